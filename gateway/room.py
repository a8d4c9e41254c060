"""A room: everyone who watches one auction, and what they were told last.

Two lanes with two rules. An *event* (extended, ended, a bid) is never dropped: a subscriber whose socket does not take it
keeps it in its own bounded buffer. A *tick* is worth nothing once a newer one exists: such a subscriber has one slot,
and the newest wins. The loops below run over writable subscribers only, so a stuck one costs the others nothing.
"""

from typing import Any, Final, Protocol

from websockets import frames

from engine.contract.cursors import START, stream_order
from engine.domain.lifecycle import Status
from gateway.closing import CloseCode

_OVER: Final = frozenset({Status.ENDED.value, Status.CANCELLED.value})


def text_frame(payload: bytes) -> bytes:
    """One unmasked text frame (RFC 6455, section 5.2), built once however many sockets it goes to."""
    return frames.Frame(frames.Opcode.TEXT, payload).serialize(mask=False)


class Frame:
    """What is sent to everyone in a room: encoded once, framed once for all sockets.

    Args:
        payload: the JSON object.
        cursor: of an event-lane frame; None of a tick.
    """

    __slots__ = ("_head", "cursor", "socket")

    def __init__(self, payload: bytes, cursor: str | None = None) -> None:
        self.cursor = cursor
        self.socket = text_frame(payload)
        """The frame as it is written to a socket. It is kept in this form only: a ring holds ten thousand."""
        self._head = len(self.socket) - len(payload)

    @property
    def payload(self) -> bytes:
        """The JSON object."""
        return self.socket[self._head :]


class Stream(Protocol):
    """Somebody who watches otherwise than by a socket, and bounds by itself what it holds."""

    def event(self, frame: Frame) -> None:
        """Take an event; none may be lost."""
        ...

    def tick(self, frame: Frame) -> None:
        """Take a tick; a newer one may replace it."""
        ...

    def close(self, code: CloseCode, reason: str) -> None:
        """Say farewell."""
        ...


class Subscriber(Protocol):
    """A socket, as a room sees it."""

    def send(self, data: bytes) -> None:
        """Write frames; the transport takes them at once."""
        ...

    def keep_event(self, frame: bytes) -> None:
        """Hold an event for later, within bounds."""
        ...

    def keep_tick(self, frame: bytes) -> None:
        """Hold a tick in the one slot there is."""
        ...

    def close(self, code: CloseCode, reason: str) -> None:
        """Say farewell."""
        ...


class Room:
    """One auction in this gateway's memory."""

    __slots__ = ("auction_id", "lagging", "loaded_order", "shard", "streams", "timer", "version", "writable")

    def __init__(self, auction_id: str, shard: int) -> None:
        self.auction_id = auction_id
        self.shard = shard
        self.timer: dict[str, Any] = {}
        self.version = 0
        self.loaded_order = stream_order(START)
        """Entries of the event lane up to here are part of what was loaded."""
        self.writable: set[Subscriber] = set()
        self.lagging: set[Subscriber] = set()
        self.streams: set[Stream] = set()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.timer.get("status") in _OVER

    @property
    def is_watched(self) -> bool:
        """Whether anybody is here."""
        return bool(self.writable or self.lagging or self.streams)

    def show(self, timer: dict[str, Any]) -> None:
        """Remember the auction's timer, unless a newer one is known."""
        if timer["version"] >= self.version:
            self.timer = timer
            self.version = timer["version"]

    def everyone(self) -> list[Subscriber | Stream]:
        """Who is here, whichever way they watch."""
        return [*self.writable, *self.lagging, *self.streams]

    def part(self, code: CloseCode, reason: str) -> None:
        """Say farewell to everyone."""
        for watcher in self.everyone():
            watcher.close(code, reason)
