"""The lease of the reconciler that acts. It stands on Redis alone, and on no shard: one reconciler serves them all."""

from engine.contract import keys
from engine.store.link import RedisLink
from engine.store.protocol import Lease
from engine.store.scripts import CLAIM, RELEASE, RENEW


class ReconcilerLease:
    """Implements `LeaseStore` for the one "shard" 0. Every method raises `StoreUnavailableError` when no answer comes."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def claim(self, _shard: int, holder: str, seen: Lease | None) -> Lease:
        """See `LeaseStore`."""
        args = (holder, seen.epoch, seen.beat) if seen else (holder, -1, -1)
        now_holder, epoch, beat = await self._link.run(CLAIM, [keys.RECONCILER], args)
        return Lease(now_holder.decode(), int(epoch), int(beat))

    async def renew(self, _shard: int, holder: str, epoch: int) -> bool:
        """See `LeaseStore`."""
        return bool(await self._link.run(RENEW, [keys.RECONCILER], [holder, epoch]))

    async def release(self, _shard: int, holder: str, epoch: int) -> None:
        """See `LeaseStore`."""
        await self._link.run(RELEASE, [keys.RECONCILER], [holder, epoch])
