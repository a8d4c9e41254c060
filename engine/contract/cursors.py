"""Cursors: a place in the event lane of one shard, opaque to clients, `<shard>.<stream id>` to us.

A stream id is an order, never a time: after a clock step it may lie in the future or stand still (Redis keeps it
increasing, not true).
"""

import re
from dataclasses import dataclass
from typing import Final

_CURSOR: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,20})-([0-9]{1,20})")

_UINT64_MAX: Final = 2**64 - 1

START: Final = "0-0"
"""The stream id before every entry."""


def stream_order(stream_id: str) -> tuple[int, int]:
    """The sort key of a stream id: ids compare as a pair of integers, not as text."""
    ms, _, seq = stream_id.partition("-")
    return int(ms), int(seq)


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in `auction:updates:{shard}`."""

    shard: int
    stream_id: str

    def __str__(self) -> str:
        return f"{self.shard}.{self.stream_id}"

    @classmethod
    def parse(cls, text: str) -> "Cursor | None":
        """Read a cursor that came from outside; None if it is none of ours."""
        match = _CURSOR.fullmatch(text)
        if match is None:
            return None
        ms, seq = int(match[2]), int(match[3])
        return cls(int(match[1]), f"{ms}-{seq}") if max(ms, seq) <= _UINT64_MAX else None
