"""Corrections: what is kept of an auction is brought back to what the log says of it.

A correction is no transition. In the log nothing has happened; a hash, a sorted set or a memory had come to say something
else. So there is no cell for it in the life-cycle table, and two rules bound what it can do:

1. What has been decided since the log was read stands. Every change raises the version, so whoever holds a higher version
   than the log had is ahead of it, and a close that was recorded is never taken back.
2. It counts as a change, with a version above every one that anybody was shown, so that whoever saw the wrong values sees
   the right ones replace them.

Worked example: the log has version 5, ends_at 100. By hand the hash was made version 9, ends_at 90. The engine still holds
version 5, ends_at 100: that stands, as version 10.
"""

from dataclasses import replace
from typing import Final

from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.instants import EpochMs

VERSION_MAX: Final = 2**52
"""A found version above this is damage itself, and is not counted on from: versions cross readers of JSON doubles."""


def true_one(held: Auction | None, said: Auction | None) -> Auction | None:
    """Which of two states stands: what an engine holds, or what the log said when it was read; None if there is neither."""
    if held is None or said is None:
        return held or said
    return said if held.version <= said.version else held


def correct(
    auction: Auction, at: EpochMs, *, cause: str, found_version: int, found_ends_at: EpochMs | None
) -> Decision:
    """State anew what stands, above the version and instead of the end that were found; either may be unknown."""
    found = found_version if 0 <= found_version < VERSION_MAX else 0
    after = replace(auction, version=max(auction.version, found) + 1)
    return Decision(
        auction,
        after,
        at,
        Fact.CORRECTED,
        details={
            "cause": cause,
            "previous_ends_at": found_ends_at,
            "ends_at": after.ends_at,
            "found_version": found_version,
        },
    )
