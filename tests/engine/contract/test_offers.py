"""Tests for engine.contract.offers."""

import pytest

from engine.contract.offers import BOUND_TO_AUCTION, CANCELLED_BEFORE_START, auction_bound_in


@pytest.mark.requirement("R19")
@pytest.mark.parametrize(
    ("value", "auction_id"),
    [
        (None, None),
        ("", None),
        (BOUND_TO_AUCTION + "lot-7", "lot-7"),
        (BOUND_TO_AUCTION + "auction 7", "auction 7"),
        (CANCELLED_BEFORE_START + '{"reason":"auction lot-7"}', None),
        ("auctions lot-7", None),
    ],
)
def test_an_offer_stands_for_an_auction_or_for_none(value: str | None, auction_id: str | None) -> None:
    """Only a binding names an auction; a cancellation that waits for its start, or nothing at all, does not."""
    assert auction_bound_in(value) == auction_id
