"""Many real WebSocket clients in one loop: a protocol object each, no task, no parsing beyond what a test asks for.

A watcher comes back by itself, with `since` and after a jitter, until it is told that its auction is over. What it was
told stands beside what the store holds: `gaps` compares the two, event by event.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, cast
from urllib.parse import urlsplit

import orjson

from engine.contract.cursors import Cursor, stream_order
from engine.contract.frames import is_frame
from engine.contract.keys import shard_of
from tests.live import LiveStack

SHARDS: Final = 8
DEADLINE_S: Final = 30.0
RETRY_S: Final = (0.05, 0.5)
"""When a watcher that lost its socket comes back."""
MASK: Final = b"\0\0\0\0"
SEGMENT_BYTES: Final = 1_460
"""With small buffers: of an Ethernet. With the 64 kB of a loopback the kernel gives each socket a send buffer of 2.6 MB,
and a reader that is stuck is not noticed for minutes."""
STUCK_BUFFER_BYTES: Final = 4_096

Event = tuple[str, str]
"""Cursor and type."""


async def until(
    condition: Callable[[], Any], what: str, watchers: Iterable["Watcher"] = (), within_s: float = DEADLINE_S
) -> None:
    """Poll a condition until it is true; fail with `what` after a deadline."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s: {what}; {summary(watchers)}") from None


class Watcher(asyncio.Protocol):
    """One who watches an auction, over as many sockets as it takes."""

    def __init__(self, auction_id: str, *, small_buffers: bool = False) -> None:
        self.auction_id = auction_id
        self.since: str | None = None
        """The cursor to come back with."""
        self.base: str = ""
        """The cursor of the last snapshot that was a fresh start; everything behind it must have come."""
        self.events: list[Event] = []
        """What came behind `base`."""
        self.event_bytes = 0
        """Of all frames but ticks."""
        self.ticks: list[dict[str, Any]] = []
        self.order: list[tuple[str, int]] = []
        """Every frame's type and server time, over all sockets."""
        self.snapshots: list[dict[str, Any]] = []
        self.closes: list[tuple[int, str]] = []
        self.lost = 0
        self.refused: list[int] = []
        self.connected = False
        """Whether it was greeted."""
        self.is_over = False
        self.comes_back = True
        self.port = 0
        self.transport: asyncio.Transport | None = None
        self._small_buffers = small_buffers
        self._buffer = b""
        self._upgraded = False
        self._tasks: set[asyncio.Task[None]] = set()

    # Connecting.

    def connect(self, port: int) -> None:
        """Connect, now and whenever the socket is lost."""
        self.port = port
        task = asyncio.get_running_loop().create_task(self._connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        if self._small_buffers:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STUCK_BUFFER_BYTES)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(connection, ("127.0.0.1", self.port))
            await loop.create_connection(lambda: self, sock=connection)
        except OSError:
            connection.close()
            self._come_back()
        except asyncio.CancelledError:
            connection.close()
            raise

    def _come_back(self) -> None:
        if self.comes_back and not self.is_over:
            asyncio.get_running_loop().call_later(random.uniform(*RETRY_S), self._connect_again)

    def _connect_again(self) -> None:
        if self.comes_back:
            self.connect(self.port)

    @property
    def local_port(self) -> int:
        """The port of this end."""
        assert self.transport is not None
        return int(self.transport.get_extra_info("sockname")[1])

    def leave(self) -> None:
        """Go away for good."""
        self.comes_back = False
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._buffer, self._upgraded = b"", False
        since = f"?since={self.since}" if self.since is not None else ""
        self.transport.write(
            f"GET /auctions/{self.auction_id}/updates{since} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.lost += self.connected
        self.connected = False
        self._come_back()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        if not self._upgraded:
            head, found, rest = buffer.partition(b"\r\n\r\n")
            if not found:
                self._buffer = buffer
                return
            status = int(head.split(b" ", 2)[1])
            if status != 101:
                self.refused.append(status)
                assert self.transport is not None
                self.transport.abort()
                return
            self._upgraded, buffer = True, rest
        at = 0
        while (whole := _frame(buffer, at)) is not None:
            opcode, payload, at = whole
            self._on_frame(opcode, payload)
        self._buffer = buffer[at:]

    def _on_frame(self, opcode: int, payload: bytes) -> None:
        assert self.transport is not None
        if opcode == 0x1:
            self._on_text(orjson.loads(payload), len(payload))
        elif opcode == 0x9:
            self.transport.write(b"\x8a" + bytes([0x80 | len(payload)]) + MASK + payload)
        else:
            assert opcode == 0x8, opcode
            code: int = struct.unpack("!H", payload[:2])[0]
            self.closes.append((code, payload[2:].decode()))
            self.is_over = self.is_over or code == 4000
            self.transport.write(b"\x88" + bytes([0x80 | len(payload)]) + MASK + payload)

    def _on_text(self, frame: dict[str, Any], size: int) -> None:
        self.order.append((frame["type"], frame["server_time"]))
        match frame["type"]:
            case "timer.tick":
                self.ticks.append(frame)
            case "timer.snapshot":
                self.connected = True
                self.snapshots.append(frame)
                # A snapshot stands at the end of what is replayed behind it: its cursor counts only where nothing is.
                if not frame["recovered"]:
                    self.base = self.since = frame["cursor"]
                    self.events = []
            case _:
                self.since = frame["cursor"]
                self.event_bytes += size
                self.events.append((frame["cursor"], frame["type"]))


def _frame(buffer: bytes, at: int) -> tuple[int, bytes, int] | None:
    """The frame at a place: opcode, payload, and where the next one begins; None if it is not all there."""
    if len(buffer) < at + 2:
        return None
    first, length = buffer[at], buffer[at + 1]
    assert first & 0xF0 == 0x80, "one whole frame, nothing negotiated"
    assert length < 0x80, "a server does not mask"
    start = at + 2
    if length == 126:
        start, length = at + 4, int.from_bytes(buffer[at + 2 : at + 4], "big")
    elif length == 127:
        start, length = at + 10, int.from_bytes(buffer[at + 2 : at + 10], "big")
    if len(buffer) < start + length:
        return None
    return first & 0x0F, buffer[start : start + length], start + length


def summary(watchers: Iterable[Watcher]) -> dict[str, int]:
    """How a crowd fares, for a test that fails."""
    counts = Counter[str]()
    for watcher in watchers:
        state = "greeted" if watcher.connected else "connected" if watcher.transport is not None else "away"
        counts[state] += 1
        counts["lost"] += watcher.lost
        counts.update(f"refused {status}" for status in watcher.refused)
        counts.update(f"closed {code}" for code, _ in watcher.closes)
        counts.update(f"recovered {snapshot['recovered']}" for snapshot in watcher.snapshots)
    return dict(counts)


def port_of(url: str) -> int:
    """The port of a URL."""
    port = urlsplit(url).port
    assert port is not None
    return port


@asynccontextmanager
async def crowd(*watchers: Watcher, port: int) -> AsyncIterator[list[Watcher]]:
    """Watchers who are all in; everyone leaves at the end."""
    try:
        for watcher in watchers:
            watcher.connect(port)
        await until(lambda: all(watcher.connected for watcher in watchers), "everyone is in", watchers)
        yield list(watchers)
    finally:
        for watcher in watchers:
            watcher.leave()
        for task in [task for watcher in watchers for task in watcher._tasks]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await until(lambda: not any(watcher.transport for watcher in watchers), "everyone has left", watchers)


def lane(stack: LiveStack, auction_ids: Iterable[str]) -> dict[str, list[Event]]:
    """The event lane of auctions as the store holds it."""
    found: dict[str, list[Event]] = {auction_id: [] for auction_id in auction_ids}
    for shard in {shard_of(auction_id, SHARDS) for auction_id in found}:
        for stream_id, values in stack.redis("XRANGE", f"auction:updates:{{{shard}}}", "-", "+"):
            fields = dict(zip(values[::2], values[1::2], strict=True)) if isinstance(values, list) else values
            auction_id, update_type = fields[b"auction_id"].decode(), fields[b"type"].decode()
            if auction_id in found and is_frame(update_type):
                found[auction_id].append((str(Cursor(shard, stream_id.decode())), update_type))
    return found


def behind(events: list[Event], cursor: str) -> list[Event]:
    """The events behind a place."""
    return [event for event in events if _order(event[0]) > _order(cursor)]


def _order(cursor: str) -> tuple[int, int]:
    return stream_order(cursor.partition(".")[2])


def gaps(watchers: Iterable[Watcher], lanes: dict[str, list[Event]]) -> list[str]:
    """Who was not told exactly what happened since its base, in order, and how; empty if there is nobody."""
    found = []
    for watcher in watchers:
        expected = behind(lanes[watcher.auction_id], watcher.base)
        if watcher.events != expected:
            missing = [event for event in expected if event not in watcher.events]
            found.append(
                f"{watcher.auction_id} from {watcher.base}: {len(watcher.events)} events instead of {len(expected)}, "
                f"missing {missing[:3]}, resumes {[shot['recovered'] for shot in watcher.snapshots]}"
            )
    return found
