"""Tests for gateway.replay: stretches that are shared, and turns."""

import asyncio

import pytest

from engine.store.protocol import UpdateEntry
from gateway import replay as replay_module
from gateway.replay import NOTHING, Greeting, Stretch, Stretches, Turns, is_too_much
from gateway.ring import Event
from gateway.room import Frame


def events(count: int, size: int = 10) -> list[Event]:
    """So many of one auction, of so many bytes each, all of them frames."""
    made = [Event(UpdateEntry(f"{number}-0", "bid.accepted", "a-1", 1, b"x" * size)) for number in range(1, count + 1)]
    for event in made:
        event.become(Frame(b"%d" % event.order[0], "0.{}-{}".format(*event.order)))
    return made


def payload(frame: Frame) -> bytes:
    """A form of a transport."""
    return frame.payload + b"\n"


# Stretches.


@pytest.mark.requirement("B4")
def test_a_stretch_is_joined_once_in_each_form() -> None:
    """However many sockets and event streams are sent it, they share the bytes."""
    stretch = Stretch(events(3))
    assert stretch.joined(payload) == b"1\n2\n3\n"
    assert stretch.joined(payload) is stretch.joined(payload)
    greeting = Greeting(Frame(b"snapshot"), True, stretch)
    assert b"".join(greeting.socket) == b"".join(frame.socket for frame in greeting)
    assert greeting.socket[1] is greeting.socket[1]
    assert [frame.payload for frame in greeting] == [b"snapshot", b"1", b"2", b"3"]


def test_what_cannot_be_read_is_left_out() -> None:
    """An entry that is no frame stops nothing."""
    some = events(3)
    some[1].become(None)
    assert Stretch(some).joined(payload) == b"1\n3\n"


def test_a_greeting_with_nothing_behind_it_is_one_frame() -> None:
    """Who missed nothing is written the snapshot and no more."""
    assert [len(Greeting(Frame(b"s"), True, NOTHING).socket), NOTHING.size, NOTHING.frames] == [1, 0, []]


@pytest.mark.requirement("B4")
def test_who_missed_the_same_is_given_the_same_stretch() -> None:
    """Whatever the cursor was: the events decide. Of another history they are others, though the ids be the same."""
    stretches = Stretches()
    some = events(4)
    assert stretches.of([]) is NOTHING
    whole = stretches.of(some.copy())
    assert stretches.of(some.copy()) is whole
    assert stretches.of(some[1:]) is not whole
    assert stretches.of(some[:3]) is not whole
    assert stretches.of(events(4)) is not whole
    assert stretches.of(some) is whole


def test_the_stretches_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number and by their bytes; those that nobody asked for the longest go first."""
    monkeypatch.setattr(replay_module, "STRETCHES_MAX", 3)
    monkeypatch.setattr(replay_module, "SHARED_BYTES_MAX", 100)
    stretches = Stretches()
    some = [events(2) for _ in range(4)]
    first, second = stretches.of(some[0]), stretches.of(some[1])
    stretches.of(some[2])
    assert stretches.of(some[0]) is first
    stretches.of(some[3])
    assert stretches.of(some[0]) is first
    assert stretches.of(some[1]) is not second
    large = stretches.of(events(7))
    assert (len(stretches._known), stretches._bytes) == (2, 90)
    assert stretches.of(large.events) is large


def test_what_is_too_much_is_remembered_and_takes_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never joined, so it weighs nothing; who asks again is told so without a look at each event."""
    monkeypatch.setattr(replay_module, "REPLAY_BYTES_MAX", 50)
    monkeypatch.setattr(replay_module, "SHARED_BYTES_MAX", 60)
    stretches = Stretches()
    small = stretches.of(events(5))
    much = stretches.of(events(6))
    assert [is_too_much(small.size), is_too_much(much.size)] == [False, True]
    assert stretches.of(much.events) is much
    assert stretches.of(small.events) is small


# Turns.


async def test_so_much_is_done_in_a_pass_and_the_rest_in_later_ones_in_order() -> None:
    """The last one of a pass may go over; who comes then waits behind those who wait already."""
    turns = Turns(10)
    done: list[tuple[int, int]] = []
    at = 0

    async def work(number: int, cost: int) -> None:
        await turns.taken(cost)
        done.append((number, at))

    tasks = [asyncio.ensure_future(work(number, cost)) for number, cost in enumerate([4, 4, 4, 30, 1, 1])]
    await asyncio.sleep(0)
    assert not turns.take(1), "nobody overtakes those who wait"
    while len(done) < 6:
        at += 1
        await asyncio.sleep(0)
    passes = [when for _, when in sorted(done)]
    assert [number for number, _ in done] == list(range(6))
    assert passes[0] == passes[1] == passes[2] < passes[3] < passes[4] == passes[5]
    await asyncio.gather(*tasks)


async def test_who_goes_away_while_it_waits_costs_nothing() -> None:
    """Its turn is the next one's."""
    turns = Turns(10)
    first, gone, stays, last = (asyncio.ensure_future(turns.taken(10)) for _ in range(4))
    await asyncio.sleep(0)
    assert first.done()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    while not stays.done():
        assert not last.done()
        await asyncio.sleep(0)
    await last
    assert gone.cancelled()
    assert not turns._waiting


async def test_an_idle_loop_is_not_kept_busy() -> None:
    """Turns are renewed while there is something to do, and then no more."""
    turns = Turns(10)
    assert turns.take(3)
    assert turns._renewing
    await asyncio.sleep(0)
    assert not turns._renewing
    assert turns.take(10)
