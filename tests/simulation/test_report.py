"""What `auction-timer simulate` says of one seed and of many, and how it ends."""

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
from typer.testing import CliRunner

from auction_timer.cli import app
from auction_timer.simulation import report
from auction_timer.simulation.report import Options, plans_of_days, play, small_plans
from auction_timer.simulation.run import Outcome, Plan

BREAKS_SEED = 12


def told(plan: Plan) -> Outcome:
    """Of a simulation that need not run: seed 12 is bad."""
    violations = {"caps": ["auction-2: [past] the last one allowed"] if plan.seed == BREAKS_SEED else []}
    return Outcome(plan, trace="f00d", virtual_ms=60_000, counts={}, faults={}, violations=violations, cpu_s=0.25)


def judged(monkeypatch: pytest.MonkeyPatch, *, interrupted_after: int = 1_000) -> None:
    """No simulation runs; Ctrl-C comes after so many."""

    def judge_all(plans: Iterable[Plan]) -> Iterator[Outcome]:
        for number, plan in enumerate(plans):
            if number == interrupted_after:
                raise KeyboardInterrupt
            yield told(plan)

    monkeypatch.setattr(report, "judge_all", judge_all)
    monkeypatch.setattr(report, "judge", told)


@pytest.mark.requirement("B10")
def test_a_seed_that_fails_is_told_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several seeds those that fail are printed whole; the seeds come first, the time last, and the exit code is 1."""
    judged(monkeypatch)
    assert play(small_plans(faults=True), first=10, seeds=4) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SEED 10 to 13"
    assert lines[1:3] == [
        "seed 12 fails; what replays it exactly: auction-timer simulate --small --seed 12",
        "violated: caps: auction-2: [past] the last one allowed",
    ]
    assert lines[3].startswith("4 seeds, in ")
    assert lines[3].endswith(" s, 1.0 s of CPU: 1 failed")


@pytest.mark.requirement("B10")
@pytest.mark.parametrize(("first", "code"), [(0, 130), (12, 1)])
def test_ctrl_c_ends_with_what_was_found_so_far(
    first: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is that of an interruption only if no seed had failed by then."""
    judged(monkeypatch, interrupted_after=2)
    assert play(small_plans(faults=True), first=first, seeds=100) == code
    assert "2 of 100 seeds, then interrupted, in " in capsys.readouterr().out


@pytest.mark.requirement("B10")
@pytest.mark.parametrize(("seed", "code"), [(BREAKS_SEED, 1), (13, 0)])
def test_one_seed_is_told_in_a_table(
    seed: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed first, the trace last, and in between what replays it, if it fails."""
    judged(monkeypatch)
    assert play(plans_of_days(auctions=3, days=0.5, faults=False), first=seed, seeds=1) == code
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == (f"SEED {seed}", "trace f00d")
    command = "auction-timer simulate --auctions 3 --days 0.5 --no-faults --seed 12"
    assert any(line.endswith(command) for line in lines) == (seed == BREAKS_SEED)


@pytest.mark.requirement("B10")
@pytest.mark.parametrize(
    "options", [small_plans(faults=False), plans_of_days(auctions=3, days=0.123456789, faults=True)]
)
def test_the_command_that_is_printed_asks_for_the_same_plan(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as a shell reads it, it is the plan of that seed and nothing else."""
    asked: list[Plan] = []

    def plan_of(wanted: Options, *, first: int, seeds: int) -> int:
        asked.extend(wanted.plan(seed) for seed in range(first, first + seeds))
        return 0

    monkeypatch.setattr(report, "play", plan_of)
    assert CliRunner().invoke(app, options.command(77).split()[1:]).exit_code == 0
    assert asked == [options.plan(77)]


@pytest.mark.requirement("B10")
def test_small_plans_have_no_days() -> None:
    """Who asks for both is told, and nothing runs."""
    assert CliRunner().invoke(app, ["simulate", "--small", "--days", "2"]).exit_code == 2


@pytest.mark.requirement("B10")
def test_the_command_ends_at_once_when_it_is_interrupted() -> None:
    """A real SIGINT, with real processes at work on a million seeds."""
    command = [sys.executable, "-m", "auction_timer", "simulate", "--small", "--seed", "1", "--seeds", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "SEED 1 to 1000000\n"
        running.send_signal(signal.SIGINT)
        said, wrong = running.communicate(timeout=60)
    assert running.returncode == 130, wrong
    assert " of 1000000 seeds, then interrupted, in " in said
    assert wrong == ""
