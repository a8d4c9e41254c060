"""Tests for engine.domain.cadence."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.domain.auction import Auction
from engine.domain.cadence import next_tick_at, tick_step_ms
from engine.domain.decide import decide
from engine.domain.events import Bid, Resume
from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Policy
from tests.engine.domain.examples import AUCTION_ID, END, IN_STATUS, T0, at, registration

TICKING = [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING]

ticking = st.sampled_from(TICKING)
# Mostly near the bands, where the step changes.
remaining = st.one_of(
    st.integers(1, 3 * MINUTE_MS),
    st.sampled_from([MINUTE_MS, 10 * MINUTE_MS]).flatmap(lambda edge: st.integers(edge - 3, edge + 3)),
    st.integers(1, 20 * MINUTE_MS),
    st.integers(1, 7 * 24 * HOUR_MS),
)
intervals = st.one_of(st.just(15_000), st.sampled_from([100, 1_000, 5_000]), st.integers(100, 15_000))


def live(status: Status = Status.ACTIVE, tick_interval_ms: int = 15_000) -> Auction:
    """A live auction that ends at `END`."""
    policy = Policy(tick_interval_ms=tick_interval_ms)
    return Auction(AUCTION_ID, status, 1, registration(starts_at=T0, policy=policy), END)


def ticks(auction: Auction, now: EpochMs) -> list[int]:
    """The remaining times at which `auction` ticks after `now`, by asking again after each tick."""
    left = []
    while (tick := next_tick_at(auction, now)) is not None:
        assert tick > now, "the same tick again, for ever"
        left.append(auction.ends_at - tick)
        now = tick
    return left


@pytest.mark.requirement("R4")
@pytest.mark.parametrize(
    ("remaining_ms", "step_ms"),
    [
        (HOUR_MS, 15_000),
        (10 * MINUTE_MS + 1, 15_000),
        (10 * MINUTE_MS, 5_000),
        (MINUTE_MS + 1, 5_000),
        (MINUTE_MS, 1_000),
        (1, 1_000),
    ],
)
def test_the_bands(remaining_ms: int, step_ms: int) -> None:
    """15 s, 5 s from ten minutes on, 1 s from one minute on; a policy's interval can only make it shorter."""
    assert tick_step_ms(remaining_ms, 15_000) == step_ms
    for tick_interval_ms in (100, 700, 3_000, 7_000):
        assert tick_step_ms(remaining_ms, tick_interval_ms) == min(step_ms, tick_interval_ms)


@pytest.mark.requirement("R4")
def test_every_tick_of_the_last_hour() -> None:
    """By default an auction ticks at exactly these remaining times: 15 s, then 5 s, then 1 s steps, never at 0."""
    quarter = range(HOUR_MS - 15_000, 10 * MINUTE_MS, -15_000)
    five = range(10 * MINUTE_MS, MINUTE_MS, -5_000)
    one = range(MINUTE_MS, 0, -SECOND_MS)
    assert ticks(live(), T0) == [*quarter, *five, *one]


@pytest.mark.requirement("R4")
@settings(max_examples=200, deadline=None)
@given(status=ticking, remaining_ms=remaining, tick_interval_ms=intervals)
def test_the_next_tick_is_soon_and_before_the_end(status: Status, remaining_ms: int, tick_interval_ms: int) -> None:
    """The next tick comes after now, before the end, within the step; it is missing only if the end comes sooner."""
    now = EpochMs(END - remaining_ms)
    step_ms = tick_step_ms(remaining_ms, tick_interval_ms)
    tick = next_tick_at(live(status, tick_interval_ms), now)
    if tick is None:
        assert remaining_ms <= step_ms
    else:
        assert now < tick < END
        assert tick - now <= step_ms <= min(15_000, tick_interval_ms)
        # In phase with the end, or at the edge where shorter steps begin.
        assert (END - tick) % step_ms == 0 or END - tick in (10 * MINUTE_MS, MINUTE_MS)


@pytest.mark.requirement("R4")
@settings(max_examples=60, deadline=None)
@given(first_ms=st.integers(1, 15 * MINUTE_MS), tick_interval_ms=st.integers(700, 15_000))
def test_no_silence_is_longer_than_promised(first_ms: int, tick_interval_ms: int) -> None:
    """From any instant to the end, neighbouring ticks are at most 15 s and at most the policy's interval apart."""
    left = [first_ms, *ticks(live(tick_interval_ms=tick_interval_ms), EpochMs(END - first_ms)), 0]
    gaps = [earlier - later for earlier, later in pairwise(left)]
    assert all(0 < gap <= min(15_000, tick_interval_ms) for gap in gaps)
    assert all(gap <= SECOND_MS for gap, before in zip(gaps, left, strict=False) if before <= MINUTE_MS)
    assert all(gap <= 5 * SECOND_MS for gap, before in zip(gaps, left, strict=False) if before <= 10 * MINUTE_MS)


@pytest.mark.requirement("R4")
@settings(max_examples=120, deadline=None)
@given(remaining_ms=remaining, looks=st.lists(st.integers(1, 15_000), max_size=5))
def test_looking_early_does_not_move_a_tick(remaining_ms: int, looks: list[int]) -> None:
    """A scheduler that wakes in between and asks again is told the same instant, so all viewers' digits flip together."""
    auction, now = live(), EpochMs(END - remaining_ms)
    tick = next_tick_at(auction, now)
    for look_ms in looks:
        if tick is not None and now + look_ms < tick:
            assert next_tick_at(auction, EpochMs(now + look_ms)) == tick


@pytest.mark.requirement("R4")
@pytest.mark.parametrize(("edge_ms", "step_ms"), [(10 * MINUTE_MS, 5_000), (MINUTE_MS, 1_000)])
@pytest.mark.parametrize("tick_interval_ms", [15_000, 7_500, 5_000, 3_000, 1_000, 100])
def test_a_band_begins_at_its_edge(tick_interval_ms: int, edge_ms: int, step_ms: int) -> None:
    """With an interval that divides the band edges, the shorter steps begin right at ten minutes and at one minute."""
    left = ticks(live(tick_interval_ms=tick_interval_ms), EpochMs(END - edge_ms - 20_000))
    assert edge_ms in left
    assert edge_ms - min(step_ms, tick_interval_ms) in left


@pytest.mark.parametrize(
    ("tick_interval_ms", "edge_ms", "step_ms"),
    [(14_000, 10 * MINUTE_MS, 5_000), (4_700, MINUTE_MS, 1_000)],
)
def test_a_band_begins_at_its_edge_for_any_interval(tick_interval_ms: int, edge_ms: int, step_ms: int) -> None:
    """Also with an interval that does not divide the edge, no silence inside a band is longer than the band's step."""
    left = ticks(live(tick_interval_ms=tick_interval_ms), EpochMs(END - edge_ms - 20_000))
    assert edge_ms - max(remaining_ms for remaining_ms in left if remaining_ms < edge_ms) <= step_ms


@pytest.mark.requirement("R4")
def test_a_moved_deadline_locks_the_phase_again() -> None:
    """After an extension the ticks fall on round remaining times of the new end."""
    auction, _ = IN_STATUS[Status.CLOSING]
    arrival = EpochMs(END - 7 * MINUTE_MS + 123)
    extended = decide(auction, Bid("b"), arrival).after
    assert extended.ends_at == arrival + 15 * MINUTE_MS
    tick = next_tick_at(extended, arrival)
    assert tick is not None
    assert extended.ends_at - tick == 15 * MINUTE_MS - 15 * SECOND_MS


def test_a_paused_auction_keeps_ticking() -> None:
    """While paused the ticks come at the policy's interval for ever, and lock to the remaining time after a resume."""
    auction, now = IN_STATUS[Status.PAUSED]
    assert next_tick_at(auction, now) == now + 15_000
    far = at(1_000 * HOUR_MS)
    assert next_tick_at(auction, far) == far + 15_000
    resumed = decide(auction, Resume(), now).after
    tick = next_tick_at(resumed, now)
    assert tick is not None
    assert (resumed.ends_at - tick) % 15_000 == 0


@pytest.mark.requirement("R27")
@pytest.mark.parametrize("status", [Status.UNREGISTERED, Status.TOMBSTONE, Status.ENDED, Status.CANCELLED])
def test_what_is_not_live_does_not_tick(status: Status) -> None:
    """An auction that is over, or that nobody registered, leaves no pending tick."""
    auction, now = IN_STATUS[status]
    assert next_tick_at(auction, now) is None
    assert next_tick_at(auction, EpochMs(1)) is None


@pytest.mark.parametrize("status", TICKING)
@pytest.mark.parametrize("late_ms", [0, 1, HOUR_MS])
def test_an_overdue_auction_does_not_tick(status: Status, late_ms: int) -> None:
    """At and after the end there is no tick: the next thing said is the close."""
    assert next_tick_at(live(status), EpochMs(END + late_ms)) is None
