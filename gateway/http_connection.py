"""One HTTP connection: uvicorn's, with a bound on everything a peer can make it wait for.

uvicorn waits for ever for a request that never ends and for an answer that nobody reads. Here one deadline runs at a
time, told by the state in which h11 sees the peer:

    accepted, or answered ──▶ the head of a request    10 s
    head read ──────────────▶ its body                 30 s
    request read ───────────▶ nothing: ours to answer
    closed by us ───────────▶ what it has not taken    20 s

Beside it, an answer that fills the transport and is not taken for 20 s ends the connection too.
"""

import asyncio
import sys
from collections.abc import Iterable
from enum import Enum, unique
from typing import TYPE_CHECKING, Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from gateway.connection import refusal
from gateway.correlation import correlation_id_of
from gateway.problems import Problem, ProblemType

if TYPE_CHECKING:
    from gateway.door import Door

HEADERS_BYTES_MAX: Final = 65_536
PIECE_BYTES: Final = 4_096
"""h11 measures a head only while it is incomplete, and the loop reads up to 256 KiB at once."""


@unique
class Awaited(Enum):
    """What a peer owes, and how long it may take, in s."""

    HEAD = 10.0
    BODY = 30.0
    REST = 20.0


class HttpConnection(H11Protocol):
    """A connection, until it is upgraded or closed. Created by uvicorn, with its arguments."""

    _awaited: Awaited | None = None
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _is_counted = False

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._door: Door = self.app_state["door"]
        self._address = self.client[0] if self.client else ""
        self._door.admission.arrived(self._address)
        self._is_counted = True
        if self._door.admission.is_flooded(self._address):
            self.transport.abort()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._depart()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():
                break
            piece = data[start : start + PIECE_BYTES]
            upgraded: Any = self.transport.get_protocol()
            if upgraded is self:
                super().data_received(piece)
            else:
                upgraded.data_received(piece)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(Awaited.REST.value, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # uvicorn's H11Protocol.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        detail = _fault_of(event)
        if detail is not None:
            self._door.metrics.handshake("malformed")
            self._refuse(Problem(ProblemType.MALFORMED_REQUEST, detail), _given_id(event.headers))
            return
        self._depart()
        super().handle_websocket_upgrade(event)
        # What came in one piece with the handshake belongs to the socket: uvicorn would forget it, and the frames
        # behind it would be read from the middle.
        behind = self.conn.trailing_data[0]
        if behind and not self.transport.is_closing():
            upgraded: Any = self.transport.get_protocol()
            upgraded.data_received(behind)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn names it
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            problem = Problem(ProblemType.HEADERS_TOO_LARGE, f"headers have at most {HEADERS_BYTES_MAX} bytes")
        else:
            problem = Problem(ProblemType.MALFORMED_REQUEST, "this is no HTTP/1.1 request (RFC 9112)")
        self._refuse(problem)

    # Deadlines.

    def _watch(self) -> None:
        """Let the deadline run that the state asks for. One that runs already is not prolonged: dripping gains nothing."""
        awaited = self._owed()
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if awaited is not None:
            self._deadline = self.loop.call_later(awaited.value, self._too_late, awaited)

    def _owed(self) -> Awaited | None:
        if not self._is_counted:
            return None  # gone, or a socket now
        if self.transport.is_closing():
            return Awaited.REST
        return {h11.IDLE: Awaited.HEAD, h11.SEND_BODY: Awaited.BODY}.get(self.conn.their_state)

    def _too_late(self, awaited: Awaited) -> None:
        if awaited is Awaited.REST:
            self.transport.abort()
        elif awaited is Awaited.HEAD and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was asked
            self._watch()
        else:
            self._refuse(
                Problem(
                    ProblemType.REQUEST_TIMEOUT,
                    f"the {awaited.name.lower()} of a request must be here within {awaited.value:g} s",
                )
            )

    def _refuse(self, problem: Problem, given_id: str = "") -> None:
        """Answer past the application, which may wait for the rest of the request, and close."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()  # whatever came now would be read as part of that answer
                return
            cycle.disconnected = True
            cycle.message_event.set()
            # The application's own, if it has begun: it may have logged it.
            given_id = cycle.scope["state"].get("correlation_id") or _given_id(cycle.scope["headers"])
        self.transport.write(refusal(problem, correlation_id_of(given_id)).serialize())
        self.transport.close()
        self._watch()

    def _depart(self) -> None:
        if not self._is_counted:
            return
        self._is_counted = False
        self._door.admission.left(self._address)
        self._watch()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _given_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The correlation id that a request brought; empty if none."""
    return dict(headers).get(b"x-correlation-id", b"").decode("latin-1")


def _fault_of(handshake: h11.Request) -> str | None:
    """What uvicorn would hide from the socket, which it shows a head of HTTP/1.1 and nothing else; None if nothing."""
    if handshake.http_version != b"1.1":
        return "a handshake is a request of HTTP/1.1 (RFC 6455, section 4.1)"
    if any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in handshake.headers
    ):
        return "a handshake has no body (RFC 6455, section 4.1)"
    return None
