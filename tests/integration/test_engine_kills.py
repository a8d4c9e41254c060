"""503 real auctions, 8,460 real bids, and an engine that is killed again and again while they run."""

import asyncio
import gzip
import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import orjson
import pytest

from auction_timer.replay import ReplayProgress, ReplayReport, replay
from engine.contract.audit import verify
from tests.live import SCRIPT, LiveStack, alive, until

pytestmark = pytest.mark.integration

HISTORY = Path(__file__).parent.parent / "data" / "ebay-bids.csv.gz"
SPEED = 18_000
"""Seven days in 34 seconds."""
KILLS = 12
UPTIME_S = (0.2, 2.5)
"""An engine lives so long, at random: from before it has loaded its shards to well into its work."""


class Killer:
    """Kills the engine, waits for the next one, and again."""

    def __init__(self, stack: LiveStack, seed: int) -> None:
        self._stack = stack
        self._random = random.Random(seed)
        self.killed: list[int] = []

    async def run(self) -> None:
        while len(self.killed) < KILLS:
            pid = await asyncio.to_thread(self._next_engine)
            await asyncio.sleep(self._random.uniform(*UPTIME_S))
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def _next_engine(self) -> int:
        def fresh() -> int | None:
            found = [pid for pid in self._stack.pids("engine") if pid not in self.killed and alive(pid)]
            return found[0] if found else None

        pid: int = until(fresh, "an engine runs")
        return pid


@pytest.mark.requirement("R5", "R10", "R15", "B1", "B2")
async def test_killing_the_engine_twelve_times_changes_no_result(short_tmp: Path) -> None:
    """Every auction ends exactly once, never early, with the end and the extensions that the pure domain computes."""
    history = short_tmp / "history.csv"
    history.write_bytes(gzip.decompress(HISTORY.read_bytes()))
    seed = random.randrange(2**32)
    print(f"SEED={seed}")
    stack = await asyncio.to_thread(LiveStack, short_tmp)
    try:
        killer = Killer(stack, seed)
        watched = asyncio.Event()

        def on_progress(progress: ReplayProgress) -> None:
            if progress.watched == progress.auctions:
                watched.set()

        playing = asyncio.create_task(replay(history, url=stack.url, speed=SPEED, on_progress=on_progress))
        # Whoever watches an auction that no engine has registered yet is told that there is none.
        await watched.wait()
        killing = asyncio.create_task(killer.run())
        report = await playing
        # The last auctions may be over before the last kill; a kill at rest must not change anything either.
        await killing
        _judge(report)
        assert len(set(killer.killed)) == KILLS
        _judge_audit(stack)
    finally:
        await asyncio.to_thread(stack.stop)


def _judge(report: ReplayReport) -> None:
    assert {row.auction_id: row.faults for row in report.faulty} == {}
    assert report.exit_code == 0
    assert len(report.rows) == 503


def _judge_audit(stack: LiveStack) -> None:
    """The chain of every shard is whole, archive and stream together, and each auction's start and end stand in it once."""
    chains: dict[int, list[dict[str, str]]] = {shard: [] for shard in range(8)}
    export = subprocess.run(
        [*SCRIPT, "audit", "export", "--data-dir", str(stack.data_dir)], capture_output=True, check=True, timeout=60
    )
    for line in export.stdout.splitlines():
        exported = orjson.loads(line)
        chains[exported["shard"]].append(exported["record"])
    ended: Counter[str] = Counter()
    for records in chains.values():
        assert verify(records) is None
        ended.update(record["auction_id"] for record in records if record["event_type"] == "auction_timer_ended")
    assert len(ended) == 503
    assert set(ended.values()) == {1}
