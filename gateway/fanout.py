"""Fan-out: one frame to everyone in a room, without letting one crowded room delay the others.

Writing to a socket costs microseconds, so ten thousand of them cost the better part of a tenth of a second, in which nothing
else would happen. So writes are done in turns of at most `TURN` per pass of the event loop:

    a frame for a small room, while there is turn left and nothing waits there  ─▶ written at once
    any other frame ─▶ the room's queue ─▶ rooms take turns, `CHUNK` writes each, in the passes that follow

Frames of one room stay in their order for every subscriber, whichever way they go. Ticks in a queue conflate: a tick that
nobody has been sent yet is replaced by the newer one. Events never are; what reads them from Redis waits while too many
writes are outstanding (`relieved`).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gateway.room import Frame, Room, Subscriber

TURN: Final = 512
"""Writes per pass of the event loop: about 4 ms."""
CHUNK: Final = 128
"""Writes of one room before it is another one's turn."""
OUTSTANDING_MAX: Final = 200_000
"""Writes that may wait before no more events are taken in: about a second of work."""


@dataclass(slots=True)
class Job:
    """A frame on its way to those who were in the room when it came."""

    frame: Frame
    is_tick: bool
    targets: list[Subscriber]
    done: Callable[[], None] | None
    at: int = 0


class Fanout:
    """Writes frames to rooms.

    Args:
        conflated: told how many subscribers will not get a tick, because a newer one took its place in a queue.
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
        """Send a frame to everyone in a room; `done` is called when the last one has been written."""
        if room not in self._queues and room.size <= self._left:
            self._left -= room.size
            self._pass_soon()
            room.deliver(frame, is_tick=is_tick)
            if done is not None:
                done()
        else:
            self._queue(room, Job(frame, is_tick, [*room.writable, *room.lagging], done))
            room.deliver_to_streams(frame, is_tick=is_tick)

    def _queue(self, room: Room, job: Job) -> None:
        queue = self._queues.get(room)
        if queue is None:
            queue = self._queues[room] = deque()
            self._turns.append(room)
        if job.is_tick and queue and queue[-1].is_tick and not queue[-1].at:
            replaced = queue.pop()
            self._outstanding -= len(replaced.targets)
            self._conflated(len(replaced.targets))
        queue.append(job)
        self._outstanding += len(job.targets)
        if self._outstanding > OUTSTANDING_MAX:
            self._relieved.clear()
        self._pass_soon()

    def is_sending(self, room: Room) -> bool:
        """Whether somebody in the room is still to be sent something."""
        return room in self._queues

    async def relieved(self) -> None:
        """Wait until few enough writes are outstanding."""
        await self._relieved.wait()

    def _pass_soon(self) -> None:
        if not self._passing:
            self._passing = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        """One pass of the event loop: the turn is whole again, and rooms with a queue share it."""
        self._passing = False
        self._left = TURN
        while self._turns and self._left > 0:
            room = self._turns.popleft()
            queue = self._queues[room]
            written = _advance(room, queue[0], min(CHUNK, self._left))
            self._left -= max(1, written)
            self._outstanding -= written
            if queue[0].at >= len(queue[0].targets):
                job = queue.popleft()
                if job.done is not None:
                    job.done()
            if queue:
                self._turns.append(room)
            else:
                del self._queues[room]
        if self._outstanding <= OUTSTANDING_MAX // 2:
            self._relieved.set()
        if self._turns:
            self._pass_soon()


def _advance(room: Room, job: Job, count: int) -> int:
    """Write a job's frame to its next `count` targets; how many there were."""
    targets = job.targets[job.at : job.at + count]
    job.at += len(targets)
    writable, lagging, data = room.writable, room.lagging, job.frame.socket
    for subscriber in targets:
        # Whoever began to lag, or to read again, since the frame came is served as it stands now; whoever left, not at all.
        if subscriber in writable:
            subscriber.send(data)
        elif subscriber in lagging:
            if job.is_tick:
                subscriber.keep_tick(data)
            else:
                subscriber.keep_event(data)
    return len(targets)
