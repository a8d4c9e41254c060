"""A store that fails when told to, in front of one that does not."""

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from engine.store.memory import MemoryStore
from engine.store.protocol import Batch, CommitResult, StoreUnavailableError


class Fault(Enum):
    """What happens to a call."""

    NONE = "it is answered"
    BEFORE = "it is lost on the way there"
    AFTER = "it takes effect, and its answer is lost on the way back"


class FaultyStore:
    """`MemoryStore`, whose calls can be lost and whose every call gives others a turn, as a network does.

    `plan` says what becomes of each commit, in order; when it is used up all is well. `away` makes every call fail,
    after `patience_s`: on virtual time a caller that tries again at once would try for ever.
    `before_commit` is called with each batch before the store sees it. `time_ahead_ms` falsifies `time_us`, so that an
    engine which asks it keeps a clock that is ahead of the authority. `answer_takes_s` says how long the answers of a
    method are on their way, after the call has taken effect.
    """

    def __init__(self, inner: MemoryStore, plan: Iterable[Fault] = ()) -> None:
        self.inner = inner
        self.away = False
        self.time_ahead_ms = 0
        self.patience_s = 0.0
        self.answer_takes_s: dict[str, float] = {}
        self.commits: list[tuple[Batch, CommitResult | None]] = []
        self.before_commit: Callable[[Batch], None] = lambda _batch: None
        self._plan = iter(plan)

    async def commit(self, batch: Batch) -> CommitResult:
        """See `ShardStore`."""
        await self._reach()
        self.before_commit(batch)
        fault = next(self._plan, Fault.NONE)
        if fault is Fault.BEFORE:
            await asyncio.sleep(self.answer_takes_s.get("commit", 0))
            self.commits.append((batch, None))
            raise StoreUnavailableError("lost on the way there")
        answer = await self.inner.commit(batch)
        await asyncio.sleep(self.answer_takes_s.get("commit", 0))
        self.commits.append((batch, answer))
        if fault is Fault.AFTER:
            raise StoreUnavailableError("lost on the way back")
        return answer

    async def time_us(self) -> int:
        """See `ShardStore`."""
        await self._reach()
        return await self.inner.time_us() + self.time_ahead_ms * 1_000

    async def _reach(self) -> None:
        await asyncio.sleep(self.patience_s if self.away else 0)
        if self.away:
            raise StoreUnavailableError("away")

    def __getattr__(self, name: str) -> Any:
        """Every other call: passed on, unless the store is away."""
        method = getattr(self.inner, name)
        if name in ("connections", "live", "ticks", "shards", "replies"):
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._reach()
            answer = await method(*args, **kwargs)
            if takes_s := self.answer_takes_s.get(name, 0):
                await asyncio.sleep(takes_s)
            return answer

        return call
