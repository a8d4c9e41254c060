"""What every role process does around its work: settings checked, logs set, a fast loop, an exit code that says why.

Imports of the roles are deferred: an engine that is restarted in the last seconds of an auction must not wait until the
gateway's libraries are loaded.
"""

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry

from auction_timer.errors import ChildConfigError, DataDirError, LocalStackError, ServerBinaryError
from auction_timer.preflight import Role, usable
from auction_timer.processes import EXIT_CONFIG, die_with_parent
from auction_timer.pulse import beat
from engine import logs
from engine.settings import Settings, SettingsError
from engine.store.link import RedisRefusedError, RedisUrlError
from engine.store.protocol import DeploymentMismatchError, StoreError

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_UNAVAILABLE: Final = 69
"""sysexits.h EX_UNAVAILABLE: something this needs did not answer."""
NICENESS: Final = 5
"""Of a reconciler: nobody waits for it, and on a busy machine a pass must not delay a tick or a close."""

_CONFIG_ERRORS: Final = (
    SettingsError,
    RedisUrlError,
    DeploymentMismatchError,
    RedisRefusedError,
    ChildConfigError,
    DataDirError,
    ServerBinaryError,
)

log = structlog.get_logger()


def run(
    role: str,
    settings: Settings,
    work: Callable[[], Coroutine[Any, Any, None]],
    *,
    parent: int | None = None,
    alive: int | None = None,
) -> int:
    """Run a role until it ends; the exit code. `alive`: the descriptor on which a `serve` wants to see that it lives."""
    logs.configure(role, form=settings.log_format, level=settings.log_level)
    if parent is not None:
        die_with_parent(parent)
    with _explained() as outcome, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_showing_life(work, alive))
    return outcome.code


async def _showing_life(work: Callable[[], Coroutine[Any, Any, None]], alive: int | None) -> None:
    beating = asyncio.create_task(beat(alive)) if alive is not None else None
    try:
        await work()
    finally:
        if beating is not None:
            beating.cancel()


class _Outcome:
    code = EXIT_OK


@contextlib.contextmanager
def _explained() -> Iterator[_Outcome]:
    """Turn an error into an exit code and a message a person can act on; an unknown one keeps its traceback."""
    outcome = _Outcome()
    try:
        yield outcome
    except* _CONFIG_ERRORS as errors:
        outcome.code = EXIT_CONFIG
        _complain(errors)
    except* (StoreError, LocalStackError, OSError) as errors:
        outcome.code = EXIT_UNAVAILABLE
        _complain(errors)


def _complain(errors: BaseExceptionGroup[Any]) -> None:
    for error in _leaves(errors):
        print(f"auction-timer: {error}", file=sys.stderr)


def _leaves(errors: BaseException) -> Iterator[BaseException]:
    if isinstance(errors, BaseExceptionGroup):
        for error in errors.exceptions:
            yield from _leaves(error)
    else:
        yield errors


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def engine(settings: Settings, *, parent: int | None = None, alive: int | None = None) -> int:
    """The engine role."""
    from engine import app
    from engine.metrics_server import metrics_server

    registry = CollectorRegistry()

    async def work() -> None:
        with metrics_server(settings.metrics_port, registry):
            await app.serve(usable(settings, Role.ENGINE), registry)

    return run("engine", settings, work, parent=parent, alive=alive)


def gateway(settings: Settings, *, parent: int | None = None, alive: int | None = None, fd: int | None = None) -> int:
    """The gateway role. `fd`: a listening socket that was inherited."""
    from gateway import app

    async def work() -> None:
        checked = usable(settings, Role.GATEWAY)
        listener = socket.socket(fileno=fd) if fd is not None else listen(checked.host, checked.port)
        await app.serve(
            checked, CollectorRegistry(), listener, is_orphan=lambda: parent is not None and os.getppid() != parent
        )

    return run("gateway", settings, work, parent=parent, alive=alive)


def reconciler(settings: Settings, *, parent: int | None = None, alive: int | None = None) -> int:
    """The reconciler role."""
    from engine.metrics_server import metrics_server
    from reconciler import app

    registry = CollectorRegistry()
    # Under `serve` the port is the engine's, and the gateways expose what every process counts.
    port = settings.metrics_port if parent is None else None

    async def work() -> None:
        os.nice(NICENESS)
        with metrics_server(port, registry):
            await app.serve(usable(settings, Role.RECONCILER), registry)

    return run("reconciler", settings, work, parent=parent, alive=alive)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the address cannot be bound; the message says which, and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(4_096)
    except (OSError, TypeError) as error:  # the latter for what no host can be called
        listener.close()
        number, why = (error.errno, error.strerror or error) if isinstance(error, OSError) else (None, error)
        option = "--port" if number in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise OSError(f"{host}:{port} cannot be bound ({why}): choose another {option}") from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL under which a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, *, gateways: int) -> int:
    """Everything on one machine."""
    from auction_timer import stack
    from auction_timer.embedded import refuse_in_use

    async def work() -> None:
        checked = usable(settings, Role.SERVE)
        if checked.redis_url is None:
            refuse_in_use(data_dir_of(checked))  # whoever has it may well have our port, too
        await stack.serve(checked, gateways=gateways)

    return run("serve", settings, work)


def data_dir_of(settings: Settings) -> Path:
    """The data dir, as an absolute path."""
    return settings.data_dir.expanduser().absolute()
