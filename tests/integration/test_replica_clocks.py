"""The date of the replicas is off, and one of them becomes the primary: auctions end when they should (F22)."""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import pytest

from engine.contract.keys import CLOCKS, ShardKeys
from tests.integration.faketime import MISSING, Date
from tests.integration.records import SHARDS, facts_of
from tests.integration.test_clock_steps import BOUND_MS, Sale, until
from tests.live import LiveStack
from tests.topologies import SentinelGroup, stopping

pytestmark = [
    pytest.mark.integration,
    pytest.mark.requirement("R12", "R16", "B1"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

KILLED_AFTER_S: Final = 2.0
DOWN_AFTER_MS: Final = 3_000
"""So that a primary that stands still for a moment is not replaced by a date that is off before it is meant to."""
FAILED_OVER_S: Final = 9.0
"""4.2 s, and what a loaded machine adds: whoever bids before may find nobody who takes it."""
ENDS_IN_S: Final = [KILLED_AFTER_S + after_s for after_s in (FAILED_OVER_S, FAILED_OVER_S + 3, FAILED_OVER_S + 6)]
LATE_MS: Final = 2_500
"""A date that is followed shows as three seconds."""


class Stack(LiveStack):
    """A `serve` behind a group."""

    def facts(self, auction_id: str) -> list[str]:
        """What happened to an auction."""
        return facts_of(self, auction_id)


def stated(group: SentinelGroup) -> dict[str, dict[str, Any]]:
    """What the processes state about their clocks."""
    said = group.primary.ask("HGETALL", CLOCKS)
    pairs = said.items() if isinstance(said, dict) else zip(said[::2], said[1::2], strict=True)
    return {name: json.loads(body) for name, body in pairs}


def offsets(group: SentinelGroup) -> list[int]:
    """The sequenced offset of each shard, in ms."""
    primary = group.primary
    return [int(primary.ask("HGET", ShardKeys.of(shard).cursor, "offset") or 0) for shard in range(SHARDS)]


@pytest.mark.parametrize("ahead_s", [3, -3])
async def test_the_date_of_a_replica_that_is_promoted_is_off(ahead_s: int, tmp_path: Path, short_tmp: Path) -> None:
    """Everybody coasts over the failover; what the new primary's date is off is taken back in every shard, once."""
    date = Date(tmp_path, "replicas")
    date.set(ahead_s)
    with stopping(SentinelGroup(down_after_ms=DOWN_AFTER_MS, replica_env=date.env)) as group:
        env = {
            "AUCTION_TIMER_REDIS_URL": group.url,
            "AUCTION_TIMER_DURABILITY": "replicated",
            "AUCTION_TIMER_DRAIN_MS": "0",
        }
        stack = Stack(short_tmp, env=env)
        try:
            await until(lambda: len(stated(group)) == 3, "every process has stated its clock")
            before = stated(group)
            await until(
                lambda: all(clock["at"] > before[name]["at"] for name, clock in stated(group).items()), "and again"
            )
            sales = [Sale(stack, ends_in_s) for ends_in_s in ENDS_IN_S]
            for sale in sales:
                await until(sale.has_begun, f"{sale.auction_id} runs")
            selling = [asyncio.create_task(sale.run()) for sale in sales]
            await asyncio.sleep(max(0.0, sales[0].ends_at_s - FAILED_OVER_S - asyncio.get_running_loop().time()))
            group.primary.kill()
            await asyncio.gather(*selling)
            for sale in sales:
                await sale.judge(LATE_MS)
            await until(
                lambda: all(abs(offset + ahead_s * 1_000) <= BOUND_MS for offset in offsets(group)), "corrected"
            )
            await until(
                lambda: {clock["verdict"] for clock in stated(group).values()} == {"none"}, "all clocks agree again"
            )
            print("closed after ms:", [round(sale.closes[0]) for sale in sales], "offsets", offsets(group))
        finally:
            stack.stop()
