"""Operators' orders while engine, gateway and reconciler are killed: each is carried out once or not at all.

Commands are parked, then several operators at once retry, cancel and requeue them at random, often the same ones. What became
of every command is told by the audit log as it stands in Redis, by troubleshooting, by the intake and by what its producer
was answered; all of them must tell the same.
"""

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest

from engine.contract.keys import ShardKeys, shard_of
from tests.integration.events import bid, fresh_id, started
from tests.integration.records import (
    NUMBERS,
    SHARDS,
    assert_whole,
    drained,
    parked_in,
    records_of,
    replies_to,
    stream,
)
from tests.live import LiveStack, alive, until

pytestmark = pytest.mark.integration

CLIENTS: Final = 8
KILLS: Final = 6
AUCTIONS: Final = 7 * (KILLS + 1)
LOST_AUCTIONS: Final = 6
"""So many are never registered: a bid for one of them is parked again and again."""
BIDS: Final = 6
POISON: Final = 24
UNTIL_KILL: Final = (20, 150)
"""So many orders are answered before the next kill: most of those in flight are about what has just become possible."""
REQUEUED_MAX: Final = 10
ANSWERED_WITHIN_S: Final = 30.0
LONG_MS: Final = 3_600_000
ROLES: Final = ("engine", "gateway", "reconciler")
NO_OUTAGES: Final = {"AUCTION_TIMER_OUTAGE_EXTENSION_MS": "0"}
UNKNOWN, INVALID = "UNKNOWN_AUCTION", "SCHEMA_INVALID"
RETRY, CANCEL = "OPERATOR_RETRY", "OPERATOR_CANCEL"
PARKED, CANCELED = "IN_TROUBLESHOOTING_QUEUE", "CANCELED"


# The load.


@dataclass(frozen=True, slots=True)
class Command:
    """What was parked before anybody was killed."""

    command_id: str
    shard: int
    auction_id: str = ""
    """Empty for poison: it cannot be read."""
    reply_to: str = ""


@dataclass(slots=True)
class Order:
    """One request of an operator; several that were not answered may stand for one wish."""

    path: str
    body: dict[str, Any]
    command_id: str | None = None
    """None for a requeue, which names no command."""
    correlation_id: str = field(default_factory=lambda: f"ops-{uuid4().hex}")
    answer: httpx.Response | None = None

    @property
    def status(self) -> int | None:
        """None if there was no answer."""
        return None if self.answer is None else self.answer.status_code


@dataclass(slots=True)
class Desk:
    """What all operators together have asked, and what they were told."""

    stack: LiveStack
    commands: dict[str, Command]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    orders: list[Order] = field(default_factory=list)
    answered: int = 0
    hot: list[str] = field(default_factory=list)
    """What can be applied since a moment ago."""

    async def operator(self, seed: int) -> None:
        """One operator: orders whatever comes to its mind until the load is over."""
        chance = random.Random(seed)
        body = {"operator": f"op-{seed}"}
        async with httpx.AsyncClient(base_url=self.stack.url, trust_env=False, timeout=10) as http:
            while not self.over.is_set():
                what = chance.choices(["retry", "cancel", "requeue", "stranger"], [6, 2, 1, 0.3])[0]
                command_id = self._pick(chance) if what != "stranger" else f"e-{uuid4().hex}"
                if what == "requeue":
                    chosen = chance.choice([{}, {"error_code": UNKNOWN}, {"error_code": INVALID}])
                    limit = chance.randint(1, REQUEUED_MAX)
                    await self._insist(http, "requeue", None, body | chosen | {"limit": limit})
                elif what == "cancel":
                    await self._insist(http, "cancel", command_id, body | {"reason": f"why-{uuid4().hex}"})
                else:
                    await self._insist(http, "retry", command_id, body)

    def _pick(self, chance: random.Random) -> str:
        if not self.hot or chance.random() < 0.4:
            return chance.choice(list(self.commands))
        if chance.random() < 0.5:
            return chance.choice(self.hot)
        return self.hot[self.answered // CLIENTS % len(self.hot)]  # the same as the others

    async def _insist(self, http: httpx.AsyncClient, what: str, command_id: str | None, body: dict[str, Any]) -> None:
        """Order until it is answered, each time under another correlation id."""
        path = "/ops/troubleshooting/" + (what if command_id is None else f"{command_id}/{what}")
        give_up = time.monotonic() + ANSWERED_WITHIN_S
        while time.monotonic() < give_up:
            order = Order(path, body, command_id)
            self.orders.append(order)
            try:
                order.answer = await http.post(path, json=body, headers={"X-Correlation-Id": order.correlation_id})
                if order.status == 202:
                    await self._decided(http, order.answer.headers["location"], give_up)
            except httpx.TransportError:
                await asyncio.sleep(0.02)
                continue
            if order.status != 503:
                self.answered += 1
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{path} was not answered within {ANSWERED_WITHIN_S} s")

    @staticmethod
    async def _decided(http: httpx.AsyncClient, location: str, give_up: float) -> None:
        while time.monotonic() < give_up:
            found = await http.get(location)
            if found.status_code == 200 and found.json()["outcome"] != "PENDING":
                return
            assert found.status_code in {200, 503}, found.text
            await asyncio.sleep(0.02)
        raise AssertionError(f"{location} was not decided within {ANSWERED_WITHIN_S} s")

    async def register(self, auction_ids: list[str]) -> None:
        """From now on a bid for one of these is applied, if it is retried."""
        now = int(time.time() * 1_000)
        starts = [started(name, now - 1_000, now + LONG_MS, soft_close_window_ms=0) for name in auction_ids]

        def taken() -> bool:
            try:
                return self.stack.http.post("/events", json=starts).status_code == 202
            except httpx.TransportError:
                return False

        await asyncio.to_thread(until, taken, "a gateway takes the starts")
        self.hot = [each.command_id for each in self.commands.values() if each.auction_id in auction_ids]

    async def kill(self, chance: random.Random, auction_ids: list[str]) -> Counter[str]:
        """Kill one process after the other, each while the bids for a few more auctions are retried; how often which."""
        killed: Counter[str] = Counter()
        pids: set[int] = set()
        for number in range(KILLS + 1):
            role = ROLES[number] if number < len(ROLES) else chance.choices(ROLES, (5, 2, 2))[0]
            await self.register(auction_ids[number :: KILLS + 1])
            wanted = self.answered + chance.randint(*UNTIL_KILL)

            def fresh(role: str = role, wanted: int = wanted) -> bool:
                return self.answered >= wanted and any(pid not in pids and alive(pid) for pid in self.stack.pids(role))

            await asyncio.to_thread(until, fresh, f"a {role} runs, and orders are answered")
            if number < KILLS:
                pids.add(await asyncio.to_thread(self.stack.kill, role))
                killed[role] += 1
        return killed


def listed(stack: LiveStack) -> dict[str, dict[str, Any]]:
    """What is in troubleshooting, by command id."""
    found = parked_in(stack)
    by_id = {command["command_id"]: command for command in found}
    assert len(by_id) == len(found)
    return by_id


def park(stack: LiveStack, auction_ids: list[str]) -> dict[str, Command]:
    """Bids for auctions that nobody knows, some with a `reply_to`, and entries that nobody can read."""
    commands: dict[str, Command] = {}
    for auction_id in auction_ids:
        inbox = f"inbox-{uuid4().hex}"
        bids = [bid(auction_id, **({"reply_to": inbox} if number % 2 else {})) for number in range(BIDS)]
        stack.post(*bids)
        for each in bids:
            told = each["data"].get("reply_to", "")
            commands[each["id"]] = Command(each["id"], shard_of(auction_id, SHARDS), auction_id, told)
    for number in range(POISON):
        poison = Command(f"poison-{uuid4().hex}", number % SHARDS)
        key, at = ShardKeys.of(poison.shard).events, str(10**12 + number)
        stack.redis("XADD", key, "*", "at", at, "id", poison.command_id, "body", "{spoiled")
        commands[poison.command_id] = poison
    until(lambda: listed(stack).keys() == commands.keys(), "everything is in troubleshooting")
    return commands


# The judgement.


@dataclass(slots=True)
class Log:
    """The audit log as it stands in the streams of Redis; nothing was trimmed yet."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """Of one shard after the other, in order."""
    orders: defaultdict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """Per command what operators did with it."""
    accepted: Counter[str] = field(default_factory=Counter)
    """How often which bid was accepted, by its event id."""

    def take(self, stack: LiveStack, shard: int) -> None:
        """Read a shard's chain, which must be whole up to its head."""
        keys = ShardKeys.of(shard)
        chain: list[dict[str, Any]] = []
        for entry in stream(stack, keys.audit):
            del entry["stream_id"]
            numbers = {name: int(entry[name]) for name in NUMBERS if entry[name]}
            chain.append(entry | numbers | {"details": json.loads(entry["details"]), "shard": shard})
        assert_whole(chain)
        seq, head = stack.redis("HMGET", keys.cursor, "seq", "hash")
        assert int(seq or 0) == len(chain)
        assert not chain or head.decode() == chain[-1]["hash"]
        self.records += chain
        for record in chain:
            if record["event_type"] in {RETRY, CANCEL}:
                self.orders[record["details"]["command_id"]].append(record)
            self.accepted[record["event_id"]] += record["event_type"] == "bid_accepted"


def judge(desk: Desk, seen_first: dict[str, dict[str, Any]]) -> None:
    """Hold the log, troubleshooting, the intake and all answers against each other."""
    stack = desk.stack
    until(lambda: stack.http.get("/readyz").status_code == 200 and drained(stack), "everything is applied")
    log = Log()
    entered: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for shard in range(SHARDS):
        log.take(stack, shard)
        for entry in stream(stack, ShardKeys.of(shard).events):
            entered[entry["id"]].append((entry.get("attempts", "0"), entry.get("first_seen_at", "")))
    judge_routes(stack, log)
    parked = listed(stack)
    assert parked.keys() <= desk.commands.keys()
    assert stack.http.get("/ops/troubleshooting").json()["depth"] == len(parked)
    assert log.orders.keys() <= desk.commands.keys()
    told = outcomes_told(stack, desk)
    places: Counter[str] = Counter()
    for command in desk.commands.values():
        first_seen = seen_first[command.command_id]["first_seen_at"]
        places[judge_command(stack, log, command, parked.get(command.command_id), first_seen, told)] += 1
        # What enters again does so with its past, once per record.
        again = [(str(number), str(first_seen)) for number in range(1, len(entered[command.command_id]))]
        assert entered[command.command_id] == [("0", ""), *again]
        assert len(again) == sum(each["event_type"] == RETRY for each in log.orders[command.command_id])
    statuses = judge_orders(desk, log)
    again = sum(parked[name]["attempts"] > 1 for name in parked)
    print(f"places={dict(places)} parked_again={again} answers={dict(statuses)}")
    assert set(places) == {"parked", "canceled", "applied"}
    assert again > 0
    assert {200, 404, 409} <= statuses.keys()


def judge_routes(stack: LiveStack, log: Log) -> None:
    """`/auctions/{id}/audit` shows the same records, operators' orders among them."""
    of_auctions: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in log.records:
        of_auctions[record["auction_id"]].append(record)
    del of_auctions[""]  # poison names none
    for auction_id, records in of_auctions.items():
        assert [each["hash"] for each in records_of(stack, auction_id)] == [each["hash"] for each in records]


def outcomes_told(stack: LiveStack, desk: Desk) -> defaultdict[str, list[str]]:
    """What producers were answered, per command, in order."""
    told: defaultdict[str, list[str]] = defaultdict(list)
    for reply_to in {each.reply_to for each in desk.commands.values() if each.reply_to}:
        for reply in replies_to(stack, reply_to):
            told[reply["command_id"]].append(reply["outcome"])
    return told


def judge_command(
    stack: LiveStack,
    log: Log,
    command: Command,
    parked: dict[str, Any] | None,
    first_seen_at: int,
    told: dict[str, list[str]],
) -> str:
    """A command is in exactly one place, every order on the way there took it one attempt further; which place."""
    orders = log.orders[command.command_id]
    kinds = [record["event_type"] for record in orders]
    retries = kinds.count(RETRY)
    for number, record in enumerate(orders, start=1):
        assert (record["auction_id"], record["prev_status"]) == (command.auction_id, PARKED)
        assert record["new_status"] == ("RETRIED" if record["event_type"] == RETRY else CANCELED)
        assert record["details"]["attempts"] == number
    accepted = log.accepted[command.command_id]
    assert (parked is not None) + kinds.count(CANCEL) + accepted == 1, (command, parked, kinds, accepted)
    if parked is not None:
        place, outcome, failed = "parked", PARKED, retries + 1
        assert (parked["attempts"], parked["first_seen_at"]) == (failed, first_seen_at)
        assert parked["error_code"] == (UNKNOWN if command.auction_id else INVALID)
    elif accepted:
        place, outcome, failed = "applied", "APPLIED", retries
        assert retries > 0
    else:
        place, outcome, failed = "canceled", CANCELED, retries + 1
        assert kinds[-1] == CANCEL
    assert stack.http.get(f"/commands/{command.command_id}").json()["outcome"] == outcome
    if command.reply_to:
        assert told[command.command_id] == [PARKED] * failed + ([outcome] if parked is None else [])
    return place


def judge_orders(desk: Desk, log: Log) -> Counter[int | None]:
    """Every 200 has its record, every 409 and 404 none, the rest at most one and what `/commands` says; how many of each."""
    done: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for records in log.orders.values():
        for record in records:
            done[record["correlation_id"]].append(record)
    written = [record["event_id"] for records in done.values() for record in records]
    assert len(set(written)) == len(written)  # never two for one order
    assert done.keys() <= {order.correlation_id for order in desk.orders}
    statuses: Counter[int | None] = Counter()
    for order in desk.orders:
        statuses[order.status] += 1
        found = done[order.correlation_id]
        for record in found:
            assert record["event_type"] == (CANCEL if order.path.endswith("/cancel") else RETRY)
            assert record["actor_id"] == record["details"]["operator"] == order.body["operator"]
            assert record["details"]["reason"] == order.body.get("reason")
        if order.command_id is None:
            judge_requeue(order, found)
        else:
            assert order.status in {200, 202, 404, 409, 503, None}
            assert [record["details"]["command_id"] for record in found] in ([], [order.command_id])
            judge_order(desk, order, len(found))
    return statuses


def judge_order(desk: Desk, order: Order, done: int) -> None:
    """What an operator was told of one command is what was recorded."""
    if order.answer is None:
        return
    told = order.answer.json()
    if order.status == 200:
        assert done == 1
        assert told["command_id"] == order.command_id
        assert told["status"] == (CANCELED if order.path.endswith("/cancel") else "RETRIED")
    elif order.status in {404, 409}:
        assert done == 0
        assert told["error_code"] == ("RESOURCE_NOT_FOUND" if order.status == 404 else "INVALID_OPERATION")
        assert (order.status == 409) == (order.command_id in desk.commands)
    elif "command_id" in told:
        found = desk.stack.http.get(f"/commands/{told['command_id']}")
        assert order.status == 503 or found.status_code == 200
        outcome = found.json()["outcome"] if found.status_code == 200 else None
        assert (outcome, done) in {("APPLIED", 1), ("REFUSED", 0), (None, 0)}
    else:
        assert done == 0


def judge_requeue(order: Order, found: list[dict[str, Any]]) -> None:
    """Each of the commands that were sent round was so once, and those that were counted were."""
    names = [record["details"]["command_id"] for record in found]
    assert len(set(names)) == len(names) <= order.body["limit"]
    assert order.status in {200, 503, None}
    if order.answer is not None and order.status == 200:
        counts = order.answer.json()
        assert counts["requeued"] <= len(names) <= counts["requeued"] + counts["pending"]


@pytest.mark.requirement("R29", "R30", "R32", "B7")
async def test_killing_engine_gateway_and_reconciler_carries_every_order_out_once(short_tmp: Path) -> None:
    """Every parked command is still parked, canceled or applied, and nothing else, by exactly the orders on record."""
    seed = random.randrange(2**32)
    print(f"SEED={seed}")
    stack = await asyncio.to_thread(LiveStack, short_tmp, env=NO_OUTAGES)
    try:
        auction_ids = [fresh_id() for _ in range(AUCTIONS)]
        lost = [fresh_id() for _ in range(LOST_AUCTIONS)]
        desk = Desk(stack, await asyncio.to_thread(park, stack, auction_ids + lost))
        seen_first = await asyncio.to_thread(listed, stack)
        operators = [asyncio.create_task(desk.operator(seed + number)) for number in range(CLIENTS)]
        killed = await desk.kill(random.Random(seed), auction_ids)
        desk.over.set()
        await asyncio.gather(*operators)
        assert sum(killed.values()) == KILLS
        assert set(killed) == set(ROLES)
        print(f"killed={dict(killed)}")
        await asyncio.to_thread(judge, desk, seen_first)
    finally:
        await asyncio.to_thread(stack.stop)
