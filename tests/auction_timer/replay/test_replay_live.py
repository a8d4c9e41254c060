"""The replay against the real thing: real processes, real sockets, real auctions."""

from pathlib import Path

import pytest

from auction_timer.client import Api, TimerSession, UnknownAuctionError, watch_auction
from auction_timer.replay import replay, sample_path
from engine.domain.instants import HOUR_MS
from engine.domain.lifecycle import Status
from tests.live import LiveStack

pytestmark = pytest.mark.integration

SPEED = 150_000
"""A week in four seconds; with the start's lead and the farewell of the sockets, six in all."""


@pytest.mark.requirement("R15")
@pytest.mark.requirement("B1")
async def test_the_sample_ends_as_the_rules_say(live_stack: LiveStack) -> None:
    """Twelve real auctions end exactly once, never early, with the extensions that follow from what the intake answered."""
    # Three quarters of a day are 432 ms at this speed: wide enough that snipes hit the window through a real network.
    report = await replay(
        sample_path(), url=live_stack.url, speed=SPEED, window_ms=18 * HOUR_MS, extension_ms=18 * HOUR_MS
    )
    assert report.faulty == ()
    assert report.early_closes == 0
    assert len(report.lateness_ms) == len(report.rows) == 12
    assert sum(row.extension_count for row in report.rows) >= 12


async def test_the_client_speaks_the_gateways_language(live_stack: LiveStack, tmp_path: Path) -> None:
    """Readiness, an unknown auction, a finished one over HTTP, in the list and over its socket: all as the client expects."""
    path = tmp_path / "one.csv"
    path.write_text("auction_id,item,duration_days,opening_bid,bid_days,bid,bidder\nx,Watch,1,1,0.5,1,ann\n")
    report = await replay(path, url=live_stack.url, speed=1_000_000, lead_ms=300)
    (row,) = report.rows
    async with Api(live_stack.url) as api:
        assert (await api.readyz()).ready
        assert (await api.get_timer(row.auction_id))["status"] == Status.ENDED
        listed = [timer["auction_id"] async for page in api.list_auctions(status=Status.ENDED) for timer in page]
        assert row.auction_id in listed
        with pytest.raises(UnknownAuctionError):
            await api.get_timer("nobody-knows-me")
    session = TimerSession(row.auction_id)
    frames = [frame async for frame in watch_auction(live_stack.url, row.auction_id, session=session)]
    assert [frame["type"] for frame in frames if frame["type"] != "sync"] == ["timer.snapshot"]
    assert session.is_over
