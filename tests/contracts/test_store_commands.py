"""The store contract of commands, run against every store: troubleshooting, retries, outcomes, answers."""

import asyncio
from dataclasses import replace

import pytest

from engine.contract.cursors import START, stream_order
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.store.protocol import (
    Announce,
    Committed,
    Draft,
    Group,
    IntakeFullError,
    KeepOutcome,
    News,
    Park,
    Placed,
    Reply,
    Requeue,
    Undrained,
    Unpark,
)
from tests.contracts.stores import LONG_AGO_MS, WITHIN_S, Bench, until
from tests.contracts.test_store_commit import batch_on, commit, refused

SEEN = EpochMs(1_700_000_000_000)


def park(command_id: str, first_seen_at: int = SEEN) -> Park:
    """A command moves to troubleshooting."""
    return Park(command_id, EpochMs(first_seen_at), b"body of " + command_id.encode())


async def listed(bench: Bench, shard: int = 0) -> list[str]:
    """The commands in troubleshooting, as they are listed."""
    return [at.auction_id for at in await bench.store.page(shard, Group.PARKED, None, 100)]


# Into troubleshooting and out of it.


@pytest.mark.requirement("R30")
async def test_parked_commands_are_listed_by_when_they_were_first_seen(bench: Bench) -> None:
    """Not by when they were parked: what has waited longest comes first, page by page."""
    await commit(bench, park("late", SEEN + 9), park("early", SEEN - 9))
    await commit(bench, park("b", SEEN), park("a", SEEN))
    assert await listed(bench) == ["early", "a", "b", "late"]
    page = await bench.store.page(0, Group.PARKED, Placed(SEEN, "a"), 1)
    assert page == [Placed(SEEN, "b")]
    assert await listed(bench, shard=1) == []


@pytest.mark.requirement("R29")
async def test_of_two_commands_of_one_id_both_are_kept(bench: Bench) -> None:
    """The second one under its other name, in one commit or in two; once the first one has left, its name is free."""
    other = [Park("c-1", SEEN, name.encode(), name) for name in ("p-1", "p-2", "p-3", "p-4")]
    await commit(bench, *other[:2])
    await commit(bench, other[2])
    await commit(bench, Unpark("c-1"), other[3])
    assert await bench.troubleshooting(0) == {"c-1": b"p-4", "p-2": b"p-2", "p-3": b"p-3"}
    assert await listed(bench) == ["c-1", "p-2", "p-3"]


@pytest.mark.requirement("R30")
async def test_parked_commands_come_in_the_order_asked_for(bench: Bench) -> None:
    """Each as it was parked, None for one that is not there."""
    await commit(bench, park("c-1"), park("c-2"))
    assert await bench.store.parked_commands(0, ["c-2", "c-3", "c-1"]) == [b"body of c-2", None, b"body of c-1"]
    assert await bench.store.parked_commands(1, ["c-2"]) == [None]


@pytest.mark.requirement("R30")
async def test_an_unparked_command_is_gone(bench: Bench) -> None:
    """From the count, the list and the bodies; the others stay, and one that is not there is no error."""
    await commit(bench, park("c-1"), park("c-2"))
    await commit(bench, Unpark("c-1"), Unpark("c-9"))
    assert await bench.store.parked(0) == 1
    assert await listed(bench) == ["c-2"]
    assert await bench.store.parked_commands(0, ["c-1", "c-2"]) == [None, b"body of c-2"]


@pytest.mark.requirement("R32")
async def test_the_depth_is_that_of_the_list(bench: Bench) -> None:
    """Parked twice it counts once, parked and unparked in one commit not at all, unparked and parked again once."""
    await commit(bench, park("c-1"), park("c-1", SEEN + 1), park("c-2"), Unpark("c-2"), Unpark("c-3"), park("c-3"))
    assert await bench.store.parked(0) == len(await listed(bench)) == len(await bench.troubleshooting(0)) == 2


@pytest.mark.requirement("R29")
async def test_a_full_troubleshooting_refuses_producers(bench: Bench) -> None:
    """So that nothing that cannot be applied ever has to be dropped; nothing is added and no stamp moves."""
    tight = bench.with_troubleshooting_max(2)
    await commit(bench, park("c-1"))
    (appended,) = await tight.append(0, [Draft("e-1", b"")], bench.now(), "call-1")
    assert appended.accepted
    await commit(bench, park("c-2"))
    held = await bench.dump()
    with pytest.raises(IntakeFullError, match="troubleshooting"):
        await tight.append(0, [Draft("e-2", b"")], EpochMs(bench.now() + 100), "call-2")
    assert await bench.dump() == held
    (elsewhere,) = await tight.append(1, [Draft("e-2", b"")], bench.now(), "call-2")
    assert elsewhere.accepted, "another shard's troubleshooting is another"


@pytest.mark.requirement("R30")
async def test_a_full_troubleshooting_does_not_refuse_operators(bench: Bench) -> None:
    """They are who empties it; then producers are welcome again. The bound of the intake holds for them too."""
    tight = bench.with_troubleshooting_max(1)
    await commit(bench, park("c-1"))
    with pytest.raises(IntakeFullError):
        await tight.append(0, [Draft("e-0", b"")], bench.now(), "call-0")
    (order,) = await tight.append(0, [Draft("order-1", b"")], bench.now(), "call-1", urgent=True)
    assert order.accepted
    await commit(bench, Unpark("c-1"))
    (appended,) = await tight.append(0, [Draft("e-1", b"")], bench.now(), "call-2")
    assert appended.accepted
    with pytest.raises(IntakeFullError):
        await bench.with_intake_max(2).append(0, [Draft("order-2", b"")], bench.now(), "call-3", urgent=True)


@pytest.mark.requirement("R2")
async def test_a_full_troubleshooting_repeats_answers_all_the_same(bench: Bench) -> None:
    """A call whose answer was lost, and an event that is known, add nothing: both are answered."""
    tight = bench.with_troubleshooting_max(1)
    first = await tight.append(0, [Draft("e-1", b"")], bench.now(), "call-1")
    await commit(bench, park("c-1"))
    assert await tight.append(0, [Draft("e-1", b"")], bench.now(), "call-1") == first
    (again,) = await tight.append(0, [Draft("e-1", b"")], bench.now(), "call-2")
    assert (again.accepted, again.at) == (False, first[0].at)


# Once more.


@pytest.mark.requirement("R30")
@pytest.mark.requirement("R32")
async def test_a_requeued_event_is_read_at_the_end_of_the_intake(bench: Bench) -> None:
    """As it was, stamped with the commit that did it, with how often it was tried and since when it is known."""
    await bench.store.append(0, [Draft("e-1", b"1")], bench.now(), "call-1")
    done = await commit(bench, park("e-9"), Unpark("e-9"), Requeue("e-9", b"\x00\xff", 3, SEEN))
    await bench.store.append(0, [Draft("e-2", b"2")], bench.now(), "call-2")
    first, again, second = (await bench.store.read_intake({0: START}, 10, 0))[0]
    assert [first.event_id, second.event_id] == ["e-1", "e-2"]
    assert {(entry.attempts, entry.first_seen_at) for entry in (first, second)} == {(0, None)}
    assert (again.event_id, again.body, again.at) == ("e-9", b"\x00\xff", done.at)
    assert (again.attempts, again.first_seen_at) == (3, SEEN)
    assert first.at <= again.at <= second.at
    assert stream_order(first.stream_id) < stream_order(again.stream_id) < stream_order(second.stream_id)


@pytest.mark.requirement("R32")
async def test_a_requeued_event_never_arrives_before_what_was_there(bench: Bench) -> None:
    """Its stamp is a stamp like any other: not before the last arrival, and a floor for the next one."""
    (high,) = await bench.store.append(0, [Draft("e-1", b"")], EpochMs(bench.now() + LONG_AGO_MS), "call-1")
    done = await commit(bench, Requeue("e-9", b"", 1, SEEN))
    assert done.at == high.at
    assert (await bench.store.read_intake({0: START}, 10, 0))[0][1].at == high.at


@pytest.mark.requirement("R2")
async def test_a_requeue_leaves_the_repetitions_alone(bench: Bench) -> None:
    """Of an event that was appended before, the producer's repetition stays a duplicate; the retry is ours, and counts."""
    await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "call-1")
    await commit(bench, Requeue("e-1", b"", 1, SEEN), Requeue("e-1", b"", 2, SEEN))
    (again,) = await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "call-2")
    assert not again.accepted
    entries = (await bench.store.read_intake({0: START}, 10, 0))[0]
    assert [entry.attempts for entry in entries] == [0, 1, 2]


@pytest.mark.requirement("B2")
async def test_a_requeued_event_stops_a_close_until_it_is_applied(bench: Bench) -> None:
    """It lies in the intake unapplied, and arrived before the deadline: the close must look at it first."""
    done = await commit(bench, Requeue("e-9", b"", 1, SEEN), est=EpochMs(bench.now() - LONG_AGO_MS))
    (entry,) = (await bench.store.read_intake({0: START}, 10, 0))[0]
    batch = await batch_on(bench, due_at=EpochMs(done.at + 1))
    assert await refused(bench, batch) == Undrained()
    assert isinstance(await bench.store.commit(replace(batch, due_at=done.at)), Committed)
    applied = await batch_on(bench, due_at=EpochMs(done.at + 1), intake=entry.stream_id)
    assert isinstance(await bench.store.commit(applied), Committed)


@pytest.mark.requirement("R30")
async def test_a_repeated_commit_requeues_once(bench: Bench) -> None:
    """A commit whose answer was lost is answered again, and the event is in the intake once."""
    await commit(bench, park("e-9"))
    batch = await batch_on(bench, Unpark("e-9"), Requeue("e-9", b"", 1, SEEN), KeepOutcome("order", b"{}"))
    first = await bench.store.commit(batch)
    assert await bench.store.commit(batch) == first
    assert len((await bench.store.read_intake({0: START}, 10, 0))[0]) == 1
    assert await bench.store.parked(0) == 0


async def test_a_requeue_wakes_the_reader_of_the_intake(bench: Bench) -> None:
    """It is news for the shard that wrote it."""
    reading = asyncio.create_task(bench.store.read_intake({0: START}, 10, 1_000))
    await until(bench.blocked)
    await commit(bench, Requeue("e-9", b"", 1, SEEN))
    async with asyncio.timeout(WITHIN_S):
        found = await reading or await bench.store.read_intake({0: START}, 10, 0)
    assert [entry.event_id for entry in found[0]] == ["e-9"]


@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    "fields",
    [
        {"at": "9" * 5_000, "id": "e", "body": "{}"},
        {"at": str(EPOCH_MS_MAX + 1), "id": "e", "body": "{}"},
        {"at": "5", "id": "e", "body": "{}", "attempts": "many", "first_seen_at": "5"},
        {"at": "5", "id": "e", "body": "{}", "attempts": "1", "first_seen_at": "9" * 5_000},
        {"at": "5", "id": "e", "body": "{}", "attempts": "1"},
        {"at": "-5", "id": "e", "body": "{}"},
    ],
    ids=["endless", "after the calendar", "attempts", "seen", "half", "negative"],
)
async def test_an_entry_with_a_number_that_is_none_is_poison(bench: Bench, fields: dict[str, str]) -> None:
    """Whoever can write to the stream cannot stop its reader: the entry has no arrival, and what follows is read."""
    await bench.inject(0, **fields)
    await bench.store.append(0, [Draft("e-2", b"")], bench.now(), "call-1")
    poison, good = (await bench.store.read_intake({0: START}, 10, 0))[0]
    assert poison.at is None
    assert good.event_id == "e-2"


# What became of a command.


@pytest.mark.requirement("R30")
async def test_the_outcome_of_a_command_is_kept(bench: Bench) -> None:
    """By its id, in its shard, the latest one; of a command that was not decided there is none."""
    assert await bench.store.outcome(0, "c-1") is None
    await commit(bench, KeepOutcome("c-1", b"first"), KeepOutcome("c-2", b"\x00\xff"))
    assert await bench.store.outcome(0, "c-1") == b"first"
    assert await bench.store.outcome(0, "c-2") == b"\x00\xff"
    await commit(bench, KeepOutcome("c-1", b"second"))
    assert await bench.store.outcome(0, "c-1") == b"second"
    assert await bench.store.outcome(1, "c-1") is None


async def test_whether_an_event_is_known_and_applied(bench: Bench) -> None:
    """By its own id, from when it is in the intake, in its shard only; it is applied once the cursor has passed it, also
    where others of the same instant wait behind it, or such as have no arrival."""
    assert await bench.store.is_applied(0, "c-1") is None
    await bench.store.append(0, [Draft(name, b"") for name in ("c-1", "c-2", "c-3")], bench.now(), "call-1")
    await bench.store.append(0, [Draft("c-4", b"")], bench.now() + 9, "call-2")

    async def told() -> list[bool | None]:
        return [await bench.store.is_applied(0, name) for name in ("c-1", "c-2", "c-3", "c-4")]

    assert await told() == [False] * 4
    entries = (await bench.store.read_intake({0: START}, 10, 0))[0]
    for done in range(1, 5):
        await commit(bench, intake=entries[done - 1].stream_id)
        assert await told() == [n < done for n in range(4)]
    await bench.inject(0, body="no arrival")
    assert await told() == [True] * 4
    assert await bench.store.is_applied(1, "c-1") is None
    assert await bench.store.is_applied(0, "c-9") is None
    assert await bench.store.is_applied(0, "call-1") is None


# Following the event lane and the answers together.


async def test_answers_and_announcements_are_followed_together(bench: Bench) -> None:
    """One read gives what is new of both, each stream from its own place, in order; silent streams are left out."""
    await commit(
        bench,
        *[Announce("timer.started", "a", 1, b"1"), Announce("timer.closing", "a", 2, b"2")],
        *[Reply("me", "APPLIED", "c-1", b"one"), Reply("me", "LATE", "c-2", b"two"), Reply("other", "LATE", "x", b"")],
    )
    await commit(bench, Announce("timer.ended", "z", 9, b"9"), shard=1)
    news = await bench.store.follow({0: START, 1: START, 2: START}, {"me": START, "nobody": START}, 10, 0)
    assert {shard: [entry.body for entry in entries] for shard, entries in news.updates.items()} == {
        0: [b"1", b"2"],
        1: [b"9"],
    }
    assert {who: [(entry.command_id, entry.body) for entry in entries] for who, entries in news.replies.items()} == {
        "me": [("c-1", b"one"), ("c-2", b"two")]
    }
    rest = await bench.store.follow(
        {0: news.updates[0][0].stream_id}, {"me": news.replies["me"][0].stream_id}, 10, 0
    )  # fmt: skip
    assert [entry.body for entry in rest.updates[0]] == [b"2"]
    assert [entry.body for entry in rest.replies["me"]] == [b"two"]


async def test_a_read_takes_no_more_than_it_asked_for(bench: Bench) -> None:
    """At most `count` of each stream; the next read goes on behind them."""
    await commit(bench, *[Announce("timer.extended", "a", n, b"") for n in range(5)])
    await commit(bench, *[Reply("me", "APPLIED", f"c-{n}", b"") for n in range(5)])
    updates, replies, since, answered = [], [], START, START
    for _ in range(10):
        news = await bench.store.follow({0: since}, {"me": answered}, 2, 0)
        if news == News({}, {}):
            break
        assert all(len(entries) <= 2 for entries in (*news.updates.values(), *news.replies.values()))
        updates += news.updates.get(0, [])
        replies += news.replies.get("me", [])
        since, answered = updates[-1].stream_id, replies[-1].stream_id
    assert [entry.version for entry in updates] == list(range(5))
    assert [entry.command_id for entry in replies] == [f"c-{n}" for n in range(5)]


@pytest.mark.parametrize("kind", ["an update", "a reply"])
async def test_a_follower_is_woken_by_either(bench: Bench, kind: str) -> None:
    """Whoever waits for both is woken by one; without any the wait ends by itself, with nothing."""
    assert await bench.store.follow({0: START}, {"me": START}, 10, 0) == News({}, {})
    assert await bench.store.follow({0: START}, {"me": START}, 10, 20) == News({}, {})
    following = asyncio.create_task(bench.store.follow({0: START, 1: START}, {"me": START}, 10, 1_000))
    await until(bench.blocked)
    await commit(bench, Reply("somebody else", "APPLIED", "c-0", b""))
    if kind == "a reply":
        await commit(bench, Reply("me", "APPLIED", "c-1", b"one"))
    else:
        await commit(bench, Announce("timer.started", "a", 1, b"one"), shard=1)
    async with asyncio.timeout(WITHIN_S):
        news = await following
        if news == News({}, {}):  # it had waited for a second before there was any
            news = await bench.store.follow({0: START, 1: START}, {"me": START}, 10, 0)
    assert [entry.body for entry in (*news.updates.get(1, []), *news.replies.get("me", []))] == [b"one"]


@pytest.mark.requirement("B4")
async def test_what_a_commit_announced_is_never_later_than_its_answer(bench: Bench) -> None:
    """While commits go on: when an answer is read, the announcement of the same commit was read before or with it."""

    async def write() -> None:
        for number in range(60):
            await commit(bench, Reply("me", "APPLIED", str(number), b""), Announce("timer.extended", "a", number, b""))
            await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    since, answered = START, START
    announced, answers = -1, 0
    async with asyncio.timeout(WITHIN_S):
        while answers < 60:
            news = await bench.store.follow({0: since}, {"me": answered}, 100, 20)
            for update in news.updates.get(0, []):
                since, announced = update.stream_id, update.version
            for reply in news.replies.get("me", []):
                answered, answers = reply.stream_id, answers + 1
                assert int(reply.command_id) <= announced
    await writing
