"""Tests for engine.clock: the estimate of the authority, never jumping and never running backwards, on hostile clocks."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.clock import (
    SAMPLES_MAX,
    SLEW_PPM,
    AuctionClock,
    MonotonicNs,
    SystemClock,
    UnsyncedClockError,
)
from engine.contract.clock_vote import STEP_US
from engine.domain.instants import EpochMs
from tests.fakes.clock import BORN_MS, Authority, ManualClock, Timeline


class Rig:
    """One machine and its authority; samples take as long as they are told to."""

    def __init__(self, *, seed: int = 1, drift_ppm: int = 0) -> None:
        self.line = Timeline()
        self.authority = Authority(self.line)
        self.machine = ManualClock(self.line, seed=seed, drift_ppm=drift_ppm)
        self.clock = AuctionClock(self.machine)

    def sample(self, there_ms: float = 0, back_ms: float = 0) -> bool:
        """One round trip: the authority reads its clock `there_ms` after it was asked."""
        sent = self.machine.monotonic_ns()
        self.line.advance(there_ms)
        authority_us = self.authority()
        self.line.advance(back_ms)
        return self.clock.observe(sent, self.machine.monotonic_ns(), authority_us)

    @property
    def error_us(self) -> int:
        """How far the estimate is from the truth."""
        return self.clock.now_us() - self.authority()


def test_a_clock_that_heard_nothing_cannot_be_read() -> None:
    """Before the first sample there is no auction clock, and no guess."""
    rig = Rig()
    assert not rig.clock.synced
    with pytest.raises(UnsyncedClockError):
        rig.clock.now_ms()
    with pytest.raises(UnsyncedClockError):
        rig.clock.monotonic_at(BORN_MS)
    assert rig.clock.uncertainty_us() == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_first_sample_sets_the_clock(seed: int) -> None:
    """Whatever origin the monotonic clock has, one sample without delay makes the estimate exact."""
    rig = Rig(seed=seed)
    assert rig.sample()
    assert rig.clock.synced
    assert abs(rig.error_us) <= 1
    rig.line.advance(3_600_000)
    assert abs(rig.error_us) <= 1


@given(there_ms=st.floats(0, 400), back_ms=st.floats(0, 400))
def test_the_error_is_at_most_half_the_round_trip(there_ms: float, back_ms: float) -> None:
    """However a round trip's time is divided, the estimate is wrong by at most half of it, and says so."""
    rig = Rig()
    rig.sample(there_ms, back_ms)
    half_rtt_us = (there_ms + back_ms) * 1_000 / 2
    assert abs(rig.error_us) <= half_rtt_us + 2
    assert abs(rig.clock.uncertainty_us() - half_rtt_us) <= 2


def test_the_shortest_round_trip_is_believed() -> None:
    """Among samples that were delayed on the way there, the goal is the one with the shortest round trip."""
    rig = Rig()
    for there_ms in (40, 8, 0.2, 25):
        assert rig.sample(there_ms, 0)
    assert rig.clock.uncertainty_us() <= 105
    rig.line.advance(60_000)
    assert abs(rig.error_us) <= 101
    assert rig.clock.error_us() == 0


def test_old_samples_are_worth_less() -> None:
    """A sample ages by what two oscillators may drift: after long, a longer but fresh round trip is believed."""
    rig = Rig(drift_ppm=90)
    rig.sample(0.5, 0.5)
    rig.line.advance(60_000)
    # 90 ppm for a minute: the first sample is wrong by 5.4 ms and worth 0.5 + 6 ms; this one is worth 4.
    rig.sample(4, 4)
    rig.clock.settle()
    assert abs(rig.error_us) <= 2


def test_only_the_last_samples_count() -> None:
    """A lucky sample is forgotten after `SAMPLES_MAX` others."""
    rig = Rig()
    rig.sample(0, 0)
    for _ in range(SAMPLES_MAX):
        rig.sample(0, 30)
    assert rig.clock.uncertainty_us() == 15_000


def test_the_estimate_slews_by_half_a_millisecond_per_second() -> None:
    """A difference of 10 ms is made up for in 20 s, evenly, and then not overshot."""
    rig = Rig()
    rig.sample()
    rig.authority.step(10)
    rig.line.advance(1)
    for _ in range(SAMPLES_MAX + 1):
        rig.sample()
    began = rig.error_us
    assert -10_010 <= began <= -9_990
    for second in range(1, 20):
        rig.line.advance(1_000)
        assert abs(rig.error_us - (began + 500 * second)) <= 2
    rig.line.advance(5_000)
    assert abs(rig.error_us) <= 2
    assert rig.clock.error_us() == 0


def test_what_is_still_to_be_slewed_is_known() -> None:
    """`error_us` is the distance from the best sample."""
    rig = Rig()
    rig.sample()
    rig.authority.step(-10)
    rig.line.advance(1)
    for _ in range(SAMPLES_MAX + 1):
        rig.sample()
    assert -10_010 <= rig.clock.error_us() <= -9_990


@pytest.mark.requirement("R12")
@pytest.mark.parametrize("step_ms", [10_000, -10_000])
def test_an_adopted_sample_is_all_that_counts(step_ms: int) -> None:
    """Where the estimate itself was wrong it is given up: at once, for this sample; what was heard before is forgotten."""
    rig = Rig()
    for _ in range(4):
        rig.sample(0.1, 0.1)
    rig.authority.step(step_ms)
    assert not rig.sample()
    sent = rig.machine.monotonic_ns()
    rig.clock.adopt(sent, sent, rig.authority())
    assert abs(rig.error_us) <= 1
    assert rig.sample(1, 1)
    rig.line.advance(60_000)
    assert abs(rig.error_us) <= 1_001


@pytest.mark.requirement("R12")
@pytest.mark.parametrize("step_ms", [251, -251, 3_600_000, -3_600_000])
def test_a_step_is_refused(step_ms: int) -> None:
    """A sample more than 250 ms away is no drift: it is not followed, counted, and the clock coasts on."""
    rig = Rig()
    rig.sample()
    rig.authority.step(step_ms)
    for refused in range(1, 4):
        rig.line.advance(1_000)
        assert not rig.sample()
        assert rig.clock.steps_refused == refused
        assert abs(rig.clock.now_us() - (rig.authority() - step_ms * 1_000)) <= 1
    rig.authority.step(-step_ms)
    assert rig.sample()


@pytest.mark.parametrize("step_ms", [249, -249])
def test_a_difference_within_the_bound_is_followed(step_ms: int) -> None:
    """Up to 250 ms a difference is drift."""
    rig = Rig()
    rig.sample()
    rig.authority.step(step_ms)
    assert rig.sample()
    assert rig.clock.steps_refused == 0


def test_a_slow_answer_is_no_step() -> None:
    """A sample whose round trip was long may seem far away; only what its round trip cannot explain is a step."""
    rig = Rig()
    rig.sample()
    assert rig.sample(800, 0)
    assert rig.clock.steps_refused == 0


def test_a_clock_that_began_with_a_slow_answer_recovers() -> None:
    """A first sample that was delayed for long (dead sentinels are tried first) does not make every good one a step."""
    rig = Rig()
    rig.sample(700, 0)
    assert abs(rig.error_us) > STEP_US
    assert rig.sample(0.1, 0.1)
    rig.clock.settle()
    assert abs(rig.error_us) <= 101


@pytest.mark.parametrize("step_ms", [60_000, -60_000])
def test_the_wall_clock_has_no_say(step_ms: int) -> None:
    """Somebody sets the date of this machine: nothing happens."""
    rig = Rig()
    rig.sample()
    rig.machine.step_wall(step_ms)
    rig.line.advance(500)
    assert rig.sample()
    assert abs(rig.error_us) <= 1


def test_milliseconds_are_rounded_down() -> None:
    """An instant is never reported before it is reached."""
    rig = Rig()
    rig.sample()
    rig.line.advance(0.9995)
    assert rig.clock.now_ms() == BORN_MS
    rig.line.advance(0.0015)
    assert rig.clock.now_ms() == BORN_MS + 1


@given(
    drift_ppm=st.integers(-100, 100),
    steps=st.lists(
        st.tuples(
            st.floats(0, 3_000),  # time that passes
            st.sampled_from([0, 0, 0, 1, 40, -40, 200, -200, 5_000, -5_000]),  # a step of the authority
            st.none() | st.tuples(st.floats(0, 50), st.floats(0, 50)),  # a sample and its delays
        ),
        max_size=40,
    ),
)
def test_the_clock_never_runs_backwards_and_never_jumps(drift_ppm: int, steps: list) -> None:
    """Whatever the samples say, reading is monotone, and between two readings it differs from real time by the slew."""
    rig = Rig(drift_ppm=drift_ppm)
    rig.sample(1, 1)
    before_us, before_mono_ns = rig.clock.now_us(), rig.machine.monotonic_ns()
    for pass_ms, step_ms, delays in steps:
        rig.line.advance(pass_ms)
        rig.authority.step(step_ms)
        if delays is not None:
            rig.sample(*delays)
        now_us, mono_ns = rig.clock.now_us(), rig.machine.monotonic_ns()
        passed_us = (mono_ns - before_mono_ns) / 1_000
        assert now_us >= before_us
        assert abs((now_us - before_us) - passed_us) <= passed_us * SLEW_PPM / 1_000_000 + 2
        before_us, before_mono_ns = now_us, mono_ns


@given(drift_ppm=st.integers(-90, 90), delays=st.lists(st.floats(0, 3), min_size=40, max_size=60))
def test_a_drifting_machine_stays_within_a_few_milliseconds(drift_ppm: int, delays: list[float]) -> None:
    """Sampled once a second, the estimate stays within half a usual round trip and a second's drift of the truth."""
    rig = Rig(drift_ppm=drift_ppm)
    rig.sample()
    for delay_ms in delays:
        rig.line.advance(1_000)
        rig.sample(delay_ms, 3 - delay_ms)
        assert abs(rig.error_us) <= 1_500 + 16 * 100 + 50


@given(
    drift_ppm=st.integers(-100, 100), ahead_ms=st.integers(1, 10**7), mono_ns=st.integers(0, 10**7), step=st.booleans()
)
def test_when_an_instant_will_come(drift_ppm: int, ahead_ms: int, mono_ns: int, step: bool) -> None:
    """At the monotonic time predicted for an instant the clock shows it, unless it is being slewed meanwhile."""
    rig = Rig(drift_ppm=drift_ppm)
    rig.sample()
    rig.line.advance_to(rig.line.now_ns + mono_ns)
    if step:
        rig.authority.step(20)
        rig.sample()
    instant = EpochMs(rig.clock.now_ms() + ahead_ms)
    due = rig.clock.monotonic_at(instant)
    rig.line.advance((due - rig.machine.monotonic_ns()) / 1e6 * 1_000_000 / (1_000_000 + drift_ppm))
    off_us = rig.clock.now_us() - instant * 1_000
    allowed_us = ahead_ms * SLEW_PPM / 1_000 if step else 0
    assert -10 <= off_us <= allowed_us + 10


# The real clocks.


async def test_the_system_clock_reads_this_machine() -> None:
    """Monotonic in nanoseconds, the date in milliseconds."""
    clock = SystemClock()
    first = clock.monotonic_ns()
    assert abs(clock.wall_ms() - time.time() * 1_000) < 1_000
    assert 0 <= clock.monotonic_ns() - first < 10**9
    assert abs(first - time.monotonic_ns()) < 10**9


async def test_a_sleep_ends_at_its_time() -> None:
    """Not long before it, and without being woken."""
    clock, wake = SystemClock(), asyncio.Event()
    due = MonotonicNs(clock.monotonic_ns() + 20_000_000)
    await asyncio.wait_for(clock.sleep_until(due, wake), 10)
    assert clock.monotonic_ns() >= due - 2_000_000


async def test_a_sleep_ends_when_it_is_woken() -> None:
    """Also from a sleep of a day."""
    clock, wake = SystemClock(), asyncio.Event()
    sleeping = asyncio.create_task(clock.sleep_until(MonotonicNs(clock.monotonic_ns() + 86_400 * 10**9), wake))
    await asyncio.sleep(0)
    wake.set()
    await asyncio.wait_for(sleeping, 10)


async def test_a_sleep_whose_time_is_past_gives_the_others_a_turn() -> None:
    """A scheduler that is behind must not starve the sockets: the loop runs once."""
    clock, turns = SystemClock(), []
    asyncio.get_running_loop().call_soon(turns.append, "other")
    await clock.sleep_until(MonotonicNs(clock.monotonic_ns() - 1), asyncio.Event())
    assert turns == ["other"]
    asyncio.get_running_loop().call_soon(turns.append, "another")
    awake = asyncio.Event()
    awake.set()
    await clock.sleep_until(MonotonicNs(clock.monotonic_ns() + 10**12), awake)
    assert turns == ["other", "another"]


async def test_a_cancelled_sleep_leaves_nothing_behind() -> None:
    """Its timer is taken back: the event is not set later by a sleep that nobody waits for."""
    clock, wake = SystemClock(), asyncio.Event()
    sleeping = asyncio.create_task(clock.sleep_until(MonotonicNs(clock.monotonic_ns() + 5_000_000), wake))
    await asyncio.sleep(0)
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    other = asyncio.Event()
    await clock.sleep_until(MonotonicNs(clock.monotonic_ns() + 10_000_000), other)
    assert not wake.is_set()
