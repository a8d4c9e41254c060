"""Tests for gateway.connection: real handshakes and frames in, bytes out, on a transport without a network."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from websockets.datastructures import Headers
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.http11 import Request

from engine.contract.timers import tick_line
from engine.domain.instants import EpochMs
from engine.store.protocol import StoreUnavailableError
from gateway.closing import CloseCode
from gateway.connection import (
    BAD_MESSAGES_MAX,
    CLIENT_FRAME_BYTES_MAX,
    CLIENT_FRAMES_PER_SECOND_MAX,
    CLOSE_WITHIN_S,
    MESSAGE_EARNED_NS,
    MESSAGES_PER_SECOND_MAX,
)
from gateway.problems import RETRY_AFTER_MAX_S
from gateway.room import Room, text_frame
from tests.fakes.clock import BORN_MS
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, House, record
from tests.gateway.peers import PATH, Peer

SYNC = {"type": "sync", "t0": 1}
MASK = b"\x01\x02\x03\x04"


async def opened(house: House, path: str = PATH, **options: Any) -> Peer:
    """A peer whose socket is open and who has read the snapshot."""
    if AUCTION not in house.memory.shards[0].timers:
        house.put(record(version=1))
    peer = Peer(house.door, path, **options).knock()
    await settled(house)
    assert peer.told()[0]["type"] == "timer.snapshot"
    return peer


async def settled(house: House) -> None:
    """Everything the door does beside the loop is done, and did not fail."""
    await asyncio.gather(*house.door._tasks)
    await asyncio.sleep(0)


async def turns(count: int = 3) -> None:
    """Let callbacks that are ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def room_of(house: House) -> Room:
    """The room everyone is in."""
    room = house.hub.known(AUCTION)
    assert room is not None
    return room


def assert_gone(house: House, *peers: Peer) -> None:
    """Nothing refers to these connections any more, and nothing they kept is left."""
    room = house.hub.known(AUCTION)
    for peer in peers:
        assert peer.transport.is_closing()
        assert peer.connection not in house.door._connections
        assert peer.uvicorn_connections == set()
        assert peer.connection.room is None
        assert room is None or not {peer.connection} & (room.writable | room.lagging)
        assert (peer.connection._outbox, peer.connection._tick, peer.connection.outbox_bytes) == ([], None, 0)
        assert peer.connection._closer is None or peer.connection._closer.cancelled() or peer.transport.aborted
    assert house.door._tasks == set()
    if not house.door._connections:
        assert dict(house.door._per_address) == {}
        assert house.sample("auctions_gateway_connections") == 0


def tick(house: House, version: int = 1) -> bytes:
    """A tick of now reaches the gateway; its frame."""
    line = tick_line(record(version=version), house.authority.now_ms)
    house.hub.on_ticks(0, line)
    return line.split(b" ", 2)[2]


# Opening.


@pytest.mark.requirement("R7")
async def test_an_accepted_handshake_is_answered_101_and_the_snapshot_comes_first() -> None:
    """The upgrade, then the snapshot, then what happens: nothing comes before it."""
    house = House()
    house.put(record(version=1))
    peer = Peer(house.door).knock()
    assert bytes(peer.transport.taken) == b"", "the auction must be read first"
    await settled(house)
    assert peer.status == 101
    (frame,) = [orjson.loads(frame.data) for frame in peer.frames]
    assert (frame["type"], frame["recovered"], frame["timer"]["version"]) == ("timer.snapshot", None, 1)
    assert room_of(house).writable == {peer.connection}
    assert house.sample("auctions_gateway_handshakes_total", outcome="accepted") == 1
    assert house.sample("auctions_gateway_connections") == 1
    house.announce("timer.extended", record(version=2))
    await house.read_lane()
    assert [frame["type"] for frame in peer.told()] == ["timer.extended"]


@pytest.mark.requirement("R16")
async def test_an_auction_in_memory_is_answered_at_once_even_without_a_store() -> None:
    """A reconnect needs no store when the room is known: not even a turn of the loop."""
    house = House()
    await opened(house)
    house.store.failing["view"] = StoreUnavailableError("away")
    peer = Peer(house.door).knock()
    assert peer.status == 101
    assert house.store.calls["view"] == 1


async def test_compression_is_declined() -> None:
    """A client that offers permessage-deflate gets an uncompressed socket: one frame serves everyone."""
    house = House()
    house.put(record())
    peer = Peer(house.door)
    peer.client.available_extensions = [ClientPerMessageDeflateFactory()]
    peer.knock()
    await settled(house)
    assert peer.response is None
    assert peer.status == 101
    assert peer.response is not None
    assert "Sec-WebSocket-Extensions" not in peer.response.headers


@pytest.mark.requirement("B4")
async def test_since_brings_what_was_missed() -> None:
    """The cursor in the query is honoured, the last one if there are several; an empty one leads nowhere."""
    house = House()
    await opened(house)
    for version in (2, 3):
        house.announce("timer.extended", record(version=version))
    await house.read_lane()
    peer = Peer(house.door, f"{PATH}?since=garbage&since=0.1-0").knock()
    snapshot, missed = peer.told()
    assert (snapshot["recovered"], missed["timer"]["version"]) == (True, 3)
    for since in ("?since=", "?since", "?since=0.1-0&since="):
        (alone,) = Peer(house.door, PATH + since).knock().told()
        assert alone["recovered"] is False


async def test_a_handshake_in_single_bytes_is_a_handshake() -> None:
    """However the bytes are cut, the answer is the same."""
    house = House()
    house.put(record())
    peer = Peer(house.door).knock(piece=1)
    await settled(house)
    assert peer.status == 101
    assert len(peer.frames) == 1


def _with(name: str, *values: str) -> Callable[[Request], None]:
    def edit(request: Request) -> None:
        headers = Headers((key, value) for key, value in request.headers.raw_items() if key.lower() != name.lower())
        for value in values:
            headers[name] = value
        request.headers = headers

    return edit


def _as(**changes: str) -> Callable[[Request], None]:
    def edit(request: Request) -> None:
        for name, value in changes.items():
            setattr(request, name, value)

    return edit


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (_with("Sec-WebSocket-Version", "8"), 400),
        (_with("Sec-WebSocket-Version"), 400),
        (_with("Sec-WebSocket-Version", "13", "13"), 400),
        (_with("Sec-WebSocket-Key"), 400),
        (_with("Sec-WebSocket-Key", "c2hvcnQ="), 400),
        (_with("Sec-WebSocket-Key", "?"), 400),
        (_with("Upgrade", "h2c"), 426),
        (_with("Connection", "keep-alive"), 426),
        (_as(method="POST"), 405),
        (_as(protocol="HTTP/1.0"), 505),
    ],
)
async def test_a_malformed_handshake_is_answered_and_closed(
    edit: Callable[[Request], None], status: int, known: bool
) -> None:
    """What RFC 6455 does not allow gets its status, no room and no lasting connection, known auction or not."""
    house = House()
    house.put(record())
    if known:
        await house.hub.room(AUCTION)
    peer = Peer(house.door).knock(edit)
    await settled(house)
    assert peer.status == status
    assert peer.frames == []
    await turns()
    assert_gone(house, peer)
    assert house.sample("auctions_gateway_handshakes_total", outcome="malformed") == 1


@pytest.mark.parametrize(
    "edit",
    [
        _with("Content-Length", "7"),
        _with("Transfer-Encoding", "chunked"),
        _with("X-Many", *["x"] * 200),
        _with("X-Long", "x" * 9_000),
        _as(protocol="HTTP/2.0"),
    ],
)
async def test_a_request_that_cannot_be_read_is_closed(edit: Callable[[Request], None]) -> None:
    """What the library does not take for a handshake at all leaves nothing behind."""
    house = House()
    house.put(record())
    peer = Peer(house.door).knock(edit)
    await turns()
    assert not bytes(peer.transport.taken).startswith(b"HTTP/1.1 101")
    assert_gone(house, peer)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/auctions",
        "/auctions/a-1",
        "/auctions/a-1/timer",
        "/auctions//updates",
        "/auctions/a-1/updates/",
        "/x/auctions/a-1/updates",
        "/bids/a-1/updates",
        "/auctions/a%20b/updates",
        "/auctions/%2e%2e%2f/updates",
        f"/auctions/{'x' * 129}/updates",
        "//[",
        "//[::1/auctions/a-1/updates",
        "//a-1/updates?since=0.0-0",
    ],
)
async def test_a_path_without_a_socket_is_404(path: str) -> None:
    """Any other path, and any id that cannot be one, is a problem document and no read of the store."""
    house = House()
    peer = Peer(house.door).knock(_as(path=path))
    await turns()
    assert peer.status == 404
    assert peer.problem["error_code"] == "RESOURCE_NOT_FOUND"
    assert_gone(house, peer)
    assert house.store.calls["view"] == 0


async def test_an_unknown_auction_is_404() -> None:
    """The answer is the same problem as over HTTP, with a correlation id to ask about."""
    house = House()
    peer = Peer(house.door).knock()
    await settled(house)
    assert peer.status == 404
    assert peer.response is not None
    assert peer.response.headers["Content-Type"] == "application/problem+json"
    assert peer.response.headers["Connection"] == "close"
    assert peer.problem["error_code"] == "RESOURCE_NOT_FOUND"
    assert peer.problem["correlation_id"].startswith("req-")
    await turns()
    assert_gone(house, peer)
    assert house.sample("auctions_gateway_handshakes_total", outcome="resource_not_found") == 1


async def test_an_escaped_id_is_the_id() -> None:
    """`%2D` in the path is a hyphen."""
    house = House()
    house.put(record())
    peer = Peer(house.door, "/auctions/a%2D1/updates").knock()
    await settled(house)
    assert peer.status == 101


@pytest.mark.requirement("R16")
async def test_a_store_that_is_away_is_503_and_says_when_to_come_back() -> None:
    """An auction that is not in memory cannot be shown now; the client is told to try again."""
    house = House()
    house.store.failing["view"] = StoreUnavailableError("away")
    peer = Peer(house.door).knock()
    await settled(house)
    assert (peer.status, peer.problem["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")
    assert peer.response is not None
    assert 1 <= int(peer.response.headers["Retry-After"]) <= RETRY_AFTER_MAX_S
    await turns()
    assert_gone(house, peer)


async def test_an_auction_that_cannot_be_read_is_answered_too() -> None:
    """A timer that is corrupt in the store is a fault of ours, and no socket that hangs for ever."""
    house = House()
    house.put(record())
    house.memory.shards[0].timers[AUCTION]["version"] = "nonsense"
    peer = Peer(house.door).knock()
    await settled(house)
    assert (peer.status, peer.problem["error_code"]) == (500, "INTERNAL_ERROR")
    await turns()
    assert_gone(house, peer)


REFUSED: dict[str, tuple[str, int, Callable[[House], None]]] = {
    "no socket there": ("/nowhere", 404, lambda _house: None),
    "no such auction": ("/auctions/nobody/updates", 404, lambda _house: None),
    "draining": (PATH, 503, lambda house: setattr(house.door, "draining", True)),
    "store away": (PATH, 503, lambda house: house.store.failing.update(view=StoreUnavailableError("away"))),
    "unreadable": (PATH, 500, lambda house: house.memory.shards[0].timers[AUCTION].update(version="nonsense")),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize(
    ("given", "echoed"),
    [((), None), (("mine-1",), "mine-1"), (("first", "last"), "last"), (("two words",), None), (("x" * 129,), None)],
)
async def test_a_refusal_can_be_asked_about(case: str, given: tuple[str, ...], echoed: str | None) -> None:
    """The correlation id is the one that was sent, or a new one where none can be echoed; the body says the same."""
    path, status, prepare = REFUSED[case]
    house = House()
    house.put(record())
    prepare(house)
    peer = Peer(house.door, path).knock(_with("X-Correlation-Id", *given))
    await settled(house)
    assert peer.status == status
    assert peer.response is not None
    said = peer.response.headers["X-Correlation-Id"]
    assert peer.problem["correlation_id"] == said
    assert said == echoed or (echoed is None and said.startswith("req-"))


@pytest.mark.parametrize(("given", "echoed"), [((), None), (("mine-1",), "mine-1"), (("two words",), None)])
async def test_a_socket_can_be_asked_about(given: tuple[str, ...], echoed: str | None) -> None:
    """An accepted handshake is answered with its correlation id as every other request is."""
    house = House()
    house.put(record())
    peer = Peer(house.door).knock(_with("X-Correlation-Id", *given))
    await settled(house)
    assert (peer.status, peer.response is not None) == (101, True)
    said = peer.response.headers["X-Correlation-Id"]
    assert said == echoed or (echoed is None and said.startswith("req-"))


async def test_a_malformed_handshake_can_be_asked_about_too() -> None:
    """The library's own refusals have the id as well."""
    house = House()
    house.put(record())

    def edit(request: Request) -> None:
        _with("Sec-WebSocket-Key", "?")(request)
        request.headers["X-Correlation-Id"] = "mine-1"

    peer = Peer(house.door).knock(edit)
    await settled(house)
    assert peer.status == 400
    assert peer.response is not None
    assert peer.response.headers["X-Correlation-Id"] == "mine-1"


# Going away before the handshake is answered.


@pytest.mark.parametrize("found", ["found", "unknown", "away", "corrupt"])
@pytest.mark.parametrize("how", ["lost", "eof", "closed", "garbage"])
async def test_one_who_goes_while_the_auction_is_read_leaves_nothing(how: str, found: str) -> None:
    """However the peer disappears and whatever is found then, no connection is left and nothing fails."""
    house = House()
    if found != "unknown":
        house.put(record())
    if found == "corrupt":
        house.memory.shards[0].timers[AUCTION]["version"] = "nonsense"
    house.store.after_view.clear()
    house.store.before_view.clear()
    peer = Peer(house.door).knock()
    await turns()
    if how == "lost":
        peer.transport.abort()
    elif how == "eof":
        peer.connection.eof_received()
    elif how == "closed":
        peer.feed(Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True))
    else:
        peer.feed(b"\xff\xff\xff\xff")
    await turns()
    if found == "away":
        house.store.inner = FailingViews()
    house.store.before_view.set()
    house.store.after_view.set()
    await settled(house)
    await turns()
    assert_gone(house, peer)
    assert b"101" not in peer.transport.taken


class FailingViews:
    """A store that goes away while a view is asked for."""

    async def view(self, shard: int, auction_id: str) -> Any:
        """No answer."""
        raise StoreUnavailableError("away")


async def test_messages_before_the_answer_are_no_messages() -> None:
    """Frames of one who does not wait for the 101 are not answered; too many of them end it."""
    house = House()
    house.put(record())
    house.store.before_view.clear()
    peer = Peer(house.door).knock()
    frame = Frame(Opcode.TEXT, orjson.dumps(SYNC)).serialize(mask=True)
    for _ in range(MESSAGES_PER_SECOND_MAX):
        peer.feed(frame)
    assert bytes(peer.transport.taken) == b""
    assert not peer.transport.is_closing()
    peer.feed(frame)
    await turns()
    house.store.before_view.set()
    await settled(house)
    assert_gone(house, peer)


# Client messages.


@pytest.mark.requirement("R8", "B5")
async def test_sync_is_answered_with_both_instants() -> None:
    """`t0` comes back as it was sent, `t1` and `t2` are the auction clock; what the client measured is a histogram."""
    house = House()
    peer = await opened(house)
    house.line.advance(250)
    peer.say(SYNC | {"t0": 12.5, "drift_ms": -40, "rtt_ms": 3.5, "unknown": [1]})
    (answer,) = peer.told()
    now = BORN_MS + 250
    assert answer == {
        "type": "sync", "t0": 12.5, "t1": now, "t2": now, "auction_id": AUCTION, "server_time": now,
        "trace_id": f"trace-{AUCTION}",
    }  # fmt: skip
    assert house.sample("auctions_timer_drift_ms_sum", source="client") == 40
    peer.say(SYNC | {"drift_ms": None, "rtt_ms": None})
    assert peer.told()[0]["type"] == "sync"
    assert house.sample("auctions_timer_drift_ms_count", source="client") == 1


@pytest.mark.requirement("R8")
async def test_a_message_in_single_bytes_or_in_fragments_is_one_message() -> None:
    """Neither the cuts of the network nor those of the client's frames matter; a ping may stand between fragments."""
    house = House()
    peer = await opened(house)
    peer.say(SYNC, piece=1)
    assert peer.told()[0]["type"] == "sync"
    text = orjson.dumps(SYNC)
    peer.client.send_text(text[:5], fin=False)
    peer.flush(piece=1)
    assert peer.read() == []
    peer.client.send_ping(b"hm?")
    peer.client.send_continuation(b"", fin=False)
    peer.client.send_continuation(text[5:9], fin=False)
    peer.client.send_continuation(text[9:], fin=True)
    peer.flush()
    answer, pong = sorted(peer.read(), key=lambda frame: frame.opcode)
    assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"hm?")
    assert orjson.loads(answer.data)["type"] == "sync"


@pytest.mark.parametrize(
    "message",
    [
        b"{",
        b"",
        b"null",
        b"[]",
        b'"sync"',
        b"7",
        b"{}",
        b'{"type":"bid"}',
        b'{"type":"sync"}',
        b'{"type":"sync","t0":"1"}',
        b'{"type":"sync","t0":true}',
        b'{"type":"sync","t0":null}',
        b'{"type":"sync","t0":1,"drift_ms":"1"}',
        b'{"type":"sync","t0":1,"rtt_ms":false}',
        b'{"type":"sync","t0":1,"rtt_ms":-0.5}',
        b'{"type":"sync","t0":NaN}',
    ],
)
async def test_a_message_that_is_none_is_explained(message: bytes) -> None:
    """The answer is an `error` with a reason; the socket stays open and well."""
    house = House()
    peer = await opened(house)
    peer.say(message)
    (answer,) = peer.told()
    assert (answer["type"], answer["error_code"]) == ("error", "BAD_MESSAGE")
    assert answer["detail"]
    peer.say(SYNC)
    assert peer.told()[0]["type"] == "sync"
    assert peer.farewell is None


async def test_a_binary_message_is_explained_whole_or_in_fragments() -> None:
    """The protocol is JSON text: also what would be valid JSON is refused when it comes as binary."""
    house = House()
    peer = await opened(house)
    peer.client.send_binary(orjson.dumps(SYNC))
    peer.client.send_binary(b"{", fin=False)
    peer.client.send_continuation(b"}", fin=True)
    peer.flush()
    answers = peer.told()
    assert [(answer["type"], "binary" in answer["detail"]) for answer in answers] == [("error", True)] * 2


async def test_the_third_bad_message_closes() -> None:
    """Two are explained, the third is explained and is the last; what comes behind it is not read."""
    house = House()
    peer = await opened(house)
    peer.say(*[b"{"] * BAD_MESSAGES_MAX, SYNC)
    assert [frame["type"] for frame in peer.told()] == ["error"] * BAD_MESSAGES_MAX
    assert peer.farewell == (4400, "the message is not JSON")
    peer.flush()
    await turns()
    assert_gone(house, peer)
    assert house.sample("auctions_gateway_disconnects_total", code="4400") == 1


async def test_bad_messages_count_over_the_whole_life_of_a_socket() -> None:
    """Good ones between them do not wash them off."""
    house = House()
    peer = await opened(house)
    for number in range(BAD_MESSAGES_MAX):
        house.line.advance(60_000)
        peer.say(SYNC, b"{")
        assert (peer.farewell is None) is (number < BAD_MESSAGES_MAX - 1)


EARNED_MS = MESSAGE_EARNED_NS / 1e6


@pytest.mark.requirement("R8")
@pytest.mark.parametrize("pause_ms", [1_000, 3_600_000])
async def test_five_messages_at_once_are_answered_and_the_sixth_closes(pause_ms: int) -> None:
    """A second later there are five again, and after an hour no more than that."""
    house = House()
    peer = await opened(house)
    for _ in range(3):
        peer.say(*[SYNC] * MESSAGES_PER_SECOND_MAX)
        assert len(peer.told()) == MESSAGES_PER_SECOND_MAX
        house.line.advance(pause_ms)
    peer.say(*[SYNC] * (MESSAGES_PER_SECOND_MAX + 1))
    assert len(peer.told()) == MESSAGES_PER_SECOND_MAX
    farewell = peer.farewell
    assert farewell is not None
    assert (farewell[0], "5 messages a second" in farewell[1]) == (4429, True)
    assert house.sample("auctions_gateway_disconnects_total", code="4429") == 1
    peer.flush()
    await turns()
    assert_gone(house, peer)


@pytest.mark.requirement("R8")
async def test_what_is_earned_is_one_message_at_a_time() -> None:
    """Behind a burst of five a message passes as soon as it is earned, and not a moment sooner."""
    house = House()
    peer = await opened(house)
    peer.say(*[SYNC] * MESSAGES_PER_SECOND_MAX)
    for _ in range(20):
        house.line.advance(EARNED_MS)
        peer.say(SYNC)
    assert len(peer.told()) == MESSAGES_PER_SECOND_MAX + 20
    house.line.advance(EARNED_MS - 1)
    peer.say(SYNC)
    assert peer.told() == []
    assert peer.farewell is not None
    assert peer.farewell[0] == 4429


@pytest.mark.requirement("R8")
@pytest.mark.parametrize("every_ms", [200, 191], ids=["in step", "a fast clock"])
@pytest.mark.parametrize("late_ms_max", [0, 20, 700])
async def test_five_a_second_are_never_too_many(every_ms: int, late_ms_max: int) -> None:
    """Sent evenly for ten minutes, held up by the network now and then: bunched and late, in order, and all answered."""
    chance = random.Random(late_ms_max)
    house = House()
    peer = await opened(house)
    began_ns, arrives_ms = house.line.now_ns, 0.0
    for number in range(3_000):
        arrives_ms = max(arrives_ms, number * every_ms + chance.uniform(0, late_ms_max))
        house.line.advance_to(began_ns + round(arrives_ms * 1e6))
        peer.say(SYNC)
    assert len(peer.told()) == 3_000
    assert peer.farewell is None


async def test_a_flood_in_one_piece_is_cut_at_the_sixth() -> None:
    """Hundreds of messages in a single read cost five answers."""
    house = House()
    peer = await opened(house)
    peer.say(*[SYNC] * 300)
    assert len(peer.told()) == MESSAGES_PER_SECOND_MAX
    assert peer.farewell is not None
    assert peer.farewell[0] == 4429
    await turns()
    assert_gone(house, peer)


@pytest.mark.parametrize("fragments", [1, 2, 5])
async def test_a_message_over_four_kibibytes_is_too_big(fragments: int) -> None:
    """4 KiB pass, one byte more is 1009, whether in one frame or in several."""
    house = House()
    fits, bursts = await opened(house), await opened(house)
    fits.say(b" " * CLIENT_FRAME_BYTES_MAX)
    assert fits.told()[0]["error_code"] == "BAD_MESSAGE"
    size = CLIENT_FRAME_BYTES_MAX // fragments + 1
    bursts.client.send_text(b" " * size, fin=fragments == 1)
    for number in range(1, fragments):
        bursts.client.send_continuation(b" " * size, fin=number == fragments - 1)
    bursts.flush()
    assert bursts.told() == []
    assert bursts.farewell is not None
    assert bursts.farewell[0] == 1009
    await turns()
    assert_gone(house, bursts)
    assert fits.farewell is None


@pytest.mark.parametrize(
    "data",
    [
        text_frame(b"{}"),  # not masked
        b"\x83\x80" + MASK,  # an opcode that does not exist
        b"\xc1\x80" + MASK,  # a reserved bit
        b"\x80\x80" + MASK,  # a continuation of nothing
        b"\x89\xfe\x00\x80" + MASK + b"x" * 128,  # a ping that is too long
    ],
)
async def test_what_is_no_websocket_is_a_protocol_error(data: bytes) -> None:
    """Bytes that RFC 6455 forbids end the socket with 1002."""
    house = House()
    peer = await opened(house)
    peer.feed(data)
    assert peer.farewell is not None
    assert peer.farewell[0] == 1002
    await turns()
    assert_gone(house, peer)


# Closing.


async def test_a_client_that_says_farewell_is_answered() -> None:
    """Its close is echoed, and then the connection is gone."""
    house = House()
    peer = await opened(house)
    peer.client.send_close(1000, "enough")
    peer.flush()
    assert peer.farewell == (1000, "enough")
    await turns()
    assert_gone(house, peer)


@pytest.mark.parametrize("how", ["eof", "lost"])
async def test_a_client_that_just_goes_leaves_nothing(how: str) -> None:
    """With or without an end of stream, with or without something kept for it."""
    house = House()
    reads, lags = await opened(house), await opened(house)
    lags.transport.stuck = True
    lags.connection.pause_writing()
    house.announce("timer.extended", record(version=2))
    await house.read_lane()
    tick(house, 2)
    assert lags.connection.outbox_bytes > 0
    for peer in (reads, lags):
        if how == "eof":
            peer.connection.eof_received()
            peer.transport.release()
        else:
            peer.transport.abort()
    await turns()
    assert_gone(house, reads, lags)
    assert not room_of(house).is_watched


def test_a_client_that_does_not_answer_a_farewell_is_cut_off() -> None:
    """After five seconds the connection is aborted; one that answers in time is closed at once."""
    house = House()

    async def scenario() -> None:
        silent, polite = await opened(house), await opened(house)
        for peer in (silent, polite):
            peer.connection.close(CloseCode.FEED_LOST, "gone")
            assert peer.farewell == (4102, "gone")
        polite.flush()
        await turns()
        assert_gone(house, polite)
        assert not polite.transport.aborted
        await asyncio.sleep(CLOSE_WITHIN_S - 0.01)
        assert not silent.transport.is_closing()
        assert silent.connection in house.door._connections
        await asyncio.sleep(0.02)
        assert silent.transport.aborted
        assert_gone(house, silent)

    run(house.line, scenario)


async def test_a_second_farewell_closes_at_once() -> None:
    """One that is asked to leave twice is not waited for any longer, and counted once."""
    house = House()
    peer = await opened(house)
    peer.connection.close(CloseCode.SLOW_CONSUMER, "first")
    peer.connection.close(CloseCode.BAD_MESSAGES, "second")
    assert peer.farewell == (4101, "first")
    await turns()
    assert_gone(house, peer)
    assert house.sample("auctions_gateway_disconnects_total", code="4400") == 0


@pytest.mark.parametrize("reason", ["x" * 500, "ü" * 500, "€" * 500])
async def test_a_long_reason_is_cut_between_characters(reason: str) -> None:
    """A close frame has room for 123 bytes of it, and half a character is none."""
    house = House()
    peer = await opened(house)
    peer.connection.close(CloseCode.BAD_MESSAGES, reason)
    assert peer.farewell is not None
    code, read = peer.farewell
    assert code == 4400
    assert reason.startswith(read)
    assert 120 < len(read.encode()) <= 123


async def test_nothing_is_sent_behind_a_farewell() -> None:
    """After the close frame there is neither an event nor a tick, although the peer has not answered yet."""
    house = House()
    peer = await opened(house)
    peer.connection.close(CloseCode.AUCTION_OVER, "over")
    sent = len(peer.transport.taken)
    house.announce("timer.extended", record(version=2))
    await house.read_lane()
    tick(house, 2)
    peer.connection.pause_writing()
    peer.connection.resume_writing()
    assert len(peer.transport.taken) == sent


async def test_a_drain_says_when_to_come_back() -> None:
    """uvicorn's shutdown is 1001 with the pause and the jitter as JSON; while loading and while closing it just closes."""
    house = House()
    peer = await opened(house)
    closing = await opened(house)
    closing.connection.close(CloseCode.AUCTION_OVER, "over")
    house.store.before_view.clear()
    loading = Peer(house.door, "/auctions/a-2/updates").knock()
    for each in (peer, closing, loading):
        each.connection.shutdown()
    assert peer.farewell is not None
    code, reason = peer.farewell
    assert code == 1001
    assert orjson.loads(reason) == {"retry_after_ms": 500, "jitter_ms": 3_000}
    assert closing.farewell == (4000, "over")
    peer.flush()
    house.store.before_view.set()
    await settled(house)
    await turns()
    assert bytes(loading.transport.taken) == b""
    assert_gone(house, peer, closing, loading)


# Lagging.


def stall(peer: Peer) -> None:
    """The peer stops to read, and its transport has all it takes."""
    peer.transport.stuck = True
    filler = bytes(peer.transport.high + 1)
    peer.transport.buffer += filler
    peer.transport.paused = True
    peer.connection.pause_writing()


def unstall(peer: Peer) -> None:
    """The peer reads again; the filler is forgotten."""
    del peer.transport.buffer[: peer.transport.high + 1]
    peer.transport.release()


@pytest.mark.requirement("B3")
async def test_events_wait_in_order_and_ticks_conflate_to_the_newest() -> None:
    """While a transport is full nothing is written to it; then come all events, in order, and the one newest tick."""
    house = House()
    slow, quick = await opened(house), await opened(house)
    stall(slow)
    assert room_of(house).lagging == {slow.connection}
    for version in (2, 3, 4):
        house.announce("timer.extended", record(version=version))
        await house.read_lane()
        for _ in range(2):
            house.line.advance(1)
            newest = tick(house, version)
    assert len(slow.transport.buffer) == slow.transport.high + 1
    assert [frame["type"] for frame in quick.told()] == ["timer.extended", "timer.tick", "timer.tick"] * 3
    assert house.sample("auctions_gateway_conflated_ticks_total") == 5
    unstall(slow)
    *events, last = slow.read()
    assert [orjson.loads(frame.data)["timer"]["version"] for frame in events] == [2, 3, 4]
    assert bytes(last.data) == newest
    assert room_of(house).writable == {slow.connection, quick.connection}
    assert slow.connection.outbox_bytes == 0
    tick(house, 4)
    assert [frame["type"] for frame in slow.told()] == ["timer.tick"]


@pytest.mark.requirement("B3")
async def test_a_tick_that_an_event_has_overtaken_is_not_told_behind_it() -> None:
    """What a lagging socket reads goes forward in time: a kept tick that is older than a kept event is worth nothing."""
    house = House()
    slow = await opened(house)
    stall(slow)
    tick(house, 1)
    house.line.advance(1)
    house.announce("timer.extended", record(version=2))
    await house.read_lane()
    unstall(slow)
    assert [frame["type"] for frame in slow.told()] == ["timer.extended"]
    assert house.sample("auctions_gateway_conflated_ticks_total") == 1


@pytest.mark.requirement("B3")
async def test_a_lagging_socket_with_nothing_to_say_resumes_silently() -> None:
    """Resume without anything kept writes nothing and is writable again; a second resume changes nothing."""
    house = House()
    peer = await opened(house)
    stall(peer)
    unstall(peer)
    peer.connection.resume_writing()
    assert peer.read() == []
    assert room_of(house).writable == {peer.connection}


@pytest.mark.requirement("B3")
@pytest.mark.parametrize("seed", range(20))
async def test_through_any_stutter_every_event_comes_once_in_order_and_the_last_tick_is_the_newest(seed: int) -> None:
    """Transports that fill and drain at any moment, also in the middle of a write, lose, double and reorder nothing."""
    dice = random.Random(seed)
    house = House()
    peers = [await opened(house) for _ in range(4)]
    for peer in peers:
        peer.transport.high = dice.choice([100, 1_000, 5_000])
    version, newest = 1, b""
    for _ in range(300):
        draw = dice.random()
        if draw < 0.3:
            version += 1
            house.announce("timer.extended", record(version=version))
            await house.read_lane()
        elif draw < 0.7:
            house.line.advance(1)
            newest = tick(house, version)
        elif draw < 0.85:
            dice.choice(peers).transport.stuck = True
        else:
            dice.choice(peers).transport.release()
        if dice.random() < 0.1:
            await turns(1)
    house.line.advance(1)
    newest = tick(house, version)
    while house.hub.fanout.is_sending(room_of(house)):
        await turns()
    for peer in peers:
        while peer.transport.buffer or peer.transport.stuck:
            peer.transport.release()
        frames = peer.told()
        assert [frame["timer"]["version"] for frame in frames if "timer" in frame] == list(range(2, version + 1))
        ticks = [frame["server_time"] for frame in frames if frame["type"] == "timer.tick"]
        assert ticks == sorted(set(ticks))
        assert bytes(peer.frames[-1].data) == newest
    assert len(room_of(house).writable) == 4


@pytest.mark.requirement("B3")
async def test_a_socket_that_keeps_too_much_is_closed_with_4101() -> None:
    """At the bound it is still kept, beyond it the socket goes, and all that was kept with it."""
    house = House(outbox_bytes_max=4_096)
    slow, quick = await opened(house), await opened(house)
    stall(slow)
    version, most = 1, 0
    while slow.connection.room is not None:
        version += 1
        house.announce("timer.extended", record(version=version))
        await house.read_lane()
        most = max(most, slow.connection.outbox_bytes)
    assert 3_000 < most <= 4_096
    assert slow.connection.outbox_bytes == 0
    assert slow.connection._outbox == []
    assert room_of(house).lagging == set()
    assert len(slow.transport.buffer) < slow.transport.high + 200
    unstall(slow)
    assert slow.farewell is not None
    assert slow.farewell[0] == 4101
    assert slow.told() == []
    assert len(quick.told()) == version - 1
    assert house.sample("auctions_gateway_disconnects_total", code="4101") == 1


@pytest.mark.requirement("B3")
def test_a_socket_that_never_reads_again_is_cut_off() -> None:
    """Neither its close frame nor anything else reaches it: after the farewell's five seconds it is aborted."""
    house = House(outbox_bytes_max=4_096)

    async def scenario() -> None:
        peer = await opened(house)
        stall(peer)
        for _ in range(20):
            house.announce("timer.extended", record(version=2))
        await house.read_lane()
        assert not peer.transport.is_closing()
        await asyncio.sleep(CLOSE_WITHIN_S + 0.01)
        assert peer.transport.aborted
        await turns()
        assert_gone(house, peer)

    run(house.line, scenario)


async def test_what_is_answered_to_a_lagging_socket_waits_with_the_events() -> None:
    """The answer to a `sync` that was already on its way keeps its place in the order, and counts to the bound."""
    house = House()
    peer = await opened(house)
    peer.transport.stuck = True
    peer.connection.pause_writing()
    peer.connection.data_received(Frame(Opcode.TEXT, orjson.dumps(SYNC)).serialize(mask=True))
    house.announce("timer.extended", record(version=2))
    await house.read_lane()
    assert peer.connection.outbox_bytes > 0
    peer.transport.paused = True
    peer.transport.release()
    assert [frame["type"] for frame in peer.told()] == ["sync", "timer.extended"]


async def test_a_complaint_that_fills_the_outbox_closes_once() -> None:
    """The third bad message of one whose outbox overflows with the answer is one farewell, not two."""
    house = House(outbox_bytes_max=4_096)
    peer = await opened(house)
    peer.connection._bad_messages = BAD_MESSAGES_MAX - 1
    peer.transport.stuck = True
    peer.connection.pause_writing()
    peer.connection.keep_event(b"x" * 4_090)
    peer.connection.data_received(Frame(Opcode.TEXT, b"{").serialize(mask=True))
    peer.transport.release()
    assert peer.farewell is not None
    assert peer.farewell[0] == 4101
    await turns()
    assert_gone(house, peer)


@pytest.mark.requirement("B3")
async def test_one_who_does_not_read_is_not_read_either() -> None:
    """A peer that sends pings and takes no pongs makes us keep no more than its transport's mark and one read."""
    house = House()
    peer = await opened(house)
    peer.transport.stuck = True
    pings = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * CLIENT_FRAMES_PER_SECOND_MAX
    for _ in range(100):
        house.line.advance(1_000)
        peer.feed(pings)
    assert len(peer.transport.buffer) < peer.transport.high + len(pings)
    peer.transport.release()
    assert peer.transport.reading
    house.line.advance(1_000)
    peer.say(SYNC)
    assert peer.told()[-1]["type"] == "sync"


async def test_a_transport_that_pauses_outside_of_a_room_changes_nothing() -> None:
    """Before the handshake is answered, and after the farewell, there is no lane to change."""
    house = House()
    house.put(record())
    house.store.before_view.clear()
    peer = Peer(house.door).knock()
    peer.connection.pause_writing()
    peer.connection.resume_writing()
    house.store.before_view.set()
    await settled(house)
    assert room_of(house).writable == {peer.connection}
    peer.connection.close(CloseCode.AUCTION_OVER, "over")
    peer.connection.pause_writing()
    peer.connection.resume_writing()
    assert not room_of(house).is_watched


@pytest.mark.requirement("B4")
async def test_a_greeting_that_fills_the_transport_is_followed_by_the_lane_in_order() -> None:
    """One who missed more than a transport takes at once lags from the start, and still gets everything once."""
    house = House()
    await opened(house)
    for version in range(2, 200):
        house.announce("timer.extended", record(version=version))
    await house.read_lane()
    peer = Peer(house.door, f"{PATH}?since=0.0-0")
    peer.transport.stuck = True
    peer.knock()
    assert peer.connection in room_of(house).lagging
    house.announce("timer.extended", record(version=200))
    await house.read_lane()
    peer.transport.release()
    assert [frame["timer"]["version"] for frame in peer.told()] == [199, *range(2, 201)]


async def test_a_peer_without_an_address_is_served() -> None:
    """Behind a Unix socket there is no address; all such peers count as one."""
    house = House()
    peer = await opened(house, address="")
    assert peer.connection.address == ""
    assert house.door._per_address == {"": 1}


async def test_an_end_of_the_wire_is_never_written_to() -> None:
    """What the protocol still wants to say to a transport that is closing is dropped."""
    house = House()
    peer = await opened(house)
    peer.transport.close()
    peer.connection.ping()
    await turns()
    assert_gone(house, peer)


async def test_an_update_as_old_as_the_clock_is_no_negative_delay() -> None:
    """A commit stamped ahead of this gateway's clock counts as delivered at once."""
    house = House()
    peer = await opened(house)
    house.append(AUCTION, "bid.accepted", orjson.dumps({"type": "bid.accepted", "server_time": EpochMs(BORN_MS + 90)}))
    await house.read_lane()
    assert peer.told()[0]["server_time"] == BORN_MS
    assert house.sample("auctions_gateway_delivery_ms_sum", lane="event") == 0
