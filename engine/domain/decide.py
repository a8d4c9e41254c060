"""`decide`: the one function that says what an event does to an auction.

It takes the auction as it stands, the event, and the instant the event counts from (`at`: the intake's stamp, or the due
time of a start, a window or a deadline), and returns a `Decision`. It changes nothing, knows no Redis and reads no clock,
so the same log always folds to the same result, on whatever machine and however late it is processed.

Boundary rules, each held by a property test:

- a bid counts iff `at < ends_at`; the deadline wins a tie;
- what is refused or ignored returns the very state that came in;
- every change raises the version by exactly one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, assert_never

from engine.domain.auction import Auction
from engine.domain.events import (
    Bid,
    Cancel,
    Event,
    OpenWindow,
    Pause,
    ReachDeadline,
    Register,
    Reschedule,
    Resume,
    Start,
    Withdraw,
)
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import ATTEMPTED, LIFECYCLE, Cell, Status, Verdict
from engine.domain.policy import Cap, ExtendsOn, extension
from engine.domain.refusals import Refusal, RefusalCode
from engine.domain.withdrawal import window_ends_at

Detail = int | str | bool | None


class Fact(StrEnum):
    """What happened, in the past tense: the `event_type` of an audit record."""

    REGISTERED = "auction_timer_registered"
    TOMBSTONED = "auction_timer_tombstoned"
    STARTED = "auction_timer_started"
    CLOSING = "auction_timer_closing"
    ENDED = "auction_timer_ended"
    CANCELLED = "auction_timer_cancelled"
    OFFER_CANCELLED = "offer_cancelled"
    PAUSED = "auction_timer_paused"
    RESUMED = "auction_timer_resumed"
    RESCHEDULED = "auction_timer_rescheduled"
    EXTENDED = "auction_timer_extended"
    BID_ACCEPTED = "bid_accepted"
    LATE_BID_IGNORED = "late_bid_ignored"
    CORRECTED = "auction_timer_corrected"
    OUTAGE_EXTENDED = "auction_timer_extended_for_outage"


@dataclass(frozen=True, slots=True)
class Decision:
    """What an event does.

    Exactly one of three holds: `fact` says what happened (and `after` is what stands now); `refusal` says why it may
    not; neither, and the event had no effect. In the last two cases `after is before` and nothing is written.
    """

    before: Auction
    after: Auction
    at: EpochMs
    fact: Fact | None = None
    refusal: Refusal | None = None
    details: dict[str, Detail] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the auction's own state changed, and so its version."""
        return self.after is not self.before


def decide(auction: Auction, event: Event, at: EpochMs) -> Decision:
    """Say what `event`, counting from `at`, does to `auction`."""
    cell = LIFECYCLE[auction.status][event.trigger]
    match cell.verdict:
        case Verdict.IGNORE:
            return Decision(auction, auction, at)
        case Verdict.REFUSE:
            assert cell.code is not None
            return _refuse(auction, event, at, cell.code, _sentence(auction, event))
        case Verdict.COMPARE:
            return _compare(auction, event, at)
        case Verdict.LATE:
            assert isinstance(event, Bid)
            return Decision(auction, auction, at, Fact.LATE_BID_IGNORED, details=_bid_details(event))
        case Verdict.MOVE | Verdict.STAY:
            return _APPLY[type(event)](auction, event, at, cell)
        case _:  # pragma: no cover
            assert_never(cell.verdict)


def _next(auction: Auction, **changes: object) -> Auction:
    return replace(auction, version=auction.version + 1, **changes)  # type: ignore[arg-type]


def _refuse(auction: Auction, event: Event, at: EpochMs, code: RefusalCode, message: str) -> Decision:
    refusal = Refusal(code, message, auction.status.value, ATTEMPTED[event.trigger].value)
    return Decision(auction, auction, at, refusal=refusal)


def _sentence(auction: Auction, event: Event) -> str:
    if auction.status is Status.UNREGISTERED:
        return f"no auction {auction.auction_id} is registered"
    if isinstance(event, Withdraw):
        return f"auction {auction.auction_id} is {auction.status}: its offer cannot be cancelled any more"
    return f"auction {auction.auction_id} is {auction.status}: it cannot {event.trigger}"


def _compare(auction: Auction, event: Event, at: EpochMs) -> Decision:
    assert isinstance(event, Register)
    if event.registration == auction.registration:
        return Decision(auction, auction, at)
    message = f"auction {auction.auction_id} is already registered with other terms"
    return _refuse(auction, event, at, RefusalCode.CONFLICTING_REGISTRATION, message)


def _register(auction: Auction, event: Register, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    registration = event.registration
    assert registration.auction_id == auction.auction_id
    after = _next(auction, status=status, registration=registration, ends_at=registration.ends_at)
    return Decision(auction, after, at, Fact.REGISTERED, details={"ends_at": registration.ends_at})


def _start(auction: Auction, _event: Start, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    return Decision(auction, _next(auction, status=status), at, Fact.STARTED)


def _open_window(auction: Auction, _event: OpenWindow, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    return Decision(auction, _next(auction, status=status), at, Fact.CLOSING, details={"ends_at": auction.ends_at})


def _reach_deadline(auction: Auction, _event: ReachDeadline, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    after = _next(auction, status=status, ended_at=auction.ends_at)
    return Decision(auction, after, at, Fact.ENDED, details={"ends_at": auction.ends_at})


def _bid(auction: Auction, event: Bid, at: EpochMs, _cell: Cell) -> Decision:
    details = _bid_details(event)
    if not _extends(auction, event, at):
        return Decision(auction, auction, at, Fact.BID_ACCEPTED, details=details)
    moved = extension(
        auction.policy,
        ends_at=auction.ends_at,
        cap_ends_at=auction.cap_ends_at,
        count=auction.extension_count,
        arrival=at,
    )
    details["clipped_by"] = _named(moved.clipped_by)
    if moved.ends_at == auction.ends_at:
        return Decision(auction, auction, at, Fact.BID_ACCEPTED, details=details)
    after = _next(
        auction,
        ends_at=moved.ends_at,
        extension_count=auction.extension_count + 1,
        clipped_by=moved.clipped_by,
    )
    details |= {"previous_ends_at": auction.ends_at, "ends_at": after.ends_at}
    return Decision(auction, after, at, Fact.EXTENDED, details=details)


def _extends(auction: Auction, event: Bid, at: EpochMs) -> bool:
    """Guard: the window is open at the bid's arrival, and this kind of bid extends."""
    if auction.status is not Status.CLOSING or at < auction.window_opens_at:
        return False
    return event.leader_changed or auction.policy.extends_on is ExtendsOn.ANY_ACCEPTED


def _bid_details(event: Bid) -> dict[str, Detail]:
    return {
        "bid_id": event.bid_id,
        "amount_minor": event.amount_minor,
        "currency": event.currency,
        "bidder_id": event.bidder_id,
        "leader_changed": event.leader_changed,
        "origin": event.origin,
    }


def _named(cap: Cap | None) -> str | None:
    return None if cap is None else cap.value


def _cancel(auction: Auction, event: Cancel, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    after = _next(auction, status=status, cancelled_at=at, reason=event.reason, paused_at=None, paused_from=None)
    fact = Fact.TOMBSTONED if status is Status.TOMBSTONE else Fact.CANCELLED
    return Decision(auction, after, at, fact, details={"reason": event.reason})


def _withdraw(auction: Auction, event: Withdraw, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    until = window_ends_at(auction, event.default_window_minutes)
    if at >= until:
        message = f"the offer could be cancelled until {until}, and the request arrived at {at}"
        return _refuse(auction, event, at, RefusalCode.WINDOW_EXPIRED, message)
    after = _next(
        auction, status=status, cancelled_at=at, reason=event.reason_code.value, paused_at=None, paused_from=None
    )
    details: dict[str, Detail] = {
        "reason": event.reason_code.value,
        "note": event.note,
        "device": event.device,
        "offer_id": auction.registered.offer.offer_id,
        "window_ends_at": until,
    }
    return Decision(auction, after, at, Fact.OFFER_CANCELLED, details=details)


def _pause(auction: Auction, event: Pause, at: EpochMs, cell: Cell) -> Decision:
    (status,) = cell.to
    after = _next(auction, status=status, paused_at=at, paused_from=auction.status, reason=event.reason)
    details: dict[str, Detail] = {"reason": event.reason, "paused_remaining_ms": after.paused_remaining_ms}
    return Decision(auction, after, at, Fact.PAUSED, details=details)


def _resume(auction: Auction, event: Resume, at: EpochMs, cell: Cell) -> Decision:
    assert auction.paused_at is not None
    assert auction.paused_from in cell.to
    paused_ms = at - auction.paused_at
    after = _next(
        auction,
        status=auction.paused_from,
        ends_at=EpochMs(auction.ends_at + paused_ms),
        paused_total_ms=auction.paused_total_ms + paused_ms,
        paused_at=None,
        paused_from=None,
        reason=None,
    )
    details: dict[str, Detail] = {
        "reason": event.reason,
        "previous_ends_at": auction.ends_at,
        "ends_at": after.ends_at,
        "paused_ms": paused_ms,
    }
    return Decision(auction, after, at, Fact.RESUMED, details=details)


def _reschedule(auction: Auction, event: Reschedule, at: EpochMs, _cell: Cell) -> Decision:
    refused = _unreachable_end(auction, event.ends_at, at)
    if refused is not None:
        return _refuse(auction, event, at, *refused)
    if event.ends_at == auction.ends_at:
        return Decision(auction, auction, at)
    after = _next(auction, ends_at=event.ends_at)
    if auction.status is Status.CLOSING and at < after.window_opens_at:
        after = replace(after, status=Status.ACTIVE)
    details: dict[str, Detail] = {
        "reason": event.reason,
        "previous_ends_at": auction.ends_at,
        "ends_at": after.ends_at,
    }
    return Decision(auction, after, at, Fact.RESCHEDULED, details=details)


def _unreachable_end(auction: Auction, ends_at: EpochMs, at: EpochMs) -> tuple[RefusalCode, str] | None:
    """Guard: an operator may move the end only into the future, after the start, and within the total cap."""
    if ends_at <= at:
        return RefusalCode.SCHEDULE_IN_PAST, f"the new end {ends_at} is not after the arrival {at}"
    if ends_at <= auction.registered.starts_at:
        return RefusalCode.SCHEDULE_BEFORE_START, f"the new end {ends_at} is not after the start"
    if ends_at > auction.cap_ends_at:
        return (
            RefusalCode.SCHEDULE_BEYOND_CAP,
            f"the new end {ends_at} is past the last one allowed, {auction.cap_ends_at}",
        )
    return None


_APPLY: Final[dict[type, Callable[..., Decision]]] = {
    Register: _register,
    Start: _start,
    OpenWindow: _open_window,
    ReachDeadline: _reach_deadline,
    Bid: _bid,
    Cancel: _cancel,
    Pause: _pause,
    Resume: _resume,
    Reschedule: _reschedule,
    Withdraw: _withdraw,
}
