"""What `auction-timer simulate` prints: the seed first, then the table, then what to do with a violation."""

from secrets import randbelow
from typing import Final

from rich.console import Console
from rich.table import Table

from auction_timer.simulation.run import Outcome, simulate, some_days

SHOWN_MAX: Final = 10
"""Violations of one checker that are printed."""
SEEDS: Final = 2**32


def play(seed: int | None, *, auctions: int, days: float, faults: bool) -> int:
    """Simulate days of auctions and report on stdout; without a seed, from one that nobody knows yet.

    Returns:
        The exit code: 0, or 1 if a checker found anything.
    """
    seed = randbelow(SEEDS) if seed is None else seed
    console = Console()
    console.print(f"SEED {seed}", highlight=False)
    outcome = simulate(some_days(seed, auctions=auctions, days=days, faults=faults))
    report(outcome, console)
    return 0 if outcome.is_good else 1


def report(outcome: Outcome, console: Console) -> None:
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
    for name, found in outcome.violations.items():
        for violation in found[:SHOWN_MAX]:
            console.print(f"violated: {name}: {violation}", soft_wrap=True)
        if len(found) > SHOWN_MAX:
            console.print(f"violated: {name}: and {len(found) - SHOWN_MAX} more")
    if not outcome.is_good:
        console.print("the same seed with the same options replays this exactly")
    console.print(f"trace {outcome.trace}", highlight=False, soft_wrap=True)
