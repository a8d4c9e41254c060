"""When the next tick is due.

Ticks are locked to the *remaining* time, not to the moment somebody registered: at 15 s steps an auction ticks when 45,
30 and 15 seconds are left, so every viewer's digits flip together and a change of deadline re-locks the phase by itself.

    remaining      step
    > 10 min       15 s     (the ceiling of requirement R4)
    <= 10 min       5 s
    <= 1 min        1 s

A policy's `tick_interval_ms` can only make the steps shorter.
"""

from engine.domain.auction import Auction
from engine.domain.instants import MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import TICK_INTERVAL_MS_MAX


def tick_step_ms(remaining_ms: int, tick_interval_ms: int) -> int:
    """The distance of two ticks with `remaining_ms` left, in ms."""
    if remaining_ms <= MINUTE_MS:
        step = SECOND_MS
    elif remaining_ms <= 10 * MINUTE_MS:
        step = 5 * SECOND_MS
    else:
        step = TICK_INTERVAL_MS_MAX
    return min(step, tick_interval_ms)


def next_tick_at(auction: Auction, now: EpochMs) -> EpochMs | None:
    """The next instant after `now` at which `auction` ticks; None if it will not tick before something else happens.

    A paused auction ticks too, with its frozen remaining time: its viewers must know that the silence is not a fault.
    """
    match auction.status:
        case Status.SCHEDULED | Status.ACTIVE | Status.CLOSING:
            remaining_ms = auction.ends_at - now
            if remaining_ms <= 0:
                return None
            step_ms = tick_step_ms(remaining_ms, auction.policy.tick_interval_ms)
            # The largest multiple of the step that is strictly below the remaining time; 0 is the close itself.
            next_remaining_ms = (remaining_ms - 1) // step_ms * step_ms
            # A step that does not divide an edge of the bands must not run past it: there shorter steps begin.
            for edge_ms in (10 * MINUTE_MS, MINUTE_MS):
                if remaining_ms > edge_ms > next_remaining_ms:
                    next_remaining_ms = edge_ms
                    break
            return EpochMs(auction.ends_at - next_remaining_ms) if next_remaining_ms else None
        case Status.PAUSED:
            return EpochMs(now + auction.policy.tick_interval_ms)
        case _:
            return None
