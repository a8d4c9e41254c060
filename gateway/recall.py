"""What is older than the memory of a gateway: it is looked up in the event lane itself, for a client that was away for long.

The lane holds a hundred thousand entries per shard, a ring ten thousand events. A search goes back from where the ring
begins until it meets the cursor, a page at a time:

    lane     ├──────────────┬─────────────────────────┤··············┤
             first entry    the cursor                the ring       now
                            ◀──── page ◀── page ◀─────┤

It answers everyone who waits for something of its shard, whatever their auctions; who comes meanwhile waits for the next
one; and there is one at a time. So a crowd that was away for long costs a search or two, and a single client that asks
again and again no more than a part of the loop.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import structlog

from engine.contract.cursors import stream_order
from engine.contract.frames import is_frame
from engine.store.protocol import StoreError, UpdateEntry, ViewStore
from gateway.replay import is_too_much
from gateway.ring import Event, Ring

PAGE: Final = 500
"""Entries that are read at once: half a megabyte, 2 ms of the loop."""
REST_S: Final = 0.005
"""Between two pages: a search takes less than half of the loop, and a second for all that a lane holds."""
LOOKBACK_MAX: Final = 100_000
"""Entries that a search goes back. A client that waits longer for its handshake has given up."""

SEARCHES_MAX: Final = 3
"""For one client: the second finds what came during the first, where that was more than a ring holds."""

log = structlog.get_logger()

Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Recalled:
    """All events of an auction behind a cursor, up to a place that its ring held.

    Attributes:
        history: of the ring (`Ring.histories`); in another one this is worth nothing.
    """

    events: list[Event]
    upto: Place
    history: int


@dataclass(frozen=True, slots=True)
class _Asked:
    auction_id: str
    behind: Place
    answer: "asyncio.Future[Recalled | None]"


@dataclass(slots=True)
class _Found:
    """What is known of one auction."""

    newer: list[Event]
    """What its ring holds."""
    size: int
    older: list[Event] = field(default_factory=list)
    """What was found before that, the latest first."""

    @property
    def events(self) -> list[Event]:
        """In order."""
        return [*reversed(self.older), *self.newer]


class _Search:
    """What is looked for in the lane of one shard, from where its ring begins."""

    def __init__(self, ring: Ring, asked: list[_Asked]) -> None:
        self._upto = ring.position
        self.history = ring.histories
        self.begin = ring.complete_from
        asked = [each for each in asked if each.behind < self.begin]  # or it was started anew meanwhile
        self._wanted = {place: list(them) for place, them in groupby(asked, key=_behind)}
        """Who is answered at which place; they are asked for in their order."""
        self._found: dict[str, _Found] = {}
        for auction_id in {each.auction_id for each in asked}:
            newer = ring.since(auction_id, self.begin) or []
            self._found[auction_id] = _Found(newer, 0)
            self._weigh(auction_id, sum(event.size for event in newer))

    def goes_on_before(self, place: Place | None) -> bool:
        """Whether somebody waits for what is older. Who waits for something newer has no place of the lane."""
        return bool(self._wanted) and (place is None or min(self._wanted) < place)

    def take(self, place: Place, entry: UpdateEntry) -> None:
        """The entry before all that were taken."""
        for asked in self._wanted.pop(place, ()):
            asked.answer.set_result(Recalled(self._found[asked.auction_id].events, self._upto, self.history))
        if entry.auction_id in self._found and is_frame(entry.type):
            self._found[entry.auction_id].older.append(Event(entry))
            self._weigh(entry.auction_id, len(entry.body))

    def _weigh(self, auction_id: str, size: int) -> None:
        """So much more of an auction is found. Who is still waiting for it then may have missed too much."""
        found = self._found[auction_id]
        found.size += size
        if is_too_much(found.size):
            del self._found[auction_id]
            for place, them in list(self._wanted.items()):
                _give_up([asked for asked in them if asked.auction_id == auction_id])
                self._wanted[place] = [asked for asked in them if not asked.answer.done()]
                if not self._wanted[place]:
                    del self._wanted[place]


class Recall:
    """Looks up what the rings have forgotten."""

    def __init__(self, store: ViewStore, rings: Mapping[int, Ring]) -> None:
        self._store = store
        self._rings = rings
        self._asked: dict[tuple[int, str, Place], _Asked] = {}
        self._waiting: dict[int, list[_Asked]] = {}
        self._searching: asyncio.Task[None] | None = None

    async def events(self, shard: int, auction_id: str, behind: Place) -> Recalled | None:
        """The events of an auction behind a place that its ring has forgotten.

        None if the lane has forgotten it too, or never had it; if there are too many of them, or they are too far back; or
        if Redis does not tell.
        """
        ring, older = self._rings[shard], list[Event]()
        history = ring.histories
        for _ in range(SEARCHES_MAX):
            found = await self._searched(shard, auction_id, behind)
            if found is None or found.history != history:
                return None
            if found.upto >= ring.complete_from:
                return found if not older else Recalled(older + found.events, found.upto, history)
            older += found.events
            behind = found.upto
        return None

    async def _searched(self, shard: int, auction_id: str, behind: Place) -> Recalled | None:
        """What a search finds; by its end the ring may have forgotten more."""
        key = shard, auction_id, behind
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = _Asked(auction_id, behind, asyncio.get_running_loop().create_future())
            asked.answer.add_done_callback(lambda _done: self._asked.pop(key, None))
            self._waiting.setdefault(shard, []).append(asked)
            if self._searching is None or self._searching.done():
                self._searching = asyncio.create_task(self._search())
        return await asyncio.shield(asked.answer)

    async def _search(self) -> None:
        while self._waiting:
            shard = next(iter(self._waiting))
            asked = sorted(self._waiting.pop(shard), key=_behind)
            try:
                await self._search_shard(shard, asked)
            except StoreError as error:
                log.warning("lane_not_searched", shard=shard, error=str(error))
            finally:
                _give_up(asked)

    async def _search_shard(self, shard: int, asked: list[_Asked]) -> None:
        ring = self._rings[shard]
        # A cursor that is no place of the lane, or not any more, costs one look and not a search through all of it.
        while asked and not await self._is_place(shard, asked[0].behind):
            _give_up([asked.pop(0)])
        search, left = _Search(ring, asked), LOOKBACK_MAX
        place: Place | None = None
        while left > 0 and search.goes_on_before(place):
            page = await self._store.recent_updates(shard, PAGE, upto=_stream_id(place or search.begin))
            # Each page ends with the entry with which the one before it began.
            older = page if place is None else page[:-1]
            if not older or ring.histories != search.history:
                return
            for entry in reversed(older):
                place = stream_order(entry.stream_id)
                search.take(place, entry)
            left -= len(page)
            await asyncio.sleep(REST_S)

    async def _is_place(self, shard: int, place: Place) -> bool:
        found = await self._store.recent_updates(shard, 1, upto=_stream_id(place))
        return bool(found) and stream_order(found[0].stream_id) == place


def _behind(asked: _Asked) -> Place:
    return asked.behind


def _give_up(asked: list[_Asked]) -> None:
    for each in asked:
        if not each.answer.done():
            each.answer.set_result(None)


def _stream_id(place: Place) -> str:
    return f"{place[0]}-{place[1]}"
