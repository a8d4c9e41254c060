"""Tests for gateway.door: limits, origins, the look at every socket, and farewells."""

import asyncio

import orjson
import pytest
from websockets.frames import Opcode
from websockets.http11 import Request

from engine.domain.lifecycle import Status
from gateway.closing import CloseCode
from gateway.door import GONE_AFTER_MS, LOOK_EVERY_S, OVER_LINGER_S, PING_AFTER_MS
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
    """After 20 s it is asked, after 30 s without an answer it is closed with 4408."""
    house = House()
    peer = await opened(house)
    house.line.advance(PING_AFTER_MS)
    house.door._look()
    assert peer.read() == []
    house.line.advance(1)
    for _ in range(3):
        house.door._look()
    (ping,) = peer.read()
    assert (ping.opcode, bytes(ping.data)) == (Opcode.PING, b"")
    house.line.advance(GONE_AFTER_MS - PING_AFTER_MS - 1)
    house.door._look()
    assert peer.farewell is None
    house.line.advance(1)
    house.door._look()
    assert peer.farewell == (4408, "no answer to a ping")
    peer.flush()
    await turns()
    assert_gone(house, peer)


async def test_a_peer_that_answers_pings_stays_for_ever() -> None:
    """Each pong counts as a sign of life, and the next silence is asked about again."""
    house = House()
    peer = await opened(house)
    for _ in range(5):
        house.line.advance(PING_AFTER_MS + 1)
        house.door._look()
        assert [frame.opcode for frame in peer.read()] == [Opcode.PING]
        peer.flush()
    assert peer.farewell is None


async def test_one_that_lags_is_not_pinged() -> None:
    """Its answer could not arrive in time: its age is what counts."""
    house = House(outbox_age_max_ms=120_000)
    peer = await opened(house)
    stall(peer)
    house.line.advance(GONE_AFTER_MS + 1)
    house.door._look()
    unstall(peer)
    assert peer.read() == []
    assert peer.farewell is None


async def test_a_connection_without_a_room_is_not_looked_at() -> None:
    """One whose auction is still being read is neither pinged nor closed: the store's own deadline ends that."""
    house = House()
    house.put(record())
    house.store.before_view.clear()
    peer = Peer(house.door).knock()
    house.line.advance(10 * GONE_AFTER_MS)
    house.door._look()
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
        await asyncio.sleep((GONE_AFTER_MS - PING_AFTER_MS) / 1_000 + 1.2 * LOOK_EVERY_S)
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


async def test_ids_of_requests_are_their_own() -> None:
    """A generated correlation id has its prefix and is used once."""
    house = House()
    ids = {house.door.new_correlation_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(name.startswith("req-") for name in ids)


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
