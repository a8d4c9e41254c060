"""The store contract of what hands have written over keys: the one key is damaged, and nothing else is the worse for it."""

from typing import Any

import pytest

from engine.contract.cursors import START
from engine.contract.keys import ShardKeys
from engine.contract.timers import CorruptTimerError
from engine.domain.instants import EpochMs
from engine.store.protocol import Committed, Displace, Draft, Group, KeyDamagedError, PlaceLive, Superseded
from tests.contracts.stores import Bench
from tests.contracts.test_store_commit import EVERYTHING, PLACE, batch_on, commit, put, record, refused

pytestmark = [pytest.mark.requirement("R12"), pytest.mark.requirement("R29")]

KEYS = ShardKeys.of(0)
SETS = {Group.LIVE: KEYS.deadlines, Group.PAUSED: KEYS.paused, Group.CLOSED: KEYS.closed}


async def loaded(bench: Bench) -> list[Any]:
    """What an engine that takes the shard over finds."""
    return [timer async for page in bench.store.live(0) for timer in page]


async def test_a_timer_of_another_type_is_one_that_cannot_be_read(bench: Bench) -> None:
    """By every reader: it is named, and the auctions beside it are what they were."""
    await commit(bench, put("a"), PlaceLive("a", EpochMs(5)), put("b"), PlaceLive("b", EpochMs(6)))
    await bench.break_key(0, KEYS.timer("a"))
    a, b = await bench.store.timers(0, ["a", "b"])
    assert isinstance(a, CorruptTimerError)
    assert "'a'" in str(a)
    assert b == record("b")
    assert [type(timer) for timer in await loaded(bench)] == [CorruptTimerError, type(record("b"))]
    with pytest.raises(CorruptTimerError, match="'a'"):
        await bench.store.view(0, "a")
    standings = (await bench.store.observe(0, ["a", "b"])).standings
    assert isinstance(standings["a"].record, CorruptTimerError)
    assert [dict(standings[name].scores) for name in "ab"] == [{Group.LIVE: 5}, {Group.LIVE: 6}]
    assert standings["b"].record == record("b")


@pytest.mark.requirement("R11")
async def test_a_timer_of_another_type_is_of_no_version(bench: Bench) -> None:
    """A commit that builds on one is told which it is, writes nothing, and without that guard puts the timer in its place."""
    await commit(bench, put("a"), put("b"))
    await bench.break_key(0, KEYS.timer("b"))
    answer = await refused(bench, await batch_on(bench, put("a", 4), put("b", 4), versions={"a": 3, "b": 3}))
    assert isinstance(answer, Superseded)
    assert (answer.auction_id, answer.version) == ("b", None)
    done = await commit(bench, put("a", 4), put("b", 4), versions={"a": 3})
    assert done.begun_anew == (KEYS.timer("b"),)
    assert await bench.store.timers(0, ["a", "b"]) == [record("a", 4), record("b", 4)]


async def test_a_sound_timer_of_another_auction_is_damage(bench: Bench) -> None:
    """A copy of a hash under another id has its checksum: an engine that took it would hold the one auction twice."""
    await commit(bench, put("a"), put("b"), PlaceLive("a", EpochMs(5)), PlaceLive("b", EpochMs(6)))
    for field, value in put("a").fields.items():
        await bench.damage(0, "b", field, value)
    a, b = await bench.store.timers(0, ["a", "b"])
    assert a == record("a")
    assert isinstance(b, CorruptTimerError)
    assert [type(timer) for timer in await loaded(bench)] == [type(record("a")), CorruptTimerError]


@pytest.mark.parametrize("group", list(PLACE))
async def test_a_sorted_set_that_is_none_has_no_members(bench: Bench, group: Group) -> None:
    """Readers find nothing in it and all that is elsewhere; the first commit about any auction begins it anew."""
    await commit(bench, put("a"), PLACE[group]("a", EpochMs(5)))
    for other in PLACE:
        await commit(bench, put(other.value), PLACE[other](other.value, EpochMs(6)))
    await bench.break_key(0, SETS[group])
    assert await bench.store.page(0, group, None, 9) == []
    standings = (await bench.store.observe(0, ["a", *PLACE])).standings
    assert [dict(standings[name].scores) for name in ("a", group.value)] == [{}, {}]
    assert all(standings[name].record == record(name) for name in standings)
    assert all(dict(standings[other.value].scores) == {other: 6} for other in PLACE if other is not group)
    unreadable = [str(timer) for timer in await loaded(bench) if isinstance(timer, CorruptTimerError)]
    assert [SETS[group] in each for each in unreadable] == ([] if group is Group.CLOSED else [True])
    assert (await commit(bench, Displace("nobody"))).begun_anew == (SETS[group],)
    assert (await commit(bench, PLACE[group]("a", EpochMs(7)))).begun_anew == ()
    assert [(at.score, at.auction_id) for at in await bench.store.page(0, group, None, 9)] == [(7, "a")]


@pytest.mark.parametrize("name", [KEYS.cursor, KEYS.events, KEYS.audit])
async def test_without_place_intake_or_log_nothing_is_committed(bench: Bench, name: str) -> None:
    """Nor by half; the error names the key; the next shard goes on."""
    batch = await batch_on(bench, *EVERYTHING)
    await bench.break_key(0, name)
    held = await bench.dump()
    with pytest.raises(KeyDamagedError) as raised:
        await bench.store.commit(batch)
    assert name in str(raised.value)
    assert await bench.dump() == held
    assert isinstance(await commit(bench, *EVERYTHING, shard=1), Committed)


@pytest.mark.parametrize("name", [KEYS.cursor, KEYS.events])
async def test_without_place_or_intake_nothing_is_appended(bench: Bench, name: str) -> None:
    """A producer is told that it was not taken, and nothing is left of the try; the next shard takes it."""
    await bench.break_key(0, name)
    held = await bench.dump()
    with pytest.raises(KeyDamagedError):
        await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    assert await bench.dump() == held
    (appended,) = await bench.store.append(1, [Draft("e-1", b"")], bench.now(), "c-1")
    assert appended.accepted


@pytest.mark.parametrize("block_ms", [0, 50])
async def test_an_intake_that_is_none_does_not_keep_others_from_being_read(bench: Bench, block_ms: int) -> None:
    """Those of the other shards are read; alone it gives nothing, after the time that a read may wait."""
    await bench.store.append(1, [Draft("e-1", b"")], bench.now(), "c-1")
    await bench.break_key(0, KEYS.events)
    found = await bench.store.read_intake({0: START, 1: START}, 9, block_ms)
    assert {shard: [entry.event_id for entry in entries] for shard, entries in found.items()} == {1: ["e-1"]}
    assert await bench.store.read_intake({0: START}, 9, block_ms) == {}


async def test_who_needs_what_is_damaged_is_told_which_key_it_is(bench: Bench) -> None:
    """The head of a shard, what is observed against it, and the records of its log."""
    await commit(bench)
    for name, ask in (
        (KEYS.audit, lambda: bench.store.audit_entries(0, START, 9)),
        (KEYS.cursor, lambda: bench.store.head(0)),
        (KEYS.cursor, lambda: bench.store.observe(0, ["a"])),
    ):
        await bench.break_key(0, name)
        with pytest.raises(KeyDamagedError) as raised:
            await ask()
        assert name in str(raised.value)
