"""Tests for gateway.events."""

import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from engine.contract.intake import (
    AMOUNT_MINOR_MAX,
    ANONYMOUS,
    BODY_BYTES_MAX,
    DELEGATES_MAX,
    Actor,
    Context,
    EventType,
    IntakeEvent,
    decode,
    encode,
)
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.policy import ExtendsOn, ExtensionMode, Policy
from gateway import events as events_module
from gateway.events import ERRORS_LISTED_MAX, EVENTS_MAX, event_schemas, parse_events
from gateway.problems import Problem, ProblemType, problem_response

T0 = 1_800_000_000_000
T0_TEXT = "2027-01-15T08:00:00Z"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"

ID_REASON = "must be 1-128 printable ASCII characters without spaces"
AUCTION_ID_REASON = "must be 1-128 characters of A-Z a-z 0-9 . _ : -"
INSTANT_REASON = "must be whole epoch milliseconds or an RFC 3339 date-time with a zone"
RANGE_REASON = f"must be between 1 and {EPOCH_MS_MAX} in epoch milliseconds"
ZONE_REASON = "has no time zone: end it with Z or an offset such as +02:00"

FULL: dict[str, dict[str, Any]] = {
    EventType.AUCTION_STARTED: {
        "auction_id": "a-1",
        "starts_at": T0,
        "ends_at": "2027-01-15T09:00:00Z",
        "policy": {
            "soft_close_window_ms": 60_000,
            "extension_ms": 30_000,
            "mode": "add",
            "total_cap_ms": 600_000,
            "max_extensions": 3,
            "extends_on": "any_accepted",
            "tick_interval_ms": 5_000,
        },
        "offer_id": "o-1",
        "owner_id": "owner",
        "maker_id": "maker",
        "buyer_id": "buyer",
        "maker_delegate_ids": ["d-1", "d-2"],
        "offer_created_at": "2027-01-15T07:00:00Z",
        "modification_window_minutes": 30,
        "amount_minor": 12_345,
        "currency": "EUR",
        "auto_reject_threshold_minor": 100,
    },
    EventType.BID_ACCEPTED: {
        "auction_id": "a-1",
        "bid_id": "b-1",
        "amount_minor": 12_345,
        "currency": "EUR",
        "bidder_id": "u-1",
        "leader_changed": False,
        "origin": "proxy",
    },
    EventType.OFFER_CANCELLED: {"offer_id": "o-1", "reason": "withdrawn", "actor": {"type": "maker", "id": "m-1"}},
    EventType.CANCEL_REQUESTED: {"auction_id": "a-1", "reason": "fraud", "actor": {"type": "ops", "id": "x"}},
    EventType.PAUSE_REQUESTED: {"auction_id": "a-1", "reason": "outage", "actor": {"type": "ops", "id": "x"}},
    EventType.RESUME_REQUESTED: {"auction_id": "a-1", "reason": "it is over", "actor": {"type": "ops", "id": "x"}},
    EventType.SCHEDULE_CHANGED: {
        "auction_id": "a-1",
        "ends_at": T0,
        "reason": "typo",
        "actor": {"type": "ops", "id": "x"},
    },
}
"""For each type, a detail with every field of the contract's table."""

LEAST: dict[str, dict[str, Any]] = {
    EventType.AUCTION_STARTED: {"auction_id": "a-1", "starts_at": T0, "ends_at": T0 + 1},
    EventType.BID_ACCEPTED: {"auction_id": "a-1", "bid_id": "b-1"},
    EventType.OFFER_CANCELLED: {"auction_id": "a-1", "reason": "withdrawn"},
    EventType.CANCEL_REQUESTED: {"auction_id": "a-1", "reason": "fraud"},
    EventType.PAUSE_REQUESTED: {"auction_id": "a-1"},
    EventType.RESUME_REQUESTED: {"auction_id": "a-1"},
    EventType.SCHEDULE_CHANGED: {"auction_id": "a-1", "ends_at": T0},
}
"""For each type, a detail with the required fields only."""


def eventbridge(event_type: str, detail: object, **attributes: object) -> dict[str, Any]:
    """An event in the EventBridge envelope."""
    return {"id": "e-1", "detail-type": event_type, "source": "bidding", "time": T0_TEXT, "detail": detail} | attributes


def cloudevent(event_type: str, data: object, **attributes: object) -> dict[str, Any]:
    """An event in the CloudEvents envelope."""
    envelope = {"specversion": "1.0", "id": "e-1", "type": event_type, "source": "/bidding", "time": T0_TEXT}
    return envelope | {"data": data} | attributes


Wrap = Callable[..., dict[str, Any]]
WRAPS: list[Wrap] = [eventbridge, cloudevent]
ENVELOPES = [pytest.param(eventbridge, id="eventbridge"), pytest.param(cloudevent, id="cloudevents")]


def bid(**fields: object) -> dict[str, Any]:
    """A minimal bid in the EventBridge envelope, with `fields` in its detail."""
    return eventbridge(EventType.BID_ACCEPTED, LEAST[EventType.BID_ACCEPTED] | fields)


def started(**fields: object) -> dict[str, Any]:
    """A minimal registration in the EventBridge envelope, with `fields` in its detail."""
    return eventbridge(EventType.AUCTION_STARTED, LEAST[EventType.AUCTION_STARTED] | fields)


def without(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of `raw` that lacks one field."""
    return {key: value for key, value in raw.items() if key != name}


def body_of(raw: object) -> bytes:
    """The JSON of any Python value, also of those that orjson would not write (huge integers, lone surrogates)."""
    return json.dumps(raw, ensure_ascii=False).encode("utf-8", "surrogatepass")


def parse_body(body: bytes, *, traceparent: str | None = None) -> list[IntakeEvent]:
    """What `body` holds; new trace ids are `new-1`, `new-2`, …"""
    numbers: Iterator[int] = count(1)
    return parse_events(
        body, correlation_id="req-1", traceparent=traceparent, new_trace_id=lambda: f"new-{next(numbers)}"
    )


def parse(*raw: object, traceparent: str | None = None) -> list[IntakeEvent]:
    """The events of a batch."""
    return parse_body(body_of(list(raw)), traceparent=traceparent)


def one(raw: object, *, traceparent: str | None = None) -> IntakeEvent:
    """The event of a body that is a single object."""
    (event,) = parse_body(body_of(raw), traceparent=traceparent)
    return event


def refusal(body: bytes) -> Problem:
    """The problem that refuses `body`."""
    with pytest.raises(Problem) as caught:
        parse_body(body)
    return caught.value


def faults(*raw: object) -> list[tuple[int, str, str]]:
    """Index, path and reason of each listed error of a malformed batch."""
    problem = refusal(body_of(list(raw)))
    assert problem.type is ProblemType.MALFORMED_EVENTS
    return [(error["index"], error["path"], error["reason"]) for error in problem.extra["errors"]]


# --- what is understood -----------------------------------------------------------------------------------------------

ACTED_ON: dict[str, InputEvent] = {
    EventType.AUCTION_STARTED: Register(
        Registration(
            "a-1",
            EpochMs(T0),
            EpochMs(T0 + 3_600_000),
            Policy(60_000, 30_000, ExtensionMode.ADD, 600_000, 3, ExtendsOn.ANY_ACCEPTED, 5_000),
            Offer(
                "o-1",
                "owner",
                "maker",
                "buyer",
                ("d-1", "d-2"),
                EpochMs(T0 - 3_600_000),
                30,
                12_345,
                "EUR",
                100,
            ),
        )
    ),
    EventType.BID_ACCEPTED: Bid("b-1", 12_345, "EUR", "u-1", leader_changed=False, origin="proxy"),
    EventType.OFFER_CANCELLED: Cancel("withdrawn"),
    EventType.CANCEL_REQUESTED: Cancel("fraud"),
    EventType.PAUSE_REQUESTED: Pause("outage"),
    EventType.RESUME_REQUESTED: Resume("it is over"),
    EventType.SCHEDULE_CHANGED: Reschedule(EpochMs(T0), "typo"),
}

LEAST_ACTED_ON: dict[str, InputEvent] = {
    EventType.AUCTION_STARTED: Register(Registration("a-1", EpochMs(T0), EpochMs(T0 + 1))),
    EventType.BID_ACCEPTED: Bid("b-1"),
    EventType.OFFER_CANCELLED: Cancel("withdrawn"),
    EventType.CANCEL_REQUESTED: Cancel("fraud"),
    EventType.PAUSE_REQUESTED: Pause(),
    EventType.RESUME_REQUESTED: Resume(),
    EventType.SCHEDULE_CHANGED: Reschedule(EpochMs(T0)),
}


@pytest.mark.parametrize("wrap", ENVELOPES)
@pytest.mark.parametrize("event_type", EventType)
def test_every_type_is_read_in_full(wrap: Wrap, event_type: EventType) -> None:
    """Every field of the contract's table arrives in the event of the domain, whichever envelope carried it."""
    event = one(wrap(event_type, FULL[event_type]))
    assert event.event == ACTED_ON[event_type]
    assert event.context.event_type == event_type
    assert (event.auction_id, event.offer_id) == (
        (None, "o-1") if event_type is EventType.OFFER_CANCELLED else ("a-1", None)
    )


@pytest.mark.parametrize("wrap", ENVELOPES)
@pytest.mark.parametrize("event_type", EventType)
def test_every_type_needs_only_its_required_fields(wrap: Wrap, event_type: EventType) -> None:
    """Without the optional fields the domain's defaults stand, and nobody in particular asked."""
    event = one(wrap(event_type, LEAST[event_type]))
    assert event.event == LEAST_ACTED_ON[event_type]
    assert event.context.actor == ANONYMOUS
    assert event.auction_id == "a-1"


@pytest.mark.parametrize("wrap", ENVELOPES)
@pytest.mark.parametrize(
    ("event_type", "name"), [(event_type, name) for event_type, detail in LEAST.items() for name in detail]
)
def test_each_required_field_is_required(wrap: Wrap, event_type: str, name: str) -> None:
    """Leaving out any one required field is refused with the path of that field."""
    prefix = "detail" if wrap is eventbridge else "data"
    listed = faults(wrap(event_type, without(LEAST[event_type], name)))
    if event_type == EventType.OFFER_CANCELLED and name == "auction_id":
        assert listed == [(0, prefix, "auction_id or offer_id is required")]
    else:
        assert listed == [(0, f"{prefix}.{name}", "is required")]


@pytest.mark.parametrize(
    ("event_type", "name"),
    [
        (event_type, name)
        for event_type, detail in FULL.items()
        for name in sorted(detail.keys() - LEAST[event_type].keys())
        if name != "leader_changed"
    ],
)
def test_null_is_the_same_as_leaving_an_optional_field_out(event_type: str, name: str) -> None:
    """Producers that write every field may write null where they have nothing to say."""
    assert one(eventbridge(event_type, LEAST[event_type] | {name: None})).event == LEAST_ACTED_ON[event_type]


def test_an_offer_cancellation_goes_by_its_auction_where_it_names_both() -> None:
    """With an auction id and an offer id, the auction id says what is meant."""
    detail = {"auction_id": "a-1", "offer_id": "o-1", "reason": "withdrawn"}
    event = one(eventbridge(EventType.OFFER_CANCELLED, detail))
    assert (event.auction_id, event.offer_id) == ("a-1", None)


@pytest.mark.parametrize("event_type", [EventType.AUCTION_STARTED, EventType.BID_ACCEPTED])
def test_an_actor_is_ignored_where_the_type_has_none(event_type: EventType) -> None:
    """The contract gives these types no actor, so the field is an unknown one: neither read nor checked."""
    assert one(eventbridge(event_type, LEAST[event_type] | {"actor": 5})).context.actor == ANONYMOUS


def test_the_actor_is_kept() -> None:
    """Who asked is handed on as named; names may hold spaces and letters of any script."""
    detail = LEAST[EventType.PAUSE_REQUESTED] | {"actor": {"type": "operator", "id": "Žofie K."}}
    assert one(eventbridge(EventType.PAUSE_REQUESTED, detail)).context.actor == Actor("operator", "Žofie K.")


def test_one_object_is_a_batch_of_one() -> None:
    """A body may be the event itself instead of an array."""
    assert parse_body(body_of(bid())) == parse(bid())


def test_a_batch_keeps_its_order_and_may_mix_envelopes() -> None:
    """Events come out as they went in: every type, both envelopes, in one array."""
    raw = [
        wrap(event_type, detail, id=f"{wrap.__name__}-{event_type}")
        for event_type, detail in FULL.items()
        for wrap in (eventbridge, cloudevent)
    ]
    events = parse(*raw)
    assert [event.context.event_id for event in events] == [event["id"] for event in raw]


def test_the_same_id_twice_in_a_batch_is_not_an_error() -> None:
    """Duplicates are the intake's to answer for, event by event; here both are events."""
    assert len(parse(bid(), bid())) == 2


def test_a_full_batch_is_accepted() -> None:
    """Five hundred events are allowed."""
    assert len(parse(*[bid(bid_id=f"b-{number}") for number in range(EVENTS_MAX)])) == EVENTS_MAX == 500


@pytest.mark.parametrize("wrap", ENVELOPES)
def test_unknown_fields_are_ignored_wherever_they_are(wrap: Wrap) -> None:
    """New fields in the envelope, the detail or the policy do not break an older server."""
    detail = LEAST[EventType.AUCTION_STARTED] | {"policy": {"colour": 1}, "event": {}, "subject": [], "résumé": None}
    raw = wrap(EventType.AUCTION_STARTED, detail, account="123", resources=[], datacontenttype="x", model_config=1)
    assert one(raw).event == LEAST_ACTED_ON[EventType.AUCTION_STARTED]


def test_names_of_the_python_side_are_not_accepted() -> None:
    """Only the spelling of the wire counts: `event_type` does not stand in for `detail-type`."""
    raw = without(bid(), "detail-type") | {"event_type": EventType.BID_ACCEPTED}
    assert faults(raw) == [(0, "detail-type", "is required")]


def test_the_last_of_two_equal_keys_wins() -> None:
    """JSON leaves duplicate keys open; the last one counts, as in every common parser."""
    body = body_of(bid()).replace(b'"bid_id": "b-1"', b'"bid_id": "b-1", "bid_id": "b-2"')
    assert [event.event for event in parse_body(body)] == [Bid("b-2")]


@pytest.mark.parametrize("wrap", ENVELOPES)
def test_source_and_time_may_be_missing_where_the_envelope_allows(wrap: Wrap) -> None:
    """EventBridge events need neither source nor time; CloudEvents need their source."""
    raw = wrap(EventType.BID_ACCEPTED, LEAST[EventType.BID_ACCEPTED])
    assert one(without(raw, "time")).context.occurred_at is None
    assert one(raw | {"time": None}).context.occurred_at is None
    if wrap is eventbridge:
        assert one(without(raw, "source")).event == Bid("b-1")
    else:
        assert faults(without(raw, "source")) == [(0, "source", "is required")]
        assert faults(raw | {"source": ""}) == [(0, "source", "must not be empty")]
        assert faults(raw | {"source": "s" * 1025}) == [(0, "source", "must have at most 1024 characters")]


# --- context ----------------------------------------------------------------------------------------------------------


def test_the_context_of_a_bare_event() -> None:
    """What the event does not say comes from the request; the rest is empty."""
    assert one(bid()).context == Context(
        event_id="e-1",
        event_type="auctions.bid.accepted",
        trace_id="new-1",
        correlation_id="req-1",
        actor=ANONYMOUS,
        reply_to=None,
        occurred_at=EpochMs(T0),
    )


def test_correlation_id_and_reply_to_are_the_events_own() -> None:
    """A correlation id of the event goes before that of the request."""
    context = one(bid(correlation_id="c-1", reply_to="queue:1")).context
    assert (context.correlation_id, context.reply_to) == ("c-1", "queue:1")


def test_each_event_without_a_trace_gets_a_new_one() -> None:
    """Two events of one batch do not share an invented trace."""
    assert [event.context.trace_id for event in parse(bid(), bid(trace_id="t"), bid())] == ["new-1", "t", "new-2"]


@pytest.mark.parametrize("wrap", ENVELOPES)
def test_the_trace_is_the_most_specific_one(wrap: Wrap) -> None:
    """trace_id, submission_trace_id, the event's traceparent, the detail's, the request's, a new one: in that order."""

    def other(digit: str) -> str:
        return f"00-{digit * 32}-00f067aa0ba902b7-01"

    detail = LEAST[EventType.BID_ACCEPTED] | {
        "trace_id": "t-1",
        "submission_trace_id": "t-2",
        "traceparent": other("4"),
    }
    raw = wrap(EventType.BID_ACCEPTED, detail, traceparent=other("3"))
    seen = [one(raw, traceparent=other("5")).context.trace_id]
    for name in ("trace_id", "submission_trace_id"):
        del detail[name]
        seen.append(one(raw, traceparent=other("5")).context.trace_id)
    del raw["traceparent"]
    seen.append(one(raw, traceparent=other("5")).context.trace_id)
    del detail["traceparent"]
    seen.append(one(raw, traceparent=other("5")).context.trace_id)
    seen.append(one(raw).context.trace_id)
    assert seen == ["t-1", "t-2", "3" * 32, "4" * 32, "5" * 32, "new-1"]


@pytest.mark.parametrize(
    "traceparent",
    [
        TRACEPARENT,
        f"00-{TRACE}-00f067aa0ba902b7-00",
        f"01-{TRACE}-00f067aa0ba902b7-01",
        f"cc-{TRACE}-00f067aa0ba902b7-01-what-the-future-brings",
    ],
)
def test_valid_traceparents(traceparent: str) -> None:
    """Version 00, and later versions with or without more parts, give their trace id."""
    assert one(bid(), traceparent=traceparent).context.trace_id == TRACE
    assert one(bid(traceparent=traceparent)).context.trace_id == TRACE


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "junk",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7-01-more",
        f"00-{TRACE}-00f067aa0ba902b7-01-",
        f"00-{TRACE}-00f067aa0ba902b7-01\n",
        f"cc-{TRACE}-00f067aa0ba902b7-01.more",
        f"00-{TRACE}-00f067aa0ba902b7",
        f" {TRACEPARENT}",
        5,
        None,
        [TRACEPARENT],
        {"traceparent": TRACEPARENT},
    ],
)
def test_an_invalid_traceparent_is_ignored(traceparent: object) -> None:
    """W3C Trace Context: what cannot be read counts as absent and never fails the event."""
    event = one(bid(traceparent=traceparent) | {"traceparent": traceparent}, traceparent=str(traceparent))
    assert event.context.trace_id == "new-1"


# --- instants ---------------------------------------------------------------------------------------------------------

INSTANTS = [
    (1, 1),
    (T0, T0),
    (EPOCH_MS_MAX, EPOCH_MS_MAX),
    (T0_TEXT, T0),
    ("2027-01-15t08:00:00z", T0),
    ("2027-01-15 08:00:00Z", T0),
    ("2027-01-15T10:00:00+02:00", T0),
    ("2027-01-14T22:30:00-09:30", T0),
    ("2027-01-15T08:00:00-00:00", T0),
    ("2027-01-15T08:00:00.5Z", T0 + 500),
    ("2027-01-15T08:00:00.123Z", T0 + 123),
    ("2027-01-15T08:00:00.1239999999999Z", T0 + 123),
    ("2027-01-15T08:00:00.000999Z", T0),
    ("2028-02-29T00:00:00Z", 1_835_395_200_000),
    ("2016-12-31T23:59:60Z", 1_483_228_800_000),
    ("2016-12-31T15:59:60.75-08:00", 1_483_228_800_750),
    ("1970-01-01T00:00:00.001Z", 1),
    ("9999-12-31T23:59:59.999999Z", EPOCH_MS_MAX),
]

NOT_INSTANTS: list[tuple[object, str]] = [
    (True, INSTANT_REASON),
    (1.5, INSTANT_REASON),
    (float(T0), INSTANT_REASON),
    (1e300, INSTANT_REASON),
    (10**30, INSTANT_REASON),
    ([T0], INSTANT_REASON),
    ({"ms": T0}, INSTANT_REASON),
    ("", INSTANT_REASON),
    (str(T0), INSTANT_REASON),
    ("tomorrow", INSTANT_REASON),
    ("2027-01-15", INSTANT_REASON),
    ("2027-01-15T08:00Z", INSTANT_REASON),
    ("20270115T080000Z", INSTANT_REASON),
    ("2027-W02-5T08:00:00Z", INSTANT_REASON),
    ("2027-01-15T08:00:00,5Z", INSTANT_REASON),
    ("2027-01-15T08:00:00.Z", INSTANT_REASON),
    ("2027-01-15T08:00:00+0200", INSTANT_REASON),
    ("2027-01-15T08:00:00+24:00", INSTANT_REASON),
    ("2027-01-15T08:00:00Z\n", INSTANT_REASON),
    (" 2027-01-15T08:00:00Z", INSTANT_REASON),
    ("2027-01-15T24:00:00Z", INSTANT_REASON),
    ("2027-01-15T08:60:00Z", INSTANT_REASON),
    ("2027-01-15T08:00:61Z", INSTANT_REASON),
    ("٢٠٢٧-01-15T08:00:00Z", INSTANT_REASON),
    ("2027-01-15T08:00:00Z\x00", INSTANT_REASON),
    ("2027-01-15T08:00:00", ZONE_REASON),
    ("2027-01-15 08:00:00.123", ZONE_REASON),
    ("2027-02-29T00:00:00Z", "is a day that no calendar has"),
    ("2027-13-01T00:00:00Z", "is a day that no calendar has"),
    ("2027-00-10T00:00:00Z", "is a day that no calendar has"),
    ("0000-01-01T00:00:00Z", "is a day that no calendar has"),
    ("2027-01-15T08:00:60Z", "is a leap second at a time of day that has none"),
    ("2016-12-31T23:59:60+01:00", "is a leap second at a time of day that has none"),
    (0, RANGE_REASON),
    (-1, RANGE_REASON),
    (EPOCH_MS_MAX + 1, RANGE_REASON),
    (2**64 - 1, RANGE_REASON),
    ("1970-01-01T00:00:00Z", RANGE_REASON),
    ("1969-12-31T23:59:59Z", RANGE_REASON),
    ("9999-12-31T23:59:59-00:01", RANGE_REASON),
    ("9999-12-31T23:59:60Z", RANGE_REASON),
]


@pytest.mark.parametrize(("written", "meant"), INSTANTS)
def test_instants(written: object, meant: int) -> None:
    """Epoch milliseconds and RFC 3339 mean the same instant everywhere; digits below the millisecond are cut off."""
    assert one(bid() | {"time": written}).context.occurred_at == meant
    event = one(eventbridge(EventType.SCHEDULE_CHANGED, {"auction_id": "a-1", "ends_at": written}))
    assert event.event == Reschedule(EpochMs(meant))


@pytest.mark.parametrize(("written", "reason"), NOT_INSTANTS)
def test_not_instants(written: object, reason: str) -> None:
    """Anything else is refused, in the envelope, in a required and in an optional field, with a reason that helps."""
    assert faults(bid() | {"time": written}) == [(0, "time", reason)]
    assert faults(eventbridge(EventType.SCHEDULE_CHANGED, {"auction_id": "a-1", "ends_at": written})) == [
        (0, "detail.ends_at", reason)
    ]
    assert faults(started(offer_created_at=written)) == [(0, "detail.offer_created_at", reason)]
    assert faults(started(starts_at=written)) == [(0, "detail.starts_at", reason)]


@settings(deadline=None)
@given(
    st.datetimes(
        min_value=datetime(1970, 1, 3),  # noqa: DTZ001 - Hypothesis adds the zone
        max_value=datetime(9999, 12, 29),  # noqa: DTZ001
        timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    )
)
def test_rfc_3339_agrees_with_the_standard_library(at: datetime) -> None:
    """For any date, time and offset the instant is the one that datetime computes, floored to the millisecond."""
    meant = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert one(bid() | {"time": at.isoformat()}).context.occurred_at == meant


@pytest.mark.parametrize(
    ("starts_at", "ends_at"), [(T0, T0), (T0 + 1, T0), (T0_TEXT, T0), (T0_TEXT, "2027-01-15T09:00:00+02:00")]
)
def test_an_inverted_schedule_is_refused(starts_at: object, ends_at: object) -> None:
    """The end must come after the start, however the two are written."""
    assert faults(started(starts_at=starts_at, ends_at=ends_at)) == [
        (0, "detail.ends_at", "ends_at must be after starts_at")
    ]


def test_an_end_in_the_past_is_legal() -> None:
    """An auction that is over on arrival is registered and closed by the engine, so it passes here."""
    assert one(started(starts_at=1, ends_at=2)).event == Register(Registration("a-1", EpochMs(1), EpochMs(2)))


# --- policy -----------------------------------------------------------------------------------------------------------

POLICY_BOUNDS = [
    ("soft_close_window_ms", 0, 86_400_000),
    ("extension_ms", 1, 900_000),
    ("total_cap_ms", 0, 86_400_000),
    ("max_extensions", 0, 86_400),
    ("tick_interval_ms", 100, 15_000),
]


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(("name", "least", "most"), POLICY_BOUNDS)
def test_policy_bounds_are_the_domains(name: str, least: int, most: int) -> None:
    """Both bounds pass here and in the domain; one less or one more is refused by both."""
    for allowed in (least, most):
        event = one(started(policy={name: allowed}))
        assert event.event == Register(
            Registration("a-1", EpochMs(T0), EpochMs(T0 + 1), Policy(**{name: allowed}))  # type: ignore[arg-type]
        )
    for refused, reason in ((least - 1, f"must be at least {least}"), (most + 1, f"must be at most {most}")):
        assert faults(started(policy={name: refused})) == [(0, f"detail.policy.{name}", reason)]
        with pytest.raises(ValueError, match=name):
            Policy(**{name: refused})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("mode", "sideways", "must be 'reset_to' or 'add'"),
        ("mode", "ADD", "must be 'reset_to' or 'add'"),
        ("mode", None, "must be 'reset_to' or 'add'"),
        ("mode", 1, "must be 'reset_to' or 'add'"),
        ("mode", ["add"], "must be 'reset_to' or 'add'"),
        ("extends_on", "never", "must be 'leader_changed' or 'any_accepted'"),
        ("extends_on", {}, "must be 'leader_changed' or 'any_accepted'"),
        ("extension_ms", "30000", "must be an integer"),
        ("extension_ms", 30000.0, "must be an integer"),
        ("extension_ms", True, "must be an integer"),
        ("extension_ms", None, "must be an integer"),
        ("extension_ms", 10**30, "must be an integer"),
        ("extension_ms", 2**64 - 1, "must be at most 900000"),
        ("total_cap_ms", -(2**63), "must be at least 0"),
        ("max_extensions", 1.5, "must be an integer"),
        ("tick_interval_ms", [], "must be an integer"),
    ],
)
def test_bad_policy_values(name: str, value: object, reason: str) -> None:
    """A wrong value names its path and what would be right; null is refused where it would mean a guess."""
    assert faults(started(policy={name: value})) == [(0, f"detail.policy.{name}", reason)]


@pytest.mark.parametrize("policy", [[], "fast", 5, True])
def test_a_policy_is_an_object(policy: object) -> None:
    """Anything else in its place is refused."""
    assert faults(started(policy=policy)) == [(0, "detail.policy", "must be an object")]


# --- bad values -------------------------------------------------------------------------------------------------------

BAD_IDS: list[tuple[object, str]] = [
    ("", ID_REASON),
    (" ", ID_REASON),
    ("a b", ID_REASON),
    ("a\n", ID_REASON),
    ("a\t", ID_REASON),
    ("a\x00", ID_REASON),
    ("\x7f", ID_REASON),
    ("é", ID_REASON),
    ("\U0001f600", ID_REASON),
    ("x" * 129, ID_REASON),
    (5, "must be a string"),
    (5.0, "must be a string"),
    (True, "must be a string"),
    (["x"], "must be a string"),
    ({"id": "x"}, "must be a string"),
]
ID_FIELDS = [
    (EventType.AUCTION_STARTED, "offer_id"),
    (EventType.AUCTION_STARTED, "owner_id"),
    (EventType.AUCTION_STARTED, "maker_id"),
    (EventType.AUCTION_STARTED, "buyer_id"),
    (EventType.BID_ACCEPTED, "bid_id"),
    (EventType.BID_ACCEPTED, "bidder_id"),
    (EventType.OFFER_CANCELLED, "offer_id"),
    *[(event_type, name) for event_type in EventType for name in ("trace_id", "submission_trace_id", "correlation_id")],
]


@pytest.mark.parametrize(("value", "reason"), BAD_IDS)
def test_bad_identifiers(value: object, reason: str) -> None:
    """Identifiers are 1-128 printable ASCII characters without spaces, in every field that holds one."""
    for event_type, name in ID_FIELDS:
        raw = eventbridge(event_type, LEAST[event_type] | {name: value})
        assert faults(raw) == [(0, f"detail.{name}", reason)]
    assert faults(bid() | {"id": value}) == [(0, "id", reason)]
    assert faults(started(maker_delegate_ids=["ok", value])) == [(0, "detail.maker_delegate_ids.1", reason)]


def test_good_identifiers() -> None:
    """Every printable ASCII character but the space may occur, up to 128 of them."""
    longest = "".join(chr(code) for code in range(0x21, 0x7F))[:128]
    for value in ("x", longest, "~" * 128):
        assert one(bid(bid_id=value) | {"id": value}).context.event_id == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", AUCTION_ID_REASON),
        ("a b", AUCTION_ID_REASON),
        ("a/b", AUCTION_ID_REASON),
        ("{1}", AUCTION_ID_REASON),
        ("a\n", AUCTION_ID_REASON),
        ("a\x00", AUCTION_ID_REASON),
        ("ä", AUCTION_ID_REASON),
        ("x" * 129, AUCTION_ID_REASON),
        (5, "must be a string"),
        (False, "must be a string"),
    ],
)
def test_bad_auction_ids(value: object, reason: str) -> None:
    """Auction ids and reply targets become parts of Redis names, so their characters are few."""
    for event_type in EventType:
        raw = eventbridge(event_type, LEAST[event_type] | {"auction_id": value, "reply_to": value})
        assert set(faults(raw)) == {(0, "detail.auction_id", reason), (0, "detail.reply_to", reason)}


def test_good_auction_ids() -> None:
    """All of the promised characters, and the longest one."""
    for value in ("A-z.0_9:x", "x" * 128, "."):
        assert one(bid(auction_id=value, reply_to=value)).auction_id == value


BAD_FIELDS: list[tuple[EventType, str, object, str]] = [
    (EventType.BID_ACCEPTED, "amount_minor", -1, "must be at least 0"),
    (EventType.BID_ACCEPTED, "amount_minor", AMOUNT_MINOR_MAX + 1, f"must be at most {AMOUNT_MINOR_MAX}"),
    (EventType.BID_ACCEPTED, "amount_minor", 2**64 - 1, f"must be at most {AMOUNT_MINOR_MAX}"),
    (EventType.BID_ACCEPTED, "amount_minor", 10**40, "must be an integer"),
    (EventType.BID_ACCEPTED, "amount_minor", 1.0, "must be an integer"),
    (EventType.BID_ACCEPTED, "amount_minor", "1", "must be an integer"),
    (EventType.BID_ACCEPTED, "amount_minor", True, "must be an integer"),
    (EventType.BID_ACCEPTED, "currency", "eur", "must be three letters A-Z (ISO 4217)"),
    (EventType.BID_ACCEPTED, "currency", "EURO", "must be three letters A-Z (ISO 4217)"),
    (EventType.BID_ACCEPTED, "currency", "EUR\n", "must be three letters A-Z (ISO 4217)"),
    (EventType.BID_ACCEPTED, "currency", 978, "must be a string"),
    (EventType.BID_ACCEPTED, "leader_changed", 1, "must be true or false"),
    (EventType.BID_ACCEPTED, "leader_changed", "true", "must be true or false"),
    (EventType.BID_ACCEPTED, "leader_changed", None, "must be true or false"),
    (EventType.BID_ACCEPTED, "origin", "robot", "must be 'manual' or 'proxy'"),
    (EventType.BID_ACCEPTED, "origin", ["manual"], "must be 'manual' or 'proxy'"),
    (EventType.BID_ACCEPTED, "bid_id", None, "must be a string"),
    (EventType.BID_ACCEPTED, "auction_id", None, "must be a string"),
    (EventType.AUCTION_STARTED, "starts_at", None, INSTANT_REASON),
    (EventType.AUCTION_STARTED, "amount_minor", -1, "must be at least 0"),
    (EventType.AUCTION_STARTED, "auto_reject_threshold_minor", -1, "must be at least 0"),
    (EventType.AUCTION_STARTED, "auto_reject_threshold_minor", 0.5, "must be an integer"),
    (EventType.AUCTION_STARTED, "modification_window_minutes", -1, "must be at least 0"),
    (EventType.AUCTION_STARTED, "modification_window_minutes", 525_601, "must be at most 525600"),
    (EventType.AUCTION_STARTED, "maker_delegate_ids", "d-1", "must be an array"),
    (EventType.AUCTION_STARTED, "maker_delegate_ids", {"0": "d-1"}, "must be an array"),
    (EventType.AUCTION_STARTED, "maker_delegate_ids", ["d"] * (DELEGATES_MAX + 1), "must have at most 100 items"),
    (EventType.CANCEL_REQUESTED, "reason", "", "must not be empty"),
    (EventType.CANCEL_REQUESTED, "reason", None, "must be a string"),
    (EventType.CANCEL_REQUESTED, "reason", 5, "must be a string"),
    (EventType.CANCEL_REQUESTED, "reason", "x" * 501, "must have at most 500 characters"),
    *[
        (EventType.CANCEL_REQUESTED, "reason", text, "must not contain control characters other than newline and tab")
        for text in ("\x00", "a\rb", "\x1b[31mred", "\x7f", "\x85")
    ],
    (EventType.PAUSE_REQUESTED, "reason", "", "must not be empty"),
    (EventType.CANCEL_REQUESTED, "actor", "ops", "must be an object"),
    (EventType.CANCEL_REQUESTED, "actor", ["ops", "x"], "must be an object"),
]


@pytest.mark.parametrize(("event_type", "name", "value", "reason"), BAD_FIELDS)
def test_bad_fields(event_type: EventType, name: str, value: object, reason: str) -> None:
    """One wrong field is one error, with its path and what would be right."""
    raw = eventbridge(event_type, LEAST[event_type] | {name: value})
    assert faults(raw) == [(0, f"detail.{name}", reason)]


@pytest.mark.parametrize(
    ("event_type", "name", "value"),
    [
        (EventType.BID_ACCEPTED, "amount_minor", 0),
        (EventType.BID_ACCEPTED, "amount_minor", AMOUNT_MINOR_MAX),
        (EventType.BID_ACCEPTED, "origin", "manual"),
        (EventType.BID_ACCEPTED, "currency", "XXX"),
        (EventType.CANCEL_REQUESTED, "reason", "x" * 500),
        (EventType.CANCEL_REQUESTED, "reason", "\U0001f600" * 500),
        (EventType.CANCEL_REQUESTED, "reason", "two\nlines,\ttabbed"),
    ],
)
def test_values_at_their_bounds(event_type: EventType, name: str, value: object) -> None:
    """The largest, smallest and strangest allowed values are taken over unchanged."""
    assert getattr(one(eventbridge(event_type, LEAST[event_type] | {name: value})).event, name) == value


@pytest.mark.parametrize(
    ("actor", "listed"),
    [
        ({}, [("type", "is required"), ("id", "is required")]),
        ({"type": "ops"}, [("id", "is required")]),
        ({"type": "", "id": ""}, [("type", "must not be empty"), ("id", "must not be empty")]),
        ({"type": "t" * 65, "id": "x"}, [("type", "must have at most 64 characters")]),
        ({"type": "t", "id": "x" * 129}, [("id", "must have at most 128 characters")]),
        ({"type": "t", "id": 7}, [("id", "must be a string")]),
        ({"type": None, "id": "x"}, [("type", "must be a string")]),
        ({"type": "t\n", "id": "\x00"}, [(name, "must not contain control characters") for name in ("type", "id")]),
    ],
)
def test_bad_actors(actor: object, listed: list[tuple[str, str]]) -> None:
    """An actor that is named is named in full: a type and an id, both strings without control characters."""
    raw = eventbridge(EventType.RESUME_REQUESTED, {"auction_id": "a-1", "actor": actor})
    assert faults(raw) == [(0, f"detail.actor.{name}", reason) for name, reason in listed]


# --- bad envelopes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ENVELOPES)
@pytest.mark.parametrize("event_type", ["", "auctions.bid.rejected", "AUCTIONS.BID.ACCEPTED", "\x00", 5, None, []])
def test_unknown_types_are_errors(wrap: Wrap, event_type: Any) -> None:
    """A type outside the table is refused, and the answer lists the known ones."""
    ((index, path, reason),) = faults(wrap(event_type, LEAST[EventType.BID_ACCEPTED]))
    assert (index, path) == (0, "detail-type" if wrap is eventbridge else "type")
    assert all(f"'{known}'" in reason for known in EventType)


@pytest.mark.parametrize("wrap", ENVELOPES)
@pytest.mark.parametrize("detail", [None, [], "{}", 5, True])
def test_a_detail_is_an_object(wrap: Wrap, detail: object) -> None:
    """Anything else in its place is refused, also for an unknown type."""
    path = "detail" if wrap is eventbridge else "data"
    assert faults(wrap(EventType.BID_ACCEPTED, detail)) == [(0, path, "must be an object")]
    assert (0, path, "must be an object") in faults(wrap("unknown", detail))


@pytest.mark.parametrize("raw", [None, 5, 1.5, "event", True, [], [bid()]])
def test_an_event_is_an_object(raw: object) -> None:
    """Anything else in the array is refused, also an array in the array."""
    assert faults(bid(), raw) == [(1, "", "must be an object")]


@pytest.mark.parametrize("body", [b"null", b"5", b'"event"', b"true", b"1e5"])
def test_a_body_that_is_neither_object_nor_array(body: bytes) -> None:
    """A bare JSON value counts as one event that is no object."""
    problem = refusal(body)
    assert problem.type is ProblemType.MALFORMED_EVENTS
    assert problem.extra["errors"] == [{"index": 0, "path": "", "reason": "must be an object"}]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            {},
            (
                "is neither an EventBridge event (missing: id, detail-type, detail) "
                "nor a CloudEvent (missing: specversion, id, type, source, data)"
            ),
        ),
        (
            {"id": "e-1", "source": "s", "auction_id": "a-1"},
            (
                "is neither an EventBridge event (missing: detail-type, detail) "
                "nor a CloudEvent (missing: specversion, type, data)"
            ),
        ),
    ],
)
def test_an_object_that_is_neither_envelope(raw: object, reason: str) -> None:
    """The reason names the fields that either envelope would need."""
    assert faults(raw) == [(0, "", reason)]


@pytest.mark.parametrize(
    ("raw", "missing"),
    [
        ({"detail-type": EventType.PAUSE_REQUESTED}, ["id", "detail"]),
        ({"detail": {}}, ["id", "detail-type"]),
        ({"specversion": "1.0"}, ["id", "type", "source", "data"]),
        ({"type": EventType.PAUSE_REQUESTED, "id": "e-1"}, ["specversion", "source", "data"]),
        ({"data": {}}, ["specversion", "id", "type", "source"]),
    ],
)
def test_half_an_envelope(raw: object, missing: list[str]) -> None:
    """An object that begins as one of the two envelopes is told what that one lacks."""
    assert faults(raw) == [(0, name, "is required") for name in missing]


@pytest.mark.parametrize("version", ["0.3", "1.0.2", "1", 1.0, 1, None, ""])
def test_only_cloudevents_1_0(version: object) -> None:
    """Another `specversion` is another format."""
    raw = cloudevent(EventType.BID_ACCEPTED, LEAST[EventType.BID_ACCEPTED], specversion=version)
    assert faults(raw) == [(0, "specversion", "must be '1.0'")]


def test_binary_cloudevents_are_refused() -> None:
    """`data_base64` is not decoded, and the reason says what to send instead."""
    reason = "is not accepted: send the event as a JSON object in data"
    raw = cloudevent(EventType.BID_ACCEPTED, LEAST[EventType.BID_ACCEPTED], data_base64="e30=")
    assert faults(raw) == [(0, "data_base64", reason)]
    assert set(faults(without(raw, "data"))) == {(0, "data", "is required"), (0, "data_base64", reason)}


def test_everything_that_is_wrong_with_an_event_is_said_at_once() -> None:
    """One answer names the faults of the envelope and of the detail together, with the paths the producer wrote."""
    raw = cloudevent(EventType.BID_ACCEPTED, {"auction_id": "a 1", "amount_minor": 12.5}, time="2027-01-15T08:00:00")
    assert faults(raw) == [
        (0, "time", ZONE_REASON),
        (0, "data.auction_id", AUCTION_ID_REASON),
        (0, "data.bid_id", "is required"),
        (0, "data.amount_minor", "must be an integer"),
    ]


def test_the_example_of_the_module_docstring() -> None:
    """What the module promises in its opening is what it answers."""
    raw = {
        "id": "e2",
        "detail-type": "auctions.bid.accepted",
        "time": "2027-01-15T08:00:00",
        "detail": {"auction_id": "a 1", "bid_id": "b2", "amount_minor": 12.5},
    }
    problem = refusal(body_of([bid(), raw]))
    assert events_module.__doc__ is not None
    for error in problem.extra["errors"]:
        assert json.dumps(error) in events_module.__doc__


# --- bad bodies -------------------------------------------------------------------------------------------------------

BID_TEXT = body_of(bid()).decode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"event",
        b"{",
        b"[{}",
        b"{'id': 1}",
        b"[{},]",
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        BID_TEXT.replace('"b-1"', "NaN").encode(),
        BID_TEXT.replace("b-1", "\\ud800").encode(),
        BID_TEXT.replace("b-1", "\ud800").encode("utf-8", "surrogatepass"),
        BID_TEXT.replace("b-1", "\xe9").encode("latin-1"),
        BID_TEXT.replace("b-1", "\x00").encode(),
        BID_TEXT.replace("b-1", "\n").encode(),
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"detail":' * 50_000 + b"1" + b"}" * 50_000,
        BID_TEXT.replace('"b-1"', "[" * 2_000 + "]" * 2_000).encode(),
    ],
    ids=range(24),
)
def test_what_is_not_json(body: bytes) -> None:
    """Broken text, NaN and infinities, wrong encodings, lone surrogates, raw control characters, absurd nesting."""
    problem = refusal(body)
    assert problem.type is ProblemType.MALFORMED_JSON
    assert problem.detail


@pytest.mark.parametrize("depth", [10, 500, 1_000])
def test_nesting_that_json_allows_is_only_a_wrong_value(depth: int) -> None:
    """Deep values are ignored in unknown fields and refused in known ones; neither recursion nor time runs out."""
    deep = "[" * depth + "]" * depth
    assert parse_body(BID_TEXT.replace('"bid_id"', f'"unknown": {deep}, "bid_id"').encode())
    problem = refusal(BID_TEXT.replace('"b-1"', deep).encode())
    assert problem.extra["errors"] == [{"index": 0, "path": "detail.bid_id", "reason": "must be a string"}]


@pytest.mark.parametrize("depth", [10, 400, 1_000])
@pytest.mark.parametrize("path", ["detail-type", "detail.policy.mode", "detail.policy.extends_on", "detail.starts_at"])
def test_nesting_in_a_value_that_is_one_of_a_few_is_only_a_wrong_value(path: str, depth: int) -> None:
    """Also where the message about it would name the value level by level."""
    raw = copy.deepcopy(eventbridge(EventType.AUCTION_STARTED, FULL[EventType.AUCTION_STARTED]))
    *parents, name = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[name] = "HERE"
    problem = refusal(body_of(raw).replace(b'"HERE"', b"[" * depth + b"]" * depth))
    assert problem.type is ProblemType.MALFORMED_EVENTS
    assert problem.extra["errors"][0]["index"] == 0


def test_an_empty_batch() -> None:
    """An array without events is a mistake of the sender, not a success."""
    assert refusal(b"[]").type is ProblemType.EMPTY_BATCH


def test_a_batch_of_501() -> None:
    """One event too many refuses them all, before any is looked at."""
    problem = refusal(body_of([{}] * 501))
    assert problem.type is ProblemType.BATCH_TOO_LARGE
    assert problem.extra == {"events_max": 500}


@pytest.mark.parametrize("size", [events_module.BODY_BYTES_MAX + 1, 10 * 1_048_576])
def test_a_body_that_is_too_large(size: int) -> None:
    """More than 1 MiB is refused by its length alone, valid or not."""
    for body in (BID_TEXT.encode().ljust(size), b"[" * size):
        assert refusal(body).type is ProblemType.PAYLOAD_TOO_LARGE


def test_a_body_of_exactly_1_mib() -> None:
    """The bound itself is allowed."""
    assert len(parse_body(BID_TEXT.encode().ljust(1_048_576))) == 1


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_one_bad_event_refuses_the_batch() -> None:
    """Nothing of a batch is accepted if any of it is malformed; the problem counts and names the bad ones."""
    problem = refusal(body_of([bid(), bid(bid_id="b 2"), bid(), bid(bid_id=None, amount_minor="1")]))
    assert problem.type is ProblemType.MALFORMED_EVENTS
    assert problem.detail == "2 of 4 events are malformed; none was accepted"
    assert problem.extra == {
        "errors": [
            {"index": 1, "path": "detail.bid_id", "reason": ID_REASON},
            {"index": 3, "path": "detail.bid_id", "reason": "must be a string"},
            {"index": 3, "path": "detail.amount_minor", "reason": "must be an integer"},
        ],
        "errors_total": 3,
    }


def test_no_trace_id_is_made_for_a_malformed_event() -> None:
    """Only an event that can be read draws a new trace id."""
    drawn = count()
    with pytest.raises(Problem):
        parse_events(
            body_of([bid(bid_id=1)] * 3),
            correlation_id="req-1",
            traceparent=None,
            new_trace_id=lambda: str(next(drawn)),
        )
    assert next(drawn) == 0


def test_every_bad_event_is_named_even_where_the_list_is_cut() -> None:
    """Five hundred bad events with two faults each: every index is listed once, and the rest is counted."""
    problem = refusal(body_of([bid(bid_id=1, currency=1)] * EVENTS_MAX))
    assert [error["index"] for error in problem.extra["errors"]] == list(range(EVENTS_MAX))
    assert problem.extra["errors_total"] == 2 * EVENTS_MAX


def test_further_reasons_fill_the_list_up_to_its_bound() -> None:
    """Sixty bad events with two faults each: forty keep both, all keep one, a hundred are listed."""
    problem = refusal(body_of([bid(bid_id=1, currency=1)] * 60))
    listed = [error["index"] for error in problem.extra["errors"]]
    assert len(listed) == ERRORS_LISTED_MAX == 100
    assert set(listed) == set(range(60))
    assert listed == sorted(listed)
    assert problem.extra["errors_total"] == 120


def test_a_huge_list_of_wrong_items_is_one_reason() -> None:
    """A hundred thousand wrong delegates do not become a hundred thousand errors."""
    problem = refusal(body_of(started(maker_delegate_ids=[1] * 100_000)))
    assert problem.extra["errors_total"] == 1


def test_the_largest_registration_fits_the_intake() -> None:
    """Every text at its longest still makes a body that the engine reads back."""
    longest = "x" * 128
    detail = {
        "auction_id": longest,
        "starts_at": EPOCH_MS_MAX - 1,
        "ends_at": EPOCH_MS_MAX,
        "maker_delegate_ids": [longest] * DELEGATES_MAX,
        "reply_to": longest,
        "trace_id": longest,
        "correlation_id": longest,
        **dict.fromkeys(("offer_id", "owner_id", "maker_id", "buyer_id"), longest),
    }
    event = one(eventbridge(EventType.AUCTION_STARTED, detail, id=longest))
    assert decode(longest, encode(event)) == event


# --- whatever arrives -------------------------------------------------------------------------------------------------

FIELD_NAMES = sorted(
    {"specversion", "id", "type", "source", "time", "data", "data_base64", "detail", "detail-type", "traceparent"}
    | {"trace_id", "submission_trace_id", "correlation_id", "reply_to", "auction_id"}
    | {name for detail in FULL.values() for name in detail}
)


def junk() -> SearchStrategy[Any]:
    """Any JSON value, also unwritable ones (lone surrogates, integers beyond 64 bits), with a liking for our names."""
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, T0, 2**53, 2**63, 2**64, 10**400, 1.0, -0.0, 1e308]),
        st.floats(),
        st.text(st.characters(), max_size=20),
        st.sampled_from(["", "\x00", "\ud800", "x" * 600, T0_TEXT, TRACEPARENT, "1.0", *EventType]),
    )
    names = st.one_of(st.sampled_from(FIELD_NAMES), st.text(max_size=5))
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=6)),
        max_leaves=12,
    )


def check_problem(problem: Problem) -> None:
    """It is the client's fault, can be written as JSON, and every error in it has a place and a reason."""
    assert 400 <= problem.type.status < 500
    assert json.loads(bytes(problem_response(problem, "req-1").body))["detail"]
    for error in problem.extra.get("errors", []):
        assert error.keys() == {"index", "path", "reason"}
        assert error["reason"]


def survives(body: bytes) -> None:
    """Either a well-formed problem, or events that the engine reads back unchanged."""
    try:
        events = parse_body(body)
    except Problem as problem:
        check_problem(problem)
        return
    for event in events:
        written = encode(event)
        assert len(written) <= BODY_BYTES_MAX
        assert decode(event.context.event_id, written) == event


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(body: bytes) -> None:
    """No bytes whatever raise anything but a problem."""
    survives(body)


@settings(deadline=None)
@given(junk())
def test_arbitrary_json(raw: object) -> None:
    """No JSON whatever raises anything but a problem."""
    survives(body_of(raw))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(EventType),
    st.sampled_from(WRAPS),
    st.dictionaries(st.sampled_from(FIELD_NAMES), junk(), max_size=6),
    st.dictionaries(st.sampled_from(FIELD_NAMES), junk(), max_size=3),
)
def test_arbitrary_details(event_type: EventType, wrap: Wrap, detail: dict[str, Any], around: dict[str, Any]) -> None:
    """A known type around arbitrary fields, and arbitrary fields around it, either parses or is a problem."""
    survives(body_of(wrap(event_type, LEAST[event_type] | detail) | around))


def paths(raw: object, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `raw`."""
    items: list[tuple[Any, Any]] = []
    if isinstance(raw, dict):
        items = list(raw.items())
    elif isinstance(raw, list):
        items = list(enumerate(raw))
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(EventType), st.sampled_from(WRAPS))
def test_a_valid_event_with_one_field_replaced(data: st.DataObject, event_type: EventType, wrap: Wrap) -> None:
    """Junk in any single place of a valid event either parses or is a problem that names a path."""
    raw: Any = copy.deepcopy(wrap(event_type, FULL[event_type]))
    *parents, last = data.draw(st.sampled_from(list(paths(raw))))
    place = raw
    for step in parents:
        place = place[step]
    place[last] = data.draw(junk())
    survives(body_of(raw))


@st.composite
def valid_details(draw: DrawFn, event_type: EventType) -> dict[str, Any]:
    """Any valid detail of a type: the required fields, and any of the optional ones."""
    ids = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=128)
    auction_ids = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
    amounts = st.integers(0, AMOUNT_MINOR_MAX)
    texts = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t"), min_size=1, max_size=500)
    names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=64)
    policies = {
        **{name: st.integers(least, most) for name, least, most in POLICY_BOUNDS},
        "mode": st.sampled_from([mode.value for mode in ExtensionMode]),
        "extends_on": st.sampled_from([which.value for which in ExtendsOn]),
    }
    fields: dict[str, SearchStrategy[Any]] = {
        **dict.fromkeys(("bid_id", "bidder_id", "offer_id", "owner_id", "maker_id", "buyer_id"), ids),
        **dict.fromkeys(("trace_id", "submission_trace_id", "correlation_id"), ids),
        **dict.fromkeys(("auction_id", "reply_to"), auction_ids),
        **dict.fromkeys(("amount_minor", "auto_reject_threshold_minor"), amounts),
        "currency": st.from_regex("[A-Z]{3}", fullmatch=True),
        "leader_changed": st.booleans(),
        "origin": st.sampled_from(["manual", "proxy"]),
        "reason": texts,
        "actor": st.fixed_dictionaries({"type": names, "id": names}),
        "starts_at": st.integers(1, T0),
        "ends_at": st.integers(T0 + 1, EPOCH_MS_MAX),
        "offer_created_at": st.integers(1, EPOCH_MS_MAX),
        "modification_window_minutes": st.integers(0, 525_600),
        "maker_delegate_ids": st.lists(ids, max_size=3),
        "policy": st.fixed_dictionaries({}, optional=policies),
    }
    everywhere = ("trace_id", "submission_trace_id", "correlation_id", "reply_to")
    required = {name: fields[name] for name in LEAST[event_type]}
    optional = {name: fields[name] for name in (*FULL[event_type], *everywhere) if name not in required}
    detail: dict[str, Any] = draw(st.fixed_dictionaries(required, optional=optional))
    return detail


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(EventType), st.sampled_from(WRAPS))
def test_any_valid_event_reaches_the_engine_unchanged(data: st.DataObject, event_type: EventType, wrap: Wrap) -> None:
    """Whatever is accepted here survives being written to the intake and read back."""
    detail = data.draw(valid_details(event_type))
    event = one(wrap(event_type, detail))
    assert decode("e-1", encode(event)) == event
    assert event.context.correlation_id == detail.get("correlation_id", "req-1")
    for name, value in detail.items():
        if hasattr(event.event, name):
            assert getattr(event.event, name) == value


# --- schemas ----------------------------------------------------------------------------------------------------------


def references(schema: object) -> Iterator[str]:
    """Every `$ref` inside a schema."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def test_schemas_refer_only_to_each_other() -> None:
    """Every reference resolves, and everything is reachable from the request body."""
    schemas = event_schemas()
    seen: set[str] = set()
    ahead = ["EventsRequest"]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += [reference.removeprefix("#/components/schemas/") for reference in references(schemas[name])]
    assert seen == schemas.keys()


@pytest.mark.parametrize(
    ("prefix", "named_by", "held_in"), [("EventBridge", "detail-type", "detail"), ("CloudEvent", "type", "data")]
)
def test_schemas_name_each_type_in_each_envelope(prefix: str, named_by: str, held_in: str) -> None:
    """For each envelope and type there is one schema, which fixes the type and requires the right fields."""
    schemas = event_schemas()
    by_type = {
        schema["properties"][named_by]["const"]: schema for name, schema in schemas.items() if name.startswith(prefix)
    }
    assert by_type.keys() == set(EventType)
    for event_type, schema in by_type.items():
        detail = schemas[schema["properties"][held_in]["$ref"].removeprefix("#/components/schemas/")]
        assert {"id", named_by, held_in} <= set(schema["required"])
        assert FULL[event_type].keys() <= detail["properties"].keys()
        if event_type != EventType.OFFER_CANCELLED:
            assert set(detail["required"]) == LEAST[event_type].keys()


def test_schemas_say_either_id_for_an_offer_cancellation() -> None:
    """The one alternative of the table is written down: an auction id or an offer id."""
    schema = event_schemas()["OfferCancelled"]
    assert schema["required"] == ["reason"]
    assert [choice["required"] for choice in schema["anyOf"]] == [["auction_id"], ["offer_id"]]


def test_schemas_bound_the_batch() -> None:
    """The request is one event, or one to five hundred of them."""
    one_event, batch = event_schemas()["EventsRequest"]["oneOf"]
    assert one_event == batch["items"] == {"$ref": "#/components/schemas/Event"}
    assert (batch["minItems"], batch["maxItems"]) == (1, 500)


def test_schemas_are_fresh_each_time_and_plain_json() -> None:
    """A caller may change what it got, and can write it out."""
    event_schemas().clear()
    assert json.loads(json.dumps(event_schemas())) == event_schemas()
