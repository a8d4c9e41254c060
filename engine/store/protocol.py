"""What a store guarantees. The docstrings here are the specification; `MemoryStore` is its executable form.

A commit is a list of *operations* that happen all or not at all, behind four guards. The store knows no business rule:
which operations a bid or a close needs is decided in `engine.domain` and spelled in `engine.journal`.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from engine.contract.audit import ChainHead
from engine.contract.timers import CorruptTimerError, TimerRecord
from engine.contract.values import unguarded
from engine.domain.instants import EpochMs
from engine.domain.policy import EXTENSION_MS_MAX

SCORE_MAX: Final = 2**53
"""Up to here a score tells whole milliseconds apart; no deadline is nearly as high."""
OUTAGE_HOLD_MS: Final = EXTENSION_MS_MAX
"""A close is held for an outage no longer than an extension can move an end: afterwards it could help nobody."""


class StoreError(Exception):
    """The store could not do what was asked. Subclasses say whose fault it was."""


class StoreUnavailableError(StoreError):
    """The store did not answer within the deadline of the call, retries included.

    Whether the call took effect is *unknown*: repeat it with the same command id, never with a new one.
    """


class KeyDamagedError(StoreUnavailableError):
    """A key that the call cannot do without holds something else than ours: a hand has written over it.

    Nothing was written, so that nothing is written by half. The message names the key. Repeating the call helps once a
    person has seen to it.
    """


class IntakeFullError(StoreError):
    """The intake or the troubleshooting of a shard holds as many entries as it may. Nothing was added.

    The engine is behind or down, or nobody has looked at what could not be applied.
    """


class DeploymentMismatchError(StoreError):
    """The store belongs to a deployment with another shard count or schema; start with the settings it was made with."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An event to append: its id, its normalised body, and what makes it a repetition.

    Its id counts once for each `subject`, which is what the event is about; each of `seen_ids` counts once whatever that is.
    """

    event_id: str
    body: bytes
    seen_ids: tuple[str, ...] = ()
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a draft. `at` is the arrival that decides; of a duplicate, that of the first."""

    event_id: str
    accepted: bool
    at: EpochMs


@unguarded
@dataclass(frozen=True, slots=True)
class Entry:
    """An intake entry as it was read. `at` is None if it was not written by `append`: poison.

    `attempts` counts how often it was tried before and went to troubleshooting, the first time at `first_seen_at`.
    """

    stream_id: str
    at: EpochMs | None
    event_id: str
    body: bytes
    attempts: int = 0
    first_seen_at: EpochMs | None = None


@dataclass(frozen=True, slots=True)
class ShardHead:
    """Where the fold of a shard stands."""

    intake: str
    chain: ChainHead
    last_at: EpochMs


# Operations of a commit.


@unguarded
@dataclass(frozen=True, slots=True)
class PutTimer:
    """Write fields of a timer hash. The first one for an auction in a batch must carry the version it builds on."""

    auction_id: str
    fields: Mapping[str, str]


@unguarded
@dataclass(frozen=True, slots=True)
class PlaceLive:
    """The deadline of an auction is `ends_at`: it stands in the sorted set of deadlines."""

    auction_id: str
    ends_at: EpochMs


@dataclass(frozen=True, slots=True)
class PlacePaused:
    """An auction has no deadline while it is paused."""

    auction_id: str
    paused_at: EpochMs


@dataclass(frozen=True, slots=True)
class PlaceClosed:
    """An auction is over: no deadline is left, and its hash is kept for the retention only."""

    auction_id: str
    closed_at: EpochMs


@dataclass(frozen=True, slots=True)
class Displace:
    """Nothing stands where an auction of this id would: it has no deadline, no pause and no end."""

    auction_id: str


@unguarded
@dataclass(frozen=True, slots=True)
class Record:
    """Append an audit record, already chained."""

    fields: Mapping[str, str]


@unguarded
@dataclass(frozen=True, slots=True)
class Announce:
    """Append to the event lane."""

    type: str
    auction_id: str
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the one who asked."""

    reply_to: str
    outcome: str
    command_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Park:
    """Move a command to troubleshooting; it is listed by `first_seen_at`.

    Where another one of this id waits there already, it is parked as `otherwise`; if that is None, in the other's place.
    """

    command_id: str
    first_seen_at: EpochMs
    body: bytes
    otherwise: str | None = None


@dataclass(frozen=True, slots=True)
class Unpark:
    """Take a command out of troubleshooting."""

    command_id: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """Append an event to the end of the intake, stamped with this commit. It was tried `attempts` times before."""

    event_id: str
    body: bytes
    attempts: int
    first_seen_at: EpochMs


@dataclass(frozen=True, slots=True)
class KeepOutcome:
    """Remember what became of a command, for whoever asks by its id as long as its repetition is recognised."""

    command_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class BindOffer:
    """Remember what an offer id stands for in this shard: an auction, or a cancellation that came first.

    `forget` says that it is kept for the retention only, and never in the place of something else: an offer that was put up
    again belongs to the later auction, also when the earlier one closes. A binding that says this and more, after a space,
    stays what it is.
    """

    offer_id: str
    value: str
    forget: bool


@dataclass(frozen=True, slots=True)
class SetOffset:
    """From now on the shard's stamps are `TIME + offset_ms`. It counts as one more correction of the shard's clock."""

    offset_ms: int


Operation = (
    PutTimer
    | PlaceLive
    | PlacePaused
    | PlaceClosed
    | Displace
    | Record
    | Announce
    | Reply
    | Park
    | Unpark
    | Requeue
    | KeepOutcome
    | BindOffer
    | SetOffset
)


@dataclass(slots=True)
class Batch:
    """Operations of one shard that are committed in one atomic step.

    Guards, in order; the first that fails decides the answer and nothing is written:

    1. `commit_id` is the last commit of the shard: it was done before, the answer is repeated (`Committed`).
    2. `holder` and `epoch` are those of the shard's lease (`Fenced`). The epoch alone would not do: a failover that loses a
       claim gives its number out again, and whom it was given to first may not know yet.
    3. `after` is where the shard stands, by its cursor and the last record's `seq` and `hash`, and each of `versions` is the
       version of that auction (`Superseded`).
    4. if `due_at` is set, the stamp of this commit is at least `due_at` (`Early`), and no intake entry behind `intake`
       arrived before it (`Undrained`).
    5. if `closes_at` is set, a gateway has written to the shard since `outage_ms` before it (`Unattended`), and no outage
       that began before it is unapplied (`Undrained`). It holds for `OUTAGE_HOLD_MS` after `closes_at`, and only where
       outages count and a gateway has ever beaten.

    Whatever hands have written over keys, a commit happens all or not at all. A timer of another type is of no version
    (`Superseded`). What the log can give back, and what is on its way out (timers, sorted sets, troubleshooting, the event
    lane, replies), is begun anew, by that one key. Without the cursor, the intake or the audit log there is no commit:
    `KeyDamagedError`, before anything is written.
    """

    shard: int
    holder: str
    epoch: int
    commit_id: str
    est: EpochMs
    after: ShardHead
    intake: str
    chain: ChainHead
    due_at: EpochMs | None = None
    closes_at: EpochMs | None = None
    """The latest end among the auctions that it closes."""
    versions: dict[str, int] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Committed:
    """Done. `at` is the stamp of the commit: no later event of the shard can carry an earlier arrival.

    `begun_anew` are keys that the commit found to be of another type, and has put ours in the place of.
    """

    at: EpochMs
    begun_anew: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another engine has the lease; stop."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Superseded:
    """The shard is not where the batch was built on: load it again. With an `auction_id` only that auction's hash is not.

    `version` is the one its hash has instead (0 if there is no hash, None if it is no number).
    """

    what: str
    auction_id: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Early:
    """The authority's clock has not reached `due_at`; it lacks `by_ms`."""

    by_ms: int


@dataclass(frozen=True, slots=True)
class Undrained:
    """Intake entries that arrived before `due_at` are still unapplied; apply them first."""


@dataclass(frozen=True, slots=True)
class Unattended:
    """No gateway could write to the shard since `at`, which is too long before a close of the batch: wait for one."""

    at: EpochMs


CommitResult = Committed | Fenced | Superseded | Early | Undrained | Unattended


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard's lease as it was seen. `beat` counts the holder's heartbeats."""

    holder: str
    epoch: int
    beat: int


@dataclass(frozen=True, slots=True)
class ShardClock:
    """A shard's clock as it was read in one step: `TIME`, what is added to it, and how often that was set."""

    time_us: int
    offset_ms: int
    corrections: int

    @property
    def now_us(self) -> int:
        """What the shard's clock shows."""
        return self.time_us + self.offset_ms * 1_000


@dataclass(frozen=True, slots=True)
class UpdateEntry:
    """An entry of the event lane as it was read."""

    stream_id: str
    type: str
    auction_id: str
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class View:
    """One auction and the place in the event lane as of which it stands so, read in one step."""

    record: TimerRecord | None
    stream_id: str


@dataclass(frozen=True, slots=True)
class ReplyEntry:
    """An answer as it was read from the stream of the one who asked."""

    stream_id: str
    command_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class News:
    """What is new on the event lane, per shard, and on reply streams, per `reply_to`.

    Both are read in one step: the announcements of a commit are never later than its reply.
    """

    updates: dict[int, list[UpdateEntry]]
    replies: dict[str, list[ReplyEntry]]


class Group(StrEnum):
    """The ordered sets. Every registered auction stands in exactly one of the first three; commands in the last."""

    LIVE = "live"
    PAUSED = "paused"
    CLOSED = "closed"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Placed:
    """A member of an ordered set. `score`: its deadline, its pause or its end; when a parked command was first seen.

    A score that is no instant is `SCORE_MAX` or its negative, whichever is nearer: it equals no right one.
    """

    score: int
    auction_id: str
    """Of a parked command: the command id. Of what is no auction id: its name (`engine.contract.members`)."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is kept of one auction outside the log: its hash, and its score in each of the ordered sets it may stand in."""

    record: TimerRecord | CorruptTimerError | None
    scores: Mapping[Group, int]
    sealed: bool = True
    """Whether the hash has the checksum of its values."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Auctions of one shard, and the place in its audit log as of which they stand so, read in one step."""

    chain: ChainHead
    at: EpochMs
    """The last stamp of the shard."""
    standings: Mapping[str, Standing]


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A record of the audit stream as it was read: every field of it, `hash` included."""

    stream_id: str
    fields: dict[str, str]


class ClockStore(Protocol):
    """The authority's clock, and what processes state about theirs.

    No call is repeated here: a late answer is a bad sample, and a statement is followed by the next one. Every method raises
    `StoreUnavailableError`, `redis.exceptions.RedisError` or `OSError` when no answer comes.
    """

    async def time_us(self) -> int:
        """The authority's clock: that of shard 0, with its offset, in microseconds since the Unix epoch."""
        ...

    async def shard_clock(self, shard: int) -> ShardClock:
        """The clock by which arrivals in a shard are stamped."""
        ...

    async def state_clock(self, name: str, body: bytes) -> None:
        """State something about the clock of the process of this name, in the place of what it stated before."""
        ...

    async def stated_clocks(self) -> dict[str, bytes]:
        """What was stated last, by name."""
        ...

    async def forget_clock(self, name: str) -> None:
        """Take a name off the list."""
        ...


class AuditStore(Protocol):
    """The archiver's and the auditor's side. Every method raises `StoreUnavailableError` when no answer comes in time."""

    async def audit_entries(self, shard: int, after: str, count: int) -> list[AuditEntry]:
        """The next `count` records of the audit stream behind a stream id (`engine.contract.cursors.START` for all)."""
        ...

    async def audit_length(self, shard: int) -> int:
        """How many records the audit stream holds."""
        ...

    async def trim_audit(self, shard: int, before: str) -> None:
        """Forget the records before a stream id. The caller has archived them."""
        ...

    async def head(self, shard: int) -> ShardHead:
        """Where the fold of the shard stands: its `chain` is the last record's `seq` and `hash`."""
        ...


class ReconcilerStore(AuditStore, ClockStore, Protocol):
    """The reconciler's side. Every method raises `StoreUnavailableError` when no answer comes in time."""

    async def observe(self, shard: int, auction_ids: Sequence[str]) -> Observed:
        """These auctions as they are kept, with the head of the audit log in the same instant."""
        ...

    async def page(self, shard: int, group: Group, after: Placed | None, count: int) -> list[Placed]:
        """See `ViewStore`."""
        ...

    async def lease(self, shard: int) -> Lease:
        """The lease of the shard, as it stands."""
        ...

    async def append(
        self, shard: int, drafts: Sequence[Draft], est: EpochMs, command_id: str, *, urgent: bool = False
    ) -> list[Appended]:
        """See `Intake`."""
        ...

    async def record_reconciliation(self, fields: Mapping[str, str]) -> None:
        """Append to the stream of reconciliations, which keeps the last ones only (`StoreLimits.reconciliations_max`)."""
        ...

    def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See `ViewStore`."""
        ...


class Intake(Protocol):
    """The producers' side."""

    async def append(
        self, shard: int, drafts: Sequence[Draft], est: EpochMs, command_id: str, *, urgent: bool = False
    ) -> list[Appended]:
        """Append events in order, in one atomic step, and stamp their arrival.

        The stamp is `max(last_at, clamp(TIME + offset, est - 250, est + 250))`, so it never goes back and a stepping
        server clock cannot falsify it by more than 250 ms. A draft whose id was appended before with the same subject, or
        any of its seen ids, is a duplicate. Repeating a call with the same `command_id` repeats its answer.

        Where the store is a gateway's (`StoreLimits.attendant`), the call also proves that producers can reach the shard, if
        an event of theirs would be taken now: at its bounds it refuses them, whoever beats. With no drafts the call does only
        that, and begins to. If no gateway did for longer than `outage_ms`, the outage is appended before the drafts, as an
        event of its own.

        Raises:
            IntakeFullError: the shard's backlog is at its bound, or its troubleshooting is, which hinders nothing `urgent`:
                commands of people and of ours, which name what is known and hardly ever end there.
            KeyDamagedError: there is no intake to append to, or no cursor to stamp by.
            StoreUnavailableError: no answer in time; repeat with the same `command_id`.
        """
        ...


class LeaseStore(Protocol):
    """Who works on a shard. Every method raises `StoreUnavailableError` when no answer comes in time."""

    async def claim(self, shard: int, holder: str, seen: Lease | None) -> Lease:
        """Take the lease if it is free, ours, or still exactly as `seen`; return it as it now stands.

        A claim that succeeds raises the fencing epoch, so whoever held it before cannot commit any more.
        """
        ...

    async def renew(self, shard: int, holder: str, epoch: int) -> bool:
        """Beat once. False: the lease is no longer ours."""
        ...

    async def release(self, shard: int, holder: str, epoch: int) -> None:
        """Give the lease back, if it is still ours; the epoch stays."""
        ...


class MemberStore(Protocol):
    """Which engines there are. Every method raises `StoreUnavailableError` when no answer comes in time."""

    async def beat_member(self, name: str) -> Mapping[str, int]:
        """Beat once as this member; every member and its beats, this one included."""
        ...

    async def forget_member(self, name: str) -> None:
        """Take a member off the list."""
        ...

    async def lease(self, shard: int) -> Lease:
        """The lease of a shard, as it stands."""
        ...


class ShardStore(LeaseStore, MemberStore, Protocol):
    """The engine's side. Every method raises `StoreUnavailableError` when no answer comes in time."""

    async def time_us(self) -> int:
        """See `ClockStore`."""
        ...

    async def deployment(self, shards: int) -> None:
        """Store the shard count at the first start; check it at every other.

        Raises:
            DeploymentMismatchError: the deployment was started with another shard count or schema.
        """
        ...

    async def head(self, shard: int) -> ShardHead:
        """Where the fold of the shard stands.

        Raises:
            KeyDamagedError: the cursor cannot be read.
        """
        ...

    def live(self, shard: int) -> AsyncIterator[list[TimerRecord | CorruptTimerError]]:
        """Every auction of the shard that is not over, in pages.

        A sorted set that is none, and a member that is too long to be named, are a `CorruptTimerError` each.
        """
        ...

    async def timers(self, shard: int, auction_ids: Sequence[str]) -> list[TimerRecord | CorruptTimerError | None]:
        """These auctions, in this order; None where there is none."""
        ...

    async def offers(self, shard: int, offer_ids: Sequence[str]) -> list[str | None]:
        """What these offer ids are bound to."""
        ...

    @property
    def connections(self) -> int:
        """How many connections were made for `read_intake` and `follow`.

        One more than before a read: the server may be another, and may lack the end of what was read or committed.
        """
        ...

    async def read_intake(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[Entry]]:
        """Entries behind the given stream ids, at most `count` per shard; waits up to `block_ms` if there are none.

        A shard whose intake is of another type has none.
        """
        ...

    async def commit(self, batch: Batch) -> CommitResult:
        """See `Batch`."""
        ...

    async def deliver_replies(self, shard: int) -> None:
        """Deliver the replies that commits of the shard could not write themselves: at least once, in order."""
        ...

    async def parked(self, shard: int) -> int:
        """How many commands of the shard are in troubleshooting."""
        ...

    async def parked_commands(self, shard: int, command_ids: Sequence[str]) -> list[bytes | None]:
        """These commands as they were parked; None where one is not in troubleshooting."""
        ...

    async def intake_length(self, shard: int) -> int:
        """How many entries the intake of the shard holds, applied or not."""
        ...

    async def trim_intake(self, shard: int, before: str) -> None:
        """Forget intake entries before stream id `before`, which the caller has committed long ago."""
        ...

    async def forget_closed(self, shard: int, before: EpochMs) -> None:
        """Take auctions that closed before `before` out of the listing; their hashes expire by themselves."""
        ...

    async def publish(self, lines: Mapping[int, bytes]) -> None:
        """Send lines of the tick lane, per shard. They are disposable: nobody waits for them and nobody repeats them."""
        ...


class ViewStore(Protocol):
    """The gateway's side."""

    async def view(self, shard: int, auction_id: str) -> View:
        """One auction, and where the event lane stood in the same instant."""
        ...

    async def timers(self, shard: int, auction_ids: Sequence[str]) -> list[TimerRecord | CorruptTimerError | None]:
        """These auctions, in this order; None where there is none."""
        ...

    async def page(self, shard: int, group: Group, after: Placed | None, count: int) -> list[Placed]:
        """The next members of a group behind `after`, by score; of closed auctions, the latest end first.

        A sorted set that is none has no members, and one that is too long to be named is left out.
        """
        ...

    async def offers(self, shard: int, offer_ids: Sequence[str]) -> list[str | None]:
        """What these offer ids are bound to."""
        ...

    async def parked_commands(self, shard: int, command_ids: Sequence[str]) -> list[bytes | None]:
        """These commands as they were parked; None where one is not in troubleshooting."""
        ...

    async def parked(self, shard: int) -> int:
        """How many commands of the shard are in troubleshooting."""
        ...

    async def outcome(self, shard: int, command_id: str) -> bytes | None:
        """What became of a command; None if it is not decided, or was never appended to this shard."""
        ...

    async def is_applied(self, shard: int, event_id: str) -> bool | None:
        """Whether an event that was appended to this shard has been applied; None if none of this id was.

        It is told as long as a repetition is recognised; of several events of one id, of the first. One that was sent round
        again from troubleshooting has been applied.
        """
        ...

    async def follow(self, updates: Mapping[int, str], replies: Mapping[str, str], count: int, block_ms: int) -> News:
        """Entries of the event lane and of reply streams behind the given stream ids, read in one step.

        At most `count` of each stream; waits up to `block_ms` if there are none.
        """
        ...

    @property
    def connections(self) -> int:
        """See `ShardStore`."""
        ...

    async def holds_update(self, shard: int, entry: UpdateEntry) -> bool:
        """Whether the event lane holds this very entry: of another history it may hold another one under its id."""
        ...

    async def lease(self, shard: int) -> Lease:
        """The lease of the shard, as it stands."""
        ...

    async def last_update(self, shard: int) -> str:
        """The stream id of the last entry of the event lane."""
        ...

    async def recent_updates(self, shard: int, count: int, upto: str | None = None) -> list[UpdateEntry]:
        """The last `count` entries of the event lane, or of it up to a stream id, in order; fewer if there are no more."""
        ...

    async def read_updates(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[UpdateEntry]]:
        """Entries of the event lane behind the given stream ids; waits up to `block_ms` if there are none."""
        ...

    def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """The tick lane: `(shard, lines)` as they come. Raises `StoreUnavailableError` after three seconds of silence."""
        ...
