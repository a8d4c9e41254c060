"""Tests for engine.store.redis: what a hand can do to a real server that the memory store cannot express.

What every store must do about a damaged key: tests/contracts/test_store_damage.py.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from engine.contract.cursors import START
from engine.contract.keys import ENGINES, RECONCILIATIONS, ShardKeys, delivered, replies
from engine.contract.timers import CorruptTimerError
from engine.domain.instants import EpochMs
from engine.store.forwarder import ForwarderStore
from engine.store.limits import StoreLimits
from engine.store.protocol import (
    SCORE_MAX,
    Committed,
    Draft,
    Fenced,
    Group,
    KeyDamagedError,
    Placed,
    PlaceLive,
    SetOffset,
)
from engine.store.scripts import DELIVER
from tests.contracts.stores import RedisBench, until
from tests.contracts.test_store_commit import EVERYTHING, batch_on, commit, put, record
from tests.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R12"), pytest.mark.requirement("R29")]

KEYS = ShardKeys.of(0)
SCORED = {b"a": "-inf", b"\xff": "-1e300", b"b": "4.2", b"c": "4.7", b"d d": "5", b"d": "5", b"": "1e300", b"e": "+inf"}
"""Members with scores that no commit writes, in the order of their whole scores."""
NAMES = ["%FF", "a", "b", "c", "%64%20d", "d", "%", "e"]


@pytest.fixture
async def bench(redis_server: Server) -> AsyncIterator[RedisBench]:
    """The store on each kind of server."""
    made = RedisBench(redis_server)
    try:
        yield made
    finally:
        await made.close()


async def ask(bench: RedisBench, *command: Any) -> Any:
    """What a person with redis-cli does."""
    return await bench.link.commands.execute_command(*command)


# Scores and members.


@pytest.mark.parametrize("count", [1, 2, 3, 100])
@pytest.mark.parametrize("group", [Group.LIVE, Group.CLOSED])
async def test_pages_of_a_damaged_set_end(bench: RedisBench, group: Group, count: int) -> None:
    """Whatever scores and members it has, each that can be named comes, once, and those with whole scores in their order."""
    key = KEYS.deadlines if group is Group.LIVE else KEYS.closed
    for member, score in SCORED.items():
        await ask(bench, "ZADD", key, score, member)
    await ask(bench, "ZADD", key, 7, b"\xff" * 600)
    found: list[Placed] = []
    while page := await bench.store.page(0, group, found[-1] if found else None, count):
        assert len(page) <= count
        found += page
        assert len(found) <= len(SCORED)
    names = [at.auction_id for at in found]
    assert set(names) >= {"a", "b", "c", "d", "e"}
    assert len(names) == len(set(names))
    if count == 100:
        assert names == (NAMES if group is Group.LIVE else NAMES[::-1])
        scores = {at.auction_id: at.score for at in found}
        assert [scores[name] for name in ("a", "b", "c", "e")] == [-SCORE_MAX, 4, 4, SCORE_MAX]


async def test_what_is_no_auction_id_is_seen_by_a_name(bench: RedisBench) -> None:
    """It stands where it stands; an engine that loads finds no auction there."""
    await commit(bench, put("a"), PlaceLive("a", EpochMs(5)))
    for member in (b"\xff\xfe bad", b"bad id", b""):
        await ask(bench, "ZADD", KEYS.deadlines, "+inf", member)
    names = ["%FF%FE%20bad", "%62ad%20id", "%"]
    standings = (await bench.store.observe(0, [*names, "a"])).standings
    assert [dict(standings[name].scores) for name in names] == 3 * [{Group.LIVE: SCORE_MAX}]
    assert [standings[name].record for name in names] == 3 * [None]
    assert await bench.store.timers(0, ["a", *names]) == [record("a"), None, None, None]
    assert [page async for page in bench.store.live(0)] == [[record("a")]]


async def test_what_is_too_long_to_be_named_is_told_to_who_loads(bench: RedisBench) -> None:
    """It stands in nobody's way."""
    await commit(bench, put("a"), PlaceLive("a", EpochMs(5)))
    await ask(bench, "ZADD", KEYS.deadlines, 1, b"\xff" * 600)
    ((unreadable, sound),) = [page async for page in bench.store.live(0)]
    assert isinstance(unreadable, CorruptTimerError)
    assert KEYS.deadlines in str(unreadable)
    assert sound == record("a")


async def test_what_is_no_text_is_read(bench: RedisBench) -> None:
    """Bindings of offers, names of holders, members and commands in troubleshooting."""
    await ask(bench, "SET", KEYS.offer_prefix + "o-1", b"\xff")
    await ask(bench, "HSET", KEYS.lease, "holder", b"\xff", "epoch", 3, "beat", 4)
    await ask(bench, "HSET", ENGINES, b"\xff", 4)
    await ask(bench, "ZADD", KEYS.parked, "+inf", b"\xff")
    assert await bench.store.offers(0, ["o-1"]) == ["\ufffd"]
    assert (await bench.store.lease(0)).holder == "\ufffd"
    assert (await bench.store.claim(0, "me", None)).holder == "\ufffd"
    assert await bench.store.beat_member("me") == {"me": 1, "\ufffd": 4}
    assert await bench.store.page(0, Group.PARKED, None, 9) == [Placed(SCORE_MAX, "\ufffd")]
    assert await bench.store.parked_commands(0, ["\ufffd"]) == [None]


# Keys of another type.

TOUCHED = [
    *(
        getattr(KEYS, name)
        for name in ("lease", "cursor", "events", "deadlines", "paused", "closed", "audit", "updates")
    ),
    *(KEYS.troubleshooting, KEYS.parked, KEYS.attendance, KEYS.timer("a"), KEYS.timer("c"), replies("inbox-1")),
    *(KEYS.command_prefix + "c-1", KEYS.offer_prefix + "o-1", KEYS.offer_prefix + "o-2"),
]
"""Every key that a batch of everything reads or writes."""


@pytest.mark.parametrize("name", TOUCHED)
async def test_a_commit_over_a_damaged_key_happens_all_or_not_at_all(bench: RedisBench, name: str) -> None:
    """Either nothing has changed, or all that the batch says is done, as it would have been without the damage."""
    batch = await batch_on(bench, *EVERYTHING, SetOffset(7), SetOffset(8), intake="7-0")
    await bench.break_key(0, name)
    held = await bench.dump()
    try:
        answer = await bench.store.commit(batch)
    except KeyDamagedError as error:
        assert name in str(error)
        answer = None
    if not isinstance(answer, Committed):
        assert name in (KEYS.lease, KEYS.cursor, KEYS.events, KEYS.audit)
        assert (answer == Fenced(0)) is (name == KEYS.lease)
        assert await bench.dump() == held
        return
    assert await bench.store.timers(0, ["a", "b", "c"]) == [record("a", 1), record("b", 1), record("c", 1)]
    placed = [[(at.score, at.auction_id) for at in await bench.store.page(0, group, None, 9)] for group in Group]
    assert placed == [[(50, "a")], [(60, "b")], [(70, "c")], [(5, "c-2")]]
    assert [update.auction_id for update in (await bench.store.read_updates({0: START}, 9, 0))[0]] == ["a"]
    assert await bench.replies("inbox-1") == [("APPLIED", "c-1", b"{}")]
    assert await bench.store.outcome(0, "c-1") == b"{}"
    assert await bench.troubleshooting(0) == {"c-2": b"{}"}
    assert len((await bench.store.read_intake({0: START}, 9, 0))[0]) == 1
    assert await bench.store.offers(0, ["o-1", "o-2"]) == ["auction a", "cancelled {}"]
    assert len(await bench.audit(0)) == 1
    clock = await bench.store.shard_clock(0)
    assert (clock.offset_ms, clock.corrections) == (8, 2)
    head = await bench.store.head(0)
    assert (head.intake, head.chain) == ("7-0", batch.chain)
    overwritten = name.startswith((KEYS.command_prefix, KEYS.offer_prefix, KEYS.attendance))
    assert answer.begun_anew == (() if overwritten else (name,))


async def test_a_log_that_takes_no_more_records_is_found_out_before_anything_is_written(bench: RedisBench) -> None:
    """A stream can be at the end of its ids; the shard waits for a person then, as without a log."""
    operations = [put("a"), PlaceLive("a", EpochMs(5))]
    batch = await batch_on(bench, *operations)
    batch.operations.reverse()
    await ask(bench, "XADD", KEYS.audit, f"{2**64 - 1}-{2**64 - 1}", "x", "y")
    held = await bench.dump()
    with pytest.raises(KeyDamagedError, match="audit"):
        await bench.store.commit(batch)
    assert await bench.dump() == held


@pytest.mark.parametrize(
    ("field", "value"), [("corrections", "x"), ("offset", "x"), ("last_at", "x"), ("commit_at", "x")]
)
async def test_a_number_of_the_cursor_that_is_none_counts_as_zero(bench: RedisBench, field: str, value: str) -> None:
    """Commits go on, and stamps are those of the clock."""
    await commit(bench)
    await ask(bench, "HSET", KEYS.cursor, field, value)
    before = bench.now()
    assert before - 1 <= (await commit(bench, SetOffset(0))).at <= bench.now() + 1
    clock = await bench.store.shard_clock(0)
    assert (clock.offset_ms, clock.corrections) == (0, 1)


@pytest.mark.parametrize(("field", "value"), [("intake", "x"), ("seq", "x"), ("seq", "9" * 5_000)])
async def test_a_place_in_the_cursor_that_is_none_is_damage(bench: RedisBench, field: str, value: str) -> None:
    """Nobody knows then what has been applied."""
    await commit(bench)
    await ask(bench, "HSET", KEYS.cursor, field, value)
    with pytest.raises(KeyDamagedError, match="cursor"):
        await bench.store.head(0)


@pytest.mark.parametrize("damage", ["type", "epoch", "beat"])
async def test_a_damaged_lease_is_lost_and_claimed_anew(bench: RedisBench, damage: str) -> None:
    """Its holder is fenced, and whoever comes first has it, under an epoch that nobody ever had."""
    held = await bench.store.claim(0, "other", None)
    batch = replace(await batch_on(bench), holder="other", epoch=held.epoch)
    if damage == "type":
        await bench.break_key(0, KEYS.lease)
    else:
        await ask(bench, "HSET", KEYS.lease, damage, "x")
    await bench.store.lease(0)
    await bench.store.release(0, "nobody", 1)
    assert not await bench.store.renew(0, "other", held.epoch)
    if damage != "beat":
        assert isinstance(await bench.store.commit(batch), Fenced)
    taken = await bench.store.claim(0, "me", None)
    assert taken.holder == "me"
    assert taken.epoch > held.epoch
    assert await bench.store.renew(0, "me", taken.epoch)
    assert (await bench.store.lease(0)).beat == 1


@pytest.mark.parametrize("damage", ["type", "beat", "most"])
async def test_members_find_each_other_whatever_the_list_was(bench: RedisBench, damage: str) -> None:
    """Who beats is on it."""
    if damage == "type":
        await bench.break_key(0, ENGINES)
    else:
        await ask(bench, "HSET", ENGINES, "me", "x" if damage == "beat" else str(2**63 - 1))
    await bench.store.beat_member("me")
    assert await bench.store.beat_member("me") == {"me": 1}


async def test_a_list_of_members_names_those_without_a_beat(bench: RedisBench) -> None:
    """A value that is no number is a beat that stands still."""
    await ask(bench, "HSET", ENGINES, "other", "x")
    assert await bench.store.beat_member("me") == {"me": 1, "other": 0}


async def test_an_event_lane_that_is_none_is_empty(bench: RedisBench) -> None:
    """Auctions are shown, the lanes of other shards are followed, and its own goes on with the next commit."""
    await commit(bench, *EVERYTHING)
    await commit(bench, *EVERYTHING, shard=1)
    await bench.break_key(0, KEYS.updates)
    view = await bench.store.view(0, "a")
    assert (view.record, view.stream_id) == (record("a", 1), START)
    assert await bench.store.recent_updates(0, 9) == []
    assert await bench.store.last_update(0) == START
    assert not await bench.store.holds_update(0, (await bench.store.recent_updates(1, 1))[0])
    news = await bench.store.follow({0: START, 1: START}, {"inbox-1": START}, 9, 0)
    assert ({*news.updates}, len(news.replies["inbox-1"])) == ({1}, 2)
    following = asyncio.create_task(bench.store.follow({0: START}, {}, 9, 1_000))
    await commit(bench, *EVERYTHING)
    await following
    assert len((await bench.store.follow({0: START}, {}, 9, 0)).updates[0]) == 1


async def test_who_only_looks_at_a_damaged_key_finds_nothing(bench: RedisBench) -> None:
    """Troubleshooting, outcomes and the listing of what is over."""
    for name in (KEYS.troubleshooting, KEYS.parked, KEYS.closed, KEYS.command_prefix + "c-1", KEYS.seen_prefix + "e-1"):
        await bench.break_key(0, name)
    assert await bench.store.parked(0) == 0
    assert await bench.store.parked_commands(0, ["c-1", "c-2"]) == [None, None]
    assert await bench.store.page(0, Group.PARKED, None, 9) == []
    assert await bench.store.outcome(0, "c-1") is None
    assert await bench.store.is_applied(0, "e-1") is None
    await bench.store.forget_closed(0, EpochMs(5))


# Appending, delivering, writing down.


@pytest.mark.parametrize("name", [KEYS.parked, KEYS.attendance, KEYS.seen_prefix + "e-1"])
async def test_an_event_is_taken_whatever_else_is_damaged(bench: RedisBench, name: str) -> None:
    """Once: a repetition is one."""
    bench.store.limits = StoreLimits(attendant="gateway-1", outage_extension_ms=1_000)
    await bench.break_key(0, name)
    for accepted in (True, False):
        (appended,) = await bench.store.append(0, [Draft("e-1", b"")], bench.now(), f"c-{accepted}")
        assert appended.accepted is accepted
    await bench.store.append(0, [], bench.now(), "c-3")
    if name == KEYS.attendance:
        assert await ask(bench, "HEXISTS", name, "at")


@pytest.mark.requirement("B8")
@pytest.mark.parametrize("field", ["at", "outage", "since"])
@pytest.mark.parametrize("value", ["x", "9" * 400])
async def test_attendance_that_cannot_be_read_begins_anew(bench: RedisBench, field: str, value: str) -> None:
    """No close waits for it, none fails half way, and the next beat is one."""
    bench.store.limits = StoreLimits(attendant="gateway-1", outage_extension_ms=1_000)
    await ask(bench, "HSET", KEYS.attendance, field, value)
    await commit(bench, put("a"), closes_at=EpochMs(bench.now()))
    await bench.store.append(0, [], bench.now(), "c-1")
    attended = int(await ask(bench, "HGET", KEYS.attendance, "at"))
    assert abs(attended - bench.now()) < 1_000
    await commit(bench, put("a", 4), closes_at=EpochMs(bench.now()), versions={"a": 3})


async def test_a_mark_of_a_repetition_that_cannot_be_read_is_none(bench: RedisBench) -> None:
    """The event is taken, and marked anew."""
    await ask(bench, "SET", KEYS.seen_prefix + "e-1", "x")
    assert await bench.store.is_applied(0, "e-1") is None
    for accepted in (True, False):
        (appended,) = await bench.store.append(0, [Draft("e-1", b"")], bench.now(), f"c-{accepted}")
        assert appended.accepted is accepted


async def test_a_reply_is_delivered_whatever_stands_in_its_stream(bench: RedisBench) -> None:
    """What is no stream is no answer that somebody could read."""
    stream, mark = replies("{x}"), delivered(replies("{x}"), 0, "c-1")
    await bench.break_key(0, stream)
    await bench.break_key(0, mark)
    args = ("1-0", "APPLIED", "c-1", b"{}", 9, 60_000)
    assert [await bench.link.run(DELIVER, [stream, mark], args) for _ in range(2)] == [1, 0]
    assert await bench.replies("{x}") == [("APPLIED", "c-1", b"{}")]


async def test_reconciliations_are_written_down_whatever_stands_there(bench: RedisBench) -> None:
    """The first one begins the stream anew."""
    await bench.break_key(0, RECONCILIATIONS)
    await bench.store.record_reconciliation({"cause": "x"})
    assert await ask(bench, "XLEN", RECONCILIATIONS) == 1


async def test_what_is_forwarded_goes_on_over_damaged_keys(bench: RedisBench) -> None:
    """A lane that is none has nothing to forward, a lost place is taken anew at its end, and what is put aside is kept."""
    forwarder = ForwarderStore(bench.link)
    lease = await forwarder.claim(0, "me", None)
    await bench.break_key(0, KEYS.updates)
    begun = await forwarder.pending(0, lease.epoch, 9)
    assert begun is not None
    assert (begun.standing, begun.entries) == ("begun", [])
    await commit(bench, *EVERYTHING)
    kept = await forwarder.pending(0, lease.epoch, 9)
    assert kept is not None
    assert [entry.auction_id for entry in kept.entries] == ["a"]
    await bench.break_key(0, KEYS.undelivered)
    to = kept.entries[0].stream_id
    moved = await forwarder.advance(0, lease.epoch, after=kept.cursor, to=to, passed=1, put_aside={"error": "x"})
    assert (moved, await ask(bench, "XLEN", KEYS.undelivered)) == (True, 1)
    for field in ("cursor", "passed"):
        await ask(bench, "HSET", KEYS.forwarder, field, "x")
        anew = await forwarder.pending(0, lease.epoch, 9)
        assert anew is not None
        assert (anew.standing, anew.cursor) == ("begun", to)
    await bench.break_key(0, KEYS.forwarder)
    assert await forwarder.pending(0, lease.epoch, 9) is None
    assert (await forwarder.claim(0, "me", None)).epoch > lease.epoch


async def test_a_waiting_reader_outlives_the_loss_of_its_stream(bench: RedisBench) -> None:
    """Written over while it is read, an intake gives nothing, and the others go on."""
    await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    (entry,) = (await bench.store.read_intake({0: START}, 9, 0))[0]
    reading = asyncio.create_task(bench.store.read_intake({0: entry.stream_id, 1: START}, 9, 1_000))
    await until(bench.blocked)
    await bench.break_key(0, KEYS.events)
    await bench.store.append(1, [Draft("e-2", b"")], bench.now(), "c-2")
    found = await reading or await bench.store.read_intake({0: entry.stream_id, 1: START}, 9, 0)
    assert [each.event_id for each in found[1]] == ["e-2"]
