"""`GET /auctions/{id}/events`: the frames of the socket as Server-Sent Events (WHATWG HTML, section 9.2).

For whoever can read HTTP but cannot hold a socket. A stream is one more watcher of the same room: it starts with the
snapshot, resumes from `Last-Event-ID` as a socket does from `since`, keeps ticks in one slot and events within the same
bounds, and is sent away by the same codes:

    retry: 2741                              each stream its own pause, so that they do not come back together

    event: timer.extended                    the frame's type
    id: 3.1787392800000-0                    its cursor, on the event lane; the browser sends it back by itself
    data: {"type":"timer.extended", ...}     the same bytes that sockets get

    :                                        nothing else was sent for 10 s

    event: close                             the last one, if the gateway ends the stream
    data: {"type":"close","code":4000,"reason":"the auction is over"}

A browser comes back whenever a stream ends, for ever. So who comes back to an auction that is over, and has read how it
ended, is answered 204, upon which it stops (section 9.2.5).
"""

import asyncio
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from websockets.datastructures import Headers
from websockets.http11 import Request as Handshake

from engine.domain.instants import SECOND_MS
from engine.store.protocol import StoreError
from gateway.auth import Principal, principal_of
from gateway.closing import CloseCode
from gateway.command_routes import away, room_of, unknown_auction
from gateway.replay import Greeting
from gateway.room import Frame, Room

if TYPE_CHECKING:
    from gateway.door import Door

MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final = {
    "Content-Type": MEDIA_TYPE,
    "Cache-Control": "no-store, no-transform",
    # nginx would hold events back until its buffer is full.
    "X-Accel-Buffering": "no",
}
RETRY_MS: Final = (500, 3_500)
"""When a stream that broke is opened again, at the earliest and at the latest."""
HEARTBEAT: Final = b":\n\n"
HEARTBEAT_S: Final = 10.0
"""Silence after which a heartbeat is written: well before a client may suspect its connection (`heartbeat_ms`)."""
LOOK_EVERY_S: Final = 1.0
CLOSE: Final = "close"


def event_text(frame: Frame, *, with_id: bool = True) -> bytes:
    """A frame as an event of the stream. JSON has no line breaks of its own, so the data is one line."""
    kind = orjson.loads(frame.payload)["type"].encode()
    place = b"id: %b\n" % frame.cursor.encode() if with_id and frame.cursor is not None else b""
    return b"event: %b\n%bdata: %b\n\n" % (kind, place, frame.payload)


# Once per frame, however many streams it goes to: a room hands the same frame to all of them before it takes the next.
_shared_text: Final = lru_cache(maxsize=8)(event_text)


def farewell_text(code: CloseCode, reason: str) -> bytes:
    """The last event: what a socket is told in its close frame."""
    return b"event: close\ndata: %b\n\n" % orjson.dumps({"type": CLOSE, "code": code.value, "reason": reason})


def greeting_text(greeting: Greeting, retry_ms: int) -> bytes:
    """The first bytes: when to come back, the snapshot, what was missed.

    A snapshot stands at the end of what follows it. Its cursor would skip that, if the stream broke in between; so where
    something follows it has no id.
    """
    missed = greeting.missed.joined(event_text)
    return b"retry: %d\n\n%b%b" % (retry_ms, event_text(greeting.snapshot, with_id=not missed), missed)


class EventStream:
    """One stream: what waits to be written, within the bounds of a socket. Implements `gateway.room.Stream`."""

    __slots__ = (
        "_door",
        "_is_writing",
        "_looking",
        "_looks",
        "_news",
        "_outbox",
        "_outbox_bytes",
        "_patience",
        "_tick",
        "address",
        "is_closed",
        "is_gone",
        "principal",
        "room",
    )

    def __init__(self, door: "Door", address: str, principal: Principal) -> None:
        self.address = address
        self.principal = principal
        self.room: Room | None = None
        self.is_closed = False
        """The farewell is said: what waits is still written, and nothing comes after it."""
        self.is_gone = False
        """The client has hung up."""
        self._door = door
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._tick: bytes | None = None
        self._news = asyncio.Event()
        self._is_writing = False
        self._looks = 0
        """How often it was looked at since the last write began."""
        self._looking: asyncio.TimerHandle
        self._patience: asyncio.Timeout

    def enter(self, room: Room, greeting: bytes) -> None:
        """Watch a room from now on; the greeting says how it stands now."""
        self.room = room
        room.streams.add(self)
        self._outbox.append(greeting)

    def leave(self) -> None:
        """Watch no more."""
        room, self.room = self.room, None
        if room is not None:
            room.streams.discard(self)

    def hang_up(self) -> None:
        """The client is gone."""
        self.is_gone = True
        self._news.set()

    # gateway.room.Stream.

    def event(self, frame: Frame) -> None:
        if self._tick is not None:  # it would come behind what is newer
            self._tick = None
            self._door.metrics.conflated_ticks.inc()
        text = _shared_text(frame)
        self._outbox.append(text)
        self._outbox_bytes += len(text)
        self._news.set()
        if self._outbox_bytes > self._door.outbox_bytes_max:
            self._outbox, self._tick = [], None
            self.close(CloseCode.SLOW_CONSUMER, "read faster, or come back with Last-Event-ID")

    def tick(self, frame: Frame) -> None:
        if self._tick is not None:
            self._door.metrics.conflated_ticks.inc()
        self._tick = _shared_text(frame)
        self._news.set()

    def close(self, code: CloseCode, reason: str) -> None:
        if self.is_closed:
            return
        self.leave()
        self.is_closed = True
        self._door.metrics.disconnect(code)
        self._outbox.append(farewell_text(code, reason))
        self._news.set()

    # Writing.

    async def write(self, send: Send) -> bool:
        """Write until the stream is closed or the client gone; False if it did not read within the bound."""
        self._look_soon()
        try:
            async with asyncio.timeout(None) as self._patience:
                while not self.is_gone:
                    is_last, chunk = self.is_closed, self._take()
                    self._looks, self._is_writing = 0, True
                    await send({"type": "http.response.body", "body": chunk, "more_body": not is_last})
                    self._is_writing = False
                    if is_last:
                        break
                    await self._news.wait()
        except TimeoutError:
            return False
        finally:
            self._looking.cancel()
        return True

    def _take(self) -> bytes:
        """What waits: the events, then the newest tick; a heartbeat if nothing does."""
        self._news.clear()
        kept, self._outbox, self._outbox_bytes = self._outbox, [], 0
        if self._tick is not None:
            kept.append(self._tick)
            self._tick = None
        return b"".join(kept) or HEARTBEAT

    def _look(self) -> None:
        """See that what is written is taken, and that something is. A deadline for each write would cost a tenth of it.

        Time is counted in looks: while the process is stopped nobody can read from it, and none is counted.
        """
        self._looks += 1
        since_s = self._looks * LOOK_EVERY_S
        if not self._is_writing:
            if since_s >= HEARTBEAT_S:
                self._news.set()
        elif since_s > self._door.outbox_age_max_ms / SECOND_MS:
            self.close(CloseCode.SLOW_CONSUMER, "")
            self._patience.reschedule(0.0)
            return
        self._look_soon()

    def _look_soon(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)


class EventStreamResponse:
    """The answer that carries a stream, and ends with it."""

    def __init__(self, door: "Door", stream: EventStream) -> None:
        self._door = door
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI names it
        stream = self._stream
        listening = asyncio.create_task(_hang_up_with(stream, receive))
        try:
            headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
            await send(start)
            if not await stream.write(send):
                _cut(receive)
                await listening
        finally:
            self._door.stream_closed(stream)
            listening.cancel()
            await asyncio.wait([listening])


async def _hang_up_with(stream: EventStream, receive: Receive) -> None:
    """Tell a stream when its client is gone. A body, which a GET has no use for, is read and forgotten."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.hang_up()


def _cut(receive: Receive) -> None:
    """Drop the connection with what could not be written.

    ASGI has no word for it: a response that just ends would wait in its buffer for a reader that does not read. uvicorn's
    `receive` belongs to the cycle that holds the transport.
    """
    transport: Any = getattr(getattr(receive, "__self__", None), "transport", None)
    if isinstance(transport, asyncio.Transport):
        transport.abort()


@dataclass(frozen=True, slots=True)
class EventStreamRoutes:
    """The route and what it asks."""

    door: "Door"

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/auctions/{auction_id}/events", self.get_events, methods=["GET"])]

    async def get_events(self, request: Request) -> Response | EventStreamResponse:
        """The frames of one auction from now on, or from `Last-Event-ID` on."""
        client = request.client
        stream = EventStream(self.door, client.host if client is not None else "", principal_of(request))
        self.door.stream_opened(stream)
        answer: Response | EventStreamResponse | None = None
        try:
            answer = await self._answer(request, stream)
        finally:
            if not isinstance(answer, EventStreamResponse):
                self.door.stream_closed(stream)
        return answer

    async def _answer(self, request: Request, stream: EventStream) -> Response | EventStreamResponse:
        door = self.door
        refused = door.refuse(stream, _handshake(request))
        if refused is not None:
            raise refused
        auction_id = request.path_params["auction_id"]
        await room_of(door.hub, auction_id)
        if request.method == "HEAD":
            return Response(headers=HEADERS)
        # The header first: a browser that comes back sends it, and the `since` of its first address still.
        since = request.headers.get("last-event-id") or request.query_params.get("since")
        try:
            entrance = await door.hub.entrance(auction_id, since)
        except StoreError:
            raise away() from None
        if entrance is None:  # a failover has taken it back while we waited
            raise unknown_auction(auction_id)
        room = entrance.room
        greeting = door.hub.greeting(room, since, entrance.recalled)
        if room.is_over:
            if greeting.recovered and not greeting.missed.events:
                return Response(status_code=204, headers={"Cache-Control": "no-store"})
            door.on_over(room)
        stream.enter(room, greeting_text(greeting, random.randint(*RETRY_MS)))  # noqa: S311 - spreads load, protects nothing
        return EventStreamResponse(door, stream)


def _handshake(request: Request) -> Handshake:
    """What the door judges a newcomer by."""
    judged = [(name, value) for name in ("Origin", "Host") for value in request.headers.getlist(name)]
    return Handshake(request.url.path, Headers(judged))
