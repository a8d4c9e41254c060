"""A child that stands still is told from one that has nothing to do, over real pipes."""

import asyncio
import contextlib
import os
from collections.abc import Iterator

import pytest

from auction_timer.pulse import BEAT_MS, FIRST_BEAT_MS_MAX, Pulse, beat

FROZEN_MS = 5 * BEAT_MS


@pytest.fixture
def pipe() -> Iterator[tuple[Pulse, int]]:
    """The parent's side, and a child's copy of the other one."""
    made = Pulse(FROZEN_MS)
    with made.inherited() as fd:
        writing = os.dup(fd)
    yield made, writing
    made.close()
    os.close(writing)


def looks(listening: Pulse, most: int) -> int:
    """How many looks in silence it takes until the child is given up; fails after `most`."""
    return next(number for number in range(1, most + 1) if listening.look())


def test_one_that_beats_lives_until_it_stops(pipe: tuple[Pulse, int]) -> None:
    """Each beat counts as life from then on for `frozen_ms`, and for no longer."""
    listening, writing = pipe
    for _ in range(20):
        os.write(writing, b".")
        assert not listening.look()
        assert not any(listening.look() for _ in range(4))
    os.write(writing, b"...")
    assert not listening.look()
    assert looks(listening, 10) == 5
    assert listening.silent_ms == FROZEN_MS


def test_a_start_may_take_longer_than_a_silence(pipe: tuple[Pulse, int]) -> None:
    """Until it was first heard it has a minute, whatever else is set."""
    assert looks(pipe[0], 100) == FIRST_BEAT_MS_MAX // BEAT_MS


def test_one_that_has_let_go_of_the_pipe_is_not_heard(pipe: tuple[Pulse, int]) -> None:
    """The end of the pipe is no sign of life."""
    listening, writing = pipe
    os.write(writing, b".")
    os.close(os.dup(writing))
    assert not listening.look()
    os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert looks(listening, 10) == 5


async def test_a_child_shows_life(pipe: tuple[Pulse, int]) -> None:
    """Its loop writes into the pipe as soon as it turns."""
    listening, writing = pipe
    beating = asyncio.create_task(beat(writing))
    await asyncio.sleep(0)
    listening.look()
    assert listening.silent_ms == 0
    beating.cancel()


@pytest.mark.parametrize("gone", [False, True])
async def test_a_parent_that_does_not_read_or_is_gone_does_not_end_a_child(pipe: tuple[Pulse, int], gone: bool) -> None:
    """What it cannot write it does not write; its work goes on."""
    listening, writing = pipe
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"." * 4_096)
    if gone:
        os.dup2(os.open(os.devnull, os.O_RDONLY), listening._reading)
    beating = asyncio.create_task(beat(writing))
    await asyncio.sleep(0)
    assert not beating.done()
    beating.cancel()
