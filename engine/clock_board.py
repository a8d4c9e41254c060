"""What the processes state about their clocks, where each can read it: `auction:clocks`.

A statement counts as long as it changes: whoever has died states nothing new. That is judged by the reader's own monotonic
clock, because the statements are about clocks that may be wrong.
"""

from typing import Final

import structlog
from redis.exceptions import RedisError

from engine.clock import Clock, MonotonicNs
from engine.contract.clock_vote import ClockReport, read_report
from engine.store.protocol import ClockStore, StoreError

FRESH_NS: Final = 5_000_000_000
FORGET_AFTER_NS: Final = 60_000_000_000
"""A name that has stated nothing new for a minute is taken off by whoever reads."""

log = structlog.get_logger()


class ClockBoard:
    """States what one process knows, and reads what the others do.

    Args:
        role: `engine`, `gateway` or `reconciler`.
        instance: tells it from others of its role.
    """

    def __init__(self, store: ClockStore, clock: Clock, role: str, instance: str) -> None:
        self.role = role
        self.name = f"{role}:{instance}"
        self._store = store
        self._clock = clock
        self.is_used = False
        """Whether anybody else had stated anything when it was last read."""
        self._seen: dict[str, tuple[bytes, MonotonicNs]] = {}
        self._moved: set[str] = set()

    async def state(self, report: ClockReport) -> None:
        """Say it; that nobody can hear it now does not matter."""
        try:
            await self._store.state_clock(self.name, report.encode())
        except (RedisError, StoreError, OSError) as error:
            log.debug("clock_not_stated", error=str(error))

    async def others(self) -> dict[str, ClockReport]:
        """What the others state who live: their statement has changed since the first look, and in the last five seconds.

        Empty where Redis does not answer.
        """
        try:
            stated = await self._store.stated_clocks()
            self.is_used = bool(stated.keys() - {self.name})
            await self._look(stated)
        except (RedisError, StoreError, OSError) as error:
            log.debug("clocks_unread", error=str(error))
            return {}
        now = self._clock.monotonic_ns()
        fresh = {name: stated[name] for name in self._moved if now - self._seen[name][1] < FRESH_NS}
        read = {name: read_report(body) for name, body in fresh.items() if name != self.name}
        return {name: report for name, report in read.items() if report is not None}

    async def _look(self, stated: dict[str, bytes]) -> None:
        now = self._clock.monotonic_ns()
        self._seen = {name: seen for name, seen in self._seen.items() if name in stated}
        self._moved &= set(stated)
        for name, body in stated.items():
            if name not in self._seen:
                self._seen[name] = (body, now)
            elif self._seen[name][0] != body:
                self._seen[name] = (body, now)
                self._moved.add(name)
        for name, (_, since) in self._seen.items():
            if now - since > FORGET_AFTER_NS:
                await self._store.forget_clock(name)
