"""Tests for reconciler.loop and reconciler.observations: passes over a world with an engine in it, on the memory store."""

from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from prometheus_client import CollectorRegistry

from engine.contract.audit import chained
from engine.contract.timers import checksum, heartbeat_line, tick_line
from engine.domain.instants import HOUR_MS, EpochMs
from engine.store.archive import AuditArchive
from engine.store.protocol import Group, KeyDamagedError, Lease, StoreUnavailableError
from reconciler.loop import Finding, Limits, Reconciler, Report
from reconciler.metrics import ReconcilerMetrics
from reconciler.observations import LogMovedBackError
from tests.fakes.events import bid, pause, start
from tests.fakes.world import QUICK, Worker, World, at

pytestmark = pytest.mark.requirement("R12")

LEASE_MS = 1_500


class Rig:
    """A world with an engine that holds three auctions, and a reconciler."""

    def __init__(self, *, repairs_max: int = 100) -> None:
        self.world = World()
        self.repairs_max = repairs_max
        self.watch_with(None)
        self.worker: Worker

    def watch_with(self, archive: AuditArchive | None) -> None:
        """A new reconciler, that can read this archive."""
        self.registry = CollectorRegistry()
        self.reconciler = Reconciler(
            self.world.store,
            self.world.store,
            archive,
            self.world.clock(seed=5),
            ReconcilerMetrics(self.registry),
            holder="reconciler-1",
            shards=1,
            limits=Limits(interval_ms=1_000, repairs_max=self.repairs_max, lease_ms=LEASE_MS, heartbeat_ms=300),
        )

    async def begin(self) -> "Rig":
        """Three auctions run: one in its window, one before, one paused."""
        self.worker = await Worker(self.world).begin()
        await self.world.append(
            start("closing", at(10), at(310), policy=QUICK),
            start("active", at(10), at(3_000), policy=QUICK),
            start("paused", at(10), at(3_000), policy=QUICK),
        )
        await self.worker.live_until(at(20))
        await self.world.append(pause("paused", "p"))
        await self.worker.live_until(at(260))
        return self

    async def look(self, **options: Any) -> Report:
        """A pass."""
        return await self.reconciler.make_pass(**options)

    async def mend(self) -> Report:
        """A pass, and the engine's work on what it asked for."""
        report = await self.look()
        await self.worker.work()
        return report

    def hear(self, *lines: bytes) -> None:
        """The reconciler hears the wire."""
        self.reconciler.wire.hear(0, b"\n".join(lines))

    def hear_engine(self) -> None:
        """What the engine says it holds."""
        self.hear(heartbeat_line("engine-1", 1, self.world.authority.now_ms, self.worker.shard.holding()))

    def fields(self, auction_id: str) -> dict[str, str]:
        """A hash, to be read or damaged."""
        return self.world.shard.timers[auction_id]

    def deadlines(self) -> dict[str, int]:
        """The sorted set of deadlines."""
        return self.world.shard.groups[Group.LIVE]


@pytest.fixture
async def rig() -> Rig:
    return await Rig().begin()


def kinds(report: Report) -> list[tuple[str, str, str]]:
    """What was found, about what, and what was done."""
    return [(each.drift.kind.value, each.drift.auction_id, each.action) for each in report.findings]


async def test_a_world_at_peace_has_no_drift(rig: Rig) -> None:
    """Every auction is looked at, by every view, and nothing is found, also when an engine says what it holds."""
    rig.hear_engine()
    rig.hear(*[tick_line(record, rig.world.authority.now_ms) for record in rig.worker.shard.live.values()])
    report = await rig.look()
    assert (report.auctions, report.findings) == (3, [])
    await rig.world.append(bid("closing", "b-1"))
    await rig.worker.work()
    assert kinds(await rig.look()) == []


@pytest.mark.parametrize("auction_id", ["closing", "active", "paused"])
@pytest.mark.parametrize("damage", ["hash_missing", "hash_changed", "hash_unreadable", "entry_missing"])
async def test_damage_is_mended_in_one_pass(rig: Rig, auction_id: str, damage: str) -> None:
    """Afterwards hash and sets are what they were, but for a higher version, and the next pass finds nothing."""
    kept, groups = dict(rig.fields(auction_id)), {name: dict(at) for name, at in rig.world.shard.groups.items()}
    match damage:
        case "hash_missing":
            del rig.world.shard.timers[auction_id]
        case "hash_changed":
            rig.fields(auction_id)["ends_at"] = str(int(kept["ends_at"]) - 5_000)
        case "hash_unreadable":
            rig.fields(auction_id)["policy"] = "{"
        case "entry_missing":
            for members in rig.world.shard.groups.values():
                members.pop(auction_id, None)
    assert kinds(await rig.mend()) == [(damage, auction_id, "requested")]
    mended = dict(rig.fields(auction_id))
    assert int(mended.pop("version")) > int(kept.pop("version"))
    assert mended.pop("checksum") != kept.pop("checksum")
    assert mended == kept
    assert rig.world.shard.groups == groups
    assert kinds(await rig.look()) == []
    (recorded,) = rig.world.store.reconciliations
    assert (recorded["cause"], recorded["auction_id"], recorded["action"]) == (damage, auction_id, "requested")
    assert orjson.loads(recorded["evidence"]) is not None
    assert rig.registry.get_sample_value("auctions_timer_corrections_total", {"kind": damage}) == 1


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("version", [None, "99"])
async def test_an_edited_hash_that_an_engine_loads_closes_nothing(rig: Rig, version: str | None) -> None:
    """A restart after the damage: the auction is held, past its false end too, until the log has said what is right."""
    rig.fields("active")["ends_at"] = str(at(900))
    rig.deadlines()["active"] = at(900)
    if version is not None:
        rig.fields("active")["version"] = version
    rig.worker = await Worker(rig.world, name="worker-2").begin()
    assert "active" not in rig.worker.shard.live
    assert rig.worker.metrics.held._value.get() == 1
    rig.world.line.advance(1_000)
    await rig.worker.work()
    assert rig.world.facts("active").count("auction_timer_ended") == 0
    assert ("hash_changed", "active", "requested") in kinds(await rig.mend())
    assert rig.worker.shard.live["active"].auction.ends_at == at(3_000)
    assert rig.deadlines()["active"] == at(3_000)


async def test_a_checksum_alone_that_is_wrong_is_found(rig: Rig) -> None:
    """Everything else is right, and an engine that loads it would hold it all the same: it is written anew."""
    rig.fields("active")["checksum"] = "0"
    assert kinds(await rig.mend()) == [("hash_changed", "active", "requested")]
    assert rig.fields("active")["checksum"] != "0"
    assert kinds(await rig.look()) == []


@pytest.mark.requirement("B1")
async def test_an_edited_hash_whose_checksum_was_taken_away_closes_nothing(rig: Rig) -> None:
    """Values without a checksum are none of a commit: they are held, however plausible, and the log is restored."""
    rig.fields("active")["ends_at"] = str(at(900))
    rig.deadlines()["active"] = at(900)
    del rig.fields("active")["checksum"]
    rig.worker = await Worker(rig.world, name="worker-2").begin()
    assert "active" not in rig.worker.shard.live
    rig.world.line.advance(1_000_000)
    await rig.worker.work()
    assert ("hash_changed", "active", "requested") in kinds(await rig.mend())
    assert "auction_timer_ended" not in rig.world.facts("active")
    assert rig.worker.shard.live["active"].auction.ends_at == at(3_000)


async def test_a_checksum_alone_that_is_gone_is_written_anew(rig: Rig) -> None:
    """Nothing else is wrong, and an engine that loads it would hold it all the same."""
    del rig.fields("active")["checksum"]
    assert kinds(await rig.mend()) == [("hash_changed", "active", "requested")]
    assert rig.fields("active")["checksum"]
    assert kinds(await rig.look()) == []


@pytest.mark.requirement("B1")
async def test_a_close_before_its_end_is_reported_though_it_is_over(rig: Rig) -> None:
    """An engine was made to close early, with hash, sorted set and checksum forged: its own log convicts it, for a day."""
    wrong = rig.worker.shard.live["active"]
    auction = replace(wrong.auction, ends_at=EpochMs(at(900)))
    rig.fields("active").update({"ends_at": str(at(900)), "checksum": checksum(auction)})
    rig.deadlines()["active"] = at(900)
    rig.worker = await Worker(rig.world, name="worker-2").begin()
    await rig.worker.live_until(at(901))
    assert rig.fields("active")["status"] == "ENDED"
    for _ in range(2):
        assert ("closed_early", "active", "reported") in kinds(await rig.look())
    (recorded,) = [each for each in rig.world.store.reconciliations if each["cause"] == "closed_early"]
    assert (recorded["before"], recorded["after"]) == (str(at(900)), str(at(3_000)))
    assert (recorded["severity"], recorded["ms_moved"]) == ("severe", "2100000")
    assert rig.registry.get_sample_value("auctions_timer_corrections_total", {"kind": "closed_early"}) == 1
    rig.world.line.advance(25 * HOUR_MS)
    assert "closed_early" not in {kind for kind, *_ in kinds(await rig.look())}


async def test_a_lost_hash_comes_back_to_an_engine_that_never_knew_it(rig: Rig) -> None:
    """Entry and hash gone, engine restarted: only the log knows the auction, and that is enough."""
    before = rig.worker.shard.live["active"]
    del rig.world.shard.timers["active"], rig.deadlines()["active"]
    rig.worker = await Worker(rig.world, name="worker-2").begin()
    assert "active" not in rig.worker.shard.live
    found = kinds(await rig.mend())
    assert found == [("hash_missing", "active", "requested"), ("entry_missing", "active", "requested")]
    after = rig.worker.shard.live["active"]
    assert replace(after, auction=replace(after.auction, version=before.auction.version)) == before


@pytest.mark.requirement("B1")
async def test_a_repair_that_is_late_takes_no_close_back(rig: Rig) -> None:
    """It was asked for while the auction ran; when it is applied the auction is over, and stays so."""
    rig.fields("closing")["reason"] = "edited"
    assert kinds(await rig.look()) == [("hash_changed", "closing", "requested")]
    rig.world.line.advance(60_000)
    await rig.worker.work()
    assert rig.fields("closing")["status"] == "ENDED"
    assert rig.world.facts("closing").count("auction_timer_ended") == 1


async def test_the_same_damage_is_asked_for_once(rig: Rig) -> None:
    """While the engine is away each pass finds it, and the intake holds one event; damaged again, it is mended again."""
    del rig.deadlines()["active"]
    assert [kinds(await rig.look())[0][2] for _ in range(3)] == ["requested", "pending", "pending"]
    assert len(rig.world.store.reconciliations) == 1
    await rig.worker.work()
    del rig.deadlines()["active"]
    assert kinds(await rig.mend()) == [("entry_missing", "active", "requested")]
    assert "active" in rig.deadlines()


async def test_repairs_are_bounded() -> None:
    """What is over the bound waits for the next pass."""
    rig = await Rig(repairs_max=1).begin()
    rig.deadlines().clear()
    assert [action for *_, action in kinds(await rig.mend())] == ["requested", "deferred"]
    assert [action for *_, action in kinds(await rig.mend())] == ["requested"]
    assert kinds(await rig.look()) == []


async def test_a_dry_run_changes_nothing(rig: Rig) -> None:
    """What is found is told, and nothing is asked for, counted or written down."""
    rig.deadlines().clear()
    appended = len(rig.world.shard.events)
    assert [action for *_, action in kinds(await rig.look(repairing=False))] == ["left", "left"]
    assert len(rig.world.shard.events) == appended
    assert not rig.world.store.reconciliations


async def test_a_wrong_memory_is_found_by_its_ticks(rig: Rig) -> None:
    """What an engine says on the wire at the version of the log must be what the log says."""
    record = rig.worker.shard.live["active"]
    wrong = replace(record, auction=replace(record.auction, ends_at=EpochMs(record.auction.ends_at + 9_000)))
    rig.worker.shard.live["active"] = wrong
    rig.hear(tick_line(wrong, rig.world.authority.now_ms))
    assert kinds(await rig.mend()) == [("tick_differs", "active", "requested")]
    assert rig.worker.shard.live["active"].auction.ends_at == record.auction.ends_at


async def test_a_wrong_memory_is_found_by_its_digest(rig: Rig) -> None:
    """An engine that lost an auction is reported, once while it lasts."""
    rig.hear_engine()
    del rig.worker.shard.live["active"]
    rig.hear_engine()
    assert kinds(await rig.look()) == [("memory_differs", "", "reported")]
    assert kinds(await rig.look()) == [("memory_differs", "", "reported")]
    assert len(rig.world.store.reconciliations) == 1


async def test_a_frozen_heartbeat_is_reported(rig: Rig) -> None:
    """A beat that stands still for longer than a lease, on the reconciler's own clock; a beat that moves is none."""
    await rig.look()
    rig.world.line.advance(LEASE_MS - 100)
    assert kinds(await rig.look()) == []
    lease = rig.world.shard.lease
    rig.world.shard.lease = Lease(lease.holder, lease.epoch, lease.beat + 1)
    assert kinds(await rig.look()) == []
    rig.world.line.advance(LEASE_MS + 100)
    assert kinds(await rig.look()) == [("heartbeat_frozen", "", "reported")]


def lease_is(rig: Rig, holder: str, epoch: int, beat: int) -> None:
    """The lease of the shard stands so."""
    rig.world.shard.lease = Lease(holder, epoch, beat)


async def watched(rig: Rig, *steps: tuple[int, str, int, int]) -> list[tuple[str, str, str]]:
    """The reconciler that acts looks after each step (ms later, the lease is so); what it has written down."""
    await rig.reconciler._gain(0, 1)
    for later_ms, *lease in steps:
        rig.world.line.advance(later_ms)
        lease_is(rig, *lease)  # type: ignore[arg-type]
        await rig.reconciler.look_at_beats()
    return [(each["cause"], each["before"], each["after"]) for each in rig.world.store.reconciliations]


FROZEN: Final = ("heartbeat_frozen", "one", "a beat")
TAKEN: Final = ("shard_taken_over", "one", "two")


async def test_a_beat_that_stands_still_is_told_once_without_a_pass(rig: Rig) -> None:
    """However often it is looked at, and a pass finds it too; when it has beaten and stands still again it is another one."""
    still = [(500, "one", 1, 7)] * 8
    assert await watched(rig, *still) == [FROZEN]
    assert kinds(await rig.look()) == [("heartbeat_frozen", "", "reported")]
    assert await watched(rig, *still[:2]) == [FROZEN]
    assert rig.registry.get_sample_value("auctions_timer_corrections_total", {"kind": "heartbeat_frozen"}) == 1
    assert await watched(rig, (500, "one", 1, 8)) == [FROZEN]
    assert kinds(await rig.look()) == []
    assert await watched(rig, *[(500, "one", 1, 8)] * 5) == [FROZEN, FROZEN]


async def test_a_freeze_that_is_told_while_a_pass_is_under_way_is_told_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass had looked at the beat before, and does not take the freeze for mended."""
    await watched(rig, (0, "one", 1, 7))
    look = rig.reconciler._look

    async def look_before_it_freezes(*args: Any) -> Any:
        seen = await look(*args)
        assert await watched(rig, *[(500, "one", 1, 7)] * 4) == [FROZEN]
        return seen

    monkeypatch.setattr(rig.reconciler, "_look", look_before_it_freezes)
    assert kinds(await rig.look()) == []
    assert await watched(rig, (500, "one", 1, 7)) == [FROZEN]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_freeze_that_a_pass_sees_while_it_is_written_down_is_told_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Between the decision to write it down and its being there; one that could not be written is told by whoever can."""
    await watched(rig, (0, "one", 1, 7))
    write_down = rig.reconciler._write_down

    async def slowly(finding: Finding) -> None:
        monkeypatch.setattr(rig.reconciler, "_write_down", write_down)
        if fails:
            raise StoreUnavailableError("away")
        assert kinds(await rig.look()) == [("heartbeat_frozen", "", "reported")]
        await write_down(finding)

    monkeypatch.setattr(rig.reconciler, "_write_down", slowly)
    with suppress(StoreUnavailableError):
        await watched(rig, *[(500, "one", 1, 7)] * 4)
    assert kinds(await rig.look()) == [("heartbeat_frozen", "", "reported")]
    assert await watched(rig, (500, "one", 1, 7)) == [FROZEN]


async def test_a_takeover_is_told_with_the_beat_that_stood_still(rig: Rig) -> None:
    """Also where the taker was quicker than the look; where that had told the freeze already, it is told once."""
    quick = [(250, "one", 1, 7)] * 6
    assert await watched(rig, *quick, (250, "two", 2, 1)) == [FROZEN, TAKEN]
    (_, taken) = rig.world.store.reconciliations
    assert (taken["severity"], orjson.loads(taken["evidence"])["beat_stands_still_ms"]) == ("notice", 1_500)
    rig.world.store.reconciliations.clear()
    late = [(500, "one", 3, 7)] * 6
    assert await watched(rig, *late, (500, "two", 4, 1)) == [FROZEN, TAKEN]
    assert await watched(rig, (500, "two", 4, 2)) == [FROZEN, TAKEN]


async def test_a_shard_that_is_given_is_not_taken(rig: Rig) -> None:
    """An engine that beat a moment ago gave it back, whether the empty lease was seen or not; a restart is nobody else."""
    steps = [(250, "one", 1, 7), (250, "one", 1, 7), (250, "two", 2, 1), (250, "", 2, 1), (250, "one", 3, 1)]
    assert await watched(rig, *steps) == []
    assert await watched(rig, (250, "one", 3, 1), (1_200, "one", 4, 1)) == []


async def test_a_reconciler_that_does_not_act_tells_nothing(rig: Rig) -> None:
    """The one that holds the lease does."""
    rig.reconciler._leading = False
    for _ in range(8):
        rig.world.line.advance(500)
        await rig.reconciler.look_at_beats()
    assert not rig.world.store.reconciliations


async def test_an_engine_that_is_silent_on_the_wire_is_reported(rig: Rig) -> None:
    """It beats, and says nothing for three seconds while we listen."""
    rig.reconciler.wire.listening_since = rig.world.clock(seed=5).clock.monotonic_ns()
    rig.hear_engine()
    rig.world.line.advance(3_100)
    lease = rig.world.shard.lease
    await rig.look()
    rig.world.shard.lease = Lease(lease.holder, lease.epoch, lease.beat + 1)
    assert ("engine_silent", "", "reported") in kinds(await rig.look())
    rig.hear_engine()
    assert kinds(await rig.look()) == []


@pytest.mark.requirement("R10")
async def test_a_shard_whose_log_was_written_over_hides_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an alarm of that shard, and the pass goes on."""

    async def damaged(*_args: object) -> None:
        raise KeyDamagedError("auction:audit:{0} is of another type")

    monkeypatch.setattr(rig.world.store, "audit_entries", damaged)
    report = await rig.look()
    assert kinds(report) == [("log_contradicted", "", "reported")]
    assert report.findings[0].drift.evidence == {"reason": "auction:audit:{0} is of another type"}


@pytest.mark.requirement("R10")
async def test_a_log_that_moved_back_is_read_anew(rig: Rig) -> None:
    """A failover lost the end of everything: no drift, because what is kept went back with the log."""
    rig.hear(*[tick_line(record, rig.world.authority.now_ms) for record in rig.worker.shard.live.values()])
    before = rig.world.shard
    kept = {name: dict(fields) for name, fields in before.timers.items()}
    audit, chain, groups = list(before.audit), before.chain, {name: dict(at) for name, at in before.groups.items()}
    await rig.world.append(bid("closing", "b-1"))
    await rig.worker.work()
    assert kinds(await rig.look()) == []
    before.timers, before.audit, before.chain, before.groups = kept, audit, chain, groups
    assert kinds(await rig.look()) == []
    (eye,) = rig.reconciler._eyes
    assert eye.ledger.chain == chain


async def test_a_gap_in_the_log_is_noticed(rig: Rig) -> None:
    """A record that does not follow is not folded."""
    await rig.look()
    (eye,) = rig.reconciler._eyes
    await rig.world.append(bid("closing", "b-1"), bid("closing", "b-2"))
    await rig.worker.work()
    rig.world.shard.audit.pop(-2)
    with pytest.raises(LogMovedBackError):
        await eye.ledger.catch_up()


async def test_an_entry_of_nobody_is_removed(rig: Rig) -> None:
    """The audit names it."""
    rig.deadlines()["nobody"] = at(5_000)
    assert kinds(await rig.mend()) == [("entry_extra", "nobody", "requested")]
    assert "nobody" not in rig.deadlines()
    assert rig.world.shard.audit[-1]["event_type"] == "deadline_entry_removed"


async def test_an_entry_of_nobody_is_asked_for_once_and_each_time_anew(rig: Rig) -> None:
    """However far the log moves on meanwhile it is one event; once it was removed, the same entry is another finding."""
    rig.deadlines()["nobody"] = at(5_000)
    assert kinds(await rig.look()) == [("entry_extra", "nobody", "requested")]
    more = {name: value for name, value in rig.world.shard.audit[-1].items() if name != "hash"}
    more |= {"auction_id": "active", "event_type": "bid_accepted"}
    rig.world.shard.chain, linked = chained(rig.world.shard.chain, more)
    rig.world.shard.audit.append(linked)
    assert kinds(await rig.look()) == [("entry_extra", "nobody", "pending")]
    rig.worker = await Worker(rig.world, name="worker-3").begin()
    await rig.worker.work()
    assert "nobody" not in rig.deadlines()
    rig.deadlines()["nobody"] = at(5_000)
    assert kinds(await rig.mend()) == [("entry_extra", "nobody", "requested")]
    assert "nobody" not in rig.deadlines()


@pytest.mark.parametrize("member", ["", "bad id\n", "x" * 5_000])
async def test_an_entry_that_can_be_no_auction_is_reported_once(rig: Rig, member: str) -> None:
    """Whatever happens meanwhile, it is written down and counted once, and nothing waits in troubleshooting for it."""
    rig.deadlines()[member] = at(5_000)
    for number in range(3):
        await rig.world.append(bid("active", f"b-{number}"))
        assert kinds(await rig.mend()) == [("entry_extra", member, "reported")]
    assert len(rig.world.store.reconciliations) == 1
    assert rig.world.parked() == {}
    assert rig.registry.get_sample_value("auctions_timer_corrections_total", {"kind": "entry_extra"}) == 1


async def test_what_could_not_be_written_down_is_written_down_by_the_next_pass(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report whose writing failed does not count as told."""

    async def away(_finding: Finding) -> None:
        raise StoreUnavailableError("away")

    rig.deadlines()[""] = at(5_000)
    with monkeypatch.context() as patched:
        patched.setattr(rig.reconciler, "_write_down", away)
        with pytest.raises(StoreUnavailableError):
            await rig.look()
    assert kinds(await rig.look()) == [("entry_extra", "", "reported")]
    assert len(rig.world.store.reconciliations) == 1


async def test_an_edited_version_does_not_decide(rig: Rig) -> None:
    """A bid over a hash with another version and another end counts on what the engine holds; the hash is made whole."""
    rig.fields("active").update({"ends_at": str(at(400)), "version": "40", "policy": "{"})
    await rig.world.append(pause("active", "p-2"))
    await rig.worker.work()
    assert rig.fields("active")["status"] == "PAUSED"
    assert (rig.fields("active")["ends_at"], rig.fields("active")["version"]) == (str(at(3_000)), "41")
    assert kinds(await rig.look()) == []


async def test_what_cannot_be_read_on_the_wire_is_nothing(rig: Rig) -> None:
    """A foreign line neither ends the listening nor raises an alarm."""
    rig.hear(b"", b"active", b"active x {}", b"active 9 [", b"! e", b"! e 1 2 3 zz 4", b"!")
    assert kinds(await rig.look()) == []


async def test_the_lane_is_listened_to(rig: Rig) -> None:
    """What an engine publishes arrives at the views."""
    wire = rig.reconciler.wire
    async with aclosing(_first(rig)) as heard:
        async for _ in heard:
            break
    assert wire.tick("active") is not None


async def _first(rig: Rig) -> AsyncIterator[None]:
    import asyncio

    listening = asyncio.create_task(rig.reconciler.wire.run())
    try:
        for _ in range(100):
            await asyncio.sleep(0)
            if rig.world.store._listeners:
                break
        await rig.world.store.publish({0: tick_line(rig.worker.shard.live["active"], rig.world.authority.now_ms)})
        for _ in range(100):
            await asyncio.sleep(0)
            if rig.reconciler.wire.tick("active"):
                break
        yield
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
