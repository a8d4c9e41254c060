"""Tests for engine.journal: what is written for a decision, spelled as the operations of one batch. No store, no clock."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import orjson
import pytest

from engine.contract.audit import ChainHead, verify
from engine.contract.cursors import START
from engine.contract.timers import CorruptTimerError, TimerRecord, checksum, moving_fields, to_fields
from engine.domain.auction import Auction
from engine.domain.instants import MINUTE_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.journal import Journal, peek, support_reference
from engine.store.protocol import (
    Announce,
    BindOffer,
    Draft,
    Entry,
    KeepOutcome,
    Operation,
    Park,
    PlaceClosed,
    PlaceLive,
    PlacePaused,
    PutTimer,
    Record,
    Reply,
    Requeue,
    ShardHead,
    Unpark,
)
from tests.engine.domain.examples import END, IN_STATUS, T0
from tests.engine.domain.examples import at as after_t0
from tests.fakes.events import (
    bid,
    cancel,
    cancel_offer,
    discard,
    pause,
    poison,
    reschedule,
    resume,
    resync,
    retry,
    start,
    withdraw,
)

HEAD = ShardHead("4-0", ChainHead(9, "e" * 64), EpochMs(T0 - MINUTE_MS))
NOW = after_t0(90 * MINUTE_MS)


class Drafted:
    """A journal over some auctions, to which events are applied one after the other."""

    def __init__(self, *auctions: Auction, offers: dict[str, str] | None = None, shard: int = 0, **more: Any) -> None:
        timers = {auction.auction_id: TimerRecord(auction, "trace-0", "req-0") for auction in auctions}
        self.journal = Journal(
            shard, 3, HEAD, timers, offers or {}, holder="engine-1", now=NOW, commit_id="commit-1", **more
        )
        self.serial = 4

    def apply(self, draft: Draft, at: int | None) -> "Drafted":
        """An event that arrived at `at`."""
        self.serial += 1
        entry = Entry(f"{self.serial}-0", None if at is None else EpochMs(at), draft.event_id, draft.body)
        self.journal.apply(entry, peek(entry))
        return self

    def operations(self, *kinds: type) -> list[Any]:
        """The operations of the batch, or those of some kinds."""
        if not hasattr(self, "batch"):
            self.batch = self.journal.batch()
        return [one for one in self.batch.operations if not kinds or isinstance(one, kinds)]

    def facts(self) -> list[str]:
        """The facts that are audited."""
        return [record.fields["event_type"] for record in self.operations(Record)]


def known(status: Status) -> tuple[Auction, EpochMs]:
    """The example auction in a status, and an instant at which nothing is due for it."""
    return IN_STATUS[status]


def test_an_empty_journal_changes_nothing() -> None:
    """The batch leads to where it builds on, carries its guards, and has no operations."""
    drafted = Drafted()
    assert drafted.operations() == []
    batch = drafted.batch
    assert (batch.shard, batch.epoch, batch.commit_id, batch.est) == (0, 3, "commit-1", NOW)
    assert (batch.after, batch.intake, batch.chain, batch.due_at, batch.versions) == (HEAD, "4-0", HEAD.chain, None, {})


@pytest.mark.requirement("R1")
def test_a_start_is_written_whole() -> None:
    """All fields of the hash, the deadline, the audit record and the offer; the version guard is that of nothing."""
    drafted = Drafted().apply(start("lot-7", T0, END, offer_id="o-1"), T0 - 5)
    (put,) = drafted.operations(PutTimer)
    record = drafted.journal.after["lot-7"]
    assert put == PutTimer("lot-7", to_fields(record) | {"checksum": checksum(record.auction)})
    assert (record.trace_id, record.correlation_id) == ("trace-start-lot-7", "req-start-lot-7")
    assert drafted.operations(PlaceLive) == [PlaceLive("lot-7", END)]
    assert drafted.operations(BindOffer) == [BindOffer("o-1", f"auction lot-7 {T0 - 5}", forget=False)]
    assert drafted.batch.versions == {"lot-7": 0}
    assert drafted.batch.due_at is None
    assert drafted.batch.intake == "5-0"


def test_a_change_writes_only_what_moves() -> None:
    """A bid that extends writes the moving fields, and builds on the version that stood."""
    auction, _ = known(Status.CLOSING)
    drafted = Drafted(auction).apply(bid("lot-7", "b-1"), END - 1)
    after = drafted.journal.after["lot-7"].auction
    assert drafted.operations(PutTimer) == [PutTimer("lot-7", moving_fields(after) | {"checksum": checksum(after)})]
    assert drafted.batch.versions == {"lot-7": auction.version}
    assert drafted.operations(PlaceLive) == [PlaceLive("lot-7", EpochMs(END - 1 + 15 * MINUTE_MS))]


def test_an_auction_is_written_once_however_often_it_changes() -> None:
    """Many events for one auction give one hash and one place, at the end, and the version guard of the first."""
    auction, _ = known(Status.CLOSING)
    drafted = Drafted(auction)
    for number in range(4):
        drafted.apply(bid("lot-7", f"b-{number}"), END - 4 + number)
    operations = drafted.operations()
    assert [type(one) for one in operations[-2:]] == [PutTimer, PlaceLive]
    assert len(drafted.operations(PutTimer, PlaceLive)) == 2
    assert drafted.batch.versions == {"lot-7": auction.version}
    assert drafted.facts() == ["auction_timer_extended"] * 4


@pytest.mark.parametrize(
    ("status", "make", "place"),
    [
        (Status.ACTIVE, lambda: pause("lot-7", "p"), lambda at: PlacePaused("lot-7", at)),
        (Status.PAUSED, lambda: resume("lot-7", "r"), lambda at: PlaceLive("lot-7", EpochMs(END + 10 * MINUTE_MS))),
        (Status.ACTIVE, lambda: cancel("lot-7"), lambda at: PlaceClosed("lot-7", at)),
        (Status.PAUSED, lambda: cancel("lot-7"), lambda at: PlaceClosed("lot-7", at)),
        (Status.UNREGISTERED, lambda: cancel("lot-7"), lambda at: PlaceClosed("lot-7", at)),
        (Status.TOMBSTONE, lambda: start("lot-7", T0, END), lambda at: PlaceClosed("lot-7", T0 - 60 * MINUTE_MS)),
    ],
)
def test_every_status_has_its_place(status: Status, make: Any, place: Any) -> None:
    """By deadline, by pause, or by end."""
    auction, at = known(status)
    drafted = Drafted(*([auction] if auction.version else [])).apply(make(), at)
    places = drafted.operations(PlaceLive, PlacePaused, PlaceClosed)
    if status is Status.TOMBSTONE:
        assert [type(one) for one in places] == [PlaceClosed]
    else:
        assert places == [place(at)]


def test_time_closes_in_one_go() -> None:
    """Start, window and deadline that are past are written together, each as of its time; the guard is the latest."""
    auction, _ = known(Status.SCHEDULED)
    drafted = Drafted(auction)
    drafted.journal.elapse("lot-7", NOW)
    assert drafted.facts() == ["auction_timer_started", "auction_timer_closing", "auction_timer_ended"]
    assert drafted.batch.due_at == END
    assert drafted.batch.intake == HEAD.intake
    assert drafted.operations(PlaceClosed) == [PlaceClosed("lot-7", END)]
    records = drafted.operations(Record)
    assert {record.fields["actor_type"] for record in records} == {"system"}
    assert [record.fields["occurred_at"] for record in records] == [str(T0), str(after_t0(45 * MINUTE_MS)), str(END)]
    assert {record.fields["recorded_at"] for record in records} == {str(NOW)}
    assert {(record.fields["event_id"], record.fields["intake_id"]) for record in records} == {("", "")}


def test_the_guard_is_the_latest_instant_of_all_auctions() -> None:
    """Whatever the order in which they are written: none of them may be early."""
    running, _ = known(Status.ACTIVE)
    registered = replace(running.registered, auction_id="other", ends_at=after_t0(50 * MINUTE_MS))
    other = replace(running, auction_id="other", registration=registered, ends_at=registered.ends_at)
    for order in (["lot-7", "other"], ["other", "lot-7"]):
        drafted = Drafted(running, other)
        for auction_id in order:
            drafted.journal.elapse(auction_id, NOW)
        drafted.operations()
        assert drafted.batch.due_at == END
        assert drafted.batch.versions == {"lot-7": running.version, "other": other.version}


def test_a_close_forgets_the_offer() -> None:
    """The binding of an offer whose auction is over is kept for the retention only."""
    drafted = Drafted().apply(start("lot-7", T0, END, offer_id="o-1"), T0)
    drafted.journal.elapse("lot-7", NOW)
    assert drafted.operations(BindOffer)[-1] == BindOffer("o-1", "auction lot-7", forget=True)


def test_what_time_did_before_an_event_is_not_the_events_doing() -> None:
    """A bid that came after the deadline closes the auction first: by the scheduler, without its own ids, unanswered."""
    auction, _ = known(Status.CLOSING)
    drafted = Drafted(auction).apply(bid("lot-7", "b-1", reply_to="inbox"), END + 5)
    ended, late = drafted.operations(Record)
    assert (ended.fields["event_type"], ended.fields["actor_id"], ended.fields["trace_id"]) == (
        "auction_timer_ended",
        "scheduler",
        "trace-0",
    )
    assert (late.fields["event_type"], late.fields["actor_id"], late.fields["trace_id"], late.fields["event_id"]) == (
        "late_bid_ignored",
        "m-1",
        "trace-bid-b-1",
        "bid-b-1",
    )
    assert [reply.outcome for reply in drafted.operations(Reply)] == ["LATE"]


@pytest.mark.requirement("B7")
def test_records_of_a_batch_are_chained() -> None:
    """Each to the one before it, the first to the shard's head; the batch leads to the last."""
    auction, _ = known(Status.CLOSING)
    drafted = Drafted(auction)
    for number in range(3):
        drafted.apply(bid("lot-7", f"b-{number}"), END - 3 + number)
    records = [record.fields for record in drafted.operations(Record)]
    assert verify(records, HEAD.chain) is None
    assert drafted.batch.chain == ChainHead(12, records[-1]["hash"])


def test_a_refusal_writes_no_more_than_its_answer() -> None:
    """To the one who asked, and for whoever asks later: no record, no hash, no announcement, no guard."""
    auction, at = known(Status.ENDED)
    drafted = Drafted(auction).apply(cancel("lot-7", reply_to="inbox"), at)
    reply, kept = drafted.operations()
    assert kept == KeepOutcome("cancel-lot-7", reply.body)
    assert (reply.reply_to, reply.outcome, reply.command_id) == ("inbox", "REFUSED", "cancel-lot-7")
    body = orjson.loads(reply.body)
    assert {name: body[name] for name in ("error_code", "current_status", "attempted_status", "event_type")} == {
        "error_code": "FSM_TERMINAL_IMMUTABLE",
        "current_status": "ENDED",
        "attempted_status": "CANCELLED",
        "event_type": "auctions.cancel.requested",
    }
    assert body["timer"]["status"] == "ENDED"
    assert drafted.batch.versions == {}
    assert drafted.batch.intake == "5-0"


def test_a_tombstone_is_never_shown() -> None:
    """It is audited and kept, but neither announced nor part of an answer."""
    drafted = Drafted().apply(cancel("lot-7", reply_to="inbox"), T0)
    assert drafted.facts() == ["auction_timer_tombstoned"]
    assert drafted.operations(Announce) == []
    (reply,) = drafted.operations(Reply)
    assert "timer" not in orjson.loads(reply.body)
    assert reply.outcome == "APPLIED"


@pytest.mark.requirement("R19")
def test_an_offer_cancelled_before_anyone_knew_it_is_remembered() -> None:
    """Once: the first cancellation counts, and says when and why."""
    drafted = Drafted().apply(cancel_offer("o-1", reason="first"), T0).apply(cancel_offer("o-1", event_id="2"), T0 + 1)
    (bound,) = drafted.operations(BindOffer)
    assert (bound.offer_id, bound.forget) == ("o-1", True)
    kept = orjson.loads(bound.value.removeprefix("cancelled "))
    assert (kept["reason"], kept["at"]) == ("first", T0)


@pytest.mark.requirement("R19", "R25")
def test_a_cancellation_that_waits_for_its_start_is_answered_once() -> None:
    """By shard 0, to whoever asked and to whoever will ask; the others, which have got it as well, say nothing."""
    ask = {"reply_to": "inbox"}
    drafted = Drafted().apply(cancel_offer("o-1", **ask), T0).apply(cancel_offer("o-1", event_id="2", **ask), T0 + 1)
    replies = drafted.operations(Reply)
    assert [(reply.reply_to, reply.outcome) for reply in replies] == [("inbox", "APPLIED"), ("inbox", "UNCHANGED")]
    assert [one.body for one in drafted.operations(KeepOutcome)] == [reply.body for reply in replies]
    body = orjson.loads(replies[0].body)
    assert (body["offer_id"], body["auction_id"], body["command_id"]) == ("o-1", None, "cancel-o-1")
    elsewhere = Drafted(shard=3).apply(cancel_offer("o-1", **ask), T0)
    assert [type(one) for one in elsewhere.operations()] == [BindOffer]


@pytest.mark.requirement("R19")
@pytest.mark.requirement("R26")
def test_a_remembered_cancellation_is_recorded_in_the_name_of_who_cancelled() -> None:
    """When the start comes, the audit of the cancellation has the actor, trace and event id of the cancellation itself."""
    first = Drafted().apply(cancel_offer("o-1", reason="withdrawn", submitted_by="crm"), T0)
    (bound,) = first.operations(BindOffer)
    begins = start("lot-7", T0, END, offer_id="o-1", submitted_by="shop")
    drafted = Drafted(offers={"o-1": bound.value}).apply(begins, T0 + 5)
    cancelled, registered = [record.fields for record in drafted.operations(Record)]
    told = [orjson.loads(record["details"])["submitted_by"] for record in (cancelled, registered)]
    assert told == ["crm", "shop"]
    kept = orjson.loads(bound.value.removeprefix("cancelled "))
    assert cancelled["event_type"] == "auction_timer_tombstoned"
    assert {name: cancelled[name] for name in ("event_id", "trace_id", "correlation_id", "actor_type", "actor_id")} == {
        name: kept[name] for name in ("event_id", "trace_id", "correlation_id", "actor_type", "actor_id")
    }
    assert registered["event_type"] == "auction_timer_registered"
    assert registered["event_id"] != cancelled["event_id"]


@pytest.mark.requirement("R19", "R29")
@pytest.mark.parametrize("kept", ["{", "[]", '{"reason":"withdrawn"}'])
def test_a_start_whose_remembered_cancellation_was_damaged_waits_for_a_person(kept: str) -> None:
    """It neither stops the shard nor registers an auction that may be cancelled."""
    drafted = Drafted(offers={"o-1": f"cancelled {kept}"}).apply(start("lot-7", T0, END, offer_id="o-1"), T0 + 5)
    (parked,) = drafted.operations()
    assert isinstance(parked, Park)
    assert orjson.loads(parked.body)["error_code"] == "SCHEMA_INVALID"


@pytest.mark.requirement("R19")
def test_a_remembered_cancellation_does_not_touch_a_known_auction() -> None:
    """A second start that names a cancelled offer, for an auction that is running: no effect but the conflict."""
    auction, at = known(Status.ACTIVE)
    value = "cancelled " + orjson.dumps({"reason": "withdrawn", "at": T0 - 9}).decode()
    drafted = Drafted(auction, offers={"o-1": value}).apply(start("lot-7", T0, END, offer_id="o-1"), at)
    assert drafted.facts() == []
    assert [type(one) for one in drafted.operations()] == [Park]


@pytest.mark.requirement("R19")
def test_a_remembered_cancellation_does_not_touch_an_offer_that_is_put_up_again() -> None:
    """It was about the auction that the offer stood for before, in whichever shard; the offer is bound to the new one."""
    value = "cancelled " + orjson.dumps({"reason": "withdrawn", "at": T0 - 9}).decode()
    again = start("lot-8", T0, END, offer_id="o-1", relisted=True)
    drafted = Drafted(offers={"o-1": value}).apply(again, T0).apply(cancel_offer("o-1"), T0 + 1)
    assert drafted.facts() == ["auction_timer_registered", "auction_timer_started", "auction_timer_cancelled"]
    assert drafted.operations(BindOffer)[0] == BindOffer("o-1", f"auction lot-8 {T0}", forget=False)


def test_an_event_for_a_damaged_timer_is_parked() -> None:
    """With the error that says what is wrong with the hash."""
    damaged = {"lot-7": CorruptTimerError("timer 'lot-7': ends_at")}
    drafted = Drafted(unreadable=damaged).apply(bid("lot-7", "b-1", reply_to="inbox"), T0)
    (park,) = drafted.operations(Park)
    body = orjson.loads(park.body)
    assert (park.command_id, body["error_code"], body["error"]) == (
        "bid-b-1",
        "TIMER_UNREADABLE",
        "timer 'lot-7': ends_at",
    )
    assert (body["event_type"], body["reply_to"], body["first_seen_at"]) == ("auctions.bid.accepted", "inbox", T0)
    assert drafted.batch.intake == "5-0"


@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    ("body", "payload"),
    [(b"{not json", "{not json"), (b"\xff\xfe", "\ufffd\ufffd"), (b'{"type":7}', {"type": 7}), (b"[1,2]", [1, 2])],
)
def test_poison_is_kept_as_readably_as_possible(body: bytes, payload: object) -> None:
    """As JSON where it is JSON, else as text."""
    (park,) = Drafted().apply(poison("p-1", body), T0).operations()
    kept = orjson.loads(park.body)
    assert (kept["payload"], kept["error_code"], kept["event_type"], kept["first_seen_at"]) == (
        payload,
        "SCHEMA_INVALID",
        None,
        T0,
    )


@pytest.mark.requirement("R29")
def test_a_huge_poison_is_cut() -> None:
    """What is kept of a body that is no JSON is bounded."""
    (park,) = Drafted().apply(poison("p-1", b"x" * 200_000), T0).operations()
    assert len(park.body) < 70_000


def test_poison_without_an_id_is_named_by_its_place() -> None:
    """So that two of them are two commands."""
    drafted = Drafted().apply(Draft("", b"?"), None).apply(Draft("", b"?"), None)
    assert [park.command_id for park in drafted.operations(Park)] == ["0-5-0", "0-6-0"]
    assert {orjson.loads(park.body)["first_seen_at"] for park in drafted.operations(Park)} == {NOW}
    assert drafted.journal.poison == 2


def test_announcements_follow_the_records() -> None:
    """In the order in which things happened, each with the version that then stood."""
    auction, _ = known(Status.CLOSING)
    drafted = Drafted(auction).apply(bid("lot-7", "b-1"), END - 1)
    drafted.journal.elapse("lot-7", NOW)
    told = [(one.type, one.version) for one in drafted.operations(Announce)]
    assert told == [("bid.accepted", 4), ("timer.extended", 4), ("timer.ended", 5)]
    kinds: list[type[Operation]] = [type(one) for one in drafted.operations(Record, Announce)]
    assert kinds == [Record, Announce, Announce, Record, Announce]


def test_the_cursor_follows_every_entry() -> None:
    """Applied, refused, parked or without effect: each is acknowledged by the commit that decided it."""
    auction, at = known(Status.ACTIVE)
    drafted = Drafted(auction).apply(bid("lot-7", "b"), at).apply(poison("p"), at).apply(resume("lot-7", "r"), at)
    drafted.apply(bid("unknown", "x"), at)
    assert drafted.journal.batch().intake == "8-0"
    assert HEAD.intake != START


# What became of a command.


COMMANDS: Final[dict[str, tuple[Status, Callable[..., Draft]]]] = {
    "cancel": (Status.ACTIVE, lambda **ask: cancel("lot-7", event_id="c-1", **ask)),
    "pause": (Status.ACTIVE, lambda **ask: pause("lot-7", "c-1", **ask)),
    "resume": (Status.PAUSED, lambda **ask: resume("lot-7", "c-1", **ask)),
    "reschedule": (Status.ACTIVE, lambda **ask: reschedule("lot-7", "c-1", END + 1, **ask)),
    "withdraw": (Status.ACTIVE, lambda **ask: withdraw("lot-7", "c-1", minutes=600, **ask)),
    "refused": (Status.ENDED, lambda **ask: cancel("lot-7", event_id="c-1", **ask)),
    "without effect": (Status.ACTIVE, lambda **ask: reschedule("lot-7", "c-1", END, **ask)),
}


@pytest.mark.requirement("R30")
@pytest.mark.parametrize("ask", [{}, {"reply_to": "inbox"}], ids=["unasked", "asked"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_became_of_a_command_is_kept(command: str, ask: dict[str, str]) -> None:
    """Whether or not somebody waits for the answer; to whoever waits the same is said."""
    status, make = COMMANDS[command]
    auction, at = known(status)
    drafted = Drafted(auction).apply(make(**ask), at)
    (kept,) = drafted.operations(KeepOutcome)
    assert kept.command_id == "c-1"
    assert orjson.loads(kept.body)["command_id"] == "c-1"
    assert [reply.body for reply in drafted.operations(Reply)] == [kept.body] * len(ask)


@pytest.mark.parametrize("ask", [{}, {"reply_to": "inbox"}], ids=["unasked", "asked"])
def test_what_became_of_a_bid_or_a_start_is_not_kept(ask: dict[str, str]) -> None:
    """There are too many of them, and nobody asks by their id: applied, late or parked, whoever waits is answered."""
    auction, at = known(Status.ACTIVE)
    drafted = Drafted(auction).apply(bid("lot-7", "b-1", **ask), at).apply(start("lot-8", T0, END, **ask), at)
    drafted.apply(bid("unknown", "b-2", **ask), at).apply(start("lot-7", T0, END + 1, event_id="other", **ask), at)
    assert drafted.operations(KeepOutcome) == []
    assert len(drafted.operations(Reply)) == 4 * len(ask)
    assert len(drafted.operations(Park)) == 2


@pytest.mark.requirement("R20")
@pytest.mark.requirement("R26")
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("refused", "without effect")])
def test_an_answer_carries_its_record(command: str) -> None:
    """The metadata of the one record the command has made, as the chain holds it, with the shard it is in."""
    status, make = COMMANDS[command]
    auction, at = known(status)
    drafted = Drafted(auction).apply(make(reply_to="inbox"), at)
    (record,) = drafted.operations(Record)
    (reply,) = drafted.operations(Reply)
    answer = orjson.loads(reply.body)
    assert answer["audit"] == {**record.fields, "shard": "0"}
    assert answer["audit"]["hash"] == drafted.batch.chain.hash
    assert answer["audit"]["seq"] == str(drafted.batch.chain.seq)


@pytest.mark.requirement("R26")
def test_an_answer_carries_its_own_record_and_not_that_of_time() -> None:
    """Where time moved the auction before and after the command, the record in the answer is the command's."""
    auction, _ = known(Status.SCHEDULED)
    drafted = Drafted(auction).apply(reschedule("lot-7", "c-1", END - 1, reply_to="inbox"), after_t0(50 * MINUTE_MS))
    drafted.journal.elapse("lot-7", NOW)
    (reply,) = drafted.operations(Reply)
    assert orjson.loads(reply.body)["audit"]["event_type"] == "auction_timer_rescheduled"
    assert len(drafted.facts()) == 4


@pytest.mark.requirement("R25")
@pytest.mark.parametrize("command", ["refused", "without effect"])
def test_what_did_not_happen_has_no_record(command: str) -> None:
    """A refusal and a command without effect are answered without one."""
    status, make = COMMANDS[command]
    auction, at = known(status)
    drafted = Drafted(auction).apply(make(reply_to="inbox"), at)
    (reply,) = drafted.operations(Reply)
    assert "audit" not in orjson.loads(reply.body)
    assert drafted.operations(Record) == []


@pytest.mark.requirement("R21")
def test_only_a_refused_withdrawal_is_announced_as_blocked() -> None:
    """Others that are refused are answered and no more; the reference is that of the answer."""
    auction, at = known(Status.ENDED)
    drafted = Drafted(auction).apply(cancel("lot-7", reply_to="inbox"), at)
    drafted.apply(withdraw("lot-7", "w-1", reply_to="inbox"), at)
    (blocked,) = drafted.operations(Announce)
    cancelled, withdrawn = [orjson.loads(reply.body) for reply in drafted.operations(Reply)]
    assert "support_reference" not in cancelled
    assert withdrawn["support_reference"] == support_reference("w-1")
    assert orjson.loads(blocked.body)["support_reference"] == support_reference("w-1")
    kinds = [type(one) for one in drafted.operations(Announce, Reply)]
    assert kinds == [Reply, Announce, Reply], "what a commit announces is there when its answer is"


@pytest.mark.requirement("R30")
def test_an_operators_command_spelled_out() -> None:
    """Out of troubleshooting first, then what becomes of it, the record, and the answers; no auction is guarded."""
    (parked,) = Drafted().apply(bid("lot-7", "b-1", reply_to="bidding"), T0).operations(Park)
    commands = {"bid-b-1": parked.body}
    retried = Drafted(parked=commands).apply(retry("bid-b-1", "order-1", reply_to="i"), T0 + 5)
    kinds = [type(one) for one in retried.operations()]
    assert kinds == [Unpark, Requeue, KeepOutcome, Record, Reply, KeepOutcome]
    assert orjson.loads(retried.operations(KeepOutcome)[0].body)["outcome"] == "PENDING"
    (requeue,) = retried.operations(Requeue)
    assert (requeue.event_id, requeue.attempts, requeue.first_seen_at) == ("bid-b-1", 1, T0)
    assert orjson.loads(requeue.body) == orjson.loads(bid("lot-7", "b-1", reply_to="bidding").body)
    discarded = Drafted(parked=commands).apply(discard("bid-b-1", "order-1", reply_to="i"), T0 + 5)
    kinds = [type(one) for one in discarded.operations()]
    assert kinds == [Unpark, Reply, KeepOutcome, Record, Reply, KeepOutcome]
    for drafted in (retried, discarded):
        assert drafted.batch.versions == {}
        assert drafted.batch.due_at is None
        assert drafted.batch.intake == "5-0"
        assert verify([record.fields for record in drafted.operations(Record)], HEAD.chain) is None


@pytest.mark.requirement("R8", "R14")
def test_a_clock_that_was_put_right_is_announced_and_changes_nothing() -> None:
    """One announcement with the drift and both ids; no record, no change of any auction, no answer; the cursor moves on."""
    auction, instant = IN_STATUS[Status.ACTIVE]
    drafted = Drafted(auction).apply(resync(auction.auction_id, "resync-1", -740), instant)
    (announced,) = drafted.operations()
    assert isinstance(announced, Announce)
    assert (announced.type, announced.version) == ("auction_timer_resynced", auction.version)
    assert orjson.loads(announced.body) == {
        "type": "auction_timer_resynced",
        "auction_id": auction.auction_id,
        "server_time": NOW,
        "trace_id": "trace-resync-1",
        "correlation_id": "req-resync-1",
        "occurred_at": instant,
        "drift_ms": -740,
        "rtt_ms": 38,
        "actor": {"type": "maker", "id": "m-1"},
    }
    assert (drafted.batch.intake, drafted.batch.versions, drafted.journal.after) == ("5-0", {}, {})


@pytest.mark.requirement("R14")
@pytest.mark.parametrize("status", [Status.UNREGISTERED, Status.TOMBSTONE])
def test_a_clock_report_for_what_is_not_public_is_dropped(status: Status) -> None:
    """It is no command that a person has to look at: nothing is announced or parked, and the cursor moves on."""
    drafted = Drafted(IN_STATUS[status][0]).apply(resync(IN_STATUS[status][0].auction_id, "resync-1"), T0)
    assert drafted.operations() == []
    assert drafted.batch.intake == "5-0"


def test_an_event_for_a_damaged_timer_is_kept_for_whoever_asks() -> None:
    """A command for it is in troubleshooting, and says so under its id; a bid only there."""
    damaged = {"lot-7": CorruptTimerError("timer 'lot-7': ends_at")}
    drafted = Drafted(unreadable=damaged).apply(cancel("lot-7"), T0).apply(bid("lot-7", "b-1"), T0)
    (kept,) = drafted.operations(KeepOutcome)
    assert (kept.command_id, orjson.loads(kept.body)["outcome"]) == ("cancel-lot-7", "IN_TROUBLESHOOTING_QUEUE")
    assert len(drafted.operations(Park)) == 2
