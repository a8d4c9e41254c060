"""Tests for auction_timer.simulation.loop: what several processes on one loop need; tests/fakes has the rest."""

import asyncio
import contextvars

from auction_timer.simulation.loop import PROCESS, VirtualLoop, run
from auction_timer.simulation.timeline import Timeline


def test_a_frozen_process_makes_no_step_and_then_goes_on_in_order() -> None:
    """Its timers and its messages wait; others live on; afterwards everything comes as it came."""
    line = Timeline()
    seen: list[tuple[str, int]] = []

    async def live(name: str) -> None:
        for step in range(5):
            await asyncio.sleep(1)
            seen.append((name, step))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        tasks = []
        for name in ("one", "other"):
            context = contextvars.copy_context()
            context.run(PROCESS.set, name)
            tasks.append(loop.create_task(live(name), context=context))
        await asyncio.sleep(2.5)
        loop.freeze("one")
        await asyncio.sleep(10)
        assert seen == [("one", 0), ("other", 0), ("one", 1), ("other", 1), ("other", 2), ("other", 3), ("other", 4)]
        assert loop.is_frozen("one")
        loop.thaw("one")
        await asyncio.gather(*tasks)
        assert seen[-3:] == [("one", 2), ("one", 3), ("one", 4)]
        assert loop.time() > 14  # it has slept on from where it stood

    run(line, scenario)
