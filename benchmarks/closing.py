"""How late does an auction close, and how late is a tick, when 100 auctions end within the same second?

Measured where it counts, outside the engine: this process follows both lanes of Redis and compares the instant at which it
*has* the news with the instant it was due, on its own estimate of the auction clock (uncertainty stated). `spread` ends the
auctions 10 ms apart, `together` all in the same millisecond.

Floor: a bare `loop.call_at` in this process for the same instants, which does nothing at all.
"""

import asyncio
import contextlib
import math
from typing import Any
from uuid import uuid4

import orjson

from benchmarks.harness import Bench, bench, draft, percentiles, report
from benchmarks.intake import SHARDS, append, engine_process
from engine.domain.auction import Registration
from engine.domain.events import Register
from engine.domain.instants import EpochMs
from engine.domain.policy import Policy

LEAD_MS = 5_000
"""From registration to the ends: five rounds of ticks for each auction."""


async def measure(*, auctions: int, save: bool) -> dict[str, Any]:
    """Let `auctions` end within one second, twice."""
    async with bench() as made, engine_process(made):
        measured: dict[str, Any] = {}
        for name, step_ms in (("spread", 1_000 / auctions), ("together", 0.0)):
            measured[name] = await _round(made, auctions, step_ms)
        uncertainty_us = made.clock.uncertainty_us()
    measured["clock_uncertainty_us"] = uncertainty_us
    return report("closing", {"auctions": auctions, "lead_ms": LEAD_MS, "shards": SHARDS}, measured, save=save)


async def _round(made: Bench, auctions: int, step_ms: float) -> dict[str, Any]:
    run = uuid4().hex[:8]
    starts_at = EpochMs(made.clock.now_ms() + 500)
    ends = {f"{run}-{number}": EpochMs(starts_at + LEAD_MS + int(number * step_ms)) for number in range(auctions)}
    closes: dict[str, float] = {}
    ticks: list[float] = []
    following = [
        asyncio.create_task(_follow_events(made, ends, closes)),
        asyncio.create_task(_follow_ticks(made, ends, ticks)),
    ]
    floor_ms: list[float] = []
    loop = asyncio.get_running_loop()
    try:
        policy = Policy(soft_close_window_ms=1_000, extension_ms=1_000)
        await append(
            made,
            [
                (
                    name,
                    draft(name, "offers.auction.started", name, Register(Registration(name, starts_at, end, policy))),
                )
                for name, end in ends.items()
            ],
        )
        for end in ends.values():
            delay_s = (end * 1_000 - made.clock.now_us()) / 1e6
            loop.call_later(delay_s, lambda end=end: floor_ms.append(_late_ms(made, end)))
        while len(closes) < auctions or len(floor_ms) < auctions:
            await asyncio.sleep(0.01)
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
    return {
        "close_seen_late_ms": percentiles(list(closes.values())),
        "closed_early": sum(late < 0 for late in closes.values()),
        "tick_seen_late_ms": percentiles(ticks),
        "ticks": len(ticks),
        "floor_call_at_late_ms": percentiles(floor_ms),
    }


def _late_ms(made: Bench, due: EpochMs) -> float:
    return (made.clock.now_us() - due * 1_000) / 1_000


async def _follow_events(made: Bench, ends: dict[str, EpochMs], closes: dict[str, float]) -> None:
    positions = {shard: await made.store.last_update(shard) for shard in range(SHARDS)}
    while True:
        for shard, entries in (await made.store.read_updates(positions, 1_000, 1_000)).items():
            positions[shard] = entries[-1].stream_id
            for entry in entries:
                if entry.type == "timer.ended" and entry.auction_id in ends:
                    assert entry.auction_id not in closes, "closed twice"
                    closes[entry.auction_id] = _late_ms(made, ends[entry.auction_id])


async def _follow_ticks(made: Bench, ends: dict[str, EpochMs], ticks: list[float]) -> None:
    versions: dict[str, int] = {}
    async with contextlib.aclosing(made.store.ticks(range(SHARDS))) as lane:  # type: ignore[type-var]
        async for _, payload in lane:
            for line in payload.split(b"\n"):
                name, _, rest = line.decode().partition(" ")
                end = ends.get(name)
                if end is None:
                    continue
                frame = orjson.loads(rest.partition(" ")[2])
                # The first tick of a version answers a change at once; the others stand at whole seconds before the end.
                first = versions.get(name) != frame["version"]
                versions[name] = frame["version"]
                if not first:
                    due = EpochMs(end - math.ceil(frame["remaining_ms"] / 1_000) * 1_000)
                    ticks.append(_late_ms(made, due))
