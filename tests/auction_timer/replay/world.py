"""A server for the replay to play against, on virtual time: real rules for events, the real fold, faults on demand."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import orjson

from auction_timer.client import Frame, TimerSession, UnknownAuctionError
from engine.clock import Clock
from engine.contract.frames import TIMER_ENDED, announce, is_frame
from engine.contract.intake import SCHEDULER
from engine.contract.timers import TimerRecord, timer
from engine.domain.auction import Auction
from engine.domain.decide import Decision
from engine.domain.events import Bid, InputEvent
from engine.domain.fold import elapse, fold
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from gateway.events import parse_events
from tests.fakes.clock import ManualClock, Timeline


@dataclass
class Faults:
    """What this server does wrong; nothing, unless told."""

    ready: bool = True
    away_posts: int = 0
    """So many posts are answered 503."""
    unknown_handshakes: int = 0
    """So many handshakes come before the engine has read the registration."""
    deaf: bool = False
    """Bids are taken and never applied."""
    ends_twice: bool = False
    early_ms: int = 0
    """`timer.ended` says it was sent so much before the end."""
    never_ends: str = ""
    """This auction does not end."""
    generous_ms: int = 0
    """Every extension is longer than the rules say, and ends later by so much."""
    gap: bool = False
    """Sockets say that they missed something, and the end comes in a snapshot."""
    no_timers: bool = False
    date: str | None = None


@dataclass
class World:
    """The server: intake, engine and gateway in one."""

    timeline: Timeline
    faults: Faults = field(default_factory=Faults)
    posts: list[int] = field(default_factory=list)
    """How many events each post brought."""

    def __post_init__(self) -> None:
        self.authority = ManualClock(self.timeline, seed=99)
        self.auctions: dict[str, Auction] = {}
        self.rooms: dict[str, list[asyncio.Queue[Frame]]] = {}
        self.seen: dict[str, EpochMs] = {}
        self._serial = 0

    @property
    def now(self) -> EpochMs:
        """The auction clock."""
        return self.authority.wall_ms()

    # HTTP.

    def transport(self) -> httpx.MockTransport:
        """What `Api` talks to."""
        return httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/readyz":
            headers = {"Date": self.faults.date} if self.faults.date else {}
            checks = {"redis": "ok", "engine": "ok" if self.faults.ready else "silent"}
            status = 200 if self.faults.ready else 503
            return httpx.Response(status, json={"ready": self.faults.ready, "checks": checks}, headers=headers)
        if path == "/events":
            return self._post(request.content)
        if self.faults.no_timers:
            return httpx.Response(500, json={"error_code": "INTERNAL_ERROR", "detail": "it broke"})
        auction = self._elapse(path.split("/")[2])
        return httpx.Response(200, content=orjson.dumps(timer(TimerRecord(auction), self.now, None)))

    def _post(self, body: bytes) -> httpx.Response:
        if self.faults.away_posts:
            self.faults.away_posts -= 1
            return httpx.Response(503)
        events = parse_events(body, correlation_id="c", traceparent=None, new_trace_id=lambda: "t")
        self.posts.append(len(events))
        results = []
        for event in events:
            event_id, auction_id = event.context.event_id, event.auction_id
            assert auction_id is not None
            status = "duplicate" if event_id in self.seen else "accepted"
            if status == "accepted":
                self.seen[event_id] = self.now
                self._apply(auction_id, event.event)
            results.append({"id": event_id, "status": status, "arrival_ms": self.seen[event_id]})
        return httpx.Response(202, json={"results": results})

    # The engine.

    def _apply(self, auction_id: str, event: InputEvent) -> None:
        if self.faults.deaf and isinstance(event, Bid):
            return
        auction = self.auctions.get(auction_id, Auction(auction_id))
        for decision in fold(auction, event, self.now):
            self._take(decision)
        self._wake(auction_id)

    def _take(self, decision: Decision) -> None:
        after = decision.after
        if self.faults.generous_ms and after.extension_count > decision.before.extension_count:
            after = replace(after, ends_at=EpochMs(after.ends_at + self.faults.generous_ms))
            decision = replace(decision, after=after)
        self.auctions[after.auction_id] = after
        for update in announce(
            decision, TimerRecord(after), actor=SCHEDULER, trace_id="t", correlation_id="c", now=self.now
        ):
            if is_frame(update.type):
                self._send(after.auction_id, orjson.loads(update.body))

    def _send(self, auction_id: str, frame: Frame) -> None:
        self._serial += 1
        frame |= {"cursor": f"0.{self._serial}-0", "server_time": self.now}
        times = 1
        if frame["type"] == TIMER_ENDED:
            frame["server_time"] = max(self.now, frame["timer"]["ends_at"]) - self.faults.early_ms
            times = 2 if self.faults.ends_twice else 1
        for room in self.rooms.get(auction_id, []):
            for _ in range(times):
                room.put_nowait(frame)

    def _elapse(self, auction_id: str) -> Auction:
        auction = self.auctions[auction_id]
        if auction_id != self.faults.never_ends:
            for decision in elapse(auction, self.now):
                self._take(decision)
        return self.auctions[auction_id]

    def _wake(self, auction_id: str) -> None:
        """Look again at the end that stands; a later one has its own look."""
        left_ms = self.auctions[auction_id].ends_at - self.now
        asyncio.get_running_loop().call_later(left_ms / 1_000, self._elapse, auction_id)

    # Sockets.

    async def watch(
        self, _url: str, auction_id: str, *, session: TimerSession, clock: Clock, **_bounds: Any
    ) -> AsyncGenerator[Frame, None]:
        """Stands in for `watch_auction`."""
        if self.faults.unknown_handshakes:
            self.faults.unknown_handshakes -= 1
            raise UnknownAuctionError("http://world", auction_id)
        queue: asyncio.Queue[Frame] = asyncio.Queue()
        self.rooms.setdefault(auction_id, []).append(queue)
        session.connected(clock.monotonic_ns())
        yield self._receive(session, clock, self._snapshot(auction_id, recovered=None))
        while not session.is_over:
            frame = await queue.get()
            if self.faults.gap and frame["type"] == TIMER_ENDED:
                session.connected(clock.monotonic_ns())
                frame = self._snapshot(auction_id, recovered=False)
            yield self._receive(session, clock, frame)
        while not queue.empty():
            yield self._receive(session, clock, queue.get_nowait())

    def _receive(self, session: TimerSession, clock: Clock, frame: Frame) -> Frame:
        session.receive(frame, clock.monotonic_ns())
        return frame

    def _snapshot(self, auction_id: str, *, recovered: bool | None) -> Frame:
        view = timer(TimerRecord(self.auctions[auction_id]), self.now, None)
        return {
            "type": "timer.snapshot",
            "cursor": f"0.{self._serial}-0",
            "server_time": self.now,
            "recovered": recovered,
            "heartbeat_ms": 20_000,
            "timer": view,
        }


def all_ended(world: World) -> bool:
    """Whether every auction of the server is over."""
    return all(auction.status is Status.ENDED for auction in world.auctions.values())
