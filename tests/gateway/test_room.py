"""Tests for gateway.room."""

import pytest
from websockets import frames
from websockets.streams import StreamReader

from engine.domain.lifecycle import Status
from gateway.closing import CloseCode
from gateway.room import Frame, Room, text_frame
from tests.gateway.house import Listener


def room_of(*, writable: int = 0, lagging: int = 0) -> tuple[Room, list[Listener], list[Listener]]:
    """A room at version 5, and who is in it."""
    room = Room("a-1", 0)
    room.show({"version": 5, "status": "ACTIVE"})
    quick, slow = [Listener() for _ in range(writable)], [Listener() for _ in range(lagging)]
    room.writable |= set(quick)
    room.lagging |= set(slow)
    return room, quick, slow


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 100_000])
def test_a_text_frame_is_one_whole_unmasked_frame(size: int) -> None:
    """Whatever its size, a payload travels as one final text frame that any parser reads back."""
    sent = b"x" * size
    reader = StreamReader()
    reader.feed_data(text_frame(sent))
    reader.feed_eof()
    parser = frames.Frame.parse(reader.read_exact, mask=False, max_size=None)
    with pytest.raises(StopIteration) as parsed:
        next(parser)
    frame: frames.Frame = parsed.value.value
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (frames.Opcode.TEXT, True, sent)


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_a_frame_is_kept_as_it_is_written_and_still_tells_what_it_carries(size: int) -> None:
    """The header is the transport's business: whoever writes otherwise gets the payload back, whatever its length."""
    frame = Frame(b"x" * size, "0.1-0")
    assert frame.socket == text_frame(b"x" * size)
    assert (frame.payload, frame.cursor) == (b"x" * size, "0.1-0")


def test_a_new_room_is_empty_and_not_over() -> None:
    """Before anything is known nobody watches and nothing has ended."""
    room = Room("a-1", 3)
    assert (room.is_watched, room.is_over, room.version, room.shard) == (False, False, 0, 3)


@pytest.mark.parametrize("status", [status for status in Status if status.is_public])
def test_a_room_is_over_exactly_in_the_terminal_statuses(status: Status) -> None:
    """Only an ended or cancelled auction sends its watchers home."""
    room = Room("a-1", 0)
    room.show({"version": 1, "status": status.value})
    assert room.is_over == status.is_terminal


def test_somebody_who_lags_still_watches() -> None:
    """A room with only lagging subscribers must not be forgotten."""
    assert room_of(lagging=1)[0].is_watched
    assert room_of(writable=1)[0].is_watched


def test_an_older_timer_does_not_replace_a_newer_one() -> None:
    """What is remembered only goes forward; the same version again may replace itself."""
    room = room_of()[0]
    room.show({"version": 4, "status": "ENDED"})
    assert room.timer == {"version": 5, "status": "ACTIVE"}
    room.show({"version": 5, "status": "CLOSING"})
    assert (room.version, room.timer["status"]) == (5, "CLOSING")
    room.show({"version": 6, "status": "ENDED"})
    assert (room.version, room.is_over) == (6, True)


class Watching:
    """Implements `gateway.room.Stream`."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.closed: list[tuple[CloseCode, str]] = []
        room.streams.add(self)

    def event(self, frame: Frame) -> None:
        raise AssertionError("there is no event")

    def tick(self, frame: Frame) -> None:
        raise AssertionError("there is no tick")

    def close(self, code: CloseCode, reason: str) -> None:
        self.closed.append((code, reason))
        self.room.streams.discard(self)


def test_somebody_who_streams_watches() -> None:
    """A room with a stream only must not be forgotten."""
    room = room_of()[0]
    Watching(room)
    assert room.is_watched


def test_parting_says_farewell_to_everyone_once() -> None:
    """Writable, lagging and streaming: each is told the code and the reason."""
    room, quick, slow = room_of(writable=2, lagging=2)
    streams = [Watching(room) for _ in range(2)]
    room.part(CloseCode.FEED_LOST, "come back later")
    assert [listener.closed for listener in (*quick, *slow)] == [[CloseCode.FEED_LOST]] * 4
    assert [stream.closed for stream in streams] == [[(CloseCode.FEED_LOST, "come back later")]] * 2
