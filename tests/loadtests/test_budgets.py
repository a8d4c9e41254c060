"""Budgets of load tests: what keeps one, and what breaks it."""

from pathlib import Path
from typing import Any

import pytest

from loadtests.__main__ import PHASES, SCENARIO
from loadtests.budgets import BUDGETS, Budget, Line, breaches, lines, read_budgets, table

BUDGET = Budget(tick_p99_ms=100, bid_p99_ms=50, failures=1)


def line(name: str, *, count: int = 10, failures: int = 0, p99_ms: int = 10) -> Line:
    return Line(name, count, failures, p99_ms, p99_ms, p99_ms)


def entry(times: dict[str, int], **values: Any) -> dict[str, Any]:
    return {"name": "tick", "num_requests": sum(times.values()), "num_failures": 0, "response_times": times} | values


@pytest.mark.requirement("R7")
def test_the_budgets_of_every_phase_are_there() -> None:
    """The file that comes with the scenario has a budget for each phase, and none promises more than 100 ms."""
    budgets = read_budgets(BUDGETS, SCENARIO)
    assert set(budgets) == set(PHASES)
    assert all(max(budget.tick_p99_ms, budget.bid_p99_ms) <= 100 for budget in budgets.values())


@pytest.mark.parametrize(
    "text", ["", "[other.one]", "[steady.one]\ntick_p99_ms = 1", "[steady]\none = 1", "steady = 1", "not toml"]
)
def test_a_file_without_budgets_is_refused(tmp_path: Path, text: str) -> None:
    """What is missing, or no TOML, is one kind of error that names the file."""
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"budgets\.toml holds no budgets"):
        read_budgets(path, "steady")


def test_percentiles_come_from_the_counts_of_each_duration() -> None:
    """Of a hundred durations, the 50th and the 99th smallest; keys are text in JSON and are ordered as numbers."""
    (found,) = lines([entry({"9": 50, "10": 49, "100": 1}, num_failures=2)])
    assert found == Line("tick", 100, 2, 9, 10, 100)


def test_nothing_measured_is_zero() -> None:
    """A name that only failed has no durations."""
    (found,) = lines([entry({}, num_failures=3)])
    assert found == Line("tick", 0, 3, 0, 0, 0)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([line("tick", p99_ms=100), line("bid", p99_ms=50)], []),
        ([line("tick", p99_ms=101), line("bid")], ["p99 of tick is 101 ms, the budget 100 ms"]),
        ([line("tick"), line("bid", p99_ms=51)], ["p99 of bid is 51 ms, the budget 50 ms"]),
        ([line("tick"), line("bid"), line("connect", failures=1)], []),
        ([line("tick", failures=1), line("bid", failures=1)], ["2 failures, the budget 1"]),
        ([line("bid")], ["no tick was delivered"]),
        ([line("tick"), line("bid", count=0)], ["no bid was delivered"]),
    ],
)
def test_a_budget_is_kept_or_broken(found: list[Line], told: list[str]) -> None:
    """Each limit is inclusive, failures count over all names, and what was not delivered was not quick."""
    assert breaches(found, BUDGET) == told


def test_the_table_shows_every_line() -> None:
    """Title and names on the left, figures below their heads."""
    head, tick = table("steady.one", [line("tick", count=1_000)]).splitlines()
    assert head.split() == ["steady.one", "count", "failures", "p50", "ms", "p99", "ms", "max", "ms"]
    assert tick.split() == ["tick", "1,000", "0", "10", "10", "10"]
    assert len(head) == len(tick)
