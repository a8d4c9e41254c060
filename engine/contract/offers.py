"""What an offer id stands for in a shard: the value of `auction:offer:{k}:<offer_id>`.

auction <auction id>     the auction that was registered with the offer
cancelled <JSON>         a cancellation that came before any start named the offer (requirement R19)
"""

from typing import Final

BOUND_TO_AUCTION: Final = "auction "
CANCELLED_BEFORE_START: Final = "cancelled "


def auction_bound_in(value: str | None) -> str | None:
    """The auction that a binding names; None if it names none."""
    if value is None or not value.startswith(BOUND_TO_AUCTION):
        return None
    return value.removeprefix(BOUND_TO_AUCTION)
