"""The witness: what truly happened in the store, and when, whoever knows of it. Also what was lost again by a failover.

It only writes down. Every line also goes into the trace, whose hash is the same whenever the same seed is run.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from auction_timer.simulation.timeline import Timeline
from engine.domain.decide import Fact
from engine.domain.instants import EpochMs
from engine.store.memory import ShardMemory
from engine.store.protocol import Appended, Batch, CommitResult, Committed, Lease, Record, UpdateEntry


@dataclass(frozen=True, slots=True)
class Close:
    """An auction was closed."""

    auction_id: str
    ends_at: EpochMs


@dataclass(frozen=True, slots=True)
class Commit:
    """A batch took effect, at `true_ms` by the undisturbed clock."""

    shard: int
    epoch: int
    incarnation: str
    """The one life of a process: who restarts under the same name is another."""
    commit_id: str
    true_ms: EpochMs
    closes: tuple[Close, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in what happened to a shard, to fall back to."""

    commits: int
    attended: int


@dataclass(slots=True)
class Damage:
    """Something of an auction that was changed by hand, behind everybody's back."""

    kind: str
    shard: int
    auction_id: str
    stands: Callable[[ShardMemory], bool]
    """Whether a shard still shows it."""
    since_ms: EpochMs
    """When it was done, or came back with a failover; true time."""
    misleads: bool
    """Whether an engine that starts while it stands believes something wrong."""
    open: bool = True
    looked: int = 0
    """Passes of the reconciler that began with it there, and with an engine that had nothing else to do."""
    overlooked: bool = False
    """It stood there still when a pass began after another had gone by."""


@dataclass(slots=True)
class ShardHistory:
    """What happened to one shard: the commits that stand, those that a failover lost, and the event lanes that were."""

    commits: list[Commit] = field(default_factory=list)
    lost: list[Commit] = field(default_factory=list)
    lanes: list[list[UpdateEntry]] = field(default_factory=list)
    """The event lane as it stood before each failover."""
    attended: list[tuple[EpochMs, EpochMs]] = field(default_factory=list)
    """When gateways wrote to the shard: sent, by their clocks, and arrived. The stamp lies between the two."""
    trimmed: list[dict[str, str]] = field(default_factory=list)
    """The audit records that were taken out of the stream, in the order in which they were."""

    def audit(self, streamed: list[dict[str, str]]) -> list[dict[str, str]]:
        """The whole log that ends with what is in the stream. What a failover brought back is there, and no more trimmed."""
        first = int(streamed[0]["seq"]) if streamed else 1
        before = {int(record["seq"]): record for record in self.trimmed}
        return [before[seq] for seq in sorted(before) if seq < first] + streamed


class Witness:
    """Writes down what happens, in the order in which it does."""

    def __init__(self, line: Timeline, shards: int) -> None:
        self._line = line
        self._hash = sha256()
        self.shards = {shard: ShardHistory() for shard in range(shards)}
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.damages: list[Damage] = []
        self.misled: set[str] = set()
        """Auctions that an engine took from a damaged hash."""
        self.ended_by_themselves: list[str] = []
        """Processes that stopped without having been told to."""

    @property
    def trace(self) -> str:
        """The hash over everything that happened, in hexadecimal."""
        return self._hash.hexdigest()

    def note(self, text: str) -> None:
        """One line of the trace."""
        self._hash.update(b"%d %b\n" % (self._line.now_ns, text.encode()))

    def fault(self, kind: str, detail: str = "") -> None:
        """Something goes wrong, on purpose."""
        self.faults[kind] += 1
        self.note(f"fault {kind} {detail}")

    def appended(self, shard: int, answers: Sequence[Appended]) -> None:
        """The intake answered."""
        for answer in answers:
            self.counts["events accepted" if answer.accepted else "events repeated"] += 1
            self.note(f"append {shard} {answer.event_id} {answer.accepted} {answer.at}")

    def attended(self, shard: int, est: EpochMs, *, begins: bool) -> None:
        """A gateway wrote to the shard, at `est` by its clock; the first beat begins the count.

        A request may be late or come twice: it proves that somebody could write when it was sent.
        """
        attended = self.shards[shard].attended
        if attended or begins:
            attended.append((max(est, attended[-1][0] if attended else est), self._line.now_ms))

    def loaded(self, shard: int) -> None:
        """An engine takes what is kept for the truth: of a hash that is damaged it cannot know."""
        for damage in self.damages:
            if damage.open and damage.misleads and damage.shard == shard:
                self.misled.add(damage.auction_id)

    def claimed(self, shard: int, incarnation: str, lease: Lease) -> None:
        """A lease was asked for."""
        self.note(f"claim {shard} {incarnation} {lease}")

    def committed(self, incarnation: str, batch: Batch, answer: CommitResult, memory: ShardMemory) -> None:
        """A commit was answered; the same batch counts once. `memory` is the shard afterwards."""
        self.note(f"commit {incarnation} {batch.shard} {batch.epoch} {batch.intake} {batch.chain.hash} {answer}")
        history = self.shards[batch.shard]
        if not isinstance(answer, Committed):
            self.counts[f"commits answered {type(answer).__name__}"] += 1
            return
        if history.commits and history.commits[-1].commit_id == batch.commit_id:
            return
        records = [made.fields for made in batch.operations if isinstance(made, Record)]
        closes = tuple(
            Close(record["auction_id"], EpochMs(int(record["occurred_at"])))
            for record in records
            if record["event_type"] == Fact.ENDED
        )
        history.commits.append(
            Commit(batch.shard, batch.epoch, incarnation, batch.commit_id, self._line.now_ms, closes)
        )
        self.counts["commits"] += 1
        for damage in self.damages:
            if damage.open and damage.shard == batch.shard:
                damage.open = damage.stands(memory)

    def trimmed(self, shard: int, records: list[dict[str, str]]) -> None:
        """The archiver takes records out of the stream."""
        self.shards[shard].trimmed += records
        self.counts["audit records trimmed"] += len(records)
        self.note(f"trim {shard} {len(records)}")

    def damaged(self, damage: Damage) -> None:
        """Somebody has changed something by hand."""
        self.damages.append(damage)
        self.fault(f"damage, {damage.kind}", damage.auction_id)

    def pass_begins(self, shards: Mapping[int, ShardMemory]) -> list[Damage]:
        """A pass of the reconciler begins. What it must find; `pass_ends` is to be told if it comes to its end."""
        found = []
        for damage in self.damages:
            memory = shards[damage.shard]
            idle = not memory.events or memory.events[-1].stream_id == memory.intake_cursor
            if damage.open and idle:
                damage.overlooked |= damage.looked > 0
                found.append(damage)
        return found

    def pass_ends(self, found: list[Damage], requested: int) -> None:
        """The pass that began with `found` came to its end, and asked for so many repairs."""
        for damage in found:
            damage.looked += 1
        self.counts["passes of the reconciler"] += 1
        self.counts["repairs"] += requested

    def mark(self, shard: int) -> Mark:
        """Where the shard stands."""
        return Mark(len(self.shards[shard].commits), len(self.shards[shard].attended))

    def lost(self, shard: int, mark: Mark, lane: list[UpdateEntry], memory: ShardMemory) -> None:
        """A failover threw the shard back to `mark`, and to `memory`; until then its event lane was `lane`."""
        history = self.shards[shard]
        del history.attended[mark.attended :]
        for damage in self.damages:
            if damage.shard == shard:
                damage.open, damage.looked, damage.since_ms = damage.stands(memory), 0, self._line.now_ms
        history.lost += history.commits[mark.commits :]
        del history.commits[mark.commits :]
        history.lanes.append(lane)
