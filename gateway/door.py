"""The door of the gateway: who gets in, and who is asked to leave.

Everything that concerns all sockets at once stands here: the limits, the look at every socket each few seconds, and the
farewell when an auction is over or the process drains.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import orjson
from websockets.http11 import Request

from engine.clock import Clock
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.settings import Settings
from gateway.admission import Admission
from gateway.auth import Principal
from gateway.closing import CloseCode
from gateway.connection import Connection
from gateway.hub import Hub
from gateway.metrics import GatewayMetrics
from gateway.origins import OriginRule
from gateway.problems import Problem, ProblemType, retry_after
from gateway.room import Room, Stream, Subscriber
from gateway.tokens import Tokens

if TYPE_CHECKING:
    from gateway.event_stream import EventStream

OVER_LINGER_S: Final = 1.0
"""From the last event to the farewell 4000: time for the frame to be seen, well within the promised 5 s."""
LOOK_EVERY_S: Final = 1.0
LOOK_LATE_MS: Final = 2_000
"""A look that is later than this tells that the process stood still: it was stopped, or its machine was."""
PING_AFTER_MS: Final = 20_000
"""Silence after which a socket is asked whether anybody is there."""
ANSWER_WITHIN_MS: Final = 10_000
"""One that was asked and is still not heard after this is given up. Nobody else is: silence alone proves nothing."""
RETRY_AFTER_MS: Final = 500
JITTER_MS: Final = 3_000
DRAIN_LOOK_EVERY_S: Final = 0.1
FAREWELLS_AT_ONCE: Final = 128
"""Sockets closed in one pass of the event loop: about 5 ms."""
LAST_MINUTE_MS: Final = 60_000
"""So long before the end a socket outlives its token."""
_NS: Final = 1_000_000


class Door:
    """Admits sockets, watches over them, says farewell."""

    def __init__(
        self, hub: Hub, settings: Settings, clock: Clock, metrics: GatewayMetrics, tokens: Tokens | None = None
    ) -> None:
        self.hub = hub
        self.metrics = metrics
        self.tokens = tokens
        self.admission = Admission(settings, clock)
        self.outbox_bytes_max = settings.outbox_bytes_max
        self.outbox_age_max_ms = settings.outbox_age_max_ms
        self.origins = OriginRule(
            settings.allowed_origins, loopback_only=settings.is_loopback, is_open=not settings.wants_tokens
        )
        self._settings = settings
        self._clock = clock
        self._connections: set[Connection] = set()
        self._streams: set[EventStream] = set()
        self._per_address: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._farewells: set[Room] = set()
        self._looked_ns = self.now_ns()
        self.draining = False
        self.on_drift: Callable[[Room, float, float | None, Principal, str], None] = lambda *_reported: None
        """Told what a socket reports of its clock: room, drift and round trip in ms, who, and the correlation id."""
        hub.on_over = self.on_over

    def now_ns(self) -> int:
        """The monotonic clock, in ns."""
        return self._clock.monotonic_ns()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the loop, and hold on to it until it is done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def opened(self, connection: Connection) -> None:
        """A connection wants to become a socket."""
        self._connections.add(connection)
        self._count(connection.address, 1)

    def closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self._count(connection.address, -1)

    def stream_opened(self, stream: "EventStream") -> None:
        """A request wants to become an event stream. It counts as a socket does, and no longer as a plain connection."""
        self.admission.left(stream.address)
        self._streams.add(stream)
        self._count(stream.address, 1)

    def stream_closed(self, stream: "EventStream") -> None:
        """An event stream is over, or never began."""
        stream.leave()
        self._streams.discard(stream)
        self._count(stream.address, -1)
        self.admission.arrived(stream.address)

    def _count(self, address: str, by: int) -> None:
        self._per_address[address] += by
        if not self._per_address[address]:
            del self._per_address[address]
        self.metrics.connections.set(self._watchers)

    @property
    def _watchers(self) -> int:
        return len(self._connections) + len(self._streams)

    def refuse(self, connection: "Connection | EventStream", request: Request) -> Problem | None:
        """Why a handshake is refused; None if it is not."""
        settings = self._settings
        if self.draining:
            return Problem(ProblemType.DRAINING, "this gateway is going away; come back", headers=retry_after())
        if (
            self._watchers > settings.connections_max
            or self._per_address[connection.address] > settings.connections_per_address_max
        ):
            return Problem(ProblemType.TOO_MANY_CONNECTIONS, "too many sockets; try again", headers=retry_after())
        origins, hosts = request.headers.get_all("Origin"), request.headers.get_all("Host")
        if len(origins) > 1 or not self.origins.admits(origins[0] if origins else None, hosts[0] if hosts else None):
            return Problem(
                ProblemType.FOREIGN_ORIGIN,
                "pages of this origin may not open sockets here; name it in AUCTION_TIMER_ALLOWED_ORIGINS if they should",
            )
        # Last, so that a page that would be refused anyway uses up nobody's turn.
        if not self.admission.takes_handshake():
            return Problem(
                ProblemType.TOO_MANY_HANDSHAKES, "too many handshakes at once; try again", headers=retry_after()
            )
        return None

    def on_over(self, room: Room) -> None:
        """An auction is over: everyone in its room has read why, and is let go."""
        if room not in self._farewells:
            self._farewells.add(room)
            asyncio.get_running_loop().call_later(OVER_LINGER_S, self._farewell, room)

    def _farewell(self, room: Room) -> None:
        if self.hub.fanout.is_sending(room):
            asyncio.get_running_loop().call_later(OVER_LINGER_S, self._farewell, room)
            return
        self._farewells.discard(room)
        if room.is_over:  # a failover may have taken the end back
            self._part(room.everyone())

    def _part(self, watchers: list[Subscriber | Stream]) -> None:
        """Let watchers of an auction that is over go, some at a time: a crowded close may not delay the others."""
        for watcher in watchers[:FAREWELLS_AT_ONCE]:
            watcher.close(CloseCode.AUCTION_OVER, "the auction is over")
        if rest := watchers[FAREWELLS_AT_ONCE:]:
            asyncio.get_running_loop().call_soon(self._part, rest)

    async def drain(self, within_s: float) -> None:
        """Let everyone go, within a bound: first those who lose nothing, last those who watch an auction's last minute.

        Who watches a last minute stays until the close was delivered, so that a deploy does not hit it (requirement B9).
        """
        self.draining = True
        try:
            async with asyncio.timeout(within_s):
                while self._connections or self.hub.streaming():
                    await self._send_away(self._misses_nothing)
                    await asyncio.sleep(DRAIN_LOOK_EVERY_S)
        except TimeoutError:
            pass
        await self._send_away(lambda _room: True)

    async def _send_away(self, may_go: Callable[[Room], bool]) -> None:
        for number, connection in enumerate(self._connections.copy(), start=1):
            if connection.room is not None and may_go(connection.room):
                connection.close(CloseCode.GOING_AWAY, self.come_back())
            if number % FAREWELLS_AT_ONCE == 0:
                await asyncio.sleep(0)
        for room in self.hub.streaming():
            if may_go(room):
                for stream in room.streams.copy():
                    stream.close(CloseCode.GOING_AWAY, self.come_back())

    def _misses_nothing(self, room: Room) -> bool:
        """Whether its watchers can be sent away: the close is not near, nor has been with its farewell on the way."""
        if room.is_over:
            return room not in self._farewells
        return not _ends_soon(room, self.hub.clock.now_ms())

    def come_back(self) -> str:
        """The reason of a farewell while draining: when to come back, spread by jitter."""
        return orjson.dumps({"retry_after_ms": RETRY_AFTER_MS, "jitter_ms": JITTER_MS}).decode()

    async def watch_over(self) -> None:
        """Look at every socket once in a while, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S * random.uniform(0.9, 1.1))  # noqa: S311 - so that processes do not march
            self._look()

    def _look(self) -> None:
        now_ns = self.now_ns()
        away_ns = self._away_ns(now_ns)
        self._part_with_expired()
        lagging_max_ns = self._settings.outbox_age_max_ms * _NS
        for connection in self._connections.copy():
            if connection.room is None:
                continue
            if away_ns:
                connection.excuse(away_ns, now_ns)
            if connection in connection.room.lagging:
                if now_ns - connection.lagging_since_ns > lagging_max_ns:
                    connection.close(CloseCode.SLOW_CONSUMER, "read faster, or come back with since")
            elif connection.pinged_at_ns:
                if now_ns - connection.pinged_at_ns >= ANSWER_WITHIN_MS * _NS:
                    connection.close(CloseCode.HEARTBEAT_MISSED, "no answer to a ping")
            elif now_ns - connection.last_heard_ns > PING_AFTER_MS * _NS:
                connection.ping()

    def _away_ns(self, now_ns: int) -> int:
        """For how long this process stood still since the last look; 0 if it did not."""
        late_ns = now_ns - self._looked_ns - round(LOOK_EVERY_S * 1_000 * _NS)
        self._looked_ns = now_ns
        return late_ns if late_ns > LOOK_LATE_MS * _NS else 0

    def _part_with_expired(self) -> None:
        """Close what a token has expired under, except where the end is near: nobody must miss it over a renewal."""
        if self.tokens is None:
            return
        now = self.hub.clock.now_ms()
        watchers: list[Connection | EventStream] = [*self._connections, *self._streams]
        for watcher in watchers:
            room = watcher.room
            if room is not None and watcher.principal.is_expired(now) and not _ends_soon(room, now):
                watcher.close(CloseCode.TOKEN_EXPIRED, "the token has expired: renew it, and come back with since")


def _ends_soon(room: Room, now: EpochMs) -> bool:
    """Whether an auction is in its last minute, or over."""
    running = room.timer["status"] != Status.PAUSED
    return room.is_over or (running and room.timer["ends_at"] - now <= LAST_MINUTE_MS)
