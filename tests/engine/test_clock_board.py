"""Tests for engine.clock_board: statements count while they change, and names that are silent go."""

from dataclasses import replace

import pytest
from redis.exceptions import ConnectionError  # noqa: A004 - redis-py's own

from engine.clock_board import FORGET_AFTER_NS, FRESH_NS, ClockBoard
from engine.contract.clock_vote import ClockReport, Verdict
from engine.domain.instants import EpochMs
from engine.store.memory import MemoryStore
from tests.fakes.clock import Authority, ManualClock, Timeline

pytestmark = pytest.mark.requirement("R12")

REPORT = ClockReport("engine", 0.5, 0.1, 0.0, 0, Verdict.NONE, EpochMs(5))


class Rig:
    """Two processes with a board."""

    def __init__(self) -> None:
        self.line = Timeline()
        self.store = MemoryStore(Authority(self.line))
        self.mine = ClockBoard(self.store, ManualClock(self.line, seed=1), "reconciler", "one")
        self.other = ClockBoard(self.store, ManualClock(self.line, seed=2), "engine", "one")
        self.stated = 0

    async def state(self, board: ClockBoard, verdict: Verdict = Verdict.NONE) -> None:
        """State something new."""
        self.stated += 1
        await board.state(replace(REPORT, verdict=verdict, at=EpochMs(self.stated)))


async def test_who_states_something_new_lives() -> None:
    """The first look shows only what may be left of the dead; a change shows life, for five seconds. Never one's own."""
    rig = Rig()
    await rig.state(rig.mine)
    await rig.state(rig.other)
    assert await rig.mine.others() == {}
    await rig.state(rig.mine)
    await rig.state(rig.other, Verdict.AUTHORITY)
    found = await rig.mine.others()
    assert [(name, report.verdict) for name, report in found.items()] == [("engine:one", Verdict.AUTHORITY)]
    rig.line.advance(FRESH_NS / 1e6 - 1)
    assert len(await rig.mine.others()) == 1
    rig.line.advance(2)
    assert await rig.mine.others() == {}


async def test_a_name_that_is_silent_is_forgotten() -> None:
    """After a minute without anything new the hash is without it: it does not grow with every restart."""
    rig = Rig()
    await rig.state(rig.other)
    await rig.mine.others()
    rig.line.advance(FORGET_AFTER_NS / 1e6 - 1)
    await rig.mine.others()
    assert set(rig.store.clocks) == {"engine:one"}
    rig.line.advance(2)
    await rig.mine.others()
    assert rig.store.clocks == {}
    assert await rig.mine.others() == {}


async def test_what_cannot_be_read_is_not_there() -> None:
    """Somebody else's bytes are no statement."""
    rig = Rig()
    for body in (b"?", b"??"):
        rig.store.clocks["engine:odd"] = body
        assert await rig.mine.others() == {}


async def test_a_store_that_is_away_is_no_news() -> None:
    """Neither stating nor reading raises: the next round comes."""
    rig = Rig()

    async def away(*_args: object) -> dict[str, bytes]:
        raise ConnectionError("away")

    rig.store.stated_clocks = rig.store.state_clock = away  # type: ignore[method-assign, assignment]
    await rig.state(rig.mine)
    assert await rig.mine.others() == {}
