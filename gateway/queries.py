"""What a request asks for in its query string."""

from typing import Final

from gateway.problems import Problem, ProblemType

LIMIT_MAX: Final = 500
LIMIT_DEFAULT: Final = 50


def invalid(name: str, wanted: str) -> Problem:
    """400: a parameter is not what it must be."""
    return Problem(ProblemType.INVALID_PARAMETER, f"{name} {wanted}", extra={"parameter": name})


def integer_of(name: str, text: str | None, least: int, most: int) -> int | None:
    """A parameter as an integer; None if it is absent.

    Raises:
        Problem: `INVALID_PARAMETER`.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and least <= int(text) <= most):
        raise invalid(name, f"must be an integer from {least} to {most}")
    return int(text)


def limit_of(text: str | None) -> int:
    """How many are wanted on a page."""
    return integer_of("limit", text, 1, LIMIT_MAX) or LIMIT_DEFAULT
