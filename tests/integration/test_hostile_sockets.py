"""Peers that mean no good, or know no better, against the real gateway: refused as RFC 6455 says, nothing left behind."""

import os
import random
import resource
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final

import orjson
import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from gateway.admission import PLAIN_MIN
from gateway.connection import (
    CLIENT_FRAME_BYTES_MAX,
    CLIENT_FRAMES_PER_SECOND_MAX,
    CLOSE_WITHIN_S,
    MESSAGES_PER_SECOND_MAX,
)
from gateway.http_connection import HEADERS_BYTES_MAX, Awaited
from tests.integration.events import fresh_id, started
from tests.integration.test_first_light import LONG_MS, now_of
from tests.live import SCRIPT, LiveStack, until

pytestmark = pytest.mark.integration

HEADERS: Final = {
    "Host": "127.0.0.1",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
SYNC: Final = b'{"type":"sync","t0":1}'
MASK: Final = b"\x01\x02\x03\x04"


def masked(opcode: int, data: bytes = b"", *, fin: bool = True, bits: int = 0) -> bytes:
    """A client's frame, right or wrong: any opcode, any bits of the first byte."""
    body = bytes(byte ^ MASK[index % 4] for index, byte in enumerate(data))
    return length_of((fin << 7) | bits | opcode, len(data)) + MASK + body


def length_of(first: int, length: int, mask: int = 0x80) -> bytes:
    """The first bytes of a frame, with a length that need not be true."""
    if length < 126:
        return bytes((first, mask | length))
    if length < 65_536:
        return struct.pack("!BBH", first, mask | 126, length)
    return struct.pack("!BBQ", first, mask | 127, length)


def head(
    path: str, *, query: str = "", method: str = "GET", protocol: str = "HTTP/1.1", **changes: str | None
) -> bytes:
    """The head of a handshake; a header that is None is left out."""
    headers = HEADERS | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"{method} {path}{query} {protocol}", *lines, "", ""]).encode("latin-1")


def address_of(stack: LiveStack) -> tuple[str, int]:
    """Where the gateway listens."""
    host, _, port = stack.url.removeprefix("http://").rpartition(":")
    return host, int(port)


@contextmanager
def connected(stack: LiveStack) -> Iterator[socket.socket]:
    """A raw connection."""
    with socket.create_connection(address_of(stack), timeout=20) as raw:
        yield raw


def to_the_end(raw: socket.socket) -> bytes:
    """Everything until the gateway ends the connection."""
    parts = []
    with suppress(ConnectionResetError):
        while part := raw.recv(65_536):
            parts.append(part)
    return b"".join(parts)


class Watcher:
    """An open socket whose next bytes are anything."""

    def __init__(self, stack: LiveStack, raw: socket.socket, auction_id: str, behind: bytes = b"") -> None:
        self.raw = raw
        self.client = ClientProtocol(
            parse_uri("ws" + stack.url.removeprefix("http") + f"/auctions/{auction_id}/updates")
        )
        self.client.send_request(self.client.connect())
        raw.sendall(b"".join(self.client.data_to_send()) + behind)
        self.frames: list[Any] = []
        self.read_until(lambda: self.frames)

    def read_until(self, condition: Callable[[], Any]) -> None:
        """Read until a condition holds; the connection must not end before."""
        while not condition():
            data = self.raw.recv(65_536)
            assert data, "the gateway ended the connection"
            self._take(data)

    def farewell(self) -> int | None:
        """Read to the end; the close code, or None if none came."""
        self._take(to_the_end(self.raw))
        received = self.client.close_rcvd
        return None if received is None else int(received.code)

    def _take(self, data: bytes) -> None:
        if data:
            self.client.receive_data(data)
        self.frames += [
            orjson.loads(event.data)
            for event in self.client.events_received()
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT
        ]


@contextmanager
def watching(stack: LiveStack, auction_id: str, behind: bytes = b"") -> Iterator[Watcher]:
    """An open socket, with bytes behind its handshake."""
    with connected(stack) as raw:
        yield Watcher(stack, raw, auction_id, behind)


def sockets_of(stack: LiveStack) -> float:
    """What the gauge of open sockets says."""
    (value,) = [
        line.rpartition(" ")[2]
        for line in stack.http.get("/metrics").text.splitlines()
        if line.startswith("auctions_gateway_connections")
    ]
    return float(value)


@pytest.fixture(scope="module")
def auction_id(live_stack: LiveStack) -> str:
    """An auction that runs."""
    made, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(made, now, now + LONG_MS))
    live_stack.until_status(made, "ACTIVE")
    return made


@pytest.fixture(autouse=True)
def nothing_is_left(live_stack: LiveStack) -> Iterator[None]:
    """After each test the same gateway runs, no socket is counted any more, and nothing failed inside."""
    pids, before = live_stack.pids("gateway"), len(live_stack.logged())
    yield
    until(lambda: sockets_of(live_stack) == 0, "no socket is counted")
    assert live_stack.pids("gateway") == pids
    said = live_stack.logged()[before:]
    assert "Traceback" not in said, said
    # A warning may tell of a Redis that a loaded machine kept waiting.
    assert "rror" not in "".join(line for line in said.splitlines() if "[warning" not in line), said


# Handshakes.


@pytest.mark.requirement("R7")
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Sec_WebSocket_Key": None}, 400),
        ({"Sec_WebSocket_Key": ""}, 400),
        ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400),
        ({"Sec_WebSocket_Key": "no base64 at all!!!!!!!"}, 400),
        (
            {
                "Sec_WebSocket_Key": HEADERS["Sec-WebSocket-Key"]
                + "\r\nSec-WebSocket-Key: "
                + HEADERS["Sec-WebSocket-Key"]
            },
            400,
        ),
        ({"Sec_WebSocket_Version": None}, 400),
        ({"Sec_WebSocket_Version": "8"}, 400),
        ({"Sec_WebSocket_Version": "13, 8"}, 400),
        ({"Host": None}, 400),
        ({"Host": "a\r\nHost: b"}, 400),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Connection": "keep-alive"}, 426),
        ({"Upgrade": "h2c"}, 426),
        ({"Upgrade": "websocket, h2c"}, 426),
        ({"method": "POST", "Content_Length": "0"}, 405),
        ({"protocol": "HTTP/1.0"}, 400),
        ({"Content_Length": "5"}, 400),
        ({"Transfer_Encoding": "chunked"}, 400),
        ({"Content_Length": "5", "Transfer_Encoding": "chunked"}, 400),
        ({"X_Long": "x" * 9_000}, 431),
        ({"X_Many": "x" + "\r\nX-Many: x" * 200}, 431),
        ({"X_Many": "x" + ("\r\nX-Many: " + "x" * 1_000) * (HEADERS_BYTES_MAX // 1_000 + 10)}, 431),
        ({"X_Bad": "a\x00b"}, 400),
        ({"query": "?" + "x" * 9_000}, 414),
    ],
)
def test_a_handshake_that_is_none_is_answered_and_ended(
    live_stack: LiveStack, auction_id: str, changes: dict[str, Any], status: int
) -> None:
    """The status says what is wrong; a version that is not spoken is answered with the one that is."""
    with connected(live_stack) as raw:
        raw.sendall(head(f"/auctions/{auction_id}/updates", **changes))
        answer = raw.recv(65_536)
        if status != 404:  # which is HTTP's answer to a plain request
            to_the_end(raw)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    if changes.get("Sec_WebSocket_Version", "13") != "13":
        assert b"Sec-WebSocket-Version: 13\r\n" in answer


@pytest.mark.requirement("R7")
def test_a_handshake_byte_by_byte_is_a_handshake(live_stack: LiveStack, auction_id: str) -> None:
    """However it is cut; and what comes in one piece with it is not lost."""
    with connected(live_stack) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head(f"/auctions/{auction_id}/updates"):
            raw.sendall(bytes((byte,)))
        assert raw.recv(65_536).startswith(b"HTTP/1.1 101 ")
    with watching(live_stack, auction_id, masked(1, SYNC)) as watcher:
        watcher.read_until(lambda: any(frame["type"] == "sync" for frame in watcher.frames))


@pytest.mark.requirement("R7")
def test_silent_and_dripping_peers_are_cut_within_ten_seconds(live_stack: LiveStack, auction_id: str) -> None:
    """Neither silence nor a byte a second holds a connection, before a handshake or after an answer."""
    handshake = head(f"/auctions/{auction_id}/updates")
    request = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"

    bound = Awaited.HEAD.value + CLOSE_WITHIN_S

    def drip(first: bytes, then: bytes) -> tuple[bytes, float]:
        with connected(live_stack) as raw:
            begun, said, drops = monotonic(), b"", iter(then)
            raw.sendall(first)
            raw.settimeout(1)
            while monotonic() < begun + 2 * bound:
                try:
                    part = raw.recv(65_536)
                except TimeoutError:
                    with suppress(ConnectionError):  # cut just now, which the next look tells
                        raw.sendall(bytes((next(drops),)) if then else b"")
                    continue
                except ConnectionError:  # cut while a byte was on its way
                    break
                if not part:
                    break
                said += part
            return said, monotonic() - begun

    kinds = [(b"", b""), (b"", handshake), (b"", request), (request, b""), (request, request), (handshake[:40], b"")]
    with ThreadPoolExecutor(len(kinds)) as pool:
        outcomes = list(pool.map(lambda kind: drip(*kind), kinds))
    assert all(Awaited.HEAD.value - 1 < took < bound for _said, took in outcomes), outcomes
    assert [b"HTTP/1.1 408 " in said for said, _took in outcomes] == [False, True, True, False, True, True]


# Frames.


@pytest.mark.requirement("R7")
@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (Frame(Opcode.TEXT, SYNC).serialize(mask=False), 1002),
        *((masked(1, SYNC, bits=bit), 1002) for bit in (0x40, 0x20, 0x10, 0x70)),
        *((masked(opcode), 1002) for opcode in (3, 7, 11, 15)),
        (masked(9, b"x" * 126), 1002),
        (masked(9, fin=False), 1002),
        (masked(8, fin=False), 1002),
        (masked(0, b"x"), 1002),
        (masked(1, b"x", fin=False) + masked(1, b"x"), 1002),
        (masked(1, b"\xff\xfe"), 1007),
        (masked(1, b"\xed\xa0\x80"), 1007),
        (masked(1, b"\xe2", fin=False) + masked(0, b"\x82"), 1007),
        (masked(8, b"\x03"), 1002),
        (masked(8, struct.pack("!H", 1005)), 1002),
        (masked(8, struct.pack("!H", 999)), 1002),
        (masked(8, struct.pack("!H", 1000) + b"\xff"), 1007),
        (masked(1, b" " * (CLIENT_FRAME_BYTES_MAX + 1)), 1009),
        (masked(1, b" " * CLIENT_FRAME_BYTES_MAX, fin=False) + masked(0, b" "), 1009),
        (length_of(0x81, 1 << 62) + MASK, 1009),
        (length_of(0x82, (1 << 64) - 1) + MASK, 1009),
        (length_of(0x81, 16 << 20) + MASK + bytes(16 << 20), 1009),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1002),
        (masked(1, b"{") * 3, 4400),
        (masked(1, SYNC) * (MESSAGES_PER_SECOND_MAX + 1), 4429),
        (masked(9, b"?") * (CLIENT_FRAMES_PER_SECOND_MAX + 1), 4429),
        (masked(10) * (CLIENT_FRAMES_PER_SECOND_MAX + 1), 4429),
        (masked(1, fin=False) + masked(0, fin=False) * CLIENT_FRAMES_PER_SECOND_MAX, 4429),
        (masked(8), 1005),
        (masked(8, struct.pack("!H", 1001)), 1001),
    ],
)
def test_frames_that_break_the_protocol_close_with_its_code(
    live_stack: LiveStack, auction_id: str, frames: bytes, code: int
) -> None:
    """The close code says what was wrong, and arrives even while the peer is still sending."""
    with watching(live_stack, auction_id) as watcher:
        with suppress(ConnectionResetError, BrokenPipeError):
            watcher.raw.sendall(frames)
        if code >= 4_000:  # ours waits for the answer to its close frame
            watcher.read_until(lambda: watcher.client.close_rcvd is not None)
            watcher.raw.shutdown(socket.SHUT_WR)
        assert watcher.farewell() == code


@pytest.mark.requirement("B3")
def test_a_flood_of_empty_pings_costs_one_frame_of_farewell(live_stack: LiveStack, auction_id: str) -> None:
    """A megabyte of pings is 170,000 frames. A few dozen are answered, the rest is not even parsed; others notice nothing."""
    with watching(live_stack, auction_id) as other, watching(live_stack, auction_id) as flood:
        with suppress(ConnectionResetError, BrokenPipeError):
            flood.raw.sendall(masked(9) * 170_000)
        assert flood.farewell() in {4429, None}  # a reset may overtake the close frame of one who goes on
        other.raw.sendall(masked(1, SYNC))
        other.read_until(lambda: any(frame["type"] == "sync" for frame in other.frames))


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_break_nothing(live_stack: LiveStack, auction_id: str, seed: int) -> None:
    """Whatever comes, as a request, behind a handshake or in a socket, ends in an answer, a close code or the end."""
    chance = random.Random(seed)
    noise = chance.randbytes(chance.randrange(1, 20_000))
    with connected(live_stack) as raw:
        with suppress(ConnectionResetError, BrokenPipeError):
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
        to_the_end(raw)
    with watching(live_stack, auction_id) as watcher:
        with suppress(ConnectionResetError, BrokenPipeError):
            watcher.raw.sendall(noise)
            watcher.raw.shutdown(socket.SHUT_WR)
        assert watcher.farewell() in {1002, 1007, 1009, 4400, 4429, None}
    with connected(live_stack) as raw:
        with suppress(ConnectionResetError, BrokenPipeError):
            raw.sendall(head(f"/auctions/{auction_id}/updates") + noise)
            raw.shutdown(socket.SHUT_WR)
        to_the_end(raw)


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("when", ["connected", "asked", "open", "half a frame"])
@pytest.mark.parametrize("how", ["half-open", "reset", "closed"])
def test_peers_that_vanish_leave_nothing(live_stack: LiveStack, auction_id: str, when: str, how: str) -> None:
    """At any point and in any way: the end of one direction, a reset, or a plain close without a farewell."""
    with connected(live_stack) as raw:
        if when == "asked":
            raw.sendall(head(f"/auctions/{auction_id}/updates"))
        elif when != "connected":
            Watcher(live_stack, raw, auction_id)
        if when == "half a frame":
            raw.sendall(masked(1, SYNC)[:7])
        if how == "half-open":
            raw.shutdown(socket.SHUT_WR)
            to_the_end(raw)
        elif how == "reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# Numbers.


@pytest.mark.requirement("R7")
def test_more_connections_than_there_is_room_for(short_tmp: Path) -> None:
    """Idle connections beyond the bound cost requests a 503, more are cut on arrival; liveness and sockets stay."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_CONNECTIONS_MAX": "2"})
    idle: list[socket.socket] = []
    try:
        idle += [socket.create_connection(address_of(stack), timeout=20) for _ in range(PLAIN_MIN + 20)]
        answer = until(
            lambda: (
                (found := stack.http.get("/openapi.json", headers={"Connection": "close"})).status_code == 503 and found
            ),
            "requests are refused",
        )
        assert answer.json()["error_code"] == "TOO_MANY_CONNECTIONS"
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert stack.http.get("/healthz").status_code == 200
        idle += [socket.create_connection(address_of(stack), timeout=20) for _ in range(PLAIN_MIN)]
        assert to_the_end(idle[-1]) == b"", "cut on arrival"
        for raw in idle:
            raw.close()
        until(lambda: stack.http.get("/openapi.json").status_code == 200, "there is room again")
        assert "Traceback" not in stack.logged()
    finally:
        for raw in idle:
            raw.close()
        assert stack.stop() == 0


@pytest.mark.requirement("R7")
def test_handshakes_beyond_the_rate_are_503(short_tmp: Path) -> None:
    """The bucket is of the gateway: who is refused is told when to come back, and then let in."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_HANDSHAKES_PER_SECOND_MAX": "2"})

    def knock() -> bytes:
        with connected(stack) as raw:
            raw.sendall(head("/auctions/nobody/updates"))
            return to_the_end(raw)

    try:
        answers = [knock() for _ in range(20)]
        statuses = [int(answer.split(b" ", 2)[1]) for answer in answers]
        assert statuses[:2] == [404, 404]
        assert 503 in statuses
        refused = answers[statuses.index(503)]
        assert b"TOO_MANY_HANDSHAKES" in refused
        assert b"Retry-After: " in refused
        until(lambda: knock().startswith(b"HTTP/1.1 404"), "handshakes are taken again")
    finally:
        assert stack.stop() == 0


def test_a_gateway_that_cannot_have_its_descriptors_says_so(short_tmp: Path) -> None:
    """A chosen `connections_max` beyond the hard limit of open files is refused at the start, with what to do."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2_000, 2_000))

    environment = os.environ | {"AUCTION_TIMER_CONNECTIONS_MAX": "5000"}
    done = subprocess.run(
        [*SCRIPT, "gateway", "--port", "0", "--redis-url", "unix:///nowhere"],
        cwd=short_tmp,
        env=environment,
        preexec_fn=few,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78
    assert "AUCTION_TIMER_CONNECTIONS_MAX to 1162 or less" in done.stderr
