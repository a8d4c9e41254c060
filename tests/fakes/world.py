"""A small world for the engine: one store, one authority, machines with clocks of their own, one timeline for all."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry

from engine.agenda import Agenda
from engine.app import Engine
from engine.clock import AuctionClock, MonotonicNs
from engine.contract.timers import TimerRecord
from engine.domain.fold import next_due
from engine.domain.instants import MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.policy import Policy
from engine.metrics import EngineMetrics
from engine.settings import Settings
from engine.shard import Shard
from engine.store.memory import MemoryStore, ShardMemory
from engine.store.protocol import Appended, Draft
from tests.fakes.clock import BORN_MS, Authority, ManualClock, Timeline
from tests.fakes.store import FaultyStore

QUICK: Final = Policy(soft_close_window_ms=MINUTE_MS, extension_ms=MINUTE_MS, total_cap_ms=5 * MINUTE_MS)
"""A policy whose window is a minute, so that a whole life fits into a few."""


def at(seconds: float) -> EpochMs:
    """The instant so many seconds after the world began."""
    return EpochMs(BORN_MS + round(seconds * SECOND_MS))


class World:
    """What the machines of a test share."""

    def __init__(self) -> None:
        self.line = Timeline()
        self.authority = Authority(self.line)
        self.store = MemoryStore(self.authority)
        self._commands = 0

    @property
    def shard(self) -> ShardMemory:
        """What the store holds of shard 0."""
        return self.store.shards[0]

    async def append(self, *drafts: Draft, shard: int = 0) -> list[Appended]:
        """Events reach the intake now."""
        self._commands += 1
        return await self.store.append(shard, drafts, self.authority.now_ms, f"command-{self._commands}")

    def clock(self, *, seed: int = 0, drift_ppm: int = 0, ahead_ms: int = 0) -> AuctionClock:
        """The auction clock of a machine, in step with the authority, or so much ahead of it."""
        machine = ManualClock(self.line, seed=seed, drift_ppm=drift_ppm)
        clock = AuctionClock(machine)
        now = machine.monotonic_ns()
        clock.observe(now, MonotonicNs(now), self.authority() + ahead_ms * 1_000)
        return clock

    def engine(self, name: str = "engine-1", *, store: Any = None, seed: int = 0, **settings: Any) -> Engine:
        """A whole engine on a machine of its own."""
        chosen = {"shards": 1, "instance": name} | settings
        machine = ManualClock(self.line, seed=seed)
        registry = CollectorRegistry()
        made = Engine(
            store or FaultyStore(self.store),
            machine,
            Settings(_env_file=None, **chosen),
            EngineMetrics(registry),
            lambda: 0,
        )
        made.registry = registry  # type: ignore[attr-defined]
        return made

    def facts(self, auction_id: str) -> list[str]:
        """What has happened to an auction, by its audit records."""
        return [record["event_type"] for record in self.shard.audit if record["auction_id"] == auction_id]

    def announced(self, auction_id: str) -> list[str]:
        """What was announced about an auction on the event lane."""
        return [update.type for update in self.shard.updates if update.auction_id == auction_id]

    def parked(self) -> dict[str, dict[str, Any]]:
        """The troubleshooting queue."""
        return {command_id: orjson.loads(body) for command_id, body in self.shard.troubleshooting.items()}

    def answers(self, reply_to: str) -> list[dict[str, Any]]:
        """What was answered to `reply_to`."""
        return [orjson.loads(body) for _, _, body in self.store.replies[reply_to]]


class StepCalendar:
    """Implements `engine.shard.Calendar`: remembers what is due, and leaves ticks out."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.entered: list[tuple[str, bool]] = []

    def enter(self, records: Iterable[TimerRecord], *, tick_now: bool) -> None:
        for record in records:
            due = next_due(record.auction)
            self.agenda.set(record.auction.auction_id, due[0] if due else None)
            self.entered.append((record.auction.auction_id, tick_now))

    def wake_at(self, auction_id: str, instant: EpochMs) -> None:
        self.agenda.set(auction_id, instant)


class Worker:
    """Shard 0 worked step by step, by whoever holds it, without a scheduler: time and turns pass only when told to."""

    def __init__(
        self,
        world: World,
        *,
        store: Any = None,
        name: str = "worker-1",
        clock: AuctionClock | None = None,
        batch_max: int = 256,
        intake_retained: int = 100_000,
    ) -> None:
        self.world = world
        self.store = store or world.store
        self.name = name
        self.clock = clock or world.clock()
        self.batch_max = batch_max
        self.intake_retained = intake_retained
        self.registry = CollectorRegistry()
        self.metrics = EngineMetrics(self.registry)
        self.calendar = StepCalendar()
        self.turns = 0
        self.shard: Shard

    async def begin(self) -> "Worker":
        """Claim the shard, with whatever right, and load it."""
        lease = await self.world.store.claim(0, self.name, await self.world.store.lease(0))
        self.calendar = StepCalendar()
        self.shard = Shard(
            0,
            lease.epoch,
            self.store,
            self.clock,
            self.calendar,
            self.metrics,
            batch_max=self.batch_max,
            intake_retained=self.intake_retained,
            holder=self.name,
        )
        await self.shard.load()
        return self

    async def look(self) -> None:
        """Take what waits in the intake, and what is due."""
        found = await self.world.store.read_intake({0: self.shard.read_to}, 512, 0)
        if found:
            self.shard.deliver(found[0])
        due = self.calendar.agenda.pop_due(self.clock.now_ms(), 10_000)
        if due:
            self.shard.fall_due([auction_id for _, auction_id in due])

    async def work(self, turns_max: int = 2_000) -> None:
        """Take turns until nothing waits and nothing is due."""
        for _ in range(turns_max):
            await self.look()
            if not self.shard.inbox and not self.shard.due:
                return
            self.turns += 1
            await self.shard.turn()
        raise AssertionError(f"still at work after {turns_max} turns: it never ends")

    async def live_until(self, instant: int) -> None:
        """Let time pass up to `instant`, at work at every instant at which something is due."""
        line = self.world.line
        while True:
            await self.work()
            due_at = self.calendar.agenda.next_at()
            left_ms = instant - self.world.authority.now_ms
            if due_at is None or left_ms <= 0 or due_at - self.clock.now_ms() > left_ms:
                break
            line.advance(max(0.001, due_at - self.clock.now_ms()))
        line.advance(max(0, instant - self.world.authority.now_ms))
        await self.work()

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        return self.registry.get_sample_value(name, labels) or 0.0


async def passes(seconds: float) -> None:
    """On a virtual loop: let time pass."""
    await asyncio.sleep(seconds)
