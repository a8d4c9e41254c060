"""Tests for engine.clock_sync: in step before anyone reads the clock, and kept there, whatever the authority does."""

import asyncio
import random
from collections.abc import Callable

import pytest
from redis.exceptions import ConnectionError  # noqa: A004 - redis-py's own
from structlog.testing import capture_logs

from engine.clock import AuctionClock
from engine.clock_sync import BURST, ClockSync
from engine.store.protocol import StoreUnavailableError
from tests.fakes.clock import Authority, ManualClock, Timeline
from tests.fakes.loop import run


class Rig:
    """A machine whose questions to the authority take as long as `delay_ms` says, half of it each way."""

    def __init__(self, *, seed: int = 3, drift_ppm: int = 0) -> None:
        self.line = Timeline()
        self.authority = Authority(self.line)
        self.machine = ManualClock(self.line, seed=seed, drift_ppm=drift_ppm)
        self.clock = AuctionClock(self.machine)
        self.sync = ClockSync(self.clock, self.ask)
        self.asked = 0
        self.failures: list[Exception] = []
        self.delay_ms: Callable[[], tuple[float, float]] = lambda: (0.2, 0.2)

    async def ask(self) -> int:
        """What the store would do."""
        self.asked += 1
        there_ms, back_ms = self.delay_ms()
        await asyncio.sleep(there_ms / 1_000)
        if self.failures:
            raise self.failures.pop(0)
        authority_us = self.authority()
        await asyncio.sleep(back_ms / 1_000)
        return authority_us

    @property
    def error_us(self) -> int:
        """How far the estimate is from the truth."""
        return self.clock.now_us() - self.authority()


@pytest.mark.parametrize("seed", range(4))
def test_the_start_ends_in_step(seed: int) -> None:
    """After the burst the clock is as right as its best sample, at once and without slewing."""
    rig = Rig(seed=seed)
    delays = random.Random(seed)
    rig.delay_ms = lambda: (delays.uniform(0.05, 90), delays.uniform(0.05, 90))
    run(rig.line, rig.sync.start)
    assert rig.asked == BURST
    assert rig.clock.error_us() == 0
    assert abs(rig.error_us) <= rig.clock.uncertainty_us() + 2


@pytest.mark.requirement("R16")
def test_the_start_waits_for_an_authority_that_is_away() -> None:
    """Failures of any kind are waited out; each is logged and none counts."""
    rig = Rig()
    rig.failures = [ConnectionError("refused"), StoreUnavailableError("away"), OSError("no route"), TimeoutError()]
    with capture_logs() as lines:
        run(rig.line, rig.sync.start)
    assert rig.asked == BURST + 4
    assert [line["event"] for line in lines] == ["clock_sample_failed"] * 4
    assert rig.line.now_ns >= 4 * 250_000_000


def test_a_slow_first_answer_does_not_hold_up_the_start() -> None:
    """The first question may meet dead sentinels and a connection to be made: all its delay lies before the answer."""
    rig = Rig()
    delays = iter([(900.0, 0.1)])
    rig.delay_ms = lambda: next(delays, (0.1, 0.1))

    async def scenario() -> None:
        async with asyncio.timeout(60):
            await rig.sync.start()

    run(rig.line, scenario)
    assert abs(rig.error_us) <= 101


@pytest.mark.parametrize(("step_ms", "warned"), [(0, False), (2_000, True), (-2_000, True)])
def test_a_wall_clock_that_differs_is_reported_at_the_start(step_ms: int, warned: bool) -> None:
    """This machine's date is only a witness: more than 250 ms off it is worth a warning, which names the distance."""
    rig = Rig()
    rig.machine.step_wall(step_ms)
    with capture_logs() as lines:
        run(rig.line, rig.sync.start)
    assert [line["event"] for line in lines] == ["wall_clock_differs"] * warned
    if warned:
        assert abs(lines[0]["by_ms"] + step_ms) <= 250
    assert abs(rig.error_us) <= 201


def running(rig: Rig, seconds: float, during: Callable[[int], None] = lambda _second: None) -> list[float]:
    """Start, keep in step for some seconds, and return what was observed; `during` is called once a second."""
    observed: list[float] = []

    async def scenario() -> None:
        await rig.sync.start()
        task = asyncio.create_task(rig.sync.run(observed.append))
        for second in range(int(seconds)):
            during(second)
            await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(rig.line, scenario)
    return observed


@pytest.mark.parametrize("drift_ppm", [-90, 0, 90])
def test_a_drifting_machine_is_kept_in_step(drift_ppm: int) -> None:
    """For ten minutes, with delays of up to 5 ms each way, the estimate stays within a few milliseconds."""
    rig = Rig(drift_ppm=drift_ppm)
    delays = random.Random(drift_ppm)
    rig.delay_ms = lambda: (delays.uniform(0.1, 5), delays.uniform(0.1, 5))
    errors: list[int] = []
    observed = running(rig, 600, lambda _second: errors.append(abs(rig.error_us)))
    assert max(errors) <= 5_000
    assert len(observed) >= 590
    assert max(observed) < 5


@pytest.mark.requirement("R12")
def test_a_step_of_the_authority_is_reported_and_not_followed() -> None:
    """The Redis host's date jumps by a minute: the process coasts, and says so once per sample."""
    rig = Rig()

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(60_000)

    with capture_logs() as lines:
        running(rig, 10, jump)
    events = [line["event"] for line in lines]
    assert set(events) == {"clock_step_refused"}
    assert 3 <= len(events) <= 6
    assert lines[-1]["refused"] == len(events)
    assert abs(rig.error_us + 60_000_000) <= 500


def test_an_authority_that_is_away_is_missed_for_as_long_as_it_is() -> None:
    """Failed samples end nothing: the clock coasts and goes on being asked."""
    rig = Rig()

    def away(second: int) -> None:
        if 3 <= second < 8:
            rig.failures = [ConnectionError("away")]

    with capture_logs() as lines:
        observed = running(rig, 20, away)
    assert [line["event"] for line in lines] == ["clock_sample_failed"] * 5
    assert len(observed) >= 18
    assert abs(rig.error_us) <= 201
