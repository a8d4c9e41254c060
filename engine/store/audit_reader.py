"""Reading an audit log that lies in two places, while an archiver moves records from one to the other.

The archiver inserts, then trims. So whoever reads the stream *first* and the archive *after it* misses nothing: a record
that was no longer in the stream had been archived before. Nor is one read twice, because its number tells.

    stream   41 42 43 | archived and trimmed: 41 42 | archive 1..42   read: 43 from the stream, the rest from the archive

A failover may lose the end of a stream that was archived already. Then there are two histories: what happened, as far as the
shard knows, is what its stream and its head say, and the archive keeps the other one as evidence. `walk` reads the archive
first, for whoever looks for the evidence; `surviving` asks it only for numbers that the stream no longer holds.

    archive 1..40, of which the shard lost 36..40 | stream 30..35 36' 37'   surviving: 1..29 30..35 36' 37'
"""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from engine.contract.cursors import START
from engine.store.archive import EVERYTHING, PAGE, AuditArchive, Selection, seq_of
from engine.store.protocol import AuditEntry, AuditStore

_STREAM_ID: Final = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class AuditReader:
    """The audit log of every shard. `store` is None where only the archive can be reached, `archive` where there is none.

    Methods raise `StoreUnavailableError` and `ArchiveUnavailableError`. Where both places hold a record of the same number
    and differ, `auction-timer audit verify` tells.
    """

    store: AuditStore | None
    archive: AuditArchive | None

    async def of_auction(self, shard: int, auction_id: str, after_seq: int, limit: int) -> list[dict[str, str]]:
        """The next `limit` surviving records of an auction behind a number (0 for all), in order; fewer only if there are no
        more."""
        found: list[dict[str, str]] = []
        walking = self.surviving(shard, Selection(auction_id), after_seq=after_seq, page=min(limit, PAGE))
        async with aclosing(walking):
            async for page in walking:
                found += [entry.fields for entry in page if seq_of(entry.fields) is not None]
                if len(found) >= limit:
                    break
        return found[:limit]

    async def walk(
        self, shard: int, selection: Selection = EVERYTHING, *, after_seq: int = 0, page: int = PAGE
    ) -> AsyncGenerator[list[AuditEntry], None]:
        """Every record of a shard behind a number, in order, in pages of about `page`; none of them is empty.

        Records of the stream that have no number come where they stand in it. Where both places hold a record of the same
        number and differ, the archive's is read.
        """
        at = after_seq
        async for entries in self._archived(shard, at, selection, page):
            at = _seq(entries[-1])
            yield entries
        if self.store is None:
            return
        # What the archive holds need not be read from the stream, which keeps some of it.
        last = await self.archive.last(shard) if self.archive is not None else None
        # The chain does not cover the id: one that somebody has damaged must not end the reading.
        behind = last.stream_id if last is not None and _STREAM_ID.fullmatch(last.stream_id) else START
        while True:
            streamed = await self.store.audit_entries(shard, behind, PAGE)
            # Also behind an empty page: what `last` stands behind may have been archived after the archive was read above.
            async for entries in self._archived(shard, at, selection, page):
                at = _seq(entries[-1])
                yield entries
            if not streamed:
                return
            behind = streamed[-1].stream_id
            fresh = [entry for entry in streamed if selection.holds(entry.fields) and _is_behind(entry, at)]
            if fresh:
                at = max(at, *(seq_of(entry.fields) or 0 for entry in fresh), 0)
                yield fresh

    async def surviving(
        self, shard: int, selection: Selection = EVERYTHING, *, after_seq: int = 0, page: int = PAGE
    ) -> AsyncGenerator[list[AuditEntry], None]:
        """The records of the history that the shard goes on from, behind a number, as `walk` gives them.

        What comes from the archive need not link to the rest: nobody but the reader of all of it can tell (`misfit`).
        Without a store, all that the archive holds.
        """
        if self.store is None:
            async for entries in self._archived(shard, after_seq, selection, page):
                yield entries
            return
        # Before the stream: of what the head was then, all that the stream does not show has been archived.
        head, at, behind = (await self.store.head(shard)).chain, after_seq, START
        given: list[range] = []
        while True:
            streamed = await self.store.audit_entries(shard, behind, PAGE)
            fresh: list[AuditEntry] = []
            for entry in streamed:
                seq = seq_of(entry.fields)
                if seq is not None and seq - 1 > at:
                    # Before the first of them, and where somebody has taken one out, or changed the number of one.
                    if fresh:
                        yield fresh
                        fresh = []
                    last = at
                    async for entries in self._archived(shard, at, selection, page, seq - 1):
                        last = _seq(entries[-1])
                        yield entries
                    given.append(range(at + 1, last + 1))
                at = max(at, seq or 0)
                is_wanted = selection.holds(entry.fields) and _is_behind(entry, after_seq)
                if is_wanted and not any(seq in numbers for numbers in given):
                    fresh.append(entry)
            if fresh:
                yield fresh
            if not streamed:
                async for entries in self._archived(shard, at, selection, page, head.seq):
                    yield entries
                return
            behind = streamed[-1].stream_id

    async def _archived(
        self, shard: int, after_seq: int, selection: Selection, page: int, until_seq: int | None = None
    ) -> AsyncGenerator[list[AuditEntry], None]:
        """What the archive holds behind a number, up to another one."""
        if self.archive is None or (until_seq is not None and until_seq <= after_seq):
            return
        while entries := await self.archive.walk(shard, after_seq, page, selection):
            after_seq = _seq(entries[-1])
            kept = entries if until_seq is None else [entry for entry in entries if _seq(entry) <= until_seq]
            if kept:
                yield kept
            if len(kept) < page:
                return


def _seq(entry: AuditEntry) -> int:
    return seq_of(entry.fields) or 0


def _is_behind(entry: AuditEntry, seq: int) -> bool:
    own = seq_of(entry.fields)
    return own is None or own > seq
