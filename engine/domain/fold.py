"""The fold of one auction: time and events, in the one order that counts.

Time acts by itself: an auction starts, opens its window and closes at instants that follow from its state. So before an
event that counts from `at` is decided, everything that was due up to and including `at` happens first, each as of its own
due time. That makes the result a function of the log alone: an engine that slept for a minute, and one that never did,
write the same history.

Worked example: ends_at = 100, window 15. A bid stamped 99 and a bid stamped 100 are processed at 140, after an outage.
The first finds the auction CLOSING (the window opened as of 85) and extends it; had it not, the second would first
have met the close as of 100, and counted as late.
"""

from collections.abc import Iterator
from typing import Final

from engine.domain.auction import Auction
from engine.domain.decide import Decision, decide
from engine.domain.events import InputEvent, OpenWindow, ReachDeadline, Start, TimeEvent
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status

_START: Final = Start()
_OPEN_WINDOW: Final = OpenWindow()
_REACH_DEADLINE: Final = ReachDeadline()


def next_due(auction: Auction) -> tuple[EpochMs, TimeEvent] | None:
    """The next thing that time alone will do to `auction`, and when; None if nothing."""
    status = auction.status
    if status is Status.ACTIVE:
        return auction.window_opens_at, _OPEN_WINDOW
    if status is Status.CLOSING:
        return auction.ends_at, _REACH_DEADLINE
    if status is Status.SCHEDULED:
        return auction.registered.starts_at, _START
    return None


def elapse(auction: Auction, until: EpochMs) -> Iterator[Decision]:
    """Yield what time does to `auction` up to and including `until`, in order. At most three steps."""
    while (due := next_due(auction)) is not None and due[0] <= until:
        decision = decide(auction, due[1], due[0])
        assert decision.changed, "what is due always applies, or this would never end"
        auction = decision.after
        yield decision


def fold(auction: Auction, event: InputEvent, at: EpochMs) -> list[Decision]:
    """Apply `event`, which arrived at `at`, to `auction`: what was due before it, itself, and what it makes due.

    The event's own decision is always present; `Decision.fact` of the others is one that time brings about.
    """
    decisions = list(elapse(auction, at))
    standing = decisions[-1].after if decisions else auction
    decision = decide(standing, event, at)
    decisions.append(decision)
    if decision.changed:  # else nothing is due that was not before
        decisions.extend(elapse(decision.after, at))
    return decisions
