"""`auction-timer watch`: one auction's countdown in the terminal, from its socket.

What is shown is a function of the session and the time (`view`, `plain_line`), so it can be looked at without a terminal and
without a server. Around it two things run: one takes frames, one paints, ten times a second on a terminal and once a second
as plain lines where the output is a file or a pipe.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from auction_timer.client import (
    ConnectionState,
    Frame,
    Timer,
    TimerSession,
    rfc3339,
    watch_auction,
)
from engine.clock import Clock, MonotonicNs, SystemClock
from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.lifecycle import Status

PAINT_EVERY_S: Final = 0.1
"""The last digit is a tenth of a second."""
PLAIN_EVERY_S: Final = 1.0
EVENTS_SHOWN: Final = 8

_DAY_MS: Final = 24 * HOUR_MS
_TENTH_MS: Final = 100
_NOT_LISTED: Final = frozenset({"timer.tick", "timer.snapshot", "sync"})
_STATUS_STYLE: Final = {
    Status.SCHEDULED: "cyan",
    Status.ACTIVE: "green",
    Status.CLOSING: "bold yellow",
    Status.PAUSED: "magenta",
    Status.ENDED: "bold red",
    Status.CANCELLED: "bold red",
}
_LINE_STYLE: Final = {
    ConnectionState.CONNECTING: "yellow",
    ConnectionState.LIVE: "green",
    ConnectionState.RECONNECTING: "bold yellow",
    ConnectionState.OVER: "dim",
}
# Five rows of three bits, one octal digit each: 7 is a full row, 5 its two ends, 1 the right end.
_GLYPHS: Final = {
    "0": "75557",
    "1": "11111",
    "2": "71747",
    "3": "71717",
    "4": "55711",
    "5": "74717",
    "6": "74757",
    "7": "71111",
    "8": "75757",
    "9": "75717",
    "d": "11757",
    ":": "02020",
    ".": "00002",
    "-": "00700",
    " ": "00000",
}

Source = Callable[[TimerSession], AsyncGenerator[Frame, None]]


async def watch(
    auction_id: str,
    *,
    url: str,
    console: Console,
    token: str | None = None,
    clock: Clock | None = None,
    source: Source | None = None,
) -> None:
    """Show an auction until it is over.

    Args:
        url: of the gateway.
        console: where to; a live display if it is a terminal, else a line per second and one per event.
        token: what the gateway knows the caller by; one in open mode needs none.
        clock: of this machine.
        source: where the frames come from; the auction's socket if None.

    Raises:
        ClientError: it cannot be watched.
    """
    clock = clock or SystemClock()

    def dialled(session: TimerSession) -> AsyncGenerator[Frame, None]:
        return watch_auction(url, auction_id, token=token, session=session, clock=clock)

    session = TimerSession(auction_id)
    show = _paint_live if console.is_terminal else _print_lines
    await show((source or dialled)(session), session, console, clock)


async def _paint_live(
    frames: AsyncGenerator[Frame, None], session: TimerSession, console: Console, clock: Clock
) -> None:
    events: deque[Frame] = deque(maxlen=EVENTS_SHOWN)
    with Live(console=console, auto_refresh=False) as live:

        def paint() -> None:
            live.update(view(session, events, clock.monotonic_ns(), width=console.width), refresh=True)

        await _follow(frames, session, events.append, paint, PAINT_EVERY_S)


async def _print_lines(
    frames: AsyncGenerator[Frame, None], session: TimerSession, console: Console, clock: Clock
) -> None:
    await _follow(
        frames,
        session,
        lambda event: _print(console, event_text(event)),
        lambda: _print(console, plain_line(session, clock.monotonic_ns())),
        PLAIN_EVERY_S,
    )


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


async def _follow(
    frames: AsyncGenerator[Frame, None],
    session: TimerSession,
    on_event: Callable[[Frame], None],
    paint: Callable[[], None],
    every_s: float,
) -> None:
    """Take frames until the auction is over, painting meanwhile, and once more at the end."""
    painter = asyncio.create_task(_repeat(paint, every_s))
    try:
        async with contextlib.aclosing(frames):
            async for frame in frames:
                if frame["type"] not in _NOT_LISTED:
                    on_event(frame)
                if session.is_over:
                    break
    finally:
        painter.cancel()
        await asyncio.wait([painter])
    paint()


async def _repeat(paint: Callable[[], None], every_s: float) -> None:
    while True:
        paint()
        await asyncio.sleep(every_s)


# What is shown.


def view(session: TimerSession, events: Sequence[Frame], now: MonotonicNs, *, width: int) -> RenderableType:
    """The whole display, for a terminal of `width` columns."""
    timer = session.timer
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("auction", Text(session.auction_id))
    facts.add_row("status", _status(timer))
    if timer is not None:
        facts.add_row("ends at", ends_text(timer))
        facts.add_row("extensions", extensions_text(timer))
    facts.add_row("clock", Text(clock_text(session), style="bold red" if session.warns else ""))
    facts.add_row("line", Text(line_text(session), style=_LINE_STYLE[session.state]))
    parts: list[RenderableType] = [Text(), _digits(countdown_text(session, now), timer, width), Text(), facts]
    if events:
        parts += [Text(), *(Text(event_text(event), style="dim") for event in events)]
    return Group(*parts)


def plain_line(session: TimerSession, now: MonotonicNs) -> str:
    """The same in one line."""
    parts = [countdown_text(session, now), session.status or "-"]
    if session.timer is not None:
        parts += [f"ends {ends_text(session.timer)}", extensions_text(session.timer)]
    return " | ".join([*parts, clock_text(session), line_text(session)])


def countdown_text(session: TimerSession, now: MonotonicNs) -> str:
    """The digits of the countdown; dashes before anything is known."""
    remaining_ms = session.remaining_ms(now)
    return "--:--.-" if remaining_ms is None else countdown(remaining_ms)


def countdown(remaining_ms: int) -> str:
    """`mm:ss.t` below an hour, `hh:mm:ss` below a day, then `1d 02:03:04`. Rounded up: zero is the end, not nearly it."""
    if remaining_ms <= HOUR_MS - _TENTH_MS:
        tenths = math.ceil(remaining_ms / _TENTH_MS)
        minutes, tenths = divmod(tenths, MINUTE_MS // _TENTH_MS)
        return f"{minutes:02}:{tenths // 10:02}.{tenths % 10}"
    days, ms = divmod(math.ceil(remaining_ms / SECOND_MS) * SECOND_MS, _DAY_MS)
    clock = f"{ms // HOUR_MS:02}:{ms % HOUR_MS // MINUTE_MS:02}:{ms % MINUTE_MS // SECOND_MS:02}"
    return f"{days}d {clock}" if days else clock


def digits(text: str) -> list[str]:
    """`text` in five rows of blocks."""
    rows = []
    for row in range(5):
        cells = [int(_GLYPHS[character][row]) for character in text]
        rows.append(" ".join("".join("█" if bits & bit else " " for bit in (4, 2, 1)) for bits in cells).rstrip())
    return rows


def _digits(text: str, timer: Timer | None, width: int) -> Text:
    style = "dim" if timer is None else _STATUS_STYLE[Status(timer["status"])]
    rows = digits(text)
    if 4 * len(text) > width:
        return Text(text, style=style)
    return Text("\n".join(rows), style=style, no_wrap=True)


def _status(timer: Timer | None) -> Text:
    if timer is None:
        return Text("-", style="dim")
    reason = f" ({timer['reason']})" if timer.get("reason") else ""
    return Text(timer["status"] + reason, style=_STATUS_STYLE[Status(timer["status"])])


def ends_text(timer: Timer) -> str:
    """The end that stands, and the last one there can be."""
    text = rfc3339(timer["ends_at"])
    if Status(timer["status"]).is_terminal:
        return text
    return f"{text}, " + ("final" if timer["at_cap"] else f"at the latest {rfc3339(timer['final_deadline'])}")


def extensions_text(timer: Timer) -> str:
    """How often and how far the end moved, and how far it still can."""
    count, moved_ms = timer["extension_count"], timer["ends_at"] - timer["original_ends_at"]
    text = f"{count} extension{'' if count == 1 else 's'}, moved {duration(moved_ms)}"
    if not Status(timer["status"]).is_terminal:
        text += f", left {duration(timer['extension_left_ms'])}"
    return text + (f", clipped by {timer['clipped_by']}" if timer.get("clipped_by") else "")


def duration(ms: int) -> str:
    """A length of time, written as a countdown is, but cut and not rounded up."""
    return ("-" if ms < 0 else "") + countdown(abs(ms) // _TENTH_MS * _TENTH_MS)


def clock_text(session: TimerSession) -> str:
    """Drift and round trip."""
    drift_ms, rtt_ms = session.drift_ms, session.clock.rtt_ms
    if drift_ms is None or rtt_ms is None:
        return "drift -, rtt -"
    return f"drift {drift_ms:+.1f} ms, rtt {rtt_ms:.1f} ms"


def line_text(session: TimerSession) -> str:
    """The state of the connection, and why it is no better."""
    parts: list[str] = [session.state.value]
    if session.state in (ConnectionState.CONNECTING, ConnectionState.RECONNECTING) and session.trouble:
        parts.append(f"({session.trouble})")
    if session.reconnects:
        times = "once" if session.reconnects == 1 else f"{session.reconnects} times"
        parts.append(f"(came back {times}" + (", events are missing)" if session.gaps else ")"))
    return " ".join(parts)


def event_text(frame: Frame) -> str:
    """One event, for a person."""
    at = frame.get("server_time")
    head = f"{rfc3339(EpochMs(at)) if isinstance(at, int) else '-':<24}  {frame['type']}"
    return f"{head}  {_details(frame)}".rstrip()


def _details(frame: Frame) -> str:
    match frame["type"]:
        case "timer.extended":
            timer = frame["timer"]
            by = duration(timer["ends_at"] - frame["previous_ends_at"])
            clipped = f", clipped by {frame['clipped_by']}" if frame.get("clipped_by") else ""
            return f"by {by} to {rfc3339(timer['ends_at'])} for {frame.get('bid_id')}{clipped}"
        case "timer.rescheduled" | "timer.resumed" | "timer.closing":
            return f"ends {rfc3339(frame['timer']['ends_at'])}"
        case "timer.resynced":
            return str(frame.get("cause"))
        case "bid.accepted":
            money = [str(frame[name]) for name in ("amount_minor", "currency") if frame.get(name) is not None]
            by = f"by {frame['bidder_id']}" if frame.get("bidder_id") else ""
            return " ".join(part for part in (str(frame.get("bid_id")), *money, by) if part)
        case "error":
            return str(frame.get("detail"))
        case _:
            return str(frame.get("reason") or "")
