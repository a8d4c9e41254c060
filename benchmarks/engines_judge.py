"""What two engines under fire have written, held against the log of what was asked of them.

The reference is a fold: the intake of every shard, entry by entry, through the pure domain. Nothing of the engine's shell
takes part in it. Each check counts what is wrong, and says of the first few what it is:

- records, chain: every audit record of every auction is the one that the fold makes, and each shard's chain is whole;
- missing, doubled, early: auctions that did not close exactly once, in the audit and on the event lane, or whose close was
  written by the server before the end that it names;
- timers, places, lane: the hash, the place among live, paused and closed, and the event lane, as the fold has them;
- lost: acknowledged events that do not stand exactly once in the intake;
- answers, parked: replies that did not come exactly once, troubleshooting that holds something else than what was refused;
- foreign: commits of an epoch or a holder that the lease did not name any more.
"""

import asyncio
import contextlib
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final
from uuid import uuid4

from redis import Redis

from engine.contract import audit, frames
from engine.contract.intake import SCHEDULER, Context, decode
from engine.contract.keys import ShardKeys, replies, shard_of
from engine.contract.timers import TimerRecord, from_fields
from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.events import Cancel, InputEvent, Withdraw
from engine.domain.fold import elapse, fold, next_due
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.refusals import RefusalCode

SHARDS: Final = 8
GENESIS: Final = "0" * 64
SHOWN: Final = 10
"""Findings of each kind that are kept as sentences."""
CHAINED: Final = frozenset({"seq", "prev_hash", "hash", "recorded_at"})
"""Fields of a record that do not follow from the intake alone: the order among auctions, and when it was written."""
BY_TIME: Final = frozenset({Fact.STARTED, Fact.CLOSING, Fact.ENDED})
FOR_PEOPLE: Final = frozenset({RefusalCode.UNKNOWN_AUCTION, RefusalCode.CONFLICTING_REGISTRATION})
"""Refusals that wait in troubleshooting even if whoever asked was answered."""
CAUGHT_UP_WITHIN_S: Final = 10.0
MONITOR_LINE_BYTES_MAX: Final = 2**26
"""A commit of a full batch is one line, with every record and frame in it."""

Fields = dict[str, str]


@dataclass(frozen=True, slots=True)
class Commit:
    """One call of the commit script as the server saw it."""

    epoch: int
    holder: str
    commit_id: str


@dataclass(slots=True)
class Witness:
    """Who claimed and who committed, as the server itself tells it (MONITOR): no engine has a say."""

    accepted: defaultdict[int, list[Commit]] = field(default_factory=lambda: defaultdict(list))
    """By shard, in the order in which the server applied them."""
    refused: int = 0
    """Commits under an epoch that the lease had left behind, which the server did not apply."""
    foreign: list[str] = field(default_factory=list)
    """Those which it did, as sentences. There should be none."""
    _leases: defaultdict[int, tuple[int, str]] = field(default_factory=lambda: defaultdict(lambda: (0, "")))
    """Epoch and holder of each shard now."""
    _asked: tuple[int, Commit] | None = None
    _mark: str = ""
    _marked: asyncio.Event = field(default_factory=asyncio.Event)

    async def caught_up(self, client: Redis) -> None:
        """Wait until all was read that the server has done before this call.

        Raises:
            TimeoutError: it was not, within ten seconds.
        """
        self._mark = uuid4().hex
        self._marked.clear()
        await asyncio.to_thread(client.echo, self._mark)
        async with asyncio.timeout(CAUGHT_UP_WITHIN_S):
            await self._marked.wait()

    async def watch(self, reader: asyncio.StreamReader) -> None:
        """Read what the server does until cancelled."""
        while line := await reader.readline():
            self.see(line.decode(errors="replace"))

    def see(self, line: str) -> None:
        """Take one line of MONITOR. What a script does follows the line that called it."""
        if self._mark and self._mark in line:
            self._marked.set()
        # EVALSHA, or EVAL with the whole text where the server did not know the script yet.
        if '"auction:lease:{' in line and '] "EVAL' in line:
            self._settle()
            if '"auction:updates:{' in line:
                words = _words(line)
                keys = int(next(islice(words, 2, 3)))
                names = list(islice(words, keys))
                epoch, _, holder = next(words).partition(" ")
                self._asked = _shard_in(names[0]), Commit(int(epoch), holder, next(words))
        elif " lua] " not in line:
            return
        elif '] "HINCRBY" "auction:lease:{' in line and '"epoch"' in line:
            shard = _shard_in(line)
            self._leases[shard] = self._leases[shard][0] + 1, ""
        elif '] "HSET" "auction:lease:{' in line and '"holder"' in line:
            _, name, _, holder = islice(_words(line), 4)
            self._leases[_shard_in(name)] = self._leases[_shard_in(name)][0], holder
        elif self._asked is not None and '] "HSET" "auction:cursor:{' in line:
            self._accept(line, *self._asked)

    def _accept(self, line: str, shard: int, commit: Commit) -> None:
        if f'"commit" "{commit.commit_id}"' not in line:
            return
        self._asked = None
        self.accepted[shard].append(commit)
        if (commit.epoch, commit.holder) != self._leases[shard]:
            self.foreign.append(f"shard {shard}: {commit} while the lease was of {self._leases[shard]}")

    def _settle(self) -> None:
        if self._asked is not None:
            shard, commit = self._asked
            self.refused += (commit.epoch, commit.holder) != self._leases[shard]
            self._asked = None

    @property
    def claims(self) -> int:
        """How often a shard was claimed."""
        return sum(epoch for epoch, _ in self._leases.values())


def _words(line: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r'"((?:[^"\\]|\\.)*)"', line))


def _shard_in(name: str) -> int:
    return int(name.partition("{")[2].partition("}")[0])


@contextlib.asynccontextmanager
async def witness(path: str) -> AsyncIterator[Witness]:
    """Watch the server behind a Unix socket for the duration of a block."""
    reader, writer = await asyncio.open_unix_connection(path, limit=MONITOR_LINE_BYTES_MAX)
    seen = Witness()
    writer.write(b"MONITOR\r\n")
    assert (await reader.readline()).startswith(b"+OK")
    watching = asyncio.create_task(seen.watch(reader))
    try:
        yield seen
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        writer.close()
        await writer.wait_closed()


# The reference.


@dataclass(slots=True)
class Reference:
    """What must stand in the store, by the intake alone."""

    auctions: dict[str, TimerRecord] = field(default_factory=dict)
    records: defaultdict[str, list[Fields]] = field(default_factory=lambda: defaultdict(list))
    lane: defaultdict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    """Per auction: type and version of what is announced."""
    parked: set[str] = field(default_factory=set)
    asked: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By reply stream: the commands that are answered there."""
    entered: Counter[str] = field(default_factory=Counter)

    def take(self, entry: Fields, stream_id: str) -> None:
        """Fold one intake entry."""
        self.entered[entry["id"]] += 1
        read = decode(entry["id"], entry["body"].encode())
        assert isinstance(read.event, InputEvent)
        assert read.auction_id is not None
        standing = self._standing(read.auction_id)
        for decision in fold(standing.auction, read.event, EpochMs(int(entry["at"]))):
            by_time = decision.fact in BY_TIME
            self._write(decision, None if by_time else read.context, stream_id)
            if decision.refusal is not None and _is_for_people(decision, read.context, read.event):
                self.parked.add(entry["id"])
        if read.context.reply_to is not None:
            self.asked[read.context.reply_to].append(entry["id"])

    def elapse(self, until: EpochMs) -> None:
        """Let time pass over everything, up to and including `until`."""
        for auction_id in list(self.auctions):
            for decision in elapse(self.auctions[auction_id].auction, until):
                self._write(decision, None, "")

    def at_rest_until(self) -> EpochMs | None:
        """When time does something next; None if never."""
        due = [next_due(record.auction) for record in self.auctions.values()]
        return min((each[0] for each in due if each is not None), default=None)

    def _standing(self, auction_id: str) -> TimerRecord:
        return self.auctions.get(auction_id) or TimerRecord(Auction(auction_id))

    def _write(self, decision: Decision, context: Context | None, stream_id: str) -> None:
        if decision.fact is None:
            return
        auction_id = decision.after.auction_id
        standing = self._standing(auction_id)
        ids = standing.trace_id, standing.correlation_id
        if decision.fact in (Fact.REGISTERED, Fact.TOMBSTONED):
            assert context is not None
            ids = context.trace_id, context.correlation_id
        record = self.auctions[auction_id] = TimerRecord(decision.after, *ids)
        actor = context.actor if context else SCHEDULER
        if context:
            ids = context.trace_id, context.correlation_id
        made = audit.record(
            decision, actor=actor, event_id=context.event_id if context else "", intake_id=stream_id if context else "",
            trace_id=ids[0], correlation_id=ids[1], recorded_at=decision.at,
        )  # fmt: skip
        self.records[auction_id].append(_comparable(made))
        if decision.after.status.is_public:
            updates = frames.announce(
                decision, record, actor=actor, trace_id=ids[0], correlation_id=ids[1], now=decision.at
            )
            self.lane[auction_id] += [(update.type, update.version) for update in updates]


def _is_for_people(decision: Decision, context: Context, event: InputEvent) -> bool:
    assert decision.refusal is not None
    if decision.refusal.code in FOR_PEOPLE:
        return True
    return context.reply_to is None and not isinstance(event, Cancel | Withdraw)


def _comparable(record: Mapping[str, str]) -> Fields:
    return {name: value for name, value in record.items() if name not in CHAINED}


def reference(client: Redis) -> Reference:
    """Fold the whole intake."""
    made = Reference()
    for shard in range(SHARDS):
        for stream_id, entry in _stream(client, ShardKeys.of(shard).events):
            made.take(entry, stream_id)
    return made


# The store.


def _stream(client: Redis, key: str) -> list[tuple[str, Fields]]:
    found: Any = client.xrange(key)
    return [
        (stream_id.decode(), {name.decode(): value.decode() for name, value in fields.items()})
        for stream_id, fields in found
    ]


def drained(client: Redis) -> bool:
    """Whether everything that was asked has been applied."""
    for shard in range(SHARDS):
        names = ShardKeys.of(shard)
        last: Any = client.xrevrange(names.events, count=1)
        if last and client.hget(names.cursor, "intake") != last[0][0]:
            return False
    return True


def recorded(client: Redis) -> int:
    """How many audit records there are."""
    lengths: list[Any] = [client.xlen(ShardKeys.of(shard).audit) for shard in range(SHARDS)]
    return sum(lengths)


CHECKS: Final = (
    "records", "chain", "missing", "doubled", "early", "timers", "places", "lane", "lost", "answers", "parked", "foreign",
)  # fmt: skip


@dataclass(slots=True)
class Verdict:
    """What is wrong: how many of each kind, and the first few as sentences."""

    wrong: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    lateness_ms: list[int] = field(default_factory=list)
    """Of each close: from its end until an engine decided it."""
    closed: int = 0
    cancelled: int = 0
    records: int = 0

    def find(self, kind: str, what: str) -> None:
        """Count something that is wrong."""
        assert kind in CHECKS
        self.wrong[kind] += 1
        if self.wrong[kind] <= SHOWN:
            self.findings.append(f"{kind}: {what}")

    def counts(self) -> dict[str, int]:
        """How many of each kind, 0 included."""
        return {kind: self.wrong[kind] for kind in CHECKS}


def judge(client: Redis, expected: Reference, seen: Witness, acknowledged: Mapping[str, int]) -> Verdict:
    """Hold everything that was written against the reference. `acknowledged`: the arrival in ms, by event id."""
    verdict = Verdict()
    records = _judge_audit(client, verdict)
    for auction_id in expected.records.keys() | records.keys():
        _judge_records(auction_id, expected, records[auction_id], verdict)
    _judge_lane(client, expected, verdict)
    for auction_id, record in expected.auctions.items():
        _judge_timer(client, auction_id, record, verdict)
    _judge_intake(client, expected, acknowledged, verdict)
    _judge_answers(client, expected, verdict)
    for what in seen.foreign:
        verdict.find("foreign", what)
    for shard in range(SHARDS):
        last: Any = client.hget(ShardKeys.of(shard).cursor, "commit")
        witnessed = seen.accepted[shard][-1].commit_id.encode() if shard in seen.accepted else None
        if last != witnessed:
            verdict.find("foreign", f"shard {shard} ends with commit {last!r}, the witness saw {witnessed!r} last")
    return verdict


def _judge_audit(client: Redis, verdict: Verdict) -> defaultdict[str, list[Fields]]:
    """The chain of every shard, by SHA-256 of the standard library; the records by auction."""
    found: defaultdict[str, list[Fields]] = defaultdict(list)
    for shard in range(SHARDS):
        names = ShardKeys.of(shard)
        previous, length = GENESIS, 0
        for stream_id, record in _stream(client, names.audit):
            length += 1
            content = {name: value for name, value in record.items() if name != "hash"}
            text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if (record["seq"], record["prev_hash"], record["hash"]) != (str(length), previous, digest):
                verdict.find("chain", f"shard {shard}, record {length}: {record}")
            previous = digest
            found[record["auction_id"]].append(record)
            verdict.records += 1
            if record["event_type"] == Fact.ENDED:
                written_at = int(stream_id.partition("-")[0])
                verdict.lateness_ms.append(int(record["recorded_at"]) - int(record["occurred_at"]))
                if min(written_at, int(record["recorded_at"])) < int(record["occurred_at"]):
                    verdict.find("early", f"written at {written_at}: {record}")
            elif record["event_type"] == Fact.CANCELLED:
                verdict.cancelled += 1
        head: Any = client.hmget(names.cursor, ["seq", "hash"])
        if length and head != [str(length).encode(), previous.encode()]:
            verdict.find("chain", f"shard {shard} has {length} records, its head says {head}")
    return found


def _judge_records(auction_id: str, expected: Reference, records: list[Fields], verdict: Verdict) -> None:
    said = [_comparable(record) for record in records]
    wanted = expected.records[auction_id]
    if said != wanted:
        place = next((n for n, (one, other) in enumerate(zip(said, wanted, strict=False)) if one != other), -1)
        verdict.find(
            "records",
            f"{auction_id}: {len(said)} records instead of {len(wanted)}; first difference at {place}: "
            f"{said[place : place + 1]} instead of {wanted[place : place + 1]}",
        )
    closes = sum(record["event_type"] == Fact.ENDED for record in records)
    should = sum(record["event_type"] == Fact.ENDED for record in wanted)
    verdict.closed += closes
    if closes > 1:
        verdict.find("doubled", f"{auction_id} has {closes} closes in the audit")
    if closes < should:
        verdict.find("missing", f"{auction_id} was never closed")


def _judge_lane(client: Redis, expected: Reference, verdict: Verdict) -> None:
    announced: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for shard in range(SHARDS):
        for _, update in _stream(client, ShardKeys.of(shard).updates):
            announced[update["auction_id"]].append((update["type"], int(update["version"])))
    for auction_id in announced.keys() | expected.lane.keys():
        said, wanted = announced[auction_id], expected.lane[auction_id]
        if said != wanted:
            verdict.find("lane", f"{auction_id}: {said} instead of {wanted}")
        ends = [update_type for update_type, _ in said if update_type in frames.OVER]
        if len(ends) > 1:
            verdict.find("doubled", f"{auction_id} is over {len(ends)} times on the event lane")


def _judge_timer(client: Redis, auction_id: str, record: TimerRecord, verdict: Verdict) -> None:
    names = ShardKeys.of(shard_of(auction_id, SHARDS))
    kept: Any = client.hgetall(names.timer(auction_id))
    found = from_fields({name.decode(): value.decode() for name, value in kept.items()})
    wanted = None if record.auction.status is Status.UNREGISTERED else record
    if found != wanted:
        verdict.find("timers", f"{found} instead of {wanted}")
    scores: list[Any] = [client.zscore(name, auction_id) for name in (names.deadlines, names.paused, names.closed)]
    auction = record.auction
    should: list[int | None] = [None, None, None]
    if auction.status is Status.PAUSED:
        should[1] = auction.paused_at
    elif auction.status.is_terminal or auction.status is Status.TOMBSTONE:
        should[2] = auction.cancelled_at if auction.ended_at is None else auction.ended_at
    elif auction.status is not Status.UNREGISTERED:
        should[0] = auction.ends_at
    if scores != should:
        verdict.find("places", f"{auction_id} ({auction.status}): {scores} instead of {should}")


def _judge_intake(client: Redis, expected: Reference, acknowledged: Mapping[str, int], verdict: Verdict) -> None:
    arrivals: dict[str, int] = {}
    for shard in range(SHARDS):
        for _, entry in _stream(client, ShardKeys.of(shard).events):
            arrivals[entry["id"]] = int(entry["at"])
    for event_id, arrival in acknowledged.items():
        if expected.entered[event_id] != 1 or arrivals[event_id] != arrival:
            verdict.find("lost", f"{event_id} stands {expected.entered[event_id]} times in the intake")


def _judge_answers(client: Redis, expected: Reference, verdict: Verdict) -> None:
    for reply_to, asked in expected.asked.items():
        answered = Counter(fields["command_id"] for _, fields in _stream(client, replies(reply_to)))
        for command_id in {*asked, *answered}:
            if answered[command_id] != 1:
                verdict.find("answers", f"{command_id} was answered {answered[command_id]} times")
    parked: set[str] = set()
    for shard in range(SHARDS):
        held: Any = client.hkeys(ShardKeys.of(shard).troubleshooting)
        parked |= {name.decode() for name in held}
    for command_id in parked ^ expected.parked:
        verdict.find("parked", f"{command_id} {'waits' if command_id in parked else 'does not wait'}")
