"""The limits of one socket: frames of every kind are counted, text is checked, and nobody is waited for without end."""

import asyncio

import pytest
from websockets.frames import Frame, Opcode

from gateway.closing import CloseCode
from gateway.connection import (
    CLIENT_FRAME_BYTES_MAX,
    CLIENT_FRAMES_PER_SECOND_MAX,
    CLOSE_WITHIN_S,
    FRAME_EARNED_NS,
    MESSAGES_PER_SECOND_MAX,
    PIECE_BYTES,
)
from tests.fakes.loop import run
from tests.gateway.house import House
from tests.gateway.peers import Peer
from tests.gateway.test_connection import SYNC, assert_gone, opened, turns


def frames(opcode: Opcode, count: int, data: bytes = b"", *, fin: bool = True) -> bytes:
    """So many equal frames of a client."""
    return Frame(opcode, data, fin=fin).serialize(mask=True) * count


BEGUN = frames(Opcode.TEXT, 1, fin=False)


@pytest.mark.requirement("B3")
@pytest.mark.parametrize(
    ("first", "opcode", "fin"),
    [(b"", Opcode.PING, True), (b"", Opcode.PONG, True), (BEGUN, Opcode.CONT, False)],
    ids=["pings", "pongs", "fragments"],
)
async def test_frames_of_every_kind_count(first: bytes, opcode: Opcode, fin: bool) -> None:
    """Fifty pass at once, second after second, then one each time it is earned; one more is 4429."""
    house = House()
    peer = await opened(house)
    peer.feed(first)
    for _ in range(3):
        house.line.advance(1_000)
        peer.feed(frames(opcode, CLIENT_FRAMES_PER_SECOND_MAX, fin=fin))
        assert peer.farewell is None
    house.line.advance(FRAME_EARNED_NS / 1e6)
    peer.feed(frames(opcode, 1, fin=fin))
    assert peer.farewell is None
    house.line.advance(FRAME_EARNED_NS / 1e6 - 1)
    peer.feed(frames(opcode, 1, fin=fin))
    assert peer.farewell == (4429, "at most 50 frames a second")
    assert house.sample("auctions_gateway_disconnects_total", code="4429") == 1


async def test_a_message_in_pieces_is_one_message() -> None:
    """Fragments count as frames, and only their last one as a message."""
    house = House()
    peer = await opened(house)
    for _ in range(MESSAGES_PER_SECOND_MAX):
        peer.feed(BEGUN + frames(Opcode.CONT, 7, fin=False) + frames(Opcode.CONT, 1, b"{", fin=True))
        peer.connection._bad_messages = 0
    assert [frame["error_code"] for frame in peer.told()] == ["BAD_MESSAGE"] * MESSAGES_PER_SECOND_MAX
    assert peer.farewell is None


@pytest.mark.requirement("B3")
async def test_a_flood_is_told_once_and_then_cut() -> None:
    """Of a quarter of a megabyte of pings, which one read can bring, hardly any are parsed, and fewer are answered."""
    house = House()
    peer = await opened(house)
    before = len(peer.transport.taken)
    parsed = 0
    receive = peer.connection.ws.receive_data

    def counted(data: bytes) -> None:
        nonlocal parsed
        parsed += len(data)
        receive(data)

    peer.connection.ws.receive_data = counted  # type: ignore[method-assign]
    peer.connection.data_received(frames(Opcode.PING, 43_000))
    assert peer.transport.aborted
    assert parsed == PIECE_BYTES
    assert len(peer.transport.taken) - before < PIECE_BYTES
    await turns()
    assert_gone(house, peer)


@pytest.mark.requirement("B3")
async def test_beyond_twice_as_many_frames_nothing_is_said_any_more() -> None:
    """Up to there somebody may not have read the farewell yet; one more, and the connection is cut."""
    house = House()
    peer = await opened(house)
    peer.feed(frames(Opcode.PONG, 2 * CLIENT_FRAMES_PER_SECOND_MAX))
    assert peer.farewell == (4429, "at most 50 frames a second")
    assert not peer.transport.is_closing()
    peer.feed(frames(Opcode.PONG, 1))
    assert peer.transport.aborted


async def test_one_who_is_a_little_too_quick_can_still_say_farewell() -> None:
    """What is on the way while the close frame travels does not turn it into a cut."""
    house = House()
    peer = await opened(house)
    peer.say(*[SYNC] * (MESSAGES_PER_SECOND_MAX + 3))
    assert peer.farewell == (4429, "at most 5 messages a second")
    assert not peer.transport.is_closing()
    peer.flush()
    await turns()
    assert not peer.transport.aborted
    assert_gone(house, peer)


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("cut", [1, 2, 5])
async def test_text_that_is_no_utf_8_is_1007(cut: int) -> None:
    """Whole or in fragments, as RFC 6455, section 8.1, asks; a character that a cut splits is none the worse."""
    house = House()
    peer = await opened(house)
    text = '{"type":"sync","t0":1,"x":"ü"}'.encode()
    split = text.index(b"\xc3") + 1
    peer.client.send_text(text[:split], fin=False)
    peer.client.send_continuation(text[split:], fin=True)
    peer.flush()
    assert peer.told()[0]["type"] == "sync"
    broken = b'{"x":"\xff"}'
    peer.feed(frames(Opcode.TEXT, 1, broken[:cut], fin=False) + frames(Opcode.CONT, 1, broken[cut:]))
    assert peer.farewell == (1007, "a text message is UTF-8")
    await turns()
    assert_gone(house, peer)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff\xff\xff\xff", "1002"),
        (frames(Opcode.TEXT, 1, b"\xff"), "1007"),
        (frames(Opcode.TEXT, 1, b" " * (CLIENT_FRAME_BYTES_MAX + 1)), "1009"),
    ],
    ids=["no frame", "no text", "too long"],  # the mask of a frame is random, and workers must agree on names
)
async def test_a_socket_that_is_closed_for_a_fault_is_counted_once(data: bytes, code: str) -> None:
    """By the code it was told first: what a peer breaks behind our farewell is not counted again."""
    house = House()
    faulty, parting = await opened(house), await opened(house)
    faulty.feed(data)
    faulty.feed(data)
    parting.connection.close(CloseCode.FEED_LOST, "gone")
    parting.feed(data)
    await turns()
    assert_gone(house, faulty, parting)
    assert house.sample("auctions_gateway_disconnects_total", code=code) == 1
    assert house.sample("auctions_gateway_disconnects_total", code="4102") == 1


@pytest.mark.parametrize("how", ["a close frame", "end of its stream"])
async def test_a_peer_that_goes_by_itself_is_not_counted(how: str) -> None:
    """Only what the gateway closes is: neither the echo of a farewell nor the end of a stream is its doing."""
    house = House()
    peer = await opened(house)
    if how == "a close frame":
        peer.feed(frames(Opcode.CLOSE, 1, b"\x03\xe8"))
    else:
        peer.connection.eof_received()
    await turns()
    assert_gone(house, peer)
    (family,) = (each for each in house.registry.collect() if each.name == "auctions_gateway_disconnects")
    assert family.samples == []


async def test_what_is_sent_behind_a_fault_is_read_until_the_peer_has_seen_why() -> None:
    """A reset would overtake the close frame: our end is closed, and the rest thrown away until theirs is."""
    house = House()
    peer = await opened(house)
    ended = []
    peer.transport.write_eof = lambda: ended.append(True)  # type: ignore[method-assign]
    peer.feed(frames(Opcode.TEXT, 1, b" " * (CLIENT_FRAME_BYTES_MAX + 1)))
    assert peer.farewell is not None
    assert peer.farewell[0] == 1009
    assert ended == [True]
    assert not peer.transport.is_closing()
    peer.feed(b"\xff" * 100_000)
    peer.feed(frames(Opcode.PING, 500))
    assert peer.read() == []
    peer.connection.eof_received()
    peer.transport.close()  # as a loop does when `eof_received` returns nothing
    await turns()
    assert_gone(house, peer)


@pytest.mark.requirement("B3")
@pytest.mark.parametrize("way", ["end of its stream", "a close frame", "a fault", "no reading at all"])
def test_one_who_takes_nothing_is_not_waited_for(way: str) -> None:
    """A close that cannot be delivered is given up after 5 s: no half-open peer holds a connection or its place."""
    house = House()

    async def scenario() -> None:
        peer = await opened(house)
        if way == "a fault":
            peer.transport.write_eof = lambda: None  # type: ignore[method-assign]
        peer.transport.stuck = True
        peer.connection.send(b"x" * 100)
        if way == "end of its stream":
            peer.connection.eof_received()
        elif way == "a close frame":
            peer.feed(frames(Opcode.CLOSE, 1))
        elif way == "a fault":
            peer.feed(b"\xff\xff\xff\xff")
        else:
            peer.transport.close = lambda: None  # type: ignore[method-assign]
            peer.connection.shutdown()
        await asyncio.sleep(CLOSE_WITHIN_S - 0.1)
        assert house.door._connections == {peer.connection}
        await asyncio.sleep(0.2)
        assert peer.transport.aborted
        assert_gone(house, peer)

    run(house.line, scenario)


async def test_a_refusal_that_is_not_taken_is_cut_too() -> None:
    """The answer to a handshake needs a reader as well."""
    house = House()
    peer = Peer(house.door, "/nowhere")
    peer.transport.stuck = True
    peer.knock()
    assert peer.transport.is_closing()
    assert peer.connection._closer is not None
    peer.transport.abort()
    await turns()
    assert_gone(house, peer)
