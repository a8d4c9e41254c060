"""Tests for engine.contract.intake."""

import re
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.contract.intake import (
    ANONYMOUS,
    AUCTION_ID,
    BODY_BYTES_MAX,
    SCHEDULER,
    Actor,
    CommandType,
    Context,
    Correct,
    CorrectClock,
    Discard,
    EventType,
    IntakeEvent,
    Outage,
    Resync,
    Retry,
    SchemaError,
    decode,
    encode,
    read_offer,
    read_policy,
)
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Cancel, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.policy import ExtendsOn, ExtensionMode, Policy
from engine.domain.withdrawal import WithdrawalReason
from tests.engine.contract.strategies import auction_ids, intake_events, json_values, mutated, offers
from tests.engine.domain.strategies import policies

POLICY = {
    "soft_close_window_ms": 900_000,
    "extension_ms": 600_000,
    "mode": "add",
    "total_cap_ms": 3_600_000,
    "max_extensions": 4,
    "extends_on": "any_accepted",
    "tick_interval_ms": 5_000,
}
OFFER = {
    "offer_id": "offer-1",
    "owner_id": "owner-1",
    "maker_id": "maker-1",
    "buyer_id": "buyer-1",
    "maker_delegate_ids": ["delegate-1", "delegate-2"],
    "offer_created_at": 1_799_990_000_000,
    "modification_window_minutes": 30,
    "amount_minor": 12_500,
    "currency": "EUR",
    "auto_reject_threshold_minor": 1_000,
}
REGISTRATION = Registration(
    "lot-7",
    EpochMs(1_800_000_000_000),
    EpochMs(1_800_003_600_000),
    Policy(900_000, 600_000, ExtensionMode.ADD, 3_600_000, 4, ExtendsOn.ANY_ACCEPTED, 5_000),
    Offer(
        "offer-1",
        "owner-1",
        "maker-1",
        "buyer-1",
        ("delegate-1", "delegate-2"),
        EpochMs(1_799_990_000_000),
        30,
        12_500,
        "EUR",
        1_000,
    ),
)
START = {"starts_at": 1_800_000_000_000, "ends_at": 1_800_003_600_000, "policy": POLICY, "offer": OFFER}
BID = {
    "bid_id": "bid-1",
    "amount_minor": 500,
    "currency": "EUR",
    "bidder_id": "bidder-3",
    "leader_changed": False,
    "origin": "proxy",
}

# Every event type: its detail as it stands in the stream, and the event that it means.
EVENTS = {
    EventType.AUCTION_STARTED: (START, Register(REGISTRATION)),
    EventType.BID_ACCEPTED: (BID, Bid("bid-1", 500, "EUR", "bidder-3", leader_changed=False, origin="proxy")),
    EventType.OFFER_CANCELLED: ({"reason": "withdrawn"}, Cancel("withdrawn")),
    EventType.CANCEL_REQUESTED: ({"reason": "withdrawn"}, Cancel("withdrawn")),
    EventType.PAUSE_REQUESTED: ({"reason": "alarm"}, Pause("alarm")),
    EventType.RESUME_REQUESTED: ({"reason": None}, Resume()),
    EventType.SCHEDULE_CHANGED: (
        {"ends_at": 1_800_007_200_000, "reason": "hall"},
        Reschedule(EpochMs(1_800_007_200_000), "hall"),
    ),
    CommandType.OFFER_CANCEL_REQUESTED: (
        {"reason_code": "changed_mind", "default_window_minutes": 30, "note": "sorry", "device": "phone-1"},
        Withdraw(WithdrawalReason.CHANGED_MIND, 30, "sorry", "phone-1"),
    ),
    CommandType.RETRY_REQUESTED: ({"command_id": "bid-9", "reason": "known now"}, Retry("bid-9", "known now")),
    CommandType.DISCARD_REQUESTED: ({"command_id": "bid-9", "reason": "a test"}, Discard("bid-9", "a test")),
    CommandType.CORRECTION_REQUESTED: (
        {
            "cause": "hash_changed",
            "fields": {"status": "ACTIVE"},
            "found_version": 9,
            "found_ends_at": 5,
            "unknown": False,
        },
        Correct("hash_changed", {"status": "ACTIVE"}, 9, EpochMs(5)),
    ),
    CommandType.OUTAGE_OBSERVED: (
        {"since": 5, "until": 7_005, "extension_ms": 120_000},
        Outage(EpochMs(5), EpochMs(7_005), 120_000),
    ),
    CommandType.RESYNC_REPORTED: ({"drift_ms": -740, "rtt_ms": 38}, Resync(-740, 38)),
    CommandType.CLOCK_CORRECTED: (
        {"offset_ms": -10_000, "reason": "TIME stepped", "evidence": {"stepped_ms": 10_000}},
        CorrectClock(-10_000, "TIME stepped", {"stepped_ms": 10_000}),
    ),
}
Type = EventType | CommandType
ABOUT_A_COMMAND = {CommandType.RETRY_REQUESTED, CommandType.DISCARD_REQUESTED}


def body_of(event_type: Type = EventType.BID_ACCEPTED, **changes: Any) -> dict[str, Any]:
    """The normalised body of an example event, with some of its fields changed."""
    return {
        "type": event_type.value,
        "auction_id": None if event_type in ABOUT_A_COMMAND else "lot-7",
        "offer_id": None,
        "trace_id": "trace-1",
        "correlation_id": "req-1",
        "actor": {"type": "service", "id": "bidding"},
        "reply_to": None,
        "occurred_at": 1_800_000_100_000,
        "detail": EVENTS[event_type][0],
    } | changes


def read(body: Any) -> IntakeEvent:
    """Decode a body given as a value."""
    return decode("event-1", orjson.dumps(body))


def test_the_event_types_are_the_published_ones() -> None:
    """Seven types come from producers, spelled as in the contract; the others are made by us."""
    assert [event_type.value for event_type in EventType] == [
        "offers.auction.started",
        "auctions.bid.accepted",
        "offers.cancellation.completed",
        "auctions.cancel.requested",
        "auctions.pause.requested",
        "auctions.resume.requested",
        "auctions.schedule.changed",
    ]
    assert set(EVENTS) == {*EventType, *CommandType}
    assert {event_type.value for event_type in CommandType} == {
        "offers.cancel.requested",
        "troubleshooting.retry.requested",
        "troubleshooting.cancel.requested",
        "timers.resync.reported",
        "timers.correction.requested",
        "service.outage.observed",
        "clock.corrected",
    }


@pytest.mark.requirement("R1")
@pytest.mark.parametrize("event_type", EVENTS)
def test_each_type_means_its_event(event_type: Type) -> None:
    """A body of each type is read into the event it stands for, with everything that accompanied it."""
    assert read(body_of(event_type)) == IntakeEvent(
        Context(
            event_id="event-1",
            event_type=event_type.value,
            trace_id="trace-1",
            correlation_id="req-1",
            actor=Actor("service", "bidding"),
            reply_to=None,
            occurred_at=EpochMs(1_800_000_100_000),
        ),
        EVENTS[event_type][1],
        None if event_type in ABOUT_A_COMMAND else "lot-7",
    )


@pytest.mark.parametrize("event_type", EVENTS)
def test_the_written_body_is_the_documented_one(event_type: Type) -> None:
    """What `encode` writes is, field by field, the normalised body."""
    assert orjson.loads(encode(read(body_of(event_type)))) == body_of(event_type)


@pytest.mark.parametrize("event_type", EVENTS)
def test_what_came_with_a_token_says_whose(event_type: Type) -> None:
    """A body without one, as earlier versions wrote it, names nobody."""
    body = body_of(event_type)
    assert read(body).context.submitted_by is None
    assert read(body | {"submitted_by": "bidding-7"}).context.submitted_by == "bidding-7"


@pytest.mark.parametrize("event_type", EVENTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_event_reads_back_as_it_was_written(event_type: Type, data: st.DataObject) -> None:
    """Whatever an event of this type carries, the engine reads exactly what the gateway wrote."""
    event = data.draw(intake_events((event_type,)))
    assert decode(event.context.event_id, encode(event)) == event


@pytest.mark.requirement("R29")
@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff\xfe")
@example(b"[" * 5_000)
@example(b'{"a":' * 5_000)
@example(b'{"type":"\\ud800"}')
@example(b"NaN")
@example(b"1" * 5_000)
def test_no_bytes_break_the_reader(body: bytes) -> None:
    """Bytes that are no body are a schema error and nothing else."""
    with pytest.raises(SchemaError):
        decode("event-1", body)


@pytest.mark.requirement("R29")
@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        json_values,
        st.dictionaries(st.sampled_from(list(body_of())), json_values),
        st.builds(body_of, st.sampled_from(list(EVENTS)), detail=json_values),
    )
)
def test_no_json_breaks_the_reader(body: Any) -> None:
    """A JSON value of any shape is either a readable event or a schema error."""
    check_readable_or_refused(orjson.dumps(body))


@pytest.mark.requirement("R29")
@settings(max_examples=150, deadline=None)
@given(mutated(st.sampled_from(list(EVENTS)).map(lambda event_type: orjson.dumps(body_of(event_type)))))
def test_no_damaged_body_breaks_the_reader(body: bytes) -> None:
    """A valid body with some of its fields lost or overwritten is either still readable or a schema error."""
    check_readable_or_refused(body)


@pytest.mark.requirement("R29")
@settings(max_examples=100, deadline=None)
@given(event_type=st.sampled_from(list(EVENTS)), data=st.data())
def test_no_flipped_byte_breaks_the_reader(event_type: Type, data: st.DataObject) -> None:
    """A valid body with one byte changed, or cut short, is either still readable or a schema error."""
    body = bytearray(orjson.dumps(body_of(event_type)))
    index = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        body[index] = data.draw(st.integers(0, 255))
    else:
        del body[index:]
    check_readable_or_refused(bytes(body))


def check_readable_or_refused(body: bytes) -> None:
    """`body` is refused as a schema error, or means one event that can be written and read again."""
    try:
        event = decode("event-1", body)
    except SchemaError:
        return
    assert decode("event-1", encode(event)) == event
    named = (event.auction_id is not None) + (event.offer_id is not None)
    assert named == 1 or (isinstance(event.event, Retry | Discard | Outage | CorrectClock) and event.offer_id is None)


@pytest.mark.requirement("R29")
def test_a_body_may_be_64_kib() -> None:
    """The last byte within the limit is read, the first one beyond is refused without looking at the body."""
    body = orjson.dumps(body_of())
    assert decode("event-1", body + b" " * (BODY_BYTES_MAX - len(body))).auction_id == "lot-7"
    with pytest.raises(SchemaError, match="65537 bytes, at most 65536"):
        decode("event-1", b" " * (BODY_BYTES_MAX + 1))


@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "auctions.unheard.of"}, "type 'auctions.unheard.of' is unknown"),
        ({"type": None}, "type is not a string"),
        ({"type": "x" * 500}, "type '" + "x" * 100 + "' is unknown"),
        ({"auction_id": None}, "auction_id is missing"),
        ({"auction_id": 7}, "auction_id is not a string"),
        ({"auction_id": ""}, "auction_id is not 1-128 of A-Z a-z 0-9 . _ : -"),
        ({"auction_id": "a b"}, "auction_id is not 1-128 of A-Z a-z 0-9 . _ : -"),
        ({"auction_id": "lot\n"}, "auction_id is not 1-128 of A-Z a-z 0-9 . _ : -"),
        ({"auction_id": "lót"}, "auction_id is not 1-128 of A-Z a-z 0-9 . _ : -"),
        ({"auction_id": "{0}"}, "auction_id is not 1-128 of A-Z a-z 0-9 . _ : -"),
        ({"auction_id": "a" * 129}, "auction_id is not 1-128 of A-Z a-z 0-9 . _ : -"),
        ({"trace_id": None}, "trace_id is not a string"),
        ({"correlation_id": 1}, "correlation_id is not a string"),
        ({"actor": "me"}, "actor is not an object"),
        ({"actor": {"type": "user"}}, "actor.id is not a string"),
        ({"actor": {"type": 1, "id": "u"}}, "actor.type is not a string"),
        ({"reply_to": 5}, "reply_to is not a string"),
        ({"occurred_at": "today"}, "occurred_at is not an integer"),
        ({"occurred_at": 0}, f"occurred_at is not an instant in 1..{EPOCH_MS_MAX}"),
        ({"occurred_at": True}, "occurred_at is not an integer"),
        ({"detail": None}, "detail is not an object"),
        ({"detail": {}}, "detail.bid_id is not a string"),
        ({"detail": BID | {"leader_changed": 1}}, "detail.leader_changed is not true or false"),
        ({"detail": BID | {"leader_changed": None}}, "detail.leader_changed is not true or false"),
        ({"detail": BID | {"amount_minor": 1.5}}, "detail.amount_minor is not an integer"),
        ({"detail": BID | {"amount_minor": False}}, "detail.amount_minor is not an integer"),
        ({"detail": BID | {"currency": ["EUR"]}}, "detail.currency is not a string"),
    ],
)
def test_a_schema_error_names_the_field(changes: dict[str, Any], message: str) -> None:
    """What is wrong with a bid's body is said in one sentence that begins with the field's path."""
    with pytest.raises(SchemaError, match=f"^{re.escape(message)}$"):
        read(body_of(**changes))


@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts_at": None}, "detail.starts_at is not an integer"),
        ({"ends_at": "2027-01-15T08:00:00Z"}, "detail.ends_at is not an integer"),
        ({"ends_at": EPOCH_MS_MAX + 1}, f"detail.ends_at is not an instant in 1..{EPOCH_MS_MAX}"),
        ({"starts_at": 1_800_003_600_000}, "0 < starts_at < ends_at <="),
        ({"policy": []}, "detail.policy is not an object"),
        ({"offer": None}, "detail.offer is not an object"),
        ({"policy": POLICY | {"mode": "double"}}, "policy: 'double' is not a valid ExtensionMode"),
        ({"policy": POLICY | {"extends_on": "never"}}, "policy: 'never' is not a valid ExtendsOn"),
        ({"policy": POLICY | {"extension_ms": 900_001}}, "policy: extension_ms must be between 1 and 900000"),
        ({"policy": POLICY | {"tick_interval_ms": 15_001}}, "policy: tick_interval_ms must be between 100 and 15000"),
        ({"policy": POLICY | {"max_extensions": True}}, "policy.max_extensions is not an integer"),
        ({"offer": OFFER | {"maker_delegate_ids": "me"}}, "offer.maker_delegate_ids is not a list of strings"),
        ({"offer": OFFER | {"maker_delegate_ids": ["me", 1]}}, "offer.maker_delegate_ids is not a list of strings"),
        ({"offer": OFFER | {"offer_created_at": -1}}, "offer.offer_created_at is not an instant"),
        (
            {"offer": OFFER | {"modification_window_minutes": -1}},
            "offer.modification_window_minutes is not a number of",
        ),
        (
            {"offer": OFFER | {"modification_window_minutes": 2**63}},
            "offer.modification_window_minutes is not a number",
        ),
    ],
)
def test_a_wrong_start_is_refused(changes: dict[str, Any], message: str) -> None:
    """The terms of a registration are checked one by one, and the policy's bounds hold at the border too."""
    with pytest.raises(SchemaError, match=f"^{re.escape(message)}"):
        read(body_of(EventType.AUCTION_STARTED, detail=START | changes))


WITHDRAWAL = EVENTS[CommandType.OFFER_CANCEL_REQUESTED][0]


@pytest.mark.requirement("R22")
@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    ("event_type", "detail", "message"),
    [
        (CommandType.OFFER_CANCEL_REQUESTED, {"reason_code": None}, "detail.reason_code is not a string"),
        (CommandType.OFFER_CANCEL_REQUESTED, {"reason_code": "bored"}, "detail.reason_code 'bored' is unknown"),
        (CommandType.OFFER_CANCEL_REQUESTED, {"note": "x" * 501}, "detail.note has more than 500 characters"),
        (CommandType.OFFER_CANCEL_REQUESTED, {"note": 1}, "detail.note is not a string"),
        (CommandType.OFFER_CANCEL_REQUESTED, {"device": {}}, "detail.device is not a string"),
        (CommandType.OFFER_CANCEL_REQUESTED, {"default_window_minutes": None}, "detail.default_window_minutes is not"),
        (CommandType.OFFER_CANCEL_REQUESTED, {"default_window_minutes": -1}, "detail.default_window_minutes is not"),
        (
            CommandType.OFFER_CANCEL_REQUESTED,
            {"default_window_minutes": 525_601},
            "detail.default_window_minutes is not",
        ),
        (CommandType.RETRY_REQUESTED, {"command_id": None}, "detail.command_id is not a string"),
        (CommandType.RETRY_REQUESTED, {"reason": 1}, "detail.reason is not a string"),
        (CommandType.DISCARD_REQUESTED, {"command_id": 7}, "detail.command_id is not a string"),
        (CommandType.CORRECTION_REQUESTED, {"cause": ""}, "detail.cause is not 1-500 characters"),
        (CommandType.CORRECTION_REQUESTED, {"fields": None}, "detail.fields is not an object"),
        (CommandType.CORRECTION_REQUESTED, {"fields": {"version": 3}}, "fields.version is not a string"),
        (CommandType.CORRECTION_REQUESTED, {"found_version": "9"}, "detail.found_version is not an integer"),
        (CommandType.CORRECTION_REQUESTED, {"found_ends_at": 0}, "detail.found_ends_at is not an instant in"),
        (CommandType.CORRECTION_REQUESTED, {"unknown": None}, "detail.unknown is not true or false"),
        (CommandType.CLOCK_CORRECTED, {"offset_ms": 0.5}, "detail.offset_ms is not an integer"),
        (CommandType.CLOCK_CORRECTED, {"offset_ms": -(10**15)}, "detail.offset_ms is not an offset in"),
        (CommandType.CLOCK_CORRECTED, {"reason": ""}, "detail.reason is not 1-500 characters"),
        (CommandType.CLOCK_CORRECTED, {"evidence": []}, "detail.evidence is not an object of at most 4096 bytes"),
        (CommandType.CLOCK_CORRECTED, {"evidence": {"x": "y" * 4_096}}, "detail.evidence is not an object"),
        (CommandType.RESYNC_REPORTED, {"drift_ms": None}, "detail.drift_ms is not an integer"),
        (CommandType.RESYNC_REPORTED, {"drift_ms": 0.5}, "detail.drift_ms is not an integer"),
        (CommandType.RESYNC_REPORTED, {"rtt_ms": "1"}, "detail.rtt_ms is not an integer"),
        (CommandType.DISCARD_REQUESTED, {"reason": None}, "detail.reason is not a string"),
        (CommandType.DISCARD_REQUESTED, {"reason": ""}, "detail.reason is not 1-500 characters"),
        (CommandType.DISCARD_REQUESTED, {"reason": "x" * 501}, "detail.reason is not 1-500 characters"),
    ],
)
def test_a_wrong_command_is_refused(event_type: CommandType, detail: dict[str, Any], message: str) -> None:
    """What gateways make is checked as strictly as what producers send: who writes to the stream may be anybody."""
    with pytest.raises(SchemaError, match=f"^{re.escape(message)}"):
        read(body_of(event_type, detail=EVENTS[event_type][0] | detail))


@pytest.mark.requirement("R22")
def test_the_longest_note_and_the_widest_window_are_read() -> None:
    """The last character, the last minute and no minute at all are inside."""
    detail = WITHDRAWAL | {"note": "ü" * 500, "default_window_minutes": 525_600}
    assert read(body_of(CommandType.OFFER_CANCEL_REQUESTED, detail=detail)).event == Withdraw(
        WithdrawalReason.CHANGED_MIND, 525_600, "ü" * 500, "phone-1"
    )
    none = read(body_of(CommandType.OFFER_CANCEL_REQUESTED, detail=detail | {"default_window_minutes": 0}))
    assert isinstance(none.event, Withdraw)
    assert none.event.default_window_minutes == 0


@pytest.mark.requirement("R30")
def test_an_operators_command_needs_no_auction() -> None:
    """It is about a command, of whatever auction."""
    discard = read(body_of(CommandType.DISCARD_REQUESTED))
    assert (discard.auction_id, discard.offer_id, discard.event) == (None, None, Discard("bid-9", "a test"))
    with pytest.raises(SchemaError, match=r"^auction_id is missing$"):
        read(body_of(CommandType.OFFER_CANCEL_REQUESTED, auction_id=None, offer_id="offer-1"))


@pytest.mark.requirement("R19")
def test_an_offer_is_cancelled_by_either_id() -> None:
    """Only a completed cancellation may name an offer instead of an auction; where both are named, the auction counts."""
    by_offer = read(body_of(EventType.OFFER_CANCELLED, auction_id=None, offer_id="offer-1"))
    assert (by_offer.auction_id, by_offer.offer_id) == (None, "offer-1")
    by_both = read(body_of(EventType.OFFER_CANCELLED, offer_id="offer-1"))
    assert (by_both.auction_id, by_both.offer_id) == ("lot-7", None)
    of_the_shard = {CommandType.OUTAGE_OBSERVED, CommandType.CLOCK_CORRECTED}
    for event_type in set(EVENTS) - {EventType.OFFER_CANCELLED} - of_the_shard - ABOUT_A_COMMAND:
        with pytest.raises(SchemaError, match=r"^auction_id is missing$"):
            read(body_of(event_type, auction_id=None, offer_id="offer-1"))


def test_unknown_fields_are_ignored() -> None:
    """Fields nobody knows change nothing, at any depth."""
    detail = BID | {"shoe_size": 44}
    body = body_of(detail=detail, colour="red", actor={"type": "service", "id": "bidding", "mood": "good"})
    assert read(body) == read(body_of())


@pytest.mark.parametrize("name", ["reply_to", "occurred_at", "offer_id"])
def test_what_may_be_absent_may_be_null(name: str) -> None:
    """An optional field that is left out means the same as one that is null."""
    body = body_of(**{name: None})
    del body[name]
    assert read(body) == read(body_of(**{name: None}))


@settings(max_examples=60, deadline=None)
@given(policies())
def test_a_policy_reads_back(policy: Policy) -> None:
    """A policy written as JSON is read as the same policy."""
    assert read_policy(orjson.loads(orjson.dumps(policy))) == policy


@settings(max_examples=60, deadline=None)
@given(offers)
def test_an_offer_reads_back(offer: Offer) -> None:
    """An offer written as JSON is read as the same offer."""
    assert read_offer(orjson.loads(orjson.dumps(offer))) == offer


@settings(max_examples=60, deadline=None)
@given(auction_ids)
def test_every_allowed_auction_id_is_accepted(auction_id: str) -> None:
    """Any 1 to 128 of the allowed characters are an auction id."""
    assert AUCTION_ID.fullmatch(auction_id)
    assert read(body_of(auction_id=auction_id)).auction_id == auction_id


def test_who_acts_when_nobody_asked() -> None:
    """Time acts as the system's scheduler; a producer that names no actor is a service without a name."""
    assert Actor("system", "scheduler") == SCHEDULER
    assert Actor("service", "") == ANONYMOUS
