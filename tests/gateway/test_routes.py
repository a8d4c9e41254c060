"""Tests for gateway.routes: the application in this process, on the memory store."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from engine.contract.intake import decode
from engine.contract.keys import shard_of
from engine.contract.offers import CANCELLED_BEFORE_START, binding
from engine.contract.timers import heartbeat_line
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.lifecycle import Status
from engine.store.link import RedisRefusedError
from engine.store.protocol import Draft, IntakeFullError, StoreUnavailableError
from gateway.bodies import DISCARDED_BYTES_MAX
from gateway.events import BODY_BYTES_MAX
from gateway.feeds import SILENCE_MAX_MS
from gateway.routes import VERSION, next_poll_ms
from tests.fakes.clock import BORN_MS
from tests.gateway.front import Front, front
from tests.gateway.house import AUCTION, ENDS_AT, record

START = {
    "specversion": "1.0", "id": "e-start", "type": "offers.auction.started", "source": "tests",
    "data": {"auction_id": AUCTION, "starts_at": BORN_MS, "ends_at": ENDS_AT},
}  # fmt: skip


def event(event_id: str, event_type: str = "auctions.bid.accepted", **data: Any) -> dict[str, Any]:
    """An event with an id of one's choice."""
    return {"specversion": "1.0", "id": event_id, "type": event_type, "source": "tests", "data": data}


def cancel_offer(event_id: str, offer_id: str = "o-1") -> dict[str, Any]:
    """A cancellation that names only the offer."""
    return event(event_id, "offers.cancellation.completed", offer_id=offer_id, reason="withdrawn")


def intake(made: Front, shard: int = 0) -> list[str]:
    """The event ids in the intake of a shard, in order."""
    return [entry.event_id for entry in made.memory.shards[shard].events]


# POST /events.


@pytest.mark.requirement("R2")
async def test_an_event_is_stamped_and_its_repetition_is_named_one() -> None:
    """202 with the arrival that decides; the same id again is `duplicate` with the arrival of the first."""
    async with front() as made:
        first = await made.http.post("/events", json=START)
        assert (first.status_code, first.json()) == (
            202,
            {"results": [{"id": "e-start", "status": "accepted", "arrival_ms": BORN_MS}]},
        )
        made.line.advance(700)
        again = await made.http.post("/events", json=[START, event("e-2", auction_id=AUCTION, bid_id="b-1")])
        assert again.json()["results"] == [
            {"id": "e-start", "status": "duplicate", "arrival_ms": BORN_MS},
            {"id": "e-2", "status": "accepted", "arrival_ms": BORN_MS + 700},
        ]
        assert intake(made) == ["e-start", "e-2"]


async def test_what_reaches_the_intake_is_the_normalised_event() -> None:
    """The engine can read it back, with the correlation id of the request and the trace of its header."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with front() as made:
        headers = {"X-Correlation-Id": "mine-1", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        await made.http.post("/events", json=START, headers=headers)
        (entry,) = made.memory.shards[0].events
        context = decode(entry.event_id, entry.body).context
        assert (context.correlation_id, context.trace_id) == ("mine-1", trace)


@pytest.mark.requirement("R2")
@pytest.mark.parametrize("shards", [1, 4])
async def test_an_event_id_counts_once_for_each_auction(shards: int) -> None:
    """Whether two auctions share a shard or not: about the same one a used id is a duplicate, about another one it is new."""
    names = [f"n-{number}" for number in range(6)]
    async with front(shards=shards) as made:
        batch = [event("e-1", "auctions.cancel.requested", auction_id=name, reason="fire") for name in names]
        for expected in ("accepted", "duplicate"):
            answer = await made.http.post("/events", json=[*batch, cancel_offer("e-1")])
            assert [result["status"] for result in answer.json()["results"]] == [expected] * 7
        changed = event("e-1", auction_id=names[0], bid_id="b-1")
        assert (await made.http.post("/events", json=changed)).json()["results"][0]["status"] == "duplicate"


@pytest.mark.requirement("R2", "B2")
async def test_the_same_bid_under_two_event_ids_is_one_bid() -> None:
    """A bid that is announced twice must not extend an auction twice; the same bid id elsewhere is another bid."""
    async with front() as made:
        answer = await made.http.post(
            "/events",
            json=[
                event("e-1", auction_id=AUCTION, bid_id="b-1"),
                event("e-2", auction_id=AUCTION, bid_id="b-1"),
                event("e-3", auction_id="a-2", bid_id="b-1"),
            ],
        )
        assert [result["status"] for result in answer.json()["results"]] == ["accepted", "duplicate", "accepted"]
        assert intake(made) == ["e-1", "e-3"]


@pytest.mark.requirement("R2")
async def test_no_event_id_and_no_other_auction_stands_for_a_bid() -> None:
    """Ids may hold whatever separates others: a bid that was in time is never taken for the repetition of something else."""
    async with front() as made:
        batch = [
            event("bid:lot:2", auction_id="lot", bid_id="1"),
            event("e-2", auction_id="lot", bid_id="2"),
            event("e-3", auction_id="lot:2", bid_id="3:4"),
            event("e-4", auction_id="lot:2:3", bid_id="4"),
        ]
        answer = await made.http.post("/events", json=batch)
        assert [result["status"] for result in answer.json()["results"]] == ["accepted"] * 4


async def test_a_batch_over_many_shards_is_answered_in_its_order() -> None:
    """Each event goes to its auction's shard, in the order of the batch; the results stand as the events stood."""
    names = [f"n-{number}" for number in range(20)]
    async with front(shards=4) as made:
        batch = [event(f"e-{name}", auction_id=name, bid_id="b") for name in names]
        answer = await made.http.post("/events", json=batch)
        assert [result["id"] for result in answer.json()["results"]] == [f"e-{name}" for name in names]
        for shard in range(4):
            assert intake(made, shard) == [f"e-{name}" for name in names if shard_of(name, 4) == shard]


def in_shard(shard: int, shards: int, prefix: str = "n") -> str:
    """An auction id that lives in a shard."""
    return next(f"{prefix}-{n}" for n in range(999) if shard_of(f"{prefix}-{n}", shards) == shard)


@pytest.mark.requirement("R19")
async def test_a_cancellation_by_offer_goes_to_the_shard_of_its_last_auction() -> None:
    """Where the offer is bound, only there: no other shard remembers it for an auction to come."""
    async with front(shards=3) as made:
        made.memory.shards[0].offers["o-1"] = binding(in_shard(0, 3), BORN_MS - 5)
        made.memory.shards[1].offers["o-1"] = CANCELLED_BEFORE_START + "{}"
        made.memory.shards[2].offers["o-1"] = binding(in_shard(2, 3), BORN_MS - 4)
        answer = await made.http.post("/events", json=[cancel_offer("e-1"), cancel_offer("e-2", "o-2")])
        assert [result["status"] for result in answer.json()["results"]] == ["accepted"] * 2
        assert [intake(made, shard) for shard in range(3)] == [["e-2"], ["e-2"], ["e-1", "e-2"]]


@pytest.mark.requirement("R19")
async def test_a_start_says_that_its_offer_stood_for_another_auction() -> None:
    """Whichever shard that one is in; not if it is the same auction again, or if the offer was only cancelled."""
    async with front(shards=3) as made:
        known, other = in_shard(0, 3), in_shard(1, 3)
        made.memory.shards[0].offers["o-1"] = binding(known, BORN_MS - 5)
        made.memory.shards[0].offers["o-2"] = CANCELLED_BEFORE_START + "{}"
        about = [(known, "o-1"), (known, "o-2"), (known, "o-3"), (other, "o-1"), (other, "o-2")]
        schedule = {"starts_at": BORN_MS, "ends_at": ENDS_AT}
        batch = [
            event(f"e-{n}", "offers.auction.started", auction_id=auction_id, offer_id=offer_id, **schedule)
            for n, (auction_id, offer_id) in enumerate(about)
        ]
        await made.http.post("/events", json=batch)
        sent = [decode(entry.event_id, entry.body) for shard in range(3) for entry in made.memory.shards[shard].events]
        assert len(sent) == len(about)
        assert [start.context.event_id for start in sent if start.context.relisted] == ["e-3"]


@pytest.mark.requirement("R19", "R16")
async def test_offers_that_cannot_be_looked_up_are_no_reason_to_guess() -> None:
    """503 before anything is taken, and only for events that name an offer."""
    async with front(shards=3) as made:
        made.store.failing["offers"] = StoreUnavailableError("away")
        bid = event("e-1", auction_id=AUCTION, bid_id="b")
        answer = await made.http.post("/events", json=[bid, cancel_offer("e-2")])
        assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")
        assert [intake(made, shard) for shard in range(3)] == [[], [], []]
        assert (await made.http.post("/events", json=bid)).status_code == 202


@pytest.mark.requirement("R19")
async def test_a_cancellation_by_offer_goes_to_every_shard_where_it_is_bound_nowhere() -> None:
    """Nobody knows which shard an offer will live in: each gets it, and the answer carries the latest arrival."""
    async with front(shards=3) as made:
        made.memory.shards[1].last_at = BORN_MS + 90
        answer = await made.http.post(
            "/events", json=[cancel_offer("e-1"), event("e-2", auction_id=AUCTION, bid_id="b")]
        )
        assert answer.json()["results"][0] == {"id": "e-1", "status": "accepted", "arrival_ms": BORN_MS + 90}
        for shard in range(3):
            assert intake(made, shard)[0] == "e-1"
        made.line.advance(500)
        again = await made.http.post("/events", json=cancel_offer("e-1"))
        assert again.json()["results"] == [{"id": "e-1", "status": "duplicate", "arrival_ms": BORN_MS + 90}]


@pytest.mark.requirement("R19")
async def test_a_cancellation_by_offer_that_reached_only_some_shards_is_accepted_by_the_rest() -> None:
    """After a request that failed half way the same event completes it: accepted if any shard takes it now."""
    async with front(shards=3) as made:
        made.store.failing["append"] = StoreUnavailableError("away")
        assert (await made.http.post("/events", json=cancel_offer("e-1"))).status_code == 503
        made.store.failing.clear()
        await made.memory.append(2, [Draft("e-1", b"{}")], EpochMs(BORN_MS), "earlier")
        made.line.advance(500)
        answer = await made.http.post("/events", json=cancel_offer("e-1"))
        assert answer.json()["results"] == [{"id": "e-1", "status": "accepted", "arrival_ms": BORN_MS + 500}]


@pytest.mark.requirement("R16")
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (IntakeFullError("the intake of shard 0 holds 7 entries, its bound"), "INTAKE_FULL"),
        (StoreUnavailableError("secret-host:6379 is away"), "DEPENDENCY_UNAVAILABLE"),
        (RedisRefusedError("NOPERM"), "DEPENDENCY_UNAVAILABLE"),
    ],
)
async def test_a_store_that_takes_nothing_is_503_and_says_when_to_try_again(fault: Exception, code: str) -> None:
    """The producer keeps its events, and is told that repeating them is safe."""
    async with front() as made:
        made.store.failing["append"] = fault
        answer = await made.http.post("/events", json=START)
        assert (answer.status_code, answer.json()["error_code"]) == (503, code)
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert answer.headers["content-type"] == "application/problem+json"
        assert "same" in answer.json()["detail"]
        assert "secret-host" not in answer.text


async def test_a_full_shard_refuses_the_request_and_the_repetition_counts_what_was_taken_once() -> None:
    """What other shards took stays taken; sent again it is a duplicate there."""
    async with front(shards=2) as made:
        names = [next(f"n-{n}" for n in range(9) if shard_of(f"n-{n}", 2) == shard) for shard in range(2)]
        batch = [event(f"e-{name}", auction_id=name, bid_id="b") for name in names]
        made.memory._intake_max = 0
        assert (await made.http.post("/events", json=batch)).json()["error_code"] == "INTAKE_FULL"
        made.memory._intake_max = 10
        await made.http.post("/events", json=batch[:1])
        answer = await made.http.post("/events", json=batch)
        assert [result["status"] for result in answer.json()["results"]] == ["duplicate", "accepted"]


@pytest.mark.parametrize("route", ["events", "timer"])
async def test_a_fault_of_ours_is_500_with_an_id_and_no_traceback(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer says nothing of our insides, only by which id to ask for them."""

    def faulty(*_args: object, **_named: object) -> None:
        raise ZeroDivisionError("inside-7")

    async with front() as made:
        monkeypatch.setattr("gateway.routes.parse_events", faulty)
        made.store.failing["view"] = ZeroDivisionError("inside-7")
        headers = {"X-Correlation-Id": "mine-1"}
        if route == "events":
            answer = await made.http.post("/events", json=START, headers=headers)
        else:
            answer = await made.http.get("/auctions/a-9/timer", headers=headers)
        assert (answer.status_code, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["correlation_id"] == "mine-1"
        for inside in ("inside-7", "Traceback", "ZeroDivision", ".py"):
            assert inside not in answer.text


async def test_every_answer_carries_the_correlation_id_also_a_500() -> None:
    """Whatever becomes of a request, its id comes back in the header."""
    async with front() as made:
        made.store.failing["view"] = ZeroDivisionError()
        for path in ("/healthz", "/nowhere", "/auctions/a-9/timer"):
            answer = await made.http.get(path, headers={"X-Correlation-Id": "mine-1"})
            assert answer.headers["x-correlation-id"] == "mine-1", path


async def test_a_body_is_read_up_to_its_bound_and_no_further() -> None:
    """A sender that never ends is refused at last, whatever length it claims; nothing of it is taken."""
    chunk = b" " * 65_536
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += len(chunk)
            yield chunk

    async with front() as made:
        answer = await made.http.post("/events", content=endless(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error_code"]) == (413, "PAYLOAD_TOO_LARGE")
        assert answer.json()["body_bytes_max"] == BODY_BYTES_MAX
        assert answer.headers["connection"] == "close"
        assert DISCARDED_BYTES_MAX < given <= DISCARDED_BYTES_MAX + 2 * len(chunk)
        fits = orjson.dumps(START)
        answer = await made.http.post("/events", content=fits + b" " * (BODY_BYTES_MAX - len(fits)))
        assert answer.status_code == 202
        answer = await made.http.post("/events", content=fits + b" " * (BODY_BYTES_MAX - len(fits) + 1))
        assert answer.status_code == 413


async def test_a_sender_that_goes_away_in_the_midst_of_its_body_has_sent_nothing() -> None:
    """Half a body is never parsed, even where the half would be valid."""
    async with front() as made:
        messages = [
            {"type": "http.request", "body": orjson.dumps(START), "more_body": True},
            {"type": "http.disconnect"},
        ]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/events", "raw_path": b"/events", "query_string": b"",
            "headers": [(b"host", b"127.0.0.1:8080")], "http_version": "1.1", "scheme": "http", "root_path": "",
            "server": ("127.0.0.1", 8080), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await made.gateway.app(scope, receive, send)
        assert sent[0]["status"] == 400
        assert intake(made) == []


async def test_bad_events_are_refused_before_any_is_taken() -> None:
    """One that cannot be read refuses the batch, with its index."""
    async with front() as made:
        answer = await made.http.post("/events", json=[START, event("e-2", auction_id="with space", bid_id="b")])
        assert (answer.status_code, answer.json()["error_code"]) == (400, "MALFORMED_EVENTS")
        assert answer.json()["errors"][0]["index"] == 1
        assert intake(made) == []


# GET /auctions/{id}/timer.


@pytest.mark.requirement("R6")
async def test_a_countdown_is_hydrated_with_its_reference_instant() -> None:
    """The timer as of now on the auction clock, its version as `ETag`, and when to ask again."""
    async with front() as made:
        made.put(record(version=4))
        made.line.advance(1_500)
        answer = await made.http.get(f"/auctions/{AUCTION}/timer")
        assert answer.status_code == 200
        timer = answer.json()
        assert (timer["auction_id"], timer["version"], timer["server_time"]) == (AUCTION, 4, BORN_MS + 1_500)
        assert timer["remaining_ms"] == ENDS_AT - BORN_MS - 1_500
        assert (timer["stale"], timer["next_poll_ms"]) == (False, 15_000)
        assert (answer.headers["etag"], answer.headers["cache-control"]) == ('"4"', "no-cache")


@pytest.mark.requirement("R6")
@pytest.mark.parametrize(
    ("header", "status"),
    [
        ('"4"', 304),
        ('W/"4"', 304),
        ('"1", "4"', 304),
        ('"1",W/"4"', 304),
        ("*", 304),
        ('"3"', 200),
        ('"44"', 200),
        ("4", 200),
        ("", 200),
    ],
)
async def test_an_unchanged_timer_is_304(header: str, status: int) -> None:
    """The comparison is the weak one of RFC 9110; a 304 has no body and the tag again."""
    async with front() as made:
        made.put(record(version=4))
        answer = await made.http.get(f"/auctions/{AUCTION}/timer", headers={"If-None-Match": header})
        assert (answer.status_code, answer.headers["etag"]) == (status, '"4"')
        assert (answer.headers["next-poll-ms"], answer.headers["cache-control"]) == ("15000", "no-cache")
        assert (answer.content == b"") is (status == 304)


@pytest.mark.parametrize("auction_id", ["nobody", "a%20b", "x" * 129, "%C3%BC"])
async def test_an_unknown_timer_is_404(auction_id: str) -> None:
    """What cannot be an id is not even asked for."""
    async with front() as made:
        answer = await made.http.get(f"/auctions/{auction_id}/timer")
        assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
        assert made.store.calls["view"] == (auction_id == "nobody")
        assert len(answer.json()["detail"]) < 160


@pytest.mark.requirement("R16")
async def test_without_its_store_a_known_timer_is_stale_and_an_unknown_one_503() -> None:
    """What is in memory is served and marked; what is not cannot be."""
    async with front() as made:
        made.put(record())
        assert (await made.http.get(f"/auctions/{AUCTION}/timer")).json()["stale"] is False
        made.store.failing |= {name: StoreUnavailableError("away") for name in ("view", "follow", "page")}
        made.line.advance(SILENCE_MAX_MS)
        answer = await made.http.get(f"/auctions/{AUCTION}/timer", headers={"If-None-Match": "*"})
        assert (answer.status_code, answer.json()["stale"]) == (200, True)
        for path in ("/auctions/other/timer", "/auctions"):
            answer = await made.http.get(path)
            assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")
            assert 1 <= int(answer.headers["retry-after"]) <= 5


@pytest.mark.parametrize(
    ("status", "remaining_ms", "wanted"),
    [
        (Status.SCHEDULED, 3_600_000, 15_000),
        (Status.ACTIVE, 600_001, 15_000),
        (Status.ACTIVE, 600_000, 5_000),
        (Status.CLOSING, 60_001, 5_000),
        (Status.CLOSING, 60_000, 1_000),
        (Status.CLOSING, 0, 1_000),
        (Status.PAUSED, 10, 15_000),
        (Status.ENDED, 0, 15_000),
        (Status.CANCELLED, 0, 15_000),
    ],
)
@pytest.mark.requirement("R16")
def test_a_poller_asks_as_often_as_it_would_be_told(status: Status, remaining_ms: int, wanted: int) -> None:
    """The polling fallback follows the cadence of the ticks."""
    assert next_poll_ms({"status": status.value, "remaining_ms": remaining_ms}) == wanted


# GET /auctions.


async def test_auctions_are_listed_in_pages_over_all_shards() -> None:
    """Next to close first; `next_cursor` goes on where the page ended."""
    async with front(shards=3) as made:
        for number in range(7):
            made.put(record(f"n-{number}", ends_at=ENDS_AT + number))
        names, cursor = [], None
        while True:
            query = {"limit": "3"} | ({"cursor": cursor} if cursor else {})
            answer = (await made.http.get("/auctions", params=query)).json()
            names += [timer["auction_id"] for timer in answer["auctions"]]
            cursor = answer["next_cursor"]
            if cursor is None:
                break
        assert names == [f"n-{number}" for number in range(7)]
        filtered = await made.http.get("/auctions", params={"status": "ACTIVE", "ending_before": str(ENDS_AT + 2)})
        assert [timer["auction_id"] for timer in filtered.json()["auctions"]] == ["n-0", "n-1"]
        assert (await made.http.get("/auctions?status=ENDED")).json() == {"auctions": [], "next_cursor": None}


async def test_a_listed_auction_says_from_where_it_can_be_followed() -> None:
    """Its cursor is its own shard's, as of before the reading: nothing that comes meanwhile is left out behind it."""
    async with front(shards=3) as made:
        for number in range(7):
            made.put(record(f"n-{number}", ends_at=ENDS_AT + number))
        before = dict(made.hub.positions)
        page = made.store.page

        async def meanwhile(shard: int, *arguments: Any) -> Any:
            made.hub.positions[shard] = "9999999999999-0"
            return await page(shard, *arguments)

        made.store.page = meanwhile
        listed = (await made.http.get("/auctions")).json()["auctions"]
        assert len(listed) == 7
        for view in listed:
            shard = shard_of(view["auction_id"], 3)
            assert view["cursor"] == f"{shard}.{before[shard]}"


@pytest.mark.parametrize("path", ["/healthz/", "/auctions/", f"/auctions/{AUCTION}/timer/"])
async def test_a_slash_too_many_leads_nowhere(path: str) -> None:
    """No redirect, which would go to whatever host the request names: 404 like any other path that is none of ours."""
    async with front(host="0.0.0.0", insecure=True) as made:
        answer = await made.http.get(path, headers={"Host": "elsewhere.example"})
        assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
        assert "location" not in answer.headers


async def test_the_path_of_the_socket_says_what_it_is() -> None:
    """Whoever opens it in a browser is told so, with the protocol to upgrade to (RFC 9110, section 15.5.22)."""
    async with front() as made:
        made.put(record())
        answer = await made.http.get(f"/auctions/{AUCTION}/updates")
        assert (answer.status_code, answer.json()["error_code"]) == (426, "UPGRADE_REQUIRED")
        assert (answer.headers["upgrade"], answer.headers["connection"]) == ("websocket", "Upgrade")
        assert "WebSocket" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=" + "9" * 400, "limit"),
        ("status=OPEN", "status"),
        ("status=active", "status"),
        ("status=TOMBSTONE", "status"),
        ("status=", "status"),
        ("ending_before=0", "ending_before"),
        (f"ending_before={EPOCH_MS_MAX + 1}", "ending_before"),
        ("ending_before=tomorrow", "ending_before"),
        ("cursor=", "cursor"),
        ("cursor=%25", "cursor"),
        ("cursor=%C3%BC", "cursor"),
    ],
)
async def test_a_bad_parameter_is_named(query: str, parameter: str) -> None:
    """400 with the parameter at fault, and no read of the store."""
    async with front() as made:
        answer = await made.http.get(f"/auctions?{query}")
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER")
        assert answer.json()["parameter"] == parameter
        assert made.store.calls["page"] == 0


# Operations.


@pytest.mark.requirement("R16")
async def test_health_is_not_readiness() -> None:
    """Alive is alive; ready needs the clock, Redis and an engine for every shard, and names what is missing."""
    async with front(shards=2) as made:
        alive = await made.http.get("/healthz")
        assert (alive.status_code, alive.json()) == (200, {"status": "alive", "version": VERSION})
        waiting = await made.http.get("/readyz")
        assert (waiting.status_code, waiting.json()["ready"]) == (503, False)
        assert waiting.json()["checks"] == {
            "clock": "ok",
            "redis": "ok",
            "engine": "no engine is heard for 2 of 2 shards: 0, 1",
        }
        for shard in range(2):
            made.hub.on_ticks(shard, heartbeat_line("engine-1", 1, made.authority.now_ms))
        ready = await made.http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (200, True)


@pytest.mark.requirement("R13")
async def test_a_scrape_shows_the_metrics_of_this_process() -> None:
    """In the text format, under the names of the contract."""
    async with front() as made:
        made.gateway.metrics.disconnect(4101)
        answer = await made.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'auctions_gateway_disconnects_total{code="4101"} 1.0' in answer.text
        assert "auctions_gateway_connections 0.0" in answer.text


@pytest.mark.requirement("R28")
async def test_the_description_is_served() -> None:
    """OpenAPI, with the version of the package."""
    async with front() as made:
        answer = await made.http.get("/openapi.json")
        assert (answer.status_code, answer.json()["info"]["version"]) == (200, VERSION)
