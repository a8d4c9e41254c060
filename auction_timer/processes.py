"""Child processes of `serve`: each is watched, restarted when it dies or freezes, and never left behind.

Two promises point in opposite directions:

    down   a child that dies is started again, at once the first time, then with a growing delay (`Backoff`);
    up     a parent that dies takes its children with it, even when it was killed with SIGKILL and could not say so.

The second one cannot be kept by the parent. On Linux the kernel keeps it (`PR_SET_PDEATHSIG`, prctl(2)); elsewhere the
child asks once a second who its parent is. One condition comes with the kernel's version: the signal is sent when the
*thread* that forked ends, so children must be started from a thread that lives as long as the process does. The event
loop of `serve` runs in the main thread, which does.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

import structlog

from auction_timer.errors import ChildConfigError, ChildStartError
from auction_timer.pulse import Pulse

EXIT_USAGE: Final = 2
"""What argparse, click and typer exit with when the command line is wrong."""
EXIT_CONFIG: Final = 78
"""EX_CONFIG of sysexits.h: the settings contradict each other or cannot be used."""

# The first restart has no delay: most deaths are single ones, and every 100 ms without an engine is lateness.
RESTART_DELAY_MS_FIRST: Final = 200
# A child that dies again and again costs one start (about a second of one core) in five.
RESTART_DELAY_MS_MAX: Final = 5_000
# Longer than a start takes where the machine is not busy: after that a death is no reason to wait longer than the last time.
HEALTHY_AFTER_MS: Final = 2_000
# Longer than a start takes on any machine: only after that can a configuration error not come from the start.
STARTED_AFTER_MS: Final = 60_000
# For a child whose owner names no bound. Long enough to tidy up, and nobody who pressed Ctrl-C waits longer for nothing.
STOP_MS_DEFAULT: Final = 10_000
# SIGKILL is immediate except for a process inside an uninterruptible system call. Not worth hanging `serve` for.
KILLED_WAIT_MS_MAX: Final = 5_000
# Where the kernel does not tell a child that its parent died: how long an orphan lives on at most.
PARENT_POLL_MS: Final = 1_000

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_EXIT_ORPHANED: Final = 1  # nobody is left to read it

_log = structlog.get_logger(__name__)


class Backoff:
    """The delay before each restart: 0, then 200 ms doubling to 5 s; back to 0 after a healthy run.

    Pure: it reads no clock, it is told how long the process had been up.

    Worked example, uptimes of 50 ms each: 0, 200, 400, 800, 1600, 3200, 5000, 5000 ms. Then a run of a minute: 0 again.
    """

    def __init__(self) -> None:
        self._next_ms = 0

    def delay_ms(self, uptime_ms: int) -> int:
        """The delay after a process that was up for `uptime_ms`; each call counts as one death."""
        if uptime_ms >= HEALTHY_AFTER_MS:
            self._next_ms = 0
        delay = self._next_ms
        self._next_ms = min(max(2 * delay, RESTART_DELAY_MS_FIRST), RESTART_DELAY_MS_MAX)
        return delay


# --- a parent that dies takes its children with it -------------------------------------------------------------------


def _load_prctl() -> Callable[..., int] | None:
    """prctl(2), or None where there is none. Loaded at import: a forked child must not load libraries."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    # The kernel reads unsigned longs; without argtypes ctypes would pass ints and leave the upper half undefined.
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    prctl.restype = ctypes.c_int
    function: Callable[..., int] = prctl
    return function


_prctl: Final = _load_prctl()


def kernel_tells_of_parent_death() -> bool:
    """Whether a child can be bound to its parent by the kernel (Linux), without the child's own help."""
    return _prctl is not None


def die_with_parent(parent_pid: int) -> None:
    """Bind the life of this process to `parent_pid`: it gets SIGTERM when that process dies, or at once if it is dead.

    Called by a role process first thing, with the pid of the `serve` that started it. On Linux the kernel sends the
    signal; elsewhere a daemon thread does, within `PARENT_POLL_MS`.
    """
    if _prctl is None or _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        threading.Thread(target=_poll_parent, args=(parent_pid,), name="parent-watch", daemon=True).start()
    # The parent may have died before prctl was called; the kernel does not send signals for the past.
    elif os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)


def _poll_parent(parent_pid: int) -> None:
    pause = threading.Event()
    while os.getppid() == parent_pid:
        pause.wait(PARENT_POLL_MS / 1000)
    os.kill(os.getpid(), signal.SIGTERM)


def parent_death_hook() -> Callable[[], None] | None:
    """A `preexec_fn` that binds a foreign program to this process, for programs that cannot call `die_with_parent`.

    None where the kernel cannot do it (macOS): there such a program is only stopped by an orderly exit.

    Code between fork and exec must not take a lock another thread may have held. This closure calls three functions of
    the C library, all resolved before the fork, and imports, logs and raises nothing.
    """
    prctl, parent_pid = _prctl, os.getpid()
    if prctl is None:
        return None

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(_EXIT_ORPHANED)

    return in_child


# --- one process -----------------------------------------------------------------------------------------------------


def console_script() -> list[str]:
    """The argv prefix under which a child shows as `auction-timer <role>` in the process list."""
    script = Path(sys.executable).with_name("auction-timer")
    return [sys.executable, str(script)] if script.is_file() else [sys.executable, "-m", "auction_timer"]


def exit_fields(returncode: int) -> dict[str, int | str | None]:
    """The two log fields that tell how a process ended: `exit_code`, or the name of the `signal` that ended it."""
    if returncode >= 0:
        return {"exit_code": returncode, "signal": None}
    with contextlib.suppress(ValueError):  # real-time signals have numbers but no names
        return {"exit_code": None, "signal": signal.Signals(-returncode).name}
    return {"exit_code": None, "signal": str(-returncode)}


async def end_process(process: asyncio.subprocess.Process, *, grace_ms: int) -> bool:
    """Ask a process to end (SIGTERM), kill it by its own pid after `grace_ms`, and reap it.

    Returns True if it ended by itself, False if it was killed. Cancelled, it kills at once: whoever cancels has no time
    left, and nothing may stay behind.
    """
    if process.returncode is not None:
        return True
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(grace_ms / 1000):
            await process.wait()
    except TimeoutError:
        await _kill(process)
        return False
    except asyncio.CancelledError:
        kill_now(process)
        raise
    return True


def kill_now(process: asyncio.subprocess.Process) -> None:
    """SIGKILL without waiting; the event loop reaps the process when it is gone."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def _kill(process: asyncio.subprocess.Process) -> None:
    kill_now(process)
    try:
        async with asyncio.timeout(KILLED_WAIT_MS_MAX / 1000):
            await process.wait()
    except TimeoutError:
        _log.error("process_survived_sigkill", pid=process.pid, waited_ms=KILLED_WAIT_MS_MAX)


async def first_of(*waits: Awaitable[object]) -> None:
    """Return when the first of `waits` is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def is_set_within(event: asyncio.Event, wait_ms: int) -> bool:
    """Wait for `event`, at most `wait_ms`; whether it is set then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_ms / 1000):
            await event.wait()
    return event.is_set()


# --- many processes, kept running ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one child, again and again.

    `env` None: ours. `pass_fds`: descriptors the child inherits under the same numbers. `frozen_ms`: a child that shows no
    life for so long is killed and started again; it is given `--alive FD`, where it must `beat`. None: nobody looks.
    `stdout`, `stderr`: as for `subprocess.Popen`; None: ours.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = None
    pass_fds: tuple[int, ...] = ()
    frozen_ms: int | None = None
    stdout: int | IO[Any] | None = None
    stderr: int | IO[Any] | None = None


class Child:
    """One supervised child: the process that runs now, restarted by `keep` until it is asked to stop."""

    def __init__(self, spec: ChildSpec, *, on_exit: Callable[[int], None], monotonic: Callable[[], float]) -> None:
        self.spec = spec
        self.restarts = 0
        self._on_exit = on_exit
        self._monotonic = monotonic
        self._process: asyncio.subprocess.Process | None = None
        self._pulse: Pulse | None = None
        self._started_at = 0.0
        self._was_healthy = False
        self._backoff = Backoff()
        self._stop_asked = asyncio.Event()
        self._grace_ms = STOP_MS_DEFAULT

    @property
    def pid(self) -> int | None:
        """The pid of the running process; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def report_healthy(self) -> None:
        """Tell that the child was seen working (its `/readyz` answered): from now on no exit code is a config error."""
        self._was_healthy = True

    def ask_to_stop(self, grace_ms: int) -> None:
        """Let `keep` end the process (SIGKILL after `grace_ms`) and return. This call returns at once."""
        self._grace_ms = grace_ms
        self._stop_asked.set()

    def ask_again(self) -> None:
        """SIGTERM once more, to a process that was asked to stop and may take its time: a role takes it as haste."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def kill(self) -> None:
        """Kill the process if it runs. For the way out when there is no time for `ask_to_stop`."""
        if self._process is not None:
            kill_now(self._process)

    async def spawn(self) -> None:
        """Start the process, once.

        Its own session keeps the terminal's Ctrl-C away from it: `serve` gets it, and stops the children in order.

        Raises:
            OSError: the operating system refused (no such program, too many processes or open files).
        """
        with self._new_pulse() as fds:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.argv,
                *(argument for fd in fds for argument in ("--alive", str(fd))),
                env=self.spec.env,
                pass_fds=(*self.spec.pass_fds, *fds),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self.spec.stdout,
                stderr=self.spec.stderr,
                start_new_session=True,
            )
        self._started_at = self._monotonic()

    @contextlib.contextmanager
    def _new_pulse(self) -> Iterator[tuple[int, ...]]:
        """The descriptor on which a process started meanwhile shows life, if anybody looks."""
        self._close_pulse()
        if self.spec.frozen_ms is None:
            yield ()
            return
        self._pulse = Pulse(self.spec.frozen_ms)
        try:
            with self._pulse.inherited() as fd:
                yield (fd,)
        except BaseException:
            self._close_pulse()
            raise

    def _close_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None

    async def keep(self) -> None:
        """Restart the spawned process whenever it ends, until `ask_to_stop`; then end it.

        Raises:
            ChildConfigError: its exit code says that a restart would end the same way.
        """
        try:
            while (exit_code := await self._exited()) is not None and await self._restarted(exit_code):
                pass
        finally:
            self.kill()
            self._close_pulse()

    async def _exited(self) -> int | None:
        """Wait until the process is gone: how it ended, or None if that had been asked for."""
        process = self._process
        assert process is not None, "a child is kept only after it was spawned"
        await first_of(process.wait(), self._stop_asked.wait(), self._killed_frozen(process))
        if self._stop_asked.is_set():
            by_itself = await end_process(process, grace_ms=self._grace_ms)
            _log.info("child_stopped", role=self.spec.name, pid=process.pid, killed=not by_itself)
        self._on_exit(process.pid)
        if self._stop_asked.is_set():
            return None
        # One that survives even SIGKILL, in a call that does not return, cannot do anything else either.
        return -signal.SIGKILL if process.returncode is None else process.returncode

    async def _killed_frozen(self, process: asyncio.subprocess.Process) -> None:
        """Kill the process once it has shown no life for too long; then return."""
        if self._pulse is None:
            await asyncio.Event().wait()
            return
        await self._pulse.stopped()
        _log.error("child_frozen", role=self.spec.name, pid=process.pid, silent_ms=self._pulse.silent_ms)
        await _kill(process)

    async def _restarted(self, exit_code: int) -> bool:
        """Spawn again after the delay that is due; False if asked to stop meanwhile."""
        uptime_ms = round((self._monotonic() - self._started_at) * 1000)
        self._was_healthy = self._was_healthy or uptime_ms >= STARTED_AFTER_MS
        self._refuse_config_error(exit_code)
        delay_ms = self._backoff.delay_ms(uptime_ms)
        fields = exit_fields(exit_code)
        _log.warning("child_exited", role=self.spec.name, **fields, uptime_ms=uptime_ms, restart_in_ms=delay_ms)
        while not await is_set_within(self._stop_asked, delay_ms):
            try:
                await self.spawn()
            except OSError as error:
                delay_ms = self._backoff.delay_ms(0)
                _log.error("child_restart_failed", role=self.spec.name, error=str(error), restart_in_ms=delay_ms)
            else:
                self.restarts += 1
                _log.info("child_restarted", role=self.spec.name, pid=self.pid, restarts=self.restarts)
                return True
        return False

    def _refuse_config_error(self, exit_code: int) -> None:
        if exit_code in (EXIT_USAGE, EXIT_CONFIG) and not self._was_healthy:
            raise ChildConfigError(
                f"The {self.spec.name} refused to start (exit code {exit_code}: usage or configuration). It is not "
                "restarted, it would refuse again. Its own message above names the setting; "
                "`auction-timer check-config` shows all of them.",
                name=self.spec.name,
                exit_code=exit_code,
            )


class ChildSupervisor:
    """Starts children, restarts the ones that die, and ends them all.

        async with ChildSupervisor(on_exit=forget_metrics_of) as children:
            await children.start(ChildSpec("engine", (*console_script(), "engine")))
            await children.supervise()

    Restarts are unlimited in number and limited in rate: a role waits for its store by itself, so a child that dies
    every few seconds is something an operator should find running and complaining, not gone.

    `on_exit` is called with the pid of each process after it was reaped, expected or not.
    """

    def __init__(
        self, *, on_exit: Callable[[int], None] | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_exit = on_exit or (lambda _pid: None)
        self._monotonic = monotonic
        self._children: dict[str, Child] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._over = asyncio.Event()
        self._failure: Exception | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def children(self) -> tuple[Child, ...]:
        """All children, in the order of their start."""
        return tuple(self._children.values())

    async def start(self, spec: ChildSpec) -> Child:
        """Start a child and keep it running from now on.

        Raises:
            ChildStartError: it could not be started. Only for this first time; a restart that fails is tried again.
            ValueError: there is a child of that name.
        """
        if spec.name in self._children:
            raise ValueError(f"there is already a child named {spec.name!r}")
        child = Child(spec, on_exit=self._on_exit, monotonic=self._monotonic)
        try:
            await child.spawn()
        except OSError as error:
            raise ChildStartError(
                f"The {spec.name} could not be started ({error}). The command was: {' '.join(spec.argv)}. "
                "Check that the installation is complete and that the limits on processes and open files are not reached."
            ) from error
        self._children[spec.name] = child
        self._keepers[spec.name] = asyncio.create_task(self._keep(child), name=f"keep-{spec.name}")
        _log.info("child_started", role=spec.name, pid=child.pid)
        return child

    async def supervise(self) -> None:
        """Return after `stop`, or raise when a child is given up. The other children run on until `stop`.

        Raises:
            ChildConfigError: a child exited with `EXIT_USAGE` or `EXIT_CONFIG` before it was ever healthy.
        """
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    async def stop(self, timeout_ms: int = STOP_MS_DEFAULT) -> None:
        """End all children at the same time: SIGTERM, and SIGKILL for those that remain after `timeout_ms`."""
        await self._stop(self.children, timeout_ms)
        self._over.set()

    async def stop_only(self, names: Iterable[str], timeout_ms: int = STOP_MS_DEFAULT) -> None:
        """End some children for good and at the same time, for a stop in a certain order.

        None of them is started again once this was called, whatever the event loop does before the first `await`.

        Raises:
            KeyError: there is no child of such a name.
        """
        await self._stop(tuple(self._children[name] for name in names), timeout_ms)

    async def _stop(self, children: tuple[Child, ...], timeout_ms: int) -> None:
        for child in children:
            child.ask_to_stop(timeout_ms)
        keepers = [self._keepers[child.spec.name] for child in children]
        try:
            if keepers:
                await asyncio.wait(keepers)
        except asyncio.CancelledError:
            for child in children:
                child.kill()
            raise

    async def _keep(self, child: Child) -> None:
        try:
            await child.keep()
        except Exception as error:
            # Whatever it was, a child that nobody watches any more must not look like one that is watched.
            _log.error("child_given_up", role=child.spec.name, reason=str(error))
            self._failure = self._failure or error
            self._over.set()
