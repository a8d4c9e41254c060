"""What can be asked of one auction, as values. Each class knows its trigger in the life-cycle table."""

from dataclasses import dataclass
from typing import ClassVar

from engine.domain.auction import Registration
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Trigger
from engine.domain.withdrawal import WithdrawalReason


@dataclass(frozen=True, slots=True)
class Register:
    """`offers.auction.started`: the auction becomes known, with its schedule and its frozen policy."""

    trigger: ClassVar[Trigger] = Trigger.REGISTER
    registration: Registration


@dataclass(frozen=True, slots=True)
class Bid:
    """`auctions.bid.accepted`: somebody upstream accepted a bid. Amounts are passed on, never judged."""

    trigger: ClassVar[Trigger] = Trigger.BID
    bid_id: str
    amount_minor: int | None = None
    currency: str | None = None
    bidder_id: str | None = None
    leader_changed: bool = True
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """`auctions.cancel.requested` or `offers.cancellation.completed`."""

    trigger: ClassVar[Trigger] = Trigger.CANCEL
    reason: str


@dataclass(frozen=True, slots=True)
class Pause:
    """`auctions.pause.requested`: freeze the remaining time."""

    trigger: ClassVar[Trigger] = Trigger.PAUSE
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """`auctions.resume.requested`: go on with the remaining time that was frozen."""

    trigger: ClassVar[Trigger] = Trigger.RESUME
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Reschedule:
    """`auctions.schedule.changed`: an operator sets another end."""

    trigger: ClassVar[Trigger] = Trigger.RESCHEDULE
    ends_at: EpochMs
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Withdraw:
    """`offers.cancel.requested`: the offer behind the auction is cancelled, within its modification window.

    `default_window_minutes` counts where the registration names no window. It travels with the request, so that the same
    log folds to the same result whatever a later setting says.
    """

    trigger: ClassVar[Trigger] = Trigger.WITHDRAW
    reason_code: WithdrawalReason
    default_window_minutes: int
    note: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Time reached `starts_at`."""

    trigger: ClassVar[Trigger] = Trigger.START


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """Time reached the soft-close window."""

    trigger: ClassVar[Trigger] = Trigger.OPEN_WINDOW


@dataclass(frozen=True, slots=True)
class ReachDeadline:
    """Time reached `ends_at`."""

    trigger: ClassVar[Trigger] = Trigger.REACH_DEADLINE


TimeEvent = Start | OpenWindow | ReachDeadline
InputEvent = Register | Bid | Cancel | Pause | Resume | Reschedule | Withdraw
Event = InputEvent | TimeEvent
