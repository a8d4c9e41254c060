"""`auction-timer emit`: send events written as JSON Lines, in batches, and say what became of each.

The idea: the server takes a batch whole or not at all (contract, section 2), a file should not fail for one bad line. So a
batch that is refused is sent again without the events it was refused for, which are reported with their line and reason.

One reader fills a bounded queue while one batch is on its way. Never two: an auction's events count in the order in which
they arrive, and two requests at once may overtake each other, a bid its own auction's start. One is enough: the
server is the slower side. Measured with 50,100 events on one `serve` and two cores: 4,200 new events a second, 10,700 known
ones, and a tenth of the time spent here.

    lines ──▶ reader ──queue (two batches)──▶ sender ──POST /events──▶ gateway
"""

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, Final

import httpx
import orjson

from auction_timer.client import (
    BODY_BYTES_MAX,
    EVENTS_MAX,
    Api,
    ClientError,
    EventResult,
    MalformedEventsError,
    Retry,
)

LINE_BYTES_MAX: Final = BODY_BYTES_MAX - 2
"""An event must fit into one body, with the brackets around it."""
REJECTIONS_LISTED_MAX: Final = 1_000
"""Rejections kept with their reason; more are only counted, so that a file of nonsense does not fill the memory."""
LINES_AT_ONCE: Final = 500
"""Lines taken from a file per visit to its thread."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line that was not accepted."""

    line: int
    reason: str


@dataclass(slots=True)
class EmitResult:
    """What became of the lines. `lines` counts those read, blank ones and comments as well."""

    lines: int = 0
    accepted: int = 0
    duplicate: int = 0
    rejected: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    """The first 1,000."""

    @property
    def exit_code(self) -> int:
        """1 if any line was rejected."""
        return 1 if self.rejected else 0

    def reject(self, line: int, reason: str) -> None:
        """Count a line that was not accepted."""
        self.rejected += 1
        if len(self.rejections) < REJECTIONS_LISTED_MAX:
            self.rejections.append(Rejection(line, reason))

    def take(self, results: Iterable[EventResult]) -> None:
        """Count events that were answered."""
        for result in results:
            if result.is_duplicate:
                self.duplicate += 1
            else:
                self.accepted += 1


class EmitStoppedError(ClientError):
    """Sending stopped before the end. `result` is what became of the lines until then; `line` is the first one whose fate is
    unknown. Sending all of them again is safe: what was taken is a duplicate then."""

    def __init__(self, cause: ClientError, line: int, result: EmitResult) -> None:
        super().__init__(f"stopped at line {line}: {cause}")
        self.line = line
        self.result = result


@dataclass(frozen=True, slots=True)
class _Event:
    line: int
    body: bytes


async def emit(
    lines: AsyncIterable[bytes] | Iterable[bytes],
    *,
    url: str,
    token: str | None = None,
    batch_max: int = EVENTS_MAX,
    on_progress: Callable[[EmitResult], None] | None = None,
    result: EmitResult | None = None,
    retry: Retry | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> EmitResult:
    """Send every line that holds an event; blank lines and lines that begin with `#` are skipped.

    Args:
        lines: JSON Lines. A plain iterable is read in a thread, 500 lines at a time; see `stream_lines` for a pipe.
        url: of the gateway.
        token: what the gateway knows the caller by, with the scope `events:write`; one in open mode needs none.
        batch_max: events per request, 1 to 500. A request also stays below 1 MiB.
        on_progress: called after each batch with the counts so far; the object is the result itself.
        result: what is counted in, and returned; for whoever wants to know how far it came when it is interrupted.
        retry: how long to insist when the gateway is away.
        transport: for tests.

    Raises:
        EmitStoppedError: the gateway is away, or refuses requests as a whole.
        UrlError: the URL is not one of a gateway.
    """
    if not 1 <= batch_max <= EVENTS_MAX:
        raise ValueError(f"batch_max must be between 1 and {EVENTS_MAX}, not {batch_max}")
    result = EmitResult() if result is None else result
    inbox = _Inbox(batch_max)
    async with Api(url, token=token, retry=retry, transport=transport) as api:
        reader = asyncio.create_task(_read(lines, inbox, result))
        try:
            await _send_all(api, inbox, result, on_progress or (lambda _result: None))
            await reader
        finally:
            reader.cancel()
            await asyncio.wait([reader])
            # What is no JSON is found ahead of what the server objects to.
            result.rejections.sort(key=lambda rejection: rejection.line)
    return result


async def stream_lines(stream: BinaryIO) -> AsyncGenerator[bytes, None]:
    """The lines of an open file, such as stdin: of a pipe or a terminal each as soon as it is there. Bytes, because what is
    not UTF-8 is a fault of its own line, and must neither be altered on the way nor end the others.

    Of a line far beyond the bound of an event only the beginning is kept, which `emit` rejects.
    """
    fd = stream.fileno()
    if not _can_be_awaited(fd):
        async for line in _each(stream):
            yield line
        return
    reader = asyncio.StreamReader(limit=2 * BODY_BYTES_MAX)
    # A copy, because the transport closes what it is given at the end of the stream.
    copy = os.fdopen(os.dup(fd), "rb", buffering=0)
    blocking = os.get_blocking(fd)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), copy
    )
    try:
        while line := await _one_line(reader):
            yield line
    finally:
        transport.close()
        # Blocking or not belongs to the open file, not to the copy: a terminal is shared with the shell.
        os.set_blocking(fd, blocking)


def _can_be_awaited(fd: int) -> bool:
    """Regular files and devices such as /dev/null are always readable, and an event loop refuses to wait for them."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


async def _one_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as rest:
        return rest.partial
    except asyncio.LimitOverrunError as overrun:
        return await _beginning(reader, overrun.consumed)


async def _beginning(reader: asyncio.StreamReader, there: int) -> bytes:
    """Take an endless line, of which `there` bytes have come, and keep those."""
    kept = await reader.read(there)
    while True:
        try:
            await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return kept
        except asyncio.LimitOverrunError as overrun:
            await reader.read(overrun.consumed)
        else:
            return kept


class _Inbox:
    """Events between the reader and the sender: two batches of them, with a request's bounds on what is taken out."""

    def __init__(self, batch_max: int) -> None:
        self._batch_max = batch_max
        self._queue: asyncio.Queue[_Event | None] = asyncio.Queue(2 * batch_max)
        self._held: _Event | None = None
        self._ended = False

    async def put(self, event: _Event | None) -> None:
        """Add an event, waiting for room; None is the end."""
        await self._queue.put(event)

    async def batch(self) -> list[_Event]:
        """What is there by now, at least one event; empty at the end.

        Nothing lingers: a trickle is sent line by line, a flood fills a batch while the one before is on its way.
        """
        event = self._held or (None if self._ended else await self._queue.get())
        self._held = None
        batch: list[_Event] = []
        size = 1
        while event is not None:
            size += 1 + len(event.body)
            if size > BODY_BYTES_MAX:
                self._held = event
                return batch
            batch.append(event)
            if len(batch) == self._batch_max or self._queue.empty():
                return batch
            event = self._queue.get_nowait()
        self._ended = True
        return batch


async def _read(lines: AsyncIterable[bytes] | Iterable[bytes], inbox: _Inbox, result: EmitResult) -> None:
    try:
        async for line in _each(lines):
            result.lines += 1
            event = _event(line.strip(), result)
            if event is not None:
                await inbox.put(event)
    except Exception:
        await inbox.put(None)
        raise
    await inbox.put(None)


async def _each(lines: AsyncIterable[bytes] | Iterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(lines, AsyncIterable):
        async for line in lines:
            yield line
        return
    source = iter(lines)
    while chunk := await asyncio.to_thread(lambda: list(islice(source, LINES_AT_ONCE))):
        for line in chunk:
            yield line


def _event(line: bytes, result: EmitResult) -> _Event | None:
    """The event of a line; None if it holds none, or none that can be sent."""
    if not line or line.startswith(b"#"):
        return None
    try:
        body = orjson.dumps(orjson.loads(line))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        result.reject(result.lines, f"is not JSON: {error}")
        return None
    if len(body) > LINE_BYTES_MAX:
        result.reject(result.lines, f"has {len(body)} bytes; a request has at most {BODY_BYTES_MAX}")
        return None
    return _Event(result.lines, body)


async def _send_all(api: Api, inbox: _Inbox, result: EmitResult, on_progress: Callable[[EmitResult], None]) -> None:
    while batch := await inbox.batch():
        try:
            await _send(api, batch, result)
        except ClientError as error:
            raise EmitStoppedError(error, batch[0].line, result) from error
        on_progress(result)


async def _send(api: Api, batch: Sequence[_Event], result: EmitResult) -> None:
    """Send a batch; if events of it are malformed, send it again without them, until nothing is left to object to."""
    while batch:
        try:
            result.take(await api.post_encoded([event.body for event in batch]))
        except MalformedEventsError as refused:
            reasons: dict[int, list[str]] = {}
            for fault in refused.errors:
                reasons.setdefault(fault.index, []).append(str(fault))
            good = [event for index, event in enumerate(batch) if index not in reasons]
            if len(good) == len(batch):
                raise
            for index, event in enumerate(batch):
                if index in reasons:
                    result.reject(event.line, "; ".join(reasons[index]))
            batch = good
        else:
            return
