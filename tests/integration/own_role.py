"""A role of a test's own on the store of a running stack: its exit code, its settings and its death belong to the test."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

import httpx

from auction_timer.roles import listen, url_of
from tests.integration.crowd import port_of
from tests.live import DEADLINE_S, SCRIPT, LiveStack, until


class OwnRole:
    """A running `auction-timer <role>`, started and not waited for. Settings by name, without the prefix."""

    def __init__(
        self, stack: LiveStack, role: str, *options: str, fds: tuple[int, ...] = (), **settings: object
    ) -> None:
        self._log = stack.data_dir.parent / f"own-{role}-{time.monotonic_ns()}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        named = {"REDIS_URL": f"unix://{stack.data_dir / 'valkey.sock'}", "DATA_DIR": stack.data_dir} | settings
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*SCRIPT, role, "--parent", str(os.getpid()), *options],
                cwd=stack.data_dir.parent,
                env=clean | {f"AUCTION_TIMER_{name}": str(value) for name, value in named.items()},
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def logged(self) -> str:
        """Everything it has said."""
        return self._log.read_text(errors="replace")

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End it, whatever state it is in; its exit code."""
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class OwnGateway(OwnRole):
    """A gateway on a port of its own, which is ready."""

    def __init__(self, stack: LiveStack, **settings: object) -> None:
        with listen("127.0.0.1", 0) as listener:
            self.url = url_of(listener)
            self.port = port_of(self.url)
            fd = listener.fileno()
            super().__init__(stack, "gateway", "--fd", str(fd), fds=(fd,), **settings)
        try:
            with httpx.Client(base_url=self.url, trust_env=False, timeout=DEADLINE_S) as http:
                until(lambda: http.get("/readyz").status_code == 200, "the gateway is ready")
        except BaseException:
            self.stop()
            raise

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
