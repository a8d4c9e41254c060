"""The supervision of child processes, against real processes on both event loops."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop

from auction_timer import pulse
from auction_timer.errors import ChildConfigError, ChildStartError, LocalStackError
from auction_timer.processes import (
    EXIT_CONFIG,
    EXIT_USAGE,
    HEALTHY_AFTER_MS,
    RESTART_DELAY_MS_FIRST,
    RESTART_DELAY_MS_MAX,
    STARTED_AFTER_MS,
    Backoff,
    Child,
    ChildSpec,
    ChildSupervisor,
    console_script,
    exit_fields,
    kernel_tells_of_parent_death,
    kill_now,
)
from tests.auction_timer import DEADLINE_S, eventually, kill_if_running
from tests.live import alive, exists

Scenario = Callable[[], Coroutine[Any, Any, None]]

PYTHON = (sys.executable, "-I", "-S", "-c")  # no site-packages: starts in some 15 ms
RUNS_ON = "import signal; open({ready!r}, 'a').write('x'); signal.pause()"
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + RUNS_ON
BEATS_ONCE = "import os, sys; os.write(int(sys.argv[2]), b'.'); " + RUNS_ON
# Waited for, not handled: a handler does not end a `pause` that the signal came just before.
LEAVES_A_NOTE = (
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); open({ready!r}, 'a').write('x'); "
    "signal.sigwait([signal.SIGTERM]); open({note!r}, 'w').write('bye')"
)


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


def spec_of(name: str, code: str, tmp_path: Path, **more: Any) -> ChildSpec:
    """A child that runs `code`, with its `ready` and `note` files in `tmp_path`."""
    code = code.format(ready=str(ready_file(tmp_path, name)), note=str(tmp_path / "note"))
    return ChildSpec(name, (*PYTHON, code), **more)


def ready_file(tmp_path: Path, name: str) -> Path:
    """The file to which a child adds one character at each start, once its signal handlers are in place."""
    return tmp_path / f"{name}.ready"


def starts(tmp_path: Path, name: str) -> int:
    """How often a child got ready."""
    file = ready_file(tmp_path, name)
    return len(file.read_text()) if file.exists() else 0


# --- pure parts ------------------------------------------------------------------------------------------------------


def test_backoff_restarts_at_once_then_doubles_to_its_bound() -> None:
    """The first death costs no delay, the next ones 200 ms doubling, and never more than five seconds."""
    backoff = Backoff()
    assert [backoff.delay_ms(0) for _ in range(9)] == [0, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
    assert RESTART_DELAY_MS_FIRST == 200
    assert RESTART_DELAY_MS_MAX == 5000


def test_backoff_forgets_after_a_healthy_run() -> None:
    """A run of ten seconds resets the delay; one that was a millisecond shorter does not."""
    backoff = Backoff()
    for _ in range(4):
        backoff.delay_ms(0)
    assert backoff.delay_ms(HEALTHY_AFTER_MS - 1) == 1600
    assert backoff.delay_ms(HEALTHY_AFTER_MS) == 0
    assert backoff.delay_ms(0) == 200


@pytest.mark.parametrize(
    ("returncode", "fields"),
    [
        (0, {"exit_code": 0, "signal": None}),
        (78, {"exit_code": 78, "signal": None}),
        (-9, {"exit_code": None, "signal": "SIGKILL"}),
        (-40, {"exit_code": None, "signal": "40"}),
    ],
)
def test_exit_fields_name_the_code_or_the_signal(returncode: int, fields: dict[str, object]) -> None:
    """A log line tells an exit code from a signal, and names the signal where it has a name."""
    assert exit_fields(returncode) == fields


def test_console_script_is_preferred_when_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child shows as `auction-timer` in the process list if the script lies beside the interpreter."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert console_script() == [str(tmp_path / "python"), "-m", "auction_timer"]
    (tmp_path / "auction-timer").touch()
    assert console_script() == [str(tmp_path / "python"), str(tmp_path / "auction-timer")]


# --- a parent that dies takes its children with it -------------------------------------------------------------------

BOUND_CHILD = """
import os, signal, sys
from auction_timer import processes
if {polling}:
    processes._prctl = None
processes.die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
signal.pause()
"""
PARENT = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())])
signal.pause()
"""


@pytest.mark.integration
@pytest.mark.parametrize("polling", [False, True], ids=["kernel", "polling"])
async def test_a_child_dies_with_a_parent_that_was_killed(polling: bool) -> None:
    """SIGKILL to the parent ends the child, told by the kernel or by asking once a second."""
    code = PARENT.format(child=BOUND_CHILD.format(polling=polling))
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    child_pid = 0
    try:
        assert parent.stdout is not None
        child_pid = int(await parent.stdout.readline())
        assert alive(child_pid)
        parent.kill()
        await eventually(lambda: not alive(child_pid))
    finally:
        kill_now(parent)
        kill_if_running(child_pid or None)
        await parent.communicate()


@pytest.mark.integration
@pytest.mark.parametrize("polling", [False, True], ids=["kernel", "polling"])
def test_a_child_whose_parent_died_before_it_asked_ends_at_once(polling: bool) -> None:
    """The time between fork and prctl is covered: a process whose parent is another one by now gets SIGTERM."""
    code = BOUND_CHILD.format(polling=polling)
    ended = subprocess.run([sys.executable, "-c", code, "1073741824"], capture_output=True, timeout=20, check=False)
    assert ended.returncode == -signal.SIGTERM, ended.stderr


HOOK_IN_ORPHAN = """
import os, sys
from auction_timer.processes import parent_death_hook
hook = parent_death_hook()          # made for children of this process
child = os.fork()
if child == 0:
    grandchild = os.fork()
    if grandchild == 0:             # its parent is not the process the hook was made in
        hook()
        os._exit(99)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.integration
@pytest.mark.skipif(not kernel_tells_of_parent_death(), reason="needs prctl (Linux)")
def test_the_hook_ends_a_program_whose_parent_died_between_fork_and_prctl() -> None:
    """A foreign program is not even executed if its parent is gone already."""
    ended = subprocess.run([sys.executable, "-c", HOOK_IN_ORPHAN], capture_output=True, timeout=20, check=False)
    assert ended.returncode == 1, ended.stderr


@pytest.mark.integration
@pytest.mark.parametrize("polling", [False, True], ids=["kernel", "polling"])
def test_a_child_lives_as_long_as_its_parent_does(polling: bool) -> None:
    """Binding a process to its real, living parent sends no signal."""
    code = f"""
import os
from auction_timer import processes
if {polling}:
    processes._prctl = None
processes.die_with_parent(os.getppid())
print("alive")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout) == (0, b"alive\n"), ended.stderr


# --- supervision -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_killed_child_is_restarted(
    on_loop: Callable[[Scenario], None], tmp_path: Path, log: list[dict[str, Any]]
) -> None:
    """kill -9 of a child starts it again at once, with a log line that names role, signal and delay."""
    reaped: list[int] = []

    async def scenario() -> None:
        async with ChildSupervisor(on_exit=reaped.append) as children:
            engine = await children.start(spec_of("engine", RUNS_ON, tmp_path))
            first = engine.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: engine.pid not in (first, None))
            assert engine.restarts == 1
            assert reaped == [first]
            assert not exists(first)
            second = engine.pid
        assert second is not None
        assert not exists(second)
        assert reaped == [first, second]

    on_loop(scenario)
    (line,) = [line for line in log if line["event"] == "child_exited"]
    assert (line["role"], line["signal"], line["exit_code"], line["restart_in_ms"]) == ("engine", "SIGKILL", None, 0)


@pytest.mark.integration
def test_children_that_ignore_sigterm_are_killed(
    on_loop: Callable[[Scenario], None], tmp_path: Path, log: list[dict[str, Any]]
) -> None:
    """After the deadline of a stop no child is left, not even as a zombie, whatever it does with SIGTERM."""

    async def scenario() -> None:
        children = ChildSupervisor()
        pids = []
        for name in ("engine", "gateway"):
            child = await children.start(spec_of(name, IGNORES_SIGTERM, tmp_path))
            pids.append(child.pid)
        await eventually(lambda: starts(tmp_path, "engine") and starts(tmp_path, "gateway"))
        await children.stop(timeout_ms=100)
        assert not any(exists(pid) for pid in pids if pid is not None)
        await children.supervise()

    on_loop(scenario)
    assert [line["killed"] for line in log if line["event"] == "child_stopped"] == [True, True]


@pytest.mark.integration
def test_a_child_that_ends_on_sigterm_is_given_the_time(
    on_loop: Callable[[Scenario], None], tmp_path: Path, log: list[dict[str, Any]]
) -> None:
    """A stop lets a child finish its own way and is over as soon as it has."""

    async def scenario() -> None:
        children = ChildSupervisor()
        await children.start(spec_of("gateway", LEAVES_A_NOTE, tmp_path))
        await eventually(lambda: starts(tmp_path, "gateway"))
        async with asyncio.timeout(10):
            await children.stop(timeout_ms=60_000)

    on_loop(scenario)
    assert (tmp_path / "note").read_text() == "bye"
    assert [line["killed"] for line in log if line["event"] == "child_stopped"] == [False]


@pytest.mark.integration
@pytest.mark.parametrize("code", [EXIT_USAGE, EXIT_CONFIG])
def test_a_config_error_is_not_restarted(
    on_loop: Callable[[Scenario], None], tmp_path: Path, log: list[dict[str, Any]], code: int
) -> None:
    """A child that refuses its settings ends the supervision with an error that names it; the others run until stop."""

    async def scenario() -> None:
        async with ChildSupervisor() as children:
            engine = await children.start(spec_of("engine", RUNS_ON, tmp_path))
            await children.start(spec_of("gateway", f"raise SystemExit({code})", tmp_path))
            with pytest.raises(ChildConfigError, match=f"gateway refused to start .exit code {code}") as caught:
                await children.supervise()
            assert (caught.value.name, caught.value.exit_code) == ("gateway", code)
            assert isinstance(caught.value, LocalStackError)
            assert engine.pid is not None

    on_loop(scenario)
    assert not [line for line in log if line["event"] == "child_restarted"]


@pytest.mark.integration
def test_a_child_that_stands_still_is_killed_and_started_again(
    on_loop: Callable[[Scenario], None], tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its processes beats once and no more: each is replaced, and a stop still ends the last one."""
    monkeypatch.setattr(pulse, "BEAT_MS", 10)

    async def scenario() -> None:
        async with ChildSupervisor() as children:
            child = await children.start(spec_of("engine", BEATS_ONCE, tmp_path, frozen_ms=200))
            first = child.pid
            await eventually(lambda: starts(tmp_path, "engine") >= 3 and child.restarts >= 2)
            assert first is not None
            assert not exists(first)

    on_loop(scenario)
    frozen = [line for line in log if line["event"] == "child_frozen"]
    assert {(line["role"], line["silent_ms"]) for line in frozen} == {("engine", 200)}
    assert {line["signal"] for line in log if line["event"] == "child_exited"} == {"SIGKILL"}


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


@pytest.mark.integration
async def test_descriptors_of_frozen_children_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a child is replaced, its parent keeps no pipe of those that were."""
    monkeypatch.setattr(pulse, "BEAT_MS", 10)
    before = descriptors()
    async with ChildSupervisor() as children:
        await children.start(spec_of("engine", BEATS_ONCE, tmp_path, frozen_ms=50))
        await eventually(lambda: starts(tmp_path, "engine") >= 3)
    assert descriptors() <= before + 1


FAILS_WITH_2_ONCE = """
import os, signal
with open({ready!r}, "a+") as file:
    file.write("x")
    file.seek(0)
    first = file.read() == "x"
if first:
    while not os.path.exists({note!r}):
        pass
    raise SystemExit(2)
signal.pause()
"""


@pytest.mark.integration
async def test_exit_code_2_of_a_child_that_was_healthy_is_an_ordinary_death(tmp_path: Path) -> None:
    """Once a child was reported healthy its settings cannot be what is wrong, so it is restarted."""
    async with ChildSupervisor() as children:
        engine = await children.start(spec_of("engine", FAILS_WITH_2_ONCE, tmp_path))
        engine.report_healthy()
        (tmp_path / "note").touch()
        await eventually(lambda: starts(tmp_path, "engine") == 2 and engine.restarts == 1)


@pytest.mark.integration
async def test_a_minute_of_running_counts_as_started(tmp_path: Path, log: list[dict[str, Any]]) -> None:
    """After a minute no exit code is a configuration error of the start, and the restart has no delay."""
    now = 1000.0
    async with ChildSupervisor(monotonic=lambda: now) as children:
        await children.start(spec_of("engine", FAILS_WITH_2_ONCE, tmp_path))
        now += STARTED_AFTER_MS / 1000
        (tmp_path / "note").touch()
        await eventually(lambda: starts(tmp_path, "engine") == 2)
    (line,) = [line for line in log if line["event"] == "child_exited"]
    assert (line["uptime_ms"], line["exit_code"], line["restart_in_ms"]) == (STARTED_AFTER_MS, 2, 0)


@pytest.mark.integration
async def test_a_slow_start_that_ends_in_a_configuration_error_is_not_repeated(tmp_path: Path) -> None:
    """On a busy machine the settings may be refused after seconds: they stay refused, and `serve` says so."""
    now = 1000.0
    async with ChildSupervisor(monotonic=lambda: now) as children:
        await children.start(spec_of("engine", FAILS_WITH_2_ONCE, tmp_path))
        now += (STARTED_AFTER_MS - 1) / 1000
        (tmp_path / "note").touch()
        with pytest.raises(ChildConfigError):
            await children.supervise()


@pytest.mark.integration
async def test_a_child_that_keeps_dying_is_restarted_ever_more_slowly(
    tmp_path: Path, log: list[dict[str, Any]]
) -> None:
    """Deaths in a row follow the backoff, and a stop during the delay is immediate and starts nothing."""
    async with ChildSupervisor(monotonic=lambda: 0.0) as children:  # none of them ran for long
        engine = await children.start(spec_of("engine", "raise SystemExit(1)", tmp_path))

        def delays() -> list[int]:
            return [line["restart_in_ms"] for line in log if line["event"] == "child_exited"]

        await eventually(lambda: len(delays()) == 4)
        assert delays() == [0, 200, 400, 800]
        restarts = engine.restarts
        await children.stop()
        assert (engine.pid, engine.restarts) == (None, restarts)


@pytest.mark.integration
async def test_a_program_that_cannot_be_started_is_an_error_the_first_time(tmp_path: Path) -> None:
    """The caller of start() learns that there is no such program, and no child is kept."""
    async with ChildSupervisor() as children:
        with pytest.raises(ChildStartError, match="engine could not be started"):
            await children.start(ChildSpec("engine", (str(tmp_path / "missing"),)))
        assert children.children == ()


@pytest.mark.integration
async def test_a_restart_that_cannot_be_started_is_tried_again(tmp_path: Path, log: list[dict[str, Any]]) -> None:
    """A program that is away for a moment (an upgrade) does not end the supervision."""
    program, aside = tmp_path / "program", tmp_path / "aside"
    program.symlink_to(sys.executable)
    async with ChildSupervisor() as children:
        engine = await children.start(
            ChildSpec("engine", (str(program), "-I", "-S", "-c", "import signal; signal.pause()"))
        )
        program.rename(aside)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await eventually(lambda: any(line["event"] == "child_restart_failed" for line in log))
        aside.rename(program)
        await eventually(lambda: engine.restarts == 1)


@pytest.mark.integration
def test_descriptors_reach_the_child_and_its_successor(on_loop: Callable[[Scenario], None], tmp_path: Path) -> None:
    """`pass_fds` keeps its numbers in the child, after a restart too, so a listening socket survives the listener."""
    ours, theirs = os.pipe()

    async def scenario() -> None:
        async with ChildSupervisor() as children:
            code = f"import os, signal; os.write({theirs}, b'x'); signal.pause()"
            engine = await children.start(spec_of("engine", code, tmp_path, pass_fds=(theirs,)))
            assert await asyncio.to_thread(os.read, ours, 1) == b"x"
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            assert await asyncio.to_thread(os.read, ours, 1) == b"x"

    try:
        on_loop(scenario)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.integration
def test_environment_output_and_session_are_the_specified_ones(
    on_loop: Callable[[Scenario], None], tmp_path: Path
) -> None:
    """A child gets the given environment and output, and a session of its own that Ctrl-C does not reach."""

    async def scenario() -> None:
        code = "import os, signal; print(os.environ['GREETING'], flush=True); signal.pause()"
        with (tmp_path / "out").open("wb") as out:
            async with ChildSupervisor() as children:
                spec = spec_of("engine", code, tmp_path, env={"GREETING": "hello"}, stdout=out)
                engine = await children.start(spec)
                await eventually(lambda: (tmp_path / "out").read_bytes() == b"hello\n")
                assert engine.pid is not None
                assert os.getsid(engine.pid) == engine.pid != os.getsid(0)

    on_loop(scenario)


@pytest.mark.integration
async def test_some_children_can_be_stopped_before_the_others(tmp_path: Path) -> None:
    """A stop in order ends the named children for good and leaves the rest; a name that is not there is an error."""
    async with ChildSupervisor() as children:
        engine = await children.start(spec_of("engine", RUNS_ON, tmp_path))
        gateways = [await children.start(spec_of(name, RUNS_ON, tmp_path)) for name in ("gateway-1", "gateway-2")]
        await children.stop_only(["gateway-1", "gateway-2"])
        assert [gateway.pid for gateway in gateways] == [None, None]
        assert engine.pid is not None
        assert children.children == (engine, *gateways)
        with pytest.raises(KeyError):
            await children.stop_only(["reconciler"])


WANTS_TO_BE_ASKED_TWICE = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open({ready!r}, "a").write("x")
for _ in range(2):
    signal.sigwait([signal.SIGTERM])
    open({note!r}, "a").write("x")
"""


@pytest.mark.integration
async def test_a_child_that_takes_its_time_can_be_asked_again(tmp_path: Path, log: list[dict[str, Any]]) -> None:
    """A second SIGTERM reaches a child that was asked to stop; one that has ended is left alone."""
    async with ChildSupervisor() as children:
        gateway = await children.start(spec_of("gateway", WANTS_TO_BE_ASKED_TWICE, tmp_path))
        await eventually(lambda: starts(tmp_path, "gateway"))
        stopping = asyncio.create_task(children.stop_only(["gateway"], timeout_ms=60_000))
        await eventually(lambda: (tmp_path / "note").exists() and (tmp_path / "note").read_text() == "x")
        gateway.ask_again()
        async with asyncio.timeout(DEADLINE_S):
            await stopping
        gateway.ask_again()
    assert (tmp_path / "note").read_text() == "xx"
    assert [line["killed"] for line in log if line["event"] == "child_stopped"] == [False]


@pytest.mark.integration
async def test_a_name_is_used_once(tmp_path: Path) -> None:
    """Two children of one name could not be told apart in the log, so the second is refused."""
    async with ChildSupervisor() as children:
        await children.start(spec_of("engine", RUNS_ON, tmp_path))
        with pytest.raises(ValueError, match="engine"):
            await children.start(spec_of("engine", RUNS_ON, tmp_path))


@pytest.mark.integration
def test_a_stop_that_is_cut_short_kills(on_loop: Callable[[Scenario], None], tmp_path: Path) -> None:
    """When the owner's own deadline cancels the stop, the children are killed at once instead of left."""

    async def scenario() -> None:
        children = ChildSupervisor()
        engine = await children.start(spec_of("engine", IGNORES_SIGTERM, tmp_path))
        pid = engine.pid
        assert pid is not None
        await eventually(lambda: starts(tmp_path, "engine"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await children.stop(timeout_ms=60_000)
        await eventually(lambda: not exists(pid))
        await children.stop()  # what watched it is over too, before the loop is

    on_loop(scenario)


@pytest.mark.integration
async def test_an_error_in_the_callback_is_not_swallowed(tmp_path: Path) -> None:
    """A child that is watched no more because of our own error ends the supervision with that error."""

    def broken(pid: int) -> None:
        raise RuntimeError(f"cannot forget {pid}")

    async with ChildSupervisor(on_exit=broken) as children:
        await children.start(spec_of("engine", "raise SystemExit(1)", tmp_path))
        with pytest.raises(RuntimeError, match="cannot forget"):
            await children.supervise()


def test_a_child_that_never_ran_has_no_pid() -> None:
    """Before its first start there is nothing to kill and no pid."""
    child = Child(ChildSpec("engine", ("true",)), on_exit=lambda _pid: None, monotonic=lambda: 0.0)
    assert child.pid is None
    child.kill()
