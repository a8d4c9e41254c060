"""Fan-out: one frame to everyone in a room, without letting one crowded room delay the others.

Writing to a socket costs microseconds, so ten thousand of them cost the better part of a tenth of a second, in which nothing
else would happen. So writes are done in turns of at most `TURN` per pass of the event loop:

    frames ─▶ the rooms' queues ─▶ rooms take turns, `CHUNK` writes each: at once (`write`) while there is turn left,
                                   then in the passes that follow

What a subscriber is to be sent, and has been written nothing of yet, goes out together, in one write: a bid is told as two
events and a tick, and a write costs the same for one frame as for three. Frames of one room stay in their order
for every subscriber. Of ticks that were not begun the newest stays, if no event came after it: an event tells more. Events
are never left out; what reads them from Redis waits while too many frames are outstanding (`relieved`).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gateway.room import Frame, Room, Subscriber

TURN: Final = 512
"""Writes per pass of the event loop: about 4 ms."""
CHUNK: Final = 128
"""Writes of one room before it is another one's turn."""
OUTSTANDING_MAX: Final = 200_000
"""Frames times sockets that may wait before no more events are taken in: about a second of work."""


@dataclass(slots=True)
class Job:
    """Frames on their way to those who were in the room when they came: events, then perhaps a tick."""

    targets: list[Subscriber]
    events: list[bytes] = field(default_factory=list)
    tick: bytes | None = None
    done: list[Callable[[], None]] = field(default_factory=list)
    at: int = 0
    whole: bytes = b""
    """What is written to each, from the first write on."""

    @property
    def frames(self) -> int:
        """How many frames each is sent."""
        return len(self.events) + (self.tick is not None)


class Fanout:
    """Writes frames to rooms.

    Args:
        conflated: told how many subscribers will not get a tick, because something newer took its place in a queue.
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
        """Send a frame to everyone in a room, at the next `write`; `done` is called when the last one has been written."""
        room.deliver_to_streams(frame, is_tick=is_tick)
        targets = [*room.writable, *room.lagging]
        for job in self._open_jobs(room, targets):
            if job.tick is not None:
                job.tick = None
                self._outstanding -= len(job.targets)
                self._conflated(len(job.targets))
            if is_tick:
                job.tick = frame.socket
            else:
                job.events.append(frame.socket)
        if done is not None:
            job.done.append(done)
        self._outstanding += len(targets)
        if self._outstanding > OUTSTANDING_MAX:
            self._relieved.clear()
        self._pass_soon()

    def _open_jobs(self, room: Room, targets: list[Subscriber]) -> list[Job]:
        """The jobs that take one more frame for these subscribers, in their order in the room's queue."""
        queue = self._queues.get(room)
        if queue is None:
            queue = self._queues[room] = deque()
            self._turns.append(room)
        elif queue[-1].targets == targets:
            last = queue[-1]
            if not last.at:
                return [last]
            # It is half-way: who waits for it is written both at once, then the others what they lack.
            queue[-1] = Job(targets[last.at :], last.events.copy(), last.tick, last.done)
            queue.append(Job(targets[: last.at]))
            return [queue[-2], queue[-1]]
        queue.append(Job(targets))
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
            if job.at >= len(job.targets):
                queue.popleft()
                for done in job.done:
                    done()
            if queue:
                self._turns.append(room)
            else:
                del self._queues[room]
        if self._outstanding <= OUTSTANDING_MAX // 2:
            self._relieved.set()


def _advance(room: Room, job: Job, count: int) -> int:
    """Write a job's frames to its next `count` targets; how many there were."""
    if not job.at:
        job.whole = b"".join(job.events if job.tick is None else [*job.events, job.tick])
    targets = job.targets[job.at : job.at + count]
    job.at += len(targets)
    writable, lagging = room.writable, room.lagging
    for subscriber in targets:
        # Whoever began to lag, or to read again, since the frame came is served as it stands now; whoever left, not at all.
        if subscriber in writable:
            subscriber.send(job.whole)
            continue
        for event in job.events:
            if subscriber in lagging:  # what is too much for it sends it away
                subscriber.keep_event(event)
        if job.tick is not None and subscriber in lagging:
            subscriber.keep_tick(job.tick)
    return len(targets)
