"""The two feeds of a gateway: each a loop that no fault of Redis ends."""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from engine.clock import Clock
from engine.contract.cursors import START
from engine.store.link import RedisRefusedError
from engine.store.protocol import StoreUnavailableError, UpdateEntry, ViewStore
from gateway.commands import Commands
from gateway.hub import Hub

READ_MAX: Final = 500
BLOCK_MS: Final = 1_000
RECENT_MAX: Final = 4_000
"""Entries per shard that are read back at the start. With fewer it starts faster, and looks up more for who comes back."""
SILENCE_MAX_MS: Final = 3_000
"""A feed that has not heard from Redis for this long is lost: what it feeds is marked stale."""
BACKOFF_S: Final = 0.2

log = structlog.get_logger()


class EventFeed:
    """Follows the event lane of every shard with a cursor, and the answers to the commands of this gateway."""

    def __init__(
        self,
        store: ViewStore,
        hub: Hub,
        clock: Clock,
        shards: int,
        *,
        commands: Commands | None = None,
        updates_max: int = RECENT_MAX,
    ) -> None:
        self._store = store
        self._commands = commands
        self._hub = hub
        self._clock = clock
        self._shards = shards
        # A lane that was trimmed holds at least `updates_max` entries, so fewer than asked for means that none is missing.
        self._recent_max = min(RECENT_MAX, updates_max)
        self._heard = clock.monotonic_ns()
        self._last: dict[int, UpdateEntry] = {}
        self._outdated: set[int] = set()

    @property
    def is_fresh(self) -> bool:
        """Whether Redis answered lately."""
        return self._clock.monotonic_ns() - self._heard < SILENCE_MAX_MS * 1_000_000

    async def start(self) -> None:
        """Take the places from which the lane will be followed, a little back: whoever was connected to the gateway that
        ran here before comes now with a cursor from there.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        for shard in range(self._shards):
            recent = await self._store.recent_updates(shard, self._recent_max)
            self._hub.start_at(shard, START if len(recent) < self._recent_max else recent[0].stream_id)
            self._take(shard, recent)
        self._heard = self._clock.monotonic_ns()

    async def run(self) -> None:
        """Follow until cancelled."""
        self._hub.is_followed = True
        checked = self._store.connections
        check = False
        while True:
            try:
                if check:
                    checked = self._store.connections
                    await self._check_lineage()
                    check = False
                answers = self._commands.positions if self._commands is not None else {}
                news = await self._store.follow(self._hub.positions, answers, READ_MAX, BLOCK_MS)
                if self._store.connections != checked:
                    # Perhaps of another history: it is read again when our place is found to be part of that.
                    check = True
                    continue
            except (StoreUnavailableError, RedisRefusedError) as error:
                log.warning("event_lane_lost", error=str(error))
                check = True
                await asyncio.sleep(BACKOFF_S)
                continue
            self._heard = self._clock.monotonic_ns()
            for shard, entries in news.updates.items():
                self._take(shard, entries)
            await self._hub.fanout.relieved()
            # After what the same commits announced: who is answered finds in this gateway what was done.
            for reply_to, replies in news.replies.items():
                if self._commands is not None:
                    self._commands.on_replies(reply_to, replies)

    def _take(self, shard: int, entries: Sequence[UpdateEntry]) -> None:
        self._hub.on_updates(shard, entries)
        if entries:
            self._last[shard] = entries[-1]

    async def _check_lineage(self) -> None:
        """After an outage our place may be gone: a failover lost the last entries, or wrote others. Start over there.

        Ids do not tell: a new primary that has written past our place ends behind it as the old one did. The entry that
        was read last does: a history that holds it holds all before it.
        """
        if self._commands is not None:
            self._commands.rewind()
        for shard, position in list(self._hub.positions.items()):
            read = self._last.get(shard)
            if read is not None and not await self._store.holds_update(shard, read):
                last = await self._store.last_update(shard)
                log.warning("event_lane_went_back", shard=shard, was=position, now=last)
                del self._last[shard]
                self._hub.start_at(shard, last)
                self._outdated.add(shard)
            # Also when this fails half way: the place has moved already, and would not tell next time.
            if shard in self._outdated:
                await self._hub.reload(shard, "failover")
                self._outdated.discard(shard)


class TickFeed:
    """Listens to the tick lane of every shard."""

    def __init__(self, store: ViewStore, hub: Hub, shards: int) -> None:
        self._store = store
        self._hub = hub
        self._shards = range(shards)

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            try:
                async for shard, payload in self._store.ticks(self._shards):
                    self._hub.on_ticks(shard, payload)
            except (StoreUnavailableError, RedisRefusedError) as error:
                log.warning("tick_lane_lost", error=str(error))
                await asyncio.sleep(BACKOFF_S)
