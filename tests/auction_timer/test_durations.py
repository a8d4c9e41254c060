"""Durations of the command line."""

import pytest

from auction_timer.durations import read_duration


@pytest.mark.parametrize(
    ("text", "ms"),
    [("15m", 900_000), ("250ms", 250), ("1.5h", 5_400_000), ("2d", 172_800_000), (" 90s ", 90_000), ("0s", 0)],
)
def test_a_number_and_a_unit_is_a_duration(text: str, ms: int) -> None:
    """Every unit is read, also with a fraction."""
    assert read_duration(text) == ms


@pytest.mark.parametrize("text", ["15", "m", "1.5ms", "-1s", "1 m", "1w", "", "1e3s", "٣s"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    """What is no duration, or no whole millisecond, is a ValueError."""
    with pytest.raises(ValueError, match=r"such as 15m|milliseconds"):
        read_duration(text)
