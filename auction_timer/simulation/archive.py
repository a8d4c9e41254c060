"""The audit archive of a simulation: in memory, on a machine of its own, which no failover of the store touches.

So it goes on holding what a failover has taken back. Its answers may be late or lost, as those of a database are; what was
sent takes effect.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

from auction_timer.simulation.network import PATIENCE_MS, Fate
from engine.store.archive import EVERYTHING, ArchiveUnavailableError, Selection, seq_of
from engine.store.protocol import AuditEntry

T = TypeVar("T")


class Archive:
    """As much of `engine.store.archive.AuditArchive` as a reconciler asks for. `fate` is that of `Network`."""

    def __init__(self, fate: Callable[[str, bool], Fate]) -> None:
        self._fate = fate
        self.held: defaultdict[int, dict[int, AuditEntry]] = defaultdict(dict)
        """By shard and number; what stands there stays."""

    async def create(self) -> None:
        """See `AuditArchive`."""
        await self._call("create", lambda: None, writes=True)

    async def append(self, shard: int, entries: Sequence[AuditEntry]) -> list[AuditEntry]:
        """See `AuditArchive`."""

        def effect() -> list[AuditEntry]:
            held = self.held[shard]
            return [entry for entry in entries if not _stands(held, entry)]

        return await self._call("append", effect, writes=True)

    async def last(self, shard: int) -> AuditEntry | None:
        """See `AuditArchive`."""
        held = self.held[shard]
        return await self._call("last", lambda: held[max(held)] if held else None)

    async def walk(self, shard: int, after_seq: int, limit: int, selection: Selection = EVERYTHING) -> list[AuditEntry]:
        """See `AuditArchive`."""
        held = self.held[shard]

        def effect() -> list[AuditEntry]:
            behind = (held[seq] for seq in range(after_seq + 1, max(held, default=0) + 1) if seq in held)
            return list(islice((entry for entry in behind if selection.holds(entry.fields)), limit))

        return await self._call("walk", effect)

    async def at(self, shard: int, seqs: Sequence[int]) -> dict[int, AuditEntry]:
        """See `AuditArchive`."""
        held = self.held[shard]
        return await self._call("at", lambda: {seq: held[seq] for seq in seqs if seq in held})

    async def _call(self, name: str, effect: Callable[[], T], *, writes: bool = False) -> T:
        fate = self._fate(f"archive {name}", writes)
        await asyncio.sleep(fate.out_ms / 1_000)
        answer = effect() if not fate.request_lost else None
        if fate.again_ms is not None:
            answer = effect()
        if fate.request_lost or fate.answer_lost:
            await asyncio.sleep(PATIENCE_MS / 1_000)
            raise ArchiveUnavailableError("no answer")
        await asyncio.sleep(fate.back_ms / 1_000)
        return answer  # type: ignore[return-value]


def _stands(held: dict[int, AuditEntry], entry: AuditEntry) -> bool:
    """Whether a record stands at its place, once it has been written there if that was free."""
    seq = seq_of(entry.fields)
    return seq is not None and held.setdefault(seq, entry).fields == entry.fields
