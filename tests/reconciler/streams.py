"""Audit streams of a real server, written as the engine's commits write them, or as nobody should."""

from collections.abc import Iterable, Sequence

from engine.clock import SystemClock
from engine.contract.audit import ChainHead
from engine.contract.cursors import START
from engine.contract.keys import META, ShardKeys
from engine.store.link import RedisLink
from engine.store.protocol import AuditEntry
from engine.store.redis import RedisStore
from tests.engine.store.audit_records import head_of, records
from tests.servers import Server

SHARDS = 2


class Streams:
    """The streams, and a store to read them with that gives up early."""

    def __init__(self, server: Server, *, call_deadline_ms: int = 2_000) -> None:
        self.server = server
        self.link = server.link()
        self._hasty = RedisLink(server.url, SystemClock(), call_deadline_ms=call_deadline_ms)
        self.store = RedisStore(self._hasty, SystemClock())
        self.heads: dict[int, ChainHead] = {}
        self._run = self.link.commands.execute_command

    async def grow(self, shard: int, count: int) -> list[AuditEntry]:
        """Commit `count` more records of a shard, with the head of its chain."""
        written = records(count, self.heads.get(shard))
        await self.put(shard, written)
        await self.set_head(shard, head_of(written))
        return written

    async def put(self, shard: int, entries: Iterable[AuditEntry]) -> None:
        """Add entries under their own ids, and leave the head alone."""
        pipe = self.link.commands.pipeline(transaction=False)
        for entry in entries:
            pairs = [text.encode(errors="surrogateescape") for pair in entry.fields.items() for text in pair]
            pipe.execute_command("XADD", ShardKeys.of(shard).audit, entry.stream_id, *pairs)
        await pipe.execute()

    async def set_head(self, shard: int, head: ChainHead) -> None:
        """Say what the last record is."""
        self.heads[shard] = head
        await self._run("HSET", ShardKeys.of(shard).cursor, "seq", head.seq, "hash", head.hash)

    async def deploy(self, shards: int = SHARDS) -> None:
        """Be a deployment of so many shards."""
        await self._run("HSET", META, "shards", shards, "schema", "1")

    async def lose(self, shard: int, entries: Sequence[AuditEntry], head: ChainHead) -> None:
        """Go back to before some records, as a failover to a replica that lacked them does: ids and all."""
        kept = [entry for entry in await self.held(shard) if entry not in entries]
        await self._run("DEL", ShardKeys.of(shard).audit)
        await self.put(shard, kept)
        await self.set_head(shard, head)

    async def held(self, shard: int) -> list[AuditEntry]:
        """Everything a stream holds."""
        return await self.store.audit_entries(shard, START, 100_000)

    async def close(self) -> None:
        """Give the connections back."""
        await self.link.close()
        await self._hasty.close()
