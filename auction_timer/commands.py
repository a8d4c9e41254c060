"""The commands that talk to a running gateway, with their progress on stderr and their results on stdout."""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from auction_timer.client import ClientError
from auction_timer.emit import EmitResult, stream_lines
from auction_timer.emit import emit as emit_lines
from auction_timer.replay import HistoryError, ReplayProgress, print_report, sample_path
from auction_timer.replay import replay as play
from auction_timer.replay.plan import PlanError
from auction_timer.roles import EXIT_FAILURE, EXIT_OK, loop_factory
from auction_timer.watch import watch as watch_one

T = TypeVar("T")

EXIT_INTERRUPTED: Final = 130
"""What a shell makes of SIGINT."""
REJECTIONS_SHOWN = 20
SAMPLE = "sample"


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A progress display on stderr; silent where that is no terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        yield progress


def _complain(error: Exception) -> int:
    print(f"auction-timer: {error}", file=sys.stderr)
    return EXIT_FAILURE


def emit(file: str, *, url: str, token: str | None) -> int:
    """Send the events of a file, or of stdin for `-`; the exit code. However it ends, what was counted is told."""
    result = EmitResult()
    with _progress() as progress, contextlib.ExitStack() as opened:
        task = progress.add_task("sending", total=None, facts="")

        def show(_result: EmitResult) -> None:
            done = result.accepted + result.duplicate + result.rejected
            progress.update(task, completed=done, facts=f"{done:,} events")

        try:
            stream = sys.stdin.buffer if file == "-" else opened.enter_context(Path(file).open("rb"))
            _run(emit_lines(stream_lines(stream), url=url, token=token, on_progress=show, result=result))
        except KeyboardInterrupt:
            _tell(result)
            return EXIT_INTERRUPTED
        except (ClientError, OSError) as error:
            if result.lines:
                _tell(result)
            return _complain(error)
    _tell(result)
    return result.exit_code


def _tell(result: EmitResult) -> None:
    print(f"accepted {result.accepted}  duplicate {result.duplicate}  rejected {result.rejected}")
    for rejection in result.rejections[:REJECTIONS_SHOWN]:
        print(f"line {rejection.line}: {rejection.reason}", file=sys.stderr)
    if result.rejected > REJECTIONS_SHOWN:
        print(f"... and {result.rejected - REJECTIONS_SHOWN} more", file=sys.stderr)


def replay(file: str, *, rows_max: int | None, **options: Any) -> int:
    """Play a bid history, or the sample that comes with the program; the exit code."""
    seen: ReplayProgress | None = None
    with _progress() as progress:
        task = progress.add_task("reading", total=None, facts="")

        def show(now: ReplayProgress) -> None:
            nonlocal seen
            seen = now
            progress.update(
                task,
                description=now.phase.value,
                total=now.bids + now.auctions,
                completed=now.sent + now.ended,
                facts=_facts(now),
            )

        try:
            path = sample_path() if file == SAMPLE else Path(file)
            report = _run(play(path, on_progress=show, **options))
        except KeyboardInterrupt:
            print(f"interrupted: {_facts(seen)}" if seen is not None else "interrupted before anything was sent")
            return EXIT_INTERRUPTED
        except (ClientError, HistoryError, PlanError, OSError) as error:
            return _complain(error)
    print_report(report, Console(), rows_max=rows_max)
    return report.exit_code


def _facts(now: ReplayProgress) -> str:
    return f"{now.sent:,}/{now.bids:,} bids, {now.ended:,}/{now.auctions:,} ended, {now.extensions:,} extensions"


def watch(auction_id: str, *, url: str, token: str | None) -> int:
    """Show an auction until it is over; the exit code. Ctrl-C stops watching, which is no failure."""
    try:
        _run(watch_one(auction_id, url=url, token=token, console=Console()))
    except KeyboardInterrupt:
        return EXIT_OK
    except ClientError as error:
        return _complain(error)
    return EXIT_OK
