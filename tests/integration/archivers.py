"""Starts real reconciler processes quickly: everything is imported once, and each line on stdin forks one more.

    python -m tests.integration.archivers REDIS_URL DATA_DIR RETAINED SHARDS

Answers each line with the pid of the new process. They all end with this one.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry

from auction_timer.processes import die_with_parent
from engine import logs
from engine.settings import Settings
from engine.store.archive import AuditArchive
from reconciler import app
from tests.engine.store.audit_records import records


async def _warm() -> None:
    """Import what is imported at the first use of a database, so that a fork is at work after milliseconds."""
    with TemporaryDirectory() as directory:
        archive = AuditArchive(f"sqlite+aiosqlite:///{directory}/audit.sqlite3")
        await archive.create()
        await archive.append(0, records(1))
        await archive.close()


def main(redis_url: str, data_dir: str, retained: str, shards: str) -> None:
    """Fork until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    settings = Settings(
        redis_url=redis_url,
        data_dir=Path(data_dir),
        audit_retained=int(retained),
        shards=int(shards),
        metrics_port=None,
    )
    logs.configure("reconciler", form="text", level="info")
    asyncio.run(_warm())
    parent = os.getpid()
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            die_with_parent(parent)
            code = 1
            try:
                asyncio.run(app.serve(settings, CollectorRegistry()))
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
