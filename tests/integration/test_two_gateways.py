"""Two gateway processes behind one port."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.integration.crowd import Watcher, behind, crowd, gaps, lane, port_of, until
from tests.integration.events import bid, fresh_id, started
from tests.live import LiveStack

pytestmark = pytest.mark.integration

HOUR_MS: Final = 3_600_000
WATCHERS: Final = 20
"""On each gateway."""
BIDS: Final = 100


def told(watcher: Watcher) -> int:
    """Bids that a watcher was told of."""
    return sum(name == "bid.accepted" for _, name in watcher.events)


@pytest.mark.requirement("R7", "B3")
async def test_watchers_of_either_gateway_are_told_the_same(short_tmp: Path) -> None:
    """Whichever process a socket ends up at, it sees the same events with the same cursors in the same order."""
    stack = await asyncio.to_thread(LiveStack, short_tmp, "--gateways", "2")
    try:
        auction_id, port = fresh_id(), port_of(stack.url)
        now = stack.post(bid(fresh_id()))[0]["arrival_ms"]
        stack.post(
            started(auction_id, now, now + HOUR_MS, soft_close_window_ms=2 * HOUR_MS, extension_ms=1_000, mode="add")
        )
        stack.until_status(auction_id, "CLOSING")
        one, other = stack.pids("gateway")
        first, second = [[Watcher(auction_id) for _ in range(WATCHERS)] for _ in range(2)]
        # A process that is stopped accepts nobody: so each gateway gets its own half.
        async with AsyncExitStack() as everyone:
            for watchers, paused in ((first, other), (second, one)):
                os.kill(paused, signal.SIGSTOP)
                try:
                    await everyone.enter_async_context(crowd(*watchers, port=port))
                finally:
                    os.kill(paused, signal.SIGCONT)
            for _ in range(BIDS // 10):
                await asyncio.to_thread(stack.post, *(bid(auction_id) for _ in range(10)))
            watchers = [*first, *second]
            await until(lambda: all(told(watcher) == BIDS for watcher in watchers), "every bid has come", watchers)
            assert gaps(watchers, await asyncio.to_thread(lane, stack, [auction_id])) == []
            assert len({tuple(behind(watcher.events, watchers[-1].base)) for watcher in watchers}) == 1
            assert not any(watcher.lost or watcher.closes for watcher in watchers)
    finally:
        assert await asyncio.to_thread(stack.stop) == 0
