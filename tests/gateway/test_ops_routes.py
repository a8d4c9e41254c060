"""Tests for gateway.ops_routes: troubleshooting over HTTP, with a shard at work behind it."""

import asyncio
from typing import Any

import orjson
import pytest

from engine.contract.keys import shard_of
from engine.store.protocol import Group, StoreUnavailableError
from gateway import commands as commands_module
from gateway import ops_routes as module
from gateway.listing import Place
from tests.fakes.clock import BORN_MS
from tests.fakes.events import poison
from tests.gateway.desk import CALLERS, Desk, bearing, desk
from tests.gateway.front import front

PATH = "/ops/troubleshooting"
ROUTES = (
    ("GET", ""),
    ("POST", "/e-1/retry"),
    ("POST", "/e-1/cancel"),
    ("POST", "/requeue"),
)


async def listed(made: Desk, **query: str) -> list[str]:
    """The ids of all pages."""
    found: list[str] = []
    while True:
        page = (await made.http.get(PATH, params=query)).json()
        found += [command["command_id"] for command in page["commands"]]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


async def act(made: Desk, command_id: str, action: str, **body: Any) -> Any:
    """One operation."""
    return await made.http.post(f"{PATH}/{command_id}/{action}", json={"reason": "why", "operator": "op-1"} | body)


# Who may.


@pytest.mark.requirement("R30")
@pytest.mark.parametrize("caller", CALLERS)
async def test_only_the_scope_ops_opens_troubleshooting(caller: str) -> None:
    """No role and no share in an auction does; and what is refused was not looked up."""
    async with desk(tokens=True) as made:
        await made.park("e-1")
        for method, path in ROUTES:
            answer = await made.http.request(
                method, PATH + path, headers=bearing(caller), json={"reason": "why"} if method == "POST" else None
            )
            if caller == "operator by scope":
                assert answer.status_code in {200, 404, 409}
            else:
                assert (answer.status_code, answer.json()["error_code"]) == (403, "INSUFFICIENT_SCOPE")
        if caller != "operator by scope":
            assert made.store.calls["parked_commands"] == 0


@pytest.mark.requirement("R30")
async def test_with_a_token_the_operator_is_whoever_brings_it() -> None:
    """A name in the body does not take the place of the one who is known."""
    async with desk(tokens=True) as made:
        await made.park("e-1")
        answer = await made.http.post(
            f"{PATH}/e-1/cancel",
            json={"reason": "why", "operator": "somebody-else"},
            headers=bearing("operator by scope"),
        )
        assert answer.json()["operator"] == made.last_record()["actor_id"] == "op-2"
        assert made.last_record()["actor_type"] == "operator"


# List.


@pytest.mark.requirement("R29", "R30")
@pytest.mark.parametrize("levels", [2, 155, 204, 251, 254, 600, 1_024])
async def test_what_is_nested_deeply_is_listed(levels: int) -> None:
    """No poison makes the others of its page unreadable; also not if a hand has put it there."""
    body = b"[" * levels + b"]" * levels
    async with desk() as made:
        await made.append(poison("p-1", body))
        await made.park("e-1")
        made.memory.shards[0].troubleshooting["e-1"] = b'{"payload":%b}' % body
        page = (await made.http.get(PATH)).json()
        assert [command["command_id"] for command in page["commands"]] == ["p-1", "e-1"]
        assert all("payload" in command for command in page["commands"])
        assert (await made.http.get("/commands/e-1")).status_code == 200


@pytest.mark.requirement("R29", "R30")
async def test_what_waits_is_listed_the_longest_first() -> None:
    """Each with its error, its attempts and its payload; and how many there are."""
    async with desk() as made:
        await made.park("e-2", "e-1", "e-3", reply_to="inbox-1")
        page = (await made.http.get(PATH)).json()
        assert [command["command_id"] for command in page["commands"]] == ["e-2", "e-1", "e-3"]
        assert (page["depth"], page["next_cursor"]) == (3, None)
        first = page["commands"][0]
        assert first["payload"]["detail"]["bid_id"] == "bid-e-2"
        assert {name: first[name] for name in first if name not in {"payload", "error"}} == {
            "command_id": "e-2",
            "event_id": "e-2",
            "event_type": "auctions.bid.accepted",
            "status": "IN_TROUBLESHOOTING_QUEUE",
            "error_code": "UNKNOWN_AUCTION",
            "attempts": 1,
            "first_seen_at": BORN_MS + 1,
            "reply_to": "inbox-1",
            "asked_by": None,
            "shard": 0,
        }


@pytest.mark.requirement("R30")
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 500])
async def test_pages_cover_everything_once_in_order(limit: int) -> None:
    """Also with a filter that leaves most of it out."""
    names = [f"e-{number}" for number in range(7)]
    async with desk() as made:
        await made.park(*names[:4])
        made.line.advance(1)
        await made.append(poison("bad-1"), poison("bad-2"))
        await made.park(*names[4:])
        assert await listed(made, limit=str(limit)) == [*names[:4], "bad-1", "bad-2", *names[4:]]
        assert await listed(made, limit=str(limit), error_code="SCHEMA_INVALID") == ["bad-1", "bad-2"]
        assert await listed(made, limit=str(limit), event_type="auctions.bid.accepted") == names
        assert await listed(made, limit=str(limit), error_code="SCHEMA_INVALID", event_type="x") == []


@pytest.mark.requirement("R30")
async def test_a_filter_that_matches_little_gets_a_short_page_and_a_place_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request looks at a bounded number of commands, whatever it asks for."""
    monkeypatch.setattr(module, "ROUNDS_MAX", 2)
    async with desk() as made:
        await made.park(*(f"e-{number}" for number in range(9)))
        await made.append(poison("bad-1"))
        page = (await made.http.get(PATH, params={"limit": "2", "error_code": "SCHEMA_INVALID"})).json()
        assert (page["commands"], page["next_cursor"] is not None) == ([], True)
        assert await listed(made, limit="2", error_code="SCHEMA_INVALID") == ["bad-1"]


async def test_shards_are_merged_by_time() -> None:
    """One queue for whoever looks at it, and each command says where it is."""
    async with front(shards=3) as made:
        for number in range(9):
            name = f"e-{number}"
            memory = made.memory.shards[shard_of(name, 3)]
            memory.troubleshooting[name] = orjson.dumps({"command_id": name})
            memory.groups[Group.PARKED][name] = 1_000 - number
        page = (await made.http.get(PATH, params={"limit": "4"})).json()
        assert [command["command_id"] for command in page["commands"]] == ["e-8", "e-7", "e-6", "e-5"]
        assert all(command["shard"] == shard_of(command["command_id"], 3) for command in page["commands"])
        assert page["depth"] == 9


async def test_what_somebody_spoiled_or_took_away_is_no_reason_to_fail() -> None:
    """A body that is no JSON is shown as it is; a place without a body is passed over."""
    async with desk() as made:
        await made.park("e-1", "e-2", "e-3")
        troubleshooting = made.memory.shards[0].troubleshooting
        troubleshooting["e-1"] = b"{spoiled"
        troubleshooting["e-3"] = b'"text"'
        del troubleshooting["e-2"]
        answer = await made.http.get(PATH)
        assert answer.status_code == 200, answer.text
        assert [command["command_id"] for command in answer.json()["commands"]] == ["e-1", "e-3"]
        assert answer.json()["commands"][0]["payload"] == "{spoiled"
        for name in ("e-1", "e-3"):
            assert (await made.http.get(f"/commands/{name}")).status_code == 200
            assert (await act(made, name, "cancel")).status_code == 200


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "501"}, "limit"),
        ({"cursor": ""}, "cursor"),
        ({"cursor": "%%%"}, "cursor"),
        ({"cursor": Place(Group.LIVE, None).encode()}, "cursor"),
    ],
)
async def test_a_bad_query_names_its_parameter(query: dict[str, str], parameter: str) -> None:
    """Also a cursor of another list."""
    async with desk() as made:
        answer = await made.http.get(PATH, params=query)
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER")
        assert answer.json()["parameter"] == parameter


# Retry and cancel.


@pytest.mark.requirement("R30", "R32")
async def test_a_retried_command_arrives_now() -> None:
    """It is tried again at the end of the intake; if in vain it comes back with its age and one attempt more."""
    async with desk() as made:
        await made.park("e-1")
        answer = await act(made, "e-1", "retry")
        assert (answer.status_code, answer.json()["status"], answer.json()["attempts"]) == (200, "RETRIED", 1)
        assert made.last_record()["event_type"] == "OPERATOR_RETRY"
        await made.worker.work()
        (back,) = (await made.http.get(PATH)).json()["commands"]
        assert (back["attempts"], back["first_seen_at"]) == (2, BORN_MS + 1)
        await made.register("missing")
        await act(made, "e-1", "retry")
        await made.worker.work()
        assert made.facts("missing")[-1] == "bid_accepted"
        assert await listed(made) == []


@pytest.mark.requirement("R30")
async def test_a_cancelled_command_is_cancelled_for_good() -> None:
    """Record, reply and outcome say so; what comes afterwards is refused and writes nothing."""
    async with desk() as made:
        await made.park("e-1", reply_to="inbox-1")
        answer = await act(made, "e-1", "cancel", reason="a test bid")
        assert (answer.status_code, answer.json()["status"]) == (200, "CANCELED")
        assert (answer.json()["reason"], answer.json()["operator"]) == ("a test bid", "op-1")
        record = made.last_record()
        assert (record["event_type"], record["auction_id"], record["actor_id"]) == (
            "OPERATOR_CANCEL",
            "missing",
            "op-1",
        )
        outcome, command_id, body = made.memory.replies["inbox-1"][-1]
        assert (outcome, command_id, orjson.loads(body)["error"]) == ("CANCELED", "e-1", "a test bid")
        assert (await made.http.get("/commands/e-1")).json()["outcome"] == "CANCELED"
        for action in ("retry", "cancel"):
            refused = await act(made, "e-1", action)
            assert (refused.status_code, refused.json()["error_code"]) == (409, "INVALID_OPERATION")
            assert refused.json()["current_status"] == "CANCELED"
        assert made.last_record() == record


@pytest.mark.requirement("R30")
@pytest.mark.parametrize("action", ["retry", "cancel"])
async def test_a_command_that_is_not_in_troubleshooting_is_refused(action: str) -> None:
    """409 for one that is known, 404 for one that is not, also for what cannot be an id."""
    async with desk() as made:
        await made.register()
        answer = await act(made, "start-a-1-0", action)
        assert (answer.status_code, answer.json()["error_code"]) == (409, "INVALID_OPERATION")
        for command_id in ("e-9", "x" * 1_025):
            answer = await act(made, command_id, action)
            assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
            assert len(answer.json()["detail"]) < 160


@pytest.mark.requirement("R30")
async def test_of_commands_of_one_id_each_is_reached_by_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing says which shards; an operator who does not say which of them is asked to."""
    monkeypatch.setattr(commands_module, "ANSWER_WITHIN_S", 0.02)
    async with front(shards=4) as made:
        for shard in (1, 3):
            made.memory.shards[shard].troubleshooting["e-1"] = b"{}"
            made.memory.shards[shard].groups[Group.PARKED]["e-1"] = BORN_MS
        listed = (await made.http.get(PATH)).json()["commands"]
        assert [(command["command_id"], command["shard"]) for command in listed] == [("e-1", 1), ("e-1", 3)]
        answer = await made.http.post(f"{PATH}/e-1/retry")
        assert (answer.status_code, answer.json()["parameter"]) == (400, "shard")
        assert "1, 3" in answer.json()["detail"]
        for shard, status in {"3": 202, "0": 404, "4": 404, "1024": 400, "x": 400}.items():
            answer = await made.http.post(f"{PATH}/e-1/cancel", params={"shard": shard}, json={"reason": "twice"})
            assert answer.status_code == status, shard
        assert [len(made.memory.shards[shard].events) for shard in range(4)] == [0, 0, 0, 1]


@pytest.mark.requirement("R30")
async def test_of_two_operators_at_once_one_is_told_that_the_other_was_faster() -> None:
    """Both found it in troubleshooting; the engine decides in order."""
    async with desk() as made:
        await made.park("e-1")
        answers = await asyncio.gather(*(act(made, "e-1", "cancel", operator=name) for name in ("op-1", "op-2")))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        assert [record["event_type"] for record in made.memory.shards[0].audit] == ["OPERATOR_CANCEL"]


@pytest.mark.parametrize("command_id", ["a/b", "retry", "a/retry", "50%25", "ü"])
async def test_a_command_is_found_whatever_its_id_looks_like(command_id: str) -> None:
    """Producers choose the ids of events."""
    async with desk() as made:
        name = command_id.replace("%25", "%")
        await made.append(poison(name))
        answer = await act(made, command_id, "cancel")
        assert (answer.status_code, answer.json()["command_id"]) == (200, name)


@pytest.mark.requirement("R30")
@pytest.mark.parametrize(
    "body", [{}, {"reason": ""}, {"reason": " \t\n\u2003"}, {"reason": 7}, {"reason": "why", "operator": ""}]
)
async def test_a_cancellation_needs_a_reason(body: dict[str, Any]) -> None:
    """422 before anything is looked up."""
    async with desk() as made:
        await made.park("e-1")
        answer = await made.http.post(f"{PATH}/e-1/cancel", json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_BODY")
        assert await listed(made) == ["e-1"]


# Requeue.


@pytest.mark.requirement("R32")
async def test_many_are_sent_round_again_each_once() -> None:
    """The longest waiting first, up to the limit; what fails again is not met again in the same request."""
    async with desk() as made:
        await made.append(poison("bad-1"))
        await made.park(*(f"e-{number}" for number in range(5)))
        answer = await made.http.post(f"{PATH}/requeue", json={"error_code": "UNKNOWN_AUCTION", "limit": 3})
        assert answer.json() == {"requeued": 3, "refused": 0, "pending": 0}
        await made.worker.work()
        attempts = {c["command_id"]: c["attempts"] for c in (await made.http.get(PATH)).json()["commands"]}
        assert attempts == {"bad-1": 1, "e-0": 2, "e-1": 2, "e-2": 2, "e-3": 1, "e-4": 1}
        await made.register("missing")
        answer = await made.http.post(f"{PATH}/requeue", json={"event_type": "auctions.bid.accepted"})
        assert answer.json()["requeued"] == 5
        await made.worker.work()
        assert made.facts("missing").count("bid_accepted") == 5
        assert await listed(made) == ["bad-1"]
        assert (await made.http.post(f"{PATH}/requeue", json={"error_code": "NONE"})).json()["requeued"] == 0


@pytest.mark.parametrize("body", [{"limit": 0}, {"limit": 1_001}, {"limit": "3"}, {"error_code": ""}, []])
async def test_a_requeue_is_bounded(body: Any) -> None:
    """422 for what is out of bounds; nothing is sent."""
    async with desk() as made:
        await made.park("e-1")
        answer = await made.http.post(f"{PATH}/requeue", json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_BODY")
        assert "OPERATOR_RETRY" not in made.facts("missing")


# What goes wrong.


@pytest.mark.requirement("R16")
async def test_a_store_that_is_away_is_503() -> None:
    """For the list and for every operation."""
    async with desk() as made:
        await made.park("e-1")
        for call in ("page", "parked_commands"):
            made.store.failing = {call: StoreUnavailableError("away")}
            for method, path in ROUTES:
                if call == "page" and path.startswith("/e-1"):
                    continue
                answer = await made.http.request(
                    method, PATH + path, json={"reason": "x"} if method == "POST" else None
                )
                assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE"), path


async def test_an_operation_without_an_answer_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """202 for one, and counted as pending among many."""
    monkeypatch.setattr(commands_module, "ANSWER_WITHIN_S", 0.02)
    async with desk(answering=False) as made:
        await made.park("e-1", "e-2")
        answer = await act(made, "e-1", "cancel")
        assert answer.status_code == 202
        counts = (await made.http.post(f"{PATH}/requeue", json={})).json()
        assert counts == {"requeued": 0, "refused": 0, "pending": 2}
        await made.worker.work()
        assert (await made.http.get(answer.headers["location"])).json()["command"]["status"] == "CANCELED"
