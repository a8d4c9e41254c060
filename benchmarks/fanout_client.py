"""Many sockets in one process, as cheap as Python makes them: epoll, one buffer, no parsing of JSON.

    python -m benchmarks.fanout_client CORE

A JSON object a line comes in on stdin, and each is answered by one on stdout when it is done:

    open     {port, auctions, sockets, stuck_every, frame_bytes}   connect, 100 at a time; answered when all are connected
    expect   {frames}                                              answered when so many more frames of `frame_bytes` came
    measure  {}                                                    forget what was measured, from now on it counts
    progress {}                                                    frames so far, and the last bid that everyone has
    report   {}                                                    delivery per lane, gaps, doubles, closes
    storm    {drop}                                                cut every socket, or wait until the server does; come back
                                                                   with `since`; answered when everyone is connected again
    cut      {}                                                    cut every socket, and stay away
    return   {}                                                    come back from that; answered as `storm` is

Bytes are stamped when they have been read, and looked at when nobody else has any: a crowd that is written at once is read
as fast as it comes, and what delays this process all the same counts as a delay of the server. The sockets have the
segment size of an Ethernet: with the 64 kB of a loopback the kernel would give each of them a send buffer of 2.6 MB, and a
reader that is stuck would not be noticed for minutes. Every 5,000 sockets come from another address, so that ports last.
"""

import json
import os
import random
import select
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from benchmarks.machine import open_files, pin
from benchmarks.percentiles import percentiles

PER_ADDRESS: Final = 5_000
SEGMENT_BYTES: Final = 1_460
STUCK_BUFFER_BYTES: Final = 4_096
READ_MAX: Final = 262_144
IP_BIND_ADDRESS_NO_PORT: Final = 24
"""ip(7): the port is chosen by connect(2), when the other end is known. Python 3.11 has no name for it."""
RETRY_S: Final = 1.0
"""After a refusal (503) or a lost connection, times 0.5 to 1.5."""
OPENING_MAX: Final = 100
"""Handshakes at a time, but for a storm: what thousands of half-open ones need at once is no idle socket's memory."""
REFUSED_MAX: Final = 100_000
UNREAD_MAX: Final = 20_000

TICK: Final = b'{"type":"timer.tick"'
BID: Final = b'{"type":"bid.accepted"'
SNAPSHOT: Final = b'{"type":"timer.snapshot"'
RECOVERED: Final = (b"true", b"false", b"null")
EPOCH_DIGITS: Final = 13
BID_DIGITS: Final = 10
"""Bids of one auction are numbered without a gap: `"bid_id":"0000000042"`."""


class Socket:
    """One watcher."""

    __slots__ = ("address", "back_at", "cursor", "greeted", "is_stuck", "number", "path", "rest", "sock")

    def __init__(self, path: str, address: str, *, is_stuck: bool) -> None:
        self.path = path
        self.address = address
        self.is_stuck = is_stuck
        self.sock: socket.socket | None = None
        self.greeted = False
        self.rest = b""
        self.cursor = ""
        self.number: int | None = 0
        """Of the last bid; None where what came before was not replayed."""
        self.back_at = 0.0


@dataclass
class Measured:
    """What was seen since `measure`."""

    latencies_ms: dict[str, list[float]] = field(
        default_factory=lambda: {"tick": [], "bid_from_commit": [], "bid_from_arrival": []}
    )
    frames: int = 0
    gaps: int = 0
    doubles: int = 0
    closes: Counter[str] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)
    refused: int = 0


class Client:
    """All sockets of this process."""

    def __init__(self) -> None:
        self.measured = Measured()
        self._epoll = select.epoll()
        self._sockets: list[Socket] = []
        self._by_fd: dict[int, Socket] = {}
        self._connecting: set[int] = set()
        self._retries: list[tuple[float, Socket]] = []
        self._buffer = bytearray(READ_MAX)
        self._view = memoryview(self._buffer)
        self._port = 0
        self._frame_bytes = 0
        self._counted = 0
        self._expected: int | None = None
        self._waiting: list[Socket] = []
        """Sockets to be opened, the next one last."""
        self._awaiting = 0
        """Sockets that are not (yet, or again) greeted, while `open` or `storm` waits for them."""
        self._asked = ""
        self._comes_back = False
        self._since = 0.0
        self._commands = b""
        self._unread: list[tuple[Socket, bytes, float]] = []
        """What came, and when, in ms; not looked at yet."""

    # Commands.

    def run(self) -> None:
        """Serve commands until stdin ends."""
        stdin = sys.stdin.fileno()
        os.set_blocking(stdin, False)
        self._epoll.register(stdin, select.EPOLLIN)
        while True:
            ready = self._epoll.poll(0 if self._unread else 0.05, 4_096)
            if not ready:
                self._look()
            for fd, _ in ready:
                if fd == stdin:
                    self._look()
                    if not self._read_commands(stdin):
                        return
                elif (watcher := self._by_fd.get(fd)) is not None:
                    self._on_ready(fd, watcher)
            if self._retries:
                self._retry()

    def _read_commands(self, stdin: int) -> bool:
        data = os.read(stdin, 1_048_576)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            getattr(self, f"do_{command.pop('do')}")(**command)
        return bool(data)

    def _answer(self, **body: Any) -> None:
        print(json.dumps(body), flush=True)

    def do_open(self, port: int, auctions: list[str], sockets: int, stuck_every: int = 0, frame_bytes: int = 0) -> None:
        """Connect `sockets` watchers, in turn to each of `auctions`; each `stuck_every`-th never reads."""
        self._port, self._frame_bytes = port, frame_bytes
        self._asked, self._since = "open", time.monotonic()
        for number in range(sockets):
            path = f"/auctions/{auctions[number % len(auctions)]}/updates"
            # Shifted by one each time around, so that stuck ones are spread over the auctions.
            shift = number // max(len(auctions), stuck_every)
            is_stuck = bool(stuck_every) and (number + shift) % stuck_every == 0
            self._sockets.append(Socket(path, f"127.0.0.{2 + number // PER_ADDRESS}", is_stuck=is_stuck))
        self._awaiting = sockets
        self._waiting = self._sockets[OPENING_MAX:][::-1]
        for watcher in self._sockets[:OPENING_MAX]:
            self._connect(watcher)

    def do_expect(self, frames: int) -> None:
        """Answer when `frames` more have come."""
        self._expected = frames
        self._check_expected()

    def do_measure(self) -> None:
        """Begin to measure."""
        self.measured = Measured()
        self._answer()

    def do_progress(self) -> None:
        """Tell how far everyone is, without working through what was measured: others are being written to meanwhile."""
        numbers = [watcher.number for watcher in self._sockets if not watcher.is_stuck]
        self._answer(
            frames=self.measured.frames,
            behind=min((-1 if number is None else number for number in numbers), default=-1),
        )

    def do_report(self) -> None:
        """Tell what was measured."""
        seen = self.measured
        self._answer(
            delivery_ms={lane: percentiles(values) for lane, values in seen.latencies_ms.items()},
            frames=seen.frames,
            gaps=seen.gaps,
            doubles=seen.doubles,
            closes=dict(seen.closes),
            recovered=dict(seen.recovered),
            refused=seen.refused,
        )

    def do_storm(self, drop: bool) -> None:
        """Lose every socket, and come back."""
        self._await_everyone("storm")
        if drop:
            self._cut()
            for watcher in self._sockets:
                self._connect(watcher)

    def do_cut(self) -> None:
        """Lose every socket."""
        self._cut()
        self._answer()

    def do_return(self) -> None:
        """Come back, everybody at once."""
        self._await_everyone("return")
        for watcher in self._sockets:
            self._connect(watcher)

    def _await_everyone(self, asked: str) -> None:
        self._asked, self._since, self._comes_back = asked, time.monotonic(), True
        self._awaiting = len(self._sockets)
        for watcher in self._sockets:
            watcher.back_at = 0.0

    def _cut(self) -> None:
        lost = [watcher.sock for watcher in self._sockets if watcher.sock is not None]
        for watcher in self._sockets:
            self._forget(watcher)
        for sock in lost:  # a reset, as a network that is gone
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()

    # Connecting.

    def _connect(self, watcher: Socket) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        if watcher.is_stuck:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STUCK_BUFFER_BYTES)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((watcher.address, 0))
        sock.connect_ex(("127.0.0.1", self._port))
        watcher.sock = sock
        self._by_fd[sock.fileno()] = watcher
        self._connecting.add(sock.fileno())
        self._epoll.register(sock.fileno(), select.EPOLLOUT)

    def _send_request(self, fd: int, watcher: Socket) -> None:
        assert watcher.sock is not None
        fault = watcher.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if fault:
            self._lost(watcher, os.strerror(fault))
            return
        self._connecting.discard(fd)
        query = f"?since={quote(watcher.cursor)}" if watcher.cursor else ""
        request = (
            f"GET {watcher.path}{query} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        try:
            watcher.sock.send(request.encode())
        except OSError as error:
            self._lost(watcher, type(error).__name__)
        else:
            self._epoll.modify(fd, select.EPOLLIN)

    def _retry(self) -> None:
        now = time.monotonic()
        due = [watcher for at, watcher in self._retries if at <= now]
        self._retries = [(at, watcher) for at, watcher in self._retries if at > now]
        for watcher in due:
            self._connect(watcher)

    def _forget(self, watcher: Socket) -> None:
        """This socket is no more."""
        if watcher.sock is not None:
            fd = watcher.sock.fileno()
            if not (watcher.is_stuck and watcher.greeted):
                self._epoll.unregister(fd)
            self._by_fd.pop(fd, None)
            self._connecting.discard(fd)
        watcher.sock, watcher.greeted, watcher.rest = None, False, b""

    def _lost(self, watcher: Socket, why: str) -> None:
        sock, was_greeted = watcher.sock, watcher.greeted
        self._forget(watcher)
        if sock is not None:
            sock.close()
        if was_greeted:
            self.measured.closes[why] += 1
            if self._expected is not None:
                sys.exit(f"a socket that counts was closed: {why}")
            if self._comes_back:
                self._retries.append((0.0, watcher))
        else:
            self.measured.refused += 1
            if self.measured.refused > REFUSED_MAX:
                sys.exit(f"{REFUSED_MAX} handshakes were refused, the last with: {why}")
            delay_s = RETRY_S * random.uniform(0.5, 1.5)
            self._retries.append((time.monotonic() + delay_s, watcher))

    # Reading.

    def _on_ready(self, fd: int, watcher: Socket) -> None:
        if fd in self._connecting:
            self._send_request(fd, watcher)
            return
        assert watcher.sock is not None
        try:
            count = watcher.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(watcher, type(error).__name__)
            return
        if not count:
            self._end(watcher, "closed")
        elif count == self._frame_bytes and not watcher.rest and watcher.greeted:
            self._counted += 1
            self._check_expected()
        else:
            self._unread.append((watcher, self._view[:count].tobytes(), time.time() * 1_000))
            if not watcher.greeted or self._frame_bytes or len(self._unread) > UNREAD_MAX:
                self._look()

    def _end(self, watcher: Socket, why: str) -> None:
        self._look()
        if watcher.sock is not None:  # else what it sent last was its farewell
            self._lost(watcher, why)

    def _look(self) -> None:
        unread, self._unread = self._unread, []
        for watcher, data, read_ms in unread:
            if watcher.sock is not None:
                self._on_bytes(watcher, watcher.rest + data, read_ms)

    def _on_bytes(self, watcher: Socket, data: bytes, now_ms: float) -> None:
        at = 0
        if not watcher.greeted:
            at = data.find(b"\r\n\r\n") + 4
            if at < 4:
                watcher.rest = data
                return
            if not data.startswith(b"HTTP/1.1 101 "):
                self._lost(watcher, data[9:12].decode())
                return
            self._greet(watcher)
            if watcher.is_stuck:
                return
        size = len(data)
        while size - at >= 2:
            length, start = data[at + 1], at + 2
            if length == 126:
                length, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            elif length == 127:
                length, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
            end = start + length
            if end > size:
                break
            self._on_frame(watcher, data, at, start, end, now_ms)
            if watcher.sock is None:
                return
            at = end
        watcher.rest = data[at:]

    def _greet(self, watcher: Socket) -> None:
        watcher.greeted = True
        first, watcher.back_at = not watcher.back_at, time.monotonic()
        if watcher.is_stuck:
            assert watcher.sock is not None
            self._epoll.unregister(watcher.sock.fileno())
        if self._waiting:
            self._connect(self._waiting.pop())
        if first and self._awaiting:
            self._awaiting -= 1
            if not self._awaiting:
                self._all_here()

    def _all_here(self) -> None:
        back_ms = [(watcher.back_at - self._since) * 1_000 for watcher in self._sockets]
        asked, self._asked = self._asked, ""
        self._comes_back = False
        stuck = sum(watcher.is_stuck for watcher in self._sockets)
        self._answer(done=asked, back_ms=percentiles(back_ms), refused=self.measured.refused, stuck=stuck)

    def _on_frame(self, watcher: Socket, data: bytes, at: int, start: int, end: int, now_ms: float) -> None:
        opcode = data[at] & 15
        if opcode == 9:
            assert watcher.sock is not None
            # The same bytes back (RFC 6455, section 5.5.3), masked with zeros: servers that do not get them hang up.
            watcher.sock.send(bytes((0x8A, 0x80 | end - start)) + bytes(4) + data[start:end])
        elif opcode == 8:
            self._lost(watcher, str(int.from_bytes(data[start : start + 2], "big")))
        elif end - at == self._frame_bytes:
            self._counted += 1
            self._check_expected()
        else:
            self._on_text(watcher, data, start, end, now_ms)

    def _on_text(self, watcher: Socket, data: bytes, start: int, end: int, now_ms: float) -> None:
        seen = self.measured
        seen.frames += 1
        if data.startswith(TICK, start):
            seen.latencies_ms["tick"].append(now_ms - _instant(data, b'"server_time":', start, end))
            return
        cursor_at = data.find(b'"cursor":"', start, end) + 10
        if cursor_at >= 10:
            watcher.cursor = data[cursor_at : data.index(b'"', cursor_at)].decode()
        if data.startswith(BID, start):
            seen.latencies_ms["bid_from_commit"].append(now_ms - _instant(data, b'"committed_at":', start, end))
            seen.latencies_ms["bid_from_arrival"].append(now_ms - _instant(data, b'"occurred_at":', start, end))
            self._on_bid(watcher, _integer(data, b'"bid_id":"', BID_DIGITS, start, end))
        elif data.startswith(SNAPSHOT, start):
            at = data.index(b'"recovered":', start, end) + 12
            recovered = next(answer for answer in RECOVERED if data.startswith(answer, at)).decode()
            seen.recovered[recovered] += 1
            if recovered == "false":
                watcher.number = None

    def _on_bid(self, watcher: Socket, number: int) -> None:
        if watcher.number is not None:
            if number <= watcher.number:
                self.measured.doubles += 1
            elif number > watcher.number + 1:
                self.measured.gaps += number - watcher.number - 1
        watcher.number = number

    def _check_expected(self) -> None:
        if self._expected is not None and self._counted >= self._expected:
            self._counted -= self._expected
            self._expected = None
            self._answer()


def _integer(data: bytes, name: bytes, digits: int, start: int, end: int) -> int:
    at = data.index(name, start, end) + len(name)
    return int(data[at : at + digits])


def _instant(data: bytes, name: bytes, start: int, end: int) -> int:
    return _integer(data, name, EPOCH_DIGITS, start, end)


if __name__ == "__main__":
    pin(os.getpid(), int(sys.argv[1]))
    open_files()
    Client().run()
