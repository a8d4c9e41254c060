"""A gateway of a test's own on the store of a running stack: its exit code, its settings and its death belong to the test."""

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx

from auction_timer.roles import listen, url_of
from tests.integration.crowd import port_of
from tests.live import DEADLINE_S, SCRIPT, LiveStack, until


class OwnGateway:
    """A running `auction-timer gateway`. Settings by name, without the prefix."""

    def __init__(self, stack: LiveStack, **settings: object) -> None:
        listener = listen("127.0.0.1", 0)
        self.url = url_of(listener)
        self.port = port_of(self.url)
        self._log = (stack.data_dir.parent / f"gateway-{time.monotonic_ns()}.log").open("wb")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        named = {"REDIS_URL": f"unix://{stack.data_dir / 'valkey.sock'}", "DATA_DIR": stack.data_dir} | settings
        with listener:
            self.process = subprocess.Popen(
                [*SCRIPT, "gateway", "--parent", str(os.getpid()), "--fd", str(listener.fileno())],
                cwd=stack.data_dir.parent,
                env=clean | {f"AUCTION_TIMER_{name}": str(value) for name, value in named.items()},
                pass_fds=(listener.fileno(),),
                stdout=self._log,
                stderr=self._log,
            )
        try:
            with httpx.Client(base_url=self.url, trust_env=False, timeout=DEADLINE_S) as http:
                until(lambda: http.get("/readyz").status_code == 200, "the gateway is ready")
        except BaseException:
            self.stop()
            raise

    def logged(self) -> str:
        """Everything it has said."""
        return Path(self._log.name).read_text(errors="replace")

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End it, whatever state it is in; its exit code."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait(DEADLINE_S)
        self._log.close()
        return code
