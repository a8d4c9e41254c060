"""Processes on this machine: the server on one core, everything else on another, measured from outside."""

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SERVER_CORE: Final = 0
CLIENT_CORE: Final = 1


def pin(pid: int, core: int) -> None:
    """Keep a process on one core. A machine that has no such core measures all the same, less steadily."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(pid, {core})


@contextlib.contextmanager
def on_client_core(*others: int) -> Iterator[None]:
    """This process, and `others`, out of the server's way; children inherit it."""
    before = os.sched_getaffinity(0)
    for pid in (os.getpid(), *others):
        pin(pid, CLIENT_CORE)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def open_files() -> None:
    """Raise the bound on open files to what is allowed: two for each socket pair would be one process's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_ns(pid: int) -> int:
    """CPU time a process has used, user and system, in ns. Linux makes the id of such a clock from the pid."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, without the kernel's buffers for its sockets."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
