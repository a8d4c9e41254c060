"""Tests for engine.store.forwarder, on every kind of server: the lease, the cursor beside it, and what both refuse."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import TimeoutError  # noqa: A004 - redis-py's own

from engine.clock import SystemClock
from engine.contract.cursors import START
from engine.contract.keys import ShardKeys
from engine.store import forwarder as forwarder_module
from engine.store.forwarder import ForwarderStore, Pending
from engine.store.link import RedisLink
from engine.store.protocol import Lease
from engine.store.redis import RedisStore
from tests.servers import Server

pytestmark = pytest.mark.integration

NAMES = ShardKeys.of(0)


class Bench:
    """Shard 0 of a real server."""

    def __init__(self, link: RedisLink) -> None:
        self.redis = link.commands
        self.lane = RedisStore(link, SystemClock())
        self.store = ForwarderStore(link)

    async def announce(self, *auction_ids: str) -> list[str]:
        """Add entries to the lane; their stream ids."""
        return [
            (
                await self.redis.execute_command(
                    "XADD",
                    NAMES.updates,
                    "*",
                    "type",
                    "timer.ended",
                    "auction_id",
                    auction_id,
                    "version",
                    3,
                    "body",
                    "{}",
                )
            ).decode()
            for auction_id in auction_ids
        ]

    async def begin(self) -> int:
        """Claim the shard and give it a cursor; the epoch."""
        epoch = (await self.store.claim(0, "f-1", None)).epoch
        await self.store.pending(0, epoch, 1)
        return epoch

    async def pending(self, epoch: int, count: int = 100) -> Pending:
        """What waits, for the holder."""
        found = await self.store.pending(0, epoch, count)
        assert found is not None
        return found

    async def advance(self, epoch: int, after: str, to: str, **put_aside: str) -> bool:
        """Move the cursor over one entry."""
        return await self.store.advance(0, epoch, after=after, to=to, passed=1, put_aside=put_aside or None)

    async def place(self) -> dict[bytes, bytes]:
        """The forwarder's hash."""
        found: dict[bytes, bytes] = await self.redis.hgetall(NAMES.forwarder)
        return found


@pytest.fixture
async def link(redis_server: Server) -> AsyncIterator[RedisLink]:
    """To an empty server."""
    made = redis_server.link()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def bench(link: RedisLink) -> Bench:
    """Shard 0 of it."""
    return Bench(link)


async def test_the_lease_is_one_of_its_own(bench: Bench) -> None:
    """It is claimed, kept and released like an engine's, and the engine's is left alone."""
    assert await bench.store.claim(0, "f-1", None) == Lease("f-1", 1, 0)
    assert await bench.store.renew(0, "f-1", 1)
    assert await bench.store.claim(0, "f-2", None) == Lease("f-1", 1, 1)
    assert await bench.store.claim(0, "f-2", Lease("f-1", 1, 1)) == Lease("f-2", 2, 0)
    assert not await bench.store.renew(0, "f-1", 1)
    await bench.store.release(0, "f-2", 2)
    assert await bench.store.claim(0, "f-1", None) == Lease("f-1", 3, 0)
    assert await bench.lane.lease(0) == Lease("", 0, 0)


async def test_a_shard_without_a_lane_begins_before_everything(bench: Bench) -> None:
    """So that the first event there ever is will be found."""
    epoch = (await bench.store.claim(0, "f-1", None)).epoch
    assert await bench.pending(epoch) == Pending("begun", START, 0, 0, [])
    assert (await bench.pending(epoch)).standing == "kept"


async def test_a_shard_begins_at_the_end_of_its_lane(bench: Bench) -> None:
    """What was there before waits for nobody; what comes then does."""
    *_, last = await bench.announce("old-1", "old-2")
    epoch = (await bench.store.claim(0, "f-1", None)).epoch
    assert await bench.pending(epoch) == Pending("begun", last, 0, 0, [])
    await bench.announce("new-1", "new-2", "new-3")
    found = await bench.pending(epoch, 2)
    assert (found.standing, found.behind) == ("kept", 3)
    assert [(entry.auction_id, entry.type, entry.version, entry.body) for entry in found.entries] == [
        ("new-1", "timer.ended", 3, b"{}"),
        ("new-2", "timer.ended", 3, b"{}"),
    ]


async def test_the_cursor_moves_over_what_was_passed(bench: Bench) -> None:
    """And the next read begins behind it."""
    epoch = await bench.begin()
    first, second = await bench.announce("a-1", "a-2")
    assert await bench.advance(epoch, START, first)
    found = await bench.pending(epoch)
    assert (found.cursor, found.behind, [entry.stream_id for entry in found.entries]) == (first, 1, [second])


async def test_an_advance_can_be_repeated(bench: Bench) -> None:
    """Its answer was lost: the second try says the same and changes nothing, nor is anything put aside twice."""
    epoch = await bench.begin()
    (first,) = await bench.announce("a-1")
    assert await bench.advance(epoch, START, first, error="HTTP 500")
    before = await bench.place()
    assert await bench.advance(epoch, START, first, error="HTTP 500")
    assert await bench.place() == before
    assert await bench.redis.xlen(NAMES.undelivered) == 1


async def test_whoever_lost_the_lease_moves_and_reads_nothing(bench: Bench) -> None:
    """The claim of another fences the cursor."""
    epoch = await bench.begin()
    (first,) = await bench.announce("a-1")
    assert (await bench.store.claim(0, "f-2", Lease("f-1", epoch, 0))).holder == "f-2"
    before = await bench.place()
    assert not await bench.advance(epoch, START, first, error="HTTP 500")
    assert await bench.store.pending(0, epoch, 1) is None
    assert await bench.place() == before
    assert not await bench.redis.exists(NAMES.undelivered)
    assert (await bench.pending(epoch + 1)).behind == 1


async def test_a_cursor_that_stands_elsewhere_is_not_moved(bench: Bench) -> None:
    """A failover took it back: nothing between is passed over."""
    epoch = await bench.begin()
    first, second, third = await bench.announce("a-1", "a-2", "a-3")
    assert await bench.advance(epoch, START, first)
    before = await bench.place()
    assert not await bench.advance(epoch, second, third, error="HTTP 500")
    assert await bench.place() == before
    assert not await bench.redis.exists(NAMES.undelivered)


async def test_what_was_trimmed_before_it_was_read_is_counted_once(bench: Bench) -> None:
    """Exactly, also where the cursor's own entry went without a loss."""
    epoch = await bench.begin()
    first, *_, last = await bench.announce("a-1", "a-2", "a-3", "a-4")
    assert await bench.advance(epoch, START, first)
    await bench.redis.execute_command("XTRIM", NAMES.updates, "MAXLEN", "=", 3)
    assert (await bench.pending(epoch)).lost == 0
    await bench.redis.execute_command("XTRIM", NAMES.updates, "MAXLEN", "=", 1)
    found = await bench.pending(epoch)
    assert (found.lost, found.behind, [entry.stream_id for entry in found.entries]) == (2, 1, [last])
    assert (await bench.pending(epoch)).lost == 0
    assert await bench.advance(epoch, found.cursor, last)
    assert (await bench.pending(epoch)).behind == 0


async def test_what_is_told_once_is_told_again_where_the_answer_was_lost(
    bench: Bench, link: RedisLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is repeated by itself, and the repetition says what the first try has found and settled."""
    exchange = link._exchange

    async def whose_answer_is_lost(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(link, "_exchange", exchange)
        await exchange(*args, **options)
        raise TimeoutError("no answer within 0.5 s")

    async def repeated(epoch: int) -> Pending:
        retries = link.retries
        monkeypatch.setattr(link, "_exchange", whose_answer_is_lost)
        found = await bench.pending(epoch)
        assert link.retries == retries + 1
        return found

    await bench.announce("a-1")
    epoch = (await bench.store.claim(0, "f-1", None)).epoch
    assert (await repeated(epoch)).standing == "begun"
    assert (await bench.pending(epoch)).standing == "kept"
    *_, last = await bench.announce("a-2", "a-3", "a-4")
    await bench.redis.execute_command("XTRIM", NAMES.updates, "MAXLEN", "=", 1)
    found = await repeated(epoch)
    assert (found.standing, found.lost, [entry.stream_id for entry in found.entries]) == ("kept", 2, [last])
    assert (await repeated(epoch)).lost == 0
    await bench.redis.delete(NAMES.updates)
    assert (await repeated(epoch)).standing == "back"
    assert (await bench.pending(epoch)).standing == "kept"


async def test_a_lane_that_ends_before_the_cursor(bench: Bench) -> None:
    """The cursor moves to its end, by the order of ids, which is not that of text."""
    epoch = await bench.begin()
    (last,) = await bench.announce("a-1")
    for ahead in ("9999999999999-0", f"{last.split('-')[0]}-10"):
        await bench.redis.hset(NAMES.forwarder, "cursor", ahead)
        assert await bench.pending(epoch) == Pending("back", last, 0, 0, [])
    await bench.redis.hset(NAMES.forwarder, "cursor", "999-0")
    assert (await bench.pending(epoch)).standing == "kept"


async def test_what_is_put_aside_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest makes room."""
    monkeypatch.setattr(forwarder_module, "UNDELIVERED_MAX", 100)
    epoch = await bench.begin()
    after = START
    for to in await bench.announce(*(f"a-{number}" for number in range(400))):
        assert await bench.advance(epoch, after, to, event_id=to)
        after = to
    assert 100 <= await bench.redis.xlen(NAMES.undelivered) < 300
    ((_, newest),) = await bench.redis.xrevrange(NAMES.undelivered, count=1)
    assert newest == [b"event_id", after.encode()]


async def test_it_works_when_the_server_is_out_of_memory(bench: Bench, redis_server: Server) -> None:
    """Otherwise what was delivered would be delivered for ever."""
    epoch = await bench.begin()
    (first,) = await bench.announce("a-1")
    with redis_server.configured("maxmemory", "1mb", "0"):
        assert (await bench.pending(epoch)).behind == 1
        assert await bench.advance(epoch, START, first, error="HTTP 500")
