"""Tests for gateway.hub."""

import asyncio
import random
from itertools import product
from typing import Any

import orjson
import pytest

from engine.contract.cursors import START, Cursor
from engine.contract.keys import shard_of
from engine.contract.timers import CorruptTimerError, heartbeat_line, tick_line
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.store.protocol import StoreUnavailableError
from gateway import fanout as fanout_module
from gateway import hub as hub_module
from gateway import replay as replay_module
from gateway.closing import CloseCode
from gateway.hub import ANNOUNCE_AT_MS, CATCH_UP_S, HEARTBEAT_MS, Entrance, Hub
from gateway.replay import Stretch, Turns
from gateway.ring import Ring
from gateway.room import Frame, Room
from tests.fakes.clock import BORN_MS
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, ENDS_AT, House, Listener, payload, record, told


async def room_in(house: House, auction_id: str = AUCTION) -> Room:
    """The room of an auction that exists."""
    room = await house.hub.room(auction_id)
    assert room is not None
    return room


def joined(room: Room) -> Listener:
    """A subscriber who watches from now on."""
    listener = Listener()
    room.writable.add(listener)
    return listener


def extended(house: House, version: int) -> str:
    """The end moves with each version; the stream id of what says so."""
    return house.announce("timer.extended", record(version=version, ends_at=ENDS_AT + version * 1_000)).stream_id


# Loading.


@pytest.mark.requirement("R7", "R16")
async def test_a_thousand_demands_at_once_cost_one_read() -> None:
    """A reconnect storm on one auction asks the store once, and everyone gets the same room."""
    house = House()
    house.put(record())
    rooms = await asyncio.gather(*(house.hub.room(AUCTION) for _ in range(1_000)))
    assert house.store.calls["view"] == 1
    assert all(room is rooms[0] is not None for room in rooms)
    assert await house.hub.room(AUCTION) is house.hub.known(AUCTION) is rooms[0]
    assert house.store.calls["view"] == 1


async def test_one_who_goes_away_while_loading_takes_nobody_with_him() -> None:
    """A cancelled demand leaves the loading to the others."""
    house = House()
    house.put(record())
    house.store.before_view.clear()
    first, second = asyncio.ensure_future(house.hub.room(AUCTION)), asyncio.ensure_future(house.hub.room(AUCTION))
    while not house.store.calls["view"]:
        await asyncio.sleep(0)
    first.cancel()
    house.store.before_view.set()
    assert await second is not None
    assert first.cancelled()
    assert house.store.calls["view"] == 1


async def test_an_unknown_auction_has_no_room_and_is_asked_for_again() -> None:
    """None is no memory: once the auction is registered it is found."""
    house = House()
    assert await house.hub.room(AUCTION) is None
    assert house.hub.known(AUCTION) is None
    house.put(record())
    assert await house.hub.room(AUCTION) is not None


@pytest.mark.requirement("R19")
async def test_a_tombstone_is_not_shown() -> None:
    """An auction that was cancelled before its start is unknown to the outside."""
    house = House()
    house.put(record(status=Status.TOMBSTONE, version=1))
    assert await house.hub.room(AUCTION) is None


@pytest.mark.requirement("R16")
async def test_a_store_that_is_away_fails_everyone_who_waits_and_is_asked_again_later() -> None:
    """The fault reaches all who wait for the same load; the next demand is a fresh one."""
    house = House()
    house.put(record())
    house.store.failing["view"] = StoreUnavailableError("away")
    answers = await asyncio.gather(*(house.hub.room(AUCTION) for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreUnavailableError] * 3
    house.store.failing.clear()
    assert await house.hub.room(AUCTION) is not None


async def lived(committed: int, known: int, before: int, during: int, after: int, total: int) -> tuple[House, Listener]:
    """An auction with `total` updates, loaded in the midst of them.

    `committed` are in the store when the view is taken, `known` of them were read before the demand; `before` have been
    read when the view is taken, `during` when its answer arrives, `after` when the first watcher comes.
    """
    house = House()
    house.put(record(version=0))
    written = 0

    def write(upto: int) -> None:
        nonlocal written
        while written < upto:
            written += 1
            extended(house, written)

    async def read(upto: int) -> None:
        write(upto)
        house.hub.on_updates(0, house.memory.shards[0].updates[int(house.hub.positions[0].partition("-")[0]) : upto])

    await read(known)
    house.store.before_view.clear()
    house.store.after_view.clear()
    demand = asyncio.ensure_future(house.hub.room(AUCTION))
    while not house.store.calls["view"]:
        await asyncio.sleep(0)
    write(committed)
    await read(before)
    house.store.before_view.set()
    for _ in range(3):
        await asyncio.sleep(0)
    await read(during)
    house.store.after_view.set()
    room = await demand
    assert room is not None
    assert room.version == max(committed, during), "the view, and what came meanwhile"
    await read(after)
    listener = joined(room)
    await read(total)
    return house, listener


INTERLEAVINGS = [
    (committed, known, before, during, after)
    for committed, known, before, during, after in product(range(4), repeat=5)
    if known <= before <= committed and before <= during <= after
]


@pytest.mark.requirement("B3")
async def test_updates_that_come_while_loading_are_neither_lost_nor_applied_twice() -> None:
    """However the entries fall before, at and behind the view: the state is the last one, each later event comes once."""
    assert len(INTERLEAVINGS) > 50
    for committed, known, before, during, after in INTERLEAVINGS:
        case = f"committed={committed} known={known} before={before} during={during} after={after}"
        house, listener = await lived(committed, known, before, during, after, 4)
        room = house.hub.known(AUCTION)
        assert room is not None
        assert (room.version, room.timer["ends_at"]) == (4, ENDS_AT + 4_000), case
        versions = [frame["timer"]["version"] for frame in told(listener.sent)]
        # What the snapshot holds is not told again as news.
        assert versions == list(range(max(committed, after) + 1, 5)), case


@pytest.mark.requirement("B4")
async def test_one_who_comes_back_gets_every_event_once_whenever_the_room_was_loaded() -> None:
    """Recovered means: what was missed and what comes then are all events behind the cursor, each once, in order."""
    recovered = 0
    for committed, known, before, during, after in INTERLEAVINGS:
        for seen in range(after + 1):
            house = House()
            house, listener = await lived(committed, known, before, during, after, after)
            room = house.hub.known(AUCTION)
            assert room is not None
            listener.sent.clear()
            snapshot, *missed = told(house.hub.greeting(room, str(Cursor(0, f"{seen}-0"))))
            while len(house.memory.shards[0].updates) < 4:
                extended(house, len(house.memory.shards[0].updates) + 1)
            await house.read_lane()
            versions = [frame["timer"]["version"] for frame in (*missed, *told(listener.sent))]
            case = f"{committed=} {known=} {before=} {during=} {after=} {seen=}"
            if snapshot["recovered"]:
                recovered += 1
                assert versions == list(range(seen + 1, 5)), case
            else:
                # The feed had not yet read what the view holds already.
                assert after < committed, case
    assert recovered > 100


@pytest.mark.requirement("B4")
def test_a_room_opens_when_the_lane_was_read_as_far_as_what_was_loaded() -> None:
    """A gateway that starts in a storm loads a room before it has read so far: who comes back waits for it, and misses
    nothing."""
    house = House()

    async def scenario() -> None:
        house.hub.is_followed = True
        for version in range(1, 5):
            extended(house, version)
        await house.read_lane(count=2)
        demand = asyncio.ensure_future(house.hub.room(AUCTION))
        await asyncio.sleep(CATCH_UP_S / 4)
        await house.read_lane(count=1)
        await asyncio.sleep(CATCH_UP_S / 4)
        assert not demand.done()
        assert house.hub.known(AUCTION) is None
        await house.read_lane(count=1)
        room = await demand
        assert room is not None
        snapshot, *missed = told(house.hub.greeting(room, "0.1-0"))
        assert (snapshot["recovered"], snapshot["cursor"]) == (True, "0.4-0")
        assert [frame["timer"]["version"] for frame in missed] == [2, 3, 4]
        assert house.line.now_ns < CATCH_UP_S * 1e9

    run(house.line, scenario)


@pytest.mark.requirement("B4", "R16")
def test_a_room_that_stays_ahead_of_the_lane_says_so() -> None:
    """If the lane cannot be read in time the room opens all the same; its cursor is where it stands, and what lies between
    is neither promised nor told."""
    house = House()

    async def scenario() -> None:
        house.hub.is_followed = True
        for version in range(1, 5):
            extended(house, version)
        await house.read_lane(count=2)
        room = await room_in(house)
        assert house.line.now_ns == pytest.approx(CATCH_UP_S * 1e9, abs=1e6)
        (snapshot,) = told(house.hub.greeting(room, "0.1-0"))
        assert (snapshot["recovered"], snapshot["cursor"], snapshot["timer"]["version"]) == (False, "0.4-0", 4)
        assert snapshot["timer"]["cursor"] == "0.4-0"
        listener = joined(room)
        extended(house, 5)
        await house.read_lane()
        assert [frame["cursor"] for frame in told(listener.sent)] == ["0.5-0"]
        assert told(house.hub.greeting(room, "0.4-0"))[0]["recovered"] is True

    run(house.line, scenario)


# The event lane.


async def test_an_event_is_sent_with_its_cursor_and_the_time_of_sending() -> None:
    """A frame carries what the commit wrote, plus where it stands and when it left; the timer in it is as of then."""
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    listener = joined(room)
    entry = house.announce("timer.extended", record(version=2, ends_at=ENDS_AT + 5_000), bid_id="b-1")
    house.line.advance(40)
    await house.read_lane()
    (frame,) = told(listener.sent)
    now = house.authority.now_ms
    assert now == BORN_MS + 40
    assert (frame["type"], frame["bid_id"], frame["auction_id"]) == ("timer.extended", "b-1", AUCTION)
    assert (frame["server_time"], frame["committed_at"]) == (now, BORN_MS)
    assert frame["cursor"] == frame["timer"]["cursor"] == f"0.{entry.stream_id}"
    assert frame["timer"]["remaining_ms"] == ENDS_AT + 5_000 - now
    assert frame["trace_id"] == f"trace-{AUCTION}"
    assert house.sample("auctions_gateway_delivery_ms_sum", lane="event") == 40


async def test_the_event_lane_keeps_a_room_current_that_nobody_watches() -> None:
    """A poller sees the newest state without a further read, and no frame is built for nobody."""
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    extended(house, 2)
    await house.read_lane()
    assert (room.version, house.hub.timer(room)["ends_at"]) == (2, ENDS_AT + 2_000)
    assert house.store.calls["view"] == 1
    assert house.sample("auctions_gateway_delivery_ms_count", lane="event") == 0


@pytest.mark.requirement("R7")
async def test_a_bid_is_news_and_no_state() -> None:
    """`bid.accepted` goes to everyone who watches and leaves the timer alone."""
    house = House()
    house.put(record(version=3))
    room = await room_in(house)
    listener = joined(room)
    before = dict(room.timer)
    house.announce("bid.accepted", record(version=3), bid_id="b-1", amount_minor=500)
    await house.read_lane()
    (frame,) = told(listener.sent)
    assert (frame["type"], frame["bid_id"], frame["amount_minor"]) == ("bid.accepted", "b-1", 500)
    assert room.timer == before


async def test_entries_for_the_event_bus_go_to_no_socket() -> None:
    """`auction_timer_started` and its like move the cursor on and are neither sent nor kept for a resume."""
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    listener = joined(room)
    entry = house.append(AUCTION, "auction_timer_started", b'{"type":"auction_timer_started"}')
    house.append(AUCTION, "offers.cancelled", b"{}")
    await house.read_lane()
    assert listener.sent == []
    assert house.hub.positions[0] == "2-0"
    assert [frame["recovered"] for frame in told(house.hub.greeting(room, "0.0-0"))] == [True]
    assert entry.stream_id == "1-0"


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[]", b'"text"', b"7", b'{"timer":{}}', b'{"timer":7}'])
async def test_an_update_that_cannot_be_read_is_skipped(body: bytes) -> None:
    """A body that is no frame stops nothing: what comes behind it is delivered, now and to one who comes back."""
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    listener = joined(room)
    house.append(AUCTION, "timer.extended", body)
    extended(house, 2)
    await house.read_lane()
    assert [frame["timer"]["version"] for frame in told(listener.sent)] == [2]
    snapshot, *missed = told(house.hub.greeting(room, "0.0-0"))
    assert snapshot["recovered"] is True
    assert [frame["timer"]["version"] for frame in missed] == [2]


async def test_the_end_of_an_auction_is_reported_once() -> None:
    """The door hears of an end when it happens, not again with whatever follows it."""
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    over: list[Room] = []
    house.hub.on_over = over.append
    house.announce("bid.accepted", record(version=1))
    await house.read_lane()
    assert over == []
    house.announce("timer.ended", record(version=2, status=Status.ENDED))
    house.announce("bid.accepted", record(version=2, status=Status.ENDED))
    await house.read_lane()
    assert over == [room]


async def test_without_a_door_an_end_is_just_an_end() -> None:
    """A hub on its own goes on when an auction ends, and takes what it knows for fresh."""
    house = House()
    hub = Hub(house.store, house.clock, 1, house.metrics)
    hub.start_at(0, "0-0")
    house.put(record(version=1))
    room = await hub.room(AUCTION)
    assert room is not None
    hub.on_updates(0, [house.announce("timer.ended", record(version=2, status=Status.ENDED))])
    assert room.is_over
    assert hub.timer(room)["stale"] is False


# What a socket is told first.


@pytest.mark.requirement("R6", "R16")
async def test_the_timer_is_as_of_now_and_says_when_it_may_be_old() -> None:
    """Remaining time follows the auction clock; `stale` is what the feed says; a paused one stands still."""
    house = House()
    house.put(record())
    room = await room_in(house)
    house.line.advance(1_234)
    view = house.hub.timer(room)
    assert (view["server_time"], view["remaining_ms"]) == (BORN_MS + 1_234, 3_600_000 - 1_234)
    assert (view["cursor"], view["stale"]) == ("0.0-0", False)
    house.hub.stale = lambda: True
    assert house.hub.timer(room)["stale"] is True
    house.announce(
        "timer.paused",
        record(version=3, status=Status.PAUSED, paused_at=EpochMs(BORN_MS), paused_from=Status.ACTIVE),
    )
    await house.read_lane()
    house.line.advance(60_000)
    assert house.hub.timer(room)["remaining_ms"] == 3_600_000


@pytest.mark.requirement("R7")
async def test_the_first_frame_is_a_snapshot() -> None:
    """Without a cursor it is the only one, and claims no recovery."""
    house = House()
    house.put(record())
    (frame,) = told(house.hub.greeting(await room_in(house), None))
    assert frame["type"] == "timer.snapshot"
    assert frame["recovered"] is None
    assert frame["timer"]["auction_id"] == frame["auction_id"] == AUCTION
    assert frame["cursor"] == frame["timer"]["cursor"]
    assert (frame["heartbeat_ms"], frame["announce_at_ms"]) == (HEARTBEAT_MS, list(ANNOUNCE_AT_MS))
    assert frame["trace_id"] == f"trace-{AUCTION}"
    assert house.sample("auctions_gateway_resumes_total", recovered="true") == 0


@pytest.mark.requirement("B4")
async def test_a_resume_brings_exactly_what_was_missed_in_order() -> None:
    """Only this auction's events, only those behind the cursor, after the snapshot."""
    house = House()
    house.put(record(version=0))
    room = await room_in(house)
    for version in range(1, 6):
        extended(house, version)
        house.announce("timer.extended", record("a-2", version=version))
    await house.read_lane()
    for seen in range(6):
        snapshot, *missed = told(house.hub.greeting(room, f"0.{seen * 2}-0"))
        assert snapshot["recovered"] is True
        assert [frame["timer"]["version"] for frame in missed] == list(range(seen + 1, 6))
        assert [frame["cursor"] for frame in missed] == [f"0.{version * 2 - 1}-0" for version in range(seen + 1, 6)]
        assert all(frame["server_time"] == frame["timer"]["server_time"] == BORN_MS for frame in missed)
    assert house.sample("auctions_gateway_resumes_total", recovered="true") == 6


@pytest.mark.requirement("B4")
@pytest.mark.parametrize(
    "since",
    [
        "",
        "garbage",
        "0.3",
        "1.3-0",
        "0.99-0",
        "0.3-1",
        "-1.3-0",
        "0.3-0 ",
        "00000.3-0",
        "0." + "9" * 30 + "-0",
        "0.3-0\n",
    ],
)
async def test_a_cursor_that_is_not_of_here_is_not_recovered(since: str) -> None:
    """Garbage, another shard or a place that was not reached yet: a plain no, and only the snapshot."""
    house = House()
    house.put(record(version=0))
    room = await room_in(house)
    for version in range(1, 4):
        extended(house, version)
    await house.read_lane()
    frames = told(house.hub.greeting(room, since))
    assert [frame["recovered"] for frame in frames] == [False]
    assert house.sample("auctions_gateway_resumes_total", recovered="false") == 1


@pytest.mark.requirement("B4")
async def test_what_fell_out_of_memory_is_not_recovered() -> None:
    """The ring holds the last events; one who missed more than it holds is told so, one who did not gets them all."""
    house = House()
    house.hub._rings[0] = Ring(3)
    house.hub.start_at(0, START)
    house.put(record(version=0))
    room = await room_in(house)
    for version in range(1, 8):
        extended(house, version)
        await house.read_lane()
        for seen in range(version + 1):
            snapshot, *missed = told(house.hub.greeting(room, f"0.{seen}-0"))
            assert snapshot["recovered"] is (version - seen <= 3), (version, seen)
            if snapshot["recovered"]:
                assert [frame["timer"]["version"] for frame in missed] == list(range(seen + 1, version + 1))


@pytest.mark.requirement("B4")
async def test_what_came_before_this_process_is_not_recovered() -> None:
    """A gateway that began to read at an entry knows nothing from before it, and all from there on."""
    house = House()
    house.put(record(version=0))
    for version in range(1, 4):
        extended(house, version)
    house.hub.start_at(0, "2-0")
    await house.read_lane()
    room = await room_in(house)
    assert told(house.hub.greeting(room, "0.1-0"))[0]["recovered"] is False
    snapshot, missed = told(house.hub.greeting(room, "0.2-0"))
    assert (snapshot["recovered"], missed["timer"]["version"]) == (True, 3)


@pytest.mark.requirement("B4")
async def test_more_than_a_client_can_be_sent_at_once_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who missed more than the bound is told so and starts from the snapshot; up to the bound all of it comes."""
    house = House()
    house.put(record(version=0))
    room = await room_in(house)
    for version in range(1, 6):
        extended(house, version)
    await house.read_lane()
    body = len(house.memory.shards[0].updates[-1].body)
    monkeypatch.setattr(replay_module, "REPLAY_BYTES_MAX", 3 * body)
    frames = told(house.hub.greeting(room, "0.2-0"))
    assert [frame.get("recovered") for frame in frames] == [True, None, None, None]
    assert [frame["recovered"] for frame in told(house.hub.greeting(room, "0.1-0"))] == [False]


@pytest.mark.requirement("B3", "B4")
async def test_one_who_comes_back_in_the_midst_of_a_fan_out_gets_every_event_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a crowded room events wait in a queue: a resume then, with any cursor, is sent none of them twice and lacks none."""
    monkeypatch.setattr(fanout_module, "TURN", 8)
    monkeypatch.setattr(fanout_module, "CHUNK", 3)
    for moment in range(12):
        house = House()
        house.put(record(version=0))
        room = await room_in(house)
        crowd = [joined(room) for _ in range(20)]
        for version in range(1, 4):
            extended(house, version)
        await house.read_lane()
        for _ in range(moment):
            await asyncio.sleep(0)
        back: dict[int, Listener] = {}
        for seen in range(4):
            greeting = house.hub.greeting(room, f"0.{seen}-0")
            back[seen] = joined(room)
            back[seen].sent += [frame.socket for frame in greeting.missed.frames]
        for version in range(4, 6):
            extended(house, version)
        await house.read_lane()
        while house.hub.fanout.is_sending(room):
            await asyncio.sleep(0)
        for seen, listener in back.items():
            assert [frame["timer"]["version"] for frame in told(listener.sent)] == list(range(seen + 1, 6)), moment
        for listener in crowd:
            assert [frame["timer"]["version"] for frame in told(listener.sent)] == list(range(1, 6)), moment
        assert house.sample("auctions_gateway_delivery_ms_count", lane="event") == 5


# Coming in.


async def missing(house: House, count: int) -> Room:
    """A room whose events nobody was sent."""
    house.put(record(version=0))
    room = await room_in(house)
    for version in range(1, count + 1):
        extended(house, version)
    await house.read_lane()
    return room


@pytest.mark.requirement("B4", "R7")
async def test_what_was_sent_is_what_is_replayed() -> None:
    """Byte for byte, however many come back: nothing is made anew, so `server_time` is that of the first sending."""
    house = House()
    house.put(record(version=0))
    room = await room_in(house)
    listener = joined(room)
    for version in range(1, 4):
        extended(house, version)
    await house.read_lane()
    house.line.advance(60_000)
    for seen in range(3):
        missed = house.hub.greeting(room, f"0.{seen}-0").missed
        assert [frame.socket for frame in missed.frames] == listener.sent[seen:]
        assert [frame["server_time"] for frame in told(missed.frames)] == [BORN_MS] * (3 - seen)


@pytest.mark.requirement("B4", "R7")
async def test_what_nobody_was_sent_is_made_into_frames_once() -> None:
    """By the first one who missed it: later ones are sent the same frames, and who missed the same, the same bytes."""
    house = House()
    room = await missing(house, 3)
    house.line.advance(5_000)
    first = house.hub.greeting(room, "0.0-0")
    house.line.advance(60_000)
    second, third = house.hub.greeting(room, "0.1-0"), house.hub.greeting(room, "0.1-0")
    assert [id(frame) for frame in second.missed.frames] == [id(frame) for frame in first.missed.frames[1:]]
    assert second.socket[1] is third.socket[1]
    now = BORN_MS + 5_000
    for frame in told(first.missed.frames):
        assert (frame["server_time"], frame["timer"]["server_time"]) == (now, now)
        assert frame["timer"]["remaining_ms"] == frame["timer"]["ends_at"] - now
    assert told(third)[0]["server_time"] == BORN_MS + 65_000


async def test_who_brings_no_cursor_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first visit is no resume: it is let in while others take their turns."""
    monkeypatch.setattr(hub_module, "REPLAY_TURN", 1)
    house = House()
    room = await missing(house, 3)
    assert house.hub.entrance_now(AUCTION, "0.0-0") == Entrance(room, "0.0-0")
    assert house.hub.entrance_now(AUCTION, "0.0-0") is None
    assert house.hub.entrance_now(AUCTION, None) == Entrance(room, None)
    assert await house.hub.entrance(AUCTION, None) == Entrance(room, None)
    assert house.hub.entrance_now("a-2", None) is await house.hub.entrance("a-2", None) is None


@pytest.mark.requirement("B3", "B4", "R7")
async def test_a_crowd_that_comes_back_is_let_in_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of the loop greets so many and no more, those who came first before the others; ticks go out in between."""
    house = House()
    room = await missing(house, 20)
    cost = hub_module.GREETING_COST + house.hub.greeting(room, "0.0-0").missed.size
    house.hub._turns = Turns(3 * cost)
    watcher = joined(room)
    came: list[int] = []
    passes: list[int] = []

    async def come(number: int) -> None:
        entrance = await house.hub.entrance(AUCTION, "0.0-0")
        assert entrance is not None
        greeting = house.hub.greeting(entrance.room, entrance.since, entrance.recalled)
        assert len(told(greeting)) == 21
        came.append(number)

    coming = [asyncio.ensure_future(come(number)) for number in range(30)]
    while len(came) < 30:
        before = len(came)
        house.hub.on_ticks(0, tick_line(record(version=20), house.clock.now_ms()))
        await asyncio.sleep(0)
        passes.append(len(came) - before)
    await asyncio.gather(*coming)
    assert came == list(range(30))
    assert max(passes) == 3
    assert len(watcher.sent) == len(passes)


async def test_much_that_nobody_was_sent_is_made_into_frames_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that has just started has made none: the first one of a crowd costs a pass no more than the others."""
    house = House()
    await missing(house, 200)
    house.hub._turns = Turns(1)
    made: list[int] = []
    making = house.hub._make

    def counted(shard: int, stretch: Stretch, count: int) -> None:
        made.append(len(stretch.unmade))
        making(shard, stretch, count)
        made[-1] -= len(stretch.unmade)

    monkeypatch.setattr(house.hub, "_make", counted)
    assert house.hub.entrance_now(AUCTION, "0.0-0") is None
    passes = 0
    crowd = [asyncio.ensure_future(house.hub.entrance(AUCTION, "0.0-0")) for _ in range(3)]
    while not all(one.done() for one in crowd):
        await asyncio.sleep(0)
        passes += 1
    assert sum(made) == 200
    assert max(made) == hub_module.FRAMES_AT_ONCE
    assert passes > 200 / hub_module.FRAMES_AT_ONCE
    # What is left to be made is little: nobody has to wait for that.
    house.hub._turns = Turns(10**9)
    for version in range(201, 211):
        extended(house, version)
    await house.read_lane()
    assert house.hub.entrance_now(AUCTION, "0.0-0") is not None


@pytest.mark.requirement("R16")
async def test_a_room_that_is_dropped_while_somebody_waits_is_loaded_again() -> None:
    """A failover forgets rooms that nobody is in yet: who waits to come in comes into the one that is there then."""
    house = House()
    room = await missing(house, 5)
    house.hub._turns = Turns(1)
    waiting = [asyncio.ensure_future(house.hub.entrance(AUCTION, "0.5-0")) for _ in range(3)]
    await asyncio.sleep(0)
    await house.hub.reload(0, "failover")
    entrances = await asyncio.gather(*waiting)
    here = house.hub.known(AUCTION)
    assert here is not room
    assert [entrance.room for entrance in entrances[1:] if entrance is not None] == [here, here]


# Forgetting.


async def test_beyond_the_bound_the_longest_unused_rooms_are_forgotten_and_watched_ones_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory is bounded by what is watched: not even the oldest room goes while somebody is in it."""
    monkeypatch.setattr(hub_module, "ROOMS_MAX", 20)
    house = House()
    names = [f"n-{number}" for number in range(60)]
    for name in names:
        house.put(record(name))
    watched = [names[0], names[1], names[5]]
    for name in names:
        room = await room_in(house, name)
        if name in watched:
            joined(room)
        assert house.hub.known(name) is room, "a room that was just asked for is there"
        await room_in(house, names[2])  # used all the time
        assert sum(house.hub.known(other) is not None for other in names) <= 20
    assert all(house.hub.known(name) for name in watched)
    assert house.hub.known(names[2])
    assert house.hub.known(names[3]) is None


async def test_the_bound_holds_when_the_oldest_rooms_are_all_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets that stay for days do not keep the gateway from forgetting what is behind them."""
    monkeypatch.setattr(hub_module, "ROOMS_MAX", 20)
    house = House()
    for number in range(10):
        house.put(record(f"old-{number}"))
        joined(await room_in(house, f"old-{number}"))
    names = [f"new-{number}" for number in range(200)]
    for name in names:
        house.put(record(name))
        await room_in(house, name)
        assert sum(house.hub.known(other) is not None for other in names) <= 10
    assert all(house.hub.known(f"old-{number}") for number in range(10))


# The lane went back.


async def regressed(house: House, *, to: int) -> None:
    """A failover lost the entries behind `to`, so that their ids come again; the hub is told where the lane now ends."""
    del house.memory.shards[0].updates[to:]
    house.memory.shards[0].serial = to
    house.hub.start_at(0, await house.memory.last_update(0))
    await house.hub.reload(0, "failover")


@pytest.mark.requirement("R16", "B4")
async def test_after_a_lane_that_went_back_everyone_is_told_what_holds() -> None:
    """Watched rooms go back with the store and say `timer.resynced`; from there the lane counts again."""
    house = House()
    for version in range(2, 6):
        extended(house, version)
    await house.read_lane()
    room = await room_in(house)
    listener = joined(room)
    house.put(record(version=3, ends_at=ENDS_AT + 3_000))
    await regressed(house, to=2)
    (frame,) = told(listener.sent)
    assert (frame["type"], frame["cause"], frame["trace_id"]) == ("timer.resynced", "failover", f"trace-{AUCTION}")
    assert (frame["timer"]["version"], frame["timer"]["ends_at"]) == (3, ENDS_AT + 3_000)
    assert frame["cursor"] == frame["timer"]["cursor"] == "0.2-0"
    # A tick of the version that holds now passes, and so does the next event although its number was there before.
    house.hub.on_ticks(0, tick_line(record(version=3), EpochMs(BORN_MS)))
    extended(house, 4)
    await house.read_lane()
    assert [frame["type"] for frame in told(listener.sent)] == ["timer.resynced", "timer.tick", "timer.extended"]
    assert room.version == 4
    # What was lost was never there: a cursor from behind the place is not recovered.
    assert told(house.hub.greeting(room, "0.1-0"))[0]["recovered"] is False


@pytest.mark.requirement("R16", "B4")
async def test_an_auction_that_a_failover_took_back_sends_its_watchers_away() -> None:
    """Nothing can be told of an auction that is unknown again: 4102 for everyone, and a fresh look for who comes next."""
    house = House()
    house.put(record())
    room = await room_in(house)
    quick, slow, reader = joined(room), Listener(), Reader()
    room.lagging.add(slow)
    room.streams.add(reader)
    del house.memory.shards[0].timers[AUCTION]
    await house.hub.reload(0, "failover")
    assert quick.closed == slow.closed == reader.closed == [CloseCode.FEED_LOST]
    assert (quick.sent, slow.kept) == ([], [])
    assert house.hub.known(AUCTION) is None
    assert await house.hub.room(AUCTION) is None
    house.put(record(version=1))
    assert (await room_in(house)).version == 1


class Reader:
    """Implements `gateway.room.Stream`."""

    def __init__(self) -> None:
        self.closed: list[CloseCode] = []

    def event(self, frame: Frame) -> None:
        raise AssertionError("there is no event")

    def tick(self, frame: Frame) -> None:
        raise AssertionError("there is no tick")

    def close(self, code: CloseCode, reason: str) -> None:
        self.closed.append(code)


class Taking(Reader):
    """One that takes everything."""

    def event(self, frame: Frame) -> None:
        """There is one."""

    def tick(self, frame: Frame) -> None:
        """There is one."""


@pytest.mark.requirement("R16", "B3")
async def test_bids_between_our_place_and_what_is_read_anew_are_still_told() -> None:
    """The view of a reload has seen events that the feed has not read yet: a bid is in no timer, so it must still come."""
    house = House()
    for version in range(2, 6):
        extended(house, version)
    await house.read_lane()
    room = await room_in(house)
    listener = joined(room)
    house.put(record(version=3, ends_at=ENDS_AT + 3_000))
    del house.memory.shards[0].updates[2:]
    house.memory.shards[0].serial = 2
    house.hub.start_at(0, await house.memory.last_update(0))
    # Before the reload gets its answer, the new primary commits on.
    house.announce("bid.accepted", record(version=3, ends_at=ENDS_AT + 3_000), bid_id="b-1")
    extended(house, 4)
    await house.hub.reload(0, "failover")
    assert room.version == 4
    house.announce("bid.accepted", record(version=4, ends_at=ENDS_AT + 4_000), bid_id="b-2")
    await house.read_lane()
    frames = told(listener.sent)
    assert [(frame["type"], frame.get("bid_id")) for frame in frames] == [
        ("timer.resynced", None),
        ("bid.accepted", "b-1"),
        ("timer.extended", None),
        ("bid.accepted", "b-2"),
    ]
    assert frames[0]["timer"]["version"] == 4
    assert [frame["cursor"] for frame in frames] == ["0.2-0", "0.3-0", "0.4-0", "0.5-0"]
    # Who comes back with the cursor of what it was told last gets the rest, once.
    snapshot, *missed = told(house.hub.greeting(room, "0.3-0"))
    assert snapshot["recovered"] is True
    assert [frame["cursor"] for frame in missed] == ["0.4-0", "0.5-0"]


@pytest.mark.parametrize("vanished", [False, True])
async def test_a_room_that_is_forgotten_while_it_is_read_anew_stops_nothing(*, vanished: bool) -> None:
    """A reload waits for the store between two rooms, and meanwhile others are loaded, forgotten, and loaded again."""
    house = House()
    for name in ("a-1", "a-2"):
        house.put(record(name))
    first = await room_in(house, "a-1")
    watcher = joined(first)
    forgotten = await room_in(house, "a-2")
    house.store.before_view.clear()
    reloading = asyncio.ensure_future(house.hub.reload(0, "failover"))
    while house.store.calls["view"] < 3:
        await asyncio.sleep(0)
    # Its watcher leaves, both rooms are forgotten as they are beyond the bound, and one of them is loaded anew.
    first.writable.clear()
    house.hub._rooms.clear()
    if vanished:
        del house.memory.shards[0].timers["a-1"]
    house.store.before_view.set()
    again = await room_in(house, "a-2")
    await reloading
    assert again is not forgotten
    assert house.hub.known("a-2") is again, "what was read after the failover is no worse for it"
    assert watcher.sent == []


async def test_rooms_that_nobody_watches_are_read_anew_when_they_are_wanted() -> None:
    """After a regress nothing old is left in memory, and nothing is read for nobody; other shards are not touched."""
    house = House(shards=2)
    mine = next(name for name in (f"x-{n}" for n in range(9)) if shard_of(name, 2) == 0)
    other = next(name for name in (f"x-{n}" for n in range(9)) if shard_of(name, 2) == 1)
    for name in (mine, other):
        house.put(record(name))
        await room_in(house, name)
    listener = joined(await room_in(house, other))
    house.store.calls.clear()
    await house.hub.reload(0, "failover")
    assert house.store.calls["view"] == 0
    assert house.hub.known(mine) is None
    assert house.hub.known(other) is not None
    assert listener.sent == []


async def test_an_auction_that_ended_in_what_was_read_anew_is_reported() -> None:
    """Watchers of an auction that turns out to be over are let go as if the event had come."""
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    listener = joined(room)
    over: list[Room] = []
    house.hub.on_over = over.append
    house.put(record(version=2, status=Status.ENDED))
    await house.hub.reload(0, "failover")
    assert over == [room]
    assert told(listener.sent)[0]["timer"]["status"] == "ENDED"


async def test_an_auction_that_is_gone_or_unreadable_after_a_regress_stops_nothing() -> None:
    """A room whose auction cannot be read keeps what it knew; the rooms behind it are read all the same."""
    house = House()
    for name in ("a-1", "a-2", "a-3"):
        house.put(record(name))
        joined(await room_in(house, name))
    last = next(iter((await room_in(house, "a-3")).writable))
    assert isinstance(last, Listener)
    del house.memory.shards[0].timers["a-1"]
    house.memory.shards[0].timers["a-2"]["version"] = "nonsense"
    with pytest.raises(CorruptTimerError):
        await house.memory.view(0, "a-2")
    await house.hub.reload(0, "failover")
    assert [frame["type"] for frame in told(last.sent)] == ["timer.resynced"]


# The tick lane.


@pytest.mark.requirement("B3")
async def test_a_tick_is_passed_on_byte_for_byte() -> None:
    """The gateway frames what the engine wrote and never looks inside, not even to parse it."""
    house = House()
    house.put(record(version=2))
    listener = joined(await room_in(house))
    line = tick_line(record(version=2), EpochMs(BORN_MS + 1))
    strange = b"%s 2  {no json,  \xff  two  spaces } " % AUCTION.encode()
    house.hub.on_ticks(0, line)
    house.hub.on_ticks(0, strange)
    assert [payload(frame) for frame in listener.sent] == [
        line.partition(b" 2 ")[2],
        b" {no json,  \xff  two  spaces } ",
    ]


@pytest.mark.requirement("B3")
async def test_ticks_never_take_back_what_the_event_lane_told() -> None:
    """A tick of an older version than the last event is dropped, of the same or a newer one it passes."""
    house = House()
    house.put(record(version=1))
    listener = joined(await room_in(house))
    extended(house, 5)
    await house.read_lane()
    listener.sent.clear()
    for version in (4, 5, 6, 3):
        house.hub.on_ticks(0, tick_line(record(version=version), EpochMs(BORN_MS)))
    assert [frame["version"] for frame in told(listener.sent)] == [5, 6]


@pytest.mark.requirement("B3")
async def test_a_crowd_that_is_being_told_an_event_is_not_written_its_tick_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event has the same timer: its tick is conflated. One that is newer, or comes when everyone was told, is sent."""
    monkeypatch.setattr(fanout_module, "TURN", 8)
    house = House()
    house.put(record(version=1))
    room = await room_in(house)
    crowd = [joined(room) for _ in range(20)]
    room.streams.add(Taking())

    def tick(version: int) -> None:
        house.hub.on_ticks(0, tick_line(record(version=version), EpochMs(BORN_MS)))

    extended(house, 2)
    await house.read_lane()
    tick(2)
    assert house.sample("auctions_gateway_conflated_ticks_total") == 21
    tick(3)
    while house.hub.fanout.is_sending(room):
        await asyncio.sleep(0)
    tick(3)
    while house.hub.fanout.is_sending(room):
        await asyncio.sleep(0)
    for listener in crowd:
        frames = [(frame["type"], frame.get("version")) for frame in told(listener.sent)]
        assert frames == [("timer.extended", None), ("timer.tick", 3), ("timer.tick", 3)]
    assert house.sample("auctions_gateway_conflated_ticks_total") == 21


@pytest.mark.parametrize(
    "line", [b"", b"a-1", b"a-1 ", b"a-1 x {}", b"a-1  {}", b"nobody 1 {}", b"! e", b"! e 1 soon", b"!"]
)
async def test_a_line_that_is_no_tick_is_passed_over(line: bytes) -> None:
    """Whatever stands on the channel, the lines around it are delivered."""
    house = House()
    house.put(record(version=1))
    listener = joined(await room_in(house))
    good = tick_line(record(version=1), EpochMs(BORN_MS))
    house.hub.on_ticks(0, good + b"\n" + line)
    house.hub.on_ticks(0, line + b"\n" + good)
    assert len(listener.sent) == 2
    assert 0 not in house.hub.engine_seen


async def test_a_heartbeat_says_that_the_engine_of_its_shard_lives() -> None:
    """When it was heard counts for readiness; it is delivered to nobody, so it takes no time either."""
    house = House(shards=2)
    house.line.advance(25)
    house.hub.on_ticks(1, heartbeat_line("engine-1", 3, EpochMs(BORN_MS)))
    assert house.hub.engine_seen == {1: BORN_MS + 25}
    assert house.sample("auctions_gateway_delivery_ms_count", lane="tick") == 0


async def test_an_unwatched_room_gets_no_ticks() -> None:
    """A tick for an auction that is known but not watched is dropped without a frame, and not measured."""
    house = House()
    house.put(record())
    room = await room_in(house)
    house.hub.on_ticks(0, tick_line(record(), EpochMs(BORN_MS)))
    assert not room.is_watched
    assert house.sample("auctions_gateway_delivery_ms_count", lane="tick") == 0


@pytest.mark.parametrize("crowd", [[3], [20], [3, 20]])
async def test_a_tick_is_delivered_when_the_last_of_the_room_has_it(
    crowd: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the stamp of its message to the end of its fan-out: once for each room, whatever else the message says."""
    monkeypatch.setattr(fanout_module, "TURN", 8)
    house = House()
    lines = [tick_line(record("nobody-watches"), EpochMs(BORN_MS + 9))]
    rooms = []
    for number, watchers in enumerate(crowd):
        house.put(record(f"r-{number}"))
        rooms.append(await room_in(house, f"r-{number}"))
        for _ in range(watchers):
            joined(rooms[-1])
        lines.append(tick_line(record(f"r-{number}"), EpochMs(BORN_MS + 10)))
    house.put(record("nobody-watches"))
    await room_in(house, "nobody-watches")
    house.line.advance(15)
    house.hub.on_ticks(0, b"\n".join([*lines, heartbeat_line("engine-1", 3, EpochMs(BORN_MS + 10))]))
    house.line.advance(100)
    while any(house.hub.fanout.is_sending(room) for room in rooms):
        await asyncio.sleep(0)
    at_once = crowd.count(3)
    assert house.sample("auctions_gateway_delivery_ms_count", lane="tick") == len(crowd)
    assert house.sample("auctions_gateway_delivery_ms_sum", lane="tick") == 5 * at_once + 105 * (len(crowd) - at_once)


async def test_a_tick_that_is_replaced_is_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a newer tick or an event has taken the place of, before all of the room had it, is not measured."""
    monkeypatch.setattr(fanout_module, "TURN", 8)
    house = House()
    house.put(record(version=2))
    room = await room_in(house)
    for _ in range(20):
        joined(room)
    # The first is half-way when the second comes, which everyone gets; the fourth takes the place of the third.
    for at in (0, 10, 20, 30):
        house.hub.on_ticks(0, tick_line(record(version=2), EpochMs(BORN_MS + at)))
    house.line.advance(50)
    while house.hub.fanout.is_sending(room):
        await asyncio.sleep(0)
    assert house.sample("auctions_gateway_delivery_ms_count", lane="tick") == 2
    assert house.sample("auctions_gateway_delivery_ms_sum", lane="tick") == 40 + 20
    house.hub.on_ticks(0, tick_line(record(version=2), EpochMs(BORN_MS + 30)))
    extended(house, 3)
    await house.read_lane()
    house.hub.on_ticks(0, tick_line(record(version=3), EpochMs(BORN_MS + 40)))
    while house.hub.fanout.is_sending(room):
        await asyncio.sleep(0)
    assert house.sample("auctions_gateway_delivery_ms_count", lane="tick") == 2
    assert house.sample("auctions_gateway_delivery_ms_count", lane="event") == 1


@pytest.mark.parametrize(
    "tick", [b"{}", b"nonsense", b'{"server_time":"soon"}', b'{"x":"' + b"y" * 300 + b'","server_time":1}']
)
async def test_a_tick_without_a_stamp_is_passed_on_and_not_measured(tick: bytes) -> None:
    """Only where the stamp must stand it is looked for; what the frame is otherwise is none of the gateway's business."""
    house = House()
    house.put(record())
    listener = joined(await room_in(house))
    house.hub.on_ticks(0, b"%s 2 %s" % (AUCTION.encode(), tick))
    assert [payload(frame) for frame in listener.sent] == [tick]
    assert house.sample("auctions_gateway_delivery_ms_count", lane="tick") == 0


@pytest.mark.requirement("B3")
async def test_a_long_life_with_ticks_and_events_mixed_only_goes_forward() -> None:
    """Whatever the order of the lanes, no watcher ever sees a version smaller than one an event has shown."""
    dice = random.Random(20)
    house = House()
    house.put(record(version=1))
    listener = joined(await room_in(house))
    version = 1
    for _ in range(400):
        if dice.random() < 0.2:
            version += 1
            extended(house, version)
        if dice.random() < 0.5:
            await house.read_lane(count=1)
        stale_version = max(1, version - dice.randrange(3))
        house.hub.on_ticks(0, tick_line(record(version=stale_version), EpochMs(BORN_MS)))
    await house.read_lane()
    told_version, events = 0, []
    for frame in told(listener.sent):
        if frame["type"] == "timer.tick":
            assert frame["version"] >= told_version
        else:
            told_version = frame["timer"]["version"]
            events.append(told_version)
    assert events == list(range(2, version + 1))


def test_every_frame_is_json_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is one JSON object in UTF-8, as the contract says of every server frame."""

    async def scenario() -> Any:
        house = House()
        house.put(record())
        return house.hub.greeting(await room_in(house), None)

    (frame,) = asyncio.run(scenario())
    assert isinstance(orjson.loads(frame.payload), dict)
