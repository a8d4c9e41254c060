"""Tests for engine.shard: the single writer of a fold, on the memory store and hostile clocks, turn by turn."""

import asyncio
from copy import deepcopy
from dataclasses import replace
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from engine import shard as shard_module
from engine.contract.audit import verify
from engine.contract.intake import EventType
from engine.contract.keys import ShardKeys
from engine.contract.offers import auction_bound_in
from engine.domain.events import Bid
from engine.domain.instants import EpochMs
from engine.shard import UNDRAINED_RETRY_MS, ShardLostError
from engine.store.protocol import Batch, Committed, Early, Entry, Fenced, Group, Superseded, Unattended, Undrained
from tests.fakes.events import (
    bid,
    cancel,
    cancel_offer,
    draft,
    pause,
    poison,
    reschedule,
    resume,
    start,
)
from tests.fakes.loop import run
from tests.fakes.store import Fault, FaultyStore
from tests.fakes.world import QUICK, Worker, World, at, passes

LIFE = ["auction_timer_registered", "auction_timer_started", "auction_timer_closing", "auction_timer_ended"]


@pytest.fixture
def world() -> World:
    """A world at its beginning."""
    return World()


@pytest.fixture
async def worker(world: World) -> Worker:
    """Somebody who works on shard 0."""
    return await Worker(world).begin()


def quick(auction_id: str = "a", begins: float = 10, ends: float = 310, **more: Any) -> Any:
    """The start of an auction of five minutes, whose window opens a minute before its end."""
    return start(auction_id, at(begins), at(ends), policy=QUICK, **more)


async def ended_at(world: World, auction_id: str = "a") -> int | None:
    """When an auction ended."""
    (record,) = await world.store.timers(0, [auction_id])
    return record.auction.ended_at


# A life.


@pytest.mark.requirement("R1")
@pytest.mark.requirement("R5")
async def test_an_auction_lives_from_its_start_to_its_close(world: World, worker: Worker) -> None:
    """Registered at once, started, closing and ended each at its own instant, announced once, then without a deadline."""
    await world.append(quick())
    await worker.work()
    (record,) = await world.store.timers(0, ["a"])
    assert (record.auction.status, record.auction.ends_at, record.auction.policy) == ("SCHEDULED", at(310), QUICK)
    assert world.shard.groups[Group.LIVE] == {"a": at(310)}
    await worker.live_until(at(400))
    assert world.facts("a") == LIFE
    assert world.announced("a") == ["timer.started", "auction_timer_started", "timer.closing", "timer.ended"]
    occurred = [int(record["occurred_at"]) for record in world.shard.audit]
    assert occurred == [at(0), at(10), at(250), at(310)]
    assert await ended_at(world) == at(310)
    assert world.shard.groups[Group.LIVE] == {}
    assert world.shard.groups[Group.CLOSED] == {"a": at(310)}
    assert worker.calendar.agenda.next_at() is None
    assert worker.shard.live == {}


@pytest.mark.requirement("R15")
async def test_bids_near_the_end_extend(world: World, worker: Worker) -> None:
    """A bid in the window moves the end, is announced with what it did, and closes at the new end."""
    await world.append(quick())
    await worker.live_until(at(290))
    await world.append(bid("a", "b-1"))
    await worker.live_until(at(340))
    assert await ended_at(world) is None
    assert world.announced("a")[-2:] == ["bid.accepted", "timer.extended"]
    extended = orjson.loads(world.shard.updates[-1].body)
    assert (extended["previous_ends_at"], extended["timer"]["ends_at"], extended["bid_id"]) == (at(310), at(350), "b-1")
    await worker.live_until(at(400))
    assert await ended_at(world) == at(350)
    assert worker.sample("auctions_timer_extensions_total", clipped_by="none") == 1


@pytest.mark.requirement("R5")
async def test_a_start_whose_end_is_past_is_closed_at_once(world: World, worker: Worker) -> None:
    """Registered and closed in one commit, as of its end."""
    world.line.advance(100_000)
    await world.append(quick(begins=10, ends=70))
    await worker.work()
    assert world.facts("a") == LIFE
    assert await ended_at(world) == at(70)
    assert worker.turns == 1


async def test_a_pause_holds_the_clock(world: World, worker: Worker) -> None:
    """Paused, an auction is due for nothing; resumed, it goes on with what was left."""
    await world.append(quick())
    await worker.live_until(at(110))
    await world.append(pause("a", "p-1"))
    await worker.work()
    assert world.shard.groups[Group.PAUSED] == {"a": at(110)}
    assert worker.calendar.agenda.next_at() is None
    assert "a" in worker.shard.live
    await worker.live_until(at(1_000))
    await world.append(resume("a", "r-1"))
    await worker.live_until(at(2_000))
    assert await ended_at(world) == at(310 + 890)


async def test_an_operator_moves_the_end(world: World, worker: Worker) -> None:
    """A changed schedule closes at the new end, not at the old one."""
    await world.append(quick())
    await worker.live_until(at(50))
    await world.append(reschedule("a", "s-1", at(100)))
    await worker.live_until(at(600))
    assert await ended_at(world) == at(100)


@pytest.mark.requirement("R27")
async def test_a_cancelled_auction_leaves_no_ghost(world: World, worker: Worker) -> None:
    """No deadline, nothing due, no further fact; a replayed start stays without effect."""
    await world.append(quick())
    await worker.live_until(at(20))
    await world.append(cancel("a"))
    await worker.work()
    assert worker.calendar.agenda.next_at() is None
    assert world.shard.groups[Group.LIVE] == {}
    await world.append(quick(event_id="start-again"))
    await worker.live_until(at(600))
    assert world.facts("a") == ["auction_timer_registered", "auction_timer_started", "auction_timer_cancelled"]
    assert world.parked() == {}


# Fairness: what was in time counts, however late it is processed.


@pytest.mark.requirement("B2")
async def test_a_bid_in_time_counts_however_late_it_is_processed(world: World, worker: Worker) -> None:
    """The engine stands still over the deadline; the bid that had arrived before it extends, one at the deadline is late."""
    await world.append(quick())
    await worker.live_until(at(200))
    world.line.advance(109_999)
    await world.append(bid("a", "in-time"))
    world.line.advance(1)
    await world.append(bid("a", "extended-too"))
    world.line.advance(59_999)
    await world.append(bid("a", "at-the-new-end"))
    world.line.advance(600_000)
    await worker.work()
    assert world.facts("a")[2:] == [
        "auction_timer_closing",
        "auction_timer_extended",
        "auction_timer_extended",
        "auction_timer_extended",
        "auction_timer_ended",
    ]
    assert await ended_at(world) == at(310) + 59_999 + 60_000


@pytest.mark.requirement("B2")
async def test_the_deadline_wins_a_tie(world: World, worker: Worker) -> None:
    """A bid that arrived at the very deadline is late, and the auction closed as of it."""
    await world.append(quick())
    await worker.live_until(at(200))
    world.line.advance(110_000)
    await world.append(bid("a", "tie", reply_to="inbox"))
    await worker.work()
    assert world.facts("a")[-2:] == ["auction_timer_ended", "late_bid_ignored"]
    assert await ended_at(world) == at(310)
    assert [answer["outcome"] for answer in world.answers("inbox")] == ["LATE"]


@pytest.mark.requirement("B2")
@pytest.mark.parametrize("batch_max", [1, 2, 3])
async def test_a_backlog_is_folded_in_its_order_whatever_the_batches(world: World, batch_max: int) -> None:
    """Time may not overtake what waits: each batch goes only as far as the last entry it takes, and is never refused."""
    store = FaultyStore(world.store)
    worker = await Worker(world, store=store, batch_max=batch_max).begin()
    await world.append(quick("a"), quick("b", ends=320))
    await worker.live_until(at(240))
    for second, auction_id in [(260, "a"), (300, "b"), (315, "a"), (350, "b"), (374, "a")]:
        world.line.advance(at(second) - world.authority.now_ms)
        await world.append(bid(auction_id, f"{auction_id}-{second}"))
    world.line.advance(1_000_000)
    await worker.work()
    assert await ended_at(world, "a") == at(374 + 60)
    assert await ended_at(world, "b") == at(350 + 60)
    assert all(isinstance(answer, Committed) for _, answer in store.commits)


@pytest.mark.requirement("B2")
async def test_an_undrained_close_waits_for_the_bid(world: World, worker: Worker) -> None:
    """A bid reaches the intake between the last read and the close: the close is refused, the bid applied, the end moved."""
    store = FaultyStore(world.store)
    worker = await Worker(world, store=store).begin()
    await world.append(quick())
    await worker.live_until(at(309))
    late_reader: list[asyncio.Task[Any]] = []

    def sneak_in(batch: Batch) -> None:
        if batch.due_at == at(310) and not late_reader:
            late_reader.append(asyncio.ensure_future(asyncio.sleep(0)))
            entry = Entry(world.shard.next_id(), EpochMs(at(310) - 1), "bid-x", bid("a", "x").body)
            world.shard.events.append(entry)

    store.before_commit = sneak_in
    await worker.live_until(at(500))
    answers = [answer for _, answer in store.commits]
    assert answers.count(Undrained()) == 1
    assert world.facts("a")[-2:] == ["auction_timer_extended", "auction_timer_ended"]
    assert await ended_at(world) == at(310) - 1 + 60_000
    await asyncio.gather(*late_reader)


async def test_a_close_that_waits_for_a_lost_read_does_not_fill_the_time_with_commits(world: World) -> None:
    """600 commits in three seconds were seen: each refusal doubles the wait, up to a bound, and a commit ends that."""
    store = FaultyStore(world.store)
    worker = await Worker(world, store=store).begin()
    await world.append(quick())
    await worker.live_until(at(309))
    world.line.advance(2_000)
    world.shard.events.append(Entry(world.shard.next_id(), EpochMs(at(310) - 1), "bid-x", bid("a", "x").body))
    shard, refused_before = worker.shard, len(store.commits)
    waits = []
    for _ in range(8):
        shard.fall_due(["a"])
        await shard.turn()
        due_at = worker.calendar.agenda.next_at()
        assert due_at is not None
        waits.append(due_at - worker.clock.now_ms())
    assert waits == [5, 10, 20, 40, 80, 160, 160, 160]
    assert [answer for _, answer in store.commits[refused_before:]] == [Undrained()] * 8
    await worker.work()
    assert shard._undrained_ms == UNDRAINED_RETRY_MS
    assert world.facts("a")[-1] == "auction_timer_extended"


# Never early.


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("ahead_ms", [1, 100, 249, 250])
async def test_a_clock_that_is_ahead_closes_nothing_early(world: World, ahead_ms: int) -> None:
    """The worker's clock runs ahead of the authority: its proposals are refused, it waits, and closes when it is time."""
    store = FaultyStore(world.store)
    worker = await Worker(world, store=store, clock=world.clock(ahead_ms=ahead_ms)).begin()
    await world.append(quick())
    await worker.live_until(at(400))
    closes = [
        (batch, answer)
        for batch, answer in store.commits
        if any(getattr(op, "type", "") == "timer.ended" for op in batch.operations)
    ]
    assert closes[0][1] == Early(ahead_ms)
    assert [type(answer) for _, answer in closes[1:]] == [Committed]
    assert all(answer.at >= at(310) for _, answer in closes if isinstance(answer, Committed))
    assert await ended_at(world) == at(310)
    assert worker.sample("auctions_timer_early_closes_total") == 0


@pytest.mark.requirement("B1")
async def test_early_proposals_do_not_hold_up_events(world: World) -> None:
    """What was refused as early is looked at again later; the entries of the same batch are applied at once."""
    store = FaultyStore(world.store)
    worker = await Worker(world, store=store, clock=world.clock(ahead_ms=200)).begin()
    await world.append(quick("a", ends=310), quick("b", ends=600))
    await worker.live_until(at(305))
    world.line.advance(at(310) - 150 - world.authority.now_ms)
    await world.append(bid("b", "b-1"))
    await worker.work()
    assert isinstance(store.commits[-2][1], Early)
    assert world.facts("b")[-1] == "bid_accepted"
    assert await ended_at(world, "a") is None
    await worker.live_until(at(311))
    assert await ended_at(world, "a") == at(310)


@pytest.mark.requirement("B1")
async def test_close_lateness_is_measured(world: World, worker: Worker) -> None:
    """From the deadline to the stamp of the commit that closed."""
    await world.append(quick())
    await worker.live_until(at(305))
    world.line.advance(5_040)
    await worker.work()
    assert worker.sample("auctions_timer_close_lateness_ms_count") == 1
    assert worker.sample("auctions_timer_close_lateness_ms_sum") == 40


@pytest.mark.requirement("R31")
async def test_trigger_lag_is_measured(world: World, worker: Worker) -> None:
    """From the instant the producer stated to the registration; a producer whose clock is ahead counts as 0."""
    world.line.advance(2_000)
    await world.append(quick("a", occurred_at=at(1.5)), quick("b", occurred_at=at(9)), quick("c"))
    await worker.work()
    assert worker.sample("auctions_timer_trigger_lag_ms_count") == 2
    assert worker.sample("auctions_timer_trigger_lag_ms_sum") == 500


# Troubleshooting.


@pytest.mark.requirement("R29")
async def test_poison_is_parked_and_the_stream_goes_on(world: World, worker: Worker) -> None:
    """What cannot be read is kept with its error and payload, and what lies behind it is applied in the same turn."""
    await world.append(poison("p-1"), poison("p-2", b'{"type":"auctions.frobbed","auction_id":"a"}'), quick())
    world.shard.events.append(Entry(world.shard.next_id(), None, "", b"at yesterday"))
    await world.append(bid("a", "b-1"))
    await worker.work()
    parked = world.parked()
    unstamped = f"0-{world.shard.events[3].stream_id}"
    assert set(parked) == {"p-1", "p-2", unstamped}
    assert {(item["status"], item["error_code"], item["attempts"]) for item in parked.values()} == {
        ("IN_TROUBLESHOOTING_QUEUE", "SCHEMA_INVALID", 1)
    }
    assert parked["p-1"]["payload"] == "{not json"
    assert parked["p-2"]["payload"] == {"type": "auctions.frobbed", "auction_id": "a"}
    assert "auctions.frobbed" in parked["p-2"]["error"]
    assert "no arrival" in parked[unstamped]["error"]
    assert parked["p-1"]["first_seen_at"] == at(0)
    assert world.facts("a") == ["auction_timer_registered", "bid_accepted"]
    assert world.shard.intake_cursor == world.shard.events[-1].stream_id
    assert worker.sample("auctions_intake_applied_total", outcome="poison") == 3
    assert worker.turns == 1


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("batch_max", [1, 2, 3])
async def test_poison_behind_a_full_batch_blocks_nothing(world: World, batch_max: int) -> None:
    """A batch whose entries made time pass for an auction is committed, also when the next entry has no arrival."""
    worker = await Worker(world, batch_max=batch_max).begin()
    await world.append(quick())
    await worker.work()
    world.line.advance(260_000)
    await world.append(*[bid("a", f"b-{n}") for n in range(batch_max)])
    world.shard.events += [Entry(world.shard.next_id(), None, "", b"poison") for _ in range(3)]
    await world.append(bid("a", "last"))
    await worker.work(turns_max=20)
    assert len(world.parked()) == 3
    assert world.facts("a").count("auction_timer_extended") == 1
    assert world.shard.intake_cursor == world.shard.events[-1].stream_id


@pytest.mark.requirement("R29")
@pytest.mark.requirement("B1")
async def test_an_arrival_that_lies_in_the_future_is_poison(world: World, worker: Worker) -> None:
    """An entry stamped by somebody else, beyond what any genuine one can be: it closes nothing and blocks nothing."""
    await world.append(quick())
    await worker.live_until(at(20))
    forged = Entry(world.shard.next_id(), at(9_999), "forged", bid("a", "forged").body)
    world.shard.events.append(forged)
    await world.append(bid("a", "genuine"))
    await worker.work(turns_max=20)
    assert set(world.parked()) == {"forged"}
    assert world.facts("a")[-1] == "bid_accepted"
    assert await ended_at(world) is None
    assert world.shard.intake_cursor == world.shard.events[-1].stream_id


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("make", [lambda: bid("x", "b"), lambda: pause("x", "p"), lambda: reschedule("x", "s", at(50))])
async def test_an_unknown_auction_is_parked(world: World, worker: Worker, make: Any) -> None:
    """Anything but a start or a cancellation of an auction nobody has heard of waits for a person, and audits nothing."""
    await world.append(make())
    await worker.work()
    (parked,) = world.parked().values()
    assert (parked["error_code"], parked["event_type"].split(".")[0]) == ("UNKNOWN_AUCTION", "auctions")
    assert parked["payload"]["auction_id"] == "x"
    assert world.shard.audit == []
    assert world.shard.timers == {}


@pytest.mark.requirement("R2")
async def test_the_same_start_again_has_no_effect(world: World, worker: Worker) -> None:
    """Under another event id, before and after the end, and after a restart."""
    await world.append(quick())
    await worker.work()
    await world.append(quick(event_id="again-1"))
    await worker.live_until(at(400))
    await world.append(quick(event_id="again-2"))
    await worker.work()
    worker = await Worker(world).begin()
    await world.append(quick(event_id="again-3"))
    await worker.work()
    assert world.facts("a") == LIFE
    assert world.parked() == {}


@pytest.mark.requirement("R2")
async def test_another_start_for_a_known_auction_is_parked(world: World, worker: Worker) -> None:
    """Other terms conflict: the first registration stands, the second waits for a person and is told so."""
    await world.append(quick(), quick(event_id="other", ends=400, reply_to="inbox"))
    await worker.work()
    assert world.parked()["other"]["error_code"] == "CONFLICTING_REGISTRATION"
    assert world.parked()["other"]["reply_to"] == "inbox"
    (answer,) = world.answers("inbox")
    assert (answer["outcome"], answer["error_code"]) == ("IN_TROUBLESHOOTING_QUEUE", "CONFLICTING_REGISTRATION")
    assert world.facts("a") == ["auction_timer_registered"]
    (record,) = await world.store.timers(0, ["a"])
    assert record.auction.ends_at == at(310)


@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    "damage",
    [
        ("status", "ASLEEP"),
        ("policy", "{"),
        ("version", ""),
        ("auction_id", None),
    ],
)
async def test_events_for_a_damaged_timer_wait(world: World, worker: Worker, damage: tuple[str, str | None]) -> None:
    """A hash that somebody has damaged stops only its own auction: its events are parked, all others live on."""
    await world.append(quick("a"), quick("b"))
    await worker.work()
    field, value = damage
    if value is None:
        del world.shard.timers["a"][field]
    else:
        world.shard.timers["a"][field] = value
    with capture_logs() as lines:
        worker = await Worker(world).begin()
    assert [line["event"] for line in lines] == ["timer_unreadable"]
    assert lines[0]["error"].startswith("timer ''" if value is None else "timer 'a'")
    await world.append(bid("a", "for-a"), cancel("a"), quick("a", event_id="again"), bid("b", "for-b"))
    await worker.work(turns_max=20)
    parked = world.parked()
    assert set(parked) == {"bid-for-a", "cancel-a", "again"}
    assert {item["error_code"] for item in parked.values()} == {"TIMER_UNREADABLE"}
    assert world.facts("b")[-1] == "bid_accepted"
    await worker.live_until(at(400))
    assert await ended_at(world, "b") == at(310)


@pytest.mark.requirement("R29")
@pytest.mark.requirement("R12")
async def test_a_timer_that_was_written_over_is_put_back(world: World, worker: Worker) -> None:
    """The engine that holds the auction writes all of it in the place of what is there, with the next event, and says so."""
    await world.append(quick("a"), quick("b"))
    await worker.live_until(at(290))
    fields, name = dict(world.shard.timers["a"]), ShardKeys.of(0).timer("a")
    world.shard.damaged |= {name}
    await world.append(bid("a", "for-a"), bid("b", "for-b"))
    with capture_logs() as lines:
        await worker.work(turns_max=20)
    assert [(line["event"], line.get("key")) for line in lines] == [
        ("commit_superseded", None),
        ("key_begun_anew", name),
    ]
    assert world.shard.damaged == frozenset()
    assert world.shard.timers["a"].keys() == fields.keys()
    await worker.live_until(at(400))
    assert [await ended_at(world, "a"), await ended_at(world, "b")] == [at(350), at(350)]
    assert world.facts("a") == world.facts("b")


@pytest.mark.requirement("R29")
async def test_an_engine_that_finds_a_timer_or_a_set_written_over_holds_what_it_cannot_read(world: World) -> None:
    """It says what it is, and works on everything else; an event for the one waits."""
    worker = await Worker(world).begin()
    await world.append(quick("a"), quick("b"))
    await worker.work()
    world.shard.damaged |= {ShardKeys.of(0).timer("a"), ShardKeys.of(0).paused}
    with capture_logs() as lines:
        worker = await Worker(world).begin()
    assert [line["event"] for line in lines] == ["timer_unreadable", "timer_unreadable"]
    assert worker.sample("auctions_timers_held_total") == 2
    await world.append(bid("a", "for-a"), bid("b", "for-b"))
    await worker.live_until(at(400))
    assert world.parked()["bid-for-a"]["error_code"] == "TIMER_UNREADABLE"
    assert await ended_at(world, "b") == at(310)
    assert ShardKeys.of(0).timer("a") in world.shard.damaged


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("key", ["cursor", "events", "audit"])
def test_a_shard_that_was_written_over_waits_for_a_person(key: str) -> None:
    """It says which key it is, tries again now and then, and goes on where it stood when that is put right."""

    world = World()

    async def looking(worker: Worker, seconds: int) -> None:
        for _ in range(seconds):
            await passes(1)
            await worker.look()

    async def story() -> None:
        worker = await Worker(world).begin()
        await world.append(quick())
        await worker.work()
        name = getattr(ShardKeys.of(0), key)
        world.shard.damaged |= {name}
        running = asyncio.create_task(worker.shard.run())
        with capture_logs() as lines:
            worker.shard.doubt()
            await looking(worker, 21)
        assert {line["event"] for line in lines} == {"shard_held"}
        assert 2 <= len(lines) <= 6
        assert all(name in line["error"] for line in lines)
        assert world.facts("a") == LIFE[:1]
        world.shard.damaged = frozenset()
        await looking(worker, 6)
        assert world.facts("a") == LIFE[:2]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    run(world.line, story)


# Cancellations before and after the start (requirement R19).


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("by", ["auction", "offer"])
async def test_a_cancellation_before_the_start_waits_for_it(world: World, by: str, restarted: bool) -> None:
    """By auction id or by offer id, days before: when the start comes, the auction is registered as cancelled."""
    worker = await Worker(world).begin()
    await world.append(cancel("a") if by == "auction" else cancel_offer("o-1"))
    await worker.live_until(at(100))
    assert world.announced("a") == []
    if restarted:
        worker = await Worker(world).begin()
    await world.append(quick(offer_id="o-1", begins=200, ends=500))
    await worker.live_until(at(900))
    (record,) = await world.store.timers(0, ["a"])
    assert (record.auction.status, record.auction.reason) == ("CANCELLED", "withdrawn")
    assert record.auction.registered.ends_at == at(500)
    assert world.facts("a") == ["auction_timer_tombstoned", "auction_timer_registered"]
    assert world.announced("a") == ["timer.cancelled"], "as if the two had come in the other order"
    closed = {"a": record.auction.cancelled_at}
    assert world.shard.groups == {Group.LIVE: {}, Group.PAUSED: {}, Group.CLOSED: closed, Group.PARKED: {}}


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("begins", [200, 10])
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("by", ["auction", "offer"])
async def test_a_cancellation_after_the_start_cancels(world: World, by: str, restarted: bool, begins: float) -> None:
    """By either id, of a scheduled or a running auction."""
    worker = await Worker(world).begin()
    await world.append(quick(offer_id="o-1", begins=begins))
    await worker.live_until(at(100))
    if restarted:
        worker = await Worker(world).begin()
    await world.append(cancel("a") if by == "auction" else cancel_offer("o-1"))
    await worker.live_until(at(900))
    assert world.facts("a")[-1] == "auction_timer_cancelled"
    assert world.announced("a")[-1] == "timer.cancelled"
    assert world.shard.groups[Group.LIVE] == {}


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("order", ["cancel first", "start first"])
@pytest.mark.parametrize("by", ["auction", "offer"])
async def test_start_and_cancellation_in_one_batch(world: World, worker: Worker, by: str, order: str) -> None:
    """Whichever was first, the auction ends up cancelled, in one commit."""
    drafts = [cancel("a") if by == "auction" else cancel_offer("o-1"), quick(offer_id="o-1")]
    await world.append(*(drafts if order == "cancel first" else reversed(drafts)))
    await worker.work()
    assert worker.turns == 1
    (record,) = await world.store.timers(0, ["a"])
    assert record.auction.status == "CANCELLED"
    assert len(world.facts("a")) == 2
    assert [auction_bound_in(value) for value in await world.store.offers(0, ["o-1"])] == ["a"]


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("by", ["auction", "offer"])
async def test_a_cancellation_twice_or_after_the_end_changes_nothing(world: World, worker: Worker, by: str) -> None:
    """Neither is an error that a person must look at, and neither is audited."""

    def again(event_id: str) -> Any:
        return cancel("a", event_id=event_id) if by == "auction" else cancel_offer("o-1", event_id=event_id)

    await world.append(again("c-1"), again("c-2"), quick(offer_id="o-1"), again("c-3"))
    await worker.work()
    told = list(world.shard.audit)
    await world.append(again("c-4"))
    await worker.live_until(at(400))
    assert world.shard.audit == told
    assert world.parked() == {}
    await world.append(start("e", at(410), at(500), policy=QUICK, offer_id="o-2"))
    await worker.live_until(at(600))
    await world.append(cancel_offer("o-2") if by == "offer" else cancel("e"))
    await worker.work()
    assert world.facts("e") == LIFE
    assert world.parked() == {}


@pytest.mark.requirement("R19")
async def test_an_offer_stands_for_its_latest_auction(world: World, worker: Worker) -> None:
    """An offer that is auctioned again is cancelled in its new auction, and only there."""
    await world.append(quick("a", ends=70, offer_id="o-1"))
    await worker.live_until(at(100))
    await world.append(quick("b", begins=110, ends=400, offer_id="o-1"))
    await worker.work()
    await world.append(cancel_offer("o-1"))
    await worker.work()
    assert world.facts("a") == LIFE
    assert world.facts("b") == ["auction_timer_registered", "auction_timer_cancelled"]


# Replies.


@pytest.mark.requirement("R25")
async def test_everyone_who_asks_is_answered_once(world: World, worker: Worker) -> None:
    """Applied, unchanged, refused with both statuses, late: each with its outcome, the command's id and the timer."""
    ask = {"reply_to": "inbox"}
    await world.append(
        quick(**ask),
        quick(event_id="again", **ask),
        resume("a", "resume", **ask),
        cancel("a", **ask),
        cancel("a", event_id="cancel-2", **ask),
        bid("a", "late", **ask),
        bid("unknown", "b", **ask),
    )
    await worker.work()
    answers = world.answers("inbox")
    assert [(answer["command_id"], answer["outcome"]) for answer in answers] == [
        ("start-a", "APPLIED"),
        ("again", "UNCHANGED"),
        ("resume", "REFUSED"),
        ("cancel-a", "APPLIED"),
        ("cancel-2", "REFUSED"),
        ("bid-late", "LATE"),
        ("bid-b", "IN_TROUBLESHOOTING_QUEUE"),
    ]
    refused = answers[2]
    assert (refused["error_code"], refused["current_status"], refused["attempted_status"]) == (
        "FSM_TRANSITION_INVALID",
        "SCHEDULED",
        "ACTIVE",
    )
    assert answers[4]["error_code"] == "FSM_TERMINAL_IMMUTABLE"
    assert answers[3]["fact"] == "auction_timer_cancelled"
    assert [answer.get("timer", {}).get("status") for answer in answers] == [
        *["SCHEDULED"] * 3,
        *["CANCELLED"] * 3,
        None,
    ]
    assert {answer["arrival_ms"] for answer in answers} == {at(0)}
    assert [answer["correlation_id"] for answer in answers[:2]] == ["req-start-a", "req-again"]
    assert set(world.parked()) == {"bid-b"}, "who was answered needs no person"


@pytest.mark.requirement("R25")
async def test_a_refusal_writes_and_audits_nothing(world: World, worker: Worker) -> None:
    """The timer, its version and the audit are what they were; only the cursor moves."""
    await world.append(quick(), cancel("a"))
    await worker.work()
    before = (dict(world.shard.timers["a"]), list(world.shard.audit), len(world.shard.updates))
    await world.append(
        pause("a", "p", reply_to="i"), resume("a", "r", reply_to="i"), cancel("a", event_id="c", reply_to="i")
    )
    await worker.work()
    assert (world.shard.timers["a"], world.shard.audit, len(world.shard.updates)) == before
    assert len(world.answers("i")) == 3


@pytest.mark.requirement("R29")
async def test_a_refusal_that_nobody_waits_for_is_parked(world: World, worker: Worker) -> None:
    """Without a reply address a refused command would vanish: a person gets it instead."""
    await world.append(quick(), resume("a", "r-1"))
    await worker.work()
    assert world.parked()["r-1"]["error_code"] == "FSM_TRANSITION_INVALID"


# The audit (requirements R3, R26, B7).


@pytest.mark.requirement("R3")
@pytest.mark.requirement("R26")
async def test_every_transition_is_audited_once_with_all_its_fields(world: World, worker: Worker) -> None:
    """Who, what, from which status to which, when it happened and when it was written, and under which ids."""
    await world.append(quick(), quick(event_id="again"))
    await worker.live_until(at(300))
    await world.append(bid("a", "b-1"), pause("a", "p-1"), resume("a", "r-1"), cancel("a"))
    await worker.work()
    records = world.shard.audit
    assert [(record["event_type"], record["prev_status"], record["new_status"]) for record in records] == [
        ("auction_timer_registered", "", "SCHEDULED"),
        ("auction_timer_started", "SCHEDULED", "ACTIVE"),
        ("auction_timer_closing", "ACTIVE", "CLOSING"),
        ("auction_timer_extended", "CLOSING", "CLOSING"),
        ("auction_timer_paused", "CLOSING", "PAUSED"),
        ("auction_timer_resumed", "PAUSED", "CLOSING"),
        ("auction_timer_cancelled", "CLOSING", "CANCELLED"),
    ]
    for record in records:
        assert {
            *("event_type", "auction_id", "actor_type", "prev_status", "new_status", "occurred_at", "recorded_at"),
            *("correlation_id", "trace_id", "seq", "prev_hash", "hash", "actor_id", "event_id", "intake_id", "version"),
        } <= set(record)
        assert record["auction_id"] == "a"
        assert int(record["occurred_at"]) <= int(record["recorded_at"])
    by_time = [record for record in records if record["actor_type"] == "system"]
    assert [record["event_type"] for record in by_time] == ["auction_timer_started", "auction_timer_closing"]
    assert {record["correlation_id"] for record in by_time} == {"req-start-a"}
    assert {(record["actor_type"], record["actor_id"]) for record in records if record not in by_time} == {
        ("maker", "m-1")
    }
    assert [record["trace_id"] for record in records if record not in by_time] == [
        *("trace-start-a", "trace-bid-b-1", "trace-p-1", "trace-r-1", "trace-cancel-a")
    ]
    assert [int(record["version"]) for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert verify(records) is None


@pytest.mark.requirement("B7")
async def test_a_changed_audit_record_is_found(world: World, worker: Worker) -> None:
    """The chain that the engine wrote breaks at the record that somebody changed, removed or moved."""
    await world.append(quick(), bid("a", "b-1"))
    await worker.live_until(at(400))
    records = world.shard.audit
    assert len(records) == 5
    assert verify(records) is None
    assert verify([*records[:2], records[2] | {"actor_id": "nobody"}, *records[3:]]) == 3
    assert verify([*records[:2], *records[3:]]) == 3
    assert verify([records[1], records[0], *records[2:]]) == 1


# Two who think they own it.


@pytest.mark.requirement("R10")
async def test_the_older_epoch_is_fenced(world: World) -> None:
    """A second engine takes the shard; the first one's next commit is refused, it stops, and nothing was doubled."""
    old = await Worker(world, name="old").begin()
    await world.append(quick())
    await old.work()
    new = await Worker(world, name="new", clock=world.clock(seed=5, drift_ppm=50)).begin()
    assert new.shard.epoch == old.shard.epoch + 1
    await world.append(bid("a", "b-1"))
    await new.work()
    told = list(world.shard.audit)
    with pytest.raises(ShardLostError, match="epoch 2"):
        await old.work()
    assert world.shard.audit == told
    await new.live_until(at(400))
    assert world.facts("a").count("auction_timer_ended") == 1


async def test_a_fenced_run_ends(world: World) -> None:
    """`run` ends with the same error instead of trying again."""
    old = await Worker(world, name="old").begin()
    running = asyncio.create_task(old.shard.run())
    await Worker(world, name="new").begin()
    await world.append(quick())
    await old.look()
    with pytest.raises(ShardLostError):
        await asyncio.wait_for(running, 10)


@pytest.mark.requirement("R11")
async def test_a_shard_that_was_changed_by_somebody_else_is_loaded_again(world: World, worker: Worker) -> None:
    """A version that is not the one remembered: the commit is refused, counted, and done again on what stands."""
    await world.append(quick())
    await worker.work()
    world.shard.timers["a"] |= {"version": "7"}
    await world.append(cancel("a"))
    with capture_logs() as lines:
        await worker.work()
    assert [line["event"] for line in lines] == ["commit_superseded"]
    assert worker.sample("auctions_commit_conflicts_total") == 1
    assert world.shard.timers["a"]["version"] == "8"
    assert world.facts("a")[-1] == "auction_timer_cancelled"


# Loading.


@pytest.mark.requirement("R10")
async def test_a_restart_goes_on_where_the_commit_left_off(world: World, worker: Worker) -> None:
    """A new engine has the same auctions, due at the same instants, and reads what was not yet applied."""
    await world.append(quick("a"), quick("b", begins=20, ends=700), quick("c"), quick("d"))
    await worker.live_until(at(60))
    await world.append(pause("c", "p"), cancel("d"))
    await worker.work()
    await world.append(bid("b", "waiting"))
    again = await Worker(world, name="again").begin()
    assert again.shard.live == worker.shard.live
    assert set(again.shard.live) == {"a", "b", "c"}
    assert again.shard.closed == {}
    assert again.calendar.agenda.next_at() == worker.calendar.agenda.next_at() == at(250)
    assert all(not tick_now for _, tick_now in again.calendar.entered), "a restart is no change of a deadline"
    await again.live_until(at(400))
    assert world.facts("b")[-1] == "bid_accepted"
    assert await ended_at(world, "a") == at(310)


@pytest.mark.requirement("R10")
async def test_what_became_due_while_nobody_worked_is_done_as_of_its_time(world: World, worker: Worker) -> None:
    """An engine that comes back after the deadline closes as of it."""
    await world.append(quick())
    await worker.work()
    world.line.advance(3_600_000)
    again = await Worker(world, name="again").begin()
    await again.live_until(world.authority.now_ms)
    assert world.facts("a") == LIFE
    assert await ended_at(world) == at(310)
    assert [int(record["occurred_at"]) for record in world.shard.audit] == [at(0), at(10), at(250), at(310)]


async def test_closed_auctions_are_remembered_up_to_a_bound(
    world: World, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late bid for a closed auction is known as such, whether it is remembered or must be read again."""
    monkeypatch.setattr(shard_module, "CLOSED_KEPT", 3)
    for number in range(6):
        await world.append(quick(f"a-{number}", ends=70 + number))
    await worker.live_until(at(100))
    assert list(worker.shard.closed) == ["a-3", "a-4", "a-5"]
    await world.append(bid("a-0", "late-0"), bid("a-5", "late-5"))
    await worker.work()
    assert world.facts("a-0")[-1] == world.facts("a-5")[-1] == "late_bid_ignored"


async def test_outcomes_are_counted(world: World, worker: Worker) -> None:
    """By what the entries did."""
    await world.append(quick(), quick(event_id="again"), resume("a", "r"), cancel("a"), bid("a", "late"), poison("p"))
    await worker.work()
    counted = {
        outcome: worker.sample("auctions_intake_applied_total", outcome=outcome)
        for outcome in ("applied", "unchanged", "refused", "late", "poison")
    }
    assert counted == {"applied": 2, "unchanged": 1, "refused": 1, "late": 1, "poison": 1}


# The intake is kept short.


async def test_applied_entries_are_trimmed_beyond_what_is_retained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old entries go once enough newer ones were applied; what was not applied yet never goes."""
    monkeypatch.setattr(shard_module, "CHECKPOINT_EVERY", 10)
    worker = await Worker(world, intake_retained=30, batch_max=5).begin()
    await world.append(quick())
    for number in range(200):
        await world.append(bid("a", f"b-{number}"))
        if number % 10 == 9:
            await worker.work()
            assert len(world.shard.events) <= 30 + 4 * 10
    await world.append(*[bid("a", f"late-{number}") for number in range(100)])
    assert len(world.shard.events) >= 100 + 30
    await worker.work()
    assert world.facts("a").count("bid_accepted") == 300


async def test_an_engine_that_restarts_often_trims_as_well(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is loaded again and again, before it ever reaches a checkpoint to trim to, keeps a bounded intake too."""
    monkeypatch.setattr(shard_module, "CHECKPOINT_EVERY", 10)
    await world.append(quick())
    for life in range(20):
        worker = await Worker(world, intake_retained=30, batch_max=5).begin()
        await world.append(*[bid("a", f"b-{life}-{number}") for number in range(35)])
        await worker.work()
        assert len(world.shard.events) <= 2 * (30 + 10) + 35
    assert world.facts("a").count("bid_accepted") == 20 * 35


async def test_a_full_inbox_says_when_it_has_room_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is told after a commit that brought the inbox below its bound, not before."""
    monkeypatch.setattr(shard_module, "INBOX_MAX", 4)
    worker = await Worker(world, batch_max=2).begin()
    room: list[int] = []
    worker.shard.on_room = lambda: room.append(len(worker.shard.inbox))
    await world.append(quick(), *[bid("a", f"b-{number}") for number in range(7)])
    await worker.look()
    assert len(worker.shard.inbox) == 8
    while worker.shard.inbox:
        await worker.shard.turn()
    assert room == [2, 0]


# The loop.


async def settled(worker: Worker) -> None:
    """Let the loop run until the shard has compared its history with the store's."""
    running = asyncio.create_task(worker.shard.run())
    try:
        async with asyncio.timeout(5):
            while worker.shard.doubted or not worker.shard.loaded:
                await asyncio.sleep(0)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.requirement("R16")
async def test_a_new_connection_to_the_same_history_has_the_intake_read_again(world: World, worker: Worker) -> None:
    """What was read ahead may be gone; what was committed is not, so nothing is loaded, lost or done twice."""
    await world.append(quick(), bid("a", "b-1"))
    await worker.look()
    held = worker.shard.live
    worker.shard.doubt()
    assert worker.shard.doubted
    await settled(worker)
    assert worker.shard.live is held
    assert (list(worker.shard.inbox), worker.shard.read_to) == ([], worker.shard.head.intake)
    await worker.work()
    assert world.facts("a").count("bid_accepted") <= 1
    assert world.facts("a")[0] == "auction_timer_registered"


@pytest.mark.requirement("R16")
async def test_a_history_that_lost_its_end_is_loaded_at_once(world: World, worker: Worker) -> None:
    """A failover took the last commit back: the memory of it goes too, before the next commit would have found out."""
    await world.append(quick())
    await worker.work()
    await worker.live_until(at(300))
    before = deepcopy(world.store.shards[0])
    await world.append(bid("a", "b-1"))
    await worker.work()
    assert worker.shard.live["a"].auction.ends_at > at(310)
    world.store.shards[0] = before
    worker.shard.doubt()
    with capture_logs() as logs:
        await settled(worker)
    assert [line["event"] for line in logs] == ["shard_went_back"]
    assert worker.shard.live["a"].auction.ends_at == at(310)
    await worker.live_until(at(400))
    assert await ended_at(world) == at(310)


@pytest.mark.requirement("R16")
async def test_a_run_outlives_a_store_that_is_away(world: World) -> None:
    """Calls that fail, of any kind, lead to loading again; nothing is lost or doubled."""
    store = FaultyStore(world.store, [Fault.BEFORE, Fault.AFTER, Fault.BEFORE])
    worker = await Worker(world, store=store).begin()
    store.away = True
    running = asyncio.create_task(worker.shard.run())
    await world.append(quick(), bid("a", "b-1"))
    with capture_logs() as lines:
        await worker.look()
        for _ in range(20):
            await asyncio.sleep(0)
        store.away = False
        for _ in range(2_000):
            if worker.shard.loaded and world.shard.intake_cursor == world.shard.events[-1].stream_id:
                break
            await asyncio.sleep(0)
            if worker.shard.loaded:
                await worker.look()
    assert {line["event"] for line in lines} == {"store_unavailable"}
    assert world.facts("a") == ["auction_timer_registered", "bid_accepted"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_wake_up_for_nothing_writes_nothing(world: World, worker: Worker) -> None:
    """Auctions that are not due, closed ones and unknown ones: no commit, and what is due later is entered again."""
    await world.append(quick("a"), quick("b"), cancel("b"))
    await worker.work()
    told = len(world.shard.audit)
    last_commit = world.shard.last_commit
    worker.calendar.agenda.set("a", None)
    worker.shard.fall_due(["a", "b", "nobody"])
    await worker.shard.turn()
    assert (len(world.shard.audit), world.shard.last_commit) == (told, last_commit)
    assert worker.calendar.agenda.next_at() == at(10)


@pytest.mark.parametrize("batch_max", [1, 3])
async def test_more_due_auctions_than_fit_a_batch(world: World, batch_max: int) -> None:
    """They are closed in the order of their deadlines, over several commits."""
    worker = await Worker(world, batch_max=batch_max).begin()
    await world.append(*[quick(f"a-{number}", ends=100 - number) for number in range(8)])
    await worker.live_until(at(60))
    world.line.advance(500_000)
    await worker.work()
    ended = [record["auction_id"] for record in world.shard.audit if record["event_type"] == "auction_timer_ended"]
    assert ended == [f"a-{number}" for number in reversed(range(8))]
    assert verify(world.shard.audit) is None


async def test_answers_of_the_store_that_cannot_be(world: World) -> None:
    """The kinds of answer that a commit has are all known to a turn (a new kind must be decided on)."""
    assert {Committed, Fenced, Superseded, Early, Undrained, Unattended} == set(
        shard_module.ShardStore.commit.__annotations__["return"].__args__
    )


async def test_a_bid_that_extends_nothing_keeps_the_version(world: World, worker: Worker) -> None:
    """It is audited and announced, and the timer's version stays: no tick is older than the state it tells of."""
    await world.append(quick())
    await worker.live_until(at(20))
    await world.append(
        draft("bid-own", EventType.BID_ACCEPTED, replace(Bid("own"), leader_changed=False), "a"),
    )
    await worker.work()
    assert world.shard.audit[-1]["event_type"] == "bid_accepted"
    assert world.shard.audit[-1]["version"] == world.shard.audit[-2]["version"] == "2"
    assert world.shard.updates[-1].version == 2
