"""A room: everyone who watches one auction, and what they were told last.

Two lanes with two rules. An *event* (extended, ended, a bid) is never dropped: a subscriber whose socket does not take it
keeps it in its own bounded buffer. A *tick* is worth nothing once a newer one exists: such a subscriber has one slot,
and the newest wins. The loops below run over writable subscribers only, so a stuck one costs the others nothing.
"""

from typing import Any, Final, Protocol

from websockets.frames import Frame, Opcode

from engine.contract.cursors import START, stream_order
from engine.domain.lifecycle import Status
from gateway.closing import CloseCode

_OVER: Final = frozenset({Status.ENDED.value, Status.CANCELLED.value})


def text_frame(payload: bytes) -> bytes:
    """One unmasked text frame (RFC 6455, section 5.2), built once however many sockets it goes to."""
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


class Subscriber(Protocol):
    """A socket, as a room sees it."""

    def send(self, frame: bytes) -> None:
        """Write a frame; the transport takes it at once."""
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

    __slots__ = ("auction_id", "lagging", "loaded_order", "shard", "timer", "version", "writable")

    def __init__(self, auction_id: str, shard: int) -> None:
        self.auction_id = auction_id
        self.shard = shard
        self.timer: dict[str, Any] = {}
        self.version = 0
        self.loaded_order = stream_order(START)
        """Entries of the event lane up to here are part of what was loaded."""
        self.writable: set[Subscriber] = set()
        self.lagging: set[Subscriber] = set()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.timer.get("status") in _OVER

    @property
    def is_watched(self) -> bool:
        """Whether anybody is here."""
        return bool(self.writable or self.lagging)

    def show(self, timer: dict[str, Any]) -> None:
        """Remember the auction's timer, unless a newer one is known."""
        if timer["version"] >= self.version:
            self.timer = timer
            self.version = timer["version"]

    def event(self, frame: bytes) -> None:
        """Send an event to everyone."""
        # The lagging ones first: a write may fill its transport, and who starts to lag by it has the frame already.
        for subscriber in self.lagging.copy():
            subscriber.keep_event(frame)
        for subscriber in self.writable.copy():
            subscriber.send(frame)

    def tick(self, version: int, frame: bytes) -> None:
        """Send a tick to everyone, unless the event lane already told something newer."""
        if version < self.version:
            return
        for subscriber in self.lagging:
            subscriber.keep_tick(frame)
        for subscriber in self.writable.copy():
            subscriber.send(frame)
