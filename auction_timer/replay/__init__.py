"""Play a bid history against a running server, time compressed, and judge what the server made of it.

history   the CSV, read and checked        pure
plan      events and when they are due     pure
player    sends, watches, collects         the only part that awaits
verdict   what should have happened        pure, with `engine.domain.fold`
report    the table and the summary        rich
"""

from auction_timer.replay.history import HistoryError, read_history, sample_path
from auction_timer.replay.player import ReplayError, ReplayProgress, replay
from auction_timer.replay.report import print_report
from auction_timer.replay.verdict import ReplayReport

__all__ = [
    "HistoryError",
    "ReplayError",
    "ReplayProgress",
    "ReplayReport",
    "print_report",
    "read_history",
    "replay",
    "sample_path",
]
