"""`auction-timer reconciler --once`: one pass, for people and for cron.

It listens to the tick lane for a moment first: what engines say on the wire is one of the views that are compared, and a
heartbeat that stands still can only be seen by watching it.
"""

import asyncio
import contextlib
import sys
from typing import Final

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from auction_timer.preflight import Role, usable
from auction_timer.processes import EXIT_CONFIG
from auction_timer.roles import EXIT_FAILURE, EXIT_OK, EXIT_UNAVAILABLE, loop_factory
from engine import logs
from engine.clock import AuctionClock, SystemClock
from engine.clock_sync import ClockSync
from engine.lifetime import calm_collector
from engine.settings import Settings, SettingsError
from engine.store.archive import ArchiveUrlError, AuditArchive, archive_url
from engine.store.link import RedisLink, RedisRefusedError, RedisUrlError
from engine.store.protocol import DeploymentMismatchError, Lease, StoreUnavailableError
from engine.store.reconciler_lease import ReconcilerLease
from engine.store.redis import RedisStore
from reconciler.app import made
from reconciler.loop import Reconciler, Report
from reconciler.metrics import ReconcilerMetrics

ANSWER_WITHIN_MS: Final = 2_000
"""A person waits for the answer."""
LISTEN_LEAST_MS: Final = 3_500
"""An engine speaks every second, and is silent after three."""
HOLDER: Final = "once"


def once(settings: Settings, *, printing: bool, repairing: bool) -> int:
    """Make one pass; the exit code: 0 nothing found, 1 drift, 69 if Redis does not answer, 78 if the settings are wrong."""
    logs.configure("reconciler", form=settings.log_format, level=settings.log_level)
    calm_collector()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            report, acted = runner.run(_once(usable(settings, Role.RECONCILER), repairing=repairing))
    except StoreUnavailableError as error:
        print(f"auction-timer: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    except (SettingsError, RedisUrlError, RedisRefusedError, DeploymentMismatchError, ArchiveUrlError) as error:
        print(f"auction-timer: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if printing:
        show(report)
        if repairing and not acted:
            print("another reconciler is at work: the repairs are left to it")
    return EXIT_FAILURE if report.findings else EXIT_OK


async def _once(settings: Settings, *, repairing: bool) -> tuple[Report, bool]:
    assert settings.redis_url is not None
    clock = SystemClock()
    link = RedisLink(settings.redis_url, clock, call_deadline_ms=ANSWER_WITHIN_MS, durability=settings.durability)
    store = RedisStore(link, clock, settings.store_limits())
    archive = AuditArchive(archive_url(settings.audit_url, settings.data_dir))
    auction_clock = AuctionClock(clock)
    reconciler = made(settings, store, archive, auction_clock, ReconcilerMetrics(CollectorRegistry()))
    try:
        await store.deployment(settings.shards)
        await ClockSync(auction_clock, store.time_us).start()
        return await _listen_and_look(reconciler, ReconcilerLease(link), settings.lease_ms, repairing=repairing)
    finally:
        await archive.close()
        await link.close()


async def _listen_and_look(
    reconciler: Reconciler, leases: ReconcilerLease, lease_ms: int, *, repairing: bool
) -> tuple[Report, bool]:
    seen = await leases.claim(0, HOLDER, None) if repairing else Lease("", 0, 0)
    listening = [asyncio.create_task(work()) for work in (reconciler.wire.run, reconciler.watch_beats)]
    try:
        await asyncio.sleep(max(LISTEN_LEAST_MS, 2 * lease_ms) / 1_000)
        # One that died holds the lease still, and does not beat any more.
        held = await leases.claim(0, HOLDER, seen) if repairing else seen
        acting = held.holder == HOLDER
        try:
            return await reconciler.make_pass(repairing=acting), acting
        finally:
            if acting:
                await leases.release(0, HOLDER, held.epoch)
    finally:
        for task in listening:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def show(report: Report) -> None:
    """Print what a pass has found and done."""
    print(f"{report.auctions} auctions compared in {report.took_ms:.0f} ms: {len(report.findings)} drifts")
    if not report.findings:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("drift", "severity", "shard", "auction", "found", "should be", "moves ms", "done"):
        table.add_column(column, overflow="fold")
    for finding in report.findings:
        drift = finding.drift
        table.add_row(
            drift.kind.value,
            drift.severity.value,
            str(drift.shard),
            drift.auction_id,
            drift.before,
            drift.after,
            str(drift.ms_moved),
            finding.action,
        )
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
