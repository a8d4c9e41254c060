"""Instants and durations of the domain.

An `EpochMs` is a point on the auction clock (integer milliseconds since the Unix epoch). Durations are plain `int`
milliseconds whose names end in `_ms`. The domain never learns what time it is; it is told.
"""

from typing import Final, NewType

EpochMs = NewType("EpochMs", int)

SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS

# The last instant RFC 3339 can write with a four-digit year (9999-12-31T23:59:59.999Z): a bound, so that no sum of a
# schedule and its caps leaves the integers that Lua's doubles and JavaScript's numbers hold exactly (2**53).
EPOCH_MS_MAX: Final = EpochMs(253_402_300_799_999)
