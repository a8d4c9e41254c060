"""What a shard does with `clock.corrected`, and an engine whose own clock is wrong: on the memory store and virtual time."""

from typing import Any

import orjson
import pytest

from engine.contract.audit import CLOCK_CORRECTED, verify
from engine.contract.intake import Actor, CommandType, CorrectClock
from engine.domain.instants import EpochMs
from engine.store.protocol import Draft
from tests.engine.test_app import ended_at, play, running
from tests.fakes.events import bid, draft, start
from tests.fakes.world import QUICK, Worker, World, at, passes

pytestmark = [pytest.mark.requirement("R12"), pytest.mark.requirement("B1")]

STEP_MS = 10_000


def corrected(event_id: str, offset_ms: int) -> Draft:
    """A correction by the reconciler."""
    order = CorrectClock(offset_ms, "TIME stepped", {"stepped_ms": -offset_ms})
    return draft(event_id, CommandType.CLOCK_CORRECTED, order, None, actor=Actor("system", "reconciler"))


def corrections(world: World) -> list[dict[str, str]]:
    """The corrections in the audit."""
    return [record for record in world.shard.audit if record["event_type"] == CLOCK_CORRECTED]


async def test_a_correction_is_applied_and_audited_once() -> None:
    """The offset, with one record that says who, why and by which evidence; a repetition is none; no auction is touched."""
    world = World()
    worker = await Worker(world).begin()
    await world.append(start("a", at(10), at(300), policy=QUICK))
    await worker.live_until(at(20))
    held = dict(world.shard.timers["a"])
    world.authority.step(STEP_MS)
    await world.append(corrected("clock-0-1", -STEP_MS))
    await world.append(corrected("clock-0-1", -STEP_MS))
    await worker.work()
    assert (world.shard.offset_ms, world.shard.corrections) == (-STEP_MS, 1)
    (record,) = corrections(world)
    assert (record["auction_id"], record["version"], record["actor_id"]) == ("", "", "reconciler")
    assert orjson.loads(record["details"]) == {
        "offset_ms": -STEP_MS,
        "reason": "TIME stepped",
        "evidence": {"stepped_ms": STEP_MS},
    }
    assert verify(world.shard.audit) is None
    assert world.shard.timers["a"] == held
    assert world.parked() == {}


async def test_a_bid_and_a_correction_of_one_batch_are_each_applied() -> None:
    """The correction is an entry of the log like any other: what stands around it is folded as ever."""
    world = World()
    worker = await Worker(world).begin()
    await world.append(start("a", at(10), at(100), policy=QUICK))
    await worker.live_until(at(60))
    await world.append(bid("a", "b-1"), corrected("clock-0-1", 3), bid("a", "b-2"))
    await worker.work()
    assert world.facts("a").count("auction_timer_extended") + world.facts("a").count("bid_accepted") == 2
    assert world.shard.offset_ms == 3


@pytest.mark.parametrize("detail", [{"offset_ms": "5"}, {"offset_ms": 10**15}, {"evidence": []}, {"reason": ""}])
async def test_a_correction_that_cannot_be_read_is_poison(detail: dict[str, Any]) -> None:
    """It is put aside, and no clock is touched."""
    world = World()
    worker = await Worker(world).begin()
    good = corrected("clock-0-1", 5)
    body = orjson.loads(good.body)
    body["detail"] |= detail
    await world.append(Draft(good.event_id, orjson.dumps(body)))
    await worker.work()
    assert (world.shard.offset_ms, world.shard.corrections, corrections(world)) == (0, 0, [])
    assert list(world.parked()) == ["clock-0-1"]


@pytest.mark.parametrize("step_ms", [STEP_MS, -STEP_MS, 3_600_000, -3_600_000])
def test_an_engine_coasts_over_a_step_and_its_correction(step_ms: int) -> None:
    """What ends before, between and after closes when it should, by the clock on which nothing stepped."""
    world = World()
    ends = {"before": 60, "between": 66, "after": 80}

    async def scenario() -> None:
        async with running(world.engine()) as _:
            await passes(2)
            await world.append(*[start(name, at(3), at(end), policy=QUICK) for name, end in ends.items()])
            await passes(62)
            world.authority.step(step_ms)
            await passes(6)
            await world.store.append(0, [corrected("clock-0-1", -step_ms)], at(70), "c")
            await passes(20)

    play(world, scenario)
    for name, end in ends.items():
        (record,) = [
            r for r in world.shard.audit if (r["auction_id"], r["event_type"]) == (name, "auction_timer_ended")
        ]
        assert 0 <= int(record["recorded_at"]) - at(end) <= 300, name
    assert world.shard.offset_ms == -step_ms


def test_an_engine_that_slept_gives_its_shards_away_first() -> None:
    """Its monotonic clock stood still while the world went on: it holds nothing when its clock jumps, then works again."""
    world = World()

    async def scenario() -> None:
        sleeper = world.engine("sleeper")
        async with running(sleeper):
            await passes(3)
            assert sleeper.leases.epochs
            # To a machine that slept for ten seconds the world looks ten seconds later: authority and wall clock alike.
            world.authority.step(STEP_MS)
            sleeper.clock.clock.step_wall(STEP_MS)  # type: ignore[attr-defined]
            sleeper.clock.clock.slept_ms = STEP_MS  # type: ignore[attr-defined]
            held: list[tuple[bool, bool, bool]] = []
            for _ in range(80):
                await passes(0.1)
                in_step = abs(sleeper.clock.now_us() - world.authority()) < 250_000
                held.append((sleeper.sync.in_step, bool(sleeper.leases.epochs), in_step))
            assert (False, False, False) in held, "it held nothing before it took up the authority"
            assert all(in_step or not holds for fit, holds, in_step in held[45:])
            assert held[-1] == (True, True, True)
            ends_at = EpochMs(world.authority.now_ms + 2_000)
            await world.append(start("a", world.authority.now_ms, ends_at, policy=QUICK))
            await passes(5)
            assert await ended_at(world, "a") == ends_at

    play(world, scenario)
