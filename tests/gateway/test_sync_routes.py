"""Tests for gateway.sync_routes and gateway.resyncs: what a client measured, and what becomes of it."""

from typing import Any

import orjson
import pytest

from engine.contract.intake import SCHEDULER, Actor, Resync, decode
from engine.contract.timers import CorruptTimerError
from engine.store.protocol import StoreUnavailableError
from gateway.auth import LOCAL, Principal
from gateway.resyncs import ANNOUNCED_PER_SECOND_MAX, DRIFT_MAX_MS, Resyncs
from tests.fakes.clock import BORN_MS
from tests.gateway.front import Front, front
from tests.gateway.house import AUCTION, House, record
from tests.gateway.peers import Peer
from tests.gateway.test_event_stream import turns

pytestmark = pytest.mark.requirement("R8")

BODY = {"auction_id": AUCTION, "t0": 1_800_000_000_000, "drift_ms": 12.5}


def reported(house: House) -> list[Any]:
    """The reports in the intake of the only shard."""
    return [decode(entry.event_id, entry.body) for entry in house.memory.shards[0].events]


async def settled(made: House, **outcomes: int) -> None:
    """Wait until reports have had these outcomes."""
    name = "auctions_gateway_client_resyncs_total"
    await turns(lambda: all(made.sample(name, outcome=outcome) == times for outcome, times in outcomes.items()))


@pytest.mark.requirement("B5")
async def test_a_sync_is_answered_with_both_instants_and_the_timer() -> None:
    """`t0` comes back as it was, `t1` and `t2` are the auction clock, the timer is as of now, the drift is measured."""
    async with front() as made:
        made.put(record(version=4))
        made.line.advance(1_500)
        now = BORN_MS + 1_500
        for t0 in (1_800_000_000_000, -0.25, 2**53):
            answer = await made.http.post("/timers/sync", json=BODY | {"t0": t0, "rtt_ms": 3, "further": [1]})
            assert answer.status_code == 200
            assert answer.headers["cache-control"] == "no-store"
            body = answer.json()
            assert (body["t0"], body["t1"], body["t2"]) == (t0, now, now)
            assert type(body["t0"]) is type(t0)
            assert (body["timer"]["version"], body["timer"]["server_time"]) == (4, now)
        assert made.sample("auctions_timer_drift_ms_sum", source="client") == 3 * 12.5
        await settled(made, small=3)
        assert reported(made) == []


async def test_a_drift_that_is_not_known_yet_is_not_measured() -> None:
    """`null` says so; leaving it out is an error, so that nobody forgets it."""
    async with front() as made:
        made.put(record())
        assert (await made.http.post("/timers/sync", json=BODY | {"drift_ms": None})).status_code == 200
        assert made.sample("auctions_timer_drift_ms_count", source="client") == 0
        without = {name: value for name, value in BODY.items() if name != "drift_ms"}
        assert (await made.http.post("/timers/sync", json=without)).status_code == 422


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"auction_id": "a b"}, "auction_id"),
        ({"auction_id": None}, "auction_id"),
        ({"t0": "now"}, "t0"),
        ({"t0": True}, "t0"),
        ({"t0": 2**53 + 2}, "t0"),
        ({"t0": None}, "t0"),
        ({"drift_ms": "1"}, "drift_ms"),
        ({"drift_ms": 86_400_001}, "drift_ms"),
        ({"drift_ms": -1e308}, "drift_ms"),
        ({"rtt_ms": -1}, "rtt_ms"),
        ({"rtt_ms": 1e9}, "rtt_ms"),
        ({"trace_id": "ü"}, "trace_id"),
    ],
)
async def test_a_body_that_is_none_is_422_and_says_where(changes: dict[str, Any], path: str) -> None:
    """Each wrong field is named, and nothing is measured: one 1e308 would spoil the sum for ever."""
    async with front() as made:
        made.put(record())
        answer = await made.http.post("/timers/sync", json=BODY | changes)
        assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_BODY")
        assert [error["path"] for error in answer.json()["errors"]] == [path]
        assert made.sample("auctions_timer_drift_ms_count", source="client") == 0


async def test_an_auction_that_cannot_be_shown_is_a_problem() -> None:
    """404 if there is none, 503 while it cannot be read, 500 if what is stored is damaged."""
    async with front() as made:
        assert (await made.http.post("/timers/sync", json=BODY)).status_code == 404
        for error, status in ((StoreUnavailableError("away"), 503), (CorruptTimerError("damaged"), 500)):
            made.store.failing["view"] = error
            assert (await made.http.post("/timers/sync", json=BODY)).status_code == status


@pytest.mark.requirement("R14")
async def test_a_large_drift_is_announced_through_the_intake() -> None:
    """What the engine will announce: the drift, rounded, and the trace of the request, else its own, else the auction's."""
    async with front() as made:
        made.put(record())
        parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        large = BODY | {"drift_ms": -740.4, "rtt_ms": 37.6}
        for body, headers in ((large | {"trace_id": "trace-of-client"}, parent), (large, parent), (large, {})):
            answer = await made.http.post("/timers/sync", json=body, headers=headers | {"X-Correlation-Id": "req-7"})
            assert answer.status_code == 200
        await settled(made, announced=3)
        events = reported(made)
        assert [event.event for event in events] == [Resync(-740, 38)] * 3
        assert {event.context.correlation_id for event in events} == {"req-7"}
        assert [event.context.trace_id for event in events] == ["trace-of-client", "a" * 32, f"trace-{AUCTION}"]
        assert {event.context.event_type for event in events} == {"timers.resync.reported"}
        assert all(event.context.actor != SCHEDULER and event.context.reply_to is None for event in events)


async def test_the_threshold_is_the_one_of_the_clients() -> None:
    """Exactly 500 ms is small, either way; a little more is announced."""
    async with front() as made:
        made.put(record())
        for drift in (DRIFT_MAX_MS, -DRIFT_MAX_MS, DRIFT_MAX_MS + 0.5, -DRIFT_MAX_MS - 0.5):
            await made.http.post("/timers/sync", json=BODY | {"drift_ms": drift})
        await settled(made, small=2, announced=2)


async def test_a_flood_of_reports_is_measured_whole_and_announced_in_part() -> None:
    """10,000 clients that were all wrong cost the intake a handful of entries a second; the rest is counted."""
    house = House()
    house.put(record())
    room = await house.hub.room(AUCTION)
    assert room is not None
    resyncs = Resyncs(house.door, house.store)
    for second in range(3):
        for _ in range(10_000):
            resyncs.report(room, 60_000, 40, LOCAL, "mine-1")
        most = (second + 1) * ANNOUNCED_PER_SECOND_MAX
        await settled(house, announced=most, limited=(second + 1) * 10_000 - most)
        house.line.advance(1_000)
    assert len(reported(house)) == 3 * ANNOUNCED_PER_SECOND_MAX


@pytest.mark.requirement("R16")
async def test_a_report_that_the_store_does_not_take_is_counted_and_hurts_nobody() -> None:
    """The client has its answer; what is lost is a line of statistics."""
    async with front() as made:
        made.put(record())
        await made.http.get(f"/auctions/{AUCTION}/timer")
        made.store.failing["append"] = StoreUnavailableError("away")
        assert (await made.http.post("/timers/sync", json=BODY | {"drift_ms": 9_000})).status_code == 200
        await settled(made, lost=1)


@pytest.mark.requirement("B5")
async def test_the_socket_follows_the_same_rules() -> None:
    """A `sync` frame with a large drift is measured once, and announced in the name of whoever holds the socket."""
    async with front() as made:
        made.put(record())
        await made.http.get(f"/auctions/{AUCTION}/timer")
        peer = Peer(made.door).knock(lambda request: request.headers.__setitem__("X-Correlation-Id", "mine-1"))
        assert peer.status == 101
        peer.connection.principal = Principal("viewer-1", frozenset(), frozenset())
        peer.say({"type": "sync", "t0": 1, "drift_ms": 501.5, "rtt_ms": None}, {"type": "sync", "t0": 1, "drift_ms": 1})
        await settled(made, announced=1, small=1)
        (event,) = reported(made)
        assert event.event == Resync(502, None)
        assert event.context.actor == Actor("client", "viewer-1")
        assert (event.context.trace_id, event.context.correlation_id) == (f"trace-{AUCTION}", "mine-1")
        assert made.sample("auctions_timer_drift_ms_count", source="client") == 2
        peer.transport.abort()


async def test_a_foreign_page_may_not_report() -> None:
    """The rule of all posts."""
    async with front() as made:
        made.put(record())
        answer = await made.http.post("/timers/sync", json=BODY, headers={"Origin": "https://elsewhere.example"})
        assert (answer.status_code, orjson.loads(answer.content)["error_code"]) == (403, "FOREIGN_ORIGIN")


async def test_under_tokens_the_reporter_is_named() -> None:
    """Without a token there is no answer."""
    async with front(jwt_secret="s" * 48) as made:
        assert isinstance(made, Front)
        made.put(record())
        assert (await made.http.post("/timers/sync", json=BODY)).status_code == 401
