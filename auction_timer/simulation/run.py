"""One simulation: everything from one seed, from an empty store to the verdict."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

import structlog

from auction_timer.simulation import loop
from auction_timer.simulation.archive import Archive
from auction_timer.simulation.checkers import CHECKERS, Evidence
from auction_timer.simulation.clients import Client
from auction_timer.simulation.faults import NO_TROUBLE, SMALL_TROUBLE, WEEK_TROUBLE, Faults, Trouble, Weather
from auction_timer.simulation.network import Network
from auction_timer.simulation.processes import EngineProcess, GatewayProcess, ReconcilerProcess
from auction_timer.simulation.timeline import BORN_MS, Authority, Timeline
from auction_timer.simulation.witness import Witness
from auction_timer.simulation.workload import SMALL, WEEK, Scale, Workload
from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS
from engine.lifetime import CALM
from engine.pace import Pace
from engine.settings import Settings
from engine.store.limits import StoreLimits
from engine.store.memory import MemoryStore
from engine.store.protocol import Group
from reconciler.loop import Limits

DAY_MS: Final = 24 * HOUR_MS
FAULTS_PER_DAY: Final = 40


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated."""

    seed: int
    auctions: int
    span_ms: int
    scale: Scale
    trouble: Trouble
    pace: Pace
    engines: int = 2
    gateways: int = 2
    shards: int = 2
    lease_ms: int = 1_500
    heartbeat_ms: int = 500
    clients: int = 6
    client_stays_s: float = 6.0
    idle_ms: int = 0
    """See `Network`."""
    beats: bool = True
    """Whether gateways prove once a second that producers can write, without which there are no outages."""
    limits: StoreLimits = field(default_factory=lambda: StoreLimits(outage_extension_ms=3_000))
    reconcile_ms: int = 1_000
    audit_retained: int = 5
    """Audit records per shard that stay in the stream although they are archived."""
    ticks: bool = True
    """Whether gateways listen to the tick lane. Engines tick in any case."""
    hostile: bool = True
    """Whether sleeps end early, as those of real loops do, and answers take time of their own."""


def small(seed: int, *, faults: bool = True) -> Plan:
    """Half a minute of five auctions: what a suite runs a thousand of."""
    pace = Pace(
        sample_every_s=2.0,
        look_again_ms=1_000,
        heartbeat_ms=2_000,
        read_block_ms=2_000,
        read_again_ms=300,
        observe_every_s=30.0,
    )
    trouble = SMALL_TROUBLE if faults else NO_TROUBLE
    return Plan(seed, auctions=5, span_ms=25_000, scale=SMALL, trouble=trouble, pace=pace)


def some_days(seed: int, *, auctions: int, days: float, faults: bool = True) -> Plan:
    """Days of auctions as people hold them, with engines that look less often than real ones while nothing happens."""
    pace = Pace(
        sample_every_s=300.0,
        look_again_ms=60_000,
        tick_round_ms=300_000,
        heartbeat_ms=60_000,
        observe_every_s=3_600.0,
    )
    trouble = replace(WEEK_TROUBLE, events=max(5, round(days * FAULTS_PER_DAY))) if faults else NO_TROUBLE
    return Plan(
        seed,
        auctions=auctions,
        span_ms=max(HOUR_MS, round(days * DAY_MS)),
        scale=WEEK,
        trouble=trouble,
        pace=pace,
        lease_ms=90_000,
        heartbeat_ms=30_000,
        clients=auctions,
        client_stays_s=6 * 3_600.0,
        idle_ms=60_000,
        beats=False,
        limits=StoreLimits(),
        reconcile_ms=10 * MINUTE_MS,
        audit_retained=200,
        ticks=False,
        hostile=False,
    )


@dataclass(slots=True)
class Outcome:
    """What became of a simulation."""

    plan: Plan
    trace: str
    virtual_ms: int
    counts: dict[str, int]
    faults: dict[str, int]
    violations: dict[str, list[str]] = field(default_factory=dict)
    cpu_s: float = field(default=0.0, compare=False)
    """What it has cost, where somebody has measured it."""

    @property
    def is_good(self) -> bool:
        """Whether no checker found anything."""
        return not any(self.violations.values())


def simulate(plan: Plan) -> Outcome:
    """Run a plan. The same plan always has the same outcome."""
    line = Timeline()
    with _silence(), _calm_collector():
        return loop.run(line, lambda: _Simulation(plan, line).run())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What engines log about faults that were made on purpose helps nobody, and takes most of the time."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


@contextlib.contextmanager
def _calm_collector() -> Iterator[None]:
    """The logs of a week are a million small values without a cycle: the collector need not walk them all the time."""
    before = gc.get_threshold()
    gc.set_threshold(*CALM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Simulation:
    def __init__(self, plan: Plan, line: Timeline) -> None:
        self._plan = plan
        self._line = line
        self._authority = Authority(line)
        self._store = MemoryStore(self._authority)
        self._witness = Witness(line, plan.shards)
        self._weather = Weather(self._random("network"), plan.trouble.calls, answers_take_time=plan.hostile)
        network = Network(line, self._store, self._witness, self._weather, plan.limits, plan.idle_ms)
        self._store.limits = plan.limits
        self._archive = Archive(self._weather)
        # Not from the environment: a seed must repeat everywhere.
        settings = Settings.model_construct(
            shards=plan.shards,
            lease_ms=plan.lease_ms,
            heartbeat_ms=plan.heartbeat_ms,
            batch_max=4,
            intake_max=10_000_000,
            intake_retained=5_000_000,
        )
        self._engines = [
            EngineProcess(
                f"engine-{n}", network, self._random(f"engine {n}"), settings, plan.pace, hostile=plan.hostile
            )
            for n in range(plan.engines)
        ]
        self._gateways = [
            GatewayProcess(
                f"gateway-{n}",
                network,
                self._random(f"gateway {n}"),
                plan.shards,
                plan.pace,
                beats=plan.beats,
                hostile=plan.hostile,
                ticks=plan.ticks,
            )
            for n in range(plan.gateways)
        ]
        self._reconciler = ReconcilerProcess(
            "reconciler",
            network,
            self._random("reconciler"),
            plan.shards,
            plan.pace,
            Limits(plan.reconcile_ms, repairs_max=100, lease_ms=plan.lease_ms, heartbeat_ms=plan.heartbeat_ms),
            self._archive,
            retained=plan.audit_retained,
            hostile=plan.hostile,
            whole=plan.ticks,
        )
        self._faults = Faults(
            self._random("faults"),
            plan.trouble,
            network,
            self._authority,
            self._engines,
            self._gateways,
            self._reconciler,
            self._weather,
        )
        self._workload = Workload(
            plan.seed, plan.auctions, plan.span_ms, plan.scale, line, self._store, self._gateways, plan.shards
        )
        self._clients = [
            Client(
                auction_id,
                self._gateways,
                self._random(f"client {n}"),
                (comes_at - BORN_MS) / 1_000,
                plan.client_stays_s,
            )
            for n in range(plan.clients)
            for auction_id, comes_at in [self._workload.watched(n)]
        ]

    def _random(self, what: str) -> Random:
        return Random(f"{self._plan.seed} {what}")  # noqa: S311 - a sequence that a seed repeats

    async def run(self) -> Outcome:
        for process in (*self._engines, *self._gateways, self._reconciler):
            process.start()
        watching = [asyncio.create_task(client.watch()) for client in self._clients]
        wandering = asyncio.create_task(self._faults.wander())
        try:
            await asyncio.gather(self._workload.run(), self._faults.run(self._plan.span_ms))
            await self._settle()
        finally:
            wandering.cancel()
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, wandering, return_exceptions=True)
            for process in (self._reconciler, *self._gateways, *self._engines):
                await process.stop()
        return self._outcome()

    async def _settle(self) -> None:
        """Everybody is well: wait until every auction is over that time can end, and everyone has heard of it."""
        grace_s = 4 * self._plan.lease_ms / SECOND_MS + self._plan.client_stays_s / 3
        await self._faults.revive()
        while True:
            await asyncio.sleep(grace_s)
            ends = [
                ends_at
                for memory in self._store.shards.values()
                for ends_at in memory.groups[Group.LIVE].values()
                if ends_at + grace_s * SECOND_MS > self._line.now_ms
            ]
            if not ends:
                return
            await asyncio.sleep(
                (max(ends) - self._line.now_ms) / SECOND_MS + grace_s if max(ends) > self._line.now_ms else 0
            )

    def _outcome(self) -> Outcome:
        evidence = Evidence(self._witness, self._store, self._clients, self._archive.held, self._line.now_ms)
        counts = dict(self._witness.counts)
        records = [record["event_type"] for memory in evidence.shards.values() for record in memory.audit]
        counts["closes"] = records.count("auction_timer_ended")
        counts["extensions for outages"] = records.count("auction_timer_extended_for_outage")
        counts["extensions"] = records.count("auction_timer_extended")
        counts["closes lost by failovers"] = sum(
            len(commit.closes) for history in self._witness.shards.values() for commit in history.lost
        )
        counts["archived records of lost histories"] = sum(
            seq in held and held[seq].fields != record
            for shard, memory in evidence.shards.items()
            for held in [self._archive.held[shard]]
            for record in memory.audit
            for seq in [int(record["seq"])]
        )
        counts["late bids"] = records.count("late_bid_ignored")
        counts["client connections"] = sum(client.connections for client in self._clients)
        counts["events seen by clients"] = sum(
            len(stretch.cursors) for client in self._clients for stretch in client.stretches
        )
        counts["ticks seen by clients"] = sum(client.ticks for client in self._clients)
        return Outcome(
            self._plan,
            self._witness.trace,
            self._line.now_ns // 1_000_000,
            counts,
            dict(self._witness.faults),
            {name: check(evidence) for name, check in CHECKERS.items()},
        )
