"""How long is an engine away? From its start to every live timer loaded and scheduled again.

    python -m benchmarks recovery
    python -m benchmarks.recovery URL TIMERS    the part that is measured: a process of its own, so that its memory is its own

Floor: reading the same rows from the same server, pipelined, and throwing them away.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.harness import Bench, bench, report, run
from benchmarks.machine import rss_bytes
from engine.app import Engine
from engine.clock import SystemClock
from engine.contract.keys import ShardKeys, shard_of
from engine.contract.timers import FIELDS, TimerRecord, sealed
from engine.domain.auction import Auction, Registration
from engine.domain.events import Register
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, EpochMs
from engine.lifetime import calm_collector
from engine.metrics import EngineMetrics
from engine.settings import Settings
from engine.store.link import RedisLink
from engine.store.redis import PAGE_MAX, RedisStore

SHARDS = 8


async def measure(*, sizes: list[int], save: bool) -> dict[str, Any]:
    """Load each number of live timers, on a server and in a process of its own."""
    measured = {str(timers): await _measure(timers) for timers in sizes}
    return report("recovery", {"timers": sizes, "shards": SHARDS}, measured, save=save)


async def _measure(timers: int) -> dict[str, Any]:
    async with bench() as made:
        await _fill(made, timers)
        floor_s = await _floor(made)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.recovery", made.url, str(timers)),
            cwd=Path(__file__).parent.parent,
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await process.communicate()
        loaded = json.loads(said.splitlines()[-1])
        used = await made.link.commands.info("memory")
    return {
        "load_s": round(loaded["took_s"], 3),
        "floor_s": round(floor_s, 3),
        "ratio_to_floor": round(loaded["took_s"] / floor_s, 2),
        "timers_per_s": round(timers / loaded["took_s"]),
        "engine_bytes_per_timer": round(loaded["grown_bytes"] / timers),
        "store_bytes_per_timer": round(int(used["used_memory"]) / timers),
    }


async def _fill(made: Bench, timers: int) -> None:
    now = made.clock.now_ms()
    pipe = made.link.commands.pipeline(transaction=False)
    for number in range(timers):
        auction_id = f"auction-{number:07d}"
        keys = ShardKeys.of(shard_of(auction_id, SHARDS))
        registration = Registration(auction_id, EpochMs(now - HOUR_MS), EpochMs(now + 24 * HOUR_MS + number))
        auction = fold(Auction(auction_id), Register(registration), now)[-1].after
        record = TimerRecord(auction, f"{number:032x}", f"req-{number:032x}")
        pipe.execute_command("HSET", keys.timer(auction_id), *_flat(sealed(record)))
        pipe.execute_command("ZADD", keys.deadlines, auction.ends_at, auction_id)
        if number % 1_000 == 999:
            await pipe.execute()
    await pipe.execute()


def _flat(fields: dict[str, str]) -> Iterator[str]:
    for pair in fields.items():
        yield from pair


async def _floor(made: Bench) -> float:
    started = time.perf_counter()
    client = made.link.commands
    for shard in range(SHARDS):
        keys = ShardKeys.of(shard)
        ids = await client.execute_command("ZRANGE", keys.deadlines, 0, -1)
        for start in range(0, len(ids), PAGE_MAX):
            pipe = client.pipeline(transaction=False)
            for name in ids[start : start + PAGE_MAX]:
                pipe.execute_command("HMGET", keys.timer(name.decode()), *FIELDS)
            await pipe.execute()
    return time.perf_counter() - started


async def _load(url: str, timers: int) -> dict[str, float]:
    calm_collector()
    clock = SystemClock()
    link = RedisLink(url, clock)
    settings = Settings.load(redis_url=url, shards=SHARDS, instance="bench")
    engine = Engine(RedisStore(link, clock), clock, settings, EngineMetrics(CollectorRegistry()), lambda: link.retries)
    before = rss_bytes(os.getpid())
    started = time.perf_counter()
    running = asyncio.create_task(engine.run())
    while sum(len(shard.live) for shard in engine.shards.values() if shard.loaded) < timers:
        await asyncio.sleep(0.002)
    took = time.perf_counter() - started
    grown = rss_bytes(os.getpid()) - before
    running.cancel()
    await asyncio.wait({running})
    await link.close()
    return {"took_s": took, "grown_bytes": grown}


if __name__ == "__main__":
    print(json.dumps(run(_load(sys.argv[1], int(sys.argv[2])))))
