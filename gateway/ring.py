"""What a gateway remembers of a shard's event lane, to replay it to clients that come back with a cursor."""

from collections import OrderedDict, deque
from typing import Final

from engine.contract.cursors import START, stream_order
from engine.store.protocol import UpdateEntry

RING_MAX: Final = 10_000
"""Events per shard that can be replayed from memory to a client that comes back."""
PLACES_PER_EVENT: Final = 4
"""Places remembered per event: the lane holds outbound events too, which are not for clients."""


class Ring:
    """The last events of one shard, in order, and by auction: a storm of reconnects looks at its own auction only.

    It also knows every place of the lane behind which nothing is missing. A cursor that is none of them comes from a history
    that a failover has lost: whoever has it was told of events that did not happen, whatever comes behind it now.
    """

    def __init__(self, length_max: int = RING_MAX) -> None:
        self._length_max = length_max
        self._entries: deque[UpdateEntry] = deque()
        self._by_auction: dict[str, deque[UpdateEntry]] = {}
        self._complete_from = stream_order(START)
        self._places: OrderedDict[tuple[int, int], None] = OrderedDict()

    def start_at(self, stream_id: str) -> None:
        """Forget everything; from here on nothing will be missing."""
        self._entries.clear()
        self._by_auction.clear()
        self._places.clear()
        self._complete_from = stream_order(stream_id)

    def pass_by(self, stream_id: str) -> None:
        """An entry of the lane that is not for clients: a place, and no more."""
        self._places[stream_order(stream_id)] = None
        if len(self._places) > PLACES_PER_EVENT * self._length_max:
            self._complete_from = max(self._complete_from, self._places.popitem(last=False)[0])

    def append(self, entry: UpdateEntry) -> None:
        """Remember an event, and forget the oldest if there is no room."""
        if len(self._entries) == self._length_max:
            oldest = self._entries.popleft()
            self._complete_from = max(self._complete_from, stream_order(oldest.stream_id))
            own = self._by_auction[oldest.auction_id]
            own.popleft()
            if not own:
                del self._by_auction[oldest.auction_id]
        self.pass_by(entry.stream_id)
        self._entries.append(entry)
        self._by_auction.setdefault(entry.auction_id, deque()).append(entry)

    def since(self, auction_id: str, behind: tuple[int, int]) -> list[UpdateEntry] | None:
        """The events of an auction behind a place, in order; None if some of them may be forgotten, or it is no place."""
        if behind < self._complete_from or (behind != self._complete_from and behind not in self._places):
            return None
        found: list[UpdateEntry] = []
        for entry in reversed(self._by_auction.get(auction_id, ())):
            if stream_order(entry.stream_id) <= behind:
                break
            found.append(entry)
        found.reverse()
        return found
