"""Many plans, as many at a time as there are cores; whatever happens to one is told as the outcome of its seed.

A process judges one plan after another. It does not hear Ctrl-C: whoever asked for the plans does, and ends it.
"""

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Final

from auction_timer.simulation.run import Outcome, Plan, simulate

RAN_TO_ITS_END: Final = "ran to its end"
"""What a simulation breaks that raises, or whose process is killed: no checker got to see it."""

# A fresh interpreter each: what a fork would inherit is something else wherever this is called from.
_SPAWN: Final = get_context("spawn")


def judge(plan: Plan) -> Outcome:
    """Run a plan, whatever comes of it: an error inside is a violation of this seed."""
    began = time.process_time()
    try:
        outcome = simulate(plan)
    except Exception:
        outcome = _unfinished(plan, traceback.format_exc().rstrip())
    outcome.cpu_s = time.process_time() - began
    return outcome


def judge_all(plans: Iterable[Plan], processes: int | None = None) -> Generator[Outcome, None, None]:
    """The outcome of each plan, as each comes to its end. Closing this ends what is still running.

    Args:
        processes: how many at a time; None for as many as there are cores.
    """
    left = iter(plans)
    working: dict[Connection, _Worker] = {}
    try:
        for plan in islice(left, processes or os.cpu_count() or 1):
            worker = _Worker(plan)
            working[worker.pipe] = worker
        while working:
            for pipe in wait(list(working)):
                assert isinstance(pipe, Connection)
                worker = working.pop(pipe)
                outcome = worker.outcome()
                if (plan_then := next(left, None)) is not None:
                    following = worker.go_on(plan_then)
                    working[following.pipe] = following
                else:
                    worker.end()
                yield outcome
    finally:
        for worker in working.values():
            worker.end()


class _Worker:
    """A process that has a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs,), daemon=True)
        with _uninterrupted():
            self._process.start()
        theirs.close()
        self.pipe.send(plan)

    def outcome(self) -> Outcome:
        """What became of the plan."""
        try:
            outcome: Outcome = self.pipe.recv()
        except EOFError:
            self._process.join()
            return _unfinished(self._plan, f"its process ended with {self._process.exitcode}")
        return outcome

    def go_on(self, plan: Plan) -> "_Worker":
        """The same process with another plan; another process, if this one has been killed."""
        if self._process.exitcode is not None:
            self.end()
            return _Worker(plan)
        self._plan = plan
        self.pipe.send(plan)
        return self

    def end(self) -> None:
        """Whatever it is doing."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hear Ctrl-C afterwards. In the middle of a start it would leave a process that has not been told what it is for, and
    says so with a traceback. What is started meanwhile never hears it."""
    resource_tracker.ensure_running()  # which it would be by the first start, and unblocks what it finds blocked
    heard: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # which alone is interrupted
    # Blocked for what is started, which inherits that; and noted, because another thread may take it for this one.
    handler = signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number)) if is_main else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _work(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError):  # whoever asked is gone
        while True:
            pipe.send(judge(pipe.recv()))


def _unfinished(plan: Plan, why: str) -> Outcome:
    return Outcome(plan, trace="", virtual_ms=0, counts={}, faults={}, violations={RAN_TO_ITS_END: [why]})
