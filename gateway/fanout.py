"""Fan-out: one frame to everyone in a room, without letting one crowded room delay the others.

Writing to a socket costs microseconds, so ten thousand of them cost the better part of a tenth of a second, in which nothing
else would happen. So writes are done in turns of at most `TURN` per pass of the event loop:

    frames ─▶ the rooms' queues ─▶ rooms take turns, `CHUNK` writes each: at once (`write`) while there is turn left,
                                   then in the passes that follow

An event stream takes part as a socket does, and counts for `STREAM_WRITES`: what it is given wakes a task, which writes it
through HTTP in the pass that follows.

What a subscriber is to be sent, and has been written nothing of yet, goes out together, in one write: a bid is told as two
events and a tick, and a write costs the same for one frame as for three. Frames of one room stay in their order
for every subscriber. Of ticks that were not begun the newest stays, if no event came after it: an event tells more. Events
are never left out; what reads them from Redis waits while too many writes are outstanding (`relieved`).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gateway.room import Frame, Room, Stream, Subscriber

TURN: Final = 512
"""Writes per pass of the event loop: about 4 ms."""
CHUNK: Final = 128
"""Writes of one room before it is another one's turn."""
STREAM_WRITES: Final = 10
"""Writes to a socket that cost as much as one to an event stream."""
OUTSTANDING_MAX: Final = 200_000
"""Writes that may wait before no more events are taken in: about a second of work."""


@dataclass(slots=True)
class Job:
    """Frames on their way to those who were in the room when they came: events, then perhaps a tick."""

    sockets: list[Subscriber]
    streams: list[Stream]
    events: list[Frame] = field(default_factory=list)
    tick: Frame | None = None
    done: list[Callable[[], None]] = field(default_factory=list)
    tick_done: Callable[[], None] | None = None
    """Called as those are, unless the tick is replaced."""
    at: int = 0
    """How many were served: the sockets first."""
    whole: bytes = b""
    """What is written to each socket, from the first write on."""

    @property
    def frames(self) -> int:
        """How many frames each is sent."""
        return len(self.events) + (self.tick is not None)

    @property
    def writes(self) -> int:
        """How many writes a frame to everyone is."""
        return len(self.sockets) + STREAM_WRITES * len(self.streams)

    @property
    def everyone(self) -> int:
        """How many they are."""
        return len(self.sockets) + len(self.streams)

    def split(self) -> "tuple[Job, Job]":
        """Who has yet to be served, and what; and those who were, for what comes now."""
        streams_at = max(0, self.at - len(self.sockets))
        left = Job(self.sockets[self.at :], self.streams[streams_at:], self.events.copy(), self.tick, self.done)
        return left, Job(self.sockets[: self.at], self.streams[:streams_at])

    def conflate(self) -> None:
        """Leave the tick out: something newer came."""
        self.tick = self.tick_done = None


class Fanout:
    """Writes frames to rooms.

    Args:
        conflated: told how many watchers will not get a tick, because something newer took its place in a queue.
    """

    def __init__(self, conflated: Callable[[int], None]) -> None:
        self._conflated = conflated
        self._queues: dict[Room, deque[Job]] = {}
        self._turns: deque[Room] = deque()
        self._left = TURN
        self._passing = False
        self._outstanding = 0
        self._relieved = asyncio.Event()
        self._relieved.set()

    def send(self, room: Room, frame: Frame, *, is_tick: bool, done: Callable[[], None] | None = None) -> None:
        """Send a frame to everyone in a room, at the next `write`.

        `done` is called when the last one has been given it; for a tick that is replaced by something newer, never.
        """
        jobs = self._open_jobs(room, [*room.writable, *room.lagging], [*room.streams])
        for job in jobs:
            if job.tick is not None:
                self._outstanding -= job.writes
                self._conflated(job.everyone)
                job.conflate()
            if is_tick:
                job.tick = frame
            else:
                job.events.append(frame)
            self._outstanding += job.writes
        if is_tick:
            jobs[-1].tick_done = done
        elif done is not None:
            jobs[-1].done.append(done)
        if self._outstanding > OUTSTANDING_MAX:
            self._relieved.clear()
        self._pass_soon()

    def _open_jobs(self, room: Room, sockets: list[Subscriber], streams: list[Stream]) -> list[Job]:
        """The jobs that take one more frame for these watchers, in their order in the room's queue."""
        queue = self._queues.get(room)
        if queue is None:
            queue = self._queues[room] = deque()
            self._turns.append(room)
        elif queue[-1].sockets == sockets and queue[-1].streams == streams:
            if not queue[-1].at:
                return [queue[-1]]
            # It is half-way: who waits for it is written both at once, then the others what they lack.
            left, served = queue.pop().split()
            queue += left, served
            return [left, served]
        queue.append(Job(sockets, streams))
        return [queue[-1]]

    def is_sending(self, room: Room) -> bool:
        """Whether somebody in the room is still to be sent something."""
        return room in self._queues

    def is_telling(self, room: Room) -> bool:
        """Whether the last that was sent to the room is an event, and not everyone has been written it yet."""
        return room in self._queues and bool(self._queues[room][-1].events)

    async def relieved(self) -> None:
        """Wait until few enough writes are outstanding."""
        await self._relieved.wait()

    def _pass_soon(self) -> None:
        if not self._passing:
            self._passing = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        """One pass of the event loop: the turn is whole again."""
        self._passing = False
        self._left = TURN
        self.write()
        if self._turns:
            self._pass_soon()

    def write(self) -> None:
        """Write what there is turn for; rooms with a queue share it."""
        while self._turns and self._left > 0:
            room = self._turns.popleft()
            queue = self._queues[room]
            job = queue[0]
            written = _advance(room, job, min(CHUNK, self._left))
            self._left -= max(1, written)
            self._outstanding -= written * job.frames
            if job.at >= job.everyone:
                queue.popleft()
                for done in [*job.done, job.tick_done]:
                    if done is not None:
                        done()
            if queue:
                self._turns.append(room)
            else:
                del self._queues[room]
        if self._outstanding <= OUTSTANDING_MAX // 2:
            self._relieved.set()


def _advance(room: Room, job: Job, writes: int) -> int:
    """Serve the next of a job, with about so many writes; how many there were."""
    at, sockets = job.at, len(job.sockets)
    if at < sockets:
        job.at = min(at + writes, sockets)
        _write(room, job, job.sockets[at : job.at])
        return job.at - at
    job.at = min(at + max(1, writes // STREAM_WRITES), job.everyone)
    _hand(room, job, job.streams[at - sockets : job.at - sockets])
    return STREAM_WRITES * (job.at - at)


def _write(room: Room, job: Job, sockets: list[Subscriber]) -> None:
    if not job.whole:
        job.whole = b"".join(frame.socket for frame in (*job.events, job.tick) if frame is not None)
    writable, lagging = room.writable, room.lagging
    for subscriber in sockets:
        # Whoever began to lag, or to read again, since the frame came is served as it stands now; whoever left, not at all.
        if subscriber in writable:
            subscriber.send(job.whole)
            continue
        for event in job.events:
            if subscriber in lagging:  # what is too much for it sends it away
                subscriber.keep_event(event.socket)
        if job.tick is not None and subscriber in lagging:
            subscriber.keep_tick(job.tick.socket)


def _hand(room: Room, job: Job, streams: list[Stream]) -> None:
    # Frame by frame, because a frame is made into text for the first stream and remembered for the next ones.
    for event in job.events:
        for stream in streams:
            if stream in room.streams:  # as above
                stream.event(event)
    if job.tick is not None:
        for stream in streams:
            if stream in room.streams:
                stream.tick(job.tick)
