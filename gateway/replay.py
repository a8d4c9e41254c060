"""What a client that comes back is sent, built once for all who come back alike.

When a gateway is lost, everyone in an auction has missed the same: thousands of sockets ask for the same hundreds of events
at once. Each of these is made into a frame once (`gateway.ring.Event`); the frames are joined once (`Stretch`); and the
joined bytes are shared by all who are sent them, until the last of them has taken them. What is left per client is a
snapshot and a write. Those are done in turns (`Turns`), so that whoever did not go away is served in between.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from gateway.ring import Event
from gateway.room import Frame

REPLAY_BYTES_MAX: Final = 1_048_576
"""What is replayed to one client at once, as the engine wrote it. One that missed more is told so, and starts from the
snapshot."""
STRETCHES_MAX: Final = 64
SHARED_BYTES_MAX: Final = 16_777_216
"""Of stretches that are kept for the next one who asks, per gateway; in each form in which they are sent."""


def is_too_much(size: int) -> bool:
    """Whether so many bytes are not replayed."""
    return size > REPLAY_BYTES_MAX


class Stretch:
    """Events of one auction that somebody missed, in order."""

    __slots__ = ("_joined", "events", "size", "unmade")

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.size = sum(event.size for event in events)
        self.unmade = [event for event in events if event.body is not None]
        """Those that are to be made into frames yet, before `frames` or `joined` may be asked for."""
        self._joined: dict[Callable[[Frame], bytes], bytes] = {}

    @property
    def frames(self) -> list[Frame]:
        """The events as frames; one that could not be read is left out."""
        return [event.frame for event in self.events if event.frame is not None]

    def joined(self, form: Callable[[Frame], bytes]) -> bytes:
        """All frames in the form of a transport, one behind the other."""
        if form not in self._joined:
            self._joined[form] = b"".join(map(form, self.frames))
        return self._joined[form]


NOTHING: Final = Stretch([])


class Stretches:
    """The stretches that were asked for last."""

    def __init__(self) -> None:
        self._bytes = 0
        # By the first and the last event themselves: after a failover others may have the same places.
        self._known: OrderedDict[tuple[Event, Event], Stretch] = OrderedDict()

    def of(self, events: list[Event]) -> Stretch:
        """The stretch of these, all there are of their auction from the first to the last."""
        if not events:
            return NOTHING
        ends = events[0], events[-1]
        found = self._known.get(ends)
        if found is None:
            found = self._known[ends] = Stretch(events)
            self._bytes += _shared(found)
            while self._bytes > SHARED_BYTES_MAX or len(self._known) > STRETCHES_MAX:
                self._bytes -= _shared(self._known.popitem(last=False)[1])
        else:
            self._known.move_to_end(ends)
        return found


def _shared(stretch: Stretch) -> int:
    """What is too much is never joined, and only remembered to be it."""
    return 0 if is_too_much(stretch.size) else stretch.size


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first frames for a client: the snapshot, then what it missed.

    Attributes:
        recovered: as the snapshot says it.
    """

    snapshot: Frame
    recovered: bool | None
    missed: Stretch

    def __iter__(self) -> Iterator[Frame]:
        yield self.snapshot
        yield from self.missed.frames

    @property
    def socket(self) -> list[bytes]:
        """What is written to a socket; the second part is shared by all who missed the same."""
        return [self.snapshot.socket, self.missed.joined(_as_written)] if self.missed.events else [self.snapshot.socket]


def _as_written(frame: Frame) -> bytes:
    return frame.socket


class Turns:
    """So much work in each pass of the event loop. Who asks when it is done waits for a later one, in order."""

    def __init__(self, per_pass: int) -> None:
        self._per_pass = per_pass
        self._left = per_pass
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._renewing = False

    def take(self, cost: int) -> bool:
        """Whether it may be done in this pass: as long as something is left, whatever it costs."""
        if self._left <= 0:  # as it is as long as somebody waits
            return False
        self._spend(cost)
        return True

    async def taken(self, cost: int) -> None:
        """Wait until it may be done."""
        if not self.take(cost):
            may: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((cost, may))
            await may

    def _spend(self, cost: int) -> None:
        self._left -= cost
        if not self._renewing:
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._renewing = False
        self._left = self._per_pass
        while self._waiting and self._left > 0:
            cost, may = self._waiting.popleft()
            if not may.done():  # or it has gone away
                may.set_result(None)
                self._spend(cost)
