"""One socket: bytes in and out, nothing else.

uvicorn hands the connection over when a request asks to become a WebSocket, and gives it to this class (`ws=`). Handshake,
framing, ping, pong and close belong to the sans-I/O `ServerProtocol` of the websockets library; the hub writes frames that
were built once straight to the transport. So a socket costs no task, no queue and no encoding of its own.

    uvicorn ──data_received──▶ ServerProtocol ──events──▶ handshake · client frames
    hub ──send(frame)────────▶ transport         (writable)
        ──keep_event/tick────▶ outbox, one slot  (lagging, after pause_writing)
"""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import parse_qs, unquote

import orjson
import structlog
from websockets.datastructures import Headers
from websockets.frames import Close, Frame, Opcode
from websockets.frames import CloseCode as WebSocketCloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from engine.contract.intake import AUCTION_ID
from engine.contract.timers import CorruptTimerError
from engine.domain.instants import HOUR_MS
from engine.store.protocol import StoreError
from gateway.auth import LOCAL
from gateway.closing import CloseCode
from gateway.correlation import HEADER, correlation_id_of
from gateway.hub import Entrance
from gateway.problems import MEDIA_TYPE, Problem, ProblemType, problem_body, unavailable
from gateway.room import Room, text_frame
from gateway.tokens import Tokens, authenticate, chosen_subprotocol, handshake_token

if TYPE_CHECKING:
    from gateway.door import Door

CLIENT_FRAME_BYTES_MAX: Final = 4_096
MESSAGES_PER_SECOND_MAX: Final = 5
CLIENT_FRAMES_PER_SECOND_MAX: Final = 50
"""Of every kind: fragments, pings and pongs cost as much as messages."""
MESSAGE_EARNED_NS: Final = 190_000_000
FRAME_EARNED_NS: Final = 19_000_000
"""In which one more is earned: a twentieth sooner than the rates ask, so that a client with a fast clock keeps to them."""
PIECE_BYTES: Final = 4_096
"""Parsed at a time, so that the rates are looked at between: 256 KiB, which a loop reads at once, may be 43,000 pings."""
BAD_MESSAGES_MAX: Final = 3
REPORTED_MS_MAX: Final = 24 * HOUR_MS
CLOSE_WITHIN_S: Final = 5.0
"""A peer that does not finish the closing handshake is cut off then."""
WRITE_BUFFER_HIGH_BYTES: Final = 65_536
"""Above this the transport asks to pause, and the socket counts as lagging: about 250 ticks."""
REASON_BYTES_MAX: Final = 123
"""RFC 6455, section 5.5.1: a close frame carries at most 125 bytes, two of them the code."""

log = structlog.get_logger()


class Connection(asyncio.Protocol):
    """A WebSocket connection, from its handshake on. Created by uvicorn, with its arguments."""

    __slots__ = (
        "_bad_messages",
        "_closer",
        "_frames_full_ns",
        "_message",
        "_messages_full_ns",
        "_opcode",
        "_outbox",
        "_tick",
        "_uvicorn_connections",
        "address",
        "correlation_id",
        "door",
        "lagging_since_ns",
        "last_heard_ns",
        "outbox_bytes",
        "pinged_at_ns",
        "principal",
        "room",
        "transport",
        "ws",
    )

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any]) -> None:  # noqa: ARG002 - uvicorn names them
        self.door: Door = app_state["door"]
        self.ws = ServerProtocol(max_size=CLIENT_FRAME_BYTES_MAX, select_subprotocol=_subprotocol)
        self.principal = LOCAL
        self.correlation_id = ""
        self.room: Room | None = None
        self.address = ""
        self.last_heard_ns = self.door.now_ns()
        self.pinged_at_ns = 0
        self.lagging_since_ns = 0
        self.outbox_bytes = 0
        self._outbox: list[bytes] = []
        self._tick: bytes | None = None
        self._message = b""
        self._opcode = Opcode.TEXT
        self._bad_messages = 0
        # A bucket is one number: when it will be full again.
        self._messages_full_ns = 0
        self._frames_full_ns = 0
        self._closer: asyncio.TimerHandle | None = None
        self._uvicorn_connections: set[Any] = server_state.connections

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH_BYTES)
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if isinstance(peer, tuple) else ""
        self._uvicorn_connections.add(self)
        self.door.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio names it
        if self._closer is not None:
            self._closer.cancel()
        self._leave()
        self._uvicorn_connections.discard(self)
        self.door.closed(self)

    def data_received(self, data: bytes) -> None:
        self._heard()
        for start in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():
                return
            self.ws.receive_data(data[start : start + PIECE_BYTES])
            for event in self.ws.events_received():
                if isinstance(event, Request):
                    self._handshake(event)
                else:
                    self._on_frame(cast(Frame, event))
            self._flush()

    def eof_received(self) -> None:
        self.ws.receive_eof()
        self._flush()

    def pause_writing(self) -> None:
        self.transport.pause_reading()  # or its pings would be answered into a buffer without a bound
        if self.room is not None:
            self.lagging_since_ns = self.door.now_ns()
            self.room.writable.discard(self)
            self.room.lagging.add(self)

    def resume_writing(self) -> None:
        self._heard()  # we did not listen meanwhile, and whoever takes what waited is there
        self.transport.resume_reading()
        room = self.room
        if room is None or self not in room.lagging:
            return
        kept, self._outbox, self.outbox_bytes = self._outbox, [], 0
        if self._tick is not None:
            kept.append(self._tick)
            self._tick = None
        room.lagging.discard(self)
        room.writable.add(self)
        # All at once: the outbox is bounded, and if it fills the transport again, pause_writing comes again.
        self.transport.write(b"".join(kept))

    def _heard(self) -> None:
        self.last_heard_ns = self.door.now_ns()
        self.pinged_at_ns = 0

    # gateway.room.Subscriber.

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def keep_event(self, frame: bytes) -> None:
        if self._tick is not None:  # it would come behind what is newer
            self._tick = None
            self.door.metrics.conflated_ticks.inc()
        self._outbox.append(frame)
        self.outbox_bytes += len(frame)
        if self.outbox_bytes > self.door.outbox_bytes_max:
            self.close(CloseCode.SLOW_CONSUMER, "read faster, or come back with since")

    def keep_tick(self, frame: bytes) -> None:
        if self._tick is not None:
            self.door.metrics.conflated_ticks.inc()
        self._tick = frame

    # Opening.

    def _handshake(self, request: Request) -> None:
        refused = self.door.refuse(self, request)
        if refused is not None:
            self._reject(request, refused)
            return
        if self.door.tokens is None:
            self._find(request)
        else:
            self.door.spawn(self._authenticate_and_find(request, self.door.tokens))

    async def _authenticate_and_find(self, request: Request, tokens: Tokens) -> None:
        headers, query = request.headers, request.path.partition("?")[2]
        offered = [name.strip() for value in headers.get_all("Sec-WebSocket-Protocol") for name in value.split(",")]
        try:
            self.principal = await authenticate(
                tokens, handshake_token(headers.get_all("Authorization"), offered, query)
            )
        except Problem as refused:
            if not self.transport.is_closing():
                self._reject(request, refused)
            return
        if not self.transport.is_closing():
            self._find(request)

    def _find(self, request: Request) -> None:
        path, _, query = request.path.partition("?")  # urlsplit raises on some: "//[" would leave us half connected
        auction_id = _auction_id(path)
        if auction_id is None:
            self._reject(request, Problem(ProblemType.RESOURCE_NOT_FOUND, "sockets are at /auctions/{id}/updates"))
            return
        # An empty one is a cursor that leads nowhere, not none: whoever brings it believes that it was here before.
        since = parse_qs(query, keep_blank_values=True).get("since", [None])[-1]
        entrance = self.door.hub.entrance_now(auction_id, since)
        if entrance is not None:
            self._accept(request, entrance)
        else:
            self.door.spawn(self._wait_and_accept(request, auction_id, since))

    async def _wait_and_accept(self, request: Request, auction_id: str, since: str | None) -> None:
        entrance, refused = None, Problem(ProblemType.RESOURCE_NOT_FOUND, f"no auction {auction_id}")
        try:
            entrance = await self.door.hub.entrance(auction_id, since)
        except StoreError:
            refused = unavailable("the auction cannot be read now; try again")
        except CorruptTimerError:
            log.exception("timer_unreadable", auction_id=auction_id)
            refused = Problem(ProblemType.INTERNAL_ERROR, "a fault of ours; report it with the correlation id")
        if self.transport.is_closing():
            return
        if entrance is None:
            self._reject(request, refused)
        else:
            self._accept(request, entrance)

    def _accept(self, request: Request, entrance: Entrance) -> None:
        response = self.ws.accept(request)
        self.correlation_id = response.headers[HEADER] = _correlation_id(request)
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            response.headers["Sec-WebSocket-Version"] = "13"  # RFC 6455, section 4.4: what would have been understood
        self.ws.send_response(response)
        self._flush()
        if self.ws.state is not State.OPEN:
            self.door.metrics.handshake("malformed")
            self._cut_soon()
            return
        self.door.metrics.handshake("accepted")
        room = self.room = entrance.room
        room.writable.add(self)
        self.transport.writelines(self.door.hub.greeting(room, entrance.since, entrance.recalled).socket)
        if room.is_over:
            self.door.on_over(room)

    def _reject(self, request: Request, problem: Problem) -> None:
        self.door.metrics.handshake(problem.type.error_code.lower())
        self.ws.send_response(refusal(problem, _correlation_id(request)))
        self._flush()

    # Client frames: `sync`, and nothing else.

    def _on_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            return  # answered by the library
        is_control = frame.opcode in (Opcode.PING, Opcode.PONG)
        if not self._within_rates(ends_message=frame.fin and not is_control):
            return
        if is_control:
            if self.ws.state is State.CONNECTING:
                self.ws.data_to_send()  # the library has answered a ping that did not wait for the 101
            else:
                self._flush()  # a pong goes before the answers to messages behind its ping
            return
        if frame.opcode is Opcode.CONT:
            self._message += bytes(frame.data)
        else:
            self._opcode, self._message = frame.opcode, bytes(frame.data)
        if frame.fin:
            message, self._message = self._message, b""
            if self._opcode is Opcode.TEXT and not _is_utf8(message):
                # RFC 6455, section 8.1. The library leaves it to whoever reads the message.
                self.ws.fail(WebSocketCloseCode.INVALID_DATA, "a text message is UTF-8")
                return
            self._on_message(self._opcode, message)

    def _within_rates(self, *, ends_message: bool) -> bool:
        now = self.last_heard_ns
        self._frames_full_ns = max(self._frames_full_ns, now) + FRAME_EARNED_NS
        if ends_message:
            self._messages_full_ns = max(self._messages_full_ns, now) + MESSAGE_EARNED_NS
        frames = (self._frames_full_ns - now) / FRAME_EARNED_NS
        messages = (self._messages_full_ns - now) / MESSAGE_EARNED_NS
        if frames <= CLIENT_FRAMES_PER_SECOND_MAX and messages <= MESSAGES_PER_SECOND_MAX:
            return True
        if frames > 2 * CLIENT_FRAMES_PER_SECOND_MAX:
            self.transport.abort()  # it was told
        elif self.ws.state is not State.CLOSING:
            too_many = (
                f"{MESSAGES_PER_SECOND_MAX} messages"
                if messages > MESSAGES_PER_SECOND_MAX
                else f"{CLIENT_FRAMES_PER_SECOND_MAX} frames"
            )
            self.close(CloseCode.TOO_MANY, f"at most {too_many} a second")
        return False

    def _on_message(self, opcode: Opcode, message: bytes) -> None:
        room = self.room
        if room is None or self.ws.state is not State.OPEN:
            return
        received_at = self.door.hub.clock.now_ms()
        fault: str | None = None
        sync: Any = None
        if opcode is Opcode.BINARY:
            fault = "a binary message; the protocol is JSON text"
        else:
            try:
                sync = orjson.loads(message)
            except orjson.JSONDecodeError:
                fault = "the message is not JSON"
        fault = fault or _fault_of(sync)
        if fault is not None:
            self._complain(room, fault)
            return
        if sync.get("drift_ms") is not None:
            self.door.metrics.drift_ms["client"].observe(abs(sync["drift_ms"]))
            self.door.on_drift(room, sync["drift_ms"], sync.get("rtt_ms"), self.principal, self.correlation_id)
        self._say(room, {"type": "sync", "t0": sync["t0"], "t1": received_at, "t2": self.door.hub.clock.now_ms()})

    def _complain(self, room: Room, fault: str) -> None:
        self._bad_messages += 1
        self._say(room, {"type": "error", "error_code": "BAD_MESSAGE", "detail": fault})
        if self._bad_messages >= BAD_MESSAGES_MAX:
            self.close(CloseCode.BAD_MESSAGES, fault)

    def _say(self, room: Room, body: dict[str, Any]) -> None:
        body |= {
            "auction_id": room.auction_id,
            "server_time": self.door.hub.clock.now_ms(),
            "trace_id": room.timer["trace_id"],
        }
        frame = text_frame(orjson.dumps(body))
        if self in room.writable:
            self.send(frame)
        else:
            self.keep_event(frame)

    # Closing.

    def close(self, code: CloseCode, reason: str) -> None:
        """Say why, and see that the socket is gone soon, whether the peer answers or not."""
        # Who is sent away for good must have read how it ended; everyone else comes back with `since`.
        last_words = b"".join(self._outbox) if code is CloseCode.AUCTION_OVER else b""
        self._leave()
        if self.ws.state is not State.OPEN:
            self.transport.close()
            self._cut_soon()
            return
        if last_words:
            self.transport.write(last_words)
        self.door.metrics.disconnect(code)
        self.ws.send_close(code, reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore"))
        self._flush()
        self._cut_soon()

    def shutdown(self) -> None:
        """uvicorn is draining."""
        if self.ws.state is State.OPEN:
            self.close(CloseCode.GOING_AWAY, self.door.come_back())
        else:
            self.transport.close()

    def ping(self) -> None:
        """Ask whether anybody is there. Not of one that lags: its answer could not arrive in time, and its age is bounded."""
        self.pinged_at_ns = self.door.now_ns()
        self.ws.send_ping(b"")
        self._flush()

    def excuse(self, away_ns: int, now_ns: int) -> None:
        """Do not count a time in which this process stood still: nobody could take anything from it, or answer it."""
        self.lagging_since_ns = min(now_ns, self.lagging_since_ns + away_ns)
        if self.pinged_at_ns:
            self.pinged_at_ns += away_ns

    def _leave(self) -> None:
        room, self.room = self.room, None
        if room is not None:
            room.writable.discard(self)
            room.lagging.discard(self)
        self._outbox, self._tick, self.outbox_bytes = [], None, 0

    def _cut_soon(self) -> None:
        if self._closer is None:
            self._closer = asyncio.get_running_loop().call_later(CLOSE_WITHIN_S, self.transport.abort)

    def _flush(self) -> None:
        """Write what the protocol wants written; an empty chunk is its end of stream."""
        if self.transport.is_closing():
            return
        for data in self.ws.data_to_send():
            if data:
                self.transport.write(data)
            else:
                self._leave()
                self._end()
                return
        if self.ws.state is not State.OPEN and self.ws.state is not State.CONNECTING:
            self._leave()
            self._cut_soon()

    def _end(self) -> None:
        """Nothing more will be written."""
        if self.ws.state is State.CLOSING and self.ws.close_rcvd is None:
            if self._closer is None:  # or it was told something else before, and that is counted
                self.door.metrics.disconnect(cast(Close, self.ws.close_sent).code)
            # The peer is in the middle of what we have failed it for. If its bytes met a closed socket, the reset would
            # overtake our close frame: read them until it has seen that.
            self.transport.write_eof()
        else:
            self.transport.close()
        self._cut_soon()  # whoever takes nothing cannot be told


def refusal(problem: Problem, correlation_id: str) -> Response:
    """The whole answer to a request that no application will see; the connection ends with it."""
    body = orjson.dumps(problem_body(problem, correlation_id))
    status = HTTPStatus(problem.type.status)
    headers = Headers({"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), "Connection": "close"})
    headers[HEADER] = correlation_id
    for name, value in problem.headers.items():
        headers[name] = value
    return Response(status.value, status.phrase, headers, body)


def _correlation_id(request: Request) -> str:
    return correlation_id_of("".join(request.headers.get_all(HEADER)[-1:]))


def _subprotocol(_protocol: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return cast(Subprotocol | None, chosen_subprotocol(offered))


def _auction_id(path: str) -> str | None:
    """The auction in `/auctions/{id}/updates`; None if the path is another, or the id is none."""
    parts = path.split("/")
    if len(parts) != 4 or (parts[0], parts[1], parts[3]) != ("", "auctions", "updates"):
        return None
    auction_id = unquote(parts[2])
    return auction_id if AUCTION_ID.fullmatch(auction_id) else None


def _is_utf8(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fault_of(sync: Any) -> str | None:
    """What is wrong with a client message, as a sentence; None if nothing."""
    if not isinstance(sync, dict) or sync.get("type") != "sync":
        return 'the only message a client may send is {"type":"sync","t0":...}'
    if not _is_number(sync.get("t0")):
        return "t0 must be a number: your clock when you send, in ms"
    if not all(sync.get(name) is None or _is_duration(sync[name]) for name in ("drift_ms", "rtt_ms")):
        return "drift_ms and rtt_ms must be numbers, in ms, of a day at most"
    if (sync.get("rtt_ms") or 0) < 0:
        return "rtt_ms must be 0 or more"
    return None


def _is_duration(value: object) -> bool:
    """A duration that can be measured. What a client reports is added up for ever: one 1e308 would spoil the sum."""
    return isinstance(value, int | float) and _is_number(value) and abs(value) <= REPORTED_MS_MAX


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
