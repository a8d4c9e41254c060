"""An agenda: what is due when, in memory. The twin of the sorted set of deadlines, kept per engine.

A heap with lazy deletion: setting a key again, or dropping it, leaves its old heap entry behind; such an entry is
recognised when it surfaces, because the key's instant no longer matches, and the heap is rebuilt when more than half of
it is stale. Every operation is O(log n) amortised; 100,000 auctions are 200,000 entries.
"""

import heapq
from typing import Final

from engine.domain.instants import EpochMs

STALE_FLOOR: Final = 1_000
"""Below this many stale entries a rebuild is not worth its pause."""


class Agenda:
    """Keys, each with the one instant at which it is due."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[str, EpochMs] = {}
        self._heap: list[tuple[EpochMs, str]] = []

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: str, at: EpochMs | None) -> None:
        """Make `key` due at `at`, and at no other time; None drops it."""
        if at is None:
            self._at.pop(key, None)
        elif self._at.get(key) != at:
            self._at[key] = at
            heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + STALE_FLOOR:
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)

    def next_at(self) -> EpochMs | None:
        """When the next key is due; None if none is left."""
        while self._heap:
            at, key = self._heap[0]
            if self._at.get(key) == at:
                return at
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: EpochMs, most: int) -> list[tuple[EpochMs, str]]:
        """Take out at most `most` keys that are due at `now`, the earliest first."""
        due: list[tuple[EpochMs, str]] = []
        while self._heap and self._heap[0][0] <= now and len(due) < most:
            at, key = heapq.heappop(self._heap)
            if self._at.get(key) == at:
                del self._at[key]
                due.append((at, key))
        return due
