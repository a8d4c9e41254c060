"""A second opinion on soft close, written from the sentences of the requirements and sharing no code with the domain.

The domain keeps absolute instants and a state machine. This reference keeps two *amounts* instead: how much time is left
on the countdown when a bid comes in, and how much of the allowance is still unspent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

FIFTEEN_MINUTES = 15 * 60 * 1000
ONE_DAY = 24 * 60 * 60 * 1000


@dataclass
class Close:
    """How one auction went."""

    end: int
    extensions: int = 0
    counted: list[bool] = field(default_factory=list)
    """One entry per bid: whether it arrived in time."""
    ends: list[int] = field(default_factory=list)
    """One entry per bid: the end that stood after it."""


def play(
    starts_at: int,
    ends_at: int,
    arrivals: Iterable[tuple[int, bool]],
    *,
    window: int,
    step: int,
    adds: bool,
    allowance: int,
    times: int | None,
    every_bid: bool,
) -> Close:
    """Play bids, `(arrival, changed the leader)` in order of arrival, against a countdown."""
    allowance = min(allowance, ONE_DAY)
    step = min(step, FIFTEEN_MINUTES)
    close = Close(ends_at)
    for arrival, new_leader in arrivals:
        countdown = close.end - arrival
        in_time = countdown > 0
        close.counted.append(in_time)
        started = arrival >= starts_at
        if in_time and started and countdown <= window and (new_leader or every_bid):
            wanted = step if adds else step - countdown
            granted = min(wanted, allowance)
            if granted > 0 and (times is None or close.extensions < times):
                close.end += granted
                close.extensions += 1
                allowance -= granted
        close.ends.append(close.end)
    return close
