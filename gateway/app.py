"""The gateway process: what is made from what, started in order, stopped in reverse."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.clock import AuctionClock, Clock, SystemClock
from engine.clock_board import ClockBoard
from engine.clock_sync import ClockSync
from engine.lifetime import calm_collector, patiently, until_stopped
from engine.settings import Settings
from engine.store.archive import AuditArchive, archive_url
from engine.store.audit_reader import AuditReader
from engine.store.link import RedisLink
from engine.store.redis import RedisStore
from gateway.admission import Admit
from gateway.attendance import Attendance
from gateway.audit_routes import AuditRoutes
from gateway.command_routes import CommandRoutes
from gateway.commands import Commands
from gateway.connection import Connection
from gateway.correlation import correlation_id_of
from gateway.descriptors import make_room
from gateway.door import Door
from gateway.event_stream import EventStreamRoutes
from gateway.feeds import EventFeed, TickFeed
from gateway.http_connection import HEADERS_BYTES_MAX, Awaited, HttpConnection
from gateway.hub import Hub
from gateway.metrics import GatewayMetrics
from gateway.offer_routes import OfferRoutes
from gateway.ops_routes import OpsRoutes
from gateway.origins import OriginRule
from gateway.problems import Problem, ProblemType, problem_response
from gateway.readiness import Readiness
from gateway.resyncs import Resyncs
from gateway.routes import Api
from gateway.stale import StaleTicks
from gateway.sync_routes import SyncRoutes
from gateway.tokens import Authenticate, Tokens, tokens_of

CALL_DEADLINE_MS: Final = 3_000
"""A caller on the other end waits: after this it is told 503 and comes again with the same ids."""
DRAIN_WITHIN_S: Final = 5
SAME_SIGNAL_S: Final = 0.5
"""Signals so close together are one: `timeout` and many a process manager send theirs twice."""
PAGES_SEND: Final = (
    "Authorization",
    "Content-Type",
    "If-None-Match",
    "Last-Event-ID",
    "Traceparent",
    "X-Correlation-Id",
)
PAGES_READ: Final = ("ETag", "Location", "Next-Poll-Ms", "Retry-After", "X-Correlation-Id")

log = structlog.get_logger()


class Correlate:
    """ASGI middleware: a correlation id in, through and out; foreign pages may change nothing."""

    def __init__(self, app: ASGIApp, origins: OriginRule) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        correlation_id = correlation_id_of(headers.get(b"x-correlation-id", ""))
        scope.setdefault("state", {})["correlation_id"] = correlation_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-correlation-id", correlation_id.encode())]
            await send(message)

        refused = self._refused(scope["method"], headers.get(b"origin"), headers.get(b"host"))
        if refused is not None:
            await problem_response(refused, correlation_id)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _refused(self, method: str, origin: str | None, host: str | None) -> Problem | None:
        if not self._origins.answers_to(host):
            return Problem(
                ProblemType.FOREIGN_ORIGIN,
                "without tokens this gateway answers to no public name; let the proxy in front pass on "
                f"Host: 127.0.0.1, or name the origin of {str(host)[:128]!r} in AUCTION_TIMER_ALLOWED_ORIGINS",
            )
        if method not in {"GET", "HEAD", "OPTIONS"} and not self._origins.admits(origin, host):
            return Problem(
                ProblemType.FOREIGN_ORIGIN,
                "pages of this origin may not send events; name it in AUCTION_TIMER_ALLOWED_ORIGINS if they should",
            )
        return None


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of one gateway process."""

    clock: AuctionClock
    sync: ClockSync
    hub: Hub
    feed: EventFeed
    ticks: TickFeed
    door: Door
    app: Starlette
    metrics: GatewayMetrics
    tokens: Tokens | None
    archive: AuditArchive
    attendance: Attendance
    hurried: asyncio.Event
    """Set: wait for nothing any more, neither for the store at the start nor for a last minute at the end."""


def build(store: RedisStore, clock: Clock, settings: Settings, registry: CollectorRegistry) -> Gateway:
    """Make a gateway on a store.

    Raises:
        SettingsError: the secret for tokens cannot be used.
    """
    metrics = GatewayMetrics(registry)
    auction_clock = AuctionClock(clock)
    hub = Hub(store, auction_clock, settings.shards, metrics)
    commands = Commands(store, auction_clock, settings.shards)
    feed = EventFeed(store, hub, clock, settings.shards, commands=commands, updates_max=settings.updates_max)
    hub.stale = lambda: not feed.is_fresh
    tokens = tokens_of(settings, auction_clock)
    door = Door(hub, settings, clock, metrics, tokens)
    readiness = Readiness(auction_clock, hub, feed, settings.shards, tokens.keys if tokens is not None else None)
    resyncs = Resyncs(door, store)
    door.on_drift = resyncs.report
    api = Api(hub, store, store, settings.shards, readiness, registry)
    auctions = CommandRoutes(hub, commands, store, settings.shards)
    offers = OfferRoutes(auctions, commands, store, settings.shards, settings.offer_modification_window_minutes)
    archive = AuditArchive(archive_url(settings.audit_url, settings.data_dir))
    audit = AuditRoutes(auctions, AuditReader(store, archive), settings.shards)
    ops = OpsRoutes(commands, store, settings.shards)
    board = ClockBoard(store, clock, "gateway", settings.instance)

    gateway: Gateway

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with _running(gateway):
            yield {"door": door}

    app = Starlette(
        routes=[
            *api.routes(),
            *EventStreamRoutes(door).routes(),
            *SyncRoutes(hub, resyncs, metrics).routes(),
            *auctions.routes(),
            *audit.routes(),
            *offers.routes(),
            *ops.routes(),
        ],
        lifespan=lifespan,
        exception_handlers={Problem: _problem, HTTPException: _http_problem, Exception: _failure},
    )
    app.router.redirect_slashes = False  # it would send a client to whatever host the request names
    app.add_middleware(Authenticate, tokens=tokens)
    app.add_middleware(Admit, admission=door.admission)
    if settings.allowed_origins:
        # Outside of the rest: a preflight carries no token, and no page reads an answer that does not name its origin.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(door.origins.allowed - {"*"}),
            allow_methods=("GET", "POST", "PUT"),
            allow_headers=PAGES_SEND,
            expose_headers=PAGES_READ,
        )
    app.add_middleware(Correlate, origins=door.origins)
    gateway = Gateway(
        auction_clock,
        ClockSync(auction_clock, store.time_us, board=board, judged=metrics.clock.count),
        hub,
        feed,
        TickFeed(store, hub, settings.shards),
        door,
        app,
        metrics,
        tokens,
        archive,
        Attendance(store, auction_clock, settings.shards),
        asyncio.Event(),
    )
    return gateway


@contextlib.asynccontextmanager
async def _running(gateway: Gateway) -> AsyncIterator[None]:
    """Clock first, then the place in the event lane, then the feeds; all of them end together."""
    if not await until_stopped(gateway.hurried, _begin(gateway)):
        yield
        return
    tasks = [
        asyncio.create_task(work)
        for work in (
            gateway.sync.run(gateway.metrics.drift_ms["gateway"].observe),
            gateway.feed.run(),
            gateway.ticks.run(),
            gateway.attendance.run(),
            gateway.door.watch_over(),
            StaleTicks(gateway.hub).run(),
            *((gateway.tokens.keys.run(),) if gateway.tokens is not None and gateway.tokens.keys is not None else ()),
        )
    ]
    for task in tasks:
        task.add_done_callback(_end_with)
    try:
        yield
    finally:
        for task in tasks:
            task.remove_done_callback(_end_with)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await gateway.archive.close()


async def _begin(gateway: Gateway) -> None:
    await gateway.sync.start()
    await patiently(gateway.feed.start)


def _end_with(task: "asyncio.Task[None]") -> None:
    """A loop that must not end has ended: so does the process, and its supervisor starts a fresh one."""
    if not task.cancelled():
        log.error("gateway_loop_failed", error=repr(task.exception()))
        signal.raise_signal(signal.SIGABRT)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error, request.state.correlation_id)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == ProblemType.METHOD_NOT_ALLOWED.status:
        problem = Problem(
            ProblemType.METHOD_NOT_ALLOWED,
            f"{request.method} is not offered here",
            headers=dict(error.headers or {}),
        )
    else:
        problem = Problem(ProblemType.RESOURCE_NOT_FOUND, "no such route; see /openapi.json")
    return problem_response(problem, request.state.correlation_id)


async def _failure(request: Request, _error: Exception) -> Response:
    correlation_id = request.state.correlation_id
    log.error("request_failed", path=request.url.path, correlation_id=correlation_id)
    # Starlette answers this one outside of `Correlate`, so the header is ours to add.
    headers = {"X-Correlation-Id": correlation_id}
    problem = Problem(ProblemType.INTERNAL_ERROR, "a fault of ours; report it with the correlation id", headers=headers)
    return problem_response(problem, correlation_id)


class _Server(uvicorn.Server):
    """uvicorn, but the signals are ours: its own handling ends the process by the signal again, not with exit code 0.

    The first one drains, and ends a start that still waits for its store. The next one ends the wait of the drain.
    """

    def __init__(
        self, config: uvicorn.Config, gateway: Gateway, drain_within_s: float, is_orphan: Callable[[], bool]
    ) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_within_s = drain_within_s
        self._is_orphan = is_orphan

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        self._on_signal(self._drain)
        yield

    def _on_signal(self, act: Callable[[], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, act)

    def _drain(self) -> None:
        self.should_exit = True
        hurry = self._gateway.hurried.set
        if not self.started or self._is_orphan():
            hurry()  # nobody closes auctions for an orphan: its engine and its store have gone with their parent
        asyncio.get_running_loop().call_later(SAME_SIGNAL_S, self._on_signal, hurry)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let the sockets go in their order, then stop as uvicorn does."""
        for server in self.servers:
            server.close()
        door = self._gateway.door
        if not await until_stopped(self._gateway.hurried, door.drain(self._drain_within_s)):
            await door.drain(0)
        await super().shutdown(sockets)


async def serve(
    settings: Settings,
    registry: CollectorRegistry,
    listener: socket.socket,
    *,
    is_orphan: Callable[[], bool] = lambda: False,
) -> None:
    """Run a gateway against `settings.redis_url` on a bound socket until SIGTERM or SIGINT, then drain.

    `is_orphan`: whether the signal has come because the stack that this gateway is part of was killed.

    Raises:
        RedisUrlError: the URL cannot be understood.
        SettingsError: the secret for tokens cannot be used, or `connections_max` needs more open files than there may be.
    """
    settings = make_room(settings)
    assert settings.redis_url is not None
    calm_collector()
    clock = SystemClock()
    link = RedisLink(settings.redis_url, clock, call_deadline_ms=CALL_DEADLINE_MS, durability=settings.durability)
    limits = replace(settings.store_limits(), attendant=settings.instance)
    gateway = build(RedisStore(link, clock, limits), clock, settings, registry)
    config = uvicorn.Config(
        gateway.app,
        http=HttpConnection,
        ws=Connection,
        lifespan="on",
        loop="none",
        log_config=None,
        log_level="error",  # a stranger's bad request is answered; a line for each would let strangers fill the disk
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_WITHIN_S,
        timeout_keep_alive=int(Awaited.HEAD.value),
        h11_max_incomplete_event_size=HEADERS_BYTES_MAX,
        backlog=4_096,
    )
    host, port = listener.getsockname()[:2]
    log.info("gateway_starting", host=host, port=port, shards=settings.shards)
    try:
        await _Server(config, gateway, settings.drain_ms / 1_000, is_orphan).serve(sockets=[listener])
    finally:
        await link.close()
    log.info("gateway_stopped")
