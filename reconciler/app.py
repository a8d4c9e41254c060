"""The reconciler process: loops beside the engine that may fail, wait and try again without any auction noticing.

It compares every live auction with the audit log and asks for repairs (`reconciler.loop`), watches the clock of Redis
(`reconciler.clock_watch`), archives the audit streams (`reconciler.archiver`) and, where a webhook is set, forwards the
outbound events to it (`reconciler.forwarder`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final
from uuid import uuid4

import structlog
from prometheus_client import CollectorRegistry

from engine.clock import AuctionClock, Clock, SystemClock
from engine.clock_board import ClockBoard
from engine.clock_sync import ClockSync
from engine.lifetime import calm_collector, patiently, stop_event, until_stopped
from engine.logs import without_secrets
from engine.settings import Settings, SettingsError
from engine.store.archive import ArchiveUnavailableError, ArchiveUrlError, AuditArchive, archive_url
from engine.store.forwarder import ForwarderStore
from engine.store.link import RedisLink
from engine.store.protocol import StoreUnavailableError
from engine.store.reconciler_lease import ReconcilerLease
from engine.store.redis import RedisStore
from reconciler.archiver import Archiver
from reconciler.clock_watch import ClockWatch
from reconciler.forwarder import Forwarder
from reconciler.loop import Limits, Reconciler
from reconciler.metrics import ReconcilerMetrics
from reconciler.webhook import Webhook

FINISH_WITHIN_S: Final = 3.0
"""How long the end may take to archive what came last; what is left waits in Redis for the next start."""

Loop = Callable[[], Coroutine[Any, Any, None]]

log = structlog.get_logger()


async def serve(settings: Settings, registry: CollectorRegistry) -> None:
    """Run a reconciler against `settings.redis_url` until SIGTERM or SIGINT.

    Raises:
        SettingsError: the URL of the archive cannot be used.
        DeploymentMismatchError: the store belongs to a deployment with other settings.
        RedisRefusedError: Redis refuses us (password, permission).
        RedisUrlError: the URL cannot be understood.
    """
    assert settings.redis_url is not None
    archive = _archive(settings)
    clock = SystemClock()
    link = RedisLink(settings.redis_url, clock, durability=settings.durability)
    store = RedisStore(link, clock, settings.store_limits())
    metrics = ReconcilerMetrics(registry)
    archiver = Archiver(store, archive, metrics, shards=settings.shards, retained=settings.audit_retained)
    forwarder = _forwarder(settings, store, clock, metrics)
    auction_clock = AuctionClock(clock)
    board = ClockBoard(store, clock, "reconciler", settings.instance)
    sync = ClockSync(auction_clock, store.time_us, board=board, judged=metrics.clock.count)
    watch = ClockWatch(store, auction_clock, sync.witnesses, board, metrics, shards=settings.shards)
    reconciler = made(settings, store, archive, auction_clock, metrics)
    stop = stop_event()
    calm_collector()
    log.info("reconciler_starting", redis=without_secrets(settings.redis_url), archive=archive.shown)
    try:
        if await until_stopped(stop, patiently(lambda: store.deployment(settings.shards))):
            await until_stopped(stop, _together(_loops(archiver, forwarder, sync, watch, reconciler)))
            await _finish(archiver)
    finally:
        await archive.close()
        await link.close()
    log.info("reconciler_stopped")


def _loops(
    archiver: Archiver, forwarder: Forwarder | None, sync: ClockSync, watch: ClockWatch, reconciler: Reconciler
) -> list[Loop]:
    """What runs until the stop. A loop waits out what is away; if it ends or raises, the process ends and says why."""

    async def reconcile() -> None:
        await sync.start()
        await reconciler.run()

    forwarding = [] if forwarder is None else [forwarder.run]
    return [archiver.run, *forwarding, sync.run, watch.run, reconcile]


def made(
    settings: Settings, store: RedisStore, archive: AuditArchive, clock: AuctionClock, metrics: ReconcilerMetrics
) -> Reconciler:
    """A reconciler on a store, as the settings say."""
    limits = Limits(
        interval_ms=settings.reconcile_interval_ms,
        repairs_max=settings.reconcile_repairs_max,
        lease_ms=settings.lease_ms,
        heartbeat_ms=settings.heartbeat_ms,
    )
    lease = ReconcilerLease(store.link)
    # Not the instance alone: two that share it must not take the lease for their own.
    holder = f"{settings.instance}-{uuid4().hex[:8]}"
    return Reconciler(store, lease, archive, clock, metrics, holder=holder, shards=settings.shards, limits=limits)


def _forwarder(settings: Settings, store: RedisStore, clock: Clock, metrics: ReconcilerMetrics) -> Forwarder | None:
    if settings.webhook_url is None or settings.webhook_secret is None:
        return None
    webhook = Webhook(settings.webhook_url, settings.webhook_secret, clock)
    return Forwarder(ForwarderStore(store.link), store, webhook, clock, settings, metrics)


def _archive(settings: Settings) -> AuditArchive:
    try:
        return AuditArchive(archive_url(settings.audit_url, settings.data_dir))
    except ArchiveUrlError as error:
        raise SettingsError([f"AUCTION_TIMER_AUDIT_URL: {error}"]) from error


async def _together(loops: list[Loop]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for loop in loops:
            tasks.create_task(loop())


async def _finish(archiver: Archiver) -> None:
    """Archive what the engine has written last."""
    with contextlib.suppress(StoreUnavailableError, ArchiveUnavailableError, TimeoutError):
        async with asyncio.timeout(FINISH_WITHIN_S):
            while await archiver.archive_once():
                pass
