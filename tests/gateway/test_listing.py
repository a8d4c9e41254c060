"""Tests for gateway.listing."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract.keys import ShardKeys, shard_of
from engine.contract.timers import sealed
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.store.memory import MemoryStore
from engine.store.protocol import SCORE_MAX, Group, Placed
from gateway import listing
from gateway.listing import Place, list_auctions
from tests.fakes.clock import BORN_MS
from tests.gateway.house import ENDS_AT, House, record

Auction = tuple[str, Status, int]
PUBLIC = [status for status in Status if status.is_public]
GROUPS = {Status.PAUSED: Group.PAUSED, Status.ENDED: Group.CLOSED, Status.CANCELLED: Group.CLOSED}


def stored(auctions: list[Auction], shards: int) -> MemoryStore:
    """A store with these auctions, each in its set at the score the engine would give it."""
    store = MemoryStore(lambda: BORN_MS * 1_000)
    for auction_id, status, offset in auctions:
        memory = store.shards[shard_of(auction_id, shards)]
        at = ENDS_AT + offset
        changes: dict[str, Any] = {}
        if status is Status.PAUSED:
            changes = {"paused_at": EpochMs(BORN_MS + offset), "paused_from": Status.ACTIVE}
        memory.timers[auction_id] = sealed(record(auction_id, status=status, ends_at=at, **changes))
        memory.groups[GROUPS.get(status, Group.LIVE)][auction_id] = at
    return store


def naive(auctions: list[Auction], status: Status | None, ending_before: int | None) -> list[str]:
    """The same in one line of thought: filter, then live by deadline, paused by pause, closed with the latest first."""
    chosen = [
        auction
        for auction in auctions
        if status in (None, auction[1])
        and (ending_before is None or (auction[1] is not Status.PAUSED and ENDS_AT + auction[2] < ending_before))
    ]
    groups: dict[Group, list[tuple[int, str]]] = {group: [] for group in Group}
    for auction_id, held, offset in chosen:
        groups[GROUPS.get(held, Group.LIVE)].append((offset, auction_id))
    ordered = [*sorted(groups[Group.LIVE]), *sorted(groups[Group.PAUSED]), *sorted(groups[Group.CLOSED], reverse=True)]
    return [name for _, name in ordered]


async def paged(
    store: Any, shards: int, status: Status | None, ending_before: int | None, limit: int
) -> tuple[list[str], int]:
    """Everything, page by page through encoded cursors; and how many pages it took."""
    names: list[str] = []
    place: Place | None = None
    pages = 0
    while True:
        pages += 1
        found, place = await list_auctions(
            store,
            shards,
            status=status,
            ending_before=None if ending_before is None else EpochMs(ending_before),
            limit=limit,
            place=place,
        )
        assert len(found) <= limit
        names += [each.auction.auction_id for each in found]
        if place is None:
            return names, pages
        assert pages < 500, "it never ends"
        again = Place.decode(place.encode())
        assert again == place
        place = again


auctions_in_any_state = st.lists(
    st.tuples(st.from_regex(r"[a-c0-9._:-]{1,4}", fullmatch=True), st.sampled_from(PUBLIC), st.integers(0, 6)),
    max_size=40,
    unique_by=lambda auction: auction[0],
)


@settings(deadline=None, max_examples=150)
@given(
    auctions=auctions_in_any_state,
    shards=st.integers(1, 4),
    status=st.none() | st.sampled_from(PUBLIC),
    ending_before=st.none() | st.integers(ENDS_AT, ENDS_AT + 7),
    limit=st.integers(1, 12),
)
def test_pages_neither_overlap_nor_skip(
    auctions: list[Auction], shards: int, status: Status | None, ending_before: int | None, limit: int
) -> None:
    """Whatever the limit, the filters, the shards and the ties: the pages together are the naive sorted list."""
    names, _ = asyncio.run(paged(stored(auctions, shards), shards, status, ending_before, limit))
    assert names == naive(auctions, status, ending_before)


async def test_a_filter_that_matches_little_gets_short_pages_and_a_place_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One answer looks at a bounded number of rows, also when none of them matches."""
    monkeypatch.setattr(listing, "ROUNDS_MAX", 2)
    auctions = [(f"n-{number:03}", Status.SCHEDULED, number) for number in range(50)] + [("z", Status.ACTIVE, 99)]
    store = stored(auctions, 2)
    names, pages = await paged(store, 2, Status.ACTIVE, None, 5)
    assert names == ["z"]
    assert 5 <= pages <= 7


async def test_an_answer_may_end_between_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the rounds are used up as a group ends, the place is the beginning of the next one."""
    monkeypatch.setattr(listing, "ROUNDS_MAX", 1)
    auctions = [("live", Status.ACTIVE, 1), ("paused", Status.PAUSED, 1), ("over", Status.ENDED, 1)]
    store: Any = stored(auctions, 1)
    found, place = await list_auctions(store, 1, status=None, ending_before=None, limit=5, place=None)
    assert [each.auction.auction_id for each in found] == ["live"]
    assert place == Place(Group.PAUSED, None)
    assert await paged(store, 1, None, None, 5) == (["live", "paused", "over"], 3)


async def test_what_closes_between_two_pages_shifts_nobody() -> None:
    """A page goes on behind the last place, not at a count: auctions that leave or come earlier do not make others skip."""
    auctions = [(f"n-{number}", Status.ACTIVE, number) for number in range(6)]
    store: Any = stored(auctions, 1)
    first, place = await list_auctions(store, 1, status=None, ending_before=None, limit=3, place=None)
    memory = store.shards[0]
    for gone in ("n-0", "n-2", "n-4"):
        del memory.groups[Group.LIVE][gone]
    memory.groups[Group.LIVE]["n-1"] = ENDS_AT - 50
    second, place = await list_auctions(store, 1, status=None, ending_before=None, limit=3, place=place)
    assert [each.auction.auction_id for each in (*first, *second)] == ["n-0", "n-1", "n-2", "n-3", "n-5"]
    assert place is None


async def test_what_cannot_be_shown_is_passed_over() -> None:
    """A tombstone, a corrupt timer or one that has just been forgotten leaves no hole in the count and ends nothing."""
    auctions = [(f"n-{number}", Status.ACTIVE, number) for number in range(8)]
    store: Any = stored(auctions, 1)
    memory = store.shards[0]
    memory.timers["n-1"]["version"] = "nonsense"
    del memory.timers["n-3"]
    memory.timers["n-5"] = sealed(record("n-5", status=Status.TOMBSTONE))
    names, _ = await paged(store, 1, None, None, 2)
    assert names == ["n-0", "n-2", "n-4", "n-6", "n-7"]


@pytest.mark.requirement("R29")
async def test_damage_costs_the_listing_only_what_is_damaged() -> None:
    """A timer of another type, a copy under another id, a member that is no id, a score that is no instant, a whole set."""
    store: Any = stored([(f"n-{number}", Status.ACTIVE, number) for number in range(6)] + [("p", Status.PAUSED, 1)], 2)
    for memory in store.shards.values():
        memory.groups[Group.LIVE]["%FF%FE%20bad"] = ENDS_AT
    keys = {number: ShardKeys.of(shard_of(f"n-{number}", 2)) for number in range(6)}
    store.shards[keys[1].shard].damaged |= {keys[1].timer("n-1")}
    store.shards[keys[3].shard].timers["n-3"] = sealed(record("n-4"))
    store.shards[keys[5].shard].groups[Group.LIVE]["n-5"] = SCORE_MAX
    names, _ = await paged(store, 2, None, None, 2)
    assert names == ["n-0", "n-2", "n-4", "n-5", "p"]
    for shard in range(2):
        store.shards[shard].damaged |= {ShardKeys.of(shard).deadlines}
    assert (await paged(store, 2, None, None, 2))[0] == ["p"]


async def test_a_place_of_another_filter_starts_at_the_beginning() -> None:
    """A cursor from a listing of closed auctions means nothing among live ones."""
    store: Any = stored([("live", Status.ACTIVE, 1)], 1)
    place = Place(Group.CLOSED, Placed(ENDS_AT, "x"))
    found, _ = await list_auctions(store, 1, status=Status.ACTIVE, ending_before=None, limit=5, place=place)
    assert [each.auction.auction_id for each in found] == ["live"]


@pytest.mark.parametrize(
    "place",
    [Place(Group.LIVE, None), Place(Group.CLOSED, Placed(-5, "a:b")), Place(Group.PAUSED, Placed(2**53, "x" * 128))],
)
def test_a_cursor_comes_back_as_it_was(place: Place) -> None:
    """Encoding is lossless and fits into a URL as it is."""
    text = place.encode()
    assert Place.decode(text) == place
    assert text.replace("-", "").replace("_", "").isalnum()


@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda raw: raw.decode("latin-1")))
def test_what_is_no_cursor_is_none(text: str) -> None:
    """Any text from outside is either a place or None, never an error."""
    place = Place.decode(text)
    assert place is None or isinstance(place.group, Group)


@pytest.mark.parametrize(
    "decoded",
    [
        b"",
        b"7",
        b"[]",
        b'["live"]',
        b'["live",null,1]',
        b'["lively",null]',
        b'[["live"],null]',
        b'["live",7]',
        b'["live",[]]',
        b'["live",[1]]',
        b'["live",["1","a"]]',
        b'["live",[1.5,"a"]]',
        b'["live",[true,"a"]]',
        b'["live",[1,2]]',
        b'["live",[1,null]]',
        b'{"live":1,"x":2}',
        b'{"group":"live","after":null}',
        b"[" * 500,
    ],
)
def test_a_cursor_of_another_shape_is_none(decoded: bytes) -> None:
    """JSON that is none of ours is refused as a whole."""
    import base64

    assert Place.decode(base64.urlsafe_b64encode(decoded).decode().rstrip("=")) is None


def test_the_house_puts_auctions_where_the_engine_does() -> None:
    """The fixture of these tests agrees with the one of the hub's about which set an auction stands in."""
    house = House()
    for status in PUBLIC:
        house.put(record(status.value.lower(), status=status))
    groups = house.memory.shards[0].groups
    assert {group: set(members) for group, members in groups.items() if members} == {
        Group.LIVE: {"scheduled", "active", "closing"},
        Group.PAUSED: {"paused"},
        Group.CLOSED: {"ended", "cancelled"},
    }
