"""The audit archive: what the audit streams held, in the SQL table `auction_audit_log`, for as long as anybody keeps it.

A record's hash is over strings, so reading must give back exactly the strings that were written. One rule makes it so,
whatever the column types: a value stands in its column only if the column can give it back to the letter; every other one
(a field this version does not know, a number that is written oddly, bytes that are no UTF-8, a NUL) stands in `extra`, a
JSON object in ASCII. An absent field is NULL.

    version   "7"  -> version 7, read as "7"       version  "07" -> version NULL, extra {"version": "07"}
    lot       "x"  -> extra {"lot": "x"}           version  absent -> version NULL, extra NULL

Nothing here is ever overwritten or deleted. Where a record differs from the row that has its place, the row stays and the
record is given back as refused: somebody has changed one of the two, or Redis has lost records and counted on.
"""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, RowMapping, Table, Text, event, inspect, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql import Select

from engine.contract.audit import ChainHead, record_hash
from engine.domain.instants import EpochMs
from engine.store.protocol import AuditEntry, StoreError

T = TypeVar("T")

FILE_NAME: Final = "audit.sqlite3"
PAGE: Final = 500
"""Records per read or write: some 200 kB, and 11 to 27 ms on SQLite (measured, 10,000 records on shared cores)."""
LOCK_TIMEOUT_S: Final = 5.0
"""How long SQLite waits for another writer. The only other writer is a second archiver, with one page at a time."""
CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 10.0
"""PostgreSQL: a page takes milliseconds; ten seconds of silence is a fault."""
CONNECTIONS_MAX: Final = 4
AUCTION_ID_MAX: Final = 512
"""A B-tree of PostgreSQL takes 2,704 bytes; a longer id than this is none of ours and stands in `extra`."""

_SQLITE: Final = "sqlite+aiosqlite"
_POSTGRESQL: Final = "postgresql+asyncpg"
# 18 digits always fit a column of 64 bits, and leave one way only to write a number.
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,17}")
FIELDS: Final = (
    "event_type", "auction_id", "actor_type", "actor_id", "prev_status", "new_status", "version", "occurred_at",
    "recorded_at", "correlation_id", "trace_id", "event_id", "intake_id", "details", "prev_hash", "hash",
)  # fmt: skip
"""Of a record, in its own order; each has a column. `seq` is a part of the key."""
_INTEGERS: Final = frozenset({"version", "occurred_at", "recorded_at"})

LOG: Final = Table(
    "auction_audit_log",
    MetaData(),
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("stream_id", Text, nullable=False),
    *(Column(name, BigInteger if name in _INTEGERS else Text) for name in FIELDS),
    Column("extra", Text),
)
"""`occurred_at` and `recorded_at` are epoch ms."""
_INDEXES: Final = (
    Index("auction_audit_log_by_auction", LOG.c.auction_id, LOG.c.shard, LOG.c.seq),
    Index("auction_audit_log_by_time", LOG.c.occurred_at),
)


class ArchiveUrlError(StoreError):
    """The URL of the archive cannot be used. The message says what to write or to install."""


class ArchiveUnavailableError(StoreError):
    """The database of the archive did not do what was asked. Nothing was half done; repeating is safe."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which records: of one auction, and of an interval `since <= occurred_at < until` (epoch ms); all by default."""

    auction_id: str | None = None
    since: EpochMs | None = None
    until: EpochMs | None = None

    def holds(self, fields: Mapping[str, str]) -> bool:
        """Whether a record is one of them. One whose `occurred_at` cannot be read is in no interval."""
        if self.auction_id is not None and fields.get("auction_id") != self.auction_id:
            return False
        if self.since is None and self.until is None:
            return True
        at = _integer(fields.get("occurred_at"))
        return at is not None and (self.since is None or at >= self.since) and (self.until is None or at < self.until)


EVERYTHING: Final = Selection()


def archive_url(audit_url: str | None, data_dir: Path) -> str:
    """The URL of the archive: the one that is set, else a file in the data dir."""
    if audit_url:
        return audit_url
    path = data_dir.expanduser().absolute() / FILE_NAME
    return URL.create(_SQLITE, database=str(path)).render_as_string()


def seq_of(fields: Mapping[str, str]) -> int | None:
    """The number of a record in its chain; None if it has none that can be one."""
    seq = _integer(fields.get("seq"))
    return seq if seq is not None and seq > 0 else None


def misfit(fields: Mapping[str, str], head: ChainHead) -> str | None:
    """Why a record is not the next one behind `head`, as a clause about it; None if it is."""
    expected = head.seq + 1
    if fields.get("seq") != str(expected):
        return f"seq is {fields.get('seq')!r} where {expected} is expected"
    if fields.get("prev_hash") != head.hash:
        return "prev_hash is not the hash of the record before it"
    try:
        fits = fields.get("hash") == record_hash(fields)
    except TypeError:  # bytes that are no UTF-8 have no JSON, so no hash either
        fits = False
    return None if fits else "hash is not the hash of its content"


class AuditArchive:
    """The table, on SQLite (a file) or PostgreSQL.

    Every method that asks the database raises `ArchiveUnavailableError` if that fails. Reading an archive nobody has made
    yet finds nothing, and makes nothing.
    """

    def __init__(self, url: str) -> None:
        """Nothing is connected yet.

        Raises:
            ArchiveUrlError: the URL cannot be understood, or the driver it needs is not installed.
        """
        self._url = _parsed(url)
        self._file = Path(self._url.database or "") if self._url.drivername == _SQLITE else None
        self._engine = _engine(self._url)
        self._errors: tuple[type[Exception], ...] = (SQLAlchemyError, OSError, *_driver_errors(self._url))
        self._made = False

    @property
    def shown(self) -> str:
        """Its URL as it may be logged."""
        return self._url.set(query={}).render_as_string(hide_password=True)

    async def create(self) -> None:
        """Make file, table and indexes where they are missing. A file is its owner's alone: it names people."""
        with self._typed():
            if self._file is not None:
                _make_private(self._file)

        async def make(connection: AsyncConnection) -> None:
            await connection.execute(CreateTable(LOG, if_not_exists=True))
            for index in _INDEXES:
                await connection.execute(CreateIndex(index, if_not_exists=True))

        await self._transact(make)
        self._made = True

    async def append(self, shard: int, entries: Sequence[AuditEntry]) -> list[AuditEntry]:
        """Write records in one transaction; those that stand there already, to the letter, are done.

        Returns:
            The records that were refused: their place (shard, seq) holds another one, or they have no place.
        """
        placed: dict[int, AuditEntry] = {}
        refused = []
        for entry in entries:
            seq = seq_of(entry.fields)
            if seq is None or placed.setdefault(seq, entry).fields != entry.fields:
                refused.append(entry)
        if not placed:
            return refused
        insert = sqlite_insert(LOG) if self._file is not None else postgresql_insert(LOG)
        statement = insert.on_conflict_do_nothing().returning(LOG.c.seq)
        rows = [_row(shard, seq, entry) for seq, entry in placed.items()]

        async def write(connection: AsyncConnection) -> dict[int, AuditEntry]:
            written = set((await connection.execute(statement, rows)).scalars())
            others = [seq for seq in placed if seq not in written]
            return await _held(connection, shard, others) if others else {}

        held = await self._transact(write)
        return refused + [placed[seq] for seq, entry in held.items() if entry.fields != placed[seq].fields]

    async def last(self, shard: int) -> AuditEntry | None:
        """The record of a shard with the highest number."""
        found = await self._entries(select(LOG).where(LOG.c.shard == shard).order_by(LOG.c.seq.desc()).limit(1))
        return found[0] if found else None

    async def walk(self, shard: int, after_seq: int, limit: int, selection: Selection = EVERYTHING) -> list[AuditEntry]:
        """The next `limit` records of a shard behind a number, in order."""
        query = select(LOG).where(LOG.c.shard == shard, LOG.c.seq > after_seq)
        if selection.auction_id is not None:
            query = query.where(LOG.c.auction_id == selection.auction_id)
        if selection.since is not None:
            query = query.where(LOG.c.occurred_at >= selection.since)
        if selection.until is not None:
            query = query.where(LOG.c.occurred_at < selection.until)
        return await self._entries(query.order_by(LOG.c.seq).limit(limit))

    async def at(self, shard: int, seqs: Sequence[int]) -> dict[int, AuditEntry]:
        """The records with these numbers, as far as there are any; at most `PAGE` of them are asked for."""
        return await self._read(lambda connection: _held(connection, shard, seqs), {})

    async def shards(self) -> list[int]:
        """The shards it holds records of, in order."""

        async def ask(connection: AsyncConnection) -> list[int]:
            return list((await connection.execute(select(LOG.c.shard).distinct().order_by(LOG.c.shard))).scalars())

        return await self._read(ask, [])

    async def exists(self) -> bool:
        """Whether anybody has made it."""

        async def ask(_connection: AsyncConnection) -> bool:
            return True

        return await self._read(ask, False)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def _entries(self, query: Select[Any]) -> list[AuditEntry]:
        async def ask(connection: AsyncConnection) -> list[AuditEntry]:
            return [_entry(row) for row in (await connection.execute(query)).mappings()]

        return await self._read(ask, [])

    async def _read(self, ask: Callable[[AsyncConnection], Awaitable[T]], nothing: T) -> T:
        """What `ask` finds; `nothing` while there is no table. SQLite would make a file of every name it is asked for."""
        if self._file is not None and not self._file.exists():
            return nothing

        async def look(connection: AsyncConnection) -> T:
            if not self._made:
                self._made = await connection.run_sync(lambda sync: inspect(sync).has_table(LOG.name))
            return await ask(connection) if self._made else nothing

        return await self._transact(look)

    async def _transact(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        async def transaction() -> T:
            with self._typed():
                async with self._engine.begin() as connection:
                    return await work(connection)

        return await _to_its_end(transaction())

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            # What SQLAlchemy says itself is the whole statement; the driver says what is wrong.
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise ArchiveUnavailableError(f"the audit archive {self.shown} does not answer: {reason}") from error


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; a cancellation waits until it is over.

    A statement that is cancelled half-way keeps SQLite's lock until its cursor is collected, and every later write fails.
    The wait is bounded by the time-outs of lock and command.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody is left to be told
        raise


async def _held(connection: AsyncConnection, shard: int, seqs: Sequence[int]) -> dict[int, AuditEntry]:
    query = select(LOG).where(LOG.c.shard == shard, LOG.c.seq.in_(seqs))
    return {row["seq"]: _entry(row) for row in (await connection.execute(query)).mappings()}


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # whose text may hold a password
        raise ArchiveUrlError("audit_url is no URL: is each special character of the password escaped?") from None
    if parsed.drivername not in (_SQLITE, _POSTGRESQL):
        raise ArchiveUrlError(
            f"audit_url begins with {parsed.drivername}://: write {_SQLITE}:///PATH or "
            f"{_POSTGRESQL}://USER:PASSWORD@HOST/DATABASE"
        )
    if parsed.drivername == _SQLITE and parsed.database in (None, "", ":memory:"):
        raise ArchiveUrlError(f"audit_url names no file: write {_SQLITE}:///PATH")
    return parsed


def _engine(url: URL) -> AsyncEngine:
    if url.drivername == _SQLITE:
        made = create_async_engine(
            url,
            pool_size=CONNECTIONS_MAX,
            max_overflow=0,
            hide_parameters=True,
            connect_args={"timeout": LOCK_TIMEOUT_S},
        )
        event.listen(made.sync_engine, "connect", _prepare_sqlite)
        return made
    try:
        return create_async_engine(
            url,
            pool_size=CONNECTIONS_MAX,
            max_overflow=0,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"timeout": CONNECT_TIMEOUT_S, "command_timeout": COMMAND_TIMEOUT_S},
        )
    except ModuleNotFoundError as error:
        raise ArchiveUrlError(
            f"{error.name} is not installed, and {_POSTGRESQL}:// needs it: pip install auction-timer[postgresql]"
        ) from error


def _driver_errors(url: URL) -> tuple[type[Exception], ...]:
    """Errors of connecting, which SQLAlchemy before 2.1 does not wrap."""
    if url.drivername == _SQLITE:
        return ()
    import asyncpg  # type: ignore[import-untyped]

    return (asyncpg.PostgresError, asyncpg.InterfaceError)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # A value somebody has damaged must be read and named, not end the reading.
    connection.driver_connection.text_factory = lambda value: value.decode(errors="surrogateescape")
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # The stream is trimmed after the commit: what is committed must survive a loss of power.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _make_private(file: Path) -> None:
    for directory in reversed([parent for parent in file.absolute().parents if not parent.exists()]):
        directory.mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))


def _integer(value: str | None) -> int | None:
    return int(value) if value is not None and _INTEGER.fullmatch(value) else None


def _storable(name: str, value: str) -> bool:
    """Whether a text column of either database gives a value back."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value and (name != "auction_id" or len(value) <= AUCTION_ID_MAX)


def _column(name: str, value: str | None) -> str | int | None:
    """A value as its column holds it; None if the column would not give it back."""
    if name in _INTEGERS:
        return _integer(value)
    return value if value is not None and _storable(name, value) else None


def _row(shard: int, seq: int, entry: AuditEntry) -> dict[str, Any]:
    fields = entry.fields
    columns = {name: _column(name, fields.get(name)) for name in FIELDS}
    extra = {name: value for name, value in fields.items() if name != "seq" and columns.get(name) is None}
    return {
        "shard": shard,
        "seq": seq,
        "stream_id": entry.stream_id,
        **columns,
        "extra": json.dumps(extra) if extra else None,
    }


def _entry(row: RowMapping) -> AuditEntry:
    fields = {name: str(row[name]) for name in ("seq", *FIELDS) if row[name] is not None}
    return AuditEntry(str(row["stream_id"]), fields | _extra(row["extra"], fields))


def _extra(text: str | None, columns: Mapping[str, str]) -> dict[str, str]:
    """What stands beside the columns, if it is to the letter what `_row` writes there."""
    if text is None:
        return {}
    try:
        extra = json.loads(text)
    except (ValueError, RecursionError):
        extra = None
    if (
        isinstance(extra, dict)
        and extra
        and all(isinstance(value, str) for value in extra.values())
        and all(_column(name, value) is None for name, value in extra.items() if name in FIELDS)
        and not extra.keys() & columns.keys()
        and json.dumps(extra) == text
    ):
        return extra
    return {"extra": str(text)}  # somebody has changed it: no hash fits that
