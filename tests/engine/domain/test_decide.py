"""Tests for engine.domain.decide: what each event does, and what holds for every decision."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact, decide
from engine.domain.events import (
    Bid,
    Cancel,
    Event,
    OpenWindow,
    Pause,
    ReachDeadline,
    Register,
    Reschedule,
    Resume,
    Start,
)
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Cap, ExtendsOn, ExtensionMode, Policy
from engine.domain.refusals import RefusalCode
from tests.engine.domain.checks import check_decision, check_extension
from tests.engine.domain.examples import (
    AUCTION_ID,
    CANCELLED_BEFORE_START_ARRIVED,
    END,
    IN_STATUS,
    PAUSED_WHILE_CLOSING,
    T0,
    at,
    registration,
    standing,
)
from tests.engine.domain.strategies import Log, events, logs, registrations

UNREGISTERED = Auction(AUCTION_ID)
BID = Bid("bid-1", amount_minor=500, currency="EUR", bidder_id="bidder-3", origin="proxy")
BID_DETAILS = {
    "bid_id": "bid-1",
    "amount_minor": 500,
    "currency": "EUR",
    "bidder_id": "bidder-3",
    "leader_changed": True,
    "origin": "proxy",
}


def closing(policy: Policy | None = None, **changes: object) -> Auction:
    """An auction in its soft-close window, under `policy`, with some fields changed."""
    auction = standing((45 * MINUTE_MS, None), registered=registration(policy=policy or Policy()))
    return replace(auction, status=Status.CLOSING, **changes)  # type: ignore[arg-type]


def refusal_code(decision: Decision) -> RefusalCode:
    """The code of a decision that must be a refusal."""
    assert decision.after is decision.before
    assert decision.refusal is not None
    return decision.refusal.code


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R1")
def test_a_registration_fixes_the_terms() -> None:
    """The first registration makes version 1, scheduled, ending where it says."""
    registered = registration(policy=Policy(max_extensions=2))
    decision = decide(UNREGISTERED, Register(registered), T0)
    assert decision.fact is Fact.REGISTERED
    assert decision.details == {"ends_at": END}
    assert decision.after == Auction(AUCTION_ID, Status.SCHEDULED, 1, registered, END)


@pytest.mark.requirement("R19")
def test_a_start_that_follows_its_cancellation_is_registered_as_cancelled() -> None:
    """A tombstone becomes a cancelled auction with terms; when and why it was cancelled stays."""
    tombstone, _ = IN_STATUS[Status.TOMBSTONE]
    decision = decide(tombstone, Register(registration()), T0)
    assert decision.fact is Fact.REGISTERED
    assert decision.after == CANCELLED_BEFORE_START_ARRIVED
    assert decision.after.status is Status.CANCELLED
    assert decision.after.version == 2
    assert (decision.after.cancelled_at, decision.after.reason) == (at(-HOUR_MS), "withdrawn")
    assert (decision.after.registration, decision.after.ends_at) == (registration(), END)


@pytest.mark.requirement("R27")
def test_a_replayed_start_does_not_revive_a_cancelled_auction() -> None:
    """The same start after a cancellation has no effect, another one is a conflict; either way it stays cancelled."""
    for cancelled in (IN_STATUS[Status.CANCELLED][0], CANCELLED_BEFORE_START_ARRIVED):
        same = decide(cancelled, Register(registration()), at(MINUTE_MS))
        assert same.after is cancelled
        assert same.fact is same.refusal is None
        other = decide(cancelled, Register(registration(ends_at=at(2 * HOUR_MS))), at(MINUTE_MS))
        assert refusal_code(other) is RefusalCode.CONFLICTING_REGISTRATION


def test_an_event_of_another_auction_is_a_programming_error() -> None:
    """A registration is never applied to the wrong auction."""
    with pytest.raises(AssertionError):
        decide(UNREGISTERED, Register(registration(auction_id="lot-8")), T0)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "event", "fact", "after"),
    [
        (Status.SCHEDULED, Start(), Fact.STARTED, Status.ACTIVE),
        (Status.ACTIVE, OpenWindow(), Fact.CLOSING, Status.CLOSING),
        (Status.CLOSING, ReachDeadline(), Fact.ENDED, Status.ENDED),
    ],
)
def test_time_moves_the_status_and_nothing_else(status: Status, event: Event, fact: Fact, after: Status) -> None:
    """Start, window and deadline change status and version; the end stands."""
    before, instant = IN_STATUS[status]
    decision = decide(before, event, instant)
    assert decision.fact is fact
    ended_at = END if after is Status.ENDED else None
    assert decision.after == replace(before, status=after, version=before.version + 1, ended_at=ended_at)
    assert decision.details == ({} if fact is Fact.STARTED else {"ends_at": END})


@pytest.mark.requirement("B1")
def test_a_close_counts_from_the_deadline() -> None:
    """However late the close is decided, the auction ended at its deadline."""
    assert decide(closing(), ReachDeadline(), at(5 * HOUR_MS)).after.ended_at == END


# --- bids -------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R15")
def test_a_bid_in_the_window_extends() -> None:
    """Ten minutes before the end, by default, the end becomes the arrival plus 15 minutes; the facts say all of it."""
    decision = decide(closing(), BID, at(50 * MINUTE_MS))
    assert decision.fact is Fact.EXTENDED
    assert decision.after == replace(closing(), version=4, ends_at=at(65 * MINUTE_MS), extension_count=1)
    assert decision.details == BID_DETAILS | {
        "clipped_by": None,
        "previous_ends_at": END,
        "ends_at": at(65 * MINUTE_MS),
    }
    check_extension(decision)


@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE, Status.PAUSED])
def test_a_bid_outside_the_window_counts_and_moves_nothing(status: Status) -> None:
    """Before the window opens, and while paused, an accepted bid is recorded and the auction stays the same object."""
    before, instant = IN_STATUS[status]
    decision = decide(before, BID, instant)
    assert (decision.fact, decision.details) == (Fact.BID_ACCEPTED, BID_DETAILS)
    assert decision.after is before


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(("before_window_ms", "fact"), [(1, Fact.BID_ACCEPTED), (0, Fact.EXTENDED)])
def test_the_window_opens_at_its_first_millisecond(before_window_ms: int, fact: Fact) -> None:
    """A closing auction whose window opens again later is extended from that millisecond on, not one before."""
    auction = closing(Policy(mode=ExtensionMode.ADD, soft_close_window_ms=5 * MINUTE_MS), ends_at=at(75 * MINUTE_MS))
    assert decide(auction, BID, EpochMs(at(70 * MINUTE_MS) - before_window_ms)).fact is fact


@pytest.mark.parametrize("status", [Status.TOMBSTONE, Status.ENDED, Status.CANCELLED])
def test_a_bid_after_the_end_is_only_recorded(status: Status) -> None:
    """A late bid leaves the auction as it is; the record says which bid it was."""
    before, instant = IN_STATUS[status]
    decision = decide(before, BID, instant)
    assert (decision.fact, decision.details) == (Fact.LATE_BID_IGNORED, BID_DETAILS)
    assert decision.after is before


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(
    ("extends_on", "leader_changed", "fact"),
    [
        (ExtendsOn.LEADER_CHANGED, True, Fact.EXTENDED),
        (ExtendsOn.LEADER_CHANGED, False, Fact.BID_ACCEPTED),
        (ExtendsOn.ANY_ACCEPTED, True, Fact.EXTENDED),
        (ExtendsOn.ANY_ACCEPTED, False, Fact.EXTENDED),
    ],
)
def test_which_bids_extend(extends_on: ExtendsOn, leader_changed: bool, fact: Fact) -> None:
    """By default only a bid that changes the leader extends; a policy can let every accepted bid do so."""
    bid = replace(BID, leader_changed=leader_changed)
    assert decide(closing(Policy(extends_on=extends_on)), bid, at(50 * MINUTE_MS)).fact is fact


@pytest.mark.requirement("B6")
def test_a_clipped_extension_names_its_cap() -> None:
    """The state and the record name the cap that cut the extension."""
    decision = decide(closing(Policy(total_cap_ms=2 * MINUTE_MS)), BID, at(50 * MINUTE_MS))
    assert decision.fact is Fact.EXTENDED
    assert decision.after.ends_at == at(62 * MINUTE_MS)
    assert decision.after.clipped_by is Cap.TOTAL
    assert decision.details["clipped_by"] == "total"


@pytest.mark.requirement("B6")
@pytest.mark.parametrize(
    ("policy", "cap"),
    [(Policy(total_cap_ms=0), "total"), (Policy(max_extensions=0), "count"), (Policy(extension_ms=1), None)],
)
def test_a_bid_that_can_move_nothing_is_accepted(policy: Policy, cap: str | None) -> None:
    """Where a cap leaves no room, or the time left is enough, the bid counts, the state stays and the cap is named."""
    before = closing(policy)
    decision = decide(before, BID, at(50 * MINUTE_MS))
    assert decision.fact is Fact.BID_ACCEPTED
    assert decision.after is before
    assert decision.details == BID_DETAILS | {"clipped_by": cap}


@pytest.mark.requirement("R15")
def test_an_unclipped_extension_forgets_the_last_cap() -> None:
    """`clipped_by` speaks of the last extension only."""
    before = closing(Policy(), clipped_by=Cap.TOTAL)
    assert decide(before, BID, at(50 * MINUTE_MS)).after.clipped_by is None


# --- cancel, pause, resume --------------------------------------------------------------------------------------------


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING, Status.PAUSED])
def test_a_cancellation_ends_any_live_auction(status: Status) -> None:
    """From every live status: cancelled, with the time and the reason, no pause left open, the end as it stood."""
    before, instant = IN_STATUS[status]
    decision = decide(before, Cancel("seller withdrew"), instant)
    assert (decision.fact, decision.details) == (Fact.CANCELLED, {"reason": "seller withdrew"})
    assert decision.after == replace(
        before,
        status=Status.CANCELLED,
        version=before.version + 1,
        cancelled_at=instant,
        reason="seller withdrew",
        paused_at=None,
        paused_from=None,
    )


@pytest.mark.requirement("R19")
def test_a_cancellation_of_an_unknown_auction_is_remembered() -> None:
    """Before the start arrived, a cancellation leaves a tombstone with the time and the reason."""
    decision = decide(UNREGISTERED, Cancel("seller withdrew"), T0)
    assert (decision.fact, decision.details) == (Fact.TOMBSTONED, {"reason": "seller withdrew"})
    assert decision.after == Auction(AUCTION_ID, Status.TOMBSTONE, 1, cancelled_at=T0, reason="seller withdrew")


def test_a_pause_freezes_what_is_left() -> None:
    """The record and the state hold the remaining time, where the auction was, and why."""
    before, instant = IN_STATUS[Status.CLOSING]
    decision = decide(before, Pause("fire alarm"), instant)
    assert decision.fact is Fact.PAUSED
    assert decision.details == {"reason": "fire alarm", "paused_remaining_ms": 10 * MINUTE_MS}
    assert decision.after == PAUSED_WHILE_CLOSING
    assert (decision.after.paused_at, decision.after.paused_from) == (instant, Status.CLOSING)
    assert (decision.after.ends_at, decision.after.reason) == (END, "fire alarm")


def test_a_resume_gives_the_frozen_time_back() -> None:
    """After 20 minutes of pause the end is 20 minutes later, the pause's reason is gone, the caps are untouched."""
    decision = decide(PAUSED_WHILE_CLOSING, Resume("all clear"), at(70 * MINUTE_MS))
    assert decision.fact is Fact.RESUMED
    assert decision.details == {
        "reason": "all clear",
        "previous_ends_at": END,
        "ends_at": at(80 * MINUTE_MS),
        "paused_ms": 20 * MINUTE_MS,
    }
    after = decision.after
    assert (after.status, after.ends_at) == (Status.CLOSING, at(80 * MINUTE_MS))
    assert (after.paused_at, after.paused_from, after.paused_total_ms) == (None, None, 20 * MINUTE_MS)
    assert after.reason is None
    assert (after.extension_count, after.extension_used_ms) == (0, 0)
    assert after.extension_left_ms == PAUSED_WHILE_CLOSING.extension_left_ms


@pytest.mark.requirement("R15")
def test_pauses_add_up() -> None:
    """The paused times of several pauses are summed, and the extension made between them stays counted."""
    auction = standing(
        (50 * MINUTE_MS, Pause()),
        (60 * MINUTE_MS, Resume()),
        (61 * MINUTE_MS, BID),
        (62 * MINUTE_MS, Pause()),
        (67 * MINUTE_MS, Resume()),
        registered=registration(),
    )
    assert auction.paused_total_ms == 15 * MINUTE_MS
    assert auction.ends_at == at(76 * MINUTE_MS) + 5 * MINUTE_MS
    assert auction.extension_used_ms == 6 * MINUTE_MS


# --- reschedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE])
@pytest.mark.parametrize("ends_at", [at(30 * MINUTE_MS), at(2 * HOUR_MS)])
def test_an_operator_moves_the_end(status: Status, ends_at: EpochMs) -> None:
    """Before the window, earlier or later: the end stands where the operator put it, and nothing else changes."""
    before, instant = IN_STATUS[status]
    decision = decide(before, Reschedule(ends_at, "hall"), instant)
    assert decision.fact is Fact.RESCHEDULED
    assert decision.details == {"reason": "hall", "previous_ends_at": END, "ends_at": ends_at}
    assert decision.after == replace(before, version=before.version + 1, ends_at=ends_at)


@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING])
def test_moving_the_end_to_where_it_stands_has_no_effect(status: Status) -> None:
    """The same end again is neither a change nor a refusal."""
    before, instant = IN_STATUS[status]
    decision = decide(before, Reschedule(END), instant)
    assert decision.after is before
    assert decision.fact is decision.refusal is None


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(
    ("status", "ends_at", "code"),
    [
        (Status.ACTIVE, IN_STATUS[Status.ACTIVE][1], RefusalCode.SCHEDULE_IN_PAST),
        (Status.ACTIVE, T0, RefusalCode.SCHEDULE_IN_PAST),
        (Status.SCHEDULED, T0, RefusalCode.SCHEDULE_BEFORE_START),
        (Status.SCHEDULED, at(-1), RefusalCode.SCHEDULE_BEFORE_START),
        (Status.SCHEDULED, at(-HOUR_MS), RefusalCode.SCHEDULE_IN_PAST),
        (Status.CLOSING, EpochMs(END + 24 * HOUR_MS + 1), RefusalCode.SCHEDULE_BEYOND_CAP),
    ],
)
def test_an_end_out_of_reach_is_refused(status: Status, ends_at: EpochMs, code: RefusalCode) -> None:
    """An end that has passed, that precedes the start, or that the total cap forbids is refused with its own code."""
    before, instant = IN_STATUS[status]
    decision = decide(before, Reschedule(ends_at), instant)
    check_decision(before, Reschedule(ends_at), decision)
    assert refusal_code(decision) is code


@pytest.mark.requirement("R15")
@pytest.mark.parametrize(
    ("status", "ends_at"),
    [
        (Status.ACTIVE, EpochMs(IN_STATUS[Status.ACTIVE][1] + 1)),
        (Status.SCHEDULED, at(1)),
        (Status.CLOSING, EpochMs(END + 24 * HOUR_MS)),
    ],
)
def test_the_nearest_and_the_furthest_end_are_allowed(status: Status, ends_at: EpochMs) -> None:
    """One millisecond after now, one after the start, and exactly the total cap are inside."""
    before, instant = IN_STATUS[status]
    assert decide(before, Reschedule(ends_at), instant).after.ends_at == ends_at


# --- every decision ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R25")
@settings(max_examples=50, deadline=None)
@given(log=logs(), event=events(), data=st.data())
def test_every_decision_keeps_the_table_and_the_promises(log: Log, event: Event, data: st.DataObject) -> None:
    """In any state a log leads to, any event and any wake-up does what its cell says: one version per change, or nothing."""
    auction = UNREGISTERED
    for logged, arrival in log:
        auction = fold(auction, logged, arrival)[-1].after
        for probe in (event, Start(), OpenWindow(), ReachDeadline()):
            check_decision(auction, probe, decide(auction, probe, arrival))


@pytest.mark.requirement("R2")
@pytest.mark.requirement("R19")
@settings(max_examples=60, deadline=None)
@given(log=logs())
def test_what_was_said_once_has_no_effect_the_second_time(log: Log) -> None:
    """A registration or a cancellation that comes again at once changes nothing, whatever happened before it."""
    auction = UNREGISTERED
    for event, arrival in log:
        first = fold(auction, event, arrival)
        auction = first[-1].after
        if isinstance(event, Register | Cancel):
            (again,) = fold(auction, event, arrival)
            assert again.after is auction
            assert again.fact is None


@pytest.mark.requirement("R2")
@settings(max_examples=40, deadline=None)
@given(one=registrations(), other=registrations())
def test_only_identical_terms_are_the_same_registration(one: object, other: object) -> None:
    """A second registration is refused iff any of its terms differs."""
    auction = decide(UNREGISTERED, Register(one), T0).after  # type: ignore[arg-type]
    decision = decide(auction, Register(other), T0)  # type: ignore[arg-type]
    assert decision.after is auction
    assert (decision.refusal is None) == (one == other)


def test_a_decision_keeps_the_instant_it_counts_from() -> None:
    """`at` is what was given, for a fact, a refusal and an event without effect alike."""
    auction, instant = IN_STATUS[Status.ACTIVE]
    for event in (BID, Resume(), Start()):
        assert decide(auction, event, instant).at == instant
