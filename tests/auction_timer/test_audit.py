"""`audit verify` and `audit export`: what they find, what they say, what they write."""

import csv
import io
import json
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from auction_timer import audit
from auction_timer.audit import COLUMNS, ShardReport, report_line, verify_shard, write_records
from auction_timer.instants import read_instant
from engine.contract.audit import ChainHead, record_hash
from engine.contract.keys import ShardKeys
from engine.domain.instants import EpochMs
from engine.settings import Settings
from engine.store.archive import EVERYTHING, PAGE, AuditArchive, Selection
from engine.store.audit_reader import AuditReader
from engine.store.protocol import AuditEntry
from reconciler.archiver import Archiver
from reconciler.metrics import ReconcilerMetrics
from tests.engine.store.archives import PostgresqlDatabase, postgresql_database
from tests.engine.store.audit_records import T0, fields, head_of, linked, records
from tests.live import DEADLINE_S, SCRIPT
from tests.postgresql import PostgreSQL
from tests.reconciler.streams import SHARDS, Streams
from tests.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R34"), pytest.mark.requirement("B7")]

RETAINED = 10
ARCHIVED = 40
WRITTEN = 45


class Log:
    """Shard 0 of an audit log: 40 records archived, ten of them still in the stream, and five more only there."""

    def __init__(self, server: Server, directory: Path, url: str | None = None) -> None:
        self.streams = Streams(server)
        self.directory = directory
        self.path = directory / "audit.sqlite3"
        self.archive = AuditArchive(url or f"sqlite+aiosqlite:///{self.path}")
        self.reader = AuditReader(self.streams.store, self.archive)
        self.written: list[AuditEntry] = []

    async def fill(self) -> None:
        await self.streams.deploy()
        self.written = await self.streams.grow(0, ARCHIVED)
        await self.drain()
        self.written += await self.streams.grow(0, WRITTEN - ARCHIVED)

    async def drain(self) -> None:
        metrics = ReconcilerMetrics(CollectorRegistry())
        archiver = Archiver(self.streams.store, self.archive, metrics, shards=SHARDS, retained=RETAINED)
        while await archiver.archive_once():
            pass

    def sql(self, statement: str) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement)

    async def verify(self, *, store: bool = True) -> ShardReport:
        reader = self.reader if store else AuditReader(None, self.archive)
        return await verify_shard(reader, 0, lambda _count: None)

    def settings(self, **options: Any) -> Settings:
        return Settings.load(**({"redis_url": self.streams.server.url, "data_dir": self.directory} | options))


@pytest.fixture
async def log(valkey_server: Server, tmp_path: Path) -> AsyncIterator[Log]:
    made = Log(valkey_server, tmp_path)
    try:
        await made.fill()
        yield made
    finally:
        await made.archive.close()
        await made.streams.close()


@pytest.fixture
def cli(log: Log) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The real command, on the log."""

    def run(*arguments: str, redis: bool = True, directory: Path | None = None) -> "subprocess.CompletedProcess[str]":
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        store = ["--redis-url", log.streams.server.url] if redis else []
        return subprocess.run(
            [*SCRIPT, "audit", *arguments, *store, "--data-dir", str(directory or log.directory)],
            env=clean,
            cwd=log.directory,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    return run


# --- verify -----------------------------------------------------------------------------------------------------------


async def test_a_whole_log_verifies(log: Log) -> None:
    """Every record is counted once, and the head is Redis's own."""
    report = await log.verify()
    assert (report.records, report.head, report.fault) == (WRITTEN, head_of(log.written), None)
    empty = await verify_shard(log.reader, 1, lambda _count: None)
    assert (empty.records, empty.head, empty.fault) == (0, ChainHead(), None)


@pytest.mark.parametrize("name", ["details", "auction_id", "occurred_at", "version", "prev_hash", "hash", "intake_id"])
@pytest.mark.parametrize("seq", [1, 20, 30, 38])
async def test_one_flipped_byte_in_the_table_is_found(log: Log, name: str, seq: int) -> None:
    """Whichever column of whichever row, also of one the stream still has: the link is named, and it is the first."""
    value = log.written[seq - 1].fields[name]
    flipped = value[:-1] + chr(ord(value[-1]) ^ 1)
    log.sql(f"UPDATE auction_audit_log SET {name} = '{flipped}' WHERE seq = {seq}")
    report = await log.verify()
    assert report.fault is not None
    assert report.fault.seq == seq
    alone = await log.verify(store=False)
    assert alone.fault is not None
    assert alone.fault.seq == seq


@pytest.mark.parametrize(
    ("seq", "at", "blamed"),
    [
        (20, 0, 20),  # 1... to 0...: before the one before it
        (20, 12, 21),  # by a millisecond later: the next one is no later any more
        (20, 13, 20),  # the dash
        (38, 14, 38),  # another place of the same millisecond, and the stream still has the record
    ],
)
async def test_one_flipped_byte_in_a_stream_id_is_found(log: Log, seq: int, at: int, blamed: int) -> None:
    """No hash is over it: its form, the order of the ids and the stream tell."""
    value = log.written[seq - 1].stream_id
    flipped = value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]
    log.sql(f"UPDATE auction_audit_log SET stream_id = '{flipped}' WHERE seq = {seq}")
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, "stream_id" in report.fault.reason) == (blamed, True)


@pytest.mark.parametrize(
    "extra",
    [
        "{}",
        '{"details": "forged"}',
        '{"seq": "1"}',
        '{"reserve": 1}',
        "[]",
        "{",
        '{"version": ""}',
        '{"version": "07"}',
    ],
)
@pytest.mark.parametrize("seq", [20, 38])
async def test_what_is_written_beside_the_columns_is_found(log: Log, seq: int, extra: str) -> None:
    """A row that needs nothing beside its columns has nothing there."""
    log.sql(f"UPDATE auction_audit_log SET extra = '{extra}' WHERE seq = {seq}")
    report = await log.verify(store=False)
    assert report.fault is not None
    assert report.fault.seq == seq


@pytest.mark.parametrize(
    "extra",
    [
        '{"version":\t"07"}',
        '{"version": "07"} ',
        '{"version": "x", "version": "07"}',
        '{"version": "07", "event_type": "FORGED"}',
        '{"version": "07", "hash": "0"}',
        '{"version": "07", "reserve": "1"}',
        '{"version": "7"}',
        '{"version": ' + "[" * 5_000 + "]" * 5_000 + "}",
    ],
    ids=range(8),
)
async def test_what_is_changed_beside_the_columns_is_found(log: Log, extra: str) -> None:
    """An oddly written number stands there: to the letter as it was written, or the row is not what it was."""
    await log.streams.put(0, linked([fields(46, version="07")], head_of(log.written)))
    await log.drain()
    assert (await log.verify(store=False)).fault is None
    log.sql(f"UPDATE auction_audit_log SET extra = '{extra}' WHERE seq = 46")
    report = await log.verify(store=False)
    assert report.fault is not None
    assert report.fault.seq == 46


@pytest.mark.parametrize("seq", [32, 39, 43])
async def test_a_record_that_is_taken_out_of_the_stream_is_found(log: Log, seq: int) -> None:
    """Also of those that the archive has: a stream is trimmed at its beginning only."""
    await log.streams.link.commands.execute_command("XDEL", ShardKeys.of(0).audit, log.written[seq - 1].stream_id)
    report = await log.verify()
    assert report.fault is not None
    assert report.fault.seq == seq


async def test_a_stream_that_is_trimmed_while_it_is_read_is_whole(log: Log) -> None:
    """An archiver that catches up takes what stood behind the page that was read last: nobody has taken anything out."""
    written = await log.streams.grow(0, 3 * PAGE)
    at = AuditArchive.at

    async def trimmed(archive: AuditArchive, shard: int, seqs: list[int]) -> dict[int, AuditEntry]:
        if WRITTEN in seqs:
            await log.drain()
        return await at(archive, shard, seqs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AuditArchive, "at", trimmed)
        report = await log.verify()
    assert (report.fault, report.head) == (None, head_of(written))
    assert len(await log.streams.held(0)) == RETAINED


async def test_a_number_that_is_given_twice_in_the_stream_is_found(log: Log) -> None:
    """The record that pretends to be its neighbour differs from the one the archive has under that number."""
    held = await log.streams.held(0)
    altered = [AuditEntry(entry.stream_id, dict(entry.fields)) for entry in held]
    altered[3].fields["seq"] = altered[4].fields["seq"]
    await log.streams.link.commands.execute_command("DEL", ShardKeys.of(0).audit)
    await log.streams.put(0, altered)
    report = await log.verify()
    assert report.fault is not None
    assert report.fault.seq == int(held[3].fields["seq"])


async def test_a_byte_that_is_no_utf_8_is_found(log: Log) -> None:
    """A broken byte in the file itself makes no text any more; the row is named all the same."""
    log.sql("UPDATE auction_audit_log SET details = CAST(x'7bff7d' AS TEXT) WHERE seq = 12")
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, report.fault.auction_id) == (12, "lot-0")


async def test_a_record_that_was_hashed_again_breaks_the_next_link(log: Log) -> None:
    """Whoever changes a record and its hash leaves a successor that does not follow."""
    forged = dict(log.written[9].fields, details="{}")
    log.sql(f"UPDATE auction_audit_log SET details = '{{}}', hash = '{record_hash(forged)}' WHERE seq = 10")
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, report.fault.reason) == (11, "prev_hash is not the hash of the record before it")
    assert report.faults == 1


@pytest.mark.parametrize("seq", [1, 17, 39])
async def test_a_removed_record_is_missed(log: Log, seq: int) -> None:
    """A row that is gone from the archive is missed at its number."""
    log.sql(f"DELETE FROM auction_audit_log WHERE seq = {seq}")
    await log.streams.link.commands.execute_command("XTRIM", ShardKeys.of(0).audit, "MINID", f"{T0 + 41}-0")
    report = await log.verify()
    assert report.fault is not None
    assert report.fault.seq == seq


async def test_a_cut_tail_is_missed(log: Log) -> None:
    """Records that are gone from the end, of archive and stream alike, are missed because Redis keeps the head."""
    log.sql("DELETE FROM auction_audit_log WHERE seq > 30")
    await log.streams.link.commands.execute_command("DEL", ShardKeys.of(0).audit)
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, report.records) == (31, 30)
    assert "45" in report.fault.reason
    assert (await log.verify(store=False)).fault is None


async def test_a_forged_last_record_is_not_the_head(log: Log) -> None:
    """A whole chain whose last record was replaced does not end in the hash that Redis keeps."""
    await log.drain()
    forged = linked([fields(WRITTEN, "lot-9")], head_of(log.written[:-1]))[0]
    await log.streams.lose(0, await log.streams.held(0), head_of(log.written))
    row = ", ".join(f"{name} = '{value}'" for name, value in forged.fields.items() if name != "seq")
    log.sql(f"UPDATE auction_audit_log SET {row} WHERE seq = {WRITTEN}")
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, "Redis" in report.fault.reason) == (WRITTEN, True)


async def test_an_altered_stream_record_is_found(log: Log) -> None:
    """In the part that is not archived it breaks the chain, in the other part it differs from the archive."""
    held = await log.streams.held(0)
    for index, seq in ((RETAINED + 2, ARCHIVED + 3), (4, ARCHIVED - RETAINED + 5)):
        altered = [AuditEntry(entry.stream_id, dict(entry.fields)) for entry in held]
        altered[index].fields["actor_id"] = "somebody else"
        await log.streams.lose(0, held, head_of(log.written))
        await log.streams.link.commands.execute_command("DEL", ShardKeys.of(0).audit)
        await log.streams.put(0, altered)
        report = await log.verify()
        assert report.fault is not None
        assert report.fault.seq == seq
    assert report.fault.reason == f"archive and stream (id {altered[4].stream_id}) differ in actor_id"


async def test_a_redis_that_lost_records_is_told_from_a_whole_log(log: Log) -> None:
    """After a failover the archive is further on than Redis; once records were written anew, they contradict it."""
    await log.drain()
    known = head_of(log.written[:42])
    await log.streams.lose(0, log.written[42:], known)
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, "Redis lost records" in report.fault.reason) == (43, True)
    news = linked([fields(seq, "lot-9") for seq in range(43, 50)], known)
    await log.streams.put(0, [AuditEntry(f"{T0 + 1_000}-{seq}", entry.fields) for seq, entry in enumerate(news)])
    await log.streams.set_head(0, head_of(news))
    await log.drain()
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, "differ" in report.fault.reason) == (43, True)


async def test_the_first_of_several_faults_is_named(log: Log) -> None:
    """All are counted, and the one with the lowest number is named, wherever it was found."""
    for seq in (22, 35, 7):
        log.sql(f"UPDATE auction_audit_log SET actor_id = 'x' WHERE seq = {seq}")
    report = await log.verify()
    assert report.fault is not None
    assert (report.fault.seq, report.faults) == (7, 4)  # 35 does not fit, and differs from the stream
    line = report_line(report)
    assert (
        line.splitlines()[1]
        == "broken: shard 0, seq 7, auction lot-1: hash is not the hash of its content (and 3 more)"
    )


# --- export -----------------------------------------------------------------------------------------------------------


async def exported(log: Log, form: Any = "jsonl", selection: Selection = EVERYTHING) -> str:
    out = io.StringIO(newline="")
    await write_records(log.reader, [0, 1], selection, form, out, lambda _count: None)
    return out.getvalue()


async def test_json_lines_verify_with_json_and_sha_256_only(log: Log) -> None:
    """Anyone can check an export: nothing of ours is needed, only the rule of the hash."""
    odd = linked([fields(46, details='{"note":"a \\"quote\\", é, 🕰,\\n"}', reserve="1")], head_of(log.written))
    await log.streams.put(0, odd)
    head = "0" * 64
    for number, line in enumerate((await exported(log)).splitlines(), start=1):
        content = json.loads(line)
        assert content["shard"] == 0
        record = content["record"]
        stated = record.pop("hash")
        assert (record["seq"], record["prev_hash"]) == (str(number), head)
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        head = sha256(text.encode()).hexdigest()
        assert head == stated
    assert number == WRITTEN + 1


async def test_csv_keeps_odd_text(log: Log) -> None:
    """Quotes, commas, line ends and fields nobody knows come back from any CSV reader as they were."""
    text = 'a "quote", a; comma\r\nand a line\n\tend'
    odd = linked([fields(46, details=text, reserve='1"')], head_of(log.written))
    await log.streams.put(0, odd)
    rows = list(csv.DictReader(io.StringIO(await exported(log, "csv"), newline="")))
    assert [row["seq"] for row in rows] == [str(seq) for seq in range(1, WRITTEN + 2)]
    assert rows[-1]["details"] == text
    assert json.loads(rows[-1]["extra"]) == {"reserve": '1"'}
    for row, entry in zip(rows, log.written, strict=False):
        assert {name: row[name] for name in COLUMNS} == entry.fields
        assert (row["shard"], row["extra"]) == ("0", "")


async def test_an_export_of_one_auction_and_of_a_time(log: Log) -> None:
    """Only what was asked for, from archive and stream, in order."""
    lines = (await exported(log, selection=Selection("lot-1", EpochMs(T0 + 20), EpochMs(T0 + 44)))).splitlines()
    assert [json.loads(line)["record"]["seq"] for line in lines] == [str(seq) for seq in range(22, 44, 3)]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1800000000000", 1_800_000_000_000),
        ("2027-01-15T08:00:00Z", 1_800_000_000_000),
        ("2027-01-15t09:30:00.250+01:30", 1_800_000_000_250),
        ("1970-01-01T00:00:00Z", 0),
    ],
)
def test_instants_are_read(text: str, at: int) -> None:
    """RFC 3339 with any offset, and epoch ms."""
    assert read_instant(text) == at


@pytest.mark.parametrize("text", ["", "yesterday", "2027-01-15", "2027-01-15T08:00:00", "-5", "1969-12-31T23:59:59Z"])
def test_what_is_no_instant_is_refused(text: str) -> None:
    """Without an offset it is not known which instant is meant; nothing is guessed."""
    with pytest.raises(ValueError, match=r"no instant|time zone|between"):
        read_instant(text)


# --- on PostgreSQL ---------------------------------------------------------------------------------------------------


@pytest.fixture
def database(postgresql_server: PostgreSQL) -> Iterator[PostgresqlDatabase]:
    with postgresql_database(postgresql_server) as made:
        yield made


@pytest.fixture
async def kept(valkey_server: Server, database: PostgresqlDatabase, tmp_path: Path) -> AsyncIterator[Log]:
    """The same log, archived in PostgreSQL."""
    made = Log(valkey_server, tmp_path, database.url)
    try:
        await made.fill()
        yield made
    finally:
        await made.archive.close()
        await made.streams.close()


@pytest.mark.requirement("R3")
async def test_a_log_in_postgresql_is_exported_as_it_was_written(kept: Log) -> None:
    """Archive and stream together, in order: the very strings that the hashes are over."""
    lines = [json.loads(line)["record"] for line in (await exported(kept)).splitlines()]
    assert lines == [entry.fields for entry in kept.written]
    some = (await exported(kept, selection=Selection("lot-1", EpochMs(T0 + 20), EpochMs(T0 + 44)))).splitlines()
    assert [json.loads(line)["record"]["seq"] for line in some] == [str(seq) for seq in range(22, 44, 3)]


@pytest.mark.requirement("R3")
def test_the_commands_read_postgresql(
    kept: Log, database: PostgresqlDatabase, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whole, exported, and broken by one byte in one column: what is said is what is said of a file."""
    settings = kept.settings(audit_url=database.url)
    assert audit.verify(settings) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"whole: 2 shards, {WRITTEN} records"
    path = kept.directory / "out.jsonl"
    assert audit.export(settings, form="jsonl", auction_id="lot-2", since=None, until=None, output=path) == 0
    assert len(path.read_text().splitlines()) == WRITTEN // 3
    database.sql("UPDATE auction_audit_log SET actor_id = 'x' WHERE seq = 17")
    database.sql(f"UPDATE auction_audit_log SET stream_id = '{T0 + 38}-1' WHERE seq = 38")
    assert audit.verify(settings) == 1
    broken = "broken: shard 0, seq 17, auction lot-2: hash is not the hash of its content (and 1 more)"
    assert broken in capfd.readouterr().out.splitlines()


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_command_verifies_and_exports(log: Log, cli: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    """Whole: exit 0, records and head of each shard. One byte flipped: exit 1, and the link is named."""
    whole = cli("verify")
    assert whole.returncode == 0, whole.stderr
    head = log.written[-1].fields["hash"]
    assert whole.stdout.splitlines() == [
        f"shard 0  records {WRITTEN}  head {WRITTEN} {head}",
        f"shard 1  records 0  head 0 {'0' * 64}",
        f"whole: 2 shards, {WRITTEN} records",
    ]
    path = log.directory / "out.csv"
    written = cli("export", "--format", "csv", "--auction", "lot-2", "-o", str(path), "--since", "2027-01-15T08:00:00Z")
    assert (written.returncode, written.stdout) == (0, "")
    assert "15 records written" in written.stderr
    assert path.stat().st_mode & 0o077 == 0
    assert len(path.read_text().splitlines()) == 16
    log.sql('UPDATE auction_audit_log SET details = \'{"bid_id":"b-16"}\' WHERE seq = 17')
    broken = cli("verify")
    assert broken.returncode == 1
    assert "broken: shard 0, seq 17, auction lot-2: hash is not the hash of its content" in broken.stdout
    assert "broken: 1 of 2 shards" in broken.stdout


def test_without_a_redis_the_archive_alone_is_read_and_it_says_so(
    log: Log, cli: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    """No store runs in the data dir: the archive is checked and exported alone, with exit code 0 and a sentence about it."""
    alone = cli("verify", redis=False)
    assert (alone.returncode, "archive alone" in alone.stderr) == (0, True)
    assert f"whole: 1 shards, {ARCHIVED} records" in alone.stdout
    written = cli("export", redis=False)
    assert len(written.stdout.splitlines()) == ARCHIVED
    nothing = cli("verify", redis=False, directory=log.directory / "elsewhere")
    assert (nothing.returncode, nothing.stdout) == (69, "")
    assert "--data-dir" in nothing.stderr
    assert not (log.directory / "elsewhere").exists()


def test_without_an_archive_the_stream_alone_is_read_and_it_says_so(
    log: Log, cli: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    """The stream was trimmed, so its beginning is missing: that is what is found, and why is said."""
    alone = cli("verify", directory=log.directory / "elsewhere")
    assert (alone.returncode, "stream alone" in alone.stderr) == (1, True)
    assert "broken: shard 0, seq 1" in alone.stdout


def test_a_redis_that_does_not_answer(
    log: Log, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A Redis that is named and silent is waited for shortly, and then the archive is verified alone."""
    monkeypatch.setattr(audit, "ANSWER_WITHIN_MS", 100)
    with log.streams.server.frozen():
        assert audit.verify(log.settings()) == 0
    assert "archive alone" in capfd.readouterr().err


def test_settings_that_cannot_be_used_exit_78(log: Log, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong URL is a matter of configuration, and the message says what to write."""
    assert audit.verify(log.settings(audit_url="mysql://db/x")) == 78
    assert "sqlite+aiosqlite:///PATH" in capfd.readouterr().err
    assert audit.verify(log.settings(redis_url="http://db")) == 78


def test_an_archive_that_cannot_be_read_exits_69(log: Log, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is no database is neither whole nor broken: it is named, and nothing is said about the chain."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{log.path}{suffix}").unlink(missing_ok=True)
    log.path.write_text("not a database, " * 100)
    assert audit.verify(log.settings()) == 69
    captured = capfd.readouterr()
    assert "audit.sqlite3" in captured.err
    assert captured.out == ""


def test_a_reader_that_has_seen_enough_is_no_error(log: Log) -> None:
    """`audit export | head -1` ends without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [*SCRIPT, "audit", "export", "--data-dir", str(log.directory)],
            env={name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    finally:
        os.close(writing)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "Broken" not in ended.stderr


def test_progress_on_a_terminal_leaves_stdout_alone(log: Log) -> None:
    """With stderr on a terminal and stdout in a file, what was counted is shown on one and the reports go to the other."""
    master, terminal = os.openpty()
    try:
        ended = subprocess.run(
            [*SCRIPT, "audit", "verify", "--redis-url", log.streams.server.url, "--data-dir", str(log.directory)],
            env={name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
            | {"TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        shown = os.read(master, 65_536).decode()
    finally:
        os.close(terminal)
        os.close(master)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == f"whole: 2 shards, {WRITTEN} records"
    assert "reading" in shown or "records verified" in shown
    assert "whole" not in shown


def test_times_that_cannot_be_read_are_a_usage_error(cli: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    """`--since yesterday` exits 2 and says what to write."""
    wrong = cli("export", "--since", "yesterday")
    assert (wrong.returncode, "2026-03-01T12:00:00Z" in wrong.stderr) == (2, True)


def test_a_time_that_ends_before_it_begins_is_a_usage_error(
    cli: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    """Nothing lies between the two, so whoever asks has mixed them up."""
    for until in (str(T0), str(T0 - 1)):
        answer = cli("export", "--since", str(T0), "--until", until)
        assert (answer.returncode, "--until" in answer.stderr, answer.stdout) == (2, True, "")


async def test_records_of_every_shard_come_in_order(log: Log) -> None:
    """An export is in order of shard, then number."""
    await log.streams.grow(1, 3)
    places = [
        (line["shard"], int(line["record"]["seq"])) for line in map(json.loads, (await exported(log)).splitlines())
    ]
    assert places == [*((0, seq) for seq in range(1, WRITTEN + 1)), (1, 1), (1, 2), (1, 3)]
    assert records(3)[0].fields["seq"] == "1"
