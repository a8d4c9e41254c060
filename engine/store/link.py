"""Connections to Redis, and the one retry loop of the project.

redis-py 8 retries silently or never, depending on how a client is made (ten times with `Redis()`, not at all with
`from_url`), and once applied an increment twice. So every client here has its retries set to none, its time-outs and its
protocol version spelled out, and `RedisLink.call` repeats a whole call, with the same command id, until one deadline.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

import redis.asyncio as redis
from hiredis import pack_command
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's own, and the only one meant here
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,  # noqa: A004
    TryAgainError,
)

from engine.clock import Clock
from engine.store.protocol import StoreError, StoreUnavailableError
from engine.store.scripts import Script

T = TypeVar("T")

COMMAND_TIMEOUT_S: Final = 0.5
"""One answer. A commit takes 0.1 ms; half a second of silence is a fault, and the call is repeated elsewhere or later."""
CONNECT_TIMEOUT_S: Final = 0.25
CALL_DEADLINE_MS: Final = 8_000
"""One call with all its retries: longer than a Sentinel failover (2.3 s measured), so callers see a pause, not an error."""
BACKOFF_FIRST_MS: Final = 10
BACKOFF_MAX_MS: Final = 200
BLOCK_MS_MAX: Final = 1_000
"""A blocking read lasts at most this long, so that a connection that died silently is noticed."""
BLOCKING_TIMEOUT_S: Final = BLOCK_MS_MAX / 1_000 + 1.5
CONNECTIONS_MAX: Final = 64

_TRANSIENT_PREFIXES: Final = ("NOREPLICAS", "UNBLOCKED", "BUSY", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "READONLY")


class RedisUrlError(StoreError):
    """A Redis URL cannot be understood. The message shows the forms that can."""


class RedisRefusedError(StoreError):
    """Redis refused the call for a reason that repeating cannot mend (authentication, permission, our own fault)."""


def is_transient(error: Exception) -> bool:
    """Whether repeating a call after `error` can help. Decided one by one; none of them may end a loop."""
    # While connecting, redis-py hides it in a ConnectionError.
    if isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError):
        return False
    if isinstance(
        error,
        ConnectionError  # includes MaxConnections, LOADING (a subclass) and "no master found"
        | TimeoutError
        | BusyLoadingError
        | ReadOnlyError  # we still talk to a demoted primary
        | MasterDownError
        | TryAgainError
        | ClusterDownError
        | OutOfMemoryError  # bids are refused until space returns; commits are allowed under it
        | OSError,
    ):
        return True
    # A pipeline puts "Command # 1 (...) of pipeline caused error: (" before what Redis said.
    said = str(error).rpartition(" of pipeline caused error: (")[2].lstrip("'\"")
    return isinstance(error, ResponseError) and said.startswith(_TRANSIENT_PREFIXES)


class _PackedInC:
    """Mixed into redis-py's connections: commands are packed by hiredis, as its blocking client does.

    A commit of 32 bids has 1,350 arguments. Packing in Python took 5.5 of the 11.3 s of a profiled run of 30,000
    bids; packing in C took 0.3 s of the same run.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        """The command in the Redis protocol."""
        name = args[0]
        if isinstance(name, str) and " " not in name:
            return [pack_command(args)]
        packed: list[bytes] = super().pack_command(*args)  # type: ignore[misc]
        return packed


@cache
def _packed_in_c(connection_class: type) -> type:
    return type(connection_class.__name__, (_PackedInC, connection_class), {})


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


@dataclass(frozen=True, slots=True)
class _Target:
    """What a URL says."""

    url: str
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    username: str | None = None
    password: str | None = None


def _target(url: str) -> _Target:
    try:
        parts = urlsplit(url)
        _ = parts.port if parts.scheme != "redis+sentinel" else None
    except ValueError:  # whose text may hold a piece of the password
        raise RedisUrlError(
            "host and port cannot be read: is each special character of the password escaped?"
        ) from None
    if parts.scheme in ("redis", "rediss", "unix"):
        return _Target(url)
    if parts.scheme == "redis+sentinel":
        userinfo, _, hosts = parts.netloc.rpartition("@")
        username, _, password = userinfo.partition(":")
        service = parts.path.strip("/")
        addresses = tuple(_address(host) for host in hosts.split(",") if host)
        if not service or not addresses:
            raise RedisUrlError("a Sentinel URL reads redis+sentinel://host:port,host:port/SERVICE")
        return _Target(url, addresses, service, unquote(username) or None, unquote(password) or None)
    if parts.scheme == "redis+cluster":
        raise RedisUrlError(
            "redis+cluster:// is not supported by this version; use redis://, unix:// or redis+sentinel://"
        )
    raise RedisUrlError(f"the scheme {parts.scheme!r} is none of redis, rediss, unix, redis+sentinel")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise RedisUrlError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)


async def heeding_cancellation(attempt: Callable[[], Awaitable[T]]) -> T:
    """Run one call of redis-py so that a cancellation is never lost in it.

    redis-py sends under `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that arrives in the same turn
    of the loop as the result (cpython#86296): the caller then runs on for ever. Measured here: 1 of 13 shutdowns hung.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await attempt()
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


class RedisLink:
    """The clients of one process, one per use, because a blocking read must never stand before a commit."""

    def __init__(self, url: str, clock: Clock, *, call_deadline_ms: int = CALL_DEADLINE_MS) -> None:
        """Nothing is connected yet.

        Raises:
            RedisUrlError: the URL cannot be understood.
        """
        self._target = _target(url)
        self._clock = clock
        self._call_deadline_ms = call_deadline_ms
        self.commands = self._client(COMMAND_TIMEOUT_S)
        self.blocking = self._client(BLOCKING_TIMEOUT_S)
        self.subscriber = self._client(COMMAND_TIMEOUT_S)
        self.retries = 0

    def _client(self, timeout_s: float) -> "redis.Redis":
        options: dict[str, Any] = {
            "retry": _no_retry(),
            "socket_timeout": timeout_s,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "protocol": 2,
            "max_connections": CONNECTIONS_MAX,
        }
        client = self._plain_client(options)
        pool = client.connection_pool
        pool.connection_class = _packed_in_c(pool.connection_class)  # type: ignore[arg-type]
        return client

    def _plain_client(self, options: dict[str, Any]) -> "redis.Redis":
        target = self._target
        if not target.sentinels:
            return redis.Redis.from_url(target.url, **options)
        sentinel = Sentinel(
            list(target.sentinels),
            # Without its own short time-outs discovery takes 3.9 s with one dead sentinel.
            sentinel_kwargs={
                "socket_timeout": CONNECT_TIMEOUT_S,
                "socket_connect_timeout": CONNECT_TIMEOUT_S,
                "retry": _no_retry(),
                "protocol": 2,
            },
        )
        client: redis.Redis = sentinel.master_for(
            target.service, username=target.username, password=target.password, **options
        )
        return client

    async def call(self, attempt: Callable[[], Awaitable[T]], *, deadline_ms: int | None = None) -> T:
        """Run `attempt` until it answers, fails for good, or the deadline is over.

        `attempt` must be safe to repeat: it reads, or it carries its own command id.

        Raises:
            StoreUnavailableError: no answer by the deadline; the effect is unknown.
            RedisRefusedError: Redis refused, and would again.
        """
        wait_ms = self._call_deadline_ms if deadline_ms is None else deadline_ms
        give_up = self._clock.monotonic_ns() + wait_ms * 1_000_000
        backoff_ms = BACKOFF_FIRST_MS
        while True:
            try:
                return await heeding_cancellation(attempt)
            except (redis.RedisError, OSError) as error:
                if not is_transient(error):
                    raise RedisRefusedError(f"Redis refused: {error}") from error
                left_ms = (give_up - self._clock.monotonic_ns()) / 1e6
                if left_ms <= 0:
                    raise StoreUnavailableError(f"no answer from Redis within {wait_ms} ms: {error}") from error
            self.retries += 1
            # Full jitter: after a failover every process calls again, and not at the same instant.
            await asyncio.sleep(min(left_ms, random.uniform(0.5, 1) * backoff_ms) / 1_000)  # noqa: S311
            backoff_ms = min(BACKOFF_MAX_MS, backoff_ms * 2)

    async def run(self, script: Script, names: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script by its digest; a server that does not know it yet gets its text. Raises as `call` does."""
        client = self.commands

        async def attempt() -> Any:
            try:
                return await client.execute_command("EVALSHA", script.sha, len(names), *names, *args)
            except NoScriptError:
                return await client.execute_command("EVAL", script.source, len(names), *names, *args)

        return await self.call(attempt)

    async def close(self) -> None:
        """Close every connection."""
        for client in (self.commands, self.blocking, self.subscriber):
            await client.aclose()
            await client.connection_pool.disconnect()
