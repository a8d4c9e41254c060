"""Tests for reconciler.repairs: which input events are asked for, and how many."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from engine.contract.intake import CommandType, Correct, decode
from engine.contract.timers import TimerRecord, to_fields
from engine.domain.lifecycle import Status
from engine.store.protocol import Group, Standing
from reconciler.drift import Drift, DriftKind, Severity, Tick, Views
from reconciler.ledger import Told
from reconciler.repairs import REPORTED_ONLY, Repair, plan
from tests.engine.domain.examples import IN_STATUS

pytestmark = pytest.mark.requirement("R12")

CLOSING = TimerRecord(IN_STATUS[Status.CLOSING][0], "trace-1", "req-1")


def seen(auction_id: str, *, seq: int = 5, found: TimerRecord | None = CLOSING) -> Views:
    """Views of an auction whose log is known up to `seq`."""
    return Views(auction_id, Standing(found, {Group.LIVE: 1}), Told(CLOSING, seq, CLOSING.auction.ends_at), seq=seq)


def drift(auction_id: str, kind: DriftKind = DriftKind.SCORE_WRONG, **changes: object) -> Drift:
    """A drift of an auction."""
    return Drift(kind, 3, auction_id, **changes)  # type: ignore[arg-type]


def planned(drifts: Iterable[Drift], most: int = 10, **views: Views) -> tuple[Repair, ...]:
    """The repairs."""
    found = list(drifts)
    return plan(
        found, {each.auction_id: views.get(each.auction_id, seen(each.auction_id)) for each in found}, most
    ).repairs


def order_of(repair: Repair) -> Correct:
    """What is asked for."""
    event = decode(repair.draft.event_id, repair.draft.body)
    assert event.context.event_type == CommandType.CORRECTION_REQUESTED
    assert isinstance(event.event, Correct)
    return event.event


def test_a_repair_carries_what_the_log_says() -> None:
    """The engine is told the whole hash, what was found instead, and why."""
    (repair,) = planned([drift("a", DriftKind.HASH_CHANGED), drift("a", DriftKind.SCORE_WRONG)])
    assert (repair.shard, repair.auction_id, repair.cause) == (3, "a", DriftKind.HASH_CHANGED)
    assert order_of(repair) == Correct(
        "hash_changed", to_fields(CLOSING), CLOSING.auction.version, CLOSING.auction.ends_at
    )


@pytest.mark.parametrize(("on_the_wire", "counted_on_from"), [(0, 3), (8, 8), (2**60, 3), (-1, 3)])
def test_a_repair_goes_above_every_version_that_was_shown(on_the_wire: int, counted_on_from: int) -> None:
    """A tick may have told of a change that a failover lost; whoever heard it must see the repair replace it."""
    record = replace(CLOSING, auction=replace(CLOSING.auction, version=3))
    views = replace(seen("a", found=record), tick=Tick(on_the_wire, "CLOSING", 1))
    (repair,) = planned([drift("a", DriftKind.TICK_DIFFERS)], a=views)
    assert order_of(repair).found_version == counted_on_from


def test_the_same_finding_asks_for_the_same_event() -> None:
    """An engine that is away finds one event, however many passes found the same; after a repair the id is another."""
    (one,), (same,), (later,) = (
        planned([drift("a")]),
        planned([drift("a")]),
        planned([drift("a")], a=seen("a", seq=6)),
    )
    assert one.draft.event_id == same.draft.event_id != later.draft.event_id


@pytest.mark.parametrize("member", ["", "bad id\n", "x" * 5_000])
def test_what_can_be_no_auction_is_reported(member: str) -> None:
    """No event could name it, so none is asked for, which would wait in troubleshooting."""
    made = plan([drift(member, DriftKind.ENTRY_EXTRA)], {member: seen(member)}, 10)
    assert (made.repairs, [each.auction_id for each in made.reported]) == ((), [member])


def test_repairs_are_bounded_and_severe_ones_come_first() -> None:
    """What is over the bound waits for the next pass."""
    drifts = [drift(f"n-{number}", severity=Severity.NOTICE) for number in range(3)] + [drift("s")]
    made = plan(drifts, {each.auction_id: seen(each.auction_id) for each in drifts}, 2)
    assert [repair.auction_id for repair in made.repairs] == ["s", "n-0"]
    assert [each.auction_id for each in made.deferred] == ["n-1", "n-2"]


@pytest.mark.parametrize("kind", sorted(REPORTED_ONLY))
def test_what_no_event_can_mend_is_reported(kind: DriftKind) -> None:
    """It needs a person, and takes no place among the repairs."""
    made = plan([drift("", kind)], {}, 10)
    assert (made.repairs, [each.kind for each in made.reported]) == ((), [kind])


def test_what_is_over_is_reported_and_not_repaired() -> None:
    """The same kind of drift is mended while the auction lasts."""
    over = drift("a", DriftKind.CAP_BREACHED, is_over=True)
    made = plan([over, drift("b", DriftKind.CAP_BREACHED)], {"a": seen("a"), "b": seen("b")}, 10)
    assert ([repair.auction_id for repair in made.repairs], made.reported) == (["b"], (over,))


def test_an_entry_of_nobody_is_to_go() -> None:
    """Only a log that was read whole can say that there is no such auction."""
    views = Views("x", Standing(None, {Group.LIVE: 1}), None, log_whole=True, seq=9)
    (repair,) = planned([drift("x", DriftKind.ENTRY_EXTRA)], x=views)
    assert order_of(repair) == Correct("entry_extra", {}, 0, None, unknown=True)
    partly = Views("x", Standing(None, {Group.LIVE: 1}), None, log_whole=False, seq=9)
    (repair,) = planned([drift("x", DriftKind.HASH_MISSING)], x=partly)
    assert not order_of(repair).unknown
