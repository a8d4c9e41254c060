"""Instants as people write them on a command line: RFC 3339, or epoch ms."""

import re
from datetime import UTC, datetime, timedelta

from engine.domain.instants import EPOCH_MS_MAX, EpochMs

_EPOCH_MS = re.compile(r"[0-9]{1,15}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read_instant(text: str) -> EpochMs:
    """An instant in epoch ms; what RFC 3339 writes below a millisecond is cut off.

    Raises:
        ValueError: it is none, or it has no offset from UTC.
    """
    text = text.strip()
    if _EPOCH_MS.fullmatch(text):
        at = int(text)
    else:
        try:
            instant = datetime.fromisoformat(text.upper())
        except ValueError:
            raise ValueError(
                f"{text!r} is no instant: write 2026-03-01T12:00:00Z, or milliseconds since 1970"
            ) from None
        if instant.tzinfo is None:
            raise ValueError(f"{text!r} does not say in which time zone: add Z or an offset such as +02:00")
        at = (instant - _EPOCH) // timedelta(milliseconds=1)
    if not 0 <= at <= EPOCH_MS_MAX:
        raise ValueError(f"{text!r} is not between 1970 and 9999")
    return EpochMs(at)
