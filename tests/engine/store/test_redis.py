"""Tests for engine.store.redis: what only a real server can do to a store. What every store must do: tests/contracts."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest
from redis.exceptions import RedisError

from engine.clock import SystemClock
from engine.contract.cursors import START
from engine.contract.keys import META, ShardKeys, replies
from engine.domain.instants import EpochMs
from engine.store import redis as redis_module
from engine.store.link import RedisLink
from engine.store.protocol import (
    Announce,
    BindOffer,
    Committed,
    DeploymentMismatchError,
    Draft,
    Lease,
    PlaceClosed,
    Reply,
    StoreUnavailableError,
)
from engine.store.redis import RedisStore, StoreLimits
from engine.store.scripts import APPEND, CLAIM, COMMIT, RELEASE, RENEW, VIEW
from tests.contracts.stores import WITHIN_S, RedisBench, until
from tests.contracts.test_store_commit import EVERYTHING, batch_on, commit, put, record
from tests.servers import Server

pytestmark = pytest.mark.integration

KEYS = ShardKeys.of(0)
DEADLINE_MS = 600
ANSWER_MS = 750
"""One attempt more than the deadline: half a second for the answer, a quarter for the connection."""
SLACK_MS = 5_500
"""For a machine that is busy with something else."""


@pytest.fixture
async def bench(redis_server: Server) -> AsyncIterator[RedisBench]:
    """The store on each kind of server."""
    made = RedisBench(redis_server)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def hasty(redis_server: Server) -> AsyncIterator[RedisStore]:
    """The same data behind a store that gives up soon."""
    link = RedisLink(redis_server.url, SystemClock(), call_deadline_ms=DEADLINE_MS)
    try:
        yield RedisStore(link, SystemClock())
    finally:
        await link.close()


# Scripts, and commands.


async def test_a_command_of_two_words_is_sent_as_such(bench: RedisBench) -> None:
    """The link packs commands by itself; names with a space, as redis-py has them, are still taken apart."""
    name = f"probe-{id(bench)}"
    await bench.link.commands.execute_command("CLIENT SETNAME", name)
    assert await bench.link.commands.execute_command("CLIENT GETNAME") in (name, name.encode())
    await bench.link.commands.execute_command("CLIENT", "SETNAME", "")


async def test_scripts_come_back_after_they_were_flushed(bench: RedisBench) -> None:
    """A server that has forgotten the scripts (restart, failover, SCRIPT FLUSH) learns them with the next call."""
    flush = ("SCRIPT", "FLUSH")
    bench.server.ask(*flush)
    await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    bench.server.ask(*flush)
    lease = await bench.store.claim(0, "me", None)
    bench.server.ask(*flush)
    assert await bench.store.renew(0, "me", lease.epoch)
    batch = await batch_on(bench, *EVERYTHING)
    bench.server.ask(*flush)
    assert isinstance(await bench.store.commit(batch), Committed)
    bench.server.ask(*flush)
    assert (await bench.store.view(0, "a")).record == record("a", 1)
    bench.server.ask(*flush)
    await bench.store.release(0, "me", lease.epoch)
    assert (await bench.store.lease(0)).holder == ""


async def test_scripts_are_known_by_their_hash(bench: RedisBench) -> None:
    """The hash each script is called by is the one the server gives it, so it is sent once and not with every call."""
    for script in (APPEND, CLAIM, COMMIT, RELEASE, RENEW, VIEW):
        loaded = await bench.link.commands.execute_command("SCRIPT", "LOAD", script.source)
        assert script.sha in (loaded, loaded.decode() if isinstance(loaded, bytes) else loaded)


# The deployment.


async def test_another_schema_is_refused(bench: RedisBench) -> None:
    """Data of another program version is not touched, and the message says what to do."""
    await bench.store.deployment(8)
    await bench.link.commands.hset(META, "schema", "99")
    with pytest.raises(DeploymentMismatchError, match="schema version 99"):
        await bench.store.deployment(8)


async def test_a_sound_server_gives_no_cause_for_complaint(bench: RedisBench) -> None:
    """noeviction and an append-only file."""
    assert await bench.store.complaints() == []


async def test_a_server_that_forgets_is_complained_about(bench: RedisBench) -> None:
    """Eviction and a missing append-only file are named, each with what to do."""
    with (
        bench.server.configured("maxmemory-policy", "allkeys-lru", "noeviction"),
        bench.server.configured("appendonly", "no", "yes"),
    ):
        eviction, append_only = await bench.store.complaints()
    assert "allkeys-lru" in eviction
    assert "noeviction" in eviction
    assert "appendonly yes" in append_only


async def test_a_server_that_hides_its_configuration_is_complained_about(bench: RedisBench) -> None:
    """Where CONFIG is not allowed, a person must look."""
    bench.server.ask("ACL", "SETUSER", "bob", "on", "nopass", "~*", "+@all", "-config")
    link = RedisLink(f"unix://bob:any@{bench.server.socket}", SystemClock())
    try:
        (complaint,) = await RedisStore(link, SystemClock()).complaints()
    finally:
        await link.close()
        bench.server.ask("ACL", "DELUSER", "bob")
    assert "not allowed" in complaint


# Bounds of what is kept.


async def pttl(bench: RedisBench, key: str) -> int:
    """How long a key still lives, in ms; negative if for ever or not at all."""
    return int(await bench.link.commands.pttl(key))


async def test_what_is_over_is_kept_for_the_retention(bench: RedisBench) -> None:
    """The hash of a closed auction and a forgotten offer expire, answers sooner; a running auction and its offer do not."""
    bench.store.limits = StoreLimits(closed_retention_ms=90_000, seen_ms=70_000)
    await commit(bench, *EVERYTHING)
    for key in (KEYS.timer("c"), KEYS.offer_prefix + "o-2"):
        assert 70_000 < await pttl(bench, key) <= 90_000
    for key in (replies("inbox-1"), KEYS.command_prefix + "c-1"):
        assert 0 < await pttl(bench, key) <= 70_000
    for key in (KEYS.timer("a"), KEYS.timer("b"), KEYS.offer_prefix + "o-1", KEYS.audit, KEYS.updates, KEYS.cursor):
        assert await pttl(bench, key) == -1


async def test_a_rebound_offer_is_kept(bench: RedisBench) -> None:
    """Binding an offer anew, without forgetting, ends its retention."""
    await commit(bench, BindOffer("o-1", "cancelled {}", forget=True))
    await commit(bench, BindOffer("o-1", "auction a", forget=False))
    assert await pttl(bench, KEYS.offer_prefix + "o-1") == -1


async def test_repetitions_are_recognised_for_as_long_as_the_settings_say(bench: RedisBench) -> None:
    """Every id of an event is remembered for `seen_ms`, then it is forgotten."""
    bench.store.limits = StoreLimits(seen_ms=80_000)
    await bench.store.append(0, [Draft("e-1", b"", ("s-1",))], bench.now(), "c-1")
    for seen in ("e-1", "s-1"):
        assert 0 < await pttl(bench, KEYS.seen_prefix + seen) <= 80_000
    await bench.link.commands.delete(KEYS.seen_prefix + "e-1", KEYS.seen_prefix + "s-1")
    (appended,) = await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-2")
    assert appended.accepted


async def test_streams_out_are_bounded(bench: RedisBench) -> None:
    """Event lane and replies keep about as much as the settings say, the newest; the audit keeps everything."""
    bench.store.limits = StoreLimits(updates_max=100, replies_max=100)
    for number in range(40):
        updates = [Announce("timer.extended", "a", number, b"{}") for _ in range(10)]
        answers = [Reply("inbox-1", "APPLIED", f"c-{number}", b"{}") for _ in range(10)]
        await commit(bench, *updates, *answers)
    length = bench.link.commands.xlen
    # Redis trims whole nodes of 100 entries.
    assert 100 <= await length(KEYS.updates) <= 200
    assert 100 <= await length(replies("inbox-1")) <= 200
    assert await length(KEYS.audit) == 40
    entries = (await bench.store.read_updates({0: START}, 1_000, 0))[0]
    assert entries[-1].version == 39


async def test_an_update_with_missing_fields_is_read(bench: RedisBench) -> None:
    """An entry of the event lane that somebody else added does not stop its readers."""
    await bench.link.commands.xadd(KEYS.updates, {"type": "timer.started"})
    (entry,) = (await bench.store.read_updates({0: START}, 9, 0))[0]
    assert (entry.type, entry.auction_id, entry.version, entry.body) == ("timer.started", "", 0, b"{}")


@pytest.mark.requirement("R29")
@pytest.mark.parametrize(
    "fields",
    [
        {"at": "5", "id": "e-1"},
        {"id": "e-1", "at": "5", "body": "{}"},
        {"at": "-5", "id": "e-1", "body": "{}"},
        {"at": "5.5", "id": "e-1", "body": "{}"},
        {"at": "5", "id": "e-1", "body": "{}", "more": "x"},
    ],
)
async def test_an_entry_of_another_shape_is_poison(bench: RedisBench, fields: dict[str, str]) -> None:
    """Only what `append` writes has an arrival."""
    await bench.inject(0, **fields)
    (entry,) = (await bench.store.read_intake({0: START}, 9, 0))[0]
    assert entry.at is None
    assert all(value.encode() in entry.body for value in fields.values())


async def test_an_entry_that_is_no_text_is_read(bench: RedisBench) -> None:
    """An id in another encoding is no reason to stop."""
    await bench.link.commands.execute_command("XADD", KEYS.events, "*", "at", "5", "id", b"\xff\xfe", "body", b"\xff")
    (entry,) = (await bench.store.read_intake({0: START}, 9, 0))[0]
    assert (entry.at, entry.body) == (5, b"\xff")


# A server that is silent.


async def elapsed_ms(call: object) -> float:
    """How long a call took that ended with `StoreUnavailableError`."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        await call  # type: ignore[misc]
    return (time.monotonic() - began) * 1_000


@pytest.mark.requirement("R16")
async def test_an_append_to_a_frozen_server_can_be_repeated(bench: RedisBench, hasty: RedisStore) -> None:
    """It gives up at its deadline; the same command id later gives one event, however many tries reached the server."""
    await hasty.append(0, [Draft("e-0", b"")], bench.now(), "c-0")
    call = (0, [Draft("e-1", b""), Draft("e-2", b"")], bench.now(), "c-1")
    with bench.server.frozen():
        assert DEADLINE_MS <= await elapsed_ms(hasty.append(*call)) < DEADLINE_MS + ANSWER_MS + SLACK_MS
    answer = await bench.store.append(*call)
    assert [one.accepted for one in answer] == [True, True]
    assert await bench.store.append(*call) == answer
    entries = (await bench.store.read_intake({0: START}, 9, 0))[0]
    assert [entry.event_id for entry in entries] == ["e-0", "e-1", "e-2"]


@pytest.mark.requirement("R16")
async def test_a_commit_to_a_frozen_server_can_be_repeated(bench: RedisBench, hasty: RedisStore) -> None:
    """The same holds for a commit: once, whether a try was lost or only its answer."""
    batch = await batch_on(bench, *EVERYTHING, intake="7-0", versions={"a": 0})
    with bench.server.frozen():
        assert DEADLINE_MS <= await elapsed_ms(hasty.commit(batch)) < DEADLINE_MS + ANSWER_MS + SLACK_MS
    answer = await bench.store.commit(batch)
    assert isinstance(answer, Committed)
    assert await bench.store.commit(batch) == answer
    assert len(await bench.audit(0)) == 1
    assert len((await bench.store.read_updates({0: START}, 9, 0))[0]) == 1
    assert len(await bench.replies("inbox-1")) == 1
    head = await bench.store.head(0)
    assert (head.intake, head.chain) == ("7-0", batch.chain)


async def test_reads_of_a_frozen_server_give_up(bench: RedisBench, hasty: RedisStore) -> None:
    """Every kind of read ends with its deadline; a blocking one after the longest block."""
    with bench.server.frozen():
        reads = [hasty.head(0), hasty.timers(0, ["a"]), hasty.view(0, "a"), hasty.lease(0), hasty.claim(0, "b", None)]
        took = await asyncio.gather(*[elapsed_ms(read) for read in reads])
        assert max(took) < DEADLINE_MS + ANSWER_MS + SLACK_MS
        assert await elapsed_ms(hasty.publish({0: b"tick"})) < ANSWER_MS + SLACK_MS


async def test_the_clock_is_asked_once(bench: RedisBench, hasty: RedisStore) -> None:
    """A late answer is a bad sample, so asking for the time is not repeated."""
    assert await hasty.time_us() > 0
    with bench.server.frozen(), pytest.raises(RedisError):
        await hasty.time_us()
    assert hasty.link.retries == 0


async def first_error(store: RedisStore, heard: list[tuple[int, bytes]]) -> StoreUnavailableError:
    """What ends the tick lane of shard 0, and what is heard on it until then."""
    try:
        async with aclosing(store.ticks([0])) as lines:
            async for line in lines:
                heard.append(line)
    except StoreUnavailableError as error:
        return error
    raise AssertionError("the tick lane ended without an error")


async def test_a_frozen_server_ends_the_tick_lane_after_three_seconds(valkey_server: Server) -> None:
    """A server that is silent never tells its subscribers; three seconds without an answer to a ping do."""
    bench = RedisBench(valkey_server)
    heard: list[tuple[int, bytes]] = []
    listening = asyncio.create_task(first_error(bench.store, heard))
    await until(lambda: bench.listening(0))
    await bench.store.publish({0: b"tick"})
    await until(lambda: len(heard) == 1)
    with valkey_server.frozen():
        error = await asyncio.wait_for(listening, 3 + WITHIN_S)
    assert heard == [(0, b"tick")]
    assert "silent" in str(error)
    await bench.close()


async def test_a_quiet_tick_lane_is_not_a_silent_one(bench: RedisBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any tick the answers to the pings keep the subscription: a tick sent long after still comes."""
    monkeypatch.setattr(redis_module, "SILENCE_MAX_MS", 150)
    monkeypatch.setattr(redis_module, "PING_EVERY_S", 0.03)

    async def heard_late() -> tuple[int, bytes]:
        async with aclosing(bench.store.ticks([0])) as lines:
            listening = asyncio.ensure_future(anext(lines))
            await until(lambda: bench.listening(0))
            began = time.monotonic()
            await until(lambda: time.monotonic() - began > 0.5 or listening.done())
            if not listening.done():
                await bench.store.publish({0: b"late"})
            return await asyncio.wait_for(listening, WITHIN_S)

    for _ in range(4):  # a machine that stands still for so long is silent, too
        with suppress(StoreUnavailableError):
            assert await heard_late() == (0, b"late")
            return
    assert await heard_late() == (0, b"late")


async def test_a_lost_connection_ends_the_tick_lane(bench: RedisBench) -> None:
    """A subscription whose connection is closed is over: what was missed meanwhile cannot be known."""
    heard: list[tuple[int, bytes]] = []
    listening = asyncio.create_task(first_error(bench.store, heard))
    await until(lambda: bench.listening(0))
    bench.server.ask("CLIENT", "KILL", "TYPE", "pubsub")
    error = await asyncio.wait_for(listening, WITHIN_S)
    assert heard == []
    assert "tick lane" in str(error)


async def test_ticks_of_a_server_that_is_away(bench: RedisBench) -> None:
    """Neither listening nor sending waits for a server that is not there."""
    link = RedisLink("unix:///tmp/no-such-socket", SystemClock())
    store = RedisStore(link, SystemClock())
    heard: list[tuple[int, bytes]] = []
    await first_error(store, heard)
    assert heard == []
    with pytest.raises(StoreUnavailableError):
        await store.publish({0: b"tick"})
    await link.close()


# A server without memory.


@pytest.mark.requirement("R16")
@pytest.mark.parametrize("scripts", ["known", "flushed"])
async def test_closes_commit_without_memory(bench: RedisBench, hasty: RedisStore, scripts: str) -> None:
    """Out of memory, bids are refused, for they could not be kept; a close, a lease and a view still work."""
    await commit(bench, put("a", version=1))
    await bench.store.append(0, [Draft("e-0", b"")], bench.now(), "c-0")
    head = await bench.store.head(0)
    (e_0,) = (await bench.store.read_intake({0: START}, 9, 0))[0]
    close = await batch_on(
        bench,
        put("a", version=2),
        PlaceClosed("a", EpochMs(5)),
        Announce("timer.ended", "a", 2, b"{}"),
        due_at=head.last_at,
        intake=e_0.stream_id,
        versions={"a": 1},
    )
    lease = await bench.store.lease(0)
    with bench.server.configured("maxmemory", "1mb", "0"):
        if scripts == "flushed":
            bench.server.ask("SCRIPT", "FLUSH")
        draft = Draft("e-1", b"x" * 1_000)

        async def told() -> bool:
            with pytest.raises(StoreUnavailableError) as refused:
                await hasty.append(0, [draft], bench.now(), "c-1")
            return "memory" in str(refused.value)  # or, of a machine that stood still, that it did not answer

        await until(told)
        assert isinstance(await bench.store.commit(close), Committed)
        assert await bench.store.renew(0, "me", lease.epoch)
        assert (await bench.store.view(0, "a")).record == record("a", 2)
        await bench.store.release(0, "me", lease.epoch)
        taken = await bench.store.claim(0, "other", None)
        assert taken == Lease("other", lease.epoch + 1, 0)
    (appended,) = await bench.store.append(0, [draft], bench.now(), "c-1")
    assert appended.accepted
    assert isinstance(await bench.store.commit(replace(close, epoch=9)), Committed), "a repetition, and not done twice"
    assert len((await bench.store.read_updates({0: START}, 9, 0))[0]) == 1


# Across a restart.


async def test_everything_survives_a_restart(bench: RedisBench) -> None:
    """The append-only file brings the whole shard back: state, cursor, chain and marks of repetition."""
    await commit(bench, *EVERYTHING, intake="7-0")
    await bench.store.append(0, [Draft("e-1", b"")], bench.now(), "c-1")
    held = await bench.dump()
    bench.server.ask("DEBUG", "LOADAOF")
    assert await bench.dump() == held
