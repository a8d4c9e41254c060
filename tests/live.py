"""The whole system as a user starts it: `auction-timer serve` as a process, on a free port, in a directory of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import httpx
import pytest

from auction_timer.processes import parent_death_hook

DEADLINE_S = 30.0
SCRIPT = [sys.executable, str(Path(sys.executable).parent / "auction-timer")]


def until(condition: Callable[[], Any], what: str, within_s: float = DEADLINE_S) -> Any:
    """Poll a condition until it is true, and return it; fail with `what` after a deadline."""
    give_up = time.monotonic() + within_s
    while True:
        if found := condition():
            return found
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.01)


def exists(pid: int) -> bool:
    """Whether the pid is taken, by a running process or by a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not reaped by its parent does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self").exists() and exists(pid)
    except ProcessLookupError:  # it was reaped while it was read
        return False
    return state not in "ZX"


def children_of(pid: int) -> dict[int, str]:
    """The running children of a process, with their command lines."""
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and command:
            found[int(directory.name)] = command
    return found


class LiveStack:
    """A running `serve`."""

    def __init__(self, directory: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.data_dir = directory / "data"
        self.log = (directory / f"serve-{time.monotonic_ns()}.log").open("wb+")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        self.process = subprocess.Popen(
            [*SCRIPT, "serve", "--port", "0", "--data-dir", str(self.data_dir), *options],
            cwd=directory,
            # What a test stops must still be there when it lets it go on.
            env=environment | {"AUCTION_TIMER_FROZEN_MS": "300000"} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            preexec_fn=parent_death_hook(),  # a test run that is killed leaves nothing behind
        )
        self._lines: Queue[str] = Queue()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.ready_line = self._lines.get(timeout=DEADLINE_S)
        except Empty:
            logged = self.logged()
            self.stop()
            raise AssertionError(f"serve was not ready within {DEADLINE_S} s:\n{logged}") from None
        assert self.ready_line.startswith("ready "), self.logged()
        self.url = self.ready_line.removeprefix("ready ").strip()
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=10)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def logged(self) -> str:
        """Everything on stderr so far."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def pids(self, role: str) -> list[int]:
        """The pids of a role: `engine`, `gateway`, or `valkey-server` for the store."""
        return [
            pid
            for pid, command in children_of(self.process.pid).items()
            if f"auction-timer {role} " in command + " " or role in command.split(" ")[0]
        ]

    def kill(self, role: str) -> int:
        """SIGKILL the process of a role, and return its pid."""
        (pid,) = until(lambda: self.pids(role), f"a {role} runs")
        os.kill(pid, signal.SIGKILL)
        return pid

    def post(self, *events: dict[str, Any]) -> list[dict[str, Any]]:
        """Post events until they are accepted, as a producer does whose 503 says to repeat them; their results."""
        answer = self._patiently(lambda: self.http.post("/events", json=list(events)))
        assert answer.status_code == 202, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results

    def get(self, path: str, **query: str) -> httpx.Response:
        """Get a page; one that is unavailable for a moment is asked for again."""
        return self._patiently(lambda: self.http.get(path, params=query))

    @staticmethod
    def _patiently(ask: Callable[[], httpx.Response]) -> httpx.Response:
        answer, give_up = ask(), time.monotonic() + DEADLINE_S
        while answer.status_code == 503 and time.monotonic() < give_up:
            time.sleep(0.1)
            answer = ask()
        return answer

    def timer(self, auction_id: str) -> dict[str, Any]:
        """The timer of an auction that is known."""
        answer = self.get(f"/auctions/{auction_id}/timer")
        assert answer.status_code == 200, answer.text
        timer: dict[str, Any] = answer.json()
        return timer

    def until_status(self, auction_id: str, *statuses: str) -> dict[str, Any]:
        """Wait until an auction is known and has one of some statuses."""

        def reached() -> dict[str, Any] | None:
            answer = self.http.get(f"/auctions/{auction_id}/timer")
            return answer.json() if answer.status_code == 200 and answer.json()["status"] in statuses else None

        found: dict[str, Any] = until(reached, f"{auction_id} is {' or '.join(statuses)}")
        return found

    def is_flushed(self) -> bool:
        """Whether the store has handed everything to the kernel; it puts that off, for up to two seconds, while it syncs."""
        state = self.redis("INFO", "persistence")
        return bool(state["aof_buffer_length"] == state["aof_pending_bio_fsync"] == 0)

    def redis(self, *command: Any) -> Any:
        """Ask the store itself."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        client = redis.Redis(unix_socket_path=str(self.data_dir / "valkey.sock"), retry=Retry(NoBackoff(), 0))
        try:
            return client.execute_command(*command)
        finally:
            client.close()

    def stop(self) -> int:
        """SIGTERM, and the exit code; whatever is left of it is killed by its own pid."""
        started = {self.process.pid, *children_of(self.process.pid)}
        self.process.terminate()
        try:
            code = self.process.wait(DEADLINE_S)
        finally:
            for pid in started:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.log.close()
            if hasattr(self, "http"):
                self.http.close()
        return code


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory with a short path: a socket's name has room for about 100 bytes."""
    with TemporaryDirectory(prefix="at-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def live_stack() -> Iterator[LiveStack]:
    """One stack for all tests that only talk to it; each uses auctions of its own."""
    with TemporaryDirectory(prefix="at-") as directory:
        stack = LiveStack(Path(directory))
        try:
            yield stack
        finally:
            stack.stop()
