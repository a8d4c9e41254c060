"""The witness: what truly happened in the store, and when, whoever knows of it. Also what was lost again by a failover.

It only writes down. Every line also goes into the trace, whose hash is the same whenever the same seed is run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from auction_timer.simulation.timeline import Timeline
from engine.domain.decide import Fact
from engine.domain.instants import EpochMs
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


@dataclass(slots=True)
class ShardHistory:
    """What happened to one shard: the commits that stand, those that a failover lost, and the event lanes that were."""

    commits: list[Commit] = field(default_factory=list)
    lost: list[Commit] = field(default_factory=list)
    lanes: list[list[UpdateEntry]] = field(default_factory=list)
    """The event lane as it stood before each failover."""


class Witness:
    """Writes down what happens, in the order in which it does."""

    def __init__(self, line: Timeline, shards: int) -> None:
        self._line = line
        self._hash = sha256()
        self.shards = {shard: ShardHistory() for shard in range(shards)}
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
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

    def claimed(self, shard: int, incarnation: str, lease: Lease) -> None:
        """A lease was asked for."""
        self.note(f"claim {shard} {incarnation} {lease}")

    def committed(self, incarnation: str, batch: Batch, answer: CommitResult) -> None:
        """A commit was answered; the same batch counts once."""
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

    def mark(self, shard: int) -> Mark:
        """Where the shard stands."""
        return Mark(len(self.shards[shard].commits))

    def lost(self, shard: int, mark: Mark, lane: list[UpdateEntry]) -> None:
        """A failover threw the shard back to `mark`; until then its event lane was `lane`."""
        history = self.shards[shard]
        history.lost += history.commits[mark.commits :]
        del history.commits[mark.commits :]
        history.lanes.append(lane)
