"""Tests for gateway.command_routes: the application in this process, with a shard at work behind it."""

from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from engine.contract.intake import EventType
from engine.domain.auction import Offer
from engine.domain.events import Cancel, Reschedule
from engine.domain.instants import EpochMs
from engine.store.protocol import Draft, StoreUnavailableError
from gateway import commands as commands_module
from gateway.command_routes import refuse
from gateway.events import _PATTERN_REASONS, SAID_PATTERN
from gateway.problems import Problem, ProblemType
from tests.fakes.clock import BORN_MS
from tests.fakes.events import bid, draft, poison, retry
from tests.gateway.desk import CALLERS, ENDS_AT, OFFER, Desk, bearing, desk, without_ids
from tests.gateway.front import front

COMMANDS = ("cancel", "pause", "resume")


async def ask(
    made: Desk, command: str, auction_id: str = "a-1", caller: str | None = None, **body: Any
) -> httpx.Response:
    """One command about an auction, with a token where a caller is named."""
    return await made.http.post(
        f"/auctions/{auction_id}/{command}",
        json={"reason": "withdrawn"} | body,
        headers={"X-Correlation-Id": "mine-1"} | (bearing(caller) if caller else {}),
    )


# What is done.


@pytest.mark.requirement("R24", "R25", "R26")
async def test_a_cancellation_is_answered_with_the_timer_and_recorded_once() -> None:
    """The answer is the one that the commit wrote; the second one is refused by name and writes nothing."""
    async with desk() as made:
        await made.register()
        answer = await ask(made, "cancel", actor={"type": "maker", "id": "m-1"})
        assert answer.status_code == 200
        timer = answer.json()
        assert (timer["status"], timer["reason"], timer["cancelled_at"]) == ("CANCELLED", "withdrawn", BORN_MS)
        assert timer["cursor"] is not None
        record = made.last_record()
        assert (record["actor_type"], record["actor_id"], record["correlation_id"]) == ("maker", "m-1", "mine-1")
        assert made.facts() == ["auction_timer_registered", "auction_timer_started", "auction_timer_cancelled"]
        for command in COMMANDS:
            refused = await ask(made, command)
            problem = refused.json()
            assert (refused.status_code, problem["error_code"]) == (409, "FSM_TERMINAL_IMMUTABLE")
            assert problem["current_status"] == "CANCELLED"
        assert len(made.facts()) == 3


@pytest.mark.requirement("R25")
async def test_an_auction_is_paused_and_resumed() -> None:
    """The countdown stands still meanwhile, and what cannot follow is refused with both statuses."""
    async with desk() as made:
        await made.register()
        refused = (await ask(made, "resume")).json()
        assert (refused["current_status"], refused["attempted_status"]) == ("ACTIVE", "ACTIVE")
        paused = (await ask(made, "pause")).json()
        assert (paused["status"], paused["remaining_ms"]) == ("PAUSED", ENDS_AT - BORN_MS)
        made.line.advance(5_000)
        again = (await ask(made, "pause")).json()
        assert (again["error_code"], again["current_status"]) == ("FSM_TRANSITION_INVALID", "PAUSED")
        resumed = (await ask(made, "resume")).json()
        assert (resumed["status"], resumed["ends_at"]) == ("ACTIVE", ENDS_AT + 5_000)


@pytest.mark.parametrize("command", ["pause", "resume"])
async def test_a_pause_needs_no_body_and_a_cancellation_needs_a_reason(command: str) -> None:
    """Nothing is something for one of them only."""
    async with desk() as made:
        await made.register()
        assert (await made.http.post(f"/auctions/a-1/{command}")).status_code in {200, 409}
        for body in (None, {"reason": "  "}):
            answer = await made.http.post("/auctions/a-1/cancel", json=body)
            assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_BODY")
        assert answer.json()["errors"] == [{"path": "reason", "reason": _PATTERN_REASONS[SAID_PATTERN]}]
        assert (await ask(made, "cancel", reason=" \nWhy,\tthen? ")).status_code == 200


# Who may.


@pytest.mark.requirement("R24")
@pytest.mark.parametrize(
    ("caller", "actor"),
    [
        ("owner", "owner"),
        ("maker", "maker"),
        ("delegate", "maker_delegate"),
        ("commerce admin", "commerce_admin"),
        ("operator by role", "operator"),
        ("operator by scope", "operator"),
        ("buyer", None),
        ("producer", None),
        ("stranger", None),
    ],
)
async def test_who_may_cancel_an_auction(caller: str, actor: str | None) -> None:
    """Its owner's side and operators, recorded as what they are, whatever the body says; to others it is not there."""
    async with desk(tokens=True) as made:
        await made.register()
        answer = await ask(made, "cancel", caller=caller, actor={"type": "maker", "id": "somebody-else"})
        if actor is None:
            unknown = await ask(made, "cancel", "a-2", caller=caller)
            assert answer.status_code == unknown.status_code == 404
            assert orjson.dumps(without_ids(answer)).replace(b"a-1", b"a-2") == orjson.dumps(without_ids(unknown))
            assert "auction_timer_cancelled" not in made.facts()
            return
        assert answer.status_code == 200, answer.text
        record = made.last_record()
        assert (record["actor_type"], record["actor_id"]) == (actor, CALLERS[caller]["sub"])


@pytest.mark.requirement("R24")
@pytest.mark.parametrize(
    ("also", "actor"), [("owner_id", "owner"), ("maker_id", "maker"), ("maker_delegate_ids", "maker_delegate")]
)
async def test_a_buyer_who_is_more_than_that_may_cancel(also: str, actor: str) -> None:
    """Being the buyer takes nothing away: what admits them is recorded."""
    facts: dict[str, Any] = {also: ("buyer-1",) if also == "maker_delegate_ids" else "buyer-1"}
    async with desk(tokens=True) as made:
        await made.register(offer=replace(OFFER, **facts))
        answer = await ask(made, "cancel", caller="buyer")
        assert answer.status_code == 200, answer.text
        assert (made.last_record()["actor_type"], made.last_record()["actor_id"]) == (actor, "buyer-1")


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize("caller", CALLERS)
async def test_only_the_scope_ops_pauses(command: str, caller: str) -> None:
    """Whatever somebody is to the auction; and without the scope nobody learns whether there is one."""
    async with desk(tokens=True) as made:
        await made.register()
        known, unknown = await ask(made, command, caller=caller), await ask(made, command, "a-2", caller=caller)
        if caller == "operator by scope":
            assert known.status_code == (200 if command == "pause" else 409)
            assert unknown.status_code == 404
            return
        assert (known.status_code, known.json()["error_code"]) == (403, "INSUFFICIENT_SCOPE")
        assert without_ids(known) == without_ids(unknown)


@pytest.mark.requirement("R24")
async def test_an_auction_that_names_nobody_is_cancelled_by_those_who_may_everywhere() -> None:
    """A token without a subject of its own matches no absent owner."""
    async with desk(tokens=True) as made:
        await made.register(offer=Offer())
        assert (await ask(made, "cancel", caller="owner")).status_code == 404
        assert (await ask(made, "cancel", caller="operator by scope")).status_code == 200


@pytest.mark.requirement("R24")
async def test_who_may_not_see_an_auction_asks_the_store_as_often_as_for_one_that_is_not_there() -> None:
    """No answer comes sooner because the gateway happens to know: nothing is to be learned from time."""
    async with desk(tokens=True) as made:
        await made.register()
        counts = []
        for auction_id in ("a-1", "a-2"):
            made.store.calls.clear()
            await ask(made, "cancel", auction_id, caller="stranger")
            counts.append({name: count for name, count in made.store.calls.items() if name in {"timers", "append"}})
        assert counts[0] == counts[1] == {"timers": 1}


@pytest.mark.parametrize("auction_id", ["a b", "x" * 129, "%C3%BC"])
async def test_what_cannot_be_an_id_is_not_asked_for(auction_id: str) -> None:
    """404 like every other unknown auction, with a short answer."""
    async with desk() as made:
        answer = await made.http.post(f"/auctions/{auction_id}/cancel", json={"reason": "why"})
        assert answer.status_code == 404
        assert made.store.calls["timers"] == 0
        assert len(answer.json()["detail"]) < 160


@pytest.mark.requirement("R19")
async def test_an_auction_that_was_cancelled_before_its_start_is_not_there_yet() -> None:
    """A tombstone is never shown outside."""
    async with desk() as made:
        await made.append(draft("e-1", EventType.CANCEL_REQUESTED, Cancel("early"), "a-1"))
        assert made.facts() == ["auction_timer_tombstoned"]
        for command in COMMANDS:
            assert (await ask(made, command)).status_code == 404


# What goes wrong.


@pytest.mark.requirement("R16")
async def test_a_store_that_is_away_is_503() -> None:
    """Before anything was appended, nothing has to be looked up afterwards."""
    async with desk() as made:
        await made.register()
        made.store.failing["timers"] = StoreUnavailableError("secret-host is away")
        answer = await ask(made, "cancel")
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert "secret-host" not in answer.text
        assert "command_id" not in answer.json()


async def test_a_damaged_timer_is_a_fault_of_ours() -> None:
    """500 with an id; nobody cancels what cannot be read."""
    async with desk() as made:
        await made.register()
        made.memory.shards[0].timers["a-1"]["ends_at"] = "soon"
        answer = await ask(made, "cancel")
        assert (answer.status_code, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")


@pytest.mark.requirement("R24")
async def test_a_command_without_an_answer_is_accepted_and_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """202 with its place; PENDING for everybody while nothing is decided, and then for those whom it concerns."""
    monkeypatch.setattr(commands_module, "ANSWER_WITHIN_S", 0.02)
    async with desk(tokens=True, answering=False) as made:
        await made.register()
        answer = await ask(made, "cancel", caller="owner")
        assert answer.status_code == 202
        path = answer.headers["location"]
        assert answer.json() == {"command_id": path.removeprefix("/commands/"), "outcome": "PENDING"}
        for caller in ("owner", "stranger"):
            assert (await made.http.get(path, headers=bearing(caller))).json() == answer.json()
        await made.worker.work()
        for caller, status in (("owner", 200), ("operator by scope", 200), ("maker", 404), ("stranger", 404)):
            asked = await made.http.get(path, headers=bearing(caller))
            assert asked.status_code == status, caller
            if status == 404:
                unknown = await made.http.get("/commands/cmd-0-unknown", headers=bearing(caller))
                assert without_ids(asked).keys() == without_ids(unknown).keys()
                assert asked.json()["error_code"] == unknown.json()["error_code"]
        outcome = (await made.http.get(path, headers=bearing("owner"))).json()
        assert (outcome["outcome"], outcome["timer"]["status"]) == ("APPLIED", "CANCELLED")


# GET /commands/{id}.


async def test_a_command_can_be_asked_for_by_the_id_of_its_event() -> None:
    """Whatever its id looks like, and whatever became of it."""
    async with desk() as made:
        await made.register()
        past = Reschedule(EpochMs(1), None)
        await made.append(
            draft("a/b", EventType.CANCEL_REQUESTED, Cancel("slash"), "a-9"),
            draft("e-refused", EventType.SCHEDULE_CHANGED, past, "a-1", reply_to="somebody"),
            draft("e-parked", EventType.SCHEDULE_CHANGED, past, "a-1"),
            poison("e-poison"),
        )
        outcomes = {
            name: (await made.http.get(f"/commands/{name}")).json()
            for name in ("a/b", "e-refused", "e-parked", "e-poison")
        }
        assert {name: outcome["outcome"] for name, outcome in outcomes.items()} == {
            "a/b": "APPLIED",
            "e-refused": "REFUSED",
            "e-parked": "IN_TROUBLESHOOTING_QUEUE",
            "e-poison": "IN_TROUBLESHOOTING_QUEUE",
        }
        assert outcomes["e-refused"]["error_code"] == outcomes["e-parked"]["error_code"] == "SCHEDULE_IN_PAST"
        assert outcomes["e-poison"]["error_code"] == "SCHEMA_INVALID"
        assert all(type(outcomes["a/b"]["audit"][name]) is int for name in ("seq", "version", "occurred_at", "shard"))


@pytest.mark.requirement("R30")
async def test_what_nobody_keeps_is_told_from_what_waits() -> None:
    """A start and a bid leave no outcome behind: they are pending until the engine has been there, and processed then."""
    async with desk(answering=False) as made:
        await made.register()
        await made.memory.append(0, [bid("a-1", "b-1"), bid("a-9", "b-2")], made.authority.now_ms, "bids")

        async def told(name: str) -> str:
            return str((await made.http.get(f"/commands/{name}")).json()["outcome"])

        assert [await told(name) for name in ("start-a-1-0", "bid-b-1")] == ["PROCESSED", "PENDING"]
        await made.worker.work()
        assert [await told(name) for name in ("bid-b-1", "bid-b-2")] == ["PROCESSED", "IN_TROUBLESHOOTING_QUEUE"]
        await made.memory.append(0, [retry("bid-b-2", "again")], made.authority.now_ms, "retry")
        made.worker.batch_max = 1
        await made.worker.begin()
        await made.worker.look()
        await made.worker.shard.turn()
        assert await told("bid-b-2") == "PENDING"
        await made.register("a-9")
        assert await told("bid-b-2") == "IN_TROUBLESHOOTING_QUEUE"
        await made.memory.append(0, [retry("bid-b-2", "once more")], made.authority.now_ms, "retry-2")
        await made.worker.work()
        assert await told("bid-b-2") == "APPLIED"


async def test_an_event_whose_id_looks_like_a_gateways_is_found_in_its_shard() -> None:
    """Producers choose their ids: what begins alike says nothing about where it is."""
    async with front(shards=4) as made:
        await made.memory.append(3, [Draft("cmd-0-abc", b"{}")], made.authority.now_ms, "call")
        assert (await made.http.get("/commands/cmd-0-abc")).json()["outcome"] == "PENDING"


async def test_of_one_id_in_several_shards_what_was_decided_is_told() -> None:
    """Before what was only processed, and that before what waits; of two decisions the one about an auction."""
    async with front(shards=4) as made:
        for shard in range(4):
            await made.memory.append(shard, [Draft("e-1", b"{}")], made.authority.now_ms, f"call-{shard}")
        made.memory.shards[1].intake_cursor = made.memory.shards[1].events[-1].stream_id

        async def told() -> dict[str, Any]:
            answer: dict[str, Any] = (await made.http.get("/commands/e-1")).json()
            return answer

        assert (await told())["outcome"] == "PROCESSED"
        made.memory.shards[0].outcomes["e-1"] = b'{"command_id":"e-1","outcome":"APPLIED","auction_id":null}'
        assert (await told())["outcome"] == "APPLIED"
        made.memory.shards[2].outcomes["e-1"] = b'{"command_id":"e-1","outcome":"REFUSED","auction_id":"a-1"}'
        assert (await told())["outcome"] == "REFUSED"


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("actor", [None, "buyer-1"])
async def test_what_became_of_an_event_is_told_to_whoever_sent_it(actor: str | None) -> None:
    """By the token it came with, from its arrival to its cancellation; not to whom it names, and to nobody else."""
    who = {} if actor is None else {"actor": {"type": "buyer", "id": actor}}

    def told(name: str, **data: Any) -> dict[str, Any]:
        data = {"auction_id": "a-1"} | who | data
        return {"specversion": "1.0", "id": name, "type": "auctions.schedule.changed", "source": "tests", "data": data}

    async with desk(tokens=True) as made:
        await made.register()
        batch = [
            told("applied", ends_at=ENDS_AT + 1),
            told("refused", ends_at=1, reply_to="r"),
            told("parked", ends_at=1),
        ]
        assert (await made.http.post("/events", json=batch, headers=bearing("producer"))).status_code == 202
        await made.worker.work()
        expected = {"applied": "APPLIED", "refused": "REFUSED", "parked": "IN_TROUBLESHOOTING_QUEUE"}
        for state in ("IN_TROUBLESHOOTING_QUEUE", "CANCELED"):
            expected["parked"] = state
            for name, outcome in expected.items():
                for caller, status in {
                    "producer": 200,
                    "operator by scope": 200,
                    "buyer": 404,
                    "stranger": 404,
                }.items():
                    answer = await made.http.get(f"/commands/{name}", headers=bearing(caller))
                    assert answer.status_code == status, (name, caller)
                    assert status == 404 or answer.json()["outcome"] == outcome
            if state != "CANCELED":
                order = {"headers": bearing("operator by scope"), "json": {"reason": "of no use"}}
                assert (await made.http.post("/ops/troubleshooting/parked/cancel", **order)).status_code == 200


@pytest.mark.parametrize("command_id", ["nothing", "cmd-0-nothing", "cmd-7-nothing", "x" * 1_025, "%00", "%20"])
async def test_an_unknown_command_is_404(command_id: str) -> None:
    """The answer is short, however long the question was."""
    async with desk() as made:
        answer = await made.http.get(f"/commands/{command_id}")
        assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
        assert len(answer.json()["detail"]) < 160


@pytest.mark.requirement("R16")
async def test_what_became_of_a_command_is_503_while_the_store_is_away() -> None:
    """Unknown is not the same as not there."""
    async with desk() as made:
        made.store.failing["outcome"] = StoreUnavailableError("away")
        assert (await made.http.get("/commands/e-1")).status_code == 503


# Refusals.


@pytest.mark.parametrize(
    ("code", "problem_type"),
    [
        ("FSM_TRANSITION_INVALID", ProblemType.FSM_TRANSITION_INVALID),
        ("FSM_TERMINAL_IMMUTABLE", ProblemType.FSM_TERMINAL_IMMUTABLE),
        ("WINDOW_EXPIRED", ProblemType.WINDOW_EXPIRED),
        ("ALREADY_CANCELLED", ProblemType.ALREADY_CANCELLED),
        ("AUCTION_CLOSED", ProblemType.AUCTION_CLOSED),
        ("INVALID_OPERATION", ProblemType.INVALID_OPERATION),
        ("UNKNOWN_AUCTION", ProblemType.RESOURCE_NOT_FOUND),
        ("TIMER_UNREADABLE", ProblemType.IN_TROUBLESHOOTING),
        ("CONFLICTING_REGISTRATION", ProblemType.IN_TROUBLESHOOTING),
    ],
)
def test_a_refusal_is_the_problem_of_its_code(code: str, problem_type: ProblemType) -> None:
    """With the members that a client branches on, and nothing of what the answer holds besides."""
    answer = {
        "auction_id": "a-1",
        "command_id": "cmd-0-1",
        "error_code": code,
        "error": "a sentence",
        "current_status": "ENDED",
        "attempted_status": "CANCELLED",
        "asked_by": "owner-1",
        "timer": {},
    }
    with pytest.raises(Problem) as raised:
        refuse(answer)
    assert raised.value.type is problem_type
    assert "asked_by" not in raised.value.extra
    if problem_type is not ProblemType.RESOURCE_NOT_FOUND:
        assert raised.value.extra["current_status"] == "ENDED"
        assert raised.value.detail == "a sentence"


def test_an_answer_without_a_code_refuses_nothing() -> None:
    """What was applied, and what had no effect."""
    refuse({"outcome": "APPLIED"})
