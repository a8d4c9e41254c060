"""Tests for gateway.http_connection: how long a peer may take, and what is answered past the application."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from websockets.frames import Frame, Opcode

from gateway.admission import PLAIN_MIN
from gateway.connection import Connection
from gateway.http_connection import HEADERS_BYTES_MAX, Awaited, HttpConnection
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, House, record
from tests.gateway.peers import StillTransport

HEAD_S, BODY_S, REST_S = Awaited.HEAD.value, Awaited.BODY.value, Awaited.REST.value
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /events HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
HANDSHAKE = (
    b"GET /auctions/%b/updates HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" % AUCTION.encode()
)
SYNC = Frame(Opcode.TEXT, b'{"type":"sync","t0":1}').serialize(mask=True)

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def answer(send: Send, *parts: bytes) -> None:
    """Send an answer in parts."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads the whole request and answers `ok`; it says so if the request was cut off."""
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    await answer(send, b"ok" if message["type"] == "http.request" else b"cut off")


class Wire(StillTransport):
    """A transport that can be handed to another protocol, and to which a peer writes."""

    def __init__(self, house: House, app: App = reading, *, address: str = "192.0.2.1") -> None:
        super().__init__(address)
        config = uvicorn.Config(
            app,
            ws=Connection,
            http=HttpConnection,
            lifespan="off",
            log_config=None,
            timeout_keep_alive=60,
            h11_max_incomplete_event_size=HEADERS_BYTES_MAX,
        )
        config.load()
        self.state: Any = SimpleNamespace(connections=set(), tasks=set(), total_requests=0, default_headers=[])
        self.protocol: Any = HttpConnection(config, self.state, {"door": house.door})
        self.protocol.connection_made(self)

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def feed(self, data: bytes) -> None:
        """The peer sends bytes, if it still can."""
        if not self.is_closing():
            self.protocol.data_received(data)

    async def drip(self, data: bytes, every_s: float) -> None:
        """The peer sends byte by byte."""
        for index in range(len(data)):
            self.feed(data[index : index + 1])
            await asyncio.sleep(every_s)

    @property
    def said(self) -> str:
        """Everything that was answered."""
        return self.taken.decode("latin-1")

    @property
    def answers(self) -> int:
        """How many answers were given."""
        return len(re.findall(r"HTTP/1\.1 \d{3} ", self.said))

    @property
    def refused(self) -> tuple[int, str]:
        """Status and error code of the only answer, which must say that the connection ends."""
        head, _, body = bytes(self.taken).partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        assert b"application/problem+json" in head
        return int(head.split(b" ", 2)[1]), orjson.loads(body)["error_code"]


def after(house: House, scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario on virtual time; nothing of its connections is left at the end."""

    async def whole() -> None:
        await scenario()
        await asyncio.sleep(BODY_S + REST_S)
        assert house.door.admission.plain == 0
        assert house.door.admission._per_address == {}
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(house.line, whole)


@pytest.fixture
def house() -> Iterator[House]:
    """A house with one auction."""
    made = House()
    made.put(record())
    yield made
    assert made.door._connections == set()


# Time.


@pytest.mark.requirement("R7")
def test_a_silent_connection_is_closed_after_ten_seconds(house: House) -> None:
    """Who asks nothing is let go without an answer, not a moment before."""

    async def scenario() -> None:
        wire = Wire(house)
        await asyncio.sleep(HEAD_S - 0.1)
        assert not wire.is_closing()
        await asyncio.sleep(0.2)
        assert wire.is_closing()
        assert wire.said == ""

    after(house, scenario)


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("head", [GET, HANDSHAKE + b"\r\n"])
def test_a_dripping_head_is_cut_after_ten_seconds(house: House, head: bytes) -> None:
    """A byte now and then prolongs nothing: the whole head counts, of a request as of a handshake."""

    async def scenario() -> None:
        wire = Wire(house)
        dripping = asyncio.create_task(wire.drip(head, every_s=0.9))
        await asyncio.sleep(HEAD_S - 0.1)
        assert not wire.is_closing()
        await asyncio.sleep(0.2)
        assert wire.refused == (408, "REQUEST_TIMEOUT")
        assert wire.is_closing()
        await dripping

    after(house, scenario)


def test_a_slow_head_that_is_in_time_is_served(house: House) -> None:
    """Nine seconds are enough, however the bytes are cut."""

    async def scenario() -> None:
        wire = Wire(house)
        await wire.drip(GET, every_s=9 / len(GET))
        await asyncio.sleep(0)
        assert wire.said.startswith("HTTP/1.1 200")

    after(house, scenario)


def test_a_connection_that_is_kept_is_held_to_the_same_between_requests(house: House) -> None:
    """Every answer gives ten seconds for the next head; drops of it give none."""

    async def scenario() -> None:
        wire = Wire(house)
        for _ in range(3):
            wire.feed(GET)
            await asyncio.sleep(HEAD_S - 0.1)
            assert not wire.is_closing()
        assert wire.said.count("HTTP/1.1 200") == 3
        wire.feed(GET[:5])
        await asyncio.sleep(0.2)
        assert wire.said.count("HTTP/1.1 408") == 1

    after(house, scenario)


def test_a_dripping_body_is_cut_after_thirty_seconds(house: House) -> None:
    """The answer is 408, and the application, told that the peer is gone, cannot add to it."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(POST)
        dripping = asyncio.create_task(wire.drip(b"x" * 90, every_s=0.5))
        await asyncio.sleep(BODY_S - 0.1)
        assert wire.said == ""
        await asyncio.sleep(0.2)
        assert wire.refused == (408, "REQUEST_TIMEOUT")
        await dripping
        assert wire.answers == 1

    after(house, scenario)


def test_a_body_that_goes_on_after_its_answer_is_cut(house: House) -> None:
    """An application may answer before it has read everything; the rest is not waited for without end."""

    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"no")

    async def scenario() -> None:
        wire = Wire(house, early)
        wire.feed(POST)
        await wire.drip(b"x" * 90, every_s=0.5)
        assert wire.is_closing()
        assert wire.said.startswith("HTTP/1.1 200")

    after(house, scenario)


def test_a_body_that_stops_in_the_middle_of_an_answer_ends_both(house: House) -> None:
    """A second answer inside the first would be read as part of it: the connection is cut instead."""

    async def talks_on(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def scenario() -> None:
        wire = Wire(house, talks_on)
        wire.feed(POST)
        await asyncio.sleep(BODY_S + 0.1)
        assert wire.aborted
        assert wire.answers == 1

    after(house, scenario)


def test_an_application_may_take_its_time(house: House) -> None:
    """The bounds are for peers: an answer that needs ten minutes is given."""

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(600)
        await answer(send, b"ok")

    async def scenario() -> None:
        wire = Wire(house, slow)
        wire.feed(GET)
        await asyncio.sleep(601)
        assert wire.said.startswith("HTTP/1.1 200")

    after(house, scenario)


def test_an_answer_that_is_not_taken_is_given_up(house: House) -> None:
    """Who asks for much and reads nothing is cut after 20 s; who reads in time gets all of it."""

    async def much(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, *[b"x" * 50_000] * 10)

    async def scenario() -> None:
        stuck, late = Wire(house, much), Wire(house, much)
        for wire in (stuck, late):
            wire.stuck = True
            wire.feed(GET)
        await asyncio.sleep(REST_S - 0.1)
        assert not stuck.aborted
        late.release()
        await asyncio.sleep(0.2)
        assert stuck.aborted
        assert not late.aborted
        assert len(late.taken) > 500_000

    after(house, scenario)


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_the_end_of_an_answer_may_be_taken_slowly(house: House, header: bytes) -> None:
    """What is written already is still delivered when the connection is closed behind it, within the bound."""

    async def one_piece(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"x" * 60_000)

    async def scenario() -> None:
        wire = Wire(house, one_piece)
        wire.stuck = True
        wire.feed(GET[:-2] + header + b"\r\n")
        await asyncio.sleep(REST_S - 0.1)
        assert wire.is_closing()
        wire.release()
        await asyncio.sleep(0.2)
        assert not wire.aborted
        assert len(wire.taken) > 60_000

    after(house, scenario)


def test_a_farewell_that_is_not_taken_does_not_hold_the_connection(house: House) -> None:
    """A close waits for what is still to be written; it does not wait for ever."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.stuck = True
        wire.feed(GET)
        await asyncio.sleep(HEAD_S + 0.1)
        assert wire.is_closing()
        assert not wire.aborted
        await asyncio.sleep(REST_S)
        assert wire.aborted

    after(house, scenario)


@pytest.mark.requirement("R7")
def test_a_socket_is_not_held_to_the_time_of_a_request(house: House) -> None:
    """Once upgraded, nothing of the bounds for requests is left."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(HANDSHAKE + b"\r\n")
        await asyncio.sleep(60)
        assert wire.said.startswith("HTTP/1.1 101")
        assert not wire.is_closing()
        assert house.door.admission.plain == 0
        wire.abort()

    after(house, scenario)


# What is answered past the application.


@pytest.mark.requirement("R7")
@pytest.mark.parametrize(
    "handshake",
    [
        HANDSHAKE + b"Content-Length: 5\r\n",
        HANDSHAKE + b"Transfer-Encoding: chunked\r\n",
        HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_a_handshake_with_a_body_or_of_an_old_protocol_is_400(house: House, handshake: bytes) -> None:
    """RFC 6455 knows no body there, so what would follow can be no frames; and HTTP/1.0 knows no upgrade."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(handshake + b"\r\nhello")
        assert wire.refused == (400, "MALFORMED_REQUEST")
        assert house.sample("auctions_gateway_handshakes_total", outcome="malformed") == 1

    after(house, scenario)


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("pieces", [[HANDSHAKE + b"\r\n" + SYNC], [HANDSHAKE, b"\r\n" + SYNC[:4], SYNC[4:]]])
@pytest.mark.parametrize("known", [True, False])
def test_frames_behind_the_handshake_are_read(house: House, pieces: list[bytes], known: bool) -> None:
    """What comes in one piece with the handshake is not lost. Only once the socket is open does it count as a message."""

    async def scenario() -> None:
        if known:
            await house.hub.room(AUCTION)
        wire = Wire(house)
        for piece in pieces:
            wire.feed(piece)
        await asyncio.sleep(1)
        wire.feed(SYNC)
        assert wire.said.startswith("HTTP/1.1 101")
        assert wire.said.count('"type":"sync"') == 1 + known
        wire.abort()

    after(house, scenario)


def asked_by(wire: Wire) -> str:
    """The correlation id of the only answer, which its header and its body must both say."""
    head, _, body = bytes(wire.taken).partition(b"\r\n\r\n")
    (said,) = re.findall(rb"(?i)\r\nx-correlation-id: (\S+)", head)
    assert orjson.loads(body)["correlation_id"] == said.decode()
    return str(said.decode())


MINE = b"X-Correlation-Id: mine-1\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "echoed"),
    [
        (HANDSHAKE + b"Content-Length: 5\r\n" + MINE, True),
        (POST[:-2] + MINE, True),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + MINE + b"zz\r\n", True),
        (POST[:-2] + MINE.replace(b"mine", b"not mine"), False),
        (GET[:-2] + b"X-Long: " + b"x" * 2 * HEADERS_BYTES_MAX + b"\r\n" + MINE, False),
        (GET[:-2] + MINE[:-2], False),
        (b"GET\r\n" + MINE, False),
    ],
    ids=["handshake", "slow body", "broken body", "no id", "large head", "slow head", "no request"],
)
def test_what_is_answered_past_the_application_can_be_asked_about(house: House, data: bytes, echoed: bool) -> None:
    """The correlation id of the request, as far as that could be read; a new one otherwise."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(data)
        await asyncio.sleep(BODY_S + 0.1)
        assert wire.answers == 1
        assert (asked_by(wire) == "mine-1") if echoed else asked_by(wire).startswith("req-")

    after(house, scenario)


def test_the_id_is_the_one_that_the_application_gave(house: House) -> None:
    """What it has logged of a request that never ended is found by what the peer was told."""

    async def names(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["correlation_id"] = "req-ours"
        await reading(scope, receive, send)

    async def scenario() -> None:
        wire = Wire(house, names)
        wire.feed(POST)
        await asyncio.sleep(BODY_S + 0.1)
        assert asked_by(wire) == "req-ours"

    after(house, scenario)


def test_a_request_is_not_answered_with_the_id_of_the_one_before(house: House) -> None:
    """On a connection that is kept, the id belongs to its request."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(GET[:-2] + MINE)
        await asyncio.sleep(0.1)
        assert wire.said.startswith("HTTP/1.1 200")
        wire.taken.clear()
        wire.feed(b"GET\r\n\r\n")
        assert asked_by(wire).startswith("req-")

    after(house, scenario)


def test_a_ping_that_does_not_wait_for_the_answer_is_not_answered_before_it(house: House) -> None:
    """No pong stands before the 101, where a client would take it for HTTP."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(HANDSHAKE + b"\r\n" + Frame(Opcode.PING, b"?").serialize(mask=True))
        assert wire.said == ""
        await asyncio.sleep(1)
        assert wire.said.startswith("HTTP/1.1 101")
        wire.abort()

    after(house, scenario)


@pytest.mark.parametrize(
    ("size", "status"), [(HEADERS_BYTES_MAX - 1_000, 200), (HEADERS_BYTES_MAX + 10_000, 431), (1_000_000, 431)]
)
@pytest.mark.parametrize("piece", [1_000, 1 << 20])
def test_heads_over_64_kib_are_431(house: House, size: int, status: int, piece: int) -> None:
    """The bound holds whether a head comes in one read or in many."""

    async def scenario() -> None:
        wire = Wire(house)
        head = GET[:-2] + b"".join(b"X-%d: %b\r\n" % (number, b"x" * 990) for number in range(size // 1_000)) + b"\r\n"
        for start in range(0, len(head), piece):
            wire.feed(head[start : start + piece])
        await asyncio.sleep(0)
        if status == 431:
            assert wire.refused == (431, "HEADERS_TOO_LARGE")
        else:
            assert wire.said.startswith("HTTP/1.1 200")

    after(house, scenario)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n : b\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request_is_400(house: House, data: bytes) -> None:
    """Whatever h11 does not take is answered once, as a problem like every other, and the connection ends."""

    async def scenario() -> None:
        wire = Wire(house)
        wire.feed(data)
        assert wire.refused == (400, "MALFORMED_REQUEST")
        await asyncio.sleep(1)
        assert wire.answers == 1

    after(house, scenario)


def test_garbage_in_the_middle_of_an_answer_ends_it(house: House) -> None:
    """A broken chunk that comes while the answer goes out neither fails in our code nor adds a second answer."""

    async def talks_on(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def scenario() -> None:
        wire = Wire(house, talks_on)
        wire.feed(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.1)
        wire.feed(b"zz\r\n")
        assert wire.aborted
        assert wire.answers == 1

    after(house, scenario)


# How many.


def test_arrivals_beyond_twice_the_bound_are_cut(house: House) -> None:
    """Until then a request gets an answer; beyond, not even a descriptor is spent on one."""

    async def scenario() -> None:
        wires = [Wire(house) for _ in range(2 * PLAIN_MIN * 20)]
        limit = 2 * house.door.admission.plain_max
        assert [wire.aborted for wire in wires] == [number >= limit for number in range(len(wires))]
        await asyncio.sleep(0)
        assert house.door.admission.plain == min(limit, len(wires))

    house.door.admission.plain_max = PLAIN_MIN
    after(house, scenario)
