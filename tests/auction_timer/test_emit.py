"""Sending JSON Lines, against the gateway's own rules for a batch."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auction_timer.client import GatewayAwayError, RefusedError, Retry
from auction_timer.emit import REJECTIONS_LISTED_MAX, EmitResult, EmitStoppedError, Rejection, emit, stream_lines
from gateway.events import BODY_BYTES_MAX, EVENTS_MAX, parse_events
from gateway.problems import Problem, problem_body

URL = "http://gateway.test"
QUICK = Retry(first_ms=1, most_ms=1, deadline_ms=500)


class Intake(httpx.MockTransport):
    """Takes a batch by the rules of the real gateway, all or nothing, and remembers ids."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.taken: dict[str, int] = {}
        self.away = 0
        super().__init__(self._post)

    def _post(self, request: httpx.Request) -> httpx.Response:
        assert len(request.content) <= BODY_BYTES_MAX
        if self.away:
            self.away -= 1
            return httpx.Response(503)
        try:
            events = parse_events(request.content, correlation_id="c", traceparent=None, new_trace_id=lambda: "t")
        except Problem as problem:
            return httpx.Response(problem.type.status, json=problem_body(problem, "c"))
        ids = [event.context.event_id for event in events]
        self.batches.append(ids)
        return httpx.Response(202, json={"results": [self._take(event_id) for event_id in ids]})

    def _take(self, event_id: str) -> dict[str, Any]:
        known = event_id in self.taken
        arrival_ms = self.taken.setdefault(event_id, len(self.taken))
        return {"id": event_id, "status": "duplicate" if known else "accepted", "arrival_ms": arrival_ms}


def bid(event_id: str, **detail: Any) -> bytes:
    """One line with an accepted bid."""
    body = {"auction_id": "a", "bid_id": event_id} | detail
    return orjson.dumps({"id": event_id, "detail-type": "auctions.bid.accepted", "detail": body})


async def send(lines: Any, intake: Intake | None = None, **options: Any) -> EmitResult:
    """Emit to a fake intake."""
    return await emit(lines, url=URL, transport=intake or Intake(), retry=QUICK, **options)


async def test_lines_become_batches() -> None:
    """Events go out in their order, 500 to a request, and blank lines and comments are no events."""
    intake = Intake()
    ids = [f"e{number}" for number in range(1_201)]
    result = await send([b"# a comment\n", b"\n", *(bid(event_id) + b"\n" for event_id in ids)], intake)
    assert (result.accepted, result.duplicate, result.rejected, result.lines) == (1_201, 0, 0, 1_203)
    assert [event_id for batch in intake.batches for event_id in batch] == ids
    assert max(len(batch) for batch in intake.batches) == EVENTS_MAX
    assert result.exit_code == 0


async def test_a_file_sent_twice_is_a_file_of_duplicates() -> None:
    """The second time every event is a duplicate, which is no failure."""
    intake = Intake()
    await send([bid("e1"), bid("e2")], intake)
    result = await send([bid("e1"), bid("e2"), bid("e3")], intake)
    assert (result.accepted, result.duplicate, result.rejected) == (1, 2, 0)
    assert result.exit_code == 0


async def test_bad_events_do_not_hold_up_the_good_ones() -> None:
    """The good events of a refused batch are sent again; the bad ones are named by line, with every reason."""
    intake = Intake()
    lines = [
        bid("e1"),
        bid("e2", amount_minor=-1, currency="x"),
        b"# note \xff",
        b"{no json",
        bid("e5"),
        b"[1]",
        bid("e7", bid_id=""),
    ]
    result = await send(lines, intake)
    assert intake.batches == [["e1", "e5"]]
    assert (result.accepted, result.rejected, result.exit_code) == (2, 4, 1)
    assert [rejection.line for rejection in result.rejections] == [2, 4, 6, 7]
    assert "detail.amount_minor" in result.rejections[0].reason
    assert "detail.currency" in result.rejections[0].reason
    assert result.rejections[1].reason.startswith("is not JSON")
    assert result.rejections[2].reason == "must be an object"


async def test_what_is_not_utf_8_is_a_fault_of_its_own_line() -> None:
    """It is neither altered and taken, nor the end of the lines behind it."""
    intake = Intake()
    result = await send([bid("e1"), bid("e2").replace(b"e2", b"e\xff"), bid("e3")], intake)
    assert intake.batches == [["e1", "e3"]]
    assert (result.accepted, result.rejected) == (2, 1)
    assert result.rejections[0].line == 2
    assert result.rejections[0].reason.startswith("is not JSON")


@given(st.lists(st.sampled_from(["good", "again", "blank", "noise", "wrong"]), max_size=60), st.integers(1, 7))
async def test_every_line_is_accounted_for(kinds: list[str], batch_max: int) -> None:
    """Whatever the mixture and the batches, each line is counted once, and the good events arrive once, in order."""
    intake, lines = Intake(), []
    for number, kind in enumerate(kinds):
        lines.append(
            {
                "good": bid(f"e{number}"),
                "again": bid("same"),
                "blank": b"  ",
                "noise": b"}{",
                "wrong": bid(f"e{number}", amount_minor="1"),
            }[kind]
        )
    result = await send(lines, intake, batch_max=batch_max)
    again = kinds.count("again")
    assert result.accepted == kinds.count("good") + min(1, again)
    assert result.duplicate == max(0, again - 1)
    assert [one.line for one in result.rejections] == [
        number for number, kind in enumerate(kinds, start=1) if kind in ("noise", "wrong")
    ]
    sent = [event_id for batch in intake.batches for event_id in batch if event_id != "same"]
    assert sent == [f"e{number}" for number, kind in enumerate(kinds) if kind == "good"]
    assert all(len(batch) <= batch_max for batch in intake.batches)


async def test_a_request_stays_below_a_megabyte() -> None:
    """Large events make small batches, and one that fits into no request is rejected without asking."""
    intake = Intake()
    large = [bid(f"e{number}", note="x" * 300_000) for number in range(7)]
    huge = bid("huge", note="x" * BODY_BYTES_MAX)
    result = await send([*large[:3], huge, *large[3:]], intake)
    assert [len(batch) for batch in intake.batches] == [3, 3, 1]
    assert result.rejections == [Rejection(4, f"has {len(huge)} bytes; a request has at most {BODY_BYTES_MAX}")]


async def test_it_never_reads_far_ahead() -> None:
    """A source without end is read no further than two batches and what is under way."""
    read = 0
    furthest = 0
    intake = Intake()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for read in range(1, 1_000):
            yield bid(f"e{read}")

    def look(result: EmitResult) -> None:
        nonlocal furthest
        furthest = max(furthest, read - result.accepted)

    result = await send(endless(), intake, batch_max=10, on_progress=look)
    assert result.accepted == 999
    assert furthest <= 3 * 10


async def test_progress_is_told_after_each_batch() -> None:
    """The counts grow with every request."""
    counts: list[int] = []
    await send(
        [bid(f"e{number}") for number in range(25)], batch_max=10, on_progress=lambda now: counts.append(now.accepted)
    )
    assert counts == [10, 20, 25]


async def test_who_is_interrupted_still_has_the_counts() -> None:
    """They are kept where the caller can see them, also when nothing is returned any more."""
    result = EmitResult()

    async def lines() -> AsyncIterator[bytes]:
        yield b"}{"
        yield bid("e1")
        await asyncio.Event().wait()

    sent = asyncio.Event()
    sending = asyncio.create_task(send(lines(), result=result, on_progress=lambda _result: sent.set()))
    await sent.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert (result.lines, result.accepted, result.rejected) == (2, 1, 1)


async def test_a_gateway_that_comes_back_gets_everything() -> None:
    """A few refusals for the moment cost nothing but time."""
    intake = Intake()
    intake.away = 3
    result = await send([bid("e1")], intake)
    assert result.accepted == 1


async def test_a_gateway_that_stays_away_stops_it() -> None:
    """The error says at which line, and brings what was done before."""
    intake = Intake()

    def leave(_result: EmitResult) -> None:
        intake.away = 10**9

    with pytest.raises(EmitStoppedError, match="stopped at line 3") as caught:
        await send([bid(f"e{number}") for number in range(1, 9)], intake, batch_max=2, on_progress=leave)
    assert isinstance(caught.value.__cause__, GatewayAwayError)
    assert caught.value.line == 3
    assert caught.value.result.accepted == 2


async def test_a_refusal_of_another_kind_stops_it() -> None:
    """What is not about single events cannot be mended by leaving some out, and is not tried for ever."""
    forbidden = httpx.MockTransport(lambda _request: httpx.Response(403, json={"error_code": "FOREIGN_ORIGIN"}))
    with pytest.raises(EmitStoppedError, match="FOREIGN_ORIGIN") as caught:
        await emit([bid("e1")], url=URL, transport=forbidden)
    assert isinstance(caught.value.__cause__, RefusedError)
    nobody = httpx.MockTransport(
        lambda _request: httpx.Response(400, json={"error_code": "MALFORMED_EVENTS", "errors": []})
    )
    with pytest.raises(EmitStoppedError, match="MALFORMED_EVENTS"):
        await emit([bid("e1")], url=URL, transport=nobody)


async def test_a_source_that_fails_is_told_after_what_was_read() -> None:
    """Events read before the fault are sent, then the fault comes out as it is."""
    intake = Intake()

    def failing() -> Iterator[bytes]:
        yield bid("e1")
        raise OSError("the disk is gone")

    async def failing_later() -> AsyncIterator[bytes]:
        for line in failing():
            yield line

    with pytest.raises(OSError, match="the disk is gone"):
        await send(failing_later(), intake)
    assert intake.batches == [["e1"]]


async def test_rejections_are_listed_up_to_a_bound() -> None:
    """A file of nonsense is counted to its end, without keeping every reason."""
    result = await send([b"nonsense"] * (REJECTIONS_LISTED_MAX + 5))
    assert result.rejected == REJECTIONS_LISTED_MAX + 5
    assert len(result.rejections) == REJECTIONS_LISTED_MAX


@pytest.mark.parametrize("batch_max", [0, EVENTS_MAX + 1])
async def test_a_batch_has_its_bounds(batch_max: int) -> None:
    """A size no request could have is told before anything is read."""
    with pytest.raises(ValueError, match="batch_max"):
        await send([], batch_max=batch_max)


def feeder(fd: int, data: bytes) -> "asyncio.Future[None]":
    """Write all of `data` in a thread, since a pipe holds 64 kB, and close."""

    def feed() -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.close(fd)

    return asyncio.get_running_loop().run_in_executor(None, feed)


async def test_a_pipe_is_read_line_by_line() -> None:
    """Lines of a pipe come as they are, the last one also without its newline."""
    reading, writing = os.pipe()
    os.write(writing, b"one\n\ntwo\xff\nthree")
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert [line async for line in stream_lines(pipe)] == [b"one\n", b"\n", b"two\xff\n", b"three"]


async def test_of_an_endless_line_only_the_beginning_is_kept(tmp_path: Path) -> None:
    """A line beyond any event is cut, and what follows keeps its line number."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    both = os.open(fifo, os.O_RDWR)
    reading = os.open(fifo, os.O_RDONLY)
    feeding = feeder(both, b"x" * 5 * BODY_BYTES_MAX + b"\nnext\n")
    with os.fdopen(reading, "rb") as pipe:
        lines = stream_lines(pipe)
        first, second = await anext(lines), await anext(lines)
        await lines.aclose()
    await feeding
    assert BODY_BYTES_MAX < len(first) <= 3 * BODY_BYTES_MAX
    assert second == b"next\n"


async def test_a_regular_file_can_be_stdin(tmp_path: Path) -> None:
    """What an event loop cannot wait for, a file or /dev/null, is read all the same."""
    path = tmp_path / "events.jsonl"
    path.write_text("one\ntwo\n")
    with path.open("rb") as file:
        assert [line async for line in stream_lines(file)] == [b"one\n", b"two\n"]
    with os.fdopen(os.open("/dev/null", os.O_RDONLY), "rb") as nothing:
        assert [line async for line in stream_lines(nothing)] == []
