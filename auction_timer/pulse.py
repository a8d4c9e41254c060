"""A sign of life from a child that runs: a byte a second through a pipe, written by the very loop that does its work.

A child that died is seen by its exit. One whose process lives and whose loop stands still (stopped, dead-locked, caught in
a call that does not return) exits never, and nothing else tells it from one that has nothing to do. Redis is not asked:
a child that waits for a store that is away is alive.

    child   loop turns  -> a byte a second
    parent  no byte for `frozen_ms` of its own seconds -> it kills the child, and starts it again

The parent counts the seconds in which it looked, not those that went by: one that was itself stopped, together with all of
its machine, does not take its first look for a long silence.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Final

BEAT_MS: Final = 1_000
FIRST_BEAT_MS_MAX: Final = 60_000
"""How long a child may take to its first sign: longer than a start takes on any machine."""
_READ_BYTES: Final = 4_096


class Pulse:
    """The parent's side of one process's pipe."""

    def __init__(self, frozen_ms: int) -> None:
        self.silent_ms = 0
        """For how long nothing was heard."""
        self._bound_ms = FIRST_BEAT_MS_MAX
        self._frozen_ms = frozen_ms
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)

    @contextlib.contextmanager
    def inherited(self) -> Iterator[int]:
        """The descriptor that a child started meanwhile is to inherit; afterwards only the child has it."""
        try:
            yield self._writing
        finally:
            os.close(self._writing)

    def close(self) -> None:
        """Listen no longer."""
        os.close(self._reading)

    async def stopped(self) -> None:
        """Return once the child has shown no life for too long."""
        while True:
            if self.look():
                return
            await asyncio.sleep(BEAT_MS / 1_000)

    def look(self) -> bool:
        """Look once more, a beat after the last time: whether the child has shown no life for too long by now."""
        if self._was_heard():
            self.silent_ms, self._bound_ms = 0, self._frozen_ms
        else:
            self.silent_ms += BEAT_MS
        return self.silent_ms >= self._bound_ms

    def _was_heard(self) -> bool:
        try:
            return os.read(self._reading, _READ_BYTES) != b""
        except BlockingIOError:
            return False


async def beat(writing: int) -> None:
    """Show life until cancelled: the child's side. A parent that does not read, or is gone, is nobody's concern here."""
    os.set_blocking(writing, False)
    while True:
        with contextlib.suppress(OSError):
            os.write(writing, b".")
        await asyncio.sleep(BEAT_MS / 1_000)
