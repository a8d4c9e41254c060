"""Tests of the front door. What those of them share that start real processes: waiting, and looking at processes."""

import asyncio
import os
import signal
from collections.abc import Callable

from tests.live import alive

DEADLINE_S = 20.0
"""How long a condition may take on a loaded two-core machine before the test fails; none needs a second on an idle one."""
POLL_S = 0.01


async def eventually(condition: Callable[[], object], *, within_s: float = DEADLINE_S) -> None:
    """Poll `condition` until it is true; fail after the deadline, showing the condition's source position."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        code = condition.__code__
        raise AssertionError(f"not true within {within_s} s: {code.co_filename}:{code.co_firstlineno}") from None


def kill_if_running(pid: int | None) -> None:
    """SIGKILL to one process of the test, by its own pid, on the way out."""
    if pid is not None and alive(pid):
        os.kill(pid, signal.SIGKILL)
