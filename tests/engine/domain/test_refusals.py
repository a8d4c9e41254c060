"""Tests for engine.domain.refusals."""

from dataclasses import FrozenInstanceError

import pytest

from engine.domain.refusals import Refusal, RefusalCode

PUBLISHED = {
    "UNKNOWN_AUCTION",
    "CONFLICTING_REGISTRATION",
    "FSM_TRANSITION_INVALID",
    "FSM_TERMINAL_IMMUTABLE",
    "SCHEDULE_IN_PAST",
    "SCHEDULE_BEFORE_START",
    "SCHEDULE_BEYOND_CAP",
    "WINDOW_EXPIRED",
    "ALREADY_CANCELLED",
    "AUCTION_CLOSED",
}


@pytest.mark.requirement("R25")
def test_the_codes_are_the_published_ones() -> None:
    """A code is its own spelling on the wire, and none has been renamed or dropped."""
    assert {code.value for code in RefusalCode} == PUBLISHED
    assert {code.name for code in RefusalCode} == PUBLISHED


def test_a_refusal_is_a_value() -> None:
    """Two refusals that say the same are equal, and neither can be edited."""
    one = Refusal(RefusalCode.UNKNOWN_AUCTION, "no auction a", "UNREGISTERED", "CLOSING")
    assert one == Refusal(RefusalCode.UNKNOWN_AUCTION, "no auction a", "UNREGISTERED", "CLOSING")
    with pytest.raises(FrozenInstanceError):
        one.message = "something else"  # type: ignore[misc]
