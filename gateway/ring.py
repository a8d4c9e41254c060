"""What a gateway remembers of a shard's event lane, to replay it to clients that come back with a cursor."""

from bisect import bisect_right
from collections import OrderedDict, deque
from itertools import islice
from typing import Final

from engine.contract.cursors import START, stream_order
from engine.store.protocol import UpdateEntry
from gateway.room import Frame

RING_MAX: Final = 10_000
"""Events per shard that can be replayed from memory to a client that comes back."""
PLACES_PER_EVENT: Final = 4
"""Places remembered per event: the lane holds outbound events too, which are not for clients."""


class Event:
    """An event for clients: first as it was read, then as the frame that was made of it. Never both: there are many.

    So what was sent to a room is what is replayed, byte for byte; and what nobody was sent is made into a frame when the
    first one asks for it, once for all.
    """

    __slots__ = ("auction_id", "body", "frame", "order", "size")

    def __init__(self, entry: UpdateEntry) -> None:
        self.order = stream_order(entry.stream_id)
        self.auction_id = entry.auction_id
        self.size = len(entry.body)
        self.body: bytes | None = entry.body
        """None if there is a frame, or cannot be one."""
        self.frame: Frame | None = None

    def become(self, frame: Frame | None) -> None:
        """Be this frame from now on; or none, if the body cannot be read."""
        self.frame, self.body = frame, None


class Ring:
    """The last events of one shard, in order, and by auction: a storm of reconnects looks at its own auction only.

    It also knows every place of the lane behind which nothing is missing. A cursor that is none of them comes from a history
    that a failover has lost: whoever has it was told of events that did not happen, whatever comes behind it now.
    """

    def __init__(self, length_max: int = RING_MAX) -> None:
        self._length_max = length_max
        self._events: deque[Event] = deque()
        self._by_auction: dict[str, deque[Event]] = {}
        self._places: OrderedDict[tuple[int, int], None] = OrderedDict()
        self.complete_from = stream_order(START)
        """The place behind which nothing is missing here."""
        self.histories = 0
        """How often it was started anew: what was read of the lane before may be of a history that was lost."""

    def start_at(self, stream_id: str) -> None:
        """Forget everything; from here on nothing will be missing."""
        self._events.clear()
        self._by_auction.clear()
        self._places.clear()
        self.complete_from = stream_order(stream_id)
        self.histories += 1

    @property
    def position(self) -> tuple[int, int]:
        """The last place that it knows."""
        return next(reversed(self._places), self.complete_from)

    def pass_by(self, stream_id: str) -> None:
        """An entry of the lane that is not for clients: a place, and no more."""
        self._pass(stream_order(stream_id))

    def append(self, event: Event) -> None:
        """Remember an event, and forget the oldest if there is no room."""
        if len(self._events) == self._length_max:
            oldest = self._events.popleft()
            self.complete_from = max(self.complete_from, oldest.order)
            own = self._by_auction[oldest.auction_id]
            own.popleft()
            if not own:
                del self._by_auction[oldest.auction_id]
        self._pass(event.order)
        self._events.append(event)
        self._by_auction.setdefault(event.auction_id, deque()).append(event)

    def _pass(self, place: tuple[int, int]) -> None:
        self._places[place] = None
        if len(self._places) > PLACES_PER_EVENT * self._length_max:
            self.complete_from = max(self.complete_from, self._places.popitem(last=False)[0])

    def since(self, auction_id: str, behind: tuple[int, int]) -> list[Event] | None:
        """The events of an auction behind a place, in order; None if some of them may be forgotten, or it is no place."""
        if behind < self.complete_from or (behind != self.complete_from and behind not in self._places):
            return None
        own = self._by_auction.get(auction_id)
        if own is None:
            return []
        missed = len(own) - bisect_right(own, behind, key=_order)
        # From the end: a deque is slow to reach in the middle, and mostly little was missed.
        found = list(islice(reversed(own), missed))
        found.reverse()
        return found


def _order(event: Event) -> tuple[int, int]:
    return event.order
