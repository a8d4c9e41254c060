"""Tests for reconciler.drift: each difference between two views has its name, and agreement has none."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from engine.contract.timers import CorruptTimerError, TimerRecord
from engine.domain.auction import Auction
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.store.protocol import Group, Standing
from reconciler.drift import OVERDUE_MS, Drift, DriftKind, Severity, Tick, Views, compare, judge
from reconciler.ledger import Told
from tests.engine.domain.examples import AUCTION_ID, IN_STATUS, T0
from tests.engine.domain.strategies import Log, logs

pytestmark = pytest.mark.requirement("R12")

LONG_AGO = EpochMs(0)
"""Nothing is overdue then."""


def told(auction: Auction, **changes: Any) -> Told:
    """What the log says."""
    return replace(Told(TimerRecord(auction, "trace-1", "req-1"), 5, auction.ends_at), **changes)


def placed(auction: Auction) -> dict[Group, int]:
    """Where it must stand."""
    if auction.status is Status.PAUSED:
        assert auction.paused_at is not None
        return {Group.PAUSED: auction.paused_at}
    if auction.status.is_terminal or not auction.status.is_public:
        return {Group.CLOSED: auction.ended_at or auction.cancelled_at or 0}
    return {Group.LIVE: auction.ends_at}


def views(auction: Auction, **changes: Any) -> Views:
    """Views that agree, but for the changes."""
    said = changes.pop("told", told(auction))
    record = changes.pop("record", TimerRecord(auction, "trace-1", "req-1"))
    scores: Mapping[Group, int] = changes.pop("scores", placed(auction))
    return Views(AUCTION_ID, Standing(record, scores), said, **changes)


def kinds(seen: Views, now: EpochMs = LONG_AGO) -> list[DriftKind]:
    """The names of what is wrong."""
    return [drift.kind for drift in compare(0, seen, now)]


def only(seen: Views, now: EpochMs = LONG_AGO) -> Drift:
    """The one thing that is wrong."""
    (drift,) = compare(0, seen, now)
    return drift


CLOSING = IN_STATUS[Status.CLOSING][0]
PAUSED = IN_STATUS[Status.PAUSED][0]
ENDED = IN_STATUS[Status.ENDED][0]
LIVE = [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING, Status.PAUSED]


@settings(max_examples=60, deadline=None)
@given(logs())
def test_what_agrees_is_no_drift(log: Log) -> None:
    """Whatever happened to an auction, views that agree raise no alarm."""
    auction = Auction(AUCTION_ID)
    for event, arrival in log:
        auction = fold(auction, event, arrival)[-1].after
        if auction.version == 0:
            continue
        tick = Tick(auction.version, auction.status.value, auction.ends_at)
        assert compare(0, views(auction, tick=tick), LONG_AGO) == []


@pytest.mark.parametrize("status", LIVE)
def test_an_entry_that_is_missing(status: Status) -> None:
    """A live auction that stands in no set would never close."""
    assert kinds(views(IN_STATUS[status][0], scores={})) == [DriftKind.ENTRY_MISSING]


@pytest.mark.parametrize(("by_ms", "severity"), [(1, "notice"), (250, "notice"), (-251, "severe"), (10_000, "severe")])
def test_a_score_that_is_wrong(by_ms: int, severity: str) -> None:
    """It tells by how much the end has to be moved back; above 250 ms it is severe."""
    drift = only(views(CLOSING, scores={Group.LIVE: CLOSING.ends_at + by_ms}))
    assert (drift.kind, drift.ms_moved, drift.severity) == (DriftKind.SCORE_WRONG, -by_ms, Severity(severity))


def test_an_entry_too_many() -> None:
    """An auction that stands in two sets is listed twice."""
    drift = only(views(PAUSED, scores=placed(PAUSED) | {Group.LIVE: PAUSED.ends_at}))
    assert drift.kind is DriftKind.ENTRY_EXTRA


@pytest.mark.requirement("B1")
def test_a_closed_auction_among_the_deadlines() -> None:
    """What is over has no deadline, whether its hash is still kept or not."""
    scores = {Group.LIVE: ENDED.ends_at, Group.CLOSED: ENDED.ends_at}
    assert kinds(views(ENDED, scores=scores)) == [DriftKind.CLOSED_IN_DEADLINES]
    assert kinds(views(ENDED, scores=scores, record=None)) == [DriftKind.CLOSED_IN_DEADLINES]


def test_what_is_over_may_be_forgotten() -> None:
    """After the retention neither hash nor listing holds it: no drift."""
    assert kinds(views(ENDED, scores={}, record=None)) == []


@pytest.mark.parametrize("status", LIVE)
def test_a_hash_that_is_missing_or_unreadable(status: Status) -> None:
    """Both have their names."""
    auction = IN_STATUS[status][0]
    assert kinds(views(auction, record=None)) == [DriftKind.HASH_MISSING]
    assert kinds(views(auction, record=CorruptTimerError("x"))) == [DriftKind.HASH_UNREADABLE]


def test_a_hash_that_was_changed() -> None:
    """The evidence names each field with what was found and what is right."""
    changed = TimerRecord(replace(CLOSING, ends_at=EpochMs(CLOSING.ends_at - 10_000), version=77), "trace-1", "req-1")
    drift = only(views(CLOSING, record=changed))
    assert (drift.kind, drift.ms_moved, drift.severity) == (DriftKind.HASH_CHANGED, 10_000, Severity.SEVERE)
    assert drift.evidence == {
        "found_and_right": {
            "version": ["77", str(CLOSING.version)],
            "ends_at": [str(CLOSING.ends_at - 10_000), str(CLOSING.ends_at)],
        },
        "sealed": True,
    }


@pytest.mark.requirement("R15")
def test_an_end_that_was_pushed_past_the_cap() -> None:
    """It has a name of its own, and the right end is what the log says."""
    pushed = TimerRecord(replace(CLOSING, ends_at=EpochMs(CLOSING.cap_ends_at + 1)), "trace-1", "req-1")
    drift = only(views(CLOSING, record=pushed))
    assert (drift.kind, drift.after) == (DriftKind.END_PAST_CAP, str(CLOSING.ends_at))


@pytest.mark.requirement("R15")
def test_a_log_that_breaks_a_cap() -> None:
    """The cause comes first, and what is kept is measured by what the log says, which is to be clipped."""
    lawful = EpochMs(CLOSING.ends_at - 60_000)
    found = compare(0, views(CLOSING, told=told(CLOSING, lawful_ends_at=lawful, breach="record 3 ...")), LONG_AGO)
    assert [drift.kind for drift in found] == [DriftKind.CAP_BREACHED, DriftKind.SCORE_WRONG]
    assert found[0].ms_moved == -60_000


def test_an_auction_that_is_overdue() -> None:
    """Not at its end, when the close may be under way, but a while after it."""
    due = CLOSING.ends_at + OVERDUE_MS
    assert kinds(views(CLOSING), EpochMs(due)) == []
    assert kinds(views(CLOSING), EpochMs(due + 1)) == [DriftKind.OVERDUE]
    assert kinds(views(PAUSED), EpochMs(due + HOUR_MS)) == []


@pytest.mark.parametrize(
    ("version", "status", "moved", "expected"),
    [(0, "CLOSING", 0, True), (0, "CLOSING", 5_000, True), (0, "PAUSED", 0, True), (1, "CLOSING", 0, True)],
)
def test_a_tick_that_says_something_else(version: int, status: str, moved: int, expected: bool) -> None:
    """At the version of the log, or above it, a tick with other values comes from a wrong memory."""
    tick = Tick(CLOSING.version + version, status, CLOSING.ends_at + moved)
    differs = (version, status, moved) != (0, "CLOSING", 0)
    assert kinds(views(CLOSING, tick=tick)) == ([DriftKind.TICK_DIFFERS] if differs and expected else [])


def test_an_old_tick_is_no_drift() -> None:
    """What was right when it was sent may be old."""
    assert kinds(views(CLOSING, tick=Tick(CLOSING.version - 1, "ACTIVE", T0))) == []


def test_an_entry_for_what_nobody_knows() -> None:
    """With a log that was read whole the entry is one too many; else the hash may be what is missing."""
    nobody: Any = {"told": None, "record": None, "scores": {Group.LIVE: 5}}
    assert kinds(views(CLOSING, **nobody)) == [DriftKind.ENTRY_EXTRA]
    assert kinds(views(CLOSING, **nobody, log_whole=False)) == [DriftKind.HASH_MISSING]


def test_a_hash_without_a_log() -> None:
    """It is named and kept if the log was read whole; else it is believed, and measures the sorted set."""
    assert kinds(views(CLOSING, told=None)) == [DriftKind.LOG_MISSING]
    assert kinds(views(CLOSING, told=None, log_whole=False)) == []
    assert kinds(views(CLOSING, told=None, log_whole=False, scores={})) == [DriftKind.ENTRY_MISSING]
    assert kinds(views(CLOSING, told=None, record=CorruptTimerError("x"))) == [DriftKind.HASH_UNREADABLE]


@pytest.mark.requirement("R15")
def test_a_breach_that_led_to_a_close_is_told_for_a_day() -> None:
    """It is a drift about what is over, so nobody repairs it; what is long over is left to the log."""
    lawful = EpochMs(ENDED.ends_at - 60_000)
    said = told(ENDED, lawful_ends_at=lawful, breach="record 3 ...")
    (drift,) = judge(0, said, EpochMs(ENDED.ends_at + HOUR_MS))
    assert (drift.kind, drift.is_over, drift.severity) == (DriftKind.CAP_BREACHED, True, Severity.SEVERE)
    assert (drift.before, drift.after, drift.ms_moved) == (str(ENDED.ends_at), str(lawful), -60_000)
    assert list(judge(0, said, EpochMs(ENDED.ends_at + 25 * HOUR_MS))) == []
    assert list(judge(0, told(ENDED), EpochMs(ENDED.ends_at))) == []
    assert kinds(views(ENDED, told=said)) == []
