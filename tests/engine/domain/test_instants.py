"""Tests for engine.domain.instants."""

from datetime import UTC, datetime, timedelta

from engine.domain.instants import EPOCH_MS_MAX, HOUR_MS, MINUTE_MS, SECOND_MS
from engine.domain.policy import EXTENSION_MS_MAX, TOTAL_CAP_MS_MAX


def test_durations_are_milliseconds() -> None:
    """A second, a minute and an hour are 1,000, 60,000 and 3,600,000."""
    assert (SECOND_MS, MINUTE_MS, HOUR_MS) == (1_000, 60_000, 3_600_000)


def test_the_last_instant_is_the_last_four_digit_year() -> None:
    """`EPOCH_MS_MAX` is 9999-12-31T23:59:59.999Z."""
    last = datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
    assert (last - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1) == EPOCH_MS_MAX


def test_no_extended_end_leaves_the_integers_a_double_holds() -> None:
    """The last representable schedule plus every cap stays below 2**53, which Lua and JavaScript hold exactly."""
    assert EPOCH_MS_MAX + TOTAL_CAP_MS_MAX + EXTENSION_MS_MAX < 2**53
