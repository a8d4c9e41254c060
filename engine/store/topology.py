"""Which server a key lives on: one server, the primary that sentinels name, or the node of a Cluster that serves its slot.

A Cluster is reached by a plain client per node, because every command of ours stays in one slot, and because redis-py's own
cluster client repeats writes by itself. What a node says of slots (`MOVED`, `ASK`) is heeded here; repeating the call is
`RedisLink.call`'s part, as for every other fault.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's own, and the only one meant here
    MovedError,
    TimeoutError,  # noqa: A004
)

Address = tuple[str, int]
Streams = dict[str, list[tuple[bytes, list[bytes]]]]
"""Entries of streams, by the name of the stream."""

RETIRED_MAX: Final = 1_024
"""Reads whose place was given up and that still block: each ends within a second."""


def slot_of(name: str) -> int:
    """The slot of a key (Redis Cluster specification: CRC-16 of its hash tag)."""
    slot: int = key_slot(name.encode())
    return slot


class SlotMap:
    """Which node serves which slot, as far as was heard."""

    def __init__(self, seeds: Sequence[Address]) -> None:
        self._seeds = tuple(seeds)
        self._serving: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._asking: dict[int, Address] = {}
        self.outdated = True
        """Whether the nodes should be asked again."""

    @property
    def known(self) -> list[Address]:
        """Every node that may know more."""
        return list(dict.fromkeys([*self.serving, *self._seeds]))

    @property
    def serving(self) -> list[Address]:
        """Every node that serves a slot."""
        return list(dict.fromkeys(address for address in self._serving if address is not None))

    def node_of(self, slot: int) -> Address:
        """The node that serves a slot.

        Raises:
            ConnectionError: nobody does.
        """
        address = self._serving[slot]
        if address is None:
            raise ConnectionError(f"no node of the Cluster serves slot {slot}")
        return address

    def take_ask(self, slot: int) -> Address | None:
        """Where the slot is moving to, if the next command about it must go there; said once."""
        return self._asking.pop(slot, None)

    def is_asked(self, slot: int) -> bool:
        """Whether `take_ask` has something to say."""
        return slot in self._asking

    def learn(self, slots: Sequence[Any], asked: Address) -> None:
        """Take an answer to CLUSTER SLOTS. A node that does not know its own host is where it was asked."""
        serving: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, primary, *_replicas in slots:
            host = primary[0].decode() if primary[0] else asked[0]
            for slot in range(int(first), int(last) + 1):
                serving[slot] = (host, int(primary[1]))
        self._serving = serving
        self.outdated = False

    def heed(self, error: Exception) -> bool:
        """Take what an error says of the Cluster; whether it is a redirection, so that repeating the call helps."""
        if isinstance(error, MovedError):
            if error.host:
                self._serving[error.slot_id] = (error.host, error.port)
            return True
        if isinstance(error, AskError):
            self._asking[error.slot_id] = (error.host, error.port)
            return True
        if isinstance(error, ConnectionError | TimeoutError | ClusterDownError | OSError):
            self.outdated = True
        return False


class OutstandingReads:
    """Blocking reads of several slots, each with a command and a connection of its own.

    The first that has something ends the waiting; the others are left as they are, and the next call takes them up again
    if it asks for the same. To cancel them would close a connection each time an entry comes.
    """

    def __init__(self) -> None:
        self._standing: dict[tuple[str, ...], tuple[tuple[str, ...], asyncio.Task[Streams]]] = {}
        self._retired: set[asyncio.Task[Streams]] = set()

    async def first(
        self,
        wanted: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
        read: Callable[[tuple[str, ...], tuple[str, ...]], Awaitable[Streams]],
        within_s: float,
    ) -> Streams:
        """What came first behind `wanted`, pairs of stream names and the places behind which to read; {} if nothing did.

        Raises whatever a read raised; what the others found is kept for the next call.
        """
        tasks = {names: self._task(names, since, read) for names, since in wanted}
        await asyncio.wait(tasks.values(), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        failed = [names for names, task in tasks.items() if task.done() and task.exception() is not None]
        if failed:
            _, task = self._standing.pop(failed[0])
            return task.result()
        found: Streams = {}
        for names, task in tasks.items():
            if task.done():
                del self._standing[names]
                found |= task.result()
        return found

    def _task(
        self,
        names: tuple[str, ...],
        since: tuple[str, ...],
        read: Callable[[tuple[str, ...], tuple[str, ...]], Awaitable[Streams]],
    ) -> "asyncio.Task[Streams]":
        standing = self._standing.get(names)
        if standing is not None and standing[0] == since:
            return standing[1]
        if standing is not None:
            self._retire(standing[1])
        task = asyncio.ensure_future(read(names, since))
        self._standing[names] = (since, task)
        return task

    def _retire(self, task: "asyncio.Task[Streams]") -> None:
        """Nobody wants the answer of this read any more."""
        if len(self._retired) >= RETIRED_MAX:
            task.cancel()
        self._retired.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[Streams]") -> None:
        self._retired.discard(task)
        if not task.cancelled():
            task.exception()

    async def close(self) -> None:
        """End every read."""
        tasks = [*(task for _, task in self._standing.values()), *self._retired]
        self._standing.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
