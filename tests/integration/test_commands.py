"""Commands over HTTP against real processes: one winner, one record, one reply, whatever happens at the same time."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx
import pytest
import redis
from websockets.sync.client import ClientConnection, connect

from engine.contract.audit import as_json
from engine.contract.keys import shard_of
from tests.integration.events import bid, event, fresh_id, started
from tests.integration.records import (
    SHARDS,
    announced,
    facts_of,
    has_deadline,
    hash_of,
    keys_of,
    records_of,
    replies_to,
    stream,
)
from tests.live import LiveStack, until

pytestmark = pytest.mark.integration

LONG_MS: Final = 7_200_000
HOUR_MS: Final = 3_600_000
REGISTERED: Final = "auction_timer_registered"
STARTED: Final = "auction_timer_started"
CLOSING: Final = "auction_timer_closing"
ENDED: Final = "auction_timer_ended"
CANCELLED: Final = "auction_timer_cancelled"


@pytest.fixture(scope="module")
def own_stack() -> Iterator[LiveStack]:
    """A stack of these tests' own, which they may mistreat; its archiver trims whatever it has archived."""
    with TemporaryDirectory(prefix="at-") as directory:
        stack = LiveStack(Path(directory), env={"AUCTION_TIMER_AUDIT_RETAINED": "0"})
        try:
            yield stack
        finally:
            stack.stop()


def now_of(stack: LiveStack) -> int:
    """The auction clock, from the arrival of an event that changes nothing."""
    answer = stack.post(event("offers.cancellation.completed", auction_id=fresh_id(), reason="clock"))
    return int(answer[0]["arrival_ms"])


def running(stack: LiveStack, length_ms: int = LONG_MS, policy: dict[str, Any] | None = None, **data: Any) -> str:
    """An auction that has begun and ends so much later."""
    auction_id, now = fresh_id(), now_of(stack)
    start = started(auction_id, now - 1_000, now + length_ms, **(policy or {}))
    start["data"] |= data
    stack.post(start)
    until(
        lambda: (
            stack.http.get(f"/auctions/{auction_id}/timer").status_code == 200
            and stack.timer(auction_id)["status"] != "SCHEDULED"
        ),
        "the auction runs",
    )
    return auction_id


def ask(stack: LiveStack, auction_id: str, command: str, **body: Any) -> httpx.Response:
    """One command about one auction."""
    return stack.http.post(f"/auctions/{auction_id}/{command}", json=body)


async def at_once(stack: LiveStack, *calls: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> list[Any]:
    """Make calls at the same time, each on a connection of its own."""
    async with httpx.AsyncClient(
        base_url=stack.url, trust_env=False, timeout=20, limits=httpx.Limits(max_connections=len(calls))
    ) as client:
        return list(await asyncio.gather(*(call(client) for call in calls)))


def socket(stack: LiveStack, auction_id: str) -> ClientConnection:
    """A watching socket."""
    return connect(stack.url.replace("http", "ws", 1) + f"/auctions/{auction_id}/updates", compression=None, proxy=None)


def next_event(line: ClientConnection) -> dict[str, Any]:
    """The next frame that is no tick."""
    while True:
        frame: dict[str, Any] = json.loads(line.recv(timeout=20))
        if frame["type"] != "timer.tick":
            return frame


# Cancel.


@pytest.mark.requirement("R24", "R25", "R26")
async def test_of_a_hundred_cancellations_at_once_one_wins_and_is_recorded(live_stack: LiveStack) -> None:
    """One 200, ninety-nine 409 that name what it is now, one audit record, which is the winner's."""
    auction_id = running(live_stack)

    def cancel(number: int) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
        return lambda client: client.post(
            f"/auctions/{auction_id}/cancel",
            json={"reason": f"reason {number}", "actor": {"type": "maker", "id": f"m-{number}"}},
            headers={"X-Correlation-Id": f"cancel-{number}"},
        )

    answers = await at_once(live_stack, *(cancel(number) for number in range(100)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 99}
    (winner,) = [number for number, answer in enumerate(answers) if answer.status_code == 200]
    for answer in answers:
        if answer.status_code == 409:
            problem = answer.json()
            assert problem["error_code"] == "FSM_TERMINAL_IMMUTABLE"
            assert (problem["current_status"], problem["attempted_status"]) == ("CANCELLED", "CANCELLED")
    timer = answers[winner].json()
    assert (timer["status"], timer["reason"]) == ("CANCELLED", f"reason {winner}")
    records = records_of(live_stack, auction_id)
    assert [record["event_type"] for record in records] == [REGISTERED, STARTED, CANCELLED]
    record = records[-1]
    assert (record["actor_type"], record["actor_id"]) == ("maker", f"m-{winner}")
    assert (record["prev_status"], record["new_status"]) == ("ACTIVE", "CANCELLED")
    assert record["correlation_id"] == f"cancel-{winner}"
    assert record["occurred_at"] == timer["cancelled_at"] <= record["recorded_at"]
    assert [update["type"] for update in announced(live_stack, auction_id)].count("timer.cancelled") == 1


@pytest.mark.requirement("R26")
def test_a_command_without_a_correlation_id_is_recorded_under_a_generated_one(live_stack: LiveStack) -> None:
    """The id in the answer's header, `req-…`, is the id in the record."""
    auction_id = running(live_stack)
    answer = ask(live_stack, auction_id, "cancel", reason="withdrawn")
    assert answer.headers["x-correlation-id"].startswith("req-")
    assert records_of(live_stack, auction_id)[-1]["correlation_id"] == answer.headers["x-correlation-id"]


@pytest.mark.requirement("R5", "R25", "B1")
async def test_a_cancellation_and_the_close_have_one_winner(live_stack: LiveStack) -> None:
    """Around the deadline either the cancellation or the close happens, and every loser's 409 says which it was."""
    offsets_ms = (-HOUR_MS, -40, -20, -10, -5, -2, 0, 2, 5, 30)
    ids = [fresh_id() for _ in offsets_ms]
    now = now_of(live_stack)
    ends_at = now + 6_000
    live_stack.post(*(started(auction_id, now - 1_000, ends_at, soft_close_window_ms=0) for auction_id in ids))
    for auction_id in ids:
        live_stack.until_status(auction_id, "ACTIVE")

    def cancel(auction_id: str, offset_ms: int) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
        async def call(client: httpx.AsyncClient) -> httpx.Response:
            await asyncio.sleep(max(0.0, (ends_at + offset_ms) / 1_000 - time.time()))
            return await client.post(f"/auctions/{auction_id}/cancel", json={"reason": "a race"})

        return call

    calls = [cancel(auction_id, offset) for auction_id, offset in zip(ids, offsets_ms, strict=True) for _ in range(2)]
    answers = await at_once(live_stack, *calls)
    outcomes = set()
    for index, auction_id in enumerate(ids):
        pair = answers[2 * index : 2 * index + 2]
        timer = until(lambda name=auction_id: _over(live_stack, name), f"{auction_id} is over")
        outcomes.add(timer["status"])
        facts = [fact for fact in facts_of(live_stack, auction_id) if fact in {ENDED, CANCELLED}]
        told = [update["type"] for update in announced(live_stack, auction_id)]
        if timer["status"] == "CANCELLED":
            assert timer["cancelled_at"] < ends_at
            assert facts == [CANCELLED]
            assert sorted(answer.status_code for answer in pair) == [200, 409]
        else:
            assert timer["ended_at"] == ends_at
            assert facts == [ENDED]
            assert [answer.status_code for answer in pair] == [409, 409]
        assert told.count("timer.ended") + told.count("timer.cancelled") == 1
        for answer in pair:
            if answer.status_code == 409:
                assert answer.json()["current_status"] == timer["status"]
        assert not has_deadline(live_stack, auction_id)
    # The first is cancelled well before the deadline, the last well after it.
    assert outcomes == {"CANCELLED", "ENDED"}


def _over(stack: LiveStack, auction_id: str) -> dict[str, Any] | None:
    timer = stack.timer(auction_id)
    return timer if timer["status"] in {"CANCELLED", "ENDED"} else None


@pytest.mark.requirement("R27")
def test_a_cancelled_auction_leaves_no_ghost(live_stack: LiveStack) -> None:
    """No deadline, no tick, no close when its end comes, and no start brings it back."""
    auction_id, witness, now = fresh_id(), fresh_id(), now_of(live_stack)
    ends_at = now + 7_000
    start = started(auction_id, now - 1_000, ends_at, soft_close_window_ms=0)
    live_stack.post(start, started(witness, now - 1_000, ends_at, soft_close_window_ms=0))
    live_stack.until_status(auction_id, "ACTIVE")
    timer = ask(live_stack, auction_id, "cancel", reason="withdrawn").json()
    assert not has_deadline(live_stack, auction_id)
    heard = []
    client = redis.Redis(unix_socket_path=str(live_stack.data_dir / "valkey.sock"))
    with client, client.pubsub(ignore_subscribe_messages=True) as ticks:
        ticks.subscribe("over", *(keys.ticks for keys in {keys_of(auction_id), keys_of(witness)}))
        (again,) = live_stack.post(start)
        assert again["status"] == "duplicate"
        live_stack.post(started(auction_id, now - 1_000, ends_at, soft_close_window_ms=0))
        other = started(auction_id, now - 1_000, ends_at + HOUR_MS)
        live_stack.post(other)
        live_stack.until_status(witness, "ENDED")
        # One connection hears all channels in order: behind this there is nothing more of the time before.
        client.publish("over", "over")
        for message in ticks.listen():
            if message["channel"] == b"over":
                break
            heard += message["data"].split(b"\n")
    assert any(line.startswith(witness.encode()) for line in heard)
    assert not any(line.startswith(auction_id.encode()) for line in heard)
    after = live_stack.timer(auction_id)
    assert (after["status"], after["version"]) == ("CANCELLED", timer["version"])
    assert facts_of(live_stack, auction_id) == [REGISTERED, STARTED, CANCELLED]
    outcome = until(lambda: _command(live_stack, other["id"], "IN_TROUBLESHOOTING_QUEUE"), "the other terms are parked")
    assert outcome["error_code"] == "CONFLICTING_REGISTRATION"


def _command(stack: LiveStack, command_id: str, outcome: str) -> dict[str, Any] | None:
    answer = stack.http.get(f"/commands/{command_id}")
    return answer.json() if answer.status_code == 200 and answer.json()["outcome"] == outcome else None


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("names", ["auction", "offer"])
def test_a_cancellation_before_the_start_waits_for_it(live_stack: LiveStack, names: str) -> None:
    """Until the start nothing is to be seen; with it the auction is CANCELLED, once, by whoever cancelled it."""
    auction_id, offer_id, now = fresh_id(), f"o-{fresh_id()}", now_of(live_stack)
    about = {"auction_id": auction_id} if names == "auction" else {"offer_id": offer_id}
    cancellation = event(
        "offers.cancellation.completed", reason="changed_mind", actor={"type": "buyer", "id": "b-1"}, **about
    )
    live_stack.post(cancellation)
    live_stack.post(event("offers.cancellation.completed", reason="again", **about))
    assert live_stack.http.get(f"/auctions/{auction_id}/timer").status_code == 404
    assert ask(live_stack, auction_id, "cancel", reason="over HTTP").json()["error_code"] == "RESOURCE_NOT_FOUND"
    start = started(auction_id, now - 1_000, now + LONG_MS)
    start["data"]["offer_id"] = offer_id
    live_stack.post(start)
    timer = live_stack.until_status(auction_id, "CANCELLED")
    assert timer["reason"] == "changed_mind"
    assert not has_deadline(live_stack, auction_id)
    records = records_of(live_stack, auction_id)
    assert [record["event_type"] for record in records] == ["auction_timer_tombstoned", REGISTERED]
    assert (records[0]["actor_type"], records[0]["actor_id"]) == ("buyer", "b-1")
    assert records[-1]["new_status"] == "CANCELLED"
    assert ask(live_stack, auction_id, "cancel", reason="late").json()["current_status"] == "CANCELLED"


def _beside(auction_id: str, *, same_shard: bool) -> str:
    """An auction id nobody has used, in the same shard as another one or in another."""
    shard = shard_of(auction_id, SHARDS)
    return next(name for name in iter(fresh_id, "") if (shard_of(name, SHARDS) == shard) is same_shard)


def _by_offer(offer_id: str) -> dict[str, Any]:
    return event(
        "offers.cancellation.completed", offer_id=offer_id, reason="withdrawn", actor={"type": "buyer", "id": "b"}
    )


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("same_shard", [True, False])
@pytest.mark.parametrize("cancelled", ["while it ran", "before its start"])
def test_an_offer_that_is_put_up_again_is_not_cancelled_once_more(
    live_stack: LiveStack, same_shard: bool, cancelled: str
) -> None:
    """A cancellation by offer is about one auction: the next one runs, whichever shard it lives in, until it is cancelled."""
    first, offer_id = fresh_id(), f"o-{fresh_id()}"
    second = _beside(first, same_shard=same_shard)
    if cancelled == "before its start":
        live_stack.post(_by_offer(offer_id))
    _start(live_stack, first, offer_id)
    if cancelled == "while it ran":
        live_stack.until_status(first, "ACTIVE")
        live_stack.post(_by_offer(offer_id))
    live_stack.until_status(first, "CANCELLED")
    _start(live_stack, second, offer_id)
    live_stack.until_status(second, "ACTIVE")
    assert facts_of(live_stack, second) == [REGISTERED, STARTED]
    assert live_stack.http.get(f"/offers/{offer_id}/cancellation").json()["auction_id"] == second
    live_stack.post(_by_offer(offer_id))
    live_stack.until_status(second, "CANCELLED")


@pytest.mark.requirement("R19")
@pytest.mark.parametrize("same_shard", [True, False])
def test_of_two_auctions_of_an_offer_the_one_registered_last_is_cancelled(
    live_stack: LiveStack, same_shard: bool
) -> None:
    """Also when it begins before the other one; wherever they live, the other one runs on."""
    first, offer_id = fresh_id(), f"o-{fresh_id()}"
    second = _beside(first, same_shard=same_shard)
    _start(live_stack, first, offer_id)
    live_stack.until_status(first, "ACTIVE")
    _start(live_stack, second, offer_id, ago_ms=60_000)
    live_stack.until_status(second, "ACTIVE")
    asked = _by_offer(offer_id)
    live_stack.post(asked)
    until(lambda: _command(live_stack, asked["id"], "APPLIED"), "the cancellation is answered")
    live_stack.until_status(second, "CANCELLED")
    assert live_stack.timer(first)["status"] == "ACTIVE"


def _start(stack: LiveStack, auction_id: str, offer_id: str, ago_ms: int = 1_000) -> None:
    """Register an auction of an offer that has begun a while ago."""
    now = now_of(stack)
    start = started(auction_id, now - ago_ms, now + LONG_MS)
    start["data"]["offer_id"] = offer_id
    stack.post(start)


@pytest.mark.requirement("R19", "R25")
def test_a_cancellation_after_the_end_changes_nothing(live_stack: LiveStack) -> None:
    """By event or over HTTP: the close stands, nothing is recorded, and nothing waits for an operator."""
    auction_id = running(live_stack, 500, {"soft_close_window_ms": 0})
    ended = live_stack.until_status(auction_id, "ENDED")
    late = event("offers.cancellation.completed", auction_id=auction_id, reason="too late")
    live_stack.post(late)
    assert until(lambda: _command(live_stack, late["id"], "REFUSED"), "the cancellation is answered")
    answer = ask(live_stack, auction_id, "cancel", reason="too late")
    problem = answer.json()
    assert (answer.status_code, problem["error_code"]) == (409, "FSM_TERMINAL_IMMUTABLE")
    assert (problem["current_status"], problem["attempted_status"]) == ("ENDED", "CANCELLED")
    assert live_stack.timer(auction_id)["version"] == ended["version"]
    assert facts_of(live_stack, auction_id)[-1] == ENDED


# Schedule.


@pytest.mark.requirement("R25")
def test_a_schedule_change_is_answered_to_whoever_asked_and_can_be_looked_up(live_stack: LiveStack) -> None:
    """A reachable end is set; an unreachable one is refused by name. Both on the reply stream and at `/commands/{id}`."""
    auction_id, reply_to = running(live_stack), fresh_id()
    before = live_stack.timer(auction_id)
    wanted = before["ends_at"] + HOUR_MS
    changed, past, beyond = (
        event("auctions.schedule.changed", auction_id=auction_id, ends_at=ends_at, reason="hall", reply_to=reply_to)
        for ends_at in (wanted, before["server_time"] - 1, before["original_ends_at"] + 25 * HOUR_MS)
    )
    live_stack.post(changed)
    live_stack.post(past, beyond)
    answers = until(lambda: len(found := replies_to(live_stack, reply_to)) == 3 and found, "three answers")
    assert [answer["outcome"] for answer in answers] == ["APPLIED", "REFUSED", "REFUSED"]
    assert [answer.get("error_code") for answer in answers] == [None, "SCHEDULE_IN_PAST", "SCHEDULE_BEYOND_CAP"]
    assert answers[0]["timer"]["ends_at"] == wanted
    for sent, answer in zip((changed, past, beyond), answers, strict=True):
        shown = answer | ({"audit": as_json(answer["audit"])} if "audit" in answer else {})
        assert live_stack.http.get(f"/commands/{sent['id']}").json() == shown
    assert live_stack.timer(auction_id)["ends_at"] == wanted
    unasked = event("auctions.schedule.changed", auction_id=auction_id, ends_at=1, reason="nobody waits")
    live_stack.post(unasked)
    parked = until(lambda: _command(live_stack, unasked["id"], "IN_TROUBLESHOOTING_QUEUE"), "it is parked")
    assert parked["error_code"] == "SCHEDULE_IN_PAST"


# No answer in time.


@pytest.mark.requirement("R24")
def test_a_command_that_no_engine_answers_is_accepted_and_can_be_looked_up(own_stack: LiveStack) -> None:
    """202 with the id after two seconds, PENDING until the engine goes on, then the outcome; nothing is done twice."""
    auction_id = running(own_stack)
    (engine,) = own_stack.pids("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        asked = time.monotonic()
        answer = ask(own_stack, auction_id, "cancel", reason="nobody is there")
        assert 2.0 <= time.monotonic() - asked < 6.0
        assert answer.status_code == 202
        command_id = answer.json()["command_id"]
        assert answer.json()["outcome"] == "PENDING"
        assert answer.headers["location"] == f"/commands/{command_id}"
        assert own_stack.http.get(answer.headers["location"]).json() == answer.json()
    finally:
        os.kill(engine, signal.SIGCONT)
    outcome = until(lambda: _command(own_stack, command_id, "APPLIED"), "the command is decided")
    assert outcome["timer"]["status"] == "CANCELLED"
    assert own_stack.until_status(auction_id, "CANCELLED")["reason"] == "nobody is there"
    assert facts_of(own_stack, auction_id).count(CANCELLED) == 1


# Pause.


@pytest.mark.requirement("R3", "R7", "R10", "R25")
def test_a_pause_is_seen_survives_the_engine_and_is_resumed_with_its_remaining_time(own_stack: LiveStack) -> None:
    """The frozen countdown stays through a `kill -9`; the time spent paused is added to the end, and to no cap."""
    auction_id = running(own_stack, HOUR_MS)
    before = own_stack.timer(auction_id)
    assert ask(own_stack, auction_id, "resume").json()["error_code"] == "FSM_TRANSITION_INVALID"
    with socket(own_stack, auction_id) as line:
        assert next_event(line)["type"] == "timer.snapshot"
        answer = ask(own_stack, auction_id, "pause", reason="fire alarm", actor={"type": "operator", "id": "o-1"})
        assert answer.status_code == 200
        paused = answer.json()
        assert paused["status"] == "PAUSED"
        assert paused["remaining_ms"] == paused["paused_remaining_ms"] <= before["remaining_ms"]
        frame = next_event(line)
        assert (frame["type"], frame["reason"]) == ("timer.paused", "fire alarm")
        assert frame["timer"]["paused_remaining_ms"] == paused["paused_remaining_ms"]
        again = ask(own_stack, auction_id, "pause").json()
        assert (again["error_code"], again["current_status"]) == ("FSM_TRANSITION_INVALID", "PAUSED")
        assert not has_deadline(own_stack, auction_id)
        killed = own_stack.kill("engine")
        until(lambda: [pid for pid in own_stack.pids("engine") if pid != killed], "another engine runs")
        placed = bid(auction_id)
        own_stack.post(placed)
        accepted = next_event(line)
        assert (accepted["type"], accepted["extended"]) == ("bid.accepted", False)
        frozen = own_stack.timer(auction_id)
        assert (frozen["status"], frozen["remaining_ms"]) == ("PAUSED", paused["paused_remaining_ms"])
        resumed = ask(own_stack, auction_id, "resume", reason="all clear").json()
        assert next_event(line)["type"] == "timer.resumed"
    by_fact = {record["event_type"]: record for record in records_of(own_stack, auction_id)}
    paused_ms = by_fact["auction_timer_resumed"]["occurred_at"] - by_fact["auction_timer_paused"]["occurred_at"]
    assert paused_ms > 0
    assert resumed["status"] == "ACTIVE"
    assert resumed["ends_at"] == before["ends_at"] + paused_ms
    assert resumed["final_deadline"] == before["final_deadline"] + paused_ms
    assert resumed["extension_used_ms"] == 0
    assert "paused_remaining_ms" not in resumed
    assert has_deadline(own_stack, auction_id)
    assert by_fact["auction_timer_paused"]["actor_id"] == "o-1"


# Offers.


def offered(stack: LiveStack, length_ms: int = LONG_MS, **data: Any) -> tuple[str, str]:
    """A running auction with an offer that can be cancelled for half an hour."""
    offer_id = f"o-{fresh_id()}"
    offer = {
        "offer_id": offer_id, "owner_id": "owner-1", "maker_id": "maker-1", "buyer_id": "buyer-1",
        "offer_created_at": now_of(stack) - 60_000, "amount_minor": 900, "currency": "EUR",
    }  # fmt: skip
    return running(stack, length_ms, {"soft_close_window_ms": 0}, **(offer | data)), offer_id


def cancel_offer(stack: LiveStack, offer_id: str, **body: Any) -> httpx.Response:
    """Cancel an offer, for a canned reason where none is given."""
    return stack.http.put(f"/offers/{offer_id}/cancel", json={"reason_code": "changed_mind"} | body)


@pytest.mark.requirement("R20", "R22", "R23")
def test_an_offer_is_cancelled_within_its_window(live_stack: LiveStack) -> None:
    """Preflight, answer, record and outbound events tell one story; an amount over the threshold raises an alert."""
    auction_id, offer_id = offered(live_stack, amount_minor=10_001, auto_reject_threshold_minor=10_000)
    ahead = live_stack.http.get(f"/offers/{offer_id}/cancellation").json()
    assert (ahead["cancellable"], ahead["error_code"], ahead["note_max_chars"]) == (True, None, 500)
    assert 0 < ahead["remaining_window_ms"] <= 29 * 60_000
    assert ahead["remaining_window_ms"] == ahead["window_ends_at"] - ahead["server_time"]
    assert "changed_mind" in ahead["reasons"]
    answer = cancel_offer(live_stack, offer_id, note="Zwei gekauft \N{SMILING FACE WITH SUNGLASSES}", device="phone")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["offer"] == {
        "offer_id": offer_id, "auction_id": auction_id, "status": "CANCELLED", "reason_code": "changed_mind",
        "cancelled_at": body["timer"]["cancelled_at"], "amount_minor": 10_001, "currency": "EUR",
        "note": "Zwei gekauft \N{SMILING FACE WITH SUNGLASSES}",
    }  # fmt: skip
    assert body["timer"]["status"] == "CANCELLED"
    assert body["audit"] == records_of(live_stack, auction_id)[-1]
    assert body["audit"]["hash"] == hash_of(body["audit"])
    assert (body["audit"]["event_type"], body["audit"]["details"]["device"]) == ("offer_cancelled", "phone")
    assert body["audit"]["correlation_id"] == answer.headers["x-correlation-id"]
    told = {update["type"]: update for update in announced(live_stack, auction_id)}
    outbound = (
        "offers.cancelled",
        "offers.cancellation.completed",
        "offers.payment_hold.release_requested",
        "offers.cancellation.high_value",
    )
    for name in outbound:
        assert (told[name]["offer_id"], told[name]["amount_minor"]) == (offer_id, 10_001)
        assert told[name]["occurred_at"] == body["timer"]["cancelled_at"]
        assert told[name]["correlation_id"] == answer.headers["x-correlation-id"]
    assert not has_deadline(live_stack, auction_id)


@pytest.mark.requirement("R20", "R21", "R22")
def test_an_offer_that_cannot_be_cancelled_says_why_before_and_after(live_stack: LiveStack) -> None:
    """Expired, cancelled already, closed: the preflight's code is the answer's, with a reference for support."""
    expired = offered(live_stack, offer_created_at=now_of(live_stack) - 31 * 60_000)
    overridden = offered(live_stack, modification_window_minutes=0)
    twice = offered(live_stack)
    assert cancel_offer(live_stack, twice[1]).status_code == 200
    closed = offered(live_stack, 500)
    live_stack.until_status(closed[0], "ENDED")
    cases = (
        (expired, "WINDOW_EXPIRED"),
        (overridden, "WINDOW_EXPIRED"),
        (twice, "ALREADY_CANCELLED"),
        (closed, "AUCTION_CLOSED"),
    )
    for (auction_id, offer_id), code in cases:
        records = records_of(live_stack, auction_id)
        ahead = live_stack.http.get(f"/offers/{offer_id}/cancellation").json()
        assert (ahead["cancellable"], ahead["error_code"]) == (False, code)
        answer = cancel_offer(live_stack, offer_id)
        problem = answer.json()
        assert (answer.status_code, problem["error_code"]) == (409, code)
        assert problem["support_reference"].startswith("SUP-")
        assert problem["current_status"] == live_stack.timer(auction_id)["status"]
        (blocked,) = [u for u in announced(live_stack, auction_id) if u["type"] == "offers.cancellation.blocked"]
        assert (blocked["error_code"], blocked["support_reference"]) == (code, problem["support_reference"])
        assert records_of(live_stack, auction_id) == records
        assert "offers.cancellation.high_value" not in {u["type"] for u in announced(live_stack, auction_id)}
    for body in ({"reason_code": "because"}, {"note": "x" * 501}, {"device": ""}, {"reason_code": None}):
        assert cancel_offer(live_stack, expired[1], **body).json()["error_code"] == "INVALID_BODY"
    assert cancel_offer(live_stack, f"o-{fresh_id()}").json()["error_code"] == "RESOURCE_NOT_FOUND"


# Troubleshooting.


@pytest.mark.requirement("R29", "R30", "R32")
def test_operators_work_through_what_could_not_be_applied(own_stack: LiveStack) -> None:
    """List, filter and page; retry, cancel and requeue; each with its record, its reply and its refusal."""
    known, missing, reply_to = running(own_stack), fresh_id(), fresh_id()
    early = fresh_id()
    conflicting = started(known, 1_000, 2_000)
    strangers = [bid(early, reply_to=reply_to), *(bid(missing, reply_to=reply_to) for _ in range(4))]
    own_stack.post(conflicting, *strangers)
    path = "/ops/troubleshooting"

    def listed(**query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = own_stack.http.get(path, params=query).json()
            found += page["commands"]
            if page["next_cursor"] is None:
                return found
            query["cursor"] = page["next_cursor"]

    until(lambda: own_stack.http.get(path).json()["depth"] == 6, "six commands are parked")
    everything = listed(limit="2")
    assert {command["command_id"] for command in everything} == {conflicting["id"], *(s["id"] for s in strangers)}
    assert [c["first_seen_at"] for c in everything] == sorted(c["first_seen_at"] for c in everything)
    assert all(c["status"] == "IN_TROUBLESHOOTING_QUEUE" and c["attempts"] == 1 for c in everything)
    (conflict,) = listed(error_code="CONFLICTING_REGISTRATION", limit="1")
    assert conflict["command_id"] == conflicting["id"]
    assert len(listed(event_type="auctions.bid.accepted", error_code="UNKNOWN_AUCTION", limit="3")) == 5
    assert listed(error_code="NOTHING_SUCH") == []
    # Retry: in vain while nothing has changed, and to effect once it has.
    vain = own_stack.http.post(f"{path}/{strangers[0]['id']}/retry", json={"operator": "op-1", "reason": "hope"})
    assert (vain.status_code, vain.json()["status"]) == (200, "RETRIED")
    until(lambda: [c for c in listed() if c["command_id"] == strangers[0]["id"] and c["attempts"] == 2], "it is back")
    own_stack.post(started(early, 1_000, now_of(own_stack) + LONG_MS))
    own_stack.until_status(early, "ACTIVE")
    own_stack.http.post(f"{path}/{strangers[0]['id']}/retry", json={"operator": "op-1"})
    until(lambda: "bid_accepted" in facts_of(own_stack, early), "the bid is applied")
    assert facts_of(own_stack, early).count("OPERATOR_RETRY") == 2
    # Cancel: needs a reason, tells the sender, is final.
    refused = own_stack.http.post(f"{path}/{strangers[1]['id']}/cancel", json={"operator": "op-2"})
    assert (refused.status_code, refused.json()["error_code"]) == (422, "INVALID_BODY")
    cancelled = own_stack.http.post(
        f"{path}/{strangers[1]['id']}/cancel", json={"reason": "a test bid", "operator": "op-2"}
    )
    assert cancelled.status_code == 200, cancelled.text
    assert (cancelled.json()["status"], cancelled.json()["operator"]) == ("CANCELED", "op-2")
    reply = replies_to(own_stack, reply_to)[-1]
    assert (reply["outcome"], reply["command_id"]) == ("CANCELED", strangers[1]["id"])
    assert (reply["error"], reply["operator"]) == ("a test bid", "op-2")
    (record,) = [r for r in records_of(own_stack, missing) if r["event_type"] == "OPERATOR_CANCEL"]
    assert (record["actor_type"], record["actor_id"], record["new_status"]) == ("operator", "op-2", "CANCELED")
    assert record["details"]["reason"] == "a test bid"
    assert own_stack.http.get(f"/commands/{strangers[1]['id']}").json()["outcome"] == "CANCELED"
    for action in ("cancel", "retry"):
        again = own_stack.http.post(f"{path}/{strangers[1]['id']}/{action}", json={"reason": "again"})
        assert (again.status_code, again.json()["error_code"]) == (409, "INVALID_OPERATION")
        unknown = own_stack.http.post(f"{path}/never-sent/{action}", json={"reason": "again"})
        assert (unknown.status_code, unknown.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
    # Requeue: only what the filter names, only as many as wanted, and each of them once.
    own_stack.post(started(missing, 1_000, now_of(own_stack) + LONG_MS))
    own_stack.until_status(missing, "ACTIVE")
    wanted = {"error_code": "UNKNOWN_AUCTION", "operator": "op-3"}
    counts = [
        own_stack.http.post(f"{path}/requeue", json=wanted | limit).json() for limit in ({"limit": 2}, {}, {})
    ]  # fmt: skip
    assert [count["requeued"] for count in counts] == [2, 1, 0]
    until(lambda: facts_of(own_stack, missing).count("bid_accepted") == 3, "the other bids are applied, once each")
    assert [command["command_id"] for command in listed()] == [conflicting["id"]]
    assert own_stack.http.get(path).json()["depth"] == 1


@pytest.mark.requirement("R29")
def test_what_nobody_can_read_is_found_in_troubleshooting_and_stops_nothing(own_stack: LiveStack) -> None:
    """An entry that somebody put into the stream by hand is parked with its payload; the events behind it are applied."""
    auction_id = running(own_stack)
    own_stack.redis("XADD", keys_of(auction_id).events, "*", "at", "x", "id", "by-hand", "body", "{not json")
    placed = bid(auction_id)
    own_stack.post(placed)
    until(lambda: "bid_accepted" in facts_of(own_stack, auction_id), "the bid behind it is applied")
    (found,) = own_stack.http.get("/ops/troubleshooting", params={"error_code": "SCHEMA_INVALID"}).json()["commands"]
    assert "{not json" in found["payload"]
    answer = own_stack.http.post(f"/ops/troubleshooting/{found['command_id']}/cancel", json={"reason": "garbage"})
    assert (answer.status_code, answer.json()["status"]) == (200, "CANCELED")


# Audit.


@pytest.mark.requirement("R26", "R34", "B7")
def test_the_audit_is_whole_over_http_also_when_the_stream_was_trimmed(own_stack: LiveStack) -> None:
    """Page by page, from archive and stream together: every record once, in order, each with the hash it must have."""
    auction_id = running(own_stack)
    own_stack.post(*(bid(auction_id, amount_minor=number, bidder_id="Zoë"[:2]) for number in range(40)))
    assert ask(own_stack, auction_id, "cancel", reason="Größe falsch\n\N{WARNING SIGN}").status_code == 200
    keys = keys_of(auction_id)
    until(lambda: len(stream(own_stack, keys.audit)) <= 1, "the archiver has trimmed the stream")
    ask(own_stack, auction_id, "cancel", reason="again")
    records = records_of(own_stack, auction_id, limit=7)
    assert records == records_of(own_stack, auction_id)
    facts = [record["event_type"] for record in records]
    assert facts == [REGISTERED, STARTED, *["bid_accepted"] * 40, CANCELLED]
    assert [record["details"]["amount_minor"] for record in records[2:-1]] == list(range(40))
    assert all(record["hash"] == hash_of(record) for record in records)
    assert [record["seq"] for record in records] == sorted({record["seq"] for record in records})
    assert own_stack.http.get(f"/auctions/{fresh_id()}/audit").status_code == 404
    for query in ({"limit": "0"}, {"limit": "501"}, {"cursor": "x"}, {"cursor": "1" * 16}):
        refused = own_stack.http.get(f"/auctions/{auction_id}/audit", params=query)
        assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER")
    # All auctions of all shards, put together by their numbers: no record of the chain is hidden from an operator.
    ids = {timer["auction_id"] for timer in _all(own_stack)}
    by_shard: dict[int, list[dict[str, Any]]] = {}
    for name in ids:
        for record in records_of(own_stack, name):
            by_shard.setdefault(record["shard"], []).append(record)
    for shard in range(SHARDS):
        known = sorted(by_shard.get(shard, []), key=lambda record: record["seq"])
        linked = {record["seq"]: record for record in known}
        for record in known:
            if (previous := linked.get(record["seq"] - 1)) is not None:
                assert record["prev_hash"] == previous["hash"]


def _all(stack: LiveStack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.http.get("/auctions", params={"limit": "500"}).json()["auctions"]
    return found
