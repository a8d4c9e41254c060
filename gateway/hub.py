"""The hub: rooms, and the two lanes that feed them.

What a gateway knows of an auction is loaded once, on the first demand, together with the place in the event lane as of
which it stands so; from then on the event lane keeps it current, whether anybody watches or not. So ten thousand sockets
that reconnect, and a thousand clients that poll, cost Redis one read in all.
"""

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import orjson
import structlog

from engine.clock import AuctionClock
from engine.contract.cursors import Cursor, stream_order
from engine.contract.frames import is_frame
from engine.contract.keys import shard_of
from engine.contract.timers import CorruptTimerError, as_of, timer
from engine.store.protocol import UpdateEntry, ViewStore
from gateway.closing import CloseCode
from gateway.fanout import Fanout
from gateway.metrics import EVENT_LANE, TICK_LANE, GatewayMetrics
from gateway.recall import Recall, Recalled
from gateway.replay import NOTHING, Greeting, Stretch, Stretches, Turns, is_too_much
from gateway.ring import Event, Ring
from gateway.room import Frame, Room

ROOMS_MAX: Final = 50_000
"""Auctions remembered; the longest unused ones that nobody watches are forgotten. About 2 kB each."""
REPLAY_TURN: Final = 8_388_608
"""What resumes may cost in one pass of the event loop, counted in bytes that are written: about 5 ms."""
GREETING_COST: Final = 131_072
FRAME_COST: Final = 65_536
"""A snapshot takes as long as the writing of so many bytes, and a frame that nobody was sent before as long as of so many."""
FRAMES_AT_ONCE: Final = 32
CATCH_UP_S: Final = 0.5
"""A room that was loaded ahead of the event lane is opened when the lane was read so far: some ms, at most this."""
ANNOUNCE_AT_MS: Final = (600_000, 300_000, 60_000, 10_000)
"""Remaining times worth announcing to a person who cannot see the digits (WAI-ARIA `timer` is silent by itself)."""
HEARTBEAT_MS: Final = 20_000
"""A client that hears nothing for this long, not even a tick, may suspect its connection. Ticks are 15 s apart at most."""

STAMP: Final = re.compile(rb'"server_time":([0-9]{1,16})')
STAMP_WITHIN: Final = 256
"""It stands behind the type and the id of the auction."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entrance:
    """Where somebody may come in, and with what: to be greeted before the event loop passes on.

    Attributes:
        since: the cursor that was brought.
        recalled: what was looked up for it.
    """

    room: Room
    since: str | None
    recalled: Recalled | None = None


class Hub:
    """All rooms of one gateway process."""

    def __init__(self, store: ViewStore, clock: AuctionClock, shards: int, metrics: GatewayMetrics) -> None:
        self._store = store
        self._shards = shards
        self._metrics = metrics
        self._rooms: OrderedDict[bytes, Room] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Room | None]] = {}
        self._held: dict[str, list[tuple[UpdateEntry, Event]]] = {}
        self._rings = {shard: Ring() for shard in range(shards)}
        self._recall = Recall(store, self._rings)
        self._stretches = Stretches()
        self._turns = Turns(REPLAY_TURN)
        self.clock = clock
        self.fanout = Fanout(metrics.conflated_ticks.inc)
        self._moved = asyncio.Event()
        self.is_followed = False
        """Whether somebody reads the event lane."""
        self.positions: dict[int, str] = {}
        """How far the event lane was read, per shard."""
        self.engine_seen: dict[int, int] = {}
        """When each shard's engine was last heard, on the auction clock, in ms."""
        self.stale: Callable[[], bool] = lambda: False
        """Whether the event lane is out of reach, so that what is remembered may be old."""
        self.on_over: Callable[[Room], None] = lambda _room: None

    def start_at(self, shard: int, stream_id: str) -> None:
        """The event lane of a shard will be read from here."""
        self.positions[shard] = stream_id
        self._rings[shard].start_at(stream_id)

    # Loading.

    async def room(self, auction_id: str) -> Room | None:
        """The room of an auction, loaded if need be; None if there is no such auction.

        Raises:
            StoreUnavailableError: it is not in memory, and Redis does not answer.
        """
        key = auction_id.encode()
        known = self._rooms.get(key)
        if known is not None:
            self._rooms.move_to_end(key)
            return known
        loading = self._loading.get(auction_id)
        if loading is None:
            loading = self._loading[auction_id] = asyncio.create_task(self._load(auction_id))
            loading.add_done_callback(lambda _done: self._loading.pop(auction_id, None))
        room = await asyncio.shield(loading)
        if room is not None and self._rooms.get(key) is not room:
            # Dropped again before we came to look: nothing would reach whoever stays in it.
            return await self.room(auction_id)
        return room

    def known(self, auction_id: str) -> Room | None:
        """The room of an auction if it is in memory."""
        return self._rooms.get(auction_id.encode())

    def watched(self) -> list[Room]:
        """The rooms that somebody is in."""
        return [room for room in self._rooms.values() if room.is_watched]

    def streaming(self) -> list[Room]:
        """The rooms that somebody watches otherwise than by a socket."""
        return [room for room in self._rooms.values() if room.streams]

    async def _load(self, auction_id: str) -> Room | None:
        shard = shard_of(auction_id, self._shards)
        held = self._held[auction_id] = []
        try:
            view = await self._store.view(shard, auction_id)
            if view.record is None or not view.record.auction.status.is_public:
                return None
            await self._catch_up(shard, view.stream_id)
        finally:
            del self._held[auction_id]
        room = Room(auction_id, shard)
        room.loaded_order = stream_order(view.stream_id)
        room.show(timer(view.record, self.clock.now_ms(), None))
        self._rooms[auction_id.encode()] = room
        # What came while we were asking: part of the view, or newer than it.
        for entry, event in held:
            self._apply(room, entry, event)
        self._forget_unused()
        return room

    async def _catch_up(self, shard: int, stream_id: str) -> None:
        """Wait, within a bound, until the event lane was read up to a place.

        Who comes back into a room that is ahead of the lane cannot be told what lies between. A gateway that starts in the
        midst of a storm would say so to everyone who had watched the one before it.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_S):
                while self.is_followed and stream_order(self.positions[shard]) < stream_order(stream_id):
                    await self._moved.wait()

    def _forget_unused(self) -> None:
        if len(self._rooms) <= ROOMS_MAX:
            return
        unwatched = (key for key, room in self._rooms.items() if not room.is_watched)
        for key in list(islice(unwatched, len(self._rooms) // 10)):
            del self._rooms[key]

    async def reload(self, shard: int, cause: str) -> None:
        """The event lane of a shard went back or was lost: read its rooms anew and tell everyone who watches."""
        for key, room in list(self._rooms.items()):
            if room.shard != shard or self._rooms.get(key) is not room:
                continue
            if not room.is_watched:
                del self._rooms[key]
                continue
            try:
                view = await self._store.view(shard, room.auction_id)
            except CorruptTimerError:
                log.exception("timer_unreadable", shard=shard, auction_id=room.auction_id)
                continue
            if self._rooms.get(key) is not room:
                continue  # its last watcher left while we asked, and it was forgotten
            if view.record is None or not view.record.auction.status.is_public:
                # A failover took the auction's registration back: there is nothing to watch until it is sent again.
                del self._rooms[key]
                room.part(CloseCode.FEED_LOST, "the auction is not known any more; come back later")
                continue
            room.version = 0
            # What the lane holds behind our place is still sent, though the view has seen some of it: no bid may be lost.
            room.loaded_order = stream_order(self.positions[shard])
            now = self.clock.now_ms()
            room.show(timer(view.record, now, None))
            cursor = str(Cursor(shard, self.positions[shard]))
            body = {
                "type": "timer.resynced",
                "auction_id": room.auction_id,
                "cursor": cursor,
                "server_time": now,
                "trace_id": room.timer["trace_id"],
                "cause": cause,
                "timer": as_of(room.timer, now, cursor),
            }
            self.fanout.send(room, Frame(orjson.dumps(body), cursor), is_tick=False)
            self.fanout.write()
            if room.is_over:
                self.on_over(room)

    # The event lane.

    def on_updates(self, shard: int, entries: Sequence[UpdateEntry]) -> None:
        """Take entries of the event lane, in order."""
        ring = self._rings[shard]
        for entry in entries:
            self.positions[shard] = entry.stream_id
            if not is_frame(entry.type):
                ring.pass_by(entry.stream_id)
                continue
            event = Event(entry)
            ring.append(event)
            if (held := self._held.get(entry.auction_id)) is not None:
                held.append((entry, event))
            room = self._rooms.get(entry.auction_id.encode())
            if room is not None:
                self._apply(room, entry, event)
        self.fanout.write()
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _apply(self, room: Room, entry: UpdateEntry, event: Event) -> None:
        if event.order <= room.loaded_order:
            return
        body = self._body(room.shard, event.order, entry.body)
        if body is None:
            event.become(None)
            return
        was_over = room.is_over
        if "timer" in body:
            room.show(body["timer"])
        if room.is_watched:
            frame = Frame(orjson.dumps(body), body["cursor"])
            event.become(frame)
            self.fanout.send(room, frame, is_tick=False, done=self._delivered(EVENT_LANE, body["committed_at"]))
        if room.is_over and not was_over:
            self.on_over(room)

    def _delivered(self, lane: str, since: int) -> Callable[[], None]:
        """Measure, when a fan-out is done, how long it has taken since a server time."""
        return lambda: self._metrics.delivery_ms[lane].observe(max(0, self.clock.now_ms() - since))

    def _body(self, shard: int, place: tuple[int, int], written: bytes) -> dict[str, Any] | None:
        """An entry as the frame that is made now: with its cursor, and the time of making."""
        now = self.clock.now_ms()
        cursor = _cursor(shard, place)
        try:
            body: dict[str, Any] = orjson.loads(written)
            body["committed_at"] = body.get("server_time", now)
            body["cursor"] = cursor
            body["server_time"] = now
            if "timer" in body:
                body["timer"] = as_of(body["timer"], now, cursor)
        except (ValueError, TypeError, KeyError, AttributeError):
            log.exception("update_unreadable", shard=shard, cursor=cursor)
            return None
        return body

    # Coming in.

    def entrance_now(self, auction_id: str, since: str | None) -> Entrance | None:
        """Where somebody may come in; None if that must be waited for."""
        room = self.known(auction_id)
        if room is None:
            return None
        if since is None:
            return Entrance(room, None)
        if self._is_forgotten(room.shard, self._place(room, since)):
            return None
        missed = self._missed(room, since, None)
        frames = len(missed.unmade) if missed is not None else 0
        if frames > FRAMES_AT_ONCE or not self._turns.take(_cost(missed) + frames * FRAME_COST):
            return None
        return Entrance(room, since)

    async def entrance(self, auction_id: str, since: str | None) -> Entrance | None:
        """Where somebody may come in, when it is its turn and what it missed is in memory; None if there is no such auction.

        Raises:
            StoreUnavailableError: the auction is not in memory, and Redis does not answer.
        """
        while (room := await self.room(auction_id)) is not None:
            if since is None:
                return Entrance(room, None)
            recalled, behind = None, self._place(room, since)
            if behind is not None and self._is_forgotten(room.shard, behind):
                recalled = await self._recall.events(room.shard, auction_id, behind)
            missed = self._missed(room, since, recalled)
            while missed is not None and missed.unmade:
                await self._turns.taken(FRAMES_AT_ONCE * FRAME_COST)
                self._make(room.shard, missed, FRAMES_AT_ONCE)
            await self._turns.taken(_cost(missed))
            if self.known(auction_id) is room:
                return Entrance(room, since, recalled)
        return None

    def _is_forgotten(self, shard: int, behind: tuple[int, int] | None) -> bool:
        """Whether a place is older than what is remembered, so that it must be looked up."""
        return behind is not None and behind < self._rings[shard].complete_from and not self.stale()

    def _place(self, room: Room, since: str | None) -> tuple[int, int] | None:
        """The place that a cursor names; None if nothing can be promised from there."""
        cursor = None if since is None else Cursor.parse(since)
        if cursor is None or cursor.shard != room.shard:
            return None
        place = stream_order(cursor.stream_id)
        position = stream_order(self.positions[room.shard])
        # A room that was loaded ahead of the lane is not sent what lies between: until that is read, nothing can be promised.
        return None if place > position or room.loaded_order > position else place

    def _missed(self, room: Room, since: str | None, recalled: Recalled | None) -> Stretch | None:
        """The events of an auction behind a cursor; None if they are not all known, or too many."""
        behind, older = self._place(room, since), list[Event]()
        if behind is None:
            return None
        ring = self._rings[room.shard]
        if recalled is not None and recalled.history == ring.histories:
            behind, older = recalled.upto, recalled.events
        newer = ring.since(room.auction_id, behind)
        if newer is None:
            return None
        missed = self._stretches.of(older + newer)
        return None if is_too_much(missed.size) else missed

    def _make(self, shard: int, stretch: Stretch, count: int) -> None:
        """Make the next of a stretch into frames, unless somebody has meanwhile."""
        for event in stretch.unmade[-count:]:
            if event.body is not None:
                body = self._body(shard, event.order, event.body)
                event.become(None if body is None else Frame(orjson.dumps(body), body["cursor"]))
        del stretch.unmade[-count:]

    def timer(self, room: Room) -> dict[str, Any]:
        """The auction's timer as of now."""
        # A room that is ahead of the lane is not sent what lies between.
        place = max(stream_order(self.positions[room.shard]), room.loaded_order)
        return as_of(room.timer, self.clock.now_ms(), _cursor(room.shard, place), stale=self.stale())

    def greeting(self, room: Room, since: str | None, recalled: Recalled | None = None) -> Greeting:
        """The first frames for a client: the snapshot, then what it missed since its cursor, if that is still known."""
        missed = self._missed(room, since, recalled)
        recovered = None if since is None else missed is not None
        if recovered is not None:
            self._metrics.resumes[recovered].inc()
        if missed is not None:
            self._make(room.shard, missed, len(missed.unmade))
        view = self.timer(room)
        snapshot = {
            "type": "timer.snapshot",
            "auction_id": room.auction_id,
            "cursor": view["cursor"],
            "server_time": view["server_time"],
            "trace_id": view["trace_id"],
            "timer": view,
            "recovered": recovered,
            "heartbeat_ms": HEARTBEAT_MS,
            "announce_at_ms": ANNOUNCE_AT_MS,
        }
        return Greeting(Frame(orjson.dumps(snapshot), view["cursor"]), recovered, missed or NOTHING)

    # The tick lane.

    def on_ticks(self, shard: int, payload: bytes) -> None:
        """Take one message of the tick lane: lines that are split and passed on, never parsed.

        But for the stamp of the first that somebody watches: the lines of a message were made together.
        """
        rooms, done = self._rooms, None
        for line in payload.split(b"\n"):
            auction_id, _, rest = line.partition(b" ")
            if auction_id == b"!":
                if rest.rpartition(b" ")[2].isdigit():
                    self.engine_seen[shard] = self.clock.now_ms()
                continue
            room = rooms.get(auction_id)
            if room is not None and room.is_watched:
                version, _, tick = rest.partition(b" ")
                if version.isdigit():
                    done = done or self._tick_delivered(tick)
                    self.tick(room, int(version), tick, done)
        self.fanout.write()

    def _tick_delivered(self, tick: bytes) -> Callable[[], None] | None:
        stamp = STAMP.search(tick, 0, STAMP_WITHIN)
        return None if stamp is None else self._delivered(TICK_LANE, int(stamp[1]))

    def tick(self, room: Room, version: int, payload: bytes, done: Callable[[], None] | None = None) -> None:
        """Send a tick to a room at the next `fanout.write`, unless the event lane already told something newer.

        Or is telling it: an event has the whole timer, and a second write to each of a crowd would say nothing new.
        """
        if version == room.version and self.fanout.is_telling(room):
            self._metrics.conflated_ticks.inc(len(room.writable) + len(room.lagging) + len(room.streams))
        elif version >= room.version:
            self.fanout.send(room, Frame(payload), is_tick=True, done=done)


def _cursor(shard: int, place: tuple[int, int]) -> str:
    return str(Cursor(shard, f"{place[0]}-{place[1]}"))


def _cost(missed: Stretch | None) -> int:
    return GREETING_COST + (missed.size if missed is not None else 0)
