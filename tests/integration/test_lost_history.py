"""A failover under `local` takes back what was archived already: the reconciler sides with the history that survived."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
from redis.exceptions import RedisError

from engine.contract.keys import RECONCILIATIONS, shard_of
from engine.domain.decide import Fact
from tests.integration.events import bid, event, fresh_id, started
from tests.integration.records import SHARDS, keys_of, records_of
from tests.integration.test_first_light import now_of
from tests.integration.test_reconciler import passed_since, passes
from tests.live import LiveStack, until
from tests.topologies import SentinelGroup, stopping

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R10"), pytest.mark.requirement("R12")]

INTERVAL_MS: Final = 300
LONG_MS: Final = 600_000
WINDOW: Final = {"soft_close_window_ms": LONG_MS, "extension_ms": 60_000, "mode": "add"}
"""Every bid moves the end."""
LOST: Final = 4


@pytest.fixture
def group() -> Iterator[SentinelGroup]:
    """A group of its own: what is left of it is another history."""
    with stopping(SentinelGroup()) as made:
        yield made


@pytest.fixture
def stack(group: SentinelGroup) -> Iterator[LiveStack]:
    """A stack behind the group whose reconciler looks often."""
    env = {
        "AUCTION_TIMER_REDIS_URL": group.url,
        "AUCTION_TIMER_DURABILITY": "local",
        "AUCTION_TIMER_RECONCILE_INTERVAL_MS": str(INTERVAL_MS),
        "AUCTION_TIMER_OUTAGE_EXTENSION_MS": "0",  # a slow failover must not move an end either
    }
    with TemporaryDirectory(prefix="at-") as directory:
        made = LiveStack(Path(directory), env=env)
        try:
            yield made
        finally:
            made.stop()


def neighbour_of(auction_id: str) -> str:
    """An id of an auction in the same shard."""
    return next(other for other in iter(fresh_id, "") if shard_of(other, SHARDS) == shard_of(auction_id, SHARDS))


def ask(group: SentinelGroup, *command: str | int) -> Any:
    """Ask the primary, as soon as there is one."""

    def answer() -> Any:
        try:
            return (group.primary.ask(*command),)
        except (RedisError, OSError):
            return None

    return until(answer, f"the primary answers {command[0]}")[0]


def hash_of(group: SentinelGroup, auction_id: str) -> dict[str, str]:
    """The hash as it is kept."""
    kept: dict[str, str] = ask(group, "HGETALL", keys_of(auction_id).timer(auction_id))
    return kept


def standing(group: SentinelGroup, auction_ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """What is kept of the auctions, but for the number of the state.

    A tick that told of what is lost may have been heard, and is then set right by stating the same once more, above it.
    """
    hashes = {auction_id: hash_of(group, auction_id) for auction_id in auction_ids}
    return {
        auction_id: {name: value for name, value in kept.items() if name not in ("version", "checksum")}
        for auction_id, kept in hashes.items()
    }


def head_of(group: SentinelGroup, auction_id: str) -> int:
    """The number of the last record of an auction's shard."""
    return int(ask(group, "HGET", keys_of(auction_id).cursor, "seq"))


def archived(stack: LiveStack, auction_id: str) -> int:
    """How many records of an auction the archive holds."""
    with closing(sqlite3.connect(f"file:{stack.data_dir}/audit.sqlite3?mode=ro", uri=True)) as archive:
        query = "SELECT count(*) FROM auction_audit_log WHERE auction_id = ?"
        return int(archive.execute(query, (auction_id,)).fetchone()[0])


def after_a_pass(stack: LiveStack) -> None:
    """A pass that has begun after this was called is over."""
    before = passes(stack)
    until(lambda: passed_since(stack, before), "two more passes")


def written_down(group: SentinelGroup, auction_id: str) -> list[str]:
    """The causes of what the reconciler has recorded about an auction, or its shard's log."""
    shard = str(shard_of(auction_id, SHARDS))
    entries = [fields for _, fields in ask(group, "XRANGE", RECONCILIATIONS, "-", "+")]
    about = [each for each in entries if each["auction_id"] == auction_id or each["cause"] == "log_contradicted"]
    return [each["cause"] for each in about if each["shard"] == shard]


def test_what_was_archived_and_lost_moves_nothing(group: SentinelGroup, stack: LiveStack) -> None:
    """Bids moved an end, a cancellation closed another auction, both were archived and taken back: they stay taken back.

    Before the shard has counted on past the archive, at that place, and behind it; damage is found and mended all along.
    """
    moved = fresh_id()
    cancelled, other = neighbour_of(moved), neighbour_of(moved)
    now = now_of(stack)
    for auction_id in (moved, cancelled, other):
        stack.post(started(auction_id, now, now + LONG_MS - 1_000, **WINDOW))
        stack.until_status(auction_id, "CLOSING")
    group.wait_until_whole()
    before = standing(group, (moved, cancelled))
    held = {auction_id: archived(stack, auction_id) for auction_id in before}

    with group.without_replicas() as primary:
        stack.post(*[bid(moved) for _ in range(LOST)])
        stack.post(event("auctions.cancel.requested", auction_id=cancelled, reason="lost"))
        until(lambda: archived(stack, moved) >= held[moved] + LOST, "the bids are archived")
        until(lambda: archived(stack, cancelled) > held[cancelled], "the cancellation is archived")
        told = head_of(group, moved)
        assert hash_of(group, moved)["ends_at"] != before[moved]["ends_at"]
        primary.kill()
    until(lambda: group.primary is not primary, "another one is the primary")
    primary.start()

    assert standing(group, before) == before
    assert head_of(group, moved) < told
    after_a_pass(stack)
    while head_of(group, moved) < told + LOST:
        stack.post(bid(other))
        after_a_pass(stack)
    assert standing(group, before) == before
    assert set(written_down(group, moved)) <= {"tick_differs"}
    facts = [record["event_type"] for record in records_of(stack, moved)]
    assert [fact for fact in facts if fact != Fact.CORRECTED][-1] == Fact.CLOSING

    deadlines = keys_of(moved).deadlines
    ask(group, "ZREM", deadlines, moved)
    until(lambda: ask(group, "ZSCORE", deadlines, moved) is not None, "the deadline is back")
    assert int(float(ask(group, "ZSCORE", deadlines, moved))) == int(before[moved]["ends_at"])
    # The engine may have mended it before the reconciler has written down that it asked for that.
    until(lambda: "entry_missing" in written_down(group, moved), "what was found is written down")
    assert [cause for cause in written_down(group, moved) if cause != "tick_differs"] == ["entry_missing"]
