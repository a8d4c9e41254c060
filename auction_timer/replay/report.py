"""The report of a replay, for a terminal: one row per auction, then the summary."""

from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from auction_timer.client import rfc3339
from auction_timer.replay.verdict import ReplayReport, Row, percentile
from engine.domain.instants import SECOND_MS, EpochMs

FULL_WIDTH: Final = 144
"""Columns that the whole table needs. A narrower terminal gets the time of day instead of the instant, and no item."""
FAULTS_SHOWN: Final = 20


def print_report(report: ReplayReport, console: Console, *, rows_max: int | None = None) -> None:
    """Print the table (with `rows_max`, only so many rows; 0 for none), the faults and the summary.

    A console that is no terminal is widened: rich assumes 80 columns there, and a file has no edge.
    """
    if not console.is_terminal:
        console.width = max(console.width, FULL_WIDTH)
    console.print(render(report, rows_max=rows_max, full=console.width >= FULL_WIDTH))


def render(report: ReplayReport, *, rows_max: int | None = None, full: bool = True) -> RenderableType:
    """The same, as something rich can print."""
    shown = report.rows if rows_max is None else report.rows[:rows_max]
    parts: list[RenderableType] = []
    if shown:
        parts.append(_table(shown, full=full))
        if hidden := len(report.rows) - len(shown):
            parts.append(Text(f"{hidden} more auctions are not shown", style="dim"))
    parts += [Text(line, style="bold red", overflow="fold") for line in fault_lines(report)]
    parts += [Text(line, overflow="fold") for line in summary_lines(report)]
    return Group(*parts)


def _table(rows: tuple[Row, ...], *, full: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("auction", overflow="fold", min_width=26 if full else 10)
    if full:
        table.add_column("item", overflow="ellipsis", no_wrap=True, max_width=22)
    table.add_column("bids", justify="right", no_wrap=True)
    table.add_column("original end", no_wrap=True)
    table.add_column("final end", no_wrap=True)
    table.add_column("ext.", justify="right", no_wrap=True)
    table.add_column("clipped" if full else "clip", no_wrap=True)
    table.add_column("lateness", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.auction_id, style="red" if row.faults else ""),
            *([Text(row.item)] if full else []),
            str(row.bids),
            _when(row.original_ends_at, full=full),
            _when(row.ends_at, full=full),
            str(row.extension_count),
            row.clipped_by or "",
            "unseen" if row.lateness_ms is None else f"{row.lateness_ms} ms",
        )
    return table


def _when(at: EpochMs, *, full: bool) -> str:
    instant = rfc3339(at)
    return instant if full else instant.partition("T")[2].rstrip("Z")


def fault_lines(report: ReplayReport) -> list[str]:
    """What was not as it should be, one line per auction, the first 20."""
    lines = [f"FAULT {row.auction_id}: {'; '.join(row.faults)}" for row in report.faulty[:FAULTS_SHOWN]]
    if more := len(report.faulty) - FAULTS_SHOWN:
        lines += [f"FAULT in {more} more auctions"] if more > 0 else []
    return lines


def summary_lines(report: ReplayReport) -> list[str]:
    """The figures of the run."""
    rows, late = report.rows, report.lateness_ms
    extended = sum(row.extension_count > 0 for row in rows)
    clipped = sum(row.clipped_by is not None for row in rows)
    moved_ms = max((row.ends_at - row.original_ends_at for row in rows), default=0)
    lateness = (
        f"p50 {percentile(late, 50)} ms, p99 {percentile(late, 99)} ms, max {late[-1]} ms"
        if late
        else "no close was seen"
    )
    figures = {
        "auctions": f"{len(rows)}, ended {sum(row.lateness_ms is not None for row in rows)}, "
        f"at speed {report.speed:g} in {report.elapsed_ms / SECOND_MS:.1f} s",
        "bids": f"{sum(row.bids for row in rows)}, late {sum(row.late_bids for row in rows)}",
        "extensions": f"{sum(row.extension_count for row in rows)} in {extended} auctions, {clipped} clipped, "
        f"end moved by at most {moved_ms} ms",
        "close lateness": lateness,
        "early closes": str(report.early_closes),
        "mismatches": str(len(report.faulty)),
        "line": f"{report.reconnects} reconnects, {report.gaps} with events missing, {report.resent} requests sent again",
        "verdict": "all as it should be" if report.exit_code == 0 else "NOT as it should be",
    }
    return [f"{name:<16}{figure}" for name, figure in figures.items()]
