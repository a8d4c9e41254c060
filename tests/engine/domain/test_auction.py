"""Tests for engine.domain.auction."""

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.domain.auction import Auction, Offer, Registration
from engine.domain.decide import Fact
from engine.domain.events import Bid
from engine.domain.fold import elapse, fold
from engine.domain.instants import EPOCH_MS_MAX, HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import ExtensionMode, Policy
from tests.engine.domain.examples import AUCTION_ID, END, IN_STATUS, PAUSED_WHILE_CLOSING, T0, at, registration
from tests.engine.domain.strategies import Log, logs, registrations


def closing(policy: Policy, **changes: object) -> Auction:
    """A closing auction under `policy`, with some fields changed."""
    auction = Auction(AUCTION_ID, Status.CLOSING, 3, registration(policy=policy), END)
    return replace(auction, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("starts_at", "ends_at"),
    [(0, 10), (-1, 10), (10, 10), (11, 10), (1, EPOCH_MS_MAX + 1)],
)
def test_a_schedule_must_run_forward_inside_the_calendar(starts_at: int, ends_at: int) -> None:
    """A registration without duration, before the epoch or past the year 9999 is refused, with both instants named."""
    with pytest.raises(ValueError, match=f"not {starts_at} and {ends_at}$"):
        Registration("a", EpochMs(starts_at), EpochMs(ends_at))


def test_the_widest_schedule_is_allowed() -> None:
    """The first and the last representable instants are inside the bounds, and so is one millisecond of duration."""
    assert Registration("a", EpochMs(1), EPOCH_MS_MAX).ends_at == EPOCH_MS_MAX
    assert Registration("a", EpochMs(1), EpochMs(2)).starts_at == 1


@pytest.mark.requirement("R2")
@pytest.mark.parametrize(
    "other",
    [
        {"starts_at": at(1)},
        {"ends_at": at(HOUR_MS + 1)},
        {"policy": Policy(max_extensions=3)},
        {"offer": Offer(offer_id="offer-1")},
        {"auction_id": "lot-8"},
    ],
)
def test_registrations_are_the_same_iff_every_term_is(other: dict[str, object]) -> None:
    """Equality, which decides about a registration that comes again, looks at every term."""
    assert registration() == registration()
    assert registration(**other) != registration()


def test_an_auction_cannot_be_edited() -> None:
    """A change is a new value; the old one stays what it was."""
    with pytest.raises(FrozenInstanceError):
        Auction(AUCTION_ID).version = 1  # type: ignore[misc]


def test_an_unregistered_auction_has_no_terms() -> None:
    """Asking an auction without a registration for its terms says which one it is and how it stands."""
    with pytest.raises(AssertionError, match="lot-7 is TOMBSTONE"):
        _ = IN_STATUS[Status.TOMBSTONE][0].policy


@pytest.mark.requirement("B6")
def test_the_derived_instants_of_a_fresh_auction() -> None:
    """Before any bid: nothing used, everything left, the window 15 minutes before the end, the cap 24 hours after."""
    auction = IN_STATUS[Status.SCHEDULED][0]
    assert auction.base_ends_at == auction.ends_at == END
    assert auction.cap_ends_at == auction.final_deadline == END + 24 * HOUR_MS
    assert auction.window_opens_at == END - 15 * MINUTE_MS
    assert (auction.extension_used_ms, auction.extension_left_ms, auction.at_cap) == (0, 24 * HOUR_MS, False)


def test_the_window_never_opens_before_the_start() -> None:
    """A window longer than the auction opens with the auction."""
    assert closing(Policy(soft_close_window_ms=2 * HOUR_MS)).window_opens_at == T0


@pytest.mark.requirement("B6")
@pytest.mark.parametrize(
    ("moved_ms", "used_ms", "left_ms", "at_cap"),
    [
        (0, 0, 30 * MINUTE_MS, False),
        (10 * MINUTE_MS, 10 * MINUTE_MS, 20 * MINUTE_MS, False),
        (30 * MINUTE_MS - 1, 30 * MINUTE_MS - 1, 1, False),
        (30 * MINUTE_MS, 30 * MINUTE_MS, 0, True),
        (-10 * MINUTE_MS, 0, 40 * MINUTE_MS, False),
    ],
)
def test_used_and_left_add_up_to_the_cap(moved_ms: int, used_ms: int, left_ms: int, at_cap: bool) -> None:
    """What is used and what is left follow from where the end stands; a shortened auction has used nothing."""
    auction = closing(Policy(total_cap_ms=30 * MINUTE_MS), ends_at=END + moved_ms)
    assert (auction.extension_used_ms, auction.extension_left_ms, auction.at_cap) == (used_ms, left_ms, at_cap)


@pytest.mark.requirement("B6")
@pytest.mark.parametrize(
    ("count", "final_deadline", "left_ms"),
    [
        (0, END + 30 * MINUTE_MS, 40 * MINUTE_MS),
        (1, END + 20 * MINUTE_MS, 40 * MINUTE_MS),
        (2, END + 10 * MINUTE_MS, 40 * MINUTE_MS),
        (3, END, 0),
        (4, END, 0),
    ],
)
def test_the_count_cap_limits_the_final_deadline(count: int, final_deadline: int, left_ms: int) -> None:
    """With three extensions of ten minutes allowed, each one made leaves ten minutes less; after the third, none."""
    policy = Policy(extension_ms=10 * MINUTE_MS, max_extensions=3, total_cap_ms=40 * MINUTE_MS)
    auction = closing(policy, extension_count=count)
    assert auction.final_deadline == final_deadline
    assert auction.extension_left_ms == left_ms
    assert auction.at_cap == (left_ms == 0)


@pytest.mark.requirement("B6")
def test_the_total_cap_limits_the_final_deadline() -> None:
    """Where both caps are set, the nearer one is the final deadline."""
    policy = Policy(extension_ms=10 * MINUTE_MS, max_extensions=3, total_cap_ms=25 * MINUTE_MS)
    assert closing(policy).final_deadline == END + 25 * MINUTE_MS


def test_a_pause_moves_the_base_and_the_cap_with_it() -> None:
    """Time spent paused is no extension: base and cap move by it, what is used does not."""
    auction = closing(Policy(), paused_total_ms=HOUR_MS, ends_at=END + HOUR_MS)
    assert auction.base_ends_at == END + HOUR_MS
    assert auction.cap_ends_at == END + 25 * HOUR_MS
    assert auction.extension_used_ms == 0


@pytest.mark.parametrize(
    ("offset_ms", "remaining_ms"),
    [(0, HOUR_MS), (HOUR_MS - 1, 1), (HOUR_MS, 0), (HOUR_MS + 1, 0), (-HOUR_MS, 2 * HOUR_MS)],
)
def test_the_countdown_stops_at_zero(offset_ms: int, remaining_ms: int) -> None:
    """Remaining time is the distance to the end and never negative."""
    auction = IN_STATUS[Status.ACTIVE][0]
    assert auction.remaining_ms(at(offset_ms)) == remaining_ms
    assert auction.paused_remaining_ms is None


def test_a_paused_countdown_stands_still() -> None:
    """While paused, the remaining time is what it was at the pause, whenever one looks."""
    assert PAUSED_WHILE_CLOSING.paused_remaining_ms == 10 * MINUTE_MS
    for offset_ms in (50 * MINUTE_MS, HOUR_MS, 100 * HOUR_MS):
        assert PAUSED_WHILE_CLOSING.remaining_ms(at(offset_ms)) == 10 * MINUTE_MS


@pytest.mark.requirement("B6")
@settings(max_examples=60, deadline=None)
@given(registered=registrations(), data=st.data())
def test_no_bid_passes_the_announced_final_deadline(registered: Registration, data: st.DataObject) -> None:
    """However bids come, the end stays at or before each final deadline announced before, and `at_cap` stops it."""
    auction = Auction(AUCTION_ID, Status.SCHEDULED, 1, registered, registered.ends_at)
    announced = auction.final_deadline
    for _ in range(12):
        standing = auction
        arrival = EpochMs(standing.ends_at - data.draw(st.integers(1, 5 * MINUTE_MS)))
        assume(arrival >= registered.starts_at)
        auction = fold(standing, Bid("b"), arrival)[-1].after
        assert auction.ends_at <= auction.final_deadline <= announced
        if standing.at_cap:
            assert auction.ends_at == standing.ends_at
        announced = auction.final_deadline


@pytest.mark.requirement("B6")
@pytest.mark.parametrize("max_extensions", [1, 3, None])
def test_the_final_deadline_is_reached(max_extensions: int | None) -> None:
    """The announced final deadline is no mere bound: bids in the last millisecond, in `add` mode, do reach it."""
    policy = Policy(
        mode=ExtensionMode.ADD,
        extension_ms=10 * MINUTE_MS,
        total_cap_ms=45 * MINUTE_MS,
        max_extensions=max_extensions,
    )
    auction = Auction(AUCTION_ID, Status.SCHEDULED, 1, registration(policy=policy), END)
    announced = auction.final_deadline
    for _ in range(6):
        auction = fold(auction, Bid("b"), EpochMs(auction.ends_at - 1))[-1].after
    assert auction.ends_at == announced
    assert auction.at_cap


@pytest.mark.requirement("R15")
@settings(max_examples=60, deadline=None)
@given(log=logs())
def test_used_and_left_follow_the_end_through_any_history(log: Log) -> None:
    """In every state a log leads to, the derived amounts agree with the instants they are derived from."""
    auction = Auction(AUCTION_ID)
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            auction = decision.after
            if auction.registration is None:
                continue
            moved_ms = auction.ends_at - auction.registration.ends_at - auction.paused_total_ms
            assert auction.extension_used_ms == max(0, moved_ms)
            assert auction.extension_left_ms in (0, auction.policy.total_cap_ms - moved_ms)
            assert auction.at_cap == (auction.extension_left_ms == 0)
            assert auction.ends_at <= auction.final_deadline <= auction.cap_ends_at
            if decision.fact is Fact.ENDED:
                assert auction.remaining_ms(auction.ends_at) == 0
    assert list(elapse(auction, arrival)) == []
