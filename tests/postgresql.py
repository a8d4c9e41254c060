"""A real PostgreSQL for tests: Debian's, in a temporary directory of its own, on a Unix socket.

It refuses to run as root, so under root it runs as the user that Debian's package makes for it.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from auction_timer.processes import parent_death_hook

START_WITHIN_S: Final = 30.0
POLL_S: Final = 0.02
USER: Final = "postgres"
PORT: Final = 5432
"""A part of the socket's name only: no port is opened."""

PROGRAMS: Final = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


def missing() -> str | None:
    """Why there can be no PostgreSQL here, as a sentence; None if there can."""
    if not PROGRAMS:
        return "PostgreSQL is not installed (/usr/lib/postgresql/*/bin/postgres): no tests against it"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(USER)
        except KeyError:
            return f"PostgreSQL does not run as root, and there is no user {USER}: no tests against it"
    return None


class PostgreSQL:
    """A running server. Its only door is a Unix socket, behind which everyone is let in."""

    def __init__(self) -> None:
        self._bin = PROGRAMS[-1].parent
        self._user = USER if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="at-pg-", dir="/tmp"))
        if self._user is not None:
            shutil.chown(self._directory, self._user)
        self._data, self._log = self._directory / "data", self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._run("initdb", "-D", str(self._data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
            self.start()
        except BaseException:
            self.remove()
            raise

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._bin / program, *arguments],
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
            cwd=self._directory,
            check=True,
            capture_output=True,
            timeout=START_WITHIN_S,
        )

    def url(self, database: str = USER) -> str:
        """The URL of a database, as settings spell it."""
        return f"postgresql+asyncpg://{USER}@/{database}?host={self._directory}"

    def sql(self, statement: str, database: str = USER) -> None:
        """Run one statement."""
        self._run("psql", "-X", "-q", "-h", str(self._directory), "-U", USER, "-d", database, "-c", statement)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._bin / "postgres",
                    *("-D", self._data, "-k", self._directory, "-p", str(PORT), "-c", "listen_addresses="),
                    *("-c", "shared_buffers=16MB", "-c", "max_connections=40"),
                ],
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=parent_death_hook(),  # after the change of user, so that it holds
            )
        give_up = time.monotonic() + START_WITHIN_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"PostgreSQL did not start:\n{self._log.read_text(errors='replace')[-2_000:]}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        try:
            self._run("pg_isready", "-q", "-h", str(self._directory))
        except subprocess.CalledProcessError:
            return False
        return True

    @property
    def runs(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server at once (SIGQUIT: it ends its own processes, and recovers at its next start)."""
        if self._process is not None and self.runs:
            os.kill(self._process.pid, signal.SIGQUIT)
            self._process.wait(START_WITHIN_S)

    def remove(self) -> None:
        """End the server, and remove what it has written."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """An empty database for the duration of a block; its URL."""
        self.sql(f'CREATE DATABASE "{name}"')
        try:
            yield self.url(name)
        finally:
            self.sql(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """The session's PostgreSQL; each test makes a database of its own."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    server = PostgreSQL()
    try:
        yield server
    finally:
        server.remove()
