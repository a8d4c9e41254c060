"""Tests for reconciler.ledger: the fold of the audit log, written from the records alone."""

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings

from engine.contract.audit import ChainHead, chained, record
from engine.contract.intake import SCHEDULER
from engine.domain.auction import Auction, Registration
from engine.domain.correction import correct
from engine.domain.decide import Decision, Fact
from engine.domain.events import Bid, Register
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Cap, Policy
from reconciler.ledger import LogGapError, Told, fold_record
from tests.engine.domain.examples import AUCTION_ID, T0, at
from tests.engine.domain.strategies import Log, logs

pytestmark = pytest.mark.requirement("R12")


def linked(decision: Decision, seq: int, **details: Any) -> dict[str, str]:
    """The record of a decision as number `seq`, with some details falsified."""
    fields = record(
        decision,
        actor=SCHEDULER,
        event_id="event-1",
        intake_id="1-0",
        trace_id="trace-1",
        correlation_id="req-1",
        recorded_at=decision.at,
    )
    if details:
        fields["details"] = orjson.dumps(orjson.loads(fields["details"]) | details).decode()
    return chained(ChainHead(seq - 1), fields)[1]


def told_of(*decisions: Decision) -> Told:
    """What the log says after decisions."""
    told = None
    for seq, decision in enumerate(decisions, start=1):
        told = fold_record(told, linked(decision, seq))
    assert told is not None
    return told


def running(**policy: Any) -> list[Decision]:
    """An auction of an hour from T0 on, in its closing window, as the decisions that made it."""
    registration = Registration(AUCTION_ID, T0, EpochMs(T0 + HOUR_MS), Policy(**policy))
    decisions = fold(Auction(AUCTION_ID), Register(registration), EpochMs(T0 - 1))
    for event, when in ((Bid("first"), EpochMs(T0 + 50 * MINUTE_MS)),):
        decisions += fold(decisions[-1].after, event, when)
    return decisions


@settings(max_examples=150, deadline=None)
@given(logs())
def test_the_log_alone_tells_the_state(log: Log) -> None:
    """After any history the fold of its records is the state that the domain has reached, field by field."""
    auction, told, seq = Auction(AUCTION_ID), None, 0
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            auction = decision.after
            if decision.fact is None:
                continue
            seq += 1
            told = fold_record(told, linked(decision, seq))
            assert told is not None
            assert (told.auction, told.seq) == (auction, seq)
            assert told.is_live == (auction.status.is_public and not auction.status.is_terminal)
            assert told.breach is None
            assert told.lawful.auction.ends_at == auction.ends_at


@pytest.mark.requirement("R15")
def test_an_extension_of_more_than_15_minutes_is_a_breach() -> None:
    """The end that stands moves by 15 minutes only, whatever the log says, and the breach names the record."""
    decisions = running()
    told = told_of(*decisions[:-1])
    before = told.auction.ends_at
    extended = replace(decisions[-1], after=replace(decisions[-1].after, ends_at=EpochMs(before + 20 * MINUTE_MS)))
    told = fold_record(told, linked(extended, 9, ends_at=before + 20 * MINUTE_MS))
    assert told is not None
    assert told.breach == f"record 9 extends by {20 * MINUTE_MS} ms, at most {15 * MINUTE_MS} are allowed"
    assert told.lawful.auction.ends_at == before + 15 * MINUTE_MS
    assert told.lawful.auction.clipped_by is Cap.TOTAL


@pytest.mark.requirement("R15")
def test_an_extension_past_the_total_cap_is_a_breach() -> None:
    """The end that stands is clipped to the policy's cap."""
    decisions = running(total_cap_ms=2 * MINUTE_MS)
    told = told_of(*decisions[:-1])
    told = fold_record(told, linked(decisions[-1], 9, ends_at=T0 + HOUR_MS + 5 * MINUTE_MS))
    assert told is not None
    assert told.breach is not None
    assert "past the last one allowed" in told.breach
    assert told.lawful.auction.ends_at == T0 + HOUR_MS + 2 * MINUTE_MS


@pytest.mark.requirement("R15")
@pytest.mark.parametrize("fact", [Fact.RESCHEDULED, Fact.RESUMED, Fact.CORRECTED])
def test_any_record_that_moves_the_end_past_the_cap_is_a_breach(fact: Fact) -> None:
    """An operator's end, a pause that is over and a correction are bound as extensions are, and clipped as they are."""
    told = told_of(*running())
    cap = told.auction.cap_ends_at
    past = replace(told.auction, ends_at=EpochMs(cap + 1), version=told.auction.version + 1)
    details = {"ends_at": past.ends_at, "paused_ms": 0, "reason": "x", "cause": "x"}
    found = fold_record(told, linked(Decision(told.auction, past, at(3_000), fact, details=details), 9))
    assert found is not None
    assert found.breach == f"record 9 moves the end to {cap + 1}, past the last one allowed, {cap}"
    assert (found.lawful_ends_at, found.lawful.auction.ends_at) == (cap, cap)


@pytest.mark.requirement("R15")
def test_a_lawful_new_end_makes_a_breach_good() -> None:
    """What an operator has set within the cap stands, whatever an extension before it has broken."""
    *before, last = running()
    told = told_of(*before)
    far = EpochMs(told.auction.ends_at + 20 * MINUTE_MS)
    broken = fold_record(told, linked(replace(last, after=replace(last.after, ends_at=far)), 9, ends_at=far))
    assert broken is not None
    assert broken.breach is not None
    new = EpochMs(told.auction.ends_at + MINUTE_MS)
    after = replace(broken.auction, ends_at=new, version=broken.auction.version + 1)
    decision = Decision(broken.auction, after, at(3_000), Fact.RESCHEDULED, details={"ends_at": new})
    found = fold_record(broken, linked(decision, 10))
    assert found is not None
    assert (found.breach, found.lawful.auction.ends_at) == (None, new)


@pytest.mark.requirement("R15")
def test_what_is_over_is_not_clipped() -> None:
    """A breach that led to a close is told, and the end that bidders saw stays the end."""
    told = told_of(*running())
    past = EpochMs(told.auction.cap_ends_at + 1)
    ended = replace(told, record=replace(told.record, auction=replace(told.auction, status=Status.ENDED, ends_at=past)))
    assert ended.lawful.auction.ends_at == past


def test_a_correction_states_everything_anew() -> None:
    """What a correction recorded is what counts from there on."""
    told = told_of(*running())
    clipped = replace(told.auction, ends_at=at(1))
    corrected = correct(clipped, T0, cause="cap_breached", found_version=40, found_ends_at=None)
    after = fold_record(told, linked(corrected, 9))
    assert after is not None
    assert after.auction == corrected.after
    assert (after.lawful_ends_at, after.breach) == (at(1), None)
    assert after.record.trace_id == "trace-1"


def test_a_registration_without_its_policy_is_unknown() -> None:
    """A record that an earlier version wrote does not tell enough; what follows it tells nothing either."""
    first, *rest = running()
    fields = linked(first, 1)
    fields["details"] = orjson.dumps({"ends_at": T0 + HOUR_MS}).decode()
    assert fold_record(None, fields) is None
    assert fold_record(None, linked(rest[0], 2)) is None


@pytest.mark.parametrize("spoiled", [{"details": "{"}, {"version": "x"}, {"new_status": "ASLEEP"}, {"details": "[]"}])
def test_a_record_that_cannot_be_read_says_which(spoiled: dict[str, str]) -> None:
    """Damage of the log is an error of its own, with the number of the record."""
    *before, last = running()
    with pytest.raises(LogGapError, match="record 7 of"):
        fold_record(told_of(*before), linked(last, 7) | spoiled)
