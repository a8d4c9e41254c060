"""A state machine drives the real HTTP surface, and the pure domain says beforehand what every answer must be.

The model is `engine.domain.fold` and nothing else. It is fed with the stamps that the server gave: `arrival_ms` of
`POST /events`, and for a command the `occurred_at` of its record. A refused command leaves no stamp: there the answer must be
one that the domain gives at some instant between the asking and the answering.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.contract.timers import TimerRecord, timer
from engine.domain.auction import Auction, Offer, Registration
from engine.domain.decide import Decision, Fact
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.fold import elapse, fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.policy import Policy
from engine.domain.withdrawal import WithdrawalReason, window_ends_at
from engine.journal import ALWAYS_PARKED
from tests.integration.events import event
from tests.integration.records import records_of
from tests.live import LiveStack, until

pytestmark = pytest.mark.integration

EXAMPLES: Final = 30
STEPS: Final = 18
SLACK_MS: Final = 3
"""Between this process's wall clock and a stamp: both show the same machine's clock, in whole milliseconds."""
WINDOW_MINUTES: Final = 30
"""The default of AUCTION_TIMER_OFFER_MODIFICATION_WINDOW_MINUTES."""
PASSING_MS_MAX: Final = 300
BY_TIME: Final = {Fact.STARTED, Fact.CLOSING, Fact.ENDED}
MOVING: Final = {"server_time", "remaining_ms", "cursor", "trace_id"}
"""What of a timer depends on when and where it is looked at."""

NAMES: Final = st.sampled_from(["one", "one", "one", "two"])
"""The first one is registered from the beginning; the second one is what unknown and out of order look like."""
LENGTHS_MS: Final = st.sampled_from([-5_000, 200, 500, HOUR_MS, HOUR_MS])
WINDOWS: Final = st.sampled_from([None, None, 60, 0])
POLICIES: Final = st.sampled_from(
    [
        Policy(soft_close_window_ms=0),
        Policy(soft_close_window_ms=HOUR_MS, extension_ms=MINUTE_MS, total_cap_ms=0),
        Policy(soft_close_window_ms=2 * HOUR_MS, extension_ms=MINUTE_MS, total_cap_ms=10 * MINUTE_MS, max_extensions=2),
        Policy(soft_close_window_ms=60, extension_ms=200, total_cap_ms=250),
    ]
)


def now_ms() -> EpochMs:
    """The clock that the server's authority reads, too."""
    return EpochMs(int(time.time() * 1_000))


@dataclass(slots=True)
class Model:
    """What must have become of one auction."""

    auction: Auction
    offer_id: str
    sent: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    """Events with the arrival of each."""
    history: list[Decision] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    """What operators did about its commands, in order."""

    def take(self, event: InputEvent, at: int) -> Decision:
        """Fold an event that arrived at `at`; its own decision."""
        decisions = fold(self.auction, event, EpochMs(at))
        self.history += [decision for decision in decisions if decision.fact is not None]
        self.auction = decisions[-1].after
        return own(decisions)

    def facts_until(self, at: EpochMs) -> list[tuple[str, int, int]]:
        """What the records must say once time has done its part up to `at`."""
        whole = [*self.history, *elapse(self.auction, at)]
        return [(str(each.fact), each.at, each.after.version) for each in whole]

    def may_park(self, waiting: "Waiting", low: EpochMs, high: EpochMs) -> bool:
        """Whether a command that enters again between `low` and `high` may come back to troubleshooting."""
        decisions = self.possible(waiting.asked, low, high)
        return any(parks(decision, waiting.asked, waiting.reply_to) for decision in decisions)

    def possible(self, event: InputEvent, low: EpochMs, high: EpochMs) -> list[Decision]:
        """What may be decided about an event that arrives somewhere from `low` to `high`."""
        instants = {low, high}
        for due in elapse(self.auction, high):
            instants |= {EpochMs(due.at - 1), due.at}
        if isinstance(event, Withdraw) and self.auction.registration is not None:
            instants.add(window_ends_at(self.auction, event.default_window_minutes))
        return [own(fold(self.auction, event, at)) for at in instants if low <= at <= high]


@dataclass(slots=True)
class Waiting:
    """A command in troubleshooting."""

    name: str
    asked: InputEvent
    reply_to: str | None
    attempts: int = 1


def own(decisions: list[Decision]) -> Decision:
    """The decision about the event itself: the others are what time does."""
    (found,) = [decision for decision in decisions if decision.fact not in BY_TIME]
    return found


def parks(decision: Decision, event: InputEvent, reply_to: str | None) -> bool:
    """Whether a refusal waits for an operator (contract, section 6)."""
    if decision.refusal is None:
        return False
    return decision.refusal.code in ALWAYS_PARKED or (reply_to is None and not isinstance(event, Cancel))


def still(view: dict[str, Any]) -> dict[str, Any]:
    """A timer without what depends on when it is looked at."""
    return {name: value for name, value in view.items() if name not in MOVING | {"next_poll_ms"}}


class HttpMachine(RuleBasedStateMachine):
    """Two auctions, everything that can be asked of them over HTTP, in any order."""

    def __init__(self, stack: LiveStack) -> None:
        super().__init__()
        self.stack = stack
        self.steps = 0
        run = uuid4().hex[:12]
        self.models = {
            name: Model(Auction(f"machine-{run}-{name}"), f"offer-{run}-{name}") for name in ("one", "two")
        }  # fmt: skip
        self.waiting: dict[str, Waiting] = {}

    # Events.

    def post(
        self,
        name: str,
        event_type: str,
        asked: InputEvent,
        reply_to: str | None,
        *,
        by_offer: bool = False,
        **data: Any,
    ) -> Decision:
        """Send an event, and hold what is said of it against the domain."""
        model = self.models[name]
        about = {"offer_id": model.offer_id} if by_offer else {"auction_id": model.auction.auction_id}
        sent = event(event_type, **about, **data)
        if reply_to is not None:
            sent["data"]["reply_to"] = reply_to
        (result,) = self.stack.post(sent)
        assert result["status"] == "accepted"
        model.sent.append((sent, result["arrival_ms"]))
        decision = model.take(asked, result["arrival_ms"])
        outcome = self.decided(sent["id"])
        if parks(decision, asked, reply_to):
            self.waiting[sent["id"]] = Waiting(name, asked, reply_to)
            assert (outcome["outcome"], outcome["attempts"]) == ("IN_TROUBLESHOOTING_QUEUE", 1)
            assert decision.refusal is not None
            assert outcome["error_code"] == decision.refusal.code.value
        elif isinstance(asked, Bid | Register):
            assert outcome["outcome"] == "PROCESSED"  # of these many no more is kept
        else:
            self.check_outcome(outcome, decision)
        return decision

    def decided(self, command_id: str) -> dict[str, Any]:
        """What `/commands/{id}` says once an engine has been there."""

        def told() -> dict[str, Any] | None:
            answer = self.stack.http.get(f"/commands/{command_id}")
            return answer.json() if answer.status_code == 200 and answer.json()["outcome"] != "PENDING" else None

        outcome: dict[str, Any] = until(told, f"{command_id} is decided")
        return outcome

    def check_outcome(self, outcome: dict[str, Any], decision: Decision) -> None:
        """What is kept is what the domain decided."""
        if decision.refusal is not None:
            assert (outcome["outcome"], outcome["error_code"]) == ("REFUSED", decision.refusal.code.value)
        elif decision.fact is Fact.LATE_BID_IGNORED:
            assert outcome["outcome"] == "LATE"
        else:
            assert outcome["outcome"] == ("UNCHANGED" if decision.fact is None else "APPLIED")

    @initialize(length_ms=st.sampled_from([500, HOUR_MS, HOUR_MS, HOUR_MS]), policy=POLICIES, window=WINDOWS)
    def begin(self, length_ms: int, policy: Policy, window: int | None) -> None:
        """One auction runs when the example begins."""
        self.start("one", length_ms, policy, window)

    @rule(name=NAMES, length_ms=LENGTHS_MS, policy=POLICIES, window=WINDOWS)
    def start_by_rule(self, name: str, length_ms: int, policy: Policy, window: int | None) -> None:
        """A start, in time, out of order, or with other terms than an earlier one."""
        self.start(name, length_ms, policy, window)

    def start(self, name: str, length_ms: int, policy: Policy, window: int | None) -> None:
        """Register an auction that ends so much later, with an offer."""
        model, now = self.models[name], now_ms()
        offer = Offer(
            model.offer_id, "owner-1", "maker-1", "buyer-1", (), EpochMs(now - 1_000), window, 900, "EUR", 500
        )
        registration = Registration(
            model.auction.auction_id, EpochMs(now - 10_000), EpochMs(now + length_ms), policy, offer
        )  # fmt: skip
        self.register(name, registration)

    @precondition(lambda self: any(model.auction.registration for model in self.models.values()))
    @rule(name=NAMES)
    def start_again(self, name: str) -> None:
        """The terms that stand, under another event id: no effect."""
        registration = self.models[name].auction.registration
        if registration is not None:
            self.register(name, registration)

    def register(self, name: str, registration: Registration) -> None:
        """Send a registration as a start."""
        offer = {
            key: getattr(registration.offer, key)
            for key in Offer.__dataclass_fields__
            if getattr(registration.offer, key) not in (None, ())
        }
        policy = {
            key: getattr(registration.policy, key)
            for key in Policy.__dataclass_fields__
            if getattr(registration.policy, key) is not None
        }
        times = {"starts_at": registration.starts_at, "ends_at": registration.ends_at}
        self.post(name, "offers.auction.started", Register(registration), None, policy=policy, **times, **offer)

    @rule(name=NAMES, leader_changed=st.booleans())
    def bid(self, name: str, leader_changed: bool) -> None:
        """A bid: before, within, after."""
        bid_id = uuid4().hex
        data = {"bid_id": bid_id, "amount_minor": 100, "leader_changed": leader_changed}
        self.post(name, "auctions.bid.accepted", Bid(bid_id, 100, None, None, leader_changed), None, **data)

    @rule(
        name=NAMES,
        reply=st.booleans(),
        kind=st.sampled_from(["pause", "resume", "pause", "resume", "cancel", "complete"]),
    )
    def command_by_event(self, name: str, reply: bool, kind: str) -> None:
        """A command as an event, with somebody who waits for the reply or nobody."""
        event_type, asked = {
            "cancel": ("auctions.cancel.requested", Cancel("by event")),
            "complete": ("offers.cancellation.completed", Cancel("by event")),
            "pause": ("auctions.pause.requested", Pause("by event")),
            "resume": ("auctions.resume.requested", Resume("by event")),
        }[kind]
        self.post(name, event_type, asked, f"machine-{uuid4().hex}" if reply else None, reason="by event")

    # Only where the offer has its auction: a cancellation that waits in every shard has as many stamps.
    @precondition(lambda self: self.steps > STEPS // 2)
    @rule(name=NAMES, reply=st.booleans())
    def cancel_by_offer(self, name: str, reply: bool) -> None:
        """A cancellation that names the offer only is one of the auction that was registered with it."""
        if self.models[name].auction.registration is not None:
            reply_to = f"machine-{uuid4().hex}" if reply else None
            kind = "offers.cancellation.completed"
            self.post(name, kind, Cancel("by offer"), reply_to, by_offer=True, reason="by offer")

    @rule(name=NAMES, reply=st.booleans(), delta_ms=st.sampled_from([-HOUR_MS, 100, 5 * MINUTE_MS, 30 * HOUR_MS]))
    def reschedule(self, name: str, reply: bool, delta_ms: int) -> None:
        """Another end: reachable, past, too far."""
        ends_at = EpochMs(now_ms() + delta_ms)
        reply_to = f"machine-{uuid4().hex}" if reply else None
        self.post(name, "auctions.schedule.changed", Reschedule(ends_at, None), reply_to, ends_at=ends_at)

    @precondition(lambda self: any(model.sent for model in self.models.values()))
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """An event that was sent before: a duplicate, with the arrival of the first, and no effect."""
        sent, arrival_ms = data.draw(st.sampled_from([each for model in self.models.values() for each in model.sent]))
        (result,) = self.stack.post(sent)
        assert (result["status"], result["arrival_ms"]) == ("duplicate", arrival_ms)

    # Troubleshooting.

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        """An operator cancels what waits: once, for good, and nothing else changes."""
        command_id = data.draw(st.sampled_from(sorted(self.waiting)))
        waiting = self.waiting.pop(command_id)
        for expected in (200, 409):
            answer = self.stack.http.post(f"/ops/troubleshooting/{command_id}/cancel", json={"reason": "of no use"})
            assert answer.status_code == expected, answer.text
        assert self.decided(command_id)["outcome"] == "CANCELED"
        self.models[waiting.name].operations.append("OPERATOR_CANCEL")

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """An operator sends what waits round again: it arrives anew, and is decided as of then, or waits once more."""
        command_id = data.draw(st.sampled_from(sorted(self.waiting)))
        waiting, low = self.waiting[command_id], EpochMs(now_ms() - SLACK_MS)
        model = self.models[waiting.name]
        answer = self.stack.http.post(f"/ops/troubleshooting/{command_id}/retry")
        assert (answer.status_code, answer.json()["attempts"]) == (200, waiting.attempts), answer.text
        model.operations.append("OPERATOR_RETRY")
        outcome = self.decided(command_id)
        if outcome["outcome"] == "IN_TROUBLESHOOTING_QUEUE":
            waiting.attempts += 1
            assert outcome["attempts"] == waiting.attempts
            assert model.may_park(waiting, low, EpochMs(now_ms() + SLACK_MS))
            return
        del self.waiting[command_id]
        self.check_outcome(outcome, model.take(waiting.asked, outcome["arrival_ms"]))

    # Commands.

    @rule(name=NAMES, command=st.sampled_from(["pause", "resume", "pause", "resume", "cancel"]))
    def ask(self, name: str, command: str) -> None:
        """A command over HTTP."""
        asked: InputEvent = {"cancel": Cancel("asked"), "pause": Pause("asked"), "resume": Resume("asked")}[command]
        model, correlation_id, low = self.models[name], f"machine-{uuid4().hex}", EpochMs(now_ms() - SLACK_MS)
        answer = self.stack.http.post(
            f"/auctions/{model.auction.auction_id}/{command}",
            json={"reason": "asked"},
            headers={"X-Correlation-Id": correlation_id},
        )
        self.check_answer(model, asked, answer, low, correlation_id)

    # What ends an auction comes late, or most of an example would be about one that is over.
    @precondition(lambda self: self.steps > STEPS // 2)
    @rule(name=NAMES)
    def cancel_offer(self, name: str) -> None:
        """An offer is cancelled; the preflight, asked right before, knew."""
        asked = Withdraw(WithdrawalReason.OTHER, WINDOW_MINUTES, "a note", None)
        model, correlation_id, low = self.models[name], f"machine-{uuid4().hex}", EpochMs(now_ms() - SLACK_MS)
        ahead = self.stack.http.get(f"/offers/{model.offer_id}/cancellation")
        if self.is_public(model):
            view = ahead.json()
            expected = own(fold(model.auction, asked, view["server_time"]))
            code = None if expected.refusal is None else expected.refusal.code.value
            assert (view["cancellable"], view["error_code"]) == (code is None, code)
            left_ms = window_ends_at(model.auction, WINDOW_MINUTES) - view["server_time"]
            assert view["remaining_window_ms"] == (0 if expected.before.status.is_terminal else max(0, left_ms))
        else:
            assert ahead.status_code == 404
        answer = self.stack.http.put(
            f"/offers/{model.offer_id}/cancel",
            json={"reason_code": "other", "note": "a note"},
            headers={"X-Correlation-Id": correlation_id},
        )
        self.check_answer(model, asked, answer, low, correlation_id)

    def check_answer(
        self, model: Model, asked: InputEvent, answer: httpx.Response, low: EpochMs, correlation_id: str
    ) -> None:
        """200 with the timer of the domain's decision, or the domain's refusal, or 404 for what nobody may see."""
        body = answer.json()
        if not self.is_public(model):
            assert (answer.status_code, body["error_code"]) == (404, "RESOURCE_NOT_FOUND")
            return
        if answer.status_code == 200:
            records = records_of(self.stack, model.auction.auction_id)
            (record,) = [each for each in records if each["correlation_id"] == correlation_id]
            decision = model.take(asked, record["occurred_at"])
            assert str(decision.fact) == record["event_type"]
            view = body["timer"] if isinstance(asked, Withdraw) else body
            assert still(view) == still(timer(TimerRecord(decision.after), now_ms(), None))
            return
        assert answer.status_code == 409, answer.text
        told = (body["error_code"], body["current_status"], body["attempted_status"])
        refusals = [
            decision.refusal for decision in model.possible(asked, low, EpochMs(now_ms() + SLACK_MS))
        ]  # fmt: skip
        assert told in [(r.code.value, r.current_status, r.attempted_status) for r in refusals if r is not None]

    @staticmethod
    def is_public(model: Model) -> bool:
        """Whether readers may see the auction."""
        return model.auction.status.is_public

    # Time, and what stands.

    @precondition(lambda self: self.steps % 3 == 0)
    @rule(ms=st.integers(20, PASSING_MS_MAX))
    def time_passes(self, ms: int) -> None:
        """Nobody asks anything for a while; an auction may start, close or end meanwhile."""
        time.sleep(ms / 1_000)

    @invariant()
    def timers_are_the_domains(self) -> None:
        """Each timer is what the domain says of the instant in which it was read, as soon as the engine has been there."""
        self.steps += 1
        for model in self.models.values():
            until(lambda model=model: self.agrees(model), f"{model.auction} is what is shown")

    def agrees(self, model: Model) -> bool:
        """Whether the timer that is shown now is the model's."""
        answer = self.stack.http.get(f"/auctions/{model.auction.auction_id}/timer")
        if not self.is_public(model):
            return answer.status_code == 404
        if answer.status_code != 200:
            return False
        shown = answer.json()
        standing = [model.auction, *(each.after for each in elapse(model.auction, shown["server_time"]))][-1]
        expected = timer(TimerRecord(standing), shown["server_time"], None)
        return still(shown) == still(expected) and shown["remaining_ms"] == expected["remaining_ms"]

    def teardown(self) -> None:
        """The records tell the same story, in the same order, with the same instants."""
        for model in self.models.values():
            if not model.history and not model.operations:
                continue

            def told(model: Model = model) -> bool:
                records = records_of(self.stack, model.auction.auction_id)
                done = [each["event_type"] for each in records if each["event_type"].startswith("OPERATOR_")]
                facts = [
                    (each["event_type"], each["occurred_at"], each["version"])
                    for each in records
                    if not each["event_type"].startswith("OPERATOR_")
                ]
                return facts == model.facts_until(now_ms()) and done == model.operations

            until(told, f"the records of {model.auction.auction_id} are the domain's")


@pytest.mark.requirement("R2", "R19", "R20", "R24", "R25", "R26", "R27", "R29", "R30")
def test_every_answer_is_the_domains(live_stack: LiveStack) -> None:
    """Starts, bids, commands, repetitions and passing time in any order: answers, timers and records follow the fold."""
    run_state_machine_as_test(
        lambda: HttpMachine(live_stack),
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            # A real clock answers a shortened history differently, so there is nothing to be gained from shortening it.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
