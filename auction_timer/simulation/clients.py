"""Simulated clients: each watches one auction in some gateway, hangs up now and then, and comes back with its cursor."""

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import orjson

from auction_timer.simulation.processes import GatewayProcess
from engine.store.protocol import StoreUnavailableError
from gateway.closing import CloseCode
from gateway.hub import Hub
from gateway.room import Frame, Room

UNKNOWN_WAITS: Final = 1 / 6
"""How long a client waits for an auction that is not announced yet, as a part of the time for which it stays connected."""
COME_BACK_WAITS: Final = 1 / 20
"""The same when the gateway was lost."""


@dataclass(slots=True)
class Stretch:
    """What a client was told without a break: the events between `since` and the last of `cursors`, none missing."""

    since: str
    cursors: list[str] = field(default_factory=list)


class Client:
    """Implements `gateway.room.Stream`: remembers every event, and when it was told that there was a break."""

    def __init__(
        self, auction_id: str, gateways: list[GatewayProcess], random: Random, comes_s: float, stays_s: float
    ) -> None:
        self.auction_id = auction_id
        self._comes_s = comes_s
        self._gateways = gateways
        self._random = random
        self._stays_s = stays_s
        self._lost = asyncio.Event()
        self.stretches: list[Stretch] = []
        self.timer: dict[str, Any] = {}
        self.ticks = 0
        self.connections = 0

    @property
    def cursor(self) -> str | None:
        """Where the client stands in the event lane."""
        if not self.stretches:
            return None
        last = self.stretches[-1]
        return last.cursors[-1] if last.cursors else last.since

    async def watch(self) -> None:
        """Until cancelled."""
        await asyncio.sleep(self._comes_s)
        while True:
            gateway = self._random.choice(self._gateways)
            hub = gateway.hub
            room = await self._room(hub) if hub is not None else None
            # Whatever happened while we waited: the gateway must be the one that it was, and still have the room.
            if hub is None or room is None or gateway.hub is not hub or hub.known(self.auction_id) is not room:
                unknown = hub is not None and room is None
                await asyncio.sleep(self._stays_s * (UNKNOWN_WAITS if unknown else COME_BACK_WAITS))
                continue
            self._lost.clear()
            self.connections += 1
            for frame in hub.greeting(room, self.cursor):
                self.event(frame)
            room.streams.add(self)
            try:
                await self._stay(gateway)
            finally:
                room.streams.discard(self)

    async def _room(self, hub: Hub) -> Room | None:
        try:
            return await hub.room(self.auction_id)
        except StoreUnavailableError:
            return None

    async def _stay(self, gateway: GatewayProcess) -> None:
        hangs_up = asyncio.get_running_loop().call_later(self._random.expovariate(1 / self._stays_s), self._lost.set)
        gateway.farewells.append(self._lost.set)
        try:
            await self._lost.wait()
        finally:
            hangs_up.cancel()
            gateway.farewells.remove(self._lost.set)

    def event(self, frame: Frame) -> None:
        """See `gateway.room.Stream`."""
        body = orjson.loads(frame.payload)
        if body["type"] == "timer.snapshot":
            if not body["recovered"]:
                self.stretches.append(Stretch(body["cursor"]))
        elif body["type"] == "timer.resynced" and "cause" in body:
            self.stretches.append(Stretch(body["cursor"]))
        else:
            self.stretches[-1].cursors.append(body["cursor"])
        shown = body.get("timer")
        if shown is not None:
            self.timer = shown

    def tick(self, _frame: Frame) -> None:
        """See `gateway.room.Stream`."""
        self.ticks += 1

    def close(self, _code: CloseCode, _reason: str) -> None:
        """See `gateway.room.Stream`."""
        self._lost.set()
