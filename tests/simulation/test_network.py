"""Tests for auction_timer.simulation.network: what was sent takes effect, whatever becomes of the sender or the answer."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from auction_timer.simulation.loop import run
from auction_timer.simulation.network import PATIENCE_MS, Fate, Link, Network, copy_of
from auction_timer.simulation.timeline import Authority, Timeline
from auction_timer.simulation.witness import Witness
from engine.store.limits import StoreLimits
from engine.store.memory import MemoryStore
from engine.store.protocol import Draft, StoreUnavailableError


class Bench:
    """A network whose next fates are given."""

    def __init__(self) -> None:
        self.line = Timeline()
        self.store = MemoryStore(Authority(self.line))
        self.fates: list[Fate] = []
        self.network = Network(self.line, self.store, Witness(self.line, 1), self._fate, StoreLimits())
        self.link = Link(self.network, "engine-0", "engine-0#1")

    def _fate(self, _name: str, _writes: bool) -> Fate:
        return self.fates.pop(0) if self.fates else Fate(1, 1)

    async def append(self, event_id: str) -> None:
        """Send one event."""
        await self.link.append(0, [Draft(event_id, b"{}")], self.line.now_ms, f"command-{event_id}")

    @property
    def events(self) -> list[str]:
        """What has reached the intake."""
        return [entry.event_id for entry in self.store.shards[0].events]

    def play(self, scenario: Callable[[], Awaitable[None]]) -> None:
        """On virtual time."""

        async def whole() -> None:
            await scenario()

        run(self.line, whole)


def test_who_is_cut_off_reaches_nobody() -> None:
    """The others do."""
    bench = Bench()

    async def scenario() -> None:
        bench.network.cut_off = {"engine-0"}
        with pytest.raises(StoreUnavailableError):
            await bench.append("e-1")
        await Link(bench.network, "engine-1", "engine-1#1").append(0, [Draft("e-2", b"{}")], bench.line.now_ms, "c-2")
        assert bench.events == ["e-2"]

    bench.play(scenario)


@pytest.mark.parametrize(
    ("fate", "arrives"), [(Fate(1, 1, request_lost=True), False), (Fate(1, 1, answer_lost=True), True)]
)
def test_a_caller_without_an_answer_learns_nothing(fate: Fate, arrives: bool) -> None:
    """Lost on the way there or on the way back: the same error after the same time, and only the store knows."""
    bench = Bench()

    async def scenario() -> None:
        bench.fates = [fate]
        with pytest.raises(StoreUnavailableError):
            await bench.append("e-1")
        assert bench.line.now_ns == PATIENCE_MS * 1_000_000
        assert bench.events == (["e-1"] if arrives else [])

    bench.play(scenario)


def test_what_a_killed_process_has_sent_arrives_and_nothing_else() -> None:
    """The request is on its way when the process dies; later calls of the dead reach nobody."""
    bench = Bench()

    async def scenario() -> None:
        bench.fates = [Fate(500, 1)]
        sending = asyncio.create_task(bench.append("e-1"))
        await asyncio.sleep(0.1)
        bench.link.cut()
        sending.cancel()
        with pytest.raises(StoreUnavailableError):
            await bench.append("e-2")
        await asyncio.sleep(1)
        assert bench.events == ["e-1"]
        assert sending.cancelled()

    bench.play(scenario)


def test_a_request_on_a_broken_connection_never_arrives() -> None:
    """A failover: what had not arrived is lost, whoever waits is told, and the next blocking read says it is a new one."""
    bench = Bench()

    async def scenario() -> None:
        await bench.append("e-1")
        await bench.link.read_intake({0: "0-0"}, 10, 0)
        assert bench.link.connections == 1
        bench.fates = [Fate(100, 1)]
        sending = asyncio.create_task(bench.append("e-2"))
        reading = asyncio.create_task(bench.link.read_intake({0: "1-0"}, 10, 60_000))
        await asyncio.sleep(0.01)
        bench.network.break_connections()
        for task in (sending, reading):
            with pytest.raises(StoreUnavailableError):
                await task
        await asyncio.sleep(1)
        assert bench.events == ["e-1"]
        await bench.link.read_intake({0: "0-0"}, 10, 0)
        assert bench.link.connections == 2

    bench.play(scenario)


def test_a_blocking_read_ends_with_what_it_waits_for_or_with_nothing() -> None:
    """As soon as an entry comes, or after its time."""
    bench = Bench()

    async def scenario() -> None:
        reading = asyncio.create_task(bench.link.read_intake({0: "0-0"}, 10, 5_000))
        await asyncio.sleep(0.5)
        await bench.append("e-1")
        assert [entry.event_id for entry in (await reading)[0]] == ["e-1"]
        assert bench.line.now_ns < 600_000_000
        assert await bench.link.read_intake({0: "1-0"}, 10, 5_000) == {}
        assert 5_000_000_000 < bench.line.now_ns < 6_000_000_000

    bench.play(scenario)


def test_a_doubled_request_takes_effect_twice() -> None:
    """The store recognises the second; its answer goes to nobody."""
    bench = Bench()

    async def scenario() -> None:
        bench.fates = [Fate(1, 1, again_ms=50)]
        await bench.append("e-1")
        await asyncio.sleep(1)
        assert bench.events == ["e-1"]
        assert bench.network.witness.counts["events accepted"] == 2, "the same command is answered the same"

    bench.play(scenario)


async def test_a_copy_of_a_shard_is_not_changed_by_what_comes_later() -> None:
    """What a failover falls back to is the shard as it was, in all its parts."""
    bench = Bench()
    await bench.store.append(0, [Draft("e-1", b"{}")], bench.line.now_ms, "c-1")
    memory = bench.store.shards[0]
    memory.timers["a"] = {"version": "1"}
    kept = copy_of(memory)
    await bench.store.append(0, [Draft("e-2", b"{}")], bench.line.now_ms, "c-2")
    memory.timers["a"]["version"] = "2"
    for group in memory.groups.values():
        group["a"] = 1
    assert [entry.event_id for entry in kept.events] == ["e-1"]
    assert list(kept.seen) == ["e-1"]
    assert kept.timers == {"a": {"version": "1"}}
    assert not any(kept.groups.values())
