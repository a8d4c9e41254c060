"""A WebSocket client for greenlets: the sans-I/O protocol of the websockets library on a plain blocking socket.

gevent makes such a socket cooperative; asyncio, which the library's own clients run on, it does not.
"""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from websockets.client import ClientProtocol
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

READ_BYTES: Final = 65_536
FRAME_BYTES_MAX: Final = 1_048_576


class SocketRefusedError(Exception):
    """The handshake was answered otherwise than by a switch of protocols."""


class SocketClosedError(Exception):
    """The server closed the socket."""


class Socket:
    """An open socket.

    Args:
        url: http or https, with the path of the socket.
        token: sent as a bearer; None in open mode.
        silence_max_s: how long nothing may come.

    Raises:
        SocketRefusedError: with the status.
        OSError: there is no connection, or no answer in time.
    """

    def __init__(self, url: str, *, token: str | None = None, silence_max_s: float = 30.0) -> None:
        parts = urlsplit(url)
        uri = parse_uri(urlunsplit(parts._replace(scheme="wss" if parts.scheme == "https" else "ws")))
        self._socket = socket.create_connection((uri.host, uri.port), timeout=silence_max_s)
        try:
            if uri.secure:
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=uri.host)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._protocol = ClientProtocol(uri, max_size=FRAME_BYTES_MAX)
            self._early = self._opened(token)
        except BaseException:
            self._socket.close()
            raise

    def _opened(self, token: str | None) -> list[Frame]:
        """Do the handshake; frames that came with its answer."""
        request = self._protocol.connect()
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token}"
        self._protocol.send_request(request)
        while True:
            events = self._events()
            if events:
                break
        answer = events.pop(0)
        if self._protocol.handshake_exc is not None:
            status = answer.status_code if isinstance(answer, Response) else 0
            raise SocketRefusedError(f"{status} {HTTPStatus(status).phrase if status else 'no answer'}")
        return [event for event in events if isinstance(event, Frame)]

    def _events(self) -> list[Frame | Response]:
        """What comes next, after what was to be sent."""
        self._flush()
        data = self._socket.recv(READ_BYTES)
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        events = [event for event in self._protocol.events_received() if isinstance(event, Frame | Response)]
        self._flush()
        if not data and not events:
            raise SocketClosedError("the connection was lost")
        return events

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._socket.sendall(data)

    def send(self, text: bytes) -> None:
        """Send a text."""
        self._protocol.send_text(text)
        self._flush()

    def texts(self) -> Iterator[bytes]:
        """Every text from now on, for as long as the socket is open.

        Raises:
            SocketClosedError: the server closed it, or it broke.
            OSError: nothing came for too long, or the connection was lost.
        """
        events: list[Frame | Response] = list(self._early)
        self._early = []
        while True:
            for event in events:
                if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                    yield bytes(event.data)
                elif isinstance(event, Frame) and event.opcode is Opcode.CLOSE:
                    raise SocketClosedError(str(Close.parse(event.data)))
            events = self._events()

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.close()
