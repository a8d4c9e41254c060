"""Soft close: how far an accepted bid near the end moves the end, and which cap stops it.

The idea in one line: an extension *proposes* a new end, then three caps are applied in turn, and the one that cut the
proposal is named.

Worked example (defaults: window 15 min, extension 15 min, `reset_to`, total cap 24 h). The auction ends at 12:00. A bid
arrives at 11:50, inside the window, so the end becomes at least 11:50 + 15 min = 12:05: it moved by 5 minutes. In `add`
mode the same bid would have moved it to 12:15. A bid at 11:40 is outside the window and moves nothing.

    cap          bound                                          named
    count        `max_extensions` (optional)                    "count"
    increment    15 min for one extension (requirement R15)     "increment"
    total        `total_cap_ms` <= 24 h from the original end   "total"
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS, EpochMs

EXTENSION_MS_MAX: Final = 15 * MINUTE_MS
TOTAL_CAP_MS_MAX: Final = 24 * HOUR_MS
# A window longer than the longest total movement would keep an auction in its closing phase for no benefit.
SOFT_CLOSE_WINDOW_MS_MAX: Final = 24 * HOUR_MS
TICK_INTERVAL_MS_MAX: Final = 15 * SECOND_MS
# Ten ticks a second is more than a person can read; below it ticks would crowd out the events.
TICK_INTERVAL_MS_MIN: Final = 100
# 24 h of one-second extensions. More could never be used; the bound keeps a typo from reading as "unlimited".
MAX_EXTENSIONS_MAX: Final = 86_400


class ExtensionMode(StrEnum):
    """How an extension computes the new end."""

    RESET_TO = "reset_to"
    """The end becomes at least arrival + extension (Zora's and Nouns' rule; the most common one in the field)."""
    ADD = "add"
    """The end moves by the full extension, whatever time is left."""


class ExtendsOn(StrEnum):
    """Which accepted bids extend."""

    LEADER_CHANGED = "leader_changed"
    """Only a bid that changed the leader: nobody stalls an auction by raising his own ceiling."""
    ANY_ACCEPTED = "any_accepted"


class Cap(StrEnum):
    """The cap that clipped an extension."""

    COUNT = "count"
    INCREMENT = "increment"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Policy:
    """The closing rules of one auction, frozen at its registration (requirement B6).

    Raises:
        ValueError: a value is outside its bound; the message names the field and the bound.
    """

    soft_close_window_ms: int = 15 * MINUTE_MS
    extension_ms: int = 15 * MINUTE_MS
    mode: ExtensionMode = ExtensionMode.RESET_TO
    total_cap_ms: int = TOTAL_CAP_MS_MAX
    max_extensions: int | None = None
    extends_on: ExtendsOn = ExtendsOn.LEADER_CHANGED
    tick_interval_ms: int = TICK_INTERVAL_MS_MAX

    def __post_init__(self) -> None:
        _check("soft_close_window_ms", self.soft_close_window_ms, 0, SOFT_CLOSE_WINDOW_MS_MAX)
        _check("extension_ms", self.extension_ms, 1, EXTENSION_MS_MAX)
        _check("total_cap_ms", self.total_cap_ms, 0, TOTAL_CAP_MS_MAX)
        _check("tick_interval_ms", self.tick_interval_ms, TICK_INTERVAL_MS_MIN, TICK_INTERVAL_MS_MAX)
        if self.max_extensions is not None:
            _check("max_extensions", self.max_extensions, 0, MAX_EXTENSIONS_MAX)


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, not {value}")


@dataclass(frozen=True, slots=True)
class Extension:
    """What one bid did to the end. `ends_at` equals the old end where nothing moved."""

    ends_at: EpochMs
    clipped_by: Cap | None


def extension(policy: Policy, *, ends_at: EpochMs, cap_ends_at: EpochMs, count: int, arrival: EpochMs) -> Extension:
    """Compute the end after a qualifying bid at `arrival`.

    Args:
        ends_at: the end that stands, later than `arrival`.
        cap_ends_at: the last end the total cap allows.
        count: extensions so far.
    """
    if policy.mode is ExtensionMode.ADD:
        proposed = ends_at + policy.extension_ms
    else:
        proposed = max(ends_at, arrival + policy.extension_ms)
    if proposed == ends_at:
        return Extension(ends_at, None)
    if policy.max_extensions is not None and count >= policy.max_extensions:
        return Extension(ends_at, Cap.COUNT)
    clipped_by: Cap | None = None
    # `extension_ms` is bounded at construction, so this cap cuts only if that bound is ever raised: the two limits of
    # requirement R15 stay enforced where the end is computed, not where the policy was accepted.
    if proposed > ends_at + EXTENSION_MS_MAX:
        proposed, clipped_by = ends_at + EXTENSION_MS_MAX, Cap.INCREMENT
    if proposed > cap_ends_at:
        proposed, clipped_by = max(ends_at, cap_ends_at), Cap.TOTAL
    return Extension(EpochMs(proposed), clipped_by)
