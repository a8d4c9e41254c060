"""The store contract of `commit`, run against every store: four guards in their order, all or nothing, every operation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final
from uuid import uuid4

import pytest

from engine.contract.audit import ChainHead, chained
from engine.contract.cursors import START
from engine.contract.timers import TimerRecord, checksum, sealed
from engine.domain.instants import EpochMs
from engine.store.protocol import (
    Announce,
    Batch,
    BindOffer,
    CommitResult,
    Committed,
    Draft,
    Early,
    Fenced,
    Group,
    KeepOutcome,
    Operation,
    Park,
    PlaceClosed,
    PlaceLive,
    PlacePaused,
    PutTimer,
    Record,
    Reply,
    Requeue,
    ShardHead,
    Superseded,
    Undrained,
    Unpark,
)
from tests.contracts.stores import LONG_AGO_MS, Bench
from tests.engine.domain.examples import IN_STATUS, Status

PLACE: Final[dict[Group, Callable[[str, EpochMs], Operation]]] = {
    Group.LIVE: PlaceLive,
    Group.PAUSED: PlacePaused,
    Group.CLOSED: PlaceClosed,
}
"""What puts an auction into each group of auctions; commands in troubleshooting are no auctions."""


def record(auction_id: str, version: int = 3) -> TimerRecord:
    """A running auction."""
    auction = IN_STATUS[Status.ACTIVE][0]
    registration = replace(auction.registered, auction_id=auction_id)
    return TimerRecord(
        replace(auction, auction_id=auction_id, registration=registration, version=version), "trace-1", "req-1"
    )


def put(auction_id: str, version: int = 3) -> PutTimer:
    """Write that auction."""
    return PutTimer(auction_id, sealed(record(auction_id, version)))


async def claimed(bench: Bench, shard: int = 0) -> int:
    """The epoch of the lease of a shard, which "me" holds."""
    lease = await bench.store.lease(shard)
    return (lease if lease.holder == "me" else await bench.store.claim(shard, "me", None)).epoch


async def batch_on(bench: Bench, *operations: Operation, shard: int = 0, **changes: Any) -> Batch:
    """A batch that every guard lets pass, unless `changes` say otherwise; every batch adds one audit record."""
    epoch = await claimed(bench, shard)
    head = await bench.store.head(shard)
    chain, fields = chained(head.chain, {"event_type": "test", "auction_id": "a"})
    made = Batch(shard, "me", epoch, uuid4().hex, bench.now(), after=head, intake=head.intake, chain=chain)
    made.operations = [Record(fields), *operations]
    return replace(made, **changes)


async def commit(bench: Bench, *operations: Operation, shard: int = 0, **changes: Any) -> Committed:
    """Commit operations that nothing stands against."""
    result = await bench.store.commit(await batch_on(bench, *operations, shard=shard, **changes))
    assert isinstance(result, Committed)
    return result


async def refused(bench: Bench, batch: Batch) -> CommitResult:
    """The answer to a batch that is refused, after which the store holds what it held."""
    held = await bench.dump()
    answer = await bench.store.commit(batch)
    assert not isinstance(answer, Committed)
    assert await bench.dump() == held
    return answer


EVERYTHING: Final[list[Operation]] = [
    put("a", version=1),
    PlaceLive("a", EpochMs(50)),
    put("b", version=1),
    PlacePaused("b", EpochMs(60)),
    put("c", version=1),
    PlaceClosed("c", EpochMs(70)),
    Announce("timer.started", "a", 1, b"{}"),
    Reply("inbox-1", "APPLIED", "c-1", b"{}"),
    KeepOutcome("c-1", b"{}"),
    Park("c-2", EpochMs(5), b"{}"),
    Park("c-3", EpochMs(4), b"{}"),
    Unpark("c-3"),
    Requeue("c-3", b"again", 2, EpochMs(4)),
    BindOffer("o-1", "auction a", forget=False),
    BindOffer("o-2", "cancelled {}", forget=True),
]
"""One of each operation."""


# All.


async def test_a_commit_does_everything_it_says(bench: Bench) -> None:
    """Every operation of a batch has its effect, in one step with the cursor, the chain and the stamp."""
    before = bench.now()
    batch = await batch_on(bench, *EVERYTHING, intake="7-0")
    result = await bench.store.commit(batch)
    assert isinstance(result, Committed)
    assert before - 1 <= result.at <= bench.now() + 1
    assert await bench.store.head(0) == ShardHead("7-0", batch.chain, result.at)
    assert await bench.store.timers(0, ["a", "b", "c"]) == [record("a", 1), record("b", 1), record("c", 1)]
    placed = [[(at.score, at.auction_id) for at in await bench.store.page(0, group, None, 9)] for group in Group]
    assert placed == [[(50, "a")], [(60, "b")], [(70, "c")], [(5, "c-2")]]
    assert await bench.audit(0) == [batch.operations[0].fields]  # type: ignore[union-attr]
    (update,) = (await bench.store.read_updates({0: START}, 9, 0))[0]
    assert (update.type, update.auction_id, update.version, update.body) == ("timer.started", "a", 1, b"{}")
    assert await bench.replies("inbox-1") == [("APPLIED", "c-1", b"{}")]
    assert await bench.store.outcome(0, "c-1") == b"{}"
    assert await bench.troubleshooting(0) == {"c-2": b"{}"}
    (requeued,) = (await bench.store.read_intake({0: START}, 9, 0))[0]
    assert (requeued.event_id, requeued.body, requeued.at) == ("c-3", b"again", result.at)
    assert await bench.store.offers(0, ["o-1", "o-2"]) == ["auction a", "cancelled {}"]


async def test_a_batch_without_operations_moves_the_cursor(bench: Bench) -> None:
    """Events that had no effect are acknowledged all the same."""
    batch = replace(await batch_on(bench, intake="9-0"), operations=[])
    batch.chain = batch.after.chain
    assert isinstance(await bench.store.commit(batch), Committed)
    head = await bench.store.head(0)
    assert (head.intake, head.chain) == ("9-0", ChainHead())
    assert await bench.audit(0) == []


async def test_a_timer_is_written_field_by_field(bench: Bench) -> None:
    """Fields that a later operation names are replaced, the others stay as they were."""
    await commit(bench, put("a", version=1))
    after = replace(record("a", 2).auction, reason="späť \n\x00")
    changed = {"version": "2", "reason": "späť \n\x00", "checksum": checksum(after)}
    await commit(bench, PutTimer("a", changed), versions={"a": 1})
    (timer,) = await bench.store.timers(0, ["a"])
    assert timer.auction == after


async def test_operations_happen_in_their_order(bench: Bench) -> None:
    """Of two that touch the same thing the later one stands; streams keep the order of the batch."""
    await commit(
        bench,
        *[put("a", version=1), put("a", version=2), PlaceLive("a", EpochMs(50)), PlaceLive("a", EpochMs(55))],
        *[Announce("timer.started", "a", 1, b"1"), Announce("timer.extended", "a", 2, b"2")],
        *[Reply("r", "APPLIED", "c-1", b"1"), Reply("r", "LATE", "c-2", b"2")],
        *[Park("c", EpochMs(5), b"1"), Park("c", EpochMs(6), b"2")],
    )
    assert (await bench.store.timers(0, ["a"])) == [record("a", 2)]
    assert [at.score for at in await bench.store.page(0, Group.LIVE, None, 9)] == [55]
    assert [update.body for update in (await bench.store.read_updates({0: START}, 9, 0))[0]] == [b"1", b"2"]
    assert [command_id for _, command_id, _ in await bench.replies("r")] == ["c-1", "c-2"]
    assert await bench.troubleshooting(0) == {"c": b"2"}
    assert [at.score for at in await bench.store.page(0, Group.PARKED, None, 9)] == [6]


@pytest.mark.parametrize("first", list(PLACE))
@pytest.mark.parametrize("then", list(PLACE))
async def test_an_auction_stands_in_one_group(bench: Bench, first: Group, then: Group) -> None:
    """Whatever group an auction was in, a new place is its only one."""
    await commit(bench, put("a"), PLACE[first]("a", EpochMs(5)))
    await commit(bench, PLACE[then]("a", EpochMs(6)))
    found = {group: [at.score for at in await bench.store.page(0, group, None, 9)] for group in PLACE}
    assert found == {group: [6] if group is then else [] for group in PLACE}


async def test_shards_are_committed_apart(bench: Bench) -> None:
    """A commit touches nothing of another shard."""
    await commit(bench, *EVERYTHING, intake="7-0", shard=1)
    assert (await bench.store.head(0)).intake == START
    assert await bench.store.timers(0, ["a"]) == [None]
    assert await bench.audit(0) == []
    assert await bench.store.parked(0) == 0


# The stamp.


async def test_a_commit_is_stamped_like_an_arrival(bench: Bench) -> None:
    """Within 250 ms of the estimate, with the shard's offset, and never back."""
    est = EpochMs(bench.now() - LONG_AGO_MS)
    assert (await commit(bench, est=est)).at == est + 250
    est = EpochMs(bench.now() + LONG_AGO_MS)
    high = (await commit(bench, est=est)).at
    assert high == est - 250
    assert (await commit(bench)).at == high
    await bench.shift_authority(1, -200)
    before = bench.now()
    assert before - 201 <= (await commit(bench, shard=1)).at <= bench.now() - 199


async def test_after_a_commit_no_event_arrives_earlier(bench: Bench) -> None:
    """The stamp of a commit is a floor for every arrival that follows: what was closed stays closed."""
    at = (await commit(bench, est=EpochMs(bench.now() + LONG_AGO_MS))).at
    (appended,) = await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    assert appended.at == at


async def test_after_an_arrival_no_commit_is_stamped_earlier(bench: Bench) -> None:
    """And the other way round."""
    (appended,) = await bench.store.append(0, [Draft("e-1", b"")], EpochMs(bench.now() + LONG_AGO_MS), "c-1")
    assert (await commit(bench)).at == appended.at


# Guard 1: the same commit again.


async def test_the_last_commit_can_be_repeated(bench: Bench) -> None:
    """A commit whose answer was lost is answered again and done once, although its guards would no longer let it pass."""
    batch = await batch_on(bench, *EVERYTHING, intake="7-0", versions={"a": 0})
    first = await bench.store.commit(batch)
    held = await bench.dump()
    assert await bench.store.commit(replace(batch, est=EpochMs(batch.est + 40))) == first
    assert await bench.dump() == held


async def test_a_repeated_commit_is_answered_with_its_own_stamp(bench: Bench) -> None:
    """Also when events have arrived in between."""
    batch = await batch_on(bench, est=EpochMs(bench.now() - LONG_AGO_MS))
    first = await bench.store.commit(batch)
    await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    assert await bench.store.commit(batch) == first


async def test_a_repeated_commit_is_answered_before_the_lease_is_looked_at(bench: Bench) -> None:
    """What was done was done, whoever holds the lease now."""
    batch = await batch_on(bench)
    first = await bench.store.commit(batch)
    await bench.store.claim(0, "other", await bench.store.lease(0))
    assert await bench.store.commit(batch) == first


async def test_an_older_commit_cannot_be_repeated(bench: Bench) -> None:
    """Only the last one is remembered; an older one meets the guards, and changes nothing."""
    old = await batch_on(bench, put("a", version=1))
    await bench.store.commit(old)
    await commit(bench, put("a", version=2))
    assert isinstance(await refused(bench, old), Superseded)


# Guard 2: the fencing epoch.


async def test_a_fenced_engine_cannot_commit(bench: Bench) -> None:
    """After another engine's claim, a commit under the old epoch is refused, and the new epoch is named."""
    batch = await batch_on(bench, *EVERYTHING)
    taken = await bench.store.claim(0, "other", await bench.store.lease(0))
    assert await refused(bench, batch) == Fenced(taken.epoch)


async def test_an_epoch_that_was_never_given_out_cannot_commit(bench: Bench) -> None:
    """Nobody has claimed the shard yet."""
    head = await bench.store.head(0)
    batch = Batch(0, "me", 1, "c-1", bench.now(), head, START, head.chain, operations=[*EVERYTHING])
    assert await refused(bench, batch) == Fenced(0)


async def test_an_epoch_is_worth_nothing_to_somebody_else(bench: Bench) -> None:
    """A failover can lose a claim and give its epoch out again: who got it first is fenced by the name."""
    batch = await batch_on(bench, *EVERYTHING)
    assert await refused(bench, replace(batch, holder="other")) == Fenced(batch.epoch)


async def test_fencing_is_decided_before_the_state(bench: Bench) -> None:
    """An engine that is fenced and behind is told that it is fenced."""
    batch = await batch_on(bench, *EVERYTHING)
    batch = replace(batch, epoch=batch.epoch + 1, after=replace(batch.after, intake="5-0"), versions={"a": 9})
    assert isinstance(await refused(bench, batch), Fenced)


# Guard 3: where the shard and its auctions stand.


async def test_a_commit_built_on_another_history_is_superseded(bench: Bench) -> None:
    """A record of the same number and another hash: after a failover the log was written anew, and the chain would break."""
    batch = await batch_on(bench, *EVERYTHING)
    chain = replace(batch.after.chain, hash="f" * 64)
    assert isinstance(await refused(bench, replace(batch, after=replace(batch.after, chain=chain))), Superseded)


async def test_a_commit_built_on_another_cursor_is_superseded(bench: Bench) -> None:
    """The shard's cursor is not where the batch thinks."""
    batch = await batch_on(bench, *EVERYTHING)
    assert isinstance(await refused(bench, replace(batch, after=replace(batch.after, intake="5-0"))), Superseded)


async def test_a_commit_built_on_another_audit_record_is_superseded(bench: Bench) -> None:
    """The audit chain has gone on: linking to an older record would break it."""
    batch = await batch_on(bench, *EVERYTHING)
    batch = replace(batch, after=replace(batch.after, chain=ChainHead(4, "f" * 64)))
    assert isinstance(await refused(bench, batch), Superseded)


@pytest.mark.requirement("R11")
@pytest.mark.parametrize("version", [0, 2, 4])
async def test_a_commit_built_on_another_version_is_superseded(bench: Bench, version: int) -> None:
    """Version 3 stands: a batch built on any other is refused as a whole, also for the auctions it is right about."""
    await commit(bench, put("a", version=3), put("z", version=1))
    batch = await batch_on(bench, *EVERYTHING, versions={"z": 1, "a": version})
    assert isinstance(await refused(bench, batch), Superseded)


@pytest.mark.requirement("R11")
async def test_an_auction_that_is_not_there_has_version_0(bench: Bench) -> None:
    """A registration builds on version 0, and any other version of an unknown auction is wrong."""
    assert isinstance(await refused(bench, await batch_on(bench, versions={"a": 1})), Superseded)
    await commit(bench, put("a", version=1), versions={"a": 0})
    await commit(bench, put("a", version=2), versions={"a": 1})


async def test_a_damaged_version_is_no_version(bench: Bench) -> None:
    """A version that is no number equals none."""
    await commit(bench, put("a"))
    await bench.damage(0, "a", "version", "many")
    assert isinstance(await refused(bench, await batch_on(bench, versions={"a": 3})), Superseded)


async def test_the_state_is_decided_before_the_time(bench: Bench) -> None:
    """A close that is superseded and early is told that it is superseded."""
    batch = await batch_on(bench, *EVERYTHING, versions={"a": 9}, due_at=EpochMs(bench.now() + 60_000))
    assert isinstance(await refused(bench, batch), Superseded)


# Guard 4: never early, and drained.


@pytest.mark.requirement("B1")
async def test_a_close_is_not_early(bench: Bench) -> None:
    """At `due_at` by the stamp, not a millisecond before; how much is lacking is said."""
    est = EpochMs(bench.now() - LONG_AGO_MS)
    stamp = est + 250
    batch = await batch_on(bench, *EVERYTHING, est=est)
    assert await refused(bench, replace(batch, due_at=EpochMs(stamp + 1))) == Early(1)
    assert await refused(bench, replace(batch, due_at=EpochMs(stamp + 4_321))) == Early(4_321)
    assert await bench.store.commit(replace(batch, due_at=EpochMs(stamp))) == Committed(EpochMs(stamp))


@pytest.mark.requirement("B1")
async def test_a_close_waits_for_the_authority(bench: Bench) -> None:
    """An engine whose clock is 200 ms ahead proposes too early, and the authority says so."""
    due_at = EpochMs(bench.now() + 10_000)
    answer = await refused(bench, await batch_on(bench, est=EpochMs(due_at + 50), due_at=due_at))
    assert isinstance(answer, Early)
    assert 0 < answer.by_ms <= 200


@pytest.mark.requirement("B2")
async def test_a_bid_in_time_keeps_an_auction_open(bench: Bench) -> None:
    """An unapplied entry that arrived before the deadline stops the close; one that arrived at it does not."""
    arrived = EpochMs(bench.now() - LONG_AGO_MS + 250)
    await bench.store.append(0, [Draft("e-1", b"")], EpochMs(bench.now() - LONG_AGO_MS), "c-1")
    arrived = (await bench.store.read_intake({0: START}, 1, 0))[0][0].at
    batch = await batch_on(bench, *EVERYTHING)
    assert await refused(bench, replace(batch, due_at=EpochMs(arrived + 1))) == Undrained()
    assert isinstance(await bench.store.commit(replace(batch, due_at=arrived)), Committed)


@pytest.mark.requirement("B2")
async def test_a_bid_that_the_close_applies_does_not_stop_it(bench: Bench) -> None:
    """What the batch itself takes from the intake is applied; what lies behind that is not."""
    await bench.store.append(0, [Draft("e-1", b""), Draft("e-2", b"")], EpochMs(bench.now() - LONG_AGO_MS), "c-1")
    first, second = (await bench.store.read_intake({0: START}, 9, 0))[0]
    batch = await batch_on(bench, due_at=EpochMs(first.at + 10))
    assert await refused(bench, replace(batch, intake=first.stream_id)) == Undrained()
    assert isinstance(await bench.store.commit(replace(batch, intake=second.stream_id)), Committed)


@pytest.mark.requirement("B2")
@pytest.mark.parametrize("fields", [{"surprise": "!"}, {"at": "yesterday", "id": "e", "body": "{}"}])
async def test_an_entry_without_an_arrival_stops_a_close(bench: Bench, fields: dict[str, str]) -> None:
    """Nobody knows when poison arrived, so it must be set aside first."""
    poison = await bench.inject(0, **fields)
    batch = await batch_on(bench, due_at=EpochMs(bench.now() - LONG_AGO_MS))
    assert await refused(bench, batch) == Undrained()
    assert isinstance(await bench.store.commit(replace(batch, intake=poison)), Committed)


async def test_early_is_decided_before_undrained(bench: Bench) -> None:
    """A close that is both is early: applying the entries would not make it possible."""
    await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    batch = await batch_on(bench, due_at=EpochMs(bench.now() + 60_000))
    assert isinstance(await refused(bench, batch), Early)


async def test_waiting_entries_do_not_stop_what_is_not_due_by_time(bench: Bench) -> None:
    """A batch that only applies events may leave others for the next one."""
    await bench.store.append(0, [Draft("e-1", b"")], EpochMs(bench.now() - LONG_AGO_MS), "c-1")
    await bench.inject(0, surprise="!")
    await commit(bench, *EVERYTHING)


async def test_a_refused_batch_can_be_committed_later(bench: Bench) -> None:
    """A refusal remembers nothing: the same commit id is new as long as it was not committed."""
    est = EpochMs(bench.now() - LONG_AGO_MS)
    batch = await batch_on(bench, *EVERYTHING, est=est, due_at=EpochMs(est + 300))
    assert await refused(bench, batch) == Early(50)
    assert await bench.store.commit(replace(batch, est=EpochMs(est + 50))) == Committed(EpochMs(est + 300))


async def test_what_has_been_closed_for_long_is_forgotten(bench: Bench) -> None:
    """Auctions closed before the given instant leave the listing, the one closed at it and live ones stay."""
    await commit(bench, put("a"), PlaceClosed("a", EpochMs(6)), put("b"), PlaceClosed("b", EpochMs(7)))
    await commit(bench, put("c"), PlaceLive("c", EpochMs(5)))
    await bench.store.forget_closed(0, EpochMs(7))
    assert [at.auction_id for at in await bench.store.page(0, Group.CLOSED, None, 10)] == ["b"]
    assert [at.auction_id for at in await bench.store.page(0, Group.LIVE, None, 10)] == ["c"]
