"""What a stack has written, read back by other means than its own: HTTP, Redis, and the hash of the standard library."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from engine.contract.keys import ShardKeys, replies, shard_of
from tests.live import LiveStack

SHARDS = 8
GENESIS = "0" * 64
NUMBERS = ("seq", "version", "occurred_at", "recorded_at")


def records_of(stack: LiveStack, auction_id: str, limit: int = 500) -> list[dict[str, Any]]:
    """The audit of an auction, page by page."""
    found: list[dict[str, Any]] = []
    query: dict[str, str] = {"limit": str(limit)}
    while True:
        answer = stack.get(f"/auctions/{auction_id}/audit", **query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["records"]) <= limit
        found += page["records"]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


def facts_of(stack: LiveStack, auction_id: str) -> list[str]:
    """What happened to an auction, in order."""
    return [record["event_type"] for record in records_of(stack, auction_id)]


def hash_of(record: dict[str, Any]) -> str:
    """The hash that a record of the API must carry, by its description in `/openapi.json` alone."""
    fields = {name: "" if value is None else value for name, value in record.items() if name not in {"hash", "shard"}}
    for name in NUMBERS:
        fields[name] = str(fields[name])
    fields["details"] = json.dumps(record["details"], separators=(",", ":"), ensure_ascii=False)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def assert_whole(records: Iterable[dict[str, Any]]) -> None:
    """The records of a shard from its first on: numbered without a gap, each linked to the one before it."""
    previous = GENESIS
    for seq, record in enumerate(records, start=1):
        assert record["seq"] == seq
        assert record["prev_hash"] == previous
        assert record["hash"] == hash_of(record)
        previous = record["hash"]


def stream(stack: LiveStack, key: str) -> list[dict[str, str]]:
    """The entries of a stream as they stand in Redis, each with its id."""
    return [
        {"stream_id": stream_id.decode()} | {name.decode(): value.decode() for name, value in fields.items()}
        for stream_id, fields in stack.redis("XRANGE", key, "-", "+")
    ]


def replies_to(stack: LiveStack, reply_to: str) -> list[dict[str, Any]]:
    """What was answered to `reply_to`, in order."""
    return [json.loads(entry["body"]) for entry in stream(stack, replies(reply_to))]


def announced(stack: LiveStack, auction_id: str) -> list[dict[str, Any]]:
    """What was announced about an auction on the event lane, in order."""
    keys = keys_of(auction_id)
    return [
        json.loads(entry["body"]) for entry in stream(stack, keys.updates) if entry["auction_id"] == auction_id
    ]  # fmt: skip


def keys_of(auction_id: str) -> ShardKeys:
    """The names of the shard that an auction lives in."""
    return ShardKeys.of(shard_of(auction_id, SHARDS))


def has_deadline(stack: LiveStack, auction_id: str) -> bool:
    """Whether an auction stands in the sorted set of deadlines."""
    return stack.redis("ZSCORE", keys_of(auction_id).deadlines, auction_id) is not None


def parked_in(stack: LiveStack) -> list[dict[str, Any]]:
    """What is in troubleshooting, page by page."""
    found: list[dict[str, Any]] = []
    query: dict[str, str] = {"limit": "500"}
    while True:
        page = stack.http.get("/ops/troubleshooting", params=query).json()
        found += page["commands"]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


def drained(stack: LiveStack) -> bool:
    """Whether the engine has applied everything. The cursor is read first: its move may append what is sent round again."""
    for shard in range(SHARDS):
        keys = ShardKeys.of(shard)
        applied = stack.redis("HGET", keys.cursor, "intake")
        last = stack.redis("XREVRANGE", keys.events, "+", "-", "COUNT", 1)
        if last and last[0][0] != applied:
            return False
    return True
