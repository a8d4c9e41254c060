"""Whole simulations: a seed repeats, many seeds hold, and each checker finds the bug that was planted for it."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest

from auction_timer.simulation.archive import Archive
from auction_timer.simulation.checkers import CHECKERS
from auction_timer.simulation.damage import pull_end
from auction_timer.simulation.faults import Faults
from auction_timer.simulation.report import Options, plans_of_days, small_plans
from auction_timer.simulation.run import Outcome, simulate, small
from auction_timer.simulation.seeds import judge
from engine.clock import AuctionClock
from engine.contract.keys import shard_of
from engine.domain.auction import Auction
from engine.domain.decide import Decision
from engine.domain.events import Bid, InputEvent
from engine.domain.fold import fold
from engine.domain.instants import EpochMs
from engine.domain.policy import Extension
from engine.scheduler import Scheduler
from engine.store.audit_reader import AuditReader
from engine.store.memory import MemoryStore, ShardMemory
from engine.store.protocol import Announce, Lease, Operation, Record, UpdateEntry
from gateway.hub import Hub
from reconciler.repairs import Plan

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "100"))
"""How many seeds the suite runs. For more: `SIMULATION_SEEDS=1000`, or `auction-timer simulate --small --seeds 1000`."""
SEEDS_AT_ONCE = 10
SEEDS_THAT_SEE_ALL = 50
PLANTED_SEEDS = 40
"""In so many seeds a planted bug must show."""


def explain(outcome: Outcome, options: Options) -> str:
    """What a failing seed says of itself."""
    found = [(name, violations[:3]) for name, violations in outcome.violations.items() if violations]
    return f"{options.command(outcome.plan.seed)}: {outcome.faults} {found}"


@cache
def judged(seed: int) -> tuple[str, frozenset[str], Mapping[str, int]]:
    """What is wrong with a seed, the faults it saw, and its counts."""
    outcome = judge(small(seed))
    assert not outcome.is_good or set(outcome.violations) == set(CHECKERS)
    return (
        "" if outcome.is_good else explain(outcome, small_plans(faults=True)),
        frozenset(outcome.faults),
        outcome.counts,
    )


@pytest.mark.requirement("B10")
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_AT_ONCE))
def test_many_seeds_keep_every_promise(first: int) -> None:
    """Whatever crashes, pauses, loses and steps: every checker is content."""
    assert [wrong for seed in range(first, min(first + SEEDS_AT_ONCE, SEEDS)) if (wrong := judged(seed)[0])] == []


@pytest.mark.requirement("B10")
@pytest.mark.skipif(
    SEEDS < SEEDS_THAT_SEE_ALL, reason=f"{SEEDS_THAT_SEE_ALL} seeds see everything between them, not {SEEDS}"
)
def test_the_seeds_saw_everything() -> None:
    """Between them the seeds met every fault that there is, and did all that has rules."""
    seen: set[str] = set()
    totals: Counter[str] = Counter()
    for seed in range(SEEDS):
        _, faults, counts = judged(seed)
        seen |= faults
        totals.update(counts)
    assert seen >= {
        "crash", "pause", "outage", "lost suffix", "authority step", "authority far off", "wall step",
        "network, commit: request lost", "network, commit: answer lost", "network, commit: twice",
        "network, append: twice", "network, reads: slow", "unattended",
        "damage, entry deleted", "damage, entry moved", "damage, field changed", "damage, end past its cap",
        "damage, end moved forward",
        "network, archive append: request lost", "network, archive append: answer lost",
    }  # fmt: skip
    assert totals["commits answered Fenced"] > 0
    assert totals["closes lost by failovers"] > 0
    assert totals["extensions"] > SEEDS
    assert totals["late bids"] > SEEDS
    assert totals["extensions for outages"] > 0
    assert totals["repairs"] > SEEDS / 10
    assert totals["audit records trimmed"] > SEEDS
    assert totals["archived records of lost histories"] > 0


@pytest.mark.requirement("B10")
def test_a_seed_replays_exactly() -> None:
    """The same seed has the same trace, another one has another, and calm weather has none of the faults."""
    one, again, other = simulate(small(3)), simulate(small(3)), simulate(small(4))
    assert (one.trace, one.counts, one.faults) == (again.trace, again.counts, again.faults)
    assert one.trace != other.trace
    calm = simulate(small(3, faults=False))
    assert calm.is_good, explain(calm, small_plans(faults=False))
    assert calm.faults == {}


@pytest.mark.requirement("B10")
def test_the_command_says_its_seed_first_and_repeats_byte_for_byte() -> None:
    """Also where the interpreter hashes strings in another order: nothing hangs on the order of a set."""
    said = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "auction_timer", "simulate", "--seed", "5", "--auctions", "5", "--days", "0.02"],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
    assert said[0].startswith("SEED 5\n")
    assert "checker: exactly one close" in said[0]
    assert said[0].splitlines()[-1].startswith("trace ")


@pytest.mark.requirement("B10")
def test_days_of_auctions_take_seconds() -> None:
    """Days of people's auctions, with failovers and pauses of minutes, keep the promises too."""
    options = plans_of_days(auctions=15, days=0.2, faults=True)
    outcome = judge(options.plan(11))
    assert outcome.is_good, explain(outcome, options)
    assert outcome.virtual_ms > 4 * 3_600_000
    assert outcome.counts["closes"] > 8


# Planted bugs: one for each checker.

Plant = Callable[[pytest.MonkeyPatch], None]


def closes_two_seconds_early(patch: pytest.MonkeyPatch) -> None:
    """Engines are two seconds ahead, and the store takes their word for it."""
    tells_us = AuctionClock.now_us
    patch.setattr(AuctionClock, "now_us", lambda self: tells_us(self) + 2_000_000)

    def stamp(_self: MemoryStore, memory: ShardMemory, est: EpochMs) -> EpochMs:
        return EpochMs(max(memory.last_at, est))

    patch.setattr(MemoryStore, "_stamp", stamp)


def announces_a_close_twice(patch: pytest.MonkeyPatch) -> None:
    """The event lane gets each `timer.ended` twice."""
    apply = MemoryStore._apply

    def twice(self: MemoryStore, memory: ShardMemory, operation: Operation, at: EpochMs) -> None:
        apply(self, memory, operation, at)
        if isinstance(operation, Announce) and operation.type == "timer.ended":
            apply(self, memory, operation, at)

    patch.setattr(MemoryStore, "_apply", twice)


def ignores_bids_in_the_last_second(patch: pytest.MonkeyPatch) -> None:
    """A bid in the last second counts as one that came at the end."""

    def hasty(auction: Auction, event: InputEvent, at: EpochMs) -> list[Decision]:
        if isinstance(event, Bid) and auction.registration is not None and 0 < auction.ends_at - at < 1_000:
            at = auction.ends_at
        return fold(auction, event, at)

    patch.setattr("engine.journal.fold", hasty)


def forgets_the_caps(patch: pytest.MonkeyPatch) -> None:
    """An extension is what the bidder would like. The fold of the checkers has this bug too, and must not be needed."""

    def generous(_policy: Any, *, ends_at: EpochMs, **_more: Any) -> Extension:
        return Extension(EpochMs(ends_at + 16_000), None)

    patch.setattr("engine.domain.decide.extension", generous)


def edits_an_audit_record(patch: pytest.MonkeyPatch) -> None:
    """Somebody else is named in a record, after its hash was made."""
    apply = MemoryStore._apply

    def edited(self: MemoryStore, memory: ShardMemory, operation: Operation, at: EpochMs) -> None:
        if isinstance(operation, Record) and operation.fields["event_type"] == "auction_timer_started":
            operation = Record(dict(operation.fields) | {"actor_id": "nobody"})
        apply(self, memory, operation, at)

    patch.setattr(MemoryStore, "_apply", edited)


def skips_an_event_of_the_lane(patch: pytest.MonkeyPatch) -> None:
    """A gateway overlooks every extension."""
    take = Hub.on_updates

    def overlooks(self: Hub, shard: int, entries: list[UpdateEntry]) -> None:
        take(self, shard, [entry for entry in entries if entry.type != "timer.closing"])

    patch.setattr(Hub, "on_updates", overlooks)


def claims_without_a_new_epoch(patch: pytest.MonkeyPatch) -> None:
    """A claim does not raise the fencing epoch."""

    async def claim(self: MemoryStore, shard: int, holder: str, seen: Lease | None) -> Lease:
        memory = self.shards[shard]
        if not memory.lease.holder or memory.lease.holder == holder or memory.lease == seen:
            memory.lease = Lease(holder, 1, 0)
        return memory.lease

    patch.setattr(MemoryStore, "claim", claim)


def falls_over_a_tick(patch: pytest.MonkeyPatch) -> None:
    """The scheduler cannot bear the third auction."""
    send = Scheduler._send_ticks

    async def falls(self: Scheduler, now: EpochMs) -> bool:
        if any("auction-2" in shard.live for shard in self._shards.values()):
            raise ZeroDivisionError
        return await send(self, now)

    patch.setattr(Scheduler, "_send_ticks", falls)


def gives_nothing_back(patch: pytest.MonkeyPatch) -> None:
    """No auction counts as hit by an outage. The fold of the checkers has this bug too, and must not be needed."""
    patch.setattr("engine.domain.outage.is_hit", lambda *_args: False)
    patch.setattr("engine.shard.is_hit", lambda *_args: False)


def plans_no_repair(patch: pytest.MonkeyPatch) -> None:
    """The reconciler sees what is wrong and asks for nothing."""
    patch.setattr("reconciler.loop.plan", lambda *_args: Plan())


def trims_what_was_not_archived(patch: pytest.MonkeyPatch) -> None:
    """The archive says that it has written, and has not."""

    async def forgets(_self: Archive, _shard: int, _entries: Any) -> list[Any]:
        return []

    patch.setattr(Archive, "append", forgets)


PLANTED: Mapping[str, Plant] = {
    "no early close": closes_two_seconds_early,
    "exactly one close": announces_a_close_twice,
    "no bid in time ignored": ignores_bids_in_the_last_second,
    "caps": forgets_the_caps,
    "audit is the fold of the intake": edits_an_audit_record,
    "every client converged": skips_an_event_of_the_lane,
    "one holder per epoch": claims_without_a_new_epoch,
    "outages are given back once": gives_nothing_back,
    "damage is repaired": plans_no_repair,
    "what is trimmed is archived": trims_what_was_not_archived,
    "nobody fell": falls_over_a_tick,
}


@pytest.mark.requirement("B1")
def test_an_engine_that_believed_a_damaged_hash_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checksum an engine that starts over an end moved forward closes by it, and the judge tells."""
    monkeypatch.setattr("engine.contract.timers.is_sealed", lambda _row: True)
    monkeypatch.setattr("auction_timer.simulation.faults.HARMS", (pull_end,))
    monkeypatch.setattr("reconciler.loop.plan", lambda *_args: Plan())
    monkeypatch.setattr(Faults, "_pause", Faults._damage)
    for seed in range(PLANTED_SEEDS):
        if any("its records say" in found for found in simulate(small(seed)).violations["no early close"]):
            return
    pytest.fail(f"no early close was found in {PLANTED_SEEDS} seeds")


@pytest.mark.requirement("R12")
def test_a_reconciler_that_believed_a_lost_history_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive keeps what a failover took back: repaired to that, an auction is not what its intake says."""
    monkeypatch.setattr(AuditReader, "surviving", AuditReader.walk)
    monkeypatch.setattr("reconciler.observations.misfit", lambda *_args: None)
    for seed in range(PLANTED_SEEDS):
        if simulate(small(seed)).violations["audit is the fold of the intake"]:
            return
    pytest.fail(f"no repair to what is lost was found in {PLANTED_SEEDS} seeds")


@pytest.mark.requirement("B10")
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_checker_finds_the_bug_that_was_planted_for_it(checker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checker that could not fail would prove nothing."""
    PLANTED[checker](monkeypatch)
    for seed in range(PLANTED_SEEDS):
        if simulate(small(seed)).violations[checker]:
            return
    pytest.fail(f"{checker}: the planted bug was not found in {PLANTED_SEEDS} seeds")


def test_both_shards_have_work() -> None:
    """The auctions of a small plan spread over its shards, or takeovers would never meet live ones."""
    plan = small(0)
    assert {shard_of(f"auction-{n}", plan.shards) for n in range(plan.auctions)} == set(range(plan.shards))
