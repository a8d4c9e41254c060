"""Engine, gateway and archiver are killed at random under a mixed load; afterwards the log alone must explain everything.

The reference is a replay: the intake streams, entry by entry, through the pure domain. What the processes wrote in spite of
being killed (timers, records, troubleshooting, answers) is compared with it.
"""

import asyncio
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest

from engine.contract.intake import IntakeEvent
from engine.contract.keys import ShardKeys, shard_of
from engine.contract.timers import TimerRecord, timer
from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.events import Cancel, InputEvent, Withdraw
from engine.domain.fold import elapse, fold, next_due
from engine.domain.instants import EpochMs
from engine.journal import ALWAYS_PARKED, peek
from engine.store.protocol import Entry
from tests.integration.events import bid, event, fresh_id, started
from tests.integration.records import SHARDS, assert_whole, drained, parked_in, records_of, stream
from tests.live import LiveStack, alive, until

pytestmark = pytest.mark.integration

CLIENTS: Final = 10
AUCTIONS: Final = 60
KILLS: Final = 8
BETWEEN_KILLS: Final = 20
"""So many answers at least: on a busy machine a process is killed later, not before it has done anything."""
ROLES: Final = ("engine", "gateway", "reconciler")
ROLE_WEIGHTS: Final = (5, 2, 3)
"""A gateway takes longest to come back, and without one there is no load."""
UPTIME_S: Final = (0.1, 1.2)
RETRY_WITHIN_S: Final = 30.0
LONG_MS: Final = 3_600_000
QUIET_MS: Final = 60_000
"""Longer than the judging takes."""
CORRECTED: Final = "auction_timer_corrected"
BY_TIME: Final = {Fact.STARTED, Fact.CLOSING, Fact.ENDED}
MOVING: Final = {"server_time", "remaining_ms", "cursor", "trace_id", "next_poll_ms"}


# The load.


QUIET_GUARD: Final = {"AUCTION_TIMER_AUDIT_RETAINED": "5", "AUCTION_TIMER_OUTAGE_EXTENSION_MS": "0"}
"""The outage guard is off: where a killed gateway is slow to come back it would give time that no replay knows of."""


@dataclass(slots=True)
class Asked:
    """A command over HTTP and its answer; None if there was none, or if it did not tell."""

    auction_id: str
    correlation_id: str
    answer: httpx.Response | None


@dataclass(slots=True)
class Load:
    """What all clients together have sent, and what they were told."""

    stack: LiveStack
    ids: list[str]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    arrivals: dict[str, int] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    poison: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """How many requests were answered so far, roughly."""
        return len(self.arrivals) + sum(asked.answer is not None for asked in self.asked)

    async def client(self, seed: int) -> None:
        """One client: starts a few auctions, then does whatever comes to its mind until the load is over."""
        chance = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.stack.url, trust_env=False, timeout=10) as http:
            for auction_id in self.ids[seed % CLIENTS :: CLIENTS]:
                await self._send(http, chance, self._start(chance, auction_id))
            while not self.over.is_set():
                await self._act(http, chance, chance.choice(self.ids))

    @staticmethod
    def _start(chance: random.Random, auction_id: str) -> dict[str, Any]:
        now = int(time.time() * 1_000)
        start = started(
            auction_id,
            now - 1_000,
            now + chance.choice([1_500, 4_000, 8_000, LONG_MS, LONG_MS]),
            soft_close_window_ms=chance.choice([0, 2_000, LONG_MS]),
            extension_ms=1_000,
            total_cap_ms=5_000,
        )
        start["data"] |= {"offer_id": f"o-{auction_id}", "amount_minor": 900, "auto_reject_threshold_minor": 500}
        return start

    async def _act(self, http: httpx.AsyncClient, chance: random.Random, auction_id: str) -> None:
        what = chance.choices(
            ["bid", "batch", "stranger", "pause", "resume", "event", "reschedule", "cancel", "offer", "poison"],
            [8, 2, 1, 4, 4, 3, 3, 0.4, 0.4, 0.5],
        )[0]
        if what == "bid":
            await self._send(http, chance, bid(auction_id))
        elif what == "batch":
            await self._send(http, chance, *(bid(chance.choice(self.ids)) for _ in range(20)))
        elif what == "stranger":
            await self._send(http, chance, bid(fresh_id()))
        elif what == "event":
            kinds = ["auctions.pause.requested", "auctions.resume.requested", "offers.cancellation.completed"]
            kind = chance.choices(kinds, [4, 4, 1])[0]
            extra = {"reply_to": f"load-{chance.randrange(4)}"} if chance.random() < 0.5 else {}
            if kind == kinds[2] and chance.random() < 0.5:
                extra["offer_id"] = f"o-{auction_id}"  # the auction id goes first
            await self._send(http, chance, event(kind, auction_id=auction_id, reason="by event", **extra))
        elif what == "reschedule":
            ends_at = int(time.time() * 1_000) + chance.choice([-1_000, 2_000, 4_000, 2 * LONG_MS])
            await self._send(http, chance, event("auctions.schedule.changed", auction_id=auction_id, ends_at=ends_at))
        elif what == "poison":
            await asyncio.to_thread(self._poison, auction_id)
        elif what == "offer":
            await self._ask(http, "PUT", f"/offers/o-{auction_id}/cancel", auction_id, {"reason_code": "other"})
        else:
            await self._ask(http, "POST", f"/auctions/{auction_id}/{what}", auction_id, {"reason": "asked"})

    async def _send(self, http: httpx.AsyncClient, chance: random.Random, *events: dict[str, Any]) -> None:
        """Post events until they are taken, always under the same ids, and now and then once more."""
        give_up = time.monotonic() + RETRY_WITHIN_S
        again = chance.random() < 0.1
        while time.monotonic() < give_up:
            try:
                answer = await http.post("/events", json=list(events))
            except httpx.TransportError:
                await asyncio.sleep(0.02)
                continue
            if answer.status_code == 503:
                await asyncio.sleep(0.02)
                continue
            assert answer.status_code == 202, answer.text
            for result in answer.json()["results"]:
                known = self.arrivals.setdefault(result["id"], result["arrival_ms"])
                assert result["arrival_ms"] == known
            if not again:
                return
            again = False
        raise AssertionError(f"no gateway took the events within {RETRY_WITHIN_S} s")

    async def _ask(
        self, http: httpx.AsyncClient, method: str, path: str, auction_id: str, body: dict[str, Any]
    ) -> None:
        """Ask once: a command over HTTP has no id until it is answered."""
        correlation_id = f"load-{uuid4().hex}"
        answer = None
        try:
            answer = await http.request(method, path, json=body, headers={"X-Correlation-Id": correlation_id})
        except httpx.TransportError:
            await asyncio.sleep(0.02)
        self.asked.append(Asked(auction_id, correlation_id, answer))

    def _poison(self, auction_id: str) -> None:
        name = f"poison-{uuid4().hex}"
        key = ShardKeys.of(shard_of(auction_id, SHARDS)).events
        self.stack.redis("XADD", key, "*", "at", str(10**12), "id", name, "body", "{spoiled")
        self.poison.append(name)


async def kill(stack: LiveStack, load: Load, chance: random.Random) -> Counter[str]:
    """Kill one process after the other, each at a random instant of its life and under load; how often which."""
    killed: Counter[str] = Counter()
    pids: set[int] = set()
    for number in range(KILLS):
        role = ROLES[number % 3] if number < 3 else chance.choices(ROLES, ROLE_WEIGHTS)[0]

        wanted = load.answered + BETWEEN_KILLS

        def fresh(role: str = role, wanted: int = wanted) -> bool:
            return load.answered >= wanted and any(pid not in pids and alive(pid) for pid in stack.pids(role))

        await asyncio.to_thread(until, fresh, f"a {role} runs, and the load goes on")
        await asyncio.sleep(chance.uniform(*UPTIME_S))
        pids.add(await asyncio.to_thread(stack.kill, role))
        killed[role] += 1
    return killed


# The reference.


@dataclass(slots=True)
class Replay:
    """The intake, through the pure domain."""

    auctions: dict[str, Auction] = field(default_factory=dict)
    history: defaultdict[str, list[tuple[Decision, str]]] = field(default_factory=lambda: defaultdict(list))
    """Per auction what happened, with the event that it was brought about by; none if it was time."""
    parked: set[str] = field(default_factory=set)
    entered: Counter[str] = field(default_factory=Counter)
    """How often which event id stands in the intake."""
    refused: dict[str, str] = field(default_factory=dict)
    """By correlation id: the error code."""

    def take(self, stack: LiveStack, shard: int) -> None:
        """Fold everything that reached a shard, in its order."""
        for fields in stream(stack, ShardKeys.of(shard).events):
            entry = Entry(fields["stream_id"], EpochMs(int(fields["at"])), fields["id"], fields["body"].encode())
            self.entered[entry.event_id] += 1
            read = peek(entry)
            if not isinstance(read, IntakeEvent):
                self.parked.add(entry.event_id)
                continue
            if not isinstance(read.event, InputEvent):
                continue  # a request of the reconciler, and no transition
            assert read.auction_id is not None
            assert entry.at is not None
            self._fold(read.auction_id, read, read.event, entry.at)

    def _fold(self, auction_id: str, read: IntakeEvent, asked: InputEvent, at: EpochMs) -> None:
        context = read.context
        decisions = fold(self.auctions.get(auction_id, Auction(auction_id)), asked, at)
        self.auctions[auction_id] = decisions[-1].after
        for decision in decisions:
            if decision.fact is not None:
                self.history[auction_id].append((decision, "" if decision.fact in BY_TIME else context.event_id))
            if decision.refusal is None:
                continue
            self.refused[context.correlation_id] = decision.refusal.code.value
            silent = context.reply_to is None and not isinstance(asked, Cancel | Withdraw)
            if silent or decision.refusal.code in ALWAYS_PARKED:
                self.parked.add(context.event_id)

    def facts(self, auction_id: str, now: EpochMs) -> list[tuple[str, int, int, str]]:
        """What the records of an auction must say at `now`."""
        whole = [*self.history[auction_id], *((each, "") for each in elapse(self.auctions[auction_id], now))]
        return [(str(each.fact), each.at, each.after.version, by) for each, by in whole]


# The comparison.


def now_ms() -> EpochMs:
    """The clock that the authority reads, too."""
    return EpochMs(int(time.time() * 1_000))


def at_rest(auction: Auction) -> bool:
    """Whether time does nothing to an auction while it is judged."""
    now = now_ms()
    due = next_due([auction, *(each.after for each in elapse(auction, now))][-1])
    return due is None or due[0] > now + QUIET_MS


def told(records: list[dict[str, Any]]) -> list[tuple[str, int, int, str]]:
    """What records say, but for corrections: they state what stands again, under a version that is one higher."""
    said: list[tuple[str, int, int, str]] = []
    for each in records:
        if each["event_type"] != CORRECTED:
            version = each["version"] - corrections(records[: records.index(each)])
            said.append((each["event_type"], each["occurred_at"], version, each["event_id"] or ""))
    return said


def corrections(records: list[dict[str, Any]]) -> int:
    """How often the reconciler had something stated again, such as a close that was overdue while no engine ran."""
    return sum(record["event_type"] == CORRECTED for record in records)


def judge_auctions(stack: LiveStack, replay: Replay) -> dict[str, list[dict[str, Any]]]:
    """Every auction's records and timer are those of the replay; all records, per auction."""
    found: dict[str, list[dict[str, Any]]] = {}
    for auction_id, auction in replay.auctions.items():

        def caught_up(auction_id: str = auction_id) -> bool:
            found[auction_id] = records_of(stack, auction_id) if replay.history[auction_id] else []
            return told(found[auction_id]) == replay.facts(auction_id, now_ms())

        until(caught_up, f"the records of {auction_id} are those of the replay", within_s=10)
        if not auction.status.is_public:
            assert found[auction_id] == []
            continue
        shown = stack.timer(auction_id)
        standing = [auction, *(each.after for each in elapse(auction, shown["server_time"]))][-1]
        expected = timer(TimerRecord(standing), shown["server_time"], None)
        expected["version"] += corrections(found[auction_id])
        assert {name: value for name, value in shown.items() if name not in MOVING} == {
            name: value for name, value in expected.items() if name not in MOVING
        }
        # The audit log alone leads to the same place.
        last = found[auction_id][-1]
        assert (last["new_status"], last["version"]) == (shown["status"], shown["version"])
        ends = [record["details"]["ends_at"] for record in found[auction_id] if "ends_at" in record["details"]]
        assert not ends or ends[-1] == shown["ends_at"]
    return found


def judge_chain(stack: LiveStack, records: dict[str, list[dict[str, Any]]]) -> None:
    """The records of all auctions together are the whole chain of every shard, up to its head."""
    by_shard: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for found in records.values():
        for record in found:
            by_shard[record["shard"]].append(record)
    for shard in range(SHARDS):
        chain = sorted(by_shard[shard], key=lambda record: record["seq"])
        assert_whole(chain)
        seq, head = stack.redis("HMGET", ShardKeys.of(shard).cursor, "seq", "hash")
        assert int(seq or 0) == len(chain)
        assert not chain or head.decode() == chain[-1]["hash"]


def judge_answers(load: Load, records: dict[str, list[dict[str, Any]]], replay: Replay) -> Counter[int | None]:
    """200 was done exactly once, 409 was refused for that reason, 202 can be looked up, the rest at most once; how many of
    each."""
    statuses: Counter[int | None] = Counter()
    for asked in load.asked:
        done = [each for each in records.get(asked.auction_id, []) if each["correlation_id"] == asked.correlation_id]
        status = None if asked.answer is None else asked.answer.status_code
        statuses[status] += 1
        if status == 200:
            assert len(done) == 1
        elif status == 409:
            assert asked.answer is not None
            assert done == []
            assert asked.answer.json()["error_code"] == replay.refused[asked.correlation_id]
        elif status == 404:
            assert done == []
        elif status == 202:
            assert asked.answer is not None
            outcome = load.stack.http.get(asked.answer.headers["location"]).json()["outcome"]
            assert (outcome, len(done)) in {("APPLIED", 1), ("REFUSED", 0)}
        else:
            assert status in {None, 503}
            assert len(done) <= 1
    return statuses


@pytest.mark.requirement("R2", "R10", "R25", "R26", "R27", "R29", "B1", "B2", "B7")
async def test_killing_engine_gateway_and_archiver_loses_and_doubles_nothing(short_tmp: Path) -> None:
    """Timers, records, troubleshooting and answers are those of a replay of the intake, and the chain is whole."""
    seed = random.randrange(2**32)
    print(f"SEED={seed}")
    stack = await asyncio.to_thread(LiveStack, short_tmp, env=QUIET_GUARD)
    try:
        load = Load(stack, [fresh_id() for _ in range(AUCTIONS)])
        clients = [asyncio.create_task(load.client(seed + number)) for number in range(CLIENTS)]
        killed = await kill(stack, load, random.Random(seed))
        load.over.set()
        await asyncio.gather(*clients)
        assert sum(killed.values()) == KILLS
        assert set(killed) == set(ROLES)
        await asyncio.to_thread(judge, stack, load)
    finally:
        await asyncio.to_thread(stack.stop)


def judge(stack: LiveStack, load: Load) -> None:
    """Hold everything against the replay."""
    until(lambda: stack.http.get("/readyz").status_code == 200 and drained(stack), "everything is applied")
    replay = Replay()
    for shard in range(SHARDS):
        replay.take(stack, shard)
    until(lambda: all(at_rest(auction) for auction in replay.auctions.values()), "what was to end soon has ended")
    # Nothing that was accepted is missing, and nothing stands there twice, however often it was sent.
    assert set(replay.entered.values()) == {1}
    assert load.arrivals.keys() | set(load.poison) <= replay.entered.keys()
    records = judge_auctions(stack, replay)
    judge_chain(stack, records)
    parked = [command["command_id"] for command in parked_in(stack)]
    assert Counter(parked) == Counter(replay.parked)
    assert set(load.poison) <= set(parked)
    statuses = judge_answers(load, records, replay)
    print(f"events={len(load.arrivals)} asked={dict(statuses)} parked={len(parked)}")
    assert statuses[200] > 0
    assert statuses[409] > 0
