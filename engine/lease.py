"""Leases: which shards this engine owns, and when another engine's hold is over.

A holder beats; a taker watches the beat. Only if epoch and beat have not moved for `lease_ms` on the taker's *own monotonic
clock* does it claim, naming exactly what it saw, so two takers cannot both succeed. No TTL and no wall clock has a say. A
claim raises the fencing epoch, and `commit.lua` compares it: a holder that merely slept finds out at its next commit.
An engine that comes back under its own name need not wait: the one it replaces is fenced by the same claim.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from engine.clock import Clock, MonotonicNs
from engine.store.protocol import Lease, LeaseStore, StoreUnavailableError

log = structlog.get_logger()


class LeaseKeeper:
    """Claims every shard it can get, and keeps what it has.

    Args:
        gained: called with the shard and its new epoch.
        lost: called with a shard that is no longer ours.
    """

    def __init__(
        self,
        store: LeaseStore,
        clock: Clock,
        holder: str,
        shard_count: int,
        *,
        lease_ms: int,
        heartbeat_ms: int,
        gained: Callable[[int, int], Awaitable[None]],
        lost: Callable[[int], Awaitable[None]],
    ) -> None:
        self._store = store
        self._clock = clock
        self._holder = holder
        self._shard_count = shard_count
        self._lease_ns = lease_ms * 1_000_000
        self._heartbeat_s = heartbeat_ms / 1_000
        self._gained = gained
        self._lost = lost
        self._watched: dict[int, tuple[Lease, MonotonicNs]] = {}
        self.epochs: dict[int, int] = {}
        """The shards we hold, each with its fencing epoch."""

    async def run(self) -> None:
        """Beat, and take what is free, until cancelled."""
        while True:
            held = set(self.epochs)
            try:
                for shard in range(self._shard_count):
                    if shard in self.epochs:
                        await self._beat(shard)
                    else:
                        await self._try(shard)
            except StoreUnavailableError as error:
                log.warning("lease_round_failed", error=str(error))
                # Nobody could beat while the store was away: whoever holds a shard gets a whole lease to show that it lives.
                self._watched.clear()
            if gained := sorted(set(self.epochs) - held):
                log.info("shards_claimed", shards=gained, of=self._shard_count)
            await asyncio.sleep(self._heartbeat_s)

    async def _beat(self, shard: int) -> None:
        if not await self._store.renew(shard, self._holder, self.epochs[shard]):
            await self.drop(shard)

    async def drop(self, shard: int) -> None:
        """A shard is not ours any more, whoever has found out."""
        if self.epochs.pop(shard, None) is not None:
            log.warning("shard_lost", shard=shard)
            await self._lost(shard)

    async def _try(self, shard: int) -> None:
        seen, since = self._watched.get(shard, (None, MonotonicNs(0)))
        now = self._clock.monotonic_ns()
        stale = seen is not None and now - since >= self._lease_ns
        lease = await self._store.claim(shard, self._holder, seen if stale else None)
        if lease.holder == self._holder:
            self._watched.pop(shard, None)
            self.epochs[shard] = lease.epoch
            log.debug("shard_claimed", shard=shard, epoch=lease.epoch)
            await self._gained(shard, lease.epoch)
        elif lease != seen:
            # As of the answer: while it was on its way the holder may have beaten.
            self._watched[shard] = (lease, self._clock.monotonic_ns())

    async def release(self) -> None:
        """Give everything back, so that the next engine need not wait."""
        for shard, epoch in list(self.epochs.items()):
            del self.epochs[shard]
            await self._store.release(shard, self._holder, epoch)
