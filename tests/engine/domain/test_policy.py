"""Tests for engine.domain.policy."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.domain import policy as policy_module
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.policy import Cap, ExtendsOn, Extension, ExtensionMode, Policy, extension
from tests.engine.domain.strategies import policies

NOON = EpochMs(1_800_000_000_000)


def minutes(count: int) -> EpochMs:
    """The instant `count` minutes after noon."""
    return EpochMs(NOON + count * MINUTE_MS)


TOMORROW = minutes(24 * 60)


def extend(policy: Policy, arrival: EpochMs, *, cap_ends_at: EpochMs = TOMORROW, count: int = 0) -> Extension:
    """The extension of an auction that ends at noon."""
    return extension(policy, ends_at=NOON, cap_ends_at=cap_ends_at, count=count, arrival=arrival)


@pytest.mark.requirement("B6")
def test_the_defaults_are_the_promised_ones() -> None:
    """Unless a registration says otherwise: 15 min window, reset to 15 min, at most 24 h, ticks every 15 s."""
    assert Policy() == Policy(
        soft_close_window_ms=900_000,
        extension_ms=900_000,
        mode=ExtensionMode.RESET_TO,
        total_cap_ms=86_400_000,
        max_extensions=None,
        extends_on=ExtendsOn.LEADER_CHANGED,
        tick_interval_ms=15_000,
    )


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("soft_close_window_ms", 0, 24 * HOUR_MS),
        ("extension_ms", 1, 15 * MINUTE_MS),
        ("total_cap_ms", 0, 24 * HOUR_MS),
        ("tick_interval_ms", 100, 15_000),
        ("max_extensions", 0, 86_400),
    ],
)
def test_every_number_has_bounds(field: str, least: int, most: int) -> None:
    """Both bounds are allowed; one less or one more is refused with the field's name and its bounds."""
    for allowed in (least, most):
        assert getattr(Policy(**_with(field, allowed)), field) == allowed
    for refused in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"^{field} must be between {least} and {most}, not {refused}$"):
            Policy(**_with(field, refused))


def _with(field: str, value: int) -> dict[str, Any]:
    return {field: value}


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(
    ("mode", "arrival", "end"),
    [
        (ExtensionMode.RESET_TO, minutes(-10), minutes(5)),
        (ExtensionMode.ADD, minutes(-10), minutes(15)),
        (ExtensionMode.RESET_TO, minutes(-15), NOON),
        (ExtensionMode.RESET_TO, minutes(-20), NOON),
        (ExtensionMode.RESET_TO, EpochMs(NOON - 1), EpochMs(minutes(15) - 1)),
        (ExtensionMode.ADD, EpochMs(NOON - 1), minutes(15)),
    ],
)
def test_the_worked_examples(mode: ExtensionMode, arrival: EpochMs, end: EpochMs) -> None:
    """`reset_to` leaves at least 15 minutes after the bid, `add` puts 15 minutes on the end; nothing is clipped."""
    assert extend(Policy(mode=mode), arrival) == Extension(end, None)


@pytest.mark.requirement("B6")
def test_the_total_cap_clips_and_is_named() -> None:
    """An end past the total cap is cut back to it, and the cap is named; at the cap nothing moves, still named."""
    policy = Policy(mode=ExtensionMode.ADD)
    assert extend(policy, minutes(-1), cap_ends_at=minutes(15)) == Extension(minutes(15), None)
    assert extend(policy, minutes(-1), cap_ends_at=minutes(14)) == Extension(minutes(14), Cap.TOTAL)
    assert extend(policy, minutes(-1), cap_ends_at=NOON) == Extension(NOON, Cap.TOTAL)


def test_an_end_past_its_cap_is_not_pulled_back() -> None:
    """A cap that lies before the standing end stops an extension; it never shortens the auction."""
    assert extend(Policy(), minutes(-1), cap_ends_at=minutes(-5)) == Extension(NOON, Cap.TOTAL)


@pytest.mark.requirement("B6")
@pytest.mark.parametrize(("count", "expected"), [(1, Extension(minutes(15), None)), (2, Extension(NOON, Cap.COUNT))])
def test_the_count_cap_stops_and_is_named(count: int, expected: Extension) -> None:
    """With two extensions allowed the second one is made and the third one is not, and the cap is named."""
    assert extend(Policy(mode=ExtensionMode.ADD, max_extensions=2), minutes(-1), count=count) == expected


def test_a_bid_that_needs_no_time_is_not_clipped() -> None:
    """Where the proposal is the end that stands, no cap is named, whatever the caps are."""
    policy = Policy(max_extensions=0, total_cap_ms=0)
    assert extend(policy, minutes(-15), cap_ends_at=NOON) == Extension(NOON, None)


@pytest.mark.requirement("R15")
@pytest.mark.parametrize("mode", ExtensionMode)
def test_the_increment_cap_holds_where_the_end_is_computed(
    mode: ExtensionMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that asks for more than the increment cap moves the end by the cap only, which is named."""
    policy = Policy(mode=mode)
    monkeypatch.setattr(policy_module, "EXTENSION_MS_MAX", 5 * MINUTE_MS)
    assert extend(policy, EpochMs(NOON - 1)) == Extension(minutes(5), Cap.INCREMENT)
    assert extend(policy, EpochMs(NOON - 1), cap_ends_at=minutes(4)) == Extension(minutes(4), Cap.TOTAL)


@pytest.mark.requirement("R15")
@settings(max_examples=200, deadline=None)
@given(
    policy=policies(),
    left_ms=st.one_of(st.integers(1, 20 * MINUTE_MS), st.integers(1, 24 * HOUR_MS)),
    room_ms=st.one_of(st.integers(0, 20 * MINUTE_MS), st.integers(0, 24 * HOUR_MS)),
    count=st.integers(0, 4),
)
def test_an_extension_stays_inside_every_bound(policy: Policy, left_ms: int, room_ms: int, count: int) -> None:
    """The end never moves back, nor by more than 15 min, nor past the cap; a cap is named iff one cut the proposal."""
    cap_ends_at = EpochMs(NOON + room_ms)
    moved = extend(policy, EpochMs(NOON - left_ms), cap_ends_at=cap_ends_at, count=count)
    wanted_ms = policy.extension_ms if policy.mode is ExtensionMode.ADD else max(0, policy.extension_ms - left_ms)
    moved_ms = moved.ends_at - NOON
    assert 0 <= moved_ms <= min(wanted_ms, 15 * MINUTE_MS, room_ms)
    assert (moved.clipped_by is not None) == (moved_ms < wanted_ms)
    assert (moved.clipped_by is Cap.COUNT) == (
        wanted_ms > 0 and count >= (policy.max_extensions or 0) and _counts(policy)
    )


def _counts(policy: Policy) -> bool:
    return policy.max_extensions is not None
