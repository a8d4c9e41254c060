"""What a failover may take back, and what it may not: the recipe that loses acknowledged writes on demand.

Stop the replicas, cut their links, write, kill the primary, let the replicas go on: whatever was written meanwhile is gone.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Literal

import pytest
from prometheus_client import CollectorRegistry

from engine.app import Engine
from engine.clock import AuctionClock, SystemClock
from engine.clock_sync import ClockSync
from engine.contract.keys import ShardKeys
from engine.domain.instants import EpochMs
from engine.domain.policy import Policy
from engine.metrics import EngineMetrics
from engine.settings import Settings
from engine.store.link import RedisLink
from engine.store.protocol import Draft, StoreUnavailableError
from engine.store.redis import RedisStore
from gateway.feeds import EventFeed, TickFeed
from gateway.hub import Hub
from gateway.metrics import GatewayMetrics
from tests.contracts.stores import until
from tests.fakes.events import bid, start
from tests.gateway.house import Listener, told
from tests.topologies import SentinelGroup, stopping

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R16")]

Durability = Literal["local", "replicated"]
HOUR_MS = 3_600_000
POLICY = Policy(soft_close_window_ms=HOUR_MS, extension_ms=900_000)
"""Every bid moves the end: an auction of ten minutes is in its window from its start."""
WITHIN_S = 20.0


@pytest.fixture(scope="module")
def group() -> Iterator[SentinelGroup]:
    """One group for the module."""
    with stopping(SentinelGroup()) as made:
        yield made


class System:
    """An engine and a gateway's memory in this process, each with connections of its own."""

    def __init__(self, url: str, durability: Durability) -> None:
        self.links: list[RedisLink] = []
        self.url, self.durability = url, durability
        self.producer = self.store(call_deadline_ms=300)
        settings = Settings(_env_file=None, redis_url=url, durability=durability, shards=1)
        self.engine = Engine(self.store(), SystemClock(), settings, EngineMetrics(CollectorRegistry()), lambda: 0)
        seen = self.store(call_deadline_ms=3_000)
        clock = AuctionClock(SystemClock())
        self.hub = Hub(seen, clock, 1, GatewayMetrics(CollectorRegistry()))
        self.feed = EventFeed(seen, self.hub, SystemClock(), 1)
        self.sync = ClockSync(clock, seen.time_us)
        self.ticks = TickFeed(seen, self.hub, 1)
        self.listener = Listener()

    def store(self, **options: Any) -> RedisStore:
        """A store with connections of its own."""
        link = RedisLink(self.url, SystemClock(), durability=self.durability, **options)
        self.links.append(link)
        return RedisStore(link, SystemClock())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["System"]:
        """All loops, which must still run at the end."""
        tasks = [asyncio.create_task(self.engine.run())]
        try:
            await self.sync.start()
            await self.feed.start()
            loops = (self.feed.run(), self.ticks.run(), self.sync.run(lambda _: None))
            tasks += [asyncio.create_task(work) for work in loops]
            yield self
            assert not any(task.done() for task in tasks), tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for link in self.links:
                await link.close()

    async def send(self, draft: Draft) -> bool:
        """Append once, with the event id as the command id; whether it was acknowledged."""
        try:
            (appended,) = await self.producer.append(0, [draft], SystemClock().wall_ms(), draft.event_id)
        except StoreUnavailableError:
            return False
        return appended.accepted

    async def begin(self) -> None:
        """One auction of ten minutes, with somebody who watches it."""
        now = SystemClock().wall_ms()
        await until(lambda: self.send(start("a", now, now + HOUR_MS // 6, policy=POLICY)), within_s=WITHIN_S)
        await until(lambda: self._watched(), within_s=WITHIN_S)

    async def _watched(self) -> bool:
        room = await self.hub.room("a")
        if room is not None:
            room.writable.add(self.listener)
        return room is not None

    def bids_told(self) -> set[str]:
        """The bids that the watcher was told of since it was last told to start over."""
        bids: set[str] = set()
        for frame in told(self.listener.sent):
            if frame["type"] == "timer.resynced":
                bids.clear()
            elif frame["type"] == "bid.accepted":
                bids.add(frame["bid_id"])
        return bids

    def all_bids_told(self) -> set[str]:
        """Every bid that the watcher was ever told of."""
        return {frame["bid_id"] for frame in told(self.listener.sent) if frame["type"] == "bid.accepted"}

    async def bids_recorded(self) -> set[str]:
        """The bids in the audit log."""
        entries = await self.producer.audit_entries(0, "0-0", 1_000)
        return {
            entry.fields["event_id"].removeprefix("bid-")
            for entry in entries
            if entry.fields["event_id"].startswith("bid-")
        }

    def resynced(self) -> int:
        """How often the watcher was told to start over."""
        return sum(frame["type"] == "timer.resynced" for frame in told(self.listener.sent))


async def lose_the_end(
    group: SentinelGroup, system: System, bids: list[str], waited_for: Callable[[], bool]
) -> list[str]:
    """The recipe, with bids as what is written; the bids that were acknowledged."""
    acknowledged = []
    with group.without_replicas() as primary:
        for name in bids:
            if await system.send(bid("a", name)):
                acknowledged.append(name)
        await until(waited_for, within_s=WITHIN_S)
        primary.kill()
    await until(lambda: asyncio.to_thread(lambda: group.primary), within_s=WITHIN_S)
    primary.start()
    return acknowledged


async def test_local_durability_can_lose_what_was_told_and_says_so(group: SentinelGroup) -> None:
    """Bids that were acknowledged and announced are gone after the failover: everybody starts over, and goes on."""
    group.primary.ask("FLUSHALL")
    async with System(group.url, "local").running() as system:
        await system.begin()
        await until(lambda: system.send(bid("a", "kept")), within_s=WITHIN_S)
        await until(lambda: system.bids_told() == {"kept"}, within_s=WITHIN_S)
        await asyncio.to_thread(group.wait_until_whole)
        lost = [f"lost-{number}" for number in range(5)]
        assert await lose_the_end(group, system, lost, lambda: "lost-4" in system.bids_told()) == lost
        await until(lambda: system.resynced() > 0, within_s=WITHIN_S)
        await until(lambda: system.send(bid("a", "after")), within_s=WITHIN_S)
        await until(lambda: "after" in system.all_bids_told(), within_s=WITHIN_S)
        assert await system.bids_recorded() == {"kept", "after"}
        assert system.bids_told() == {"after"}, told(system.listener.sent)
        shard = system.engine.shards[0]
        room = system.hub.known("a")
        assert room is not None
        assert room.version == shard.live["a"].auction.version
        assert room.timer["ends_at"] == shard.live["a"].auction.ends_at
    await asyncio.to_thread(group.wait_until_whole)


async def test_replicated_durability_loses_nothing_that_was_told(group: SentinelGroup) -> None:
    """The same recipe: nothing is acknowledged and nothing announced while no replica has it, and all comes afterwards."""
    group.primary.ask("FLUSHALL")
    async with System(group.url, "replicated").running() as system:
        await system.begin()
        await until(lambda: system.send(bid("a", "kept")), within_s=WITHIN_S)
        await until(lambda: system.bids_told() == {"kept"}, within_s=WITHIN_S)
        await asyncio.to_thread(group.wait_until_whole)
        lost = [f"lost-{number}" for number in range(5)]
        entered = ShardKeys.of(0).events

        def written() -> bool:
            return "bid-lost-4" in str(group.primary.ask("XREVRANGE", entered, "+", "-", "COUNT", 1))

        assert await lose_the_end(group, system, lost, written) == []
        assert system.all_bids_told() == {"kept"}
        # The producer does what it was told: the same events, with the same ids.
        for name in lost:
            await until(lambda name=name: system.send(bid("a", name)), within_s=WITHIN_S)
        await until(lambda: system.bids_told() >= set(lost), within_s=WITHIN_S)
        assert await system.bids_recorded() >= system.all_bids_told() == {"kept", *lost}
    await asyncio.to_thread(group.wait_until_whole)


@pytest.mark.parametrize("cut", [True, False], ids=["gone", "silent"])
async def test_a_repetition_is_not_taken_for_replicated(group: SentinelGroup, cut: bool) -> None:
    """A repeated command writes nothing; it is acknowledged when a replica has the first one, and not before.

    Replicas that are connected and silent are the trap: as of the beginning of time they have everything.
    """
    group.primary.ask("FLUSHALL")
    link = RedisLink(group.url, SystemClock(), durability="replicated", call_deadline_ms=200)
    store = RedisStore(link, SystemClock())
    estimate = EpochMs(SystemClock().wall_ms())
    patient = RedisLink(group.url, SystemClock(), durability="replicated")
    try:
        await RedisStore(patient, SystemClock()).append(0, [Draft("e-0", b"")], estimate, "c-0")
        with group.without_replicas(cut=cut):
            for _ in range(3):
                # On a connection of its own: nothing was written there before.
                await link.commands.connection_pool.disconnect()
                await lacks_a_replica(lambda: store.append(0, [Draft("e-1", b"")], estimate, "c-1"))
                await lacks_a_replica(lambda: store.head(0))
                await lacks_a_replica(lambda: store.read_intake({0: "0-0"}, 10, 0))
            promises_nothing = RedisStore(patient, SystemClock())
            assert await promises_nothing.time_us() > 0, "what promises nothing waits for nobody"
            assert not await promises_nothing.renew(0, "nobody", 1)
        (appended,) = await until_appended(store, estimate)
        assert appended.accepted, "its own first try is no duplicate"
    finally:
        await patient.close()
        await link.close()
    await asyncio.to_thread(group.wait_until_whole)


async def lacks_a_replica(call: Callable[[], Awaitable[Any]]) -> None:
    """Never acknowledged, for want of a replica; a machine that stands still may be the reason now and then."""

    async def said() -> bool:
        with pytest.raises(StoreUnavailableError) as refused:
            await call()
        return "replica" in str(refused.value)

    await until(said, within_s=WITHIN_S)


async def until_appended(store: RedisStore, estimate: EpochMs) -> Any:
    """The same command again until it is acknowledged."""
    while True:
        with contextlib.suppress(StoreUnavailableError):
            return await store.append(0, [Draft("e-1", b"")], estimate, "c-1")


async def test_too_few_replicas_are_complained_of(group: SentinelGroup) -> None:
    """With two replicas nothing is wrong; with one the operator is told what a failover would do."""
    primary = await asyncio.to_thread(group.wait_until_whole)
    link = RedisLink(group.url, SystemClock(), durability="replicated")
    store = RedisStore(link, SystemClock())
    killed = group.replicas[0]
    try:
        assert await store.complaints() == []
        killed.kill()
        await until(lambda: len(primary.ask("ROLE")[2]) == 1)
        (complaint,) = await store.complaints()
        assert "two" in complaint
    finally:
        killed.start()
        await link.close()
    await asyncio.to_thread(group.wait_until_whole)


async def test_the_first_command_is_not_refused_when_memory_is_full(group: SentinelGroup) -> None:
    """What waits for a replica writes a mark of its own: closes must commit under maxmemory, so the mark must too."""
    primary = await asyncio.to_thread(group.wait_until_whole)
    link = RedisLink(group.url, SystemClock(), durability="replicated")
    store = RedisStore(link, SystemClock())
    primary.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        assert (await store.head(0)) is not None
    finally:
        primary.ask("CONFIG", "SET", "maxmemory", "0")
        await link.close()
