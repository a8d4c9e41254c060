"""Tests for engine.store.link: URLs, which errors may be repeated, the one retry loop, cancellation."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis._parsers.base import BaseParser
from redis.asyncio import Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import (
    ConnectionError,  # noqa: A004 - redis-py's own
    MaxConnectionsError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from engine.clock import SystemClock
from engine.logs import without_secrets
from engine.store import link as link_module
from engine.store.link import (
    RedisLink,
    RedisRefusedError,
    RedisUrlError,
    heeding_cancellation,
    is_transient,
)
from engine.store.protocol import StoreUnavailableError
from tests.contracts.stores import until
from tests.fakes.clock import ManualClock, Timeline
from tests.fakes.loop import run
from tests.servers import Server

# URLs.


def connection(url: str) -> Any:
    """A connection as the pool for a URL would make it; nothing is connected."""
    pool = RedisLink(url, SystemClock()).commands.connection_pool
    return pool.connection_class(**pool.connection_kwargs)


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("redis://cache.example:7000/3", {"host": "cache.example", "port": 7000, "db": 3}),
        ("redis://localhost", {"host": "localhost", "port": 6379, "db": 0}),
        ("redis://[::1]:7000", {"host": "::1", "port": 7000}),
    ],
)
def test_a_plain_url_says_host_port_and_database(url: str, seen: dict[str, object]) -> None:
    """What a redis:// URL says is what is connected to."""
    made = connection(url)
    assert {name: getattr(made, name) for name in seen} == seen


def test_a_url_carries_its_credentials() -> None:
    """User and password of a URL are used, with escapes undone."""
    made = connection("redis://bob:s%40cret@localhost")
    assert (made.username, made.password) == ("bob", "s@cret")


def test_a_unix_url_says_a_path() -> None:
    """unix:// connects to a socket file."""
    made = connection("unix:///run/redis.sock?db=2")
    assert isinstance(made, UnixDomainSocketConnection)
    assert (made.path, made.db) == ("/run/redis.sock", 2)


def test_a_rediss_url_uses_tls() -> None:
    """rediss:// is the same over TLS."""
    assert isinstance(connection("rediss://localhost"), SSLConnection)


@pytest.mark.parametrize("url", ["redis://localhost", "unix:///run/redis.sock", "redis+sentinel://a:1/main"])
def test_nothing_is_left_to_redis_pys_defaults(url: str) -> None:
    """Every client has no retries of its own, its time-outs and its protocol version spelled out."""
    link = RedisLink(url, SystemClock())
    for client, timeout_s in [(link.commands, 0.5), (link.blocking, 2.5), (link.subscriber, 0.5)]:
        options = client.connection_pool.connection_kwargs
        assert options["retry"]._retries == 0
        assert options["protocol"] == 2
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (timeout_s, 0.25)
        assert client.connection_pool.max_connections == 64


def test_a_sentinel_url_says_sentinels_and_service() -> None:
    """Every address and the service name are read; the sentinels themselves are asked with short time-outs, once."""
    link = RedisLink("redis+sentinel://s1.example:26379,[::1]:26380/prime", SystemClock())
    pool = link.commands.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "prime"
    asked = [client.connection_pool.connection_kwargs for client in pool.sentinel_manager.sentinels]
    assert [(options["host"], options["port"]) for options in asked] == [("s1.example", 26379), ("::1", 26380)]
    for options in asked:
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (0.25, 0.25)
        assert options["retry"]._retries == 0


def test_a_sentinel_url_carries_the_credentials_of_the_primary() -> None:
    """User and password before the sentinels are those of the server behind them; without, there are none."""
    options = RedisLink("redis+sentinel://bob:s%40cret@a:1/main", SystemClock()).commands.connection_pool
    assert (options.connection_kwargs["username"], options.connection_kwargs["password"]) == ("bob", "s@cret")
    options = RedisLink("redis+sentinel://:pw@a:1/main", SystemClock()).commands.connection_pool
    assert (options.connection_kwargs["username"], options.connection_kwargs["password"]) == (None, "pw")
    options = RedisLink("redis+sentinel://a:1/main", SystemClock()).commands.connection_pool
    assert (options.connection_kwargs["username"], options.connection_kwargs["password"]) == (None, None)


def test_a_sentinel_url_carries_the_credentials_of_the_sentinels_and_a_database() -> None:
    """The sentinels have a password of their own, if any; the database is that of the primary."""
    url = "redis+sentinel://:pw@a:1/main/3?sentinel_username=guard&sentinel_password=s%40cret"
    pool = RedisLink(url, SystemClock()).commands.connection_pool
    assert (pool.connection_kwargs["db"], pool.connection_kwargs["password"]) == (3, "pw")
    (sentinel,) = pool.sentinel_manager.sentinels
    asked = sentinel.connection_pool.connection_kwargs
    assert (asked["username"], asked["password"]) == ("guard", "s@cret")
    assert "cret" not in without_secrets(url)
    assert "pw" not in without_secrets(url)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis+sentinel://a:1", "/SERVICE"),
        ("redis+sentinel://a:1/", "/SERVICE"),
        ("redis+sentinel:///main", "/SERVICE"),
        ("redis+sentinel://,/main", "/SERVICE"),
        ("redis+sentinel://a:1/main/db", "DATABASE"),
        ("redis+sentinel://a:1/main?password=x", "sentinel_password"),
        ("redis+sentinel://a/main", "host:port"),
        ("redis+sentinel://a:b/main", "host:port"),
        ("redis+sentinel://a:1,:2/main", "host:port"),
        ("redis+cluster://", "Cluster URL"),
        ("redis+cluster://a:1/2", "Cluster URL"),
        ("redis+cluster://a", "host:port"),
        ("http://a:1", "http"),
        ("localhost:6379", "scheme"),
        ("", "scheme"),
        ("redis://localhost:port", "port"),
        ("redis://localhost:99999", "port"),
        ("redis://:pass/word@localhost", "password"),
        ("redis://[::1", "host"),
        ("http://a:port", "host"),
    ],
)
def test_a_url_that_cannot_be_understood_is_refused(url: str, complaint: str) -> None:
    """The error says what is wrong or which forms there are, and gives no password away."""
    with pytest.raises(RedisUrlError, match=complaint) as raised:
        RedisLink(url, SystemClock())
    assert "word" not in str(raised.value).replace("password", "")
    assert "'pass'" not in str(raised.value)


# Which errors may be repeated.


@pytest.mark.parametrize(
    "answer",
    [
        "READONLY You can't write against a read only replica.",
        "LOADING Redis is loading the dataset in memory",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "NOREPLICAS Not enough good replicas to write.",
        "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "CLUSTERDOWN The cluster is down",
        "MISCONF Errors writing to the AOF file: No space left on device",
        "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk.",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "OOM command not allowed when used memory > 'maxmemory'.",
        "ERR max number of clients reached",
    ],
)
@pytest.mark.parametrize("in_pipeline", [False, True])
async def test_a_state_of_the_server_that_passes_is_transient(answer: str, in_pipeline: bool) -> None:
    """Each answer that a failover, a start or a shortage brings may be repeated, also when a pipeline reports it."""
    error = BaseParser.parse_error(answer)
    if in_pipeline:
        client = Redis()
        client.pipeline().annotate_exception(error, 2, ("HMGET", "auction:timer:{0}:a"))
        await client.aclose()
    assert is_transient(error)


@pytest.mark.parametrize(
    "answer",
    [
        "WRONGPASS invalid username-password pair or user is disabled.",
        "NOAUTH Authentication required.",
        "NOPERM this user has no permissions to run the 'evalsha' command",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "ERR unknown command 'FROB'",
        "ERR Error running script (call to f_1): @user_script:1: a fault of ours",
        "MOVED 1234 10.0.0.1:6379",
        "CROSSSLOT Keys in request don't hash to the same slot",
        "NOSCRIPT No matching script. Please use EVAL.",
    ],
)
def test_a_refusal_is_not_transient(answer: str) -> None:
    """What repeating cannot mend is not repeated."""
    assert not is_transient(BaseParser.parse_error(answer))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Connection closed by server."),
        TimeoutError("Timeout reading from socket"),
        MaxConnectionsError("Too many connections"),
        ConnectionRefusedError(111, "Connection refused"),
        OSError("no route"),
        FileNotFoundError(2, "no such socket"),
    ],
)
def test_a_lost_connection_is_transient(error: Exception) -> None:
    """Whatever the network does may be over the next time."""
    assert is_transient(error)


def test_only_known_words_make_an_answer_transient() -> None:
    """The word must stand at the beginning, where Redis puts it."""
    assert not is_transient(ResponseError("ERR value is BUSY"))
    assert not is_transient(RedisError("something"))


# The retry loop, on virtual time.


class Attempts:
    """A call that fails in the ways listed, one per attempt, each after 5 ms; then it answers."""

    def __init__(self, *failures: Exception, for_ever: Exception | None = None) -> None:
        self.failures = list(failures)
        self.for_ever = for_ever
        self.made = 0

    async def __call__(self) -> str:
        self.made += 1
        await asyncio.sleep(0.005)
        if self.failures:
            raise self.failures.pop(0)
        if self.for_ever is not None:
            raise self.for_ever
        return "answer"


@pytest.fixture
def line() -> Timeline:
    """Virtual time."""
    return Timeline()


def link_on(line: Timeline, deadline_ms: int = 8_000) -> RedisLink:
    """A link that is never connected."""
    return RedisLink("redis://localhost", ManualClock(line), call_deadline_ms=deadline_ms)


def test_a_call_is_repeated_until_it_is_answered(line: Timeline) -> None:
    """Transient errors cost time, not the call; retries are counted."""
    attempts, link = Attempts(ConnectionError(), TimeoutError(), OSError()), link_on(line)
    assert run(line, lambda: link.call(attempts)) == "answer"
    assert (attempts.made, link.retries) == (4, 3)


def test_a_call_gives_up_at_its_deadline(line: Timeline) -> None:
    """The error says that the effect is unknown, after the deadline and at most one attempt more, the last cause attached."""
    attempts, link = Attempts(for_ever=ConnectionError("gone")), link_on(line)
    with pytest.raises(StoreUnavailableError, match="8000 ms: gone") as raised:
        run(line, lambda: link.call(attempts))
    assert isinstance(raised.value.__cause__, ConnectionError)
    assert 8_000 <= line.now_ns / 1e6 <= 8_000 + 2 * 5
    assert link.retries == attempts.made - 1


def test_a_call_can_have_its_own_deadline(line: Timeline) -> None:
    """A deadline given with the call stands before that of the link; 0 means one attempt."""
    attempts, link = Attempts(for_ever=ConnectionError("gone")), link_on(line)
    with pytest.raises(StoreUnavailableError, match="within 0 ms"):
        run(line, lambda: link.call(attempts, deadline_ms=0))
    assert attempts.made == 1


def test_the_backoff_doubles_to_its_bound(line: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """10, 20, 40 ... 200 ms, each with jitter between half and the whole, and never past the deadline."""
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def noting(delay: float) -> None:
        waits.append(delay * 1_000)
        await real_sleep(delay)

    monkeypatch.setattr(link_module.asyncio, "sleep", noting)
    link, error = link_on(line, 2_000), ConnectionError("gone")

    async def fail() -> None:
        raise error

    with pytest.raises(StoreUnavailableError):
        run(line, lambda: link.call(fail))
    bounds = [10, 20, 40, 80, 160, *[200] * len(waits)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits[:-1], bounds, strict=False))
    assert len({round(wait / bound, 6) for wait, bound in zip(waits[:-1], bounds, strict=False)}) > 5, "no jitter"
    assert abs(sum(waits) - 2_000) < 1


def test_a_refusal_ends_a_call_at_once(line: Timeline) -> None:
    """What repeating cannot mend is raised after one attempt, with the cause."""
    attempts, link = Attempts(for_ever=ResponseError("WRONGTYPE of key")), link_on(line)
    with pytest.raises(RedisRefusedError, match="WRONGTYPE"):
        run(line, lambda: link.call(attempts))
    assert attempts.made == 1


def test_a_fault_of_ours_is_not_hidden(line: Timeline) -> None:
    """An exception that is not Redis's passes through."""
    attempts, link = Attempts(for_ever=ZeroDivisionError()), link_on(line)
    with pytest.raises(ZeroDivisionError):
        run(line, lambda: link.call(attempts))


# Cancellation.


async def swallowing(started: asyncio.Event) -> str:
    """A call that answers although it was cancelled, as `asyncio.wait_for` could before Python 3.12."""
    started.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return "answer"
    raise AssertionError


async def test_a_cancellation_is_never_swallowed() -> None:
    """A call that answers in spite of a cancellation is cancelled all the same."""
    started = asyncio.Event()
    task = asyncio.create_task(heeding_cancellation(lambda: swallowing(started)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_cancellation_ends_the_retry_loop() -> None:
    """Also inside a call of the link, whatever the call makes of it."""
    started, link = asyncio.Event(), RedisLink("redis://localhost", SystemClock())
    task = asyncio.create_task(link.call(lambda: swallowing(started)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_timeout_around_a_call_is_kept() -> None:
    """`asyncio.timeout` cancels too; it gets its cancellation and becomes a TimeoutError."""
    started = asyncio.Event()
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.01):
            await heeding_cancellation(lambda: swallowing(started))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_of_before_is_not_taken_for_a_new_one() -> None:
    """A task that was cancelled and goes on, to clean up, can still make calls."""
    answers = []

    async def cleaning_up() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            answers.append(await heeding_cancellation(lambda: asyncio.sleep(0, "answer")))
            raise

    task = asyncio.create_task(cleaning_up())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answers == ["answer"]


async def test_an_error_of_a_call_passes_through() -> None:
    """Without a cancellation nothing is changed: neither the answer nor the error."""
    assert await heeding_cancellation(lambda: asyncio.sleep(0, "answer")) == "answer"

    async def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await heeding_cancellation(fail)


# Against real servers.


@pytest.fixture
async def link(redis_server: Server) -> AsyncIterator[RedisLink]:
    """A link to each kind of server."""
    made = RedisLink(redis_server.url, SystemClock(), call_deadline_ms=5_000)
    try:
        yield made
    finally:
        await made.close()


@pytest.mark.integration
async def test_a_server_that_is_away_is_unavailable() -> None:
    """Nobody listens: the call ends with its deadline."""
    link = RedisLink("unix:///tmp/no-such-socket", SystemClock(), call_deadline_ms=50)
    with pytest.raises(StoreUnavailableError):
        await link.call(link.commands.ping)
    await link.close()


@pytest.mark.integration
@pytest.mark.requirement("R16")
async def test_connections_that_cannot_say_goodbye_are_closed_all_the_same(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a loaded machine a goodbye takes longer than is waited for: every client is closed, and the stop is no failure."""
    link = RedisLink(redis_server.url, SystemClock(), call_deadline_ms=5_000)
    clients = (link.commands, link.blocking, link.subscriber)
    for client in clients:
        await link.call(client.ping)
    disconnect, gone = UnixDomainSocketConnection.disconnect, set()

    async def too_late(self: UnixDomainSocketConnection, *args: Any, **options: Any) -> None:
        await disconnect(self, *args, **options)
        gone.add(self)
        raise TimeoutError("Timed out closing connection after 0.25")

    monkeypatch.setattr(UnixDomainSocketConnection, "disconnect", too_late)
    await link.close()
    assert len(gone) == len(clients)


@pytest.mark.integration
async def test_a_wrong_password_is_refused(redis_server: Server) -> None:
    """A server that does not know us is no outage: the call ends at once."""
    redis_server.ask("ACL", "SETUSER", "bob", "on", ">right", "~*", "+@all")
    link = RedisLink(f"unix://bob:wrong@{redis_server.socket}", SystemClock())
    try:
        with pytest.raises(RedisRefusedError):
            await link.call(link.commands.ping)
        assert link.retries == 0
    finally:
        await link.close()
        redis_server.ask("ACL", "DELUSER", "bob")


@pytest.mark.integration
async def test_more_callers_than_connections_wait_their_turn(link: RedisLink) -> None:
    """Running out of connections is transient: everyone is answered."""
    link.commands.connection_pool.max_connections = 2
    answers = await asyncio.gather(*[link.call(link.commands.ping) for _ in range(30)])
    assert answers == [True] * 30


@pytest.mark.integration
async def test_a_write_waits_for_a_replica_to_come_back(link: RedisLink, redis_server: Server) -> None:
    """NOREPLICAS is repeated until a replica is not wanted any more; the write happens once."""
    with redis_server.configured("min-replicas-to-write", "1", "0"):
        writing = asyncio.create_task(link.call(lambda: link.commands.incr("n")))
        await until(lambda: link.retries > 0)
        assert not writing.done()
    assert await writing == 1


@pytest.mark.integration
async def test_a_write_waits_for_a_primary(link: RedisLink, redis_server: Server) -> None:
    """READONLY, the answer of a demoted primary, is repeated until it is a primary again."""
    redis_server.ask("REPLICAOF", "127.0.0.1", "1")
    try:
        writing = asyncio.create_task(link.call(lambda: link.commands.incr("n")))
        await until(lambda: link.retries > 0)
        assert not writing.done()
    finally:
        redis_server.ask("REPLICAOF", "NO", "ONE")
    assert await writing == 1


@pytest.mark.integration
async def test_a_blocked_read_survives_a_change_of_role(link: RedisLink, redis_server: Server) -> None:
    """UNBLOCKED, what a blocked reader gets when its server becomes a replica, ends no reader."""
    reading = asyncio.create_task(
        link.call(lambda: link.blocking.execute_command("XREAD", "BLOCK", 2_000, "STREAMS", "s", "0-0"))
    )

    async def blocked() -> bool:
        return int((await link.commands.info("clients"))["blocked_clients"]) > 0

    await until(blocked)
    redis_server.ask("REPLICAOF", "127.0.0.1", "1")
    try:
        await until(lambda: link.retries > 0)
    finally:
        redis_server.ask("REPLICAOF", "NO", "ONE")
    assert not await asyncio.wait_for(reading, 20)


@pytest.mark.integration
async def test_a_call_waits_for_a_script_that_keeps_the_server_busy(link: RedisLink, redis_server: Server) -> None:
    """BUSY is repeated until the script is over, for a single command and for a pipeline."""
    async with Redis.from_url(redis_server.url, protocol=2, socket_timeout=None) as other:
        with redis_server.configured("busy-reply-threshold", "1", "5000"):
            hanging = asyncio.create_task(other.execute_command("EVAL", "while true do end", 0))
            reading = asyncio.create_task(link.call(lambda: link.commands.get("n")))

            async def attempt() -> list[Any]:
                pipe = link.commands.pipeline(transaction=False)
                pipe.execute_command("HMGET", "h", "f")
                return await pipe.execute()

            piped = asyncio.create_task(link.call(attempt))
            try:
                await until(lambda: link.retries > 4)
            finally:
                await until(lambda: killed(redis_server))
            with pytest.raises(ResponseError):
                await hanging
            assert await reading is None
            assert await piped == [[None]]


def killed(server: Server) -> bool:
    """Whether the running script was stopped."""
    try:
        return server.ask("SCRIPT", "KILL") == "OK"
    except RuntimeError as error:
        return "NOTBUSY" in str(error)
