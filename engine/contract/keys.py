"""Redis names. All keys of shard `k` share the hash tag `{k}`, so a script never leaves one slot (Redis Cluster)."""

from dataclasses import dataclass
from typing import Final
from zlib import crc32

META: Final = "auction:meta"
"""Hash: `shards`, `schema`. Written once, when a deployment is first started."""

ENGINES: Final = "auction:engines"
"""Hash: the beats of every engine that runs, by its name."""

CLOCKS: Final = "auction:clocks"
"""Hash: what every process states about its clock, by its role and name."""

RECONCILIATIONS: Final = "auction:timer:reconciliations"
"""Stream: what the reconciler found, what it did about it, and why."""

RECONCILER: Final = "auction:reconciler"
"""The lease of the one reconciler that acts."""

SHARDS_MAX: Final = 1024


def shard_of(auction_id: str, shards: int) -> int:
    """The shard an auction lives in: CRC-32 of its id, so that every language finds it with its standard library."""
    return crc32(auction_id.encode()) % shards


def replies(reply_to: str) -> str:
    """The stream on which the one who asked for a reply waits."""
    return f"auction:replies:{reply_to}"


def hash_tag(name: str) -> str:
    """The part of a name that decides its slot: what stands in its first braces, or all of it (Redis Cluster)."""
    _, opened, rest = name.partition("{")
    tag, closed, _ = rest.partition("}")
    return tag if opened and closed and tag else name


def delivered(stream: str, shard: int, command_id: str) -> str:
    """The mark, beside a reply stream, of the last answer to a command that a shard has delivered there."""
    return f"auction:delivered:{{{hash_tag(stream)}}}:{shard}:{command_id}"


def barrier(name: str) -> str:
    """A key in the slot of `name` that is written only so that replicas can be waited for."""
    return f"auction:barrier:{{{hash_tag(name)}}}"


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The names of one shard, built once."""

    shard: int
    events: str
    updates: str
    audit: str
    ticks: str
    deadlines: str
    paused: str
    closed: str
    troubleshooting: str
    parked: str
    forwarder: str
    undelivered: str
    lease: str
    cursor: str
    attendance: str
    outbox: str
    timer_prefix: str
    offer_prefix: str
    seen_prefix: str
    command_prefix: str

    @classmethod
    def of(cls, shard: int) -> "ShardKeys":
        """The names of shard number `shard`."""
        tag = f"{{{shard}}}"
        return cls(
            shard=shard,
            events=f"auction:events:{tag}",
            updates=f"auction:updates:{tag}",
            audit=f"auction:audit:{tag}",
            ticks=f"auction:ticks:{tag}",
            deadlines=f"auction:deadlines:{tag}",
            paused=f"auction:paused:{tag}",
            closed=f"auction:closed:{tag}",
            troubleshooting=f"auction:troubleshooting:{tag}",
            parked=f"auction:parked:{tag}",
            forwarder=f"auction:forwarder:{tag}",
            undelivered=f"auction:undelivered:{tag}",
            lease=f"auction:lease:{tag}",
            cursor=f"auction:cursor:{tag}",
            attendance=f"auction:attendance:{tag}",
            outbox=f"auction:outbox:{tag}",
            timer_prefix=f"auction:timer:{tag}:",
            offer_prefix=f"auction:offer:{tag}:",
            seen_prefix=f"auction:seen:{tag}:",
            command_prefix=f"auction:command:{tag}:",
        )

    def timer(self, auction_id: str) -> str:
        """The hash of one auction."""
        return self.timer_prefix + auction_id
