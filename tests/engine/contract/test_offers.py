"""Tests for engine.contract.offers."""

import pytest

from engine.contract.offers import (
    BOUND_TO_AUCTION,
    CANCELLED_BEFORE_START,
    Bound,
    auction_bound_in,
    binding,
    bound_in,
)


@pytest.mark.requirement("R19")
@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (None, None),
        ("", None),
        (binding("lot-7", 1_800_000_000_000), Bound(1_800_000_000_000, "lot-7")),
        (BOUND_TO_AUCTION + "lot-7", Bound(0, "lot-7")),
        (BOUND_TO_AUCTION + "lot-7 soon", Bound(0, "lot-7")),
        (CANCELLED_BEFORE_START + '{"reason":"auction lot-7"}', None),
        ("auctions lot-7", None),
    ],
)
def test_an_offer_stands_for_an_auction_or_for_none(value: str | None, bound: Bound | None) -> None:
    """Only a binding names an auction; a cancellation that waits for its start, or nothing at all, does not."""
    assert bound_in(value) == bound
    assert auction_bound_in(value) == (bound and bound.auction_id)


@pytest.mark.requirement("R19")
def test_the_later_binding_is_the_greater_one() -> None:
    """By arrival, and not by how it is written; one that does not know its arrival is the oldest."""
    values = [binding("a", 1_000), BOUND_TO_AUCTION + "z", binding("b", 999)]
    ordered = sorted(each for each in map(bound_in, values) if each is not None)
    assert [each.auction_id for each in ordered] == ["z", "b", "a"]
