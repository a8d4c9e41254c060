"""Troubleshooting end to end, on the memory store: what is parked, retried, cancelled, recorded and answered."""

import asyncio
from dataclasses import replace
from itertools import product
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract.audit import as_json, verify
from engine.contract.intake import Actor, CommandType, CorrectClock
from engine.domain.instants import EPOCH_MS_MAX
from engine.store.protocol import Entry, Group, StoreUnavailableError
from tests.fakes.events import bid, cancel, discard, draft, poison, resume, retry, start
from tests.fakes.store import Fault, FaultyStore
from tests.fakes.world import QUICK, Worker, World, at

AUDIT_FIELDS = {"shard", "seq", "prev_hash", "hash", "event_type", "actor_type", "actor_id", "event_id", "occurred_at"}


@pytest.fixture
def world() -> World:
    """A world at its beginning."""
    return World()


@pytest.fixture
async def worker(world: World) -> Worker:
    """Somebody who works on shard 0."""
    return await Worker(world).begin()


def quick(auction_id: str = "a", **more: Any) -> Any:
    """The start of an auction that runs from the 10th to the 310th second."""
    return start(auction_id, at(10), at(310), policy=QUICK, **more)


async def played(world: World, worker: Worker, *drafts: Any, after_s: float = 0) -> None:
    """These events arrive, after a while, and are worked off."""
    await worker.live_until(world.authority.now_ms + round(after_s * 1_000))
    await world.append(*drafts)
    await worker.work()


def operations(world: World) -> list[dict[str, str]]:
    """The records of what operators did."""
    return [record for record in world.shard.audit if record["event_type"].startswith("OPERATOR_")]


def kept(world: World, command_id: str) -> dict[str, Any]:
    """What became of a command, as it is kept for whoever asks by its id."""
    read: dict[str, Any] = orjson.loads(world.shard.outcomes[command_id])
    return read


# Cancelled by an operator.


@pytest.mark.requirement("R30")
@pytest.mark.requirement("R26")
async def test_a_cancelled_command_is_gone_recorded_and_answered(world: World, worker: Worker) -> None:
    """Out of troubleshooting for good, one record in the operator's name, the reason to whoever waits for the command."""
    await played(world, worker, bid("unknown", "b-1", reply_to="bidding", submitted_by="bidding-7"))
    assert world.answers("bidding")[0]["outcome"] == "IN_TROUBLESHOOTING_QUEUE"
    await played(world, worker, discard("bid-b-1", "order-1", reply_to="gateway"), after_s=60)

    assert world.parked() == {}
    assert world.shard.groups[Group.PARKED] == {}
    (record,) = operations(world)
    details = orjson.loads(record.pop("details"))
    assert {name: record[name] for name in record if name not in ("seq", "hash", "prev_hash", "intake_id")} == {
        "event_type": "OPERATOR_CANCEL",
        "auction_id": "unknown",
        "actor_type": "operator",
        "actor_id": "op-1",
        "prev_status": "IN_TROUBLESHOOTING_QUEUE",
        "new_status": "CANCELED",
        "version": "",
        "occurred_at": str(at(60)),
        "recorded_at": str(at(60)),
        "correlation_id": "req-order-1",
        "trace_id": "trace-order-1",
        "event_id": "order-1",
    }
    assert details == {
        "command_id": "bid-b-1",
        "reason": "of no use",
        "operator": "op-1",
        "error_code": "UNKNOWN_AUCTION",
        "attempts": 1,
    }
    told = world.answers("bidding")[1]
    assert told == {
        "outcome": "CANCELED",
        "command_id": "bid-b-1",
        "event_type": "auctions.bid.accepted",
        "error": "of no use",
        "operator": "op-1",
        "correlation_id": "req-bid-b-1",
        "operator_correlation_id": "req-order-1",
        "asked_by": "bidding-7",
    }
    assert world.store.replies["bidding"][1][:2] == ("CANCELED", "bid-b-1")
    assert kept(world, "bid-b-1") == told


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("batch_max", [1, 256])
async def test_what_has_the_id_of_another_that_waits_is_lost_no_more_than_that(world: World, batch_max: int) -> None:
    """Poison under the id of a parked command, and a command under that of another: each waits, is named by its place in
    the intake, and is answered, retried and cancelled for itself."""
    worker = await Worker(world, batch_max=batch_max).begin()
    first = bid("unknown", "b-1", reply_to="first")
    second = replace(bid("unheard", "b-1", reply_to="second"), subject="unheard")
    await world.append(first, second)
    for body in (b"{bad", b"{worse"):
        world.shard.events.append(Entry(world.shard.next_id(), at(0), "bid-b-1", body))
    await worker.work()
    places = [f"0-{entry.stream_id}" for entry in world.shard.events[1:]]
    assert {name: command["payload"] for name, command in world.parked().items()} == {
        "bid-b-1": orjson.loads(first.body), places[0]: orjson.loads(second.body), places[1]: "{bad", places[2]: "{worse",
    }  # fmt: skip
    await played(
        world, worker, discard(places[1], "order-1"), retry(places[0], "order-2"), discard("bid-b-1", "order-3")
    )
    assert set(world.parked()) == {"bid-b-1", places[2]}
    assert world.parked()["bid-b-1"]["attempts"] == 2
    assert [answer["outcome"] for answer in world.answers("first")] == ["IN_TROUBLESHOOTING_QUEUE", "CANCELED"]
    assert [answer["command_id"] for answer in world.answers("second")] == ["bid-b-1"] * 2


def nested(levels: int) -> bytes:
    """A body of so many levels that nobody can apply."""
    return b'{"type":"no.such","reply_to":"sender","x":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("levels", [2, 150, 154, 155, 204, 205, 251, 254, 255, 600, 1_024, 1_025, 5_000])
async def test_poison_that_is_nested_deeply_is_one_more_poison(world: World, worker: Worker, levels: int) -> None:
    """JSON can be read that cannot be written again: such a body is kept as text, and everything goes on."""
    await played(world, worker, poison("p-1", nested(levels)), poison("p-2", nested(levels)), quick())
    assert world.facts("a") == ["auction_timer_registered"]
    shown = world.parked()["p-1"]["payload"]
    assert shown == (orjson.loads(nested(levels)) if levels <= 154 else nested(levels).decode())
    await played(world, worker, retry("p-1", "order-1", reply_to="i"), discard("p-2", "order-2", reply_to="i"))
    assert [answer["outcome"] for answer in world.answers("i")] == ["APPLIED"] * 2
    assert set(world.parked()) == {"p-1"}
    assert world.parked()["p-1"]["attempts"] == 2
    # By hand, into what is parked.
    world.shard.troubleshooting["p-1"] = nested(levels)
    again = await Worker(world).begin()
    await played(world, again, discard("p-1", "order-3", reply_to="i"))
    assert world.answers("i")[-1]["outcome"] == "APPLIED"


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("levels", [2, 100, 149, 152, 155, 200, 253, 254, 600])
async def test_evidence_that_is_nested_deeply_is_poison_too(world: World, worker: Worker, levels: int) -> None:
    """What goes into the audit as it is must be fit to be written there, and shown."""
    order = CorrectClock(5, "a test", {"a": 1})
    body = draft("clock-0-1", CommandType.CLOCK_CORRECTED, order, None).body
    deep = body.replace(b'{"a":1}', b'{"a":%b%b}' % (b"[" * (levels - 1), b"]" * (levels - 1)))
    assert deep != body
    await played(world, worker, poison("clock-0-1", deep), quick())
    assert world.facts("a") == ["auction_timer_registered"]
    corrected = [record for record in world.shard.audit if record["event_type"] == "clock_corrected"]
    assert (len(corrected), set(world.parked())) == ((1, set()) if levels < 154 else (0, {"clock-0-1"}))
    orjson.dumps([as_json(record) for record in world.shard.audit])


@pytest.mark.requirement("R29", "R30")
async def test_who_sent_what_cannot_be_read_is_told_if_their_name_can(world: World, worker: Worker) -> None:
    """An event of no known form still says where an answer is waited for."""
    await played(world, worker, poison("p-1", nested(3)), poison("p-2", b'{"type":"no.such","reply_to":7}'))
    await played(world, worker, discard("p-1", "order-1"), discard("p-2", "order-2"))
    answers = world.answers("sender")
    assert [answer["outcome"] for answer in answers] == ["IN_TROUBLESHOOTING_QUEUE", "CANCELED"]
    assert {answer["command_id"] for answer in answers} == {"p-1"}
    assert (answers[0]["error_code"], answers[1]["error"]) == ("SCHEMA_INVALID", "of no use")
    assert set(world.store.replies) == {"sender"}


@pytest.mark.requirement("R29")
@pytest.mark.parametrize("event_id", ["x" * 1_025, "two\nlines", "nul\0", "", " ", "x ", ".", ".."])
async def test_an_id_that_nobody_can_ask_for_is_replaced_by_a_place(
    world: World, worker: Worker, event_id: str
) -> None:
    """By its place in the intake a command can be retried and cancelled; the id itself fits into no URL."""
    world.shard.events.append(Entry(world.shard.next_id(), at(0), event_id, b"{bad"))
    await worker.work()
    place = f"0-{world.shard.events[-1].stream_id}"
    assert set(world.parked()) == {place}
    await played(world, worker, discard(place, "order-1", reply_to="i"))
    assert world.answers("i")[0]["outcome"] == "APPLIED"
    assert world.parked() == {}


@pytest.mark.requirement("R30")
async def test_the_operator_is_answered_with_the_command_and_its_record(world: World, worker: Worker) -> None:
    """The command as it now stands, and the metadata of the record, which is the one in the chain."""
    await played(world, worker, quick(), bid("unknown", "b-1"))
    await played(world, worker, discard("bid-b-1", "order-1", reply_to="gateway", submitted_by="op-1"), after_s=5)
    (answer,) = world.answers("gateway")
    assert (answer["outcome"], answer["command_id"], answer["asked_by"]) == ("APPLIED", "order-1", "op-1")
    command = answer["command"]
    assert {name: command[name] for name in ("command_id", "status", "reason", "operator", "canceled_at")} == {
        "command_id": "bid-b-1",
        "status": "CANCELED",
        "reason": "of no use",
        "operator": "op-1",
        "canceled_at": at(5),
    }
    assert (command["attempts"], command["first_seen_at"], command["error_code"]) == (1, at(0), "UNKNOWN_AUCTION")
    assert command["payload"]["detail"]["bid_id"] == "b-1"
    assert answer["audit"] == world.shard.audit[-1] | {"shard": "0"}
    assert set(answer["audit"]) >= AUDIT_FIELDS
    assert kept(world, "order-1") == answer
    assert verify(world.shard.audit) is None


@pytest.mark.requirement("R30")
async def test_a_cancelled_command_cannot_be_brought_back(world: World, worker: Worker) -> None:
    """`CANCELED` is terminal: neither a retry nor a second cancellation finds it, and nothing is recorded."""
    await played(world, worker, poison("p-1"), discard("p-1", "order-1"))
    told = list(world.shard.audit)
    await played(world, worker, retry("p-1", "order-2", reply_to="i"), discard("p-1", "order-3", reply_to="i"))
    assert [(answer["outcome"], answer["error_code"]) for answer in world.answers("i")] == [
        ("REFUSED", "INVALID_OPERATION")
    ] * 2
    assert world.shard.audit == told
    assert world.parked() == {}
    assert kept(world, "p-1")["outcome"] == "CANCELED"


# Refused.


@pytest.mark.requirement("R30")
@pytest.mark.parametrize("order", [retry, discard], ids=["retry", "cancel"])
@pytest.mark.parametrize("command_id", ["never-sent", "start-a", "order-1", ""])
async def test_what_is_not_in_troubleshooting_cannot_be_operated_on(
    world: World, worker: Worker, order: Any, command_id: str
) -> None:
    """Never sent, applied long ago, the order itself, no name at all: refused by name, nothing parked, nothing recorded."""
    await played(world, worker, quick())
    await played(world, worker, order(command_id, "order-1", reply_to="i"))
    (answer,) = world.answers("i")
    assert (answer["outcome"], answer["error_code"]) == ("REFUSED", "INVALID_OPERATION")
    assert answer["error"] == f"command {command_id} is not in troubleshooting"
    assert "audit" not in answer
    assert kept(world, "order-1") == answer
    assert world.parked() == {}
    assert operations(world) == []


@pytest.mark.requirement("R30")
@pytest.mark.parametrize(("first", "second"), list(product([retry, discard], repeat=2)))
@pytest.mark.parametrize("batch_max", [1, 10])
async def test_of_two_operators_one_wins(world: World, first: Any, second: Any, batch_max: int) -> None:
    """Whether their orders fall into one batch or two: the first is done and recorded, the second told what is so."""
    worker = await Worker(world, batch_max=batch_max).begin()
    await played(world, worker, poison("p-1"))
    await played(
        world,
        worker,
        first("p-1", "order-1", reply_to="i"),
        second("p-1", "order-2", reply_to="i", actor=Actor("operator", "op-2")),
    )
    one, two = world.answers("i")
    assert (one["outcome"], two["outcome"], two["error_code"]) == ("APPLIED", "REFUSED", "INVALID_OPERATION")
    assert [(record["actor_id"], record["event_id"]) for record in operations(world)] == [("op-1", "order-1")]
    assert list(world.parked()) == (["p-1"] if first is retry else [])


@pytest.mark.requirement("R30")
@pytest.mark.parametrize("batch_max", [1, 10])
async def test_a_command_can_be_operated_on_as_soon_as_it_is_parked(world: World, batch_max: int) -> None:
    """Also by an order that lies right behind it in the intake, whether or not in the same batch."""
    worker = await Worker(world, batch_max=batch_max).begin()
    await played(world, worker, bid("a", "b-1", reply_to="i"), discard("bid-b-1", "order-1"), quick())
    assert [answer["outcome"] for answer in world.answers("i")] == ["IN_TROUBLESHOOTING_QUEUE", "CANCELED"]
    assert world.parked() == {}
    assert world.facts("a") == ["OPERATOR_CANCEL", "auction_timer_registered"]


# Sent round again.


@pytest.mark.requirement("R30")
@pytest.mark.requirement("R32")
@pytest.mark.requirement("B2")
async def test_a_retried_bid_counts_as_of_its_retry(world: World, worker: Worker) -> None:
    """The auction is known by now: the bid is applied, answered again, and recorded under its own id and actor."""
    await played(world, worker, bid("a", "b-1", reply_to="bidding"))
    await played(world, worker, quick())
    await played(world, worker, retry("bid-b-1", "order-1", reply_to="gateway"), after_s=300)
    assert world.parked() == {}
    assert [answer["outcome"] for answer in world.answers("bidding")] == ["IN_TROUBLESHOOTING_QUEUE", "APPLIED"]
    assert world.answers("bidding")[1]["arrival_ms"] == at(300)
    assert world.facts("a")[-2:] == ["OPERATOR_RETRY", "auction_timer_extended"]
    retried, applied = world.shard.audit[-2:]
    assert (retried["new_status"], retried["actor_id"], retried["event_id"]) == ("RETRIED", "op-1", "order-1")
    assert (applied["event_id"], applied["actor_id"], applied["occurred_at"]) == ("bid-b-1", "m-1", str(at(300)))
    (answer,) = world.answers("gateway")
    assert (answer["outcome"], answer["command"]["status"]) == ("APPLIED", "RETRIED")
    assert verify(world.shard.audit) is None


@pytest.mark.requirement("R30")
@pytest.mark.requirement("B2")
async def test_a_retried_bid_is_late_where_the_auction_is_over(world: World, worker: Worker) -> None:
    """Its first arrival was in time for nothing: an ended auction is never extended by a retry."""
    await played(world, worker, bid("a", "b-1", reply_to="bidding"), quick())
    await played(world, worker, retry("bid-b-1", "order-1"), after_s=310)
    assert world.answers("bidding")[1]["outcome"] == "LATE"
    assert world.facts("a")[-2:] == ["OPERATOR_RETRY", "late_bid_ignored"]
    assert world.shard.timers["a"]["ended_at"] == str(at(310))


@pytest.mark.requirement("R29")
@pytest.mark.requirement("R32")
async def test_attempts_add_up_and_the_first_sight_stays(world: World, worker: Worker) -> None:
    """However often a command is retried in vain; the list keeps its place, the payload its content."""
    await played(world, worker, bid("unknown", "b-1"), after_s=1)
    payload = world.parked()["bid-b-1"]["payload"]
    for attempt in range(2, 6):
        await played(world, worker, retry("bid-b-1", f"order-{attempt}"), after_s=50)
        (command,) = world.parked().values()
        assert (command["attempts"], command["first_seen_at"], command["payload"]) == (attempt, at(1), payload)
        assert command["status"] == "IN_TROUBLESHOOTING_QUEUE"
        assert world.shard.groups[Group.PARKED] == {"bid-b-1": at(1)}
    assert [orjson.loads(record["details"])["attempts"] for record in operations(world)] == [1, 2, 3, 4]


@pytest.mark.requirement("R29")
@pytest.mark.requirement("R30")
@pytest.mark.parametrize(
    "body",
    [b"{not json", b"\xff\xfe\x00", b'"a text"', b"[1,2]", b"7", b"null", b"", b'{"type":"a.b"}', '{"ü":1e3}'.encode()],
)
async def test_poison_can_be_retried_and_cancelled(world: World, worker: Worker, body: bytes) -> None:
    """Whatever it is: tried again it is poison again, the second attempt counted; cancelled it is gone. Nothing stops."""
    await played(world, worker, poison("p-1", body))
    before = world.parked()["p-1"]
    await played(world, worker, retry("p-1", "order-1", reply_to="i"), quick())
    again = world.parked()["p-1"]
    assert (before["attempts"], again["attempts"]) == (1, 2)
    assert (again["error_code"], again["payload"]) == ("SCHEMA_INVALID", before["payload"])
    await played(world, worker, discard("p-1", "order-2", reply_to="i"))
    assert world.parked() == {}
    assert [answer["outcome"] for answer in world.answers("i")] == ["APPLIED", "APPLIED"]
    assert world.facts("a") == ["auction_timer_registered"]


@pytest.mark.requirement("R29")
async def test_poison_that_never_had_an_arrival_gets_one(world: World, worker: Worker) -> None:
    """What was put into the stream behind our back is retried with a stamp of its own, and stays poison."""
    world.shard.events.append(Entry(world.shard.next_id(), None, "", b"surprise !"))
    await worker.work()
    (command_id,) = world.parked()
    await played(world, worker, retry(command_id, "order-1"), after_s=5)
    assert world.parked()[command_id]["attempts"] == 2
    assert world.parked()[command_id]["first_seen_at"] == at(0)
    assert world.shard.events[-1].at == at(5)


@pytest.mark.requirement("R30")
async def test_a_retried_conflict_is_still_one(world: World, worker: Worker) -> None:
    """A start with other terms is refused again, and changes nothing."""
    await played(world, worker, quick(), quick(event_id="other", offer_id="o-9"))
    assert world.parked()["other"]["error_code"] == "CONFLICTING_REGISTRATION"
    timer = dict(world.shard.timers["a"])
    await played(world, worker, retry("other", "order-1"))
    assert world.parked()["other"]["attempts"] == 2
    assert world.shard.timers["a"] == timer


@pytest.mark.requirement("R27")
@pytest.mark.requirement("R30")
async def test_a_retry_does_not_revive_a_cancelled_auction(world: World, worker: Worker) -> None:
    """A parked resume that is retried after the cancellation is refused for good."""
    await played(world, worker, quick(), resume("a", "r-1"), cancel("a"), after_s=20)
    await played(world, worker, retry("r-1", "order-1"))
    assert world.parked()["r-1"]["error_code"] == "FSM_TERMINAL_IMMUTABLE"
    assert world.shard.timers["a"]["status"] == "CANCELLED"


# Edited by hand.


HAND_EDITED = [
    b"",
    b"{",
    b"[]",
    b"7",
    b"{}",
    b'{"payload":null}',
    b'{"payload":{"auction_id":7}}',
    b'{"attempts":-1,"first_seen_at":-1}',
    b'{"attempts":18446744073709551615,"first_seen_at":18446744073709551615}',
    b'{"attempts":1e30,"first_seen_at":99999999999999999999999}',
    b'{"attempts":"many","first_seen_at":"today","reply_to":["x"],"event_type":{},"error_code":[1]}',
    b'{"attempts":true,"first_seen_at":true,"command_id":"another","status":"DONE"}',
    b"\xff\xfe",
    orjson.dumps({"attempts": EPOCH_MS_MAX, "first_seen_at": EPOCH_MS_MAX, "payload": "x" * 70_000}),
]


@pytest.mark.requirement("R29")
@pytest.mark.requirement("R30")
@pytest.mark.parametrize("body", HAND_EDITED)
async def test_what_somebody_edited_by_hand_stops_nobody(world: World, worker: Worker, body: bytes) -> None:
    """The fields in Redis are open to operators: whatever they made of it can be retried, again, and cancelled."""
    await played(world, worker, poison("p-1"))
    world.shard.troubleshooting["p-1"] = body
    for number in range(2):
        await played(world, worker, retry("p-1", f"order-{number}", reply_to="i"))
        (command,) = world.parked().values()
        assert (command["command_id"], command["status"]) == ("p-1", "IN_TROUBLESHOOTING_QUEUE")
        assert type(command["attempts"]) is type(command["first_seen_at"]) is int
        assert command["first_seen_at"] <= EPOCH_MS_MAX
    world.shard.troubleshooting["p-1"] = body
    await played(world, worker, discard("p-1", "order-9", reply_to="i"), quick())
    assert [answer["outcome"] for answer in world.answers("i")] == ["APPLIED"] * 3
    assert world.parked() == {}
    assert verify(world.shard.audit) is None
    assert world.facts("a") == ["auction_timer_registered"]


# Crashes.


@pytest.mark.requirement("R30")
@pytest.mark.requirement("R10")
@pytest.mark.parametrize("order", [retry, discard], ids=["retry", "cancel"])
@pytest.mark.parametrize("plan", list(product([Fault.BEFORE, Fault.AFTER, Fault.NONE], repeat=3)))
async def test_an_order_is_done_once_whatever_gets_lost(world: World, order: Any, plan: tuple[Fault, ...]) -> None:
    """Commits lost on the way there or back, and an engine that loads again after each: one record, one answer, one retry."""
    calm = await Worker(world).begin()
    await played(world, calm, poison("p-1"), quick())
    worker = await Worker(world, name="next", store=FaultyStore(world.store, plan)).begin()
    await world.append(order("p-1", "order-1", reply_to="i"))
    for _ in plan:
        try:
            await worker.work()
        except StoreUnavailableError:
            await worker.shard.load()
    await worker.work()
    assert [record["event_id"] for record in operations(world)] == ["order-1"]
    assert [answer["outcome"] for answer in world.answers("i")] == ["APPLIED"]
    requeued = [entry for entry in world.shard.events if entry.event_id == "p-1" and entry.attempts]
    assert [entry.attempts for entry in requeued] == ([1] if order is retry else [])
    assert [command["attempts"] for command in world.parked().values()] == ([2] if order is retry else [])
    assert verify(world.shard.audit) is None


# Any sequence of all that.


STEPS = st.lists(
    st.tuples(st.sampled_from(["poison", "bid", "retry", "retry", "cancel", "restart"]), st.integers(0, 3)),
    min_size=4,
    max_size=30,
)


@pytest.mark.requirement("R29")
@pytest.mark.requirement("R30")
@pytest.mark.requirement("R32")
@settings(max_examples=80, deadline=None)
@given(steps=STEPS, batch_max=st.integers(1, 4), at_once=st.integers(1, 5))
def test_a_command_is_in_troubleshooting_until_an_operator_cancels_it(
    steps: list[tuple[str, int]], batch_max: int, at_once: int
) -> None:
    """Whatever is sent, retried, cancelled, restarted and however it falls into batches: a command's books always balance."""
    parked: dict[str, int] = {}  # the attempts of each
    sent: set[str] = set()
    orders: list[str] = []

    async def scenario() -> None:
        world = World()
        worker = await Worker(world, batch_max=batch_max).begin()
        for serial, (kind, number) in enumerate(steps):
            # A retry goes behind what is in the intake already, so what it leads to must be there before the next order.
            name = f"p-{number}" if number < 2 else f"bid-{number}"
            if kind in ("poison", "bid"):
                await world.append(poison(name) if number < 2 else bid("unknown", str(number)))
                if name not in sent:
                    parked[name] = 1
                sent.add(name)
            elif kind == "restart":
                worker = await Worker(world, name=f"engine-{serial}", batch_max=batch_max).begin()
            else:
                make = retry if kind == "retry" else discard
                await world.append(make(name, f"order-{serial}", reply_to="i"))
                orders.append("APPLIED" if name in parked else "REFUSED")
                if kind == "retry" and name in parked:
                    parked[name] += 1
                    await worker.work()
                elif kind == "cancel":
                    parked.pop(name, None)
            if serial % at_once == 0:
                await worker.work()
        await worker.work()
        assert {name: command["attempts"] for name, command in world.parked().items()} == parked
        assert set(world.shard.groups[Group.PARKED]) == set(parked)
        assert [answer["outcome"] for answer in world.answers("i")] == orders
        assert len(operations(world)) == orders.count("APPLIED")
        assert verify(world.shard.audit) is None

    asyncio.run(scenario())
