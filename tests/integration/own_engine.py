"""An engine of a test's own on the store of a running stack, beside the one that the stack has."""

import os
import subprocess

from tests.live import DEADLINE_S, SCRIPT, LiveStack


class OwnEngine:
    """A running `auction-timer engine` for the duration of a block. Settings by name, without the prefix."""

    def __init__(self, stack: LiveStack, **settings: object) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        named = {"REDIS_URL": f"unix://{stack.data_dir / 'valkey.sock'}", "DATA_DIR": stack.data_dir} | settings
        self.process = subprocess.Popen(
            [*SCRIPT, "engine", "--parent", str(os.getpid())],
            cwd=stack.data_dir.parent,
            env=clean | {f"AUCTION_TIMER_{name}": str(value) for name, value in named.items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "OwnEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
