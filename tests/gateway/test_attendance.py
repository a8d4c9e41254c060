"""Tests for gateway.attendance."""

import pytest
from structlog.testing import capture_logs

from engine.contract.keys import ShardKeys
from engine.store.limits import StoreLimits
from engine.store.protocol import StoreUnavailableError
from gateway.attendance import Attendance
from tests.fakes.store import FaultyStore
from tests.fakes.world import World

pytestmark = pytest.mark.requirement("B8")


async def test_a_damaged_shard_does_not_cost_the_others_their_attendance() -> None:
    """It has none itself, which is logged; a store that is away is told to the caller, who asks again."""
    world = World()
    world.store.limits = StoreLimits(attendant="gateway-1", outage_extension_ms=1_000)
    world.store.shards[1].damaged |= {ShardKeys.of(1).events}
    store = FaultyStore(world.store)
    attendance = Attendance(store, world.clock(), 3)  # type: ignore[arg-type]
    with capture_logs() as lines:
        await attendance.beat()
    assert [line["event"] for line in lines] == ["beat_failed"]
    assert [world.store.shards[shard].attended_at is not None for shard in range(3)] == [True, False, True]
    store.away = True
    with pytest.raises(StoreUnavailableError):
        await attendance.beat()
