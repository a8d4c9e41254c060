"""Tests for gateway.door: limits, origins, the look at every socket, and farewells."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from websockets.frames import Opcode
from websockets.http11 import Request

from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from gateway.closing import CloseCode
from gateway.connection import CLOSE_WITHIN_S
from gateway.door import ANSWER_WITHIN_MS, LOOK_EVERY_S, LOOK_LATE_MS, OVER_LINGER_S, PING_AFTER_MS
from gateway.problems import RETRY_AFTER_MAX_S
from gateway.room import Frame, Room
from tests.fakes.clock import BORN_MS
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, House, record
from tests.gateway.peers import PATH, Peer
from tests.gateway.test_connection import assert_gone, opened, room_of, settled, stall, turns, unstall

OVER_WITHIN_S = 5.0
"""What the contract promises for the farewell 4000."""


# Who gets in.


def _origins(*origins: str, host: str | None = "127.0.0.1:8080") -> object:
    def edit(request: Request) -> None:
        del request.headers["Host"]
        if host is not None:
            request.headers["Host"] = host
        for origin in origins:
            request.headers["Origin"] = origin

    return edit


@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (_origins(), 101),
        (_origins(host=None), 101),
        (_origins("http://127.0.0.1:8080"), 101),
        (_origins("https://bids.example"), 101),
        (_origins("http://evil.example"), 403),
        (_origins("http://127.0.0.1:8080", "http://127.0.0.1:8080"), 403),
        (_origins("http://127.0.0.1:8080", "http://evil.example"), 403),
        (_origins("http://evil.example", host="evil.example"), 403),
        (_origins("http://127.0.0.1:8080", host=None), 403),
        (_origins("http://[", host="["), 403),
        (_origins("null"), 403),
    ],
)
async def test_pages_from_elsewhere_get_no_socket(edit: object, status: int) -> None:
    """A foreign origin, an unreadable one, or two of them is 403; no origin is a program."""
    house = House(allowed_origins=["https://bids.example"])
    house.put(record())
    peer = Peer(house.door).knock(edit)  # type: ignore[arg-type]
    await settled(house)
    assert peer.status == status
    if status == 403:
        assert peer.problem["error_code"] == "FOREIGN_ORIGIN"
        await turns()
        assert_gone(house, peer)
        assert house.store.calls["view"] == 0


@pytest.mark.parametrize("limit", [{"connections_max": 2}, {"connections_per_address_max": 2}])
async def test_beyond_the_limits_the_answer_is_503_and_when_to_try_again(limit: dict[str, int]) -> None:
    """As many sockets as allowed are served; the next one is refused, and let in when another has gone."""
    house = House(**limit)
    first, _second = await opened(house), await opened(house)
    refused = Peer(house.door).knock()
    assert (refused.status, refused.problem["error_code"]) == (503, "TOO_MANY_CONNECTIONS")
    assert refused.response is not None
    assert 1 <= int(refused.response.headers["Retry-After"]) <= 5
    await turns()
    assert_gone(house, refused)
    assert house.sample("auctions_gateway_connections") == 2
    other = Peer(house.door, address="192.0.2.2").knock()
    assert other.status == (503 if "connections_max" in limit else 101)
    other.transport.abort()
    first.transport.abort()
    await turns()
    await opened(house)
    assert house.sample("auctions_gateway_handshakes_total", outcome="too_many_connections") == (
        2 if "connections_max" in limit else 1
    )


# The look at every socket.


def looks(house: House, ms: int) -> None:
    """So much time passes, with a look every second and one at its end."""
    while ms > 0:
        step = min(ms, round(LOOK_EVERY_S * 1_000))
        house.line.advance(step)
        house.door._look()
        ms -= step


@pytest.mark.requirement("B3")
async def test_a_socket_that_lags_too_long_is_closed_with_4101() -> None:
    """Age counts from when it began to lag, whether anything waits for it or not; a socket that reads is left alone."""
    house = House(outbox_age_max_ms=1_000)
    slow, quick = await opened(house), await opened(house)
    house.line.advance(500)
    stall(slow)
    house.line.advance(1_000)
    house.door._look()
    assert slow.connection.room is not None
    house.line.advance(1)
    house.door._look()
    assert room_of(house).writable == {quick.connection}
    assert room_of(house).lagging == set()
    unstall(slow)
    assert slow.farewell is not None
    assert slow.farewell[0] == 4101
    assert quick.farewell is None


@pytest.mark.requirement("B3")
async def test_a_socket_that_recovers_starts_anew() -> None:
    """Two short stalls are not one long one."""
    house = House(outbox_age_max_ms=1_000)
    peer = await opened(house)
    for _ in range(3):
        stall(peer)
        house.line.advance(900)
        house.door._look()
        unstall(peer)
    assert peer.farewell is None


async def test_a_silent_peer_is_pinged_once_and_then_given_up() -> None:
    """After 20 s it is asked; if it is not heard within 10 s, it is closed with 4408."""
    house = House()
    peer = await opened(house)
    looks(house, PING_AFTER_MS)
    assert peer.read() == []
    looks(house, 1)
    for _ in range(3):
        house.door._look()
    (ping,) = peer.read()
    assert (ping.opcode, bytes(ping.data)) == (Opcode.PING, b"")
    looks(house, ANSWER_WITHIN_MS - 1)
    assert peer.farewell is None
    looks(house, 1)
    assert peer.farewell == (4408, "no answer to a ping")
    peer.flush()
    await turns()
    assert_gone(house, peer)


async def test_a_peer_that_answers_pings_stays_for_ever() -> None:
    """Each pong counts as a sign of life, and the next silence is asked about again."""
    house = House()
    peer = await opened(house)
    for _ in range(5):
        looks(house, PING_AFTER_MS + 1)
        assert [frame.opcode for frame in peer.read()] == [Opcode.PING]
        peer.flush()
    assert peer.farewell is None


async def test_one_that_lags_is_not_pinged() -> None:
    """Its answer could not arrive in time: its age is what counts."""
    house = House(outbox_age_max_ms=120_000)
    peer = await opened(house)
    stall(peer)
    looks(house, PING_AFTER_MS + ANSWER_WITHIN_MS)
    unstall(peer)
    assert peer.read() == []
    assert peer.farewell is None


@pytest.mark.parametrize("silent_ms", [1_000, PING_AFTER_MS + 1], ids=["not asked", "asked"])
async def test_one_that_reads_again_is_not_taken_for_silent(silent_ms: int) -> None:
    """While it lagged it was not read, so its silence begins anew, and what it was asked before is forgotten."""
    house = House(outbox_age_max_ms=120_000)
    peer = await opened(house)
    looks(house, silent_ms)
    peer.read()
    stall(peer)
    looks(house, PING_AFTER_MS + ANSWER_WITHIN_MS)
    unstall(peer)
    looks(house, PING_AFTER_MS)
    assert peer.read() == []
    looks(house, 1)
    assert [frame.opcode for frame in peer.read()] == [Opcode.PING]
    looks(house, ANSWER_WITHIN_MS)
    assert peer.farewell is not None
    assert peer.farewell[0] == 4408


async def test_a_process_that_was_stopped_gives_up_nobody_it_did_not_ask() -> None:
    """After half a minute in which nobody could be heard everyone is asked, and who answers stays."""
    house = House()
    answers, gone = await opened(house), await opened(house)
    house.line.advance(33_000)
    house.door._look()
    for peer in (answers, gone):
        assert [frame.opcode for frame in peer.read()] == [Opcode.PING]
    answers.flush()
    looks(house, ANSWER_WITHIN_MS)
    assert answers.farewell is None
    assert gone.farewell == (4408, "no answer to a ping")


async def test_a_stop_is_no_time_to_answer_in() -> None:
    """Who was asked before the process was stopped has the rest of its ten seconds afterwards."""
    house = House()
    peer = await opened(house)
    looks(house, PING_AFTER_MS + 1)
    looks(house, 4_000)
    peer.read()
    stopped_ms = 33_000
    house.line.advance(stopped_ms + LOOK_EVERY_S * 1_000)
    house.door._look()
    looks(house, ANSWER_WITHIN_MS - 5_000 - 1)
    assert peer.farewell is None
    looks(house, 1)
    assert peer.farewell == (4408, "no answer to a ping")


@pytest.mark.requirement("B3")
async def test_a_stop_is_no_time_to_read_in() -> None:
    """Nor does it age what waits: who lagged before has the rest of its bound, who lags since then all of it."""
    house = House(outbox_age_max_ms=5_000)
    before, since = await opened(house), await opened(house)
    stall(before)
    looks(house, 1_000)
    house.line.advance(33_000 + LOOK_EVERY_S * 1_000)
    stall(since)
    house.door._look()
    looks(house, 3_000)
    assert room_of(house).lagging == {before.connection, since.connection}
    looks(house, 1)
    assert room_of(house).lagging == {since.connection}
    looks(house, 1_999)
    assert room_of(house).lagging == {since.connection}
    looks(house, 1)
    assert room_of(house).lagging == set()


@pytest.mark.parametrize(("late_ms", "stays"), [(LOOK_LATE_MS, False), (LOOK_LATE_MS + 1, True)])
async def test_a_look_that_is_a_little_late_excuses_nobody(late_ms: int, stays: bool) -> None:
    """A busy loop is late by some hundred ms every time: if that were forgiven, nobody would ever be given up."""
    house = House()
    peer = await opened(house)
    looks(house, PING_AFTER_MS + 1)
    looks(house, ANSWER_WITHIN_MS - 2_000)
    house.line.advance(LOOK_EVERY_S * 1_000 + late_ms)
    house.door._look()
    assert (peer.farewell is None) is stays


async def test_a_connection_without_a_room_is_not_looked_at() -> None:
    """One whose auction is still being read is neither pinged nor closed: the store's own deadline ends that."""
    house = House()
    house.put(record())
    house.store.before_view.clear()
    peer = Peer(house.door).knock()
    looks(house, 10 * PING_AFTER_MS)
    assert not peer.transport.is_closing()
    house.store.before_view.set()
    await settled(house)
    assert peer.status == 101


def test_the_door_looks_by_itself() -> None:
    """`watch_over` finds a silent peer within a look of its time, and goes on until it is cancelled."""
    house = House()

    async def scenario() -> None:
        peer = await opened(house)
        watch = asyncio.create_task(house.door.watch_over())
        await asyncio.sleep(PING_AFTER_MS / 1_000 + 1.2 * LOOK_EVERY_S)
        assert [frame.opcode for frame in peer.read()] == [Opcode.PING]
        await asyncio.sleep(ANSWER_WITHIN_MS / 1_000 + 1.2 * LOOK_EVERY_S)
        assert peer.farewell is not None
        assert peer.farewell[0] == 4408
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watch

    run(house.line, scenario)


# Farewells.


def test_when_an_auction_is_over_everyone_is_let_go_with_4000() -> None:
    """First the event, then, within five seconds, the farewell; also for those that lag and those that come later."""
    house = House()

    async def scenario() -> None:
        reads, lags = await opened(house), await opened(house)
        stall(lags)
        house.announce("timer.ended", record(version=2, status=Status.ENDED))
        await house.read_lane()
        assert [frame["type"] for frame in reads.told()] == ["timer.ended"]
        assert reads.farewell is None
        await asyncio.sleep(OVER_LINGER_S / 2)
        late = await opened(house)
        await asyncio.sleep(OVER_LINGER_S)
        for peer in (reads, late):
            assert peer.farewell == (4000, "the auction is over")
        unstall(lags)
        assert lags.farewell is not None
        assert lags.farewell[0] == 4000
        later = await opened(house)
        assert later.farewell is None
        await asyncio.sleep(OVER_WITHIN_S)
        assert later.farewell is not None
        assert later.farewell[0] == 4000
        assert not room_of(house).is_watched
        await asyncio.sleep(OVER_WITHIN_S)
        assert_gone(house, reads, lags, late, later)

    run(house.line, scenario)


@pytest.mark.requirement("B3")
def test_one_that_lags_at_the_end_still_reads_how_it_ended() -> None:
    """The end is an event, and events are never dropped: the outbox goes out before the farewell."""
    house = House()

    async def scenario() -> None:
        peer = await opened(house)
        stall(peer)
        house.announce("timer.ended", record(version=2, status=Status.ENDED))
        await house.read_lane()
        await asyncio.sleep(OVER_LINGER_S + 0.1)
        unstall(peer)
        assert [frame["type"] for frame in peer.told()] == ["timer.ended"]
        assert peer.farewell is not None
        assert peer.farewell[0] == 4000

    run(house.line, scenario)


def test_an_end_that_a_failover_took_back_lets_nobody_go() -> None:
    """If the auction runs again when the farewell is due, everyone stays."""
    house = House()

    async def scenario() -> None:
        peer = await opened(house)
        house.announce("timer.ended", record(version=2, status=Status.ENDED))
        await house.read_lane()
        house.put(record(version=1))
        await house.hub.reload(0, "failover")
        await asyncio.sleep(OVER_WITHIN_S)
        assert peer.farewell is None
        assert [orjson.loads(frame.data)["type"] for frame in peer.frames[1:]] == ["timer.ended", "timer.resynced"]
        house.announce("timer.ended", record(version=2, status=Status.ENDED))
        await house.read_lane()
        await asyncio.sleep(OVER_WITHIN_S)
        assert peer.farewell is not None
        assert peer.farewell[0] == 4000

    run(house.line, scenario)


def test_a_room_that_was_forgotten_and_loaded_again_lets_its_sockets_go_too() -> None:
    """A farewell that is due for a forgotten room does not stand in the way of the one that took its place."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=1))
        await house.hub.room(AUCTION)
        house.announce("timer.ended", record(version=2, status=Status.ENDED))
        await house.read_lane()
        await house.hub.reload(0, "failover")
        assert house.hub.known(AUCTION) is None
        peer = await opened(house)
        await asyncio.sleep(OVER_WITHIN_S)
        assert peer.farewell is not None
        assert peer.farewell[0] == 4000

    run(house.line, scenario)


def test_one_timer_serves_a_whole_room() -> None:
    """A hundred sockets that come after the end are let go together."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=2, status=Status.CANCELLED))
        peers = [await opened(house) for _ in range(100)]
        assert len(house.door._farewells) == 1
        await asyncio.sleep(OVER_LINGER_S + 0.01)
        assert {peer.farewell for peer in peers} == {(4000, "the auction is over")}
        assert house.door._farewells == set()
        assert house.sample("auctions_gateway_disconnects_total", code="4000") == 100

    run(house.line, scenario)


# Draining.

FAR, NEAR = "far", "near"
NEAR_ENDS_AT = BORN_MS + 30_000
COME_BACK = orjson.dumps({"retry_after_ms": 500, "jitter_ms": 3_000}).decode()


class Crowd:
    """Peers who answer what they are sent, as clients do."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.peers: list[Peer] = []
        house.put(record(FAR, version=1))
        house.put(record(NEAR, version=1, ends_at=NEAR_ENDS_AT))

    async def comes(self, auction_id: str) -> Peer:
        """One who watches an auction from now on."""
        peer = Peer(self.house.door, f"/auctions/{auction_id}/updates").knock()
        await settled(self.house)
        assert peer.status == 101
        self.peers.append(peer)
        return peer

    async def answers(self) -> None:
        """Read and answer, until cancelled."""
        while True:
            for peer in self.peers:
                if peer.farewell is not None:
                    peer.flush()
            await asyncio.sleep(0.01)

    async def ends(self, auction_id: str, status: Status = Status.ENDED) -> None:
        """An auction comes to its end, and the gateway reads of it."""
        self.house.announce("timer.ended", record(auction_id, version=2, status=status, ends_at=NEAR_ENDS_AT))
        await self.house.read_lane()


def types(peer: Peer) -> list[str]:
    """What a peer was told, by type."""
    return [orjson.loads(frame.data)["type"] for frame in peer.frames if frame.opcode is Opcode.TEXT]


@asynccontextmanager
async def crowd_of(house: House) -> AsyncIterator[Crowd]:
    """A crowd that answers."""
    crowd = Crowd(house)
    answering = asyncio.create_task(crowd.answers())
    try:
        yield crowd
        assert not answering.done()
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


@pytest.mark.requirement("B9")
def test_a_drain_lets_a_last_minute_come_to_its_end() -> None:
    """Who loses nothing goes at once and is told when to come back; who watches a last minute reads its end, and 4000."""
    house = House()

    async def scenario() -> None:
        async with crowd_of(house) as crowd:
            far, near = await crowd.comes(FAR), await crowd.comes(NEAR)
            draining = asyncio.create_task(house.door.drain(60))
            await asyncio.sleep(0.05)
            assert far.farewell == (1001, COME_BACK)
            await asyncio.sleep(29)
            assert near.farewell is None
            await asyncio.sleep(1)
            await crowd.ends(NEAR)
            assert not draining.done()
            async with asyncio.timeout(OVER_LINGER_S + 0.5):
                await draining
            assert near.farewell == (4000, "the auction is over")
            assert (types(far), types(near)) == (["timer.snapshot"], ["timer.snapshot", "timer.ended"])
            await turns()
            assert_gone(house, far, near)

    run(house.line, scenario)


@pytest.mark.requirement("B9")
def test_a_drain_has_a_deadline() -> None:
    """A last minute that does not end in time is left with 1001: a deploy is not held up by an auction that is extended."""
    house = House()

    async def scenario() -> None:
        async with crowd_of(house) as crowd:
            near = await crowd.comes(NEAR)
            began = asyncio.get_running_loop().time()
            draining = asyncio.create_task(house.door.drain(10))
            await asyncio.sleep(9.9)
            assert near.farewell is None
            await draining
            assert asyncio.get_running_loop().time() - began == pytest.approx(10, abs=0.01)
            assert near.farewell == (1001, COME_BACK)

    run(house.line, scenario)


@pytest.mark.requirement("B9")
@pytest.mark.parametrize(
    ("update", "changed"),
    [
        ("timer.extended", {"ends_at": NEAR_ENDS_AT + 900_000}),
        ("timer.paused", {"status": Status.PAUSED, "paused_at": EpochMs(BORN_MS), "paused_from": Status.CLOSING}),
    ],
)
def test_a_close_that_moves_away_holds_nobody_back(update: str, changed: dict[str, Any]) -> None:
    """A bid extends the auction, or somebody pauses it, while a drain waits for its end: its watchers can go now."""
    house = House()

    async def scenario() -> None:
        async with crowd_of(house) as crowd:
            near = await crowd.comes(NEAR)
            draining = asyncio.create_task(house.door.drain(60))
            await asyncio.sleep(1)
            assert near.farewell is None
            house.announce(update, record(NEAR, version=2, **({"ends_at": NEAR_ENDS_AT} | changed)))
            await house.read_lane()
            async with asyncio.timeout(0.5):
                await draining
            assert near.farewell == (1001, COME_BACK)
            assert types(near) == ["timer.snapshot", update]

    run(house.line, scenario)


@pytest.mark.requirement("B9")
def test_a_farewell_that_is_due_comes_before_the_end_of_a_drain() -> None:
    """An auction that ended just before the drain: its watchers are told 4000, not to come back for nothing."""
    house = House()

    async def scenario() -> None:
        async with crowd_of(house) as crowd:
            near = await crowd.comes(NEAR)
            await crowd.ends(NEAR, Status.CANCELLED)
            await house.door.drain(60)
            assert near.farewell == (4000, "the auction is over")

    run(house.line, scenario)


class StreamOf:
    """Implements `gateway.room.Stream`, in a room until it is closed."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.closed: list[tuple[CloseCode, str]] = []
        room.streams.add(self)

    def event(self, frame: Frame) -> None:
        assert not self.closed

    def tick(self, frame: Frame) -> None:
        assert not self.closed

    def close(self, code: CloseCode, reason: str) -> None:
        self.closed.append((code, reason))
        self.room.streams.discard(self)


@pytest.mark.requirement("B9")
def test_a_drain_lets_streams_go_by_the_same_rules() -> None:
    """Who watches over HTTP is sent away in the same order, with the same codes, once."""
    house = House()

    async def scenario() -> None:
        async with crowd_of(house) as crowd:
            streams = {}
            for name in (FAR, NEAR):
                room = await house.hub.room(name)
                assert room is not None
                streams[name] = StreamOf(room)
            draining = asyncio.create_task(house.door.drain(60))
            await asyncio.sleep(1)
            assert [code for code, _ in streams[FAR].closed] == [CloseCode.GOING_AWAY]
            assert streams[NEAR].closed == []
            await crowd.ends(NEAR)
            await draining
            assert streams[NEAR].closed == [(CloseCode.AUCTION_OVER, "the auction is over")]
            assert len(streams[FAR].closed) == 1

    run(house.line, scenario)


@pytest.mark.requirement("B9")
def test_while_draining_newcomers_are_told_to_come_back() -> None:
    """A handshake is answered 503 with `Retry-After`; one that was under way is let in, and let go."""
    house = House()

    async def scenario() -> None:
        async with crowd_of(house) as crowd:
            await crowd.comes(NEAR)
            house.store.before_view.clear()
            under_way = Peer(house.door, f"/auctions/{FAR}/updates").knock()
            crowd.peers.append(under_way)
            draining = asyncio.create_task(house.door.drain(20))
            await asyncio.sleep(1)
            late = Peer(house.door, f"/auctions/{NEAR}/updates").knock()
            assert (late.status, late.problem["error_code"]) == (503, "DRAINING")
            assert late.response is not None
            assert 1 <= int(late.response.headers["Retry-After"]) <= RETRY_AFTER_MAX_S
            house.store.before_view.set()
            await asyncio.sleep(0.2)
            assert under_way.farewell == (1001, COME_BACK)
            await crowd.ends(NEAR)
            await draining

    run(house.line, scenario)


def test_one_that_does_not_answer_its_farewell_delays_a_drain_by_five_seconds_at_most() -> None:
    """A peer that is gone without a word is cut off, and the drain goes on."""
    house = House()

    async def scenario() -> None:
        house.put(record(FAR))
        mute = Peer(house.door, f"/auctions/{FAR}/updates").knock()
        await settled(house)
        async with asyncio.timeout(CLOSE_WITHIN_S + 0.2):
            await house.door.drain(60)
        assert mute.transport.aborted

    run(house.line, scenario)


def test_a_drain_of_an_empty_gateway_takes_no_time() -> None:
    """Nobody to wait for: it returns at once, even though an auction is in its last minute."""
    house = House()

    async def scenario() -> None:
        house.put(record(NEAR, ends_at=NEAR_ENDS_AT))
        assert await house.hub.room(NEAR) is not None
        before = house.line.now_ns
        await house.door.drain(60)
        assert house.line.now_ns == before

    run(house.line, scenario)


def test_close_codes_have_their_ranges() -> None:
    """4000-4099 stop, 4100-4199 come back, 4400-4499 mend first: a client can act on a code it does not know."""
    assert {code.name: code.value for code in CloseCode} == {
        "GOING_AWAY": 1001,
        "AUCTION_OVER": 4000,
        "SLOW_CONSUMER": 4101,
        "FEED_LOST": 4102,
        "BAD_MESSAGES": 4400,
        "TOKEN_EXPIRED": 4401,
        "HEARTBEAT_MISSED": 4408,
        "TOO_MANY": 4429,
    }
    assert PATH.startswith("/auctions/")
