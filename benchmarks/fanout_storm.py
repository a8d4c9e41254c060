"""How long until everybody is back, when every socket is lost at the same moment in the middle of bidding?

5,000 sockets watch fifty auctions on which bids are placed all the while. Each comes back at once, without the jitter that a
good client adds, with `since`; a refusal is tried again after about a second.

    dropped   the network resets every socket; the gateway stays
    killed    SIGKILL of the gateway; its supervisor starts another on the same port, which must first read the lanes
    away      a fifth as many are cut, and come back when they have missed `missed` bids each, which is twice as many events.
              One socket on each auction stays: how late do the others' returns make its bids and ticks?

It checks each bid of each socket: nobody misses one or gets one twice, or was told `recovered: false`. `back_ms` is counted
from the loss to the answer to the handshake that succeeded, with the whole start of the process where it was killed.
"""

import asyncio
import os
import signal
import time
from typing import Any, Final

from benchmarks.fanout_delivery import bid, everyone_has, soft_closing, ticking
from benchmarks.fanout_processes import GatewayProcess, client, gateway_process
from benchmarks.harness import Bench, bench, report
from benchmarks.intake import SHARDS, engine_process
from benchmarks.machine import cpu_ns, on_client_core

AUCTIONS: Final = 50
BIDS_PER_S: Final = 100
MISSED_PER_S: Final = 2_000
AWAY_SHARE: Final = 5


async def measure(*, sockets: int, seconds: float, missed: int, save: bool) -> dict[str, Any]:
    """Bid for `seconds` around each loss, and place `missed` bids on each auction while nearly nobody is there."""
    async with bench() as made, engine_process(made) as engine_pid:
        with on_client_core(made.server_pid, engine_pid):
            async with gateway_process(made, SHARDS) as gateway:
                measured = {
                    "dropped": await _storm(made, gateway, sockets, seconds, kill=False),
                    "killed": await _storm(made, gateway, sockets, seconds, kill=True),
                    "away": await _away(made, gateway, sockets // AWAY_SHARE, seconds, missed),
                }
    parameters = {"sockets": sockets, "seconds": seconds, "missed": missed}
    parameters |= {"auctions": AUCTIONS, "bids_per_s": BIDS_PER_S, "away_share": 1 / AWAY_SHARE, "shards": SHARDS}
    return report("fanout_storm", parameters, measured, save=save)


async def _storm(made: Bench, gateway: GatewayProcess, sockets: int, seconds: float, *, kill: bool) -> dict[str, Any]:
    async with client() as watchers:
        auctions = await soft_closing(made, AUCTIONS, seconds)
        await watchers.ask("open", port=gateway.port, auctions=auctions, sockets=sockets)
        await ticking(watchers, sockets)
        await watchers.ask("measure")
        bidding = asyncio.create_task(bid(made, auctions, BIDS_PER_S, seconds))
        try:
            await asyncio.sleep(seconds / 4)
            watchers.tell(do="storm", drop=not kill)
            if kill:
                os.kill(gateway.pid, signal.SIGKILL)
                await gateway.until_alive()
            back = await watchers.answer()
            placed = await bidding
        finally:
            bidding.cancel()
        # One more on each auction: who was told that something is missing counts again from here.
        await bid(made, auctions, 1, 0.0, first=placed + 1)
        await everyone_has(watchers, placed + 1)
        found = await watchers.ask("report")
    return _judged(back, found, placed + 1)


async def _away(made: Bench, gateway: GatewayProcess, sockets: int, seconds: float, missed: int) -> dict[str, Any]:
    async with client() as watchers, client() as staying:
        auctions = await soft_closing(made, AUCTIONS, seconds)
        await staying.ask("open", port=gateway.port, auctions=auctions, sockets=AUCTIONS)
        await watchers.ask("open", port=gateway.port, auctions=auctions, sockets=sockets)
        await ticking(watchers, sockets)
        await watchers.ask("cut")
        placed = await bid(made, auctions, MISSED_PER_S, missed * AUCTIONS / MISSED_PER_S)
        await everyone_has(staying, placed)
        for one in (watchers, staying):
            await one.ask("measure")
        used, since = cpu_ns(gateway.pid), time.monotonic_ns()
        bidding = asyncio.create_task(bid(made, auctions, BIDS_PER_S, seconds / 4, first=placed + 1))
        try:
            back = await watchers.ask("return")
            placed += await bidding
            await everyone_has(watchers, placed)
            used, took = cpu_ns(gateway.pid) - used, time.monotonic_ns() - since
        finally:
            bidding.cancel()
        await everyone_has(staying, placed)
        found, stayed = await watchers.ask("report"), await staying.ask("report")
    return _judged(back, found, placed) | {
        "caught_up_s": round(took / 1e9, 2),
        "gateway_cpu_ms_per_socket": round(used / 1e6 / sockets, 3),
        "delivery_ms_of_who_stayed": stayed["delivery_ms"],
    }


def _judged(back: dict[str, Any], found: dict[str, Any], placed: int) -> dict[str, Any]:
    recovered = found["recovered"]
    return {
        "back_ms": back["back_ms"],
        "recovered": recovered,
        "recovered_share": round(recovered.get("true", 0) / max(1, sum(recovered.values())), 4),
        "refused": back["refused"],
        "closes": found["closes"],
        "bids_per_auction": placed,
        "gaps": found["gaps"],
        "doubles": found["doubles"],
    }
