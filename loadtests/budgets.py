"""Budgets of scenarios, and whether what locust measured keeps them."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

BUDGETS: Final = Path(__file__).with_name("budgets.toml")
TICK: Final = "tick"
BID: Final = "bid"
P99: Final = 0.99


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a phase of a scenario may cost; durations in ms."""

    tick_p99_ms: int
    bid_p99_ms: int
    failures: int


@dataclass(frozen=True, slots=True)
class Line:
    """What was measured under one name; durations in ms, as locust rounds them: two digits from 100 on."""

    name: str
    count: int
    failures: int
    p50_ms: int
    p99_ms: int
    max_ms: int


def read_budgets(path: Path, scenario: str) -> dict[str, Budget]:
    """The budgets of a scenario, by phase.

    Raises:
        ValueError: the file does not hold them; the message says what is wrong.
        OSError: it cannot be read.
    """
    try:
        phases = tomllib.loads(path.read_text())[scenario]
        return {phase: Budget(**limits) for phase, limits in phases.items()}
    except (KeyError, TypeError, AttributeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} holds no budgets for {scenario!r}: {error}") from None


def lines(stats: Sequence[dict[str, Any]]) -> list[Line]:
    """Locust's statistics (`--json`) as lines."""
    return [_line(entry) for entry in stats]


def _line(entry: dict[str, Any]) -> Line:
    times = {int(ms): count for ms, count in entry["response_times"].items()}
    return Line(
        entry["name"],
        entry["num_requests"],
        entry["num_failures"],
        _percentile(times, 0.5),
        _percentile(times, P99),
        max(times, default=0),
    )


def _percentile(times: dict[int, int], share: float) -> int:
    """The least duration that at least `share` of all kept to; 0 if there is none."""
    wanted, seen = share * sum(times.values()), 0
    for ms in sorted(times):
        seen += times[ms]
        if seen >= wanted:
            return ms
    return 0


def breaches(found: Sequence[Line], budget: Budget) -> list[str]:
    """How a budget is broken, as sentences; empty if it is kept. Nothing delivered breaks it as well."""
    by_name = {line.name: line for line in found}
    told = []
    for name, limit_ms in ((TICK, budget.tick_p99_ms), (BID, budget.bid_p99_ms)):
        line = by_name.get(name)
        if line is None or not line.count:
            told.append(f"no {name} was delivered")
        elif line.p99_ms > limit_ms:
            told.append(f"p99 of {name} is {line.p99_ms} ms, the budget {limit_ms} ms")
    failures = sum(line.failures for line in found)
    if failures > budget.failures:
        told.append(f"{failures} failures, the budget {budget.failures}")
    return told


def table(title: str, found: Sequence[Line]) -> str:
    """Lines as text."""
    rows: list[tuple[str, ...]] = [(title, "count", "failures", "p50 ms", "p99 ms", "max ms")]
    rows += [
        (line.name, *(f"{value:,}" for value in (line.count, line.failures, line.p50_ms, line.p99_ms, line.max_ms)))
        for line in found
    ]
    return "\n".join(f"{row[0]:<24}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)
