"""Tests for reconciler.forwarder: a real store, a real receiver that fails on purpose, and no waiting between attempts."""

import asyncio
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine.clock import SystemClock
from engine.contract.keys import ShardKeys
from engine.settings import Settings
from engine.store.forwarder import ForwarderStore
from engine.store.link import RedisLink
from engine.store.redis import RedisStore
from reconciler.forwarder import BACKOFF_MAX_S, RETRY_AFTER_MAX_S, Forwarder
from reconciler.metrics import ReconcilerMetrics
from reconciler.webhook import IN_FLIGHT_MAX, Webhook
from tests.contracts.stores import until
from tests.reconciler.webhook_server import Answer, WebhookServer
from tests.servers import Server

pytestmark = pytest.mark.integration

SECRET = "sesame-sesame-sesame"
SHARDS = 2
LEASE_MS = 1_200
WITHIN_S = 20.0


class Running:
    """A forwarder at work."""

    def __init__(self, bench: "Bench", link: RedisLink, settings: Settings) -> None:
        self.link = link
        self.waits: list[float] = []
        self.registry = CollectorRegistry()
        clock = SystemClock()
        store = RedisStore(link, clock)
        webhook = Webhook(bench.server.url, SECRET, clock, attempt_s=bench.attempt_s)
        metrics = ReconcilerMetrics(self.registry)
        self.forwarder = Forwarder(ForwarderStore(link), store, webhook, clock, settings, metrics, sleep=self._sleep)
        self.task = asyncio.create_task(self.forwarder.run())

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(0)

    def count(self, outcome: str) -> float:
        """Of the deliveries."""
        return self.registry.get_sample_value("auctions_webhook_deliveries_total", {"outcome": outcome}) or 0.0

    @property
    def lag(self) -> float | None:
        """Entries not passed yet."""
        return self.registry.get_sample_value("auctions_webhook_lag_events")

    async def holds(self, shards: int = SHARDS) -> None:
        """Wait until it holds so many shards, each with its place."""

        async def placed() -> bool:
            names = [ShardKeys.of(shard).forwarder for shard in self.forwarder.leases.epochs]
            return len(names) == shards and all([await self.link.commands.hexists(name, "cursor") for name in names])

        await until(placed, within_s=WITHIN_S)

    async def stop(self) -> None:
        """As the role does."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


class Bench:
    """A store, a receiver, and forwarders between the two."""

    def __init__(self, valkey: Server, server: WebhookServer, link: RedisLink) -> None:
        self.valkey = valkey
        self.server = server
        self.link = link
        self.attempt_s = 5.0
        self.stack = AsyncExitStack()
        self._instances = 0

    async def start(self, **settings: Any) -> Running:
        """Another forwarder, with connections of its own."""
        self._instances += 1
        link = RedisLink(self.valkey.url, SystemClock(), call_deadline_ms=500)
        chosen: dict[str, Any] = {
            "shards": SHARDS,
            "instance": f"forwarder-{self._instances}",
            "lease_ms": LEASE_MS,
            "heartbeat_ms": 100,
            "webhook_types": ["*"],
        }
        running = Running(self, link, Settings(_env_file=None, **(chosen | settings)))
        self.stack.push_async_callback(link.close)
        self.stack.push_async_callback(running.stop)
        return running

    async def announce(self, auction_id: str = "auction-1", kind: str = "timer.extended", *, shard: int = 0) -> str:
        """Add an entry to the event lane, as a commit does; the id under which the receiver will know it."""
        body = orjson.dumps({"type": kind, "auction_id": auction_id, "occurred_at": 1_700_000_000_000})
        fields = ("type", kind, "auction_id", auction_id, "version", "1", "body", body)
        added = await self.link.commands.execute_command("XADD", ShardKeys.of(shard).updates, "*", *fields)
        return f"{shard}-{added.decode()}"

    async def cursor(self, shard: int = 0) -> str:
        """The committed place of a shard."""
        return str((await self.link.commands.hget(ShardKeys.of(shard).forwarder, "cursor") or b"").decode())

    async def undelivered(self, shard: int = 0) -> list[dict[str, bytes]]:
        """What was put aside."""
        rows = await self.link.commands.xrange(ShardKeys.of(shard).undelivered)
        return [{name.decode(): value for name, value in fields.items()} for _, fields in rows]

    async def received(self, *ids: str) -> None:
        """Wait until the receiver has been offered all of these."""
        await until(lambda: set(ids) <= set(self.server.ids), within_s=WITHIN_S)


@pytest.fixture
async def bench(valkey_server: Server) -> AsyncIterator[Bench]:
    """An empty store, a receiver that takes everything."""
    async with WebhookServer() as server:
        link = valkey_server.link()
        made = Bench(valkey_server, server, link)
        try:
            async with made.stack:
                yield made
        finally:
            await link.close()


# Forwarding.


async def test_events_are_posted_in_order(bench: Bench) -> None:
    """Each once, as CloudEvents, in the order of its shard, and the place is committed behind the last."""
    running = await bench.start()
    await running.holds()
    ids = [await bench.announce(f"auction-{number % 3}") for number in range(100)]
    await bench.received(*ids)
    assert bench.server.ids == ids
    assert [request.event["id"] for request in bench.server.requests] == ids
    assert {request.event["subject"] for request in bench.server.requests} == {"auction-0", "auction-1", "auction-2"}
    await until(lambda: running.lag == 0)
    assert f"0-{await bench.cursor()}" == ids[-1]
    assert running.count("delivered") == 100


async def test_an_event_is_posted_when_it_happens(bench: Bench) -> None:
    """A forwarder at rest is woken by the lane, not by its next look: a hundred events one by one take no second each."""
    running = await bench.start()
    await running.holds()
    async with asyncio.timeout(WITHIN_S):
        for _ in range(100):
            await bench.received(await bench.announce())


async def test_a_new_webhook_begins_at_the_end(bench: Bench) -> None:
    """It is not flooded with what happened before it was set up."""
    await bench.announce()
    with capture_logs() as logs:
        running = await bench.start()
        await running.holds()
        fresh = await bench.announce()
        await bench.received(fresh)
    assert bench.server.ids == [fresh]
    assert sum(line["event"] == "forwarding_begins" for line in logs) == SHARDS


async def test_only_the_types_that_are_wanted_are_posted(bench: Bench) -> None:
    """The others are passed over, and do not hold the place back."""
    running = await bench.start(webhook_types=["offers.*", "timer.ended"])
    await running.holds()
    for kind in (
        "timer.started",
        "offers.cancelled",
        "bid.accepted",
        "timer.ended",
        "timer.endedness",
        "timer.closing",
    ):
        last = await bench.announce(kind=kind)
    await until(lambda: running.lag == 0 and len(bench.server.requests) == 2)
    assert [request.event["type"] for request in bench.server.requests] == ["offers.cancelled", "timer.ended"]
    await until(lambda: _is(bench.cursor(), last.removeprefix("0-")))


async def _is(value: Any, expected: str) -> bool:
    return bool(await value == expected)


async def test_one_shard_does_not_wait_for_another(bench: Bench) -> None:
    """While the receiver sits on an event of one shard, those of the other are delivered."""
    release = asyncio.Event()
    running = await bench.start()
    await running.holds()
    bench.server.answers.append(Answer(after=release))
    slow = await bench.announce(shard=0)
    await bench.received(slow)
    ids = [await bench.announce(shard=1) for _ in range(20)]
    await bench.received(*ids)
    behind = await bench.announce(shard=0)
    await asyncio.sleep(0)
    assert behind not in bench.server.ids
    release.set()
    await bench.received(behind)


async def test_attempts_at_a_time_are_bounded_over_all_shards(bench: Bench) -> None:
    """A slow receiver sees a bounded number of connections, and gets everything."""
    shards = IN_FLIGHT_MAX + 8
    release = asyncio.Event()
    bench.server.otherwise = lambda _: Answer(after=release)
    running = await bench.start(shards=shards)
    await running.holds(shards)
    ids = [await bench.announce(shard=shard) for shard in range(shards)]
    await until(lambda: bench.server.in_flight == IN_FLIGHT_MAX)
    release.set()
    await bench.received(*ids)
    assert bench.server.in_flight_most == IN_FLIGHT_MAX


# Failing.


async def test_a_receiver_that_fails_is_tried_again(bench: Bench) -> None:
    """Errors, silence, hanging up before and in the body: the event comes again under its id until it is taken."""
    bench.attempt_s = 1.0
    never = asyncio.Event()
    bench.server.answers.extend(
        [Answer(500), Answer(after=never), Answer(hang_up=True), Answer(503, body=b"sorry, not now", cut=True)]
    )
    running = await bench.start()
    await running.holds()
    first, second = await bench.announce(), await bench.announce()
    await bench.received(first, second)
    assert bench.server.ids == [first] * 5 + [second]
    await until(lambda: running.count("delivered") == 2)  # it counts when it has read the answer
    assert (running.count("retried"), running.count("delivered")) == (4, 2)
    assert await bench.undelivered() == []


async def test_each_attempt_waits_longer(bench: Bench) -> None:
    """From half a second, doubling up to a minute, each with its own chance; altogether some minutes, not hours."""
    bench.server.answers.extend(Answer(500) for _ in range(12))
    running = await bench.start()
    await running.holds()
    await bench.announce()
    await until(lambda: running.count("delivered") == 1)
    assert len(running.waits) == 12
    for number, wait in enumerate(running.waits):
        full = min(BACKOFF_MAX_S, 0.5 * 2**number)
        assert 0.75 * full <= wait <= full
    assert len(set(running.waits)) == 12


async def test_a_receiver_may_ask_for_a_pause(bench: Bench) -> None:
    """`Retry-After` counts if it is longer than the own pause, and is bounded."""
    bench.server.answers.extend(
        [Answer(429, {"Retry-After": "17"}), Answer(503, {"Retry-After": "86400"}), Answer(429, {"Retry-After": "0"})]
    )
    running = await bench.start()
    await running.holds()
    await bench.announce()
    await until(lambda: running.count("delivered") == 1)
    assert running.waits[:2] == [17.0, RETRY_AFTER_MAX_S]
    assert 1.5 <= running.waits[2] <= 2.0


async def test_what_is_never_taken_is_put_aside(bench: Bench) -> None:
    """After the last attempt, with its last error; it is logged and counted, and the next event has its turn."""
    bench.server.answers.extend([Answer(500), Answer(500), Answer(418)])
    running = await bench.start(webhook_attempts_max=3)
    await running.holds()
    with capture_logs() as logs:
        poison, good = await bench.announce("poison"), await bench.announce("good")
        await bench.received(good)
    assert bench.server.ids == [poison] * 3 + [good]
    (aside,) = await bench.undelivered()
    assert aside["event_id"].decode() == poison
    assert (aside["type"], aside["auction_id"], aside["version"]) == (b"timer.extended", b"poison", b"1")
    assert (aside["attempts"], aside["error"]) == (b"3", b"HTTP 418")
    assert orjson.loads(aside["body"])["auction_id"] == "poison"
    assert (running.count("retried"), running.count("undelivered")) == (2, 1)
    assert [line["event_id"] for line in logs if line["event"] == "event_undelivered"] == [poison]


async def test_a_receiver_that_is_gone_is_not_asked_again(bench: Bench) -> None:
    """410 puts the event aside at once."""
    bench.server.answers.append(Answer(410))
    running = await bench.start()
    await running.holds()
    gone, good = await bench.announce(), await bench.announce()
    await bench.received(good)
    assert bench.server.ids == [gone, good]
    assert [aside["event_id"].decode() for aside in await bench.undelivered()] == [gone]


async def test_an_entry_that_is_not_ours_is_put_aside(bench: Bench) -> None:
    """Somebody else's writing on the lane is never posted in our name, and holds nothing up."""
    running = await bench.start()
    await running.holds()
    await bench.link.commands.xadd(ShardKeys.of(0).updates, {"type": "timer.ended", "body": "no json"})
    good = await bench.announce()
    await bench.received(good)
    assert bench.server.ids == [good]
    assert [aside["attempts"] for aside in await bench.undelivered()] == [b"0"]


async def test_no_secret_is_logged_or_kept(bench: Bench) -> None:
    """Neither the signing secret nor the password or the path of the URL, whatever goes wrong."""
    bench.attempt_s = 1.0
    never = asyncio.Event()
    bench.server.answers.extend(
        [
            Answer(500),
            Answer(307, {"Location": bench.server.url}),
            Answer(after=never),
            Answer(hang_up=True),
            Answer(410),
        ]
    )
    with capture_logs() as logs:
        running = await bench.start()
        await running.holds()
        await bench.announce()
        await until(lambda: running.count("undelivered") == 1)
        await until(lambda: running.lag == 0)
    kept = repr((logs, await bench.undelivered()))
    assert "http://127.0.0.1" in kept
    assert not re.search("path-secret|pass-word|sesame", kept)


# Takeovers, and faults of the store.


async def test_two_of_them_do_not_both_post(bench: Bench) -> None:
    """The second holds nothing while the first lives, and takes over at once when it stops."""
    first = await bench.start()
    await first.holds()
    second = await bench.start()
    ids = [await bench.announce() for _ in range(30)]
    await bench.received(*ids)
    assert second.forwarder.leases.epochs == {}
    await until(lambda: first.lag == 0)
    await first.stop()
    await second.holds()
    more = [await bench.announce() for _ in range(30)]
    await bench.received(*more)
    assert bench.server.ids == ids + more


async def test_a_dead_one_is_followed_by_another(bench: Bench) -> None:
    """Its lease stands still; what it had in flight comes again, what it had committed does not."""
    first = await bench.start()
    await first.holds()
    done = await bench.announce()
    await until(lambda: _is(bench.cursor(), done.removeprefix("0-")))
    never = asyncio.Event()
    bench.server.answers.append(Answer(after=never))
    in_flight, waiting = await bench.announce(), await bench.announce()
    await bench.received(in_flight)
    # It dies: no lease is given back.
    first.forwarder.leases.epochs.clear()
    await first.stop()
    second = await bench.start()
    await second.holds()
    await bench.received(waiting)
    assert bench.server.ids == [done, in_flight, in_flight, waiting]


async def test_one_that_was_asleep_moves_nothing(bench: Bench) -> None:
    """Its delivery ends after another has taken over: its commit is refused, and it lets the shard go."""
    release = asyncio.Event()
    first = await bench.start()
    await first.holds()
    bench.server.answers.append(Answer(after=release))
    event = await bench.announce()
    await bench.received(event)
    # Another one claims the shard, with whatever right, and its place stays where it is.
    name = ShardKeys.of(0).forwarder
    before = await bench.cursor()
    await bench.link.commands.hset(name, mapping={"holder": "other", "beat": "7"})
    await bench.link.commands.hincrby(name, "epoch", 1)
    release.set()
    await until(lambda: 0 not in first.forwarder.leases.epochs, within_s=WITHIN_S)
    assert await bench.cursor() == before
    # Nobody beats for the other, so the shard comes back, and with it the event.
    await first.holds()
    await until(lambda: bench.server.ids == [event, event], within_s=WITHIN_S)


async def test_whoever_lost_a_shard_stops_trying(bench: Bench) -> None:
    """Also in the middle of its attempts: nobody is offered an event by two forwarders for longer than a moment."""
    bench.server.otherwise = lambda _: Answer(500)
    running = await bench.start(shards=1, webhook_attempts_max=1_000)
    await running.holds(1)
    await bench.announce()
    await until(lambda: len(bench.server.requests) > 3)
    lost = running.forwarder._tasks[0]
    await bench.link.commands.hset(ShardKeys.of(0).forwarder, mapping={"holder": "other", "beat": "7"})
    await until(lambda: lost.done(), within_s=WITHIN_S)
    assert lost.cancelled()
    assert len(bench.server.requests) < 900


async def test_events_that_were_trimmed_are_counted_as_lost(bench: Bench) -> None:
    """A forwarder that was away for longer than the lane is kept goes on at the oldest, and says how many it missed."""
    first = await bench.start()
    await first.holds()
    await first.stop()
    ids = [await bench.announce() for _ in range(10)]
    await bench.link.commands.execute_command("XTRIM", ShardKeys.of(0).updates, "MAXLEN", "=", 4)
    with capture_logs() as logs:
        second = await bench.start()
        await bench.received(*ids[6:])
    assert bench.server.ids == ids[6:]
    assert second.count("lost") == 6
    assert [line["events"] for line in logs if line["event"] == "events_trimmed_before_forwarded"] == [6]


async def test_events_that_are_trimmed_meanwhile_are_counted_as_lost(bench: Bench) -> None:
    """The same for one that is held up by its receiver: what it has read is not lost, what it has not read is."""
    release = asyncio.Event()
    bench.server.answers.append(Answer(after=release))
    running = await bench.start()
    await running.holds()
    stuck = await bench.announce()
    await bench.received(stuck)
    ids = [await bench.announce() for _ in range(10)]
    await bench.link.commands.execute_command("XTRIM", ShardKeys.of(0).updates, "MAXLEN", "=", 4)
    release.set()
    await bench.received(*ids[6:])
    assert bench.server.ids == [stuck, *ids[6:]]
    assert running.count("lost") == 6


async def test_a_failover_that_lost_a_suffix_takes_the_place_back(bench: Bench) -> None:
    """Cursor and lane roll back together: what is announced anew is posted, though the forwarder had been further."""
    running = await bench.start()
    await running.holds()
    kept = await bench.announce()
    await until(lambda: _is(bench.cursor(), kept.removeprefix("0-")))
    names = ShardKeys.of(0)
    lane, place = [await bench.link.commands.dump(name) for name in (names.updates, names.forwarder)]
    doomed = await bench.announce()
    await until(lambda: _is(bench.cursor(), doomed.removeprefix("0-")))
    for name, value in ((names.updates, lane), (names.forwarder, place)):
        await bench.link.commands.restore(name, 0, value, replace=True)
    again = await bench.announce()
    await bench.received(again)
    assert bench.server.ids == [kept, doomed, again]


async def test_a_lane_that_ends_before_the_place_is_followed_from_its_end(bench: Bench) -> None:
    """The lane alone was lost: the forwarder does not wait for ids that may never come."""
    running = await bench.start()
    await running.holds()
    await bench.link.commands.hset(ShardKeys.of(0).forwarder, "cursor", "99999999999999-0")
    with capture_logs() as logs:
        await until(lambda: any(line["event"] == "event_lane_went_back" for line in logs), within_s=WITHIN_S)
        fresh = await bench.announce()
        await bench.received(fresh)
    assert bench.server.ids == [fresh]


async def test_a_lane_that_was_made_anew_is_read_whole(bench: Bench) -> None:
    """Its count begins again, and nothing of it is taken for passed or lost."""
    running = await bench.start()
    await running.holds()
    await bench.received(*[await bench.announce() for _ in range(5)])
    await until(lambda: running.lag == 0)
    await bench.link.commands.delete(ShardKeys.of(0).updates)
    fresh = await bench.announce()
    await bench.received(fresh)
    await until(lambda: running.lag == 0)
    assert running.count("lost") == 0


async def test_a_store_that_is_away_costs_nothing(bench: Bench) -> None:
    """What was delivered while nobody could commit it is committed later, and not delivered again."""
    release = asyncio.Event()
    bench.server.answers.append(Answer(after=release))
    running = await bench.start()
    await running.holds()
    first, second = await bench.announce(), await bench.announce()
    await bench.received(first)
    with capture_logs() as logs, bench.valkey.frozen():
        release.set()
        await until(lambda: any(line["event"] == "forwarder_not_committed" for line in logs), within_s=WITHIN_S)
    await bench.received(second)
    assert bench.server.ids == [first, second]


KILLS = 6
PROGRAM = """
import asyncio
from prometheus_client import CollectorRegistry
from engine.settings import Settings
from reconciler.app import serve
asyncio.run(serve(Settings.load(), CollectorRegistry()))
"""


async def test_killing_it_loses_nothing(bench: Bench, tmp_path: Path) -> None:
    """SIGKILL at any instant, under a stream of events: each is delivered, in order, and twice only what was in flight."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")} | {
        "AUCTION_TIMER_REDIS_URL": bench.valkey.url,
        "AUCTION_TIMER_SHARDS": "1",
        "AUCTION_TIMER_DATA_DIR": str(tmp_path),
        "AUCTION_TIMER_INSTANCE": "killed-again-and-again",
        "AUCTION_TIMER_WEBHOOK_URL": bench.server.url,
        "AUCTION_TIMER_WEBHOOK_SECRET": SECRET,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    seed = random.randrange(2**32)
    print(f"SEED={seed}")
    chance = random.Random(seed)
    log = tmp_path / "log"
    ids: list[str] = []
    for life in range(KILLS + 1):
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PROGRAM, env=environment, cwd=tmp_path, stderr=stderr
            )
        try:
            await until(bench.cursor, within_s=WITHIN_S)
            enough = len(bench.server.requests) + chance.randint(1, 40)
            ids += [await bench.announce() for _ in range(40)]
            if life == KILLS:
                await bench.received(*ids)
            else:
                await until(lambda: len(bench.server.requests) >= enough, within_s=WITHIN_S)  # noqa: B023
        finally:
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
    assert list(dict.fromkeys(bench.server.ids)) == ids
    assert len(bench.server.ids) - len(ids) <= KILLS
    assert not re.search("path-secret|pass-word|sesame", log.read_text())
