"""A stream with poison in it, through a real engine on a real server: every good event once, every bad one to be found."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
import pytest
from prometheus_client import CollectorRegistry

from engine.app import Engine
from engine.clock import SystemClock
from engine.contract.audit import verify
from engine.contract.cursors import START, stream_order
from engine.contract.keys import ShardKeys, shard_of
from engine.domain.instants import HOUR_MS
from engine.metrics import EngineMetrics
from engine.settings import Settings
from engine.store.link import RedisLink
from engine.store.protocol import Draft, Group
from engine.store.redis import RedisStore
from tests.contracts.stores import until
from tests.fakes.events import bid, poison, retry, start
from tests.servers import Server

EVENTS: Final = 10_000
EACH: Final = 20
"""Of each of five kinds of poison: one event in a hundred is bad."""
SHARDS: Final = 2
AUCTIONS: Final = [f"auction-{number}" for number in range(12)]
UNKNOWN: Final = [f"unknown-{number}" for number in range(4)]
CALL: Final = 250
"""Events per call, as a producer would send them."""
SEED: Final = 20_261_122


class Unstamped(str):
    """An entry that somebody adds behind the engine's back; its value."""


def stream(now: int) -> tuple[list[tuple[int, Draft | Unstamped]], dict[str, str]]:
    """The stream, each event with its shard; and of the bad ones that have an id of their own, the code they must get."""
    chance = random.Random(SEED)
    bad: dict[str, str] = {}
    found: list[tuple[int, Draft | Unstamped]] = []

    def add(code: str, auction_id: str, made: Draft) -> None:
        bad[made.event_id] = code
        found.append((shard_of(auction_id, SHARDS), made))

    for number in range(EACH):
        auction_id, unknown = chance.choice(AUCTIONS), chance.choice(UNKNOWN)
        add("SCHEMA_INVALID", auction_id, poison(f"no-json-{number}", b"\xff{" * (number + 1)))
        half = orjson.loads(bid(auction_id, "x").body) | {"detail": {"amount_minor": number}}
        add("SCHEMA_INVALID", auction_id, Draft(f"no-schema-{number}", orjson.dumps(half)))
        add("UNKNOWN_AUCTION", unknown, bid(unknown, f"unknown-{number}"))
        other = start(auction_id, now, now + 2 * HOUR_MS + number, event_id=f"conflict-{number}")
        add("CONFLICTING_REGISTRATION", auction_id, other)
        found.append((number % SHARDS, Unstamped(f"no stamp {number}")))
    while len(found) < EVENTS - len(AUCTIONS):
        auction_id = chance.choice(AUCTIONS)
        found.append((shard_of(auction_id, SHARDS), bid(auction_id, str(len(found)))))
    chance.shuffle(found)
    starts = [(shard_of(name, SHARDS), start(name, now, now + HOUR_MS)) for name in AUCTIONS]
    return [*starts, *found], bad


class Stage:
    """The server, the store, and what the engine left there."""

    def __init__(self, server: Server) -> None:
        self.settings = Settings(_env_file=None, redis_url=server.url, shards=SHARDS, heartbeat_ms=50)
        self.link = server.link()
        self.store = RedisStore(self.link, SystemClock())
        self.calls = 0

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[None]:
        """An engine in this process, stopped in order."""
        link = RedisLink(str(self.settings.redis_url), SystemClock())
        metrics = EngineMetrics(CollectorRegistry())
        store = RedisStore(link, SystemClock())
        working = asyncio.create_task(Engine(store, SystemClock(), self.settings, metrics, lambda: 0).run())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await link.close()

    async def send(self, events: list[tuple[int, Draft | Unstamped]]) -> None:
        """Events reach the intake, shard by shard in calls of many; unstamped ones where they stand among them."""
        for shard in range(SHARDS):
            call: list[Draft] = []
            for _, event in [one for one in events if one[0] == shard]:
                if isinstance(event, Draft):
                    call.append(event)
                else:
                    await self.append(shard, call)
                    call = []
                    await self.link.commands.xadd(ShardKeys.of(shard).events, {"surprise": event})
            await self.append(shard, call)

    async def append(self, shard: int, drafts: list[Draft], *, urgent: bool = False) -> None:
        """One call."""
        self.calls += 1
        if drafts:
            now = SystemClock().wall_ms()
            appended = await self.store.append(shard, drafts, now, f"call-{self.calls}", urgent=urgent)
            assert all(one.accepted for one in appended)

    async def applied(self) -> bool:
        """Whether every entry of every intake is applied."""
        for shard in range(SHARDS):
            # The cursor first: a commit that requeues moves it and adds entries in one step.
            cursor = (await self.store.head(shard)).intake
            entries = await self.link.commands.xrevrange(ShardKeys.of(shard).events, count=1)
            last = entries[0][0].decode() if entries else START
            if stream_order(cursor) < stream_order(last):
                return False
        return True

    async def audit(self, shard: int) -> list[dict[str, str]]:
        """The records of a shard."""
        found: list[dict[str, str]] = []
        behind = START
        while page := await self.store.audit_entries(shard, behind, 1_000):
            found += [entry.fields for entry in page]
            behind = page[-1].stream_id
        return found

    async def parked(self) -> dict[str, dict[str, Any]]:
        """Everything in troubleshooting, found as an operator finds it: by the list."""
        found = {}
        for shard in range(SHARDS):
            listed = await self.store.page(shard, Group.PARKED, None, 1_000)
            bodies = await self.store.parked_commands(shard, [at.auction_id for at in listed]) if listed else []
            for at, body in zip(listed, bodies, strict=True):
                assert body is not None
                found[at.auction_id] = orjson.loads(body) | {"shard": shard, "listed_at": at.score}
        return found


@pytest.fixture
async def stage(valkey_server: Server) -> AsyncIterator[Stage]:
    """A real, empty server."""
    made = Stage(valkey_server)
    try:
        yield made
    finally:
        await made.link.close()


@pytest.mark.integration
@pytest.mark.requirement("R29")
@pytest.mark.requirement("R30")
@pytest.mark.requirement("R32")
async def test_a_stream_with_poison_loses_and_doubles_nothing(stage: Stage) -> None:
    """10,000 events, one in a hundred bad, two engines one after the other: all good ones applied, all bad ones parked.

    Then the cause of one kind is removed and everything is retried: that kind is applied, the rest is back, tried twice.
    """
    events, bad = stream(SystemClock().wall_ms())
    assert len(events) == EVENTS
    async with stage.engine():
        await stage.send(events[: EVENTS // 2])
        await until(stage.applied, within_s=20)
        await stage.send(events[EVENTS // 2 :])  # the engine stops in the midst of these
    async with stage.engine():
        await until(stage.applied, within_s=20)
        await check_applied(stage, events, bad)
        parked = await check_parked(stage, bad)

        for shard in range(SHARDS):
            now = SystemClock().wall_ms()
            starts = [start(name, now, now + HOUR_MS) for name in UNKNOWN if shard_of(name, SHARDS) == shard]
            await stage.append(shard, starts)
            orders = [retry(name, f"order-{name}") for name in parked if parked[name]["shard"] == shard]
            await stage.append(shard, orders, urgent=True)
        await until(stage.applied, within_s=20)
    await check_retried(stage, bad, parked)


async def check_applied(stage: Stage, events: list[tuple[int, Draft | Unstamped]], bad: dict[str, str]) -> None:
    """Every good event has exactly one record, in a whole chain, and every bid was announced once."""
    good = {event.event_id for _, event in events if isinstance(event, Draft)} - set(bad)
    recorded: Counter[str] = Counter()
    announced = 0
    for shard in range(SHARDS):
        records = await stage.audit(shard)
        assert verify(records) is None
        recorded.update(record["event_id"] for record in records if record["event_id"])
        updates = (await stage.store.read_updates({shard: START}, EVENTS, 0))[shard]
        announced += sum(update.type == "bid.accepted" for update in updates)
    assert recorded == Counter(good)
    assert announced == len(good) - len(AUCTIONS)


async def check_parked(stage: Stage, bad: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every bad event is in troubleshooting, with its error, once; and nothing else is."""
    parked = await stage.parked()
    assert {name: command["error_code"] for name, command in parked.items() if name in bad} == bad
    unstamped = [command for name, command in parked.items() if name not in bad]
    assert {command["error_code"] for command in unstamped} == {"SCHEMA_INVALID"}
    assert sorted(command["payload"] for command in unstamped) == sorted(f"surprise no stamp {n}" for n in range(EACH))
    assert len(parked) == EVENTS // 100
    assert sum([await stage.store.parked(shard) for shard in range(SHARDS)]) == EVENTS // 100
    for command in parked.values():
        assert (command["attempts"], command["first_seen_at"]) == (1, command["listed_at"])
    return parked


async def check_retried(stage: Stage, bad: dict[str, str], before: dict[str, dict[str, Any]]) -> None:
    """What the removed cause had stopped is applied once; the others are back as they were, tried once more."""
    again = await stage.parked()
    assert set(again) == {name for name in before if bad.get(name) != "UNKNOWN_AUCTION"}
    for name, command in again.items():
        assert command == before[name] | {"attempts": 2, "error": command["error"]}
    records = [record for shard in range(SHARDS) for record in await stage.audit(shard)]
    facts = Counter((record["event_type"], record["event_id"]) for record in records)
    applied = [name for name in bad if bad[name] == "UNKNOWN_AUCTION"]
    assert [facts["bid_accepted", name] for name in applied] == [1] * EACH
    assert sum(times for (fact, _), times in facts.items() if fact == "OPERATOR_RETRY") == len(before)
    for shard in range(SHARDS):
        assert verify(await stage.audit(shard)) is None
