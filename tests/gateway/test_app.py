"""Tests for gateway.app: the composition, its start and its end."""

import asyncio
import os
import signal
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from engine.store.protocol import StoreUnavailableError
from gateway.app import Correlate, _end_with, _Server
from gateway.origins import OriginRule
from tests.gateway.front import Front, front
from tests.gateway.house import AUCTION, record
from tests.gateway.issuer import SECRET


@pytest.mark.parametrize("given", ["mine-1", "!", "~" * 128, "a/b?c=d"])
async def test_a_correlation_id_comes_back(given: str) -> None:
    """Any printable id of up to 128 characters is echoed once, whatever the answer."""
    async with front() as made:
        for path in ("/healthz", "/nowhere"):
            answer = await made.http.get(path, headers={"X-Correlation-Id": given})
            assert answer.headers.get_list("x-correlation-id") == [given]


@pytest.mark.parametrize("given", [None, "", "two words", "ü".encode("latin-1"), b"\x7f", "x" * 129])
async def test_a_missing_or_unusable_correlation_id_is_replaced(given: str | bytes | None) -> None:
    """What cannot stand in a log line is not passed on; each request gets one of its own."""
    async with front() as made:
        headers: Any = {} if given is None else {b"X-Correlation-Id": given}
        ids = {(await made.http.get("/healthz", headers=headers)).headers["x-correlation-id"] for _ in range(2)}
        assert len(ids) == 2
        assert all(name.startswith("req-") for name in ids)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://["])
async def test_pages_from_elsewhere_change_nothing(origin: str) -> None:
    """A foreign origin is 403 for whatever is not a read, before the body is looked at; reads are left alone."""
    async with front() as made:
        answer = await made.http.post("/events", content=b"{", headers={"Origin": origin, "X-Correlation-Id": "mine-1"})
        assert (answer.status_code, answer.json()["error_code"]) == (403, "FOREIGN_ORIGIN")
        assert answer.headers["x-correlation-id"] == answer.json()["correlation_id"] == "mine-1"
        assert (await made.http.get("/healthz", headers={"Origin": origin})).status_code == 200


async def test_a_name_that_was_made_to_resolve_to_this_machine_reads_nothing() -> None:
    """Without tokens the `Host` must be one of this machine, or that of a named origin; the answer says what to do."""
    foreign = {"Host": "evil.example:8080"}
    async with front(allowed_origins=["https://bids.example"]) as made:
        for path in ("/auctions", "/ops/troubleshooting", "/metrics", "/healthz"):
            answer = await made.http.get(path, headers=foreign)
            assert (answer.status_code, answer.json()["error_code"]) == (403, "FOREIGN_ORIGIN")
            assert "AUCTION_TIMER_ALLOWED_ORIGINS" in answer.json()["detail"]
        assert (await made.http.get("/healthz", headers={"Host": "bids.example"})).status_code == 200
    async with front(jwt_secret=SECRET) as made:
        assert (await made.http.get("/healthz", headers=foreign)).status_code == 200


async def test_its_own_pages_and_named_ones_may() -> None:
    """The gateway's own origin and those of the settings reach the route."""
    async with front(allowed_origins=["https://bids.example"]) as made:
        for origin in ("http://127.0.0.1:8080", "https://bids.example"):
            answer = await made.http.post("/events", content=b"{", headers={"Origin": origin})
            assert answer.json()["error_code"] == "MALFORMED_JSON"


async def test_a_page_of_a_named_origin_may_read_the_answers() -> None:
    """Preflight and answer name the origin, without a token; another origin, and a gateway that names none, say nothing."""
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization,content-type"}
    async with front(allowed_origins=["https://Bids.example/", "*"]) as made:
        page = {"Origin": "https://bids.example"}
        preflight = await made.http.options("/offers/o-1/cancel", headers=page | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://bids.example"
        assert "PUT" in preflight.headers["access-control-allow-methods"]
        answer = await made.http.get("/healthz", headers=page)
        assert answer.headers["access-control-allow-origin"] == "https://bids.example"
        assert {"ETag", "Next-Poll-Ms"} <= set(answer.headers["access-control-expose-headers"].split(", "))
        assert preflight.headers["x-correlation-id"].startswith("req-")
        foreign = {"Origin": "https://evil.example"}
        assert (await made.http.options("/healthz", headers=foreign | asked)).status_code == 400
        assert "access-control-allow-origin" not in (await made.http.get("/healthz", headers=foreign)).headers
    async with front() as made:
        assert "access-control-allow-origin" not in (await made.http.get("/healthz", headers=page)).headers


async def test_wrong_methods_and_unknown_routes_are_problems() -> None:
    """405 names what is allowed; 404 says where the routes are described."""
    async with front() as made:
        answer = await made.http.delete("/events")
        assert (answer.status_code, answer.json()["error_code"]) == (405, "METHOD_NOT_ALLOWED")
        assert answer.headers["allow"] == "POST"
        answer = await made.http.get("/no/such/route")
        assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
        assert "/openapi.json" in answer.json()["detail"]


async def test_what_is_no_http_request_passes_untouched() -> None:
    """Lifespan messages carry no correlation id and no origin."""
    seen: list[Scope] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    await Correlate(inner, OriginRule([], loopback_only=True, is_open=True))({"type": "lifespan"}, receive, send)
    assert seen == [{"type": "lifespan"}]


async def test_the_second_signal_is_haste_and_the_first_one_twice_is_not() -> None:
    """A signal begins the drain; what follows within half a second is the same one, and the next ends the wait."""
    async with front() as made:
        server = _Server(uvicorn.Config(made.gateway.app), made.gateway, 60, lambda: False)
        server.started = True
        loop = asyncio.get_running_loop()
        try:
            with server.capture_signals():
                for _ in range(10):
                    os.kill(os.getpid(), signal.SIGTERM)
                    await asyncio.sleep(0)
                assert server.should_exit
                assert not made.gateway.hurried.is_set()
                async with asyncio.timeout(20):
                    while not made.gateway.hurried.is_set():
                        os.kill(os.getpid(), signal.SIGINT)
                        await asyncio.sleep(0.01)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


@pytest.mark.requirement("R16")
async def test_a_start_waits_for_its_store() -> None:
    """While Redis is away nothing is served; when it answers, the feeds start where the lane stands then."""
    made = Front()
    made.put(record(version=1))
    made.announce("timer.extended", record(version=2))
    made.store.failing["recent_updates"] = StoreUnavailableError("away")
    given_up = 0

    class Thrice(dict[str, Exception]):
        def __getitem__(self, name: str) -> Exception:
            nonlocal given_up
            given_up += 1
            fault = super().__getitem__(name)
            if given_up == 3:
                del self[name]
            return fault

    made.store.failing = Thrice(made.store.failing)
    async with made.gateway.app.router.lifespan_context(made.gateway.app) as state:
        assert state == {"door": made.door}
        assert given_up == 3
        assert made.hub.positions == {0: "1-0"}
        assert made.clock.synced


async def test_while_up_the_feeds_run_and_nothing_of_them_is_left_at_the_end() -> None:
    """Events and ticks reach a room; after the end no task of the gateway lives."""
    before = asyncio.all_tasks()
    async with front() as made:
        made.put(record(version=1))
        assert await made.hub.room(AUCTION) is not None
        running = asyncio.all_tasks() - before
        assert len(running) >= 4
        made.announce("timer.extended", record(version=2))
        made.memory._grow()
        while (room := made.hub.known(AUCTION)) is None or room.version < 2:
            await asyncio.sleep(0)
        while not made.memory._listeners:
            await asyncio.sleep(0)
        await made.memory.publish({0: b"! engine-1 1 %d" % made.authority.now_ms})
        while 0 not in made.hub.engine_seen:
            await asyncio.sleep(0)
    assert all(task.done() for task in running)
    assert asyncio.all_tasks() == before


async def test_a_loop_that_must_not_end_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway without its feeds would lie in silence: it aborts, and its supervisor starts a fresh one."""
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    made = Front()
    made.store.failing["follow"] = ZeroDivisionError()
    async with made.gateway.app.router.lifespan_context(made.gateway.app):
        while not raised:
            await asyncio.sleep(0)
    assert raised == [signal.SIGABRT]


async def test_a_loop_that_is_cancelled_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At an ordered stop the loops are cancelled, and that is no fault."""
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    task = asyncio.create_task(asyncio.sleep(3_600))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    _end_with(task)  # type: ignore[arg-type]
    assert raised == []
