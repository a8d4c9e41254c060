"""`serve`: everything on one machine. A private Redis, an engine, a reconciler and the gateways, each a real process that is
kept running.

Start: store, engine, reconciler, gateways, and then one line `ready http://HOST:PORT`, when `/readyz` says so.
Stop: gateways first (they tell their sockets to come back), then the engine (it gives its shards back), the reconciler (it
archives what came last), the store last.
A second signal is haste: the gateways wait for no last minute any more, the rest goes as before.
The port is bound here and handed down, so it stays open while a gateway restarts: whoever connects waits, and is served.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import httpx
import structlog
from prometheus_client import multiprocess

from auction_timer.embedded import EmbeddedServer, StartProgress, find_server_binary
from auction_timer.processes import ChildSpec, ChildSupervisor, console_script, first_of
from auction_timer.roles import data_dir_of, listen, url_of
from engine.lifetime import stop_event, until_stopped
from engine.settings import PREFIX, Settings

READY_POLL_S: Final = 0.05
DRAIN_MS: Final = 25_000
"""How long the gateways wait for auctions in their last minute where no setting says it. A gateway alone waits for all of
a minute, because others serve meanwhile; here nobody does, and whoever pressed Ctrl-C waits in front of it."""
STOP_GATEWAYS_MS: Final = 8_000
"""For a gateway to stop, after what it waits for auctions in their last minute."""
STOP_ENGINE_MS: Final = 5_000
STOP_RECONCILER_MS: Final = 5_000

log = structlog.get_logger()


async def serve(settings: Settings, *, gateways: int) -> None:
    """Run the whole stack until SIGTERM or SIGINT.

    Raises:
        LocalStackError: the store or a role cannot be started; the message says what to do.
        OSError: the port cannot be bound.
    """
    stop = stop_event()
    with contextlib.closing(listen(settings.host, settings.port)) as listener, _shared_metrics() as metrics_dir:
        store = _embedded(settings)
        try:
            if store is None or await until_stopped(stop, store.start()):
                await _roles(settings, store, listener, metrics_dir, gateways, stop)
        finally:
            if store is not None:
                await store.stop()


def _embedded(settings: Settings) -> EmbeddedServer | None:
    """The embedded server; None where the settings name a Redis."""
    if settings.redis_url is not None:
        return None
    return EmbeddedServer(data_dir_of(settings), find_server_binary(settings.server_binary), on_progress=_Told())


class _Told:
    """Tells how the start of the store goes on: when something is new, not at every look."""

    def __init__(self) -> None:
        self._last: tuple[str, int | None] | None = None

    def __call__(self, progress: StartProgress) -> None:
        percent = progress.loaded_percent
        tens = None if percent is None else int(percent // 10)
        if (progress.state, tens) != self._last:
            self._last = (progress.state, tens)
            log.info("store_starting", state=progress.state, loaded_percent=percent)


async def _roles(
    settings: Settings,
    store: EmbeddedServer | None,
    listener: socket.socket,
    metrics_dir: Path,
    gateways: int,
    stop: asyncio.Event,
) -> None:
    redis_url = store.url if store is not None else settings.redis_url
    assert redis_url is not None
    url = url_of(listener)
    # In the environment, not on the command line: a Redis URL may hold a password, and everyone may read a process list.
    env = os.environ | {
        f"{PREFIX}REDIS_URL": redis_url,
        f"{PREFIX}DATA_DIR": str(data_dir_of(settings)),
        f"{PREFIX}INSTANCE": _instance(settings),
        f"{PREFIX}HOST": settings.host,
        f"{PREFIX}PORT": str(listener.getsockname()[1]),
        f"{PREFIX}INSECURE": str(settings.insecure).lower(),
        f"{PREFIX}DRAIN_MS": str(drain_ms(settings)),
        **_token_settings(settings),
        "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir),
    }
    prefix, parent, fd = console_script(), str(os.getpid()), listener.fileno()

    def forget(pid: int) -> None:
        multiprocess.mark_process_dead(pid, str(metrics_dir))  # type: ignore[no-untyped-call]

    names = [f"gateway-{number}" for number in range(1, gateways + 1)]
    async with ChildSupervisor(on_exit=forget) as children:
        watched = [asyncio.create_task(children.supervise(), name="children")]
        if store is not None:
            watched.append(asyncio.create_task(store.supervise(), name="store"))
        try:
            frozen_ms = settings.frozen_ms
            for name in ("engine", "reconciler"):
                argv = (*prefix, name, "--parent", parent)
                await children.start(ChildSpec(name, argv, env, frozen_ms=frozen_ms))
            for name in names:
                argv = (*prefix, "gateway", "--parent", parent, "--fd", str(fd))
                await children.start(ChildSpec(name, argv, env, pass_fds=(fd,), frozen_ms=frozen_ms))
            announcing = asyncio.create_task(_announce(url, children), name="announce")
            watched.append(announcing)
            await first_of(stop.wait(), *(_failed(task) for task in watched))
        finally:
            log.info("draining")
            # Ours is the copy that would keep newcomers waiting for nobody, once the gateways have closed theirs. Nothing
            # is awaited up to the stop of the gateways, so none of them is started again without it.
            listener.close()
            watched.append(asyncio.create_task(_hurry(children, names), name="hurry"))
            await children.stop_only(_running(children, names), drain_ms(settings) + STOP_GATEWAYS_MS)
            await children.stop_only(_running(children, ["engine"]), STOP_ENGINE_MS)
            await children.stop(STOP_RECONCILER_MS)
            for task in watched:
                task.cancel()
            outcomes = await asyncio.gather(*watched, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


def drain_ms(settings: Settings) -> int:
    """How long the gateways of a `serve` wait for auctions in their last minute: `DRAIN_MS`, or what was set."""
    return settings.drain_ms if "drain_ms" in settings.model_fields_set else DRAIN_MS


async def _hurry(children: ChildSupervisor, names: list[str]) -> None:
    """Pass each further signal on to the gateways, which know what is haste, until cancelled."""
    while True:
        await stop_event().wait()
        log.info("hurrying")
        for child in children.children:
            if child.spec.name in names:
                child.ask_again()


def _token_settings(settings: Settings) -> dict[str, str]:
    """What the gateways need to know about tokens, wherever the settings came from."""
    given = {
        "JWT_SECRET": settings.jwt_secret,
        "JWKS_URL": settings.jwks_url,
        "JWKS_FILE": settings.jwks_file and str(settings.jwks_file.absolute()),
        "JWT_ISSUER": settings.jwt_issuer,
        "JWT_AUDIENCE": settings.jwt_audience,
    }
    return {PREFIX + name: value for name, value in given.items() if value}


def _running(children: ChildSupervisor, names: list[str]) -> list[str]:
    started = {child.spec.name for child in children.children}
    return [name for name in names if name in started]


async def _failed(task: "asyncio.Task[None]") -> None:
    """Return when `task` fails; one that merely ends is no reason to stop."""
    await asyncio.wait({task})
    if task.cancelled() or task.exception() is None:
        await asyncio.Event().wait()


async def _announce(url: str, children: ChildSupervisor) -> None:
    """Print the one line of stdout once the stack is ready."""
    async with httpx.AsyncClient(trust_env=False, timeout=1.0) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/readyz")).status_code == httpx.codes.OK:
                    break
            await asyncio.sleep(READY_POLL_S)
    for child in children.children:
        child.report_healthy()
    print(f"ready {url}", flush=True)


def _instance(settings: Settings) -> str:
    """The engine's name: the same after a restart, so that it takes its shards back at once.

    With a store of our own the data dir, which is locked, makes it unique. With somebody else's Redis only this process does.
    """
    node = os.uname().nodename[:64]
    if settings.redis_url is not None:
        return f"serve-{node}-{os.getpid()}"
    return f"serve-{node}-{sha256(bytes(data_dir_of(settings))).hexdigest()[:12]}"


@contextlib.contextmanager
def _shared_metrics() -> Iterator[Path]:
    """A directory in which all processes count together (see `gateway.metrics.exposition`)."""
    directory = Path(tempfile.mkdtemp(prefix="auction-timer-metrics-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
