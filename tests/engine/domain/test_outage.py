"""Tests for engine.domain.outage: who lost time near the end gets it back, within the caps."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.domain.auction import Auction, Registration
from engine.domain.decide import Decision, Fact
from engine.domain.events import Register
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.outage import OVERLAP_MS_MAX, extend_over
from engine.domain.policy import EXTENSION_MS_MAX, Cap, Policy
from tests.engine.domain.examples import AUCTION_ID, IN_STATUS, T0
from tests.engine.domain.strategies import Log, logs

pytestmark = pytest.mark.requirement("B8")

END = EpochMs(T0 + HOUR_MS)
OPENS = EpochMs(END - 15 * MINUTE_MS)


def registered(**policy: int) -> Auction:
    """An auction of an hour, with a window of 15 minutes."""
    return fold(Auction(AUCTION_ID), Register(Registration(AUCTION_ID, T0, END, Policy(**policy))), EpochMs(T0 - 1))[
        -1
    ].after


def hit(auction: Auction, since: int, until: int, extension_ms: int = 2 * MINUTE_MS) -> list[Decision]:
    """What an outage does."""
    return list(extend_over(auction, EpochMs(since), EpochMs(until), extension_ms))


def test_an_outage_before_the_end() -> None:
    """What was due happens first, as of its own time; then the end moves by the extension."""
    found = hit(registered(), OPENS + 1, END - 1)
    assert [decision.fact for decision in found] == [Fact.STARTED, Fact.CLOSING, Fact.OUTAGE_EXTENDED]
    assert found[-1].after.ends_at == END + 2 * MINUTE_MS
    assert found[-1].after.extension_count == 0


def test_an_outage_over_the_end() -> None:
    """The extension counts from where producers could bid again, and stands before the end in the log."""
    (*_, extended) = hit(registered(), END - 10_000, END + MINUTE_MS)
    assert extended.after.ends_at == END + 3 * MINUTE_MS
    assert extended.at == END - 1
    assert extended.details == {
        "reason": "outage",
        "previous_ends_at": END,
        "ends_at": END + 3 * MINUTE_MS,
        "clipped_by": None,
        "outage_since": END - 10_000,
        "outage_until": END + MINUTE_MS,
        "extension_ms": 2 * MINUTE_MS,
    }


@pytest.mark.parametrize(
    ("since", "until"),
    [
        (T0, OPENS),
        (T0, OPENS + OVERLAP_MS_MAX),
        (END - OVERLAP_MS_MAX, END + HOUR_MS),
        (END, END + HOUR_MS),
        (T0 - HOUR_MS, T0),
    ],
)
def test_an_outage_that_missed_the_window(since: int, until: int) -> None:
    """Before the window, after the end, or no longer than 5 s within it: nothing happens."""
    assert hit(registered(), since, until) == []


@pytest.mark.requirement("R15")
def test_the_caps_hold() -> None:
    """At most 15 minutes, never past the total cap; at the cap nothing moves."""
    (*_, far) = hit(registered(), END - 60_000, END + HOUR_MS)
    assert (far.after.ends_at, far.after.clipped_by) == (END + EXTENSION_MS_MAX, Cap.INCREMENT)
    (*_, near) = hit(registered(total_cap_ms=60_000), END - 60_000, END)
    assert (near.after.ends_at, near.after.clipped_by) == (END + 60_000, Cap.TOTAL)
    assert [decision.fact for decision in hit(registered(total_cap_ms=0), END - 60_000, END)] == [
        Fact.STARTED,
        Fact.CLOSING,
    ]


@pytest.mark.requirement("B1")
@pytest.mark.parametrize(
    "status", [Status.ENDED, Status.CANCELLED, Status.PAUSED, Status.TOMBSTONE, Status.UNREGISTERED]
)
def test_what_is_over_or_frozen_stays(status: Status) -> None:
    """A closed auction is never opened again, and a paused one loses nothing."""
    assert hit(IN_STATUS[status][0], 1, T0 + 30 * HOUR_MS) == []


@pytest.mark.requirement("B1")
@pytest.mark.requirement("R15")
@settings(max_examples=80, deadline=None)
@given(logs(), st.integers(-HOUR_MS, 3 * HOUR_MS), st.integers(1, 2 * HOUR_MS), st.integers(1, EXTENSION_MS_MAX))
def test_an_outage_never_ends_an_auction_nor_breaks_a_cap(log: Log, begins: int, lasts: int, extension_ms: int) -> None:
    """Whatever the history: the end never goes back, moves by 15 minutes at most, and stays within the total cap."""
    auction = Auction(AUCTION_ID)
    for event, arrival in log:
        auction = fold(auction, event, arrival)[-1].after
    before = auction
    for decision in hit(auction, T0 + begins, T0 + begins + lasts, extension_ms):
        assert decision.before == auction
        assert decision.after.version == auction.version + 1
        assert decision.fact is not Fact.ENDED
        auction = decision.after
    assert before.ends_at <= auction.ends_at <= before.ends_at + EXTENSION_MS_MAX
    if auction.ends_at > before.ends_at:
        assert auction.ends_at <= auction.cap_ends_at
        assert replace(auction, ends_at=before.ends_at).extension_count == before.extension_count
