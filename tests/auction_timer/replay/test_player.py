"""The driver, against a server of the real rules on virtual time: a good run is found good, each fault is found."""

from pathlib import Path
from typing import Any

import pytest

from auction_timer.client import GatewayAwayError
from auction_timer.replay import ReplayError, ReplayProgress, ReplayReport, replay, sample_path
from auction_timer.replay.history import HistoryError
from auction_timer.replay.plan import PlanError
from auction_timer.replay.player import SETTLE_MS, Phase
from engine.domain.instants import HOUR_MS, MINUTE_MS
from engine.domain.policy import ExtensionMode
from tests.auction_timer.replay.examples import SPEED, csv_text
from tests.auction_timer.replay.world import Faults, World, all_ended
from tests.fakes.clock import ManualClock, Timeline
from tests.fakes.loop import run

URL = "http://world"


def play(path: Path, faults: Faults | None = None, **options: Any) -> tuple[ReplayReport, World]:
    """Replay a file against a world with these faults."""
    timeline = Timeline()
    world = World(timeline, faults or Faults())
    clock = options.pop("clock", None) or ManualClock(timeline, seed=7)
    clock.timeline = timeline
    options = {"speed": SPEED, "auction_prefix": "p"} | options

    async def scenario() -> ReplayReport:
        return await replay(path, url=URL, clock=clock, transport=world.transport(), watcher=world.watch, **options)

    return run(timeline, scenario), world


@pytest.fixture
def history_file(tmp_path: Path) -> Path:
    """Two auctions, the first extended once at the speed of the examples, the second with a late bid."""
    path = tmp_path / "history.csv"
    path.write_text(csv_text())
    return path


def test_a_good_server_is_found_good(history_file: Path) -> None:
    """The ends, the extensions and the late bid are what the rules say; every figure of the report follows."""
    report, world = play(history_file)
    assert report.faulty == ()
    assert report.exit_code == 0
    assert all_ended(world)
    first, second = report.rows
    assert (first.auction_id, first.bids, first.extension_count, first.late_bids) == ("p-x1", 3, 1, 0)
    assert 0 < first.ends_at - first.original_ends_at <= 625
    assert (second.extension_count, second.late_bids, second.ends_at) == (0, 1, second.original_ends_at)
    assert report.early_closes == report.reconnects == report.gaps == report.resent == 0
    assert all(ms <= 2 for ms in report.lateness_ms)


@pytest.mark.parametrize("mode", list(ExtensionMode))
def test_the_sample_plays_in_every_mode(mode: ExtensionMode) -> None:
    """Real snipes extend real auctions, to their caps, and all is as the fold says."""
    report, world = play(
        sample_path(),
        speed=7_200,
        mode=mode,
        window_ms=24 * HOUR_MS,
        extension_ms=6 * HOUR_MS,
        total_cap_ms=8 * HOUR_MS,
    )
    assert report.faulty == ()
    assert len(report.rows) == 12
    assert sum(row.extension_count for row in report.rows) > 12
    assert {row.clipped_by for row in report.rows} >= ({"total"} if mode is ExtensionMode.ADD else {None})
    assert sum(world.posts) == 12 + 247


def test_bids_are_sent_when_they_are_due(history_file: Path) -> None:
    """Each bid arrives within a few milliseconds of its share of the time, though the machine has another date."""
    timeline = Timeline()
    clock = ManualClock(timeline, seed=3, drift_ppm=200)
    report, world = play(history_file, clock=clock)
    assert report.exit_code == 0
    starts_at = world.auctions["p-x1"].registered.starts_at
    due = {"p-x1:bid-1": 30_000, "p-x1:bid-2": 59_700, "p-x2:bid-1": 15_000, "p-x2:bid-2": 150_000}
    for event_id, due_ms in due.items():
        assert abs(world.seen[event_id] - starts_at - due_ms) <= 40


def test_a_date_of_its_own_does_not_matter(history_file: Path) -> None:
    """If the server's header says it lives in another year, the auctions start there."""
    timeline = Timeline()
    clock = ManualClock(timeline, seed=3)
    clock.step_wall(-400 * 24 * HOUR_MS)
    report, world = play(history_file, Faults(date="Fri, 15 Jan 2027 08:00:01 GMT"), clock=clock)
    assert report.faulty == ()
    lead_ms = world.auctions["p-x1"].registered.starts_at - world.seen["p-x1:start"]
    assert 0 < lead_ms < 4_000


def test_a_server_that_is_away_for_a_while_gets_everything(history_file: Path) -> None:
    """Requests are repeated with the same ids, and the verdict still holds."""
    report, world = play(history_file, Faults(away_posts=4))
    assert report.faulty == ()
    assert report.resent == 4
    assert len(world.seen) == 2 + 5


def test_an_engine_that_is_a_moment_behind_is_waited_for(history_file: Path) -> None:
    """A handshake that is answered 404 right after the registration is tried again."""
    report, _ = play(history_file, Faults(unknown_handshakes=6))
    assert report.faulty == ()


def test_an_auction_that_never_becomes_known_is_a_fault(history_file: Path) -> None:
    """Where the socket stays unknown, the others are still played and judged."""
    report, _ = play(history_file, Faults(unknown_handshakes=10**9))
    assert len(report.faulty) == 2
    assert any("knows no auction p-x1" in fault for fault in report.rows[0].faults)
    assert any("timer.ended was received 0 times" in fault for fault in report.rows[0].faults)


def test_a_gap_that_was_admitted_is_no_fault(history_file: Path) -> None:
    """Where the server says that events are missing, an end that only a snapshot shows is enough."""
    report, _ = play(history_file, Faults(gap=True))
    assert report.faulty == ()
    assert (report.gaps, report.reconnects) == (2, 2)
    assert report.lateness_ms == ()


@pytest.mark.parametrize(
    ("faults", "auction_id", "told"),
    [
        (Faults(deaf=True), "p-x1", "extension_count is 0, expected 1"),
        (Faults(ends_twice=True), "p-x1", "timer.ended was received 2 times"),
        (Faults(early_ms=1), "p-x2", "timer.ended was sent before the end"),
        (Faults(generous_ms=700), "p-x1", "an extension moved the end by"),
        (Faults(never_ends="p-x1"), "p-x1", f"did not end within {SETTLE_MS // 1_000} s"),
        (Faults(no_timers=True), "p-x2", "its final timer could not be read"),
    ],
)
def test_a_fault_is_found(history_file: Path, faults: Faults, auction_id: str, told: str) -> None:
    """Whatever the server does wrong is named at the auction it happened to, and fails the run."""
    report, _ = play(history_file, faults)
    assert report.exit_code == 1
    (row,) = (row for row in report.rows if row.auction_id == auction_id)
    assert any(told in fault for fault in row.faults), row.faults
    assert report.early_closes == (2 if faults.early_ms else 0)


def test_progress_runs_through_its_phases(history_file: Path) -> None:
    """Whoever shows progress hears of every phase, and the counts end at their totals."""
    told: list[ReplayProgress] = []
    play(history_file, on_progress=told.append)
    assert list(dict.fromkeys(now.phase for now in told)) == list(Phase)
    last = told[-1]
    assert (last.registered, last.watched, last.sent, last.ended) == (2, 2, 5, 2)
    assert (last.auctions, last.bids, last.extensions) == (2, 5, 1)


def test_a_limit_plays_fewer(history_file: Path) -> None:
    """Only the first auctions of the file are registered."""
    report, world = play(history_file, limit=1)
    assert [row.auction_id for row in report.rows] == ["p-x1"]
    assert set(world.auctions) == {"p-x1"}


def test_a_random_prefix_makes_runs_independent(history_file: Path) -> None:
    """Without a prefix two runs against one server do not meet."""
    first, _ = play(history_file, auction_prefix=None)
    second, _ = play(history_file, auction_prefix=None)
    assert {row.auction_id for row in first.rows}.isdisjoint(row.auction_id for row in second.rows)


def test_a_prefix_that_was_used_is_refused(history_file: Path) -> None:
    """Events that are known already would be judged by another run's arrivals."""
    timeline = Timeline()
    world = World(timeline)

    async def twice() -> None:
        options: dict[str, Any] = {"url": URL, "speed": SPEED, "auction_prefix": "p", "watcher": world.watch}
        clock = ManualClock(timeline)
        await replay(history_file, clock=clock, transport=world.transport(), **options)
        await replay(history_file, clock=clock, transport=world.transport(), **options)

    with pytest.raises(ReplayError, match="choose another auction prefix"):
        run(timeline, twice)


def test_a_server_that_is_not_ready_is_told(history_file: Path) -> None:
    """Nothing is registered, and the failing check is named."""
    with pytest.raises(ReplayError, match="engine: silent"):
        play(history_file, Faults(ready=False))


def test_a_server_that_stays_away_ends_the_run(history_file: Path) -> None:
    """After two minutes the replay gives up, saying what to do."""
    with pytest.raises(GatewayAwayError, match="auction-timer serve"):
        play(history_file, Faults(away_posts=10**9))


def test_what_is_wrong_with_the_plan_is_told_before_the_server_is_asked(tmp_path: Path, history_file: Path) -> None:
    """A broken file and impossible rules need no server to be found."""
    broken = tmp_path / "broken.csv"
    broken.write_text("a,b\n")
    with pytest.raises(HistoryError, match="line 1, column auction_id"):
        play(broken, Faults(ready=False))
    with pytest.raises(PlanError, match="extension_ms"):
        play(history_file, Faults(ready=False), speed=1.0, extension_ms=16 * MINUTE_MS)
