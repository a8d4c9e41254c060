"""Tests for gateway.stale: ticks from memory while nobody sends any."""

import asyncio
from itertools import pairwise
from typing import Any

import orjson
import pytest

from engine.clock import AuctionClock
from engine.contract.keys import shard_of
from engine.contract.timers import heartbeat_line, tick_line
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from gateway.stale import ENGINE_SILENCE_MAX_MS, LOOK_EVERY_S, StaleTicks
from tests.fakes.clock import BORN_MS, ManualClock
from tests.fakes.loop import run
from tests.gateway.house import AUCTION, House, Listener, record, told

MINUTE_MS = 60_000


async def watched(house: House, auction_id: str = AUCTION, **changes: Any) -> Listener:
    """Somebody who watches an auction that exists."""
    house.put(record(auction_id, **changes))
    room = await house.hub.room(auction_id)
    assert room is not None
    listener = Listener()
    room.writable.add(listener)
    return listener


def heard(house: House, shard: int = 0) -> None:
    """The engine of a shard is heard now."""
    house.hub.on_ticks(shard, heartbeat_line("engine-1", 1, house.authority.now_ms))


def looks(house: House, stale: StaleTicks, count: int) -> None:
    """So many looks, a second apart."""
    for _ in range(count):
        house.line.advance(LOOK_EVERY_S * 1_000)
        stale.look()


def away(house: House) -> StaleTicks:
    """The event lane is out of reach."""
    house.hub.stale = lambda: True
    return StaleTicks(house.hub)


@pytest.mark.requirement("R16")
async def test_a_tick_from_memory_says_what_is_known_and_that_it_may_be_old() -> None:
    """It has every field of the engine's tick, the time of now, and `stale`."""
    house = House()
    listener = await watched(house, version=4, ends_at=BORN_MS + MINUTE_MS, extension_count=2)
    house.line.advance(12_345)
    away(house).look()
    (tick,) = told(listener.sent)
    now = house.authority.now_ms
    real = orjson.loads(
        tick_line(
            record(version=4, ends_at=BORN_MS + MINUTE_MS, extension_count=2),
            now,
        ).split(b" ", 2)[2]
    )
    assert tick == {**tick, **real}
    assert (tick["stale"], tick["remaining_ms"], tick["server_time"]) == (True, MINUTE_MS - 12_345, BORN_MS + 12_345)


@pytest.mark.requirement("R4", "R16")
@pytest.mark.parametrize(
    ("remaining_ms", "step_s"), [(3_600_000, 15), (9 * MINUTE_MS, 5), (50_000, 1), (0, 1), (-5_000, 1)]
)
async def test_the_cadence_is_that_of_the_engine(remaining_ms: int, step_s: int) -> None:
    """Every 15 s, every 5 s in the last ten minutes, every second in the last one; never faster, whatever a look does."""
    house = House()
    listener = await watched(house, ends_at=BORN_MS + remaining_ms)
    stale = away(house)
    at: list[int] = []
    for _ in range(30):
        house.line.advance(LOOK_EVERY_S * 1_000)
        for _ in range(2):
            stale.look()
            at += [frame["server_time"] for frame in told(listener.sent)]
            listener.sent.clear()
    assert len(at) == 30 // step_s
    assert {later - earlier for earlier, later in pairwise(at)} == {step_s * 1_000}


async def test_looks_that_come_a_little_early_or_late_keep_the_cadence() -> None:
    """A loop under load looks 300 ms off its second: no tick of the last minute is left out for it."""
    house = House()
    listener = await watched(house, ends_at=BORN_MS + 50_000)
    stale = away(house)
    for ms in (1_000, 700, 1_300, 700, 700, 1_300, 1_000):
        house.line.advance(ms)
        stale.look()
    assert len(listener.sent) == 7


@pytest.mark.requirement("B1", "R16")
@pytest.mark.parametrize("status", [Status.SCHEDULED, Status.ACTIVE, Status.CLOSING])
async def test_a_deadline_that_passes_unheard_is_never_called_an_end(status: Status) -> None:
    """Only the engine ends an auction: at zero the ticks go on, with nothing left and the status that is known."""
    house = House()
    listener = await watched(house, status=status, ends_at=BORN_MS + 2_000)
    over: list[object] = []
    house.hub.on_over = over.append
    looks(house, away(house), 10)
    ticks = told(listener.sent)
    assert [tick["remaining_ms"] for tick in ticks] == [1_000, *[0] * 9]
    assert {tick["status"] for tick in ticks} == {status.value}
    assert over == []


@pytest.mark.parametrize("status", [Status.ENDED, Status.CANCELLED])
async def test_an_auction_that_is_over_ticks_no_more(status: Status) -> None:
    """Its watchers wait for their farewell, not for time."""
    house = House()
    listener = await watched(house, status=status)
    looks(house, away(house), 20)
    assert listener.sent == []


async def test_a_paused_auction_stands_still() -> None:
    """Its watchers are told that somebody is there; the time that is left does not change."""
    house = House()
    listener = await watched(
        house,
        status=Status.PAUSED,
        ends_at=BORN_MS + 120_000,
        paused_at=EpochMs(BORN_MS),
        paused_from=Status.ACTIVE,
    )
    looks(house, away(house), 61)
    ticks = told(listener.sent)
    assert len(ticks) > 4
    assert {(tick["status"], tick["remaining_ms"], tick["stale"]) for tick in ticks} == {("PAUSED", 120_000, True)}


async def test_while_everybody_is_heard_nothing_is_said() -> None:
    """A quiet auction with a live engine and a live lane has no ticks but the engine's own."""
    house = House()
    listener = await watched(house)
    stale = StaleTicks(house.hub)
    for _ in range(30):
        heard(house)
        looks(house, stale, 2)
    assert listener.sent == []


@pytest.mark.requirement("R16")
async def test_only_the_rooms_of_a_silent_engine_tick_from_memory() -> None:
    """Shards have engines of their own: where one is heard, nothing is marked stale."""
    house = House(shards=2)
    names = {shard_of(name, 2): name for name in (f"x-{number}" for number in range(9))}
    silent, live = await watched(house, names[0]), await watched(house, names[1])
    stale = StaleTicks(house.hub)
    heard(house, 0)
    for _ in range(ENGINE_SILENCE_MAX_MS // 1_000):
        heard(house, 1)
        looks(house, stale, 1)
    assert silent.sent == [], "it may still come"
    heard(house, 1)
    looks(house, stale, 1)
    assert [tick["stale"] for tick in told(silent.sent)] == [True]
    assert live.sent == []


@pytest.mark.requirement("R16")
async def test_it_heals_as_soon_as_the_engine_is_heard() -> None:
    """The next tick is the engine's, without the mark; the next silence starts anew, at once."""
    house = House()
    listener = await watched(house)
    stale = StaleTicks(house.hub)
    heard(house)
    looks(house, stale, 10)
    assert len(listener.sent) == 1
    heard(house)
    house.hub.on_ticks(0, tick_line(record(), house.authority.now_ms))
    looks(house, stale, 3)
    assert [tick.get("stale") for tick in told(listener.sent)] == [True, None]
    looks(house, stale, 1)
    assert [tick.get("stale") for tick in told(listener.sent)] == [True, None, True]


@pytest.mark.requirement("R16")
async def test_an_engine_that_was_never_heard_is_silent_too() -> None:
    """A gateway that starts while no engine runs: its watchers see the countdown, marked, after the same time."""
    house = House()
    listener = await watched(house)
    stale = StaleTicks(house.hub)
    stale.look()
    looks(house, stale, ENGINE_SILENCE_MAX_MS // 1_000)
    assert listener.sent == [], "it may still come"
    looks(house, stale, 1)
    assert [tick["stale"] for tick in told(listener.sent)] == [True]


async def test_an_event_that_came_meanwhile_is_what_the_next_tick_says() -> None:
    """Ticks from memory never go back behind the event lane."""
    house = House()
    listener = await watched(house, ends_at=BORN_MS + 50_000)
    stale = away(house)
    stale.look()
    house.announce("timer.extended", record(version=7, ends_at=BORN_MS + 55_000))
    await house.read_lane()
    looks(house, stale, 1)
    assert [(frame["type"], frame.get("version")) for frame in told(listener.sent)] == [
        ("timer.tick", 2),
        ("timer.extended", None),
        ("timer.tick", 7),
    ]


async def test_nobody_is_ticked_to_who_is_not_there() -> None:
    """Rooms that nobody watches cost nothing, and who has left is remembered nowhere."""
    house = House()
    listener = await watched(house)
    stale = away(house)
    stale.look()
    room = house.hub.known(AUCTION)
    assert room is not None
    room.writable.clear()
    looks(house, stale, 20)
    assert len(listener.sent) == 1
    assert stale._sent_at == {}


async def test_without_a_clock_nothing_is_said() -> None:
    """Before the auction clock is in step nobody knows how much time is left."""
    house = House()
    listener = await watched(house)
    house.hub.clock = AuctionClock(ManualClock(house.line))
    away(house).look()
    assert listener.sent == []


@pytest.mark.requirement("R16")
def test_it_looks_by_itself() -> None:
    """`run` sends a tick a second in the last minute, until it is cancelled."""
    house = House()

    async def scenario() -> None:
        listener = await watched(house, ends_at=BORN_MS + 50_000)
        running = asyncio.create_task(away(house).run())
        await asyncio.sleep(5.5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert len(listener.sent) == 5

    run(house.line, scenario)
