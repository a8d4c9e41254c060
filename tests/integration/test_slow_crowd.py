"""Two hundred watchers of one auction on a real gateway, of whom one in twenty stops reading."""

import asyncio
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.integration.crowd import Watcher, behind, crowd, gaps, lane, until
from tests.integration.events import bid, fresh_id, started
from tests.integration.own_role import OwnGateway
from tests.live import LiveStack

pytestmark = pytest.mark.integration

HOUR_MS: Final = 3_600_000
READERS: Final = 190
LATE: Final = 5
"""They read again while what waits for them is within the bounds."""
STUCK: Final = 5
"""They do not."""
OUTBOX_BYTES_MAX: Final = 262_144
OUTBOX_AGE_MAX_MS: Final = 30_000
"""Longer than the test: here it is the bytes that count."""
BATCH: Final = 20
KERNEL_BYTES_MAX: Final = 160_000
"""What the kernel takes for a socket with small buffers, both ends, and some."""
TRANSPORT_BYTES: Final = 65_536
RSS_GROWTH_BYTES_MAX: Final = 32 * 1_048_576


async def bids_until(stack: LiveStack, auction_id: str, reader: Watcher, event_bytes: int) -> None:
    """Bid until a reader was sent so many bytes of events; it is told of each batch before the next, so it gets no burst."""
    began = reader.event_bytes

    def told() -> int:
        return sum(name == "bid.accepted" for name, _ in reader.order)

    expected = told()
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=30) as http, asyncio.timeout(60):
        while reader.event_bytes - began < event_bytes:
            answer = await http.post("/events", json=[bid(auction_id) for _ in range(BATCH)])
            assert answer.status_code == 202
            expected += BATCH
            while told() < expected:
                await asyncio.sleep(0.01)


async def cut_with_4101(gateway: OwnGateway) -> float:
    """Sockets that a gateway has closed because they did not read."""
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=10) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    found = [line for line in lines if line.startswith("auctions_gateway_disconnects_total{") and '"4101"' in line]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


@pytest.mark.requirement("B3", "B4", "R7")
async def test_who_does_not_read_delays_nobody_and_costs_no_more_than_its_bounds(short_tmp: Path) -> None:
    """The others get everything in time order; who reads again within the bound lost nothing; past it 4101, and a resume."""
    stack = await asyncio.to_thread(LiveStack, short_tmp)
    gateway: OwnGateway | None = None
    try:
        gateway = await asyncio.to_thread(
            OwnGateway, stack, OUTBOX_BYTES_MAX=OUTBOX_BYTES_MAX, OUTBOX_AGE_MAX_MS=OUTBOX_AGE_MAX_MS
        )
        auction_id = fresh_id()
        now = stack.post(bid(fresh_id()))[0]["arrival_ms"]
        # Every bid moves the end, so each is two events.
        policy = {"soft_close_window_ms": HOUR_MS, "extension_ms": 900_000, "extends_on": "any_accepted"}
        stack.post(started(auction_id, now, now + 600_000, **policy))
        stack.until_status(auction_id, "CLOSING")
        readers = [Watcher(auction_id) for _ in range(READERS)]
        late, stuck = [[Watcher(auction_id, small_buffers=True) for _ in range(count)] for count in (LATE, STUCK)]
        everyone = [*readers, *late, *stuck]
        async with crowd(*everyone, port=gateway.port):
            rss_bytes = gateway.rss_bytes()
            for watcher in (*late, *stuck):
                assert watcher.transport is not None
                watcher.transport.pause_reading()
            # More than the kernel and the transport take, less than their outboxes do besides.
            await bids_until(stack, auction_id, readers[0], KERNEL_BYTES_MAX + TRANSPORT_BYTES + 50_000)
            assert await cut_with_4101(gateway) == 0
            for watcher in late:
                assert watcher.transport is not None
                assert watcher.event_bytes < KERNEL_BYTES_MAX, "it would have read"
                watcher.transport.resume_reading()
            await until(
                lambda: all(watcher.since == readers[0].since for watcher in late), "the late ones are up", late
            )
            await bids_until(stack, auction_id, readers[0], OUTBOX_BYTES_MAX + 100_000)
            async with asyncio.timeout(30):
                while await cut_with_4101(gateway) < STUCK:
                    await asyncio.sleep(0.05)
            assert gateway.rss_bytes() - rss_bytes < RSS_GROWTH_BYTES_MAX
            for watcher in stuck:
                assert watcher.transport is not None
                watcher.transport.resume_reading()
            await until(lambda: all(watcher.lost and watcher.connected for watcher in stuck), "they are back", stuck)
            last = (await asyncio.to_thread(lane, stack, [auction_id]))[auction_id][-1][0]
            await until(
                lambda: all(not behind([(last, "")], watcher.since or "") for watcher in everyone),
                "all is told",
                everyone,
            )
            assert gaps(everyone, await asyncio.to_thread(lane, stack, [auction_id])) == []
            _judge(readers, late, stuck)
            assert await cut_with_4101(gateway) == STUCK
    finally:
        if gateway is not None:
            gateway.stop()
        assert await asyncio.to_thread(stack.stop) == 0


def _judge(readers: list[Watcher], late: list[Watcher], stuck: list[Watcher]) -> None:
    for watcher in (*readers, *late):
        assert not watcher.lost
        assert not watcher.closes
        sent_at = [at for name, at in watcher.order if name != "timer.tick"]
        assert sent_at == sorted(sent_at)
    for watcher in stuck:
        # Whose connection is reset before it has read so far does not see the close frame; the metric does.
        assert {code for code, _ in watcher.closes} <= {4101}
        assert [shot["recovered"] for shot in watcher.snapshots] == [None, True]
