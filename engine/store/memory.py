"""The memory store: the executable specification of `engine.store.protocol`, and what simulations run on.

It keeps what Redis would keep, in the shape in which Redis would keep it, so that a fault injected into one can be
injected into the other.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, TypeVar

from engine.contract.audit import ChainHead
from engine.contract.cursors import START, stream_order
from engine.contract.intake import Actor, CommandType, Context, IntakeEvent, Outage, encode
from engine.contract.keys import ShardKeys
from engine.contract.timers import CorruptTimerError, TimerRecord, to_row
from engine.domain.instants import EpochMs
from engine.store.limits import StoreLimits
from engine.store.protocol import (
    OUTAGE_HOLD_MS,
    Announce,
    Appended,
    AuditEntry,
    Batch,
    BindOffer,
    CommitResult,
    Committed,
    DeploymentMismatchError,
    Displace,
    Draft,
    Early,
    Entry,
    Fenced,
    Group,
    IntakeFullError,
    KeepOutcome,
    KeyDamagedError,
    Lease,
    News,
    Observed,
    Operation,
    Park,
    PlaceClosed,
    Placed,
    PlaceLive,
    PlacePaused,
    PutTimer,
    Record,
    Reply,
    ReplyEntry,
    Requeue,
    SetOffset,
    ShardClock,
    ShardHead,
    Superseded,
    Unattended,
    Undrained,
    Unpark,
    UpdateEntry,
    View,
)
from engine.store.rows import Row, shown_in, standing_in, timer_in

_names_of: Final = cache(ShardKeys.of)
STAMP_BOUND_MS = 250
PAGE_MAX = 1_000


@dataclass(slots=True)
class ShardMemory:
    """Everything kept of one shard."""

    lease: Lease = field(default_factory=lambda: Lease("", 0, 0))
    intake_cursor: str = START
    chain: ChainHead = field(default_factory=ChainHead)
    last_at: int = 0
    offset_ms: int = 0
    corrections: int = 0
    last_commit: str = ""
    last_commit_at: int = 0
    attended_at: EpochMs | None = None
    outage_since: EpochMs | None = None
    outage_id: str = START
    serial: int = 0
    events: list[Entry] = field(default_factory=list)
    updates: list[UpdateEntry] = field(default_factory=list)
    audit: list[dict[str, str]] = field(default_factory=list)
    timers: dict[str, dict[str, str]] = field(default_factory=dict)
    groups: dict[Group, dict[str, int]] = field(default_factory=lambda: {group: {} for group in Group})
    offers: dict[str, str] = field(default_factory=dict)
    troubleshooting: dict[str, bytes] = field(default_factory=dict)
    outcomes: dict[str, bytes] = field(default_factory=dict)
    seen: dict[str, tuple[EpochMs, str, str]] = field(default_factory=dict)
    damaged: frozenset[str] = frozenset()
    """Keys, by their Redis names, that are of another type: timers, sorted sets, cursor, intake and audit log."""

    def next_id(self) -> str:
        """A stream id: increasing, and deliberately no time."""
        self.serial += 1
        return f"{self.serial}-0"


class MemoryStore:
    """Implements `Intake`, `ShardStore`, `ViewStore` and `AuditStore` in one process.

    Args:
        authority_us: what Redis `TIME` would answer, in microseconds.
    """

    def __init__(
        self, authority_us: Callable[[], int], *, intake_max: int = 1_000_000, troubleshooting_max: int = 100_000
    ) -> None:
        self._authority_us = authority_us
        self._intake_max = intake_max
        self._troubleshooting_max = troubleshooting_max
        self.limits = StoreLimits()
        """What it says of outages counts here; the other bounds are parameters."""
        self._deployment: int | None = None
        self.connections = 1
        self._grown = asyncio.Event()
        self._listeners: list[asyncio.Queue[tuple[int, bytes]]] = []
        self.shards: defaultdict[int, ShardMemory] = defaultdict(ShardMemory)
        self.members: dict[str, int] = {}
        self.clocks: dict[str, bytes] = {}
        self.reconciliations: deque[dict[str, str]] = deque(maxlen=StoreLimits().reconciliations_max)
        self.replies: defaultdict[str, list[tuple[str, str, bytes]]] = defaultdict(list)

    def _stamp(self, memory: ShardMemory, est: EpochMs) -> EpochMs:
        now = self._authority_us() // 1_000 + memory.offset_ms
        now = max(est - STAMP_BOUND_MS, min(est + STAMP_BOUND_MS, now))
        return EpochMs(max(memory.last_at, now))

    def _grow(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def time_us(self) -> int:
        return (await self.shard_clock(0)).now_us

    async def shard_clock(self, shard: int) -> ShardClock:
        memory = self.shards[shard]
        return ShardClock(self._authority_us(), memory.offset_ms, memory.corrections)

    async def state_clock(self, name: str, body: bytes) -> None:
        self.clocks[name] = body

    async def stated_clocks(self) -> dict[str, bytes]:
        return dict(self.clocks)

    async def forget_clock(self, name: str) -> None:
        self.clocks.pop(name, None)

    async def deployment(self, shards: int) -> None:
        if self._deployment is None:
            self._deployment = shards
        if self._deployment != shards:
            raise DeploymentMismatchError(f"this store holds {self._deployment} shards, the settings say {shards}")

    def _require(self, shard: int, *names: str) -> ShardMemory:
        memory = self.shards[shard]
        for name in names:
            if name in memory.damaged:
                raise KeyDamagedError(f"{name} is of another type")
        return memory

    async def append(
        self, shard: int, drafts: Sequence[Draft], est: EpochMs, command_id: str, *, urgent: bool = False
    ) -> list[Appended]:
        names = _names_of(shard)
        memory = self._require(shard, names.cursor, names.events)
        at = self._stamp(memory, est)
        held, added = len(memory.events), False
        troubled = len(memory.troubleshooting) >= self._troubleshooting_max
        if self.limits.attendant and held < self._intake_max and not troubled:
            self._attend(memory, at, begins=not drafts)
        answer = []
        for n, draft in enumerate(drafts):
            first = memory.seen.get(draft.event_id)
            is_others = first is not None and first[2] != draft.subject
            own_id = f"event {draft.event_id} {draft.subject}" if is_others else draft.event_id
            seen_ids = (own_id, *draft.seen_ids)
            mark = next((memory.seen[seen] for seen in seen_ids if seen in memory.seen), None)
            if mark is not None:
                answer.append(Appended(draft.event_id, mark[1] == f"{n} {command_id}", mark[0]))
                continue
            if not added and held + len(drafts) - n > self._intake_max:
                raise IntakeFullError(f"the intake of shard {shard} holds {held} entries, its bound")
            if not added and not urgent and troubled:
                raise IntakeFullError(f"shard {shard} has as many commands in troubleshooting as it may")
            memory.events.append(Entry(memory.next_id(), at, draft.event_id, draft.body))
            memory.seen |= dict.fromkeys(seen_ids, (at, f"{n} {command_id}", draft.subject))
            memory.last_at, added = at, True
            answer.append(Appended(draft.event_id, True, at))
        self._grow()
        return answer

    def _attend(self, memory: ShardMemory, at: EpochMs, *, begins: bool) -> None:
        limits, seen = self.limits, memory.attended_at
        if seen is not None and limits.outage_extension_ms > 0 and at - seen > limits.outage_ms:
            outage = Outage(seen, at, limits.outage_extension_ms)
            name = f"outage-{seen}-{at}"
            context = Context(name, CommandType.OUTAGE_OBSERVED, name, name, Actor("system", limits.attendant))
            memory.events.append(Entry(memory.next_id(), at, name, encode(IntakeEvent(context, outage, None))))
            memory.outage_since = seen if memory.outage_since is None else memory.outage_since
            memory.outage_id = memory.events[-1].stream_id
            memory.last_at = at
        if seen is not None or begins:
            memory.attended_at = at if seen is None else max(seen, at)  # one that is late does not take others back

    def _unattended(self, memory: ShardMemory, batch: Batch, at: EpochMs) -> CommitResult | None:
        closes_at, limits = batch.closes_at, self.limits
        if closes_at is None or limits.outage_extension_ms == 0 or at >= closes_at + OUTAGE_HOLD_MS:
            return None
        if memory.attended_at is not None and memory.attended_at < closes_at - limits.outage_ms:
            return Unattended(memory.attended_at)
        if (
            memory.outage_since is not None
            and closes_at > memory.outage_since
            and stream_order(batch.intake) < stream_order(memory.outage_id)
        ):
            return Undrained()
        return None

    async def claim(self, shard: int, holder: str, seen: Lease | None) -> Lease:
        memory = self.shards[shard]
        lease = memory.lease
        if not lease.holder or lease.holder == holder or lease == seen:
            memory.lease = Lease(holder, lease.epoch + 1, 0)
        return memory.lease

    async def renew(self, shard: int, holder: str, epoch: int) -> bool:
        memory = self.shards[shard]
        lease = memory.lease
        if (lease.holder, lease.epoch) != (holder, epoch):
            return False
        memory.lease = Lease(holder, epoch, lease.beat + 1)
        return True

    async def release(self, shard: int, holder: str, epoch: int) -> None:
        memory = self.shards[shard]
        if (memory.lease.holder, memory.lease.epoch) == (holder, epoch):
            memory.lease = Lease("", epoch, memory.lease.beat)

    async def beat_member(self, name: str) -> Mapping[str, int]:
        self.members[name] = self.members.get(name, 0) + 1
        return dict(self.members)

    async def forget_member(self, name: str) -> None:
        self.members.pop(name, None)

    async def lease(self, shard: int) -> Lease:
        return self.shards[shard].lease

    async def head(self, shard: int) -> ShardHead:
        memory = self._require(shard, _names_of(shard).cursor)
        return ShardHead(memory.intake_cursor, memory.chain, EpochMs(memory.last_at))

    async def live(self, shard: int) -> AsyncIterator[list[TimerRecord | CorruptTimerError]]:
        memory = self.shards[shard]
        for group in (Group.LIVE, Group.PAUSED):
            if (name := _set_name(shard, group)) in memory.damaged:
                yield [CorruptTimerError(f"{name} is of another type")]
                continue
            ids = list(memory.groups[group])
            for start in range(0, len(ids), PAGE_MAX):
                page = await self.timers(shard, ids[start : start + PAGE_MAX])
                yield [timer for timer in page if timer is not None]

    def _row(self, shard: int, auction_id: str) -> Row:
        memory = self.shards[shard]
        if memory.damaged and _names_of(shard).timer(auction_id) in memory.damaged:
            return None
        return to_row(memory.timers.get(auction_id, {}))

    def _members(self, shard: int, group: Group) -> Mapping[str, int]:
        memory = self.shards[shard]
        return {} if memory.damaged and _set_name(shard, group) in memory.damaged else memory.groups[group]

    async def timers(self, shard: int, auction_ids: Sequence[str]) -> list[TimerRecord | CorruptTimerError | None]:
        return [timer_in(auction_id, self._row(shard, auction_id)) for auction_id in auction_ids]

    async def offers(self, shard: int, offer_ids: Sequence[str]) -> list[str | None]:
        return [self.shards[shard].offers.get(offer_id) for offer_id in offer_ids]

    async def read_intake(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[Entry]]:
        def behind() -> dict[int, list[Entry]]:
            found = {
                shard: _behind(self.shards[shard].events, since, count)
                for shard, since in after.items()
                if not self.shards[shard].damaged or _names_of(shard).events not in self.shards[shard].damaged
            }
            return {shard: entries for shard, entries in found.items() if entries}

        return behind() or (await self._wait(block_ms) and behind()) or {}

    async def _wait(self, block_ms: int) -> bool:
        if block_ms <= 0:
            return False
        try:
            async with asyncio.timeout(block_ms / 1_000):
                await self._grown.wait()
        except TimeoutError:
            return False
        return True

    async def commit(self, batch: Batch) -> CommitResult:
        names = _names_of(batch.shard)
        memory = self._require(batch.shard, names.cursor)
        if batch.commit_id == memory.last_commit:
            return Committed(EpochMs(memory.last_commit_at))
        if (batch.holder, batch.epoch) != (memory.lease.holder, memory.lease.epoch):
            return Fenced(memory.lease.epoch)
        if batch.after.intake != memory.intake_cursor or batch.after.chain != memory.chain:
            return Superseded(f"cursor {memory.intake_cursor}, audit {memory.chain.seq}")
        self._require(batch.shard, names.audit, names.events)
        if (edited := self._edited(batch)) is not None:
            return edited
        at = self._stamp(memory, batch.est)
        if batch.due_at is not None:
            if at < batch.due_at:
                return Early(batch.due_at - at)
            waiting = _behind(memory.events, batch.intake, 1)
            if waiting and (waiting[0].at is None or waiting[0].at < batch.due_at):
                return Undrained()
        if (refused := self._unattended(memory, batch, at)) is not None:
            return refused
        if stream_order(batch.intake) >= stream_order(memory.outage_id):
            memory.outage_since = None
        begun_anew = self._begin_anew(batch) if memory.damaged else ()
        for operation in batch.operations:
            self._apply(memory, operation, at)
        memory.intake_cursor, memory.chain = batch.intake, batch.chain
        memory.last_at, memory.last_commit, memory.last_commit_at = at, batch.commit_id, at
        self._grow()
        return Committed(at, begun_anew)

    def _edited(self, batch: Batch) -> Superseded | None:
        for auction_id, version in batch.versions.items():
            if self._row(batch.shard, auction_id) is None:
                return Superseded(auction_id, auction_id, None)
            found = self.shards[batch.shard].timers.get(auction_id, {}).get("version", "0")
            if found != str(version):
                return Superseded(auction_id, auction_id, int(found) if found.isdigit() else None)
        return None

    def _begin_anew(self, batch: Batch) -> tuple[str, ...]:
        """What the batch writes over: the keys of another type that it touches, empty from now on."""
        memory, names = self.shards[batch.shard], _names_of(batch.shard)
        touched: dict[str, None] = {}
        for operation in batch.operations:
            match operation:
                case PutTimer(auction_id):
                    name = names.timer(auction_id)
                    if name in memory.damaged and name not in touched:
                        memory.timers[auction_id] = {}
                    touched[name] = None
                case PlaceLive() | PlacePaused() | PlaceClosed() | Displace():
                    for group in (Group.LIVE, Group.PAUSED, Group.CLOSED):
                        name = _set_name(batch.shard, group)
                        if name in memory.damaged and name not in touched:
                            memory.groups[group] = {}
                        touched[name] = None
        begun_anew = tuple(name for name in touched if name in memory.damaged)
        memory.damaged -= set(begun_anew)
        return begun_anew

    def _apply(self, memory: ShardMemory, operation: Operation, at: EpochMs) -> None:
        match operation:
            case PutTimer(auction_id, fields):
                memory.timers.setdefault(auction_id, {}).update(fields)
            case PlaceLive(auction_id, score):
                _place(memory, Group.LIVE, auction_id, score)
            case PlacePaused(auction_id, score):
                _place(memory, Group.PAUSED, auction_id, score)
            case PlaceClosed(auction_id, score):
                _place(memory, Group.CLOSED, auction_id, score)
            case Record(fields):
                memory.audit.append(dict(fields))
            case Announce(update_type, auction_id, version, body):
                memory.updates.append(UpdateEntry(memory.next_id(), update_type, auction_id, version, body))
            case Displace(auction_id):
                for group in (Group.LIVE, Group.PAUSED, Group.CLOSED):
                    memory.groups[group].pop(auction_id, None)
            case BindOffer(offer_id, value, forget):
                if not forget:
                    memory.offers[offer_id] = value
                memory.offers.setdefault(offer_id, value)
            case Reply() | KeepOutcome() | Park() | Unpark() | Requeue() | SetOffset():
                self._apply_command(memory, operation, at)

    def _apply_command(
        self, memory: ShardMemory, operation: Reply | KeepOutcome | Park | Unpark | Requeue | SetOffset, at: EpochMs
    ) -> None:
        match operation:
            case SetOffset(offset_ms):
                memory.offset_ms = offset_ms
                memory.corrections += 1
            case Reply(reply_to, outcome, command_id, body):
                self.replies[reply_to].append((outcome, command_id, body))
            case KeepOutcome(command_id, body):
                memory.outcomes[command_id] = body
            case Park(command_id, first_seen_at, body, otherwise):
                command_id = otherwise if otherwise and command_id in memory.troubleshooting else command_id
                memory.troubleshooting[command_id] = body
                memory.groups[Group.PARKED][command_id] = first_seen_at
            case Unpark(command_id):
                memory.troubleshooting.pop(command_id, None)
                memory.groups[Group.PARKED].pop(command_id, None)
            case Requeue(event_id, body, attempts, first_seen_at):
                memory.events.append(Entry(memory.next_id(), at, event_id, body, attempts, first_seen_at))

    async def parked(self, shard: int) -> int:
        return len(self.shards[shard].troubleshooting)

    async def parked_commands(self, shard: int, command_ids: Sequence[str]) -> list[bytes | None]:
        return [self.shards[shard].troubleshooting.get(command_id) for command_id in command_ids]

    async def outcome(self, shard: int, command_id: str) -> bytes | None:
        return self.shards[shard].outcomes.get(command_id)

    async def is_applied(self, shard: int, event_id: str) -> bool | None:
        memory = self.shards[shard]
        if event_id not in memory.seen:
            return None
        mark = (memory.seen[event_id][0], event_id)
        waiting = _behind(memory.events, memory.intake_cursor, len(memory.events))
        return mark not in [(entry.at, entry.event_id) for entry in waiting]

    async def intake_length(self, shard: int) -> int:
        return len(self.shards[shard].events)

    async def trim_intake(self, shard: int, before: str) -> None:
        memory = self.shards[shard]
        memory.events = [entry for entry in memory.events if stream_order(entry.stream_id) >= stream_order(before)]

    async def forget_closed(self, shard: int, before: EpochMs) -> None:
        groups = self.shards[shard].groups
        groups[Group.CLOSED] = {name: at for name, at in groups[Group.CLOSED].items() if at >= before}

    async def audit_entries(self, shard: int, after: str, count: int) -> list[AuditEntry]:
        records = self._require(shard, _names_of(shard).audit).audit
        start = bisect_right(records, stream_order(after), key=lambda record: stream_order(_audit_id(record)))
        return [AuditEntry(_audit_id(record), dict(record)) for record in records[start : start + count]]

    async def audit_length(self, shard: int) -> int:
        return len(self.shards[shard].audit)

    async def trim_audit(self, shard: int, before: str) -> None:
        memory = self.shards[shard]
        memory.audit = [record for record in memory.audit if stream_order(_audit_id(record)) >= stream_order(before)]

    async def observe(self, shard: int, auction_ids: Sequence[str]) -> Observed:
        memory = self._require(shard, _names_of(shard).cursor)
        members = {group: self._members(shard, group) for group in (Group.LIVE, Group.PAUSED, Group.CLOSED)}
        standings = {
            auction_id: standing_in(
                auction_id,
                self._row(shard, auction_id),
                {group: placed[auction_id] for group, placed in members.items() if auction_id in placed},
            )
            for auction_id in auction_ids
        }
        return Observed(memory.chain, EpochMs(memory.last_at), standings)

    async def record_reconciliation(self, fields: Mapping[str, str]) -> None:
        self.reconciliations.append(dict(fields))

    async def publish(self, lines: Mapping[int, bytes]) -> None:
        for listener in self._listeners:
            for shard, payload in lines.items():
                if not listener.full():
                    listener.put_nowait((shard, payload))

    async def view(self, shard: int, auction_id: str) -> View:
        timer = shown_in(auction_id, self._row(shard, auction_id))
        return View(timer, await self.last_update(shard))

    async def page(self, shard: int, group: Group, after: Placed | None, count: int) -> list[Placed]:
        latest_first = group is Group.CLOSED
        members = self._members(shard, group)
        ordered = sorted(((score, name) for name, score in members.items()), reverse=latest_first)
        if after is not None:
            edge = (after.score, after.auction_id)
            ordered = [at for at in ordered if (at < edge if latest_first else at > edge)]
        return [Placed(score, name) for score, name in ordered[:count]]

    async def last_update(self, shard: int) -> str:
        updates = self.shards[shard].updates
        return updates[-1].stream_id if updates else START

    async def deliver_replies(self, shard: int) -> None:
        pass

    async def holds_update(self, shard: int, entry: UpdateEntry) -> bool:
        updates = self.shards[shard].updates
        at = bisect_left(updates, stream_order(entry.stream_id), key=_order)
        return updates[at : at + 1] == [entry]

    async def recent_updates(self, shard: int, count: int, upto: str | None = None) -> list[UpdateEntry]:
        updates = self.shards[shard].updates
        end = len(updates) if upto is None else bisect_right(updates, stream_order(upto), key=_order)
        return updates[max(0, end - count) : end]

    async def read_updates(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[UpdateEntry]]:
        def behind() -> dict[int, list[UpdateEntry]]:
            found = {shard: _behind(self.shards[shard].updates, since, count) for shard, since in after.items()}
            return {shard: entries for shard, entries in found.items() if entries}

        return behind() or (await self._wait(block_ms) and behind()) or {}

    async def follow(self, updates: Mapping[int, str], replies: Mapping[str, str], count: int, block_ms: int) -> News:
        def behind() -> News:
            lanes = {shard: _behind(self.shards[shard].updates, since, count) for shard, since in updates.items()}
            answers = {reply_to: self._replies_behind(reply_to, since, count) for reply_to, since in replies.items()}
            return News(
                {shard: entries for shard, entries in lanes.items() if entries},
                {reply_to: entries for reply_to, entries in answers.items() if entries},
            )

        news = behind()
        if not news.updates and not news.replies and await self._wait(block_ms):
            news = behind()
        return news

    def _replies_behind(self, reply_to: str, since: str, count: int) -> list[ReplyEntry]:
        answers = enumerate(self.replies[reply_to], start=1)
        entries = [ReplyEntry(f"{place}-0", command_id, body) for place, (_, command_id, body) in answers]
        return _behind(entries, since, count)

    async def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        listener: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(maxsize=10_000)
        self._listeners.append(listener)
        try:
            while True:
                shard, payload = await listener.get()
                if shard in shards:
                    yield shard, payload
        finally:
            self._listeners.remove(listener)


E = TypeVar("E", Entry, UpdateEntry, ReplyEntry)


def _behind(entries: list[E], since: str, count: int) -> list[E]:
    place = stream_order(since)
    if not entries or stream_order(entries[-1].stream_id) <= place:
        return []  # what a reader who waits finds nearly every time
    start = bisect_right(entries, place, key=_order)
    return entries[start : start + count]


def _order(entry: Entry | UpdateEntry | ReplyEntry) -> tuple[int, int]:
    return stream_order(entry.stream_id)


def _audit_id(record: Mapping[str, str]) -> str:
    return f"{record['seq']}-0"


def _set_name(shard: int, group: Group) -> str:
    names = _names_of(shard)
    return {
        Group.LIVE: names.deadlines,
        Group.PAUSED: names.paused,
        Group.CLOSED: names.closed,
        Group.PARKED: names.parked,
    }[group]


def _place(memory: ShardMemory, group: Group, auction_id: str, score: int) -> None:
    for standing in (Group.LIVE, Group.PAUSED, Group.CLOSED):
        memory.groups[standing].pop(auction_id, None)
    memory.groups[group][auction_id] = score
