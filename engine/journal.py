"""From decisions to a batch: folds entries and due instants over a shard, and spells what must be written.

Pure but for its name: it reads no clock and touches no store. The service hands it what the shard holds and what is to
be applied; it hands back one `Batch`, and the auctions as they will stand once that batch is committed. Nothing is
installed in memory before the store has said so.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any, Final

import orjson

from engine.contract import audit, frames
from engine.contract.intake import (
    COMMAND_ID_CHARS_MAX,
    COMMAND_WITHIN,
    PAYLOAD_WITHIN,
    SCHEDULER,
    TEXT_CHARS_MAX,
    Actor,
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
    readable,
)
from engine.contract.offers import BOUND_TO_AUCTION, CANCELLED_BEFORE_START, auction_bound_in, binding
from engine.contract.timers import (
    CorruptTimerError,
    TimerRecord,
    checksum,
    from_fields,
    moving_fields,
    timer,
    to_fields,
)
from engine.domain.auction import Auction
from engine.domain.correction import correct, true_one
from engine.domain.decide import Decision, Fact
from engine.domain.events import Bid, Cancel, InputEvent, Register, Withdraw
from engine.domain.fold import elapse, fold
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.outage import extend_over
from engine.domain.refusals import Refusal, RefusalCode
from engine.store.protocol import (
    Announce,
    Batch,
    BindOffer,
    Displace,
    Entry,
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
    SetOffset,
    ShardHead,
    Unpark,
)

ALWAYS_PARKED: Final = frozenset({RefusalCode.UNKNOWN_AUCTION, RefusalCode.CONFLICTING_REGISTRATION})
"""Refusals that a person must look at. The others are answers: whoever asked with a `reply_to` has got it."""

PENDING: Final = "PENDING"
IN_TROUBLESHOOTING: Final = "IN_TROUBLESHOOTING_QUEUE"
CANCELED: Final = "CANCELED"
INVALID_OPERATION: Final = "INVALID_OPERATION"


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
        parked: the commands in troubleshooting that operators' commands are about, as they were parked.
        unreadable: auctions whose hash was damaged; events for them wait in troubleshooting.
        edited: auctions whose hash was changed behind our back: they are written whole, whatever version it has now.
    """

    def __init__(
        self,
        shard: int,
        epoch: int,
        head: ShardHead,
        timers: Mapping[str, TimerRecord],
        offers: Mapping[str, str],
        *,
        parked: Mapping[str, bytes] | None = None,
        unreadable: Mapping[str, CorruptTimerError] | None = None,
        edited: Collection[str] = (),
        holder: str,
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
        self.offset_ms: int | None = None
        """What will be added to the authority's clock from now on; None if that is not touched."""
        self._timers = timers
        self._offers = dict(offers)
        self._parked = dict(parked or {})
        self._unreadable = dict(unreadable or {})
        self._registered: set[str] = set()
        self._whole: set[str] = set(edited)
        """The auctions of which every field is written."""
        self._edited = frozenset(edited)
        self._batch = Batch(
            shard, holder, epoch, commit_id, now, after=head, intake=head.intake, chain=head.chain
        )  # fmt: skip

    def batch(self) -> Batch:
        """The batch: the operations in the order in which they were decided, then each changed auction once."""
        operations = self._batch.operations
        for auction_id, record in self.after.items():
            fields = to_fields(record) if auction_id in self._whole else moving_fields(record.auction)
            operations.append(PutTimer(auction_id, fields | {"checksum": checksum(record.auction)}))
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
        if isinstance(event.event, Retry | Discard):
            self._operate(event.event, context, entry)
            return
        if isinstance(event.event, Resync):
            self._announce_resync(event.auction_id or "", event.event, context, entry.at)
            return
        if isinstance(event.event, Outage):
            self._sit_out(event.event, context, entry)
            return
        if isinstance(event.event, CorrectClock):
            self._correct_clock(event.event, context, entry)
            return
        if isinstance(event.event, Correct):
            self._correct(event.auction_id or "", event.event, context, entry)
            return
        auction_id = event.auction_id or self._auction_of(event.offer_id or "")
        if auction_id is None:
            self._remember_cancellation(event, entry)
            return
        if auction_id in self._unreadable:
            self._park_unreadable(auction_id, event.event, context, entry)
            return
        self._fold(auction_id, event.event, context, entry)

    def _fold(self, auction_id: str, event: InputEvent, context: Context, entry: Entry) -> None:
        assert entry.at is not None
        if isinstance(event, Register):
            try:
                self._cancel_first(event, auction_id, context, entry)
            except (ValueError, TypeError, KeyError):
                fault = (
                    "a cancellation is kept for its offer, and cannot be read: whether it is cancelled is for a person"
                )
                self._park_poison(entry, SchemaError(fault))
                return
        for decision in fold(self._record(auction_id).auction, event, entry.at):
            by_time = decision.fact in _BY_TIME
            self._write(decision, None if by_time else context, entry.stream_id)
            if not by_time:
                self._answer(decision, context, event, entry)
        if isinstance(event, Register):
            self._bind_offer(event, auction_id, entry.at)

    # Outages: who lost time near the end gets it back.

    def _sit_out(self, outage: Outage, context: Context, entry: Entry) -> None:
        for auction_id in sorted({*self._timers, *self.after}):
            record = self._record(auction_id)
            for decision in extend_over(record.auction, outage.since, outage.until, outage.extension_ms):
                by_time = decision.fact in _BY_TIME
                self._write(decision, None if by_time else context, entry.stream_id)

    # Corrections: what the reconciler found is brought back to what the log says.

    def _correct(self, auction_id: str, order: Correct, context: Context, entry: Entry) -> None:
        assert entry.at is not None
        try:
            said = from_fields(order.fields)
        except CorruptTimerError as error:
            self._park_poison(entry, SchemaError(f"detail.fields: {error}"))
            return
        held = self.after.get(auction_id) or self._timers.get(auction_id)
        auction = true_one(held.auction if held else None, said.auction if said else None)
        if auction is None or auction.version == 0:
            if order.unknown:
                self._displace(auction_id, order, context, entry)
            return
        # Whatever version the hash has now, it was not written by a commit: this one does not depend on it.
        self._batch.versions.pop(auction_id, None)
        self._unreadable.pop(auction_id, None)
        self._whole.add(auction_id)
        ids = said or held
        assert ids is not None
        self.after[auction_id] = replace(ids, auction=auction)
        decision = correct(
            auction,
            entry.at,
            cause=order.cause,
            found_version=order.found_version,
            found_ends_at=order.found_ends_at,
        )
        self._write(decision, context, entry.stream_id)

    def _displace(self, auction_id: str, order: Correct, context: Context, entry: Entry) -> None:
        self._batch.operations.append(Displace(auction_id))
        self._note(audit.ENTRY_REMOVED, auction_id, {"cause": order.cause}, context, entry)

    def _correct_clock(self, order: CorrectClock, context: Context, entry: Entry) -> None:
        self.offset_ms = order.offset_ms
        self._batch.operations.append(SetOffset(order.offset_ms))
        details = {"offset_ms": order.offset_ms, "reason": order.reason, "evidence": order.evidence}
        self._note(audit.CLOCK_CORRECTED, "", details, context, entry)

    def _note(
        self, event_type: str, auction_id: str, details: Mapping[str, object], context: Context, entry: Entry
    ) -> None:
        """Record what was done that changed no auction."""
        self._chain(
            audit.operation(
                event_type,
                auction_id=auction_id,
                prev_status="",
                new_status="",
                actor=context.actor,
                event_id=context.event_id,
                intake_id=entry.stream_id,
                trace_id=context.trace_id,
                correlation_id=context.correlation_id,
                occurred_at=entry.at or self.now,
                recorded_at=self.now,
                details=details,
            )
        )

    # Offers: a cancellation may name an offer whose auction is not known yet (requirement R19).

    def _auction_of(self, offer_id: str) -> str | None:
        return auction_bound_in(self._offers.get(offer_id))

    def _remember_cancellation(self, event: IntakeEvent, entry: Entry) -> None:
        """The offer is unknown in this shard: keep the cancellation until a start names the offer."""
        assert event.offer_id is not None
        assert isinstance(event.event, Cancel)
        context = event.context
        is_new = event.offer_id not in self._offers
        if is_new:
            kept = {
                "reason": event.event.reason,
                "at": entry.at,
                "event_id": context.event_id,
                "trace_id": context.trace_id,
                "correlation_id": context.correlation_id,
                "actor_type": context.actor.type,
                "actor_id": context.actor.id,
                "submitted_by": context.submitted_by,
            }
            value = CANCELLED_BEFORE_START + orjson.dumps(kept).decode()
            self._offers[event.offer_id] = value
            self._batch.operations.append(BindOffer(event.offer_id, value, forget=True))
        # Every shard has got it, and one of them answers.
        if self._batch.shard == 0:
            body = self._head(context, None, entry)
            body |= {"offer_id": event.offer_id, "outcome": "APPLIED" if is_new else "UNCHANGED"}
            self._say(context, body, keep=True)

    def _cancel_first(self, event: Register, auction_id: str, context: Context, entry: Entry) -> None:
        offer_id = event.registration.offer.offer_id
        bound = self._offers.get(offer_id, "") if offer_id else ""
        auction = self._record(auction_id).auction
        if not bound.startswith(CANCELLED_BEFORE_START) or auction.status is not Status.UNREGISTERED:
            return
        if context.relisted:
            return  # what was cancelled is the auction that the offer stood for before
        kept = orjson.loads(bound.removeprefix(CANCELLED_BEFORE_START))
        # Recorded in the name of the one who cancelled, not of the start that brought it to light.
        canceller = replace(
            context,
            event_id=kept["event_id"],
            event_type=EventType.OFFER_CANCELLED,
            trace_id=kept["trace_id"],
            correlation_id=kept["correlation_id"],
            actor=Actor(kept["actor_type"], kept["actor_id"]),
            submitted_by=kept.get("submitted_by"),
        )
        for decision in fold(auction, Cancel(kept["reason"]), EpochMs(kept["at"])):
            self._write(decision, canceller, entry.stream_id)

    def _bind_offer(self, event: Register, auction_id: str, at: EpochMs) -> None:
        offer_id = event.registration.offer.offer_id
        value = binding(auction_id, at)
        if offer_id and self._auction_of(offer_id) != auction_id and auction_id in self._registered:
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
            self._whole.add(auction_id)
            standing = TimerRecord(standing.auction, context.trace_id, context.correlation_id)
        record = standing
        if decision.after is not standing.auction:
            record = TimerRecord(decision.after, standing.trace_id, standing.correlation_id)
        if context is None:
            batch.due_at = decision.at if batch.due_at is None else EpochMs(max(batch.due_at, decision.at))
        if decision.fact is Fact.ENDED:
            batch.closes_at = EpochMs(max(batch.closes_at or 0, decision.at))
        if decision.changed:
            if auction_id not in self.after and auction_id not in self._edited:
                batch.versions[auction_id] = decision.before.version
            self.after[auction_id] = record
        trace_id = context.trace_id if context else record.trace_id
        correlation_id = context.correlation_id if context else record.correlation_id
        actor: Actor = context.actor if context else SCHEDULER
        self._chain(
            audit.record(
                decision,
                actor=actor,
                event_id=context.event_id if context else "",
                intake_id=intake_id if context else "",
                trace_id=trace_id,
                correlation_id=correlation_id,
                recorded_at=self.now,
                submitted_by=context.submitted_by if context else None,
            )
        )
        if not decision.after.status.is_public:
            return
        for update in frames.announce(
            decision, record, actor=actor, trace_id=trace_id, correlation_id=correlation_id, now=self.now
        ):  # fmt: skip
            self._announce(update)

    def _chain(self, fields: dict[str, str]) -> None:
        self._batch.chain, linked = audit.chained(self._batch.chain, fields)
        self._batch.operations.append(Record(linked))

    def _announce(self, update: frames.Update) -> None:
        self._batch.operations.append(Announce(update.type, update.auction_id, update.version, update.body))

    def _announce_resync(self, auction_id: str, resync: Resync, context: Context, at: EpochMs) -> None:
        record = self._record(auction_id)
        if record.auction.status.is_public:
            self._announce(frames.resynced(record, resync, at=at, context=context, now=self.now))

    # Answering.

    def _answer(self, decision: Decision, context: Context, event: InputEvent, entry: Entry) -> None:
        refusal = decision.refusal
        keep = _is_kept(event, entry)
        if refusal is None and not keep and context.reply_to is None:
            return
        record = self._record(decision.after.auction_id)
        body = self._head(context, decision.after.auction_id, entry)
        body["outcome"] = _outcome(decision)
        if refusal is not None:
            body |= {
                "error_code": refusal.code.value,
                "error": refusal.message,
                "current_status": refusal.current_status,
                "attempted_status": refusal.attempted_status,
            }
            if isinstance(event, Withdraw) and record.auction.registration is not None:
                body["support_reference"] = support_reference(context.event_id)
                self._announce(
                    frames.blocked(
                        decision,
                        record,
                        actor=context.actor,
                        support_reference=body["support_reference"],
                        trace_id=context.trace_id,
                        correlation_id=context.correlation_id,
                        now=self.now,
                    )
                )
            if _parks(refusal, event, context):
                body["outcome"] = IN_TROUBLESHOOTING
                self._park(context, entry, refusal.code.value, refusal.message)
        if not keep and context.reply_to is None:
            return
        if decision.fact is not None:
            body["fact"] = decision.fact.value
            body["audit"] = self._last_record()
        if record.auction.status.is_public:
            body["timer"] = timer(record, self.now, None)
        self._say(context, body, keep=keep)

    def _head(self, context: Context, auction_id: str | None, entry: Entry) -> dict[str, Any]:
        return {
            "command_id": context.event_id,
            "event_type": context.event_type,
            "auction_id": auction_id,
            "correlation_id": context.correlation_id,
            "arrival_ms": entry.at,
            "asked_by": context.submitted_by,
        }

    def _last_record(self) -> dict[str, str]:
        """The record that was written last, as its reader will find it."""
        written = next(made for made in reversed(self._batch.operations) if isinstance(made, Record))
        return dict(written.fields) | {"shard": str(self._batch.shard)}

    def _say(self, context: Context, body: dict[str, Any], *, keep: bool) -> None:
        """Tell the one who asked, and whoever will ask what became of the command."""
        answer = orjson.dumps(body)
        if context.reply_to is not None:
            self._batch.operations.append(Reply(context.reply_to, body["outcome"], context.event_id, answer))
        if keep:
            self._batch.operations.append(KeepOutcome(context.event_id, answer))

    # Troubleshooting.

    def _operate(self, order: Retry | Discard, context: Context, entry: Entry) -> None:
        """What an operator wants done with a command, if it is in troubleshooting."""
        body = self._head(context, "", entry)
        found = self._parked.pop(order.command_id, None)
        if found is None:
            body |= {
                "outcome": "REFUSED",
                "error_code": INVALID_OPERATION,
                "error": f"command {order.command_id} is not in troubleshooting",
            }
            self._say(context, body, keep=True)
            return
        command = _command(order.command_id, found)
        self._batch.operations.append(Unpark(order.command_id))
        if isinstance(order, Retry):
            status = command["status"] = "RETRIED"
            event_id = command["event_id"] or order.command_id
            self._batch.operations.append(
                Requeue(event_id, _payload(command), command["attempts"], EpochMs(command["first_seen_at"]))
            )
            waiting = {"command_id": event_id, "outcome": PENDING, "asked_by": command["asked_by"]}
            self._batch.operations.append(KeepOutcome(event_id, orjson.dumps(waiting)))
        else:
            status = command["status"] = CANCELED
            self._tell_canceled(command, order, context)
        self._chain(
            audit.operation(
                audit.OPERATOR_RETRY if isinstance(order, Retry) else audit.OPERATOR_CANCEL,
                auction_id=_named_in(command, "auction_id"),
                prev_status=IN_TROUBLESHOOTING,
                new_status=status,
                actor=context.actor,
                event_id=context.event_id,
                intake_id=entry.stream_id,
                trace_id=context.trace_id,
                correlation_id=context.correlation_id,
                occurred_at=entry.at or self.now,
                recorded_at=self.now,
                details={
                    "command_id": order.command_id,
                    "reason": order.reason,
                    "operator": context.actor.id,
                    "error_code": command["error_code"],
                    "attempts": command["attempts"],
                },
            )
        )
        body |= {"outcome": "APPLIED", "command": command, "audit": self._last_record()}
        self._say(context, body, keep=True)

    def _tell_canceled(self, command: dict[str, Any], order: Discard, context: Context) -> None:
        command |= {"reason": order.reason, "operator": context.actor.id, "canceled_at": self.now}
        event_id = command["event_id"] or order.command_id
        answer = orjson.dumps(
            {
                "outcome": CANCELED,
                "command_id": event_id,
                "event_type": command["event_type"],
                "error": order.reason,
                "operator": context.actor.id,
                "correlation_id": _named_in(command, "correlation_id") or context.correlation_id,
                "operator_correlation_id": context.correlation_id,
                "asked_by": command["asked_by"],
            }
        )
        if command["reply_to"] is not None:
            self._batch.operations.append(Reply(command["reply_to"], CANCELED, event_id, answer))
        self._batch.operations.append(KeepOutcome(order.command_id, answer))

    def _park_unreadable(self, auction_id: str, event: InputEvent, context: Context, entry: Entry) -> None:
        error = str(self._unreadable[auction_id])
        self._park(context, entry, "TIMER_UNREADABLE", error)
        body = self._head(context, auction_id, entry)
        body |= {"outcome": IN_TROUBLESHOOTING, "error_code": "TIMER_UNREADABLE", "error": error}
        self._say(context, body, keep=_is_kept(event, entry))

    def _park_poison(self, entry: Entry, error: SchemaError) -> None:
        self.poison += 1
        code, message = "SCHEMA_INVALID", str(error)
        command_id, reply_to = self._park(None, entry, code, message)
        if reply_to is not None:
            outcome = {"outcome": IN_TROUBLESHOOTING, "command_id": command_id, "error_code": code, "error": message}
            self._batch.operations.append(Reply(reply_to, IN_TROUBLESHOOTING, command_id, orjson.dumps(outcome)))

    def _park(self, context: Context | None, entry: Entry, code: str, message: str) -> tuple[str, str | None]:
        """Keep an entry for a person, by its id; by its place in the intake if another one of that id waits already, or
        nobody could ask for it by its own.

        Returns:
            What it is kept by, and where whoever sent it wants to be told, if anywhere.
        """
        first_seen_at = entry.first_seen_at or entry.at or self.now
        place = f"{self._batch.shard}-{entry.stream_id}"
        own = entry.event_id
        command_id = own if _is_addressable(own) and own not in self._parked else place
        payload = readable(entry.body, levels_around=PAYLOAD_WITHIN)
        reply_to = context.reply_to if context else _reply_to_in(payload)
        body = orjson.dumps(
            {
                "command_id": command_id,
                "event_id": context.event_id if context else None,
                "event_type": context.event_type if context else _type_named_in(payload),
                "status": IN_TROUBLESHOOTING,
                "error_code": code,
                "error": message,
                "attempts": entry.attempts + 1,
                "first_seen_at": first_seen_at,
                "payload": payload,
                "reply_to": reply_to,
                "asked_by": context.submitted_by if context else None,
            }
        )
        self._parked[command_id] = body
        self._batch.operations.append(Park(command_id, first_seen_at, body, place))
        return command_id, reply_to


def support_reference(command_id: str) -> str:
    """What a person quotes to support about a refusal: short, the same in the answer and in the announcement."""
    return f"SUP-{sha256(command_id.encode()).hexdigest()[:10].upper()}"


_THE_MANY: Final = frozenset({Bid, Register})
_BY_TIME: Final = frozenset({Fact.STARTED, Fact.CLOSING, Fact.ENDED})


def _parks(refusal: Refusal, event: InputEvent, context: Context) -> bool:
    if refusal.code in ALWAYS_PARKED:
        return True
    # A cancellation of what is over has reached its goal or come too late: neither needs a person (requirement R19).
    return context.reply_to is None and not isinstance(event, Cancel | Withdraw)


def _is_kept(event: InputEvent, entry: Entry) -> bool:
    """Whether what becomes of an event is kept for whoever asks: not of the many, unless a person sent one round again."""
    return entry.attempts > 0 or type(event) not in _THE_MANY


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


def _is_addressable(event_id: str) -> bool:
    """Whether people can ask for a command by this id: it fits into a URL, and into a line."""
    if not 0 < len(event_id) <= COMMAND_ID_CHARS_MAX or event_id in {".", ".."}:
        return False
    return event_id.isprintable() and event_id == event_id.strip()


def _reply_to_in(payload: object) -> str | None:
    """Where somebody whose event cannot be read wants to be told, if that much of it can be."""
    reply_to = payload.get("reply_to") if isinstance(payload, dict) else None
    return reply_to if isinstance(reply_to, str) and _is_addressable(reply_to) else None


def _command(command_id: str, body: bytes) -> dict[str, Any]:
    """A command as it was parked; whoever edited it by hand, it stays one that can be retried or cancelled."""
    read = readable(body, levels_around=COMMAND_WITHIN)
    command: dict[str, Any] = read if isinstance(read, dict) else {"payload": body.decode(errors="replace")}
    blank = {
        "event_id": None,
        "event_type": None,
        "error_code": None,
        "attempts": 0,
        "first_seen_at": 1,
        "payload": None,
        "reply_to": None,
        "asked_by": None,
    }
    command = blank | command | {"command_id": command_id}
    for name in ("attempts", "first_seen_at"):
        if type(command[name]) is not int or not 0 <= command[name] <= EPOCH_MS_MAX:
            command[name] = blank[name]
    for name in ("event_id", "reply_to", "asked_by"):
        if type(command[name]) is not str:
            command[name] = None
    return command


def _payload(command: dict[str, Any]) -> bytes:
    payload = command["payload"]
    return payload.encode() if isinstance(payload, str) else orjson.dumps(payload)


def _named_in(command: dict[str, Any], name: str) -> str:
    payload = command["payload"]
    found = payload.get(name) if isinstance(payload, dict) else None
    return found if isinstance(found, str) else ""


def _type_named_in(payload: object) -> str | None:
    event_type = payload.get("type") if isinstance(payload, dict) else None
    return event_type[:TEXT_CHARS_MAX] if isinstance(event_type, str) else None
