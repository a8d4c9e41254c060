"""An event loop on virtual time: whenever nobody has anything left to do, time jumps to the next thing that is due.

`asyncio.sleep`, `asyncio.timeout`, `call_later` and `ManualClock.sleep_until` all run on the same timeline, so an hour of an
engine's life takes as long as its work, always in the same order. A wait for something that can never happen, and work
that never ends, are errors instead of runs that hang.

Several processes share the loop. Which one a callback belongs to stands in its context (`PROCESS`), so a process can be
frozen as SIGSTOP freezes a real one: between any two of its steps, for as long as it takes, with all it remembers.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

from auction_timer.simulation.timeline import Timeline

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PROCESS: Final[ContextVar[str]] = ContextVar("PROCESS", default="")
"""The name of the process that a callback belongs to."""

TURNS_MAX: Final = 100_000
"""Of one instant. The busiest ones take a few thousand."""


class NothingWillHappenError(RuntimeError):
    """Everybody waits, nothing is due: in real time this would hang for ever."""


class NothingEndsError(RuntimeError):
    """Somebody is at work without end, and no time passes: in real time this would be a busy loop."""


class _IdleMeansLater(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    """Instead of waiting for `timeout` seconds, lets them pass."""

    timeline: Timeline
    turns = 0
    """Turns of the loop since time last passed."""

    def __init__(self) -> None:
        super().__init__()
        self._watched = self.get_map()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            self.turns += 1
            if self.turns > TURNS_MAX:
                self.turns = 0
                raise NothingEndsError(f"{TURNS_MAX} turns of the loop and no time has passed")
            return self._look()
        self.turns = 0
        if ready := self._look():
            return ready
        line = self.timeline
        due_ns = line.next_ns
        if timeout is not None:
            timer_ns = line.now_ns + max(1, round(timeout * 1e9))
            due_ns = timer_ns if due_ns is None or timer_ns < due_ns else due_ns
        if due_ns is None:
            raise NothingWillHappenError("every task waits and nothing is due on the timeline")
        line.advance_to(due_ns)
        return []

    def _look(self) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop's own pipe is always there. Where nothing else is, the kernel need not be asked a million times.
        return super().select(0) if len(self._watched) > 1 else []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        selector = _IdleMeansLater()
        selector.timeline = timeline
        self._timeline = timeline
        self._frozen: dict[str, list[tuple[asyncio.Handle, Any, tuple[Any, ...], Context]]] = {}
        super().__init__(selector)

    def time(self) -> float:
        return self._timeline.now_ns / 1e9

    def freeze(self, process: str) -> None:
        """From now on no step of this process is taken. Steps that are already due in this turn still are."""
        self._frozen.setdefault(process, [])

    def thaw(self, process: str) -> None:
        """The process goes on where it stood, in the order in which things came to it meanwhile."""
        for handle, callback, args, context in self._frozen.pop(process, []):
            if not handle.cancelled():
                self.call_soon(callback, *args, context=context)

    def is_frozen(self, process: str) -> bool:
        """Whether the process makes no steps."""
        return process in self._frozen

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self._frozen and context is not None:
            held = self._frozen.get(context.get(PROCESS) or "")
            if held is not None:
                handle = asyncio.Handle(callback, args, self, context)
                held.append((handle, callback, args, context))
                return handle
        return super().call_soon(callback, *args, context=context)


def run(timeline: Timeline, scenario: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a scenario to its end on virtual time; tasks it leaves behind are cancelled."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(timeline)) as runner:
        return runner.run(scenario())
