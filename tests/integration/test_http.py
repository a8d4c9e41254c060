"""The HTTP surface: what is asked wrongly is answered as documented, and changes nothing."""

import contextlib
import json
import socket
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.integration.events import bid, event, fresh_id, started
from tests.live import LiveStack

pytestmark = pytest.mark.integration

NOW = 1_800_000_000_000
GOOD = started("never-registered-1", NOW, NOW + 1_000)


def test_bad_bodies_get_the_documented_problem(live_stack: LiveStack) -> None:
    """Not JSON, NaN, no event, too many, too large: each its own code, never a 500."""
    cases: list[tuple[bytes, int, str]] = [
        (b"not json", 400, "MALFORMED_JSON"),
        (b"", 400, "MALFORMED_JSON"),
        (b'{"id": NaN}', 400, "MALFORMED_JSON"),
        (b"\xff\xfe", 400, "MALFORMED_JSON"),
        (b"[]", 400, "EMPTY_BATCH"),
        (json.dumps([GOOD] * 501).encode(), 400, "BATCH_TOO_LARGE"),
        (b"[" + b" " * (10 << 20) + b"]", 413, "PAYLOAD_TOO_LARGE"),
        (b"42", 400, "MALFORMED_EVENTS"),
    ]
    for body, status, code in cases:
        answer = live_stack.http.post("/events", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error_code"]) == (status, code), body[:40]
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["correlation_id"] == answer.headers["x-correlation-id"]


@pytest.mark.parametrize("size", [2 << 20, 10 << 20])
def test_who_reads_nothing_before_everything_is_sent_gets_the_413(live_stack: LiveStack, size: int) -> None:
    """The clients of the standard library do so: they used to find a reset in place of the answer. The connection stays."""
    connection = HTTPConnection("127.0.0.1", live_stack.http.base_url.port, timeout=30)
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("POST", "/events", b" " * size)
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["error_code"]) == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("head", [b"Content-Length: 99999999999", b"Content-Length: 1048577\r\nExpect: 100-continue"])
def test_a_body_that_need_not_be_sent_is_refused_before_it_is(live_stack: LiveStack, head: bytes) -> None:
    """Its length alone says so, and nobody is told to continue."""
    with socket.create_connection(("127.0.0.1", live_stack.http.base_url.port), timeout=10) as peer:
        peer.sendall(b"POST /events HTTP/1.1\r\nHost: 127.0.0.1\r\n%b\r\n\r\n" % head)
        answer = b"".join(iter(lambda: peer.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "bad",
    [
        {"auction_id": "with space"},
        {"auction_id": 7},
        {"starts_at": NOW + 2_000, "ends_at": NOW + 1_000},
        {"starts_at": "2027-01-01T00:00:00"},
        {"ends_at": -1},
        {"ends_at": 1e300},
        {"ends_at": True},
        {"policy": {"extension_ms": 900_001}},
        {"policy": {"total_cap_ms": 86_400_001}},
        {"policy": {"mode": "sideways"}},
    ],
)
def test_one_bad_event_refuses_its_whole_batch(live_stack: LiveStack, bad: dict[str, Any]) -> None:
    """The answer names the index and the reason, and not even the good events of the batch are taken."""
    auction_id = fresh_id()
    good = started(auction_id, NOW, NOW + 1_000)
    spoiled = started(fresh_id(), NOW, NOW + 1_000)
    spoiled["data"] |= bad
    answer = live_stack.http.post("/events", json=[good, spoiled])
    assert (answer.status_code, answer.json()["error_code"]) == (400, "MALFORMED_EVENTS")
    assert {error["index"] for error in answer.json()["errors"]} == {1}
    assert all(error["reason"] for error in answer.json()["errors"])
    # The id of the good one is still free: nothing was taken.
    assert live_stack.post(good)[0]["status"] == "accepted"


def test_an_unknown_type_is_refused_and_an_unknown_field_is_not(live_stack: LiveStack) -> None:
    """Unknown types are errors, unknown fields are ignored."""
    answer = live_stack.http.post("/events", json=event("auctions.unheard.of", auction_id="a"))
    assert answer.status_code == 400
    known = started(fresh_id(), NOW, NOW + 1_000)
    known["data"]["colour"] = "red"
    assert live_stack.post(known)[0]["status"] == "accepted"


@pytest.mark.requirement("R29")
def test_a_bid_for_an_unknown_auction_ends_in_troubleshooting(live_stack: LiveStack) -> None:
    """What cannot be applied is kept with its reason, and what comes behind it is applied."""
    auction_id = fresh_id()
    lost = bid(auction_id)
    live_stack.post(lost)
    live_stack.post(started(auction_id, 1_000, NOW + 10**9))
    live_stack.until_status(auction_id, "ACTIVE")
    parked = {}
    for shard in range(8):
        answer = live_stack.redis("HGET", f"auction:troubleshooting:{{{shard}}}", lost["id"])
        if answer:
            parked = json.loads(answer)
    assert parked["error_code"] == "UNKNOWN_AUCTION"
    assert parked["status"] == "IN_TROUBLESHOOTING_QUEUE"
    assert parked["payload"]["auction_id"] == auction_id


@pytest.mark.requirement("R6")
def test_the_timer_is_conditional_on_its_version(live_stack: LiveStack) -> None:
    """`ETag` is the version; `If-None-Match` with it answers 304; the body advises when to ask again."""
    auction_id = fresh_id()
    live_stack.post(started(auction_id, NOW + 10**9, NOW + 2 * 10**9))
    timer = live_stack.until_status(auction_id, "SCHEDULED")
    assert timer["next_poll_ms"] == 15_000
    answer = live_stack.http.get(f"/auctions/{auction_id}/timer")
    assert answer.headers["etag"] == '"1"'
    for tag in ('"1"', 'W/"1"', '"7", "1"', "*"):
        again = live_stack.http.get(f"/auctions/{auction_id}/timer", headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
    assert live_stack.http.get(f"/auctions/{auction_id}/timer", headers={"If-None-Match": '"2"'}).status_code == 200


def test_auctions_are_listed_next_to_close_first_without_gaps(live_stack: LiveStack) -> None:
    """Pages of two cover everything once, in the order of the deadline, and filters hold."""
    far = NOW + 3 * 10**9
    ids = [fresh_id() for _ in range(5)]
    # Two end in the same millisecond: then the id decides.
    for auction_id, offset in zip(ids, (4_000, 1_000, 3_000, 3_000, 2_000), strict=True):
        live_stack.post(started(auction_id, far, far + offset))
    for auction_id in ids:
        live_stack.until_status(auction_id, "SCHEDULED")
    wanted = sorted(ids, key=lambda name: ((4, 1, 3, 3, 2)[ids.index(name)], name))
    listed: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": "2", "status": "SCHEDULED"} | ({"cursor": cursor} if cursor else {})
        page = live_stack.http.get("/auctions", params=query).json()
        assert len(page["auctions"]) <= 2
        listed += [timer["auction_id"] for timer in page["auctions"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(listed) == len(set(listed))
    assert [name for name in listed if name in ids] == wanted
    before = live_stack.http.get("/auctions", params={"ending_before": str(far + 2_001), "limit": "500"}).json()
    assert {timer["auction_id"] for timer in before["auctions"]} & set(ids) == {ids[1], ids[4]}


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "x"},
        {"status": "OPEN"},
        {"ending_before": "tomorrow"},
        {"cursor": "%%%"},
        {"limit": "501"},
    ],
)
def test_a_bad_query_is_a_400_that_names_the_parameter(live_stack: LiveStack, query: dict[str, str]) -> None:
    """Every parameter is checked, and the answer says which one was wrong."""
    answer = live_stack.http.get("/auctions", params=query)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER")
    assert answer.json()["parameter"] in query


def test_correlation_ids_come_in_and_go_out(live_stack: LiveStack) -> None:
    """A given id is echoed, a missing or unusable one is replaced by `req-…`."""
    assert (
        live_stack.http.get("/healthz", headers={"X-Correlation-Id": "mine-1"}).headers["x-correlation-id"] == "mine-1"
    )
    for headers in ({}, {"X-Correlation-Id": "has space"}, {"X-Correlation-Id": "x" * 129}):
        assert live_stack.http.get("/healthz", headers=headers).headers["x-correlation-id"].startswith("req-")


def test_wrong_methods_and_unknown_routes_are_problems(live_stack: LiveStack) -> None:
    """405 names what is allowed, 404 points to the description."""
    answer = live_stack.http.delete("/events")
    assert (answer.status_code, answer.json()["error_code"]) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "POST"
    for path in ("/no/such/route", "/healthz/"):
        assert live_stack.http.get(path).json()["error_code"] == "RESOURCE_NOT_FOUND"
    assert live_stack.http.get("/auctions/a-1/updates").status_code == 426


@pytest.mark.requirement("R28")
def test_the_description_names_exactly_the_routes_that_answer(live_stack: LiveStack) -> None:
    """Every path and method of `/openapi.json` is served, and every served route is described with its answers."""
    from tests.gateway.front import Front

    described = live_stack.http.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    routes: Any = Front().gateway.app.routes
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in routes
        if route.include_in_schema
        for method in route.methods - {"HEAD"}
    }
    assert {(path, method) for path, item in described["paths"].items() for method in item} == served
    refs = set()
    _collect_refs(described, refs)
    assert refs <= {f"#/components/schemas/{name}" for name in described["components"]["schemas"]}
    for path, item in described["paths"].items():
        for method, operation in item.items():
            answer = live_stack.http.request(method, path.replace("{auction_id}", "nobody"))
            assert str(answer.status_code) in operation["responses"], (path, method)


def _collect_refs(node: Any, refs: set[str]) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            refs.add(node["$ref"])
        for value in node.values():
            _collect_refs(value, refs)
    elif isinstance(node, list):
        for value in node:
            _collect_refs(value, refs)


@pytest.mark.requirement("R13")
def test_one_scrape_shows_the_engine_and_the_gateway(live_stack: LiveStack) -> None:
    """Under `serve` whichever gateway answers, `/metrics` holds every process's figures; no auction closed early."""
    text = live_stack.http.get("/metrics").text
    for name in (
        "auctions_timer_close_lateness_ms_bucket",
        "auctions_timer_tick_delay_ms_bucket",
        "auctions_gateway_connections",
    ):
        assert name in text
    assert "auctions_timer_early_closes_total 0.0" in text
