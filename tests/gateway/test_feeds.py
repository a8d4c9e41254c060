"""Tests for gateway.feeds: two loops that no fault of the store ends."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.contract.timers import tick_line
from engine.domain.instants import EpochMs
from engine.store.link import RedisRefusedError
from engine.store.protocol import StoreError, StoreUnavailableError
from gateway import fanout as fanout_module
from gateway import feeds as feeds_module
from gateway.feeds import BACKOFF_S, BLOCK_MS, READ_MAX, EventFeed, TickFeed
from tests.fakes.clock import BORN_MS
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, House, Listener, record, told

FAULTS = [StoreUnavailableError("away"), RedisRefusedError("NOPERM")]


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator["asyncio.Task[None]"]:
    """A loop that runs beside the test, and must still run at its end."""
    task = asyncio.create_task(work)
    try:
        yield task
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def watched(house: House, auction_id: str = AUCTION) -> Listener:
    """A subscriber in the room of an auction."""
    room = await house.hub.room(auction_id)
    assert room is not None
    listener = Listener()
    room.writable.add(listener)
    return listener


def commit(house: House, version: int, auction_id: str = AUCTION) -> None:
    """The engine commits an extension, and whoever blocks on the lane wakes up."""
    house.announce("timer.extended", record(auction_id, version=version))
    house.memory._grow()


def versions(listener: Listener) -> list[int]:
    """What a subscriber was told of, by version."""
    return [frame["timer"]["version"] for frame in told(listener.sent)]


@pytest.mark.requirement("B3")
def test_the_event_feed_delivers_what_is_committed_from_where_it_started() -> None:
    """Entries from before the start are part of what is loaded; those behind it come once, in order, in any number."""
    house = House(shards=1)

    async def scenario() -> None:
        house.put(record(version=1))
        for version in (2, 3):
            commit(house, version)
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        assert house.hub.positions == {0: "2-0"}
        listener = await watched(house)
        async with running(feed.run()):
            for version in range(4, 6):
                commit(house, version)
                await asyncio.sleep(0.01)
            for version in range(6, 6 + 2 * READ_MAX):
                commit(house, version)
            await asyncio.sleep(0.01)
        assert versions(listener) == list(range(4, 6 + 2 * READ_MAX))

    run(house.line, scenario)


@pytest.mark.requirement("R16")
def test_a_quiet_lane_is_fresh_as_long_as_the_store_answers() -> None:
    """An empty answer is an answer: an hour without events leaves nothing stale."""
    house = House()

    async def scenario() -> None:
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        async with running(feed.run()):
            for _ in range(100):
                await asyncio.sleep(BLOCK_MS / 1_000)
                assert feed.is_fresh

    run(house.line, scenario)


@pytest.mark.requirement("R16", "B3")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_the_event_feed_goes_on_where_it_was_after_an_outage(fault: StoreError) -> None:
    """While the store is away the feed is stale and tries again; then every event of the outage comes, each once."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=1))
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        listener = await watched(house)
        async with running(feed.run()):
            commit(house, 2)
            await asyncio.sleep(0.01)
            house.store.failing["follow"] = fault
            commit(house, 3)
            await asyncio.sleep(10)
            assert not feed.is_fresh
            assert house.store.calls["follow"] < 10 / BACKOFF_S + 5, "it must not spin"
            house.store.failing.clear()
            commit(house, 4)
            await asyncio.sleep(2 * BACKOFF_S)
            assert feed.is_fresh
        assert versions(listener) == [2, 3, 4]
        assert house.store.calls["view"] == 1

    run(house.line, scenario)


@pytest.mark.requirement("R16", "B4")
def test_a_lane_that_ends_before_our_place_is_started_over_there() -> None:
    """A failover that lost entries is noticed after the outage: watchers are told what holds, then what comes."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=1))
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        listener = await watched(house)
        async with running(feed.run()):
            for version in (2, 3, 4):
                commit(house, version)
            await asyncio.sleep(0.01)
            fail(house)
            await asyncio.sleep(1)
            del house.memory.shards[0].updates[1:]
            house.memory.shards[0].serial = 1
            house.put(record(version=2))
            house.store.failing.clear()
            await asyncio.sleep(2 * BACKOFF_S)
            assert house.hub.positions == {0: "1-0"}
            commit(house, 3)
            await asyncio.sleep(0.01)
        frames = told(listener.sent)[3:]
        assert [(frame["type"], frame["timer"]["version"]) for frame in frames] == [
            ("timer.resynced", 2),
            ("timer.extended", 3),
        ]
        assert frames[0]["cause"] == "failover"

    run(house.line, scenario)


@pytest.mark.requirement("R16", "B4")
@pytest.mark.parametrize("noticed", ["an error", "a new connection"])
def test_a_lane_that_was_written_past_our_place_is_started_over(noticed: str) -> None:
    """A new primary lost our last entries and wrote others since: its lane ends behind our place, and is another one."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=1))
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        listener = await watched(house)
        async with running(feed.run()):
            for version in (2, 3, 4):
                commit(house, version)
            await asyncio.sleep(0.01)
            if noticed == "an error":
                fail(house)
                await asyncio.sleep(1)
            lane = house.memory.shards[0]
            del lane.updates[1:]
            lane.serial = 1
            for version in (13, 14, 15, 16, 17):
                house.announce("timer.extended", record(version=version))
            assert lane.updates[2].stream_id == "3-0", "the same id as the lost one"
            house.memory.connections += 1
            house.store.failing.clear()
            house.memory._grow()
            await asyncio.sleep(2 * BACKOFF_S)
            commit(house, 18)
            await asyncio.sleep(0.01)
        frames = told(listener.sent)[3:]
        assert [(frame["type"], frame["timer"]["version"]) for frame in frames] == [
            ("timer.resynced", 17),
            ("timer.extended", 18),
        ]

    run(house.line, scenario)


@pytest.mark.requirement("B4")
def test_a_new_connection_to_the_same_history_changes_nothing() -> None:
    """What comes over a new connection is read again after the comparison: nobody is told twice, and nobody starts over."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=1))
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        listener = await watched(house)
        async with running(feed.run()):
            for version in range(2, 10):
                house.memory.connections += 1
                commit(house, version)
                await asyncio.sleep(0.01)
        assert versions(listener) == list(range(2, 10))

    run(house.line, scenario)


def fail(house: House, *calls: str) -> None:
    """The store is away, for these calls or for all that a feed makes; whoever waits is told."""
    for name in calls or ("follow", "holds_update", "last_update", "view"):
        house.store.failing[name] = StoreUnavailableError("away")
    house.memory._grow()


@pytest.mark.requirement("R16", "B4")
def test_a_store_that_goes_away_again_in_the_midst_of_a_reload_is_reloaded_later() -> None:
    """No room is left with what a failover took back, even when the reading of it fails half way."""
    house = House()

    async def scenario() -> None:
        listeners = []
        for name in ("a-1", "a-2", "a-3"):
            house.put(record(name, version=1))
            listeners.append(await watched(house, name))
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        async with running(feed.run()):
            for name in ("a-1", "a-2", "a-3"):
                commit(house, 5, name)
            await asyncio.sleep(0.01)
            fail(house)
            await asyncio.sleep(1)
            house.memory.shards[0].updates.clear()
            for name in ("a-1", "a-2", "a-3"):
                house.put(record(name, version=3))
            for name in ("last_update", "holds_update", "follow"):
                del house.store.failing[name]
            await asyncio.sleep(1)
            assert not any(frame["type"] == "timer.resynced" for each in listeners for frame in told(each.sent))
            house.store.failing.clear()
            await asyncio.sleep(1)
            # Once is enough: the next outage, without a loss, reloads nothing.
            fail(house, "follow")
            await asyncio.sleep(2)
            house.store.failing.clear()
            await asyncio.sleep(1)
        for listener in listeners:
            assert [(frame["type"], frame["timer"]["version"]) for frame in told(listener.sent)][1:] == [
                ("timer.resynced", 3)
            ]

    run(house.line, scenario)


@pytest.mark.requirement("B4")
@pytest.mark.parametrize(
    ("kept", "bound", "oldest"), [(0, 5, 0), (3, 5, 0), (4, 5, 0), (5, 5, 1), (9, 5, 5), (9, 20, 0)]
)
async def test_a_start_reads_back_what_came_before_it(kept: int, bound: int, oldest: int) -> None:
    """A client of the process that ran here before resumes: from `oldest` on everything is there, before it nothing is."""
    house = House()
    for version in range(1, kept + 1):
        commit(house, version)
    house.put(record(version=kept))
    await EventFeed(house.store, house.hub, house.machine, 1, updates_max=bound).start()
    room = await house.hub.room(AUCTION)
    assert room is not None
    for seen in range(kept + 1):
        snapshot, *missed = told(house.hub.greeting(room, f"0.{seen}-0"))
        assert snapshot["recovered"] is (seen >= oldest), seen
        if seen >= oldest:
            assert [frame["timer"]["version"] for frame in missed] == list(range(seen + 1, kept + 1))


@pytest.mark.requirement("B3")
def test_events_are_read_no_faster_than_they_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """While too many writes are outstanding the lane stays in the store: memory is bounded, and nothing is lost or late."""
    monkeypatch.setattr(fanout_module, "TURN", 8)
    monkeypatch.setattr(fanout_module, "OUTSTANDING_MAX", 100)
    monkeypatch.setattr(feeds_module, "READ_MAX", 5)
    house = House()
    watchers = 20

    async def scenario() -> None:
        house.put(record(version=1))
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        listeners = [await watched(house) for _ in range(watchers)]
        most = 0
        async with running(feed.run()):
            for version in range(2, 202):
                commit(house, version)
            while len(listeners[-1].sent) < 200:
                most = max(most, house.hub.fanout._outstanding)
                await asyncio.sleep(0)
        assert 100 < most <= 100 + 5 * watchers
        for listener in listeners:
            assert versions(listener) == list(range(2, 202))
        assert feed.is_fresh

    run(house.line, scenario)


@pytest.mark.requirement("B4")
def test_who_comes_back_into_a_storm_is_told_everything() -> None:
    """While the feed follows, a room opens only when it was read as far as it was loaded: a resume then lacks nothing."""
    house = House()

    async def scenario() -> None:
        for version in range(1, 4):
            commit(house, version)
        feed = EventFeed(house.store, house.hub, house.machine, 1)
        await feed.start()
        # The engine commits on before the feed has read a first time.
        for version in range(4, 8):
            commit(house, version)
        house.store.failing["follow"] = StoreUnavailableError("away")
        async with running(feed.run()):
            await asyncio.sleep(0)
            demand = asyncio.ensure_future(house.hub.room(AUCTION))
            await asyncio.sleep(BACKOFF_S / 2)
            house.store.failing.clear()
            room = await demand
            assert room is not None
            snapshot, *missed = told(house.hub.greeting(room, "0.2-0"))
            assert (snapshot["recovered"], snapshot["cursor"]) == (True, "0.7-0")
            assert [frame["timer"]["version"] for frame in missed] == list(range(3, 8))

    run(house.line, scenario)


def test_a_start_without_a_store_says_so() -> None:
    """The places cannot be guessed: the composition root waits and asks again."""
    house = House()
    house.store.failing["recent_updates"] = StoreUnavailableError("away")
    feed = EventFeed(house.store, house.hub, house.machine, 1)
    with pytest.raises(StoreUnavailableError):
        asyncio.run(feed.start())


def test_a_fault_of_ours_ends_the_feed() -> None:
    """What no store can be blamed for is not swallowed: the process ends and its supervisor starts a fresh one."""
    house = House()
    house.store.failing["follow"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(house.line, EventFeed(house.store, house.hub, house.machine, 1).run)


class BrokenChannel:
    """A tick lane that breaks after each message, as a connection to a restarting server does."""

    def __init__(self, inner: Any, fault: StoreError) -> None:
        self.inner = inner
        self.fault = fault
        self.subscribed = 0

    async def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See `ViewStore`."""
        self.subscribed += 1
        async for message in self.inner.ticks(shards):
            yield message
            raise self.fault


@pytest.mark.requirement("R16")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_the_tick_feed_subscribes_again_after_every_fault(fault: StoreError) -> None:
    """Ticks of an outage are lost, which is their nature; those behind it come."""
    house = House()

    async def scenario() -> None:
        house.put(record(version=1))
        listener = await watched(house)
        channel = BrokenChannel(house.memory, fault)
        async with running(TickFeed(channel, house.hub, 1).run()):  # type: ignore[arg-type]
            for number in range(1, 4):
                await asyncio.sleep(0.01)
                line = tick_line(record(version=1), EpochMs(BORN_MS + number))
                await house.memory.publish({0: line, 1: line})
                await asyncio.sleep(BACKOFF_S)
                assert (len(listener.sent), channel.subscribed) == (number, number)
                await asyncio.sleep(BACKOFF_S)
        assert [frame["server_time"] - BORN_MS for frame in told(listener.sent)] == [1, 2, 3]

    run(house.line, scenario)


def test_a_fault_of_ours_ends_the_tick_feed() -> None:
    """As with the event feed."""
    house = House()

    class Wrong:
        async def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
            raise ZeroDivisionError
            yield

    with pytest.raises(ZeroDivisionError):
        run(house.line, TickFeed(Wrong(), house.hub, 1).run)  # type: ignore[arg-type]
