"""`GET /auctions`: every auction, next to close first, in pages.

The order is total: live auctions by deadline, then paused ones, then closed ones with the latest end first; equal instants
by id. A page's `next_cursor` names the last place that was looked at, so pages neither overlap nor skip, whatever closes
between two of them.
"""

import asyncio
import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

import orjson

from engine.contract.timers import TimerRecord, UnsealedTimerError
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.store.protocol import Group, Placed, ViewStore

ROUNDS_MAX: Final = 20
"""Pages looked at for one answer. A filter that matches little then gets a short page and a cursor to go on from."""

_ORDER: Final = (Group.LIVE, Group.PAUSED, Group.CLOSED)
_GROUPS: Final = {
    Status.SCHEDULED: (Group.LIVE,),
    Status.ACTIVE: (Group.LIVE,),
    Status.CLOSING: (Group.LIVE,),
    Status.PAUSED: (Group.PAUSED,),
    Status.ENDED: (Group.CLOSED,),
    Status.CANCELLED: (Group.CLOSED,),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page ended."""

    group: Group
    after: Placed | None

    def encode(self) -> str:
        """The opaque `next_cursor`."""
        after = [self.after.score, self.after.auction_id] if self.after else None
        return base64.urlsafe_b64encode(orjson.dumps([self.group, after])).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Place | None":
        """Read a cursor that came from outside; None if it is none of ours."""
        try:
            group, after = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
            placed = None if after is None else Placed(after[0], after[1])
            if placed is not None and not (type(placed.score) is int and type(placed.auction_id) is str):
                return None
            return cls(Group(group), placed)
        except (ValueError, TypeError, IndexError, KeyError, binascii.Error):
            return None


async def list_auctions(
    store: ViewStore,
    shards: int,
    *,
    status: Status | None,
    ending_before: EpochMs | None,
    limit: int,
    place: Place | None,
) -> tuple[list[TimerRecord], Place | None]:
    """One page, and where it ended; None if nothing is left.

    Raises:
        StoreUnavailableError: Redis does not answer.
    """
    groups = list(_ORDER if status is None else _GROUPS[status])
    if ending_before is not None and Group.PAUSED in groups:
        groups.remove(Group.PAUSED)  # a paused auction ends at no known instant
    after = None
    if place is not None and place.group in groups:
        groups, after = groups[groups.index(place.group) :], place.after
    found: list[TimerRecord] = []
    for _ in range(ROUNDS_MAX):
        if not groups:
            return found, None
        row = await _row(store, shards, groups[0], after, limit)
        for record, placed in row:
            if groups[0] is Group.LIVE and ending_before is not None and placed.score >= ending_before:
                row = []  # the rest of this group ends later still
                break
            after = placed
            if _matches(record, status, ending_before):
                assert record is not None
                found.append(record)
                if len(found) == limit:
                    return found, Place(groups[0], after)
        if len(row) < limit:
            groups, after = groups[1:], None
    return found, Place(groups[0], after) if groups else None


async def next_places(
    store: ViewStore, shards: int, group: Group, after: Placed | None, count: int
) -> tuple[list[tuple[Placed, int]], dict[int, list[str]]]:
    """The next `count` places of a group over all shards, each with its shard; and the names in each shard.

    Raises:
        StoreUnavailableError: Redis does not answer.
    """
    pages = await asyncio.gather(*(store.page(shard, group, after, count) for shard in range(shards)))
    merged = sorted(
        ((placed, shard) for shard, page in enumerate(pages) for placed in page),
        key=lambda at: (at[0].score, at[0].auction_id),
        reverse=group is Group.CLOSED,
    )[:count]
    by_shard: dict[int, list[str]] = {}
    for placed, shard in merged:
        by_shard.setdefault(shard, []).append(placed.auction_id)
    return merged, by_shard


async def _row(
    store: ViewStore, shards: int, group: Group, after: Placed | None, count: int
) -> list[tuple[TimerRecord | None, Placed]]:
    """The next `count` auctions of a group over all shards."""
    merged, by_shard = await next_places(store, shards, group, after, count)
    timers: dict[str, TimerRecord] = {}
    answers = await asyncio.gather(*(store.timers(shard, ids) for shard, ids in by_shard.items()))
    for found in answers:
        records = [each.record if isinstance(each, UnsealedTimerError) else each for each in found]
        timers |= {record.auction.auction_id: record for record in records if isinstance(record, TimerRecord)}
    return [(timers.get(placed.auction_id), placed) for placed, _ in merged]


def _matches(record: TimerRecord | None, status: Status | None, ending_before: EpochMs | None) -> bool:
    if record is None or not record.auction.status.is_public:
        return False
    auction: Any = record.auction
    return (status is None or auction.status is status) and (ending_before is None or auction.ends_at < ending_before)
