"""Whose clock is wrong: three witnesses of the auction clock, and what each process states about them. Pure.

The authority (Redis `TIME` and the sequenced offset), the wall clock of this machine and the monotonic extrapolation are
read in the same instant. Two that agree outvote the third (architecture section 4):

    authority   wall     monotonic   named            what it means
    12.000      12.000   12.000      none
    22.000      12.000   12.000      authority        the date of the Redis host was set: coast
    12.000      22.000   12.000      wall             the date of this machine was set: nothing follows from it
    22.000      22.000   12.000      monotonic        this machine slept for 10 s: take up the authority again
    22.000      22.000   12.000      authority        it did not sleep: Redis runs on it, and has the date that was set
    22.000      32.000   12.000      no majority      coast

The fourth and the fifth differ in what the machine knows of its own sleep. With Redis on the same machine its date and
the authority are one witness, and following them would close auctions early whenever somebody puts the clock forward.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import orjson

from engine.domain.instants import EpochMs

STEP_US: Final = 250_000
"""Above this a difference is a step, not drift: the drift bound of requirement R12."""


class Verdict(StrEnum):
    """The witness that left the other two."""

    NONE = "none"
    AUTHORITY = "authority"
    WALL = "wall"
    MONOTONIC = "monotonic"
    NO_MAJORITY = "no_majority"


def vote(
    authority_us: int, wall_us: int, monotonic_us: int, *, slack_us: int = 0, slept_us: int | None = None
) -> Verdict:
    """The odd one out by more than 250 ms, in microseconds since the Unix epoch.

    Two that differ are only held against each other if neither agrees with the third: along a slow drift each neighbour
    agrees with the next, and nobody can be named.

    Args:
        slack_us: by how much more the authority may be off because its answer was on its way.
        slept_us: how long the machine slept since the three last agreed, as it counts itself; None if it cannot tell.
    """
    near_wall = abs(authority_us - wall_us) <= STEP_US + slack_us
    near_monotonic = abs(authority_us - monotonic_us) <= STEP_US + slack_us
    machine_agrees = abs(wall_us - monotonic_us) <= STEP_US
    match near_wall, near_monotonic, machine_agrees:
        case False, False, False:
            return Verdict.NO_MAJORITY
        case False, False, True:
            return Verdict.AUTHORITY
        case False, True, False:
            return Verdict.WALL
        case True, False, False:
            awake = slept_us is not None and abs(authority_us - monotonic_us - slept_us) > STEP_US + slack_us
            return Verdict.AUTHORITY if awake else Verdict.MONOTONIC
        case _:
            return Verdict.NONE


@dataclass(frozen=True, slots=True)
class ClockReport:
    """What a process states about its clock.

    `offset_ms` is how far the auction clock is ahead of its wall clock, `uncertainty_ms` the bound of its estimate's own
    error, `error_ms` what is still to be slewed, `steps_refused` how many samples were too far off, `at` its auction clock.
    """

    role: str
    offset_ms: float
    uncertainty_ms: float
    error_ms: float
    steps_refused: int
    verdict: Verdict
    at: EpochMs

    def encode(self) -> bytes:
        """As JSON."""
        return orjson.dumps(self)


def read_report(body: bytes) -> ClockReport | None:
    """Read a statement back; None if it is none: a statement decides nothing alone, so what cannot be read is not there."""
    try:
        raw = orjson.loads(body)
        return ClockReport(
            str(raw["role"]),
            float(raw["offset_ms"]),
            float(raw["uncertainty_ms"]),
            float(raw["error_ms"]),
            int(raw["steps_refused"]),
            Verdict(raw["verdict"]),
            EpochMs(int(raw["at"])),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def is_contradicted(named: Verdict, others: list[Verdict]) -> bool:
    """Whether more processes find the authority right than find it wrong; one that is in doubt itself has no vote."""
    against = sum(other in (Verdict.NONE, Verdict.MONOTONIC) for other in others)
    return named is Verdict.AUTHORITY and against > sum(other is Verdict.AUTHORITY for other in others)
