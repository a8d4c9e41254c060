"""Attendance: a gateway writes to every shard once a second, which proves that producers can (requirement B8).

The store keeps the proof and finds the gaps (`engine/store/scripts/append.lua`): the first gateway that can write again
appends what was missed before anything else.
"""

import asyncio
from typing import Final
from uuid import uuid4

import structlog

from engine.clock import AuctionClock
from engine.store.protocol import Intake, KeyDamagedError, StoreError

BEAT_S: Final = 1.0
"""A fifth of what counts as an outage (`StoreLimits.outage_ms`): one lost beat is none."""

log = structlog.get_logger()


class Attendance:
    """The beats of one gateway."""

    def __init__(self, store: Intake, clock: AuctionClock, shards: int) -> None:
        self._store = store
        self._clock = clock
        self._shards = shards

    async def run(self) -> None:
        """Beat until cancelled; no fault of the store ends it."""
        while True:
            try:
                await self.beat()
            except StoreError as error:
                log.warning("beat_failed", error=str(error))
            await asyncio.sleep(BEAT_S)

    async def beat(self) -> None:
        """Write to every shard once; one that is damaged has no attendance, and does not cost the others theirs.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        for shard in range(self._shards):
            try:
                await self._store.append(shard, [], self._clock.now_ms(), uuid4().hex)
            except KeyDamagedError as error:
                log.warning("beat_failed", error=str(error))
