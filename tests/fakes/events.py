"""Input events for tests, as drafts of the intake: the id says what it is, so a failing assertion can be read."""

from typing import Any

from engine.contract.intake import (
    Actor,
    CommandType,
    Context,
    Discard,
    EventType,
    IntakeEvent,
    Request,
    Resync,
    Retry,
    encode,
)
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.instants import EpochMs
from engine.domain.policy import Policy
from engine.domain.withdrawal import WithdrawalReason
from engine.store.protocol import Draft

MAKER = Actor("maker", "m-1")
BUYER = Actor("buyer", "buyer-1")
OPERATOR = Actor("operator", "op-1")


def draft(
    event_id: str,
    event_type: EventType | CommandType,
    event: InputEvent | Request,
    auction_id: str | None,
    *,
    offer_id: str | None = None,
    reply_to: str | None = None,
    actor: Actor = MAKER,
    occurred_at: int | None = None,
    seen_ids: tuple[str, ...] = (),
    submitted_by: str | None = None,
    relisted: bool = False,
) -> Draft:
    """Any event, with ids that follow from its own."""
    context = Context(
        event_id=event_id,
        event_type=event_type.value,
        trace_id=f"trace-{event_id}",
        correlation_id=f"req-{event_id}",
        actor=actor,
        reply_to=reply_to,
        occurred_at=None if occurred_at is None else EpochMs(occurred_at),
        submitted_by=submitted_by,
        relisted=relisted,
    )
    return Draft(event_id, encode(IntakeEvent(context, event, auction_id, offer_id)), seen_ids)


def start(
    auction_id: str,
    starts_at: int,
    ends_at: int,
    *,
    event_id: str | None = None,
    policy: Policy | None = None,
    offer_id: str | None = None,
    offer: Offer | None = None,
    **context: Any,
) -> Draft:
    """`offers.auction.started`."""
    registration = Registration(
        auction_id, EpochMs(starts_at), EpochMs(ends_at), policy or Policy(), offer or Offer(offer_id=offer_id)
    )
    event_id = event_id or f"start-{auction_id}"
    return draft(event_id, EventType.AUCTION_STARTED, Register(registration), auction_id, **context)


def bid(auction_id: str, bid_id: str, *, leader_changed: bool = True, **context: Any) -> Draft:
    """`auctions.bid.accepted`."""
    event = Bid(bid_id, amount_minor=12_500, currency="EUR", bidder_id="bidder-1", leader_changed=leader_changed)
    return draft(f"bid-{bid_id}", EventType.BID_ACCEPTED, event, auction_id, **context)


def cancel(auction_id: str, *, event_id: str | None = None, reason: str = "withdrawn", **context: Any) -> Draft:
    """`auctions.cancel.requested`."""
    event_id = event_id or f"cancel-{auction_id}"
    return draft(event_id, EventType.CANCEL_REQUESTED, Cancel(reason), auction_id, **context)


def cancel_offer(offer_id: str, *, event_id: str | None = None, reason: str = "withdrawn", **context: Any) -> Draft:
    """`offers.cancellation.completed` that names only the offer."""
    event_id = event_id or f"cancel-{offer_id}"
    return draft(event_id, EventType.OFFER_CANCELLED, Cancel(reason), None, offer_id=offer_id, **context)


def pause(auction_id: str, event_id: str, **context: Any) -> Draft:
    """`auctions.pause.requested`."""
    return draft(event_id, EventType.PAUSE_REQUESTED, Pause("fire alarm"), auction_id, **context)


def resume(auction_id: str, event_id: str, **context: Any) -> Draft:
    """`auctions.resume.requested`."""
    return draft(event_id, EventType.RESUME_REQUESTED, Resume("all clear"), auction_id, **context)


def reschedule(auction_id: str, event_id: str, ends_at: int, **context: Any) -> Draft:
    """`auctions.schedule.changed`."""
    event = Reschedule(EpochMs(ends_at), "hall is booked longer")
    return draft(event_id, EventType.SCHEDULE_CHANGED, event, auction_id, **context)


def withdraw(auction_id: str, event_id: str, *, minutes: int = 30, **context: Any) -> Draft:
    """`offers.cancel.requested`."""
    event = Withdraw(WithdrawalReason.CHANGED_MIND, minutes, note="sorry", device="phone-1")
    return draft(event_id, CommandType.OFFER_CANCEL_REQUESTED, event, auction_id, **{"actor": BUYER} | context)


def retry(command_id: str, event_id: str, **context: Any) -> Draft:
    """`troubleshooting.retry.requested`."""
    event = Retry(command_id, "known by now")
    return draft(event_id, CommandType.RETRY_REQUESTED, event, None, **{"actor": OPERATOR} | context)


def discard(command_id: str, event_id: str, **context: Any) -> Draft:
    """`troubleshooting.cancel.requested`."""
    event = Discard(command_id, "of no use")
    return draft(event_id, CommandType.DISCARD_REQUESTED, event, None, **{"actor": OPERATOR} | context)


def resync(auction_id: str, event_id: str, drift_ms: int = 740, **context: Any) -> Draft:
    """`timers.resync.reported`."""
    return draft(event_id, CommandType.RESYNC_REPORTED, Resync(drift_ms, 38), auction_id, **context)


def poison(event_id: str, body: bytes = b"{not json") -> Draft:
    """A body that nobody can read."""
    return Draft(event_id, body)
