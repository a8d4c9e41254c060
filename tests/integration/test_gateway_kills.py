"""A thousand watchers, a storm of bids, and a gateway that is killed in its midst."""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.integration.crowd import Watcher, crowd, gaps, lane, port_of, summary, until
from tests.integration.events import bid, fresh_id, started
from tests.integration.own_role import OwnGateway
from tests.integration.records import drained
from tests.live import LiveStack, alive
from tests.live import until as polled

pytestmark = pytest.mark.integration

AUCTIONS: Final = 20
WATCHERS: Final = 1_000
BIDS: Final = 600
"""Each extends its auction, so there are twice as many events: 60,000 frames to all watchers together."""
BATCH: Final = 20
KILLS: Final = 1
HOUR_MS: Final = 3_600_000


async def storm(http: httpx.AsyncClient, auction_ids: list[str], over: asyncio.Event) -> None:
    """Bid on all auctions in turn, and stop when everyone has had enough."""
    sent = 0
    while sent < BIDS or not over.is_set():
        bids = [bid(auction_ids[(sent + number) % AUCTIONS]) for number in range(BATCH)]
        answer = await http.post("/events", json=bids)
        assert answer.status_code == 202, answer.text
        sent += BATCH
        # As many a second as the machine can do would only test the machine.
        await asyncio.sleep(0.02 if sent < BIDS else 0.2)


def next_gateway(stack: LiveStack, killed: list[int], own: int) -> int | None:
    """The gateway of a stack that runs and was not killed yet."""
    found = [pid for pid in stack.pids("gateway") if pid not in (*killed, own) and alive(pid)]
    return found[0] if found else None


async def kill_in_the_midst(stack: LiveStack, watchers: list[Watcher], own: int) -> list[int]:
    """Kill the gateway while frames are on their way, let everyone come back, and again."""
    killed: list[int] = []
    for _ in range(KILLS):
        told = sum(len(watcher.events) for watcher in watchers)
        await until(
            lambda told=told: sum(len(watcher.events) for watcher in watchers) > told + WATCHERS,
            "frames are on the way",
            watchers,
        )
        await asyncio.sleep(random.uniform(0, 0.1))
        pid = next_gateway(stack, killed, own)
        assert pid is not None
        lost = [watcher.lost for watcher in watchers]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        await until(
            lambda lost=lost: all(
                watcher.connected and watcher.lost > before for watcher, before in zip(watchers, lost, strict=True)
            ),
            "everyone is back",
            watchers,
        )
    return killed


@pytest.mark.requirement("B4", "R16")
async def test_killing_a_gateway_under_a_thousand_watchers_loses_and_doubles_nothing(short_tmp: Path) -> None:
    """Everyone comes back with a cursor and is told what was missed: the same sequence for all, as the store holds it."""
    stack = await asyncio.to_thread(LiveStack, short_tmp)
    own: OwnGateway | None = None
    try:
        # The bids come in over a gateway that lives, so that the storm goes on while the other one is dead.
        own = await asyncio.to_thread(OwnGateway, stack)
        auction_ids = [fresh_id() for _ in range(AUCTIONS)]
        async with httpx.AsyncClient(base_url=own.url, trust_env=False, timeout=30) as http:
            now = (await asyncio.to_thread(stack.post, bid(fresh_id())))[0]["arrival_ms"]
            # In its soft close from the start, and every bid moves the end.
            policy: dict[str, Any] = {
                "soft_close_window_ms": HOUR_MS,
                "extension_ms": 900_000,
                "extends_on": "any_accepted",
            }
            starts = [started(each, now, now + 600_000, **policy) for each in auction_ids]
            assert (await http.post("/events", json=starts)).status_code == 202
            for each in auction_ids:
                await asyncio.to_thread(stack.until_status, each, "CLOSING")
            watchers = [Watcher(auction_ids[number % AUCTIONS]) for number in range(WATCHERS)]
            async with crowd(*watchers, port=port_of(stack.url)):
                over = asyncio.Event()
                storming = asyncio.create_task(storm(http, auction_ids, over))
                try:
                    killed = await kill_in_the_midst(stack, watchers, own.process.pid)
                finally:
                    over.set()
                    await storming
                last = await asyncio.to_thread(settled, stack, auction_ids)
                await until(
                    lambda: all(watcher.since == last[watcher.auction_id] for watcher in watchers),
                    "everyone has the last",
                    watchers,
                )
                lanes = await asyncio.to_thread(lane, stack, auction_ids)
                print(summary(watchers))
                assert sum(len(events) for events in lanes.values()) >= BIDS
                assert gaps(watchers, lanes) == []
                _judge(watchers, killed)
    finally:
        if own is not None:
            own.stop()
        assert await asyncio.to_thread(stack.stop) == 0


def settled(stack: LiveStack, auction_ids: list[str]) -> dict[str, str]:
    """The last cursor of each auction, once the engine has applied everything."""
    polled(lambda: drained(stack), "everything is applied")
    return {name: events[-1][0] for name, events in lane(stack, auction_ids).items()}


def _judge(watchers: list[Watcher], killed: list[int]) -> None:
    assert len(set(killed)) == KILLS
    told = [[shot["recovered"] for shot in watcher.snapshots] for watcher in watchers]
    assert all(answers[0] is None and None not in answers[1:] for answers in told)
    assert all(len(answers) > KILLS for answers in told)
    # Far less was missed than a gateway reads back: nobody has to start over.
    assert not any(False in answers for answers in told)
    # Nobody was sent away by a gateway that lives.
    assert not any(watcher.closes for watcher in watchers)
