"""One auction under any sequence of events: a state machine that drives `fold` and checks every promise at each step.

Two engines live through the same log. The *sleeper* applies what is due only when an event comes; the *waker* is also
woken at arbitrary instants. What the two write must be the same, and a third one that reads the log afterwards must
write it again. The machine keeps its own books, from the facts alone: the pauses, the frozen countdowns, the closes.
"""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.domain.auction import Auction, Registration
from engine.domain.cadence import next_tick_at
from engine.domain.decide import Decision, Fact
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.fold import elapse, fold, next_due
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.refusals import RefusalCode
from engine.domain.withdrawal import WithdrawalReason
from tests.engine.domain.checks import check_auction, check_decision, check_extension
from tests.engine.domain.examples import AUCTION_ID, T0
from tests.engine.domain.strategies import Log, gaps_ms, registrations

FAR_MS = 1_000 * 24 * HOUR_MS
LIVE = (Status.SCHEDULED, Status.ACTIVE, Status.CLOSING)


class FoldMachine(RuleBasedStateMachine):
    """Drives one auction, on two engines, through random events at non-decreasing instants."""

    def __init__(self) -> None:
        super().__init__()
        self.open_the_books(EpochMs(T0))

    def open_the_books(self, now: EpochMs) -> None:
        """Begin with an auction nobody has heard of."""
        self.now = now
        self.sleeper = self.waker = Auction(AUCTION_ID)
        self.log: Log = []
        self.slept: list[Decision] = []
        self.woken: list[Decision] = []
        self.paused_ms = 0
        self.paused_since: EpochMs | None = None
        self.frozen_ms = 0

    # --- rules: time ---

    @rule(ms=gaps_ms())
    def wait(self, ms: int) -> None:
        """Time goes by and nobody looks."""
        self.now = EpochMs(self.now + ms)

    @precondition(lambda self: next_due(self.standing) is not None)
    @rule(early_ms=st.sampled_from([-1, 0, 0, 1, 1, 2, 5 * MINUTE_MS]))
    def wait_until_nearly_due(self, early_ms: int) -> None:
        """Time goes by up to about the instant at which the next thing is due."""
        due = next_due(self.standing)
        assert due is not None
        self.now = EpochMs(max(self.now, due[0] - early_ms))

    @rule()
    def wake(self) -> None:
        """The scheduler of one of the two engines wakes up."""
        for decision in elapse(self.waker, self.now):
            assert decision.at <= self.now
            if decision.fact is Fact.ENDED:
                assert self.now >= decision.before.ends_at, "ended early"
            self.woken.append(decision)
            self.waker = decision.after

    # --- rules: events ---

    @initialize(data=st.data(), known=st.sampled_from([True, True, True, False]))
    def usually_begin_with_a_registration(self, data: st.DataObject, known: bool) -> None:
        """Most auctions are registered before anything else is said about them."""
        if known:
            self.register(data)

    @precondition(lambda self: self.sleeper.registration is None)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        """A registration around now; earlier starts and even earlier ends occur."""
        self.tell(Register(data.draw(registrations(around=self.now))))

    @rule(leader_changed=st.sampled_from([True, True, False]), count=st.integers(1, 3))
    def bid(self, leader_changed: bool, count: int) -> None:
        """Bids that arrive in the same millisecond."""
        for _ in range(count):
            self.tell(Bid(f"bid-{len(self.log)}", leader_changed=leader_changed))

    @precondition(lambda self: self.standing.status in LIVE)
    @rule(
        left_ms=st.one_of(st.sampled_from([1, 1, 1, 2, MINUTE_MS, 0]), st.integers(1, 3 * MINUTE_MS)),
        count=st.integers(1, 4),
    )
    def bid_near_the_end(self, left_ms: int, count: int) -> None:
        """Bids with `left_ms` on the countdown, again after each extension: with 1 ms they count, with 0 they are late."""
        for _ in range(count):
            if self.standing.status in LIVE:
                self.now = EpochMs(max(self.now, self.standing.ends_at - left_ms))
            self.tell(Bid(f"bid-{len(self.log)}"))

    @precondition(lambda self: self.standing.status in LIVE)
    @rule()
    def pause(self) -> None:
        """The remaining time is frozen."""
        self.tell(Pause("alarm"))

    @precondition(lambda self: self.standing.status is Status.PAUSED)
    @rule()
    def resume(self) -> None:
        """The remaining time runs on."""
        self.tell(Resume())

    @rule(offset_ms=st.one_of(st.integers(-MINUTE_MS, 30 * MINUTE_MS), st.integers(-HOUR_MS, 40 * HOUR_MS)))
    def reschedule(self, offset_ms: int) -> None:
        """An operator sets an end around now, possible or not."""
        self.tell(Reschedule(EpochMs(self.now + offset_ms)))

    @precondition(lambda self: self.standing.status in LIVE)
    @rule(edge=st.sampled_from(["now", "start", "cap"]), past_ms=st.sampled_from([0, 1]))
    def reschedule_to_an_edge(self, edge: str, past_ms: int) -> None:
        """An operator sets an end that is just in reach, or just not."""
        standing = self.standing
        edges = {"now": self.now, "start": standing.registered.starts_at, "cap": standing.cap_ends_at}
        self.tell(Reschedule(EpochMs(edges[edge] + past_ms)))

    @precondition(lambda self: self.sleeper.registration is not None)
    @rule(early_ms=st.sampled_from([-1, 0, 0, 0, 1]))
    def withdraw_near_the_end_of_the_window(self, early_ms: int) -> None:
        """The offer is cancelled about when a window of whole minutes runs out: at the last instant, or just too late."""
        registered = self.sleeper.registered
        begins_at = registered.offer.offer_created_at or registered.starts_at
        own_minutes = registered.offer.modification_window_minutes
        minutes = max(0, (self.now - begins_at) // MINUTE_MS + 1) if own_minutes is None else own_minutes
        self.now = EpochMs(max(self.now, begins_at + minutes * MINUTE_MS - early_ms))
        self.tell(Withdraw(WithdrawalReason.OTHER, minutes))

    @rule(data=st.data(), kind=st.sampled_from(["pause", "resume", "cancel", "register", "repeat", "repeat"]))
    def something_out_of_place(self, data: st.DataObject, kind: str) -> None:
        """An event that fits rarely: a cancellation, another registration, a repeated one, a pause of the paused."""
        if kind == "pause":
            self.tell(Pause())
        elif kind == "resume":
            self.tell(Resume())
        elif kind == "cancel":
            self.tell(Cancel("withdrawn"))
        elif kind == "register":
            terms = data.draw(registrations(around=self.now))
            own = self.tell(Register(terms))
            if own.before.registration is not None:
                assert own.after is own.before
                assert (own.refusal is None) == (terms == own.before.registration)
        else:
            self.repeat(data)

    def repeat(self, data: st.DataObject) -> None:
        """Deliver a registration or a cancellation that was applied once more: nothing changes."""
        applied = [said for said in self.slept if said.fact in (Fact.REGISTERED, Fact.CANCELLED, Fact.TOMBSTONED)]
        if applied:
            said = data.draw(st.sampled_from(applied))
            again = Register(said.after.registered) if said.fact is Fact.REGISTERED else Cancel(said.after.reason or "")
            own = self.tell(again)
            assert own.after is own.before
            assert own.fact is None
            assert (own.refusal is None) == isinstance(again, Register)

    @precondition(lambda self: self.sleeper.status.is_terminal)
    @rule(data=st.data(), known=st.sampled_from([True, True, True, False]))
    def next_auction(self, data: st.DataObject, known: bool) -> None:
        """Nothing more will come of this auction; its books are closed and another one begins."""
        self.close_the_books()
        self.open_the_books(self.now)
        self.usually_begin_with_a_registration(data, known)

    # --- one event, on both engines ---

    @property
    def standing(self) -> Auction:
        """The auction as it stands now, with everything that is due applied."""
        due = list(elapse(self.sleeper, self.now))
        return due[-1].after if due else self.sleeper

    def tell(self, event: InputEvent) -> Decision:
        """Deliver `event` now, check everything that follows from it, and return its own decision."""
        before, due = self.sleeper, list(elapse(self.sleeper, self.now))
        decisions = fold(before, event, self.now)
        own = decisions[len(due)]
        assert decisions[: len(due)] == due
        assert list(elapse(decisions[-1].after, self.now)) == [], "what the event made due was left undone"
        assert own.at == self.now
        check_decision(decisions[len(due) - 1].after if due else before, event, own)
        if isinstance(event, Bid):
            self.check_bid(before, own)
        if isinstance(event, Reschedule):
            self.check_reschedule(event.ends_at, own)
        if isinstance(event, Withdraw):
            self.check_withdrawal(event.default_window_minutes, own)
        for decision in decisions:
            self.check_fact(decision)
        if before.status.is_terminal:
            assert decisions == [own]
            assert own.after is before
        # Only what has passed goes on record, so that a failure above is not hidden by one in `teardown`.
        self.log.append((event, self.now))
        self.slept += decisions
        self.sleeper = decisions[-1].after
        self.woken += fold(self.waker, event, self.now)
        self.waker = self.woken[-1].after
        assert self.waker == self.sleeper
        return own

    def check_bid(self, before: Auction, own: Decision) -> None:
        """`arrival < ends_at` decides, by the end that stood before, whoever was awake."""
        if before.registration is None:
            in_time = False
        elif before.status is Status.PAUSED:
            in_time = True
        else:
            in_time = not before.status.is_terminal and self.now < before.ends_at
        assert (own.fact in (Fact.BID_ACCEPTED, Fact.EXTENDED)) == in_time

    def check_reschedule(self, ends_at: EpochMs, own: Decision) -> None:
        """A live auction takes exactly the ends after now, after the start, and within the cap of the original end."""
        before, in_reach = own.before, False
        if before.status in LIVE:
            registered = before.registered
            cap_ends_at = registered.ends_at + self.paused_ms + registered.policy.total_cap_ms
            in_reach = self.now < ends_at <= cap_ends_at and registered.starts_at < ends_at
        assert (own.refusal is None) == in_reach
        assert own.changed == (in_reach and ends_at != before.ends_at)
        assert own.after.ends_at == (ends_at if in_reach else before.ends_at)

    def check_withdrawal(self, default_minutes: int, own: Decision) -> None:
        """An offer is cancelled exactly while its auction is not over and its own window, or the default one, is open."""
        before, in_window = own.before, False
        if before.registration is not None:
            offer, begins_at = before.registration.offer, before.registration.starts_at
            minutes = offer.modification_window_minutes
            begins_at = offer.offer_created_at or begins_at
            in_window = self.now < begins_at + 60_000 * (default_minutes if minutes is None else minutes)
        open_auction = before.registration is not None and not before.status.is_terminal
        assert own.changed == (open_auction and in_window)
        assert (own.fact is Fact.OFFER_CANCELLED) == own.changed
        if not own.changed:
            assert own.refusal is not None
            assert (own.refusal.code is RefusalCode.WINDOW_EXPIRED) == open_auction

    def check_fact(self, decision: Decision) -> None:
        """Keep the books, and hold what happened against them."""
        before, after = decision.before, decision.after
        match decision.fact:
            case Fact.EXTENDED:
                check_extension(decision)
                assert before.ends_at - decision.at <= before.policy.soft_close_window_ms, "the window was closed"
            case Fact.ENDED:
                assert decision.at == before.ends_at == after.ended_at
                assert decision.at <= self.now, "ended early"
            case Fact.PAUSED:
                self.paused_since, self.frozen_ms = decision.at, before.ends_at - decision.at
                assert after.paused_remaining_ms == self.frozen_ms > 0
                assert after.paused_from is before.status
            case Fact.RESUMED:
                assert self.paused_since is not None
                self.paused_ms += decision.at - self.paused_since
                self.paused_since = None
                assert after.remaining_ms(decision.at) == self.frozen_ms
                assert after.status is before.paused_from
                assert after.extension_left_ms == before.extension_left_ms
                assert after.extension_used_ms == before.extension_used_ms
            case Fact.RESCHEDULED:
                assert decision.at < after.ends_at
                assert after.registered.starts_at < after.ends_at
            case _:
                assert after.ends_at == before.ends_at or decision.fact is Fact.REGISTERED
        if after.registration is not None:
            check_auction(after, self.paused_ms)

    # --- always ---

    @invariant()
    def the_countdown_is_sound(self) -> None:
        """Remaining time is never negative, frozen while paused; the next tick is after now and before the end."""
        auction = self.standing
        if auction.registration is None:
            return
        tick = next_tick_at(auction, self.now)
        if auction.status is Status.PAUSED:
            assert auction.remaining_ms(self.now) == self.frozen_ms
        elif auction.status.is_terminal:
            assert tick is None
        else:
            assert auction.remaining_ms(self.now) == auction.ends_at - self.now > 0
            assert tick is None or self.now < tick < auction.ends_at

    def teardown(self) -> None:
        """Let all the time go by, so that what is not paused ends."""
        self.now = EpochMs(self.now + FAR_MS)
        self.close_the_books()

    def close_the_books(self) -> None:
        """Compare the three engines, and count what may happen only once."""
        self.slept += elapse(self.sleeper, self.now)
        self.woken += elapse(self.waker, self.now)
        assert self.woken == self.slept, "waking up changed history"
        assert self.refolded() == self.slept, "the log does not give the same history again"
        for earlier, later in pairwise(self.slept):
            assert later.before is earlier.after
        count = Counter(decision.fact for decision in self.slept)
        final = self.slept[-1].after if self.slept else Auction(AUCTION_ID)
        over = sum(count[fact] for fact in (Fact.ENDED, Fact.CANCELLED, Fact.OFFER_CANCELLED, Fact.TOMBSTONED))
        assert over == (0 if final.status in (Status.UNREGISTERED, Status.PAUSED) else 1)
        assert all(count[fact] <= 1 for fact in (Fact.REGISTERED, Fact.STARTED))
        assert final.version == sum(decision.changed for decision in self.slept)
        assert final.extension_count == count[Fact.EXTENDED]
        assert final.paused_total_ms == self.paused_ms

    def refolded(self) -> list[Decision]:
        """What an engine writes that reads the log afterwards."""
        auction, decisions = Auction(AUCTION_ID), []
        for event, arrival in self.log:
            decisions += fold(auction, event, arrival)
            auction = decisions[-1].after
        return [*decisions, *elapse(auction, self.now)]


@pytest.mark.requirement("R2")
@pytest.mark.requirement("R15")
@pytest.mark.requirement("R19")
@pytest.mark.requirement("R25")
@pytest.mark.requirement("R27")
@pytest.mark.requirement("B1")
@pytest.mark.requirement("B2")
def test_no_sequence_of_events_breaks_a_promise() -> None:
    """Whatever happens to an auction, in whatever order and at whatever instants, every promise of the domain holds."""
    limits = settings(max_examples=80, stateful_step_count=50, deadline=None)
    run_state_machine_as_test(FoldMachine, settings=limits)


def test_the_machine_visits_every_status_and_every_fact() -> None:
    """The rules above, some played by hand, reach each status and each fact that a transition can bring about."""
    seen: set[object] = set()
    for play in (_live_long, _die_young, _think_again, _come_too_late):
        machine = FoldMachine()
        play(machine)
        seen |= {decision.after.status for decision in machine.slept} | {said.fact for said in machine.slept}
        machine.teardown()
    assert set(Status) - seen == {Status.UNREGISTERED}
    assert set(Fact) - {Fact.CORRECTED, Fact.OUTAGE_EXTENDED} <= seen


def _begin(machine: FoldMachine) -> None:
    machine.tell(Register(Registration(AUCTION_ID, EpochMs(T0 + 1), EpochMs(T0 + HOUR_MS))))


def _live_long(machine: FoldMachine) -> None:
    _begin(machine)
    machine.wait_until_nearly_due(-1)
    machine.bid(leader_changed=True, count=1)
    machine.bid_near_the_end(left_ms=1, count=1)
    machine.pause()
    machine.wait(HOUR_MS)
    machine.resume()
    machine.reschedule(30 * MINUTE_MS)
    machine.bid_near_the_end(left_ms=0, count=1)


def _die_young(machine: FoldMachine) -> None:
    _begin(machine)
    machine.tell(Cancel("withdrawn"))


def _think_again(machine: FoldMachine) -> None:
    _begin(machine)
    machine.withdraw_near_the_end_of_the_window(early_ms=1)


def _come_too_late(machine: FoldMachine) -> None:
    machine.tell(Cancel("withdrawn"))
    _begin(machine)
    machine.bid(leader_changed=True, count=1)
