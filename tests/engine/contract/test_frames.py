"""Tests for engine.contract.frames."""

from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from hypothesis import given, settings

from engine.contract.frames import OVER, Update, announce, blocked, is_frame
from engine.contract.intake import Actor
from engine.contract.timers import TimerRecord, timer
from engine.domain.auction import Auction, Offer
from engine.domain.correction import correct
from engine.domain.decide import Decision, Fact, decide
from engine.domain.events import Bid, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status, Trigger
from engine.domain.outage import extend_over
from engine.domain.policy import Policy
from engine.domain.withdrawal import WithdrawalReason
from tests.engine.domain.examples import (
    CANCELLED_BEFORE_START_ARRIVED,
    END,
    FOR_TRIGGER,
    IN_STATUS,
    PAUSED_WHILE_CLOSING,
    at,
    registration,
    standing,
)
from tests.engine.domain.strategies import Log, logs

NOW: Final = at(50 * MINUTE_MS + 7)
# In every entry. A gateway adds `cursor` and the time of sending.
HEAD: Final = {"type", "auction_id", "server_time", "trace_id", "correlation_id", "occurred_at"}
OFFER: Final = {"offer_id", "maker_id", "buyer_id", "amount_minor", "currency", "actor"}
CANCELLED_OFFER: Final = OFFER | {"reason", "note"}
BID: Final = {"bid_id", "amount_minor", "currency", "bidder_id", "extended"}

# What each fact is to the outside: the updates in their order, each with what it has besides `HEAD`.
ANNOUNCED: Final[dict[Fact, list[tuple[str, set[str]]]]] = {
    Fact.REGISTERED: [],
    Fact.TOMBSTONED: [],
    Fact.STARTED: [("timer.started", {"timer"}), ("auction_timer_started", set())],
    Fact.CLOSING: [("timer.closing", {"timer"})],
    Fact.ENDED: [("timer.ended", {"timer"})],
    Fact.CANCELLED: [("timer.cancelled", {"timer", "reason"})],
    Fact.OFFER_CANCELLED: [
        ("timer.cancelled", {"timer", "reason"}),
        ("offers.cancelled", CANCELLED_OFFER),
        ("offers.cancellation.completed", CANCELLED_OFFER),
        ("offers.payment_hold.release_requested", CANCELLED_OFFER),
    ],
    Fact.PAUSED: [("timer.paused", {"timer", "reason"})],
    Fact.RESUMED: [("timer.resumed", {"timer", "reason", "previous_ends_at"})],
    Fact.RESCHEDULED: [("timer.rescheduled", {"timer", "reason", "previous_ends_at"})],
    Fact.EXTENDED: [
        ("bid.accepted", BID),
        ("timer.extended", {"timer", "previous_ends_at", "bid_id", "clipped_by"}),
    ],
    Fact.BID_ACCEPTED: [("bid.accepted", BID)],
    Fact.LATE_BID_IGNORED: [],
    Fact.OUTAGE_EXTENDED: [("timer.extended", {"timer", "previous_ends_at", "bid_id", "clipped_by", "reason"})],
    Fact.CORRECTED: [("timer.resynced", {"timer", "cause", "previous_ends_at"})],
}


BUYER: Final = Actor("buyer", "buyer-1")
NOT_FOR_SOCKETS: Final = {
    "auction_timer_started",
    "offers.cancelled",
    "offers.cancellation.completed",
    "offers.payment_hold.release_requested",
}


def told(status: Status, trigger: Trigger) -> Decision:
    """The decision on the example event in this status."""
    auction, instant = IN_STATUS[status]
    return decide(auction, FOR_TRIGGER[trigger], instant)


DECISIONS: Final[dict[Fact, Decision]] = {
    Fact.REGISTERED: told(Status.UNREGISTERED, Trigger.REGISTER),
    Fact.TOMBSTONED: told(Status.UNREGISTERED, Trigger.CANCEL),
    Fact.STARTED: told(Status.SCHEDULED, Trigger.START),
    Fact.CLOSING: told(Status.ACTIVE, Trigger.OPEN_WINDOW),
    Fact.ENDED: told(Status.CLOSING, Trigger.REACH_DEADLINE),
    Fact.CANCELLED: told(Status.ACTIVE, Trigger.CANCEL),
    Fact.OFFER_CANCELLED: told(Status.ACTIVE, Trigger.WITHDRAW),
    Fact.PAUSED: told(Status.CLOSING, Trigger.PAUSE),
    Fact.RESUMED: told(Status.PAUSED, Trigger.RESUME),
    Fact.RESCHEDULED: told(Status.CLOSING, Trigger.RESCHEDULE),
    Fact.EXTENDED: told(Status.CLOSING, Trigger.BID),
    Fact.BID_ACCEPTED: told(Status.ACTIVE, Trigger.BID),
    Fact.LATE_BID_IGNORED: told(Status.ENDED, Trigger.BID),
    Fact.OUTAGE_EXTENDED: next(
        extend_over(IN_STATUS[Status.CLOSING][0], EpochMs(1), EpochMs(NOW + 30 * HOUR_MS), 60_000)
    ),
    Fact.CORRECTED: correct(
        IN_STATUS[Status.CLOSING][0], NOW, cause="hash_changed", found_version=9, found_ends_at=None
    ),
}


def announced(decision: Decision) -> list[Update]:
    """What `decision` announces at `NOW`."""
    record = TimerRecord(decision.after, "trace-1", "req-0")
    return announce(decision, record, actor=BUYER, trace_id="trace-2", correlation_id="req-2", now=NOW)


def bodies(decision: Decision) -> list[dict[str, Any]]:
    """The bodies of what `decision` announces."""
    return [orjson.loads(update.body) for update in announced(decision)]


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("fact", Fact)
def test_each_fact_announces_its_frames(fact: Fact) -> None:
    """Each fact gives exactly the updates of the contract, in order, each with exactly its fields."""
    decision = DECISIONS[fact]
    assert decision.fact is fact
    found = [(update.type, set(orjson.loads(update.body)) - HEAD) for update in announced(decision)]
    assert found == ANNOUNCED[fact]


@pytest.mark.parametrize("fact", Fact)
def test_each_update_says_what_it_is_about(fact: Fact) -> None:
    """Entry and body agree on type and auction; the event's own trace and correlation go with it, and when it counted."""
    decision = DECISIONS[fact]
    for update in announced(decision):
        body = orjson.loads(update.body)
        assert (update.auction_id, update.version) == ("lot-7", decision.after.version)
        assert {name: body[name] for name in HEAD} == {
            "type": update.type,
            "auction_id": "lot-7",
            "server_time": NOW,
            "trace_id": "trace-2",
            "correlation_id": "req-2",
            "occurred_at": decision.at,
        }


@pytest.mark.parametrize("fact", [fact for fact, updates in ANNOUNCED.items() if updates])
def test_a_frame_carries_the_timer_after_the_fact(fact: Fact) -> None:
    """`timer` is the full Timer of the state that the fact led to, as of now, without a cursor: nobody knows it yet."""
    decision = DECISIONS[fact]
    expected = timer(TimerRecord(decision.after, "trace-1", "req-0"), NOW, None)
    timers = [body["timer"] for body in bodies(decision) if "timer" in body]
    assert timers == [expected] * len(timers)
    assert len(timers) == (fact is not Fact.BID_ACCEPTED)


@pytest.mark.requirement("R15")
def test_an_extension_to_the_letter() -> None:
    """The bid comes first, then where the end stood, which bid moved it, and which cap cut the extension."""
    closing = standing((45 * MINUTE_MS, None), registered=registration(policy=Policy(total_cap_ms=2 * MINUTE_MS)))
    decision = decide(closing, FOR_TRIGGER[Trigger.BID], at(50 * MINUTE_MS))
    bid, extended = bodies(decision)
    assert {name: bid[name] for name in BID | {"clipped_by"}} == {
        "bid_id": "bid-1",
        "amount_minor": 12_500,
        "currency": "EUR",
        "bidder_id": "bidder-3",
        "extended": True,
        "clipped_by": "total",
    }
    assert (extended["previous_ends_at"], extended["bid_id"], extended["clipped_by"]) == (END, "bid-1", "total")
    assert extended["timer"]["ends_at"] == at(62 * MINUTE_MS)


def test_an_unclipped_extension_says_so() -> None:
    """`clipped_by` of `timer.extended` is there and null where no cap cut the extension."""
    _, extended = bodies(DECISIONS[Fact.EXTENDED])
    assert extended["clipped_by"] is None


@pytest.mark.requirement("B6")
def test_a_bid_that_a_cap_stopped_says_so() -> None:
    """A bid that would have extended, had there been room, is announced as accepted, not extended, with the cap's name."""
    closing = standing((45 * MINUTE_MS, None), registered=registration(policy=Policy(max_extensions=0)))
    (bid,) = bodies(decide(closing, FOR_TRIGGER[Trigger.BID], at(50 * MINUTE_MS)))
    assert (bid["extended"], bid["clipped_by"]) == (False, "count")


@pytest.mark.parametrize(
    ("decision", "added"),
    [
        (DECISIONS[Fact.PAUSED], {"reason": "fire alarm"}),
        (DECISIONS[Fact.CANCELLED], {"reason": "seller withdrew"}),
        (DECISIONS[Fact.RESUMED], {"reason": "all clear", "previous_ends_at": END}),
        (DECISIONS[Fact.RESCHEDULED], {"reason": "hall is booked longer", "previous_ends_at": END}),
        (decide(PAUSED_WHILE_CLOSING, Resume(), NOW), {"reason": None, "previous_ends_at": END}),
    ],
    ids=["paused", "cancelled", "resumed", "rescheduled", "resumed without a reason"],
)
def test_operators_actions_carry_their_reason(decision: Decision, added: dict[str, Any]) -> None:
    """A reason is handed on, also where none was given, and so is the end that stood before."""
    (body,) = bodies(decision)
    assert {name: body[name] for name in added} == added


@pytest.mark.requirement("R25")
@pytest.mark.parametrize(
    "decision",
    [
        told(Status.ENDED, Trigger.PAUSE),
        told(Status.UNREGISTERED, Trigger.BID),
        told(Status.ACTIVE, Trigger.REGISTER),
        told(Status.PAUSED, Trigger.REACH_DEADLINE),
        decide(IN_STATUS[Status.ACTIVE][0], Reschedule(END), NOW),
    ],
    ids=["refused", "unknown", "registered again", "stale wake-up", "same end"],
)
def test_what_did_not_happen_is_not_announced(decision: Decision) -> None:
    """A refusal and an event without effect announce nothing."""
    assert announced(decision) == []


@pytest.mark.requirement("R27")
def test_a_start_after_its_cancellation_announces_that_alone() -> None:
    """An auction that is cancelled from the beginning never says that it started, but that it was cancelled."""
    tombstone, instant = IN_STATUS[Status.TOMBSTONE]
    decision = decide(tombstone, Register(registration()), instant)
    assert replace(decision.after) == CANCELLED_BEFORE_START_ARRIVED
    (update,) = announced(decision)
    body = orjson.loads(update.body)
    assert (update.type, body["timer"]["status"]) == ("timer.cancelled", "CANCELLED")
    assert body["reason"] == CANCELLED_BEFORE_START_ARRIVED.reason
    assert announced(decide(decision.after, Register(registration()), instant)) == []


def withdrawn(minutes: int = 60, **offer: Any) -> Decision:
    """What becomes of the withdrawal of an offer with these facts, ten minutes after its start."""
    auction, instant = IN_STATUS[Status.ACTIVE]
    terms = Offer("offer-1", maker_id="maker-1", buyer_id="buyer-1", **offer)
    auction = replace(auction, registration=replace(auction.registered, offer=terms))
    return decide(auction, Withdraw(WithdrawalReason.PAYMENT_PROBLEM, minutes, note="sorry"), instant)


@pytest.mark.requirement("R23")
def test_a_cancelled_offer_to_the_letter() -> None:
    """Outbound events say whose offer it was, of what amount, who cancelled it, why, and in which words."""
    timer_cancelled, *offers = bodies(withdrawn(amount_minor=900, currency="EUR"))
    assert (timer_cancelled["reason"], timer_cancelled["timer"]["status"]) == ("payment_problem", "CANCELLED")
    for body in offers:
        assert {name: body[name] for name in CANCELLED_OFFER} == {
            "offer_id": "offer-1",
            "maker_id": "maker-1",
            "buyer_id": "buyer-1",
            "amount_minor": 900,
            "currency": "EUR",
            "actor": {"type": "buyer", "id": "buyer-1"},
            "reason": "payment_problem",
            "note": "sorry",
        }


@pytest.mark.requirement("R23")
@pytest.mark.parametrize(("amount_minor", "alarmed"), [(1_000, False), (1_001, True)])
def test_a_cancelled_offer_of_high_value_is_announced_once_more(amount_minor: int, alarmed: bool) -> None:
    """Over the maker's threshold, and last, so that whoever acts on it has seen the rest."""
    types = [body["type"] for body in bodies(withdrawn(amount_minor=amount_minor, auto_reject_threshold_minor=1_000))]
    assert types[:4] == [update_type for update_type, _ in ANNOUNCED[Fact.OFFER_CANCELLED]]
    assert types[4:] == ["offers.cancellation.high_value"] * alarmed


@pytest.mark.requirement("R21")
def test_a_blocked_cancellation_to_the_letter() -> None:
    """The code, the sentence and the reference that the refused one was given, and the version that stands."""
    decision = withdrawn(minutes=10, amount_minor=900, currency="EUR")
    record = TimerRecord(decision.after, "trace-1", "req-0")
    update = blocked(
        decision, record, actor=BUYER, support_reference="SUP-1", trace_id="trace-2", correlation_id="req-2", now=NOW
    )
    assert (update.type, update.auction_id, update.version) == ("offers.cancellation.blocked", "lot-7", 2)
    assert not is_frame(update.type)
    body = orjson.loads(update.body)
    assert decision.refusal is not None
    assert body == {
        "type": "offers.cancellation.blocked",
        "auction_id": "lot-7",
        "server_time": NOW,
        "trace_id": "trace-2",
        "correlation_id": "req-2",
        "occurred_at": decision.at,
        "error_code": "WINDOW_EXPIRED",
        "error": decision.refusal.message,
        "support_reference": "SUP-1",
        "offer_id": "offer-1",
        "maker_id": "maker-1",
        "buyer_id": "buyer-1",
        "amount_minor": 900,
        "currency": "EUR",
        "actor": {"type": "buyer", "id": "buyer-1"},
    }


@pytest.mark.requirement("R14")
def test_what_goes_to_sockets() -> None:
    """Timers and bids are frames; analytics and offers are for the outbound bus only; two frames end the conversation."""
    types = [update_type for updates in ANNOUNCED.values() for update_type, _ in updates]
    assert {update_type for update_type in types if not is_frame(update_type)} == NOT_FOR_SOCKETS
    assert {"timer.ended", "timer.cancelled"} == OVER


@pytest.mark.requirement("B1")
@settings(max_examples=30, deadline=None)
@given(logs())
def test_any_history_is_announced_in_full(log: Log) -> None:
    """In any history each fact announces what the table above says, and nothing follows a frame that says it is over."""
    auction, over_at = Auction("lot-7"), None
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            auction = decision.after
            expected = ANNOUNCED[decision.fact] if decision.fact else []
            if decision.fact is Fact.REGISTERED and auction.status is Status.CANCELLED:
                expected = ANNOUNCED[Fact.CANCELLED]
            if decision.fact is Fact.OFFER_CANCELLED and auction.registered.offer.amount_minor == 500:
                expected = [*expected, ("offers.cancellation.high_value", CANCELLED_OFFER)]
            updates = announced(decision)
            assert [update.type for update in updates] == [update_type for update_type, _ in expected]
            for update in updates:
                assert over_at in (None, auction.version), "something was announced after the end"
                assert not (over_at and is_frame(update.type)), "a socket was told something after the end"
                assert update.version == auction.version
                over_at = auction.version if update.type in OVER else over_at


def test_the_examples_cover_every_fact() -> None:
    """No fact can be added without saying what it announces."""
    assert set(ANNOUNCED) == set(DECISIONS) == set(Fact)


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("status", [Status.ENDED, Status.CANCELLED])
def test_the_correction_of_what_is_over_is_not_announced(status: Status) -> None:
    """Its end was announced, and once."""
    corrected = correct(IN_STATUS[status][0], NOW, cause="hash_changed", found_version=0, found_ends_at=None)
    assert announced(corrected) == []


def test_a_bid_without_details_is_announced_with_nulls() -> None:
    """What a producer left out is null in the frame, not missing."""
    paused, instant = IN_STATUS[Status.PAUSED]
    (body,) = bodies(decide(paused, Bid("bid-9"), instant))
    assert (body["bid_id"], body["amount_minor"], body["currency"], body["bidder_id"]) == ("bid-9", None, None, None)
    (body,) = bodies(decide(IN_STATUS[Status.ACTIVE][0], Pause(), instant))
    assert body["reason"] is None
