"""Tests for engine.clock_sync: in step before anyone reads the clock, and kept there, whatever the authority does."""

import asyncio
import random
from collections.abc import Callable

import pytest
from redis.exceptions import ConnectionError  # noqa: A004 - redis-py's own
from structlog.testing import capture_logs

from engine.clock import AuctionClock
from engine.clock_board import ClockBoard
from engine.clock_sync import BURST, ClockSync
from engine.contract.clock_vote import ClockReport, Verdict, read_report
from engine.domain.instants import EpochMs
from engine.store.memory import MemoryStore
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
        self.store = MemoryStore(self.authority)
        self.is_free = True
        self.judged: list[Verdict] = []
        board = ClockBoard(self.store, self.machine, "gateway", "g-1")
        self.sync = ClockSync(
            self.clock, self.ask, board=board, is_free=lambda: self.is_free, judged=self.judged.append
        )
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
    """Failures of any kind are waited out and none counts; the log says that it is away, and that it is back."""
    rig = Rig()
    rig.failures = [ConnectionError("refused"), StoreUnavailableError("away"), OSError("no route"), TimeoutError()]
    with capture_logs() as lines:
        run(rig.line, rig.sync.start)
    assert rig.asked == BURST + 4
    assert [line["event"] for line in lines] == ["clock_sample_failed", "clock_sampled_again"]
    assert lines[0]["error"] == "refused"
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
@pytest.mark.parametrize("step_ms", [60_000, -60_000, 3_600_000])
def test_a_step_of_the_authority_is_reported_and_not_followed(step_ms: int) -> None:
    """The Redis host's date jumps: the process coasts, and names it once, and once more when it is back."""
    rig = Rig()

    def jump(second: int) -> None:
        if second in (5, 15):
            rig.authority.step(step_ms if second == 5 else -step_ms)
        if second == 14:
            assert abs(rig.error_us + step_ms * 1_000) <= 500

    with capture_logs() as lines:
        running(rig, 20, jump)
    assert [(line["event"], line["odd"]) for line in lines] == [
        ("clock_verdict", "authority"),
        ("clock_verdict", "none"),
    ]
    assert 8 <= rig.judged.count(Verdict.AUTHORITY) <= 10
    assert abs(rig.error_us) <= 500
    assert rig.clock.steps_refused >= 8


@pytest.mark.requirement("R12")
@pytest.mark.parametrize("step_ms", [10_000, -3_600_000])
def test_a_step_of_the_wall_clock_is_only_said(step_ms: int) -> None:
    """It is named, for a minute, and nothing else happens; then it is a witness again, from where it then stands."""
    rig = Rig()

    def jump(second: int) -> None:
        if second == 5:
            rig.machine.step_wall(step_ms)
        if second == 80:
            assert rig.sync.verdict is Verdict.NONE
            rig.authority.step(step_ms)

    with capture_logs() as lines:
        running(rig, 90, jump)
    assert [line["odd"] for line in lines] == ["wall", "none", "authority"]
    assert 55 <= rig.judged.count(Verdict.WALL) <= 65
    assert abs(rig.error_us + step_ms * 1_000) <= 500


@pytest.mark.requirement("R12")
def test_a_date_that_is_wrong_but_steady_is_a_witness() -> None:
    """A host two hours off can still tell that it was Redis whose date was set, because its own was not."""
    rig = Rig()
    rig.machine.step_wall(7_200_000)

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(1_000)

    with capture_logs() as lines:
        running(rig, 10, jump)
    assert [line.get("odd", line["event"]) for line in lines] == ["wall_clock_differs", "authority"]


@pytest.mark.requirement("R12")
def test_three_that_differ_are_coasted_over() -> None:
    """With no majority nobody is believed; after a minute the wall clock is a witness again, and names the authority."""
    rig = Rig()

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(5_000)
            rig.machine.step_wall(-5_000)

    with capture_logs() as lines:
        running(rig, 80, jump)
    assert [line["odd"] for line in lines] == ["no_majority", "authority"]
    assert abs(rig.error_us + 5_000_000) <= 500


@pytest.mark.requirement("R12")
def test_a_single_look_says_nothing() -> None:
    """A date that was wrong for one look only is not worth a word."""
    rig = Rig()

    def jump(second: int) -> None:
        if second in (5, 6):
            rig.authority.step(10_000 if second == 5 else -10_000)

    with capture_logs() as lines:
        running(rig, 10, jump)
    assert (lines, rig.clock.steps_refused) == ([], 1)


def test_a_process_that_stands_still_between_two_readings_names_nobody() -> None:
    """On a loaded machine a second may pass between the reading of one clock and the next: they are read again."""
    rig = Rig()
    read_wall, stalls = rig.machine.wall_ms, [0]

    def wall_ms() -> EpochMs:
        read = read_wall()
        if stalls[0]:
            stalls[0] -= 1
            rig.line.advance(600)
        return read

    rig.machine.wall_ms = wall_ms  # type: ignore[method-assign]

    def stall(second: int) -> None:
        stalls[0] = 1 if 3 <= second < 9 else 0

    with capture_logs() as lines:
        running(rig, 20, stall)
    assert lines == []
    assert set(rig.judged) == {Verdict.NONE}


def sleep_of(rig: Rig, ms: int) -> None:
    """To a machine that slept, the world is later than its monotonic clock says: Redis and its own date agree on that."""
    rig.authority.step(ms)
    rig.machine.step_wall(ms)
    rig.machine.slept_ms += ms


@pytest.mark.requirement("R12")
@pytest.mark.parametrize("slept_ms", [1_000, 60_000, 3_600_000])
def test_a_machine_that_slept_takes_up_the_authority(slept_ms: int) -> None:
    """Its own extrapolation is what is odd, so the estimate jumps, within two looks."""
    rig = Rig()

    def jump(second: int) -> None:
        if second == 5:
            sleep_of(rig, slept_ms)
        if second == 8:
            assert abs(rig.error_us) <= 500

    with capture_logs() as lines:
        running(rig, 10, jump)
    assert "clock_adopted" in [line["event"] for line in lines]
    assert abs(rig.error_us) <= 500
    assert rig.sync.in_step


@pytest.mark.requirement("R12")
def test_each_sleep_counts_for_itself() -> None:
    """A machine that slept for an hour yesterday and for a minute today was a minute behind today."""
    rig = Rig()

    def jump(second: int) -> None:
        if second in (5, 15):
            sleep_of(rig, 3_600_000 if second == 5 else 60_000)

    running(rig, 20, jump)
    assert abs(rig.error_us) <= 500


@pytest.mark.requirement("R12")
@pytest.mark.requirement("B1")
def test_a_clock_does_not_jump_while_something_depends_on_it() -> None:
    """Until everything is given away it only says that it is out of step."""
    rig = Rig()
    rig.is_free = False

    def jump(second: int) -> None:
        if second == 5:
            sleep_of(rig, 10_000)
        if 8 <= second < 12:
            assert not rig.sync.in_step
            assert abs(rig.error_us + 10_000_000) <= 500
        rig.is_free = second >= 12

    running(rig, 16, jump)
    assert rig.sync.in_step
    assert abs(rig.error_us) <= 500


@pytest.mark.requirement("R12")
@pytest.mark.parametrize(("others", "jumps"), [(2, True), (1, False), (0, False)])
def test_whoever_is_outvoted_is_wrong_himself(others: int, jumps: bool) -> None:
    """Two or more others find the authority right for seconds: this machine stood still, wall clock and all."""
    rig = Rig()
    boards = [ClockBoard(rig.store, ManualClock(rig.line), "engine", f"e-{n}") for n in range(others)]

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(10_000)
        for board in boards:
            told = ClockReport("engine", 0, 0, 0, 0, Verdict.NONE, EpochMs(second))
            rig.store.clocks[board.name] = told.encode()

    with capture_logs() as lines:
        running(rig, 20, jump)
    assert ("clock_outvoted" in [line["event"] for line in lines]) is jumps
    assert (abs(rig.error_us) <= 500) is jumps
    assert rig.sync.in_step


@pytest.mark.requirement("R12")
def test_others_who_coast_too_outvote_nobody() -> None:
    """If they name the authority as well, it is the authority."""
    rig = Rig()

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(10_000)
        for n, verdict in enumerate([Verdict.AUTHORITY] * 3 + [Verdict.NONE] * 2):
            told = ClockReport("engine", 0, 0, 0, 0, verdict, EpochMs(second))
            rig.store.clocks[f"engine:e-{n}"] = told.encode()

    running(rig, 20, jump)
    assert abs(rig.error_us + 10_000_000) <= 500


@pytest.mark.requirement("R12")
def test_what_is_known_of_the_clock_is_stated() -> None:
    """Role, distance from the own date, uncertainty, what is still to be slewed, refusals and verdict, once a second."""
    rig = Rig()
    rig.machine.step_wall(-2_000)
    seen: list[ClockReport | None] = []

    def look(second: int) -> None:
        if second == 5:
            rig.authority.step(10_000)
        if second > 1:
            seen.append(read_report(rig.store.clocks["gateway:g-1"]))

    running(rig, 12, look)
    stated = [report for report in seen if report is not None]
    assert len(stated) == len(seen) == len({report.at for report in stated})
    assert all(report.role == "gateway" and abs(report.offset_ms - 2_000) <= 250 for report in stated)
    assert all(0 < report.uncertainty_ms <= 1.5 and abs(report.error_ms) <= 1 for report in stated)
    assert stated[0].verdict is Verdict.NONE
    assert stated[-1].verdict is Verdict.AUTHORITY
    assert stated[-1].steps_refused >= 4


def test_an_authority_that_is_away_is_missed_for_as_long_as_it_is() -> None:
    """Failed samples end nothing: the clock coasts and goes on being asked."""
    rig = Rig()

    def away(second: int) -> None:
        if 3 <= second < 8:
            rig.failures = [ConnectionError("away")]

    with capture_logs() as lines:
        observed = running(rig, 20, away)
    assert [line["event"] for line in lines] == ["clock_sample_failed", "clock_sampled_again"]
    assert len(observed) >= 18
    assert abs(rig.error_us) <= 201


@pytest.mark.requirement("R12")
@pytest.mark.requirement("B1")
@pytest.mark.parametrize("step_ms", [10_000, -10_000, 3_600_000])
def test_a_date_that_redis_shares_is_not_followed(step_ms: int) -> None:
    """On one machine with Redis both dates are set at once: the machine did not sleep, so no time has passed by that."""
    rig = Rig()

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(step_ms)
            rig.machine.step_wall(step_ms)

    running(rig, 10, jump)
    assert rig.sync.verdict is Verdict.AUTHORITY
    assert rig.sync.in_step
    assert abs(rig.error_us + step_ms * 1_000) <= 500


@pytest.mark.requirement("R12")
def test_a_machine_that_cannot_tell_believes_two_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the length of a sleep is unknown the vote stands."""
    rig = Rig()
    monkeypatch.setattr(rig.machine, "slept_ns", lambda: None)

    def jump(second: int) -> None:
        if second == 5:
            rig.authority.step(10_000)
            rig.machine.step_wall(10_000)

    running(rig, 10, jump)
    assert abs(rig.error_us) <= 500


def started_beside(rig: Rig, verdicts: list[Verdict], *, talks: bool = True) -> list[str]:
    """Start a process while the authority is 10 s ahead, beside others whose time is right; what was logged."""

    async def scenario() -> None:
        rig.authority.step(10_000)
        starting = asyncio.create_task(rig.sync.start())
        for _ in range(5):
            for n, verdict in enumerate(verdicts):
                right = EpochMs((rig.authority() - 10_000_000) // 1_000)
                told = ClockReport("engine", 0, 0, 0, 0, verdict, right if talks else EpochMs(7))
                rig.store.clocks[f"engine:e-{n}"] = told.encode()
            await asyncio.sleep(1)
        await starting

    with capture_logs() as lines:
        run(rig.line, scenario)
    return [line["event"] for line in lines]


@pytest.mark.requirement("R12")
@pytest.mark.requirement("B1")
@pytest.mark.parametrize("can_tell", [True, False])
@pytest.mark.parametrize("verdicts", [[Verdict.AUTHORITY], [Verdict.AUTHORITY, Verdict.AUTHORITY, Verdict.NONE]])
def test_who_starts_while_the_authority_is_wrong_takes_the_time_of_the_others(
    verdicts: list[Verdict], can_tell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their statements are samples of the right time, and from then on it coasts as they do."""
    rig = Rig()
    if not can_tell:
        monkeypatch.setattr(rig.machine, "slept_ns", lambda: None)
    assert started_beside(rig, verdicts) == ["wall_clock_differs", "clock_taken_over"]
    assert abs(rig.error_us + 10_000_000) <= 60_000
    run(rig.line, lambda: looks(rig))
    assert rig.sync.verdict is Verdict.AUTHORITY


async def looks(rig: Rig) -> None:
    """Some samples."""
    for _ in range(3):
        await rig.sync.sample()


@pytest.mark.requirement("R12")
@pytest.mark.parametrize(
    ("verdicts", "talks"),
    [([], True), ([Verdict.NONE, Verdict.NONE, Verdict.AUTHORITY], True), ([Verdict.AUTHORITY] * 3, False)],
)
def test_who_starts_with_a_wrong_date_believes_the_authority(verdicts: list[Verdict], talks: bool) -> None:
    """Where nobody else is there, most are in step with it, or only the dead had found it wrong."""
    rig = Rig()
    assert started_beside(rig, verdicts, talks=talks) == ["wall_clock_differs"]
    assert abs(rig.error_us) <= 500


def test_a_start_with_the_right_date_asks_nobody() -> None:
    """It takes no longer because others are there."""
    rig = Rig()
    rig.store.clocks["engine:e-1"] = b"{}"
    run(rig.line, rig.sync.start)
    assert rig.line.now_ns < 1_000_000_000
