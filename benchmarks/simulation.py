"""What simulations cost: many small seeds on every core, and days of auctions on one.

Each runs in processes of its own, as those of `auction-timer simulate` do. What is compared between commits is CPU: wall time
is that of a shared machine. No seed may fail, or the time would be that of something else.

Floor: the same days with one auction in them, which is what engines, gateways and a reconciler do while nothing happens.
"""

import asyncio
import time
from typing import Any, Final

from auction_timer.simulation.run import Outcome, Plan, small, some_days
from auction_timer.simulation.seeds import judge_all
from benchmarks.harness import percentiles, report

SEED: Final = 1


async def measure(*, seeds: int, auctions: int, days: float, save: bool) -> dict[str, Any]:
    """Judge the small seeds from 0 on, then `days` of `auctions`, then as many days of one auction."""
    many = await asyncio.to_thread(_judged, [small(seed) for seed in range(seeds)], None)
    plans = [some_days(SEED, auctions=number, days=days) for number in (auctions, 1)]
    whole, floor = (_of_days(*each) for each in await asyncio.to_thread(_judged, plans, 1))
    measured = {
        "small": {
            "failed": [outcome.plan.seed for outcome, _ in many if not outcome.is_good],
            "cpu_s": round(sum(outcome.cpu_s for outcome, _ in many), 1),
            "wall_s": round(sum(wall_s for _, wall_s in many), 1),
            "cpu_ms_each": percentiles([outcome.cpu_s * 1_000 for outcome, _ in many]),
        },
        "days": whole,
        "floor": floor,
    }
    parameters = {"seeds": seeds, "auctions": auctions, "days": days, "seed_of_days": SEED}
    return report("simulation", parameters, measured, save=save)


def _judged(plans: list[Plan], processes: int | None) -> list[tuple[Outcome, float]]:
    """What became of each plan, in the order in which they ended, and the wall time since the one before, in s."""
    began = time.perf_counter()
    found = []
    for outcome in judge_all(plans, processes):
        now = time.perf_counter()
        found.append((outcome, now - began))
        began = now
    return found


def _of_days(outcome: Outcome, wall_s: float) -> dict[str, Any]:
    return {
        "failed": [] if outcome.is_good else [outcome.plan.seed],
        "cpu_s": round(outcome.cpu_s, 1),
        "wall_s": round(wall_s, 1),
        "virtual_h": round(outcome.virtual_ms / 3_600_000, 1),
        "closes": outcome.counts.get("closes", 0),
        "commits": outcome.counts.get("commits", 0),
    }
