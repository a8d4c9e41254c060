"""What a replay proves: what every auction should have done, folded from what the intake answered, against what it did.

The idea: `POST /events` answers with the stamp that decides (`arrival_ms`), and the engine's rules are one pure function. So
nothing has to be assumed about the network or the load: whatever the arrivals were, the ends must be those that
`engine.domain.fold` gives for them. A bid that came late because this machine was busy is judged as a late bid, as it was.

Equal arrivals are no ambiguity: events of one auction are posted one request after the other, and count in that order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from auction_timer.replay.plan import PlannedAuction, PlannedBid
from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.events import Register
from engine.domain.fold import elapse, fold
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.lifecycle import Status


@dataclass(frozen=True, slots=True)
class Ending:
    """A `timer.ended` frame as it was received."""

    server_time: EpochMs
    """When the gateway sent it."""
    ends_at: EpochMs
    ended_at: EpochMs | None


@dataclass(frozen=True, slots=True)
class Extending:
    """A `timer.extended` frame as it was received."""

    previous_ends_at: EpochMs
    ends_at: EpochMs


@dataclass(slots=True)
class Observed:
    """What was seen of one auction: the answers of the intake, the frames of its socket, and its timer at the end."""

    registered_at: EpochMs | None = None
    arrivals: list[tuple[PlannedBid, EpochMs]] = field(default_factory=list)
    """In the order in which they were posted."""
    endings: list[Ending] = field(default_factory=list)
    extendings: list[Extending] = field(default_factory=list)
    gaps: int = 0
    """Reconnects after which the gateway said that events are missing."""
    reconnects: int = 0
    final: dict[str, Any] | None = None
    """The timer as `GET /auctions/{id}/timer` answered after the end."""
    trouble: str | None = None
    """Why the auction could not be watched to its end."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the domain makes of an auction's events."""

    auction: Auction
    """After everything, the close included."""
    late_bids: int


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one auction. `faults` is empty if everything was as it should be."""

    auction_id: str
    item: str
    bids: int
    late_bids: int
    original_ends_at: EpochMs
    ends_at: EpochMs
    """The server's, or where that is unknown the expected one."""
    extension_count: int
    clipped_by: str | None
    lateness_ms: int | None
    """From the end to the sending of `timer.ended`; None if no such frame came."""
    early: bool
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay showed. `rows` are sorted by close."""

    speed: float
    elapsed_ms: int
    reconnects: int
    gaps: int
    """Reconnects after which the gateway said that events are missing."""
    resent: int
    """Requests that had to be sent once more."""
    rows: tuple[Row, ...]

    @property
    def faulty(self) -> tuple[Row, ...]:
        """The auctions that were not as they should be."""
        return tuple(row for row in self.rows if row.faults)

    @property
    def early_closes(self) -> int:
        """Auctions that were announced as ended before their end."""
        return sum(row.early for row in self.rows)

    @property
    def lateness_ms(self) -> tuple[int, ...]:
        """Of every close that was seen, ascending."""
        return tuple(sorted(row.lateness_ms for row in self.rows if row.lateness_ms is not None))

    @property
    def exit_code(self) -> int:
        """0 if everything was as it should be."""
        return 1 if self.faulty else 0


def expect(auction: PlannedAuction, seen: Observed) -> Expected:
    """Fold what the intake took, each at its arrival, and then all the time there is."""
    assert seen.registered_at is not None, f"{auction.auction_id} was never registered"
    unknown = Auction(auction.auction_id)
    decisions = fold(unknown, Register(auction.registration), seen.registered_at)
    standing = decisions[-1].after
    late_bids = 0
    for planned, arrival in seen.arrivals:
        decisions = fold(standing, planned.bid, arrival)
        late_bids += _late(decisions)
        standing = decisions[-1].after
    for decision in elapse(standing, EPOCH_MS_MAX):
        standing = decision.after
    return Expected(standing, late_bids)


def _late(decisions: Sequence[Decision]) -> int:
    return sum(decision.fact is Fact.LATE_BID_IGNORED for decision in decisions)


def judge(auction: PlannedAuction, seen: Observed) -> Row:
    """Compare what one auction did with what it should have done."""
    expected = expect(auction, seen)
    final = seen.final or {}
    early = any(ending.server_time < max(ending.ends_at, ending.ended_at or 0) for ending in seen.endings)
    faults = [
        *([seen.trouble] if seen.trouble else []),
        *_final_faults(expected.auction, final),
        *_ending_faults(seen, early=early),
        *_extending_faults(auction, seen, final),
    ]
    ending = seen.endings[0] if seen.endings else None
    return Row(
        auction_id=auction.auction_id,
        item=auction.past.item,
        bids=len(auction.bids),
        late_bids=expected.late_bids,
        original_ends_at=auction.registration.ends_at,
        ends_at=final.get("ends_at", expected.auction.ends_at),
        extension_count=final.get("extension_count", expected.auction.extension_count),
        clipped_by=final.get("clipped_by"),
        lateness_ms=None if ending is None else ending.server_time - (ending.ended_at or ending.ends_at),
        early=early,
        faults=tuple(faults),
    )


def _final_faults(expected: Auction, final: dict[str, Any]) -> list[str]:
    """The server's timer, field by field."""
    if not final:
        return ["its final timer could not be read"]
    clipped_by = None if expected.clipped_by is None else expected.clipped_by.value
    wanted = {
        "status": Status.ENDED.value,
        "original_ends_at": expected.registered.ends_at,
        "ends_at": expected.ends_at,
        "ended_at": expected.ended_at,
        "extension_count": expected.extension_count,
        "clipped_by": clipped_by,
    }
    return [
        f"{name} is {final.get(name)}, expected {value}" for name, value in wanted.items() if final.get(name) != value
    ]


def _ending_faults(seen: Observed, *, early: bool) -> list[str]:
    faults = []
    # After a gap the snapshot told of the end, and that events are missing: then none is right as well, two never are.
    least = 0 if seen.gaps else 1
    if not least <= len(seen.endings) <= 1:
        faults.append(f"timer.ended was received {len(seen.endings)} times")
    if early:
        faults.append("timer.ended was sent before the end")
    faults += [
        f"timer.ended says ended_at {ending.ended_at} for an end at {ending.ends_at}"
        for ending in seen.endings
        if ending.ended_at != ending.ends_at
    ]
    return faults


def _extending_faults(auction: PlannedAuction, seen: Observed, final: dict[str, Any]) -> list[str]:
    """The two limits of requirement R15, on what was announced and on what stands."""
    policy = auction.registration.policy
    faults = []
    for moved in seen.extendings:
        by_ms = moved.ends_at - moved.previous_ends_at
        if not 0 < by_ms <= policy.extension_ms:
            faults.append(f"an extension moved the end by {by_ms} ms, allowed are {policy.extension_ms}")
    ends = [moved.ends_at for moved in seen.extendings] + ([final["ends_at"]] if final else [])
    moved_ms = max(ends, default=auction.registration.ends_at) - auction.registration.ends_at
    if not 0 <= moved_ms <= policy.total_cap_ms:
        faults.append(f"the end moved by {moved_ms} ms in all, allowed are {policy.total_cap_ms}")
    announced, counted = len(seen.extendings), final.get("extension_count", len(seen.extendings))
    if announced != counted and not (seen.gaps and announced < counted):
        faults.append(f"timer.extended was received {announced} times for {counted} extensions")
    return faults


def percentile(ascending: Sequence[int], percent: float) -> int | None:
    """The nearest-rank percentile: the smallest value that `percent` % of all do not exceed; None of nothing."""
    if not ascending:
        return None
    return ascending[max(1, math.ceil(len(ascending) * percent / 100)) - 1]
