"""The outage guard through a shard: a close waits for a gateway, and the outage comes before it (requirement B8)."""

from dataclasses import replace

import pytest

from engine.store.limits import StoreLimits
from tests.fakes.events import bid, start
from tests.fakes.world import QUICK, Worker, World, at

pytestmark = [pytest.mark.requirement("B8"), pytest.mark.requirement("B1")]

EXTENDED = "auction_timer_extended_for_outage"
GIVEN_MS = 30_000


@pytest.fixture
def world() -> World:
    """A world in which outages count."""
    made = World()
    made.store.limits = StoreLimits(attendant="gateway-1", outage_extension_ms=GIVEN_MS)
    return made


async def attended(world: World, worker: Worker, until_s: float) -> None:
    """A gateway beats each second up to an instant, and the shard is at work."""
    while world.authority.now_ms < at(until_s):
        await world.append()
        await worker.live_until(min(at(until_s), world.authority.now_ms + 1_000))
    await world.append()


async def running(world: World) -> Worker:
    """An auction from 10 to 310 s, its window a minute; somebody works, and a gateway beats."""
    worker = await Worker(world).begin()
    await world.append()
    await world.append(start("a", at(10), at(310), policy=QUICK))
    await worker.work()
    return worker


async def test_with_a_gateway_there_is_no_outage(world: World) -> None:
    """The close comes on time."""
    worker = await running(world)
    await attended(world, worker, 311)
    assert world.facts("a")[-1] == "auction_timer_ended"
    assert EXTENDED not in world.facts("a")


async def test_a_close_waits_for_a_gateway(world: World) -> None:
    """While no gateway beats nothing closes; the first beat brings the outage, and the end moves from there."""
    worker = await running(world)
    await attended(world, worker, 290)
    await worker.live_until(at(330))
    assert world.facts("a")[-1] == "auction_timer_closing"
    await world.append()
    await worker.live_until(at(331))
    assert world.facts("a")[-1] == EXTENDED
    assert worker.shard.live["a"].auction.ends_at == world.shard.attended_at + GIVEN_MS  # type: ignore[operator]
    await attended(world, worker, 361)
    assert world.facts("a")[-2:] == [EXTENDED, "auction_timer_ended"]


async def test_a_bid_that_brings_the_news_counts(world: World) -> None:
    """The first to come back may be a bid: the outage stands before it, so it is in time, and extends."""
    worker = await running(world)
    await attended(world, worker, 290)
    await worker.live_until(at(330))
    await world.append(bid("a", "b-1"))
    await worker.work()
    assert world.facts("a")[-2:] == [EXTENDED, "auction_timer_extended"]


async def test_an_engine_that_comes_back_first_waits_too(world: World) -> None:
    """Everything was down: a new engine that finds the end long past does not close before a gateway has told."""
    worker = await running(world)
    await attended(world, worker, 200)
    world.line.advance(140_000)
    worker = await Worker(world, name="worker-2").begin()
    await worker.live_until(at(341))
    assert world.facts("a")[-1] == "auction_timer_closing"
    await world.append()
    await worker.work()
    assert world.facts("a")[-1] == EXTENDED


async def test_nobody_waits_for_ever(world: World) -> None:
    """After 15 minutes an extension could help nobody: it is closed as of its end."""
    worker = await running(world)
    await attended(world, worker, 290)
    await worker.live_until(at(310 + 901))
    assert world.facts("a")[-1] == "auction_timer_ended"
    assert world.shard.timers["a"]["ended_at"] == str(at(310))


async def test_an_outage_outside_the_window_moves_nothing(world: World) -> None:
    """It is noticed, and nobody was hurt."""
    worker = await running(world)
    await attended(world, worker, 100)
    await worker.live_until(at(200))
    await attended(world, worker, 311)
    assert EXTENDED not in world.facts("a")
    assert world.facts("a")[-1] == "auction_timer_ended"


async def test_an_auction_without_a_window_waits_too(world: World) -> None:
    """Its window opens at its end, so one step of time does both: that one is held, and taken up again."""
    worker = await Worker(world).begin()
    await world.append()
    await world.append(start("a", at(10), at(310), policy=replace(QUICK, soft_close_window_ms=0)))
    await worker.work()
    await attended(world, worker, 290)
    await worker.live_until(at(330))
    assert world.facts("a")[-1] == "auction_timer_started"
    await attended(world, worker, 332)
    assert world.facts("a")[-1] == "auction_timer_ended"


async def test_an_auction_that_was_over_stays_over(world: World) -> None:
    """Its end lay before the outage: it closes, though nobody beats, and is not opened by what is told later."""
    worker = await running(world)
    await attended(world, worker, 310)
    await worker.live_until(at(400))
    assert world.facts("a")[-1] == "auction_timer_ended"
    await attended(world, worker, 420)
    assert EXTENDED not in world.facts("a")


async def test_zero_turns_it_off(world: World) -> None:
    """No close waits, and nothing is told."""
    world.store.limits = replace(world.store.limits, outage_extension_ms=0)
    worker = await running(world)
    await attended(world, worker, 200)
    await worker.live_until(at(311))
    assert world.facts("a")[-1] == "auction_timer_ended"
    await world.append()
    assert [entry.event_id for entry in world.shard.events] == ["start-a"]
