"""The peers and the floors of the gateway, each the least code that does the job with the means it stands for.

    python -m benchmarks.fanout_servers KIND PORT_FD

The first line on stdin is the frame; for each line that follows it goes to every socket. All but `raw` run on uvloop, as the
gateway does; none negotiates compression, each keeps its own defaults for pings and imports only what it needs, so that the
memory of one does not hold the modules of another.

    floor      asyncio: `transport.write` of the same bytes, framed once
    raw        no event loop at all: `socket.send` of the same bytes
    broadcast  `websockets.broadcast`
    starlette  `await websocket.send_text(...)` for one socket after the other, under uvicorn
"""

import asyncio
import os
import select
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, cast

import uvloop
from websockets.utils import accept_key

from benchmarks.machine import SERVER_CORE, open_files, pin
from gateway.room import text_frame

BACKLOG: Final = 4_096

Send = Callable[[], Awaitable[None]]


async def obey(send: Send) -> None:
    """Send once for each line on stdin, until it ends."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("{}", flush=True)
    while await lines.readline():
        await send()


def switching(request: bytes) -> bytes:
    """The answer to a handshake (RFC 6455, section 4.2.2)."""
    head = request.lower()
    at = head.index(b"sec-websocket-key:") + len(b"sec-websocket-key:")
    key = request[at : request.index(b"\r\n", at)].decode().strip()
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n"
    ).encode()


class Bare(asyncio.Protocol):
    """A socket that is written to, and nothing else."""

    __slots__ = ("_transports", "transport")

    def __init__(self, transports: set[asyncio.Transport]) -> None:
        self._transports = transports

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"\r\n\r\n"):
            self.transport.write(switching(data))
            self._transports.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio names it
        self._transports.discard(self.transport)


async def floor(payload: bytes, listener: socket.socket) -> None:
    """`transport.write`."""
    frame = text_frame(payload)
    transports: set[asyncio.Transport] = set()

    async def send() -> None:
        for transport in transports:
            transport.write(frame)

    await asyncio.get_running_loop().create_server(lambda: Bare(transports), sock=listener, backlog=BACKLOG)
    await obey(send)


def raw(payload: bytes, listener: socket.socket) -> None:
    """`socket.send`."""
    frame = text_frame(payload)
    listener.setblocking(False)
    sockets: dict[int, socket.socket] = {}
    waiting: dict[int, socket.socket] = {}
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    epoll.register(sys.stdin.fileno(), select.EPOLLIN)
    print("{}", flush=True)
    while True:
        for fd, _ in epoll.poll():
            if fd == sys.stdin.fileno():
                lines = os.read(fd, 4_096)
                if not lines:
                    return
                for _line in range(lines.count(b"\n")):
                    for connection in sockets.values():
                        connection.send(frame)
            elif fd == listener.fileno():
                with suppress(BlockingIOError):
                    accepted, _address = listener.accept()
                    waiting[accepted.fileno()] = accepted
                    epoll.register(accepted.fileno(), select.EPOLLIN)
            elif fd in waiting:
                connection = sockets[fd] = waiting.pop(fd)
                connection.send(switching(connection.recv(65_536)))
            elif not sockets[fd].recv(65_536):
                epoll.unregister(fd)
                sockets.pop(fd).close()


async def websockets_broadcast(payload: bytes, listener: socket.socket) -> None:
    """`websockets.broadcast`, as its documentation shows it."""
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    connections: set[ServerConnection] = set()
    message = payload.decode()

    async def handler(connection: ServerConnection) -> None:
        connections.add(connection)
        try:
            await connection.wait_closed()
        finally:
            connections.remove(connection)

    async def send() -> None:
        broadcast(connections, message)

    async with serve(handler, sock=listener, backlog=BACKLOG):
        await obey(send)


async def starlette(payload: bytes, listener: socket.socket) -> None:
    """A loop of `send_text`."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    websockets: set[WebSocket] = set()
    message = payload.decode()

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        websockets.add(websocket)
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            pass
        finally:
            websockets.discard(websocket)

    async def send() -> None:
        for websocket in websockets.copy():
            await websocket.send_text(message)

    app = Starlette(routes=[WebSocketRoute("/{path:path}", endpoint)])
    config = uvicorn.Config(app, lifespan="off", loop="none", log_config=None, access_log=False, backlog=BACKLOG)
    running = asyncio.create_task(uvicorn.Server(config).serve(sockets=[listener]))
    await obey(send)
    running.cancel()


LOOPED: Final = {"floor": floor, "broadcast": websockets_broadcast, "starlette": starlette}
KINDS: Final = ("floor", "raw", "broadcast", "starlette")


def main() -> None:
    """Read the frame, then serve."""
    kind, fd = sys.argv[1], int(sys.argv[2])
    pin(os.getpid(), SERVER_CORE)
    open_files()
    listener = socket.socket(fileno=fd)
    payload = os.read(sys.stdin.fileno(), 65_536).rstrip(b"\n")
    if kind == "raw":
        raw(payload, listener)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(LOOPED[kind](payload, listener))


if __name__ == "__main__":
    main()
