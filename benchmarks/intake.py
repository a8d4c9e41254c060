"""How many bids a second can one engine take, fully committed: state, audit with its hash chain, announcement, cursor?

Two questions, one engine process, eight shards:

- *sustained*: bids are offered at a fixed rate; does the engine keep up, and how long from arrival to commit?
- *capacity*: the engine is stopped (SIGSTOP) while a backlog is appended, then continues; how fast is it gone?

Floor of the capacity: the same number of audit and update entries of the same size written by the simplest possible script,
one EVALSHA an event, pipelined by 200 from one process. It decides nothing, checks nothing and hashes nothing.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from auction_timer.processes import ChildSpec, ChildSupervisor, console_script
from benchmarks.harness import Bench, bench, draft, percentiles, report
from engine.contract.keys import ShardKeys, shard_of
from engine.domain.auction import Registration
from engine.domain.events import Bid, Register
from engine.domain.instants import HOUR_MS, EpochMs
from engine.store.protocol import Draft

SHARDS = 8
AUCTIONS = 400
CALL_MAX = 250
"""Events per append: a producer's batch."""

FLOOR_SCRIPT = """
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 1, 34))
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 35, 42))
return redis.call('HINCRBY', KEYS[3], 'seq', 1)
"""


async def measure(*, events: int, rate: int, seconds: float, save: bool) -> dict[str, Any]:
    """Offer `rate` bids a second for `seconds`, then drain a backlog of `events`."""
    async with bench() as made, engine_process(made) as engine_pid:
        await _register(made)
        sustained = await _sustained(made, rate, seconds)
        capacity = await _capacity(made, engine_pid, events)
        floor = await _floor(made, events)
    return report(
        "intake",
        {"shards": SHARDS, "auctions": AUCTIONS, "rate": rate, "seconds": seconds, "backlog": events},
        {
            "sustained": sustained,
            "capacity_per_s": round(capacity),
            "floor_per_s": round(floor),
            "ratio_to_floor": round(capacity / floor, 2),
        },
        save=save,
    )


@asynccontextmanager
async def engine_process(made: Bench) -> AsyncIterator[int]:
    """An engine process that holds all shards; its pid."""
    env = os.environ | {"AUCTION_TIMER_REDIS_URL": made.url, "AUCTION_TIMER_SHARDS": str(SHARDS)}
    async with ChildSupervisor() as children:
        child = await children.start(ChildSpec("engine", (*console_script(), "engine"), env))
        while not all([(await made.store.lease(shard)).holder for shard in range(SHARDS)]):
            await asyncio.sleep(0.05)
        assert child.pid is not None
        yield child.pid


async def _register(made: Bench) -> None:
    now = made.clock.now_ms()
    names = [f"auction-{number}" for number in range(AUCTIONS)]
    events = [Register(Registration(name, now, EpochMs(now + HOUR_MS))) for name in names]
    drafts = [
        draft(f"start-{name}", "offers.auction.started", name, event) for name, event in zip(names, events, strict=True)
    ]
    await append(made, list(zip(names, drafts, strict=True)))
    await _applied(made, 2 * AUCTIONS)


def _bids(count: int) -> Iterator[tuple[str, Draft]]:
    run = uuid4().hex[:8]
    for number in range(count):
        name = f"auction-{number % AUCTIONS}"
        bid = Bid(f"bid-{run}-{number}", 1_000 + number, "EUR", f"bidder-{number % 997}")
        yield name, draft(f"event-{run}-{number}", "auctions.bid.accepted", name, bid)


async def append(made: Bench, events: list[tuple[str, Draft]]) -> None:
    """Append events to the shards of their auctions, as a gateway does."""
    by_shard: dict[int, list[Draft]] = {}
    for name, event in events:
        by_shard.setdefault(shard_of(name, SHARDS), []).append(event)
    est = made.clock.now_ms()
    calls = [
        made.store.append(shard, drafts[start : start + CALL_MAX], est, uuid4().hex)
        for shard, drafts in by_shard.items()
        for start in range(0, len(drafts), CALL_MAX)
    ]
    await asyncio.gather(*calls)


async def _seq(made: Bench) -> int:
    heads = await asyncio.gather(*(made.store.head(shard) for shard in range(SHARDS)))
    return sum(head.chain.seq for head in heads)


async def _applied(made: Bench, records: int) -> None:
    while await _seq(made) < records:
        await asyncio.sleep(0.05)


async def _sustained(made: Bench, rate: int, seconds: float) -> dict[str, Any]:
    before = await _seq(made)
    bids = list(_bids(int(rate * seconds)))
    step = max(1, rate // 50)
    started = time.perf_counter()
    for start in range(0, len(bids), step):
        due = started + start / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await append(made, bids[start : start + step])
    offered_s = time.perf_counter() - started
    behind = before + len(bids) - await _seq(made)
    await _applied(made, before + len(bids))
    took_s = time.perf_counter() - started
    return {
        "offered_per_s": round(len(bids) / offered_s),
        "committed_per_s": round(len(bids) / took_s),
        "uncommitted_when_the_offer_ended": behind,
        "arrival_to_commit_ms": percentiles(await _latencies(made)),
    }


async def _latencies(made: Bench) -> list[float]:
    """From the stamp of the arrival to the instant the commit was built, from the audit itself: the last 2,000 per shard."""
    found: list[float] = []
    for shard in range(SHARDS):
        rows = await made.link.commands.execute_command(
            "XREVRANGE", ShardKeys.of(shard).audit, "+", "-", "COUNT", 2_000
        )  # fmt: skip
        for row in rows:
            fields = row[1] if isinstance(row[1], dict) else dict(zip(row[1][::2], row[1][1::2], strict=True))
            found.append(int(fields[b"recorded_at"]) - int(fields[b"occurred_at"]))
    return found


async def _capacity(made: Bench, engine_pid: int, events: int) -> float:
    before = await _seq(made)
    bids = list(_bids(events))
    os.kill(engine_pid, signal.SIGSTOP)
    try:
        for start in range(0, events, 5_000):
            await append(made, bids[start : start + 5_000])
    finally:
        os.kill(engine_pid, signal.SIGCONT)
    started = time.perf_counter()
    await _applied(made, before + events)
    return events / (time.perf_counter() - started)


async def _floor(made: Bench, events: int) -> float:
    client = made.link.commands
    sha = await client.script_load(FLOOR_SCRIPT)
    args = [part for number in range(17) for part in (f"field-{number:02d}", "0af7651916cd43dd8448eb211c")]
    args += [part for name in ("type", "auction_id", "version") for part in (name, "bid.accepted")] + [
        "body",
        "x" * 300,
    ]
    started = time.perf_counter()
    for start in range(0, events, 200):
        pipe = client.pipeline(transaction=False)
        for _ in range(min(200, events - start)):
            pipe.execute_command("EVALSHA", sha, 3, "floor:{0}:audit", "floor:{0}:updates", "floor:{0}:cursor", *args)
        await pipe.execute()
    return events / (time.perf_counter() - started)
