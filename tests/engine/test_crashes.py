"""Crashes at any commit: a shard that is interrupted anywhere ends up with the very history of one that never was.

Two worlds get the same events at the same instants. In the first one nothing goes wrong. In the second commits are lost on
the way there or on the way back, engines die and are replaced, stand still over deadlines, take tiny batches and run on
clocks that drift or are ahead. Everything that people can see must be equal, but for when it was written down.
"""

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

import orjson
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from engine.contract.audit import verify
from engine.domain.instants import MINUTE_MS
from engine.domain.policy import ExtensionMode, Policy
from engine.shard import ShardLostError
from engine.store.protocol import Committed, Draft, Entry, Group, StoreUnavailableError
from tests.fakes import events
from tests.fakes.store import Fault, FaultyStore
from tests.fakes.world import QUICK, Worker, World, at

AUCTIONS: Final = "ab"
POLICIES: Final = [
    QUICK,
    Policy(soft_close_window_ms=2 * MINUTE_MS, extension_ms=MINUTE_MS, mode=ExtensionMode.ADD, max_extensions=3),
    Policy(soft_close_window_ms=0, extension_ms=1, total_cap_ms=0),
]


@dataclass(frozen=True)
class Step:
    """Something arrives after a while; what the disturbed engine makes of it."""

    gap_s: float
    kind: str
    auction: str
    number: int
    stands_still: bool
    """The engine does not get to work before the next step."""
    replaced: bool
    """Another engine takes over before it."""


def make(step: Step, serial: int, now_s: float) -> Draft:
    """The event of a step. Some are repetitions, some conflict, some cannot be read."""
    auction, n = step.auction, step.number
    ask: dict[str, Any] = {"reply_to": "inbox"} if n % 2 else {}
    match step.kind:
        case "start":
            ends = at(now_s + 30 + 45 * (n + 1))
            return events.start(
                auction,
                at(now_s + 15 * (n % 3)),
                ends,
                event_id=f"start-{serial}",
                policy=POLICIES[n % 3],
                offer_id=f"o-{auction}",
                **ask,
            )
        case "bid":
            return events.bid(auction, f"b-{serial}", leader_changed=n != 3, **ask)
        case "repeated bid":
            return events.bid(auction, f"repeated-{n}", **ask)
        case "cancel":
            return events.cancel(auction, event_id=f"c-{serial}", **ask)
        case "cancel offer":
            return events.cancel_offer(f"o-{auction}", event_id=f"co-{serial}", **ask)
        case "pause":
            return events.pause(auction, f"p-{serial}", **ask)
        case "resume":
            return events.resume(auction, f"r-{serial}", **ask)
        case "withdraw":
            # The window is counted from the start: some of these come too late.
            return events.withdraw(auction, f"w-{serial}", minutes=3 * n, **ask)
        case "discard":
            return events.discard(f"poison-{n % 3}", f"d-{serial}", **ask)
        case "reschedule":
            return events.reschedule(auction, f"s-{serial}", at(now_s + 40 * n), **ask)
        case _:
            return events.poison(f"poison-{n % 3}")


async def arrive(world: World, step: Step, serial: int, now_s: float) -> None:
    """The event of a step reaches the intake; some get there behind its back, without an arrival."""
    if step.kind == "injected":
        world.shard.events.append(Entry(world.shard.next_id(), None, f"injected-{serial}", b"no stamp"))
    else:
        await world.append(make(step, serial, now_s))


KINDS: Final = [
    *["start"] * 3,
    *["bid"] * 8,
    *("repeated bid", "cancel", "cancel offer", "pause", "resume", "resume", "reschedule", "poison", "injected"),
    *("withdraw", "discard"),
]
GAPS_S: Final = [0, 0.001, 1, 14.999, 15, 20, 30, 30, 45, 59.999, 60, 90]


def stretches(kinds: list[str], least: int, most: int) -> st.SearchStrategy[list[Step]]:
    """So many steps of these kinds."""
    step = st.builds(
        Step,
        gap_s=st.sampled_from(GAPS_S),
        kind=st.sampled_from(kinds),
        auction=st.sampled_from(AUCTIONS),
        number=st.integers(0, 5),
        stands_still=st.booleans(),
        replaced=st.sampled_from([False, False, False, True]),
    )
    return st.lists(step, min_size=least, max_size=most)


# Most logs begin with starts, so that the bids that follow meet a running auction, and often an open window.
logs = st.one_of(
    stretches(KINDS, 3, 20),
    *[
        st.builds(list.__add__, stretches(["start"], 1, 2), stretches(kinds, 3, 16))
        for kinds in (
            ["bid"],
            ["bid", "bid", "repeated bid", "pause", "resume", "reschedule"],
            ["bid", "withdraw", "withdraw", "poison", "discard", "discard"],
            KINDS,
        )
    ],
)
faults = st.lists(st.sampled_from(list(Fault)), max_size=30)


async def undisturbed(log: list[Step]) -> World:
    """A world in which one engine is always there."""
    world = World()
    worker = await Worker(world).begin()
    now_s = 0.0
    for serial, step in enumerate(log):
        now_s += step.gap_s
        await worker.live_until(at(now_s))
        await arrive(world, step, serial, now_s)
        await worker.work()
    await worker.live_until(at(now_s + 3_600))
    return world


class Disturbed:
    """A world in which everything goes wrong that can."""

    def __init__(self, plan: list[Fault], batch_max: int, ahead_ms: int) -> None:
        self.world = World()
        self.store = FaultyStore(self.world.store, plan)
        self.batch_max = batch_max
        self.ahead_ms = ahead_ms
        self.engines = 0
        self.worker: Worker

    async def replace(self) -> None:
        """Another engine takes the shard; the old one is left for dead."""
        self.engines += 1
        # Never more than 250 ms off in all: beyond, an engine refuses its own clock (engine.clock).
        drift_ppm = 0 if self.ahead_ms == 250 else (self.engines % 3 - 1) * 20
        self.worker = Worker(
            self.world,
            store=self.store,
            name=f"engine-{self.engines}",
            clock=self.world.clock(seed=self.engines, drift_ppm=drift_ppm, ahead_ms=self.ahead_ms),
            batch_max=self.batch_max,
        )
        await self.worker.begin()

    async def until(self, instant: int) -> None:
        """Live on to `instant`; an engine whose store failed loads again, or dies and is replaced."""
        while True:
            try:
                return await self.worker.live_until(instant)
            except StoreUnavailableError:
                if len(self.store.commits) % 2:
                    await self.replace()
                else:
                    await self.worker.shard.load()


async def disturbed(log: list[Step], plan: list[Fault], batch_max: int, ahead_ms: int) -> Disturbed:
    """The same events at the same instants, and trouble."""
    made = Disturbed(plan, batch_max, ahead_ms)
    await made.replace()
    now_s = 0.0
    for serial, step in enumerate(log):
        now_s += step.gap_s
        made.world.line.advance(max(0, at(now_s) - made.world.authority.now_ms))
        await arrive(made.world, step, serial, now_s)
        if step.replaced:
            await made.replace()
        if not step.stands_still:
            await made.until(at(now_s))
    await made.until(at(now_s + 3_600))
    return made


UNSTABLE: Final = {"seq", "prev_hash", "hash", "recorded_at", "intake_id"}
"""Fields of an audit record that say where and when it was written, not what happened."""


def without_time(body: bytes) -> Any:
    """A body as it reads but for when it was written."""
    read = orjson.loads(body)
    for part in (read, read.get("timer") or {}, read.get("audit") or {}, read.get("command") or {}):
        for name in ("server_time", "remaining_ms", "canceled_at", *UNSTABLE):
            part.pop(name, None)
    return read


def history(world: World) -> dict[str, Any]:
    """Everything that people can see of a shard, auction by auction."""
    shard = world.shard
    audit, updates = defaultdict(list), defaultdict(list)
    for record in shard.audit:
        audit[record["auction_id"]].append({name: value for name, value in record.items() if name not in UNSTABLE})
    for update in shard.updates:
        updates[update.auction_id].append((update.type, update.version, without_time(update.body)))
    return {
        "arrivals": [(entry.event_id, entry.at) for entry in shard.events],
        "timers": shard.timers,
        "groups": {group: members for group, members in shard.groups.items() if group is not Group.PARKED},
        "parked": {
            # What was never stamped counts as seen when it was first looked at.
            command_id: None if "injected" in command_id else first_seen_at
            for command_id, first_seen_at in shard.groups[Group.PARKED].items()
        },
        "outcomes": {command_id: without_time(body) for command_id, body in shard.outcomes.items()},
        "offers": shard.offers,
        "audit": audit,
        "updates": updates,
        "replies": [
            (outcome, command_id, without_time(body)) for outcome, command_id, body in world.store.replies["inbox"]
        ],
        "troubleshooting": {
            command_id: orjson.loads(body) | ({"first_seen_at": None} if "injected" in command_id else {})
            for command_id, body in shard.troubleshooting.items()
        },
    }


def check_audit(world: World) -> None:
    """The chain is whole, and per auction every transition is there once, without a gap."""
    assert verify(world.shard.audit) is None
    status: dict[str, str] = {}
    version: dict[str, int] = {}
    for record in world.shard.audit:
        if record["event_type"].startswith("OPERATOR_"):
            continue  # what happened to a command, not to an auction
        name = record["auction_id"]
        assert record["prev_status"] == status.get(name, "")
        changed = record["event_type"] not in ("bid_accepted", "late_bid_ignored")
        assert int(record["version"]) == version.get(name, 0) + changed
        status[name], version[name] = record["new_status"], int(record["version"])
    for name, fields in world.shard.timers.items():
        assert (fields["status"], int(fields["version"])) == (status[name], version[name])


def check_never_early(made: Disturbed) -> None:
    """Every commit that time caused was stamped at or after what it says has happened."""
    for batch, answer in made.store.commits:
        if isinstance(answer, Committed) and batch.due_at is not None:
            assert answer.at >= batch.due_at


@pytest.mark.requirement("R10")
@pytest.mark.requirement("B1")
@pytest.mark.requirement("B2")
@pytest.mark.requirement("B7")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(log=logs, plan=faults, batch_max=st.integers(1, 4), ahead_ms=st.sampled_from([0, 0, 3, 250]))
@example(
    log=[
        Step(0, "start", "a", 0, False, False),
        Step(1, "poison", "b", 0, True, False),
        Step(29, "withdraw", "a", 1, True, True),
        Step(0, "discard", "b", 0, True, False),
        Step(0, "withdraw", "a", 1, True, False),
    ],
    plan=[Fault.AFTER, Fault.BEFORE, Fault.AFTER, Fault.AFTER, Fault.BEFORE],
    batch_max=1,
    ahead_ms=0,
)
@example(
    log=[
        Step(0, "start", "a", 0, False, False),
        Step(74.999, "bid", "a", 1, True, False),
        Step(0.001, "bid", "a", 1, True, True),
        Step(60, "bid", "a", 0, False, False),
    ],
    plan=[Fault.AFTER, Fault.BEFORE, Fault.AFTER, Fault.AFTER],
    batch_max=1,
    ahead_ms=250,
)
def test_an_interrupted_shard_has_the_history_of_one_that_never_was(
    log: list[Step], plan: list[Fault], batch_max: int, ahead_ms: int
) -> None:
    """Same intake, same arrivals: same timers, facts, frames, answers and parked commands, whatever failed on the way."""

    async def scenario() -> None:
        calm = await undisturbed(log)
        rough = await disturbed(log, plan, batch_max, ahead_ms)
        check_audit(calm)
        check_audit(rough.world)
        check_never_early(rough)
        assert history(rough.world) == history(calm)
        event(f"engines: {min(rough.engines, 4)}")
        event(f"commits lost: {sum(answer is None for _, answer in rough.store.commits) > 0}")
        event(f"extended: {any('extended' in record['event_type'] for record in calm.shard.audit)}")
        event(f"withdrawn: {any(record['event_type'] == 'offer_cancelled' for record in calm.shard.audit)}")
        event(f"discarded: {any(record['event_type'] == 'OPERATOR_CANCEL' for record in calm.shard.audit)}")
        event(f"ended: {any(record['new_status'] == 'ENDED' for record in calm.shard.audit)}")

    asyncio.run(scenario())


@pytest.mark.requirement("R10")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(log=logs, turns=st.lists(st.integers(0, 1), min_size=10, max_size=40))
def test_two_engines_that_both_believe_they_own_a_shard_write_one_history(log: list[Step], turns: list[int]) -> None:
    """They take turns as they please; each commit is fenced or counts, and together they write what one would have."""

    async def scenario() -> None:
        calm = await undisturbed(log)
        world = World()
        workers = [Worker(world, name=f"engine-{n}", clock=world.clock(seed=n)) for n in range(2)]
        for worker in workers:
            await worker.begin()
        order = iter(turns * 100)
        now_s = 0.0

        async def let_work(worker: Worker) -> None:
            try:
                await worker.work()
            except ShardLostError:
                await worker.begin()
                await worker.work()

        for serial, step in enumerate(log):
            now_s += step.gap_s
            world.line.advance(max(0, at(now_s) - world.authority.now_ms))
            await arrive(world, step, serial, now_s)
            await let_work(workers[next(order)])
        world.line.advance(at(now_s + 3_600) - world.authority.now_ms)
        for worker in (*workers, *workers):
            await let_work(worker)
        check_audit(world)
        assert history(world) == history(calm)

    asyncio.run(scenario())
