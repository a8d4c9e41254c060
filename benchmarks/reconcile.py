"""How long does a pass over many live auctions take, and do ticks notice?

An engine process holds the auctions, each of which ticks every 5 s. A reconciler in this process reads the log once,
then makes passes. Ticks are followed in three stretches: without passes, while a reconciler *process* makes them as often
as it may be set to, and again without, so that what the machine did by itself can be seen.

Floor: reading the same hashes from the same server, page by page, and throwing them away.
"""

import asyncio
import contextlib
import math
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry

from auction_timer.processes import ChildSpec, ChildSupervisor, console_script
from benchmarks.harness import Bench, bench, draft, percentiles, report
from benchmarks.intake import SHARDS, append, engine_process
from engine.contract.keys import RECONCILER, shard_of
from engine.domain.auction import Registration
from engine.domain.events import Register
from engine.domain.instants import HOUR_MS, EpochMs
from engine.domain.policy import Policy
from engine.lifetime import calm_collector
from engine.store.reconciler_lease import ReconcilerLease
from reconciler.loop import Limits, Reconciler
from reconciler.metrics import ReconcilerMetrics

PASSES: Final = 5
INTERVAL_MS: Final = 200
"""The shortest that may be set: fifty times as often as by default."""
TICK_MS: Final = 5_000


async def measure(*, auctions: int, seconds: float, save: bool) -> dict[str, Any]:
    """Compare `auctions` live auctions with the log, and follow their ticks for `seconds` three times."""
    calm_collector()  # as a reconciler does
    async with bench() as made, engine_process(made):
        names = [f"auction-{number}" for number in range(auctions)]
        ends = await _register(made, names)
        reconciler = Reconciler(
            made.store,
            ReconcilerLease(made.link),
            None,
            made.clock,
            ReconcilerMetrics(CollectorRegistry()),
            holder="bench",
            shards=SHARDS,
            limits=Limits(interval_ms=INTERVAL_MS, repairs_max=0, lease_ms=1_500, heartbeat_ms=300),
        )
        first = await reconciler.make_pass(repairing=False)
        passes = [await reconciler.make_pass(repairing=False) for _ in range(PASSES)]
        assert all(each.auctions == auctions for each in passes)
        found = sum(len(each.findings) for each in passes)
        floor_ms = await _floor_ms(made, names)
        ticks: dict[str, Any] = {"before": await _ticks(made, ends, seconds)}
        async with _reconciling(made):
            ticks["while_reconciling"] = await _ticks(made, ends, seconds)
        ticks["after"] = await _ticks(made, ends, seconds)
    took_ms = sorted(each.took_ms for each in passes)
    measured = {
        "first_pass_ms": round(first.took_ms),
        "pass_ms": {"median": round(took_ms[PASSES // 2]), "max": round(took_ms[-1])},
        "floor_ms": round(floor_ms),
        "ratio_to_floor": round(took_ms[PASSES // 2] / floor_ms, 2),
        "drifts": found,
        "tick_late_ms": ticks,
    }
    return report("reconcile", {"auctions": auctions, "seconds": seconds, "shards": SHARDS}, measured, save=save)


async def _register(made: Bench, names: list[str]) -> dict[str, EpochMs]:
    now = made.clock.now_ms()
    policy = Policy(tick_interval_ms=TICK_MS)
    # Ends spread over an interval, so that ticks are too.
    ends = {name: EpochMs(now + 24 * HOUR_MS + number % TICK_MS) for number, name in enumerate(names)}
    events = [
        (name, draft(f"start-{name}", "offers.auction.started", name, Register(Registration(name, now, end, policy))))
        for name, end in ends.items()
    ]
    await append(made, events)
    while sum([(await made.store.head(shard)).chain.seq for shard in range(SHARDS)]) < 2 * len(names):
        await asyncio.sleep(0.05)
    return ends


async def _floor_ms(made: Bench, names: list[str]) -> float:
    began = time.perf_counter()
    for shard in range(SHARDS):
        await made.store.timers(shard, [name for name in names if shard_of(name, SHARDS) == shard])
    return (time.perf_counter() - began) * 1_000


async def _ticks(made: Bench, ends: dict[str, EpochMs], seconds: float) -> dict[str, Any]:
    """How late ticks were seen: they stand at whole intervals before the end."""
    late: list[float] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), contextlib.aclosing(made.store.ticks(range(SHARDS))) as lane:  # type: ignore[type-var]
            async for _, payload in lane:
                now_us = made.clock.now_us()
                for line in payload.split(b"\n"):
                    name, _, rest = line.decode().partition(" ")
                    if (end := ends.get(name)) is not None:
                        remaining_ms = orjson.loads(rest.partition(" ")[2])["remaining_ms"]
                        due = end - math.ceil(remaining_ms / TICK_MS) * TICK_MS
                        late.append(now_us / 1_000 - due)
    return {"ticks": len(late), **percentiles(late)} if late else {"ticks": 0}


@contextlib.asynccontextmanager
async def _reconciling(made: Bench) -> Any:
    """A reconciler process that makes passes as often as it may."""
    with TemporaryDirectory(prefix="at-bench-") as directory:
        env = os.environ | {
            "AUCTION_TIMER_REDIS_URL": made.url,
            "AUCTION_TIMER_SHARDS": str(SHARDS),
            "AUCTION_TIMER_DATA_DIR": str(Path(directory) / "data"),
            "AUCTION_TIMER_RECONCILE_INTERVAL_MS": str(INTERVAL_MS),
        }
        async with ChildSupervisor() as children:
            await children.start(ChildSpec("reconciler", (*console_script(), "reconciler"), env))
            while not await made.link.commands.execute_command("HGET", RECONCILER, "holder"):
                await asyncio.sleep(0.1)
            yield
