"""Input events on their way from the gateway to the fold.

The gateway validates what producers send (two envelopes, many spellings of a date) and writes the *normalised* body
defined here; the engine reads that body back without trusting it, because anyone with access to Redis can add an entry.
A body that cannot be read is poison: `SchemaError` says what is wrong, the entry goes to troubleshooting, the stream
goes on (requirement R29).
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import orjson

from engine.contract.values import unguarded
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.policy import ExtendsOn, ExtensionMode, Policy
from engine.domain.withdrawal import NOTE_CHARS_MAX, WINDOW_MINUTES_MAX, WithdrawalReason

AUCTION_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TEXT_CHARS_MAX: Final = 500
BODY_BYTES_MAX: Final = 65_536
COMMAND_ID_CHARS_MAX: Final = 1_024
"""Of an id by which a command can be asked for over HTTP; producers over HTTP send shorter ones."""
COMMAND_WITHIN: Final = 50
"""Levels of JSON that a parked command may stand within: the answer that tells of it, and what a version to come adds."""
PAYLOAD_WITHIN: Final = COMMAND_WITHIN + 50
"""The same of what was sent, which stands within the parked command."""
# Amounts are only handed on, but they cross JSON readers that hold integers as doubles.
AMOUNT_MINOR_MAX: Final = 2**53 - 1
DELEGATES_MAX: Final = 100
OFFSET_MS_MAX: Final = EPOCH_MS_MAX
EVIDENCE_BYTES_MAX: Final = 4_096


class EventType(StrEnum):
    """The event types that producers send."""

    AUCTION_STARTED = "offers.auction.started"
    BID_ACCEPTED = "auctions.bid.accepted"
    OFFER_CANCELLED = "offers.cancellation.completed"
    CANCEL_REQUESTED = "auctions.cancel.requested"
    PAUSE_REQUESTED = "auctions.pause.requested"
    RESUME_REQUESTED = "auctions.resume.requested"
    SCHEDULE_CHANGED = "auctions.schedule.changed"


class CommandType(StrEnum):
    """The event types that gateways make from requests. Producers cannot send them."""

    OFFER_CANCEL_REQUESTED = "offers.cancel.requested"
    RETRY_REQUESTED = "troubleshooting.retry.requested"
    DISCARD_REQUESTED = "troubleshooting.cancel.requested"
    CORRECTION_REQUESTED = "timers.correction.requested"
    OUTAGE_OBSERVED = "service.outage.observed"
    RESYNC_REPORTED = "timers.resync.reported"
    CLOCK_CORRECTED = "clock.corrected"


class SchemaError(ValueError):
    """An intake body cannot be read. The message names the field."""


@unguarded
@dataclass(frozen=True, slots=True)
class Actor:
    """Who asked."""

    type: str
    id: str


SCHEDULER: Final = Actor("system", "scheduler")
ANONYMOUS: Final = Actor("service", "")


@unguarded
@dataclass(frozen=True, slots=True)
class Context:
    """What accompanies an event and is kept in the record of what it did."""

    event_id: str
    event_type: str
    trace_id: str
    correlation_id: str
    actor: Actor
    reply_to: str | None = None
    occurred_at: EpochMs | None = None
    """When the producer says it happened: only ever measured (requirement R31), never decided on."""
    submitted_by: str | None = None
    """The subject of the token that it came with: whoever brings that may learn what became of it, whoever `actor` says
    asked. None where nobody was asked for a token."""
    relisted: bool = False
    """Of a start: its offer stood for another auction already, be it in another shard (docs/decisions/0006)."""


@dataclass(frozen=True, slots=True)
class Retry:
    """An operator sends a command in troubleshooting round again (requirement R30)."""

    command_id: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Discard:
    """An operator cancels a command in troubleshooting, for good (requirement R30)."""

    command_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resync:
    """A client's clock was far off and has been put right (requirements R8, R14). It changes nothing and is announced only.

    `drift_ms` is how far it was ahead (negative: behind), `rtt_ms` the round trip by which that was measured.
    """

    drift_ms: int
    rtt_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Correct:
    """The reconciler asks that what is kept of an auction be brought back to what the log says (architecture section 9).

    `fields` is the whole hash as the fold of the audit log has it; empty where the log could not be read, and then what the
    engine holds is written anew. `unknown`: a log that was read whole knows no such auction, so that, if the engine holds
    none either, its place in the sorted sets goes. `found_version` and `found_ends_at` are what the hash said when it was
    found damaged; 0 and None if that could not be read.
    """

    cause: str
    fields: Mapping[str, str]
    found_version: int = 0
    found_ends_at: EpochMs | None = None
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Outage:
    """No gateway could write to this shard after `since` and before `until` (requirement B8), so no producer could either.

    `extension_ms` travels with it, so that the same log folds to the same result whatever a later setting says.
    """

    since: EpochMs
    until: EpochMs
    extension_ms: int


@dataclass(frozen=True, slots=True)
class CorrectClock:
    """The reconciler asks that this shard stamp by `TIME + offset_ms`, because `TIME` stepped (architecture section 4).

    The offset is absolute, so the same order twice is the same order. `evidence` says what the witnesses showed.
    """

    offset_ms: int
    reason: str
    evidence: Mapping[str, Any]


Request = Retry | Discard | Resync | Correct | Outage | CorrectClock
"""What gateways and the reconciler ask of a shard, and no transition of the life cycle."""


@unguarded
@dataclass(frozen=True, slots=True)
class IntakeEvent:
    """A readable input event.

    Exactly one of `auction_id` and `offer_id` says what it is about; an operator's `Retry` or `Discard`, an `Outage` and a
    `CorrectClock` have neither.
    """

    context: Context
    event: InputEvent | Request
    auction_id: str | None
    offer_id: str | None = None


def encode(event: IntakeEvent) -> bytes:
    """The normalised body of an event, as JSON."""
    context = event.context
    body: dict[str, object] = {
        "type": context.event_type,
        "auction_id": event.auction_id,
        "offer_id": event.offer_id,
        "trace_id": context.trace_id,
        "correlation_id": context.correlation_id,
        "actor": {"type": context.actor.type, "id": context.actor.id},
        "reply_to": context.reply_to,
        "occurred_at": context.occurred_at,
        "detail": _detail(event.event),
    }
    if context.submitted_by is not None:
        body["submitted_by"] = context.submitted_by
    if context.relisted:
        body["relisted"] = True
    return orjson.dumps(body)


def _detail(event: InputEvent | Request) -> object:
    if isinstance(event, Register):
        registration = event.registration
        return {
            "starts_at": registration.starts_at,
            "ends_at": registration.ends_at,
            "policy": registration.policy,
            "offer": registration.offer,
        }
    return event


def readable(body: bytes, *, levels_around: int) -> object:
    """A body as JSON, if that can stand within so many levels of other JSON; else as text, of which no more is kept than a
    body may be long.

    orjson reads 1,024 levels of nesting and writes 254, so what can be read need not be what can be told.
    """
    with contextlib.suppress(orjson.JSONDecodeError):
        if can_stand_within(found := orjson.loads(body), levels_around):
            return found
    return body[:BODY_BYTES_MAX].decode(errors="replace")


def can_stand_within(value: object, levels_around: int) -> bool:
    """Whether JSON that was read can be written within so many levels of other JSON."""
    for _ in range(levels_around):
        value = [value]
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


def decode(event_id: str, body: bytes) -> IntakeEvent:
    """Read a normalised body back.

    Raises:
        SchemaError: it is not JSON, of an unknown type, or a field is missing or wrong.
    """
    if len(body) > BODY_BYTES_MAX:
        raise SchemaError(f"body is {len(body)} bytes, at most {BODY_BYTES_MAX} are read")
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise SchemaError(f"body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise SchemaError("body is not an object")
    fields = _Fields(raw, "")
    event_type = fields.text("type")
    build = _BUILD.get(event_type)
    if build is None:
        raise SchemaError(f"type {event_type[:100]!r} is unknown")
    auction_id = fields.text_or_none("auction_id")
    offer_id = fields.text_or_none("offer_id") if event_type == EventType.OFFER_CANCELLED else None
    if auction_id is None and offer_id is None and event_type not in _ABOUT_NO_AUCTION:
        raise SchemaError("auction_id is missing")
    if auction_id is not None and not AUCTION_ID.fullmatch(auction_id):
        raise SchemaError("auction_id is not 1-128 of A-Z a-z 0-9 . _ : -")
    actor = fields.fields("actor")
    context = Context(
        event_id=event_id,
        event_type=event_type,
        trace_id=fields.text("trace_id"),
        correlation_id=fields.text("correlation_id"),
        actor=Actor(actor.text("type"), actor.text("id")),
        reply_to=fields.text_or_none("reply_to"),
        occurred_at=fields.instant_or_none("occurred_at"),
        submitted_by=fields.text_or_none("submitted_by"),
        relisted="relisted" in raw and fields.flag("relisted"),
    )
    event = build(auction_id or "", fields.fields("detail"))
    return IntakeEvent(context, event, auction_id, None if auction_id is not None else offer_id)


class _Fields:
    """Typed access to one JSON object; every failure names the object and the field."""

    __slots__ = ("_name", "_raw")

    def __init__(self, raw: Mapping[str, Any], name: str) -> None:
        self._raw = raw
        self._name = name

    def _wrong(self, name: str, wanted: str) -> SchemaError:
        return SchemaError(f"{self._name}.{name} is not {wanted}" if self._name else f"{name} is not {wanted}")

    def fields(self, name: str) -> "_Fields":
        value = self._raw.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return _Fields(value, name)

    def text(self, name: str) -> str:
        value = self._raw.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def reason(self, name: str) -> str:
        value = self.text(name)
        if not 0 < len(value) <= TEXT_CHARS_MAX:
            raise self._wrong(name, f"1-{TEXT_CHARS_MAX} characters")
        return value

    def text_or_none(self, name: str) -> str | None:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def all_texts(self) -> dict[str, str]:
        return {name: self.text(name) for name in self._raw}

    def integer(self, name: str) -> int:
        value = self._raw.get(name)
        if type(value) is not int:
            raise self._wrong(name, "an integer")
        return value

    def integer_or_none(self, name: str) -> int | None:
        return None if self._raw.get(name) is None else self.integer(name)

    def offset(self, name: str) -> int:
        value = self.integer(name)
        if abs(value) > OFFSET_MS_MAX:
            raise self._wrong(name, f"an offset in -{OFFSET_MS_MAX}..{OFFSET_MS_MAX}")
        return value

    def evidence(self, name: str) -> Mapping[str, Any]:
        value = self._raw.get(name)
        if (
            not isinstance(value, dict)
            or not can_stand_within(value, PAYLOAD_WITHIN)
            or len(orjson.dumps(value)) > EVIDENCE_BYTES_MAX
        ):
            raise self._wrong(name, f"an object of at most {EVIDENCE_BYTES_MAX} bytes")
        return value

    def minutes(self, name: str) -> int:
        value = self.integer(name)
        if not 0 <= value <= WINDOW_MINUTES_MAX:
            raise self._wrong(name, f"a number of minutes in 0..{WINDOW_MINUTES_MAX}")
        return value

    def minutes_or_none(self, name: str) -> int | None:
        return None if self._raw.get(name) is None else self.minutes(name)

    def instant(self, name: str) -> EpochMs:
        value = self.integer(name)
        if not 0 < value <= EPOCH_MS_MAX:
            raise self._wrong(name, f"an instant in 1..{EPOCH_MS_MAX}")
        return EpochMs(value)

    def instant_or_none(self, name: str) -> EpochMs | None:
        return None if self._raw.get(name) is None else self.instant(name)

    def flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value


def read_policy(raw: Mapping[str, Any]) -> Policy:
    """A policy from its JSON object.

    Raises:
        SchemaError: a field is missing, wrong or out of its bounds.
    """
    fields = _Fields(raw, "policy")
    try:
        return Policy(
            soft_close_window_ms=fields.integer("soft_close_window_ms"),
            extension_ms=fields.integer("extension_ms"),
            mode=ExtensionMode(fields.text("mode")),
            total_cap_ms=fields.integer("total_cap_ms"),
            max_extensions=fields.integer_or_none("max_extensions"),
            extends_on=ExtendsOn(fields.text("extends_on")),
            tick_interval_ms=fields.integer("tick_interval_ms"),
        )
    except SchemaError:
        raise
    except ValueError as error:
        raise SchemaError(f"policy: {error}") from None


def read_offer(raw: Mapping[str, Any]) -> Offer:
    """An offer from its JSON object.

    Raises:
        SchemaError: a field is missing or wrong.
    """
    fields = _Fields(raw, "offer")
    return Offer(
        offer_id=fields.text_or_none("offer_id"),
        owner_id=fields.text_or_none("owner_id"),
        maker_id=fields.text_or_none("maker_id"),
        buyer_id=fields.text_or_none("buyer_id"),
        maker_delegate_ids=fields.texts("maker_delegate_ids"),
        offer_created_at=fields.instant_or_none("offer_created_at"),
        modification_window_minutes=fields.minutes_or_none("modification_window_minutes"),
        amount_minor=fields.integer_or_none("amount_minor"),
        currency=fields.text_or_none("currency"),
        auto_reject_threshold_minor=fields.integer_or_none("auto_reject_threshold_minor"),
    )


def _register(auction_id: str, detail: _Fields) -> Register:
    policy = read_policy(detail.fields("policy")._raw)  # noqa: SLF001 - the same class
    offer = read_offer(detail.fields("offer")._raw)  # noqa: SLF001
    starts_at, ends_at = detail.instant("starts_at"), detail.instant("ends_at")
    try:
        return Register(Registration(auction_id, starts_at, ends_at, policy, offer))
    except ValueError as error:
        raise SchemaError(str(error)) from None


def _bid(_auction_id: str, detail: _Fields) -> Bid:
    return Bid(
        bid_id=detail.text("bid_id"),
        amount_minor=detail.integer_or_none("amount_minor"),
        currency=detail.text_or_none("currency"),
        bidder_id=detail.text_or_none("bidder_id"),
        leader_changed=detail.flag("leader_changed"),
        origin=detail.text_or_none("origin"),
    )


def _withdraw(_auction_id: str, detail: _Fields) -> Withdraw:
    reason_code, note = detail.text("reason_code"), detail.text_or_none("note")
    if reason_code not in set(WithdrawalReason):
        raise SchemaError(f"detail.reason_code {reason_code[:100]!r} is unknown")
    if note is not None and len(note) > NOTE_CHARS_MAX:
        raise SchemaError(f"detail.note has more than {NOTE_CHARS_MAX} characters")
    return Withdraw(
        WithdrawalReason(reason_code), detail.minutes("default_window_minutes"), note, detail.text_or_none("device")
    )


def _correct(_auction_id: str, detail: _Fields) -> Correct:
    return Correct(
        detail.reason("cause"),
        detail.fields("fields").all_texts(),
        detail.integer("found_version"),
        detail.instant_or_none("found_ends_at"),
        detail.flag("unknown"),
    )


def _correct_clock(_auction_id: str, detail: _Fields) -> CorrectClock:
    return CorrectClock(detail.offset("offset_ms"), detail.reason("reason"), detail.evidence("evidence"))


_ABOUT_NO_AUCTION: Final = frozenset(
    {
        CommandType.RETRY_REQUESTED,
        CommandType.DISCARD_REQUESTED,
        CommandType.OUTAGE_OBSERVED,
        CommandType.CLOCK_CORRECTED,
    }
)
_BUILD: Final[dict[str, Callable[[str, _Fields], InputEvent | Request]]] = {
    EventType.AUCTION_STARTED: _register,
    EventType.BID_ACCEPTED: _bid,
    EventType.OFFER_CANCELLED: lambda _id, detail: Cancel(detail.reason("reason")),
    EventType.CANCEL_REQUESTED: lambda _id, detail: Cancel(detail.reason("reason")),
    EventType.PAUSE_REQUESTED: lambda _id, detail: Pause(detail.text_or_none("reason")),
    EventType.RESUME_REQUESTED: lambda _id, detail: Resume(detail.text_or_none("reason")),
    EventType.SCHEDULE_CHANGED: lambda _id, detail: Reschedule(
        detail.instant("ends_at"), detail.text_or_none("reason")
    ),
    CommandType.OFFER_CANCEL_REQUESTED: _withdraw,
    CommandType.RETRY_REQUESTED: lambda _id, detail: Retry(detail.text("command_id"), detail.text_or_none("reason")),
    CommandType.DISCARD_REQUESTED: lambda _id, detail: Discard(detail.text("command_id"), detail.reason("reason")),
    CommandType.RESYNC_REPORTED: lambda _id, detail: Resync(
        detail.integer("drift_ms"), detail.integer_or_none("rtt_ms")
    ),
    CommandType.CORRECTION_REQUESTED: _correct,
    CommandType.CLOCK_CORRECTED: _correct_clock,
    CommandType.OUTAGE_OBSERVED: lambda _id, detail: Outage(
        detail.instant("since"), detail.instant("until"), detail.integer("extension_ms")
    ),
}
