"""503 real auctions, 8,460 real bids, and an engine that is killed again and again while they run."""

import asyncio
import gzip
import os
import random
import signal
from pathlib import Path

import pytest

from auction_timer.replay import ReplayReport, replay
from engine.contract.audit import verify
from tests.live import LiveStack, alive, until

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
        playing = asyncio.create_task(replay(history, url=stack.url, speed=SPEED))
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
    assert report.exit_code == 0, report
    assert len(report.rows) == 503


def _judge_audit(stack: LiveStack) -> None:
    """The chain of every shard is whole, and each auction's start and end stand in it once."""
    ended: dict[str, int] = {}
    for shard in range(8):
        rows = stack.redis("XRANGE", f"auction:audit:{{{shard}}}", "-", "+")
        records = [{k.decode(): v.decode() for k, v in _pairs(row[1])} for row in rows]
        assert verify(records) is None
        for record in records:
            if record["event_type"] == "auction_timer_ended":
                ended[record["auction_id"]] = ended.get(record["auction_id"], 0) + 1
    assert len(ended) == 503
    assert set(ended.values()) == {1}


def _pairs(values: object) -> list[tuple[bytes, bytes]]:
    if isinstance(values, dict):
        return list(values.items())
    assert isinstance(values, list | tuple)
    return list(zip(values[::2], values[1::2], strict=True))
