"""The other end of a socket: a transport that only remembers, and a client that speaks real WebSocket bytes through it."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.uri import parse_uri

from gateway.connection import Connection
from gateway.door import Door
from tests.gateway.house import AUCTION

PATH = f"/auctions/{AUCTION}/updates"


class StillTransport(asyncio.Transport):
    """A transport with asyncio's rules and no network: what is written is taken at once, or piles up while `stuck`.

    As in asyncio, `pause_writing` is called from inside the write that goes over the mark, `resume_writing` when all is
    taken, and `connection_lost` one turn of the loop after a close with nothing left to write, or after an abort.
    """

    def __init__(self, address: str = "192.0.2.1") -> None:
        super().__init__({"peername": (address, 50_000)} if address else {"peername": ""})
        self.protocol: asyncio.Protocol
        self.high = 65_536
        self.stuck = False
        self.paused = False
        self.aborted = False
        self.reading = True
        self.taken = bytearray()
        self.buffer = bytearray()
        self._closing = False
        self._lost = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.high = high

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def write(self, data: Any) -> None:
        assert not self._closing, "asyncio would drop this silently"
        if not self.stuck:
            self.taken += data
            return
        self.buffer += data
        if len(self.buffer) > self.high and not self.paused:
            self.paused = True
            self.protocol.pause_writing()

    def release(self) -> None:
        """The peer reads again, all of it."""
        self.stuck = False
        self.taken += self.buffer
        self.buffer.clear()
        if self._closing:
            self._lose()
        elif self.paused:
            self.paused = False
            self.protocol.resume_writing()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self.buffer:
                self._lose()

    def write_eof(self) -> None:
        """Nothing more will come; the peer sees it and closes its own end."""
        self.close()

    def abort(self) -> None:
        self._closing = self.aborted = True
        self.buffer.clear()
        self._lose()

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Peer:
    """A client and the connection it is served by."""

    def __init__(
        self, door: Door, path: str = PATH, *, address: str = "192.0.2.1", host: str = "127.0.0.1:8080"
    ) -> None:
        self.transport = StillTransport(address)
        self.uvicorn_connections: set[Any] = set()
        state: Any = SimpleNamespace(connections=self.uvicorn_connections)
        self.connection = Connection(None, state, {"door": door})
        self.transport.protocol = self.connection
        self.client = ClientProtocol(parse_uri(f"ws://{host}{path}"))
        self.response: Response | None = None
        self.frames: list[Frame] = []
        self._read_to = 0

    def knock(self, edit: Callable[[Request], None] = lambda _request: None, *, piece: int = 1 << 20) -> "Peer":
        """Connect and send the handshake, in pieces of so many bytes."""
        request = self.client.connect()
        edit(request)
        self.client.send_request(request)
        self.connection.connection_made(self.transport)
        self.flush(piece)
        return self

    def flush(self, piece: int = 1 << 20) -> None:
        """Send what the client's side of the protocol has to send."""
        self.feed(b"".join(self.client.data_to_send()), piece)

    def feed(self, data: bytes, piece: int = 1 << 20) -> None:
        """Send these bytes, as long as the connection takes any."""
        for start in range(0, len(data), piece):
            if self.transport.is_closing() or not self.transport.reading:
                return
            self.connection.data_received(data[start : start + piece])

    def say(self, *messages: Any, piece: int = 1 << 20) -> None:
        """Send text messages in one go: bytes as they are, anything else as JSON."""
        for message in messages:
            self.client.send_text(message if isinstance(message, bytes) else orjson.dumps(message))
        self.flush(piece)

    def read(self) -> list[Frame]:
        """Read what has arrived; the new frames."""
        data = bytes(self.transport.taken[self._read_to :])
        self._read_to += len(data)
        if data:
            self.client.receive_data(data)
        if self.transport.is_closing() and not self.transport.buffer:
            self.client.receive_eof()
        new = []
        for event in self.client.events_received():
            if isinstance(event, Response):
                self.response = event
            elif isinstance(event, Frame):
                new.append(event)
        self.frames += new
        return new

    def told(self) -> list[dict[str, Any]]:
        """The text frames that are new, as the objects they carry."""
        return [orjson.loads(frame.data) for frame in self.read() if frame.opcode is Opcode.TEXT]

    @property
    def status(self) -> int:
        """The status of the answer to the handshake."""
        self.read()
        assert self.response is not None, "no answer yet"
        return self.response.status_code

    @property
    def problem(self) -> dict[str, Any]:
        """The body of an answer that refuses."""
        self.read()
        assert self.response is not None
        found: dict[str, Any] = orjson.loads(self.response.body)
        return found

    @property
    def farewell(self) -> tuple[int, str] | None:
        """The close code and the reason that came; None if the socket was not closed so."""
        self.read()
        received = self.client.close_rcvd
        return None if received is None else (int(received.code), received.reason)
