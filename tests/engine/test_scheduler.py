"""Tests for engine.scheduler: what it proposes when, what it says on the tick lane, on hostile clocks and virtual time."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import orjson
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine import scheduler as scheduler_module
from engine.clock import AuctionClock
from engine.contract.keys import shard_of
from engine.contract.timers import Holding, TimerRecord
from engine.domain.auction import Auction, Registration
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Policy
from engine.metrics import EngineMetrics
from engine.pace import REALTIME, Pace
from engine.scheduler import Scheduler
from engine.store.protocol import StoreUnavailableError
from tests.fakes.clock import Authority, ManualClock, Timeline
from tests.fakes.loop import run
from tests.fakes.world import at, passes

INSTANCE: Final = "engine-1"


@dataclass
class HeldShard:
    """As much of a shard as the scheduler sees."""

    epoch: int
    now_ms: Callable[[], int]
    live: dict[str, TimerRecord] = field(default_factory=dict)
    fell_due: list[tuple[int, str]] = field(default_factory=list)
    """When each auction was proposed."""

    def holding(self) -> Holding:
        """See `Shard`."""
        return Holding(len(self.live), 12, 0xBEEF)

    def fall_due(self, auction_ids: list[str]) -> None:
        """See `Shard`."""
        self.fell_due += [(self.now_ms(), auction_id) for auction_id in auction_ids]


class Rig:
    """A scheduler on a machine of its own, and everything it publishes."""

    def __init__(self, *, shards: int = 1, drift_ppm: int = 0, seed: int = 1, pace: Pace = REALTIME) -> None:
        self.line = Timeline()
        self.authority = Authority(self.line)
        machine = ManualClock(self.line, seed=seed, drift_ppm=drift_ppm)
        self.clock = AuctionClock(machine)
        self.machine = machine
        self.keep_in_step()
        self.registry = CollectorRegistry()
        self.shards = {number: HeldShard(7 + number, lambda: self.authority.now_ms) for number in range(shards)}
        self.published: list[tuple[int, int, bytes]] = []
        """When which line was published for which shard."""
        self.publish_fails = False
        self.publish_takes_ms = 0.0
        self.scheduler = Scheduler(
            self.clock,
            self,  # type: ignore[arg-type]
            self.shards,  # type: ignore[arg-type]
            shard_count=shards,
            instance=INSTANCE,
            metrics=EngineMetrics(self.registry),
            pace=pace,
        )

    def keep_in_step(self) -> None:
        """One sample of the authority, without delay."""
        now = self.machine.monotonic_ns()
        self.clock.observe(now, now, self.authority())

    async def publish(self, lines: Mapping[int, bytes]) -> None:
        """See `ShardStore`."""
        await passes(self.publish_takes_ms / 1_000)
        if self.publish_fails:
            raise StoreUnavailableError("away")
        for shard, rows in lines.items():
            self.published += [(self.authority.now_ms, shard, row) for row in rows.split(b"\n")]

    def hold(self, record: TimerRecord, *, tick_now: bool = False) -> None:
        """An auction is as it is now, as a commit would say."""
        auction = record.auction
        shard = self.shards[shard_of(auction.auction_id, len(self.shards))]
        if auction.status.is_terminal:
            shard.live.pop(auction.auction_id, None)
        else:
            shard.live[auction.auction_id] = record
        self.scheduler.enter([record], tick_now=tick_now)

    def play(self, seconds: float, during: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Let the scheduler run for some seconds."""

        async def scenario() -> None:
            task = asyncio.create_task(self.scheduler.run())
            if during is not None:
                await during()
            await passes(seconds)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        run(self.line, scenario)

    def ticks(self, auction_id: str) -> list[tuple[int, dict[str, Any]]]:
        """When an auction ticked, and what the tick said."""
        found = []
        for when, _, line in self.published:
            name, version, frame = line.split(b" ", 2)
            if name == auction_id.encode():
                read = orjson.loads(frame)
                assert read["version"] == int(version)
                found.append((when, read))
        return found

    def fell_due(self) -> list[tuple[int, str]]:
        """When each auction was proposed."""
        return [due for shard in self.shards.values() for due in shard.fell_due]


def auction(auction_id: str, status: Status, ends_s: float, *, starts_s: float = 0, **policy: Any) -> TimerRecord:
    """An auction in this status."""
    registration = Registration(auction_id, at(starts_s), at(ends_s), Policy(**policy))
    paused: dict[str, Any] = {}
    if status is Status.PAUSED:
        paused = {"paused_at": at(1), "paused_from": Status.ACTIVE}
    if status is Status.ENDED:
        paused = {"ended_at": at(ends_s)}
    return TimerRecord(Auction(auction_id, status, 3, registration, at(ends_s), **paused), "trace-1", "req-1")


# What is due.


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("drift_ppm", [-100, 0, 100])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_proposed_before_it_is_due(seed: int, drift_ppm: int) -> None:
    """Although its sleeps end up to a millisecond early, on a clock that drifts: never before, and within 10 ms after."""
    rig = Rig(seed=seed, drift_ppm=drift_ppm)
    due_s = {"start": 1.5, "window": 2.003, "close": 2.003, "later": 7.777}
    rig.hold(auction("start", Status.SCHEDULED, 900, starts_s=1.5))
    rig.hold(auction("window", Status.ACTIVE, 3.003, soft_close_window_ms=1_000))
    rig.hold(auction("close", Status.CLOSING, 2.003))
    rig.hold(auction("later", Status.CLOSING, 7.777))
    rig.hold(auction("paused", Status.PAUSED, 3))
    rig.play(20)
    proposed = {auction_id: when for when, auction_id in rig.fell_due()}
    assert set(proposed) == set(due_s)
    for auction_id, when in proposed.items():
        # 100 ppm of 8 s is 0.8 ms: so far the clock itself may be ahead.
        assert at(due_s[auction_id]) - 1 <= when <= at(due_s[auction_id]) + 10
    assert len(rig.fell_due()) == len(due_s), "each once: what follows is entered by the commit"


def test_what_is_overdue_is_proposed_at_once() -> None:
    """After a restart everything that is past comes in the first pass, the earliest first."""
    rig = Rig()
    rig.line.advance(60_000)
    rig.keep_in_step()
    for number in range(5):
        rig.hold(auction(f"a-{number}", Status.CLOSING, 50 - number))
    rig.play(0.001)
    assert rig.fell_due() == [(at(60), f"a-{number}") for number in reversed(range(5))]


def test_a_change_wakes_the_scheduler() -> None:
    """It sleeps towards a far deadline when a nearer one is entered: that one is not missed."""
    rig = Rig()
    rig.hold(auction("far", Status.CLOSING, 600, tick_interval_ms=15_000))

    async def later() -> None:
        await passes(5.5)
        rig.hold(auction("near", Status.CLOSING, 5.6))

    rig.play(3, later)
    assert [(auction_id, when - at(5.6) < 10) for when, auction_id in rig.fell_due()] == [("near", True)]


def test_a_moved_deadline_is_due_once_at_its_new_place() -> None:
    """The old place is forgotten, whether the end was moved back or forth, or dropped by a pause."""
    rig = Rig()
    rig.hold(auction("later", Status.CLOSING, 5))
    rig.hold(auction("sooner", Status.CLOSING, 50))
    rig.hold(auction("paused", Status.CLOSING, 6))
    rig.hold(auction("over", Status.CLOSING, 7))

    async def change() -> None:
        await passes(2)
        rig.hold(auction("later", Status.CLOSING, 20))
        rig.hold(auction("sooner", Status.CLOSING, 10))
        rig.hold(auction("paused", Status.PAUSED, 6))
        rig.hold(auction("over", Status.ENDED, 7))

    rig.play(60, change)
    assert [(auction_id, when) for when, auction_id in rig.fell_due()] == [("sooner", at(10)), ("later", at(20))]


def test_an_auction_is_looked_at_again_when_asked() -> None:
    """After "too early by n ms" the shard names the instant."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 5))

    async def early() -> None:
        await passes(5.001)
        assert len(rig.fell_due()) == 1
        rig.scheduler.wake_at("a", at(5.204))

    rig.play(5, early)
    assert [when for when, _ in rig.fell_due()] == [at(5), at(5.204)]


def test_each_shard_gets_its_own() -> None:
    """Auctions fall due for the shard they live in; those of a shard that is not ours are left alone."""
    rig = Rig(shards=4)
    names = [f"a-{number}" for number in range(40)]
    for name in names:
        rig.hold(auction(name, Status.CLOSING, 3))
    given_up = rig.shards.pop(2)
    rig.play(5)
    for number, shard in rig.shards.items():
        assert sorted(name for _, name in shard.fell_due) == sorted(
            name for name in names if shard_of(name, 4) == number
        )
    assert given_up.fell_due == []


def test_a_lost_shard_is_forgotten() -> None:
    """Nothing of it is proposed or ticks any more."""
    rig = Rig(shards=2)
    names = [f"a-{number}" for number in range(10)]
    for name in names:
        rig.hold(auction(name, Status.CLOSING, 3))
    rig.scheduler.forget(rig.shards[1])  # type: ignore[arg-type]
    rig.play(5)
    assert rig.shards[1].fell_due == []
    kept = [name for name in names if shard_of(name, 2) == 0]
    assert {name for name in names if rig.ticks(name)} == set(kept)


def test_a_crowd_at_one_instant_is_proposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """More auctions than one pass takes have one deadline: none is left behind."""
    monkeypatch.setattr(scheduler_module, "PASS_MAX", 10)
    rig = Rig()
    for number in range(35):
        rig.hold(auction(f"a-{number:02}", Status.CLOSING, 3))
    rig.play(4)
    assert len(rig.fell_due()) == 35
    assert all(at(3) <= when <= at(3) + 10 for when, _ in rig.fell_due())


# Ticks.


@pytest.mark.requirement("R4")
def test_ticks_are_locked_to_the_remaining_time() -> None:
    """Over 20 minutes: at every multiple of the step, so that every viewer's digits flip together, and never 15 s apart."""
    rig = Rig()
    rig.hold(auction("a", Status.ACTIVE, 1_200.4))
    rig.play(1_300)
    ticks = rig.ticks("a")
    remaining = [round(tick["remaining_ms"] / 1_000, 1) for _, tick in ticks]
    whole = [round(seconds) for seconds in remaining]
    assert all(abs(exact - rounded) <= 0.011 for exact, rounded in zip(remaining, whole, strict=True))
    assert whole[:41] == list(range(1_200, 599, -15))
    assert whole[41:149] == list(range(595, 59, -5))
    assert whole[149:] == list(range(59, 0, -1))
    times = [when for when, _ in ticks]
    assert max(later - earlier for earlier, later in pairwise(times)) <= 15_010


@pytest.mark.requirement("R4")
def test_a_policy_can_ask_for_more_ticks() -> None:
    """Its interval shortens the steps."""
    rig = Rig()
    rig.hold(auction("a", Status.ACTIVE, 900, tick_interval_ms=250))
    rig.play(10.1)
    assert len(rig.ticks("a")) == 40


@pytest.mark.requirement("R4")
def test_a_tick_says_how_the_timer_stands() -> None:
    """The frame is the `timer.tick` of the contract, with the server's time and the auction's own trace."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 30))
    rig.play(1.5)
    (_, tick), *_ = rig.ticks("a")
    assert {
        *("type", "auction_id", "server_time", "trace_id", "status", "version", "ends_at", "remaining_ms"),
        *("soft_close_until", "final_deadline", "extension_count", "extension_left_ms", "at_cap"),
    } <= set(tick)
    assert (tick["type"], tick["status"], tick["trace_id"]) == ("timer.tick", "CLOSING", "trace-1")
    assert tick["remaining_ms"] == tick["ends_at"] - tick["server_time"]


@pytest.mark.requirement("R4")
def test_a_change_ticks_at_once_and_locks_the_phase_again() -> None:
    """After an extension the first tick tells of it immediately, the next ones follow the new remaining time."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 100.2))

    async def extend() -> None:
        await passes(7.7)
        record = auction("a", Status.CLOSING, 130.9)
        rig.hold(replace(record, auction=replace(record.auction, version=4)), tick_now=True)

    rig.play(10, extend)
    changed = [(when, tick["ends_at"]) for when, tick in rig.ticks("a") if tick["version"] == 4]
    assert changed[0] == (at(7.7), at(130.9))
    assert [round((ends_at - when) / 1_000) for when, ends_at in changed[1:]] == [120, 115]


def test_loading_does_not_tick_at_once() -> None:
    """A hundred thousand auctions that are loaded do not all tick in that instant."""
    rig = Rig()
    for number in range(20):
        rig.hold(auction(f"a-{number}", Status.ACTIVE, 1_000 + number / 4))
    rig.play(0.1)
    assert [line for _, _, line in rig.published if not line.startswith(b"!")] == []


@pytest.mark.requirement("R4")
def test_a_paused_auction_ticks_with_its_frozen_time() -> None:
    """Its viewers must know that the silence is not a fault."""
    rig = Rig()
    rig.hold(auction("a", Status.PAUSED, 301))
    rig.play(61)
    ticks = rig.ticks("a")
    assert len(ticks) == 4
    assert {tick["remaining_ms"] for _, tick in ticks} == {300_000}


@pytest.mark.requirement("R27")
def test_an_auction_that_is_over_does_not_tick() -> None:
    """After the close, or the cancellation, not one tick more; nor between the deadline and its commit."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 5))
    rig.hold(auction("slow", Status.CLOSING, 5))

    async def close() -> None:
        await passes(5.05)
        rig.hold(auction("a", Status.ENDED, 5), tick_now=True)

    rig.play(60, close)
    for name in ("a", "slow"):
        assert [when for when, _ in rig.ticks(name)] == [at(1), at(2), at(3), at(4)]


def test_a_scheduler_that_stalled_over_a_deadline_does_not_tick_for_it() -> None:
    """The ticks it missed were before the end; after it only the close is news."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 5))
    rig.hold(auction("b", Status.CLOSING, 50))

    async def stall() -> None:
        await passes(3.5)
        rig.line.advance(2_000)

    rig.play(3, stall)
    assert [when for when, _ in rig.ticks("a")] == [at(1), at(2), at(3)]
    assert [when for when, _ in rig.ticks("b")] == [at(1), at(2), at(3), at(5.5), at(6), at(7), at(8)]
    assert [auction_id for _, auction_id in rig.fell_due()] == ["a"]


def test_ticks_of_a_shard_travel_together() -> None:
    """One message per shard and pass, a line for each auction."""
    rig = Rig(shards=2)
    for number in range(10):
        rig.hold(auction(f"a-{number}", Status.CLOSING, 30))
    messages: list[Mapping[int, bytes]] = []
    publish = rig.publish

    async def noting(lines: Mapping[int, bytes]) -> None:
        messages.append(lines)
        await publish(lines)

    rig.publish = noting  # type: ignore[method-assign]
    rig.play(1.5)
    with_ticks = [lines for lines in messages if any(b"timer.tick" in rows for rows in lines.values())]
    assert len(with_ticks) == 1
    assert sum(rows.count(b"timer.tick") for rows in with_ticks[0].values()) == 10
    for number, rows in with_ticks[0].items():
        assert all(
            shard_of(row.split()[0].decode(), 2) == number for row in rows.split(b"\n") if not row.startswith(b"!")
        )


def test_a_crowd_of_ticks_is_sent_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ticks than one pass takes are due at one instant: the loop yields in between, and all are sent then."""
    monkeypatch.setattr(scheduler_module, "PASS_MAX", 10)
    rig = Rig()
    for number in range(35):
        rig.hold(auction(f"a-{number:02}", Status.CLOSING, 30))
    rig.play(1.5)
    sent = [when for number in range(35) for when, _ in rig.ticks(f"a-{number:02}")]
    assert len(sent) == 35
    assert all(at(1) <= when <= at(1) + 10 for when in sent)


# The heartbeat.


def test_rounds_of_ticks_can_be_far_apart() -> None:
    """What an engine does in a simulated week: ticks wait for the next round, and say what is true then; deadlines do not."""
    rig = Rig(pace=Pace(tick_round_ms=10_000))
    rig.hold(auction("a", Status.CLOSING, 35.5, tick_interval_ms=1_000))
    rig.hold(auction("b", Status.CLOSING, 900))
    rig.play(36)
    ticks = rig.ticks("a")
    assert len(ticks) == 4
    assert all(after - before >= 10_000 for (before, _), (after, _) in pairwise(ticks))
    assert all(0 <= when - frame["server_time"] <= 10 for when, frame in ticks)
    assert rig.ticks("b")
    ((proposed_at, _),) = rig.fell_due()
    assert at(35.5) - 1 <= proposed_at <= at(35.5) + 10


def test_every_shard_has_a_heartbeat_each_second() -> None:
    """A line that is no tick, with the engine's name and the fencing epoch, also when there is no auction at all."""
    rig = Rig(shards=3)
    rig.play(10.5)
    for number in range(3):
        beats = [(when, line) for when, shard, line in rig.published if shard == number]
        assert len(beats) == 11
        for when, line in beats:
            mark, instance, epoch, live, seq, digest, server_time = line.split()
            assert (mark, instance, int(epoch)) == (b"!", INSTANCE.encode(), 7 + number)
            assert (live, seq, digest) == (b"0", b"12", b"beef")
            assert int(server_time) == when
        gaps = [later - earlier for (earlier, _), (later, _) in pairwise(beats)]
        assert all(1_000 <= gap <= 1_010 for gap in gaps)


def test_a_clock_that_is_set_back_does_not_silence_the_heartbeat() -> None:
    """An engine whose clock was an hour ahead is heard each second, and not an hour later."""
    rig = Rig()

    async def set_back() -> None:
        await passes(3)
        rig.authority.step(-3_600_000)
        now = rig.machine.monotonic_ns()
        rig.clock.adopt(now, now, rig.authority())

    rig.play(7.5, during=set_back)
    assert len(rig.published) >= 10


def test_an_engine_without_shards_says_nothing() -> None:
    """Nobody hears a heartbeat for a shard that nobody holds."""
    rig = Rig()
    rig.shards.clear()
    rig.play(5)
    assert rig.published == []


# A store that is away, or slow.


@pytest.mark.requirement("R16")
def test_ticks_are_disposable() -> None:
    """While the store is away ticks are lost, nothing piles up, deadlines are proposed all the same; then ticks go on."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 40))
    rig.hold(auction("b", Status.CLOSING, 8))
    rig.publish_fails = True

    async def back() -> None:
        await passes(10.5)
        rig.publish_fails = False

    with capture_logs() as lines:
        rig.play(5, back)
    assert {line["event"] for line in lines} == {"ticks_not_sent"}
    assert [when for when, _ in rig.ticks("a")] == [at(second) for second in (11, 12, 13, 14, 15)]
    assert [(auction_id, when) for when, auction_id in rig.fell_due()] == [("b", at(8))]
    assert rig.registry.get_sample_value("auctions_timer_tick_delay_ms_count") == 5


def test_tick_delay_is_measured() -> None:
    """From the instant a tick was due to the instant it was handed to the store."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 30))
    rig.publish_takes_ms = 7
    rig.play(2.5)
    assert rig.registry.get_sample_value("auctions_timer_tick_delay_ms_count") == 2
    total = rig.registry.get_sample_value("auctions_timer_tick_delay_ms_sum")
    assert total is not None
    assert 14 <= total <= 16


def test_a_wake_up_that_comes_during_a_pass_is_not_lost() -> None:
    """A deadline entered while ticks are on their way to the store is due at its time."""
    rig = Rig()
    rig.hold(auction("a", Status.CLOSING, 30))
    rig.publish_takes_ms = 40

    async def meanwhile() -> None:
        await passes(1.02)
        rig.hold(auction("b", Status.CLOSING, 1.05))

    rig.play(3, meanwhile)
    ((when, auction_id),) = rig.fell_due()
    assert auction_id == "b"
    assert at(1.05) <= when <= at(1.08)


def test_the_scheduler_looks_again_at_least_once_a_second() -> None:
    """No single timer is trusted: even with nothing due and the wake-up lost, a second later it looks."""
    rig = Rig()
    looked: list[EpochMs] = []
    propose = rig.scheduler._propose_due

    def noting(now: EpochMs) -> None:
        looked.append(now)
        propose(now)

    rig.scheduler._propose_due = noting  # type: ignore[method-assign]

    async def lose_the_wake_up() -> None:
        await passes(3.2)
        rig.scheduler._dues.set("a", at(3.5))  # as if `wake` had never been set

    rig.hold(auction("a", Status.PAUSED, 900))
    rig.play(5, lose_the_wake_up)
    assert max(later - earlier for earlier, later in pairwise(looked)) <= 1_010
    assert [auction_id for _, auction_id in rig.fell_due()] == ["a"]
