"""What `auction-timer simulate` prints: the seed first, then the table, then what to do with a violation.

Of several seeds it prints each one that fails as soon as it has, with the command that replays it.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from secrets import randbelow
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from auction_timer.simulation.run import Outcome, Plan, small, some_days
from auction_timer.simulation.seeds import judge, judge_all
from engine.clock import SystemClock

SHOWN_MAX: Final = 10
"""Violations of one checker that are printed."""
SEEDS: Final = 2**32
EXIT_INTERRUPTED: Final = 130
"""What a shell makes of SIGINT."""


@dataclass(frozen=True, slots=True)
class Options:
    """Which plan a seed has, and how it is asked for."""

    plan: Callable[[int], Plan]
    words: str
    """Of the command line, beside the seed."""

    def command(self, seed: int) -> str:
        """What replays a seed."""
        return f"auction-timer simulate {self.words} --seed {seed}"


def small_plans(*, faults: bool) -> Options:
    """Half a minute of five auctions."""
    return Options(lambda seed: small(seed, faults=faults), f"--small{_word(faults)}")


def plans_of_days(*, auctions: int, days: float, faults: bool) -> Options:
    """Days of auctions."""
    return Options(
        lambda seed: some_days(seed, auctions=auctions, days=days, faults=faults),
        f"--auctions {auctions} --days {days}{_word(faults)}",
    )


def _word(faults: bool) -> str:
    return "" if faults else " --no-faults"


def play(options: Options, *, first: int | None, seeds: int) -> int:
    """Simulate so many seeds and report on stdout; without a first one, from one that nobody knows yet.

    Returns:
        The exit code: 0, or 1 if anything was found, or 130 if nothing was until Ctrl-C.
    """
    first = randbelow(SEEDS) if first is None else first
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        return _play_one(options, first, console) if seeds == 1 else _play_many(options, first, seeds, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return EXIT_INTERRUPTED


def _play_one(options: Options, seed: int, console: Console) -> int:
    console.print(f"SEED {seed}")
    outcome = judge(options.plan(seed))
    report(outcome, options.command(seed), console)
    return 0 if outcome.is_good else 1


def _play_many(options: Options, first: int, seeds: int, console: Console) -> int:
    clock = SystemClock()
    began_ns = clock.monotonic_ns()
    done = failed = 0
    cpu_s = 0.0
    interrupted = False
    outcomes = judge_all(options.plan(seed) for seed in range(first, first + seeds))
    try:
        console.print(f"SEED {first} to {first + seeds - 1}")
        with contextlib.closing(outcomes), _progress() as progress:
            for outcome in progress.track(outcomes, total=seeds, description="seeds"):
                done += 1
                cpu_s += outcome.cpu_s
                if not outcome.is_good:
                    failed += 1
                    _tell(outcome, options.command(outcome.plan.seed), console)
    except KeyboardInterrupt:
        interrupted = True
    judged = f"{done} of {seeds} seeds, then interrupted" if interrupted else f"{done} seeds"
    took = f"{(clock.monotonic_ns() - began_ns) / 1e9:.1f} s, {cpu_s:.1f} s of CPU"
    console.print(f"{judged}, in {took}: {failed} failed")
    if failed:
        return 1
    return EXIT_INTERRUPTED if interrupted else 0


def _progress() -> Progress:
    """On stderr; silent where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )


def report(outcome: Outcome, command: str, console: Console) -> None:
    """The table of one simulation."""
    table = Table("what", "how many")
    table.add_row("virtual hours", f"{outcome.virtual_ms / 3_600_000:.1f}")
    table.add_row("auctions", str(outcome.plan.auctions))
    for name, number in sorted(outcome.counts.items()):
        table.add_row(name, str(number))
    table.add_section()
    for kind, number in sorted(outcome.faults.items()):
        table.add_row(f"fault: {kind}", str(number))
    table.add_section()
    for name, found in outcome.violations.items():
        table.add_row(f"checker: {name}", "holds" if not found else f"{len(found)} violations")
    console.print(table)
    if not outcome.is_good:
        _tell(outcome, command, console)
    console.print(f"trace {outcome.trace}")


def _tell(outcome: Outcome, command: str, console: Console) -> None:
    """What is wrong with a seed, and how to see it again."""
    console.print(f"seed {outcome.plan.seed} fails; what replays it exactly: {command}")
    for name, found in outcome.violations.items():
        for violation in found[:SHOWN_MAX]:
            console.print(f"violated: {name}: {violation}")
        if len(found) > SHOWN_MAX:
            console.print(f"violated: {name}: and {len(found) - SHOWN_MAX} more")
