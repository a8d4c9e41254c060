"""What an offer id stands for in a shard: the value of `auction:offer:{k}:<offer_id>`.

auction <auction id> <arrival>   the auction that was registered with the offer, and when its start arrived, in ms
cancelled <JSON>                 a cancellation that came before any start named the offer (requirement R19)
"""

from dataclasses import dataclass
from typing import Final

BOUND_TO_AUCTION: Final = "auction "
CANCELLED_BEFORE_START: Final = "cancelled "


@dataclass(frozen=True, slots=True, order=True)
class Bound:
    """An auction that was registered with an offer. Of two, the greater one was registered later.

    `at` is when its start arrived: by it, bindings of different shards are compared.
    """

    at: int
    auction_id: str


def binding(auction_id: str, at: int) -> str:
    """The value that binds an offer to an auction."""
    return f"{BOUND_TO_AUCTION}{auction_id} {at}"


def bound_in(value: str | None) -> Bound | None:
    """What a binding names; None if it names no auction. One without an arrival is older than every other."""
    if value is None or not value.startswith(BOUND_TO_AUCTION):
        return None
    auction_id, _, at = value.removeprefix(BOUND_TO_AUCTION).partition(" ")
    return Bound(int(at) if at.isdecimal() else 0, auction_id)


def auction_bound_in(value: str | None) -> str | None:
    """The auction that a binding names; None if it names none."""
    bound = bound_in(value)
    return None if bound is None else bound.auction_id
