"""Tests for engine.contract.timers."""

from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract.intake import AUCTION_ID
from engine.contract.timers import (
    FIELDS,
    SEALED,
    CorruptTimerError,
    Holding,
    TimerRecord,
    as_of,
    checksum,
    from_fields,
    from_row,
    heartbeat_line,
    is_sealed,
    mark,
    moving_fields,
    soft_close_until,
    tick_line,
    timer,
    to_fields,
)
from engine.domain.auction import Auction, Offer
from engine.domain.decide import Fact
from engine.domain.events import Bid
from engine.domain.fold import fold, next_due
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Policy
from tests.engine.contract.strategies import timer_records
from tests.engine.domain.examples import (
    CANCELLED_BEFORE_START_ARRIVED,
    END,
    IN_STATUS,
    PAUSED_WHILE_CLOSING,
    T0,
    WELL_TRAVELLED,
    at,
    registration,
    standing,
)
from tests.engine.domain.strategies import Log, logs

ALWAYS: Final = {
    "auction_id",
    "status",
    "version",
    "starts_at",
    "ends_at",
    "original_ends_at",
    "soft_close_until",
    "final_deadline",
    "extension_count",
    "extension_used_ms",
    "extension_left_ms",
    "at_cap",
    "remaining_ms",
    "server_time",
    "trace_id",
    "cursor",
    "stale",
}
SOMETIMES: Final = {"offer_id", "clipped_by", "paused_remaining_ms", "ended_at", "cancelled_at", "reason"}
TICK: Final = {
    "type",
    "auction_id",
    "server_time",
    "trace_id",
    "status",
    "version",
    "ends_at",
    "remaining_ms",
    "soft_close_until",
    "final_deadline",
    "extension_count",
    "extension_used_ms",
    "extension_left_ms",
    "at_cap",
}

EVERY_AUCTION: Final = [
    *[auction for auction, _ in IN_STATUS.values()],
    PAUSED_WHILE_CLOSING,
    CANCELLED_BEFORE_START_ARRIVED,
    WELL_TRAVELLED,
]
EVERY_TIMER: Final = [TimerRecord(a, "trace-1", "req-1") for a in EVERY_AUCTION if a.registration is not None]

instants = st.integers(T0 - HOUR_MS, T0 + 3 * HOUR_MS).map(EpochMs)


def row_of(record: TimerRecord, **changes: bytes | None) -> list[bytes | None]:
    """The row that `HMGET` answers for `record`, with some fields changed."""
    kept = to_fields(record) | {"checksum": checksum(record.auction)}
    fields: dict[str, bytes | None] = {name: value.encode() for name, value in kept.items()}
    return [(fields | changes)[name] for name in FIELDS]


ACTIVE_ROW: Final = TimerRecord(IN_STATUS[Status.ACTIVE][0], "trace-1", "req-1")


def as_id(record: TimerRecord) -> str:
    """How a record is called in the report."""
    return f"{record.auction.status}-v{record.auction.version}"


# --- the hash ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R10")
@settings(max_examples=50, deadline=None)
@given(timer_records(registered=False))
def test_a_timer_reads_back_as_it_was_written(record: TimerRecord) -> None:
    """An engine that loads what another one wrote knows exactly what that one knew, in whatever state."""
    assert from_row(row_of(record)) == record


@pytest.mark.requirement("R10")
@pytest.mark.parametrize("auction", EVERY_AUCTION, ids=lambda auction: f"{auction.status}-v{auction.version}")
def test_every_status_reads_back(auction: Auction) -> None:
    """An auction in each status, tombstones included, survives the way to Redis and back."""
    record = TimerRecord(auction, "trace-1", "req-1")
    assert from_row(row_of(record)) == record


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("record", EVERY_TIMER, ids=as_id)
@pytest.mark.parametrize("name", SEALED)
def test_a_field_that_somebody_changed_breaks_the_seal(record: TimerRecord, name: str) -> None:
    """Whatever says when an auction ends cannot be edited alone, and a timer without a checksum is none of a commit."""
    assert is_sealed(row_of(record))
    assert not is_sealed(row_of(record, **{name: b"edited"}))
    assert not is_sealed(row_of(record, checksum=b"\xff"))
    assert not is_sealed(row_of(record, checksum=None))


def test_a_hash_that_is_not_there_has_no_broken_seal() -> None:
    """Nothing is not an edited timer."""
    assert is_sealed([None] * len(FIELDS))


@pytest.mark.requirement("R1")
def test_the_hash_is_readable() -> None:
    """The hash of a clipped, twice paused auction: plain numbers, empty strings where nothing is, JSON for the terms."""
    fields = to_fields(TimerRecord(WELL_TRAVELLED, "trace-1", "req-1"))
    assert {name: fields[name] for name in FIELDS if name not in ("policy", "offer", "checksum")} == {
        "auction_id": "lot-7",
        "status": "PAUSED",
        "version": "7",
        "starts_at": str(T0),
        "ends_at": str(at(64 * MINUTE_MS)),
        "original_ends_at": str(END),
        "extension_count": "1",
        "clipped_by": "total",
        "paused_at": str(at(54 * MINUTE_MS)),
        "paused_from": "CLOSING",
        "paused_total_ms": str(2 * MINUTE_MS),
        "ended_at": "",
        "cancelled_at": "",
        "reason": "second alarm",
        "trace_id": "trace-1",
        "correlation_id": "req-1",
    }
    assert orjson.loads(fields["policy"])["extension_ms"] == 900_000
    assert orjson.loads(fields["offer"])["offer_id"] is None


@settings(max_examples=30, deadline=None)
@given(timer_records(registered=False))
def test_the_hash_has_exactly_its_fields(record: TimerRecord) -> None:
    """In any state all fields are written, so a new state leaves nothing of an old one behind; a commit adds the seal."""
    fields = to_fields(record)
    assert {*fields, "checksum"} == set(FIELDS)
    assert moving_fields(record.auction).items() <= fields.items()


@settings(max_examples=40, deadline=None)
@given(logs())
def test_a_change_touches_only_moving_fields(log: Log) -> None:
    """After the registration, writing `moving_fields` is enough to keep the hash equal to the state."""
    auction = Auction("lot-7")
    for event, arrival in log:
        for decision in fold(auction, event, arrival):
            if decision.fact not in (Fact.REGISTERED, Fact.TOMBSTONED):
                before, after = to_fields(TimerRecord(decision.before)), to_fields(TimerRecord(decision.after))
                assert before | moving_fields(decision.after) == after
            auction = decision.after


def test_a_missing_hash_is_no_timer() -> None:
    """`HMGET` of a key that does not exist answers nothing but nulls; that is no auction, not a corrupt one."""
    assert from_row([None] * len(FIELDS)) is None


# --- corrupt hashes ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R10")
@pytest.mark.parametrize(
    "changes",
    [
        {"status": b"RUNNING"},
        {"status": b""},
        {"version": b""},
        {"version": b"one"},
        {"version": None},
        {"ends_at": b""},
        {"ends_at": b"12.5"},
        {"starts_at": b""},
        {"original_ends_at": b"1"},
        {"extension_count": b"x"},
        {"clipped_by": b"nobody"},
        {"paused_at": b"noon"},
        {"paused_from": b"BED"},
        {"paused_total_ms": b""},
        {"ended_at": b"x"},
        {"cancelled_at": b"x"},
        {"policy": b"{"},
        {"policy": b"{}"},
        {"policy": b'{"extension_ms": 900001}'},
        {"offer": b""},
        {"offer": b"{}"},
    ],
    ids=str,
)
def test_a_corrupt_hash_is_named(changes: dict[str, bytes | None]) -> None:
    """A hash with one unreadable field is a `CorruptTimerError` that names the auction."""
    with pytest.raises(CorruptTimerError, match=r"^timer 'lot-7': "):
        from_row(row_of(ACTIVE_ROW, **changes))


@pytest.mark.parametrize("row", [row_of(ACTIVE_ROW)[:-1], [*row_of(ACTIVE_ROW), b""]], ids=["short", "long"])
def test_a_row_of_another_length_is_corrupt(row: list[bytes | None]) -> None:
    """A row that does not match `FIELDS` is refused, not shifted."""
    with pytest.raises(CorruptTimerError):
        from_row(row)


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return True


# What parses as JSON without being an object has its own test below.
field_texts = st.one_of(st.text(max_size=12), st.integers().map(str), st.sampled_from(list(Status)).map(str))
json_texts = st.one_of(st.text(max_size=12), st.dictionaries(st.text(max_size=4), st.integers(0, 9)).map(orjson.dumps))


@pytest.mark.requirement("R10")
@settings(max_examples=120, deadline=None)
@given(record=st.sampled_from(EVERY_TIMER), data=st.data())
def test_no_text_in_a_field_breaks_the_reader(record: TimerRecord, data: st.DataObject) -> None:
    """Whatever text somebody wrote into one to three fields, the hash is read or it is a `CorruptTimerError`."""
    changes: dict[str, bytes | None] = {}
    for name in data.draw(st.lists(st.sampled_from(FIELDS[1:]), min_size=1, max_size=3)):
        texts = json_texts.filter(_is_object) if name in ("policy", "offer") else field_texts
        value = data.draw(st.none() | texts)
        changes[name] = value.encode() if isinstance(value, str) else value
    try:
        read = from_row(row_of(record, **changes))
    except CorruptTimerError:
        return
    assert read is not None
    assert read.auction.auction_id == "lot-7"


@pytest.mark.parametrize("name", ["policy", "offer"])
@pytest.mark.parametrize("value", [b"[]", b"1", b"null"])
def test_terms_that_are_no_object_are_corrupt(name: str, value: bytes) -> None:
    """A policy or an offer that is JSON but not an object is a `CorruptTimerError` like any other damage."""
    with pytest.raises(CorruptTimerError):
        from_row(row_of(ACTIVE_ROW, **{name: value}))


@pytest.mark.parametrize("name", ["auction_id", "status", "reason", "policy"])
def test_bytes_that_are_no_text_are_corrupt(name: str) -> None:
    """A field that is not UTF-8 is a `CorruptTimerError` like any other damage."""
    with pytest.raises(CorruptTimerError):
        from_row(row_of(ACTIVE_ROW, **{name: b"\xff"}))


@pytest.mark.parametrize(
    "changes",
    [{"policy": b""}, {"status": b"PAUSED"}, {"status": b"PAUSED", "paused_at": b"1800000000000"}],
    ids=["active without terms", "paused since never", "paused from nothing"],
)
def test_a_state_that_cannot_be_is_corrupt(changes: dict[str, bytes | None]) -> None:
    """A hash whose status contradicts its other fields is corrupt: the fold would stop at an assertion later."""
    with pytest.raises(CorruptTimerError):
        from_row(row_of(ACTIVE_ROW, **changes))


# --- the Timer --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("R6")
@settings(max_examples=40, deadline=None)
@given(record=timer_records(), now=instants, cursor=st.none() | st.just("0.1-0"), stale=st.booleans())
def test_a_timer_has_the_fields_of_the_contract(
    record: TimerRecord, now: EpochMs, cursor: str | None, stale: bool
) -> None:
    """A Timer always has its fixed fields, an optional one only where it says something, and it is plain JSON."""
    view = timer(record, now, cursor, stale=stale)
    assert set(view) >= ALWAYS
    assert set(view) <= ALWAYS | SOMETIMES
    assert None not in [view[name] for name in SOMETIMES & set(view)]
    assert (view["server_time"], view["cursor"], view["stale"]) == (now, cursor, stale)
    read = orjson.loads(orjson.dumps(view))
    assert read == view
    for name in ALWAYS - {"auction_id", "status", "at_cap", "trace_id", "cursor", "stale", "soft_close_until"}:
        assert type(read[name]) is int


@pytest.mark.requirement("R6")
def test_a_timer_to_the_letter() -> None:
    """The Timer of an auction that was extended once and clipped, six minutes after the original end."""
    auction = standing(
        (50 * MINUTE_MS, Bid("b")),
        registered=registration(policy=Policy(total_cap_ms=2 * MINUTE_MS), offer=Offer(offer_id="offer-1")),
    )
    assert timer(TimerRecord(auction, "trace-1", "req-1"), at(61 * MINUTE_MS), "0.17-0") == {
        "auction_id": "lot-7",
        "offer_id": "offer-1",
        "status": "CLOSING",
        "version": 4,
        "starts_at": T0,
        "ends_at": at(62 * MINUTE_MS),
        "original_ends_at": END,
        "soft_close_until": at(62 * MINUTE_MS),
        "final_deadline": at(62 * MINUTE_MS),
        "extension_count": 1,
        "extension_used_ms": 2 * MINUTE_MS,
        "extension_left_ms": 0,
        "at_cap": True,
        "clipped_by": "total",
        "remaining_ms": MINUTE_MS,
        "server_time": at(61 * MINUTE_MS),
        "trace_id": "trace-1",
        "cursor": "0.17-0",
        "stale": False,
    }


@pytest.mark.parametrize("record", EVERY_TIMER, ids=as_id)
def test_optional_fields_say_what_happened(record: TimerRecord) -> None:
    """`ended_at`, `cancelled_at` and `paused_remaining_ms` are there in exactly the status they belong to."""
    view = timer(record, T0, None)
    assert ("ended_at" in view) == (view["status"] == "ENDED")
    assert ("cancelled_at" in view) == (view["status"] == "CANCELLED")
    assert ("paused_remaining_ms" in view) == (view["status"] == "PAUSED")
    assert ("reason" in view) == (view["status"] in ("CANCELLED", "PAUSED"))


@pytest.mark.requirement("R16")
@settings(max_examples=40, deadline=None)
@given(
    record=timer_records(),
    seen_at=instants,
    now=instants,
    cursor=st.none() | st.just("0.1-0"),
    stale=st.booleans(),
)
def test_a_remembered_timer_ages_like_a_fresh_one(
    record: TimerRecord, seen_at: EpochMs, now: EpochMs, cursor: str | None, stale: bool
) -> None:
    """What a gateway makes of the Timer it remembers equals the Timer made now, in every state and at any time."""
    remembered = timer(record, seen_at, None)
    before = dict(remembered)
    assert as_of(remembered, now, cursor, stale=stale) == timer(record, now, cursor, stale=stale)
    assert remembered == before, "what is remembered must not change by being shown"


@pytest.mark.parametrize("record", EVERY_TIMER, ids=as_id)
def test_every_status_ages_like_a_fresh_one(record: TimerRecord) -> None:
    """The same, for each status by name: before the end, at it and after it."""
    for now in (T0, EpochMs(END - 1), END, at(2 * HOUR_MS)):
        assert as_of(timer(record, at(-HOUR_MS), "0.1-0"), now, None) == timer(record, now, None)


@pytest.mark.parametrize(
    ("auction", "until"),
    [
        (IN_STATUS[Status.SCHEDULED][0], None),
        (IN_STATUS[Status.ACTIVE][0], None),
        (IN_STATUS[Status.CLOSING][0], END),
        (IN_STATUS[Status.PAUSED][0], None),
        (PAUSED_WHILE_CLOSING, END),
        (IN_STATUS[Status.ENDED][0], END),
    ],
    ids=["scheduled", "active", "closing", "paused", "paused while closing", "ended"],
)
def test_the_soft_close_is_shown_from_its_window_on(auction: Auction, until: EpochMs | None) -> None:
    """`soft_close_until` is null before the window opened, and the end that stands from then on, paused or not."""
    assert soft_close_until(auction) == until


# --- the tick lane ----------------------------------------------------------------------------------------------------


def parse_tick(line: bytes) -> tuple[str, int, dict[str, Any]]:
    """Split a line as a gateway does, and read the frame as a client does."""
    auction_id, version, frame = line.split(b" ", 2)
    return auction_id.decode(), int(version), orjson.loads(frame)


@pytest.mark.requirement("R4")
@pytest.mark.requirement("B6")
@settings(max_examples=30, deadline=None)
@given(record=timer_records(), now=instants)
def test_a_tick_line_reads_back(record: TimerRecord, now: EpochMs) -> None:
    """A line splits into id, version and a frame with the contract's fields, which say what the Timer says."""
    line = tick_line(record, now)
    assert b"\n" not in line
    auction_id, version, frame = parse_tick(line)
    assert (auction_id, version) == (record.auction.auction_id, record.auction.version)
    assert set(frame) == TICK
    assert frame["type"] == "timer.tick"
    view = timer(record, now, None)
    assert {name: frame[name] for name in TICK - {"type"}} == {name: view[name] for name in TICK - {"type"}}


@pytest.mark.requirement("R4")
def test_a_tick_line_to_the_letter() -> None:
    """The bytes of one tick."""
    assert tick_line(TimerRecord(IN_STATUS[Status.CLOSING][0], "trace-1"), at(59 * MINUTE_MS)) == (
        b'lot-7 3 {"type":"timer.tick","auction_id":"lot-7","server_time":1800003540000,"trace_id":"trace-1",'
        b'"status":"CLOSING","version":3,"ends_at":1800003600000,"remaining_ms":60000,'
        b'"soft_close_until":1800003600000,"final_deadline":1800090000000,"extension_count":0,'
        b'"extension_used_ms":0,"extension_left_ms":86400000,"at_cap":false}'
    )


def test_a_heartbeat_is_no_tick() -> None:
    """It begins with a sign that no auction id can begin with; instance, epoch, what is held, and last the time."""
    sign, *rest = heartbeat_line("engine-1", 7, T0, Holding(3, 41, 0xBEEF)).split(b" ")
    assert rest == [b"engine-1", b"7", b"3", b"41", b"beef", str(T0).encode()]
    assert not AUCTION_ID.match(sign.decode())


def test_a_mark_tells_states_apart() -> None:
    """Another version, status, end or auction has another mark; the same state has the same."""
    auction = IN_STATUS[Status.CLOSING][0]
    others = [
        replace(auction, version=auction.version + 1),
        replace(auction, status=Status.ACTIVE),
        replace(auction, ends_at=EpochMs(auction.ends_at + 1)),
        replace(auction, auction_id="lot-8"),
    ]
    assert len({mark(each) for each in [auction, *others]}) == 5
    assert mark(auction) == mark(replace(auction))


@pytest.mark.requirement("R10")
@pytest.mark.parametrize("auction", EVERY_AUCTION, ids=lambda auction: f"{auction.status}-v{auction.version}")
def test_fields_are_read_as_a_row_is(auction: Auction) -> None:
    """What `to_fields` writes, `from_fields` reads; no fields are no auction."""
    record = TimerRecord(auction, "trace-1", "req-1")
    assert from_fields(to_fields(record)) == from_row(row_of(record))
    assert from_fields({}) is None


@pytest.mark.requirement("R10")
@pytest.mark.parametrize("auction", EVERY_AUCTION, ids=lambda auction: f"{auction.status}-v{auction.version}")
def test_a_reloaded_auction_has_the_same_next_step(auction: Auction) -> None:
    """After a restart, what is due next and when is what it was before."""
    read = from_row(row_of(TimerRecord(auction)))
    assert read is not None
    assert next_due(read.auction) == next_due(auction)
