"""The report, as a person sees it."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from auction_timer.replay.report import FAULTS_SHOWN, FULL_WIDTH, fault_lines, print_report, summary_lines
from auction_timer.replay.verdict import ReplayReport, Row
from engine.domain.instants import EpochMs

END = EpochMs(1_795_328_519_000)


def row(number: int = 1, **changes: Any) -> Row:
    """An auction that was extended once."""
    values: dict[str, Any] = {
        "auction_id": f"replay-0123abcd-{1_638_843_936 + number}",
        "item": "Cartier [bold]wristwatch[/bold]",
        "bids": 20,
        "late_bids": 1,
        "original_ends_at": END,
        "ends_at": EpochMs(END + 125),
        "extension_count": 1,
        "clipped_by": None,
        "lateness_ms": number,
        "early": False,
        "faults": (),
    }
    return Row(**(values | changes))


def report(*rows: Row) -> ReplayReport:
    """A run with these auctions."""
    return ReplayReport(speed=7_200, elapsed_ms=88_600, reconnects=3, gaps=1, resent=2, rows=rows)


def printed(found: ReplayReport, *, width: int = 80, terminal: bool = False, **options: Any) -> str:
    """The report as text."""
    out = StringIO()
    print_report(found, Console(file=out, width=width, force_terminal=terminal, color_system=None), **options)
    return out.getvalue()


def test_a_file_gets_every_column_whole() -> None:
    """Where the output is no terminal, ids and instants are never cut, whatever width rich assumes."""
    text = printed(report(row()))
    for part in ("replay-0123abcd-1638843937", "2026-11-22T06:21:59.000Z", "2026-11-22T06:21:59.125Z", "1 ms"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= FULL_WIDTH


def test_a_narrow_terminal_gets_the_time_of_day() -> None:
    """On 80 columns the instants lose their date, and the ids wrap instead of being cut."""
    text = printed(report(row()), width=80, terminal=True)
    assert "06:21:59.125" in text
    assert "2026-" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_markup_in_an_item_is_only_text() -> None:
    """What stands in a file cannot colour the table."""
    assert "Cartier [bold]wristwa" in printed(report(row()))


@pytest.mark.parametrize(
    ("rows_max", "shown", "hidden"), [(None, 5, False), (5, 5, False), (2, 2, True), (0, 0, False)]
)
def test_rows_can_be_fewer(rows_max: int | None, shown: int, hidden: bool) -> None:
    """A bound on the rows hides the rest, says so, and keeps the summary over all of them."""
    text = printed(report(*(row(number) for number in range(5))), rows_max=rows_max)
    assert text.count("replay-0123abcd") == shown
    assert ("more auctions are not shown" in text) is hidden
    assert "auctions        5, ended 5" in text


def test_the_summary_has_the_figures() -> None:
    """Counts, percentiles and the verdict are those of the rows."""
    rows = [row(number) for number in range(1, 101)]
    rows[0] = row(1, clipped_by="total", ends_at=EpochMs(END + 900), extension_count=7)
    assert summary_lines(report(*rows)) == [
        "auctions        100, ended 100, at speed 7200 in 88.6 s",
        "bids            2000, late 100",
        "extensions      106 in 100 auctions, 1 clipped, end moved by at most 900 ms",
        "close lateness  p50 50 ms, p99 99 ms, max 100 ms",
        "early closes    0",
        "mismatches      0",
        "line            3 reconnects, 1 with events missing, 2 requests sent again",
        "verdict         all as it should be",
    ]


def test_a_run_in_which_nothing_closed_can_be_told() -> None:
    """Without a single close there are no percentiles, but a verdict."""
    lines = summary_lines(report(row(lateness_ms=None, faults=("did not end",))))
    assert "close lateness  no close was seen" in lines
    assert "verdict         NOT as it should be" in lines
    assert "unseen" in printed(report(row(lateness_ms=None)))


def test_faults_are_told_up_to_a_bound() -> None:
    """The first twenty auctions at fault are named with all their faults, the rest are counted."""
    found = report(*(row(number, faults=("one", "two")) for number in range(FAULTS_SHOWN + 3)))
    lines = fault_lines(found)
    assert lines[0] == "FAULT replay-0123abcd-1638843936: one; two"
    assert lines[-1] == "FAULT in 3 more auctions"
    assert len(lines) == FAULTS_SHOWN + 1
    assert fault_lines(report(row(faults=("one",)))) == ["FAULT replay-0123abcd-1638843937: one"]
    assert found.exit_code == 1
