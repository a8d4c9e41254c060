"""From the bytes of a `POST /events` body to intake events: all of them, or a problem that says what is wrong with each.

The idea: an event is its envelope and its detail *together*. For every pair of envelope and event type there is one
model, so a single validation finds everything that is wrong, in both halves, with the path the producer wrote.

Worked example. A producer sends two events in the EventBridge envelope; the second one reads

    {"id": "e2", "detail-type": "auctions.bid.accepted", "time": "2027-01-15T08:00:00",
     "detail": {"auction_id": "a 1", "bid_id": "b2", "amount_minor": 12.5}}

and the whole request is refused with

    {"index": 1, "path": "time", "reason": "has no time zone: end it with Z or an offset such as +02:00"}
    {"index": 1, "path": "detail.auction_id", "reason": "must be 1-128 characters of A-Z a-z 0-9 . _ : -"}
    {"index": 1, "path": "detail.amount_minor", "reason": "must be an integer"}

Three rules hold for every field. Nothing is converted: `"5"`, `5.0` and `true` are not 5. An unknown field is ignored.
`null` means "none": it stands for leaving an optional field out, but is no value where leaving it out means something
else (`leader_changed`, the numbers and modes of a policy), because guessing there would freeze the guess for good.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.contract.intake import (
    AMOUNT_MINOR_MAX,
    ANONYMOUS,
    AUCTION_ID,
    DELEGATES_MAX,
    TEXT_CHARS_MAX,
    Actor,
    Context,
    EventType,
    IntakeEvent,
)
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume
from engine.domain.instants import EPOCH_MS_MAX, MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.policy import (
    EXTENSION_MS_MAX,
    MAX_EXTENSIONS_MAX,
    SOFT_CLOSE_WINDOW_MS_MAX,
    TICK_INTERVAL_MS_MAX,
    TICK_INTERVAL_MS_MIN,
    TOTAL_CAP_MS_MAX,
    ExtendsOn,
    ExtensionMode,
    Policy,
)
from engine.domain.withdrawal import WINDOW_MINUTES_MAX
from gateway.problems import Problem, ProblemType

BODY_BYTES_MAX: Final = 1_048_576
EVENTS_MAX: Final = 500
TOO_DEEP: Final = "is nested too deeply"
# Past this many, a further reason for an event that is already listed is only counted. Every bad event keeps its first
# one, so an answer lists at most EVENTS_MAX of them.
ERRORS_LISTED_MAX: Final = 100
ACTOR_TYPE_CHARS_MAX: Final = 64
ACTOR_ID_CHARS_MAX: Final = 128
SOURCE_CHARS_MAX: Final = 1024

_AUCTION_ID_PATTERN: Final = f"^{AUCTION_ID.pattern}$"
_ID_PATTERN: Final = "^[!-~]{1,128}$"
_CURRENCY_PATTERN: Final = "^[A-Z]{3}$"
TEXT_PATTERN: Final = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
SAID_PATTERN: Final = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*[^\x00-\x1f\x7f-\x9f\s][^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
NAME_PATTERN: Final = r"^[^\x00-\x1f\x7f-\x9f]*$"

# Of the regular expressions above, in words.
_PATTERN_REASONS: Final = {
    _AUCTION_ID_PATTERN: "must be 1-128 characters of A-Z a-z 0-9 . _ : -",
    _ID_PATTERN: "must be 1-128 printable ASCII characters without spaces",
    _CURRENCY_PATTERN: "must be three letters A-Z (ISO 4217)",
    TEXT_PATTERN: "must not contain control characters other than newline and tab",
    SAID_PATTERN: "must not be blank, nor contain control characters other than newline and tab",
    NAME_PATTERN: "must not contain control characters",
}
_REASONS: Final = {
    "bool_type": "must be true or false",
    "enum": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be an integer",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be an array",
    "literal_error": "must be {expected}",
    "missing": "is required",
    "model_type": "must be an object",
    "none_required": "is not accepted: send the event as a JSON object in data",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} items",
}

# RFC 3339, section 5.6. The zone is optional here only so that its absence gets a reason of its own.
_RFC_3339: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9]|60)(?:\.([0-9]+))?"
    r"(?:([Zz])|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))?"
)
_UNIX_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()
_DAY_MS: Final = 86_400 * SECOND_MS
_LEAP_SECOND: Final = "60"

# W3C Trace Context, section 3.2.2: version 00 has exactly 55 characters, a later one may add more, ff is never valid.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)(?!00.{53}.)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


def _read_instant(value: object) -> EpochMs:
    """Epoch milliseconds, or RFC 3339 with a zone; digits below the millisecond are cut off."""
    if type(value) is int:
        at = value
    elif isinstance(value, str):
        at = _read_rfc_3339(value)
    else:
        raise PydanticCustomError("instant", "must be whole epoch milliseconds or an RFC 3339 date-time with a zone")
    if not 1 <= at <= EPOCH_MS_MAX:
        raise PydanticCustomError("instant", f"must be between 1 and {EPOCH_MS_MAX} in epoch milliseconds")
    return EpochMs(at)


def _read_rfc_3339(text: str) -> int:
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise PydanticCustomError("instant", "must be whole epoch milliseconds or an RFC 3339 date-time with a zone")
    year, month, day, hour, minute, second, fraction, utc, sign, zone_hours, zone_minutes = match.groups()
    if utc is None and sign is None:
        raise PydanticCustomError("instant", "has no time zone: end it with Z or an offset such as +02:00")
    try:
        days = date(int(year), int(month), int(day)).toordinal() - _UNIX_EPOCH_ORDINAL
    except ValueError:
        raise PydanticCustomError("instant", "is a day that no calendar has") from None
    at = days * _DAY_MS + (int(hour) * 60 + int(minute)) * MINUTE_MS + int(second) * SECOND_MS
    if sign is not None:
        offset_ms = (int(zone_hours) * 60 + int(zone_minutes)) * MINUTE_MS
        at += -offset_ms if sign == "+" else offset_ms
    # Unix time has no leap seconds: 23:59:60 UTC is the same instant as the midnight that follows it.
    if second == _LEAP_SECOND and at % _DAY_MS != 0:
        raise PydanticCustomError("instant", "is a leap second at a time of day that has none")
    return at + int((fraction or "0")[:3].ljust(3, "0"))


Instant = Annotated[
    EpochMs,
    PlainValidator(_read_instant),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": EPOCH_MS_MAX},
                {"type": "string", "format": "date-time"},
            ],
            "description": "Epoch milliseconds, or RFC 3339 with a zone.",
        }
    ),
]
AuctionId = Annotated[str, Field(pattern=_AUCTION_ID_PATTERN)]
Identifier = Annotated[str, Field(pattern=_ID_PATTERN)]
Currency = Annotated[str, Field(pattern=_CURRENCY_PATTERN)]
Amount = Annotated[int, Field(ge=0, le=AMOUNT_MINOR_MAX)]
Reason = Annotated[str, Field(min_length=1, max_length=TEXT_CHARS_MAX, pattern=TEXT_PATTERN)]
SaidReason = Annotated[str, Field(min_length=1, max_length=TEXT_CHARS_MAX, pattern=SAID_PATTERN)]
"""One that is asked of whoever calls, and told to others."""


class _Input(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class ActorInput(_Input):
    """Who asked."""

    type: Annotated[str, Field(min_length=1, max_length=ACTOR_TYPE_CHARS_MAX, pattern=NAME_PATTERN)]
    id: Annotated[str, Field(min_length=1, max_length=ACTOR_ID_CHARS_MAX, pattern=NAME_PATTERN)]


_DEFAULTS: Final = Policy()


class PolicyInput(_Input):
    """The closing rules to freeze; what is left out gets the domain's default."""

    soft_close_window_ms: Annotated[int, Field(ge=0, le=SOFT_CLOSE_WINDOW_MS_MAX)] = _DEFAULTS.soft_close_window_ms
    extension_ms: Annotated[int, Field(ge=1, le=EXTENSION_MS_MAX)] = _DEFAULTS.extension_ms
    # Not strict: an enumeration's strict form is its member, which JSON cannot write.
    mode: Annotated[ExtensionMode, Field(strict=False)] = _DEFAULTS.mode
    total_cap_ms: Annotated[int, Field(ge=0, le=TOTAL_CAP_MS_MAX)] = _DEFAULTS.total_cap_ms
    max_extensions: Annotated[int, Field(ge=0, le=MAX_EXTENSIONS_MAX)] | None = _DEFAULTS.max_extensions
    extends_on: Annotated[ExtendsOn, Field(strict=False)] = _DEFAULTS.extends_on
    tick_interval_ms: Annotated[int, Field(ge=TICK_INTERVAL_MS_MIN, le=TICK_INTERVAL_MS_MAX)] = (
        _DEFAULTS.tick_interval_ms
    )

    def frozen(self) -> Policy:
        """The same rules as a value of the domain."""
        return Policy(**dict(self))


class Detail(_Input, ABC):
    """What every event may carry."""

    trace_id: Identifier | None = None
    submission_trace_id: Identifier | None = None
    correlation_id: Identifier | None = None
    reply_to: AuctionId | None = None
    # Never an error: whoever receives a `traceparent` it cannot read goes on without it (W3C Trace Context, 3.2.2.3).
    traceparent: Any = None

    @abstractmethod
    def subject(self) -> tuple[str | None, str | None]:
        """What the event is about: its auction id, or else its offer id."""

    @abstractmethod
    def event(self) -> InputEvent:
        """The event as a value of the domain."""

    def asked_by(self) -> Actor:
        """Who asked; anonymous where the type has no actor or the producer named none."""
        return ANONYMOUS


class AuctionDetail(Detail):
    """The detail of an event that names its auction."""

    auction_id: AuctionId

    def subject(self) -> tuple[str | None, str | None]:
        """The auction."""
        return self.auction_id, None


class ActorDetail(Detail):
    """The detail of an event that may name who asked."""

    actor: ActorInput | None = None

    def asked_by(self) -> Actor:
        """The named actor, or the anonymous one."""
        return ANONYMOUS if self.actor is None else Actor(self.actor.type, self.actor.id)


class AuctionStarted(AuctionDetail):
    """`offers.auction.started`: register an auction. An end that is already past is legal; it closes at once."""

    starts_at: Instant
    ends_at: Instant
    policy: PolicyInput | None = None
    offer_id: Identifier | None = None
    owner_id: Identifier | None = None
    maker_id: Identifier | None = None
    buyer_id: Identifier | None = None
    # `fail_fast`: a list of a hundred thousand wrong items is one reason, not a hundred thousand.
    maker_delegate_ids: Annotated[list[Identifier], Field(max_length=DELEGATES_MAX, fail_fast=True)] | None = None
    offer_created_at: Instant | None = None
    modification_window_minutes: Annotated[int, Field(ge=0, le=WINDOW_MINUTES_MAX)] | None = None
    amount_minor: Amount | None = None
    currency: Currency | None = None
    auto_reject_threshold_minor: Amount | None = None

    @field_validator("ends_at")
    @classmethod
    def _ends_after_it_starts(cls, ends_at: EpochMs, info: ValidationInfo) -> EpochMs:
        starts_at = info.data.get("starts_at")
        if starts_at is not None and ends_at <= starts_at:
            raise PydanticCustomError("order", "ends_at must be after starts_at")
        return ends_at

    def event(self) -> Register:
        """The registration."""
        policy = _DEFAULTS if self.policy is None else self.policy.frozen()
        return Register(Registration(self.auction_id, self.starts_at, self.ends_at, policy, self._offer()))

    def _offer(self) -> Offer:
        return Offer(
            offer_id=self.offer_id,
            owner_id=self.owner_id,
            maker_id=self.maker_id,
            buyer_id=self.buyer_id,
            maker_delegate_ids=tuple(self.maker_delegate_ids or ()),
            offer_created_at=self.offer_created_at,
            modification_window_minutes=self.modification_window_minutes,
            amount_minor=self.amount_minor,
            currency=self.currency,
            auto_reject_threshold_minor=self.auto_reject_threshold_minor,
        )


class BidAccepted(AuctionDetail):
    """`auctions.bid.accepted`: a bid that was accepted upstream."""

    bid_id: Identifier
    amount_minor: Amount | None = None
    currency: Currency | None = None
    bidder_id: Identifier | None = None
    leader_changed: bool = True
    origin: Literal["manual", "proxy"] | None = None

    def event(self) -> Bid:
        """The bid."""
        return Bid(self.bid_id, self.amount_minor, self.currency, self.bidder_id, self.leader_changed, self.origin)


def _one_given(name: str) -> JsonDict:
    return {"required": [name], "properties": {name: {"type": "string"}}}


class OfferCancelled(ActorDetail):
    """`offers.cancellation.completed`: about an auction, or about the auction of an offer; the auction id goes first."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_one_given("auction_id"), _one_given("offer_id")]})

    auction_id: AuctionId | None = None
    offer_id: Identifier | None = None
    reason: Reason

    @model_validator(mode="after")
    def _is_about_something(self) -> Self:
        if self.auction_id is None and self.offer_id is None:
            raise PydanticCustomError("subject", "auction_id or offer_id is required")
        return self

    def subject(self) -> tuple[str | None, str | None]:
        """The auction, or else the offer."""
        return (None, self.offer_id) if self.auction_id is None else (self.auction_id, None)

    def event(self) -> Cancel:
        """The cancellation."""
        return Cancel(self.reason)


class CancelRequested(AuctionDetail, ActorDetail):
    """`auctions.cancel.requested`: cancel an auction."""

    reason: Reason

    def event(self) -> Cancel:
        """The cancellation."""
        return Cancel(self.reason)


class PauseRequested(AuctionDetail, ActorDetail):
    """`auctions.pause.requested`: freeze the remaining time."""

    reason: Reason | None = None

    def event(self) -> Pause:
        """The pause."""
        return Pause(self.reason)


class ResumeRequested(AuctionDetail, ActorDetail):
    """`auctions.resume.requested`: go on with the remaining time that was frozen."""

    reason: Reason | None = None

    def event(self) -> Resume:
        """The resumption."""
        return Resume(self.reason)


class ScheduleChanged(AuctionDetail, ActorDetail):
    """`auctions.schedule.changed`: set another end. Whether it may stand is the engine's to say."""

    ends_at: Instant
    reason: Reason | None = None

    def event(self) -> Reschedule:
        """The new end."""
        return Reschedule(self.ends_at, self.reason)


_DETAILS: Final[dict[str, type[Detail]]] = {
    EventType.AUCTION_STARTED: AuctionStarted,
    EventType.BID_ACCEPTED: BidAccepted,
    EventType.OFFER_CANCELLED: OfferCancelled,
    EventType.CANCEL_REQUESTED: CancelRequested,
    EventType.PAUSE_REQUESTED: PauseRequested,
    EventType.RESUME_REQUESTED: ResumeRequested,
    EventType.SCHEDULE_CHANGED: ScheduleChanged,
}

D = TypeVar("D", bound=BaseModel)


class EventBridgeEvent(_Input, Generic[D]):
    """An event in the envelope of Amazon EventBridge; its other fields (`account`, `region`, …) are ignored."""

    id: Identifier
    event_type: Annotated[EventType, Field(strict=False, alias="detail-type")]
    source: str | None = None
    time: Instant | None = None
    traceparent: Any = None
    detail: D


class CloudEvent(_Input, Generic[D]):
    """An event in the JSON format of CloudEvents 1.0; extension attributes other than `traceparent` are ignored."""

    specversion: Literal["1.0"]
    id: Identifier
    event_type: Annotated[EventType, Field(strict=False, alias="type")]
    source: Annotated[str, Field(min_length=1, max_length=SOURCE_CHARS_MAX)]
    time: Instant | None = None
    traceparent: Any = None
    detail: D = Field(alias="data")
    data_base64: None = None


class _Unread(_Input):
    """The detail of an event of unknown type: an object, and nothing more can be said about it."""


Envelope = EventBridgeEvent[Any] | CloudEvent[Any]


@dataclass(frozen=True, slots=True)
class _EnvelopeKind:
    type_name: str
    """The attribute that names the event's type."""
    by_type: Mapping[str, type[Envelope]]
    of_unknown_type: type[Envelope]

    def model(self, raw: Mapping[str, Any]) -> type[Envelope]:
        event_type = raw.get(self.type_name)
        known = self.by_type.get(event_type) if isinstance(event_type, str) else None
        return known or self.of_unknown_type


_EVENTBRIDGE: Final = _EnvelopeKind(
    "detail-type",
    {event_type: EventBridgeEvent[detail] for event_type, detail in _DETAILS.items()},  # type: ignore[valid-type]
    EventBridgeEvent[_Unread],
)
_CLOUDEVENTS: Final = _EnvelopeKind(
    "type",
    {event_type: CloudEvent[detail] for event_type, detail in _DETAILS.items()},  # type: ignore[valid-type]
    CloudEvent[_Unread],
)


def parse_events(
    body: bytes,
    *,
    correlation_id: str,
    traceparent: str | None,
    new_trace_id: Callable[[], str],
    submitted_by: str | None = None,
) -> list[IntakeEvent]:
    """Read the body of a `POST /events`: one event or an array of them, in either envelope, also mixed.

    Args:
        body: at most `BODY_BYTES_MAX` bytes of JSON.
        correlation_id: of the request, for events that bring none.
        traceparent: the request's header, for events that bring no trace.
        new_trace_id: makes a trace id where there is none at all.
        submitted_by: the subject of the request's token.

    Returns:
        The events, 1 to `EVENTS_MAX`, in their order.

    Raises:
        Problem: `PAYLOAD_TOO_LARGE`, `MALFORMED_JSON`, `EMPTY_BATCH`, `BATCH_TOO_LARGE`, or `MALFORMED_EVENTS` with
            `errors: [{index, path, reason}]`: every bad event with its first reason, and further reasons up to
            `ERRORS_LISTED_MAX` in all; `errors_total` says how many there are.
    """
    batch = _read_batch(body)
    request = _Request(correlation_id, trace_id_of(traceparent), new_trace_id, submitted_by)
    events: list[IntakeEvent] = []
    refused: list[tuple[int, list[_Fault]]] = []
    for index, raw in enumerate(batch):
        try:
            events.append(request.intake_event(_read_event(raw)))
        except _MalformedEventError as error:
            refused.append((index, error.faults))
        except RecursionError:  # of a value that is named in the message, level by level
            refused.append((index, [_Fault("", TOO_DEEP)]))
        except ValidationError as error:
            refused.append((index, [_fault(wrong) for wrong in error.errors(include_url=False, include_input=False)]))
    if refused:
        raise _malformed(refused, len(batch))
    return events


def _read_batch(body: bytes) -> list[Any]:
    if len(body) > BODY_BYTES_MAX:
        raise Problem(
            ProblemType.PAYLOAD_TOO_LARGE,
            f"a body has at most {BODY_BYTES_MAX} bytes",
            extra={"body_bytes_max": BODY_BYTES_MAX},
        )
    try:
        # orjson refuses NaN, infinities, invalid UTF-8, lone surrogates, and more than 1,024 levels of nesting.
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(ProblemType.MALFORMED_JSON, str(error)) from None
    batch = raw if isinstance(raw, list) else [raw]
    if not batch:
        raise Problem(ProblemType.EMPTY_BATCH, "the array holds no event")
    if len(batch) > EVENTS_MAX:
        raise Problem(
            ProblemType.BATCH_TOO_LARGE,
            f"a request has at most {EVENTS_MAX} events, not {len(batch)}",
            extra={"events_max": EVENTS_MAX},
        )
    return batch


@dataclass(frozen=True, slots=True)
class _Fault:
    """One thing that is wrong with an event. An empty path is the event as a whole."""

    path: str
    reason: str


class _MalformedEventError(Exception):
    def __init__(self, *faults: _Fault) -> None:
        super().__init__(faults)
        self.faults = list(faults)


def _read_event(raw: object) -> Envelope:
    if not isinstance(raw, dict):
        raise _MalformedEventError(_Fault("", "must be an object"))
    return _envelope_kind(raw).model(raw).model_validate(raw)


def _envelope_kind(raw: Mapping[str, Any]) -> _EnvelopeKind:
    """Which envelope an object means to be, going by the attributes that only one of the two has."""
    if "specversion" in raw:
        return _CLOUDEVENTS
    if "detail-type" in raw or "detail" in raw:
        return _EVENTBRIDGE
    if "type" in raw or "data" in raw:
        return _CLOUDEVENTS
    raise _MalformedEventError(_Fault("", _neither(raw)))


def _neither(raw: Mapping[str, Any]) -> str:
    eventbridge = ", ".join(name for name in ("id", "detail-type", "detail") if name not in raw)
    cloudevents = ", ".join(name for name in ("specversion", "id", "type", "source", "data") if name not in raw)
    return f"is neither an EventBridge event (missing: {eventbridge}) nor a CloudEvent (missing: {cloudevents})"


@dataclass(frozen=True, slots=True)
class _Request:
    """What the request gives to events that do not bring their own."""

    correlation_id: str
    trace_id: str | None
    new_trace_id: Callable[[], str]
    submitted_by: str | None

    def intake_event(self, envelope: Envelope) -> IntakeEvent:
        detail: Detail = envelope.detail
        context = Context(
            event_id=envelope.id,
            event_type=envelope.event_type.value,
            trace_id=self._trace_id(envelope, detail),
            correlation_id=detail.correlation_id or self.correlation_id,
            actor=detail.asked_by(),
            reply_to=detail.reply_to,
            occurred_at=envelope.time,
            submitted_by=self.submitted_by,
        )
        auction_id, offer_id = detail.subject()
        return IntakeEvent(context, detail.event(), auction_id, offer_id)

    def _trace_id(self, envelope: Envelope, detail: Detail) -> str:
        return (
            detail.trace_id
            or detail.submission_trace_id
            or trace_id_of(envelope.traceparent)
            or trace_id_of(detail.traceparent)
            or self.trace_id
            or self.new_trace_id()
        )


def trace_id_of(traceparent: object) -> str | None:
    """The trace id in a W3C `traceparent`, or None where it is absent or not valid."""
    match = _TRACEPARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
    return None if match is None else match[1]


def _fault(error: ErrorDetails) -> _Fault:
    return _Fault(".".join(str(step) for step in error["loc"]), reason_of(error))


def reason_of(error: ErrorDetails) -> str:
    """What is wrong with a value, in the words of this catalogue."""
    context = error.get("ctx", {})
    if error["type"] == "string_pattern_mismatch":
        return _PATTERN_REASONS[context["pattern"]]
    template = _REASONS.get(error["type"])
    return error["msg"] if template is None else template.format_map(context)


def _malformed(refused: list[tuple[int, list[_Fault]]], events: int) -> Problem:
    """Every bad event with its first reason, and further ones as long as no more than `ERRORS_LISTED_MAX` are listed."""
    listed: list[dict[str, Any]] = []
    further_max = max(0, ERRORS_LISTED_MAX - len(refused))
    for index, (first, *further) in refused:
        shown = further[:further_max]
        further_max -= len(shown)
        listed += [{"index": index, "path": fault.path, "reason": fault.reason} for fault in (first, *shown)]
    total = sum(len(faults) for _, faults in refused)
    return Problem(
        ProblemType.MALFORMED_EVENTS,
        f"{len(refused)} of {events} events are malformed; none was accepted",
        extra={"errors": listed, "errors_total": total},
    )


_REF_TEMPLATE: Final = "#/components/schemas/{model}"


def event_schemas() -> dict[str, Any]:
    """JSON schemas by name, for the `components.schemas` of an OpenAPI 3.1 document.

    `EventsRequest` is the whole body and `Event` one event; the others are what these two refer to, such as
    `EventBridgeBidAccepted`, `CloudEventBidAccepted` and their detail, `BidAccepted`.
    """
    models: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (model, "validation") for kind in (_EVENTBRIDGE, _CLOUDEVENTS) for model in kind.by_type.values()
    ]
    refs, top = models_json_schema(models, ref_template=_REF_TEMPLATE)
    schemas: dict[str, Any] = top["$defs"]
    names: list[str] = []
    for prefix, kind in (("EventBridge", _EVENTBRIDGE), ("CloudEvent", _CLOUDEVENTS)):
        for event_type, model in kind.by_type.items():
            schema = schemas.pop(refs[model, "validation"]["$ref"].rpartition("/")[2])
            schema["properties"][kind.type_name] = {"const": str(event_type)}
            names.append(prefix + _DETAILS[event_type].__name__)
            schemas[names[-1]] = schema | {"title": names[-1]}
    # Each envelope now names its own type, so the list of all of them has no reader left.
    del schemas[EventType.__name__]
    schemas["Event"] = {"oneOf": [_ref(name) for name in names]}
    batch = {"type": "array", "items": _ref("Event"), "minItems": 1, "maxItems": EVENTS_MAX}
    schemas["EventsRequest"] = {"oneOf": [_ref("Event"), batch]}
    return schemas


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF_TEMPLATE.format(model=name)}
