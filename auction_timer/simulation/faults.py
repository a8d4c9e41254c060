"""What goes wrong, and when: from the seed, before anything has happened.

    crash            an engine or a gateway is killed between any two of its steps; it is there again a little later
    pause            an engine makes no step for a while (SIGSTOP), then goes on with what it remembers
    outage           nobody reaches the store
    unattended       no gateway reaches the store: what nobody can bid in gets its time back (B8)
    damage           by hand: an entry among the deadlines is deleted or moved, a field of a hash changed, an end pushed past
                     its cap
    lost suffix      a failover: every connection breaks, and some shards stand where they stood a little earlier
    authority step   the authority's clock is set, by up to 100 ms for good, or by seconds to an hour until somebody mends it
    wall step        the date of a machine is set
    network          single calls are slow, lost on either way, or take effect twice

Bounds (architecture, section 4): the authority wanders by at most 100 ms and is set by at most 100 ms for good, so all in
all a stamp is wrong by less than 250 ms. While it is further off no process starts: it would believe what it is told, and
only the vote of the witnesses can protect it from that.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from auction_timer.simulation.damage import HARMS
from auction_timer.simulation.network import Fate, Network, copy_of
from auction_timer.simulation.processes import EngineProcess, GatewayProcess, Process, ReconcilerProcess
from auction_timer.simulation.timeline import Authority
from engine.domain.instants import HOUR_MS
from engine.store.protocol import Group

WANDER_US_MAX: Final = 100_000
WANDER_PPM: Final = 50
SET_MS_MAX: Final = 100
FAR_OFF_MS: Final = (-HOUR_MS, -10_000, -600, 600, 10_000, HOUR_MS)


@dataclass(frozen=True, slots=True)
class Trouble:
    """How much goes wrong."""

    events: int
    """Faults of the plan, not counting single calls."""
    outage_ms: int
    """The longest time that anything is away, frozen or far off."""
    unattended_ms: int
    """The longest time in which no gateway reaches the store; 0 for never."""
    lost_ms: int
    """The longest suffix that a failover loses."""
    calls: float
    """The part of all calls that fail too."""


SMALL_TROUBLE: Final = Trouble(events=6, outage_ms=4_000, unattended_ms=12_000, lost_ms=3_000, calls=0.03)
WEEK_TROUBLE: Final = Trouble(events=280, outage_ms=300_000, unattended_ms=0, lost_ms=60_000, calls=0.003)
NO_TROUBLE: Final = Trouble(events=0, outage_ms=0, unattended_ms=0, lost_ms=0, calls=0.0)


class Weather:
    """Decides the fate of single calls. In calm weather they take a fraction of a millisecond."""

    def __init__(self, random: Random, chance: float, *, answers_take_time: bool = True) -> None:
        self._random = random
        self._chance = chance
        self._answers_take_time = answers_take_time
        self.rough = True
        self.noted: Callable[[str], None] = lambda _kind: None

    def __call__(self, name: str, writes: bool) -> Fate:
        """The fate of a call."""
        random = self._random
        out_ms, back_ms = 0.05 + random.random(), 0.05 + random.random() if self._answers_take_time else 0.0
        if not self.rough or random.random() >= self._chance:
            return Fate(out_ms, back_ms)
        kind = random.choice(("slow", "request lost", "answer lost", "twice") if writes else ("slow", "answer lost"))
        self.noted(f"{name}: {kind}" if writes else f"reads: {kind}")
        match kind:
            case "slow":
                return Fate(out_ms + random.expovariate(1 / 400), back_ms + random.expovariate(1 / 400))
            case "request lost":
                return Fate(out_ms, back_ms, request_lost=True)
            case "answer lost":
                return Fate(out_ms, back_ms, answer_lost=True)
            case _:
                return Fate(out_ms, back_ms, again_ms=random.expovariate(1 / 300))


class Faults:
    """Everything that is planned to go wrong, brought about on virtual time."""

    def __init__(
        self,
        random: Random,
        trouble: Trouble,
        network: Network,
        authority: Authority,
        engines: list[EngineProcess],
        gateways: list[GatewayProcess],
        reconciler: ReconcilerProcess,
        weather: Weather,
    ) -> None:
        self._random = random
        self._trouble = trouble
        self._network = network
        self._authority = authority
        self._engines = engines
        self._gateways = gateways
        self._reconciler = reconciler
        self._weather = weather
        self._far_off = 0
        self._in_step = asyncio.Event()
        self._in_step.set()
        self._under_way: set[asyncio.Task[None]] = set()
        self._set_ms = 0
        self._wander_us = 0
        self._wander_by = WANDER_PPM
        weather.noted = lambda kind: network.witness.fault(f"network, {kind}")

    async def run(self, span_ms: int) -> None:
        """Bring about what is planned for a span of time; when this returns, everybody is well again."""
        moments = sorted(self._random.uniform(0, span_ms) for _ in range(self._trouble.events))
        kinds: list[Callable[[], Awaitable[None]]] = [
            self._crash_engine,
            self._crash_engine,
            self._crash_gateway,
            self._crash_reconciler,
            self._pause,
            self._pause,
            self._outage,
            self._unattended,
            self._unattended,
            self._damage,
            self._damage,
            self._lose_suffix,
            self._lose_suffix,
            self._step_authority,
            self._step_far,
            self._step_wall,
        ]
        now_ms = 0.0
        for at_ms in moments:
            await asyncio.sleep((at_ms - now_ms) / 1_000)
            now_ms = at_ms
            task = asyncio.ensure_future(self._random.choice(kinds)())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await asyncio.sleep(max(0.0, span_ms - now_ms) / 1_000)
        while self._under_way:
            await asyncio.gather(*self._under_way)
        self._weather.rough = False

    async def wander(self) -> None:
        """The authority's own oscillator: it drifts to and fro within its bound, until cancelled."""
        every_s = 5.0 if self._trouble.outage_ms < 60_000 else 120.0
        while True:
            await asyncio.sleep(every_s)
            by_us = round(self._wander_by * every_s)
            if abs(self._wander_us + by_us) > WANDER_US_MAX:
                self._wander_by = -self._wander_by
                continue
            self._wander_us += by_us
            self._authority.offset_us += by_us

    async def revive(self) -> None:
        """Start every process that has ended by itself: a supervisor would."""
        for process in (*self._engines, *self._gateways, self._reconciler):
            if not process.is_running:
                await self._start(process)

    def _for_ms(self) -> float:
        return self._random.choice([50.0, self._random.uniform(0, self._trouble.outage_ms)])

    def _fault(self, kind: str, detail: str = "") -> None:
        self._network.witness.fault(kind, detail)

    async def _start(self, process: Process) -> None:
        await self._in_step.wait()
        if not process.is_running:
            process.start()

    async def _crash(self, process: Process) -> None:
        if not process.is_running:
            return
        self._fault("crash", process.name)
        for_ms = self._for_ms()
        await process.kill()
        await asyncio.sleep(for_ms / 1_000)
        await self._start(process)

    async def _crash_engine(self) -> None:
        await self._crash(self._random.choice(self._engines))

    async def _crash_gateway(self) -> None:
        await self._crash(self._random.choice(self._gateways))

    async def _crash_reconciler(self) -> None:
        await self._crash(self._reconciler)

    async def _pause(self) -> None:
        engine, for_ms = self._random.choice(self._engines), self._for_ms()
        if engine.is_frozen or not engine.is_running:
            return
        self._fault("pause", f"{engine.name} {for_ms}")
        engine.freeze()
        await asyncio.sleep(for_ms / 1_000)
        engine.thaw()

    async def _outage(self) -> None:
        if self._network.away:
            return
        self._fault("outage")
        self._network.away = True
        self._network.break_connections()
        await asyncio.sleep(self._for_ms() / 1_000)
        self._network.away = False

    async def _unattended(self) -> None:
        network = self._network
        if network.cut_off or not self._trouble.unattended_ms:
            return
        self._fault("unattended")
        network.cut_off = {gateway.name for gateway in self._gateways}
        await asyncio.sleep(self._random.uniform(0.4, 1.0) * self._trouble.unattended_ms / 1_000)
        network.cut_off = set()

    async def _damage(self) -> None:
        network = self._network
        shard = self._random.choice(list(network.witness.shards))
        memory = network.store.shards[shard]
        standing = sorted([*memory.groups[Group.LIVE], *memory.groups[Group.PAUSED]])
        if standing:
            harm = self._random.choice(HARMS)
            network.witness.damaged(harm(memory, shard, self._random.choice(standing), network.line.now_ms))

    async def _lose_suffix(self) -> None:
        network, store, witness = self._network, self._network.store, self._network.witness
        chosen = [shard for shard in witness.shards if self._random.random() < 0.7]
        lost_ms = self._random.uniform(0, self._trouble.lost_ms)
        kept = {
            shard: (copy_of(store.shards[shard]), witness.mark(shard), len(witness.shards[shard].lanes))
            for shard in chosen
        }
        await asyncio.sleep(lost_ms / 1_000)
        if network.away:
            return
        self._fault("lost suffix", f"{chosen} {lost_ms}")
        network.away = True
        network.break_connections()
        for shard, (memory, mark, failovers) in kept.items():
            was = store.shards[shard]
            if failovers != len(witness.shards[shard].lanes):
                continue  # another failover came between: what we remember was lost by it
            # The ids of a stream go on from the clock of the new primary: what was lost is not called the same again.
            memory.serial = was.serial
            witness.lost(shard, mark, was.updates, memory)
            store.shards[shard] = memory
        await asyncio.sleep(self._for_ms() / 1_000)
        network.away = False

    async def _step_authority(self) -> None:
        by_ms = self._random.randint(-SET_MS_MAX, SET_MS_MAX)
        if abs(self._set_ms + by_ms) > SET_MS_MAX:
            return
        self._fault("authority step", str(by_ms))
        self._set_ms += by_ms
        self._authority.step(by_ms)

    async def _step_far(self) -> None:
        if self._far_off or not all(gateway.hub is not None for gateway in self._gateways):
            return
        if not all(engine.is_running and engine.is_settled for engine in self._engines):
            return
        by_ms = self._random.choice(FAR_OFF_MS)
        self._fault("authority far off", str(by_ms))
        self._far_off = by_ms
        self._in_step.clear()
        self._authority.step(by_ms)
        await asyncio.sleep(self._for_ms() / 1_000)
        self._authority.step(-by_ms)
        self._far_off = 0
        self._in_step.set()

    async def _step_wall(self) -> None:
        by_ms = self._random.choice(FAR_OFF_MS)
        self._fault("wall step", str(by_ms))
        self._random.choice([*self._engines, *self._gateways]).clock.step_wall(by_ms)
