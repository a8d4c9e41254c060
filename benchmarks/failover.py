"""What a failover costs, and whether it costs anything else: 100 live auctions under bids, and the primary gets SIGKILL.

    python -m benchmarks.failover --runs 10

Real processes: a Sentinel group (1 primary, 2 replicas, 3 sentinels) or a Cluster (3 primaries with 2
replicas each), and
`auction-timer serve` against it in `replicated` durability. Auctions end before, during and after the outage. Every bid is
repeated with its own id until it is acknowledged. Afterwards the audit log is read through the API and judged:

- lost: acknowledged bids that are not in the log;
- missing, doubled, early: auctions that did not close exactly once, at the end that the log gives them;
- gap: from the kill until every shard has acknowledged a bid again;
- at once, after: how far the remaining time that was shown was from the truth, until the end of the gap
  and a second, and from then on. The truth is the fold of the log at that instant, on the clock of this machine, which is
  the servers' own. The end that was shown is compared with the log's, the date that came with it with the
  request's own time: what an answer says was true at some moment of its request, or it is an error;
- request: the longest request that was judged. No error of the shown date that is smaller can be told from its way.
"""

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx

from benchmarks.harness import report, run
from engine.contract.keys import shard_of
from tests.live import LiveStack
from tests.topologies import SHARDS, ClusterGroup, SentinelGroup

WINDOW_MS: Final = 60_000
EXTENSION_MS: Final = 1_500
FIRST_END_MS: Final = 3_000
LAST_END_MS: Final = 9_000
"""From the start of the run: before, during and after an outage of two to three seconds."""
KILL_AFTER_S: Final = 2.5
SETTLED_MS: Final = 250
"""A sample asked for so soon after its auction's end moved is not judged: the bid may be on its way through the log."""
RESUMED_MS: Final = 1_000
"""From the first acknowledgement after the outage until everything is expected to be as before."""
OVER_WITHIN_S: Final = 40.0
UNDER_WAY_MS: Final = 50
"""An acknowledgement so soon after the kill was on its way before."""
BIDDERS: Final = 8
BID_EVERY_S: Final = 0.1
SAMPLE_EVERY_S: Final = 0.1

Topology = SentinelGroup | ClusterGroup
KINDS: Final[dict[str, Callable[[], Topology]]] = {
    "sentinel": SentinelGroup,
    "cluster": partial(ClusterGroup, replicas=2),
}


@dataclass(slots=True)
class Seen:
    """What was seen from outside."""

    acknowledged: set[str] = field(default_factory=set)
    """Event ids of bids."""
    acknowledged_at: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Wall clock in ms, by shard: in a Cluster the outage is that of some."""
    samples: list["Sample"] = field(default_factory=list)

    def is_again(self, killed_at: float) -> bool:
        """Whether every shard has acknowledged a bid again."""
        return all(acknowledged[-1] > killed_at + UNDER_WAY_MS for acknowledged in self.acknowledged_at.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of `GET /auctions/{id}/timer`, and the wall clock before and after its request; in ms."""

    name: str
    before: float
    after: float
    server_time: int
    ends_at: int

    def error_ms(self, true_end: int) -> float:
        """How far the shown remaining time is from the truth, whenever within the request the answer was made.

        To take the middle of the request would charge the viewer's own waiting to the servers: half a second on a machine
        that stands still for one. A long request excuses nothing about the end.
        """
        date = max(self.before - self.server_time - 1, self.server_time - self.after, 0.0)
        return abs(self.ends_at - true_end) + date


def _wall_ms() -> float:
    return time.time() * 1_000


def _event(event_type: str, **data: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": uuid4().hex, "type": event_type, "source": "benchmark", "data": data}


async def _send(client: httpx.AsyncClient, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Post events, again and again with the same ids, until they are acknowledged."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = await client.post("/events", json=events)
            if answer.status_code == httpx.codes.ACCEPTED:
                results: list[dict[str, Any]] = answer.json()["results"]
                return results
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
        await asyncio.sleep(0.02)


async def _bid(client: httpx.AsyncClient, names: list[str], seen: Seen, first: int) -> None:
    """One bidder: takes its auctions in turn."""
    number = first
    while True:
        name = names[number % len(names)]
        number += BIDDERS
        placed = _event("auctions.bid.accepted", auction_id=name, bid_id=uuid4().hex)
        await _send(client, [placed])
        seen.acknowledged.add(placed["id"])
        seen.acknowledged_at[shard_of(name, SHARDS)].append(_wall_ms())
        await asyncio.sleep(BID_EVERY_S)


async def _sample(client: httpx.AsyncClient, names: list[str], seen: Seen) -> None:
    """One viewer: looks at the auctions in turn, outage or not."""
    number = 0
    while True:
        name = names[number % len(names)]
        number += 1
        with contextlib.suppress(httpx.TransportError):
            before = _wall_ms()
            answer = await client.get(f"/auctions/{name}/timer")
            if answer.status_code == httpx.codes.OK:
                view = answer.json()
                if view["status"] in ("ACTIVE", "CLOSING"):
                    seen.samples.append(Sample(name, before, _wall_ms(), view["server_time"], view["ends_at"]))
        await asyncio.sleep(SAMPLE_EVERY_S / BIDDERS)


@contextlib.asynccontextmanager
async def _beside(*works: Any) -> AsyncIterator[list["asyncio.Task[None]"]]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all_over(client: httpx.AsyncClient, names: list[str]) -> bool:
    for name in names:
        answer = await client.get(f"/auctions/{name}/timer")
        if answer.status_code != httpx.codes.OK or answer.json()["status"] != "ENDED":
            return False
    return True


async def _records(client: httpx.AsyncClient, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    query = {"limit": "500"}
    while True:
        answer = await client.get(f"/auctions/{name}/audit", params=query)
        answer.raise_for_status()
        page = answer.json()
        found += page["records"]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


def _judge(seen: Seen, logs: dict[str, list[dict[str, Any]]], ends: dict[str, int], killed_at: float) -> dict[str, Any]:
    """One run as numbers. Nothing but the log decides what is true."""
    again_at = max(
        min(at for at in acknowledged if at > killed_at + UNDER_WAY_MS)
        for acknowledged in seen.acknowledged_at.values()
    )
    recorded = {record["event_id"] for log in logs.values() for record in log if record["event_id"]}
    missing = doubled = early = 0
    truth: dict[str, list[tuple[int, int]]] = {}
    for name, log in logs.items():
        moves = truth[name] = [(0, ends[name])]
        closes = []
        for record in log:
            if record["event_type"] == "auction_timer_extended":
                moves.append((record["occurred_at"], record["details"]["ends_at"]))
            elif record["event_type"] == "auction_timer_ended":
                closes.append(record)
        missing += not closes
        doubled += len(closes) > 1
        early += any(
            record["occurred_at"] != moves[-1][1] or record["recorded_at"] < record["occurred_at"] for record in closes
        )
    at_once, after, requests = [0.0], [0.0], [0.0]
    for sample in seen.samples:
        moves = truth[sample.name]
        if any(sample.before - SETTLED_MS < since <= sample.after for since, _ in moves):
            continue
        requests.append(sample.after - sample.before)
        settled = sample.after < killed_at or sample.before > again_at + RESUMED_MS
        (after if settled else at_once).append(
            sample.error_ms([end for since, end in moves if since <= sample.before][-1])
        )
    return {
        "gap_ms": round(again_at - killed_at),
        "bids": len(seen.acknowledged),
        "lost": sum(event_id not in recorded for event_id in seen.acknowledged),
        "missing": missing,
        "doubled": doubled,
        "early": early,
        "at_once_ms": round(max(at_once)),
        "after_ms": round(max(after)),
        "request_ms": round(max(requests)),
        "samples": len(requests) - 1,
    }


async def one_run(topology: Topology, auctions: int) -> dict[str, Any]:
    """One failover, under bids, from the start of the auctions to the last close."""
    env = {
        "AUCTION_TIMER_DURABILITY": "replicated",
        "AUCTION_TIMER_REDIS_URL": topology.url,
        "AUCTION_TIMER_DRAIN_MS": "0",
        # A failover of more than five seconds would be an outage, and push the ends that it is judged by.
        "AUCTION_TIMER_OUTAGE_EXTENSION_MS": "0",
    }
    with tempfile.TemporaryDirectory(prefix="at-") as directory:
        stack = await asyncio.to_thread(LiveStack, Path(directory), env=env)
        try:
            async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=10) as client:
                return await _failover(topology, client, auctions)
        finally:
            await asyncio.to_thread(stack.stop)


async def _failover(topology: Topology, client: httpx.AsyncClient, auctions: int) -> dict[str, Any]:
    run_id = uuid4().hex[:8]
    begins = int(_wall_ms())
    step = (LAST_END_MS - FIRST_END_MS) / auctions
    ends = {f"{run_id}-{number}": begins + FIRST_END_MS + int(number * step) for number in range(auctions)}
    policy = {"soft_close_window_ms": WINDOW_MS, "extension_ms": EXTENSION_MS}
    starts = [
        _event("offers.auction.started", auction_id=name, starts_at=begins, ends_at=end, policy=policy)
        for name, end in ends.items()
    ]
    await _send(client, starts)
    names = list(ends)
    seen = Seen()
    bidders = [_bid(client, names, seen, first) for first in range(BIDDERS)]
    async with _beside(*bidders, _sample(client, names, seen)) as tasks:
        await asyncio.sleep(KILL_AFTER_S)
        victim = await asyncio.to_thread(topology.victim, names)
        killed_at = _wall_ms()
        victim.kill()
        await asyncio.sleep((begins + LAST_END_MS - _wall_ms()) / 1_000)
        async with asyncio.timeout(OVER_WITHIN_S):
            while not seen.is_again(killed_at):
                await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks), tasks
    async with asyncio.timeout(OVER_WITHIN_S):
        while not await _all_over(client, names):
            await asyncio.sleep(0.1)
    logs = {name: await _records(client, name) for name in names}
    victim.start()
    return _judge(seen, logs, ends, killed_at)


async def measure(*, runs: int, auctions: int, save: bool, topologies: list[str] | None = None) -> dict[str, Any]:
    """Runs in a row, each on a topology of its own, as a table."""
    measured: dict[str, Any] = {}
    for kind in topologies or list(KINDS):
        rows = []
        for number in range(1, runs + 1):
            topology = await asyncio.to_thread(KINDS[kind])
            try:
                rows.append(await one_run(topology, auctions))
            finally:
                await asyncio.to_thread(topology.stop)
            if number == 1:
                print(f"{kind:>9}  " + "  ".join(f"{name:>10}" for name in rows[0]))
            print(f"{number:>9}  " + "  ".join(f"{value:>10}" for value in rows[-1].values()), flush=True)
        gaps = [row["gap_ms"] for row in rows]
        measured[kind] = {"gap_ms": {"median": statistics.median(gaps), "max": max(gaps)}, "runs": rows}
    return report("failover", {"runs": runs, "auctions": auctions, "down_after_ms": 1_000}, measured, save=save)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.failover", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--auctions", type=int, default=100)
    parser.add_argument("--topology", choices=list(KINDS), action="append", help="which; all if none is named")
    parser.add_argument("--no-save", action="store_true", help="print only, do not write benchmarks/results/")
    options = parser.parse_args()
    run(measure(runs=options.runs, auctions=options.auctions, save=not options.no_save, topologies=options.topology))


if __name__ == "__main__":
    main()
