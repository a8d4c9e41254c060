"""Tests for gateway.fanout: turns, chunks, queues, conflation, relief."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import fanout as fanout_module
from gateway.closing import CloseCode
from gateway.fanout import STREAM_WRITES, TURN, Fanout
from gateway.room import Frame, Room
from tests.gateway.house import Listener, payload, split


def crowd(room: Room, count: int, *, lagging: bool = False) -> list[Listener]:
    """So many who watch a room from now on."""
    listeners = [Listener() for _ in range(count)]
    (room.lagging if lagging else room.writable).update(listeners)
    return listeners


def framed(payload: bytes) -> bytes:
    return Frame(payload).socket


def got(listeners: list[Listener]) -> int:
    """How many of them were written something."""
    return sum(bool(listener.sent) for listener in listeners)


async def passes(fanout: Fanout, until: Callable[[], bool] | None = None) -> int:
    """Let passes of the event loop run until something holds, or nothing is left to send; how many it took."""
    count = 0
    while fanout._passing and not (until is not None and until()):
        await asyncio.sleep(0)
        count += 1
        assert count < 100_000
    return count


def counting() -> tuple[Fanout, list[int]]:
    """A fan-out, and the ticks that it has conflated."""
    conflated: list[int] = []
    return Fanout(conflated.append), conflated


def give(room: Room, frame: Frame, *, is_tick: bool) -> None:
    """Send one frame to a room that is not crowded."""
    fanout, _ = counting()
    fanout.send(room, frame, is_tick=is_tick)
    fanout.write()


# Lanes.


@pytest.mark.requirement("B3")
async def test_an_event_goes_to_everyone_in_the_lane_each_can_take() -> None:
    """Writable subscribers get it at once, lagging ones keep it."""
    room = Room("a-1", 0)
    quick, slow = crowd(room, 2), crowd(room, 2, lagging=True)
    give(room, Frame(b"e"), is_tick=False)
    assert [listener.sent for listener in quick] == [[framed(b"e")]] * 2
    assert [listener.kept for listener in slow] == [[framed(b"e")]] * 2
    assert not any(listener.kept for listener in quick)
    assert not any(listener.sent for listener in slow)


class Stalling(Listener):
    """A subscriber whose transport asks to pause in the middle of a write, as asyncio's and uvloop's do."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room = room

    def send(self, data: bytes) -> None:
        super().send(data)
        self.room.writable.discard(self)
        self.room.lagging.add(self)


@pytest.mark.requirement("B3")
async def test_a_subscriber_that_starts_to_lag_during_a_write_gets_the_event_once() -> None:
    """The event that fills a transport was taken by it: it is not kept for later as well."""
    room = Room("a-1", 0)
    stalling = Stalling(room)
    room.writable.add(stalling)
    give(room, Frame(b"e1"), is_tick=False)
    give(room, Frame(b"e2"), is_tick=False)
    assert (stalling.sent, stalling.kept) == ([framed(b"e1")], [framed(b"e2")])


async def test_a_subscriber_that_starts_to_lag_during_a_write_gets_the_tick_once() -> None:
    """The same for a tick: its slot stays free for a newer one."""
    room = Room("a-1", 0)
    stalling = Stalling(room)
    room.writable.add(stalling)
    give(room, Frame(b"t1"), is_tick=True)
    assert (stalling.sent, stalling.ticks) == ([framed(b"t1")], [])


async def test_a_subscriber_may_leave_while_everyone_is_told() -> None:
    """One that goes away because of the event itself disturbs nobody else."""
    room = Room("a-1", 0)

    class Leaving(Listener):
        def send(self, data: bytes) -> None:
            super().send(data)
            room.writable.discard(self)

        def keep_event(self, frame: bytes) -> None:
            super().keep_event(frame)
            room.lagging.discard(self)

    quick, slow = [Leaving() for _ in range(5)], [Leaving() for _ in range(5)]
    room.writable |= set(quick)
    room.lagging |= set(slow)
    give(room, Frame(b"e"), is_tick=False)
    assert [listener.sent for listener in quick] == [[framed(b"e")]] * 5
    assert [listener.kept for listener in slow] == [[framed(b"e")]] * 5
    assert not room.is_watched


async def test_a_frame_is_framed_once_however_many_it_goes_to() -> None:
    """Ten thousand sockets share the same bytes."""
    frame = Frame(b"e")
    assert frame.socket is frame.socket
    room = Room("a-1", 0)
    quick, slow = crowd(room, 3), crowd(room, 3, lagging=True)
    give(room, frame, is_tick=False)
    assert all(listener.sent[0] is frame.socket for listener in quick)
    assert all(listener.kept[0] is frame.socket for listener in slow)


async def test_frames_that_come_together_go_out_in_one_write() -> None:
    """A bid is two events and a tick: one write to each socket, and to who lags each frame in its lane."""
    fanout, conflated = counting()
    room = Room("a-1", 0)
    quick, slow = crowd(room, 3), crowd(room, 2, lagging=True)
    done: list[str] = []
    fanout.send(room, Frame(b"t1"), is_tick=True)
    fanout.send(room, Frame(b"e1"), is_tick=False, done=lambda: done.append("e1"))
    fanout.send(room, Frame(b"e2"), is_tick=False, done=lambda: done.append("e2"))
    fanout.send(room, Frame(b"t2"), is_tick=True)
    fanout.write()
    assert [(one.writes, one.sent) for one in quick] == [(1, [framed(b"e1"), framed(b"e2"), framed(b"t2")])] * 3
    assert [(one.kept, one.ticks) for one in slow] == [([framed(b"e1"), framed(b"e2")], [framed(b"t2")])] * 2
    assert (done, conflated) == (["e1", "e2"], [5])


async def test_who_came_between_two_frames_is_sent_the_second_only() -> None:
    """The first is part of the snapshot of whoever joins behind it, though nothing was written yet."""
    fanout, _ = counting()
    room = Room("a-1", 0)
    (was_here,) = crowd(room, 1)
    fanout.send(room, Frame(b"e1"), is_tick=False)
    (joins,) = crowd(room, 1)
    fanout.send(room, Frame(b"e2"), is_tick=False)
    fanout.write()
    assert (was_here.sent, joins.sent) == ([framed(b"e1"), framed(b"e2")], [framed(b"e2")])


async def test_a_frame_catches_up_with_the_one_that_is_half_way() -> None:
    """A tick behind a bid: who has not been written the bid gets both in one write, the others the tick in a second."""
    fanout, conflated = counting()
    room = Room("a-1", 0)
    listeners = crowd(room, TURN + 100)
    done: list[str] = []
    fanout.send(room, Frame(b"e"), is_tick=False, done=lambda: done.append("e"))
    fanout.write()
    fanout.send(room, Frame(b"t"), is_tick=True, done=lambda: done.append("t"))
    await passes(fanout)
    assert all(listener.sent == [framed(b"e"), framed(b"t")] for listener in listeners)
    assert sorted(listener.writes for listener in listeners) == [1] * 100 + [2] * TURN
    assert (done, conflated, fanout._outstanding) == (["e", "t"], [], 0)


# Turns.


@pytest.mark.requirement("B3")
async def test_a_small_room_is_written_at_once() -> None:
    """While the turn lasts nothing waits for a pass: a room of fifty has its frame when `write` returns."""
    fanout, _ = counting()
    room = Room("small", 0)
    listeners = crowd(room, 50)
    fanout.send(room, Frame(b"e"), is_tick=False)
    fanout.write()
    assert got(listeners) == 50
    assert not fanout.is_sending(room)


async def test_one_pass_writes_no_more_than_a_turn_whatever_there_is_to_do() -> None:
    """Between two passes the loop is free: sockets are read and timers fire, however large and many the rooms are."""
    fanout, _ = counting()
    rooms = [Room(f"r-{number}", 0) for number in range(5)]
    # No multiple of a chunk: the last one of each room is a smaller one.
    everyone = [listener for room in rooms for listener in crowd(room, TURN + 50)]
    for room in rooms:
        fanout.send(room, Frame(b"e"), is_tick=False)
        fanout.send(room, Frame(b"t"), is_tick=True)
        fanout.write()
    written = sum(listener.writes for listener in everyone)
    assert written == TURN
    while fanout._passing:
        await asyncio.sleep(0)
        before, written = written, sum(listener.writes for listener in everyone)
        assert written - before <= TURN
    assert sum(len(listener.sent) for listener in everyone) == 2 * len(everyone)


async def test_many_small_rooms_share_one_turn() -> None:
    """What the direct way has written counts as well: beyond a turn, small rooms wait for the next pass too."""
    fanout, _ = counting()
    rooms = [Room(f"r-{number}", 0) for number in range(20)]
    everyone = [listener for room in rooms for listener in crowd(room, TURN // 8)]
    for room in rooms:
        fanout.send(room, Frame(b"e"), is_tick=False)
        fanout.write()
    assert got(everyone) == TURN
    await asyncio.sleep(0)
    assert got(everyone) == 2 * TURN
    await passes(fanout)
    assert got(everyone) == len(everyone)


@pytest.mark.requirement("B3", "R7")
async def test_a_small_room_does_not_wait_for_the_whole_of_a_crowded_one() -> None:
    """Rooms with a queue take turns: 600 sockets are done after a share of the passes that 20,000 writes need."""
    fanout, _ = counting()
    crowded, small = Room("crowded", 0), Room("small", 0)
    many, few = crowd(crowded, 5_000), crowd(small, TURN + 88)
    for number in range(4):
        fanout.send(crowded, Frame(b"c%d" % number), is_tick=False)
        fanout.write()
    before = sum(listener.writes for listener in many)
    fanout.send(small, Frame(b"s"), is_tick=False)
    await passes(fanout, lambda: got(few) == len(few))
    # As many chunks, and the rest of the pass in which the last one was written.
    assert sum(listener.writes for listener in many) - before <= len(few) + TURN
    # And one that fits into a turn is written in the next pass, at the latest.
    third = Room("third", 0)
    handful = crowd(third, 10)
    fanout.send(third, Frame(b"t"), is_tick=False)
    await asyncio.sleep(0)
    assert got(handful) == len(handful)
    await passes(fanout)
    assert all([payload(frame) for frame in one.sent] == [b"c0", b"c1", b"c2", b"c3"] for one in many)


async def test_a_room_that_nobody_is_in_is_done_at_once() -> None:
    """A frame for nobody, or for streams only, takes no turn and leaves no queue."""
    fanout, _ = counting()
    room = Room("empty", 0)
    done: list[int] = []
    fanout.send(room, Frame(b"e"), is_tick=False, done=lambda: done.append(1))
    fanout.write()
    assert (done, fanout.is_sending(room)) == ([1], False)


async def test_a_frame_for_a_room_that_became_small_does_not_overtake_what_waits_there() -> None:
    """Everyone but one leaves while an event is in the queue: the next event, though small enough, comes behind it."""
    fanout, _ = counting()
    room = Room("shrinking", 0)
    stays, *leave = crowd(room, TURN + 1)
    fanout.send(room, Frame(b"first"), is_tick=False)
    room.writable -= set(leave)
    fanout.send(room, Frame(b"second"), is_tick=False)
    await passes(fanout)
    assert [payload(frame) for frame in stays.sent] == [b"first", b"second"]


async def test_a_queue_whose_watchers_have_all_gone_comes_to_its_end() -> None:
    """Everyone leaves while frames wait: each is still done, and nothing is left behind."""
    fanout, _ = counting()
    room = Room("left", 0)
    listeners = crowd(room, 2 * TURN)
    done: list[str] = []
    for name in ("first", "second"):
        fanout.send(room, Frame(name.encode()), is_tick=False, done=lambda name=name: done.append(name))  # type: ignore[misc]
    await asyncio.sleep(0)
    some = got(listeners)
    room.writable.clear()
    await passes(fanout)
    assert done == ["first", "second"]
    assert got(listeners) == some == TURN
    assert not fanout.is_sending(room)
    assert fanout._outstanding == 0


# Ticks.


@pytest.mark.requirement("B3")
async def test_ticks_in_a_queue_conflate_and_are_counted() -> None:
    """Of ticks that wait only the newest stays, behind every event; one that is half-way goes no further."""
    fanout, conflated = counting()
    room = Room("crowded", 0)
    listeners = crowd(room, 2 * TURN)
    for number in range(3):
        fanout.send(room, Frame(b"t%d" % number), is_tick=True)
    await asyncio.sleep(0)
    for number in range(3, 6):
        fanout.send(room, Frame(b"t%d" % number), is_tick=True)
    fanout.send(room, Frame(b"e"), is_tick=False)
    for number in range(6, 8):
        fanout.send(room, Frame(b"t%d" % number), is_tick=True)
    await passes(fanout)
    seen = [tuple(payload(frame) for frame in listener.sent) for listener in listeners]
    assert sorted(seen) == [(b"t2", b"t3", b"e", b"t7")] * TURN + [(b"t3", b"e", b"t7")] * TURN
    assert conflated == [2 * TURN, 2 * TURN, TURN, 2 * TURN, 2 * TURN, 2 * TURN]
    assert fanout._outstanding == 0


# Streams.


class Reader:
    """Implements `gateway.room.Stream`."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def event(self, frame: Frame) -> None:
        self.got.append(frame.payload)

    def tick(self, frame: Frame) -> None:
        self.got.append(frame.payload)

    def close(self, code: CloseCode, reason: str) -> None:
        raise AssertionError("nobody says farewell here")


def readers(room: Room, count: int) -> list[Reader]:
    """So many event streams that watch a room from now on."""
    made = [Reader() for _ in range(count)]
    room.streams.update(made)
    return made


async def test_a_few_streams_are_told_at_once() -> None:
    """Like a small room of sockets; ticks before an event are left out, and what is done is done when they have it."""
    fanout, conflated = counting()
    room = Room("quiet", 0)
    few = readers(room, 5)
    done: list[str] = []
    fanout.send(room, Frame(b"t1"), is_tick=True, done=lambda: done.append("t1"))
    fanout.send(room, Frame(b"e1"), is_tick=False, done=lambda: done.append("e1"))
    fanout.send(room, Frame(b"t2"), is_tick=True, done=lambda: done.append("t2"))
    assert [reader.got for reader in few] == [[]] * 5
    fanout.write()
    assert [reader.got for reader in few] == [[b"e1", b"t2"]] * 5
    assert (done, conflated, fanout._outstanding) == (["e1", "t2"], [5], 0)


@pytest.mark.requirement("B3", "R7")
async def test_a_crowd_of_streams_yields_between_its_chunks() -> None:
    """Each wakes a task that writes through HTTP: a pass wakes few of them, and other rooms have their turn meanwhile."""
    fanout, _ = counting()
    crowded, small = Room("crowded", 0), Room("small", 0)
    many, listeners = readers(crowded, 1_000), crowd(small, 10)
    fanout.send(crowded, Frame(b"e1"), is_tick=False)
    fanout.write()
    fanout.send(small, Frame(b"s"), is_tick=False)
    fanout.write()
    served = [sum(bool(reader.got) for reader in many)]
    assert not got(listeners), "the turn is over"
    while fanout._passing:
        await asyncio.sleep(0)
        served.append(sum(bool(reader.got) for reader in many))
        assert got(listeners) == 10
    steps = [after - before for before, after in zip([0, *served], served, strict=False)]
    assert max(steps) <= TURN // STREAM_WRITES + 1
    assert served[-1] == 1_000
    assert len(steps) > 15


async def test_a_stream_gets_every_event_once_and_in_order_however_crowded_its_room_is() -> None:
    """Frames that come while a crowd is half-way come behind what it waits for; ticks that wait for nothing conflate."""
    fanout, conflated = counting()
    room = Room("mixed", 0)
    listeners, many = crowd(room, TURN + 100), readers(room, 200)
    done: list[str] = []
    fanout.send(room, Frame(b"e1"), is_tick=False, done=lambda: done.append("e1"))
    await passes(fanout, lambda: any(reader.got for reader in many))
    for name in ("t1", "t2", "t3"):
        fanout.send(room, Frame(name.encode()), is_tick=True, done=lambda name=name: done.append(name))  # type: ignore[misc]
    fanout.send(room, Frame(b"e2"), is_tick=False, done=lambda: done.append("e2"))
    (joins,) = readers(room, 1)
    fanout.send(room, Frame(b"e3"), is_tick=False)
    fanout.send(room, Frame(b"t4"), is_tick=True)
    await passes(fanout)
    # Who waited for the first event got the first tick with it, the others behind it; of the other two nobody began.
    everything = [b"e1", b"t1", b"e2", b"e3", b"t4"]
    assert all(reader.got == everything for reader in many)
    assert all([payload(frame) for frame in one.sent] == everything for one in listeners)
    assert joins.got == [b"e3", b"t4"]
    assert (done, conflated, fanout._outstanding) == (["e1", "t1", "e2"], [TURN + 300] * 2, 0)


async def test_a_stream_that_has_left_is_told_nothing() -> None:
    """Before its turn, or because of the first of what it is told: what is left of that is for the others."""
    fanout, _ = counting()
    room = Room("left", 0)
    many = readers(room, 200)

    class Hasty(Reader):
        def event(self, frame: Frame) -> None:
            super().event(frame)
            room.streams.discard(self)

    hasty = Hasty()
    room.streams.add(hasty)
    for name in (b"e1", b"e2"):
        fanout.send(room, Frame(name), is_tick=False)
    fanout.send(room, Frame(b"t"), is_tick=True)
    await asyncio.sleep(0)
    told = [reader for reader in many if reader.got]
    room.streams.difference_update(many)
    await passes(fanout)
    assert 0 < len(told) < 200
    assert [reader for reader in many if reader.got] == told
    assert hasty.got in ([b"e1"], [])
    room.streams.add(hasty)
    fanout.send(room, Frame(b"e3"), is_tick=False)
    fanout.send(room, Frame(b"e4"), is_tick=False)
    await passes(fanout)
    assert hasty.got[-1] == b"e3"
    assert not fanout.is_sending(room)
    assert fanout._outstanding == 0


# Relief.


@pytest.mark.requirement("B3")
async def test_who_reads_events_waits_while_too_many_writes_are_outstanding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound `relieved` blocks; it frees when half of it is written, and not before."""
    monkeypatch.setattr(fanout_module, "OUTSTANDING_MAX", 4 * TURN)
    fanout, _ = counting()
    rooms = [Room(f"r-{number}", 0) for number in range(3)]
    for room in rooms:
        crowd(room, 2 * TURN)
    for room in rooms[:2]:
        fanout.send(room, Frame(b"e"), is_tick=False)
    async with asyncio.timeout(1):
        await fanout.relieved()  # the bound itself is within it
    fanout.send(rooms[2], Frame(b"e"), is_tick=False)
    waiting = asyncio.ensure_future(fanout.relieved())
    while fanout._outstanding > 2 * TURN:
        assert not waiting.done()
        await asyncio.sleep(0)
    assert fanout._outstanding > TURN, "it frees long before all is written"
    async with asyncio.timeout(1):
        await waiting
    await passes(fanout)


async def test_conflated_ticks_are_outstanding_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks replace each other in a queue, so they alone never make anybody wait."""
    monkeypatch.setattr(fanout_module, "OUTSTANDING_MAX", 4 * TURN)
    fanout, _ = counting()
    room = Room("crowded", 0)
    crowd(room, 2 * TURN)
    for number in range(100):
        fanout.send(room, Frame(b"t%d" % number), is_tick=True)
    async with asyncio.timeout(1):
        await fanout.relieved()
    await passes(fanout)
    assert fanout._outstanding == 0


# A whole life.


@dataclass(eq=False)
class Watcher:
    """A socket with the rules of `gateway.connection`: an outbox and one slot while it lags, both written when it reads."""

    room: Room
    saw: int
    """The last event that was part of its snapshot."""
    stalls_after: int
    """Writes that its transport takes before it asks to pause."""

    def __post_init__(self) -> None:
        self.read: list[bytes] = []
        self.outbox: list[bytes] = []
        self.slot: bytes | None = None
        self.here = True
        self.room.writable.add(self)

    def send(self, data: bytes) -> None:
        assert self in self.room.writable
        assert not self.outbox, "it would overtake what is kept"
        self.read += [payload(frame) for frame in split(data)]
        self.stalls_after -= 1
        if self.stalls_after == 0:
            self.stall()

    def keep_event(self, frame: bytes) -> None:
        assert self in self.room.lagging
        self.outbox.append(payload(frame))

    def keep_tick(self, frame: bytes) -> None:
        assert self in self.room.lagging
        self.slot = payload(frame)

    def close(self, code: CloseCode, reason: str) -> None:
        raise AssertionError("nobody says farewell here")

    def stall(self) -> None:
        if self.here:
            self.room.writable.discard(self)
            self.room.lagging.add(self)

    def resume(self) -> None:
        if self.here and self in self.room.lagging:
            self.read += self.outbox + ([self.slot] if self.slot is not None else [])
            self.outbox, self.slot = [], None
            self.room.lagging.discard(self)
            self.room.writable.add(self)

    def leave(self) -> None:
        self.here = False
        self.room.writable.discard(self)
        self.room.lagging.discard(self)


@dataclass(eq=False)
class Streamer:
    """An event stream, as far as a room sees it: it takes what it is given, until it leaves."""

    room: Room
    saw: int

    def __post_init__(self) -> None:
        self.read: list[bytes] = []
        self.outbox: list[bytes] = []
        self.here = True
        self.room.streams.add(self)

    def event(self, frame: Frame) -> None:
        assert self.here
        self.read.append(frame.payload)

    def tick(self, frame: Frame) -> None:
        self.event(frame)

    def close(self, code: CloseCode, reason: str) -> None:
        raise AssertionError("nobody says farewell here")

    def stall(self) -> None:
        """A stream bounds by itself what it holds."""

    def resume(self) -> None:
        """See `stall`."""

    def leave(self) -> None:
        self.here = False
        self.room.streams.discard(self)


class World:
    """Rooms, who is in them, and what was sent."""

    def __init__(self, sizes: list[int], stalls_after: int, streams: int) -> None:
        self.conflated = 0
        self.fanout = Fanout(self._count)
        self.rooms = [Room(f"r-{number}", 0) for number in range(len(sizes))]
        self.events = [0] * len(sizes)
        self.ticks = [0] * len(sizes)
        self.done: list[list[int]] = [[] for _ in sizes]
        self.watchers: list[Watcher | Streamer] = [
            Watcher(room, 0, stalls_after + number if stalls_after else 0)
            for room, size in zip(self.rooms, sizes, strict=True)
            for number in range(size)
        ]
        self.watchers += [Streamer(room, 0) for room in self.rooms for _ in range(streams)]

    def _count(self, number: int) -> None:
        self.conflated += number

    def event(self, at: int) -> None:
        self.events[at] += 1
        number = self.events[at]
        frame = Frame(b"e%d" % number)
        self.fanout.send(self.rooms[at], frame, is_tick=False, done=lambda: self.on_done(at, number))

    def on_done(self, at: int, number: int) -> None:
        self.done[at].append(number)
        for watcher in self.watchers:
            if watcher.room is self.rooms[at] and watcher.here and watcher.saw < number:
                assert b"e%d" % number in (*watcher.read, *watcher.outbox), "done before everyone has it"

    def tick(self, at: int) -> None:
        self.ticks[at] += 1
        self.fanout.send(self.rooms[at], Frame(b"t%d" % self.ticks[at]), is_tick=True)

    def join(self, at: int) -> None:
        self.watchers.append(Watcher(self.rooms[at], self.events[at], 0))

    def open_stream(self, at: int) -> None:
        self.watchers.append(Streamer(self.rooms[at], self.events[at]))

    def check(self) -> None:
        for watcher in self.watchers:
            at = self.rooms.index(watcher.room)
            events = [int(name[1:]) for name in watcher.read if name[:1] == b"e"]
            ticks = [int(name[1:]) for name in watcher.read if name[:1] == b"t"]
            expected = list(range(watcher.saw + 1, self.events[at] + 1))
            assert events == (expected if watcher.here else expected[: len(events)])
            assert ticks == sorted(set(ticks)), "a tick never goes back"
        assert self.done == [list(range(1, count + 1)) for count in self.events]
        assert self.fanout._outstanding == 0
        assert not any(self.fanout.is_sending(room) for room in self.rooms)


ROOM = st.integers(0, 2)
SOMEBODY = st.integers(0, 10_000)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), ROOM),
        st.tuples(st.just("tick"), ROOM),
        st.tuples(st.just("join"), ROOM),
        st.tuples(st.just("open_stream"), ROOM),
        st.tuples(st.just("stall"), SOMEBODY),
        st.tuples(st.just("resume"), SOMEBODY),
        st.tuples(st.just("leave"), SOMEBODY),
        st.tuples(st.just("write"), SOMEBODY),
        st.tuples(st.just("pass"), st.integers(1, 4)),
    ),
    max_size=60,
)


@pytest.mark.requirement("B3")
@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.integers(0, 25), min_size=3, max_size=3),
    stalls_after=st.sampled_from([0, 0, 1, 3]),
    streams=st.sampled_from([0, 1, 10]),
    steps=STEPS,
)
def test_whatever_watchers_do_each_gets_every_event_once_and_in_order(
    sizes: list[int], stalls_after: int, streams: int, steps: list[tuple[str, int]]
) -> None:
    """Stalls, reads again, leaves and joins at any moment between the passes, in rooms of several turns: nothing is lost,
    doubled or overtaken, a joiner is told nothing that its snapshot has, and the newest tick of all comes last."""

    async def scenario() -> None:
        world = World(sizes, stalls_after, streams)
        for name, number in steps:
            if name in ("event", "tick", "join", "open_stream"):
                getattr(world, name)(number)
            elif name == "write":
                world.fanout.write()
            elif name == "pass":
                for _ in range(number):
                    await asyncio.sleep(0)
            elif world.watchers:
                getattr(world.watchers[number % len(world.watchers)], name)()
        for at in range(3):
            world.tick(at)
        await passes(world.fanout)
        for watcher in world.watchers:
            watcher.resume()
        world.check()
        for watcher in world.watchers:
            if watcher.here:
                assert watcher.read[-1] == b"t%d" % world.ticks[world.rooms.index(watcher.room)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fanout_module, "TURN", 8)
        patch.setattr(fanout_module, "CHUNK", 3)
        patch.setattr(fanout_module, "STREAM_WRITES", 2)
        asyncio.run(scenario())
