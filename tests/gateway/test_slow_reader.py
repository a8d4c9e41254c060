"""Real sockets: a reader that never reads among fifty that do, and a gateway that drains."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, cast

import httpx
import orjson
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from engine.clock import SystemClock
from engine.contract.timers import sealed
from engine.settings import Settings
from engine.store.memory import MemoryStore
from engine.store.redis import RedisStore
from gateway import connection as connection_module
from gateway.app import build, serve
from gateway.connection import WRITE_BUFFER_HIGH_BYTES, Connection
from tests.gateway.house import AUCTION, House, record
from tests.servers import Server

pytestmark = pytest.mark.integration

DEADLINE_S: Final = 20.0
READERS: Final = 50
EVENTS: Final = 400
OUTBOX_BYTES_MAX: Final = 32_768
KERNEL_BYTES: Final = 16_384
"""Small kernel buffers on both ends, so that one who does not read is noticed after kilobytes, not megabytes."""


async def until(condition: Callable[[], Any], what: str) -> None:
    """Poll a condition of this process until it is true; fail with `what` after a deadline."""
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


def listening() -> socket.socket:
    """A listener whose connections have small send buffers."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    listener.setblocking(False)
    return listener


class Live(House):
    """A gateway on a real listener in this process, on the memory store and the real clock."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.memory = MemoryStore(lambda: time.time_ns() // 1_000)
        self.registry = CollectorRegistry()
        self.gateway = build(cast(RedisStore, self.memory), SystemClock(), self.settings, self.registry)
        self.hub, self.door = self.gateway.hub, self.gateway.door
        self.listener = listening()
        self.port: int = self.listener.getsockname()[1]

    def publish(self, version: int) -> None:
        """The engine commits an extension."""
        self.announce("timer.extended", record(version=version), filler="x" * 500)
        self.memory._grow()


@contextlib.asynccontextmanager
async def live(**settings: Any) -> AsyncIterator[Live]:
    """A gateway that accepts."""
    made = Live(**settings)
    made.put(record(version=1))
    config = uvicorn.Config(
        made.gateway.app,
        http="h11",
        ws=Connection,
        lifespan="on",
        loop="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve(sockets=[made.listener]))
    try:
        await until(lambda: server.started, "the gateway accepts")
        yield made
    finally:
        server.should_exit = True
        await task


class Client:
    """A raw TCP client that speaks WebSocket and reads when told to."""

    def __init__(self, port: int, path: str = f"/auctions/{AUCTION}/updates") -> None:
        self.port = port
        self.protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}{path}"))
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        self.socket.setblocking(False)
        self.frames: list[dict[str, Any]] = []

    async def knock(self) -> "Client":
        """Connect and send the handshake."""
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        self.protocol.send_request(self.protocol.connect())
        await self.flush()
        return self

    async def flush(self) -> None:
        """Send what the protocol has to send."""
        data = b"".join(self.protocol.data_to_send())
        if data:
            await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read(self) -> bool:
        """Read once; False at the end of the stream."""
        data = await asyncio.get_running_loop().sock_recv(self.socket, 65_536)
        if not data:
            self.protocol.receive_eof()
            return False
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            if isinstance(event, Response):
                assert event.status_code == 101
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                frame = orjson.loads(event.data)
                if frame["type"] != "timer.tick":  # from memory: no engine is heard here
                    self.frames.append(frame)
        with contextlib.suppress(OSError):
            await self.flush()
        return True

    async def read_until(self, condition: Callable[[], bool]) -> None:
        """Read until something holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                assert await self.read(), "closed too early"

    async def read_to_end(self) -> None:
        """Read until the server closes."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.read():
                pass

    def versions(self) -> list[int]:
        """What was told of, by version, behind the snapshot."""
        return [frame["timer"]["version"] for frame in self.frames[1:]]


def kept_for(connection: Connection) -> int:
    """Bytes that this process holds for a socket."""
    return connection.outbox_bytes + connection.transport.get_write_buffer_size()


@pytest.mark.requirement("B3", "R7")
async def test_one_that_never_reads_among_fifty_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reader gets every event in order; the stuck one costs no more than its bounds, and is gone in time."""
    monkeypatch.setattr(connection_module, "CLOSE_WITHIN_S", 0.3)
    async with live(outbox_bytes_max=OUTBOX_BYTES_MAX) as made:
        stuck = await Client(made.port).knock()
        await until(lambda: len(made.door._connections) == 1, "the stuck one is in")
        (connection,) = made.door._connections
        readers = [await Client(made.port).knock() for _ in range(READERS)]
        for reader in readers:
            await reader.read_until(lambda reader=reader: len(reader.frames) == 1)
        most = 0

        async def publish() -> None:
            nonlocal most
            for version in range(2, EVENTS + 2):
                made.publish(version)
                await asyncio.sleep(0)
                most = max(most, kept_for(connection))

        try:
            await asyncio.gather(
                publish(),
                *(reader.read_until(lambda reader=reader: len(reader.frames) == EVENTS + 1) for reader in readers),
            )
            for reader in readers:
                assert reader.versions() == list(range(2, EVENTS + 2))
            # The transport's mark, what was written when it was passed, the outbox, and one event more.
            assert OUTBOX_BYTES_MAX < most < WRITE_BUFFER_HIGH_BYTES + OUTBOX_BYTES_MAX + 4_096
            await until(lambda: connection not in made.door._connections, "the stuck one is gone")
            assert made.sample("auctions_gateway_disconnects_total", code="4101") == 1
            assert len(made.door._connections) == READERS
            assert connection.outbox_bytes == 0
        finally:
            for client in (stuck, *readers):
                client.socket.close()
        await until(lambda: not made.door._connections, "everyone has gone")


@pytest.mark.requirement("B3", "B4")
async def test_one_that_reads_late_gets_everything_in_order() -> None:
    """Within its bounds a slow reader misses nothing; beyond them it comes back with its cursor and misses nothing either."""
    async with live(outbox_bytes_max=OUTBOX_BYTES_MAX) as made:
        slow = await Client(made.port).knock()
        await slow.read_until(lambda: len(slow.frames) == 1)
        room = made.hub.known(AUCTION)
        assert room is not None
        version = 1
        while not room.lagging:
            version += 1
            made.publish(version)
            await asyncio.sleep(0)
        for _ in range(5):
            version += 1
            made.publish(version)
        await until(lambda: room.version == version, "the lane is read")
        await slow.read_until(lambda: len(slow.frames) == version)
        assert slow.versions() == list(range(2, version + 1))
        await until(lambda: not room.lagging, "it is writable again")
        while room.is_watched:
            version += 1
            made.publish(version)
            await asyncio.sleep(0)
        await slow.read_to_end()
        assert slow.protocol.close_rcvd is not None
        assert slow.protocol.close_rcvd.code == 4101
        slow.socket.close()
        seen = slow.versions()
        assert seen == list(range(2, len(seen) + 2))
        back = await Client(made.port, f"/auctions/{AUCTION}/updates?since={slow.frames[-1]['cursor']}").knock()
        await back.read_until(lambda: bool(back.frames) and len(back.frames) == 1 + version - seen[-1])
        assert back.frames[0]["recovered"] is True
        assert back.versions() == list(range(seen[-1] + 1, version + 1))
        back.socket.close()


async def test_one_that_floods_pings_and_reads_no_pong_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pongs pile up to the transport's mark; then it is not read any more, and closed when its time is over."""
    monkeypatch.setattr(connection_module, "CLOSE_WITHIN_S", 0.3)
    monkeypatch.setattr(connection_module, "CLIENT_FRAMES_PER_SECOND_MAX", 1_000_000)
    async with live(outbox_age_max_ms=300) as made:
        flood = await Client(made.port).knock()
        await flood.read_until(lambda: len(flood.frames) == 1)
        (connection,) = made.door._connections
        pings = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * 500

        async def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    await asyncio.get_running_loop().sock_sendall(flood.socket, pings)

        sending = asyncio.create_task(send())
        most = 0

        def gone() -> bool:
            nonlocal most
            most = max(most, connection.transport.get_write_buffer_size())
            return not made.door._connections

        await until(gone, "the flood is over")
        assert WRITE_BUFFER_HIGH_BYTES < most < WRITE_BUFFER_HIGH_BYTES + 524_288
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        flood.socket.close()


@pytest.mark.parametrize("target", [b"//[", b"/auctions/a-1/updates", b"/nowhere"])
@pytest.mark.parametrize("headers", [b"", b"Origin: http://[\r\n", b"Sec-WebSocket-Version: 13\r\n"])
async def test_no_handshake_however_wrong_is_counted_for_ever(target: bytes, headers: bytes) -> None:
    """A request that fails in any way leaves the count of connections where it was."""
    async with live() as made:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(
                b"GET "
                + target
                + b" HTTP/1.1\r\nHost: [\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                + headers
                + b"\r\n"
            )
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 4")
            writer.close()
        await until(lambda: not made.door._connections, "nobody is counted")
        assert not made.door._per_address


async def test_a_real_gateway_serves_and_drains(valkey_server: Server) -> None:
    """`serve` on a real store: a socket gets its snapshot, SIGTERM says 1001 and when to come back, and `serve` returns."""
    settings = Settings(_env_file=None, redis_url=valkey_server.url, shards=1)
    valkey_server.ask(
        "HSET", f"auction:timer:{{0}}:{AUCTION}", *(part for pair in sealed(record()).items() for part in pair)
    )
    listener = listening()
    port = listener.getsockname()[1]
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(serve(settings, CollectorRegistry(), listener))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get(f"/auctions/{AUCTION}/timer")).json()["version"] == 2
        client = await Client(port).knock()
        await client.read_until(lambda: len(client.frames) == 1)
        assert client.frames[0]["type"] == "timer.snapshot"
        os.kill(os.getpid(), signal.SIGTERM)
        await client.read_to_end()
        assert client.protocol.close_rcvd is not None
        assert client.protocol.close_rcvd.code == 1001
        assert orjson.loads(client.protocol.close_rcvd.reason) == {"retry_after_ms": 500, "jitter_ms": 3_000}
        client.socket.close()
        async with asyncio.timeout(DEADLINE_S):
            await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
