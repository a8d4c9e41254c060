"""What lies between the processes and the store: a network that takes its time, and fails when the plan says so.

A call is a request on its way, its effect, and an answer on its way. What was sent takes effect whether its sender still
lives or not, and a sender that gets no answer within `PATIENCE_MS` learns only that (`StoreUnavailableError`):

    request ──out_ms──▶ effect ──back_ms──▶ answer          Fate: how long each way takes, and what gets lost
                  ╲ again, late (a doubled request)

The store itself is `MemoryStore`, driven in one step per call, so every call is atomic as a script of Redis is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeVar, cast

from auction_timer.simulation.timeline import Timeline
from auction_timer.simulation.witness import Witness
from engine.contract.timers import CorruptTimerError, TimerRecord
from engine.domain.instants import EpochMs
from engine.store.limits import StoreLimits
from engine.store.memory import MemoryStore, ShardMemory
from engine.store.protocol import (
    Appended,
    AuditEntry,
    Batch,
    CommitResult,
    Draft,
    Entry,
    Group,
    Lease,
    News,
    Observed,
    Placed,
    ShardClock,
    ShardHead,
    StoreUnavailableError,
    UpdateEntry,
    View,
)

T = TypeVar("T")

PATIENCE_MS: Final = 2_000.0
"""How long a caller waits for an answer. Of `engine.store.link`, about the same."""
RECONNECT_MS: Final = 50
"""How long a caller whose connection broke tries before it says so, at least."""


@dataclass(slots=True)
class Fate:
    """What becomes of one call. Times in ms."""

    out_ms: float
    back_ms: float
    request_lost: bool = False
    answer_lost: bool = False
    again_ms: float | None = None
    """When the request takes effect a second time, after the first."""


class Network:
    """Everything that the links of all processes share.

    Args:
        fate: decides each call's fate by its name; whether it changes the store is told too.
        idle_ms: a read that waits does so at least so long, whatever it asks for, so that idle days cost little.
    """

    def __init__(
        self,
        line: Timeline,
        store: MemoryStore,
        witness: Witness,
        fate: Callable[[str, bool], Fate],
        limits: StoreLimits,
        idle_ms: int = 0,
    ) -> None:
        self.line = line
        self.store = store
        self.witness = witness
        self.fate = fate
        self._idle_ms = idle_ms
        self._reconnect_ms = max(RECONNECT_MS, idle_ms / 30)
        self.limits = limits
        self.away = False
        self.cut_off: set[str] = set()
        """Processes of which no new request arrives."""
        self.generation = 0
        """How often every connection broke."""
        self._waiting: dict[asyncio.Future[Any], str] = {}
        self._parked: list[_Blocked] = []

    def break_connections(self) -> None:
        """Every call that is under way fails; a request that has not arrived never does."""
        self.generation += 1
        self._parked.clear()
        for future in list(self._waiting):
            self._fail_in(self._reconnect_ms, future)

    def forget(self, process: str) -> None:
        """A process is gone: nobody waits for its answers. What it has sent arrives."""
        self._waiting = {future: name for future, name in self._waiting.items() if name != process}
        self._parked = [blocked for blocked in self._parked if blocked.process != process]

    async def call(self, process: str, name: str, effect: Callable[[], T], *, writes: bool) -> T:
        """One call of a process.

        Raises:
            StoreUnavailableError: no answer came.
        """
        future = self._ask(process)
        if self.away or process in self.cut_off:
            self._fail_in(self._reconnect_ms, future)
            return cast(T, await future)
        fate = self.fate(name, writes)
        broken = self.generation

        def arrive() -> None:
            if broken != self.generation or self.away:
                return
            try:
                answer = effect()
            except Exception as error:
                self._answer(future, fate, broken, None, error)
            else:
                self._answer(future, fate, broken, answer, None)
            if writes:
                self._grown()

        if not fate.request_lost:
            self.line.call_in(fate.out_ms, arrive)
            if fate.again_ms is not None:
                self.line.call_in(fate.out_ms + fate.again_ms, arrive)
        if fate.request_lost or fate.answer_lost or fate.out_ms + fate.back_ms > PATIENCE_MS:
            self._fail_in(PATIENCE_MS, future)
        try:
            answer: T = await future
            return answer
        finally:
            self._waiting.pop(future, None)

    async def block(self, process: str, name: str, look: Callable[[], T], block_ms: float) -> T:
        """A read that waits until `look` finds something, at most `block_ms`.

        Raises:
            StoreUnavailableError: no answer came.
        """
        future = self._ask(process)
        if self.away or process in self.cut_off:
            self._fail_in(self._reconnect_ms, future)
            return cast(T, await future)
        fate = self.fate(name, False)
        broken = self.generation

        def arrive() -> None:
            if broken != self.generation or self.away:
                return
            found = look()
            if _is_something(found) or block_ms <= 0:
                self._answer(future, fate, broken, found, None)
                return
            blocked = _Blocked(process, future, fate, broken, look)
            self._parked.append(blocked)
            self.line.call_in(max(block_ms, self._idle_ms), lambda: self._give_up(blocked))

        self.line.call_in(fate.out_ms, arrive)
        if fate.request_lost or fate.answer_lost:
            self._fail_in(block_ms + PATIENCE_MS, future)
        try:
            answer: T = await future
            return answer
        finally:
            self._waiting.pop(future, None)

    def _ask(self, process: str) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[future] = process
        return future

    def _fail_in(self, ms: float, future: asyncio.Future[Any]) -> None:
        def fail() -> None:
            if not future.done():
                future.set_exception(StoreUnavailableError("no answer"))

        self.line.call_in(ms, fail)

    def _answer(
        self, future: asyncio.Future[Any], fate: Fate, broken: int, answer: object, error: Exception | None
    ) -> None:
        if fate.answer_lost or fate.request_lost:
            return

        def come() -> None:
            if future.done() or broken != self.generation:
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answer)

        if fate.back_ms:
            self.line.call_in(fate.back_ms, come)
        else:
            come()

    def _grown(self) -> None:
        if not self._parked:
            return
        still = []
        for blocked in self._parked:
            found = blocked.look()
            if _is_something(found):
                self._answer(blocked.future, blocked.fate, blocked.broken, found, None)
            else:
                still.append(blocked)
        self._parked = still

    def _give_up(self, blocked: "_Blocked") -> None:
        if blocked in self._parked:
            self._parked.remove(blocked)
            self._answer(blocked.future, blocked.fate, blocked.broken, blocked.look(), None)


@dataclass(eq=False, slots=True)
class _Blocked:
    """A read that waits in the store."""

    process: str
    future: asyncio.Future[Any]
    fate: Fate
    broken: int
    look: Callable[[], Any]


def _is_something(found: object) -> bool:
    return bool(found.updates or found.replies) if isinstance(found, News) else bool(found)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits: those of `MemoryStore`, but for its blocking reads."""
    try:
        work.send(None)
    except StopIteration as done:
        answer: T = done.value
        return answer
    work.close()
    raise AssertionError("it waits: only calls that answer at once can be atomic")


class Link:
    """Implements `Intake`, `ShardStore`, `ViewStore` and `ReconcilerStore` for one process, over a network.

    Args:
        attends: whether what this process writes proves that producers can write: it is a gateway.
    """

    def __init__(self, network: Network, process: str, incarnation: str, *, attends: bool = False) -> None:
        self._network = network
        self._store = network.store
        self._process = process
        self._incarnation = incarnation
        self._limits = replace(network.limits, attendant=process if attends else "")
        self._dead = False
        self._generation: int | None = None
        self.connections = 0
        """See `ShardStore`: one more with the first answer to a blocking read after a break."""

    def cut(self) -> None:
        """The process is killed: from now on nothing of it reaches anybody."""
        self._dead = True
        self._network.forget(self._process)

    async def _call(self, name: str, effect: Callable[[], T], *, writes: bool = False) -> T:
        if self._dead:
            await asyncio.sleep(0)  # where a loop that tries again and again hears that it is cancelled
            raise StoreUnavailableError("this process is dead")
        return await self._network.call(self._process, name, effect, writes=writes)

    async def _block(self, name: str, look: Callable[[], T], block_ms: int) -> T:
        if self._dead:
            await asyncio.sleep(0)  # where a loop that tries again and again hears that it is cancelled
            raise StoreUnavailableError("this process is dead")
        try:
            answer = await self._network.block(self._process, name, look, block_ms)
        except StoreUnavailableError:
            self._generation = None
            raise
        if self._generation != self._network.generation:
            self._generation = self._network.generation
            self.connections += 1
        return answer

    # What changes the store: the witness sees each effect as it happens.

    async def append(
        self, shard: int, drafts: Sequence[Draft], est: EpochMs, command_id: str, *, urgent: bool = False
    ) -> list[Appended]:
        """See `Intake`."""

        def effect() -> list[Appended]:
            self._store.limits = self._limits
            answer = at_once(self._store.append(shard, drafts, est, command_id, urgent=urgent))
            self._network.witness.appended(shard, answer)
            if self._limits.attendant:
                self._network.witness.attended(shard, est, begins=not drafts)
            return answer

        return await self._call("append", effect, writes=True)

    async def commit(self, batch: Batch) -> CommitResult:
        """See `ShardStore`."""

        def effect() -> CommitResult:
            answer = at_once(self._store.commit(batch))
            self._network.witness.committed(self._incarnation, batch, answer, self._store.shards[batch.shard])
            return answer

        return await self._call("commit", effect, writes=True)

    async def claim(self, shard: int, holder: str, seen: Lease | None) -> Lease:
        """See `LeaseStore`."""

        def effect() -> Lease:
            answer = at_once(self._store.claim(shard, holder, seen))
            self._network.witness.claimed(shard, self._incarnation, answer)
            return answer

        return await self._call("claim", effect, writes=True)

    async def renew(self, shard: int, holder: str, epoch: int) -> bool:
        """See `LeaseStore`."""
        return await self._call("renew", lambda: at_once(self._store.renew(shard, holder, epoch)))

    async def release(self, shard: int, holder: str, epoch: int) -> None:
        """See `LeaseStore`."""
        await self._call("release", lambda: at_once(self._store.release(shard, holder, epoch)))

    async def beat_member(self, name: str) -> Mapping[str, int]:
        """See `MemberStore`."""
        return await self._call("beat_member", lambda: at_once(self._store.beat_member(name)))

    async def forget_member(self, name: str) -> None:
        """See `MemberStore`."""
        await self._call("forget_member", lambda: at_once(self._store.forget_member(name)))

    async def trim_intake(self, shard: int, before: str) -> None:
        """See `ShardStore`."""
        await self._call("trim_intake", lambda: at_once(self._store.trim_intake(shard, before)))

    async def forget_closed(self, shard: int, before: EpochMs) -> None:
        """See `ShardStore`."""
        await self._call("forget_closed", lambda: at_once(self._store.forget_closed(shard, before)))

    async def deliver_replies(self, shard: int) -> None:
        """See `ShardStore`."""
        await self._call("deliver_replies", lambda: at_once(self._store.deliver_replies(shard)))

    async def deployment(self, shards: int) -> None:
        """See `ShardStore`."""
        await self._call("deployment", lambda: at_once(self._store.deployment(shards)))

    async def publish(self, lines: Mapping[int, bytes]) -> None:
        """See `ShardStore`. Ticks are disposable: they take no time, and while the store is away they are gone."""
        if self._dead or self._network.away:
            raise StoreUnavailableError("no answer")
        await self._store.publish(lines)

    # What only looks.

    async def time_us(self) -> int:
        """See `ShardStore`."""
        return await self._call("time_us", lambda: at_once(self._store.time_us()))

    async def lease(self, shard: int) -> Lease:
        """See `MemberStore`."""
        return await self._call("lease", lambda: at_once(self._store.lease(shard)))

    async def head(self, shard: int) -> ShardHead:
        """See `ShardStore`."""
        return await self._call("head", lambda: at_once(self._store.head(shard)))

    async def live(self, shard: int) -> AsyncIterator[list[TimerRecord | CorruptTimerError]]:
        """See `ShardStore`."""

        def pages() -> list[list[TimerRecord | CorruptTimerError]]:
            self._network.witness.loaded(shard)
            found: list[list[TimerRecord | CorruptTimerError]] = []
            reading = self._store.live(shard)
            while True:
                try:
                    found.append(at_once(reading.__anext__()))  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return found

        for page in await self._call("live", pages):
            yield page

    async def timers(self, shard: int, auction_ids: Sequence[str]) -> list[TimerRecord | CorruptTimerError | None]:
        """See `ShardStore`."""
        return await self._call("timers", lambda: at_once(self._store.timers(shard, auction_ids)))

    async def offers(self, shard: int, offer_ids: Sequence[str]) -> list[str | None]:
        """See `ShardStore`."""
        return await self._call("offers", lambda: at_once(self._store.offers(shard, offer_ids)))

    async def parked(self, shard: int) -> int:
        """See `ShardStore`."""
        return await self._call("parked", lambda: at_once(self._store.parked(shard)))

    async def parked_commands(self, shard: int, command_ids: Sequence[str]) -> list[bytes | None]:
        """See `ShardStore`."""
        return await self._call("parked_commands", lambda: at_once(self._store.parked_commands(shard, command_ids)))

    async def intake_length(self, shard: int) -> int:
        """See `ShardStore`."""
        return await self._call("intake_length", lambda: at_once(self._store.intake_length(shard)))

    async def read_intake(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[Entry]]:
        """See `ShardStore`."""
        return await self._block("read_intake", lambda: at_once(self._store.read_intake(after, count, 0)), block_ms)

    async def view(self, shard: int, auction_id: str) -> View:
        """See `ViewStore`."""
        return await self._call("view", lambda: at_once(self._store.view(shard, auction_id)))

    async def follow(self, updates: Mapping[int, str], replies: Mapping[str, str], count: int, block_ms: int) -> News:
        """See `ViewStore`."""
        places = dict(updates)
        return await self._block("follow", lambda: at_once(self._store.follow(places, replies, count, 0)), block_ms)

    async def holds_update(self, shard: int, entry: UpdateEntry) -> bool:
        """See `ViewStore`."""
        return await self._call("holds_update", lambda: at_once(self._store.holds_update(shard, entry)))

    async def last_update(self, shard: int) -> str:
        """See `ViewStore`."""
        return await self._call("last_update", lambda: at_once(self._store.last_update(shard)))

    async def recent_updates(self, shard: int, count: int, upto: str | None = None) -> list[UpdateEntry]:
        """See `ViewStore`."""
        return await self._call("recent_updates", lambda: at_once(self._store.recent_updates(shard, count, upto)))

    async def read_updates(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[UpdateEntry]]:
        """See `ViewStore`."""
        return await self._block("read_updates", lambda: at_once(self._store.read_updates(after, count, 0)), block_ms)

    async def page(self, shard: int, group: Group, after: Placed | None, count: int) -> list[Placed]:
        """See `ViewStore`."""
        return await self._call("page", lambda: at_once(self._store.page(shard, group, after, count)))

    async def outcome(self, shard: int, command_id: str) -> bytes | None:
        """See `ViewStore`."""
        return await self._call("outcome", lambda: at_once(self._store.outcome(shard, command_id)))

    async def is_applied(self, shard: int, event_id: str) -> bool | None:
        """See `ViewStore`."""
        return await self._call("is_applied", lambda: at_once(self._store.is_applied(shard, event_id)))

    async def shard_clock(self, shard: int) -> ShardClock:
        """See `ClockStore`."""
        return await self._call("shard_clock", lambda: at_once(self._store.shard_clock(shard)))

    async def state_clock(self, name: str, body: bytes) -> None:
        """See `ClockStore`."""
        await self._call("state_clock", lambda: at_once(self._store.state_clock(name, body)))

    async def stated_clocks(self) -> dict[str, bytes]:
        """See `ClockStore`."""
        return await self._call("stated_clocks", lambda: at_once(self._store.stated_clocks()))

    async def forget_clock(self, name: str) -> None:
        """See `ClockStore`."""
        await self._call("forget_clock", lambda: at_once(self._store.forget_clock(name)))

    async def audit_entries(self, shard: int, after: str, count: int) -> list[AuditEntry]:
        """See `AuditStore`."""
        return await self._call("audit_entries", lambda: at_once(self._store.audit_entries(shard, after, count)))

    async def audit_length(self, shard: int) -> int:
        """See `AuditStore`."""
        return await self._call("audit_length", lambda: at_once(self._store.audit_length(shard)))

    async def trim_audit(self, shard: int, before: str) -> None:
        """See `AuditStore`."""

        def effect() -> None:
            was = self._store.shards[shard].audit
            at_once(self._store.trim_audit(shard, before))
            self._network.witness.trimmed(shard, was[: len(was) - len(self._store.shards[shard].audit)])

        await self._call("trim_audit", effect, writes=True)

    async def observe(self, shard: int, auction_ids: Sequence[str]) -> Observed:
        """See `ReconcilerStore`."""
        return await self._call("observe", lambda: at_once(self._store.observe(shard, auction_ids)))

    async def record_reconciliation(self, fields: Mapping[str, str]) -> None:
        """See `ReconcilerStore`."""
        await self._call("record_reconciliation", lambda: at_once(self._store.record_reconciliation(fields)))

    def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See `ViewStore`."""
        return self._store.ticks(shards)


def copy_of(memory: ShardMemory) -> ShardMemory:
    """A shard as it stands now, to be what a failover falls back to: nothing that can change is shared."""
    return ShardMemory(**{field.name: _copied(getattr(memory, field.name)) for field in fields(memory)})


def _copied(value: Any) -> Any:
    match value:
        case list():
            return list(value)
        case dict():
            return {name: dict(held) if isinstance(held, dict) else held for name, held in value.items()}
        case _:
            return value
