"""Tests for reconciler.clock_watch: what is asked for when the authority steps, and what is not, on the memory store."""

from collections.abc import Callable
from dataclasses import replace

import orjson
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine.clock import AuctionClock
from engine.clock_board import ClockBoard
from engine.clock_sync import ClockSync
from engine.contract.clock_vote import ClockReport, Verdict
from engine.contract.intake import CorrectClock, decode
from engine.domain.instants import EpochMs
from engine.store.memory import MemoryStore
from engine.store.protocol import ShardClock, StoreUnavailableError
from reconciler import clock_watch
from reconciler.clock_watch import INTERVAL_NS, LOOKS, ClockWatch
from reconciler.metrics import ReconcilerMetrics
from tests.fakes.clock import Authority, ManualClock, Timeline

pytestmark = pytest.mark.requirement("R12")


class Rig:
    """A reconciler's watch over some shards, and the other processes as they would state their clocks."""

    def __init__(self, shards: int = 2) -> None:
        self.line = Timeline()
        self.authority = Authority(self.line)
        self.store = MemoryStore(self.authority)
        self.machine = ManualClock(self.line, seed=4)
        self.clock = AuctionClock(self.machine)
        board = ClockBoard(self.store, self.machine, "reconciler", "one")
        self.sync = ClockSync(self.clock, self.store.time_us, board=board)
        self.registry = CollectorRegistry()
        self.watch = ClockWatch(
            self.store, self.clock, self.sync.witnesses, board, ReconcilerMetrics(self.registry), shards=shards
        )
        self.others: list[Verdict] = []
        self.looks = 0

    async def begin(self) -> "Rig":
        """In step."""
        await self.sync.start()
        await self.look()
        return self

    async def look(self, times: int = 1) -> None:
        """A second passes, a sample, a statement of each other process, and a look."""
        for _ in range(times):
            self.line.advance(1_000)
            self.looks += 1
            await self.sync.sample()
            for number, verdict in enumerate(self.others):
                report = ClockReport("engine", 0, 0, 0, 0, verdict, EpochMs(self.looks))
                self.store.clocks[f"engine:{number}"] = report.encode()
            await self.watch.look()

    def asked(self, shard: int = 0) -> list[CorrectClock]:
        """The corrections in the intake of a shard."""
        events = [decode(entry.event_id, entry.body).event for entry in self.store.shards[shard].events]
        return [event for event in events if isinstance(event, CorrectClock)]

    def apply(self, shard: int = 0) -> None:
        """What the engine does with the last of them."""
        memory = self.store.shards[shard]
        memory.offset_ms = self.asked(shard)[-1].offset_ms
        memory.corrections += 1

    @property
    def counted(self) -> float:
        """The metric."""
        return self.registry.get_sample_value("auctions_timer_corrections_total", {"kind": "clock"}) or 0.0


@pytest.fixture
async def rig() -> Rig:
    return await Rig().begin()


@pytest.mark.parametrize("step_ms", [10_000, -10_000, 3_600_000, -3_600_000, 400])
async def test_a_steady_step_is_corrected_once_in_every_shard(rig: Rig, step_ms: int) -> None:
    """Each shard's intake gets the one offset that undoes it, with evidence; it is written down and counted."""
    rig.others = [Verdict.AUTHORITY] * 3
    rig.authority.step(step_ms)
    await rig.look(LOOKS - 1)
    assert rig.asked() == []
    await rig.look()
    for shard in (0, 1):
        (order,) = rig.asked(shard)
        assert order.offset_ms == -step_ms
        assert order.reason == "TIME stepped"
        assert order.evidence["stepped_ms"] == step_ms
        assert (order.evidence["authority_odd_for"], order.evidence["others"]) == (3, 3)
        rig.apply(shard)
    assert rig.counted == 2
    assert [(each["cause"], each["shard"], each["ms_moved"]) for each in rig.store.reconciliations] == [
        ("clock.corrected", "0", str(step_ms)),
        ("clock.corrected", "1", str(step_ms)),
    ]
    assert orjson.loads(rig.store.reconciliations[0]["evidence"]) == rig.asked()[0].evidence
    await rig.look(60)
    assert [len(rig.asked(shard)) for shard in (0, 1)] == [1, 1]
    assert rig.sync.verdict is Verdict.NONE


@pytest.mark.parametrize(("hindered", "other"), [(1, 0), (0, 1)])
async def test_shards_of_one_server_get_one_offset_also_in_different_looks(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, hindered: int, other: int
) -> None:
    """A shard whose first answer was slow is corrected later and measures 3 ms more; its clock is that of the other."""
    shard_clock = rig.store.shard_clock
    slower_ms = 60

    async def read(shard: int) -> ShardClock:
        shown = await shard_clock(shard)
        return replace(shown, time_us=shown.time_us - slower_ms * 1_000) if shard == hindered else shown

    monkeypatch.setattr(rig.store, "shard_clock", read)
    rig.authority.step(10_000)
    await rig.look()
    slower_ms = 3
    await rig.look(LOOKS - 1)
    assert [len(rig.asked(shard)) for shard in (other, hindered)] == [1, 0]
    rig.apply(other)
    await rig.look()
    assert [order.offset_ms for shard in (other, hindered) for order in rig.asked(shard)] == [-10_000, -10_000]
    assert rig.asked(hindered)[0].evidence["measured_ms"] == [-9_997] * LOOKS


async def test_the_way_back_is_corrected_too(rig: Rig) -> None:
    """When the date is mended, the offset goes; and when it is set wrong again in the same way, it comes again."""
    for n, by_ms in enumerate((10_000, -10_000, 10_000), start=1):
        rig.authority.step(by_ms)
        await rig.look(LOOKS + INTERVAL_NS // 10**9)
        assert len(rig.asked()) == n, "each is a new event, although it was asked for before"
        rig.apply(0)
        rig.apply(1)
        await rig.look(3)
    assert [order.offset_ms for order in rig.asked()] == [-10_000, 0, -10_000]


async def test_an_engine_that_is_away_finds_one(rig: Rig) -> None:
    """What is asked for again has the same name until it is applied; it is not counted again."""
    rig.authority.step(10_000)
    await rig.look(120)
    assert [len(rig.asked(shard)) for shard in (0, 1)] == [1, 1]
    assert (rig.counted, len(rig.store.reconciliations)) == (2, 2)


async def test_two_reconcilers_ask_for_one(rig: Rig) -> None:
    """They measure the same, and give it the same name."""
    other = ClockWatch(
        rig.store, rig.clock, rig.sync.witnesses, ClockBoard(rig.store, rig.machine, "reconciler", "two"),
        ReconcilerMetrics(CollectorRegistry()), shards=2,
    )  # fmt: skip
    rig.authority.step(10_000)
    for _ in range(LOOKS + 2):
        await rig.look()
        await other.look()
    assert len(rig.asked()) == 1


async def test_a_date_that_still_moves_is_waited_out(rig: Rig) -> None:
    """As long as it is slewed or set again and again nothing is asked for; once it rests, it is."""
    for _ in range(20):
        rig.authority.step(300)
        await rig.look()
    assert rig.asked() == []
    await rig.look(LOOKS)
    assert [order.offset_ms for order in rig.asked()] == [-6_000]


async def test_looks_that_are_not_in_a_row_do_not_add_up(rig: Rig) -> None:
    """A date that is wrong now and then, each time for less than four looks, is not corrected."""
    for _ in range(5):
        rig.authority.step(10_000)
        await rig.look(LOOKS - 1)
        rig.authority.step(-10_000)
        await rig.look(2)
    assert rig.asked() == []


async def test_never_more_than_one_in_ten_seconds(rig: Rig) -> None:
    """Whatever a broken clock does, a shard gets at most six corrections a minute."""
    for second in range(120):
        if second % 5 == 0:
            rig.authority.step(1_000)
        await rig.look()
        for shard in (0, 1):
            memory = rig.store.shards[shard]
            if len(rig.asked(shard)) > memory.corrections:
                rig.apply(shard)
    assert 2 <= len(rig.asked()) <= 12


def own_wall(rig: Rig) -> None:
    """This host's date is set."""
    rig.machine.step_wall(10_000)


def own_sleep(rig: Rig) -> None:
    """This host slept."""
    rig.machine.step_wall(10_000)
    rig.authority.step(10_000)
    rig.machine.slept_ms += 10_000


def drift(rig: Rig) -> None:
    """A step that is none."""
    rig.authority.step(249)


@pytest.mark.parametrize("fault", [own_wall, own_sleep, drift])
async def test_what_is_no_step_of_the_authority_is_not_corrected(rig: Rig, fault: Callable[[Rig], None]) -> None:
    """Neither this host's own date, nor its sleep, nor what is below the bound."""
    fault(rig)
    await rig.look(30)
    assert (rig.asked(), rig.counted) == ([], 0)


@pytest.mark.requirement("B1")
async def test_a_majority_that_finds_the_authority_right_is_heeded(rig: Rig) -> None:
    """Then it is this process that is wrong, and it says so; as soon as they agree with it, it acts."""
    rig.others = [Verdict.NONE, Verdict.NONE, Verdict.AUTHORITY]
    await rig.look(2)
    rig.authority.step(10_000)
    with capture_logs() as lines:
        await rig.look(12)
    assert rig.asked() == []
    assert {line["event"] for line in lines if line["log_level"] == "warning"} == {"clock_correction_withheld"}
    rig.others = [Verdict.NONE, Verdict.AUTHORITY, Verdict.AUTHORITY]
    await rig.look(LOOKS)
    assert len(rig.asked()) == 1


async def test_a_shard_that_was_left_behind_is_corrected_alone(rig: Rig) -> None:
    """One whose correction a failover took back, or on another node of a Cluster: what others say is of shard 0."""
    rig.others = [Verdict.NONE] * 3
    rig.store.shards[1].offset_ms = 5_000
    await rig.look(LOOKS)
    assert (rig.asked(0), [order.offset_ms for order in rig.asked(1)]) == ([], [0])


async def test_who_was_left_behind_gets_the_offset_of_who_is_in_order(rig: Rig) -> None:
    """Another reconciler has corrected the one shard by 3 ms less than is measured here: the other gets the same."""
    rig.store.shards[0].offset_ms = 3
    rig.store.shards[1].offset_ms = 5_000
    await rig.look(LOOKS)
    assert (rig.asked(0), [order.offset_ms for order in rig.asked(1)]) == ([], [3])
    assert rig.asked(1)[0].evidence["measured_ms"] != [3] * LOOKS


async def test_many_shards_are_read_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look reads so many, the next one the next ones, and every shard is corrected in the end."""
    monkeypatch.setattr(clock_watch, "SHARDS_PER_LOOK", 3)
    rig = await Rig(shards=8).begin()
    rig.authority.step(10_000)
    await rig.look(8 * (LOOKS + 1))
    assert [len(rig.asked(shard)) for shard in range(8)] == [1] * 8


async def test_a_full_intake_is_waited_out(rig: Rig) -> None:
    """It is logged, and asked for again after the interval."""
    rig.store._intake_max = 0
    rig.authority.step(10_000)
    with capture_logs() as lines:
        await rig.look(LOOKS + 2)
    assert "clock_correction_refused" in [line["event"] for line in lines]
    assert (rig.asked(), rig.counted) == ([], 0)
    rig.store._intake_max = 100
    await rig.look(INTERVAL_NS // 10**9)
    assert len(rig.asked()) == 1


async def test_a_store_that_is_away_is_said_once_a_look(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on, and looks again."""
    monkeypatch.setattr(clock_watch, "LOOK_EVERY_S", 0.0)
    answers = 0

    async def away(_shard: int) -> object:
        nonlocal answers
        answers += 1
        if answers == 3:
            raise KeyboardInterrupt
        raise StoreUnavailableError("away")

    monkeypatch.setattr(rig.store, "shard_clock", away)
    with capture_logs() as lines, pytest.raises(KeyboardInterrupt):
        await rig.watch.run()
    assert [line["event"] for line in lines] == ["clock_watch_waiting"] * 2
