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
from gateway.connection import BAD_MESSAGES_MAX, CLIENT_FRAME_BYTES_MAX, CLIENT_FRAMES_PER_SECOND_MAX, CLOSE_WITHIN_S
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
    """The cursor in the query is honoured, the last one if there are several."""
    house = House()
    await opened(house)
    for version in (2, 3):
        house.announce("timer.extended", record(version=version))
    await house.read_lane()
    peer = Peer(house.door, f"{PATH}?since=garbage&since=0.1-0").knock()
    snapshot, missed = peer.told()
    assert (snapshot["recovered"], missed["timer"]["version"]) == (True, 3)
    (alone,) = Peer(house.door, f"{PATH}?since=").knock().told()
    assert alone["recovered"] is None


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
    """What RFC 6455 does not allow gets its status, no room and no lasting connection, whether the auction is known or not."""
    house = House()
    house.put(record())
    if known:
        await house.hub.room(AUCTION)
    peer = Peer(house.door).knock()
    del peer
    house.door._connections.clear()
    house.door._per_address.clear()
    room_before = house.hub.known(AUCTION)
    if room_before is not None:
        room_before.writable.clear()
    await settled(house)
    house.door._connections.clear()
    house.door._per_address.clear()
    if (room := house.hub.known(AUCTION)) is not None:
        room.writable.clear()
    peer = Peer(house.door).knock(edit)
    await settled(house)
    assert peer.status == status
    assert peer.frames == []
    await turns()
    assert_gone(house, peer)
    assert house.sample("auctions_gateway_handshakes_total", outcome="malformed") == 1
