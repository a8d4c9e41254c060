"""Cancelling an offer: the canned reasons, and the window in which it may be done (requirements R20-R22)."""

from enum import StrEnum
from typing import Final

from engine.domain.auction import Auction
from engine.domain.instants import MINUTE_MS, EpochMs

NOTE_CHARS_MAX: Final = 500
WINDOW_MINUTES_MAX: Final = 525_600
"""A year. Without a bound the end of a window could lie outside what an instant can be."""


class WithdrawalReason(StrEnum):
    """Why an offer is cancelled, in the words a page can offer."""

    CHANGED_MIND = "changed_mind"
    FOUND_ELSEWHERE = "found_elsewhere"
    ORDERED_BY_MISTAKE = "ordered_by_mistake"
    PAYMENT_PROBLEM = "payment_problem"
    TERMS_UNSUITABLE = "terms_unsuitable"
    OTHER = "other"


def window_ends_at(auction: Auction, default_window_minutes: int) -> EpochMs:
    """Until when the offer behind a registered auction can be cancelled: `at < window_ends_at` counts.

    The window begins when the offer was created; an offer that does not say when begins with its auction.
    """
    registration = auction.registered
    offer = registration.offer
    begins_at = registration.starts_at if offer.offer_created_at is None else offer.offer_created_at
    minutes = default_window_minutes if offer.modification_window_minutes is None else offer.modification_window_minutes
    return EpochMs(begins_at + minutes * MINUTE_MS)


def is_high_value(auction: Auction) -> bool:
    """Whether the amount is over the maker's threshold, so that somebody should look at its cancellation."""
    offer = auction.registered.offer
    if offer.amount_minor is None or offer.auto_reject_threshold_minor is None:
        return False
    return offer.amount_minor > offer.auto_reject_threshold_minor
