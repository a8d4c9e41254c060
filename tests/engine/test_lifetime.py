"""Tests for engine.lifetime."""

import asyncio
import os
import signal

import pytest
from structlog.testing import capture_logs

from engine.lifetime import patiently, stop_event, until_stopped
from engine.store.protocol import DeploymentMismatchError, StoreUnavailableError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_sets_the_stop(number: signal.Signals) -> None:
    """Both signals that end a process politely are heard."""
    stop = stop_event()
    try:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        async with asyncio.timeout(10):
            await stop.wait()
    finally:
        for heard in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(heard)


@pytest.mark.requirement("R16")
async def test_a_step_is_repeated_until_the_store_answers_and_that_is_said_once() -> None:
    """However often the store is away, one line tells, and the answer is the step's own."""
    answers = iter([StoreUnavailableError("away"), StoreUnavailableError("still"), 7])

    async def step() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as log:
        assert await patiently(step) == 7
    assert [line["event"] for line in log] == ["waiting_for_redis"]


async def test_any_other_failure_of_a_step_is_raised() -> None:
    """What waiting cannot mend is not waited for."""

    async def step() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await patiently(step)


async def test_work_that_ends_by_itself_was_done() -> None:
    """Without a stop the work runs to its end."""

    async def work() -> None:
        await asyncio.sleep(0)

    assert await until_stopped(asyncio.Event(), work()) is True


async def test_work_is_cancelled_by_the_stop() -> None:
    """The stop cancels, and waits for the work to end."""
    stop, ended = asyncio.Event(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    asyncio.get_running_loop().call_soon(stop.set)
    assert await asyncio.wait_for(until_stopped(stop, work()), 10) is False
    assert ended == [True]


async def test_the_failure_of_the_work_is_raised() -> None:
    """Without waiting for a stop."""

    async def work() -> None:
        raise DeploymentMismatchError("8 shards")

    with pytest.raises(DeploymentMismatchError):
        await asyncio.wait_for(until_stopped(asyncio.Event(), work()), 10)
