"""What producers do, from a seed: auctions under policies of every kind, and everything that may come to them.

Each auction is one coroutine that lives on virtual time: it is announced early, late or after its own end, gets bids, storms
of bids around the end that stands at the moment, repetitions, pauses, other ends, cancellations by auction and by offer, and
events that nobody can apply. Sends overlap, as those of many producers do.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

from auction_timer.simulation.processes import GatewayProcess
from auction_timer.simulation.timeline import BORN_MS, Timeline
from engine.contract.intake import Actor, CommandType, Context, EventType, IntakeEvent, encode
from engine.contract.keys import shard_of
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.policy import ExtendsOn, ExtensionMode, Policy
from engine.domain.withdrawal import WithdrawalReason
from engine.store.memory import MemoryStore
from engine.store.protocol import Draft, StoreUnavailableError

TRIES_MAX: Final = 6
"""How often a producer sends an event that nobody answers, before it leaves it at that."""
AROUND_THE_END_MS: Final = (-3_000, -1_000, -200, -20, -2, -1, 0, 0, 1, 5, 250)
"""When the bids of a storm are sent, seen from the end that stands."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How long things take, in ms."""

    lengths_ms: tuple[int, ...]
    """An auction is open for one of these, or anything in between."""
    windows_ms: tuple[int, ...]
    extensions_ms: tuple[int, ...]
    caps_ms: tuple[int, ...]
    lead_ms: int
    """How long before its start an auction is announced, at most."""
    grid_ms: int
    """Starts and ends are multiples of this."""
    storms_max: int
    bids_max: int
    """Outside storms, per auction."""


SMALL: Final = Scale(
    lengths_ms=(3_000, 8_000, 20_000),
    windows_ms=(0, 1_000, 4_000, 10_000),
    extensions_ms=(1, 500, 2_000, 6_000),
    caps_ms=(0, 3_000, 15_000),
    lead_ms=4_000,
    grid_ms=1,
    storms_max=4,
    bids_max=5,
)
WEEK: Final = Scale(
    lengths_ms=(5 * MINUTE_MS, 30 * MINUTE_MS, 2 * HOUR_MS, 8 * HOUR_MS),
    windows_ms=(0, MINUTE_MS, 5 * MINUTE_MS, 15 * MINUTE_MS),
    extensions_ms=(SECOND_MS, MINUTE_MS, 5 * MINUTE_MS, 15 * MINUTE_MS),
    caps_ms=(0, 10 * MINUTE_MS, 2 * HOUR_MS, 24 * HOUR_MS),
    lead_ms=10 * MINUTE_MS,
    grid_ms=15 * SECOND_MS,
    storms_max=6,
    bids_max=12,
)


class Workload:
    """All producers.

    Args:
        span_ms: auctions start within this.
    """

    def __init__(
        self,
        seed: int,
        auctions: int,
        span_ms: int,
        scale: Scale,
        line: Timeline,
        store: MemoryStore,
        gateways: list[GatewayProcess],
        shards: int,
    ) -> None:
        self._span_ms = span_ms
        self._scale = scale
        self._line = line
        self._store = store
        self._gateways = gateways
        self._shards = shards
        self._random = Random(f"{seed} producers")  # noqa: S311 - a sequence that a seed repeats
        self._sending: set[asyncio.Task[None]] = set()
        self._commands = 0
        self._lives = [
            Life(self, name, Random(f"{seed} {name}"))  # noqa: S311 - a sequence that a seed repeats
            for name in (f"auction-{number}" for number in range(auctions))
        ]
        self.unanswered = 0
        """Events that nobody has answered, however often they were sent."""

    async def run(self) -> None:
        """Until every auction has had its life, and the last event was sent."""
        async with asyncio.TaskGroup() as tasks:
            for life in self._lives:
                tasks.create_task(life.live())
        while self._sending:
            await asyncio.wait(self._sending)

    def watched(self, number: int) -> tuple[str, EpochMs]:
        """An auction to be watched, and from when on: nobody asks for one days before it is announced."""
        life = self._lives[number % len(self._lives)]
        return life.auction_id, life.known_from

    # What a life needs.

    @property
    def scale(self) -> Scale:
        """How long things take."""
        return self._scale

    @property
    def span_ms(self) -> int:
        """Auctions start within this, in ms."""
        return self._span_ms

    @property
    def now_ms(self) -> EpochMs:
        """The true time."""
        return self._line.now_ms

    def standing(self, auction_id: str) -> tuple[str, EpochMs] | None:
        """Status and end as the store has them: storms know where the end is."""
        fields = self._store.shards[shard_of(auction_id, self._shards)].timers.get(auction_id)
        return None if fields is None else (fields["status"], EpochMs(int(fields["ends_at"])))

    def send(self, auction_id: str | None, draft: Draft) -> None:
        """Send an event; of an offer it goes to every shard (docs/decisions/0006)."""
        shards = range(self._shards) if auction_id is None else [shard_of(auction_id, self._shards)]
        for shard in shards:
            self._commands += 1
            task = asyncio.create_task(self._deliver(shard, draft, f"command-{self._commands}"))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _deliver(self, shard: int, draft: Draft, command_id: str) -> None:
        for attempt in range(TRIES_MAX):
            ready = [gateway for gateway in self._gateways if gateway.hub is not None]
            if ready:
                gateway = self._random.choice(ready)
                try:
                    await gateway.link.append(shard, [draft], gateway.auction_clock.now_ms(), command_id)
                except StoreUnavailableError:
                    pass
                else:
                    return
            await asyncio.sleep(0.1 * 2**attempt)
        self.unanswered += 1


class Life:
    """One auction's life, as producers and operators make it."""

    def __init__(self, workload: Workload, auction_id: str, random: Random) -> None:
        self._workload = workload
        self._random = random
        self._serial = 0
        self.auction_id = auction_id
        self._offer_id = f"offer-of-{auction_id}" if random.random() < 0.7 else None
        scale = workload.scale
        low, high = sorted(random.choices(range(len(scale.lengths_ms)), k=2))
        length_ms = min(random.randint(scale.lengths_ms[low], scale.lengths_ms[high]), workload.span_ms)
        starts_in_ms = random.randint(scale.lead_ms, max(scale.lead_ms, workload.span_ms - length_ms))
        self._starts_at = EpochMs(BORN_MS + starts_in_ms // scale.grid_ms * scale.grid_ms)
        self.known_from = EpochMs(self._starts_at - scale.lead_ms)
        """Before this it is announced to nobody."""
        self._ends_at = EpochMs(self._starts_at + max(1, length_ms // scale.grid_ms) * scale.grid_ms)
        self._policy = Policy(
            soft_close_window_ms=random.choice(scale.windows_ms),
            extension_ms=random.choice(scale.extensions_ms),
            mode=random.choice(list(ExtensionMode)),
            total_cap_ms=random.choice(scale.caps_ms),
            max_extensions=random.choice([None, None, 0, 1, 3]),
            extends_on=random.choice(list(ExtendsOn)),
        )

    async def live(self) -> None:
        """From before its announcement to after its end."""
        random = self._random
        announced_at = self._starts_at - random.randint(0, self._workload.scale.lead_ms)
        if random.random() < 0.05:  # late: after the start, or after the end
            announced_at = random.choice([self._starts_at + 500, self._ends_at + 500])
        await self._until(min(announced_at, self._starts_at) - 400)
        if random.random() < 0.08:
            self._out_of_order()
        await self._until(announced_at)
        self._announce()
        plan = [(self._moment(), self._bid) for _ in range(random.randrange(self._workload.scale.bids_max + 1))]
        for chance, what in self._disturbances():
            if random.random() < chance:
                plan.append((self._moment(), what))
        for at, what in sorted(plan, key=lambda planned: planned[0]):
            await self._until(at)
            what()
        await self._storms()

    def _moment(self) -> EpochMs:
        return EpochMs(self._random.randint(self._starts_at - 100, self._ends_at - 1))

    def _disturbances(self) -> list[tuple[float, Callable[[], None]]]:
        return [
            (0.05, self._cancel),
            (0.04, self._withdraw),
            (0.03, self._cancel_offer),
            (0.12, self._pause),
            (0.12, self._reschedule),
            (0.05, lambda: self._announce(terms="others")),
            (0.05, self._poison),
            (0.05, self._resume),
        ]

    async def _until(self, at: int) -> None:
        left_ms = at - self._workload.now_ms
        if left_ms > 0:
            await asyncio.sleep(left_ms / 1_000)

    async def _storms(self) -> None:
        """Bids around the end that stands; if it moves, around the next one."""
        random = self._random
        for _ in range(random.randrange(self._workload.scale.storms_max + 1)):
            standing = self._workload.standing(self.auction_id)
            if standing is None or standing[0] not in ("SCHEDULED", "ACTIVE", "CLOSING"):
                return
            ends_at = standing[1]
            await self._until(ends_at + AROUND_THE_END_MS[0])
            for offset_ms in sorted(random.sample(AROUND_THE_END_MS, k=random.randint(1, 5))):
                await self._until(ends_at + offset_ms)
                self._bid()
            await asyncio.sleep(0.3)

    # Events.

    def _draft(self, event_type: EventType | CommandType, event: InputEvent, auction_id: str | None) -> Draft:
        self._serial += 1
        event_id = f"{self.auction_id}-{self._serial}-{event.trigger}"
        reply_to = "desk" if self._random.random() < 0.1 else None
        context = Context(
            event_id, event_type.value, f"trace-{event_id}", f"req-{event_id}", Actor("service", "simulation"), reply_to
        )
        offer_id = self._offer_id if auction_id is None else None
        return Draft(event_id, encode(IntakeEvent(context, event, auction_id, offer_id)))

    def _send(self, event_type: EventType | CommandType, event: InputEvent) -> None:
        draft = self._draft(event_type, event, self.auction_id)
        self._workload.send(self.auction_id, draft)
        while self._random.random() < 0.08:
            self._later(lambda: self._workload.send(self.auction_id, draft))

    def _later(self, what: Callable[[], Any]) -> None:
        asyncio.get_running_loop().call_later(self._random.expovariate(3_000 / self._workload.scale.lead_ms), what)

    def _announce(self, terms: str = "") -> None:
        policy = replace(self._policy, extension_ms=7) if terms else self._policy
        registration = Registration(
            self.auction_id, self._starts_at, self._ends_at, policy, Offer(offer_id=self._offer_id)
        )
        self._send(EventType.AUCTION_STARTED, Register(registration))

    def _bid(self) -> None:
        self._serial += 1
        bid = Bid(
            f"{self.auction_id}-bid-{self._serial}", 12_500, "EUR", "bidder", leader_changed=self._random.random() < 0.8
        )
        self._send(EventType.BID_ACCEPTED, bid)

    def _out_of_order(self) -> None:
        self._random.choice([self._bid, self._cancel, self._cancel_offer, self._pause])()

    def _cancel(self) -> None:
        self._send(EventType.CANCEL_REQUESTED, Cancel("withdrawn"))

    def _cancel_offer(self) -> None:
        if self._offer_id is not None:
            self._workload.send(None, self._draft(EventType.OFFER_CANCELLED, Cancel("offer withdrawn"), None))

    def _withdraw(self) -> None:
        self._send(
            CommandType.OFFER_CANCEL_REQUESTED, Withdraw(WithdrawalReason.OTHER, self._random.choice([0, 1, 600]))
        )

    def _pause(self) -> None:
        self._send(EventType.PAUSE_REQUESTED, Pause("fire alarm"))
        # Nothing stays paused for good: days would pass with its ticks.
        self._later(self._resume if self._random.random() < 0.8 else self._cancel)

    def _resume(self) -> None:
        self._send(EventType.RESUME_REQUESTED, Resume("all clear"))

    def _reschedule(self) -> None:
        grid_ms = self._workload.scale.grid_ms
        by_ms = self._random.randint(-(self._ends_at - self._starts_at), self._policy.total_cap_ms)
        ends_at = self._ends_at + by_ms // grid_ms * grid_ms
        self._send(EventType.SCHEDULE_CHANGED, Reschedule(EpochMs(ends_at), "hall is booked longer"))

    def _poison(self) -> None:
        self._serial += 1
        self._workload.send(self.auction_id, Draft(f"{self.auction_id}-poison-{self._serial}", b"{not json"))
