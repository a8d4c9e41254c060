"""A Cluster under the store: every slot on the node that serves it, through failovers and moves, with real processes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from prometheus_client import CollectorRegistry

from engine.app import Engine
from engine.clock import SystemClock
from engine.contract.keys import META, ShardKeys, replies, shard_of
from engine.domain.instants import EpochMs
from engine.metrics import EngineMetrics
from engine.settings import Settings
from engine.store.link import RedisLink
from engine.store.protocol import Draft, StoreUnavailableError
from engine.store.redis import RedisStore
from tests.contracts.stores import until
from tests.fakes.events import start
from tests.topologies import SHARDS, ClusterGroup, Member, stopping

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R16")]

FAILOVER_WITHIN_S = 15.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterGroup]:
    """One Cluster for the module: each test leaves three primaries with a replica each behind."""
    with stopping(ClusterGroup()) as made:
        yield made


@pytest.fixture
async def link(cluster: ClusterGroup) -> AsyncIterator[RedisLink]:
    """A link to an empty Cluster."""
    for member in cluster.members:
        with contextlib.suppress(Exception):
            member.ask("FLUSHALL")
    made = RedisLink(cluster.url, SystemClock())
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def store(link: RedisLink) -> RedisStore:
    """A store on the Cluster."""
    return RedisStore(link, SystemClock())


def estimate() -> EpochMs:
    """The auction clock, as this machine has it."""
    return SystemClock().wall_ms()


async def append(store: RedisStore, shard: int, name: str) -> bool:
    """One event, with its id as the command id; whether it was accepted."""
    (appended,) = await store.append(shard, [Draft(name, b"{}")], estimate(), name)
    return appended.accepted


async def test_shards_live_on_several_nodes(cluster: ClusterGroup, store: RedisStore) -> None:
    """Every shard is written and read where its slot is; more than one node has some."""
    await store.deployment(SHARDS)
    for shard in range(SHARDS):
        assert await append(store, shard, f"e-{shard}")
    found = await store.read_intake(dict.fromkeys(range(SHARDS), "0-0"), 10, 0)
    assert {shard: [entry.event_id for entry in entries] for shard, entries in found.items()} == {
        shard: [f"e-{shard}"] for shard in range(SHARDS)
    }
    assert len({cluster.serving(ShardKeys.of(shard).events).port for shard in range(SHARDS)}) > 1
    assert await store.time_us() > 0
    assert await store.complaints() == []
    assert await store.beat_member("engine-1") == {"engine-1": 1}


async def test_a_blocked_read_of_all_shards_wakes_for_each(store: RedisStore) -> None:
    """One call waits for every slot; whichever shard has news ends it, and the reads that go on lose nothing."""
    places = dict.fromkeys(range(SHARDS), "0-0")
    seen: list[str] = []
    for number in range(40):
        shard = number % SHARDS
        reading = asyncio.create_task(store.read_intake(places, 10, 1_000))
        await append(store, shard, f"e-{number}")
        while not (found := await reading):
            reading = asyncio.create_task(store.read_intake(places, 10, 1_000))
        for at, entries in found.items():
            places[at] = entries[-1].stream_id
            seen += [entry.event_id for entry in entries]
    assert seen == [f"e-{number}" for number in range(40)]
    assert store.connections <= 2 * SHARDS


async def test_an_answer_comes_with_what_its_commit_announced(store: RedisStore, link: RedisLink) -> None:
    """`follow` reads a shard's lane and its reply stream together, also after it had to wait."""
    asker = "{3}:gateway-1"
    lane, stream = ShardKeys.of(3).updates, replies(asker)
    updates, answers = dict.fromkeys(range(SHARDS), "0-0"), {asker: "0-0"}
    following = asyncio.create_task(store.follow(updates, answers, 10, 1_000))
    await until(lambda: store.connections >= SHARDS)
    script = "redis.call('XADD',KEYS[1],'*','type','t');redis.call('XADD',KEYS[2],'*','command_id','c','body','b')"
    await link.ask(lane, "EVAL", script, 2, lane, stream)
    news = await following
    while not news.updates:  # it had waited for a second before they came
        news = await store.follow(updates, answers, 10, 1_000)
    assert [entry.type for entry in news.updates[3]] == ["t"]
    assert [entry.command_id for entry in news.replies[asker]] == ["c"]


async def test_ticks_of_all_shards_arrive(store: RedisStore) -> None:
    """Published in their slots, heard from every node."""
    heard: dict[int, bytes] = {}

    async def listen() -> None:
        async for shard, lines in store.ticks(range(SHARDS)):
            heard[shard] = lines

    listening = asyncio.create_task(listen())
    try:

        async def all_heard() -> bool:
            with contextlib.suppress(StoreUnavailableError):  # a tick is not sent twice
                await store.publish(dict.fromkeys(range(SHARDS), b"a 1 {}"))
            return len(heard) == SHARDS

        await until(all_heard)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_the_other_shards_go_on_while_a_primary_is_gone(cluster: ClusterGroup, store: RedisStore) -> None:
    """A killed primary stops its own slots until its replica leads; calls wait for that, and nothing is done twice."""
    victim = cluster.serving(ShardKeys.of(0).events)
    elsewhere = next(shard for shard in range(SHARDS) if cluster.serving(ShardKeys.of(shard).events) is not victim)
    for shard in range(SHARDS):
        await append(store, shard, f"before-{shard}")
    victim.kill()
    began = time.monotonic()
    waiting = asyncio.create_task(append(store, 0, "after"))
    assert await append(store, elsewhere, "meanwhile")
    assert not waiting.done() or time.monotonic() - began < 1, "it waited for the failover"
    assert await waiting
    assert time.monotonic() - began < FAILOVER_WITHIN_S
    found = await store.read_intake({0: "0-0", elsewhere: "0-0"}, 10, 0)
    assert [entry.event_id for entry in found[0]] == ["before-0", "after"]
    victim.start()
    await asyncio.to_thread(cluster.wait_until_whole)


async def test_a_slot_that_moves_is_followed(cluster: ClusterGroup, store: RedisStore) -> None:
    """ASK while a slot is under way, MOVED when it has arrived, TRYAGAIN between: no caller sees any of them."""
    names = ShardKeys.of(0)
    await append(store, 0, "e-1")
    source = cluster.serving(names.events)
    target = next(
        cluster.serving(ShardKeys.of(shard).events)
        for shard in range(1, SHARDS)
        if cluster.serving(ShardKeys.of(shard).events) is not source
    )
    slot = int(source.ask("CLUSTER", "KEYSLOT", names.events))
    source_id, target_id = source.ask("CLUSTER", "MYID"), target.ask("CLUSTER", "MYID")
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    writing = asyncio.create_task(write_until_done(store, 0, 200))
    await asyncio.sleep(0)
    for _ in range(50):
        moved = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100)
        if not moved and writing.done():
            break
        for key in moved:
            source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 1_000)
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
    for member in cluster.members:
        with contextlib.suppress(Exception):
            member.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    await asyncio.wait_for(writing, 15)
    entries = (await store.read_intake({0: "0-0"}, 1_000, 0))[0]
    assert [entry.event_id for entry in entries] == ["e-1", *(f"w-{number}" for number in range(200))]
    assert cluster.serving(names.events) is target


async def write_until_done(store: RedisStore, shard: int, count: int) -> None:
    """Events one after another, each until it is acknowledged."""
    for number in range(count):
        while True:
            with contextlib.suppress(StoreUnavailableError):
                await append(store, shard, f"w-{number}")
                break


async def test_any_node_tells_who_the_others_are(cluster: ClusterGroup) -> None:
    """The first node of the URL is gone: the next one is asked."""
    gone: Member = cluster.members[3]
    gone.kill()
    link = RedisLink(f"redis+cluster://{gone.address},{cluster.members[1].address}", SystemClock())
    try:
        began = time.monotonic()
        assert await link.ask(META, "EXISTS", "auction:meta") in (0, 1)
        assert time.monotonic() - began < 2
    finally:
        await link.close()
        gone.start()
    await asyncio.to_thread(cluster.wait_until_whole)


@contextlib.asynccontextmanager
async def engine_on(cluster: ClusterGroup) -> AsyncIterator[Engine]:
    """An engine in this process, with connections of its own."""
    link = RedisLink(cluster.url, SystemClock())
    settings = Settings(_env_file=None, redis_url=cluster.url, shards=SHARDS, instance="engine-1")
    engine = Engine(
        RedisStore(link, SystemClock()), SystemClock(), settings, EngineMetrics(CollectorRegistry()), lambda: 0
    )
    running = asyncio.create_task(engine.run())
    try:
        yield engine
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await link.close()


async def answers(link: RedisLink, reply_to: str) -> list[str]:
    """The command ids that were answered, in order."""
    stream = replies(reply_to)
    rows = await link.ask(stream, "XRANGE", stream, "-", "+")
    return [fields[b"command_id"].decode() for _, fields in rows]


@pytest.mark.requirement("R18")
async def test_a_producer_outside_the_slot_is_answered(
    cluster: ClusterGroup, store: RedisStore, link: RedisLink
) -> None:
    """Replies whose stream lives elsewhere are delivered after the commit, each once and in order, for every shard."""
    now = estimate()
    names = [f"a-{number}" for number in range(40)]
    async with engine_on(cluster):
        for name in names:
            draft = start(name, now, now + 600_000, reply_to="producer-1")
            await store.append(shard_of(name, SHARDS), [draft], estimate(), draft.event_id)

        async def all_answered() -> bool:
            return len(await answers(link, "producer-1")) >= len(names)

        await until(all_answered)
        found = await answers(link, "producer-1")
        assert sorted(found) == sorted(f"start-{name}" for name in names)
        for shard in range(SHARDS):
            mine = [f"start-{name}" for name in names if shard_of(name, SHARDS) == shard]
            assert [command_id for command_id in found if command_id in mine] == mine
            outbox = ShardKeys.of(shard).outbox

            async def delivered(outbox: str = outbox) -> bool:
                return await link.ask(outbox, "XLEN", outbox) == 0

            await until(delivered)


@pytest.mark.requirement("R18")
async def test_a_reply_that_a_crash_left_behind_is_delivered_once(store: RedisStore, link: RedisLink) -> None:
    """Whoever owns the shard delivers what waits; a reply that was delivered and not crossed out is not told again."""
    outbox, stream = ShardKeys.of(0).outbox, replies("producer-2")
    fields = ("reply_to", "producer-2", "outcome", "APPLIED", "command_id")
    await link.ask(outbox, "XADD", outbox, "1-1", *fields, "c-1", "body", "{}")
    await link.ask(outbox, "XADD", outbox, "1-2", *fields, "c-2", "body", "{}")
    await store.deliver_replies(0)
    assert await answers(link, "producer-2") == ["c-1", "c-2"]
    assert await link.ask(outbox, "XLEN", outbox) == 0
    # The engine died between the delivery and the crossing out; then the same command was answered once more.
    await link.ask(outbox, "DEL", outbox)
    await link.ask(outbox, "XADD", outbox, "1-2", *fields, "c-2", "body", "{}")
    await link.ask(outbox, "XADD", outbox, "1-3", *fields, "c-2", "body", "{}")
    await store.deliver_replies(0)
    assert await answers(link, "producer-2") == ["c-1", "c-2", "c-2"]
    assert await link.ask(stream, "PTTL", stream) > 0
