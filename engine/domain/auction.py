"""The state of one auction: what was registered, and what has happened to its clock since."""

from dataclasses import dataclass, field
from typing import Final

from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Cap, Policy

_UNSET: Final = EpochMs(0)


@dataclass(frozen=True, slots=True)
class Offer:
    """The commercial facts that came with the registration. Kept and handed on; only a withdrawal reads them."""

    offer_id: str | None = None
    owner_id: str | None = None
    maker_id: str | None = None
    buyer_id: str | None = None
    maker_delegate_ids: tuple[str, ...] = ()
    offer_created_at: EpochMs | None = None
    modification_window_minutes: int | None = None
    amount_minor: int | None = None
    currency: str | None = None
    auto_reject_threshold_minor: int | None = None


@dataclass(frozen=True, slots=True)
class Registration:
    """What `offers.auction.started` fixed for good. Two are the same registration iff they compare equal.

    Raises:
        ValueError: the schedule is inverted or outside the representable range.
    """

    auction_id: str
    starts_at: EpochMs
    ends_at: EpochMs
    """The *original* end: the total cap is measured from here for ever."""
    policy: Policy = field(default_factory=Policy)
    offer: Offer = field(default_factory=Offer)

    def __post_init__(self) -> None:
        if not 0 < self.starts_at < self.ends_at <= EPOCH_MS_MAX:
            raise ValueError(
                f"0 < starts_at < ends_at <= {EPOCH_MS_MAX} must hold, not {self.starts_at} and {self.ends_at}"
            )


@dataclass(frozen=True, slots=True)
class Auction:
    """An auction as the engine knows it. Immutable: a change is a new value with the next version.

    `registration` is None for an auction that was cancelled before it was registered (status `TOMBSTONE`).
    """

    auction_id: str
    status: Status = Status.UNREGISTERED
    version: int = 0
    registration: Registration | None = None
    ends_at: EpochMs = _UNSET
    extension_count: int = 0
    clipped_by: Cap | None = None
    paused_at: EpochMs | None = None
    paused_from: Status | None = None
    paused_total_ms: int = 0
    ended_at: EpochMs | None = None
    cancelled_at: EpochMs | None = None
    reason: str | None = None

    @property
    def registered(self) -> Registration:
        """The registration of an auction that has one."""
        assert self.registration is not None, f"{self.auction_id} is {self.status}: it has no registration"
        return self.registration

    @property
    def policy(self) -> Policy:
        """The frozen closing rules."""
        return self.registered.policy

    @property
    def base_ends_at(self) -> EpochMs:
        """The original end, moved by the time spent paused: paused time does not count against the total cap."""
        return EpochMs(self.registered.ends_at + self.paused_total_ms)

    @property
    def cap_ends_at(self) -> EpochMs:
        """The last end the total cap allows."""
        return EpochMs(self.base_ends_at + self.policy.total_cap_ms)

    @property
    def window_opens_at(self) -> EpochMs:
        """When the soft-close window opens: never before the start."""
        registration = self.registered
        return max(registration.starts_at, EpochMs(self.ends_at - registration.policy.soft_close_window_ms))

    @property
    def extension_used_ms(self) -> int:
        """How far the end stands after the original one, in ms."""
        return max(0, self.ends_at - self.base_ends_at)

    @property
    def extension_left_ms(self) -> int:
        """How much further bids can still move the end, in ms; 0 once a cap is reached."""
        if self._extensions_left == 0:
            return 0
        return max(0, self.cap_ends_at - self.ends_at)

    @property
    def at_cap(self) -> bool:
        """Whether no bid can move the end any more."""
        return self.extension_left_ms == 0

    @property
    def final_deadline(self) -> EpochMs:
        """The last possible end that bids can still bring about, under every cap at once (requirement B6)."""
        left = self._extensions_left
        if left is None:
            return self.cap_ends_at
        by_count = self.ends_at + left * self.policy.extension_ms
        return EpochMs(min(self.cap_ends_at, by_count))

    @property
    def _extensions_left(self) -> int | None:
        most = self.policy.max_extensions
        return None if most is None else max(0, most - self.extension_count)

    @property
    def paused_remaining_ms(self) -> int | None:
        """The remaining time that a pause froze, in ms; None while not paused."""
        return None if self.paused_at is None else self.ends_at - self.paused_at

    def remaining_ms(self, at: EpochMs) -> int:
        """The countdown at `at`, in ms: never negative, frozen while paused."""
        return max(0, self.ends_at - (at if self.paused_at is None else self.paused_at))
