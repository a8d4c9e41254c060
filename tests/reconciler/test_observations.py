"""Tests for reconciler.observations: which records make up a shard's log when the archive knows of another history."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from engine.contract.audit import ChainHead
from engine.store.archive import AuditArchive
from engine.store.memory import MemoryStore
from engine.store.protocol import AuditEntry, Group
from reconciler.observations import Ledger, ShardEye, Trust, Wire
from tests.engine.store.audit_records import fields, head_of, linked, records
from tests.fakes.clock import Authority, ManualClock, Timeline
from tests.fakes.events import bid, cancel, reschedule, start
from tests.fakes.world import QUICK, Worker, at
from tests.reconciler.test_loop import Rig, kinds

pytestmark = [pytest.mark.requirement("R10"), pytest.mark.requirement("R12")]

ARCHIVED = 40
LOST_BEHIND = 35


@pytest.fixture
async def archive(tmp_path: Path) -> AsyncIterator[AuditArchive]:
    made = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/audit.sqlite3")
    await made.create()
    yield made
    await made.close()


def store_with(stream: list[AuditEntry], head: ChainHead) -> MemoryStore:
    """A shard that holds these records and this head."""
    store = MemoryStore(Authority(Timeline()))
    store.shards[0].audit = [dict(entry.fields) for entry in stream]
    store.shards[0].chain = head
    return store


# --- the ledger -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewritten", [0, 3, 5, 9])
@pytest.mark.parametrize("kept", [0, 5])
async def test_what_a_failover_took_back_is_no_part_of_the_log(
    archive: AuditArchive, rewritten: int, kept: int
) -> None:
    """Whether the shard has counted on as far as the archive or not: its log is its own chain, read whole to its head."""
    written = records(ARCHIVED)
    await archive.append(0, written)
    surviving = written[:LOST_BEHIND]
    news = linked([fields(LOST_BEHIND + 1 + number, "lot-9") for number in range(rewritten)], head_of(surviving))
    await archive.append(0, news)  # what goes beyond the lost ones is archived, the rest is refused
    stream = [*surviving[LOST_BEHIND - kept :], *news]
    ledger = Ledger(store_with(stream, head_of([*surviving, *news])), archive, 0)  # type: ignore[arg-type]
    await ledger.catch_up(broken_too=False)
    await ledger.advance(head_of([*surviving, *news]))
    assert (ledger.whole, ledger.broken, ledger.chain) == (True, None, head_of([*surviving, *news]))


async def test_an_archive_that_does_not_link_counts_for_nothing(archive: AuditArchive) -> None:
    """What stands behind the break links to the head and is known; what the archive says of before is not."""
    rig = await Rig().begin()
    audit = list(rig.world.shard.audit)
    await archive.append(0, records(len(audit) - 1))
    rig.world.shard.audit = audit[-1:]
    ledger = Ledger(rig.world.store, archive, 0)
    await ledger.catch_up()
    assert (ledger.whole, ledger.told) == (False, {})
    assert ledger.broken == f"record {len(audit)}: prev_hash is not the hash of the record before it"
    await rig.world.append(start("later", at(270), at(3_000), policy=QUICK))
    await rig.worker.live_until(at(280))
    await ledger.catch_up()
    assert list(ledger.told) == ["later"]
    assert ledger.chain == rig.world.shard.chain


async def test_an_archived_record_that_was_edited_is_not_folded(archive: AuditArchive, tmp_path: Path) -> None:
    """An end that somebody wrote into the table is no end: the record does not fit its hash."""
    rig = await Rig().begin()
    audit = [AuditEntry(f"{record['seq']}-0", dict(record)) for record in rig.world.shard.audit]
    (registered,) = [each for each in audit if each.fields["auction_id"] == "active" and each.fields["version"] == "1"]
    registered.fields["details"] = registered.fields["details"].replace(str(at(3_000)), str(at(900)))
    await archive.append(0, audit[:-1])
    rig.world.shard.audit = rig.world.shard.audit[-1:]
    ledger = Ledger(rig.world.store, archive, 0)
    await ledger.catch_up()
    assert "active" not in ledger.told
    assert ledger.broken == f"record {registered.fields['seq']}: hash is not the hash of its content"


async def test_a_log_whose_beginning_nobody_kept_contradicts_nothing(archive: AuditArchive) -> None:
    """An archive that was begun later, or purged: the log is not whole, and that is no alarm."""
    written = records(20)
    await archive.append(0, written[8:12])
    ledger = Ledger(store_with(written[10:], head_of(written)), archive, 0)  # type: ignore[arg-type]
    await ledger.catch_up(broken_too=False)
    assert (ledger.whole, ledger.broken, ledger.chain) == (False, None, head_of(written))


async def test_a_hole_between_archive_and_stream_is_a_break(archive: AuditArchive) -> None:
    """Records that were trimmed and never archived: what was folded before them may have changed since."""
    written = records(20)
    await archive.append(0, written[:8])
    ledger = Ledger(store_with(written[10:], head_of(written)), archive, 0)  # type: ignore[arg-type]
    await ledger.catch_up()
    assert ledger.broken == "record 11: seq is '11' where 9 is expected"


async def test_what_is_forgotten_is_looked_up_in_the_history_that_survived(archive: AuditArchive) -> None:
    """Of an auction whose cancellation was taken back, the archive's word is not taken."""
    rig = await Rig().begin()
    kept = deepcopy(rig.world.shard)
    await rig.world.append(cancel("active"))
    await rig.worker.work()
    assert rig.fields("active")["status"] == "CANCELLED"
    await archive.append(0, [AuditEntry(f"{each['seq']}-0", dict(each)) for each in rig.world.shard.audit])
    rig.world.store.shards[0] = kept
    rig.worker = await Worker(rig.world, name="worker-2").begin()
    await rig.world.append(bid("active", "b-1"))
    await rig.worker.work()
    ledger = Ledger(rig.world.store, archive, 0)
    await ledger.catch_up()
    del ledger.told["active"]
    told = await ledger.look_up("active")
    assert told is not None
    assert told.is_live


# --- the pass ---------------------------------------------------------------------------------------------------------


async def lose_the_end(rig: Rig, archive: AuditArchive, *drafts: Any) -> None:
    """Events are applied, told and archived, and then a failover takes all of it back."""
    rig.watch_with(archive)
    assert kinds(await rig.look()) == []
    kept = deepcopy(rig.world.shard)
    await rig.world.append(*drafts)
    await rig.worker.work()
    assert rig.world.shard.chain.seq > kept.chain.seq
    await archive.append(0, [AuditEntry(f"{each['seq']}-0", dict(each)) for each in rig.world.shard.audit])
    assert kinds(await rig.look()) == []
    rig.world.store.shards[0] = kept
    rig.worker = await Worker(rig.world, name="worker-2").begin()


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("counted_on", [0, 2, 20])
@pytest.mark.parametrize(
    "draft",
    [bid("closing", "b-1"), cancel("closing"), reschedule("closing", "r-1", at(290))],
    ids=["bid", "cancel", "move"],
)
async def test_a_history_that_was_lost_is_not_brought_back(archive: AuditArchive, draft: Any, counted_on: int) -> None:
    """Its bids, cancellations and ends are gone with it, and in the history that survived damage is found and mended."""
    rig = await Rig().begin()
    await lose_the_end(rig, archive, draft)
    before = dict(rig.fields("closing"))
    assert kinds(await rig.look()) == []
    await rig.world.append(*[bid("active", f"b-{number}") for number in range(counted_on)])
    await rig.worker.work()
    for _ in range(2):
        assert kinds(await rig.mend()) == []
    assert rig.fields("closing") == before
    assert rig.deadlines()["closing"] == int(before["ends_at"])
    del rig.deadlines()["closing"]
    assert kinds(await rig.mend()) == [("entry_missing", "closing", "requested")]
    assert rig.deadlines()["closing"] == int(before["ends_at"])
    assert kinds(await rig.look()) == []


async def test_a_reconciler_that_starts_after_the_loss_sees_what_survived(archive: AuditArchive) -> None:
    """It has nothing but the archive and the stream, and takes the same side."""
    rig = await Rig().begin()
    await lose_the_end(rig, archive, bid("closing", "b-1"), bid("closing", "b-2"))
    rig.watch_with(archive)
    assert kinds(await rig.look()) == []
    rig.deadlines()["closing"] -= 10_000
    assert kinds(await rig.mend()) == [("score_wrong", "closing", "requested")]


async def test_a_shard_that_lost_everything_begins_anew(archive: AuditArchive) -> None:
    """The archive's auctions are not those of the new history, however much longer its own is."""
    rig = await Rig().begin()
    await lose_the_end(rig, archive, *[bid("active", f"b-{number}") for number in range(50)])
    del rig.world.store.shards[0]
    assert kinds(await rig.look()) == []
    rig.worker = await Worker(rig.world, name="worker-3").begin()
    await rig.world.append(start("closing", at(270), at(900), policy=QUICK))
    await rig.worker.work()
    del rig.deadlines()["closing"]
    assert kinds(await rig.mend()) == [("entry_missing", "closing", "requested")]
    assert rig.deadlines() == {"closing": at(900)}


async def test_a_log_that_is_contradicted_is_an_alarm_and_moves_nothing(archive: AuditArchive) -> None:
    """It is reported once; the log moves no auction, and what hash and sorted set tell of each other is still mended."""
    rig = await Rig().begin()
    ends_at = rig.deadlines()["active"]
    rig.watch_with(archive)
    await archive.append(0, records(len(rig.world.shard.audit) - 1))
    rig.world.shard.audit = rig.world.shard.audit[-1:]
    assert kinds(await rig.mend()) == [("log_contradicted", "", "reported")]
    assert kinds(await rig.mend()) == [("log_contradicted", "", "reported")]
    (recorded,) = rig.world.store.reconciliations
    assert (recorded["severity"], recorded["shard"]) == ("severe", "0")
    assert "prev_hash" in recorded["evidence"]
    assert rig.registry.get_sample_value("auctions_timer_corrections_total", {"kind": "log_contradicted"}) == 1
    rig.deadlines()["active"] -= 10_000
    assert ("score_wrong", "active", "requested") in kinds(await rig.mend())
    assert rig.deadlines()["active"] == ends_at


async def test_a_stream_that_is_gone_is_an_alarm(archive: AuditArchive) -> None:
    """Its head is further on than anybody's records: without a log, hash and sorted set are compared all the same."""
    rig = await Rig().begin()
    rig.watch_with(archive)
    rig.world.shard.audit.clear()
    rig.deadlines()["active"] -= 10_000
    assert sorted(kinds(await rig.look())) == [
        ("log_contradicted", "", "reported"),
        ("score_wrong", "active", "requested"),
    ]


async def test_a_log_that_moves_while_it_is_read_is_no_alarm(archive: AuditArchive) -> None:
    """What does not link is read again before anybody is told."""
    rig = await Rig().begin()
    rig.watch_with(archive)
    whole = rig.world.shard.audit
    rig.world.shard.audit = [*whole[:3], *whole[4:]]
    (eye,) = rig.reconciler._eyes
    begin = eye.ledger.begin

    def begin_anew() -> None:
        rig.world.shard.audit = whole
        begin()

    eye.ledger.begin = begin_anew  # type: ignore[method-assign]
    assert kinds(await rig.look()) == []
    assert eye.ledger.broken is None


async def test_without_a_log_the_sets_are_listed(archive: AuditArchive) -> None:
    """A look that counts on no log sees what stands in the sorted sets, and knows that it knows no more."""
    rig = await Rig().begin()
    eye = ShardEye(rig.world.store, archive, Wire(rig.world.store, ManualClock(rig.world.line), 1), 0)
    async with aclosing(eye.views(Trust.NO_LOG)) as pages:
        seen = [views async for _, page in pages for views in page]
    assert {views.auction_id for views in seen} == {*rig.deadlines(), *rig.world.shard.groups[Group.PAUSED]}
    assert not any(views.log_whole or views.told for views in seen)
