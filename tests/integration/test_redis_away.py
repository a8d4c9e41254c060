"""The store stands still, or dies and comes back: what watchers see meanwhile, and that nothing is missing afterwards."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx
import pytest

from tests.integration.crowd import Watcher, crowd, gaps, lane, port_of, until
from tests.integration.events import bid, fresh_id, started
from tests.live import LiveStack, alive
from tests.live import until as polled

pytestmark = pytest.mark.integration

HOUR_MS: Final = 3_600_000
WATCHERS: Final = 20
BIDS: Final = 30


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    """One stack for this module: each test leaves it healed."""
    with TemporaryDirectory(prefix="at-") as directory:
        made = LiveStack(Path(directory))
        try:
            yield made
        finally:
            made.stop()


async def registered(stack: LiveStack, ends_in_ms: int) -> str:
    """An auction in its soft close, which no bid extends."""
    auction_id = fresh_id()
    now = (await asyncio.to_thread(stack.post, bid(fresh_id())))[0]["arrival_ms"]
    policy: dict[str, Any] = {"soft_close_window_ms": 3 * HOUR_MS, "max_extensions": 0}
    await asyncio.to_thread(stack.post, started(auction_id, now, now + ends_in_ms, **policy))
    await asyncio.to_thread(stack.until_status, auction_id, "CLOSING")
    return auction_id


async def posted(stack: LiveStack, events: list[dict[str, Any]]) -> int:
    """Send the same events until they are taken, as a producer does; how often they were refused first."""
    refused = 0
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=10) as http, asyncio.timeout(30):
        while (answer := await http.post("/events", json=events)).status_code != 202:
            assert answer.status_code == 503
            assert 1 <= int(answer.headers["retry-after"]) <= 5
            refused += 1
            await asyncio.sleep(0.05)
    return refused


async def all_have(watchers: list[Watcher], stack: LiveStack, auction_id: str, bids: int) -> None:
    """Everyone was told of so many bids, and of everything else that the store holds, each once and in order."""
    await until(
        lambda: all(sum(name == "bid.accepted" for _, name in watcher.events) >= bids for watcher in watchers),
        "every bid has come",
        watchers,
    )
    assert gaps(watchers, await asyncio.to_thread(lane, stack, [auction_id])) == []


@pytest.mark.requirement("R16", "B3", "B4")
async def test_a_store_that_stands_still_stops_no_countdown(stack: LiveStack) -> None:
    """Sockets stay, ticks go on marked `stale`, what is not in memory is 503; then all heals, and every event comes."""
    auction_id = await registered(stack, 55_000)
    watchers = [Watcher(auction_id) for _ in range(WATCHERS)]
    async with crowd(*watchers, port=port_of(stack.url)):
        await posted(stack, [bid(auction_id) for _ in range(BIDS)])
        await all_have(watchers, stack, auction_id, BIDS)
        (store,) = stack.pids("valkey-server")
        os.kill(store, signal.SIGSTOP)
        try:
            await until(
                lambda: all(sum("stale" in tick for tick in watcher.ticks) >= 3 for watcher in watchers),
                "ticks go on",
                watchers,
            )
            await _judge_while_away(stack, auction_id)
            newcomer = Watcher(auction_id)
            async with crowd(newcomer, port=port_of(stack.url)):
                assert newcomer.snapshots[0]["timer"]["stale"] is True
        finally:
            os.kill(store, signal.SIGCONT)
        await posted(stack, [bid(auction_id) for _ in range(BIDS)])
        await all_have(watchers, stack, auction_id, 2 * BIDS)
        await until(
            lambda: all("stale" not in watcher.ticks[-1] for watcher in watchers), "ticks of the engine", watchers
        )
        polled(lambda: not stack.timer(auction_id)["stale"], "what is told is fresh")
        assert not any(watcher.lost or watcher.closes for watcher in watchers)
        for watcher in watchers:
            stale = [tick for tick in watcher.ticks if "stale" in tick]
            left = [tick["remaining_ms"] for tick in stale]
            assert left == sorted(set(left), reverse=True)
            assert {(tick["stale"], tick["status"]) for tick in stale} == {(True, "CLOSING")}
            assert all(tick["remaining_ms"] == tick["ends_at"] - tick["server_time"] for tick in stale)


async def _judge_while_away(stack: LiveStack, auction_id: str) -> None:
    """What is known is answered and marked; what is not is 503, by both doors."""
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=10) as http:
        known = await http.get(f"/auctions/{auction_id}/timer")
        assert (known.status_code, known.json()["stale"]) == (200, True)
        unknown = await http.get(f"/auctions/{fresh_id()}/timer")
        assert unknown.status_code == 503
        assert 1 <= int(unknown.headers["retry-after"]) <= 5
        assert unknown.json()["error_code"] == "DEPENDENCY_UNAVAILABLE"
        socket_of_unknown = await http.get(
            f"/auctions/{fresh_id()}/updates",
            headers={
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            },
        )
        assert socket_of_unknown.status_code == 503
        assert 1 <= int(socket_of_unknown.headers["retry-after"]) <= 5


@pytest.mark.requirement("R16", "B3", "B4")
async def test_a_store_that_is_killed_comes_back_with_everything(stack: LiveStack) -> None:
    """No socket notices: bids from before, from meanwhile and from after come once each and in order, on the same socket."""
    auction_id = await registered(stack, 2 * HOUR_MS)
    watchers = [Watcher(auction_id) for _ in range(WATCHERS)]
    async with crowd(*watchers, port=port_of(stack.url)):
        await posted(stack, [bid(auction_id) for _ in range(BIDS)])
        await until(stack.is_flushed, "the kernel has what was accepted")
        killed = await asyncio.to_thread(stack.kill, "valkey-server")
        await posted(stack, [bid(auction_id) for _ in range(BIDS)])
        await until(
            lambda: [pid for pid in stack.pids("valkey-server") if pid != killed and alive(pid)], "it runs again"
        )
        await posted(stack, [bid(auction_id) for _ in range(BIDS)])
        await all_have(watchers, stack, auction_id, 3 * BIDS)
        for watcher in watchers:
            assert sum(name == "bid.accepted" for _, name in watcher.events) == 3 * BIDS
            # Nothing was lost, so nobody had to be told what holds now.
            assert "timer.resynced" not in {name for _, name in watcher.events}
        assert not any(watcher.lost or watcher.closes for watcher in watchers)
        polled(lambda: stack.http.get("/readyz").status_code == 200, "ready again")
