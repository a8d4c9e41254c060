"""The schedule of a replay: which events, and when each is due, on the auction clock.

All auctions start at the same instant, and every duration is divided by the same number: those of the auctions, those of the
bids, and those of the policy. So what extended an auction by five minutes then extends it by 300 s / N now, and a replay at
speed 7,200 plays a week in 84 seconds with a soft-close window of 125 ms.

Worked example, speed 7,200, start at S: an auction of 7 days ends at S + 84,000 ms. A bid at 6.999 days (86.4 s before the
end) is due at S + 83,988 ms; it moves the end to at least its own arrival + 125 ms.

One duration does not shrink: `tick_interval_ms`, which says how often people look, not how auctions run.
"""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from auction_timer.replay.history import PastAuction
from engine.contract.intake import AUCTION_ID, EventType
from engine.domain.auction import Registration
from engine.domain.events import Bid
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.policy import ExtensionMode, Policy

DAY_MS: Final = 24 * HOUR_MS
SPEED_MAX: Final = 10_000_000
"""A week in 60 ms. Beyond, nothing but the network would be measured."""
SOURCE: Final = "auction-timer.replay"
AUCTION_ID_CHARS_MAX: Final = 112
"""An event's id is the auction's and what happened to it, `:bid-5000000` at most, in 128 characters."""

EventBody = dict[str, Any]


class PlanError(ValueError):
    """The history cannot be played like this."""


@dataclass(frozen=True, slots=True)
class PastPolicy:
    """The closing rules in the history's own time, before compression."""

    window_ms: int = 15 * MINUTE_MS
    extension_ms: int = 15 * MINUTE_MS
    mode: ExtensionMode = ExtensionMode.RESET_TO
    total_cap_ms: int = 24 * HOUR_MS
    max_extensions: int | None = None

    def compressed(self, speed: float) -> Policy:
        """The rules to register: durations divided by `speed`, an extension by no more than leaves it 1 ms.

        Raises:
            PlanError: the domain does not allow them; the message names the field and the bound.
        """
        try:
            return Policy(
                soft_close_window_ms=_shrunk(self.window_ms, speed),
                extension_ms=max(1, _shrunk(self.extension_ms, speed)),
                mode=self.mode,
                total_cap_ms=_shrunk(self.total_cap_ms, speed),
                max_extensions=self.max_extensions,
            )
        except ValueError as error:
            raise PlanError(f"at speed {speed:g}: {error}") from None


@dataclass(frozen=True, slots=True)
class PlannedBid:
    """A bid and when it is due, in ms after the start."""

    auction_id: str
    due_ms: int
    event_id: str
    bid: Bid

    def event(self) -> EventBody:
        """As the intake takes it."""
        detail = {
            "auction_id": self.auction_id,
            "bid_id": self.bid.bid_id,
            "amount_minor": self.bid.amount_minor,
            "bidder_id": self.bid.bidder_id,
            "leader_changed": self.bid.leader_changed,
        }
        return {
            "id": self.event_id,
            "detail-type": EventType.BID_ACCEPTED.value,
            "source": SOURCE,
            "detail": detail,
        }


@dataclass(frozen=True, slots=True)
class PlannedAuction:
    """An auction to be registered, with its bids in the order in which they are sent."""

    past: PastAuction
    registration: Registration
    bids: tuple[PlannedBid, ...]

    @property
    def auction_id(self) -> str:
        """Its id in this run."""
        return self.registration.auction_id

    def event(self) -> EventBody:
        """Its registration, as the intake takes it."""
        registration, policy = self.registration, self.registration.policy
        frozen: dict[str, Any] = {
            "soft_close_window_ms": policy.soft_close_window_ms,
            "extension_ms": policy.extension_ms,
            "mode": policy.mode.value,
            "total_cap_ms": policy.total_cap_ms,
        }
        if policy.max_extensions is not None:
            frozen["max_extensions"] = policy.max_extensions
        detail = {
            "auction_id": registration.auction_id,
            "starts_at": registration.starts_at,
            "ends_at": registration.ends_at,
            "policy": frozen,
        }
        return {
            "id": f"{registration.auction_id}:start",
            "detail-type": EventType.AUCTION_STARTED.value,
            "source": SOURCE,
            "detail": detail,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played. `bids` are those of all auctions in the order in which they are due."""

    speed: float
    starts_at: EpochMs
    auctions: tuple[PlannedAuction, ...]
    bids: tuple[PlannedBid, ...] = field(repr=False)

    @property
    def ends_at(self) -> EpochMs:
        """The last end before any extension."""
        return EpochMs(max(auction.registration.ends_at for auction in self.auctions))


def make_plan(
    history: tuple[PastAuction, ...],
    *,
    starts_at: EpochMs,
    speed: float,
    policy: PastPolicy,
    prefix: str,
) -> Plan:
    """Plan a run.

    Args:
        starts_at: of every auction.
        speed: how many times faster than it was.
        prefix: goes before every auction id, and so makes the ids of this run its own.

    Raises:
        PlanError: the speed or the policy is out of bounds, or an id with its prefix is no auction id.
    """
    if not 0 < speed <= SPEED_MAX:
        raise PlanError(f"speed must be more than 0 and at most {SPEED_MAX}, not {speed:g}")
    frozen = policy.compressed(speed)
    auctions = tuple(_planned(past, starts_at, speed, frozen, prefix) for past in history)
    # Stable: bids that are due in the same millisecond stay in the order of their auction.
    bids = sorted((bid for auction in auctions for bid in auction.bids), key=lambda bid: bid.due_ms)
    return Plan(speed, starts_at, auctions, tuple(bids))


def _planned(past: PastAuction, starts_at: EpochMs, speed: float, policy: Policy, prefix: str) -> PlannedAuction:
    auction_id = f"{prefix}-{past.auction_id}"
    if not AUCTION_ID.fullmatch(auction_id) or len(auction_id) > AUCTION_ID_CHARS_MAX:
        wanted = f"it must be 1-{AUCTION_ID_CHARS_MAX} characters of A-Z a-z 0-9 . _ : -"
        raise PlanError(f"{auction_id[:160]!r} is no auction id: {wanted}")
    duration_ms = max(1, _shrunk_days(past.duration_days, speed))
    try:
        registration = Registration(auction_id, starts_at, EpochMs(starts_at + duration_ms), policy)
    except ValueError as error:
        raise PlanError(f"auction {past.auction_id} at speed {speed:g}: {error}") from None
    bids = tuple(
        PlannedBid(
            auction_id,
            _shrunk_days(bid.at_days, speed),
            f"{auction_id}:bid-{number}",
            Bid(
                bid_id=f"bid-{number}",
                amount_minor=bid.amount_minor,
                bidder_id=bid.bidder,
                leader_changed=bid.leader_changed,
            ),
        )
        for number, bid in enumerate(past.bids, start=1)
    )
    return PlannedAuction(past, registration, bids)


def _shrunk(duration_ms: int, speed: float) -> int:
    return round(duration_ms / speed)


def _shrunk_days(days: Decimal, speed: float) -> int:
    return round(days * DAY_MS / Decimal(speed))
