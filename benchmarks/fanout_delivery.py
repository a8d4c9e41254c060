"""How long does a tick, and how long does a bid, take to those who watch, and what do readers that are stuck change?

The real thing: engine, Redis and gateway as processes; bids are appended to the intake as a second gateway would. 1,000
sockets watch one auction (`one`), or ten each of a hundred (`spread`). Every auction is in its soft close, so each bid is two
events: `bid.accepted` and `timer.extended`. In every second round, 5 % of the sockets do not read at all.

A delivery is measured by the server's own stamps against this machine's clock, which is also that of Redis:

    tick              from `server_time`, the engine's clock when it made the tick
    bid_from_commit   from `committed_at`, when the engine built the commit
    bid_from_arrival  from `occurred_at`, when the bid arrived in the intake, so with the engine's work

The clocks agree to about `clock_uncertainty_us`, and stamps are whole milliseconds, which adds half a one. What the client
takes to read is part of the figure. It checks that nobody who reads misses a bid or gets one twice.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

from benchmarks.fanout_client import BID_DIGITS
from benchmarks.fanout_processes import GatewayProcess, Part, client, gateway_process
from benchmarks.harness import Bench, bench, draft, report
from benchmarks.intake import SHARDS, append, engine_process
from benchmarks.machine import cpu_ns, on_client_core, rss_bytes
from engine.domain.auction import Registration
from engine.domain.events import Bid, Register
from engine.domain.instants import MINUTE_MS, EpochMs
from engine.domain.policy import Policy

STUCK_EVERY: Final = 20
AUCTIONS: Final = {"one": 1, "spread": 100}
BIDS_PER_S: Final = {"one": 20, "spread": 500}
"""Per second in all: 20 on the one, 5 on each of the hundred."""
TICKS_WITHIN_S: Final = 30.0
QUIET_S: Final = 0.2
SLOW_CONSUMERS: Final = 'auctions_gateway_disconnects_total{code="4101"}'
LANES: Final = ("tick", "bid_from_commit", "bid_from_arrival")


async def measure(*, sockets: int, seconds: float, rounds: int, save: bool) -> dict[str, Any]:
    """Watch for `seconds` in each of `rounds` rounds with, and as many without, readers that are stuck."""
    async with bench() as made, engine_process(made) as engine_pid:
        with on_client_core(made.server_pid, engine_pid):
            async with gateway_process(made, SHARDS) as gateway:
                seen: dict[str, dict[bool, list[dict[str, Any]]]] = {}
                for topology in AUCTIONS:
                    seen[topology] = {False: [], True: []}
                    for _ in range(rounds):
                        for stuck in (False, True):
                            seen[topology][stuck].append(
                                await _round(made, gateway, topology, sockets, seconds, stuck=stuck)
                            )
        uncertainty_us = made.clock.uncertainty_us()
    measured: dict[str, Any] = {topology: _judged(found) for topology, found in seen.items()}
    measured["clock_uncertainty_us"] = uncertainty_us
    parameters = {
        "sockets": sockets,
        "seconds": seconds,
        "rounds": rounds,
        "stuck_share": 1 / STUCK_EVERY,
        "auctions": AUCTIONS,
        "bids_per_s": BIDS_PER_S,
        "shards": SHARDS,
    }
    return report("fanout_delivery", parameters, measured, save=save)


async def _round(
    made: Bench, gateway: GatewayProcess, topology: str, sockets: int, seconds: float, *, stuck: bool
) -> dict[str, Any]:
    async with client() as watchers:
        cut_before = await gateway.counted(SLOW_CONSUMERS)
        auctions = await soft_closing(made, AUCTIONS[topology], seconds)
        opened = await watchers.ask(
            "open",
            port=gateway.port,
            auctions=auctions,
            sockets=sockets,
            stuck_every=STUCK_EVERY if stuck else 0,
        )
        await ticking(watchers, sockets - opened["stuck"])
        await watchers.ask("measure")
        used, since = (cpu_ns(gateway.pid), cpu_ns(watchers.pid)), time.monotonic_ns()
        async with _memory(gateway) as rss:
            placed = await bid(made, auctions, BIDS_PER_S[topology], seconds)
            await everyone_has(watchers, placed)
            took = time.monotonic_ns() - since
            of_gateway, of_client = cpu_ns(gateway.pid) - used[0], cpu_ns(watchers.pid) - used[1]
            cut = round(await gateway.counted(SLOW_CONSUMERS) - cut_before)
        found = await watchers.ask("report")
    return found | {
        "stuck": opened["stuck"],
        "cut_with_4101": cut,
        "rss": rss,
        "cpu": {"gateway": of_gateway / took, "client": of_client / took},
        "bids_per_auction": placed,
    }


async def soft_closing(made: Bench, count: int, seconds: float) -> list[str]:
    """Register auctions that every bid extends, and that end well after `seconds`."""
    run = uuid4().hex[:8]
    names = [f"{run}-{number}" for number in range(count)]
    now = made.clock.now_ms()
    end = EpochMs(now + round(seconds * 1_000) + 2 * MINUTE_MS)
    policy = Policy(soft_close_window_ms=end - now, extension_ms=end - now)
    events = [
        (name, draft(name, "offers.auction.started", name, Register(Registration(name, now, end, policy))))
        for name in names
    ]
    await append(made, events)
    return names


async def ticking(watchers: Part, readers: int) -> None:
    """Wait until about everyone who reads has had a tick.

    Raises:
        TimeoutError: they have not.
    """
    async with asyncio.timeout(TICKS_WITHIN_S):
        while (await watchers.ask("progress"))["frames"] < readers:
            await asyncio.sleep(QUIET_S)


async def bid(made: Bench, auctions: list[str], per_second: int, seconds: float, *, first: int = 1) -> int:
    """Place bids at a steady rate, numbered from `first` in each auction; how many each of them had, at least one."""
    run = uuid4().hex[:8]
    each = max(1, round(per_second * seconds / len(auctions)))
    started = time.perf_counter()
    for turn in range(each):
        # In turns of at most ten, evenly over the time there is for one bid on each.
        for start in range(0, len(auctions), 10):
            due_s = (turn + start / len(auctions)) * seconds / each
            await asyncio.sleep(max(0.0, started + due_s - time.perf_counter()))
            await append(made, [_bid(run, name, first + turn) for name in auctions[start : start + 10]])
    return each


def _bid(run: str, name: str, number: int) -> tuple[str, Any]:
    event = Bid(f"{number:0{BID_DIGITS}d}", 1_000 + number, "EUR", f"bidder-{number % 97}")
    return name, draft(f"{run}-{name}-{number}", "auctions.bid.accepted", name, event)


async def everyone_has(watchers: Part, number: int) -> None:
    """Wait until everyone who reads has the bid of that number.

    Raises:
        TimeoutError: somebody does not get it.
    """
    async with asyncio.timeout(TICKS_WITHIN_S):
        while (await watchers.ask("progress"))["behind"] < number:
            await asyncio.sleep(QUIET_S)


@asynccontextmanager
async def _memory(gateway: GatewayProcess) -> AsyncIterator[dict[str, int]]:
    """Resident memory of the gateway over a while, in bytes."""
    first = rss_bytes(gateway.pid)
    found = {"start": first, "max": first, "end": first}

    async def look() -> None:
        while True:
            found["max"] = max(found["max"], rss_bytes(gateway.pid))
            await asyncio.sleep(QUIET_S)

    looking = asyncio.create_task(look())
    try:
        yield found
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        found["end"] = rss_bytes(gateway.pid)


def _judged(found: dict[bool, list[dict[str, Any]]]) -> dict[str, Any]:
    judged: dict[str, Any] = {
        "all_reading": _summed(found[False]),
        "some_stuck": _summed(found[True]),
    }
    judged["p99_change_by_stuck"] = {
        lane: round(
            judged["some_stuck"]["delivery_ms"][lane]["p99"] / judged["all_reading"]["delivery_ms"][lane]["p99"] - 1, 3
        )
        for lane in LANES
    }
    return judged


def _summed(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, with the p99 of each; sums of what must not be."""
    delivery: dict[str, Any] = {}
    for lane in LANES:
        each = [found["delivery_ms"][lane] for found in rounds if found["delivery_ms"][lane]]
        delivery[lane] = {
            "p50": statistics.median(one["p50"] for one in each),
            "p99": statistics.median(one["p99"] for one in each),
            "max": max(one["max"] for one in each),
            "p99_of_rounds": [one["p99"] for one in each],
        }
    closes: dict[str, int] = {}
    for found in rounds:
        for code, count in found["closes"].items():
            closes[code] = closes.get(code, 0) + count
    return {
        "delivery_ms": delivery,
        "frames": sum(found["frames"] for found in rounds),
        "gaps": sum(found["gaps"] for found in rounds),
        "doubles": sum(found["doubles"] for found in rounds),
        "readers_closed": closes,
        "stuck": [found["stuck"] for found in rounds],
        "cut_with_4101": [found["cut_with_4101"] for found in rounds],
        "share_of_a_core": {
            process: [round(found["cpu"][process], 2) for found in rounds] for process in ("gateway", "client")
        },
        "gateway_rss_mb": {
            when: [round(found["rss"][when] / 1e6, 1) for found in rounds] for when in ("start", "max", "end")
        },
    }
