"""Connections to Redis, and the one retry loop of the project.

redis-py 8 retries silently or never, depending on how a client is made (ten times with `Redis()`, not at all with
`from_url`), and once applied an increment twice. So every client here has its retries set to none, its time-outs and its
protocol version spelled out, and `RedisLink.call` repeats a whole call, with the same command id, until one deadline.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis.asyncio as redis
from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection
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
from engine.contract import keys
from engine.store.protocol import StoreError, StoreUnavailableError
from engine.store.scripts import Script
from engine.store.topology import Address, OutstandingReads, SlotMap, Streams, slot_of

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
REPLICAS_WANTED: Final = 1
"""Replicas that must have a write in `replicated` durability. With 2 replicas one may be down, and writing goes on."""
WAIT_MS: Final = 150
"""How long a replica may take to have it; on loopback it takes 0.1 ms. After that the call is repeated, with its own id."""
BARRIER: Final = "#!lua flags=allow-oom\nredis.call('SET', KEYS[1], '1')"
"""A write that changes nothing: `WAIT` counts replicas as of the last write of its own connection, and of nobody else's.

Without it a read, or a command that was recognised as a repetition, would be counted as of the beginning of time.
"""

_TRANSIENT_PREFIXES: Final = ("NOREPLICAS", "UNBLOCKED", "BUSY", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "READONLY")


class RedisUrlError(StoreError):
    """A Redis URL cannot be understood. The message shows the forms that can."""


class RedisRefusedError(StoreError):
    """Redis refused the call for a reason that repeating cannot mend (authentication, permission, our own fault)."""


class NotReplicatedError(redis.RedisError):
    """No replica has the write yet. Whether it will be kept is unknown: repeat it with the same command id."""


def is_transient(error: Exception) -> bool:
    """Whether repeating a call after `error` can help. Decided one by one; none of them may end a loop."""
    # While connecting, redis-py hides it in a ConnectionError.
    if isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError):
        return False
    if isinstance(
        error,
        ConnectionError  # includes MaxConnections, LOADING (a subclass) and "no master found"
        | NotReplicatedError
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
    db: int = 0
    sentinel_options: Mapping[str, str] = field(default_factory=dict)
    """What the sentinels themselves want to be told: `username`, `password`."""
    nodes: tuple[Address, ...] = ()
    """Nodes of a Cluster, any of which knows the others."""


def _target(url: str) -> _Target:
    try:
        parts = urlsplit(url)
        _ = parts.port if parts.scheme not in ("redis+sentinel", "redis+cluster") else None
    except ValueError:  # whose text may hold a piece of the password
        raise RedisUrlError(
            "host and port cannot be read: is each special character of the password escaped?"
        ) from None
    if parts.scheme in ("redis", "rediss", "unix"):
        return _Target(url)
    if parts.scheme == "redis+sentinel":
        userinfo, _, hosts = parts.netloc.rpartition("@")
        username, _, password = userinfo.partition(":")
        service, _, db = parts.path.strip("/").partition("/")
        addresses = tuple(_address(host) for host in hosts.split(",") if host)
        if not service or not addresses or (db and not db.isdigit()):
            raise RedisUrlError(
                "a Sentinel URL reads redis+sentinel://host:port,host:port/SERVICE, or …/SERVICE/DATABASE"
            )
        return _Target(
            url, addresses, service, unquote(username) or None, unquote(password) or None, int(db or 0), _options(parts)
        )
    if parts.scheme == "redis+cluster":
        userinfo, _, hosts = parts.netloc.rpartition("@")
        username, _, password = userinfo.partition(":")
        addresses = tuple(_address(host) for host in hosts.split(",") if host)
        if not addresses or parts.path.strip("/") or parts.query:
            raise RedisUrlError("a Cluster URL reads redis+cluster://host:port,host:port")
        return _Target(url, nodes=addresses, username=unquote(username) or None, password=unquote(password) or None)
    raise RedisUrlError(f"the scheme {parts.scheme!r} is none of redis, rediss, unix, redis+sentinel, redis+cluster")


def _options(parts: SplitResult) -> dict[str, str]:
    """The credentials of the sentinels: `?sentinel_username=…&sentinel_password=…`."""
    given = dict(parse_qsl(parts.query))
    found = {name: given.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in given}
    if given:
        raise RedisUrlError("a Sentinel URL takes the options sentinel_username and sentinel_password, and no other")
    return found


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
    try:
        result = await attempt()
    except Exception:
        # A time-out in the same turn swallows it just as well.
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from None
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


class RedisLink:
    """The clients of one process, one per use, because a blocking read must never stand before a commit.

    In `replicated` durability an answer is given only when a replica has everything that it was made from: what this
    process has written, and also what it has read, whoever wrote that.
    """

    def __init__(
        self,
        url: str,
        clock: Clock,
        *,
        call_deadline_ms: int = CALL_DEADLINE_MS,
        durability: Literal["local", "replicated"] = "local",
    ) -> None:
        """Nothing is connected yet.

        Raises:
            RedisUrlError: the URL cannot be understood.
        """
        self._target = _target(url)
        self._clock = clock
        self._call_deadline_ms = call_deadline_ms
        self._replicated = durability == "replicated"
        self._sentinel = self._sentinel_of(self._target)
        self._map = SlotMap(self._target.nodes) if self._target.nodes else None
        self._mapping = asyncio.Lock()
        self._nodes: dict[Address | None, Node] = {}
        self._reads = OutstandingReads()
        self._background: set[asyncio.Task[None]] = set()
        self.retries = 0
        self.connections = 0
        """Connections made for blocking reads. One more: what was read before may have been lost in a failover."""
        if self._map is None:
            self._nodes[None] = self._node(None)

    @property
    def is_cluster(self) -> bool:
        """Whether keys of different hash tags may live on different servers."""
        return self._map is not None

    @property
    def is_replicated(self) -> bool:
        """Whether an answer waits for a replica."""
        return self._replicated

    @property
    def commands(self) -> "redis.Redis":
        """The client of the one server there is; a Cluster has none that serves every key."""
        return self._nodes[None].commands

    @property
    def blocking(self) -> "redis.Redis":
        """As `commands`, for blocking reads."""
        return self._nodes[None].blocking

    @property
    def subscriber(self) -> "redis.Redis":
        """As `commands`, for subscriptions."""
        return self._nodes[None].subscriber

    def _node(self, address: Address | None) -> "Node":
        return Node(
            self._client(address, COMMAND_TIMEOUT_S),
            self._client(address, BLOCKING_TIMEOUT_S, on_connect=self._count_connection),
            self._client(address, COMMAND_TIMEOUT_S),
        )

    async def node(self, name: str) -> "Node":
        """The server that serves a key.

        Raises:
            ConnectionError: nobody is known to, now.
        """
        if self._map is None:
            return self._nodes[None]
        if self._map.outdated:
            await self._ask_for_slots(self._map)
        return self._node_at(self._map.node_of(slot_of(name)))

    def _node_at(self, address: Address) -> "Node":
        if address not in self._nodes:
            self._nodes[address] = self._node(address)
        return self._nodes[address]

    async def primaries(self) -> list["Node"]:
        """Every server that serves keys. Raises as `node` does."""
        if self._map is None:
            return [self._nodes[None]]
        if self._map.outdated:
            await self._ask_for_slots(self._map)
        return [self._node_at(address) for address in self._map.serving]

    async def _ask_for_slots(self, slots: SlotMap) -> None:
        async with self._mapping:
            if not slots.outdated:
                return  # somebody else has asked meanwhile
            known = slots.known
            random.shuffle(known)
            fault: Exception | None = None
            for address in known:
                try:
                    answer = await self._node_at(address).commands.execute_command("CLUSTER", "SLOTS")
                except (redis.RedisError, OSError) as error:
                    fault = error
                    continue
                slots.learn(answer, address)
                return
            raise ConnectionError(f"no node of the Cluster answers: {fault}") from fault

    @staticmethod
    def _sentinel_of(target: _Target) -> Sentinel | None:
        if not target.sentinels:
            return None
        return _Sentinels(  # type: ignore[no-untyped-call]
            list(target.sentinels),
            # Without its own short time-outs discovery takes 3.9 s with one dead sentinel.
            sentinel_kwargs={
                "socket_timeout": CONNECT_TIMEOUT_S,
                "socket_connect_timeout": CONNECT_TIMEOUT_S,
                "retry": _no_retry(),
                "protocol": 2,
                **target.sentinel_options,
            },
        )

    def _client(
        self, address: Address | None, timeout_s: float, on_connect: Callable[[], None] = lambda: None
    ) -> "redis.Redis":
        async def connected(connection: AbstractConnection) -> None:
            await connection.on_connect()
            on_connect()
            if self._sentinel is not None:
                await _insist_on_primary(connection)

        options: dict[str, Any] = {
            "retry": _no_retry(),
            "socket_timeout": timeout_s,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "protocol": 2,
            # In a Cluster each shard is read on a connection of its own.
            "max_connections": CONNECTIONS_MAX + (keys.SHARDS_MAX if self.is_cluster else 0),
            "redis_connect_func": connected,
        }
        client = self._plain_client(address, options)
        pool = client.connection_pool
        pool.connection_class = _packed_in_c(pool.connection_class)  # type: ignore[arg-type]
        # Streams are read as they come: redis-py's own parsing makes a dict per entry, which costs a third of the intake.
        for command in ("XREAD", "XREVRANGE"):
            client.set_response_callback(command, _as_it_comes)  # type: ignore[arg-type]
        return client

    def _plain_client(self, address: Address | None, options: dict[str, Any]) -> "redis.Redis":
        target = self._target
        if address is not None:
            host, port = address
            return redis.Redis(host=host, port=port, username=target.username, password=target.password, **options)
        if self._sentinel is None:
            return redis.Redis.from_url(target.url, **options)
        client: redis.Redis = self._sentinel.master_for(
            target.service, db=target.db, username=target.username, password=target.password, **options
        )
        return client

    def _count_connection(self) -> None:
        self.connections += 1

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
                redirected = self._map is not None and self._map.heed(error)
                if not (redirected or is_transient(error)):
                    raise RedisRefusedError(f"Redis refused: {error}") from error
                left_ms = (give_up - self._clock.monotonic_ns()) / 1e6
                if left_ms <= 0:
                    raise StoreUnavailableError(f"no answer from Redis within {wait_ms} ms: {error}") from error
            self.retries += 1
            # Full jitter: after a failover every process calls again, and not at the same instant.
            await asyncio.sleep(min(left_ms, random.uniform(0.5, 1) * backoff_ms) / 1_000)  # noqa: S311
            backoff_ms = min(BACKOFF_MAX_MS, backoff_ms * 2)

    async def ask(self, name: str, *command: str | bytes | int, told: bool = True, blocking: bool = False) -> Any:
        """One command about the key `name`.

        `told` says that people or producers are told of what is answered: it waits for the replica then. Raises as
        `call` does.
        """
        return await self.call(lambda: self._exchange(name, command, told=told, blocking=blocking))

    async def run(
        self, script: Script, names: Sequence[str], args: Sequence[str | bytes | int], *, told: bool = True
    ) -> Any:
        """Run a script by its digest; a server that does not know it yet gets its text. As `ask` otherwise."""

        async def attempt() -> Any:
            rest = (len(names), *names, *args)
            # Where a slot is moving to, a script is taken with its text only: an unknown digest would come too late.
            if self._map is None or not self._map.is_asked(slot_of(names[0])):
                try:
                    return await self._exchange(names[0], ("EVALSHA", script.sha, *rest), told=told)
                except NoScriptError:
                    pass
            return await self._exchange(names[0], ("EVAL", script.source, *rest), told=told)

        return await self.call(attempt)

    async def _exchange(
        self, name: str, command: Sequence[str | bytes | int], *, told: bool, blocking: bool = False
    ) -> Any:
        """One attempt: the command, and the word of a replica that it has all of it."""
        asked = self._map.take_ask(slot_of(name)) if self._map is not None else None
        node = self._node_at(asked) if asked is not None else await self.node(name)
        client = node.blocking if blocking else node.commands
        told = told and self._replicated
        if asked is None and not told:
            return await client.execute_command(*command)
        # One connection, in this order: a WAIT on another one would count as of other writes.
        pipe = client.pipeline(transaction=False)
        if asked is not None:
            pipe.execute_command("ASKING")
        pipe.execute_command(*command)
        if not told:
            return (await pipe.execute())[-1]
        if asked is not None:
            pipe.execute_command("ASKING")
        pipe.execute_command("EVAL", BARRIER, 1, keys.barrier(name))
        pipe.execute_command("WAIT", REPLICAS_WANTED, WAIT_MS)
        *answers, replicas = await pipe.execute()
        if replicas < REPLICAS_WANTED:
            raise NotReplicatedError(f"no replica had it within {WAIT_MS} ms: is one connected?")
        return answers[0 if asked is None else 1]

    async def read_streams(
        self,
        names: Sequence[str],
        since: Sequence[str],
        count: int,
        block_ms: int,
        *,
        never_alone: Collection[str] = (),
    ) -> Streams:
        """XREAD. In a Cluster each slot is read by a command of its own. Raises as `call` does.

        What one of the `never_alone` holds is given only with what the other streams of its slot held by then.
        """
        groups: dict[int, list[tuple[str, str]]] = {}
        for name, place in zip(names, since, strict=True):
            groups.setdefault(slot_of(name) if self.is_cluster else 0, []).append((name, place))
        wanted = [(tuple(name for name, _ in group), tuple(place for _, place in group)) for group in groups.values()]

        async def read(names: tuple[str, ...], since: tuple[str, ...]) -> Streams:
            return await self._read_slot(names, since, count, block_ms, never_alone)

        if len(wanted) == 1:
            return await read(*wanted[0])
        if block_ms > 0:
            return await self._reads.first(wanted, read, block_ms / 1_000)
        found: Streams = {}
        for part in await asyncio.gather(*(read(*group) for group in wanted)):
            found |= part
        return found

    async def _read_slot(
        self, names: Sequence[str], since: Sequence[str], count: int, block_ms: int, never_alone: Collection[str]
    ) -> Streams:
        block = ("BLOCK", min(block_ms, BLOCK_MS_MAX)) if block_ms > 0 else ()
        # Always of the same connection: a new one says that the server may be another, and may have lost entries.
        answer = await self.ask(names[0], "XREAD", "COUNT", count, *block, "STREAMS", *names, *since, blocking=True)
        if block_ms > 0 and any(name.decode() in never_alone for name, _ in answer or ()):
            # Redis 7.0 gives a read that had to wait only the stream that woke it: an answer without its announcements.
            answer = await self.ask(names[0], "XREAD", "COUNT", count, "STREAMS", *names, *since, blocking=True)
        return {name.decode(): rows for name, rows in answer or ()}

    async def publish(self, lines: Mapping[str, bytes]) -> None:
        """Publish by channel; in a Cluster within its slot (`SPUBLISH`). Once, and nobody is waited for.

        Raises:
            RedisError: some were not published.
            OSError: likewise.
        """
        command = "SPUBLISH" if self.is_cluster else "PUBLISH"
        pipes: dict[int, Any] = {}
        try:
            for channel, payload in lines.items():
                client = (await self.node(channel)).commands
                pipe = pipes.setdefault(id(client), client.pipeline(transaction=False))
                pipe.execute_command(command, channel, payload)
            await asyncio.gather(*(heeding_cancellation(pipe.execute) for pipe in pipes.values()))
        except (redis.RedisError, OSError) as error:
            self.heed(error)
            raise

    def heed(self, error: Exception) -> None:
        """An error of a call that is not repeated here: what it says of the Cluster is remembered."""
        if self._map is not None:
            self._map.heed(error)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the calls, at the latest until `close`."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Close every connection. One that cannot say goodbye in time is gone as well: that is no error of whoever stops."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._reads.close()
        for node in self._nodes.values():
            for client in (node.commands, node.blocking, node.subscriber):
                with contextlib.suppress(redis.RedisError, OSError):
                    await client.aclose()
                    await client.connection_pool.disconnect()
        if self._sentinel is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                await self._sentinel.aclose()


@dataclass(frozen=True, slots=True)
class Node:
    """The clients of one server, one per use."""

    commands: "redis.Redis"
    blocking: "redis.Redis"
    subscriber: "redis.Redis"


def _as_it_comes(answer: Any, **_options: Any) -> Any:
    return answer


class _Sentinels(Sentinel):
    """redis-py brings the sentinel that answered to the front of its list while other discoveries walk that list.

    Two at once can so write one sentinel over another, which is never asked again, nor closed. Each walks its own list here.
    """

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The address of the primary, of the first sentinel that knows one."""
        walked = copy(self)
        walked.sentinels = list(self.sentinels)
        found: tuple[str, int] = await super(_Sentinels, walked).discover_master(service_name)
        self.sentinels = walked.sentinels
        return found


async def _insist_on_primary(connection: AbstractConnection) -> None:
    """Refuse a server that is no primary: sentinels may be wrong, and its reads would fall behind without an error."""
    await connection.send_command("ROLE")
    role = await connection.read_response()
    if role[0] not in (b"master", "master"):
        raise ConnectionError("the sentinels named a server that is no primary")
