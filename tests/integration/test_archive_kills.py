"""Reconcilers that are killed with SIGKILL, again and again, while records come: no gap, no double, a whole chain."""

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import TracebackType

import pytest

from auction_timer.audit import verify_shard
from engine.contract.audit import verify
from engine.store.archive import AuditArchive
from engine.store.audit_reader import AuditReader
from engine.store.protocol import AuditEntry
from tests.contracts.stores import until as until_async
from tests.integration.events import bid, event, fresh_id, started
from tests.live import DEADLINE_S, SCRIPT, LiveStack, alive, until
from tests.reconciler.streams import SHARDS, Streams
from tests.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R3"), pytest.mark.requirement("B7")]

KILLS = 30
RETAINED = 25


class Archivers:
    """Real processes, started by a fork of one that has everything imported."""

    def __init__(self, server: Server, data_dir: Path) -> None:
        arguments = [server.url, str(data_dir), str(RETAINED), str(SHARDS)]
        self.log = (data_dir / "log").open("wb+")
        self._forker = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.archivers", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def start(self) -> int:
        """One more; its pid."""
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write("\n")
        self._forker.stdin.flush()
        return int(self._forker.stdout.readline())

    def __enter__(self) -> "Archivers":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._forker.kill()
        self._forker.communicate()
        self.log.close()


async def test_killed_thirty_times_during_a_stream_of_records(valkey_server: Server, tmp_path: Path) -> None:
    """Real processes, sometimes two at once, die at random instants: what they leave is one whole chain per shard."""
    seed = random.randrange(2**32)
    print(f"SEED={seed}")
    chance = random.Random(seed)
    streams = Streams(valkey_server)
    archive = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/audit.sqlite3")
    reader = AuditReader(streams.store, archive)
    written = dict.fromkeys(range(SHARDS), 0)
    enough = asyncio.Event()

    async def write() -> None:
        while not enough.is_set():
            for shard in written:
                written[shard] += len(await streams.grow(shard, chance.randrange(1, 20)))
            await asyncio.sleep(0.005)

    try:
        await streams.deploy()
        with Archivers(valkey_server, tmp_path) as archivers:
            writing = asyncio.create_task(write())
            for number in range(KILLS):
                before = await archive.last(0)
                pids = [await asyncio.to_thread(archivers.start) for _ in range(1 + (number % 4 == 3))]
                if number % 3:  # at work: between any two of its steps
                    await until_async(lambda before=before: _moved(archive, before), within_s=DEADLINE_S)
                    await asyncio.sleep(chance.uniform(0, 0.02))
                else:  # at its start
                    await asyncio.sleep(chance.uniform(0, 0.06))
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            enough.set()
            await writing
            # What the dead ones left, before anybody tidies up: everything, in one place or the other.
            for shard in written:
                assert (await verify_shard(reader, shard, lambda _count: None)).fault is None
            pid = await asyncio.to_thread(archivers.start)
            await until_async(lambda: _all_archived(archive, written), within_s=DEADLINE_S)
            os.kill(pid, signal.SIGTERM)
            await asyncio.to_thread(until, lambda: not alive(pid), "the last one ends")
        for shard, count in written.items():
            records = [entry.fields for entry in await archive.walk(shard, 0, count + 1)]
            assert len(records) == count
            assert verify(records) is None
            assert len(await streams.held(shard)) == RETAINED
    finally:
        await archive.close()
        await streams.close()


async def _moved(archive: AuditArchive, before: AuditEntry | None) -> bool:
    return await archive.last(0) != before


async def _all_archived(archive: AuditArchive, written: dict[int, int]) -> bool:
    last = [await archive.last(shard) for shard in written]
    return [int(entry.fields["seq"]) if entry else 0 for entry in last] == list(written.values())


@pytest.mark.requirement("R34")
def test_a_stack_whose_reconciler_is_killed_archives_everything(short_tmp: Path) -> None:
    """`serve` starts it again; after an orderly stop the archive alone holds the log to its last record."""
    stack = LiveStack(short_tmp)
    try:
        for _ in range(3):
            now, auctions = time.time_ns() // 1_000_000, [fresh_id() for _ in range(10)]
            stack.post(*(started(auction_id, now, now + 7_200_000) for auction_id in auctions))
            stack.post(*(bid(auction_id) for auction_id in auctions))
            killed = stack.kill("reconciler")
            until(lambda killed=killed: [p for p in stack.pids("reconciler") if p != killed], "another one runs")
        # One that gets its SIGTERM while it still imports ends at once, and leaves the rest to the next start.
        until(lambda: _archived(stack.data_dir) >= 90, "the last one is at work")
        stack.post(event("auctions.cancel.requested", auction_id=fresh_id(), reason="never mind"))
        until(lambda: _heads(stack) >= 91, "the engine has recorded everything")
        heads = _heads(stack)
    finally:
        assert stack.stop() == 0
    shown = subprocess.run(
        [*SCRIPT, "audit", "verify", "--data-dir", str(stack.data_dir)],
        cwd=short_tmp,
        env={name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout
    assert f"{heads} records" in shown.stdout.splitlines()[-1]
    assert "archive alone" in shown.stderr


def _archived(data_dir: Path) -> int:
    """Records in the archive."""
    with contextlib.suppress(sqlite3.OperationalError), closing(sqlite3.connect(data_dir / "audit.sqlite3")) as table:
        return int(table.execute("SELECT count(*) FROM auction_audit_log").fetchone()[0])
    return 0


def _heads(stack: LiveStack) -> int:
    """Records that the engine has written, over all shards."""
    return sum(int(stack.redis("HGET", f"auction:cursor:{{{shard}}}", "seq") or 0) for shard in range(8))
