"""Tests for engine.domain.withdrawal, and for what `decide` makes of it: a window, whose it is, and who is over."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.domain.auction import Auction, Offer
from engine.domain.decide import Decision, Fact, decide
from engine.domain.events import Register, Withdraw
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.refusals import RefusalCode
from engine.domain.withdrawal import NOTE_CHARS_MAX, WithdrawalReason, is_high_value, window_ends_at
from tests.engine.domain.checks import check_decision
from tests.engine.domain.examples import AUCTION_ID, END, IN_STATUS, T0, at, registration, standing
from tests.engine.domain.strategies import Log, logs

WITHDRAW = Withdraw(WithdrawalReason.FOUND_ELSEWHERE, 30, note="sorry", device="phone-1")


def offered(status: Status = Status.ACTIVE, **offer: Any) -> Auction:
    """The example auction in a status, with these facts of its offer."""
    auction, _ = IN_STATUS[status]
    return replace(auction, registration=replace(auction.registered, offer=Offer("offer-1", **offer)))


def refusal(decision: Decision) -> RefusalCode:
    """The code of a decision that must be a refusal, and change nothing."""
    assert decision.after is decision.before
    assert decision.fact is None
    assert decision.refusal is not None
    return decision.refusal.code


@pytest.mark.requirement("R22")
def test_the_reasons_are_the_published_ones() -> None:
    """The canned reasons a page can offer, spelled as on the wire, and how long a note may be."""
    assert [reason.value for reason in WithdrawalReason] == [
        "changed_mind",
        "found_elsewhere",
        "ordered_by_mistake",
        "payment_problem",
        "terms_unsuitable",
        "other",
    ]
    assert NOTE_CHARS_MAX == 500


@pytest.mark.requirement("R20")
@pytest.mark.parametrize(
    ("offer", "window_ends"),
    [
        ({}, at(30 * MINUTE_MS)),
        ({"offer_created_at": at(-10 * MINUTE_MS)}, at(20 * MINUTE_MS)),
        ({"modification_window_minutes": 7}, at(7 * MINUTE_MS)),
        ({"modification_window_minutes": 45}, at(45 * MINUTE_MS)),
        ({"modification_window_minutes": 0}, T0),
        ({"offer_created_at": at(-HOUR_MS), "modification_window_minutes": 90}, at(30 * MINUTE_MS)),
    ],
    ids=["neither", "created", "shorter", "longer", "none at all", "both"],
)
def test_a_window_begins_with_the_offer_and_the_maker_may_set_its_length(
    offer: dict[str, Any], window_ends: int
) -> None:
    """From the creation of the offer, or else the start; as long as the maker said, be it nothing, or else the default."""
    assert window_ends_at(offered(**offer), 30) == window_ends


@pytest.mark.requirement("R20")
@pytest.mark.requirement("R21")
@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING, Status.PAUSED])
@pytest.mark.parametrize("early_ms", [1, 0, -1])
def test_the_last_millisecond_of_the_window_counts(status: Status, early_ms: int) -> None:
    """In every open status: until the window ends it may be done, at that very instant it may not."""
    auction = offered(status, offer_created_at=T0, modification_window_minutes=30)
    decision = decide(auction, WITHDRAW, EpochMs(at(30 * MINUTE_MS) - early_ms))
    check_decision(auction, WITHDRAW, decision)
    if early_ms > 0:
        assert (decision.fact, decision.after.status) == (Fact.OFFER_CANCELLED, Status.CANCELLED)
    else:
        assert refusal(decision) is RefusalCode.WINDOW_EXPIRED


@pytest.mark.requirement("R21")
def test_an_expired_window_says_until_when_it_was() -> None:
    """The sentence names the last instant and the arrival, the statuses are those of any refusal."""
    decision = decide(offered(), replace(WITHDRAW, default_window_minutes=10), at(10 * MINUTE_MS))
    assert refusal(decision) is RefusalCode.WINDOW_EXPIRED
    assert decision.refusal is not None
    assert (decision.refusal.current_status, decision.refusal.attempted_status) == ("ACTIVE", "CANCELLED")
    assert decision.refusal.message.count(str(at(10 * MINUTE_MS))) == 2
    assert decision.details == {}


@pytest.mark.requirement("R20")
@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING, Status.PAUSED])
def test_a_withdrawal_cancels_and_records_all_it_was_told(status: Status) -> None:
    """One version further, no pause left open, the canned reason as the reason; the note and the device on record only."""
    auction, instant = offered(status, modification_window_minutes=120), IN_STATUS[status][1]
    decision = decide(auction, WITHDRAW, instant)
    assert decision.fact is Fact.OFFER_CANCELLED
    assert decision.after == replace(
        auction,
        status=Status.CANCELLED,
        version=auction.version + 1,
        cancelled_at=instant,
        reason="found_elsewhere",
        paused_at=None,
        paused_from=None,
    )
    assert decision.details == {
        "reason": "found_elsewhere",
        "note": "sorry",
        "device": "phone-1",
        "offer_id": "offer-1",
        "window_ends_at": at(120 * MINUTE_MS),
    }


@pytest.mark.requirement("R21")
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (Status.UNREGISTERED, RefusalCode.UNKNOWN_AUCTION),
        (Status.TOMBSTONE, RefusalCode.ALREADY_CANCELLED),
        (Status.CANCELLED, RefusalCode.ALREADY_CANCELLED),
        (Status.ENDED, RefusalCode.AUCTION_CLOSED),
    ],
)
@pytest.mark.parametrize("default_minutes", [0, 10_000])
def test_what_is_over_says_so_whatever_the_window(status: Status, code: RefusalCode, default_minutes: int) -> None:
    """A closed or cancelled auction is refused as such, in and out of the window: that is what a page must show."""
    auction, instant = IN_STATUS[status]
    event = replace(WITHDRAW, default_window_minutes=default_minutes)
    assert refusal(decide(auction, event, instant)) is code


@pytest.mark.requirement("R21")
@pytest.mark.requirement("B2")
def test_a_withdrawal_at_the_deadline_comes_too_late() -> None:
    """One millisecond before the end the offer is cancelled, at the end the auction is closed first: one winner."""
    auction = standing((45 * MINUTE_MS, None), registered=registration(offer=Offer(modification_window_minutes=600)))
    (cancelled,) = fold(auction, WITHDRAW, EpochMs(END - 1))
    assert cancelled.fact is Fact.OFFER_CANCELLED
    ended, refused = fold(auction, WITHDRAW, END)
    assert (ended.fact, ended.after.ended_at) == (Fact.ENDED, END)
    assert refusal(refused) is RefusalCode.AUCTION_CLOSED


@pytest.mark.requirement("R21")
@settings(max_examples=60, deadline=None)
@given(log=logs(), minutes=st.integers(0, 90))
def test_a_withdrawal_counts_once(log: Log, minutes: int) -> None:
    """Whatever came before: said again at once it changes nothing, and is refused."""
    auction = Auction(AUCTION_ID)
    for event, arrival in log:
        auction = fold(auction, event, arrival)[-1].after
    event = Withdraw(WithdrawalReason.OTHER, minutes)
    auction = fold(auction, event, arrival)[-1].after
    (again,) = fold(auction, event, arrival)
    assert refusal(again) is not None


@pytest.mark.requirement("R27")
def test_a_replayed_start_does_not_revive_a_withdrawn_offer() -> None:
    """The same start has no effect on what was cancelled."""
    withdrawn = decide(offered(), WITHDRAW, at(MINUTE_MS)).after
    again = decide(withdrawn, Register(withdrawn.registered), at(2 * MINUTE_MS))
    assert again.after is withdrawn
    assert again.refusal is None


@pytest.mark.requirement("R23")
@pytest.mark.parametrize(
    ("amount_minor", "threshold_minor", "high"),
    [
        (501, 500, True),
        (500, 500, False),
        (1, 0, True),
        (0, 0, False),
        (None, 500, False),
        (500, None, False),
        (None, None, False),
    ],
)
def test_a_high_value_is_over_the_makers_threshold(
    amount_minor: int | None, threshold_minor: int | None, high: bool
) -> None:
    """Over, not at it; without an amount or a threshold nobody is alarmed."""
    auction = offered(amount_minor=amount_minor, auto_reject_threshold_minor=threshold_minor)
    assert is_high_value(auction) is high
