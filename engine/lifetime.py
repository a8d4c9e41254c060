"""From its start to its end: what every role process waits for, and what ends it."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from engine.store.protocol import StoreUnavailableError

T = TypeVar("T")

CALM: Final = (50_000, 50, 1_000)
"""Thresholds of the cycle collector for who holds very many small values without a cycle among them."""

log = structlog.get_logger()


def calm_collector() -> None:
    """Keep the cycle collector away from the timers, the sockets and the fold of the log.

    What an engine holds is 100,000 small values without a cycle among them, as is what a reconciler has read, and what a
    gateway remembers are events. At the interpreter's own thresholds a full collection walks all of them again and again:
    105 ms each with 100,000 timers (measured), in which nothing closes and nobody is told anything. Reference counting
    frees them all the same. What was imported by now stays for good, and is never walked again.
    """
    gc.freeze()
    gc.set_threshold(*CALM)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and SIGINT, from now on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Repeat a step of the start until the store answers: a process that starts before its Redis waits, and says so once."""
    waiting = False
    while True:
        try:
            return await step()
        except StoreUnavailableError as error:
            if not waiting:
                log.warning("waiting_for_redis", error=str(error))
            waiting = True


async def until_stopped(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Run `work` until it is done, or `stop` is set, which cancels it; whether it was done. Its own failure is raised."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
    finally:
        stopping.cancel()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
    return done
