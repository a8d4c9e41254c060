"""Damage done by hand: what somebody at a console may change of an auction that is live, and how to tell that it stands.

Each takes the shard, its number, an auction among its deadlines or pauses, and the true time. Versions are left alone: a
hash whose version was edited is told by the guard of the next commit, and has tests of its own. Damage stands while its
auction is live: the reconciler does not look at what is over.
"""

from collections.abc import Callable
from typing import Final

import orjson

from auction_timer.simulation.witness import Damage
from engine.domain.instants import SECOND_MS, EpochMs
from engine.store.memory import ShardMemory
from engine.store.protocol import Group

MOVED_MS: Final = 10 * SECOND_MS
LIVE: Final = ("SCHEDULED", "ACTIVE", "CLOSING", "PAUSED")

Harm = Callable[[ShardMemory, int, str, EpochMs], Damage]


def delete_entry(memory: ShardMemory, shard: int, auction_id: str, now_ms: EpochMs) -> Damage:
    """The auction stands in no sorted set any more."""
    memory.groups[_place(memory, auction_id)].pop(auction_id)

    def stands(memory: ShardMemory) -> bool:
        placed = any(auction_id in memory.groups[group] for group in (Group.LIVE, Group.PAUSED))
        return not placed and _is_live(memory, auction_id)

    return Damage("entry deleted", shard, auction_id, stands, now_ms, misleads=False)


def move_entry(memory: ShardMemory, shard: int, auction_id: str, now_ms: EpochMs) -> Damage:
    """It stands ten seconds off."""
    group = _place(memory, auction_id)
    wrong = memory.groups[group][auction_id] + MOVED_MS
    memory.groups[group][auction_id] = wrong

    def stands(memory: ShardMemory) -> bool:
        return memory.groups[group].get(auction_id) == wrong and _is_live(memory, auction_id)

    return Damage("entry moved", shard, auction_id, stands, now_ms, misleads=False)


def change_field(memory: ShardMemory, shard: int, auction_id: str, now_ms: EpochMs) -> Damage:
    """Its hash says something that nobody has said."""
    return _write(memory, shard, auction_id, now_ms, "field changed", "reason", "written by hand")


def push_end(memory: ShardMemory, shard: int, auction_id: str, now_ms: EpochMs) -> Damage:
    """Its hash has an end past the last one allowed."""
    fields = memory.timers[auction_id]
    last = int(fields["original_ends_at"]) + int(fields["paused_total_ms"])
    last += int(orjson.loads(fields["policy"])["total_cap_ms"])
    return _write(memory, shard, auction_id, now_ms, "end past its cap", "ends_at", str(last + MOVED_MS))


def pull_end(memory: ShardMemory, shard: int, auction_id: str, now_ms: EpochMs) -> Damage:
    """Its hash has an end ten seconds too early."""
    wrong = int(memory.timers[auction_id]["ends_at"]) - MOVED_MS
    return _write(memory, shard, auction_id, now_ms, "end moved forward", "ends_at", str(wrong))


HARMS: Final[tuple[Harm, ...]] = (delete_entry, move_entry, change_field, push_end, pull_end)


def _write(
    memory: ShardMemory, shard: int, auction_id: str, now_ms: EpochMs, kind: str, name: str, wrong: str
) -> Damage:
    memory.timers[auction_id][name] = wrong

    def stands(memory: ShardMemory) -> bool:
        return memory.timers.get(auction_id, {}).get(name) == wrong and _is_live(memory, auction_id)

    return Damage(kind, shard, auction_id, stands, now_ms, misleads=True)


def _place(memory: ShardMemory, auction_id: str) -> Group:
    return Group.LIVE if auction_id in memory.groups[Group.LIVE] else Group.PAUSED


def _is_live(memory: ShardMemory, auction_id: str) -> bool:
    return memory.timers.get(auction_id, {}).get("status") in LIVE
