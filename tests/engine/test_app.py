"""Tests for engine.app: whole engines on virtual time and a memory store, and one on a real server."""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine import app as app_module
from engine import shard as shard_module
from engine.app import Engine, serve
from engine.clock import SystemClock
from engine.contract.audit import verify
from engine.contract.cursors import START
from engine.contract.keys import shard_of
from engine.domain.instants import EpochMs
from engine.domain.policy import ExtensionMode, Policy
from engine.settings import Settings
from engine.store.link import RedisRefusedError
from engine.store.protocol import DeploymentMismatchError, Group, Lease
from engine.store.redis import RedisStore
from tests.contracts.stores import until
from tests.fakes.events import bid, cancel, poison, start
from tests.fakes.loop import run
from tests.fakes.store import Fault, FaultyStore
from tests.fakes.world import QUICK, World, at, passes
from tests.servers import Server


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator["asyncio.Task[None]"]:
    """An engine that runs for the duration of a block, and is stopped in order."""
    task = asyncio.create_task(engine.run())
    try:
        yield task
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def play(world: World, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario on virtual time."""
    run(world.line, scenario)


async def ended_at(world: World, auction_id: str, shards: int = 1) -> int | None:
    """When an auction ended."""
    (record,) = await world.store.timers(shard_of(auction_id, shards), [auction_id])
    return record.auction.ended_at if record else None


# A whole engine.


@pytest.mark.requirement("R1")
@pytest.mark.requirement("R4")
@pytest.mark.requirement("R5")
@pytest.mark.requirement("B10")
def test_an_auction_from_its_start_to_its_close() -> None:
    """Ticks as they are due, an extension that ticks at once, one close, and silence afterwards."""
    world = World()
    heard: list[tuple[int, dict[str, Any]]] = []

    async def listen() -> None:
        async with aclosing(world.store.ticks([0])) as lines:
            async for _, rows in lines:
                for row in rows.split(b"\n"):
                    if not row.startswith(b"!"):
                        heard.append((world.authority.now_ms, orjson.loads(row.split(b" ", 2)[2])))

    async def scenario() -> None:
        listening = asyncio.create_task(listen())
        async with running(world.engine()):
            await passes(0.5)
            await world.append(start("a", at(2), at(122), policy=QUICK))
            await passes(99.5)
            await world.append(bid("a", "b-1"))
            await passes(100)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)

    play(world, scenario)
    assert world.facts("a") == [
        "auction_timer_registered",
        "auction_timer_started",
        "auction_timer_closing",
        "auction_timer_extended",
        "auction_timer_ended",
    ]
    assert world.announced("a") == [
        *("timer.started", "auction_timer_started", "timer.closing"),
        *("bid.accepted", "timer.extended", "timer.ended"),
    ]
    end = at(100 + 60)
    assert world.shard.timers["a"]["ended_at"] == str(end)
    versions = [tick["version"] for _, tick in heard]
    assert versions == sorted(versions), "no tick is older than one before it"
    by_status = {
        status: [when for when, tick in heard if tick["status"] == status] for status in ("SCHEDULED", "CLOSING")
    }
    assert by_status["SCHEDULED"][0] - at(0.5) <= 10
    (extended,) = [when for when, tick in heard if tick["version"] == 4][:1]
    assert extended - at(100) <= 10, "a change of the end ticks at once"
    assert all(when < end for when, _ in heard), "no tick after the close"
    last_minute = [round((end - when) / 1_000) for when, tick in heard if tick["version"] == 4][1:]
    assert last_minute == list(range(59, 0, -1))
    times = [when for when, _ in heard]
    assert max(later - earlier for earlier, later in pairwise(times)) <= 15_010


@pytest.mark.requirement("B1")
@pytest.mark.requirement("B2")
@pytest.mark.parametrize("ahead_ms", [0, 100, 250])
def test_many_auctions_close_on_time_and_never_early(ahead_ms: int) -> None:
    """Over four shards, on a clock that is ahead: every close is committed at or after its deadline, by a hair."""
    world = World()
    shards = 4
    names = [f"a-{number}" for number in range(60)]

    async def scenario() -> None:
        store = FaultyStore(world.store)
        store.time_ahead_ms = ahead_ms
        engine = world.engine(store=store, shards=shards)
        async with running(engine):
            await passes(0.1)
            for number, name in enumerate(names):
                ends = at(30 + number * 0.731)
                await world.append(start(name, at(1), ends, policy=QUICK), shard=shard_of(name, shards))
            await passes(120)
        value = engine.registry.get_sample_value  # type: ignore[attr-defined]
        assert value("auctions_timer_close_lateness_ms_count") == len(names)
        assert value("auctions_timer_close_lateness_ms_sum") <= 5 * len(names)
        assert value("auctions_timer_early_closes_total") == 0

    play(world, scenario)
    for number, name in enumerate(names):
        memory = world.store.shards[shard_of(name, shards)]
        assert memory.timers[name]["ended_at"] == str(at(30 + number * 0.731))
        assert int(memory.timers[name]["ended_at"]) <= memory.last_at
    assert all(verify(memory.audit) is None for memory in world.store.shards.values())


def test_events_are_applied_in_their_order_across_reads_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog beyond what one read, one batch and the inbox take: everything once, in the order of the intake."""
    for module, name, value in [
        (app_module, "READ_MAX", 7),
        (app_module, "INBOX_MAX", 12),
        (shard_module, "INBOX_MAX", 12),
    ]:
        monkeypatch.setattr(module, name, value)
    world = World()
    bids = [f"b-{number:03}" for number in range(150)]

    async def scenario() -> None:
        await world.append(start("a", at(1), at(9_000)))
        for bid_id in bids[:100]:
            await world.append(bid("a", bid_id))
        async with running(world.engine(batch_max=5)):
            await passes(2)
            for bid_id in bids[100:]:
                await world.append(bid("a", bid_id))
            await passes(5)

    play(world, scenario)
    applied = [record["event_id"] for record in world.shard.audit if record["event_type"] == "bid_accepted"]
    assert applied == [f"bid-{bid_id}" for bid_id in bids]
    assert world.shard.intake_cursor == world.shard.events[-1].stream_id


@pytest.mark.requirement("R10")
def test_a_read_that_was_overtaken_by_a_reload_is_dropped() -> None:
    """A commit is lost and the shard loaded again while a read is on its way: what it brings lies behind a gap."""
    world = World()

    async def scenario() -> None:
        store = FaultyStore(world.store, [Fault.BEFORE])
        store.answer_takes_s = {"read_intake": 0.3, "commit": 0.5}
        async with running(world.engine(store=store)):
            await passes(0.1)
            await world.append(start("a", at(60), at(600)))  # read by 0.4, its commit lost by 0.9
            await passes(0.6)
            await world.append(bid("a", "b-1"))  # read by 1.0, behind the entry that is to be read again
            await passes(10)

    with capture_logs():
        play(world, scenario)
    assert world.facts("a") == ["auction_timer_registered", "bid_accepted"]
    assert world.parked() == {}


@pytest.mark.requirement("R29")
def test_poison_does_not_stop_an_engine() -> None:
    """It is parked, counted in the depth, and the next event is applied."""
    world = World()

    async def scenario() -> None:
        engine = world.engine()
        async with running(engine):
            await passes(0.1)
            await world.append(poison("p-1"), start("a", at(1), at(50)))
            await world.append(poison("p-2"))
            await passes(5)
            value = engine.registry.get_sample_value  # type: ignore[attr-defined]
            assert value("auctions_troubleshooting_depth") == 2
            assert value("auctions_timer_active") == 1
            assert value("auctions_intake_lag_events") == 0

    play(world, scenario)
    assert set(world.parked()) == {"p-1", "p-2"}


# Two engines.


@pytest.mark.requirement("R10")
def test_a_dead_engine_is_replaced_within_the_lease() -> None:
    """The first engine stops answering in the closing minute; the second closes the auction, at the deadline, once."""
    world = World()

    async def scenario() -> None:
        first_store = FaultyStore(world.store)
        first_store.patience_s = 0.1
        first, second = world.engine("first", store=first_store), world.engine("second", seed=2)
        async with running(first):
            await passes(1)
            async with running(second):
                await world.append(start("a", at(2), at(62), policy=QUICK))
                await passes(49)
                assert second.shards == {}
                first_store.away = True
                await world.append(bid("a", "b-1"))
                await passes(5)
                assert set(second.shards) == {0}
                assert world.facts("a")[-1] == "auction_timer_extended"
                await passes(100)
                first_store.away = False
                await passes(2)
                assert first.shards == {}
                assert first.leases.epochs == {}
                assert set(second.shards) == {0}

    with capture_logs():
        play(world, scenario)
    assert world.facts("a").count("auction_timer_ended") == 1
    assert world.shard.timers["a"]["ended_at"] == str(at(50 + 60))
    assert verify(world.shard.audit) is None


@pytest.mark.requirement("R10")
def test_a_fenced_engine_notices_at_its_next_commit() -> None:
    """It drops the shard, its scheduler forgets the auctions, and it goes on as a candidate."""
    world = World()

    async def scenario() -> None:
        first = world.engine("first", heartbeat_ms=600, lease_ms=60_000)
        async with running(first):
            await passes(0.1)
            await world.append(start("a", at(0.5), at(6_000)))
            await passes(0.2)
            assert set(first.scheduler._dues._at) == {"a"}
            await world.store.claim(0, "usurper", await world.store.lease(0))
            await world.append(bid("a", "b-1"))
            await passes(0.2)
            assert first.shards == {}
            assert first.leases.epochs == {}
            assert len(first.scheduler._dues) == len(first.scheduler._ticks) == 0
            await world.store.release(0, "usurper", 2)
            await passes(1)
            assert first.leases.epochs == {0: 3}
            await passes(0.1)
            assert "bid_accepted" in world.facts("a")

    with capture_logs() as lines:
        play(world, scenario)
    events = [line["event"] for line in lines]
    assert events.count("shard_fenced") == events.count("shard_lost") == 1


def test_an_engine_that_stops_in_order_hands_over_at_once() -> None:
    """Its leases are free, so that the next one need not wait for them."""
    world = World()

    async def scenario() -> None:
        async with running(world.engine("first", shards=3)):
            await passes(1)
        assert [(await world.store.lease(shard)).holder for shard in range(3)] == [""] * 3
        async with running(world.engine("second", shards=3)) as _:
            await passes(0.1)
            assert [(await world.store.lease(shard)).holder for shard in range(3)] == ["second"] * 3

    play(world, scenario)


def test_shards_are_shared_between_engines() -> None:
    """An engine that holds some of the shards reads those, and what arrives in the others is left to their holder."""
    world = World()

    async def scenario() -> None:
        for shard in (1, 2):
            await world.store.claim(shard, "second", None)
        first = world.engine("first", shards=3)
        second = world.engine("second", shards=3, seed=2)
        async with running(first):
            await passes(0.5)
            assert set(first.shards) == {0}
            async with running(second):
                await passes(0.5)
                assert set(second.shards) == {1, 2}
                names = [f"a-{number}" for number in range(12)]
                for name in names:
                    await world.append(start(name, at(2), at(20), policy=QUICK), shard=shard_of(name, 3))
                await passes(30)
                assert [await ended_at(world, name, 3) for name in names] == [at(20)] * 12

    play(world, scenario)


# A store that is away.


@pytest.mark.requirement("R16")
def test_an_engine_waits_for_its_store() -> None:
    """Started before Redis: it waits, then begins."""
    world = World()

    async def scenario() -> None:
        store = FaultyStore(world.store)
        store.away, store.patience_s = True, 0.5
        async with running(world.engine(store=store)):
            await passes(5)
            assert world.shard.lease == Lease("", 0, 0)
            store.away = False
            await passes(20)
            assert world.shard.lease.holder == "engine-1"

    with capture_logs() as lines:
        play(world, scenario)
    assert "waiting_for_redis" in [line["event"] for line in lines]


@pytest.mark.requirement("R16")
@pytest.mark.requirement("R10")
@pytest.mark.parametrize("away_s", [1, 10, 100])
def test_an_engine_outlives_a_store_that_is_away(away_s: int) -> None:
    """Deadlines that pass meanwhile are met as of their time, and bids that had arrived before them count."""
    world = World()

    async def scenario() -> None:
        store = FaultyStore(world.store)
        store.patience_s = 0.1
        async with running(world.engine(store=store)) as task:
            await passes(0.1)
            await world.append(start("a", at(1), at(30), policy=QUICK), start("b", at(1), at(29.5), policy=QUICK))
            await passes(29)
            await world.append(bid("a", "in-time"))
            store.away = True
            await passes(away_s)
            assert not task.done()
            store.away = False
            await passes(200)

    with capture_logs():
        play(world, scenario)
    arrived = next(entry.at for entry in world.shard.events if entry.event_id == "bid-in-time")
    assert world.shard.timers["b"]["ended_at"] == str(at(29.5))
    assert world.shard.timers["a"]["ended_at"] == str((arrived or 0) + 60_000)
    assert world.facts("a").count("auction_timer_ended") == 1


def test_another_deployments_store_is_refused() -> None:
    """A shard count that is not the store's ends the start."""
    world = World()

    async def scenario() -> None:
        await world.store.deployment(8)
        with pytest.raises(DeploymentMismatchError):
            await world.engine(shards=4).run()

    play(world, scenario)


def test_an_error_that_nobody_expects_ends_the_engine() -> None:
    """A shard that cannot work must not look alive: the process ends, and its leases are given back."""
    world = World()

    async def scenario() -> None:
        store = FaultyStore(world.store)

        def fail(_batch: Any) -> None:
            raise RuntimeError("a fault of ours")

        store.before_commit = fail
        engine = world.engine(store=store)
        task = asyncio.create_task(engine.run())
        await passes(0.1)
        await world.append(start("a", at(1), at(50)))
        with pytest.raises(ExceptionGroup) as raised:
            await task
        assert raised.group_contains(RuntimeError, match="a fault of ours")
        assert (await world.store.lease(0)).holder == ""

    play(world, scenario)


def test_retries_of_the_store_are_counted() -> None:
    """As the link counts them, once each."""
    world = World()
    retries = iter([3, 3, 10, *[10] * 100])

    async def scenario() -> None:
        engine = world.engine()
        engine._retries = lambda: next(retries)
        async with running(engine):
            await passes(9)
            assert engine.registry.get_sample_value("auctions_store_retries_total") == 10  # type: ignore[attr-defined]

    play(world, scenario)


@pytest.mark.parametrize("turns", range(6))
def test_a_reader_that_waits_for_room_can_be_stopped(turns: int) -> None:
    """Also when room comes in the very turn of the loop in which it is stopped (cpython#86296)."""
    world = World()

    async def scenario() -> None:
        engine = world.engine()
        reading = asyncio.create_task(engine._read())
        await passes(0.1)
        engine._room.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        await passes(30)
        assert reading.done()
        assert reading.cancelled()

    play(world, scenario)


# Started and stopped as a process.


@pytest.fixture
def calm_again() -> Iterator[None]:
    """What `serve` sets for its process, set back."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)


async def stopped_by_signal(settings: Settings, during: Callable[[], Awaitable[None]]) -> None:
    """`serve` in this process, stopped by SIGTERM."""
    serving = asyncio.create_task(serve(settings, CollectorRegistry()))
    try:
        await during()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 20)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


@pytest.mark.integration
@pytest.mark.requirement("R5")
async def test_an_engine_on_a_real_server(redis_server: Server, calm_again: None) -> None:
    """An auction of a second, a bid in its window, its close, and an orderly end on SIGTERM."""
    settings = Settings(_env_file=None, redis_url=redis_server.url, shards=2, instance="engine-1", heartbeat_ms=50)
    link = redis_server.link()
    store = RedisStore(link, SystemClock())
    shard = shard_of("a", 2)
    policy = Policy(soft_close_window_ms=600, extension_ms=400, mode=ExtensionMode.ADD)

    async def facts() -> list[str]:
        records = await link.commands.xrange(f"auction:audit:{{{shard}}}")
        return [record[b"event_type"].decode() for _, record in records]

    async def status() -> str | None:
        (record,) = await store.timers(shard, ["a"])
        return record.auction.status.value if record else None

    async def reached(wanted: str) -> bool:
        return await status() == wanted

    async def life() -> None:
        now = await store.time_us() // 1_000
        await store.append(shard, [start("a", now + 50, now + 700, policy=policy)], EpochMs(now), "c-1")
        await until(lambda: reached("CLOSING"))
        now = await store.time_us() // 1_000
        await store.append(shard, [bid("a", "b-1")], EpochMs(now), "c-2")
        await until(lambda: reached("ENDED"))
        assert (await store.lease(shard)).holder == "engine-1"

    try:
        await stopped_by_signal(settings, life)
        assert await facts() == [
            "auction_timer_registered",
            "auction_timer_started",
            "auction_timer_closing",
            "auction_timer_extended",
            "auction_timer_ended",
        ]
        (record,) = await store.timers(shard, ["a"])
        intake = (await store.read_intake({shard: START}, 9, 0))[shard]
        assert record.auction.ended_at == record.auction.registered.ends_at + 400
        head = await store.head(shard)
        assert head.intake == intake[-1].stream_id
        assert head.last_at >= record.auction.ended_at
        assert [(await store.lease(number)).holder for number in range(2)] == ["", ""]
    finally:
        await link.close()


@pytest.mark.integration
async def test_an_engine_that_redis_refuses_does_not_start(valkey_server: Server, calm_again: None) -> None:
    """A wrong password is said at once instead of being waited out."""
    valkey_server.ask("ACL", "SETUSER", "bob", "on", ">right", "~*", "+@all")
    settings = Settings(_env_file=None, redis_url=f"unix://bob:wrong@{valkey_server.socket}", shards=1)
    try:
        with capture_logs() as lines, pytest.raises(RedisRefusedError):
            await asyncio.wait_for(serve(settings, CollectorRegistry()), 10)
    finally:
        valkey_server.ask("ACL", "DELUSER", "bob")
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
    assert lines[0]["event"] == "engine_starting"
    assert "wrong" not in str(lines)


@pytest.mark.requirement("R27")
def test_a_cancelled_auction_falls_silent() -> None:
    """No tick, no close, no fact after the cancellation."""
    world = World()

    async def scenario() -> None:
        engine = world.engine()
        async with running(engine):
            await passes(0.1)
            await world.append(start("a", at(1), at(60), policy=QUICK))
            await passes(20)
            await world.append(cancel("a"))
            await passes(0.1)
            assert len(engine.scheduler._dues) == len(engine.scheduler._ticks) == 0
            await passes(100)

    play(world, scenario)
    assert world.facts("a")[-1] == "auction_timer_cancelled"


def test_what_has_been_closed_for_long_leaves_the_listing() -> None:
    """After the retention, at one of the looks that come every ten minutes; what closed since stays."""
    world = World()

    async def scenario() -> None:
        async with running(world.engine(closed_retention_ms=60_000)):
            await passes(0.1)
            await world.append(start("old", at(1), at(20)), start("new", at(1), at(590)))
            await passes(500)
            assert world.shard.groups[Group.CLOSED] == {"old": at(20)}
            await passes(110)
            assert world.shard.groups[Group.CLOSED] == {"new": at(590)}

    play(world, scenario)
