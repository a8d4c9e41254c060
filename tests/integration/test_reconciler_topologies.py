"""The reconciler behind a Sentinel group and on a Cluster: after a failover it finds and mends through the new primary."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
from redis.exceptions import RedisError

from benchmarks.failover import KINDS, Topology
from engine.contract.keys import RECONCILIATIONS
from tests.integration.events import fresh_id, started
from tests.integration.records import keys_of, records_of
from tests.integration.test_first_light import now_of
from tests.live import SCRIPT, LiveStack, until
from tests.topologies import ClusterGroup, Member

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R10", "R12")]

INTERVAL_MS: Final = 400
LONG_MS: Final = 3_600_000
MOVED_MS: Final = 10_000
EXIT_UNAVAILABLE: Final = 69


@pytest.fixture(scope="module", params=[*KINDS.values()], ids=[*KINDS])
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """One group for the tests of a kind: the second finds what the first has left of it."""
    made: Topology = request.param()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def stack(topology: Topology) -> Iterator[LiveStack]:
    """Engine, gateway and a reconciler that looks often, behind the group."""
    env = {
        "AUCTION_TIMER_REDIS_URL": topology.url,
        "AUCTION_TIMER_DURABILITY": "replicated",
        "AUCTION_TIMER_DRAIN_MS": "0",
        "AUCTION_TIMER_RECONCILE_INTERVAL_MS": str(INTERVAL_MS),
    }
    with TemporaryDirectory(prefix="at-") as directory:
        made = LiveStack(Path(directory), env=env)
        try:
            yield made
        finally:
            made.stop()


def serving(topology: Topology, key: str) -> Member:
    """The primary that has a key now."""
    return topology.serving(key) if isinstance(topology, ClusterGroup) else topology.primary


def live_auction(stack: LiveStack) -> tuple[str, int]:
    """An auction that lasts, and its end."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + LONG_MS))
    return auction_id, int(stack.until_status(auction_id, "ACTIVE")["ends_at"])


def score_of(topology: Topology, auction_id: str) -> int | None:
    """The deadline in the sorted set of the primary."""
    key = keys_of(auction_id).deadlines
    score = serving(topology, key).ask("ZSCORE", key, auction_id)
    return None if score is None else int(float(score))


def written_down(topology: Topology, auction_id: str) -> list[tuple[str, str]]:
    """Cause and action of what the reconciler has recorded about an auction."""
    rows = serving(topology, RECONCILIATIONS).ask("XRANGE", RECONCILIATIONS, "-", "+")
    entries = [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in map(_text, rows)]
    return [(entry["cause"], entry["action"]) for entry in entries if entry["auction_id"] == auction_id]


def _text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_text(each) for each in value]
    if isinstance(value, dict):
        return [_text(each) for pair in value.items() for each in pair]
    return value.decode() if isinstance(value, bytes) else value


def until_mended(topology: Topology, auction_id: str, ends_at: int) -> None:
    """Wait until the sorted set says again what the log says; a server that is busy with a failover may not answer."""

    def mended() -> bool:
        try:
            return score_of(topology, auction_id) == ends_at
        except (RedisError, OSError):
            return False

    until(mended, f"the deadline of {auction_id} is back")


def test_a_pass_after_a_failover_mends_through_the_new_primary(topology: Topology, stack: LiveStack) -> None:
    """The primary gets SIGKILL; an entry that is deleted from, and a score that is moved on, its successor are put right."""
    deleted, deleted_ends_at = live_auction(stack)
    moved, moved_ends_at = live_auction(stack)
    victims = [topology.victim([auction_id]) for auction_id in (deleted, moved)]
    victims[0].kill()
    for auction_id, ends_at in ((deleted, deleted_ends_at), (moved, moved_ends_at)):
        until_mended(topology, auction_id, ends_at)  # the successor has it, whatever was on its way
        assert serving(topology, keys_of(auction_id).deadlines) is not victims[0]

    key = keys_of(deleted).deadlines
    assert serving(topology, key).ask("ZREM", key, deleted) == 1
    key = keys_of(moved).deadlines
    assert serving(topology, key).ask("ZADD", key, "XX", "CH", moved_ends_at - MOVED_MS, moved) == 1

    for auction_id, ends_at, cause in (
        (deleted, deleted_ends_at, "entry_missing"),
        (moved, moved_ends_at, "score_wrong"),
    ):
        until_mended(topology, auction_id, ends_at)
        # The engine may have mended it before the reconciler has written down that it asked for that.
        until(lambda: written_down(topology, auction_id), f"what was found of {auction_id} is written down")  # noqa: B023
        assert written_down(topology, auction_id) == [(cause, "requested")]
        last = records_of(stack, auction_id)[-1]
        assert (last["event_type"], last["details"]["cause"]) == ("auction_timer_corrected", cause)
        assert stack.until_status(auction_id, "ACTIVE")["ends_at"] == ends_at
    victims[0].start()


def once(stack: LiveStack, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A single pass by the command line."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    env["AUCTION_TIMER_DURABILITY"] = "replicated"
    command = [*SCRIPT, "reconciler", "--once", "--report", "--redis-url", url, "--data-dir", str(stack.data_dir)]
    return subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_single_pass_by_hand_works_on_the_same_url(topology: Topology, stack: LiveStack) -> None:
    """Exit code 0 with nothing found, 1 with drift that it leaves or repairs, 69 where no server of the URL answers."""
    auction_id, ends_at = live_auction(stack)
    clean = once(stack, topology.url)
    for _ in range(3):
        # A loaded machine lets a server or an engine stand still, which is no drift of an auction.
        if (
            clean.returncode == EXIT_UNAVAILABLE
            or "heartbeat_frozen" in clean.stdout
            or "engine_silent" in clean.stdout
        ):
            clean = once(stack, topology.url)
    assert (clean.returncode, "0 drifts" in clean.stdout) == (0, True), clean
    key = keys_of(auction_id).deadlines
    (running,) = stack.pids("reconciler")
    # Stopped, it does not beat, and whoever looks once may act.
    os.kill(running, signal.SIGSTOP)
    try:
        assert serving(topology, key).ask("ZREM", key, auction_id) == 1
        left = once(stack, topology.url, "--dry-run")
        assert (left.returncode, auction_id in left.stdout, "entry_missing" in left.stdout) == (1, True, True), left
        assert score_of(topology, auction_id) is None
        acted = once(stack, topology.url)
        assert (acted.returncode, "requested" in acted.stdout) == (1, True), acted
        until_mended(topology, auction_id, ends_at)
    finally:
        os.kill(running, signal.SIGCONT)
    assert written_down(topology, auction_id) == [("entry_missing", "requested")]
    nowhere = re.sub(r"127\.0\.0\.1:[\d.:,]+", "127.0.0.1:1", topology.url)
    assert once(stack, nowhere).returncode == EXIT_UNAVAILABLE
