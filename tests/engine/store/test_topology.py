"""Tests for engine.store.topology: what is remembered of a Cluster, and reads that outlive their call."""

import asyncio

import pytest
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's own
    MovedError,
    ResponseError,
)

from engine.contract.keys import ShardKeys, barrier, delivered, hash_tag, replies
from engine.store.topology import OutstandingReads, SlotMap, Streams, slot_of

A, B, C = ("a.example", 1), ("b.example", 2), ("c.example", 3)


def slots(*ranges: tuple[int, int, tuple[str, int]]) -> list[list[object]]:
    """An answer to CLUSTER SLOTS, with a replica that nobody is to use."""
    return [[first, last, [host.encode(), port, b"id"], [b"replica", 9, b"id"]] for first, last, (host, port) in ranges]


def test_every_key_of_a_shard_has_one_slot() -> None:
    """The braces decide, also for what stands beside a stream of somebody else."""
    for shard in range(20):
        names = ShardKeys.of(shard)
        own = [names.events, names.outbox, names.timer("a"), barrier(names.cursor), replies(f"{{{shard}}}:gateway-1")]
        assert len({slot_of(name) for name in own}) == 1
    stream = replies("producer-1")
    assert slot_of(delivered(stream, 3, "c-1")) == slot_of(stream)
    assert slot_of(barrier(stream)) == slot_of(stream)
    assert [hash_tag(name) for name in ("a{b}c", "a{}c", "a{b", "a}b{c}", "{a}{b}")] == ["b", "a{}c", "a{b", "c", "a"]


def test_a_map_knows_what_it_was_told() -> None:
    """Slots of each primary; a slot of nobody is an error that passes; a node without a host is where we asked."""
    made = SlotMap([A])
    assert made.outdated
    with pytest.raises(ConnectionError):
        made.node_of(5)
    made.learn(slots((0, 9, B), (20, 29, ("", 7))), A)
    assert not made.outdated
    assert (made.node_of(0), made.node_of(9), made.node_of(25)) == (B, B, ("a.example", 7))
    assert made.known == [B, ("a.example", 7), A]
    with pytest.raises(ConnectionError):
        made.node_of(10)


def test_redirections_are_heeded() -> None:
    """MOVED for good, ASK for the next command only; neither makes the whole map doubtful."""
    made = SlotMap([A])
    made.learn(slots((0, 9, B)), A)
    assert made.heed(MovedError("5 c.example:3"))
    assert (made.node_of(5), made.node_of(6)) == (C, B)
    assert made.heed(AskError("6 c.example:3"))
    assert made.is_asked(6)
    assert (made.take_ask(6), made.take_ask(6)) == (C, None)
    assert not made.outdated


@pytest.mark.parametrize(
    ("error", "doubtful"),
    [
        (ConnectionError("gone"), True),
        (ClusterDownError("CLUSTERDOWN"), True),
        (OSError("refused"), True),
        (ResponseError("WRONGTYPE"), False),
    ],
)
def test_a_lost_node_makes_the_map_doubtful(error: Exception, doubtful: bool) -> None:
    """After it the nodes are asked again; a refusal says nothing about the Cluster."""
    made = SlotMap([A])
    made.learn(slots((0, 9, B)), A)
    assert not made.heed(error)
    assert made.outdated is doubtful


class Lanes:
    """Streams whose reads end when the test says so."""

    def __init__(self) -> None:
        self.ends: dict[tuple[tuple[str, ...], tuple[str, ...]], asyncio.Future[Streams]] = {}
        self.begun = 0

    async def read(self, names: tuple[str, ...], since: tuple[str, ...]) -> Streams:
        """One blocking read."""
        self.begun += 1
        end = self.ends[names, since] = asyncio.get_running_loop().create_future()
        return await end


async def test_a_read_that_goes_on_is_taken_up_again() -> None:
    """The first that has something ends the waiting; the other goes on, and its answer comes with the next call."""
    lanes, reads = Lanes(), OutstandingReads()
    first = asyncio.create_task(reads.first([(("a",), ("0",)), (("b",), ("0",))], lanes.read, 5))
    while lanes.begun < 2:
        await asyncio.sleep(0)
    lanes.ends[("a",), ("0",)].set_result({"a": [(b"1-0", [])]})
    assert await first == {"a": [(b"1-0", [])]}
    second = asyncio.create_task(reads.first([(("a",), ("1-0",)), (("b",), ("0",))], lanes.read, 5))
    while lanes.begun < 3:
        await asyncio.sleep(0)
    lanes.ends[("b",), ("0",)].set_result({"b": [(b"2-0", [])]})
    assert await second == {"b": [(b"2-0", [])]}
    assert lanes.begun == 3
    await reads.close()


async def test_a_read_behind_a_place_that_was_given_up_is_not_heard() -> None:
    """After a failover the place has moved: what still comes from the old one belongs to another history."""
    lanes, reads = Lanes(), OutstandingReads()
    assert await reads.first([(("a",), ("9-0",))], lanes.read, 0.01) == {}
    again = asyncio.create_task(reads.first([(("a",), ("1-0",))], lanes.read, 5))
    while lanes.begun < 2:
        await asyncio.sleep(0)
    lanes.ends[("a",), ("9-0",)].set_result({"a": [(b"10-0", [])]})
    lanes.ends[("a",), ("1-0",)].set_result({"a": [(b"2-0", [])]})
    assert await again == {"a": [(b"2-0", [])]}
    await reads.close()


async def test_a_read_that_fails_costs_the_others_nothing() -> None:
    """Its error is raised once; what the others have found meanwhile comes with the next call."""
    lanes, reads = Lanes(), OutstandingReads()
    wanted = [(("a",), ("0",)), (("b",), ("0",))]
    failing = asyncio.create_task(reads.first(wanted, lanes.read, 5))
    while lanes.begun < 2:
        await asyncio.sleep(0)
    lanes.ends[("a",), ("0",)].set_exception(ConnectionError("gone"))
    lanes.ends[("b",), ("0",)].set_result({"b": [(b"2-0", [])]})
    with pytest.raises(ConnectionError):
        await failing
    assert await reads.first(wanted, lanes.read, 5) == {"b": [(b"2-0", [])]}
    await reads.close()
