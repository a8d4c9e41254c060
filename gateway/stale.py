"""Ticks from memory while nobody sends any: Redis is away, or no engine is heard.

A countdown that stops would be worse than one that is marked: the deadline is known, and so is the time. Only what is known
is said: such a tick carries `"stale": true`, and never that an auction is over.
"""

import asyncio
from typing import Final

import orjson

from engine.contract.timers import as_of
from engine.domain.cadence import tick_step_ms
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import TICK_INTERVAL_MS_MAX
from gateway.hub import Hub
from gateway.room import Room

LOOK_EVERY_S: Final = 1.0
ENGINE_SILENCE_MAX_MS: Final = 3_000
"""An engine is heard every second; after this no tick of its shard is on the way."""
TICK_FIELDS: Final = (
    "status", "version", "ends_at", "remaining_ms", "soft_close_until", "final_deadline", "extension_count",
    "extension_used_ms", "extension_left_ms", "at_cap", "stale",
)  # fmt: skip
_COUNTING: Final = frozenset({Status.SCHEDULED, Status.ACTIVE, Status.CLOSING, Status.PAUSED})


class StaleTicks:
    """Sends ticks from memory to the rooms that get none."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._sent_at: dict[Room, EpochMs] = {}
        self._began_at: EpochMs | None = None

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Send what is due now."""
        if not self._hub.clock.synced:
            return
        now = self._hub.clock.now_ms()
        self._began_at = self._began_at or now
        silent = [room for room in self._hub.watched() if self._is_silent(room, now)]
        self._sent_at = {room: self._sent_at[room] for room in silent if room in self._sent_at}
        for room in silent:
            if room.timer["status"] in _COUNTING and self._is_due(room, now):
                self._sent_at[room] = now
                self._hub.tick(room, room.version, _tick(room, now))
        self._hub.fanout.write()

    def _is_silent(self, room: Room, now: EpochMs) -> bool:
        # An engine that was never heard has been silent for as long as anybody has listened.
        seen_at = self._hub.engine_seen.get(room.shard, self._began_at or now)
        return self._hub.stale() or now - seen_at > ENGINE_SILENCE_MAX_MS

    def _is_due(self, room: Room, now: EpochMs) -> bool:
        sent_at = self._sent_at.get(room)
        if sent_at is None:
            return True
        remaining_ms = as_of(room.timer, now, None)["remaining_ms"]
        # A look is a second after the last, a little more or less.
        return now - sent_at >= tick_step_ms(remaining_ms, TICK_INTERVAL_MS_MAX) - LOOK_EVERY_S * 500


def _tick(room: Room, now: EpochMs) -> bytes:
    view = as_of(room.timer, now, None, stale=True)
    head = {
        "type": "timer.tick",
        "auction_id": room.auction_id,
        "server_time": now,
        "trace_id": view["trace_id"],
    }
    return orjson.dumps(head | {name: view[name] for name in TICK_FIELDS})
