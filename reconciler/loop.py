"""The reconciler's pass: look at every shard, compare, plan, ask for repairs, write down what was found.

One reconciler acts at a time, by lease; two would do no harm, because repairs are recognised when they are repeated. A pass
reads in pages and gives way after each, so ticks and commits are not disturbed.
"""

import asyncio
import contextlib
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Literal
from uuid import uuid4

import orjson
import structlog

from engine.clock import AuctionClock, MonotonicNs
from engine.contract.timers import mark
from engine.lease import LeaseKeeper
from engine.store.archive import ArchiveUnavailableError, AuditArchive
from engine.store.protocol import (
    IntakeFullError,
    KeyDamagedError,
    Lease,
    LeaseStore,
    ReconcilerStore,
    StoreUnavailableError,
)
from reconciler.drift import Drift, DriftKind, Severity, Views, compare, judge
from reconciler.metrics import ReconcilerMetrics
from reconciler.observations import Beat, LogMovedBackError, ShardEye, Trust, Wire
from reconciler.repairs import Plan, Repair, plan

SILENT_MS: Final = 3_000
"""An engine that has not been heard on the tick lane for so long, where it speaks every second, does not work."""
EVIDENCE_CHARS_MAX: Final = 4_000
BEAT_LOOK_S: Final = 0.5
LOOKS_PER_LEASE: Final = 6
"""A lease is taken over when it has stood still for `lease_ms`. An engine that gives one back has beaten within a third of
that, so at six looks per lease what stood still for five of them was taken, and not given."""
TURNS_MAX: Final = 1_000
LOOKS: Final = (Trust.WHOLE, Trust.WHOLE, Trust.BROKEN_TOO)
"""How often one pass begins a shard anew because its log moved back. One that does not link may have moved while it was
read; what it says behind the break is believed only when reading it again has changed nothing."""

Action = Literal["requested", "pending", "reported", "deferred", "left"]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a pass."""

    interval_ms: int
    repairs_max: int
    lease_ms: int
    """A heartbeat, of an engine or of a reconciler, that stands still for so long is frozen."""
    heartbeat_ms: int


@dataclass(frozen=True, slots=True)
class Finding:
    """A drift, and what was done about it."""

    drift: Drift
    action: Action
    correlation_id: str


@dataclass(slots=True)
class Report:
    """What one pass has seen and done."""

    auctions: int = 0
    took_ms: float = 0.0
    findings: list[Finding] = field(default_factory=list)


class Reconciler:
    """Makes passes over every shard."""

    def __init__(
        self,
        store: ReconcilerStore,
        leases: LeaseStore,
        archive: AuditArchive | None,
        clock: AuctionClock,
        metrics: ReconcilerMetrics,
        *,
        holder: str,
        shards: int,
        limits: Limits,
    ) -> None:
        self.wire = Wire(store, clock.clock, shards)
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._limits = limits
        self._eyes = [ShardEye(store, archive, self.wire, shard) for shard in range(shards)]
        self._beats: dict[int, Beat] = {}
        self._standing: set[tuple[DriftKind, int, str]] = set()
        """What was reported and still stands, so that it is written down once."""
        self._turns: deque[Drift] = deque(maxlen=TURNS_MAX)
        """What the watch over the beats has found and not yet written down."""
        self._leading = False
        self._lease = LeaseKeeper(
            leases,
            clock.clock,
            holder,
            1,
            lease_ms=limits.lease_ms,
            heartbeat_ms=limits.heartbeat_ms,
            gained=self._gain,
            lost=self._lose,
        )

    async def _gain(self, _shard: int, _epoch: int) -> None:
        self._leading = True

    async def _lose(self, _shard: int) -> None:
        self._leading = False

    async def run(self) -> None:
        """Make a pass every interval until cancelled, while the lease is ours."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.wire.run())
                tasks.create_task(self.watch_beats())
                tasks.create_task(self._lease.run())
                tasks.create_task(self._repeat())
        finally:
            with contextlib.suppress(StoreUnavailableError, TimeoutError):
                async with asyncio.timeout(1):
                    await self._lease.release()

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._limits.interval_ms / 1_000)
            if not self._leading:
                continue
            try:
                await self.make_pass()
            except (StoreUnavailableError, ArchiveUnavailableError) as error:
                log.warning("reconciler_waiting", error=str(error))

    async def watch_beats(self) -> None:
        """Watch every engine's heartbeat until cancelled, and write down, once each, what stands still and who takes over.

        A pass is too seldom for that: another engine has the shard long before the next one.
        """
        while True:
            try:
                await self.look_at_beats()
            except StoreUnavailableError:
                self._beats.clear()  # what was not watched did not stand still
            await asyncio.sleep(min(BEAT_LOOK_S, self._limits.lease_ms / LOOKS_PER_LEASE / 1_000))

    async def look_at_beats(self) -> None:
        """Look at every heartbeat once. Only the reconciler that acts writes anything down.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        for eye in self._eyes:
            known = await self._beat(eye.shard)
            still_ms = self._still_ms(known)
            if known.lease.holder and still_ms > self._limits.lease_ms:
                self._turns.append(_frozen(eye.shard, known.lease, still_ms))
        while self._turns:
            drift = self._turns[0]
            if self._leading and (drift.kind is DriftKind.SHARD_TAKEN_OVER or _name(drift) not in self._standing):
                stands = self._beats[drift.shard].lease.holder == drift.before
                tell = self._tell_standing if stands else self._write_down
                await tell(Finding(drift, "reported", f"rec-{uuid4().hex}"))
            self._turns.popleft()

    async def _beat(self, shard: int) -> Beat:
        lease = await self._store.lease(shard)
        known = self._beats.get(shard)
        if known is None or known.lease != lease:
            if known is not None:
                self._turn(shard, known, lease)
            self._beats[shard] = known = Beat(lease, self._clock.clock.monotonic_ns())
        return known

    def _turn(self, shard: int, known: Beat, lease: Lease) -> None:
        """A beat moves again. If it is another engine's, and this one's stood still, the shard was taken over."""
        frozen = _frozen(shard, known.lease, self._still_ms(known))
        was_told = _name(frozen) in self._standing
        self._standing.discard(_name(frozen))
        is_other = lease.holder not in ("", known.lease.holder) and known.lease.holder != ""
        if not is_other or self._still_ms(known) * LOOKS_PER_LEASE < self._limits.lease_ms * (LOOKS_PER_LEASE - 1):
            return
        if not was_told:
            self._turns.append(frozen)
        evidence = {**frozen.evidence, "taken_with_epoch": lease.epoch}
        self._turns.append(
            Drift(
                DriftKind.SHARD_TAKEN_OVER,
                shard,
                before=known.lease.holder,
                after=lease.holder,
                severity=Severity.NOTICE,
                evidence=evidence,
            )
        )

    def _still_ms(self, known: Beat) -> int:
        return (self._clock.clock.monotonic_ns() - known.since) // 1_000_000

    async def make_pass(self, *, repairing: bool = True) -> Report:
        """Look at every shard once, and ask for the repairs of what is found.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        report = Report()
        began = self._clock.clock.monotonic_ns()
        repairs_left = self._limits.repairs_max
        for eye in self._eyes:
            try:
                drifts, views = await self._look(eye, report)
            except KeyDamagedError as error:
                drifts, views = (
                    [_contradicted(eye.shard, str(error))],
                    {},
                )  # the other shards are looked at all the same
            planned = plan(drifts, views, repairs_left if repairing else 0)
            repairs_left -= len(planned.repairs)
            await self._act(planned, report, repairing=repairing)
        self._forget_mended(report)
        report.took_ms = (self._clock.clock.monotonic_ns() - began) / 1e6
        self._metrics.pass_ms.observe(report.took_ms)
        return report

    # Looking.

    async def _look(self, eye: ShardEye, report: Report) -> tuple[list[Drift], dict[str, Views]]:
        reason = ""
        for trust in LOOKS:
            try:
                return await self._look_once(eye, report, trust)
            except LogMovedBackError as error:
                # A failover took the end of the log back, and everything of the shard with it: what was heard is void.
                reason = str(error)
                log.warning("audit_log_read_anew", shard=eye.shard, reason=reason)
                self.wire.forget(eye.ledger.told)
                eye.ledger.begin()
        log.error("audit_log_unsteady", shard=eye.shard, reason=reason)
        drifts, drifted = await self._look_once(eye, report, Trust.NO_LOG)
        return [_contradicted(eye.shard, reason), *drifts], drifted

    async def _look_once(self, eye: ShardEye, report: Report, trust: Trust) -> tuple[list[Drift], dict[str, Views]]:
        drifts: list[Drift] = []
        drifted: dict[str, Views] = {}
        digest, live, seqs, seen = 0, 0, set(), 0
        async with aclosing(eye.views(trust)) as pages:
            async for observed, page in pages:
                now = self._clock.now_ms()
                seqs.add(observed.chain.seq)
                seen += len(page)
                for views in page:
                    found = compare(eye.shard, views, now)
                    if found:
                        drifts += found
                        drifted[views.auction_id] = views
                    if views.told is not None and views.told.is_live:
                        live += 1
                        digest ^= mark(views.told.auction)
                    self._metrics.drift_ms.observe(max((abs(drift.ms_moved) for drift in found), default=0))
        report.auctions += seen
        for told in eye.ledger.suspect.values():
            drifts += judge(eye.shard, told, self._clock.now_ms())
        if eye.ledger.broken is not None:
            drifts.append(_contradicted(eye.shard, eye.ledger.broken))
        drifts += await self._of_engine(eye.shard)
        if not drifts and len(seqs) == 1 and eye.ledger.whole:
            drifts += self._of_memory(eye.shard, seqs.pop(), live, digest)
        return drifts, drifted

    def _of_memory(self, shard: int, seq: int, live: int, digest: int) -> list[Drift]:
        """What the engine says it holds, against what is kept; only where both speak of the same place in the log."""
        heartbeat = self.wire.heartbeats.get(shard)
        if heartbeat is None or heartbeat.holding.seq != seq:
            return []
        holding = heartbeat.holding
        if (holding.live, holding.digest) == (live, digest):
            return []
        evidence = {"engine": heartbeat.instance, "seq": seq, "digest": f"{holding.digest:x}", "right": f"{digest:x}"}
        return [Drift(DriftKind.MEMORY_DIFFERS, shard, "", str(holding.live), str(live), evidence=evidence)]

    async def _of_engine(self, shard: int) -> list[Drift]:
        """Whether somebody works on the shard, and lives."""
        known = await self._beat(shard)
        lease, still_ms = known.lease, self._still_ms(known)
        heartbeat = self.wire.heartbeats.get(shard)
        heard = heartbeat.heard if heartbeat is not None else None
        unheard_ms = self._unheard_ms(self._clock.clock.monotonic_ns(), heard)
        frozen = _frozen(shard, lease, still_ms)
        if still_ms > self._limits.lease_ms:
            return [frozen]
        evidence = {**frozen.evidence, "unheard_ms": unheard_ms}
        if unheard_ms is not None and unheard_ms > SILENT_MS:
            return [Drift(DriftKind.ENGINE_SILENT, shard, "", lease.holder, "a heartbeat", evidence=evidence)]
        return []

    def _unheard_ms(self, now: MonotonicNs, heard: MonotonicNs | None) -> int | None:
        """How long the engine was not heard although we listened; None if we did not."""
        since = self.wire.listening_since
        if since is None:
            return None
        return (now - max(since, heard or since)) // 1_000_000

    # Acting.

    async def _act(self, planned: Plan, report: Report, *, repairing: bool) -> None:
        for repair in planned.repairs:
            action = await self._ask(repair)
            for drift in repair.drifts:
                await self._note(report, Finding(drift, action, repair.correlation_id))
        left: Action = "deferred" if repairing else "left"
        for drift in planned.deferred:
            report.findings.append(Finding(drift, left, ""))
        for drift in planned.reported:
            finding = Finding(drift, "reported", f"rec-{uuid4().hex}")
            report.findings.append(finding)
            if repairing and _name(drift) not in self._standing:
                await self._tell_standing(finding)

    async def _ask(self, repair: Repair) -> Action:
        """Append the repair to the intake; whether it is new there."""
        try:
            (appended,) = await self._store.append(
                repair.shard, [repair.draft], self._clock.now_ms(), uuid4().hex, urgent=True
            )
        except IntakeFullError as error:
            log.warning("repair_refused", shard=repair.shard, auction_id=repair.auction_id, error=str(error))
            return "deferred"
        return "requested" if appended.accepted else "pending"

    async def _note(self, report: Report, finding: Finding) -> None:
        """Write down what is done for the first time."""
        report.findings.append(finding)
        if finding.action not in ("pending", "deferred"):
            await self._write_down(finding)

    async def _tell_standing(self, finding: Finding) -> None:
        """Write down what stands. From before that it counts as told: a pass and the watch over the beats may both see it."""
        name = _name(finding.drift)
        self._standing.add(name)
        try:
            await self._write_down(finding)
        except BaseException:
            self._standing.discard(name)
            raise

    async def _write_down(self, finding: Finding) -> None:
        drift = finding.drift
        self._metrics.corrections[drift.kind].inc()
        log.warning(
            "drift_found",
            kind=drift.kind,
            shard=drift.shard,
            auction_id=drift.auction_id[:EVIDENCE_CHARS_MAX],
            action=finding.action,
            ms_moved=drift.ms_moved,
            correlation_id=finding.correlation_id,
        )
        await self._store.record_reconciliation(
            {
                "cause": drift.kind.value,
                "auction_id": drift.auction_id[:EVIDENCE_CHARS_MAX],
                "shard": str(drift.shard),
                "severity": drift.severity.value,
                "action": finding.action,
                "before": drift.before,
                "after": drift.after,
                "ms_moved": str(drift.ms_moved),
                "evidence": orjson.dumps(drift.evidence).decode()[:EVIDENCE_CHARS_MAX],
                "correlation_id": finding.correlation_id,
                "at": str(self._clock.now_ms()),
            }
        )

    def _forget_mended(self, report: Report) -> None:
        found = {_name(finding.drift) for finding in report.findings}
        # A beat that stands still is told by the watch over the beats, until it moves.
        self._standing = {name for name in self._standing if name in found or name[0] is DriftKind.HEARTBEAT_FROZEN}


def _frozen(shard: int, lease: Lease, still_ms: int) -> Drift:
    evidence = {"holder": lease.holder, "epoch": lease.epoch, "beat": lease.beat, "beat_stands_still_ms": still_ms}
    return Drift(DriftKind.HEARTBEAT_FROZEN, shard, "", lease.holder, "a beat", evidence=evidence)


def _contradicted(shard: int, reason: str) -> Drift:
    """The log of a shard is not one history from its beginning to the head that the shard keeps."""
    return Drift(DriftKind.LOG_CONTRADICTED, shard, after="one chain", evidence={"reason": reason})


def _name(drift: Drift) -> tuple[DriftKind, int, str]:
    return drift.kind, drift.shard, drift.auction_id
