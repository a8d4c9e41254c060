"""Reading stream and archive together, while records move from one to the other."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engine.contract.audit import verify
from engine.contract.keys import ShardKeys
from engine.domain.instants import EpochMs
from engine.store.archive import EVERYTHING, PAGE, AuditArchive, Selection
from engine.store.audit_reader import AuditReader
from engine.store.memory import MemoryStore
from engine.store.protocol import AuditEntry, AuditStore
from reconciler.archiver import Archiver
from reconciler.metrics import ReconcilerMetrics
from tests.engine.store.audit_records import T0, fields, head_of, records
from tests.fakes.clock import Authority, Timeline
from tests.reconciler.streams import SHARDS, Streams
from tests.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R34")]


@pytest.fixture
async def streams(valkey_server: Server) -> AsyncIterator[Streams]:
    made = Streams(valkey_server)
    yield made
    await made.close()


@pytest.fixture
async def archive(tmp_path: Path) -> AsyncIterator[AuditArchive]:
    made = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/audit.sqlite3")
    yield made
    await made.close()


async def everything(reader: AuditReader, selection: Selection = EVERYTHING, **options: int) -> list[AuditEntry]:
    return [entry async for page in reader.walk(0, selection, **options) for entry in page]


def archiver(store: AuditStore, archive: AuditArchive, retained: int = 20) -> Archiver:
    return Archiver(store, archive, ReconcilerMetrics(CollectorRegistry()), shards=SHARDS, retained=retained)


@pytest.mark.parametrize("archived", [0, 1, 30, 60])
async def test_both_places_are_read_as_one(streams: Streams, archive: AuditArchive, archived: int) -> None:
    """However many records are archived, and trimmed or not, each is read once and in order."""
    written = await streams.grow(0, archived) if archived else []
    if archived:
        while await archiver(streams.store, archive).archive_once():
            pass
    written += await streams.grow(0, 60)
    assert await everything(AuditReader(streams.store, archive)) == written
    assert await everything(AuditReader(streams.store, archive), after_seq=25) == written[25:]
    assert await everything(AuditReader(streams.store, archive), page=7) == written


async def test_either_place_alone(streams: Streams, archive: AuditArchive) -> None:
    """Without an archive the stream is read, without a store the archive, without both nothing."""
    written = await streams.grow(0, 40)
    assert await everything(AuditReader(streams.store, None)) == written
    assert await everything(AuditReader(None, archive)) == []
    while await archiver(streams.store, archive).archive_once():
        pass
    await streams.grow(0, 5)
    assert await everything(AuditReader(None, archive)) == written
    assert await everything(AuditReader(None, None)) == []


async def test_one_auction_page_by_page(streams: Streams, archive: AuditArchive) -> None:
    """The records of one auction, wherever they lie, in pages that begin behind a number; fewer only at the end."""
    written = await streams.grow(0, 50)
    while await archiver(streams.store, archive).archive_once():
        pass
    written += await streams.grow(0, 50)
    expected = [entry.fields for entry in written if entry.fields["auction_id"] == "lot-1"]
    reader, found = AuditReader(streams.store, archive), []
    while page := await reader.of_auction(0, "lot-1", int(found[-1]["seq"]) if found else 0, 4):
        assert len(page) == 4 or found + page == expected
        found += page
    assert found == expected
    assert await reader.of_auction(0, "lot-1", 0, 1_000) == expected
    assert await reader.of_auction(0, "nobody", 0, 10) == []
    assert await reader.of_auction(1, "lot-1", 0, 10) == []


async def test_a_time(streams: Streams, archive: AuditArchive) -> None:
    """An interval of `occurred_at` holds in both places."""
    written = await streams.grow(0, 30)
    while await archiver(streams.store, archive).archive_once():
        pass
    written += await streams.grow(0, 30)
    found = await everything(AuditReader(streams.store, archive), Selection(None, EpochMs(T0 + 20), EpochMs(T0 + 45)))
    assert found == written[19:44]


async def test_what_has_no_number_is_walked_and_belongs_to_no_page(streams: Streams, archive: AuditArchive) -> None:
    """A record somebody added by hand is seen by a walk over everything, and never by the pages of an auction."""
    await archive.create()
    written = await streams.grow(0, 2)
    odd = AuditEntry(f"{T0 + 2}-9", fields(7, "lot-1") | {"seq": "many"})
    await streams.put(0, [odd])
    written += [odd, *await streams.grow(0, 2)]
    reader = AuditReader(streams.store, archive)
    assert await everything(reader) == written
    assert [record["seq"] for record in await reader.of_auction(0, "lot-1", 0, 10)] == ["1", "4"]


async def test_a_damaged_stream_id_does_not_end_the_reading(
    streams: Streams, archive: AuditArchive, tmp_path: Path
) -> None:
    """The id of an archived record is no part of the chain: if it is nonsense, the stream is read from its beginning."""
    written = await streams.grow(0, 5)
    while await archiver(streams.store, archive).archive_once():
        pass
    with closing(sqlite3.connect(tmp_path / "audit.sqlite3")) as connection, connection:
        connection.execute("UPDATE auction_audit_log SET stream_id = 'x' WHERE seq = 5")
    written += await streams.grow(0, 5)
    assert [entry.fields for entry in await everything(AuditReader(streams.store, archive))] == [
        entry.fields for entry in written
    ]


class Turning:
    """A store and an archive between whose answers an archiver moves on."""

    def __init__(self, inner: Any, move: Any) -> None:
        self._inner = inner
        self._move = move

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            await self._move()
            answer = await getattr(self._inner, name)(*args)
            await self._move()
            return answer

        return call


async def test_records_that_move_between_any_two_answers_are_read_once(streams: Streams, archive: AuditArchive) -> None:
    """An archiver moves a page, the engine writes, before and after every call of the reader: no gap, no double."""
    written = await streams.grow(0, 10)
    moving = archiver(streams.store, archive, retained=1)

    async def move() -> None:
        nonlocal grown
        if grown < 12:
            grown += 1
            written.extend(await streams.grow(0, 10))
            await moving.archive_once()

    reader = AuditReader(Turning(streams.store, move), Turning(archive, move))  # type: ignore[arg-type]
    for _ in range(4):
        grown, before = 0, len(written)
        found = await everything(reader, page=15)
        assert len(found) >= before
        assert found == written[: len(found)]


async def test_what_is_archived_between_two_answers_is_not_lost(streams: Streams, archive: AuditArchive) -> None:
    """Records that waited in the stream when the walk began are archived at any one instant of it; nothing comes later."""
    written: list[AuditEntry] = []
    for skipped in range(12):
        written += await streams.grow(0, 10)
        moving = archiver(streams.store, archive, retained=1)
        calls = 0

        async def move() -> None:
            nonlocal calls
            calls += 1
            if calls > skipped:  # noqa: B023 - it is awaited within the round
                await moving.archive_once()  # noqa: B023

        reader = AuditReader(Turning(streams.store, move), Turning(archive, move))  # type: ignore[arg-type]
        assert await everything(reader) == written
        await moving.archive_once()


async def test_an_archiver_at_full_speed(streams: Streams, archive: AuditArchive) -> None:
    """While thousands of records are moved, every walk gives a whole chain that reaches what was there at its start."""
    await streams.grow(0, 4 * PAGE)
    moving = archiver(streams.store, archive)

    async def move() -> None:
        while await moving.archive_once():
            pass

    task = asyncio.create_task(move())
    reader = AuditReader(streams.store, archive)
    walks = 0
    while not task.done() or not walks:
        found = await everything(reader)
        assert len(found) == 4 * PAGE
        assert verify([entry.fields for entry in found]) is None
        walks += 1
    await task


async def test_the_memory_store_serves_too(archive: AuditArchive) -> None:
    """The executable specification of the store is read and archived like the real one."""
    store = MemoryStore(Authority(Timeline()))
    written = records(30)
    store.shards[0].audit = [dict(entry.fields) for entry in written]
    store.shards[0].chain = head_of(written)
    while await archiver(store, archive).archive_once():
        pass
    assert len(store.shards[0].audit) == 20
    assert [entry.fields for entry in await everything(AuditReader(store, archive))] == [
        entry.fields for entry in written
    ]


# --- the history that survived ----------------------------------------------------------------------------------------


async def surviving(reader: AuditReader, selection: Selection = EVERYTHING, **options: int) -> list[AuditEntry]:
    return [entry async for page in reader.surviving(0, selection, **options) for entry in page]


@pytest.mark.requirement("R10")
@pytest.mark.parametrize("rewritten", [0, 3, 5, 9])
async def test_what_a_failover_took_back_is_read_as_it_went_on(
    streams: Streams, archive: AuditArchive, rewritten: int
) -> None:
    """Five archived records were lost, and some were written anew: the stream's word is taken, and the head ends it."""
    written = await streams.grow(0, 40)
    while await archiver(streams.store, archive, retained=10).archive_once():
        pass
    await streams.lose(0, written[35:], head_of(written[:35]))
    news = await streams.grow(0, rewritten) if rewritten else []
    while await archiver(streams.store, archive, retained=1).archive_once():
        pass
    reader = AuditReader(streams.store, archive)
    expected = [entry.fields for entry in (*written[:35], *news)]
    assert [entry.fields for entry in await surviving(reader)] == expected
    assert [entry.fields for entry in await surviving(reader, after_seq=20, page=7)] == expected[20:]
    of_one = [record for record in expected if record["auction_id"] == "lot-1"]
    assert await reader.of_auction(0, "lot-1", 0, 100) == of_one
    assert [entry.fields for entry in await surviving(AuditReader(None, archive))][:35] == expected[:35]


@pytest.mark.parametrize("gone", [[41], [50], [43, 44, 45], [41, 60], [48, 50, 52]])
async def test_what_was_taken_out_of_the_stream_is_read_from_the_archive(
    streams: Streams, archive: AuditArchive, gone: list[int]
) -> None:
    """Somebody has deleted entries that are archived: nothing that happened is missing from what people are shown."""
    written = await streams.grow(0, 60)
    while await archiver(streams.store, archive, retained=20).archive_once():
        pass
    ids = [written[seq - 1].stream_id for seq in gone]
    await streams.link.commands.execute_command("XDEL", ShardKeys.of(0).audit, *ids)
    reader = AuditReader(streams.store, archive)
    assert await surviving(reader) == written
    assert await surviving(reader, after_seq=42, page=3) == written[42:]
    of_one = [entry.fields for entry in written if entry.fields["auction_id"] == "lot-1"]
    assert await reader.of_auction(0, "lot-1", 0, 100) == of_one


@pytest.mark.parametrize("after_seq", [0, 40, 43, 45])
@pytest.mark.parametrize(("altered", "to"), [(41, 1_000), (46, 1_000), (46, 48), (46, 44), (60, 1_000)])
async def test_a_number_that_was_changed_in_the_stream_doubles_nothing(
    streams: Streams, archive: AuditArchive, altered: int, to: int, after_seq: int
) -> None:
    """Somebody has changed one: the archive tells what it was, and the others are read once, wherever a page begins."""
    written = await streams.grow(0, 60)
    while await archiver(streams.store, archive, retained=20).archive_once():
        pass
    held = await streams.held(0)
    changed = [AuditEntry(entry.stream_id, dict(entry.fields)) for entry in held]
    changed[altered - 41].fields["seq"] = str(to)
    await streams.link.commands.execute_command("DEL", ShardKeys.of(0).audit)
    await streams.put(0, changed)
    found = await surviving(AuditReader(streams.store, archive), after_seq=after_seq)
    told = [entry for entry in found if entry.fields["seq"] != str(to)]
    assert told == [entry for entry in written[after_seq:] if entry.fields["seq"] != str(to)]
    assert len(found) - len(told) <= 2


async def test_a_stream_that_is_empty_ends_at_its_head(streams: Streams, archive: AuditArchive) -> None:
    """Trimmed to nothing, the archive tells all up to the head; a shard that lost everything has no past."""
    written = await streams.grow(0, 30)
    while await archiver(streams.store, archive).archive_once():
        pass
    reader = AuditReader(streams.store, archive)
    await streams.lose(0, written, head_of(written[:25]))
    assert [entry.fields for entry in await surviving(reader)] == [entry.fields for entry in written[:25]]
    streams.server.flush()
    assert await surviving(reader) == []


async def test_what_survives_is_read_once_while_records_move(streams: Streams, archive: AuditArchive) -> None:
    """An archiver moves a page and the engine writes around every call: no gap and no double, as in any walk."""
    written = await streams.grow(0, 10)
    moving = archiver(streams.store, archive, retained=1)

    async def move() -> None:
        nonlocal grown
        if grown < 12:
            grown += 1
            written.extend(await streams.grow(0, 10))
            await moving.archive_once()

    reader = AuditReader(Turning(streams.store, move), Turning(archive, move))  # type: ignore[arg-type]
    for _ in range(4):
        grown, before = 0, len(written)
        found = await surviving(reader, page=15)
        assert len(found) >= before
        assert found == written[: len(found)]
