"""The forwarder's side of the store: who forwards the events of a shard, how far, and what could not be delivered.

It stands on Redis alone. No simulation forwards anything, so there is no form of it in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal
from uuid import uuid4

from engine.contract.keys import ShardKeys
from engine.store.link import RedisLink
from engine.store.protocol import Lease, UpdateEntry
from engine.store.redis import update_entry
from engine.store.scripts import CLAIM, FORWARD, PENDING, RELEASE, RENEW

UNDELIVERED_MAX: Final = 10_000
"""Events per shard that are kept for a person to look at: weeks of single faults, minutes of a webhook that is gone."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits behind the cursor of a shard, read in one step.

    `standing` says what reading has found of the cursor: `begun` at the lane's end because there was none yet, `back` at the
    lane's end because the lane ended before it, or `kept`. `lost` entries were trimmed before they were read. `behind`
    entries wait; `entries` are the first of them.
    """

    standing: Literal["begun", "back", "kept"]
    cursor: str
    lost: int
    behind: int
    entries: list[UpdateEntry]


class ForwarderStore:
    """Every method raises `StoreUnavailableError` when no answer comes in time.

    The lease is one of its own, `auction:forwarder:{k}`, with the cursor beside it: whoever claims it has fenced the cursor
    against its predecessor in the same step.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def claim(self, shard: int, holder: str, seen: Lease | None) -> Lease:
        """See `LeaseStore`."""
        args = (holder, seen.epoch, seen.beat) if seen else (holder, -1, -1)
        now_holder, epoch, beat = await self._link.run(CLAIM, [ShardKeys.of(shard).forwarder], args)
        return Lease(now_holder.decode(), int(epoch), int(beat))

    async def renew(self, shard: int, holder: str, epoch: int) -> bool:
        """See `LeaseStore`."""
        return bool(await self._link.run(RENEW, [ShardKeys.of(shard).forwarder], [holder, epoch]))

    async def release(self, shard: int, holder: str, epoch: int) -> None:
        """See `LeaseStore`."""
        await self._link.run(RELEASE, [ShardKeys.of(shard).forwarder], [holder, epoch])

    async def pending(self, shard: int, epoch: int, count: int) -> Pending | None:
        """What waits behind the cursor, at most `count` entries; None if the lease is no longer of `epoch`.

        A shard that has no cursor yet gets one at the lane's end; one whose place is gone goes on at the nearest there is.
        That is told once.
        """
        names = ShardKeys.of(shard)
        answer = await self._link.run(PENDING, [names.forwarder, names.updates], [epoch, count, uuid4().hex])
        if answer[0] == b"FENCED":
            return None
        _, standing, cursor, lost, behind, rows = answer
        entries = [update_entry(stream_id, values) for stream_id, values in rows]
        return Pending(standing.decode(), cursor.decode(), int(lost), int(behind), entries)

    async def advance(
        self, shard: int, epoch: int, *, after: str, to: str, passed: int, put_aside: Mapping[str, str | bytes] | None
    ) -> bool:
        """Move the cursor from `after` to `to`, over `passed` entries, the last of which may be put aside.

        Repeating it repeats its answer. False, and nothing is written, if the lease is no longer of `epoch` or the cursor
        stands elsewhere (a failover took it back): read again.
        """
        names = ShardKeys.of(shard)
        args: list[str | bytes | int] = [epoch, after, to, passed, UNDELIVERED_MAX]
        for name, value in (put_aside or {}).items():
            args += (name, value)
        return bool(await self._link.run(FORWARD, [names.forwarder, names.undelivered], args))
