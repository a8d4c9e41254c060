"""Tests for gateway.recall: what the rings have forgotten is looked up in the lane."""

import asyncio
import random
from typing import Any

import pytest

from engine.contract.cursors import START
from engine.contract.timers import tick_line, timer
from engine.store.link import RedisLink
from engine.store.protocol import StoreUnavailableError, UpdateEntry
from engine.store.redis import RedisStore
from gateway import feeds as feeds_module
from gateway import recall as recall_module
from gateway import replay as replay_module
from gateway.feeds import EventFeed
from gateway.hub import Hub
from gateway.recall import Recalled
from gateway.ring import Ring
from gateway.room import Room
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, House, Listener, record, told
from tests.gateway.peers import PATH, Peer
from tests.servers import Server

OTHERS = ("a-2", "a-3")


def lived(events: int, *, ring: int = 4, read: int | None = None) -> House:
    """A lane in which entry n is the version n of the auction whose turn it is, of three; each tenth is for the event bus."""
    house = House()
    house.hub._rings[0] = Ring(ring)
    house.hub.start_at(0, START)
    for number in range(1, events + 1):
        write(house, number)
    house.hub.on_updates(0, house.memory.shards[0].updates[:read])
    return house


def write(house: House, number: int) -> None:
    """The next entry of the lane."""
    auction_id = (AUCTION, *OTHERS)[number % 3]
    if number % 10:
        house.announce("timer.extended", record(auction_id, version=number))
    else:
        house.append(auction_id, "auction_timer_started", b"{}")


def due(auction_id: str, behind: int, upto: int) -> list[int]:
    """The versions that somebody missed."""
    names = (AUCTION, *OTHERS)
    return [n for n in range(behind + 1, upto + 1) if names[n % 3] == auction_id and n % 10]


def found(recalled: Recalled | None) -> list[int] | None:
    """Which entries were found."""
    return None if recalled is None else [event.order[0] for event in recalled.events]


async def asked(house: House, auction_id: str, behind: int, seq: int = 0) -> list[int] | None:
    """What is found behind a place."""
    return found(await house.hub._recall.events(0, auction_id, (behind, seq)))


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are many."""
    monkeypatch.setattr(recall_module, "PAGE", 4)


@pytest.mark.requirement("B4")
@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_every_place_of_the_lane_is_found_and_what_is_behind_it(length: int) -> None:
    """Whatever the auction and the place, down to the first entry, in a ring of any length: each event once, in order."""
    house = lived(31, ring=length)

    async def scenario() -> None:
        edge = house.hub._rings[0].complete_from[0]
        assert edge > 10
        for auction_id in (AUCTION, *OTHERS, "quiet"):
            for behind in range(1, edge):
                assert await asked(house, auction_id, behind) == due(auction_id, behind, 31), behind
        assert not house.hub._recall._asked

    run(house.line, scenario)


@pytest.mark.requirement("B4")
def test_a_cursor_that_is_no_place_costs_one_look() -> None:
    """Of a lost history, or older than the first entry that is kept: nothing is searched, and nothing promised."""
    house = lived(40)
    del house.memory.shards[0].updates[:10]

    async def scenario() -> None:
        for behind, seq in ((12, 5), (10, 0), (3, 0), (0, 0)):
            house.store.calls.clear()
            assert await asked(house, AUCTION, behind, seq) is None
            assert house.store.calls["recent_updates"] == 1
        assert await asked(house, AUCTION, 11) == due(AUCTION, 11, 40)
        # Beside one that is found, too; and nothing is read for it that is older than what the others want.
        house.store.calls.clear()
        both = await asyncio.gather(
            asked(house, AUCTION, 12, 5), asked(house, AUCTION, 20), asked(house, AUCTION, 22, 1)
        )
        assert both == [None, due(AUCTION, 20, 40), None]
        assert house.store.calls["recent_updates"] == 2 + 5

    run(house.line, scenario)


@pytest.mark.requirement("B4")
def test_a_crowd_costs_one_search() -> None:
    """Who misses the same shares the answer; who misses something else of the shard, the reading."""
    house = lived(40)

    async def scenario() -> None:
        alone = await asked(house, AUCTION, 5)
        cost = house.store.calls["recent_updates"]
        house.store.calls.clear()
        crowd = [house.hub._recall.events(0, AUCTION, (5, 0)) for _ in range(100)]
        others = [house.hub._recall.events(0, name, (behind, 0)) for name in OTHERS for behind in range(6, 30)]
        answers = await asyncio.gather(*crowd, *others)
        assert house.store.calls["recent_updates"] == cost
        assert all(answer is answers[0] for answer in answers[:100])
        assert found(answers[0]) == alone
        assert [found(answer) for answer in answers[100:]] == [
            due(name, behind, 40) for name in OTHERS for behind in range(6, 30)
        ]

    run(house.line, scenario)


def test_who_comes_during_a_search_shares_it_or_waits_for_the_next() -> None:
    """One search at a time, whatever the shards: a client that asks on and on takes no more than a part of the loop."""
    house = lived(40)
    searching = 0

    async def scenario() -> None:
        nonlocal searching
        whole = house.store.inner.recent_updates

        async def watched(*args: Any, **options: Any) -> list[UpdateEntry]:
            nonlocal searching
            searching += 1
            await asyncio.sleep(0.001)
            assert searching == 1
            searching -= 1
            result: list[UpdateEntry] = await whole(*args, **options)
            return result

        house.memory.recent_updates = watched  # type: ignore[method-assign]
        first = asyncio.ensure_future(house.hub._recall.events(0, AUCTION, (2, 0)))
        await asyncio.sleep(0.005)
        same = asyncio.ensure_future(house.hub._recall.events(0, AUCTION, (2, 0)))
        later = asyncio.ensure_future(house.hub._recall.events(0, AUCTION, (20, 0)))
        assert await same is await first
        assert not later.done()
        assert found(await later) == due(AUCTION, 20, 40)

    run(house.line, scenario)


def test_one_that_went_away_takes_nobody_with_it() -> None:
    """A client that hangs up while it waits leaves the search to the others."""
    house = lived(40)

    async def scenario() -> None:
        gone = asyncio.ensure_future(house.hub._recall.events(0, AUCTION, (5, 0)))
        stays = asyncio.ensure_future(house.hub._recall.events(0, AUCTION, (5, 0)))
        await asyncio.sleep(0)
        gone.cancel()
        assert found(await stays) == due(AUCTION, 5, 40)
        assert gone.cancelled()

    run(house.line, scenario)


@pytest.mark.requirement("B4")
def test_more_than_is_replayed_ends_the_search_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what it will not be sent: nothing older is read for an auction of which too much was found."""
    house = lived(60, ring=6)
    size = max(len(entry.body) for entry in house.memory.shards[0].updates if entry.auction_id == AUCTION)
    monkeypatch.setattr(replay_module, "REPLAY_BYTES_MAX", 5 * size)

    async def scenario() -> None:
        assert [len(due(AUCTION, behind, 60)) for behind in (44, 41)] == [5, 6]
        alone = await asyncio.gather(*(asked(house, AUCTION, behind) for behind in (3, 41, 44)))
        assert alone == [None, None, due(AUCTION, 44, 60)]
        assert house.store.calls["recent_updates"] < 10
        # For another auction it goes on.
        both = await asyncio.gather(asked(house, AUCTION, 3), asked(house, "quiet", 3))
        assert both == [None, []]
        # What the ring holds may be too much by itself.
        monkeypatch.setattr(replay_module, "REPLAY_BYTES_MAX", size)
        house.store.calls.clear()
        assert await asked(house, AUCTION, 52) is None
        assert house.store.calls["recent_updates"] == 1

    run(house.line, scenario)


def test_a_search_goes_back_so_far_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that is kept longer than a handshake waits is not read through; who is nearer is answered all the same."""
    monkeypatch.setattr(recall_module, "LOOKBACK_MAX", 12)
    house = lived(60)

    async def scenario() -> None:
        assert await asyncio.gather(asked(house, AUCTION, 3), asked(house, AUCTION, 50)) == [None, due(AUCTION, 50, 60)]
        assert house.store.calls["recent_updates"] <= 1 + 12 / 2

    run(house.line, scenario)


@pytest.mark.requirement("R16")
def test_a_store_that_is_away_promises_nothing() -> None:
    """At the first look or in the midst of the search: everyone is answered, and the next search is a fresh one."""
    house = lived(40)

    async def scenario() -> None:
        house.store.failing["recent_updates"] = StoreUnavailableError("away")
        assert await asyncio.gather(*(asked(house, AUCTION, behind) for behind in (4, 5, 5))) == [None] * 3
        house.store.failing.clear()
        waiting = asyncio.ensure_future(asked(house, AUCTION, 5))
        await asyncio.sleep(recall_module.REST_S * 1.5)
        house.store.failing["recent_updates"] = StoreUnavailableError("away")
        assert await waiting is None
        house.store.failing.clear()
        assert await asked(house, AUCTION, 5) == due(AUCTION, 5, 40)

    run(house.line, scenario)


@pytest.mark.requirement("R16")
def test_a_search_that_fails_leaves_the_other_shards_to_the_next() -> None:
    """Whoever waits for something of another shard is answered all the same."""
    house = House(shards=2)
    for shard in (0, 1):
        house.hub.start_at(shard, "9-0")

    async def scenario() -> None:
        house.store.failing["recent_updates"] = StoreUnavailableError("away")
        asking = [house.hub._recall.events(shard, AUCTION, (5, 0)) for shard in (0, 1)]
        assert await asyncio.gather(*asking) == [None, None]
        assert house.store.calls["recent_updates"] == 2

    run(house.line, scenario)


@pytest.mark.requirement("R16", "B4")
def test_a_failover_ends_a_search() -> None:
    """What was read may be of a history that is lost; and what the ring has known since then is not looked up."""
    house = lived(40)

    async def scenario() -> None:
        waiting = asyncio.ensure_future(asked(house, AUCTION, 5))
        await asyncio.sleep(recall_module.REST_S * 1.5)
        house.hub.start_at(0, "38-0")
        assert await waiting is None
        cost = house.store.calls["recent_updates"]
        assert await asked(house, AUCTION, 39) is None
        assert house.store.calls["recent_updates"] == cost + 1

    run(house.line, scenario)


@pytest.mark.requirement("R16", "B4")
def test_events_of_two_histories_are_not_put_together() -> None:
    """The ring moved on during a search; what came meanwhile is looked up, and if it is of another history, nothing holds."""
    house = lived(40)
    inner, searches = house.memory.recent_updates, 0

    async def failing_over(shard: int, count: int, upto: str | None = None) -> list[UpdateEntry]:
        nonlocal searches
        searches += count == 1  # each begins with a look at the oldest place
        if (searches, count) == (2, 1):
            house.hub.start_at(0, house.hub.positions[0])
        return await inner(shard, count, upto)

    async def scenario() -> None:
        house.memory.recent_updates = failing_over  # type: ignore[method-assign]
        waiting = asyncio.ensure_future(asked(house, AUCTION, 5))
        await asyncio.sleep(recall_module.REST_S * 1.5)
        for number in range(41, 61):
            write(house, number)
        await house.read_lane()
        assert await waiting is None
        assert searches == 2

    run(house.line, scenario)


@pytest.mark.requirement("R16", "B4")
def test_what_was_found_before_a_failover_is_not_sent_after_it() -> None:
    """Who comes back is told that events are lost, though they were found."""
    house = lived(40)

    async def scenario() -> None:
        room = await house.hub.room(AUCTION)
        assert room is not None
        recalled = await house.hub._recall.events(0, AUCTION, (5, 0))
        assert house.hub.greeting(room, "0.5-0", recalled).recovered is True
        house.hub.start_at(0, "40-0")
        assert house.hub.greeting(room, "0.5-0", recalled).recovered is False

    run(house.line, scenario)


def test_others_are_served_between_the_pages() -> None:
    """A search is a read and a rest, again and again: ticks go out meanwhile."""
    house = lived(60)
    listener = Listener()

    async def scenario() -> None:
        room = await house.hub.room("a-2")
        assert room is not None
        room.writable.add(listener)
        searching = asyncio.ensure_future(asked(house, AUCTION, 2))
        while not searching.done():
            house.hub.on_ticks(0, tick_line(record("a-2", version=60), house.clock.now_ms()))
            await asyncio.sleep(recall_module.REST_S)
        assert house.store.calls["recent_updates"] > 15

    run(house.line, scenario)
    assert len(listener.sent) > 15


# Coming back after a long time.


@pytest.mark.requirement("B4", "R7")
def test_a_socket_that_was_away_for_long_gets_everything_it_missed() -> None:
    """It is let in when that was read: the snapshot, what it missed, and what came meanwhile, each once, in order."""
    house = lived(60, ring=12)

    async def scenario() -> None:
        await house.hub.room(AUCTION)
        peers = [Peer(house.door, f"{PATH}?since=0.{behind}-0").knock() for behind in (2, 2, 30, 40)]
        assert not any(peer.read() or peer.response for peer in peers)
        for number in range(61, 120):
            await asyncio.sleep(recall_module.REST_S)
            write(house, number)
            await house.read_lane()
        await asyncio.sleep(1)
        for peer, behind in zip(peers, (2, 2, 30, 40), strict=True):
            snapshot, *rest = peer.told()
            assert snapshot["recovered"] is True
            assert [frame["timer"]["version"] for frame in rest] == due(AUCTION, behind, 119)
        assert house.sample("auctions_gateway_resumes_total", recovered="true") == 4

    run(house.line, scenario)


@pytest.mark.requirement("B4")
def test_a_socket_that_was_away_for_too_long_is_told_so() -> None:
    """And so is one whose cursor is of nowhere: let in all the same, with the snapshot only."""
    house = lived(60)
    del house.memory.shards[0].updates[:20]

    async def scenario() -> None:
        await house.hub.room(AUCTION)
        peers = [Peer(house.door, f"{PATH}?since=0.{since}").knock() for since in ("10-0", "30-5", "0-0")]
        await asyncio.sleep(1)
        assert [[frame["recovered"] for frame in peer.told()] for peer in peers] == [[False]] * 3

    run(house.line, scenario)


@pytest.mark.requirement("R16")
async def test_while_redis_is_away_nobody_waits_for_it() -> None:
    """What the ring has forgotten cannot be looked up: the countdown is shown at once."""
    house = lived(60)
    room = await house.hub.room(AUCTION)
    assert room is not None
    house.hub.stale = lambda: True
    house.store.calls.clear()
    peer = Peer(house.door, f"{PATH}?since=0.2-0").knock()
    assert [frame["recovered"] for frame in peer.told()] == [False]
    assert house.store.calls["recent_updates"] == 0


@pytest.mark.requirement("B3", "B4")
def test_whenever_somebody_comes_back_it_gets_every_event_once() -> None:
    """A long life: a short ring, events at any moment, clients who come with any cursor and stay: none lost, none doubled."""
    dice = random.Random(7)
    house = lived(30, ring=10)
    last = 30
    here: list[tuple[Listener, int]] = []
    recovered = 0

    async def come_back(behind: int) -> None:
        nonlocal recovered
        since = f"0.{behind}-0"
        entrance = house.hub.entrance_now(AUCTION, since)
        if entrance is None:
            entrance = await house.hub.entrance(AUCTION, since)
        assert entrance is not None
        listener = Listener()
        entrance.room.writable.add(listener)
        greeting = house.hub.greeting(entrance.room, since, entrance.recalled)
        assert greeting.recovered is True
        listener.sent += [frame.socket for frame in greeting.missed.frames]
        assert greeting.socket[1:] == ([b"".join(listener.sent)] if listener.sent else [])
        here.append((listener, behind))
        recovered += entrance.recalled is not None

    async def scenario() -> None:
        nonlocal last
        coming = []
        for _ in range(300):
            choice = dice.random()
            if choice < 0.3:
                coming.append(asyncio.ensure_future(come_back(dice.randrange(1, last + 1))))
            elif choice < 0.8:
                last += 1
                write(house, last)
                if dice.random() < 0.7:
                    await house.read_lane()
            else:
                await asyncio.sleep(dice.random() * 0.02)
            coming = [task for task in coming if not task.done() or await task]
        await house.read_lane()
        await asyncio.gather(*coming)
        await asyncio.sleep(1)
        assert len(here) > 60
        assert recovered > 20
        for listener, behind in here:
            assert [frame["timer"]["version"] for frame in told(listener.sent)] == due(AUCTION, behind, last)

    run(house.line, scenario)


@pytest.mark.integration
@pytest.mark.requirement("B4")
async def test_who_watched_the_gateway_before_misses_nothing_of_a_real_lane(
    valkey_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that has just started reads back a little; who missed more than that gets it from the server."""
    monkeypatch.setattr(feeds_module, "RECENT_MAX", 20)
    house = House()
    lane = "auction:updates:{0}"
    ids = []
    for number in range(1, 201):
        entry = house.announce("timer.extended", record((AUCTION, "a-2")[number % 2], version=number))
        written = {"type": entry.type, "auction_id": entry.auction_id, "body": entry.body.decode()}
        ids.append(valkey_server.ask("XADD", lane, "*", *(part for pair in written.items() for part in pair)))
    link = RedisLink(valkey_server.url, house.machine)
    try:
        store = RedisStore(link, house.machine)
        hub = Hub(store, house.clock, 1, house.metrics)
        await EventFeed(store, hub, house.machine, 1).start()
        hub._rooms[AUCTION.encode()] = Room(AUCTION, 0)
        hub._rooms[AUCTION.encode()].show(timer(record(version=200), house.clock.now_ms(), None))
        for seen in (1, 100, 170, 190):
            since = f"0.{ids[seen - 1]}"
            assert (hub.entrance_now(AUCTION, since) is None) is (seen < 180)
            entrance = await hub.entrance(AUCTION, since)
            assert entrance is not None
            snapshot, *missed = told(hub.greeting(entrance.room, since, entrance.recalled))
            assert snapshot["recovered"] is True
            assert [frame["timer"]["version"] for frame in missed] == [n for n in range(seen + 1, 201) if n % 2 == 0]
    finally:
        await link.close()
