"""Every store the contract holds for, each behind the same handle: the store itself, and what only a test may do to it."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from typing import Any, Final

from engine.clock import SystemClock
from engine.contract.keys import ShardKeys, replies
from engine.domain.instants import EpochMs
from engine.store.memory import MemoryStore
from engine.store.protocol import Entry
from engine.store.redis import RedisStore, StoreLimits
from tests.fakes.clock import Authority, Timeline
from tests.servers import Server

LONG_AGO_MS: Final = 60_000
"""An estimate this far behind the authority is clamped, so the stamp it gives is known exactly: estimate + 250."""
WITHIN_S: Final = 10.0


async def until(condition: Callable[[], Any], *, within_s: float = WITHIN_S) -> None:
    """Poll a condition, plain or awaitable, until it holds; fail after the deadline."""
    deadline = time.monotonic() + within_s
    while True:
        held = condition()
        if asyncio.iscoroutine(held):
            held = await held
        if held:
            return
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        await asyncio.sleep(0.002)


class Bench(ABC):
    """One store on the bench. `store` is all three protocols at once."""

    store: Any

    @cached_property
    def born(self) -> EpochMs:
        """When it was first asked for this."""
        return self.now()

    @abstractmethod
    def now(self) -> EpochMs:
        """An estimate of the auction clock that agrees with the authority."""

    @abstractmethod
    def with_intake_max(self, bound: int) -> Any:
        """The same data behind a store whose intake is bounded so."""

    @abstractmethod
    def with_troubleshooting_max(self, bound: int) -> Any:
        """The same data behind a store whose troubleshooting is bounded so."""

    @abstractmethod
    async def dump(self) -> Any:
        """Everything the store holds, as a value that can be compared."""

    @abstractmethod
    async def inject(self, shard: int, **fields: str) -> str:
        """Add an intake entry behind the store's back, as anyone with access to Redis could; its stream id."""

    @abstractmethod
    async def damage(self, shard: int, auction_id: str, field: str, value: str) -> None:
        """Overwrite a field of a timer hash."""

    @abstractmethod
    async def break_key(self, shard: int, name: str) -> None:
        """Put something of another type in the place of a key of a shard."""

    @abstractmethod
    async def shift_authority(self, shard: int, offset_ms: int) -> None:
        """Set the sequenced offset of a shard."""

    @abstractmethod
    async def audit(self, shard: int) -> list[dict[str, str]]:
        """The audit records of a shard, in order."""

    @abstractmethod
    async def replies(self, reply_to: str) -> list[tuple[str, str, bytes]]:
        """What was answered: outcome, command id, body."""

    @abstractmethod
    async def troubleshooting(self, shard: int) -> dict[str, bytes]:
        """What was parked."""

    @abstractmethod
    async def blocked(self) -> bool:
        """Whether a reader waits."""

    @abstractmethod
    async def listening(self, shard: int) -> bool:
        """Whether somebody is subscribed to the tick lane of a shard."""

    @abstractmethod
    async def close(self) -> None:
        """Give back what the bench took."""


class MemoryBench(Bench):
    """The memory store, with an authority that can be set."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.timeline.advance(1_000_000)
        self.authority = Authority(self.timeline)
        self.store = MemoryStore(self.authority)

    def now(self) -> EpochMs:
        return self.authority.now_ms

    def with_intake_max(self, bound: int) -> MemoryStore:
        other = MemoryStore(self.authority, intake_max=bound)
        other.shards = self.store.shards
        return other

    def with_troubleshooting_max(self, bound: int) -> MemoryStore:
        other = MemoryStore(self.authority, troubleshooting_max=bound)
        other.shards = self.store.shards
        return other

    async def dump(self) -> Any:
        shards = {number: asdict(memory) for number, memory in self.store.shards.items()}
        return deepcopy((shards, dict(self.store.replies)))

    async def inject(self, shard: int, **fields: str) -> str:
        memory = self.store.shards[shard]
        entry = Entry(memory.next_id(), None, fields.get("id", ""), b"?")
        memory.events.append(entry)
        return entry.stream_id

    async def damage(self, shard: int, auction_id: str, field: str, value: str) -> None:
        self.store.shards[shard].timers[auction_id][field] = value

    async def break_key(self, shard: int, name: str) -> None:
        self.store.shards[shard].damaged |= {name}

    async def shift_authority(self, shard: int, offset_ms: int) -> None:
        self.store.shards[shard].offset_ms = offset_ms

    async def audit(self, shard: int) -> list[dict[str, str]]:
        return self.store.shards[shard].audit

    async def replies(self, reply_to: str) -> list[tuple[str, str, bytes]]:
        return self.store.replies[reply_to]

    async def troubleshooting(self, shard: int) -> dict[str, bytes]:
        return self.store.shards[shard].troubleshooting

    async def blocked(self) -> bool:
        return bool(self.store._grown._waiters)

    async def listening(self, shard: int) -> bool:
        return bool(self.store._listeners)

    async def close(self) -> None:
        pass


class RedisBench(Bench):
    """The Redis store on a real server."""

    store: RedisStore

    def __init__(self, server: Server) -> None:
        self.server = server
        self.link = server.link()
        self.store = RedisStore(self.link, SystemClock())
        self._run = self.link.commands.execute_command

    def now(self) -> EpochMs:
        return SystemClock().wall_ms()

    def with_intake_max(self, bound: int) -> RedisStore:
        return RedisStore(self.link, SystemClock(), StoreLimits(intake_max=bound))

    def with_troubleshooting_max(self, bound: int) -> RedisStore:
        return RedisStore(self.link, SystemClock(), StoreLimits(troubleshooting_max=bound))

    async def dump(self) -> Any:
        held = {}
        for key in sorted(await self._run("KEYS", "*")):
            kind = await self._run("TYPE", key)
            command = {
                b"string": ("GET", key),
                b"hash": ("HGETALL", key),
                b"zset": ("ZRANGE", key, 0, -1, "WITHSCORES"),
                b"stream": ("XRANGE", key, "-", "+"),
                b"list": ("LRANGE", key, 0, -1),
            }[kind]
            held[key] = (await self._run(*command), await self._run("PTTL", key) >= 0)
        return held

    async def inject(self, shard: int, **fields: str) -> str:
        pairs = [text for pair in fields.items() for text in pair]
        return str((await self._run("XADD", ShardKeys.of(shard).events, "*", *pairs)).decode())

    async def damage(self, shard: int, auction_id: str, field: str, value: str) -> None:
        await self._run("HSET", ShardKeys.of(shard).timer(auction_id), field, value)

    async def break_key(self, shard: int, name: str) -> None:
        await self._run("DEL", name)
        await self._run("RPUSH", name, "x")

    async def shift_authority(self, shard: int, offset_ms: int) -> None:
        await self._run("HSET", ShardKeys.of(shard).cursor, "offset", str(offset_ms))

    async def _stream(self, key: str) -> list[dict[str, bytes]]:
        entries = await self._run("XRANGE", key, "-", "+")
        return [{name.decode(): value for name, value in fields.items()} for _, fields in entries]

    async def audit(self, shard: int) -> list[dict[str, str]]:
        records = await self._stream(ShardKeys.of(shard).audit)
        return [{name: value.decode() for name, value in record.items()} for record in records]

    async def replies(self, reply_to: str) -> list[tuple[str, str, bytes]]:
        answers = await self._stream(replies(reply_to))
        return [(answer["outcome"].decode(), answer["command_id"].decode(), answer["body"]) for answer in answers]

    async def troubleshooting(self, shard: int) -> dict[str, bytes]:
        parked = await self._run("HGETALL", ShardKeys.of(shard).troubleshooting)
        return {name.decode(): body for name, body in parked.items()}

    async def blocked(self) -> bool:
        return int((await self._run("INFO", "clients"))["blocked_clients"]) > 0

    async def listening(self, shard: int) -> bool:
        channel = ShardKeys.of(shard).ticks
        return int((await self._run("PUBSUB", "NUMSUB", channel))[1]) > 0

    async def close(self) -> None:
        await self.link.close()
