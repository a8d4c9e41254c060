"""One auction in every status, reached the way the engine reaches it, and one event for every trigger."""

from dataclasses import replace
from typing import Any, Final

from engine.domain.auction import Auction, Registration
from engine.domain.decide import Decision
from engine.domain.events import (
    Bid,
    Cancel,
    Event,
    InputEvent,
    OpenWindow,
    Pause,
    ReachDeadline,
    Register,
    Reschedule,
    Resume,
    Start,
    Withdraw,
)
from engine.domain.fold import elapse, fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status, Trigger
from engine.domain.policy import Policy
from engine.domain.withdrawal import WithdrawalReason

AUCTION_ID: Final = "lot-7"

T0: Final = EpochMs(1_800_000_000_000)
"""The start of every example. The examples end an hour later, so by default the window opens 45 minutes in."""

START_TO_END_MS: Final = HOUR_MS


def at(offset_ms: int) -> EpochMs:
    """The instant `offset_ms` after `T0`."""
    return EpochMs(T0 + offset_ms)


END: Final = at(START_TO_END_MS)


def registration(**changes: Any) -> Registration:
    """The example registration, with some fields changed."""
    return replace(Registration(AUCTION_ID, T0, END), **changes)


def history(*steps: tuple[int, InputEvent | None], registered: Registration | None = None) -> list[Decision]:
    """Fold `steps`, pairs of an offset from `T0` and an event; None is a wake-up of the scheduler.

    With `registered` the auction is registered first, an hour before it starts.
    """
    decisions: list[Decision] = []
    auction = Auction(AUCTION_ID)
    if registered is not None:
        steps = ((-HOUR_MS, Register(registered)), *steps)
    for offset_ms, event in steps:
        instant = at(offset_ms)
        decisions += elapse(auction, instant) if event is None else fold(auction, event, instant)
        auction = decisions[-1].after if decisions else auction
    return decisions


def standing(*steps: tuple[int, InputEvent | None], registered: Registration | None = None) -> Auction:
    """The auction after `history(...)`."""
    return history(*steps, registered=registered)[-1].after


IN_STATUS: Final[dict[Status, tuple[Auction, EpochMs]]] = {
    Status.UNREGISTERED: (Auction(AUCTION_ID), T0),
    Status.TOMBSTONE: (standing((-HOUR_MS, Cancel("withdrawn"))), T0),
    Status.SCHEDULED: (standing(registered=registration()), at(-MINUTE_MS)),
    Status.ACTIVE: (standing((0, None), registered=registration()), at(10 * MINUTE_MS)),
    Status.CLOSING: (standing((45 * MINUTE_MS, None), registered=registration()), at(50 * MINUTE_MS)),
    Status.PAUSED: (standing((10 * MINUTE_MS, Pause("fire alarm")), registered=registration()), at(20 * MINUTE_MS)),
    Status.ENDED: (standing((60 * MINUTE_MS, None), registered=registration()), at(70 * MINUTE_MS)),
    Status.CANCELLED: (standing((0, Cancel("withdrawn")), registered=registration()), at(10 * MINUTE_MS)),
}
"""An auction in each status, and an instant at which nothing is due for it."""

PAUSED_WHILE_CLOSING: Final = standing((50 * MINUTE_MS, Pause("fire alarm")), registered=registration())
WELL_TRAVELLED: Final = standing(
    (50 * MINUTE_MS, Bid("clipped")),
    (51 * MINUTE_MS, Pause()),
    (53 * MINUTE_MS, Resume()),
    (54 * MINUTE_MS, Pause("second alarm")),
    registered=registration(policy=Policy(total_cap_ms=2 * MINUTE_MS)),
)
"""Paused for the second time, after an extension that the total cap clipped: no moving field has its first value."""
CANCELLED_BEFORE_START_ARRIVED: Final = standing((-HOUR_MS, Cancel("withdrawn")), (0, Register(registration())))

FOR_TRIGGER: Final[dict[Trigger, Event]] = {
    Trigger.START: Start(),
    Trigger.OPEN_WINDOW: OpenWindow(),
    Trigger.REACH_DEADLINE: ReachDeadline(),
    Trigger.REGISTER: Register(registration()),
    Trigger.BID: Bid("bid-1", amount_minor=12_500, currency="EUR", bidder_id="bidder-3", origin="manual"),
    Trigger.CANCEL: Cancel("seller withdrew"),
    Trigger.PAUSE: Pause("fire alarm"),
    Trigger.RESUME: Resume("all clear"),
    Trigger.RESCHEDULE: Reschedule(at(2 * HOUR_MS), "hall is booked longer"),
    Trigger.WITHDRAW: Withdraw(
        WithdrawalReason.CHANGED_MIND, default_window_minutes=60, note="sorry", device="phone-1"
    ),
}
