"""Tests for gateway.ring."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract.cursors import START, stream_order
from engine.store.protocol import UpdateEntry
from gateway.ring import PLACES_PER_EVENT, RING_MAX, Event, Ring
from gateway.room import Frame

AUCTIONS = ("a-1", "a-2", "a-3")


def event(stream_id: str, auction_id: str) -> Event:
    """An event of an auction."""
    return Event(UpdateEntry(stream_id, "bid.accepted", auction_id, 1, b"{}"))


def places(found: list[Event] | None) -> list[tuple[int, int]] | None:
    """Where events stand in the lane."""
    return None if found is None else [each.order for each in found]


class NaiveRing:
    """The specification: one list, looked through from end to end."""

    def __init__(self, length_max: int) -> None:
        self.length_max = length_max
        self.entries: list[Event] = []
        self.from_ = START

    def start_at(self, stream_id: str) -> None:
        self.entries, self.from_ = [], stream_id

    def append(self, new: Event) -> None:
        self.entries.append(new)
        if len(self.entries) > self.length_max:
            self.from_ = "{}-{}".format(*self.entries.pop(0).order)

    def since(self, auction_id: str, behind: tuple[int, int]) -> list[Event] | None:
        if behind not in [stream_order(self.from_), *(each.order for each in self.entries)]:
            return None
        return [found for found in self.entries if found.auction_id == auction_id and found.order > behind]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from(AUCTIONS), st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("start_at"), st.just(""), st.integers(0, 12), st.integers(0, 3)),
    ),
    max_size=40,
)


@pytest.mark.requirement("B4")
@settings(deadline=None, max_examples=150)
@given(length_max=st.integers(1, 8), steps=STEPS)
def test_a_ring_answers_as_a_plain_list_would(length_max: int, steps: list[tuple[str, str, int, int]]) -> None:
    """Whatever is appended, forgotten and started over: each auction's events behind every place, or that some are gone."""
    ring, naive = Ring(length_max), NaiveRing(length_max)
    ms, seq = 0, 0
    for name, auction_id, by, more in steps:
        if name == "append":
            # Ids grow by either half, as Redis makes them: 9-1 comes before 10-0.
            ms, seq = (ms + by, 0) if by else (ms, seq + 1 + more)
            new = event(f"{ms}-{seq}", auction_id)
            ring.append(new)
            naive.append(new)
        else:
            ms, seq = by, more
            ring.start_at(f"{ms}-{seq}")
            naive.start_at(f"{ms}-{seq}")
        for each in AUCTIONS:
            for behind in [(at, part) for at in range(ms + 2) for part in range(seq + 2)]:
                assert ring.since(each, behind) == naive.since(each, behind), (each, behind)
        assert ring.position == (ms, seq)
    assert sum(len(own) for own in ring._by_auction.values()) == len(ring._events) <= length_max
    assert all(ring._by_auction.values()), "an auction whose events are all forgotten is forgotten too"


@pytest.mark.requirement("B4")
def test_a_cursor_of_a_lost_history_is_no_place() -> None:
    """A failover lost 5-0, and the lane went on behind it: who was told of 5-0 is not told that nothing is missing."""
    ring = Ring()
    ring.append(event("3-0", "a-1"))
    ring.pass_by("4-0")
    ring.append(event("8-0", "a-1"))
    assert ring.since("a-1", (5, 0)) is None
    assert places(ring.since("a-1", (4, 0))) == [(8, 0)]


def test_places_are_bounded() -> None:
    """Events that are not for clients push old places out; a place that is forgotten cannot be resumed from."""
    ring = Ring(2)
    ring.append(event("1-0", "a-1"))
    for number in range(2, 2 + PLACES_PER_EVENT * 2):
        ring.pass_by(f"{number}-0")
    assert ring.since("a-1", (0, 0)) is None
    assert ring.since("a-1", (1, 0)) == []
    assert ring.since("a-1", (2, 0)) == []
    assert len(ring._places) == PLACES_PER_EVENT * 2


def test_a_new_ring_lacks_nothing() -> None:
    """Before anything has happened, nothing was missed, whatever the auction."""
    assert Ring().since("a-1", stream_order(START)) == []


def test_the_events_of_others_cost_a_resume_nothing() -> None:
    """A thousand clients of one quiet auction come back at once: none of them looks at the busy ones' events."""
    ring = Ring()
    ring.append(event("1-0", "quiet"))
    for number in range(RING_MAX - 1):
        ring.append(event(f"2-{number}", "busy"))
    looked: list[str] = []

    class Watched(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: object = None) -> object:
            looked.append(key)
            return super().get(key, default)

    ring._by_auction = Watched(ring._by_auction)
    # From here on a look at what all auctions share would fail.
    ring._events = None  # type: ignore[assignment]
    assert places(ring.since("quiet", (0, 0))) == [(1, 0)]
    assert ring.since("quiet", (1, 0)) == []
    assert looked == ["quiet", "quiet"]


def test_an_event_is_kept_in_one_form() -> None:
    """Ten thousand of them are kept per shard: what was made into a frame, or cannot be, is not kept as it was read too."""
    made, damaged = event("1-0", "a-1"), event("2-0", "a-1")
    assert (made.body, made.size, made.frame) == (b"{}", 2, None)
    frame = Frame(b"{}", "0.1-0")
    made.become(frame)
    damaged.become(None)
    assert (made.body, made.size, made.frame) == (None, 2, frame)
    assert (damaged.body, damaged.size, damaged.frame) == (None, 2, None)
