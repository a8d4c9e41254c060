"""The event lane: which frames and outbound events a decision announces, and what they carry.

An entry of `auction:updates:{k}` is written by the commit, before anyone knows its stream id or when a gateway will send
it. So it holds everything but `cursor`; a gateway adds that, and the time of sending, once per frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from engine.contract.intake import Actor, Context, Resync
from engine.contract.timers import TimerRecord, timer
from engine.contract.values import unguarded
from engine.domain.decide import Decision, Fact
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.withdrawal import is_high_value

TIMER_STARTED: Final = "timer.started"
TIMER_CLOSING: Final = "timer.closing"
TIMER_EXTENDED: Final = "timer.extended"
TIMER_RESCHEDULED: Final = "timer.rescheduled"
TIMER_PAUSED: Final = "timer.paused"
TIMER_RESUMED: Final = "timer.resumed"
TIMER_ENDED: Final = "timer.ended"
TIMER_CANCELLED: Final = "timer.cancelled"
TIMER_RESYNCED: Final = "timer.resynced"
BID_ACCEPTED: Final = "bid.accepted"

OVER: Final = frozenset({TIMER_ENDED, TIMER_CANCELLED})
"""After one of these nothing more will come: the socket is closed with 4000."""

ANALYTICS_STARTED: Final = "auction_timer_started"
ANALYTICS_RESYNCED: Final = "auction_timer_resynced"

OFFER_CANCELLED: Final = "offers.cancelled"
OFFER_CANCELLATION_COMPLETED: Final = "offers.cancellation.completed"
OFFER_CANCELLATION_BLOCKED: Final = "offers.cancellation.blocked"
OFFER_CANCELLATION_HIGH_VALUE: Final = "offers.cancellation.high_value"
PAYMENT_HOLD_RELEASE: Final = "offers.payment_hold.release_requested"


@unguarded
@dataclass(frozen=True, slots=True)
class Update:
    """One entry of the event lane. `body` is a JSON object."""

    type: str
    auction_id: str
    version: int
    body: bytes


def is_frame(update_type: str) -> bool:
    """Whether an entry goes to sockets; the others are for the outbound event bus only."""
    return update_type.startswith(("timer.", "bid."))


_FRAME_OF: Final[dict[Fact, str]] = {
    Fact.STARTED: TIMER_STARTED,
    Fact.CLOSING: TIMER_CLOSING,
    Fact.EXTENDED: TIMER_EXTENDED,
    Fact.RESCHEDULED: TIMER_RESCHEDULED,
    Fact.PAUSED: TIMER_PAUSED,
    Fact.RESUMED: TIMER_RESUMED,
    Fact.ENDED: TIMER_ENDED,
    Fact.CANCELLED: TIMER_CANCELLED,
    Fact.OFFER_CANCELLED: TIMER_CANCELLED,
    Fact.CORRECTED: TIMER_RESYNCED,
    Fact.OUTAGE_EXTENDED: TIMER_EXTENDED,
}

_ADDED: Final[dict[Fact, tuple[str, ...]]] = {
    Fact.EXTENDED: ("previous_ends_at", "bid_id", "clipped_by"),
    Fact.RESCHEDULED: ("previous_ends_at", "reason"),
    Fact.RESUMED: ("previous_ends_at", "reason"),
    Fact.PAUSED: ("reason",),
    Fact.CANCELLED: ("reason",),
    Fact.OFFER_CANCELLED: ("reason",),
    Fact.CORRECTED: ("cause", "previous_ends_at"),
    Fact.OUTAGE_EXTENDED: ("previous_ends_at", "bid_id", "clipped_by", "reason"),
}


def announce(
    decision: Decision, record: TimerRecord, *, actor: Actor, trace_id: str, correlation_id: str, now: EpochMs
) -> list[Update]:
    """The updates that `decision` announces, in order. `record` is the auction after it, `actor` who brought it about."""
    fact = decision.fact
    head: dict[str, Any] = {
        "auction_id": record.auction.auction_id,
        "server_time": now,
        "trace_id": trace_id,
        "correlation_id": correlation_id,
        "occurred_at": decision.at,
    }
    updates: list[Update] = []
    if fact is Fact.CORRECTED and record.auction.status.is_terminal:
        return updates  # its end was announced, and is not announced twice
    if fact is Fact.BID_ACCEPTED or fact is Fact.EXTENDED:
        updates.append(_update(BID_ACCEPTED, record, head, _bid(decision)))
    if fact is not None and (frame := _FRAME_OF.get(fact)) is not None:
        added = {name: decision.details.get(name) for name in _ADDED.get(fact, ())}
        updates.append(_update(frame, record, head, added, {"timer": timer(record, now, None)}))
    if fact is Fact.REGISTERED and record.auction.status is Status.CANCELLED:
        # Its cancellation came first, and could be told of nothing that anybody had heard of.
        added = {"reason": record.auction.reason}
        updates.append(_update(TIMER_CANCELLED, record, head, added, {"timer": timer(record, now, None)}))
    if fact is Fact.STARTED:
        updates.append(_update(ANALYTICS_STARTED, record, head))
    if fact is Fact.OFFER_CANCELLED:
        types = [OFFER_CANCELLED, OFFER_CANCELLATION_COMPLETED, PAYMENT_HOLD_RELEASE]
        if is_high_value(record.auction):
            types.append(OFFER_CANCELLATION_HIGH_VALUE)
        body = head | _offer(record, actor) | {name: decision.details.get(name) for name in ("reason", "note")}
        updates += [_update(update_type, record, body) for update_type in types]
    return updates


def blocked(
    decision: Decision,
    record: TimerRecord,
    *,
    actor: Actor,
    support_reference: str,
    trace_id: str,
    correlation_id: str,
    now: EpochMs,
) -> Update:
    """The announcement that the cancellation of an offer was refused (requirement R21)."""
    refusal = decision.refusal
    assert refusal is not None
    body = {
        "auction_id": record.auction.auction_id,
        "server_time": now,
        "trace_id": trace_id,
        "correlation_id": correlation_id,
        "occurred_at": decision.at,
        "error_code": refusal.code.value,
        "error": refusal.message,
        "support_reference": support_reference,
    }
    return _update(OFFER_CANCELLATION_BLOCKED, record, body, _offer(record, actor))


def resynced(record: TimerRecord, resync: Resync, *, at: EpochMs, context: Context, now: EpochMs) -> Update:
    """The announcement that a client's clock was put right (requirement R14). It is for the outbound bus, not for sockets."""
    body = {
        "auction_id": record.auction.auction_id,
        "server_time": now,
        "trace_id": context.trace_id,
        "correlation_id": context.correlation_id,
        "occurred_at": at,
        "drift_ms": resync.drift_ms,
        "rtt_ms": resync.rtt_ms,
        "actor": {"type": context.actor.type, "id": context.actor.id},
    }
    return _update(ANALYTICS_RESYNCED, record, body)


def _offer(record: TimerRecord, actor: Actor) -> dict[str, Any]:
    offer = record.auction.registered.offer
    return {
        "offer_id": offer.offer_id,
        "maker_id": offer.maker_id,
        "buyer_id": offer.buyer_id,
        "amount_minor": offer.amount_minor,
        "currency": offer.currency,
        "actor": {"type": actor.type, "id": actor.id},
    }


def _bid(decision: Decision) -> dict[str, Any]:
    details = decision.details
    added: dict[str, Any] = {name: details.get(name) for name in ("bid_id", "amount_minor", "currency", "bidder_id")}
    added["extended"] = decision.fact is Fact.EXTENDED
    if details.get("clipped_by") is not None:
        added["clipped_by"] = details["clipped_by"]
    return added


def _update(update_type: str, record: TimerRecord, *parts: Mapping[str, Any]) -> Update:
    auction = record.auction
    body: dict[str, Any] = {"type": update_type}
    for part in parts:
        body.update(part)
    return Update(update_type, auction.auction_id, auction.version, orjson.dumps(body))
