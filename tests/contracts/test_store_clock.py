"""The store contract of the clock: the offset that a commit sets, and what processes state, run against every store."""

import pytest

from engine.store.protocol import Committed, SetOffset
from tests.contracts.stores import Bench
from tests.contracts.test_store import stamp_of
from tests.contracts.test_store_commit import batch_on, commit, refused

pytestmark = pytest.mark.requirement("R12")


async def test_a_shard_has_no_offset_at_first(bench: Bench) -> None:
    """Its clock is `TIME`, and was never corrected."""
    before = bench.now()
    shown = await bench.store.shard_clock(0)
    assert (shown.offset_ms, shown.corrections, shown.now_us) == (0, 0, shown.time_us)
    assert before - 50 <= shown.time_us // 1_000 <= bench.now() + 50


@pytest.mark.parametrize("offset_ms", [120, -120, 3_600_000, -3_600_000])
async def test_an_offset_is_added_from_the_next_stamp_on(bench: Bench, offset_ms: int) -> None:
    """It counts as a correction, in its shard alone; stamps move with it, by no more than the bound around the estimate."""
    await bench.store.claim(0, "me", None)
    before = bench.now()
    committed = await commit(bench, SetOffset(offset_ms))
    assert before - 50 <= committed.at <= bench.now() + 50, "its own stamp is of before"
    shown = await bench.store.shard_clock(0)
    assert (shown.offset_ms, shown.corrections) == (offset_ms, 1)
    assert shown.now_us == shown.time_us + offset_ms * 1_000
    before = bench.now()
    shown_ms = await bench.store.time_us() // 1_000
    assert before + offset_ms - 50 <= shown_ms <= bench.now() + offset_ms + 50
    assert (await bench.store.shard_clock(1)).corrections == 0
    before = bench.now()
    stamp = await stamp_of(bench, "e-1", before)
    # No further from the estimate than the bound: the slower it comes, the nearer to it is a clock that is behind.
    earliest, latest = [max(-250, min(250, offset_ms + after_ms)) for after_ms in (0, bench.now() - before)]
    assert max(committed.at, before + earliest) - 50 <= stamp <= max(committed.at, before + latest) + 50
    await commit(bench, SetOffset(0))
    shown = await bench.store.shard_clock(0)
    assert (shown.offset_ms, shown.corrections) == (0, 2)


async def test_a_repeated_commit_corrects_once(bench: Bench) -> None:
    """A commit whose answer was lost is not another correction; one that is refused is none."""
    await bench.store.claim(0, "me", None)
    batch = await batch_on(bench, SetOffset(7))
    assert isinstance(await bench.store.commit(batch), Committed)
    assert isinstance(await bench.store.commit(batch), Committed)
    assert (await bench.store.shard_clock(0)).corrections == 1
    await refused(bench, await batch_on(bench, SetOffset(8), epoch=99))


async def test_statements_stand_until_they_are_replaced_or_taken_off(bench: Bench) -> None:
    """One for each name, whatever bytes it is."""
    assert await bench.store.stated_clocks() == {}
    await bench.store.state_clock("engine:a", b"\xff1")
    await bench.store.state_clock("gateway:a", b"{}")
    await bench.store.state_clock("engine:a", b"2")
    assert await bench.store.stated_clocks() == {"engine:a": b"2", "gateway:a": b"{}"}
    await bench.store.forget_clock("engine:a")
    await bench.store.forget_clock("nobody")
    assert await bench.store.stated_clocks() == {"gateway:a": b"{}"}
