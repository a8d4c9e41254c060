"""An event loop on virtual time: whenever nobody has anything left to do, time jumps to the next thing that is due.

`asyncio.sleep`, `wait_for`, `call_later` and `ManualClock.sleep_until` all run on the same timeline, so an hour of an
engine's life takes as long as its work, always in the same order. A wait for something that can never happen, and work
that never ends, are errors instead of tests that hang.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from tests.fakes.clock import Timeline

T = TypeVar("T")

TURNS_MAX: Final = 100_000
"""Of one instant. The busiest ones of these tests take a few thousand."""


class NothingWillHappenError(RuntimeError):
    """Everybody waits, nothing is due: in real time this would hang for ever."""


class NothingEndsError(RuntimeError):
    """Somebody is at work without end, and no time passes: in real time this would be a busy loop."""


class _IdleMeansLater(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    """Instead of waiting for `timeout` seconds, lets them pass."""

    timeline: Timeline
    turns = 0
    """Turns of the loop since time last passed."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            self.turns += 1
            if self.turns > TURNS_MAX:
                self.turns = 0
                raise NothingEndsError(f"{TURNS_MAX} turns of the loop and no time has passed")
            return super().select(0)
        self.turns = 0
        ready = super().select(0)
        if ready:
            return ready
        line = self.timeline
        due_ns = [line.now_ns + max(1, round(timeout * 1e9))] if timeout is not None else []
        if line.next_ns is not None:
            due_ns.append(line.next_ns)
        if not due_ns:
            raise NothingWillHappenError("every task waits and nothing is due on the timeline")
        line.advance_to(max(line.now_ns, min(due_ns)))
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        selector = _IdleMeansLater()
        selector.timeline = timeline
        self._timeline = timeline
        super().__init__(selector)

    def time(self) -> float:
        return self._timeline.now_ns / 1e9


def run(timeline: Timeline, scenario: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a scenario to its end on virtual time; tasks it leaves behind are cancelled."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(timeline)) as runner:
        return runner.run(scenario())
