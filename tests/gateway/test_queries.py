"""Tests for gateway.queries."""

import pytest

from gateway.problems import Problem, ProblemType
from gateway.queries import LIMIT_DEFAULT, LIMIT_MAX, integer_of, limit_of


@pytest.mark.parametrize(
    ("text", "value"), [(None, None), ("3", 3), ("9", 9), ("007", 7), ("0000000000000003", 3)]
)  # fmt: skip
def test_an_integer_within_its_bounds_is_read(text: str | None, value: int | None) -> None:
    """An absent one is None, and the bounds are part of it."""
    assert integer_of("n", text, 3, 9) == value


@pytest.mark.parametrize(
    "text", ["", " 3", "3 ", "2", "10", "-3", "+3", "3.0", "3e0", "0x3", "٣", "³", "1_0", "x", "3" * 17, "0" * 17 + "3"]
)
def test_anything_else_is_an_invalid_parameter_that_is_named(text: str) -> None:
    """Python reads more spellings of a number than a query may have."""
    with pytest.raises(Problem) as raised:
        integer_of("n", text, 3, 9)
    assert raised.value.type is ProblemType.INVALID_PARAMETER
    assert raised.value.extra == {"parameter": "n"}
    assert raised.value.detail == "n must be an integer from 3 to 9"


def test_a_page_has_a_length_of_its_own_or_the_default() -> None:
    """One to the most, and the default where nobody says."""
    assert (limit_of(None), limit_of("1"), limit_of(str(LIMIT_MAX))) == (LIMIT_DEFAULT, 1, LIMIT_MAX)
    for text in ("0", str(LIMIT_MAX + 1)):
        with pytest.raises(Problem):
            limit_of(text)
