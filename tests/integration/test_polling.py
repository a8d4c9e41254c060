"""Watching without a socket, on a real server: what a thousand pollers cost Redis, and the way of a drift to the bus."""

import asyncio
import time
from uuid import uuid4

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from engine.clock import SystemClock
from engine.clock_sync import ClockSync
from engine.contract.keys import shard_of
from engine.contract.timers import to_fields
from engine.domain.instants import EpochMs
from engine.settings import Settings
from engine.store.link import RedisLink
from engine.store.redis import RedisStore
from gateway.app import build
from gateway.attendance import Attendance
from tests.gateway.house import record
from tests.integration.events import fresh_id, started
from tests.integration.records import records_of
from tests.live import LiveStack, until
from tests.servers import Server

pytestmark = pytest.mark.integration

POLLERS = 1_000
AT_ONCE = 50
"""Client and gateway share this process: all at once would keep the lanes unread until what is remembered counts as stale."""
BY_THE_CLOCK = {"time", "xread", "info", "ping", "select", "client|setinfo", "hello", "client|setname", "auth"}
"""What a gateway asks whether anybody polls or not: the time once a second, the lanes, and its connections' greetings."""


async def asked_of(link: RedisLink) -> dict[str, int]:
    """How often each command was called, by the server's own count, but for what the clock brings about."""
    stats = await link.commands.info("commandstats")
    return {
        name: counted["calls"]
        for key, counted in stats.items()
        if (name := key.removeprefix("cmdstat_")) not in BY_THE_CLOCK
    }


@pytest.mark.requirement("R6", "R16")
async def test_a_thousand_pollers_cost_redis_nothing(valkey_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditional and plain polls of five auctions, twice each: not one command more than for nobody."""
    # What a gateway does every second, asked or not, are commands like its readings: the count could not tell them apart.
    monkeypatch.setattr(Attendance, "run", lambda _self: asyncio.Event().wait())
    monkeypatch.setattr(ClockSync, "run", lambda _self, _observed: asyncio.Event().wait())
    settings = Settings(_env_file=None, redis_url=valkey_server.url, shards=2)
    clock = SystemClock()
    link = RedisLink(valkey_server.url, clock, call_deadline_ms=3_000)
    try:
        gateway = build(RedisStore(link, clock, settings.store_limits()), clock, settings, CollectorRegistry())
        auctions = [f"a-{number}" for number in range(5)]
        now = time.time_ns() // 1_000_000
        ends = [now + distance for distance in (3_600_000, 600_000 - 5_000, 55_000, 3_600_000, 3_600_000)]
        for auction_id, ends_at in zip(auctions, ends, strict=True):
            fields = to_fields(record(auction_id, ends_at=EpochMs(ends_at)))
            key = f"auction:timer:{{{shard_of(auction_id, 2)}}}:{auction_id}"
            valkey_server.ask("HSET", key, *(part for pair in fields.items() for part in pair))
        async with (
            gateway.app.router.lifespan_context(gateway.app),
            httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app), base_url="http://gateway") as http,
        ):
            hydrated = [await http.get(f"/auctions/{auction_id}/timer") for auction_id in auctions]
            assert [answer.json()["next_poll_ms"] for answer in hydrated] == [15_000, 5_000, 1_000, 15_000, 15_000]
            before = await asked_of(link)

            async def poll(number: int) -> int:
                auction_id = auctions[number % len(auctions)]
                known = {"If-None-Match": '"2"'} if number % 2 else {}
                answer = await http.get(f"/auctions/{auction_id}/timer", headers=known)
                assert answer.headers["next-poll-ms"] == hydrated[number % len(auctions)].headers["next-poll-ms"]
                return answer.status_code

            for first in [*range(0, POLLERS, AT_ONCE)] * 2:
                statuses = await asyncio.gather(*map(poll, range(first, first + AT_ONCE)))
                assert statuses == [200, 304] * (AT_ONCE // 2)
            assert await asked_of(link) == before
            # The count can tell: one auction that nobody has asked for yet is one reading of it.
            assert (await http.get("/auctions/unheard-of/timer")).status_code == 404
            assert await asked_of(link) != before
    finally:
        await link.close()


@pytest.mark.requirement("R8", "R14")
def test_a_client_that_was_far_off_is_announced_by_the_engine(live_stack: LiveStack) -> None:
    """From `POST /timers/sync` through the intake to the outbound bus: with its trace id, and without an audit record."""
    auction_id, trace_id = fresh_id(), f"trace-{uuid4().hex}"
    live_stack.post(started(auction_id, 1_000, 4_000_000_000_000))
    live_stack.until_status(auction_id, "ACTIVE")
    shard = shard_of(auction_id, 8)
    records = records_of(live_stack, auction_id)
    for drift_ms in (499, 1_234):
        answer = live_stack.http.post(
            "/timers/sync",
            json={"auction_id": auction_id, "t0": 1, "drift_ms": drift_ms, "rtt_ms": 20, "trace_id": trace_id},
        )
        assert answer.status_code == 200

    def announced() -> list[dict[str, object]]:
        bodies = [
            orjson.loads(fields[b"body"])
            for _, fields in live_stack.redis("XRANGE", f"auction:updates:{{{shard}}}", "-", "+")
        ]
        return [body for body in bodies if body["type"] == "auction_timer_resynced"]

    (body,) = until(announced, "the drift is announced")
    assert (body["auction_id"], body["drift_ms"], body["rtt_ms"]) == (auction_id, 1_234, 20)
    assert body["trace_id"] == trace_id
    assert records_of(live_stack, auction_id) == records
    assert live_stack.timer(auction_id)["version"] == answer.json()["timer"]["version"]
