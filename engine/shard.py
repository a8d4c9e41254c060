"""One shard at work: the single writer of its fold.

Each turn reads as a list: take what waits, load what is missing, fold, commit, install, observe. There is one turn at a
time per shard, and memory changes only after the store has said "committed". Whatever goes wrong in between, the answer
is the same: forget the memory, load the shard again from its committed cursor, and go on.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import xor
from typing import Final, Protocol
from uuid import uuid4

import structlog

from engine.clock import AuctionClock
from engine.contract.intake import CommandType, Context, Discard, IntakeEvent, Outage, Retry, SchemaError
from engine.contract.offers import auction_bound_in
from engine.contract.timers import CorruptTimerError, Holding, TimerRecord, mark
from engine.domain.auction import Auction
from engine.domain.correction import VERSION_MAX
from engine.domain.decide import Decision, Fact
from engine.domain.events import Register
from engine.domain.fold import next_due
from engine.domain.instants import EpochMs
from engine.domain.outage import OVERLAP_MS_MAX, is_hit
from engine.journal import Journal, peek
from engine.metrics import EngineMetrics
from engine.store.protocol import (
    Committed,
    Early,
    Entry,
    Fenced,
    KeyDamagedError,
    ShardHead,
    ShardStore,
    StoreUnavailableError,
    Superseded,
    Unattended,
    Undrained,
)

INBOX_MAX: Final = 2_000
"""Entries read ahead of the commit. More would only move the backlog from Redis into this process."""
CLOSED_KEPT: Final = 4_096
"""Closed auctions remembered per shard, so that late bids and replays of a start cost no round trip."""
CHECKPOINT_EVERY: Final = 1_000
"""Entries between two places to which the intake may be trimmed."""
DAMAGED_RETRY_S: Final = 5.0
"""A shard without its cursor, intake or audit log waits for a person; the other shards do not."""
UNATTENDED_RETRY_MS: Final = 500
UNDRAINED_RETRY_MS: Final = 5
"""The reader delivers what the guard has seen within a round trip; this is the bound if it does not, doubled each time."""
UNDRAINED_RETRY_MS_MAX: Final = 160
"""A read that was lost is repeated after seconds: a close that waits for it must not fill them with commits."""

log = structlog.get_logger()


class ShardLostError(Exception):
    """Another engine has taken the shard over. Stop; nothing of ours can be committed any more."""


class Calendar(Protocol):
    """Where a shard enters what is due next. The scheduler implements it."""

    def enter(self, records: Iterable[TimerRecord], *, tick_now: bool) -> None:
        """These auctions are as they are now: plan what time does to them next, and their next tick."""
        ...

    def wake_at(self, auction_id: str, at: EpochMs) -> None:
        """Look at an auction again at `at`."""
        ...


@dataclass(slots=True)
class Shard:
    """A shard that this engine owns, under one fencing epoch."""

    number: int
    epoch: int
    store: ShardStore
    clock: AuctionClock
    calendar: Calendar
    metrics: EngineMetrics
    batch_max: int
    intake_retained: int
    holder: str
    """In whose name the lease is held."""
    head: ShardHead = field(init=False)
    read_to: str = field(init=False)
    """The last intake entry that was read, committed or not."""
    live: dict[str, TimerRecord] = field(default_factory=dict)
    closed: "OrderedDict[str, TimerRecord]" = field(default_factory=OrderedDict)
    inbox: deque[Entry] = field(default_factory=deque)
    due: set[str] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    loaded: bool = False
    _undrained_ms: int = UNDRAINED_RETRY_MS
    _doubts: int = 0
    _settled: int = 0
    _checkpoints: deque[str] = field(default_factory=deque)
    _since_checkpoint: int = 0
    digest: int = 0
    """Of what is live, as `engine.contract.timers.mark` says."""
    _edited: set[str] = field(default_factory=set)
    """Live auctions whose hash was found changed by somebody else; the next commit about them writes it whole."""
    _attended_until: EpochMs = EpochMs(0)  # noqa: RUF009 - a number
    _held_until: EpochMs | None = None
    """Until when closes that lie behind `_attended_until` are not tried again."""
    on_room: Callable[[], None] = lambda: None

    async def load(self) -> None:
        """Take the shard's state from the store, as of its committed cursor, and plan everything that is due."""
        self.loaded = False
        self.inbox.clear()
        self.due.clear()
        self.closed.clear()
        self._edited.clear()
        self._settled = self._doubts
        self.head = await self.store.head(self.number)
        self.read_to = self.head.intake
        # The checkpoints of whoever had the shard before are gone with it; what it kept for people is given up instead.
        self._checkpoints.clear()
        if await self.store.intake_length(self.number) > 2 * (self.intake_retained + CHECKPOINT_EVERY):
            await self.store.trim_intake(self.number, self.head.intake)
        live: dict[str, TimerRecord] = {}
        async for page in self.store.live(self.number):
            records = []
            for record in page:
                if isinstance(record, CorruptTimerError):
                    # Held: it neither closes nor moves until the reconciler has restored it from the log.
                    self.metrics.held.inc()
                    log.error("timer_unreadable", shard=self.number, error=str(record))
                else:
                    live[record.auction.auction_id] = record
                    records.append(record)
            self.calendar.enter(records, tick_now=False)
            await asyncio.sleep(0)  # 100,000 timers take seconds: the heartbeats must go on meanwhile
        self.live = live
        self.digest = reduce(xor, (mark(record.auction) for record in live.values()), 0)
        self.loaded = True
        self.on_room()
        self.wake.set()

    def holding(self) -> Holding:
        """What is held, for whoever compares it with what is kept."""
        return Holding(len(self.live), self.head.chain.seq if self.loaded else 0, self.digest)

    def deliver(self, entries: Sequence[Entry]) -> None:
        """Take entries that were read behind `read_to`."""
        self.inbox.extend(entries)
        self.read_to = entries[-1].stream_id
        self.wake.set()

    def fall_due(self, auction_ids: Sequence[str]) -> None:
        """Time has come for these auctions."""
        self.due.update(auction_ids)
        self.wake.set()

    @property
    def doubted(self) -> bool:
        """Whether the store may have lost the end of what was committed, and was not asked yet."""
        return self._doubts > self._settled

    def doubt(self) -> None:
        """The connection to the store is new: there may have been a failover."""
        self._doubts += 1
        self.wake.set()

    async def _compare(self) -> None:
        """Load the shard again if the store's history is not ours. The chain's hash stands for all that led to it."""
        doubts = self._doubts
        head = await self.store.head(self.number)
        if (head.intake, head.chain) != (self.head.intake, self.head.chain):
            log.warning("shard_went_back", shard=self.number, was=self.head.chain.seq, now=head.chain.seq)
            self.loaded = False
            await self.load()
            return
        # What was read ahead may be lost: it is read again.
        self.inbox.clear()
        self.read_to = head.intake
        self._settled = doubts
        self.on_room()
        self.wake.set()  # for what fell due meanwhile

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            ShardLostError: another engine has the shard.
        """
        while True:
            try:
                if not self.loaded:
                    await self.load()
                elif self.doubted:
                    await self._compare()
                await self.wake.wait()
                self.wake.clear()
                while (self.inbox or self.due) and not self.doubted:
                    await self.turn()
            except KeyDamagedError as error:
                log.error("shard_held", shard=self.number, error=str(error))  # noqa: TRY400 - it says all
                self.loaded = False
                await asyncio.sleep(DAMAGED_RETRY_S)
            except StoreUnavailableError as error:
                # The commit that was under way may have happened or not; the committed cursor tells.
                log.warning("store_unavailable", shard=self.number, error=str(error))
                self.loaded = False

    async def turn(self) -> None:
        """Fold and commit one batch."""
        now = self.clock.now_ms()
        entries = [self.inbox.popleft() for _ in range(min(self.batch_max, len(self.inbox)))]
        while self.inbox and self.inbox[0].at is None:
            # The guard of the commit cannot tell when it arrived: left behind, it would hold up this batch for ever.
            entries.append(self.inbox.popleft())
        events = [peek(entry) for entry in entries]
        # While entries wait, time may not overtake them: only what was due before the last one taken is due yet.
        waited_until = entries[-1].at if self.inbox else None
        horizon = now if waited_until is None else waited_until
        due = self._take_due(horizon)
        journal = await self._journal(entries, events, due, now)
        for auction_id in due:
            journal.elapse(auction_id, self._reach(auction_id, horizon))
        batch = journal.batch()
        if batch.intake == self.head.intake and not batch.operations:
            return
        answer = await self.store.commit(batch)
        match answer:
            case Committed(at):
                self._tell(answer.begun_anew)
                self._undrained_ms = UNDRAINED_RETRY_MS
                if batch.closes_at is not None and batch.closes_at > self._attended_until:
                    self._held_until = None
                self._install(journal, ShardHead(batch.intake, batch.chain, at), len(entries), at)
                await self._trim()
            case Early(by_ms):
                assert batch.due_at is not None
                # Nothing genuine arrived after the stamp that this commit would have had: such an entry is poison.
                self._put_back(_poisoned(entries, batch.due_at - by_ms), due, EpochMs(now + by_ms))
            case Unattended(at):
                self._hold(at, now)
                self._put_back(entries, due, now)
            case Undrained():
                self._put_back(entries, due, EpochMs(now + self._undrained_ms))
                self._undrained_ms = min(2 * self._undrained_ms, UNDRAINED_RETRY_MS_MAX)
            case Fenced(epoch):
                raise ShardLostError(f"shard {self.number} is fenced at epoch {epoch}, ours is {self.epoch}")
            case Superseded():
                self.metrics.commit_conflicts.inc()
                log.warning("commit_superseded", shard=self.number, what=answer.what)
                if answer.auction_id in self.live:
                    self._overrule(self.live[answer.auction_id], answer.version)
                    self._put_back(entries, due, now)
                else:
                    self.loaded = False
                    await self.load()

    def _tell(self, begun_anew: Sequence[str]) -> None:
        """Keys that a hand had written over hold what the commit is about; the reconciler restores the rest."""
        for key in begun_anew:
            log.error("key_begun_anew", shard=self.number, key=key)

    def _hold(self, attended_at: EpochMs, now: EpochMs) -> None:
        """Producers could not reach us before some ends: whoever comes back first says so, and then those are moved."""
        if self._held_until is None:
            log.warning("closes_held", shard=self.number, unattended_since=attended_at)
        self._attended_until = EpochMs(attended_at + OVERLAP_MS_MAX)
        self._held_until = EpochMs(now + UNATTENDED_RETRY_MS)

    def _reach(self, auction_id: str, horizon: EpochMs) -> EpochMs:
        """Up to when time may act on an auction: not up to an end that is held."""
        ends_at = self.live[auction_id].auction.ends_at
        if self._held_until is None or ends_at <= self._attended_until or self.clock.now_ms() >= self._held_until:
            return horizon
        return EpochMs(min(horizon, ends_at - 1))

    def _is_held(self, auction: Auction, due_at: EpochMs) -> bool:
        """Whether a close waits for a gateway: for a moment, and then the commit is asked again.

        What is due at the end closes, be it that the window opens there: it may have no length.
        """
        if self._held_until is None or due_at < auction.ends_at or due_at <= self._attended_until:
            return False
        return self.clock.now_ms() < self._held_until

    def _overrule(self, record: TimerRecord, version: int | None) -> None:
        """Cursor and chain are as we left them, so no engine wrote this hash: what we hold is the log, folded, and stands.

        Only the number is taken over, if it is higher: whoever has seen it must not take what is right for something old.
        """
        auction = record.auction
        if version is not None and auction.version < version < VERSION_MAX:
            self.live[auction.auction_id] = replace(record, auction=replace(auction, version=version))
            self.digest ^= mark(auction) ^ mark(self.live[auction.auction_id].auction)
        self._edited.add(auction.auction_id)

    def _take_due(self, horizon: EpochMs) -> list[str]:
        """The auctions whose due instant lies before the horizon, in the order of that instant."""
        found: list[tuple[EpochMs, str]] = []
        for auction_id in self.due:
            record = self.live.get(auction_id)
            due = next_due(record.auction) if record else None
            if record is not None and due is not None and self._is_held(record.auction, due[0]):
                assert self._held_until is not None
                self.calendar.wake_at(auction_id, self._held_until)
            elif due is not None and due[0] <= horizon:
                found.append((due[0], auction_id))
            elif due is not None:
                self.calendar.wake_at(auction_id, due[0])
        self.due.clear()
        found.sort()
        for _, auction_id in found[self.batch_max :]:
            self.due.add(auction_id)
        return [auction_id for _, auction_id in found[: self.batch_max]]

    async def _journal(
        self, entries: list[Entry], events: list[IntakeEvent | SchemaError], due: list[str], now: EpochMs
    ) -> Journal:
        """Fold the entries over what the shard holds, loading what it does not."""
        readable = [event for event in events if not isinstance(event, SchemaError)]
        offers = await self._offers(readable)
        wanted = {event.auction_id for event in readable if event.auction_id is not None}
        for outage in (event.event for event in readable):
            if isinstance(outage, Outage):
                wanted |= self._hit_by(outage)
        wanted |= {bound for bound in map(auction_bound_in, offers.values()) if bound is not None}
        timers, unreadable = await self._timers(wanted | set(due))
        journal = Journal(
            self.number,
            self.epoch,
            self.head,
            timers,
            offers,
            parked=await self._parked(readable),
            unreadable=unreadable,
            edited=self._edited,
            holder=self.holder,
            now=now,
            commit_id=uuid4().hex,
        )
        for entry, event in zip(entries, events, strict=True):
            journal.apply(entry, event)
        return journal

    def _hit_by(self, outage: Outage) -> set[str]:
        """The auctions that may lose time to an outage; one that is extended in the same batch is hit no later."""
        return {
            auction_id for auction_id, record in self.live.items() if is_hit(record.auction, outage.since, outage.until)
        }

    async def _offers(self, events: list[IntakeEvent]) -> dict[str, str]:
        wanted = {event.offer_id for event in events if event.offer_id is not None}
        for event in events:
            if isinstance(event.event, Register) and event.event.registration.offer.offer_id:
                wanted.add(event.event.registration.offer.offer_id)
        if not wanted:
            return {}
        names = sorted(wanted)
        bound = await self.store.offers(self.number, names)
        return {name: value for name, value in zip(names, bound, strict=True) if value is not None}

    async def _parked(self, events: list[IntakeEvent]) -> dict[str, bytes]:
        """The commands in troubleshooting that operators' commands are about."""
        orders = (event.event for event in events)
        names = sorted({order.command_id for order in orders if isinstance(order, Retry | Discard)})
        if not names:
            return {}
        found = await self.store.parked_commands(self.number, names)
        return {name: body for name, body in zip(names, found, strict=True) if body is not None}

    async def _timers(self, wanted: set[str]) -> tuple[dict[str, TimerRecord], dict[str, CorruptTimerError]]:
        timers: dict[str, TimerRecord] = {}
        unreadable: dict[str, CorruptTimerError] = {}
        missing: list[str] = []
        for auction_id in wanted:
            record = self.live.get(auction_id) or self.closed.get(auction_id)
            if record is None:
                missing.append(auction_id)
            else:
                timers[auction_id] = record
        if missing:
            for auction_id, found in zip(missing, await self.store.timers(self.number, missing), strict=True):
                if isinstance(found, TimerRecord):
                    timers[auction_id] = found
                elif found is not None:
                    log.error("timer_unreadable", shard=self.number, error=str(found))
                    unreadable[auction_id] = found
        return timers, unreadable

    def _put_back(self, entries: list[Entry], due: list[str], again_at: EpochMs) -> None:
        """Nothing was written: the entries come first again, what was due is looked at once more at `again_at`."""
        self.inbox.extendleft(reversed(entries))
        if entries:
            self.wake.set()
        for auction_id in due:
            self.calendar.wake_at(auction_id, again_at)

    def _install(self, journal: Journal, head: ShardHead, entries: int, at: EpochMs) -> None:
        self.head = head
        for auction_id, record in journal.after.items():
            self._edited.discard(auction_id)
            self.digest ^= mark(self.live[auction_id].auction) if auction_id in self.live else 0
            if next_due(record.auction) is None and record.auction.paused_at is None:
                self.live.pop(auction_id, None)
                self.closed[auction_id] = record
                if len(self.closed) > CLOSED_KEPT:
                    self.closed.popitem(last=False)
            else:
                self.live[auction_id] = record
                self.digest ^= mark(record.auction)
        self.calendar.enter(journal.after.values(), tick_now=True)
        if journal.offset_ms is not None:
            log.warning("clock_corrected", shard=self.number, offset_ms=journal.offset_ms)
        for outcome, times in Counter(_outcome(decision) for decision, context in journal.decisions if context).items():
            self.metrics.applied[outcome].inc(times)
        self.metrics.applied["poison"].inc(journal.poison)
        for decision, context in journal.decisions:
            self._observe(decision, context, at)
        self._count_towards_checkpoint(entries)
        if len(self.inbox) < INBOX_MAX:
            self.on_room()

    def _observe(self, decision: Decision, context: Context | None, at: EpochMs) -> None:
        metrics = self.metrics
        if decision.fact is Fact.ENDED:
            assert decision.after.ended_at is not None
            metrics.close_lateness_ms.observe(at - decision.after.ended_at)
            if at < decision.after.ended_at:
                metrics.early_closes.inc()
                log.error("closed_early", shard=self.number, auction_id=decision.after.auction_id, at=at)
        elif decision.fact is Fact.EXTENDED:
            clipped_by = decision.details["clipped_by"]
            metrics.extensions[None if clipped_by is None else str(clipped_by)].inc()
        elif decision.fact is Fact.REGISTERED and context is not None and context.occurred_at is not None:
            metrics.trigger_lag_ms.observe(max(0, at - context.occurred_at))

        if context is not None and context.event_type == CommandType.OFFER_CANCEL_REQUESTED:
            refusal = decision.refusal
            metrics.offer_cancellation("completed" if refusal is None else refusal.code.value)

    def _count_towards_checkpoint(self, entries: int) -> None:
        self._since_checkpoint += entries
        if self._since_checkpoint >= CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            self._checkpoints.append(self.head.intake)

    async def _trim(self) -> None:
        """Forget the oldest applied entries, once more of them are kept than the settings say."""
        if len(self._checkpoints) > self.intake_retained // CHECKPOINT_EVERY + 1:
            await self.store.trim_intake(self.number, self._checkpoints.popleft())


def _poisoned(entries: list[Entry], stamp: int) -> list[Entry]:
    """The same entries; one that arrived after `stamp` counts as never stamped."""
    return [replace(entry, at=None) if entry.at and entry.at > stamp else entry for entry in entries]


def _outcome(decision: Decision) -> str:
    if decision.refusal is not None:
        return "refused"
    if decision.fact is Fact.LATE_BID_IGNORED:
        return "late"
    return "unchanged" if decision.fact is None else "applied"
