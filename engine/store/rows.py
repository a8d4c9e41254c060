"""Timers as stores find them: rows of `engine.contract.timers.FIELDS`, or something else under a timer's name."""

from collections.abc import Mapping, Sequence

from engine.contract.timers import (
    CorruptTimerError,
    TimerRecord,
    UnsealedTimerError,
    from_row,
    is_sealed,
    read_row,
    read_sealed_row,
)
from engine.store.protocol import Group, Standing

Row = Sequence[bytes | None] | None
"""The values of a timer hash, in the order of `FIELDS`; None if its key is of another type."""


def timer_in(auction_id: str, row: Row) -> TimerRecord | CorruptTimerError | None:
    """What an engine may take it for. A sound hash of another auction is damage here, however it came to this name."""
    if row is None:
        return _of_another_type(auction_id)
    found = read_sealed_row(row)
    record = found.record if isinstance(found, UnsealedTimerError) else found
    if isinstance(record, TimerRecord) and record.auction.auction_id != auction_id:
        return CorruptTimerError(f"timer {auction_id!r}: it is that of {record.auction.auction_id!r}")
    return found


def standing_in(auction_id: str, row: Row, scores: Mapping[Group, int]) -> Standing:
    """What is kept of an auction, as it is."""
    if row is None:
        return Standing(_of_another_type(auction_id), scores)
    return Standing(read_row(row), scores, is_sealed(row))


def shown_in(auction_id: str, row: Row) -> TimerRecord | None:
    """What people may be shown of it.

    Raises:
        CorruptTimerError: there is something, and it cannot be read.
    """
    if row is None:
        raise _of_another_type(auction_id)
    return from_row(row)


def _of_another_type(auction_id: str) -> CorruptTimerError:
    return CorruptTimerError(f"timer {auction_id!r}: its key is of another type")
