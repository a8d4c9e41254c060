"""Pauses on the memory store: the remaining time stands still, whatever happens meanwhile, and the caps do not count it."""

from typing import Any

import orjson
import pytest

from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS
from engine.domain.policy import ExtensionMode, Policy
from engine.store.protocol import Group
from tests.fakes.events import bid, cancel, pause, reschedule, resume, start
from tests.fakes.world import QUICK, Worker, World, at


@pytest.fixture
def world() -> World:
    """A world at its beginning."""
    return World()


@pytest.fixture
async def worker(world: World) -> Worker:
    """Somebody who works on shard 0."""
    return await Worker(world).begin()


def quick(policy: Policy = QUICK) -> Any:
    """The start of an auction from the 10th to the 310th second."""
    return start("a", at(10), at(310), policy=policy)


async def at_work(world: World, worker: Worker, seconds: float, *drafts: Any) -> None:
    """These events arrive at that second, and are worked off."""
    await worker.live_until(at(seconds))
    await world.append(*drafts)
    await worker.work()


def shown(world: World) -> dict[str, Any]:
    """The Timer of the last frame."""
    frames = [update for update in world.shard.updates if update.type.startswith("timer.")]
    read: dict[str, Any] = orjson.loads(frames[-1].body)["timer"]
    return read


def standing(world: World) -> tuple[str, int]:
    """Status and end of the auction in the store."""
    timer = world.shard.timers["a"]
    return timer["status"], int(timer["ends_at"])


@pytest.mark.requirement("B1")
async def test_a_paused_auction_has_no_deadline(world: World, worker: Worker) -> None:
    """It leaves the deadlines in the very commit that pauses it; nothing is due for it however long it takes."""
    await at_work(world, worker, 0, quick())
    assert world.shard.groups[Group.LIVE] == {"a": at(310)}
    await at_work(world, worker, 110, pause("a", "p-1"))
    assert world.shard.groups[Group.LIVE] == {}
    assert world.shard.groups[Group.PAUSED] == {"a": at(110)}
    turns = worker.turns
    await worker.live_until(at(40_000))
    assert worker.turns == turns
    assert world.facts("a")[-1] == "auction_timer_paused"
    assert shown(world)["paused_remaining_ms"] == 200 * SECOND_MS


@pytest.mark.requirement("R10")
@pytest.mark.parametrize("restarts", [1, 3])
async def test_a_pause_survives_restarts(world: World, worker: Worker, restarts: int) -> None:
    """Engines come and go meanwhile, long after the old deadline: the auction is still paused, and goes on as it was."""
    await at_work(world, worker, 0, quick())
    await at_work(world, worker, 110, pause("a", "p-1"))
    for number in range(restarts):
        worker = await Worker(world, name=f"engine-{number}").begin()
        assert list(worker.shard.live) == ["a"]
        assert worker.calendar.agenda.next_at() is None
        await worker.live_until(world.authority.now_ms + HOUR_MS)
    assert standing(world) == ("PAUSED", at(310))
    resumed_s = 110 + restarts * 3_600 + 5
    await at_work(world, worker, resumed_s, resume("a", "r-1"))
    assert standing(world) == ("ACTIVE", at(resumed_s + 200))
    assert world.shard.groups[Group.LIVE] == {"a": at(resumed_s + 200)}
    assert world.shard.groups[Group.PAUSED] == {}
    again = await Worker(world, name="last").begin()
    await again.live_until(at(resumed_s + 1_000))
    assert world.shard.timers["a"]["ended_at"] == str(at(resumed_s + 200))


@pytest.mark.requirement("R15")
async def test_no_bid_extends_a_paused_auction(world: World, worker: Worker) -> None:
    """Also where its window was open: the bid counts and is announced, the end, the version and the allowance stay."""
    await at_work(world, worker, 0, quick())
    await at_work(world, worker, 290, pause("a", "p-1"))
    before = dict(world.shard.timers["a"])
    await at_work(world, worker, 300, bid("a", "b-1", reply_to="i"))
    await at_work(world, worker, 5_000, bid("a", "b-2", reply_to="i"))
    assert world.shard.timers["a"] == before
    assert [answer["fact"] for answer in world.answers("i")] == ["bid_accepted"] * 2
    assert world.announced("a")[-2:] == ["bid.accepted"] * 2
    await at_work(world, worker, 6_000, resume("a", "r-1"))
    assert standing(world) == ("CLOSING", at(6_020))
    await at_work(world, worker, 6_010, bid("a", "b-3"))
    assert standing(world) == ("CLOSING", at(6_070))


@pytest.mark.requirement("R15")
async def test_paused_time_does_not_count_against_the_cap(world: World, worker: Worker) -> None:
    """Extensions may use the whole allowance, beyond the original end by allowance and pauses, and not a millisecond more."""
    policy = Policy(MINUTE_MS, MINUTE_MS, ExtensionMode.ADD, total_cap_ms=150 * SECOND_MS)
    await at_work(world, worker, 0, quick(policy))
    await at_work(world, worker, 300, bid("a", "b-1"))
    assert standing(world) == ("CLOSING", at(370))
    await at_work(world, worker, 360, pause("a", "p-1"))
    await at_work(world, worker, 360 + 86_400, resume("a", "r-1"))
    assert standing(world) == ("CLOSING", at(370 + 86_400))
    assert shown(world)["extension_left_ms"] == 90 * SECOND_MS
    assert shown(world)["final_deadline"] == at(310 + 150 + 86_400)
    for number, seconds in enumerate([365, 429, 459]):
        await at_work(world, worker, seconds + 86_400, bid("a", f"late-{number}"))
    assert standing(world) == ("CLOSING", at(310 + 150 + 86_400))
    assert (shown(world)["clipped_by"], shown(world)["extension_left_ms"]) == ("total", 0)
    await worker.live_until(at(200_000))
    assert world.shard.timers["a"]["ended_at"] == str(at(310 + 150 + 86_400))


@pytest.mark.requirement("R15")
async def test_several_pauses_move_the_cap_by_their_sum(world: World, worker: Worker) -> None:
    """Each gives its own time back, and what was left of the allowance is left."""
    await at_work(world, worker, 0, quick())
    for number, (begins, ends) in enumerate([(50, 60), (100, 400), (450, 451)]):
        await at_work(world, worker, begins, pause("a", f"p-{number}"))
        await at_work(world, worker, ends, resume("a", f"r-{number}"))
    assert standing(world) == ("ACTIVE", at(310 + 311))
    assert shown(world)["final_deadline"] == at(310 + 311 + 300)
    await at_work(world, worker, 460, reschedule("a", "s-1", at(310 + 311 + 300) + 1, reply_to="i"))
    await at_work(world, worker, 461, reschedule("a", "s-2", at(310 + 311 + 300), reply_to="i"))
    assert [answer["outcome"] for answer in world.answers("i")] == ["REFUSED", "APPLIED"]


@pytest.mark.requirement("R25")
async def test_what_cannot_be_done_while_paused_is_refused(world: World, worker: Worker) -> None:
    """No second pause and no new end; only a resume and a cancellation, and then no resume any more."""
    await at_work(world, worker, 0, quick())
    await at_work(world, worker, 110, pause("a", "p-1"))
    before = dict(world.shard.timers["a"])
    ask = {"reply_to": "i"}
    await at_work(world, worker, 120, pause("a", "p-2", **ask), reschedule("a", "s-1", at(900), **ask))
    assert world.shard.timers["a"] == before
    await at_work(world, worker, 130, cancel("a", **ask), resume("a", "r-1", **ask))
    assert [(answer["outcome"], answer.get("error_code")) for answer in world.answers("i")] == [
        ("REFUSED", "FSM_TRANSITION_INVALID"),
        ("REFUSED", "FSM_TRANSITION_INVALID"),
        ("APPLIED", None),
        ("REFUSED", "FSM_TERMINAL_IMMUTABLE"),
    ]
    assert world.shard.groups[Group.PAUSED] == {}


@pytest.mark.requirement("B2")
@pytest.mark.parametrize(("arrives_s", "status"), [(309.999, "PAUSED"), (310, "ENDED")])
async def test_a_pause_counts_if_it_arrived_before_the_end(
    world: World, worker: Worker, arrives_s: float, status: str
) -> None:
    """However late it is processed: one millisecond before the deadline it holds the clock, at it it comes too late."""
    await at_work(world, worker, 0, quick())
    await worker.live_until(at(300))
    world.line.advance(at(arrives_s) - world.authority.now_ms)
    await world.append(pause("a", "p-1", reply_to="i"))
    world.line.advance(60_000)
    await worker.work()
    assert standing(world)[0] == status
    if status == "PAUSED":
        assert shown(world)["paused_remaining_ms"] == 1
        await at_work(world, worker, 500, resume("a", "r-1"))
        await worker.live_until(at(600))
        assert world.shard.timers["a"]["ended_at"] == str(at(500) + 1)


async def test_clients_are_told_of_a_pause(world: World, worker: Worker) -> None:
    """With the remaining time that is frozen, and with the end that is new when it goes on."""
    await at_work(world, worker, 0, quick())
    await at_work(world, worker, 110, pause("a", "p-1"))
    paused = orjson.loads(world.shard.updates[-1].body)
    assert (paused["type"], paused["reason"]) == ("timer.paused", "fire alarm")
    assert paused["timer"]["remaining_ms"] == paused["timer"]["paused_remaining_ms"] == 200 * SECOND_MS
    await at_work(world, worker, 900, resume("a", "r-1"))
    resumed = orjson.loads(world.shard.updates[-1].body)
    assert (resumed["type"], resumed["previous_ends_at"]) == ("timer.resumed", at(310))
    assert (resumed["timer"]["ends_at"], resumed["timer"]["remaining_ms"]) == (at(1_100), 200 * SECOND_MS)
    assert "paused_remaining_ms" not in resumed["timer"]
