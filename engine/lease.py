"""Leases: which shards this engine owns, and when another engine's hold is over.

A holder beats; a taker watches the beat. Only if epoch and beat have not moved for `lease_ms` on the taker's *own monotonic
clock* does it claim, naming exactly what it saw, so two takers cannot both succeed. No TTL and no wall clock has a say. A
claim raises the fencing epoch, and `commit.lua` compares it: a holder that merely slept finds out at its next commit.
An engine that comes back under its own name need not wait: the one it replaces is fenced by the same claim.

Engines share the shards. Each beats in a list of members too, and holds no more than its share of those whose beat moves, the
shards divided by the members, rounded up. Who joins finds the others giving back; who dies leaves a share to the rest:

    8 shards   A alone: 8   B joins: A 4, B 4   C joins: 3, 3, 2   A dies: B 4, C 4, one lease time later
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from engine.clock import Clock, MonotonicNs
from engine.store.protocol import Lease, LeaseStore, MemberStore, StoreUnavailableError

FORGET_AFTER_LEASES: Final = 30
"""A member that has not beaten for so many lease times is taken off the list: a minute, by default."""

log = structlog.get_logger()


class LeaseKeeper:
    """Claims its share of the shards, and keeps what it has.

    Args:
        members: who else is there; None if everything that is free should be taken.
        fit: whether this engine may hold shards at all; one whose clock is wrong gives them away.
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
        members: MemberStore | None = None,
        fit: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._clock = clock
        self._holder = holder
        self._shard_count = shard_count
        self._lease_ns = lease_ms * 1_000_000
        self._heartbeat_s = heartbeat_ms / 1_000
        self._gained = gained
        self._lost = lost
        self._members = members
        self._fit = fit
        self._peers: dict[str, tuple[int, MonotonicNs]] = {}
        self._watched: dict[int, tuple[Lease, MonotonicNs]] = {}
        self.epochs: dict[int, int] = {}
        """The shards we hold, each with its fencing epoch."""

    async def run(self) -> None:
        """Beat, and take what is free, until cancelled."""
        while True:
            held = set(self.epochs)
            try:
                share = await self._share()
                await self._give_back(share)
                for shard in range(self._shard_count):
                    if shard in self.epochs:
                        await self._beat(shard)
                    elif len(self.epochs) < share:
                        await self._try(shard)
                    elif self._members is not None:
                        self._watch(shard, await self._members.lease(shard))
            except StoreUnavailableError as error:
                log.warning("lease_round_failed", error=str(error))
                # Nobody could beat while the store was away: whoever holds a shard gets a whole lease to show that it lives.
                self._watched.clear()
                self._peers.clear()
            if gained := sorted(set(self.epochs) - held):
                log.info("shards_claimed", shards=gained, of=self._shard_count)
            await asyncio.sleep(self._heartbeat_s)

    async def _share(self) -> int:
        """How many shards this engine should hold at most, by the members whose beat moves."""
        if not self._fit():
            return 0
        if self._members is None:
            return self._shard_count
        beats = await self._members.beat_member(self._holder)
        now = self._clock.monotonic_ns()
        self._peers = {name: seen for name, seen in self._peers.items() if name in beats}
        for name, beat in beats.items():
            if name not in self._peers or self._peers[name][0] != beat:
                self._peers[name] = (beat, now)
        still = {name: now - since for name, (_, since) in self._peers.items() if name != self._holder}
        for name, still_ns in still.items():
            if still_ns > FORGET_AFTER_LEASES * self._lease_ns:
                await self._members.forget_member(name)
        alive = 1 + sum(still_ns < self._lease_ns for still_ns in still.values())
        return -(-self._shard_count // alive)

    async def _give_back(self, share: int) -> None:
        """Let go of what is over our share: somebody else is there for it."""
        for shard in sorted(self.epochs)[share:]:
            epoch = self.epochs.pop(shard, None)
            if epoch is None:
                continue  # found fenced, and dropped, while we waited for the store
            log.info("shard_given_back", shard=shard, share=share)
            await self._lost(shard)
            await self._store.release(shard, self._holder, epoch)

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
        else:
            self._watch(shard, lease)

    def _watch(self, shard: int, lease: Lease) -> None:
        """Remember since when a lease has stood as it stands."""
        if shard not in self._watched or self._watched[shard][0] != lease:
            # As of the answer: while it was on its way the holder may have beaten.
            self._watched[shard] = (lease, self._clock.monotonic_ns())

    async def release(self) -> None:
        """Give everything back, so that the next engine need not wait."""
        for shard, epoch in list(self.epochs.items()):
            del self.epochs[shard]
            await self._store.release(shard, self._holder, epoch)
        if self._members is not None:
            await self._members.forget_member(self._holder)
