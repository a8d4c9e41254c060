"""The terminal display: what it shows of a session, and how it ends."""

import asyncio
from collections.abc import AsyncGenerator
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from auction_timer.client import Frame, TimerSession, UrlError
from auction_timer.watch import (
    Source,
    countdown,
    digits,
    duration,
    ends_text,
    event_text,
    extensions_text,
    line_text,
    plain_line,
    view,
    watch,
)
from engine.clock import MonotonicNs
from engine.domain.instants import HOUR_MS, MINUTE_MS
from tests.fakes.clock import ManualClock, Timeline
from tests.fakes.loop import run

END_MS = 1_795_328_519_000
AT = MonotonicNs(0)


def timer(**changes: Any) -> dict[str, Any]:
    """An auction five minutes before its end."""
    return {
        "auction_id": "a-1",
        "status": "ACTIVE",
        "version": 2,
        "ends_at": END_MS,
        "original_ends_at": END_MS,
        "final_deadline": END_MS + HOUR_MS,
        "extension_count": 0,
        "extension_left_ms": HOUR_MS,
        "at_cap": False,
        "reason": None,
    } | changes


def session_with(**changes: Any) -> TimerSession:
    """A session that has its snapshot."""
    session = TimerSession("a-1")
    session.connected(AT)
    session.receive(snapshot(**changes), AT)
    return session


def snapshot(**changes: Any) -> Frame:
    """The first frame."""
    return {
        "type": "timer.snapshot",
        "cursor": "0.1-0",
        "server_time": END_MS - 5 * MINUTE_MS,
        "heartbeat_ms": 20_000,
        "recovered": None,
        "timer": timer(**changes),
    }


def painted(session: TimerSession, events: tuple[Frame, ...] = (), width: int = 100) -> str:
    """The display as text."""
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(view(session, events, AT, width=width))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class TestCountdown:
    """How lengths of time are written."""

    @pytest.mark.parametrize(
        ("remaining_ms", "text"),
        [
            (0, "00:00.0"),
            (1, "00:00.1"),
            (59_900, "00:59.9"),
            (59_901, "01:00.0"),
            (HOUR_MS - 100, "59:59.9"),
            (HOUR_MS - 99, "01:00:00"),
            (HOUR_MS, "01:00:00"),
            (24 * HOUR_MS - 1_000, "23:59:59"),
            (24 * HOUR_MS - 999, "1d 00:00:00"),
            (8 * 24 * HOUR_MS + 3_723_000, "8d 01:02:03"),
        ],
    )
    def test_it_has_three_forms(self, remaining_ms: int, text: str) -> None:
        """Tenths below an hour, seconds below a day, then days; always rounded up to what is shown."""
        assert countdown(remaining_ms) == text

    @given(st.integers(0, 40 * 24 * HOUR_MS), st.integers(0, 5_000))
    def test_it_never_shows_less_for_more(self, ms: int, more_ms: int) -> None:
        """More time left is never written as less, across all forms, and only zero is written as zero."""

        def read(text: str) -> float:
            days, _, clock = text.rpartition("d ")
            total = 0.0
            for part in clock.split(":"):
                total = total * 60 + float(part)
            return total + int(days or 0) * 86_400

        assert read(countdown(ms)) <= read(countdown(ms + more_ms))
        assert (read(countdown(ms)) == 0) == (ms == 0)
        assert read(countdown(ms)) * 1_000 >= ms

    def test_lengths_are_cut(self) -> None:
        """How far an end moved is not rounded up, and may be negative."""
        assert duration(1_006) == "00:01.0"
        assert duration(-90_000) == "-01:30.0"

    @given(st.integers(0, 400 * 24 * HOUR_MS))
    def test_every_countdown_can_be_drawn(self, ms: int) -> None:
        """The blocks have five rows, four columns a character, whatever is left."""
        text = countdown(ms)
        rows = digits(text)
        assert len(rows) == 5
        assert all(len(row) < 4 * len(text) for row in rows)

    def test_digits_look_like_digits(self) -> None:
        """A two and a colon, as a person would see them."""
        assert digits("2:") == ["███", "  █  █", "███", "█    █", "███"]


class TestView:
    """The live display."""

    def test_it_says_everything_a_bidder_needs(self) -> None:
        """Status, both ends, extensions used and left, the clock, the line, and the last events are there."""
        session = session_with(extension_count=2, original_ends_at=END_MS - 90_000, status="CLOSING")
        bid: Frame = {"type": "bid.accepted", "server_time": END_MS - 400_000, "bid_id": "b-7", "amount_minor": 1250}
        text = painted(session, (bid,))
        for part in (
            "CLOSING",
            "2026-11-22T06:21:59.000Z, at the latest 2026-11-22T07:21:59.000Z",
            "2 extensions, moved 01:30.0, left 01:00:00",
            "drift -, rtt -",
            "live",
            "b-7 1250",
            "█",
        ):
            assert part in text

    def test_before_the_first_frame_it_shows_dashes(self) -> None:
        """Nothing is invented while nothing is known, and the reason is told."""
        session = TimerSession("a-1")
        session.lost("ConnectionRefusedError")
        text = painted(session)
        assert "connecting (ConnectionRefusedError)" in text
        assert "ends at" not in text

    def test_a_narrow_terminal_gets_small_digits(self) -> None:
        """Where blocks do not fit, the countdown is written in one line."""
        text = painted(session_with(), width=20)
        assert "05:00.0" in text
        assert "█" not in text

    def test_markup_in_an_id_is_only_text(self) -> None:
        """What comes from outside cannot colour the display."""
        session = session_with(status="CANCELLED", reason="[bold]sold[/bold]")
        assert "CANCELLED ([bold]sold[/bold])" in painted(session)

    def test_the_drift_is_shown(self) -> None:
        """After an exchange, drift and round trip stand there."""
        session = session_with()
        message = session.due_message(AT)
        assert message is not None
        stamp = END_MS - 5 * MINUTE_MS + 1_000
        session.receive({"type": "sync", "t0": message["t0"], "t1": stamp, "t2": stamp}, AT)
        assert "drift -1000.0 ms, rtt 0.0 ms" in plain_line(session, AT)

    def test_the_last_possible_end_is_named_as_such(self) -> None:
        """At a cap the end is final, one extension is one, and what is over has no future."""
        assert ends_text(timer(at_cap=True)) == "2026-11-22T06:21:59.000Z, final"
        capped = timer(extension_count=1, extension_left_ms=0, clipped_by="count")
        assert extensions_text(capped) == "1 extension, moved 00:00.0, left 00:00.0, clipped by count"
        assert ends_text(timer(status="ENDED")) == "2026-11-22T06:21:59.000Z"
        assert extensions_text(timer(status="ENDED")) == "0 extensions, moved 00:00.0"

    def test_missing_events_are_admitted(self) -> None:
        """A line that came back without what was missed says so."""
        session = session_with()
        session.lost("gone")
        assert line_text(session) == "reconnecting (gone)"
        session.connected(AT)
        session.receive(snapshot() | {"recovered": False}, AT)
        assert line_text(session) == "live (came back once, events are missing)"

    @pytest.mark.parametrize(
        ("frame", "text"),
        [
            ({"type": "timer.started"}, "timer.started"),
            (
                {"type": "timer.extended", "timer": timer(), "previous_ends_at": END_MS - 60_000, "bid_id": "b"}
                | {"clipped_by": "total"},
                "timer.extended  by 01:00.0 to 2026-11-22T06:21:59.000Z for b, clipped by total",
            ),
            ({"type": "timer.closing", "timer": timer()}, "timer.closing  ends 2026-11-22T06:21:59.000Z"),
            ({"type": "timer.resynced", "cause": "failover"}, "timer.resynced  failover"),
            ({"type": "timer.cancelled", "reason": "withdrawn"}, "timer.cancelled  withdrawn"),
            ({"type": "error", "detail": "too fast"}, "error  too fast"),
            (
                {"type": "bid.accepted", "bid_id": "b", "amount_minor": 5, "currency": "EUR", "bidder_id": "x"},
                "bid.accepted  b 5 EUR by x",
            ),
            ({"type": "bid.accepted", "bid_id": "b", "amount_minor": None, "currency": None}, "bid.accepted  b"),
        ],
    )  # fmt: skip
    def test_events_are_told_in_words(self, frame: Frame, text: str) -> None:
        """Each kind of event has its own words."""
        assert event_text(frame | {"server_time": END_MS}) == f"2026-11-22T06:21:59.000Z  {text}"
        assert event_text(frame).endswith(text)


def watching(*steps: Frame | float, terminal: bool) -> str:
    """Watch frames that come in on virtual time; a number is a pause in seconds."""
    timeline = Timeline()
    clock = ManualClock(timeline)
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=terminal, color_system=None)

    def source() -> Source:
        async def frames(session: TimerSession) -> AsyncGenerator[Frame, None]:
            session.connected(clock.monotonic_ns())
            for step in steps:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                session.receive(step, clock.monotonic_ns())
                yield step

        return frames

    run(timeline, lambda: watch("a-1", url="http://unused", console=console, clock=clock, source=source()))
    return out.getvalue()


ENDED: Frame = {
    "type": "timer.ended",
    "cursor": "0.9-0",
    "server_time": END_MS,
    "timer": timer(status="ENDED", version=3),
}
TICK: Frame = {"type": "timer.tick", "version": 2, "status": "ACTIVE", "ends_at": END_MS, "remaining_ms": 1}


class TestWatch:
    """The command, on virtual time."""

    def test_without_a_terminal_it_writes_a_line_a_second(self) -> None:
        """A file gets one line per second, one per event, and the last state."""
        text = watching(snapshot(), 2.5, TICK, 0.25, ENDED, terminal=False)
        lines = text.splitlines()
        assert [line.split(" | ")[0].split("  ")[-1] for line in lines] == [
            "05:00.0", "04:59.0", "04:58.0", "timer.ended", "00:00.0",
        ]  # fmt: skip
        assert "\x1b" not in text

    def test_on_a_terminal_it_paints_and_leaves_the_last_picture(self) -> None:
        """The display moves while it lasts, and what remains on the screen is the end."""
        text = watching(snapshot(), 0.35, ENDED, terminal=True)
        assert "\x1b[" in text
        assert "ENDED" in text.rpartition("auction")[2]

    def test_what_cannot_be_watched_is_an_error_of_the_client(self) -> None:
        """Without another source the URL is dialled; the command tells what is wrong with it (see `test_commands`)."""
        with pytest.raises(UrlError, match="write it as http://HOST:PORT"):
            asyncio.run(watch("a-1", url="nonsense", console=Console(file=StringIO())))
