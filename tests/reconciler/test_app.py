"""The reconciler as a process: starts, waits, refuses, ends."""

import os
import signal
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.store.archive import ArchiveUnavailableError, AuditArchive
from tests.contracts.stores import until
from tests.engine.store.archives import postgresql_database
from tests.live import DEADLINE_S, SCRIPT
from tests.postgresql import PostgreSQL
from tests.reconciler.streams import SHARDS, Streams
from tests.servers import Server
from tests.topologies import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R3")]


class Process:
    """A running `auction-timer reconciler`."""

    def __init__(self, directory: Path, redis_url: str, **env: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        self.log = directory / "reconciler.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*SCRIPT, "reconciler", "--redis-url", redis_url, "--data-dir", str(directory / "data")],
                cwd=directory,
                env=clean | {"AUCTION_TIMER_SHARDS": str(SHARDS)} | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def logged(self) -> str:
        """What it has said."""
        return self.log.read_text(errors="replace")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code; it is killed if it does not end."""
        try:
            return self._process.wait(DEADLINE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, however it is."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(directory: Path, redis_url: str, **env: str) -> Iterator[Process]:
    """A reconciler for the duration of a block."""
    process = Process(directory, redis_url, **env)
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture
async def streams(valkey_server: Server) -> AsyncIterator[Streams]:
    made = Streams(valkey_server)
    yield made
    await made.close()


def holds(archive: AuditArchive, count: int) -> Callable[[], object]:
    async def look() -> bool:
        try:
            last = await archive.last(0)
        except ArchiveUnavailableError:  # it is being made
            return False
        return last is not None and last.fields["seq"] == str(count)

    return look


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_archives_and_ends_in_order(streams: Streams, tmp_path: Path, number: signal.Signals) -> None:
    """What is in the stream gets into `audit.sqlite3` of the data dir; what came just before the end too; exit code 0."""
    await streams.grow(0, 20)
    archive = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/data/audit.sqlite3")
    with running(tmp_path, streams.server.url) as process:
        await until(holds(archive, 20), within_s=DEADLINE_S)
        await streams.grow(0, 7)
        assert process.end(number) == 0
        assert "reconciler_stopped" in process.logged()
    assert await archive.walk(0, 0, 100) == await streams.held(0)
    assert len(await archive.walk(0, 0, 100)) == 27
    await archive.close()


async def test_it_waits_for_redis(streams: Streams, tmp_path: Path) -> None:
    """Started before its Redis answers it waits, and can be ended meanwhile; a Redis that comes back is used at once."""
    with streams.server.frozen(), running(tmp_path, streams.server.url) as process:
        await until(lambda: "reconciler_starting" in process.logged(), within_s=DEADLINE_S)
        assert process.end() == 0
    await streams.grow(0, 3)
    archive = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/data/audit.sqlite3")
    streams.server.freeze()
    try:
        with running(tmp_path, streams.server.url):
            streams.server.thaw()
            await until(holds(archive, 3), within_s=DEADLINE_S)
    finally:
        streams.server.thaw()
        await archive.close()


async def test_another_deployment_is_refused(streams: Streams, tmp_path: Path) -> None:
    """A Redis with another shard count, an unusable archive URL and a missing Redis are configuration errors: exit 78."""
    await streams.deploy(shards=4)
    with running(tmp_path, streams.server.url) as process:
        assert process.wait() == 78
        assert "AUCTION_TIMER_SHARDS=4" in process.logged()
    with running(tmp_path, streams.server.url, AUCTION_TIMER_AUDIT_URL="mysql://db/x") as process:
        assert process.wait() == 78
        assert "AUCTION_TIMER_AUDIT_URL" in process.logged()
        assert "Traceback" not in process.logged()
    with running(tmp_path, "") as process:
        assert process.wait() == 78
        assert "--redis-url" in process.logged()


async def test_postgresql_away_at_the_start_and_later(
    streams: Streams, tmp_path: Path, postgresql_server: PostgreSQL
) -> None:
    """A database that is down is waited for, at the start as well as later, and then nothing is missing."""
    with postgresql_database(postgresql_server) as database:
        archive = AuditArchive(database.url)
        await streams.grow(0, 20)
        postgresql_server.stop()
        try:
            with running(tmp_path, streams.server.url, AUCTION_TIMER_AUDIT_URL=database.url) as process:
                await until(lambda: "archiver_waiting" in process.logged(), within_s=DEADLINE_S)
                postgresql_server.start()
                await until(holds(archive, 20), within_s=DEADLINE_S)
                postgresql_server.stop()
                await streams.grow(0, 20)
                await until(lambda: process.logged().count("archiver_waiting") == 2, within_s=DEADLINE_S)
                postgresql_server.start()
                await until(holds(archive, 40), within_s=DEADLINE_S)
                assert process.end() == 0
        finally:
            if not postgresql_server.runs:
                postgresql_server.start()
        assert len(await archive.walk(0, 0, 100)) == 40
        await archive.close()


async def test_its_metrics(streams: Streams, tmp_path: Path) -> None:
    """On the port of the settings it says how many records wait."""
    await streams.grow(0, 3)
    (port,) = free_ports(1)

    def scraped() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    archive = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/data/audit.sqlite3")
    with running(tmp_path, streams.server.url, AUCTION_TIMER_METRICS_PORT=str(port)):
        await until(holds(archive, 3), within_s=DEADLINE_S)
        await until(lambda: "auctions_audit_archive_lag_events 0.0" in scraped(), within_s=DEADLINE_S)
    await archive.close()
