"""Tests for engine.lease: engines on hostile clocks, one store, virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from structlog.testing import capture_logs

from engine.contract.cursors import START
from engine.lease import LeaseKeeper
from engine.store.memory import MemoryStore
from engine.store.protocol import Batch, Committed, Fenced, Lease
from tests.fakes.clock import Authority, ManualClock, Timeline
from tests.fakes.loop import run
from tests.fakes.store import FaultyStore

LEASE_MS = 2_000
BEAT_MS = 500
SHARDS = 3


class World:
    """A store and a timeline for several engines."""

    def __init__(self) -> None:
        self.line = Timeline()
        self.store = MemoryStore(Authority(self.line))
        self.epochs: list[int] = []
        self.said: list[tuple[str, str, int]] = []
        """What keepers said: holder, "gained" or "lost", shard."""

    def keeper(self, holder: str, *, seed: int = 0, drift_ppm: int = 0, store: Any = None, shards: int = SHARDS) -> Any:
        """A lease keeper on a machine of its own."""

        async def gained(shard: int, epoch: int) -> None:
            self.said.append((holder, "gained", shard))
            self.epochs.append(epoch)

        async def lost(shard: int) -> None:
            self.said.append((holder, "lost", shard))

        return LeaseKeeper(
            store or self.store,
            ManualClock(self.line, seed=seed, drift_ppm=drift_ppm),
            holder,
            shards,
            lease_ms=LEASE_MS,
            heartbeat_ms=BEAT_MS,
            gained=gained,
            lost=lost,
        )

    def play(self, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a scenario on virtual time."""
        run(self.line, scenario)

    @property
    def now_ms(self) -> float:
        """How long the scenario has lasted."""
        return self.line.now_ns / 1e6


async def stop(task: "asyncio.Task[None]") -> None:
    """An engine dies, without giving anything back."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def passes(ms: float) -> None:
    """Virtual time passes."""
    await asyncio.sleep(ms / 1_000)


def test_an_engine_alone_takes_every_shard() -> None:
    """In its first round, each under its first epoch, and says so."""
    world = World()

    async def scenario() -> None:
        keeper = world.keeper("a")
        task = asyncio.create_task(keeper.run())
        await passes(1)
        assert keeper.epochs == {0: 1, 1: 1, 2: 1}
        await stop(task)

    world.play(scenario)
    assert world.said == [("a", "gained", shard) for shard in range(SHARDS)]


def test_a_holder_beats() -> None:
    """Once per heartbeat, and each shard."""
    world = World()

    async def scenario() -> None:
        task = asyncio.create_task(world.keeper("a").run())
        await passes(10 * BEAT_MS + 1)
        assert [await world.store.lease(shard) for shard in range(SHARDS)] == [Lease("a", 1, 10)] * SHARDS
        await stop(task)

    world.play(scenario)


def test_a_living_holder_keeps_its_shards() -> None:
    """For as long as it beats no other engine gets anything, however fast that engine's clock runs."""
    world = World()

    async def scenario() -> None:
        first, second = world.keeper("a", seed=1), world.keeper("b", seed=2, drift_ppm=100)
        tasks = [asyncio.create_task(first.run())]
        await passes(1)
        tasks.append(asyncio.create_task(second.run()))
        await passes(600_000)
        assert len(first.epochs) == SHARDS
        assert second.epochs == {}
        for task in tasks:
            await stop(task)

    world.play(scenario)


@pytest.mark.requirement("R10")
@pytest.mark.parametrize("drift_ppm", [-100, 0, 100])
@pytest.mark.parametrize("dies_after_ms", [1, 250, 499])
def test_a_dead_holders_shards_are_taken_after_the_lease(drift_ppm: int, dies_after_ms: int) -> None:
    """Not before the beat stood still for `lease_ms` on the taker's own clock, and at most two heartbeats later."""
    world = World()

    async def scenario() -> None:
        first, second = world.keeper("a", seed=1), world.keeper("b", seed=2, drift_ppm=drift_ppm)
        holding, taking = asyncio.create_task(first.run()), asyncio.create_task(second.run())
        await passes(10_000 + dies_after_ms)
        last_beat_ms = world.now_ms - dies_after_ms
        await stop(holding)
        while not second.epochs:
            await passes(10)
            if world.now_ms < last_beat_ms + LEASE_MS * 0.9999:
                assert not second.epochs
        assert world.now_ms <= last_beat_ms + LEASE_MS * 1.0001 + 2 * BEAT_MS + 10
        await passes(BEAT_MS)
        assert second.epochs == {0: 2, 1: 2, 2: 2}
        await stop(taking)

    world.play(scenario)


def test_the_wall_clock_has_no_say() -> None:
    """Somebody sets the date, of an engine or of the store's host: no lease changes hands."""
    world = World()

    async def scenario() -> None:
        first, second = world.keeper("a", seed=1), world.keeper("b", seed=2)
        tasks = [asyncio.create_task(first.run())]
        await passes(1)
        tasks.append(asyncio.create_task(second.run()))
        await passes(5_000)
        second._clock.step_wall(3_600_000)
        world.store._authority_us.step(3_600_000)
        await passes(10_000)
        assert (len(first.epochs), second.epochs) == (SHARDS, {})
        for task in tasks:
            await stop(task)

    world.play(scenario)


def test_an_engine_that_comes_back_under_its_name_takes_its_shards_at_once() -> None:
    """A restart need not wait for its own lease; what it was before is fenced."""
    world = World()

    async def scenario() -> None:
        before = asyncio.create_task(world.keeper("a").run())
        await passes(5_000)
        await stop(before)
        again = world.keeper("a", seed=9)
        task = asyncio.create_task(again.run())
        await passes(1)
        assert again.epochs == {0: 2, 1: 2, 2: 2}
        await stop(task)

    world.play(scenario)


def test_of_two_takers_one_wins() -> None:
    """Two engines wait for a dead one: each shard goes to exactly one of them, under one new epoch."""
    world = World()

    async def scenario() -> None:
        dead = asyncio.create_task(world.keeper("a").run())
        await passes(1_000)
        await stop(dead)
        takers = [world.keeper("b", seed=2), world.keeper("c", seed=3), world.keeper("d", seed=4)]
        tasks = [asyncio.create_task(taker.run()) for taker in takers]
        await passes(LEASE_MS + 3 * BEAT_MS)
        owners = {shard: [taker for taker in takers if shard in taker.epochs] for shard in range(SHARDS)}
        assert all(len(found) == 1 for found in owners.values())
        assert [(await world.store.lease(shard)).epoch for shard in range(SHARDS)] == [2] * SHARDS
        await passes(60_000)
        assert {shard: [taker for taker in takers if shard in taker.epochs] for shard in range(SHARDS)} == owners
        for task in tasks:
            await stop(task)

    world.play(scenario)


@pytest.mark.requirement("R10")
def test_a_fenced_holder_drops_its_shards() -> None:
    """A holder that slept through its lease finds out at its next beat, says so, and cannot commit before it did."""
    world = World()

    async def commit(holder: str, epoch: int) -> object:
        head = await world.store.head(0)
        return await world.store.commit(
            Batch(0, holder, epoch, "c-1", world.store._authority_us.now_ms, head, START, head.chain)
        )

    async def scenario() -> None:
        sleeper_store = FaultyStore(world.store)
        sleeper, taker = world.keeper("a", store=sleeper_store), world.keeper("b", seed=2)
        sleeping = asyncio.create_task(sleeper.run())
        await passes(1)
        taking = asyncio.create_task(taker.run())
        await passes(2_000)
        sleeper_store.away = True
        await passes(LEASE_MS + 3 * BEAT_MS)
        assert len(taker.epochs) == SHARDS
        assert len(sleeper.epochs) == SHARDS, "it does not know yet"
        assert await commit("a", sleeper.epochs[0]) == Fenced(taker.epochs[0])
        sleeper_store.away = False
        await passes(BEAT_MS + 1)
        assert sleeper.epochs == {}
        assert isinstance(await commit("b", taker.epochs[0]), Committed)
        await stop(sleeping)
        await stop(taking)

    world.play(scenario)
    assert [(holder, what) for holder, what, _ in world.said] == (
        [("a", "gained")] * SHARDS + [("b", "gained")] * SHARDS + [("a", "lost")] * SHARDS
    )


def test_what_is_released_is_taken_at_the_next_look() -> None:
    """An engine that stops in order hands over without the wait, and under a new epoch."""
    world = World()

    async def scenario() -> None:
        first, second = world.keeper("a"), world.keeper("b", seed=2)
        holding = asyncio.create_task(first.run())
        await passes(1)
        taking = asyncio.create_task(second.run())
        await passes(1_000)
        await stop(holding)
        await first.release()
        assert first.epochs == {}
        await passes(BEAT_MS + 1)
        assert second.epochs == {0: 2, 1: 2, 2: 2}
        await stop(taking)

    world.play(scenario)


@pytest.mark.requirement("R16")
def test_a_store_that_is_away_ends_nothing() -> None:
    """The keeper goes on trying, and has its shards as soon as the store is back."""
    world = World()

    async def scenario() -> None:
        store = FaultyStore(world.store)
        store.away = True
        keeper = world.keeper("a", store=store)
        task = asyncio.create_task(keeper.run())
        await passes(5_000)
        assert keeper.epochs == {}
        store.away = False
        await passes(BEAT_MS + 1)
        assert len(keeper.epochs) == SHARDS
        await stop(task)

    with capture_logs() as lines:
        world.play(scenario)
    assert {line["event"] for line in lines} == {"lease_round_failed", "shard_claimed", "shards_claimed"}


def test_a_shard_that_somebody_else_reports_lost_is_dropped_once() -> None:
    """`drop` of a shard that is not held says nothing; a dropped shard is watched and taken again like any other."""
    world = World()

    async def scenario() -> None:
        keeper = world.keeper("a", shards=1)
        task = asyncio.create_task(keeper.run())
        await passes(1)
        await keeper.drop(0)
        await keeper.drop(0)
        assert keeper.epochs == {}
        await passes(BEAT_MS + 1)
        assert keeper.epochs == {0: 2}
        await stop(task)

    world.play(scenario)
    assert [what for _, what, _ in world.said] == ["gained", "lost", "gained"]


class SlowAnswers(FaultyStore):
    """A store that answers each claim at once, and whose answer then is on its way for long."""

    answer_takes_ms = 0.0

    async def claim(self, shard: int, holder: str, seen: Lease | None) -> Lease:
        """See `ShardStore`."""
        await passes(self.answer_takes_ms)
        return await self.inner.claim(shard, holder, seen)


def test_a_slow_answer_does_not_shorten_a_lease() -> None:
    """The beat is watched from when it was seen, not from when the question was asked: a slow store takes from nobody."""
    world = World()

    async def scenario() -> None:
        first = world.keeper("a", shards=1)
        holding = asyncio.create_task(first.run())
        await passes(1)
        slow = SlowAnswers(world.store)
        slow.answer_takes_ms = LEASE_MS + 100
        taker = world.keeper("b", store=slow, shards=1)
        await stop(holding)
        asked = asyncio.create_task(taker._try(0))
        await passes(LEASE_MS + 50)
        assert await world.store.renew(0, "a", 1), "a beat, just before the taker's first question arrives"
        await asked
        slow.answer_takes_ms = 0
        await passes(BEAT_MS)
        await taker._try(0)
        assert taker.epochs == {}, f"the beat stood still for {BEAT_MS} ms only"
        await passes(LEASE_MS)
        await taker._try(0)
        assert taker.epochs == {0: 2}

    world.play(scenario)


class Fleet(World):
    """Engines that know of each other."""

    def member(
        self, name: str, *, seed: int = 0, shards: int = 8, fit: Callable[[], bool] = lambda: True
    ) -> LeaseKeeper:
        """A lease keeper that shares."""
        keeper: LeaseKeeper = self.keeper(name, seed=seed, shards=shards)
        keeper._members = self.store
        keeper._fit = fit
        return keeper


def held(*keepers: LeaseKeeper) -> list[int]:
    """How many shards each holds; no shard is held twice."""
    shards = [shard for keeper in keepers for shard in keeper.epochs]
    assert len(shards) == len(set(shards)), shards
    return [len(keeper.epochs) for keeper in keepers]


@pytest.mark.requirement("R10")
def test_engines_share_the_shards_as_they_come_and_go() -> None:
    """Who joins gets its share within two heartbeats; who leaves or dies leaves its own to the rest, in a lease time."""
    fleet = Fleet()

    async def scenario() -> None:
        a, b, c = (fleet.member(name, seed=seed) for seed, name in enumerate("abc"))
        tasks = {"a": asyncio.create_task(a.run())}
        await passes(1)
        assert held(a) == [8]
        tasks["b"] = asyncio.create_task(b.run())
        await passes(3 * BEAT_MS)
        assert held(a, b) == [4, 4]
        tasks["c"] = asyncio.create_task(c.run())
        await passes(3 * BEAT_MS)
        assert sorted(held(a, b, c)) == [2, 3, 3]
        await stop(tasks["a"])
        await passes(LEASE_MS + 2 * BEAT_MS)
        assert held(b, c) == [4, 4]
        tasks["b"].cancel()
        await b.release()
        await passes(2 * BEAT_MS)
        assert held(c) == [8]
        await stop(tasks["c"])

    fleet.play(scenario)


@pytest.mark.parametrize(("shards", "engines"), [(1, 3), (2, 3), (8, 3), (8, 8), (5, 8)])
def test_every_shard_is_held_however_many_engines_there_are(shards: int, engines: int) -> None:
    """Shares are rounded up, so none is left over; who joins late gets a share too where there is one to have."""
    fleet = Fleet()

    async def scenario() -> None:
        keepers = [fleet.member(f"e{number}", seed=number, shards=shards) for number in range(engines)]
        tasks = []
        for keeper in keepers:
            tasks.append(asyncio.create_task(keeper.run()))
            await passes(BEAT_MS / 3)
        await passes(6 * BEAT_MS)
        assert sum(held(*keepers)) == shards
        assert max(held(*keepers)) == -(-shards // engines)
        before = [dict(keeper.epochs) for keeper in keepers]
        await passes(60 * BEAT_MS)
        assert [keeper.epochs for keeper in keepers] == before, "what is shared out stays where it is"
        for task in tasks:
            await stop(task)

    fleet.play(scenario)


@pytest.mark.requirement("R12")
def test_an_engine_that_is_not_fit_gives_everything_away_and_comes_back_when_it_is() -> None:
    """The others need not wait for a lease to run out, and an engine alone holds nothing rather than the wrong time."""
    fleet = Fleet()
    fit = True

    async def scenario() -> None:
        nonlocal fit
        a, b = fleet.member("a", fit=lambda: fit), fleet.member("b", seed=1)
        tasks = [asyncio.create_task(a.run()), asyncio.create_task(b.run())]
        await passes(3 * BEAT_MS)
        assert held(a, b) == [4, 4]
        fit = False
        await passes(LEASE_MS + 3 * BEAT_MS)
        assert held(a, b) == [0, 8]
        fit = True
        await passes(3 * BEAT_MS)
        assert held(a, b) == [4, 4]
        for task in tasks:
            await stop(task)

    fleet.play(scenario)


def test_a_shard_that_is_found_fenced_while_others_are_given_back_is_only_dropped() -> None:
    """One that slept gives shards back to those who have come, and meanwhile its commits find the rest taken: no error."""
    fleet = Fleet()

    async def scenario() -> None:
        a, b = fleet.member("a"), fleet.member("b", seed=1)
        said_lost = a._lost

        async def lost(shard: int) -> None:
            await said_lost(shard)
            if shard == 4:
                await a.drop(6)

        a._lost = lost
        tasks = [asyncio.create_task(a.run()), asyncio.create_task(b.run())]
        await passes(LEASE_MS + 3 * BEAT_MS)
        assert held(a, b) == [4, 4]
        for task in tasks:
            await stop(task)

    fleet.play(scenario)


def test_a_member_that_is_long_gone_is_taken_off_the_list() -> None:
    """Names of engines that died do not pile up."""
    fleet = Fleet()

    async def scenario() -> None:
        await fleet.store.beat_member("long-gone")
        a = fleet.member("a")
        task = asyncio.create_task(a.run())
        await passes(31 * LEASE_MS)
        assert set(fleet.store.members) == {"a"}
        assert held(a) == [8]
        await stop(task)

    fleet.play(scenario)
