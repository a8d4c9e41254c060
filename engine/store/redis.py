"""The Redis store: Redis 7.0's command set and no more, so Valkey and Debian's redis-server both serve."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from functools import partial
from math import floor
from typing import Any, Final, TypeVar

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError, ResponseError

from engine.clock import Clock
from engine.contract import keys
from engine.contract.audit import GENESIS, ChainHead
from engine.contract.cursors import START
from engine.contract.keys import ShardKeys
from engine.contract.members import member_of, name_of
from engine.contract.timers import FIELDS, CorruptTimerError, TimerRecord
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.store.limits import StoreLimits
from engine.store.link import Node, RedisLink, RedisRefusedError, heeding_cancellation
from engine.store.protocol import (
    OUTAGE_HOLD_MS,
    SCORE_MAX,
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
    StoreUnavailableError,
    Superseded,
    Unattended,
    Undrained,
    Unpark,
    UpdateEntry,
    View,
)
from engine.store.rows import Row, shown_in, standing_in, timer_in
from engine.store.scripts import APPEND, CLAIM, COMMIT, DELIVER, OBSERVE, RELEASE, RENEW, ROWS, VIEW, Script
from engine.store.topology import Streams

SCHEMA_VERSION: Final = "1"
PAGE_MAX: Final = 1_000
"""Auctions read in one round trip: large enough to hide it, small enough that no other client waits for long."""
WAITING_PAGE: Final = 100
_MISCONF: Final = "MISCONF"
_INSTANT_DIGITS_MAX: Final = len(str(EPOCH_MS_MAX))
"""Entries read at once to find one that may be waiting. Nearly always the first one decides."""
SILENCE_MAX_MS: Final = 3_000
"""A subscription that hears nothing for this long, not even the answer to its own ping, is dead."""
PING_EVERY_S: Final = 1.0
REPLICAS_ADVISED: Final = 2
_FEW_REPLICAS: Final = (
    "durability is 'replicated' and a primary has fewer than two replicas: after its failover none is left, and nothing is "
    "acknowledged until there is one again; give each primary two"
)
_WRONG_TYPE: Final = "WRONGTYPE"
_STREAM_ID: Final = re.compile(r"\d{1,20}-\d{1,20}")
_WHOLE: Final = re.compile(rb"-?\d{1,18}")
TICKS_HELD_MAX: Final = 1_000
"""Messages of the tick lanes of a Cluster that wait for their reader; then the nodes wait."""

T = TypeVar("T")


class RedisStore:
    """Implements `Intake`, `ShardStore`, `ViewStore` and `AuditStore` on Redis."""

    def __init__(self, link: RedisLink, clock: Clock, limits: StoreLimits | None = None) -> None:
        self.link = link
        self.limits = limits or StoreLimits()
        self._clock = clock
        self._names: dict[int, ShardKeys] = {}
        self._delivering: dict[int, asyncio.Lock] = {}

    def _keys(self, shard: int) -> ShardKeys:
        names = self._names.get(shard)
        if names is None:
            names = self._names[shard] = ShardKeys.of(shard)
        return names

    @property
    def connections(self) -> int:
        return self.link.connections

    async def _run(
        self, script: Script, names: Sequence[str], args: Sequence[str | bytes | int], *, told: bool = True
    ) -> Any:
        return await self.link.run(script, names, args, told=told)

    async def _read(self, *command: str | bytes | int, told: bool = True, blocking: bool = False) -> Any:
        """One command, whose first argument is the key that it is about.

        Raises:
            KeyDamagedError: that key is of another type.
        """
        try:
            return await self.link.ask(str(command[1]), *command, told=told, blocking=blocking)
        except RedisRefusedError as error:
            if _says(error, _WRONG_TYPE):
                raise KeyDamagedError(f"{command[1]!s} is of another type") from error
            raise

    async def _read_if(self, nothing: T, *command: str | bytes | int, told: bool = True, blocking: bool = False) -> T:
        """As `_read`; `nothing`, of a key that is of another type: then nothing of ours is there."""
        try:
            answer: T = await self._read(*command, told=told, blocking=blocking)
        except KeyDamagedError:
            return nothing
        return answer

    # The authority's clock.

    async def time_us(self) -> int:
        # In a Cluster every node has a clock: that of the node with shard 0 is the authority.
        return (await self.shard_clock(0)).now_us

    async def shard_clock(self, shard: int) -> ShardClock:
        cursor = self._keys(shard).cursor
        (seconds, micros), (offset, corrections) = await self._once(
            cursor, ("TIME",), ("HMGET", cursor, "offset", "corrections")
        )
        return ShardClock(int(seconds) * 1_000_000 + int(micros), _number(offset) or 0, _number(corrections) or 0)

    async def state_clock(self, name: str, body: bytes) -> None:
        await self._once(keys.CLOCKS, ("HSET", keys.CLOCKS, name, body))

    async def stated_clocks(self) -> dict[str, bytes]:
        (found,) = await self._once(keys.CLOCKS, ("HGETALL", keys.CLOCKS))
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        return {name.decode(errors="replace"): body for name, body in pairs}

    async def forget_clock(self, name: str) -> None:
        await self._once(keys.CLOCKS, ("HDEL", keys.CLOCKS, name))

    async def _once(self, name: str, *commands: tuple[str | bytes, ...]) -> list[Any]:
        """Commands about the key `name` in one step, never repeated: a late answer is a bad sample."""
        try:
            node = await self.link.node(name)
            async with node.commands.pipeline(transaction=True) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                return list(await heeding_cancellation(pipe.execute))
        except (RedisError, OSError) as error:
            self.link.heed(error)
            raise

    async def deployment(self, shards: int) -> None:
        await self._read("HSETNX", keys.META, "shards", str(shards))
        await self._read("HSETNX", keys.META, "schema", SCHEMA_VERSION)
        row = await self._read("HMGET", keys.META, "shards", "schema")
        stored_shards, stored_schema = (value.decode() for value in row)
        if stored_shards != str(shards):
            raise DeploymentMismatchError(
                f"this Redis holds a deployment with {stored_shards} shards, the settings say {shards}: "
                f"start with AUCTION_TIMER_SHARDS={stored_shards}, or use another Redis"
            )
        if stored_schema != SCHEMA_VERSION:
            raise DeploymentMismatchError(
                f"this Redis holds schema version {stored_schema}, this program writes {SCHEMA_VERSION}: "
                "use the program version that wrote it, or another Redis"
            )

    async def complaints(self) -> list[str]:
        """What is wrong with the server's own configuration, as sentences that say what to do."""
        found: dict[str, None] = {}
        try:
            nodes = await self.link.call(self.link.primaries)
            for node in nodes:
                found |= dict.fromkeys(_complaints(await self._config(node)))
                if self.link.is_replicated and await self._replicas(node) < REPLICAS_ADVISED:
                    found |= dict.fromkeys([_FEW_REPLICAS])
        except RedisRefusedError:
            return ["CONFIG GET is not allowed here: check by hand that maxmemory-policy is noeviction and AOF is on"]
        return list(found)

    async def _replicas(self, node: Node) -> int:
        role = await self.link.call(lambda: node.commands.execute_command("ROLE"))
        return len(role[2]) if role[0] in (b"master", "master") else 0

    async def _config(self, node: Node) -> dict[str, str]:
        asked = ("CONFIG", "GET", "maxmemory-policy", "appendonly")
        answer = await self.link.call(lambda: node.commands.execute_command(*asked))
        return _texts(answer)

    # The producers' side.

    async def append(
        self, shard: int, drafts: Sequence[Draft], est: EpochMs, command_id: str, *, urgent: bool = False
    ) -> list[Appended]:
        names = self._keys(shard)
        key_names = [names.events, names.cursor, names.parked, names.attendance]
        limits = self.limits
        args: list[str | bytes | int] = [
            est, limits.stamp_bound_ms, command_id, limits.seen_ms, limits.intake_max,
            limits.troubleshooting_max,
            limits.attendant, limits.outage_ms, limits.outage_extension_ms, int(urgent), len(drafts),
        ]  # fmt: skip
        for draft in drafts:
            # No event id has a space: beside the mark of another event of this id there is room for one per subject.
            seen_ids = (draft.event_id, f"event {draft.event_id} {draft.subject}", *draft.seen_ids)
            key_names.extend(names.seen_prefix + seen for seen in seen_ids)
            args += (draft.event_id, draft.subject, len(seen_ids), draft.body)
        answer = await self._run(APPEND, key_names, args)
        if answer[0] == b"DAMAGED":
            raise _damaged(answer[1])
        if answer[0] == b"FULL":
            raise IntakeFullError(f"the intake of shard {shard} holds {int(answer[1])} entries, its bound")
        if answer[0] == b"TROUBLED":
            raise IntakeFullError(
                f"shard {shard} has {int(answer[1])} commands in troubleshooting, its bound: see `ops troubleshooting list`"
            )
        return [
            Appended(draft.event_id, answer[2 * i + 2] == b"accepted", EpochMs(int(answer[2 * i + 3])))
            for i, draft in enumerate(drafts)
        ]

    # The lease.

    async def claim(self, shard: int, holder: str, seen: Lease | None) -> Lease:
        args = (holder, seen.epoch, seen.beat) if seen else (holder, -1, -1)
        now_holder, epoch, beat = await self._run(CLAIM, [self._keys(shard).lease], args)
        return Lease(now_holder.decode(errors="replace"), int(epoch), int(beat))

    async def renew(self, shard: int, holder: str, epoch: int) -> bool:
        # What keeps a lease or is a sign of life promises nothing to anybody, so it waits for no replica.
        return bool(await self._run(RENEW, [self._keys(shard).lease], [holder, epoch], told=False))

    async def release(self, shard: int, holder: str, epoch: int) -> None:
        await self._run(RELEASE, [self._keys(shard).lease], [holder, epoch], told=False)

    async def beat_member(self, name: str) -> Mapping[str, int]:
        try:
            await self._read("HINCRBY", keys.ENGINES, name, 1, told=False)
        except KeyDamagedError:
            # Whoever is there beats within a heartbeat.
            await self._read("DEL", keys.ENGINES, told=False)
        except RedisRefusedError as error:
            if not _says(error, "hash value is not an integer", "increment or decrement would overflow"):
                raise
            await self._read("HDEL", keys.ENGINES, name, told=False)
        nothing: Any = []
        answer = await self._read_if(nothing, "HGETALL", keys.ENGINES, told=False)
        pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
        return {_text(member): _number(count) or 0 for member, count in pairs}

    async def forget_member(self, name: str) -> None:
        await self._read("HDEL", keys.ENGINES, name, told=False)

    # The fold.

    async def head(self, shard: int) -> ShardHead:
        cursor = self._keys(shard).cursor
        intake, seq, chain_hash, last_at = await self._read("HMGET", cursor, "intake", "seq", "hash", "last_at")
        place = START if intake is None else intake.decode(errors="replace")
        if not _STREAM_ID.fullmatch(place):
            raise KeyDamagedError(f"{cursor} names no place in the intake: {place[:100]!r}")
        return ShardHead(place, _chain(cursor, seq, chain_hash), EpochMs(_number(last_at) or 0))

    async def live(self, shard: int) -> AsyncIterator[list[TimerRecord | CorruptTimerError]]:
        names = self._keys(shard)
        for placed in (names.deadlines, names.paused):
            start = 0
            while members := await self._members(placed, start):
                if isinstance(members, CorruptTimerError):
                    yield [members]
                    break
                start += len(members)
                ids = [name for name in map(name_of, members) if name is not None]
                found: list[TimerRecord | CorruptTimerError | None] = [
                    CorruptTimerError(f"{placed}: {member[:100]!r} is no auction id")
                    for member in members
                    if name_of(member) is None
                ]
                yield [timer for timer in found + await self.timers(shard, ids) if timer is not None]

    async def _members(self, placed: str, start: int) -> list[bytes] | CorruptTimerError:
        try:
            members: list[bytes] = await self._read("ZRANGE", placed, start, start + PAGE_MAX - 1)
        except KeyDamagedError as error:
            return CorruptTimerError(str(error))
        return members

    async def timers(self, shard: int, auction_ids: Sequence[str]) -> list[TimerRecord | CorruptTimerError | None]:
        prefix = self._keys(shard).timer_prefix
        found: list[TimerRecord | CorruptTimerError | None] = []
        for start in range(0, len(auction_ids), PAGE_MAX):
            page = auction_ids[start : start + PAGE_MAX]
            rows = await self._run(ROWS, [prefix + auction_id for auction_id in page], FIELDS)
            found.extend(timer_in(auction_id, _row(row)) for auction_id, row in zip(page, rows, strict=True))
        return found

    async def offers(self, shard: int, offer_ids: Sequence[str]) -> list[str | None]:
        prefix = self._keys(shard).offer_prefix
        row = await self._read("MGET", *(prefix + offer_id for offer_id in offer_ids))
        return [None if value is None else value.decode(errors="replace") for value in row]

    async def read_intake(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[Entry]]:
        answer = await self._xread(
            [(self._keys(shard).events, shard, since) for shard, since in after.items()], count, block_ms
        )
        return {shard: [_entry(stream_id, values) for stream_id, values in rows] for shard, rows in answer.items()}

    async def _xread(
        self, streams: Sequence[tuple[str, int, str]], count: int, block_ms: int
    ) -> dict[int, list[tuple[bytes, list[bytes]]]]:
        names, shards, since = zip(*streams, strict=True)
        answer = await self._streams(names, since, count, block_ms)
        shard_of = dict(zip(names, shards, strict=True))
        return {shard_of[name]: rows for name, rows in answer.items()}

    async def _streams(
        self,
        names: Sequence[str],
        since: Sequence[str],
        count: int,
        block_ms: int,
        never_alone: Collection[str] = (),
    ) -> Streams:
        """As `RedisLink.read_streams`, without those that are none: one that was written over does not keep the others."""
        try:
            return await self.link.read_streams(names, since, count, block_ms, never_alone=never_alone)
        except RedisRefusedError as error:
            if not _says(error, _WRONG_TYPE):
                raise
        kinds = [await self._read("TYPE", name, told=False) for name in names]
        sound = [index for index, kind in enumerate(kinds) if _text(kind) in ("stream", "none")]
        if not sound:
            await asyncio.sleep(block_ms / 1_000)
            return {}
        kept, places = [names[index] for index in sound], [since[index] for index in sound]
        return await self._streams(kept, places, count, block_ms, never_alone)

    async def commit(self, batch: Batch) -> CommitResult:
        names, args = self._spell(batch)
        answer = await self._run(COMMIT, names, args)
        match answer[0]:
            case b"OK":
                if self._keys(batch.shard).outbox in names:
                    self.link.begin(self._deliver_soon(batch.shard))
                begun_anew = dict.fromkeys(name.decode(errors="replace") for name in answer[2:])
                return Committed(EpochMs(int(answer[1])), tuple(begun_anew))
            case b"DAMAGED":
                raise _damaged(answer[1])
            case b"FENCED":
                return Fenced(_number(answer[1]) or 0)
            case b"SUPERSEDED":
                return _superseded(batch, answer[1:])
            case b"EARLY":
                return Early(int(answer[1]))
            case b"UNDRAINED":
                return Undrained()
            case b"UNATTENDED":
                return Unattended(EpochMs(int(answer[1])))
            case other:
                raise AssertionError(f"commit.lua answered {other!r}")

    def _spell(self, batch: Batch) -> tuple[list[str], list[str | bytes | int]]:
        """A batch as KEYS and ARGV of commit.lua."""
        names = self._keys(batch.shard)
        key_names = [
            names.lease, names.cursor, names.events, names.deadlines, names.paused, names.closed,
            names.audit, names.updates, names.troubleshooting, names.parked, names.attendance,
        ]  # fmt: skip
        index: dict[str, int] = {}

        def key(name: str) -> int:
            at = index.get(name)
            if at is None:
                key_names.append(name)
                at = index[name] = len(key_names)
            return at

        limits = self.limits
        args: list[str | bytes | int] = [
            f"{batch.epoch} {batch.holder}", batch.commit_id, batch.est, limits.stamp_bound_ms,
            batch.after.intake, f"{batch.after.chain.seq} {batch.after.chain.hash}", batch.due_at or 0,
            batch.intake, batch.chain.seq, batch.chain.hash,
            limits.closed_retention_ms, limits.updates_max, limits.replies_max, limits.seen_ms,
            (batch.closes_at or 0) if limits.outage_extension_ms else 0, limits.outage_ms, OUTAGE_HOLD_MS,
            len(batch.versions),
        ]  # fmt: skip
        for auction_id, version in batch.versions.items():
            args += (key(names.timer_prefix + auction_id), version)
        # Records come first: if the audit log takes none, nothing else may have been written.
        for operation in sorted(batch.operations, key=lambda operation: not isinstance(operation, Record)):
            _spell_operation(operation, names, key, args, in_one_slot=self.link.is_cluster)
        return key_names, args

    async def parked(self, shard: int) -> int:
        return int(await self._read_if(0, "ZCARD", self._keys(shard).parked))

    async def parked_commands(self, shard: int, command_ids: Sequence[str]) -> list[bytes | None]:
        nothing: list[bytes | None] = [None] * len(command_ids)
        return list(await self._read_if(nothing, "HMGET", self._keys(shard).troubleshooting, *command_ids))

    async def outcome(self, shard: int, command_id: str) -> bytes | None:
        name = self._keys(shard).command_prefix + command_id
        return await self._read_if(None, "GET", name)

    async def is_applied(self, shard: int, event_id: str) -> bool | None:
        names = self._keys(shard)
        mark = await self._read_if(b"", "GET", names.seen_prefix + event_id)
        at = _number((mark or b"").partition(b" ")[0])
        if at is None:
            return None
        after = (await self.head(shard)).intake
        # Arrivals never go back along the stream: the first one behind the cursor decides, unless it is the very same.
        while rows := await self._read("XRANGE", names.events, f"({after}", "+", "COUNT", WAITING_PAGE):
            for _, fields in rows:
                stamp = fields.get(b"at", b"")
                arrival = int(stamp) if _is_instant(stamp) else at
                if arrival > at:
                    return True
                if arrival < at or fields.get(b"id") == event_id.encode():
                    return False
            after = rows[-1][0].decode()
        return True

    async def intake_length(self, shard: int) -> int:
        return int(await self._read("XLEN", self._keys(shard).events))

    async def trim_intake(self, shard: int, before: str) -> None:
        await self._read("XTRIM", self._keys(shard).events, "MINID", "~", before)

    async def forget_closed(self, shard: int, before: EpochMs) -> None:
        await self._read_if(0, "ZREMRANGEBYSCORE", self._keys(shard).closed, "-inf", f"({before}")

    async def publish(self, lines: Mapping[int, bytes]) -> None:
        try:
            await self.link.publish({self._keys(shard).ticks: payload for shard, payload in lines.items()})
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"ticks were not sent: {error}") from error

    # The audit.

    async def audit_entries(self, shard: int, after: str, count: int) -> list[AuditEntry]:
        answer = await self._read("XRANGE", self._keys(shard).audit, f"({after}", "+", "COUNT", count)
        return [AuditEntry(stream_id.decode(), _record(fields)) for stream_id, fields in answer]

    async def audit_length(self, shard: int) -> int:
        return int(await self._read("XLEN", self._keys(shard).audit))

    async def trim_audit(self, shard: int, before: str) -> None:
        await self._read("XTRIM", self._keys(shard).audit, "MINID", "=", before)

    # The reconciler's side.

    async def observe(self, shard: int, auction_ids: Sequence[str]) -> Observed:
        names = self._keys(shard)
        key_names = [names.cursor, names.deadlines, names.paused, names.closed, *map(names.timer, auction_ids)]
        args: list[str | bytes | int] = [len(FIELDS), *FIELDS, *map(member_of, auction_ids)]
        try:
            seq, chain_hash, at, *rows = await self._run(OBSERVE, key_names, args)
        except RedisRefusedError as error:
            if _says(error, _WRONG_TYPE):
                raise KeyDamagedError(f"{names.cursor} is of another type") from error
            raise
        groups = (Group.LIVE, Group.PAUSED, Group.CLOSED)
        standings = {
            auction_id: standing_in(
                auction_id,
                _row(row[3:]),
                {group: _score(score) for group, score in zip(groups, row[:3], strict=True) if score is not None},
            )
            for auction_id, row in zip(auction_ids, rows, strict=True)
        }
        return Observed(_chain(names.cursor, seq, chain_hash or None), EpochMs(_number(at) or 0), standings)

    async def record_reconciliation(self, fields: Mapping[str, str]) -> None:
        pairs = [text for pair in fields.items() for text in pair]
        entry: tuple[str | int, ...] = (
            "XADD",
            keys.RECONCILIATIONS,
            "MAXLEN",
            "~",
            self.limits.reconciliations_max,
            "*",
            *pairs,
        )
        try:
            await self._read(*entry)
        except KeyDamagedError:
            await self._read("DEL", keys.RECONCILIATIONS)
            await self._read(*entry)

    # The gateway's side.

    async def view(self, shard: int, auction_id: str) -> View:
        names = self._keys(shard)
        answer = await self._run(VIEW, [names.timer(auction_id), names.updates], FIELDS)
        return View(shown_in(auction_id, _row(answer[1:])), answer[0].decode())

    async def page(self, shard: int, group: Group, after: Placed | None, count: int) -> list[Placed]:
        names = self._keys(shard)
        latest_first = group is Group.CLOSED
        name = {
            Group.LIVE: names.deadlines,
            Group.PAUSED: names.paused,
            Group.CLOSED: names.closed,
            Group.PARKED: names.parked,
        }[group]
        first, last, order = ("+inf", "-inf", ("REV",)) if latest_first else ("-inf", "+inf", ())
        # A score that is no whole number was rounded down.
        if after and latest_first and after.score < SCORE_MAX:
            first = f"({after.score + 1}"
        elif after and not latest_first and after.score > -SCORE_MAX:
            first = str(after.score)
        found: list[Placed] = []
        offset, edge, odd = 0, None, set()
        # Equal scores are ordered by id: what stands before `after` among them was on an earlier page. Where a hand has put
        # something among them they are not, and are read to the last.
        while len(found) < count or edge in odd:
            row = _scored(
                await self._read_if(
                    [], "ZRANGE", name, first, last, "BYSCORE", *order, "LIMIT", offset, count, "WITHSCORES"
                )
            )
            for member, score in row:
                at, edge = _placed(group, member, score), _score(score)
                if at is None or at.auction_id.startswith("%") or float(score) != edge:
                    odd.add(edge)
                if at is not None and (after is None or _behind(at, after, latest_first)):
                    found.append(at)
            offset += len(row)
            if len(row) < count:
                break
        found.sort(key=lambda at: (at.score, at.auction_id), reverse=latest_first)
        return found[:count]

    async def last_update(self, shard: int) -> str:
        last = await self.recent_updates(shard, 1)
        return last[0].stream_id if last else START

    async def holds_update(self, shard: int, entry: UpdateEntry) -> bool:
        at = entry.stream_id
        # Asked where the lane is read.
        updates = self._keys(shard).updates
        rows: list[Any] = await self._read_if([], "XREVRANGE", updates, at, at, blocking=True, told=False)
        return [update_entry(stream_id, values) for stream_id, values in rows] == [entry]

    async def recent_updates(self, shard: int, count: int, upto: str | None = None) -> list[UpdateEntry]:
        updates = self._keys(shard).updates
        answer: list[Any] = await self._read_if([], "XREVRANGE", updates, upto or "+", "-", "COUNT", count)
        return [update_entry(stream_id, values) for stream_id, values in reversed(answer)]

    async def lease(self, shard: int) -> Lease:
        """The lease of a shard, as it stands."""
        nothing: list[bytes | None] = [None, None, None]
        row = await self._read_if(nothing, "HMGET", self._keys(shard).lease, "holder", "epoch", "beat")
        holder, epoch, beat = row
        return Lease((holder or b"").decode(errors="replace"), _number(epoch) or 0, _number(beat) or 0)

    async def read_updates(self, after: Mapping[int, str], count: int, block_ms: int) -> dict[int, list[UpdateEntry]]:
        streams = [(self._keys(shard).updates, shard, since) for shard, since in after.items()]
        answer = await self._xread(streams, count, block_ms)
        return {
            shard: [update_entry(stream_id, values) for stream_id, values in rows] for shard, rows in answer.items()
        }

    async def follow(self, updates: Mapping[int, str], replies: Mapping[str, str], count: int, block_ms: int) -> News:
        lanes = {self._keys(shard).updates: shard for shard in updates}
        askers = {keys.replies(reply_to): reply_to for reply_to in replies}
        names, since = [*lanes, *askers], [*updates.values(), *replies.values()]
        answer = await self._streams(names, since, count, block_ms, never_alone=askers)
        news = News({}, {})
        for name, rows in answer.items():
            if name in lanes:
                news.updates[lanes[name]] = [update_entry(stream_id, values) for stream_id, values in rows]
            else:
                news.replies[askers[name]] = [_reply(stream_id, values) for stream_id, values in rows]
        return news

    async def deliver_replies(self, shard: int) -> None:
        if not self.link.is_cluster:
            return
        outbox = self._keys(shard).outbox
        # One after another: whoever asked twice is answered in order.
        async with self._delivering.setdefault(shard, asyncio.Lock()):
            nothing: list[tuple[bytes, dict[bytes, bytes]]] = []
            while rows := await self._read_if(nothing, "XRANGE", outbox, "-", "+", "COUNT", PAGE_MAX):
                for stream_id, fields in rows:
                    await self._deliver(shard, stream_id, fields)
                    await self._read("XDEL", outbox, stream_id, told=False)

    async def _deliver(self, shard: int, stream_id: bytes, fields: Mapping[bytes, bytes]) -> None:
        try:
            stream = keys.replies(fields[b"reply_to"].decode())
            command_id = fields[b"command_id"].decode()
            fields[b"outcome"], fields[b"body"]
        except (KeyError, UnicodeDecodeError):
            return  # no commit has written it
        args = (
            stream_id,
            fields[b"outcome"],
            command_id,
            fields[b"body"],
            self.limits.replies_max,
            self.limits.seen_ms,
        )
        await self._run(DELIVER, [stream, keys.delivered(stream, shard, command_id)], args)

    async def _deliver_soon(self, shard: int) -> None:
        # What fails now is tried again by whoever owns the shard.
        with contextlib.suppress(StoreUnavailableError, RedisRefusedError):
            await self.deliver_replies(shard)

    async def ticks(self, shards: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        listeners = await self._listeners(shards)
        if len(listeners) == 1:
            async with contextlib.aclosing(listeners[0]) as lane:
                async for line in lane:
                    yield line
            return
        heard: asyncio.Queue[tuple[int, bytes] | StoreUnavailableError] = asyncio.Queue(TICKS_HELD_MAX)

        async def pump(listener: AsyncGenerator[tuple[int, bytes]]) -> None:
            try:
                async with contextlib.aclosing(listener) as lane:
                    async for line in lane:
                        await heard.put(line)
            except StoreUnavailableError as error:
                await heard.put(error)

        pumps = [asyncio.ensure_future(pump(listener)) for listener in listeners]
        try:
            while True:
                found = await heard.get()
                if isinstance(found, StoreUnavailableError):
                    raise found
                yield found
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _listeners(self, shards: Sequence[int]) -> list[AsyncGenerator[tuple[int, bytes]]]:
        """A subscription per server: all shards on one, or those of each node of a Cluster."""
        mine: dict[int, tuple[Node, dict[bytes, int]]] = {}
        try:
            for shard in shards:
                channel = self._keys(shard).ticks
                node = await self.link.node(channel)
                mine.setdefault(id(node), (node, {}))[1][channel.encode()] = shard
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"the tick lane was lost: {error}") from error
        return [self._listen(node, channels) for node, channels in mine.values()]

    async def _listen(self, node: Node, channels: Mapping[bytes, int]) -> AsyncGenerator[tuple[int, bytes]]:
        subscription = node.subscriber.pubsub()
        try:
            if self.link.is_cluster:
                for channel in channels:  # one command may name the channels of one slot only
                    await heeding_cancellation(partial(subscription.ssubscribe, channel))
            else:
                await heeding_cancellation(lambda: subscription.subscribe(*channels))
            heard = asked = self._clock.monotonic_ns()
            while True:
                message = await heeding_cancellation(partial(_heard, subscription))
                now = self._clock.monotonic_ns()
                if message is not None:
                    heard = now
                    if message["type"] in ("message", "smessage"):
                        yield channels[message["channel"]], message["data"]
                    elif message["type"] == "sunsubscribe":
                        raise StoreUnavailableError("the tick lane has moved to another node")
                elif now - heard > SILENCE_MAX_MS * 1_000_000:
                    self.link.heed(ConnectionError("silent"))
                    raise StoreUnavailableError(f"the tick lane was silent for {SILENCE_MAX_MS} ms")
                # Redis never tells a subscriber that it is gone: only the answer to a ping proves that it is there.
                if now - asked >= PING_EVERY_S * 1e9:
                    asked = now
                    await heeding_cancellation(subscription.ping)
        except (RedisError, OSError) as error:
            self.link.heed(error)
            raise StoreUnavailableError(f"the tick lane was lost: {error}") from error
        finally:
            await subscription.aclose()


async def _heard(subscription: PubSub) -> dict[str, Any] | None:
    """The next message; None if none came. With a full disk Redis refuses even pings, and is alive."""
    try:
        message: dict[str, Any] | None = await subscription.get_message(timeout=PING_EVERY_S)
    except ResponseError as error:
        if not str(error).startswith(_MISCONF):
            raise
        return {"type": "pong", "channel": b"", "data": b""}
    return message


def _complaints(config: Mapping[str, str]) -> list[str]:
    found = []
    if config.get("maxmemory-policy", "noeviction") != "noeviction":
        found.append(f"maxmemory-policy is {config['maxmemory-policy']}: Redis may evict timers; set it to noeviction")
    if config.get("appendonly", "yes") != "yes":
        found.append("appendonly is off: a restart of Redis loses every auction; set appendonly yes")
    return found


def _texts(answer: Any) -> dict[str, str]:
    """Names and values of a map, whether redis-py has paired and decoded them or not."""
    pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _superseded(batch: Batch, answer: Sequence[Any]) -> Superseded:
    what = answer[0].decode()
    if len(answer) == 1:
        return Superseded(what)
    auction_id = list(batch.versions)[int(answer[1]) - 1]
    return Superseded(what, auction_id, int(answer[2]) if _is_instant(answer[2]) else None)


def _says(error: RedisRefusedError, *beginnings: str) -> bool:
    """Whether Redis refused with an error that begins so. A pipeline puts the command before what Redis said."""
    said = str(error.__cause__).rpartition(" of pipeline caused error: (")[2].lstrip("'\"")
    return said.removeprefix("ERR ").startswith(beginnings)


def _damaged(name: bytes) -> KeyDamagedError:
    return KeyDamagedError(f"{name.decode(errors='replace')} is of another type")


def _number(value: bytes | None) -> int | None:
    """A whole number that one of ours has written; None if it is none."""
    return int(value) if value is not None and _WHOLE.fullmatch(value) else None


def _chain(cursor: str, seq: bytes | None, chain_hash: bytes | None) -> ChainHead:
    number = 0 if seq is None else _number(seq)
    if number is None:
        raise KeyDamagedError(f"{cursor} names no audit record")
    return ChainHead(number, GENESIS if chain_hash is None else chain_hash.decode(errors="replace"))


def _row(values: Sequence[bytes | None]) -> Row:
    # Of a key of another type the scripts give one value: what Redis says of it.
    return values if len(values) == len(FIELDS) else None


def _score(text: bytes) -> int:
    """A score as a whole number: rounded down, and what is no instant at an end of the scale."""
    return floor(max(-SCORE_MAX, min(SCORE_MAX, float(text))))


def _placed(group: Group, member: bytes, score: bytes) -> Placed | None:
    name = member.decode(errors="replace") if group is Group.PARKED else name_of(member)
    return None if name is None else Placed(_score(score), name)


def _entry(stream_id: bytes, values: list[bytes]) -> Entry:
    if values[::2] == [b"at", b"id", b"body"] and _is_instant(values[1]):
        return Entry(stream_id.decode(), EpochMs(int(values[1])), values[3].decode(errors="replace"), values[5])
    if _is_retried(values):
        at, event_id, body, attempts, first_seen_at = values[1::2]
        name = event_id.decode(errors="replace")
        return Entry(stream_id.decode(), EpochMs(int(at)), name, body, int(attempts), EpochMs(int(first_seen_at)))
    return Entry(stream_id.decode(), None, "", b" ".join(values))


def _is_retried(values: list[bytes]) -> bool:
    return values[::2] == [b"at", b"id", b"body", b"attempts", b"first_seen_at"] and all(
        _is_instant(values[index]) for index in (1, 7, 9)
    )


def _is_instant(value: bytes) -> bool:
    # The length first: whoever can write to the intake must not be able to stop its reader with a number.
    return len(value) <= _INSTANT_DIGITS_MAX and value.isdigit() and int(value) <= EPOCH_MS_MAX


def update_entry(stream_id: bytes, values: list[bytes]) -> UpdateEntry:
    # Nothing that somebody else has put there may end the reading.
    fields = dict(zip(values[::2], values[1::2], strict=True))
    version = fields.get(b"version", b"0")
    return UpdateEntry(
        stream_id.decode(),
        fields.get(b"type", b"").decode(errors="replace"),
        fields.get(b"auction_id", b"").decode(errors="replace"),
        int(version) if version.isdigit() else 0,
        fields.get(b"body", b"{}"),
    )


def _reply(stream_id: bytes, values: list[bytes]) -> ReplyEntry:
    fields = dict(zip(values[::2], values[1::2], strict=True))
    command_id = fields.get(b"command_id", b"").decode(errors="replace")
    return ReplyEntry(stream_id.decode(), command_id, fields.get(b"body", b"{}"))


def _record(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """An audit record. Bytes that are no UTF-8 stay what they are, so that a hash over them still tells."""
    try:
        return {name.decode(): value.decode() for name, value in fields.items()}  # 2.6 us, with a handler named 4.0
    except UnicodeDecodeError:
        return {
            name.decode(errors="surrogateescape"): value.decode(errors="surrogateescape")
            for name, value in fields.items()
        }


def _scored(row: list[Any]) -> list[tuple[bytes, bytes]]:
    """Members with their scores, whether redis-py has paired them or not."""
    if row and isinstance(row[0], tuple | list):
        return [(name, score) for name, score in row]
    return list(zip(row[::2], row[1::2], strict=True))


def _behind(at: Placed, after: Placed, latest_first: bool) -> bool:
    here, there = (at.score, at.auction_id), (after.score, after.auction_id)
    return here < there if latest_first else here > there


def _spell_operation(
    operation: Operation, names: ShardKeys, key: Any, args: list[str | bytes | int], *, in_one_slot: bool
) -> None:
    match operation:
        case Record(fields):
            args += ("A", 2 * len(fields))
            for pair in fields.items():
                args += pair
        case Announce(update_type, auction_id, version, body):
            args += ("U", 4, update_type, auction_id, version, body)
        case PutTimer(auction_id, fields):
            args += ("T", 1 + 2 * len(fields), key(names.timer_prefix + auction_id))
            for pair in fields.items():
                args += pair
        case PlaceLive(auction_id, ends_at):
            args += ("L", 2, auction_id, ends_at)
        case PlacePaused(auction_id, paused_at):
            args += ("P", 2, auction_id, paused_at)
        case PlaceClosed(auction_id, closed_at):
            args += ("C", 3, auction_id, closed_at, key(names.timer_prefix + auction_id))
        case Displace(auction_id):
            args += ("Z", 1, auction_id)
        case BindOffer(offer_id, value, forget):
            args += ("O", 3, key(names.offer_prefix + offer_id), value, int(forget))
        case Reply() | KeepOutcome() | Park() | Unpark() | Requeue() | SetOffset():
            _spell_command(operation, names, key, args, in_one_slot=in_one_slot)


def _spell_command(
    operation: Reply | KeepOutcome | Park | Unpark | Requeue | SetOffset,
    names: ShardKeys,
    key: Any,
    args: list[str | bytes | int],
    *,
    in_one_slot: bool,
) -> None:
    match operation:
        case Reply(reply_to, outcome, command_id, body):
            stream = keys.replies(reply_to)
            if in_one_slot and keys.hash_tag(stream) != keys.hash_tag(names.events):
                # The commit may not leave its slot: whoever owns the shard delivers it (`deliver_replies`).
                args += ("D", 5, key(names.outbox), reply_to, outcome, command_id, body)
            else:
                args += ("R", 4, key(stream), outcome, command_id, body)
        case KeepOutcome(command_id, body):
            args += ("K", 2, key(names.command_prefix + command_id), body)
        case Park(command_id, first_seen_at, body, otherwise):
            args += ("Q", 4, command_id, first_seen_at, body, otherwise or "")
        case Unpark(command_id):
            args += ("X", 1, command_id)
        case Requeue(event_id, body, attempts, first_seen_at):
            args += ("E", 4, event_id, body, attempts, first_seen_at)
        case SetOffset(offset_ms):
            args += ("S", 1, offset_ms)
