"""Engines and gateways: the production classes, each on a machine with clocks of its own, over a link that can fail."""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from itertools import count
from random import Random
from typing import cast

from prometheus_client import CollectorRegistry

from auction_timer.simulation.archive import Archive
from auction_timer.simulation.loop import PROCESS, VirtualLoop
from auction_timer.simulation.network import Link, Network
from auction_timer.simulation.timeline import ManualClock
from engine.app import Engine
from engine.clock import AuctionClock
from engine.clock_sync import ClockSync
from engine.metrics import EngineMetrics
from engine.pace import Pace
from engine.settings import Settings
from engine.store.archive import ArchiveUnavailableError, AuditArchive
from engine.store.protocol import Lease, StoreUnavailableError
from gateway.attendance import Attendance
from gateway.feeds import EventFeed, TickFeed
from gateway.hub import Hub
from gateway.metrics import GatewayMetrics
from reconciler.archiver import Archiver
from reconciler.loop import Limits, Reconciler, Report
from reconciler.metrics import ReconcilerMetrics

START_AGAIN_S = 0.5
"""A gateway whose store is away when it starts tries again so often."""


class Process:
    """What can be started, killed and frozen. One object is one machine; each start of it is a new incarnation."""

    attends = False
    """See `Link`."""

    def __init__(self, name: str, network: Network, random: Random, *, hostile: bool) -> None:
        self.name = name
        self.network = network
        self.clock = ManualClock(
            network.line, seed=random.randrange(2**32), drift_ppm=random.randrange(-50, 51), hostile=hostile
        )
        self.link: Link
        self._lives = count(1)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it is there, be it frozen."""
        return self._task is not None

    def start(self) -> None:
        """A new incarnation, which knows nothing."""
        assert self._task is None
        incarnation = f"{self.name}#{next(self._lives)}"
        self.link = Link(self.network, self.name, incarnation, attends=self.attends)
        context = contextvars.copy_context()
        context.run(PROCESS.set, self.name)
        self._task = asyncio.get_running_loop().create_task(self._live(incarnation), name=incarnation, context=context)
        self.network.witness.note(f"start {incarnation}")

    async def kill(self) -> None:
        """At once, wherever it stands: what it has sent arrives, nothing else does."""
        if self._task is not None:
            self.link.cut()
            await self._end()

    async def stop(self) -> None:
        """As SIGTERM does: it may tidy up."""
        if self._task is not None:
            await self._end()
            self.link.cut()

    def freeze(self) -> None:
        """SIGSTOP."""
        _loop().freeze(self.name)

    def thaw(self) -> None:
        """SIGCONT."""
        _loop().thaw(self.name)

    @property
    def is_frozen(self) -> bool:
        """Whether it is stopped."""
        return _loop().is_frozen(self.name)

    async def _end(self) -> None:
        task, self._task = self._task, None
        assert task is not None
        self.thaw()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _live(self, incarnation: str) -> None:
        """Work until cancelled. Any other end is one that nobody has asked for."""
        try:
            await self._work()
        except Exception as error:
            self.network.witness.ended_by_themselves.append(f"{incarnation}: {_innermost(error)!r}")
            self._task = None
            self.link.cut()

    async def _work(self) -> None:
        raise NotImplementedError


class EngineProcess(Process):
    """An engine."""

    def __init__(
        self, name: str, network: Network, random: Random, settings: Settings, pace: Pace, *, hostile: bool
    ) -> None:
        super().__init__(name, network, random, hostile=hostile)
        self._settings = settings.model_copy(update={"instance": name})
        self._pace = pace
        self._engine: Engine | None = None

    @property
    def is_settled(self) -> bool:
        """Whether its clock is in step, so that what the authority says later cannot lead it astray."""
        return self._engine is not None and bool(self._engine.leases.epochs)

    async def _work(self) -> None:
        metrics = EngineMetrics(CollectorRegistry())
        self._engine = Engine(self.link, self.clock, self._settings, metrics, lambda: 0, self._pace)
        try:
            await self._engine.run()
        finally:
            self._engine = None


class GatewayProcess(Process):
    """A gateway: its clock, its hub and its feeds. Producers send through it, clients watch in it."""

    attends = True

    def __init__(
        self,
        name: str,
        network: Network,
        random: Random,
        shards: int,
        pace: Pace,
        *,
        beats: bool,
        hostile: bool,
        ticks: bool,
    ) -> None:
        super().__init__(name, network, random, hostile=hostile)
        self._shards = shards
        self._pace = pace
        self._beats = beats
        self._ticks = ticks
        self.auction_clock: AuctionClock
        self.hub: Hub | None = None
        """None until it is ready."""
        self.farewells: list[Callable[[], None]] = []
        """What tells those who are connected that they are not any more."""

    async def _work(self) -> None:
        self.auction_clock = AuctionClock(self.clock)
        sync = ClockSync(self.auction_clock, self.link.time_us, every_s=self._pace.sample_every_s)
        hub = Hub(self.link, self.auction_clock, self._shards, GatewayMetrics(CollectorRegistry()))
        feed = EventFeed(self.link, hub, self.clock, self._shards)
        await sync.start()
        while True:
            try:
                await feed.start()
                break
            except StoreUnavailableError:
                await asyncio.sleep(START_AGAIN_S)
        self.hub = hub
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(sync.run())
                tasks.create_task(feed.run())
                if self._beats:
                    tasks.create_task(Attendance(self.link, self.auction_clock, self._shards).run())
                if self._ticks:
                    tasks.create_task(TickFeed(self.link, hub, self._shards).run())
        finally:
            self.hub = None
            for farewell in list(self.farewells):
                farewell()


class ReconcilerProcess(Process):
    """A reconciler, with its archiver.

    Args:
        retained: audit records per shard that stay in the stream although they are archived.
        whole: whether all of it runs. Where days pass only its passes do: it looks for heartbeats twice a second otherwise.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        random: Random,
        shards: int,
        pace: Pace,
        limits: Limits,
        archive: Archive,
        *,
        retained: int,
        hostile: bool,
        whole: bool,
    ) -> None:
        super().__init__(name, network, random, hostile=hostile)
        self._shards = shards
        self._pace = pace
        self._limits = limits
        # It asks for no more of an archive than this one has.
        self._archive = cast("AuditArchive", archive)
        self._retained = retained
        self._whole = whole

    async def _work(self) -> None:
        clock = AuctionClock(self.clock)
        sync = ClockSync(clock, self.link.time_us, every_s=self._pace.sample_every_s)
        metrics = ReconcilerMetrics(CollectorRegistry())
        archiver = Archiver(self.link, self._archive, metrics, shards=self._shards, retained=self._retained)
        reconciler = _WitnessedReconciler(
            self.link,
            _ReconcilerLease(self.link),
            self._archive,
            clock,
            metrics,
            holder=self.name,
            shards=self._shards,
            limits=self._limits,
        )
        reconciler.network = self.network
        await sync.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sync.run())
            if self._whole:
                tasks.create_task(archiver.run())
                tasks.create_task(reconciler.run())
            else:
                tasks.create_task(self._passes(archiver, reconciler))

    async def _passes(self, archiver: Archiver, reconciler: Reconciler) -> None:
        while True:
            await asyncio.sleep(self._limits.interval_ms / 1_000)
            with contextlib.suppress(StoreUnavailableError, ArchiveUnavailableError):
                await archiver.archive_once()
            with contextlib.suppress(StoreUnavailableError, ArchiveUnavailableError):
                await reconciler.make_pass()


class _WitnessedReconciler(Reconciler):
    """The witness hears of each of its passes."""

    network: Network

    async def make_pass(self, *, repairing: bool = True) -> Report:
        network = self.network
        found = network.witness.pass_begins(network.store.shards)
        report = await super().make_pass(repairing=repairing)
        requested = sum(finding.action == "requested" for finding in report.findings)
        network.witness.pass_ends(found, requested)
        return report


class _ReconcilerLease:
    """Implements `LeaseStore` for the one "shard" 0 of reconcilers, in a place where no shard is."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def claim(self, _shard: int, holder: str, seen: Lease | None) -> Lease:
        return await self._link.claim(-1, holder, seen)

    async def renew(self, _shard: int, holder: str, epoch: int) -> bool:
        return await self._link.renew(-1, holder, epoch)

    async def release(self, _shard: int, holder: str, epoch: int) -> None:
        await self._link.release(-1, holder, epoch)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop
