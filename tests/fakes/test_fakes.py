"""The fakes themselves: a test that rests on them is worth no more than they are."""

import asyncio

import pytest

from tests.fakes.clock import BORN_MS, Authority, ManualClock, Timeline
from tests.fakes.loop import NothingEndsError, NothingWillHappenError, run


@pytest.mark.parametrize("drift_ppm", [-100, 0, 100])
def test_a_machine_has_its_own_view_of_time(drift_ppm: int) -> None:
    """Another origin, another rate, another date; and a step moves the date alone."""
    line = Timeline()
    one, other = ManualClock(line, seed=1, drift_ppm=drift_ppm), ManualClock(line, seed=2)
    assert one.monotonic_ns() != other.monotonic_ns()
    began, other_began, wall = one.monotonic_ns(), other.monotonic_ns(), one.wall_ms()
    one.advance(1_000)
    assert one.monotonic_ns() - began == 10**9 + drift_ppm * 1_000
    assert other.monotonic_ns() - other_began == 10**9
    assert one.wall_ms() == wall + 1_000
    one.step_wall(-5_000)
    assert one.wall_ms() == wall - 4_000
    assert Authority(line).now_ms == BORN_MS + 1_000


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("drift_ppm", [-100, 0, 100])
async def test_a_sleep_is_driven_by_advance(drift_ppm: int, hostile: bool) -> None:
    """It ends when time is made to pass, not before it is nearly due, and at once when it is woken."""
    clock = ManualClock(seed=3, drift_ppm=drift_ppm, hostile=hostile)
    for _ in range(20):
        wake, due = asyncio.Event(), clock.monotonic_ns() + 50_000_000
        sleeping = asyncio.create_task(clock.sleep_until(due, wake))
        await asyncio.sleep(0)
        clock.advance(48)
        await asyncio.sleep(0)
        assert not sleeping.done()
        clock.advance(2.1)
        await sleeping
        assert clock.monotonic_ns() >= due
    wake = asyncio.Event()
    sleeping = asyncio.create_task(clock.sleep_until(clock.monotonic_ns() + 10**12, wake))
    await asyncio.sleep(0)
    wake.set()
    await sleeping
    assert clock.timeline.next_ns is None, "nothing is left behind"


def test_virtual_time_passes_by_itself() -> None:
    """In the order of what is due, asyncio's timers and a machine's sleeps alike, and without waiting."""
    line = Timeline()
    clock = ManualClock(line, hostile=False)
    order: list[str] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(name)

    async def scenario() -> None:
        tasks = [asyncio.create_task(sleeper("an hour", 3_600)), asyncio.create_task(sleeper("a minute", 60))]
        await clock.sleep_until(clock.monotonic_ns() + 90 * 10**9, asyncio.Event())
        order.append("90 seconds")
        await asyncio.gather(*tasks)

    run(line, scenario)
    assert order == ["a minute", "90 seconds", "an hour"]
    assert 3_600 <= line.now_ns / 1e9 < 3_600.001


def test_a_wait_for_nothing_is_an_error() -> None:
    """Instead of a test that hangs."""
    with pytest.raises(NothingWillHappenError):
        run(Timeline(), lambda: asyncio.Event().wait())


def test_work_without_end_is_an_error() -> None:
    """Instead of a test that hangs."""

    async def busy() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(NothingEndsError):
        run(Timeline(), busy)
