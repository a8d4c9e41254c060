"""The engine process: what is made from what, started in order, stopped in reverse."""

import asyncio
import contextlib
from collections.abc import Callable
from itertools import count
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from engine.clock import AuctionClock, Clock, SystemClock
from engine.clock_board import ClockBoard
from engine.clock_sync import ClockSync
from engine.domain.instants import EpochMs
from engine.lease import LeaseKeeper
from engine.lifetime import calm_collector, patiently, stop_event, until_stopped
from engine.logs import without_secrets
from engine.metrics import EngineMetrics
from engine.pace import REALTIME, Pace
from engine.scheduler import Scheduler
from engine.settings import Settings
from engine.shard import INBOX_MAX, Shard, ShardLostError
from engine.store.link import RedisLink
from engine.store.protocol import ShardStore, StoreUnavailableError
from engine.store.redis import RedisStore

READ_MAX: Final = 512
"""Entries per shard and read."""
FORGET_EVERY_ROUNDS: Final = 300
"""Ten minutes between two looks at what has been closed for longer than it is kept."""
RELEASE_WITHIN_S: Final = 2.0

log = structlog.get_logger()


class Engine:
    """All shards of one engine process, the scheduler, the reader and the leases."""

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        settings: Settings,
        metrics: EngineMetrics,
        retries: Callable[[], int],
        pace: Pace = REALTIME,
        board: ClockBoard | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._retries = retries
        self._pace = pace
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self.shards: dict[int, Shard] = {}
        self.clock = AuctionClock(clock)
        self.sync = ClockSync(
            self.clock,
            store.time_us,
            every_s=pace.sample_every_s,
            board=board,
            is_free=lambda: not self.leases.epochs,
            judged=metrics.clock.count,
        )
        self.scheduler = Scheduler(
            self.clock,
            store,
            self.shards,
            shard_count=settings.shards,
            instance=settings.instance,
            metrics=metrics,
            pace=pace,
        )
        self.leases = LeaseKeeper(
            store,
            clock,
            settings.instance,
            settings.shards,
            lease_ms=settings.lease_ms,
            heartbeat_ms=settings.heartbeat_ms,
            gained=self._gain,
            lost=self._lose,
            members=store,
            fit=lambda: self.sync.in_step,
        )

    async def run(self) -> None:
        """Work until cancelled, then give the leases back."""
        await patiently(lambda: self._store.deployment(self._settings.shards))
        await self.sync.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._group = tasks
                tasks.create_task(self.sync.run(self._metrics.drift_ms.observe), name="clock")
                tasks.create_task(self.leases.run(), name="leases")
                tasks.create_task(self._read(), name="reader")
                tasks.create_task(self.scheduler.run(), name="scheduler")
                tasks.create_task(self._observe(), name="observer")
        finally:
            with contextlib.suppress(StoreUnavailableError, TimeoutError):
                await asyncio.wait_for(self.leases.release(), RELEASE_WITHIN_S)

    async def _gain(self, number: int, epoch: int) -> None:
        shard = Shard(
            number,
            epoch,
            self._store,
            self.clock,
            self.scheduler,
            self._metrics,
            batch_max=self._settings.batch_max,
            intake_retained=self._settings.intake_retained,
            holder=self._settings.instance,
            on_room=self._room.set,
        )
        self.shards[number] = shard
        self._tasks[number] = self._group.create_task(self._work(shard), name=f"shard-{number}")

    async def _work(self, shard: Shard) -> None:
        # Any other error ends the process: a shard that cannot work must not look alive, and a fresh start reloads all.
        try:
            await shard.run()
        except ShardLostError as error:
            log.warning("shard_fenced", shard=shard.number, error=str(error))
            # From a task of its own: dropping cancels this one.
            self._group.create_task(self.leases.drop(shard.number))

    async def _lose(self, number: int) -> None:
        shard = self.shards.pop(number, None)
        task = self._tasks.pop(number, None)
        if shard is not None:
            self.scheduler.forget(shard)
        if task is not None:
            task.cancel()

    async def _read(self) -> None:
        """Read every shard's intake behind what was read, and hand it over."""
        connections = self._store.connections
        while True:
            loaded = [shard for shard in self.shards.values() if shard.loaded and not shard.doubted]
            after = {shard.number: shard.read_to for shard in loaded if len(shard.inbox) < INBOX_MAX}
            self._room.clear()
            if not after:
                await self._wait_for_room()
                continue
            # Shards still to come, or without room, must not wait until this read ends.
            every_shard = len(after) == self._settings.shards
            block_ms = self._pace.read_block_ms if every_shard else self._pace.read_again_ms
            try:
                found = await self._store.read_intake(after, READ_MAX, block_ms)
            except StoreUnavailableError as error:
                log.warning("intake_unreadable", error=str(error))
                continue
            if self._store.connections != connections:
                connections = self._store.connections
                # Perhaps of another history: every shard compares its own with that first.
                for doubtful in self.shards.values():
                    doubtful.doubt()
                continue
            for number, entries in found.items():
                shard = self.shards.get(number)
                # A shard that was loaded again meanwhile reads from its own place.
                if shard is not None and shard.loaded and shard.read_to == after[number]:
                    shard.deliver(entries)

    async def _wait_for_room(self) -> None:
        # Not `wait_for`, which before Python 3.12 can swallow a cancellation (see engine.store.link).
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pace.read_block_ms / 1_000):
                await self._room.wait()

    async def _observe(self) -> None:
        seen_retries = 0
        for round_number in count(1):
            await asyncio.sleep(self._pace.observe_every_s)
            self._metrics.active.set(sum(len(shard.live) for shard in self.shards.values()))
            self._metrics.intake_lag.set(sum(len(shard.inbox) for shard in self.shards.values()))
            retries = self._retries()
            self._metrics.store_retries.inc(retries - seen_retries)
            seen_retries = retries
            with contextlib.suppress(StoreUnavailableError):
                for number in list(self.shards):
                    await self._store.deliver_replies(number)
                depths = [await self._store.parked(number) for number in list(self.shards)]
                self._metrics.parked.set(sum(depths))
                if round_number % FORGET_EVERY_ROUNDS == 0:
                    before = EpochMs(self.clock.now_ms() - self._settings.closed_retention_ms)
                    for number in list(self.shards):
                        await self._store.forget_closed(number, before)


async def serve(settings: Settings, registry: CollectorRegistry) -> None:
    """Run an engine against `settings.redis_url` until SIGTERM or SIGINT.

    Raises:
        DeploymentMismatchError: the store belongs to a deployment with other settings.
        RedisRefusedError: Redis refuses us (password, permission).
        RedisUrlError: the URL cannot be understood.
    """
    assert settings.redis_url is not None
    calm_collector()
    clock = SystemClock()
    link = RedisLink(settings.redis_url, clock, durability=settings.durability)
    store = RedisStore(link, clock, settings.store_limits())
    board = ClockBoard(store, clock, "engine", settings.instance)
    engine = Engine(store, clock, settings, EngineMetrics(registry), lambda: link.retries, board=board)
    stop = stop_event()
    log.info(
        "engine_starting",
        instance=settings.instance,
        shards=settings.shards,
        redis=without_secrets(settings.redis_url),
    )
    try:
        await until_stopped(stop, _checked(store, engine))
    finally:
        await link.close()
    log.info("engine_stopped")


async def _checked(store: RedisStore, engine: Engine) -> None:
    """Say what is wrong with the server's own configuration, then run."""

    async def complain() -> None:
        for complaint in await store.complaints():
            log.warning("store_misconfigured", complaint=complaint)

    await patiently(complain)
    await engine.run()
