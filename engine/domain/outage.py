"""The outage guard: an auction that nobody could bid in near its end gets the time back (requirement B8).

The extension counts from before the end: from the last instant of the outage at which the auction was not over. It is
bounded as any extension is: at most 15 minutes, and never past the total cap. The cap on the *number* of extensions
is about bids, and does not count here.

Worked example: the end is 12:00, the window 15 minutes, the extension 2 minutes. Nobody could bid from 11:58 to 12:01.
The end becomes 12:03, two minutes from where the outage ended. Had it lasted from 11:50 to 11:55, it would become 12:02.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.fold import elapse
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import EXTENSION_MS_MAX, Cap

OVERLAP_MS_MAX: Final = 5_000
"""So much of its closing window an auction may lose without getting it back: a deploy, a failover."""
REASON: Final = "outage"


def is_hit(auction: Auction, since: EpochMs, until: EpochMs) -> bool:
    """Whether an outage took more of an auction's closing window than it may."""
    if auction.status not in (Status.SCHEDULED, Status.ACTIVE, Status.CLOSING):
        return False
    return min(until, auction.ends_at) - max(since, auction.window_opens_at) > OVERLAP_MS_MAX


def extend_over(auction: Auction, since: EpochMs, until: EpochMs, extension_ms: int) -> Iterator[Decision]:
    """What an outage does to an auction, in order: what was due before, then the extension. Nothing if it was not hit."""
    if not is_hit(auction, since, until):
        return
    at = EpochMs(min(until, auction.ends_at - 1))
    for decision in elapse(auction, at):
        auction = decision.after
        yield decision
    proposed, clipped_by = max(auction.ends_at, until) + extension_ms, None
    if proposed > auction.ends_at + EXTENSION_MS_MAX:
        proposed, clipped_by = auction.ends_at + EXTENSION_MS_MAX, Cap.INCREMENT
    if proposed > auction.cap_ends_at:
        proposed, clipped_by = max(auction.ends_at, auction.cap_ends_at), Cap.TOTAL
    if proposed == auction.ends_at:
        return
    after = replace(auction, version=auction.version + 1, ends_at=EpochMs(proposed), clipped_by=clipped_by)
    yield Decision(
        auction,
        after,
        at,
        Fact.OUTAGE_EXTENDED,
        details={
            "reason": REASON,
            "previous_ends_at": auction.ends_at,
            "ends_at": after.ends_at,
            "clipped_by": clipped_by.value if clipped_by else None,
            "outage_since": since,
            "outage_until": until,
            "extension_ms": extension_ms,
        },
    )
