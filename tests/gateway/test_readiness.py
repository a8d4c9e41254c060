"""Tests for gateway.readiness."""

import pytest

from engine.clock import AuctionClock
from engine.contract.timers import heartbeat_line
from gateway.feeds import SILENCE_MAX_MS, EventFeed
from gateway.readiness import ENGINE_SILENCE_MAX_MS, Readiness
from tests.gateway.house import House


def readiness_of(house: House) -> tuple[Readiness, EventFeed]:
    """What `/readyz` asks, and the feed it looks at."""
    feed = EventFeed(house.store, house.hub, house.machine, house.shards)
    return Readiness(house.clock, house.hub, feed, house.shards), feed


def beat(house: House, *shards: int) -> None:
    """The engines of these shards are heard."""
    for shard in shards:
        house.hub.on_ticks(shard, heartbeat_line("engine-1", 1, house.authority.now_ms))


@pytest.mark.requirement("R16")
async def test_all_is_well() -> None:
    """Clock in step, Redis fresh, every shard's engine heard: ready."""
    house = House(shards=3)
    readiness, _ = readiness_of(house)
    beat(house, 0, 1, 2)
    assert readiness.checks() == {"clock": "ok", "redis": "ok", "engine": "ok"}


@pytest.mark.requirement("R16")
async def test_a_clock_that_never_heard_its_authority_is_named() -> None:
    """Before the first sample neither the clock nor the engines can be judged."""
    house = House()
    readiness, feed = readiness_of(house)
    unsynced = Readiness(AuctionClock(house.machine), house.hub, feed, house.shards)
    checks = unsynced.checks()
    assert "not heard" in checks["clock"]
    assert "unknown" in checks["engine"]
    assert checks["redis"] == "ok"
    assert readiness.checks()["clock"] == "ok"


@pytest.mark.requirement("R16")
async def test_a_silent_redis_is_named_and_forgiven() -> None:
    """Three seconds without an answer are named; the next answer makes it well again."""
    house = House()
    readiness, feed = readiness_of(house)
    house.line.advance(SILENCE_MAX_MS - 1)
    assert readiness.checks()["redis"] == "ok"
    house.line.advance(1)
    assert not feed.is_fresh
    assert readiness.checks()["redis"] == "Redis has not answered for 3 s"
    await feed.start()
    assert readiness.checks()["redis"] == "ok"


@pytest.mark.requirement("R16")
async def test_shards_without_an_engine_are_counted_and_named() -> None:
    """Up to ten of them by number; one that is heard again is no longer named."""
    house = House(shards=12)
    readiness, _ = readiness_of(house)
    assert readiness.checks()["engine"] == "no engine is heard for 12 of 12 shards: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    beat(house, *range(12))
    assert readiness.checks()["engine"] == "ok"
    house.line.advance(ENGINE_SILENCE_MAX_MS)
    assert readiness.checks()["engine"] == "ok"
    house.line.advance(1)
    beat(house, *(shard for shard in range(12) if shard not in (3, 7)))
    assert readiness.checks()["engine"] == "no engine is heard for 2 of 12 shards: 3, 7"
