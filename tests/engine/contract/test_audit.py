"""Tests for engine.contract.audit."""

import json
from hashlib import sha256

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract.audit import GENESIS, ChainHead, as_json, chained, operation, record, record_hash, verify
from engine.contract.intake import SCHEDULER, Actor
from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact, decide
from engine.domain.events import Cancel, Resume
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, EpochMs
from engine.domain.lifecycle import Status
from tests.engine.domain.examples import IN_STATUS, T0, at
from tests.engine.domain.strategies import Log, logs

Record = dict[str, str]

FIELDS = {
    "event_type",
    "auction_id",
    "actor_type",
    "actor_id",
    "prev_status",
    "new_status",
    "version",
    "occurred_at",
    "recorded_at",
    "correlation_id",
    "trace_id",
    "event_id",
    "intake_id",
    "details",
}

contents = st.dictionaries(st.sampled_from(["event_type", "auction_id", "details", "é"]), st.text(max_size=12))


def chain(records: list[Record], head: ChainHead | None = None) -> tuple[ChainHead, list[Record]]:
    """Link records one after the other."""
    head, linked = head or ChainHead(), []
    for fields in records:
        head, one = chained(head, fields)
        linked.append(one)
    return head, linked


def recorded(decision: Decision) -> Record:
    """The record of a decision, with example ids."""
    return record(
        decision,
        actor=Actor("user", "operator-1"),
        event_id="event-1",
        intake_id="17-0",
        trace_id="trace-1",
        correlation_id="req-1",
        recorded_at=at(1),
    )


# --- one record -------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R26")
def test_a_record_to_the_letter() -> None:
    """A cancellation's record says who did what, from which status to which, when, and when that was written down."""
    closing, instant = IN_STATUS[Status.CLOSING]
    assert recorded(decide(closing, Cancel("seller withdrew"), instant)) == {
        "event_type": "auction_timer_cancelled",
        "auction_id": "lot-7",
        "actor_type": "user",
        "actor_id": "operator-1",
        "prev_status": "CLOSING",
        "new_status": "CANCELLED",
        "version": "4",
        "occurred_at": str(instant),
        "recorded_at": str(at(1)),
        "correlation_id": "req-1",
        "trace_id": "trace-1",
        "event_id": "event-1",
        "intake_id": "17-0",
        "details": '{"reason":"seller withdrew"}',
    }


@pytest.mark.requirement("R26")
def test_a_first_record_has_no_previous_status() -> None:
    """Where nobody had heard of the auction, the previous status is empty, not an internal name."""
    fields = recorded(decide(Auction("lot-7"), Cancel("x"), T0))
    assert (fields["prev_status"], fields["new_status"]) == ("", "TOMBSTONE")


@pytest.mark.requirement("R25")
def test_what_has_no_fact_has_no_record() -> None:
    """A refusal audits nothing: asking for its record is a programming error."""
    ended, instant = IN_STATUS[Status.ENDED]
    with pytest.raises(AssertionError):
        recorded(decide(ended, Resume(), instant))


@pytest.mark.requirement("R3")
@pytest.mark.requirement("R26")
@settings(max_examples=30, deadline=None)
@given(logs())
def test_every_fact_has_a_full_record(log: Log) -> None:
    """Any fact of any history has all fields as strings, its own instant and statuses, and its details as JSON."""
    auction = Auction("lot-7")
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            auction = decision.after
            if decision.fact is None:
                continue
            fields = recorded(decision)
            assert set(fields) == FIELDS
            assert all(isinstance(value, str) for value in fields.values())
            assert Fact(fields["event_type"]) is decision.fact
            assert fields["occurred_at"] == str(decision.at)
            assert fields["new_status"] == decision.after.status.value
            assert fields["prev_status"] in (decision.before.status.value, "")
            assert fields["version"] == str(decision.after.version)
            assert orjson.loads(fields["details"]).items() >= decision.details.items()


# --- the chain --------------------------------------------------------------------------------------------------------


def test_the_first_link() -> None:
    """The first record of a shard is number 1 and follows 64 zeros; the head is its number and its hash."""
    head, linked = chained(ChainHead(), {"event_type": "x"})
    assert GENESIS == "0" * 64
    assert (linked["seq"], linked["prev_hash"]) == ("1", GENESIS)
    assert head == ChainHead(1, linked["hash"])


@pytest.mark.requirement("B7")
@settings(max_examples=60, deadline=None)
@given(contents)
def test_anyone_can_compute_the_hash(fields: Record) -> None:
    """The hash is SHA-256 of the record without `hash`, as the standard library's compact, sorted JSON in UTF-8."""
    _, linked = chained(ChainHead(), fields)
    content = {name: value for name, value in linked.items() if name != "hash"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert linked["hash"] == sha256(text.encode()).hexdigest() == record_hash(linked)


@pytest.mark.requirement("B7")
def test_linking_leaves_the_record_alone() -> None:
    """The unlinked record is not changed, and its fields are all in the linked one."""
    fields = {"event_type": "x"}
    _, linked = chained(ChainHead(), fields)
    assert fields == {"event_type": "x"}
    assert set(linked) == {"event_type", "seq", "prev_hash", "hash"}


@pytest.mark.requirement("B7")
@settings(max_examples=40, deadline=None)
@given(records=st.lists(contents, max_size=8), cut=st.integers(0, 8))
def test_an_untouched_chain_verifies(records: list[Record], cut: int) -> None:
    """A whole chain has no broken link, and neither has any later part of it, from the head before it."""
    _, linked = chain(records)
    assert verify(linked) is None
    head, first = chain(records[:cut])
    assert first == linked[:cut]
    assert verify(linked[cut:], head) is None
    if linked[cut:] and cut:
        assert verify(linked[cut:]) == 1


@pytest.mark.requirement("R26", "B7")
@pytest.mark.parametrize(("submitted_by", "told"), [(None, False), ("jane", False), ("bid-service", True)])
def test_who_sent_an_event_is_told_from_whom_it_names(submitted_by: str | None, told: bool) -> None:
    """A service may say for whom it acts; whose token it came with stands beside it, where that is somebody else."""
    auction = IN_STATUS[Status.ACTIVE][0]
    decision = decide(auction, Cancel("why"), IN_STATUS[Status.ACTIVE][1])
    fields = record(
        decision, actor=Actor("operator", "jane"), event_id="e-1", intake_id="1-0", trace_id="t", correlation_id="c",
        recorded_at=decision.at, submitted_by=submitted_by,
    )  # fmt: skip
    details = orjson.loads(fields["details"])
    assert (fields["actor_type"], fields["actor_id"], details["reason"]) == ("operator", "jane", "why")
    assert details.get("submitted_by") == (submitted_by if told else None)


@pytest.mark.requirement("R34")
@pytest.mark.parametrize("details", ["[" * 300 + "]" * 300, "{", "\udcff", '"\\ud800"'])
def test_a_damaged_record_is_shown_as_it_can_be(details: str) -> None:
    """Bytes that are no UTF-8, and details that are no JSON or too deep of it, cost no reader the rest of the page."""
    shown = as_json({"seq": "7", "actor_id": "j\udcffne", "details": details})
    assert (shown["seq"], shown["actor_id"]) == (7, "j\ufffdne")
    assert orjson.loads(orjson.dumps([shown]))[0]["details"]


@pytest.mark.requirement("B7")
@settings(max_examples=100, deadline=None)
@given(records=st.lists(contents, min_size=1, max_size=8), data=st.data())
def test_a_changed_record_breaks_the_chain_there(records: list[Record], data: st.DataObject) -> None:
    """Editing, adding or removing any field of any record is found at exactly that record."""
    _, linked = chain(records)
    index = data.draw(st.integers(0, len(linked) - 1))
    fields = linked[index]
    name = data.draw(st.sampled_from([*fields, "smuggled in"]))
    if name in fields and data.draw(st.booleans()):
        del fields[name]
    else:
        fields[name] = data.draw(st.text(max_size=12).filter(lambda value: value != fields.get(name)))
    assert verify(linked) == index + 1


@pytest.mark.requirement("B7")
@settings(max_examples=60, deadline=None)
@given(records=st.lists(contents, min_size=2, max_size=8), data=st.data())
def test_a_removed_record_breaks_the_chain_there(records: list[Record], data: st.DataObject) -> None:
    """A record that is taken out is missed at its number. (The end of a chain is held by whoever knows its head.)"""
    head, linked = chain(records)
    index = data.draw(st.integers(0, len(linked) - 1))
    del linked[index]
    if index < len(linked):
        assert verify(linked) == index + 1
    else:
        assert verify(linked) is None
        assert ChainHead(len(linked), linked[-1]["hash"]) != head


@pytest.mark.requirement("B7")
@settings(max_examples=50, deadline=None)
@given(records=st.lists(contents, min_size=2, max_size=8), data=st.data())
def test_swapped_records_break_the_chain_at_the_first(records: list[Record], data: st.DataObject) -> None:
    """Two records that changed places are found where the first of them should stand."""
    _, linked = chain(records)
    first, second = sorted(data.draw(st.lists(st.integers(0, len(linked) - 1), min_size=2, max_size=2, unique=True)))
    linked[first], linked[second] = linked[second], linked[first]
    assert verify(linked) == first + 1


@pytest.mark.requirement("B7")
@settings(max_examples=40, deadline=None)
@given(records=st.lists(contents, min_size=1, max_size=8), data=st.data())
def test_a_repeated_record_breaks_the_chain_after_it(records: list[Record], data: st.DataObject) -> None:
    """A record that stands there twice is found at the second time."""
    _, linked = chain(records)
    index = data.draw(st.integers(0, len(linked) - 1))
    linked.insert(index, linked[index])
    assert verify(linked) == index + 2


@pytest.mark.requirement("B7")
@settings(max_examples=40, deadline=None)
@given(records=st.lists(contents, min_size=2, max_size=8), data=st.data())
def test_a_forged_record_breaks_the_chain_after_it(records: list[Record], data: st.DataObject) -> None:
    """A record that was edited and hashed again fits by itself, but the next one does not follow it."""
    _, linked = chain(records)
    index = data.draw(st.integers(0, len(linked) - 2))
    forged = linked[index] | {"details": linked[index].get("details", "") + "!"}
    forged["hash"] = record_hash(forged)
    linked[index] = forged
    assert verify(linked) == index + 2


@pytest.mark.requirement("B7")
@pytest.mark.parametrize(("name", "value"), [("seq", "3"), ("seq", "02"), ("prev_hash", GENESIS)])
def test_a_forged_link_is_found_where_it_is(name: str, value: str) -> None:
    """A last record that was hashed again after its number or its predecessor was changed does not fit its place."""
    _, linked = chain([{"event_type": "x"}, {"event_type": "y"}])
    linked[1][name] = value
    linked[1]["hash"] = record_hash(linked[1])
    assert verify(linked) == 2


@pytest.mark.requirement("B7")
def test_a_chain_of_real_records() -> None:
    """The records of an auction's life verify, and a changed end in the middle is found."""
    decisions = fold(IN_STATUS[Status.SCHEDULED][0], Cancel("late"), at(2 * HOUR_MS))
    facts = [decision for decision in decisions if decision.fact is not None]
    records = [
        record(
            decision,
            actor=SCHEDULER,
            event_id="",
            intake_id="",
            trace_id="t",
            correlation_id="c",
            recorded_at=EpochMs(decision.at + 3),
        )
        for decision in facts
    ]
    _, linked = chain(records)
    assert [fields["event_type"] for fields in linked] == [
        "auction_timer_started",
        "auction_timer_closing",
        "auction_timer_ended",
    ]
    assert verify(linked) is None
    linked[1]["details"] = linked[1]["details"].replace("18000036", "18000037")
    assert verify(linked) == 2


@pytest.mark.requirement("R30")
@pytest.mark.requirement("R26")
def test_what_an_operator_did_is_a_record_like_any_other() -> None:
    """The same fields as a transition, without a version: no auction changed. It takes its place in the chain."""
    done = operation(
        "OPERATOR_CANCEL",
        auction_id="lot-7",
        prev_status="IN_TROUBLESHOOTING_QUEUE",
        new_status="CANCELED",
        actor=Actor("operator", "op-1"),
        event_id="order-1",
        intake_id="18-0",
        trace_id="trace-1",
        correlation_id="req-1",
        occurred_at=T0,
        recorded_at=at(5),
        details={"command_id": "bid-1", "reason": "a test", "error_code": None, "attempts": 2},
    )
    assert set(done) == FIELDS
    assert all(isinstance(value, str) for value in done.values())
    assert (done["version"], done["occurred_at"], done["recorded_at"]) == ("", str(T0), str(at(5)))
    assert (done["actor_type"], done["actor_id"]) == ("operator", "op-1")
    assert orjson.loads(done["details"]) == {
        "command_id": "bid-1",
        "reason": "a test",
        "error_code": None,
        "attempts": 2,
    }
    transition = recorded(decide(IN_STATUS[Status.ACTIVE][0], Cancel("x"), at(HOUR_MS // 6)))
    _, linked = chain([transition, done, transition])
    assert verify(linked) is None
    assert verify([linked[0], linked[1] | {"actor_id": "op-2"}, linked[2]]) == 2


@pytest.mark.requirement("R26")
@settings(max_examples=60, deadline=None)
@given(logs())
def test_a_record_for_readers_of_json_says_the_same(log: Log) -> None:
    """Numbers, an object and nulls; written back the documented way, the hash over the strings is the one it carries."""
    auction = Auction("lot-7")
    records = []
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            auction = decision.after
            if decision.fact is not None:
                records.append(recorded(decision))
    for linked in chain(records)[1]:
        shown = as_json(linked)
        assert isinstance(shown["details"], dict)
        numbers = ("seq", "version", "occurred_at", "recorded_at")
        assert {name: shown[name] for name in numbers} == {name: int(linked[name]) for name in numbers}
        back = {name: "" if value is None else str(value) for name, value in shown.items()}
        back["details"] = orjson.dumps(shown["details"]).decode()
        assert back == linked
        assert record_hash(back) == linked["hash"]


@pytest.mark.requirement("B7")
@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"seq": "1" * 5_000}, {"seq": "1" * 5_000, "details": {}}),
        ({"seq": "²", "version": ""}, {"seq": "²", "version": None, "details": {}}),
        ({"seq": "07"}, {"seq": "07", "details": {}}),
        ({"details": "{oops"}, {"details": "{oops"}),
        ({"surprise": "7"}, {"surprise": "7", "details": {}}),
    ],
)
def test_a_damaged_record_can_be_shown(fields: Record, shown: Record) -> None:
    """What was altered in the store is shown as it is: a reader must be able to see it, whatever it is."""
    assert as_json(fields) == shown
