"""Keeps an `AuctionClock` in step with its authority: a burst of samples at the start, then one a second."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.exceptions import RedisError

from engine.clock import STEP_US, AuctionClock
from engine.pace import REALTIME
from engine.store.protocol import StoreError

BURST: Final = 8
"""Samples at the start: enough that one of them met an idle server."""
RETRY_S: Final = 0.25

log = structlog.get_logger()


class ClockSync:
    """Samples `authority_us` (Redis `TIME`) and feeds the clock."""

    def __init__(
        self,
        clock: AuctionClock,
        authority_us: Callable[[], Awaitable[int]],
        *,
        every_s: float = REALTIME.sample_every_s,
    ) -> None:
        self._clock = clock
        self._authority_us = authority_us
        self._every_s = every_s

    async def sample(self) -> bool:
        """Take one sample; False if the authority did not answer or its answer was refused as a step."""
        clock = self._clock.clock
        sent = clock.monotonic_ns()
        try:
            authority_us = await self._authority_us()
        except (RedisError, StoreError, OSError) as error:
            log.warning("clock_sample_failed", error=str(error))
            return False
        return self._clock.observe(sent, clock.monotonic_ns(), authority_us)

    async def start(self) -> None:
        """Return once the clock is in step. Waits for an authority that is away."""
        taken = 0
        while taken < BURST:
            if await self.sample():
                taken += 1
                self._clock.settle()  # each time: good samples must not be steps because the first one was slow
            else:
                await asyncio.sleep(RETRY_S)
        wall_us = self._clock.clock.wall_ms() * 1_000
        apart_us = self._clock.now_us() - wall_us
        if abs(apart_us) > STEP_US:
            log.warning("wall_clock_differs", by_ms=apart_us // 1_000, advice="check time synchronisation of this host")

    async def run(self, observed: Callable[[float], None] = lambda _ms: None) -> None:
        """Keep the clock in step until cancelled; `observed` gets the estimate's error, in ms."""
        refused = self._clock.steps_refused
        while True:
            await asyncio.sleep(self._every_s)
            await self.sample()
            observed(abs(self._clock.error_us()) / 1_000)
            if self._clock.steps_refused > refused:
                refused = self._clock.steps_refused
                log.warning("clock_step_refused", refused=refused, advice="Redis and this host disagree by over 250 ms")
