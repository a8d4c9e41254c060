"""Tests for engine.domain.fold: time and events in one order, whoever is awake."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.domain.auction import Auction, Registration
from engine.domain.decide import Decision, Fact
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume
from engine.domain.fold import elapse, fold, next_due
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import ExtendsOn, ExtensionMode
from engine.domain.refusals import RefusalCode
from tests.engine.domain import oracle
from tests.engine.domain.checks import check_auction
from tests.engine.domain.examples import AUCTION_ID, END, IN_STATUS, T0, at, history, registration
from tests.engine.domain.strategies import Log, gaps_ms, logs, registrations

UNREGISTERED = Auction(AUCTION_ID)
FAR = EpochMs(T0 + 1_000 * 24 * HOUR_MS)


def told(decisions: list[Decision]) -> list[tuple[Fact | None, EpochMs]]:
    """What happened and when."""
    return [(decision.fact, decision.at) for decision in decisions]


def facts(decisions: list[Decision]) -> list[Decision]:
    """The decisions that said something."""
    return [decision for decision in decisions if decision.fact is not None]


def fold_all(log: Log, auction: Auction = UNREGISTERED) -> list[Decision]:
    """Fold a whole log, waking up only when an event comes."""
    decisions: list[Decision] = []
    for event, arrival in log:
        decisions += fold(auction, event, arrival)
        auction = decisions[-1].after
    return decisions


def fold_awake(log: Log, wakes: list[EpochMs]) -> list[Decision]:
    """Fold a whole log as a scheduler would: also applying what is due at every instant of `wakes`."""
    decisions: list[Decision] = []
    auction = UNREGISTERED
    steps: list[tuple[EpochMs, int, InputEvent | None]] = [(instant, 0, None) for instant in wakes]
    steps += [(arrival, order, event) for order, (event, arrival) in enumerate(log, start=1)]
    for instant, _, event in sorted(steps, key=lambda step: step[:2]):
        decisions += elapse(auction, instant) if event is None else fold(auction, event, instant)
        auction = decisions[-1].after if decisions else auction
    return decisions


def registered_at(registered: Registration, arrival: EpochMs) -> Auction:
    """The auction right after its registration arrived."""
    return fold(UNREGISTERED, Register(registered), arrival)[-1].after


# --- what is due ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "instant", "trigger"),
    [
        (Status.SCHEDULED, T0, "start"),
        (Status.ACTIVE, EpochMs(END - 15 * MINUTE_MS), "open_window"),
        (Status.CLOSING, END, "reach_deadline"),
    ],
)
def test_one_thing_is_due_in_each_live_status(status: Status, instant: EpochMs, trigger: str) -> None:
    """A scheduled auction waits for its start, an active one for its window, a closing one for its end."""
    due = next_due(IN_STATUS[status][0])
    assert due is not None
    assert (due[0], due[1].trigger.value) == (instant, trigger)


@pytest.mark.requirement("R27")
@pytest.mark.parametrize(
    "status", [Status.UNREGISTERED, Status.TOMBSTONE, Status.PAUSED, Status.ENDED, Status.CANCELLED]
)
def test_nothing_is_due_where_time_does_not_count(status: Status) -> None:
    """What is over, paused or unknown leaves no deadline behind, however much time goes by."""
    auction, _ = IN_STATUS[status]
    assert next_due(auction) is None
    assert list(elapse(auction, FAR)) == []


@pytest.mark.requirement("B1")
def test_time_acts_as_of_its_own_instants() -> None:
    """A week of sleep yields start, window and close as of the instants they were due, each exactly once."""
    scheduled, _ = IN_STATUS[Status.SCHEDULED]
    assert told(list(elapse(scheduled, at(7 * 24 * HOUR_MS)))) == [
        (Fact.STARTED, T0),
        (Fact.CLOSING, END - 15 * MINUTE_MS),
        (Fact.ENDED, END),
    ]


@pytest.mark.requirement("B1")
@settings(max_examples=50, deadline=None)
@given(registered=registrations(), early_ms=st.integers(1, 5))
def test_nothing_happens_before_it_is_due(registered: Registration, early_ms: int) -> None:
    """Up to one millisecond before the start, the window or the end it has not happened; at that millisecond it has."""
    auction = registered_at(registered, EpochMs(registered.starts_at - 10))
    while (due := next_due(auction)) is not None:
        assert list(elapse(auction, EpochMs(due[0] - early_ms))) == []
        first = next(elapse(auction, due[0]))
        assert first.at == due[0]
        auction = first.after
    assert auction.status is Status.ENDED
    assert auction.ended_at == registered.ends_at


# --- the boundary -----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("B2")
def test_the_worked_example() -> None:
    """Two bids, stamped one before and exactly at the end, are processed after an outage: only the first one counts."""
    log: Log = [
        (Register(registration()), at(-HOUR_MS)),
        (Bid("in time"), EpochMs(END - 1)),
        (Bid("also in time: the end moved"), END),
    ]
    assert told(fold_all(log)) == [
        (Fact.REGISTERED, at(-HOUR_MS)),
        (Fact.STARTED, T0),
        (Fact.CLOSING, END - 15 * MINUTE_MS),
        (Fact.EXTENDED, END - 1),
        (Fact.EXTENDED, END),
    ]
    without_the_first = [log[0], log[2]]
    assert told(fold_all(without_the_first))[-2:] == [(Fact.ENDED, END), (Fact.LATE_BID_IGNORED, END)]


@pytest.mark.requirement("B2")
@settings(max_examples=60, deadline=None)
@given(
    registered=registrations(), leader_changed=st.booleans(), after_ms=st.one_of(st.just(0), st.integers(0, HOUR_MS))
)
def test_a_bid_counts_iff_it_arrived_before_the_end(
    registered: Registration, leader_changed: bool, after_ms: int
) -> None:
    """One millisecond before the end a bid counts under any policy; at the end, and after it, it is late."""
    auction = registered_at(registered, EpochMs(registered.starts_at - 1))
    bid = Bid("b", leader_changed=leader_changed)
    in_time = fold(auction, bid, EpochMs(registered.ends_at - 1))
    assert in_time[-1].fact in (Fact.BID_ACCEPTED, Fact.EXTENDED)
    assert not in_time[-1].after.status.is_terminal
    late = fold(auction, bid, EpochMs(registered.ends_at + after_ms))
    assert late[-1].fact is Fact.LATE_BID_IGNORED
    assert late[-1].after.ended_at == registered.ends_at


@pytest.mark.requirement("R25")
@pytest.mark.parametrize("event", [Cancel("x"), Pause(), Reschedule(at(2 * HOUR_MS))])
@pytest.mark.parametrize(("early_ms", "accepted"), [(1, True), (0, False)])
def test_the_deadline_wins_every_tie(event: InputEvent, early_ms: int, accepted: bool) -> None:
    """A cancellation, pause or reschedule stamped at the end meets an auction that has ended; one before, it counts."""
    auction, _ = IN_STATUS[Status.CLOSING]
    decision = fold(auction, event, EpochMs(END - early_ms))[-1]
    assert (decision.fact is not None) == accepted
    if not accepted:
        assert decision.refusal is not None
        assert decision.refusal.code is RefusalCode.FSM_TERMINAL_IMMUTABLE
        assert decision.after.status is Status.ENDED


@pytest.mark.requirement("R15")
def test_the_window_is_open_for_a_bid_that_opens_it() -> None:
    """A bid stamped at the window's first millisecond finds the window open, although nobody woke up before it."""
    log: Log = [
        (Register(registration(policy=IN_STATUS[Status.ACTIVE][0].policy)), at(-HOUR_MS)),
        (Bid("b"), EpochMs(END - 15 * MINUTE_MS)),
    ]
    assert told(fold_all(log))[-2:] == [(Fact.CLOSING, END - 15 * MINUTE_MS), (Fact.BID_ACCEPTED, END - 15 * MINUTE_MS)]


# --- what an event makes due ------------------------------------------------------------------------------------------


@pytest.mark.requirement("R2")
def test_an_end_in_the_past_is_registered_and_closed_at_once() -> None:
    """A registration that arrives after its own end is one history: registered, started, closing, ended as of the end."""
    assert told(fold(UNREGISTERED, Register(registration()), at(3 * HOUR_MS))) == [
        (Fact.REGISTERED, at(3 * HOUR_MS)),
        (Fact.STARTED, T0),
        (Fact.CLOSING, END - 15 * MINUTE_MS),
        (Fact.ENDED, END),
    ]


def test_a_nearer_end_opens_the_window_at_once() -> None:
    """An operator who moves the end to within the window puts the auction into its closing phase with the same event."""
    decisions = history((10 * MINUTE_MS, Reschedule(at(20 * MINUTE_MS))), registered=registration())
    assert told(decisions)[-2:] == [(Fact.RESCHEDULED, at(10 * MINUTE_MS)), (Fact.CLOSING, at(5 * MINUTE_MS))]


def test_an_event_without_effect_is_one_decision() -> None:
    """The event's own decision is always there, also when it says nothing."""
    auction, instant = IN_STATUS[Status.ACTIVE]
    (decision,) = fold(auction, Register(registration()), instant)
    assert (decision.fact, decision.refusal) == (None, None)
    assert decision.after is auction


@pytest.mark.requirement("R19")
@settings(max_examples=30, deadline=None)
@given(registered=registrations(), gap_ms=gaps_ms())
def test_a_cancelled_start_never_starts(registered: Registration, gap_ms: int) -> None:
    """However late the start follows its cancellation, time does nothing to it any more."""
    cancelled_at = EpochMs(registered.starts_at - HOUR_MS)
    log: Log = [(Cancel("x"), cancelled_at), (Register(registered), EpochMs(cancelled_at + gap_ms))]
    decisions = fold_all(log)
    assert [decision.fact for decision in decisions] == [Fact.TOMBSTONED, Fact.REGISTERED]
    assert decisions[-1].after.status is Status.CANCELLED
    assert list(elapse(decisions[-1].after, FAR)) == []


# --- the log alone decides --------------------------------------------------------------------------------------------


@pytest.mark.requirement("B2")
@settings(max_examples=25, deadline=None)
@given(log=logs())
def test_the_same_log_gives_the_same_result(log: Log) -> None:
    """Folding a log twice gives equal decisions, states and records."""
    assert fold_all(log) == fold_all(log)


@pytest.mark.requirement("B2")
@settings(max_examples=100, deadline=None)
@given(log=logs(), data=st.data())
def test_wake_ups_do_not_change_history(log: Log, data: st.DataObject) -> None:
    """A scheduler that wakes at arbitrary instants writes the same facts, with the same `at`, as one that slept."""
    first, last = log[0][1], log[-1][1]
    wakes = data.draw(st.lists(st.integers(first - 10, last).map(EpochMs), max_size=12))
    due = [decision.at for decision in fold_all(log)]
    wakes += data.draw(st.lists(st.sampled_from(due), max_size=4))
    wakes = [instant for instant in wakes if instant <= last]
    assert fold_awake(log, wakes) == fold_all(log)


@pytest.mark.requirement("B2")
@settings(max_examples=40, deadline=None)
@given(log=logs(), data=st.data())
def test_a_crash_between_any_two_events_changes_nothing(log: Log, data: st.DataObject) -> None:
    """A fold that stops after any prefix and goes on from the state it left there ends the same."""
    cut = data.draw(st.integers(0, len(log)))
    first = fold_all(log[:cut])
    standing = first[-1].after if first else UNREGISTERED
    assert first + fold_all(log[cut:], standing) == fold_all(log)


@pytest.mark.requirement("B1")
@pytest.mark.requirement("R5")
@settings(max_examples=50, deadline=None)
@given(log=logs())
def test_an_auction_is_over_exactly_once(log: Log) -> None:
    """After enough time every auction that is not paused has exactly one end or cancellation, and nothing after it."""
    decisions = fold_all(log)
    decisions += elapse(decisions[-1].after, FAR)
    ends = (Fact.ENDED, Fact.CANCELLED, Fact.OFFER_CANCELLED, Fact.TOMBSTONED)
    over = [i for i, said in enumerate(decisions) if said.fact in ends]
    auction = decisions[-1].after
    assert len(over) == (0 if auction.status is Status.PAUSED else 1)
    for index in over:
        afterwards = {decision.fact for decision in facts(decisions[index + 1 :])}
        assert afterwards <= {Fact.LATE_BID_IGNORED, Fact.REGISTERED}
        assert (Fact.REGISTERED in afterwards) <= (decisions[index].fact is Fact.TOMBSTONED)


@pytest.mark.requirement("B1")
@settings(max_examples=50, deadline=None)
@given(log=logs())
def test_no_auction_ends_early(log: Log) -> None:
    """A close is stamped with the end that stood, no later than the event that revealed it, and no bid was lost to it."""
    auction = UNREGISTERED
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            if decision.fact is Fact.ENDED:
                assert decision.at == decision.before.ends_at == decision.after.ended_at
                assert decision.at <= arrival
            auction = decision.after


@pytest.mark.requirement("R25")
@settings(max_examples=50, deadline=None)
@given(log=logs())
def test_versions_count_the_changes(log: Log) -> None:
    """The version after a log is the number of changes in it; neighbouring states differ by one version or not at all."""
    decisions = fold_all(log)
    assert decisions[-1].after.version == sum(decision.changed for decision in decisions)
    for earlier, later in pairwise(decisions):
        assert later.before is earlier.after


# --- pauses -----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(registered=registrations(), into_ms=st.integers(0, 3 * HOUR_MS), paused_ms=gaps_ms(), data=st.data())
def test_a_pause_costs_no_time_and_no_allowance(
    registered: Registration, into_ms: int, paused_ms: int, data: st.DataObject
) -> None:
    """The countdown after a pause is to the millisecond the one before it, and so is what is left of the caps."""
    auction = registered_at(registered, registered.starts_at)
    paused_at = EpochMs(registered.starts_at + into_ms % (registered.ends_at - registered.starts_at))
    paused = fold(auction, Pause(), paused_at)[-1].after
    before = auction.ends_at - paused_at
    resumed_at = EpochMs(paused_at + paused_ms)
    assert paused.remaining_ms(EpochMs(paused_at + data.draw(st.integers(0, HOUR_MS)))) == before
    resumed = fold(paused, Resume(), resumed_at)[-1].after
    assert resumed.remaining_ms(resumed_at) == before
    assert resumed.status is paused.paused_from
    assert resumed.extension_left_ms == paused.extension_left_ms == auction.extension_left_ms
    assert resumed.extension_used_ms == 0
    assert resumed.final_deadline - resumed_at == auction.final_deadline - paused_at
    check_auction(resumed, paused_ms)


# --- a second opinion -------------------------------------------------------------------------------------------------


Bids = list[tuple[EpochMs, bool]]


def reference(registered: Registration, arrivals: Bids) -> oracle.Close:
    """What the oracle says of these bids."""
    policy = registered.policy
    return oracle.play(
        registered.starts_at,
        registered.ends_at,
        arrivals,
        window=policy.soft_close_window_ms,
        step=policy.extension_ms,
        adds=policy.mode is ExtensionMode.ADD,
        allowance=policy.total_cap_ms,
        times=policy.max_extensions,
        every_bid=policy.extends_on is ExtendsOn.ANY_ACCEPTED,
    )


@st.composite
def bidding(draw: st.DrawFn) -> tuple[Registration, Bids]:
    """A registration and bids in order of arrival; most of them aim at the end or the window as they stand by then."""
    registered = draw(registrations())
    instant = registered.ends_at - draw(st.integers(0, 40 * MINUTE_MS))
    gaps = st.one_of(st.sampled_from([1, 1, 2, 60_000, 0]), st.integers(1, MINUTE_MS), st.integers(1, 12 * MINUTE_MS))
    aims = st.sampled_from(["end", "end", "window", "window + 1", "soon", "soon", "later"])
    step = st.tuples(gaps, aims, st.sampled_from([True, True, False]))
    arrivals: Bids = []
    for gap_ms, aim, leader_changed in draw(st.lists(step) | st.lists(step, min_size=8)):
        end = reference(registered, arrivals).end
        instant = {
            "end": max(instant, end - gap_ms),
            "window": max(instant, end - registered.policy.soft_close_window_ms),
            "window + 1": max(instant, end - registered.policy.soft_close_window_ms - 1),
            "soon": instant + gap_ms % 3,
            "later": instant + gap_ms,
        }[aim]
        arrivals.append((EpochMs(instant), leader_changed))
    return registered, arrivals


@pytest.mark.requirement("R15")
@settings(max_examples=100, deadline=None)
@given(bidding())
def test_the_oracle_agrees(case: tuple[Registration, Bids]) -> None:
    """End, number of extensions and verdict on every bid are those of an independent reference that knows no statuses."""
    registered, arrivals = case
    expected = reference(registered, arrivals)
    auction = registered_at(registered, EpochMs(registered.starts_at - 30 * 24 * HOUR_MS))
    counted, ends = [], []
    for index, (arrival, leader_changed) in enumerate(arrivals):
        decisions = fold(auction, Bid(f"bid-{index}", leader_changed=leader_changed), arrival)
        auction = decisions[-1].after
        counted.append(decisions[-1].fact is not Fact.LATE_BID_IGNORED)
        ends.append(auction.ends_at)
    closed = list(elapse(auction, FAR))
    auction = closed[-1].after if closed else auction
    assert counted == expected.counted
    assert ends == expected.ends
    assert (auction.ended_at, auction.extension_count) == (expected.end, expected.extensions)
