"""The archiver moves audit records from the streams into the archive: read, check, insert, and only then trim.

It keeps nothing that it could lose. Started anew, it reads each stream from its beginning (which is short, because it is
trimmed) and inserts again what the archive has already, to no effect. So it may be killed between any two steps, and two of
them may run at once.

    stream  98 99 100 101 102      archive 1..100      insert 98..102: two are new      trim before 101 (retained: 2)

The chain is checked on the way. A record that breaks it is archived as it is: the archive keeps the evidence, and says so.
A record whose number the archive has given to another one is *refused*: both stay where they are, and from there on the
stream is not trimmed, until a person has looked.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

import structlog

from engine.contract.audit import ChainHead
from engine.contract.cursors import START, stream_order
from engine.store.archive import PAGE, ArchiveUnavailableError, AuditArchive, misfit, seq_of
from engine.store.protocol import AuditEntry, AuditStore, StoreUnavailableError
from reconciler.metrics import ReconcilerMetrics

POLL_S: Final = 1.0
"""At rest, how old a record may grow before it is archived."""
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
REASONS_MAX: Final = 100
REFUSALS_LOGGED_MAX: Final = 20
"""Per shard: after a failover there may be thousands, and `audit verify` finds each."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Place:
    """How far the stream of a shard was read and archived."""

    retained: deque[str]
    """The ids of the last records read, at most as many as the stream keeps."""
    after: str = START
    chain: ChainHead | None = None
    """The last record read; None before the first."""
    head_seq: int = 0
    """The number of the chain's head in Redis, when it was last asked."""
    refused: int = 0
    first_refused: str | None = None


class Archiver:
    """Moves the audit records of every shard.

    Args:
        retained: records per shard that stay in the stream although they are archived; the last one always does.
    """

    def __init__(
        self, store: AuditStore, archive: AuditArchive, metrics: ReconcilerMetrics, *, shards: int, retained: int
    ) -> None:
        self._store = store
        self._archive = archive
        self._metrics = metrics
        self._retained = max(1, retained)
        self._places = {shard: self._beginning() for shard in range(shards)}
        self._lags = dict.fromkeys(range(shards), 0)
        # Why a stream was read anew: each reason counts once, or a lasting one would be read for ever.
        self._reasons: dict[int, deque[str]] = {shard: deque(maxlen=REASONS_MAX) for shard in range(shards)}
        self._created = False

    def _beginning(self) -> _Place:
        return _Place(deque(maxlen=self._retained))

    async def run(self) -> None:
        """Archive until cancelled. Redis or the database may be away: it tries again, and says so once."""
        missing: type[Exception] | None = None
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                busy = await self.archive_once()
            except (StoreUnavailableError, ArchiveUnavailableError) as error:
                if missing is not type(error):
                    missing = type(error)
                    log.warning("archiver_waiting", error=str(error))
                await asyncio.sleep(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
                continue
            if missing is not None:
                log.info("archiver_resumed")
            missing, backoff_s = None, BACKOFF_FIRST_S
            if not busy:
                await asyncio.sleep(POLL_S)

    async def archive_once(self) -> bool:
        """Move at most a page of every shard; whether there is more.

        Raises:
            StoreUnavailableError: Redis does not answer.
            ArchiveUnavailableError: the database does not.
        """
        for shard in self._places:
            await self._measure(shard)
        if not self._created:
            await self._archive.create()
            self._created = True
        busy = [await self._move(shard) for shard in self._places]
        return any(busy)

    async def _measure(self, shard: int) -> None:
        """Count what waits, and notice a Redis that has lost what was archived."""
        chain = (await self._store.head(shard)).chain
        place = self._places[shard]
        if chain.seq < place.head_seq:
            place = self._read_anew(shard, f"the head of the chain went back from {place.head_seq} to {chain.seq}")
        elif place.chain is not None and chain.seq == place.chain.seq and chain.hash != place.chain.hash:
            place = self._read_anew(
                shard, f"the head of the chain is another record {chain.seq} than the last one read"
            )
        place.head_seq = chain.seq
        behind = chain.seq - (place.chain.seq if place.chain is not None else 0)
        # Before the first page it is not known what the archive has: at most, nothing of what the stream holds.
        self._lags[shard] = min(max(0, behind), await self._store.audit_length(shard))
        self._metrics.archive_lag.set(sum(self._lags.values()))
        self._metrics.archive_refused.set(sum(place.refused for place in self._places.values()))

    def _read_anew(self, shard: int, reason: str) -> _Place:
        """Begin at the beginning of a stream: one that lost its end may have written on with ids that are behind us."""
        if reason not in self._reasons[shard]:
            self._reasons[shard].append(reason)
            log.warning("audit_stream_read_anew", shard=shard, reason=reason)
            self._places[shard] = self._beginning()
        return self._places[shard]

    async def _move(self, shard: int) -> bool:
        place = self._places[shard]
        entries = await self._store.audit_entries(shard, place.after, PAGE)
        if place.chain is not None:
            reason = None
            if entries and (clause := misfit(entries[0].fields, place.chain)):
                reason = f"the record behind {place.after} does not follow: {clause}"
            elif not entries and place.head_seq > place.chain.seq:
                reason = f"nothing is behind {place.after}, and the head of the chain is {place.head_seq}"
            if reason is not None and self._read_anew(shard, reason) is not place:
                return True
        if not entries:
            return False
        chain = place.chain or await self._chain_before(shard, entries[0])
        refused = await self._archive.append(shard, entries)
        place.chain = _checked(shard, chain, entries)
        place.after = entries[-1].stream_id
        place.retained.extend(entry.stream_id for entry in entries)
        self._refuse(shard, place, refused)
        await self._trim(shard, place)
        await self._measure(shard)
        return len(entries) == PAGE

    async def _chain_before(self, shard: int, entry: AuditEntry) -> ChainHead:
        """What the archive has before the first record of a stream."""
        seq = seq_of(entry.fields) or 1
        held = (await self._archive.at(shard, [seq - 1])).get(seq - 1)
        if held is not None:
            return ChainHead(seq - 1, held.fields.get("hash", ""))
        if seq > 1:
            log.error("audit_records_missing", shard=shard, seq=seq - 1)
        return ChainHead()

    def _refuse(self, shard: int, place: _Place, refused: list[AuditEntry]) -> None:
        for entry in refused:
            place.first_refused = min(place.first_refused or entry.stream_id, entry.stream_id, key=stream_order)
            place.refused += 1
            if place.refused <= REFUSALS_LOGGED_MAX:
                log.error(
                    "audit_record_refused",
                    shard=shard,
                    seq=entry.fields.get("seq"),
                    stream_id=entry.stream_id,
                    auction_id=entry.fields.get("auction_id"),
                    remedy="the archive holds another record of this number: run `auction-timer audit verify`",
                )

    async def _trim(self, shard: int, place: _Place) -> None:
        if len(place.retained) < self._retained:
            return
        before = place.retained[0]
        if place.first_refused is not None:
            before = min(before, place.first_refused, key=stream_order)
        await self._store.trim_audit(shard, before)


def _checked(shard: int, chain: ChainHead, entries: list[AuditEntry]) -> ChainHead:
    """Check records behind `chain`, and log each that does not follow; the last of them."""
    for entry in entries:
        fields = entry.fields
        if reason := misfit(fields, chain):
            log.error(
                "audit_chain_broken",
                shard=shard,
                seq=fields.get("seq"),
                auction_id=fields.get("auction_id"),
                reason=reason,
                remedy="run `auction-timer audit verify`, and keep copies of Redis and of the archive",
            )
        chain = ChainHead(seq_of(fields) or chain.seq, fields.get("hash", ""))
    return chain
