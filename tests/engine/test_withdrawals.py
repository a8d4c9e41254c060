"""Offers cancelled within their window, end to end on the memory store: timer, record, announcements, answer."""

from itertools import permutations
from typing import Any

import orjson
import pytest

from engine.contract.audit import verify
from engine.domain.auction import Offer
from engine.domain.instants import EpochMs
from engine.journal import support_reference
from engine.store.protocol import Group
from tests.fakes.events import bid, cancel, cancel_offer, pause, start, withdraw
from tests.fakes.world import QUICK, Worker, World, at

ANNOUNCED = [
    "timer.cancelled",
    "offers.cancelled",
    "offers.cancellation.completed",
    "offers.payment_hold.release_requested",
]
OFFER = {"offer_created_at": at(0), "maker_id": "maker-1", "buyer_id": "buyer-1"}


@pytest.fixture
def world() -> World:
    """A world at its beginning."""
    return World()


@pytest.fixture
async def worker(world: World) -> Worker:
    """Somebody who works on shard 0."""
    return await Worker(world).begin()


def offered(auction_id: str = "a", ends: float = 310, **offer: Any) -> Any:
    """The start of an auction from the 10th second, for an offer made at the beginning of the world."""
    return start(auction_id, at(10), at(ends), policy=QUICK, offer=Offer(f"o-{auction_id}", **OFFER | offer))


async def at_work(world: World, worker: Worker, seconds: float, *drafts: Any) -> None:
    """These events arrive at that second, and are worked off."""
    await worker.live_until(at(seconds))
    await world.append(*drafts)
    await worker.work()


@pytest.mark.requirement("R20")
@pytest.mark.requirement("R23")
@pytest.mark.requirement("R26")
async def test_an_offer_is_cancelled_with_its_auction(world: World, worker: Worker) -> None:
    """In one commit: the auction closed, one record with actor and device, every announcement, the answer with the record."""
    await at_work(world, worker, 0, offered(amount_minor=900, currency="EUR"))
    await at_work(world, worker, 100, withdraw("a", "w-1", reply_to="i"))
    record = world.shard.audit[-1]
    assert (record["event_type"], record["prev_status"], record["new_status"]) == (
        "offer_cancelled",
        "ACTIVE",
        "CANCELLED",
    )
    assert (record["actor_type"], record["actor_id"], record["event_id"]) == ("buyer", "buyer-1", "w-1")
    assert orjson.loads(record["details"]) == {
        "reason": "changed_mind",
        "note": "sorry",
        "device": "phone-1",
        "offer_id": "o-a",
        "window_ends_at": at(1_800),
    }
    assert world.announced("a")[-4:] == ANNOUNCED
    body = orjson.loads(world.shard.updates[-1].body)
    assert (body["offer_id"], body["amount_minor"], body["actor"]["id"]) == ("o-a", 900, "buyer-1")
    (answer,) = world.answers("i")
    assert (answer["outcome"], answer["fact"], answer["timer"]["status"]) == ("APPLIED", "offer_cancelled", "CANCELLED")
    assert answer["audit"] == record | {"shard": "0"}
    assert orjson.loads(world.shard.outcomes["w-1"]) == answer
    assert world.shard.groups[Group.LIVE] == {}
    assert world.shard.groups[Group.CLOSED] == {"a": at(100)}


@pytest.mark.requirement("R27")
async def test_a_cancelled_offer_leaves_no_ghost(world: World, worker: Worker) -> None:
    """Nothing is due any more, a bid is late, and a replayed start changes nothing, also after a restart."""
    await at_work(world, worker, 0, offered())
    await at_work(world, worker, 100, withdraw("a", "w-1"))
    assert worker.calendar.agenda.next_at() is None
    assert worker.shard.live == {}
    again = await Worker(world, name="again").begin()
    timer = dict(world.shard.timers["a"])
    replayed = start("a", at(10), at(310), event_id="replay", policy=QUICK, offer=Offer("o-a", **OFFER))
    await at_work(world, again, 200, bid("a", "b-1"), replayed)
    await again.live_until(at(900))
    assert world.shard.timers["a"] == timer
    assert world.facts("a")[-1] == "late_bid_ignored"
    assert world.parked() == {}


@pytest.mark.requirement("R23")
@pytest.mark.parametrize(("amount_minor", "alarm"), [(1_000, []), (1_001, ["offers.cancellation.high_value"])])
async def test_a_high_value_is_announced_last(
    world: World, worker: Worker, amount_minor: int, alarm: list[str]
) -> None:
    """Over the maker's threshold somebody is told; at it nobody is."""
    await at_work(world, worker, 0, offered(amount_minor=amount_minor, auto_reject_threshold_minor=1_000))
    await at_work(world, worker, 20, withdraw("a", "w-1"))
    assert world.announced("a")[2:] == [*ANNOUNCED, *alarm]


@pytest.mark.requirement("R20")
@pytest.mark.requirement("R21")
@pytest.mark.parametrize(
    ("offer", "minutes", "last_s"),
    [
        ({}, 2, 119.999),
        ({"offer_created_at": None}, 2, 129.999),
        ({"modification_window_minutes": 1}, 2, 59.999),
        ({"modification_window_minutes": 3}, 2, 179.999),
    ],
    ids=["default", "from the start", "shorter", "longer"],
)
async def test_the_window_is_decided_by_arrival(
    world: World, worker: Worker, offer: dict[str, Any], minutes: int, last_s: float
) -> None:
    """The last millisecond counts however late it is processed, the next one does not however early."""
    await at_work(world, worker, 0, offered("in-time", **offer), offered("too-late", **offer))
    await worker.live_until(at(last_s))
    await world.append(withdraw("in-time", "w-1", minutes=minutes, reply_to="i"))
    world.line.advance(1)
    await world.append(withdraw("too-late", "w-2", minutes=minutes, reply_to="i"))
    world.line.advance(30_000)
    await worker.work()
    assert [(answer["outcome"], answer.get("error_code")) for answer in world.answers("i")] == [
        ("APPLIED", None),
        ("REFUSED", "WINDOW_EXPIRED"),
    ]
    assert world.shard.timers["in-time"]["cancelled_at"] == str(at(last_s))
    assert world.shard.timers["too-late"]["status"] == "ACTIVE"


@pytest.mark.requirement("R21")
async def test_a_refused_cancellation_is_announced_with_what_support_needs(world: World, worker: Worker) -> None:
    """The same reference in answer and announcement; the timer, its version and the audit stay as they were."""
    await at_work(world, worker, 0, offered(modification_window_minutes=1))
    await worker.live_until(at(100))
    before = (dict(world.shard.timers["a"]), list(world.shard.audit))
    await at_work(world, worker, 100, withdraw("a", "w-1", reply_to="i"))
    (answer,) = world.answers("i")
    assert (answer["outcome"], answer["error_code"]) == ("REFUSED", "WINDOW_EXPIRED")
    assert (answer["current_status"], answer["attempted_status"]) == ("ACTIVE", "CANCELLED")
    assert answer["support_reference"] == support_reference("w-1")
    assert "audit" not in answer
    blocked = world.shard.updates[-1]
    body = orjson.loads(blocked.body)
    assert (blocked.type, blocked.version) == ("offers.cancellation.blocked", 2)
    assert {name: body[name] for name in ("error_code", "error", "support_reference", "correlation_id")} == {
        name: answer[name] for name in ("error_code", "error", "support_reference", "correlation_id")
    }
    assert (world.shard.timers["a"], world.shard.audit) == before
    assert world.parked() == {}
    assert orjson.loads(world.shard.outcomes["w-1"]) == answer


@pytest.mark.requirement("R21")
async def test_what_is_over_refuses_with_its_own_code(world: World, worker: Worker) -> None:
    """Cancelled before, by whatever event, or closed: both blocked, nobody is bothered with it, asked for or not."""
    await at_work(world, worker, 0, *[offered(name) for name in ("a", "b", "c")], offered("d", ends=70))
    await at_work(world, worker, 20, withdraw("a", "w-1"), cancel("b"), cancel_offer("o-c"))
    await worker.live_until(at(100))
    told = list(world.shard.audit)
    await at_work(world, worker, 100, *[withdraw(name, f"again-{name}", reply_to="i") for name in "abcd"])
    await at_work(world, worker, 101, *[withdraw(name, f"unasked-{name}") for name in "abcd"])
    assert [(answer["auction_id"], answer["error_code"]) for answer in world.answers("i")] == [
        ("a", "ALREADY_CANCELLED"),
        ("b", "ALREADY_CANCELLED"),
        ("c", "ALREADY_CANCELLED"),
        ("d", "AUCTION_CLOSED"),
    ]
    for name in "abcd":
        assert world.announced(name)[-2:] == ["offers.cancellation.blocked"] * 2
    assert world.shard.audit == told
    assert world.parked() == {}


@pytest.mark.requirement("R21")
async def test_a_withdrawal_of_what_was_never_shown_announces_nothing(world: World, worker: Worker) -> None:
    """An unknown auction is parked like any event for one; one that was cancelled before its start has no offer to name."""
    await at_work(world, worker, 0, cancel("t"))
    await at_work(world, worker, 1, withdraw("t", "w-1", reply_to="i"), withdraw("u", "w-2", reply_to="i"))
    assert [(answer["outcome"], answer["error_code"]) for answer in world.answers("i")] == [
        ("REFUSED", "ALREADY_CANCELLED"),
        ("IN_TROUBLESHOOTING_QUEUE", "UNKNOWN_AUCTION"),
    ]
    assert all("support_reference" not in answer and "timer" not in answer for answer in world.answers("i"))
    assert world.shard.updates == []
    assert set(world.parked()) == {"w-2"}


@pytest.mark.requirement("R20")
async def test_a_paused_auctions_offer_can_be_cancelled(world: World, worker: Worker) -> None:
    """The pause ends with it: nothing of it is left to resume."""
    await at_work(world, worker, 0, offered())
    await at_work(world, worker, 50, pause("a", "p-1"))
    await at_work(world, worker, 100, withdraw("a", "w-1"))
    assert world.shard.groups[Group.PAUSED] == {}
    assert world.shard.timers["a"]["paused_at"] == ""
    assert world.announced("a")[-5:] == ["timer.paused", *ANNOUNCED]


@pytest.mark.requirement("R21")
@pytest.mark.requirement("B1")
@pytest.mark.requirement("B2")
@pytest.mark.parametrize("order", list(permutations(["w", "c", "b"])), ids="".join)
@pytest.mark.parametrize("batch_max", [1, 10])
async def test_of_all_who_race_at_the_end_one_wins(world: World, order: tuple[str, ...], batch_max: int) -> None:
    """In the last millisecond a withdrawal, a cancellation and a bid arrive: the first of the two wins, each loser knows."""
    worker = await Worker(world, batch_max=batch_max).begin()
    await at_work(world, worker, 0, offered())
    await worker.live_until(at(309.999))
    asked = {
        "w": withdraw("a", "w-1", reply_to="i"),
        "c": cancel("a", reply_to="i"),
        "b": bid("a", "b-1", reply_to="i"),
    }
    await world.append(*[asked[name] for name in order])
    world.line.advance(100_000)
    await worker.work()
    outcome = dict(zip(order, [answer["outcome"] for answer in world.answers("i")], strict=True))
    first, second = (name for name in order if name != "b")
    assert (outcome[first], outcome[second]) == ("APPLIED", "REFUSED")
    assert outcome["b"] == ("APPLIED" if order[0] == "b" else "LATE")
    assert [fact for fact in world.facts("a") if fact in ("offer_cancelled", "auction_timer_cancelled")] == [
        "offer_cancelled" if first == "w" else "auction_timer_cancelled"
    ]
    assert "auction_timer_ended" not in world.facts("a")
    assert world.announced("a").count("timer.cancelled") == 1
    assert verify(world.shard.audit) is None


@pytest.mark.requirement("B1")
async def test_at_the_deadline_the_close_wins(world: World, worker: Worker) -> None:
    """A withdrawal that arrives at the end is refused, and the auction ended at its end, whoever was looked at first."""
    await at_work(world, worker, 0, offered())
    await worker.live_until(at(300))
    world.line.advance(10_000)
    await world.append(withdraw("a", "w-1", reply_to="i"))
    await worker.work()
    (answer,) = world.answers("i")
    assert (answer["outcome"], answer["error_code"]) == ("REFUSED", "AUCTION_CLOSED")
    assert world.shard.timers["a"]["ended_at"] == str(EpochMs(at(310)))
    assert world.announced("a")[-2:] == ["timer.ended", "offers.cancellation.blocked"]


@pytest.mark.requirement("R25")
async def test_a_hundred_withdrawals_are_one(world: World, worker: Worker) -> None:
    """One is applied and recorded, ninety-nine are told that it is cancelled already."""
    await at_work(world, worker, 0, offered())
    await at_work(world, worker, 20, *[withdraw("a", f"w-{number}", reply_to="i") for number in range(100)])
    outcomes = [(answer["outcome"], answer.get("error_code")) for answer in world.answers("i")]
    assert outcomes == [("APPLIED", None)] + [("REFUSED", "ALREADY_CANCELLED")] * 99
    assert world.facts("a").count("offer_cancelled") == 1


def test_a_support_reference_can_be_read_out() -> None:
    """Ten hexadecimal digits, the same for the same command and others for another."""
    reference = support_reference("cmd-1")
    assert reference == support_reference("cmd-1") != support_reference("cmd-2")
    assert reference.startswith("SUP-")
    assert len(reference) == 14
    assert set(reference[4:]) <= set("0123456789ABCDEF")
