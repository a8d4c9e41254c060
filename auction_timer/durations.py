"""Durations as people write them on a command line: `15m`, `90s`, `250ms`, `1.5h`, `2d`."""

import re
from decimal import Decimal
from typing import Final

from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS

_UNITS: Final = {"ms": 1, "s": SECOND_MS, "m": MINUTE_MS, "h": HOUR_MS, "d": 24 * HOUR_MS}
_DURATION: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")


def read_duration(text: str) -> int:
    """A duration in ms.

    Raises:
        ValueError: it is none, or not a whole number of milliseconds.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: write a number and ms, s, m, h or d, such as 15m or 250ms")
    value = Decimal(match[1]) * _UNITS[match[2]]
    if value != value.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number of milliseconds")
    return int(value)
