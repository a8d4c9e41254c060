"""The contract of the audit archive, on SQLite and on a real PostgreSQL."""

import asyncio
import contextlib
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract.audit import ChainHead, verify
from engine.domain.instants import EpochMs
from engine.store.archive import (
    ArchiveUnavailableError,
    ArchiveUrlError,
    AuditArchive,
    Selection,
    _entry,
    _row,
    archive_url,
    misfit,
    seq_of,
)
from engine.store.protocol import AuditEntry
from tests.engine.store.archives import Database, PostgresqlDatabase, SqliteFile, postgresql_database
from tests.engine.store.audit_records import T0, fields, linked, records
from tests.postgresql import PostgreSQL

pytestmark = [pytest.mark.requirement("R3"), pytest.mark.requirement("B7")]

SHARD = 3

ODD = {
    "none of ours": {"reserve_price": "12.50"},
    "a name of a column": {"shard": "7", "stream_id": "x", "extra": "y"},
    "numbers written oddly": {"version": "07", "occurred_at": "+5", "recorded_at": "1e3"},
    "a number no column holds": {"version": "9" * 30},
    "no number": {"version": ""},
    "a NUL": {"auction_id": "lot\0 7", "details": "\0"},
    "no UTF-8": {"details": b"\xff\xc3(".decode(errors="surrogateescape"), "n\udcffame": "v"},
    "a quote, lines and signs": {"details": "\"';--\r\n\t\\ é 🕰 \u2028"},
    "a very long text": {"auction_id": "x" * 10_000},
    "another script's digits": {"version": "٣"},
}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each database in turn, empty."""
    if request.param == "sqlite":
        yield SqliteFile(tmp_path)
        return
    with postgresql_database(request.getfixturevalue("postgresql_server")) as made:
        yield made


@pytest.fixture
async def archive(database: Database) -> AsyncIterator[AuditArchive]:
    """The archive in it, made."""
    made = AuditArchive(database.url)
    await made.create()
    try:
        yield made
    finally:
        await made.close()


def records_of(entries: list[AuditEntry]) -> list[dict[str, str]]:
    return [entry.fields for entry in entries]


# --- writing and reading back -----------------------------------------------------------------------------------------


async def test_what_is_read_is_what_was_written(archive: AuditArchive) -> None:
    """Records come back in order, with every string and their stream id, and their chain is whole."""
    written = records(50)
    assert await archive.append(SHARD, written) == []
    read = await archive.walk(SHARD, 0, 100)
    assert read == written
    assert verify(records_of(read)) is None
    assert list(read[0].fields) == ["seq", *(name for name in written[0].fields if name != "seq")]


@pytest.mark.parametrize("oddity", ODD.values(), ids=ODD.keys())
async def test_odd_records_come_back_to_the_letter(archive: AuditArchive, oddity: dict[str, str]) -> None:
    """Whatever the stream held, a text the column cannot hold and a field nobody knows included, is given back exactly."""
    content = fields(1) | oddity
    entry = AuditEntry("5-0", content | {"seq": "1", "prev_hash": "p", "hash": "h"})
    assert await archive.append(SHARD, [entry]) == []
    assert await archive.walk(SHARD, 0, 10) == [entry]
    assert await archive.append(SHARD, [entry]) == []


async def test_an_absent_field_stays_absent(archive: AuditArchive) -> None:
    """A record with hardly any field gets none in the archive; empty and absent are two things."""
    bare, empty = AuditEntry("1-0", {"seq": "1"}), AuditEntry("2-0", {"seq": "2", "hash": "", "details": ""})
    await archive.append(SHARD, [bare, empty])
    assert await archive.walk(SHARD, 0, 10) == [bare, empty]


_names = st.one_of(st.sampled_from(["auction_id", "version", "occurred_at", "details", "hash", "shard"]), st.text())
_values = st.one_of(
    st.text(), st.integers().map(str), st.binary().map(lambda value: value.decode(errors="surrogateescape"))
)


@given(st.dictionaries(_names.filter(lambda name: name != "seq"), _values), st.integers(1, 10**17))
def test_any_record_survives_its_row(content: dict[str, str], seq: int) -> None:
    """To a row and back is no change, whatever the fields, and no number in a row is too large for its column."""
    entry = AuditEntry("1-0", content | {"seq": str(seq)})
    row = _row(SHARD, seq, entry)
    assert all(abs(value) < 2**63 for value in row.values() if isinstance(value, int))
    assert _entry(row) == entry  # type: ignore[arg-type]


# --- idempotence and refusal ------------------------------------------------------------------------------------------


async def test_appending_again_changes_nothing(archive: AuditArchive) -> None:
    """Overlapping pages in any order leave each record once."""
    written = records(60)
    for part in (written[10:40], written[:20], written, written[30:]):
        assert await archive.append(SHARD, part) == []
    assert await archive.walk(SHARD, 0, 100) == written


async def test_two_writers_at_once_write_each_record_once(archive: AuditArchive, database: Database) -> None:
    """Two archives on one database, appending the same pages at the same time: no error, no gap, no double."""
    written = records(200)
    other = AuditArchive(database.url)
    try:
        await asyncio.gather(other.create(), archive.create())
        for start in range(0, 200, 20):
            page = written[start : start + 20]
            assert await asyncio.gather(archive.append(SHARD, page), other.append(SHARD, page[5:])) == [[], []]
        assert await other.walk(SHARD, 0, 1_000) == written
    finally:
        await other.close()


async def test_another_record_of_the_same_number_is_refused(archive: AuditArchive) -> None:
    """The archive keeps what it has, takes what is new, and gives back what contradicts it."""
    written = records(10)
    await archive.append(SHARD, written)
    rewritten = linked([fields(seq, details="{}") for seq in (9, 10, 11)], _head(written[7]))
    assert await archive.append(SHARD, rewritten) == rewritten[:2]
    assert await archive.walk(SHARD, 0, 100) == [*written, rewritten[2]]


async def test_the_same_record_under_another_stream_id_is_no_contradiction(archive: AuditArchive) -> None:
    """A commit that is repeated after a failover writes the same record anew: the id is Redis's, not the record's."""
    (first,) = records(1)
    await archive.append(SHARD, [first])
    assert await archive.append(SHARD, [AuditEntry("99-0", first.fields)]) == []
    assert await archive.walk(SHARD, 0, 10) == [first]


@pytest.mark.parametrize("seq", [None, "", "0", "-1", "01", "1.0", "x", "9" * 30])
async def test_a_record_without_a_number_is_refused(archive: AuditArchive, seq: str | None) -> None:
    """It has no place in the chain, and is not given one."""
    (good,) = records(1)
    bad = AuditEntry("9-0", fields(2) | ({} if seq is None else {"seq": seq}))
    assert await archive.append(SHARD, [bad, good]) == [bad]
    assert await archive.walk(SHARD, 0, 10) == [good]


async def test_two_records_of_one_number_in_one_page(archive: AuditArchive) -> None:
    """The first takes the place, the other is refused."""
    first, second = linked([fields(1)])[0], AuditEntry("9-0", linked([fields(1, details="{}")])[0].fields)
    assert await archive.append(SHARD, [first, second]) == [second]
    assert await archive.walk(SHARD, 0, 10) == [first]


async def test_shards_do_not_meet(archive: AuditArchive) -> None:
    """The same number in two shards is two records."""
    await archive.append(0, records(3))
    await archive.append(7, records(2))
    assert await archive.shards() == [0, 7]
    assert [len(await archive.walk(shard, 0, 10)) for shard in (0, 1, 7)] == [3, 0, 2]


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_walking_in_pages(archive: AuditArchive) -> None:
    """Pages behind a number, of at most the limit, in order."""
    written = records(25)
    await archive.append(SHARD, written)
    assert await archive.walk(SHARD, 0, 10) == written[:10]
    assert await archive.walk(SHARD, 10, 10) == written[10:20]
    assert await archive.walk(SHARD, 20, 10) == written[20:]
    assert await archive.walk(SHARD, 25, 10) == []


async def test_one_auction_and_one_interval(archive: AuditArchive) -> None:
    """A selection by auction, by time and by both gives what the same selection finds in the records themselves."""
    written = records(30)
    odd = AuditEntry("1-31", linked([fields(31, "lot-1", occurred_at="soon")], _head(written[-1]))[0].fields)
    await archive.append(SHARD, [*written, odd])
    for selection in (
        Selection("lot-1"),
        Selection("nobody"),
        Selection(since=EpochMs(T0 + 10)),
        Selection(until=EpochMs(T0 + 10)),
        Selection("lot-1", EpochMs(T0 + 4), EpochMs(T0 + 19)),
    ):
        expected = [entry for entry in [*written, odd] if selection.holds(entry.fields)]
        assert await archive.walk(SHARD, 0, 100, selection) == expected
    assert len(await archive.walk(SHARD, 0, 100, Selection("lot-1", EpochMs(T0 + 4), EpochMs(T0 + 19)))) == 5


async def test_last_and_at(archive: AuditArchive) -> None:
    """The last record of a shard, and records by their numbers; nothing where there is none."""
    written = records(12)
    assert await archive.last(SHARD) is None
    await archive.append(SHARD, written)
    assert await archive.last(SHARD) == written[-1]
    assert await archive.at(SHARD, [3, 12, 13]) == {3: written[2], 12: written[11]}


async def test_an_archive_nobody_made_is_empty(database: Database) -> None:
    """Reading finds nothing and makes nothing; as soon as there is one, the same reader finds it."""
    reader, writer = AuditArchive(database.url), AuditArchive(database.url)
    try:
        assert not await reader.exists()
        assert (await reader.walk(0, 0, 10), await reader.last(0), await reader.shards()) == ([], None, [])
        assert await reader.at(0, [1]) == {}
        if isinstance(database, SqliteFile):
            assert not database.path.exists()
        await writer.create()
        await writer.append(0, records(1))
        assert await reader.exists()
        assert await reader.walk(0, 0, 10) == records(1)
    finally:
        await reader.close()
        await writer.close()


async def test_damaged_values_are_read_and_do_not_fit(archive: AuditArchive, database: Database) -> None:
    """Whatever somebody writes into a row, reading goes on and the chain tells where."""
    written = records(6)
    await archive.append(SHARD, written)
    damages = {2: "version = NULL", 3: "extra = 'no JSON'", 4: "extra = '[1]'", 5: "hash = NULL"}
    for seq, damage in damages.items():
        database.sql(f"UPDATE auction_audit_log SET {damage} WHERE seq = {seq}")
    head, found = ChainHead(), []
    for entry, original in zip(await archive.walk(SHARD, 0, 10), written, strict=True):
        if misfit(entry.fields, head):
            found.append(seq_of(entry.fields))
        head = _head(original)
    assert found == [2, 3, 4, 5]


# --- what can be wrong with the database ------------------------------------------------------------------------------


async def test_a_server_that_is_away_is_one_typed_error(postgresql_server: PostgreSQL) -> None:
    """Refused and broken connections raise `ArchiveUnavailableError`; afterwards the same archive works again."""
    with postgresql_database(postgresql_server) as database:
        archive = AuditArchive(database.url)
        try:
            await archive.create()
            await archive.append(SHARD, records(1))
            postgresql_server.stop()
            try:
                for _ in range(2):
                    with pytest.raises(ArchiveUnavailableError):
                        await archive.append(SHARD, records(2))
                    with pytest.raises(ArchiveUnavailableError):
                        await archive.walk(SHARD, 0, 10)
            finally:
                postgresql_server.start()
            assert await archive.append(SHARD, records(2)) == []
            assert await archive.walk(SHARD, 0, 10) == records(2)
        finally:
            await archive.close()


async def test_an_unknown_database_and_a_wrong_table(database: Database) -> None:
    """A database that does not exist and a table of another shape are unavailable, and say what is wrong."""
    if isinstance(database, PostgresqlDatabase):
        absent = AuditArchive(f"postgresql+asyncpg://nobody:hunter2@/nowhere?host={database.url.rpartition('=')[2]}")
        with pytest.raises(ArchiveUnavailableError, match=r"nobody|nowhere") as raised:
            await absent.create()
        assert "hunter2" not in str(raised.value)
        await absent.close()
    archive = AuditArchive(database.url)
    await archive.create()
    database.sql("DROP TABLE auction_audit_log")
    database.sql("CREATE TABLE auction_audit_log (shard INTEGER, seq INTEGER)")
    with pytest.raises(ArchiveUnavailableError, match="column"):
        await archive.walk(0, 0, 10)
    await archive.close()


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """A file of something else is left as it is, and named."""
    path = tmp_path / "audit.sqlite3"
    path.write_text("these are my notes, not a database" * 100)
    archive = AuditArchive(f"sqlite+aiosqlite:///{path}")
    with pytest.raises(ArchiveUnavailableError, match=r"audit\.sqlite3.*not a database"):
        await archive.create()
    await archive.close()
    assert path.read_text().startswith("these are my notes")


async def test_a_locked_file_is_waited_for_and_then_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody else holds the write lock, appending waits for a bounded time; reading does not wait at all."""
    monkeypatch.setattr("engine.store.archive.LOCK_TIMEOUT_S", 0.05)
    database = SqliteFile(tmp_path)
    archive = AuditArchive(database.url)
    await archive.create()
    await archive.append(SHARD, records(1))
    with closing(sqlite3.connect(database.path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(ArchiveUnavailableError, match="locked"):
            await archive.append(SHARD, records(2))
        assert await archive.walk(SHARD, 0, 10) == records(1)
    assert await archive.append(SHARD, records(2)) == []
    await archive.close()


async def test_a_file_is_its_owners_alone_and_survives_a_loss_of_power(tmp_path: Path) -> None:
    """Directories and file get no rights for others; the journal is a WAL and every commit is synced."""
    database = SqliteFile(tmp_path)
    archive = AuditArchive(database.url)
    await archive.create()
    assert stat.S_IMODE(database.path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(parent.stat().st_mode) for parent in database.path.parents[:2]} == {0o700}
    async with archive._engine.connect() as connection:
        answers = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        ]
    assert answers == ["wal", 2, 5_000]
    await archive.close()


async def test_cancelled_in_the_middle_it_has_written_all_or_nothing(archive: AuditArchive) -> None:
    """A cancellation at any turn of the loop leaves a whole page or none, and the archive usable."""
    written = records(40)
    for turns in range(40):
        appending = asyncio.create_task(archive.append(turns, written))
        for _ in range(turns):
            await asyncio.sleep(0)
        appending.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # it may be done already
            await appending
        assert len(await archive.walk(turns, 0, 100)) in (0, 40)
        assert await archive.append(turns, written) == []
        assert await archive.walk(turns, 0, 100) == written


# --- its URL ----------------------------------------------------------------------------------------------------------


def test_the_default_is_a_file_in_the_data_dir(tmp_path: Path) -> None:
    """Without a setting the archive lies beside the embedded store; a path may hold what a URL would have to escape."""
    assert archive_url("postgresql+asyncpg://db/x", tmp_path) == "postgresql+asyncpg://db/x"
    odd = tmp_path / "a ?#%40 b"
    assert AuditArchive(archive_url(None, odd))._file == odd / "audit.sqlite3"
    assert AuditArchive(archive_url("", tmp_path))._file == tmp_path / "audit.sqlite3"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("no url", "is no URL"),
        ("postgresql+asyncpg://u:p@ss@h:port/x", "escaped"),
        ("mysql://h/x", "postgresql\\+asyncpg://USER"),
        ("postgresql://h/x", "postgresql\\+asyncpg://USER"),
        ("sqlite+aiosqlite://", "names no file"),
        ("sqlite+aiosqlite:///:memory:", "names no file"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_to_write(url: str, says: str) -> None:
    """Every wrong URL is refused before anything is connected, and a password in it is not repeated."""
    with pytest.raises(ArchiveUrlError, match=says) as raised:
        AuditArchive(url)
    assert "p@ss" not in str(raised.value)


def test_without_its_driver_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`postgresql+asyncpg://` without asyncpg names the extra."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ArchiveUrlError, match=r"pip install auction-timer\[postgresql\]"):
        AuditArchive("postgresql+asyncpg://db/x")


def test_its_url_is_shown_without_secrets() -> None:
    """Neither the password nor what stands in the query is logged."""
    shown = AuditArchive("postgresql+asyncpg://user:hunter2@db/x?password=hunter3").shown
    assert (shown.count("hunter"), "db/x" in shown) == (0, True)


def _head(entry: AuditEntry) -> ChainHead:
    return ChainHead(int(entry.fields["seq"]), entry.fields["hash"])
