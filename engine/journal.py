"""From decisions to a batch: folds entries and due instants over a shard, and spells what must be written.

Pure but for its name: it reads no clock and touches no store. The service hands it what the shard holds and what is to
be applied; it hands back one `Batch`, and the auctions as they will stand once that batch is committed. Nothing is
installed in memory before the store has said so.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import orjson

from engine.contract import audit, frames
from engine.contract.intake import (
    BODY_BYTES_MAX,
    SCHEDULER,
    Actor,
    Context,
    EventType,
    IntakeEvent,
    SchemaError,
    decode,
)
from engine.contract.timers import CorruptTimerError, TimerRecord, moving_fields, timer, to_fields
from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.events import Cancel, Register
from engine.domain.fold import elapse, fold
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.refusals import Refusal, RefusalCode
from engine.store.protocol import (
    Announce,
    Batch,
    BindOffer,
    Entry,
    Operation,
    Park,
    PlaceClosed,
    PlaceLive,
    PlacePaused,
    PutTimer,
    Record,
    Reply,
    ShardHead,
)

ALWAYS_PARKED: Final = frozenset({RefusalCode.UNKNOWN_AUCTION, RefusalCode.CONFLICTING_REGISTRATION})
"""Refusals that a person must look at. The others are answers: whoever asked with a `reply_to` has got it."""

BOUND_TO_AUCTION: Final = "auction "
CANCELLED_BEFORE_START: Final = "cancelled "


def peek(entry: Entry) -> IntakeEvent | SchemaError:
    """Read an entry's event; a `SchemaError` is the value that says why it cannot be read."""
    if entry.at is None:
        return SchemaError("the entry was not written by append.lua: it has no arrival stamp")
    try:
        return decode(entry.event_id, entry.body)
    except SchemaError as error:
        return error


class Journal:
    """One batch in the making.

    Args:
        timers: the auctions that the entries are about, as they stand; one that is absent is unregistered.
        offers: what the offer ids that the entries name are bound to.
        unreadable: auctions whose hash was damaged; events for them wait in troubleshooting.
    """

    def __init__(
        self,
        shard: int,
        epoch: int,
        head: ShardHead,
        timers: Mapping[str, TimerRecord],
        offers: Mapping[str, str],
        *,
        unreadable: Mapping[str, CorruptTimerError] | None = None,
        now: EpochMs,
        commit_id: str,
    ) -> None:
        self.now = now
        self.after: dict[str, TimerRecord] = {}
        """The auctions that the batch changes, as they will stand."""
        self.decisions: list[tuple[Decision, Context | None]] = []
        """Every decision that was taken, with the event that caused it; None if it was time."""
        self.poison = 0
        """Entries that could not be read."""
        self._timers = timers
        self._offers = dict(offers)
        self._unreadable = unreadable or {}
        self._registered: set[str] = set()
        self._batch = Batch(
            shard, epoch, commit_id, now, after=head, intake=head.intake, chain=head.chain
        )  # fmt: skip

    def batch(self) -> Batch:
        """The batch: the operations in the order in which they were decided, then each changed auction once."""
        operations = self._batch.operations
        for auction_id, record in self.after.items():
            fields = to_fields(record) if auction_id in self._registered else moving_fields(record.auction)
            operations.append(PutTimer(auction_id, fields))
            operations.append(_place(record.auction))
            offer_id = record.auction.registration.offer.offer_id if record.auction.registration else None
            if record.auction.status.is_terminal and offer_id:
                operations.append(BindOffer(offer_id, BOUND_TO_AUCTION + auction_id, forget=True))
        return self._batch

    def elapse(self, auction_id: str, until: EpochMs) -> None:
        """Apply what time does to an auction up to `until`."""
        record = self._record(auction_id)
        for decision in elapse(record.auction, until):
            self._write(decision, None, "")

    def apply(self, entry: Entry, event: IntakeEvent | SchemaError) -> None:
        """Apply one intake entry; `event` is what `peek` said of it. It always moves the cursor."""
        self._batch.intake = entry.stream_id
        if isinstance(event, SchemaError):
            self._park_poison(entry, event)
            return
        assert entry.at is not None
        context = event.context
        auction_id = event.auction_id or self._auction_of(event.offer_id or "")
        if auction_id is None:
            self._remember_cancellation(event, entry)
            return
        if auction_id in self._unreadable:
            message = str(self._unreadable[auction_id])
            self._park(context.event_id, context, entry, "TIMER_UNREADABLE", message)
            return
        if isinstance(event.event, Register):
            self._cancel_first(event.event, auction_id, context, entry)
        for decision in fold(self._record(auction_id).auction, event.event, entry.at):
            by_time = decision.fact in _BY_TIME
            self._write(decision, None if by_time else context, entry.stream_id)
            if not by_time:
                self._answer(decision, context, event, entry)
        if isinstance(event.event, Register):
            self._bind_offer(event.event, auction_id)

    # Offers: a cancellation may name an offer whose auction is not known yet (requirement R19).

    def _auction_of(self, offer_id: str) -> str | None:
        bound = self._offers.get(offer_id, "")
        return bound.removeprefix(BOUND_TO_AUCTION) if bound.startswith(BOUND_TO_AUCTION) else None

    def _remember_cancellation(self, event: IntakeEvent, entry: Entry) -> None:
        """The offer is unknown in this shard: keep the cancellation until a start names the offer."""
        assert event.offer_id is not None
        assert isinstance(event.event, Cancel)
        if event.offer_id not in self._offers:
            context = event.context
            kept = {
                "reason": event.event.reason,
                "at": entry.at,
                "event_id": context.event_id,
                "trace_id": context.trace_id,
                "correlation_id": context.correlation_id,
                "actor_type": context.actor.type,
                "actor_id": context.actor.id,
            }
            value = CANCELLED_BEFORE_START + orjson.dumps(kept).decode()
            self._offers[event.offer_id] = value
            self._batch.operations.append(BindOffer(event.offer_id, value, forget=True))

    def _cancel_first(self, event: Register, auction_id: str, context: Context, entry: Entry) -> None:
        offer_id = event.registration.offer.offer_id
        bound = self._offers.get(offer_id, "") if offer_id else ""
        auction = self._record(auction_id).auction
        if not bound.startswith(CANCELLED_BEFORE_START) or auction.status is not Status.UNREGISTERED:
            return
        kept = orjson.loads(bound.removeprefix(CANCELLED_BEFORE_START))
        # Recorded in the name of the one who cancelled, not of the start that brought it to light.
        canceller = replace(
            context,
            event_id=kept["event_id"],
            event_type=EventType.OFFER_CANCELLED,
            trace_id=kept["trace_id"],
            correlation_id=kept["correlation_id"],
            actor=Actor(kept["actor_type"], kept["actor_id"]),
        )
        for decision in fold(auction, Cancel(kept["reason"]), EpochMs(kept["at"])):
            self._write(decision, canceller, entry.stream_id)

    def _bind_offer(self, event: Register, auction_id: str) -> None:
        offer_id = event.registration.offer.offer_id
        value = BOUND_TO_AUCTION + auction_id
        if offer_id and self._offers.get(offer_id) != value and auction_id in self._registered:
            self._offers[offer_id] = value
            self._batch.operations.append(BindOffer(offer_id, value, forget=False))

    # Writing.

    def _record(self, auction_id: str) -> TimerRecord:
        record = self.after.get(auction_id) or self._timers.get(auction_id)
        return record or TimerRecord(Auction(auction_id))

    def _write(self, decision: Decision, context: Context | None, intake_id: str) -> None:
        self.decisions.append((decision, context))
        if decision.fact is None:
            return
        batch = self._batch
        auction_id = decision.after.auction_id
        standing = self._record(auction_id)
        if decision.fact is Fact.REGISTERED or decision.fact is Fact.TOMBSTONED:
            assert context is not None
            self._registered.add(auction_id)
            standing = TimerRecord(standing.auction, context.trace_id, context.correlation_id)
        record = TimerRecord(decision.after, standing.trace_id, standing.correlation_id)
        if context is None:
            batch.due_at = decision.at if batch.due_at is None else EpochMs(max(batch.due_at, decision.at))
        if decision.changed:
            if auction_id not in self.after:
                batch.versions[auction_id] = decision.before.version
            self.after[auction_id] = record
        trace_id = context.trace_id if context else record.trace_id
        correlation_id = context.correlation_id if context else record.correlation_id
        actor: Actor = context.actor if context else SCHEDULER
        batch.chain, fields = audit.chained(
            batch.chain,
            audit.record(
                decision,
                actor=actor,
                event_id=context.event_id if context else "",
                intake_id=intake_id if context else "",
                trace_id=trace_id,
                correlation_id=correlation_id,
                recorded_at=self.now,
            ),
        )
        batch.operations.append(Record(fields))
        if not decision.after.status.is_public:
            return
        for update in frames.announce(
            decision, record, trace_id=trace_id, correlation_id=correlation_id, now=self.now
        ):  # fmt: skip
            batch.operations.append(Announce(update.type, update.auction_id, update.version, update.body))

    # Answering.

    def _answer(self, decision: Decision, context: Context, event: IntakeEvent, entry: Entry) -> None:
        refusal = decision.refusal
        parks = refusal is not None and _parks(refusal, event, context)
        if parks:
            assert refusal is not None
            self._park(context.event_id, context, entry, refusal.code.value, refusal.message)
        if context.reply_to is None:
            return
        record = self._record(decision.after.auction_id)
        body: dict[str, Any] = {
            "outcome": "IN_TROUBLESHOOTING_QUEUE" if parks else _outcome(decision),
            "command_id": context.event_id,
            "event_type": context.event_type,
            "auction_id": decision.after.auction_id,
            "correlation_id": context.correlation_id,
            "arrival_ms": entry.at,
        }
        if decision.fact is not None:
            body["fact"] = decision.fact.value
        if refusal is not None:
            body |= {
                "error_code": refusal.code.value,
                "error": refusal.message,
                "current_status": refusal.current_status,
                "attempted_status": refusal.attempted_status,
            }
        if record.auction.status.is_public:
            body["timer"] = timer(record, self.now, None)
        self._batch.operations.append(
            Reply(context.reply_to, body["outcome"], context.event_id, orjson.dumps(body))
        )  # fmt: skip

    def _park_poison(self, entry: Entry, error: SchemaError) -> None:
        command_id = entry.event_id or f"{self._batch.shard}-{entry.stream_id}"
        self.poison += 1
        self._park(command_id, None, entry, "SCHEMA_INVALID", str(error))

    def _park(self, command_id: str, context: Context | None, entry: Entry, code: str, message: str) -> None:
        body = {
            "command_id": command_id,
            "event_type": context.event_type if context else None,
            "status": "IN_TROUBLESHOOTING_QUEUE",
            "error_code": code,
            "error": message,
            "attempts": 1,
            "first_seen_at": entry.at or self.now,
            "payload": _readable(entry.body),
            "reply_to": context.reply_to if context else None,
        }
        self._batch.operations.append(Park(command_id, orjson.dumps(body)))


_BY_TIME: Final = frozenset({Fact.STARTED, Fact.CLOSING, Fact.ENDED})


def _parks(refusal: Refusal, event: IntakeEvent, context: Context) -> bool:
    if refusal.code in ALWAYS_PARKED:
        return True
    # A cancellation of what is over has reached its goal or come too late: neither needs a person (requirement R19).
    return context.reply_to is None and not isinstance(event.event, Cancel)


def _outcome(decision: Decision) -> str:
    if decision.refusal is not None:
        return "REFUSED"
    if decision.fact is Fact.LATE_BID_IGNORED:
        return "LATE"
    return "UNCHANGED" if decision.fact is None else "APPLIED"


def _place(auction: Auction) -> Operation:
    match auction.status:
        case Status.PAUSED:
            assert auction.paused_at is not None
            return PlacePaused(auction.auction_id, auction.paused_at)
        case Status.ENDED:
            return PlaceClosed(auction.auction_id, auction.ends_at)
        case Status.CANCELLED | Status.TOMBSTONE:
            assert auction.cancelled_at is not None
            return PlaceClosed(auction.auction_id, auction.cancelled_at)
        case _:
            return PlaceLive(auction.auction_id, auction.ends_at)


def _readable(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:BODY_BYTES_MAX].decode(errors="replace")
