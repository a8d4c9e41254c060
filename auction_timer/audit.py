"""`auction-timer audit`: check the audit log, and write it out. Both read the archive and the streams of Redis directly.

`verify` walks every shard's chain from its first record to the head that Redis keeps. What it finds:

    a record was changed       its hash does not fit its content
    ... and hashed again       the next record's prev_hash does not fit; of the last one, Redis' head does not
    ... in one place only      stream and archive differ
    a record was removed       the numbers have a gap; at the end, Redis' head is further on
    Redis lost its last ones   the archive is further on than Redis' head
    a stream id was changed    the ids do not increase, or it is none, or the stream has another one

No hash is over the stream ids. One that was changed to another that would fit is found only while the stream has the record.
"""

import asyncio
import csv
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TextIO
from urllib.parse import quote

from rich.console import Console

from auction_timer.embedded import socket_path_for
from auction_timer.errors import DataDirError
from auction_timer.processes import EXIT_CONFIG
from auction_timer.roles import EXIT_FAILURE, EXIT_OK, EXIT_UNAVAILABLE, data_dir_of, loop_factory
from engine.clock import SystemClock
from engine.contract import keys
from engine.contract.audit import ChainHead
from engine.contract.cursors import START, stream_order
from engine.domain.instants import EpochMs
from engine.settings import Settings
from engine.store.archive import (
    FIELDS,
    PAGE,
    ArchiveUnavailableError,
    ArchiveUrlError,
    AuditArchive,
    Selection,
    archive_url,
    misfit,
    seq_of,
)
from engine.store.audit_reader import AuditReader
from engine.store.link import RedisLink, RedisRefusedError, RedisUrlError
from engine.store.protocol import AuditEntry, AuditStore, StoreUnavailableError
from engine.store.redis import RedisStore

ANSWER_WITHIN_MS: Final = 2_000
"""A person waits for the answer; a failover that takes longer is worth a second call."""
COLUMNS: Final = ("seq", *FIELDS)
_STREAM_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

Form = Literal["jsonl", "csv"]
Progress = Callable[[int], None]
"""Called with the number of records of each page."""


class NothingToReadError(Exception):
    """Neither Redis nor an archive could be reached. The message says where they were looked for."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A link of a shard's chain that does not hold: at which number, of which auction (if one can tell), and why."""

    seq: int
    auction_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What verifying a shard found. `head` is its last record; `fault` the first broken link, `faults` how many."""

    shard: int
    records: int = 0
    head: ChainHead = ChainHead()  # noqa: RUF009 - it is frozen
    place: tuple[int, int] = (0, 0)
    """Of the last record whose stream id could be read."""
    fault: Fault | None = None
    faults: int = 0

    def blaming(self, fault: Fault) -> "ShardReport":
        """The same with one more fault."""
        first = fault if self.fault is None or fault.seq < self.fault.seq else self.fault
        return replace(self, fault=first, faults=self.faults + 1)


# --- verify -----------------------------------------------------------------------------------------------------------


async def verify_shard(reader: AuditReader, shard: int, progress: Progress) -> ShardReport:
    """Walk a shard's chain.

    Records that are written meanwhile do no harm: the chain must reach the head of before, and not pass that of after.

    Raises:
        StoreUnavailableError, ArchiveUnavailableError: one of the two went away meanwhile.
    """
    before = (await reader.store.head(shard)).chain if reader.store is not None else ChainHead()
    report = ShardReport(shard)
    async for entries in reader.walk(shard):
        progress(len(entries))
        for entry in entries:
            report = _placed(_linked(report, entry.fields, before), entry)
    if reader.store is None:
        return report
    if report.head.seq < before.seq:
        missing = f"nothing is there, and the head of the chain in Redis is {before.seq}: the end was cut off"
        report = report.blaming(Fault(report.head.seq + 1, "", missing))
    after = (await reader.store.head(shard)).chain
    if report.head.seq > after.seq:
        ahead = f"the head of the chain in Redis is {after.seq}: Redis lost records, or is not the one these came from"
        report = report.blaming(Fault(after.seq + 1, "", ahead))
    async for fault in _differences(reader, shard):
        report = report.blaming(fault)
    return report


def _linked(report: ShardReport, fields: Mapping[str, str], known: ChainHead) -> ShardReport:
    """The report after one more record. A broken link is counted once: the walk goes on from the record as it is."""
    expected, auction_id = report.head.seq + 1, fields.get("auction_id", "")
    if reason := misfit(fields, report.head):
        report = report.blaming(Fault(expected, auction_id, reason))
    head = ChainHead(seq_of(fields) or expected, fields.get("hash", ""))
    if head.seq == known.seq and head.hash != known.hash:
        report = report.blaming(Fault(head.seq, auction_id, "hash is not the one that Redis keeps as the head's"))
    return replace(report, head=head, records=report.records + 1)


def _placed(report: ShardReport, entry: AuditEntry) -> ShardReport:
    """The report after the same record's place in the stream."""
    auction_id = entry.fields.get("auction_id", "")
    if not _STREAM_ID.fullmatch(entry.stream_id):
        return report.blaming(Fault(report.head.seq, auction_id, "stream_id is not the id of an entry of a stream"))
    place = stream_order(entry.stream_id)
    if place <= report.place:
        behind = "stream_id does not lie behind that of the record before it"
        report = report.blaming(Fault(report.head.seq, auction_id, behind))
    return replace(report, place=place)


async def _differences(reader: AuditReader, shard: int) -> AsyncIterator[Fault]:
    """Records that stand in the stream and otherwise in the archive, and those that are missing within the stream."""
    assert reader.store is not None
    if reader.archive is None:
        return
    after, last = START, None
    while entries := await reader.store.audit_entries(shard, after, PAGE):
        after = entries[-1].stream_id
        streamed = [(seq, entry) for entry in entries if (seq := seq_of(entry.fields)) is not None]
        held = await reader.archive.at(shard, [seq for seq, _ in streamed])
        for seq, entry in streamed:
            if last is not None and seq != last + 1 and not await _is_trimmed(reader.store, shard, last):
                # It is trimmed from its beginning only, and written in order.
                yield Fault(last + 1, "", f"the stream has record {seq} behind {last} (id {entry.stream_id})")
            last = seq
            if seq in held and held[seq] != entry:
                names = {
                    name
                    for name in (*entry.fields, *held[seq].fields)
                    if entry.fields.get(name) != held[seq].fields.get(name)
                }
                names |= {"stream_id"} if held[seq].stream_id != entry.stream_id else set()
                yield Fault(
                    seq,
                    entry.fields.get("auction_id", ""),
                    f"archive and stream (id {entry.stream_id}) differ in {', '.join(sorted(names))}",
                )


async def _is_trimmed(store: AuditStore, shard: int, seq: int) -> bool:
    """Whether an archiver has taken what stood behind a number while the stream was read."""
    first = await store.audit_entries(shard, START, 1)
    return not first or (seq_of(first[0].fields) or 0) > seq


def report_line(report: ShardReport) -> str:
    """A report for a person."""
    line = f"shard {report.shard}  records {report.records}  head {report.head.seq} {report.head.hash}"
    if report.fault is None:
        return line
    fault = report.fault
    more = f" (and {report.faults - 1} more)" if report.faults > 1 else ""
    of = f", auction {fault.auction_id}" if fault.auction_id else ""
    return f"{line}\nbroken: shard {report.shard}, seq {fault.seq}{of}: {fault.reason}{more}"


def verdict_line(reports: Sequence[ShardReport]) -> str:
    """All reports in one line."""
    records, broken = sum(report.records for report in reports), sum(report.fault is not None for report in reports)
    if broken:
        return f"broken: {broken} of {len(reports)} shards, {records} records"
    return f"whole: {len(reports)} shards, {records} records"


# --- export -----------------------------------------------------------------------------------------------------------


async def write_records(
    reader: AuditReader, shards: list[int], selection: Selection, form: Form, out: TextIO, progress: Progress
) -> int:
    """Write records in order of shard and number; how many. `out` needs no other encoding than ASCII for JSON Lines."""
    written = 0
    table = csv.writer(out, quoting=csv.QUOTE_ALL) if form == "csv" else None
    if table is not None:
        table.writerow(("shard", *COLUMNS, "extra"))
    for shard in shards:
        async for entries in reader.walk(shard, selection):
            for entry in entries:
                if table is not None:
                    table.writerow(_cells(shard, entry.fields))
                else:
                    out.write(json.dumps({"shard": shard, "record": entry.fields}, separators=(",", ":")) + "\n")
            written += len(entries)
            progress(len(entries))
    return written


def _cells(shard: int, fields: Mapping[str, str]) -> list[str]:
    extra = {name: value for name, value in fields.items() if name not in COLUMNS}
    return [str(shard), *(fields.get(name, "") for name in COLUMNS), json.dumps(extra) if extra else ""]


# --- where they are ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(settings: Settings, tell: Callable[[str], None]) -> AsyncIterator[tuple[AuditReader, list[int]]]:
    """The audit log of a deployment and its shards; `tell` gets a sentence for each part that could not be reached.

    Raises:
        NothingToReadError: neither part could be reached.
        ArchiveUnavailableError: there is an archive, and it cannot be read.
        ArchiveUrlError, RedisUrlError, RedisRefusedError, DataDirError: the settings cannot be used.
    """
    archive = AuditArchive(archive_url(settings.audit_url, settings.data_dir))
    link = _link(settings)
    store = RedisStore(link, SystemClock()) if link is not None else None
    try:
        shards = set(await archive.shards())
        answered = await _shard_count(link) if link is not None else None
        if answered is None:
            store = None
            tell("no Redis answers: this is the archive alone, and what is not archived yet is not looked at")
        else:
            shards |= set(range(answered or settings.shards))
        if not await archive.exists():
            if store is None:
                raise NothingToReadError(
                    f"there is no archive at {archive.shown}, and no Redis answers: name one with --redis-url, "
                    "--data-dir or --audit-url"
                )
            tell(f"there is no archive at {archive.shown}: this is the stream alone")
        yield AuditReader(store, archive), sorted(shards)
    finally:
        if link is not None:
            await link.close()
        await archive.close()


def _link(settings: Settings) -> RedisLink | None:
    """A connection to the Redis that is named, or else to the embedded store if it runs."""
    url = settings.redis_url
    if url is None:
        socket = socket_path_for(data_dir_of(settings))
        if not socket.exists():
            return None
        url = f"unix://{quote(str(socket))}"
    return RedisLink(url, SystemClock(), call_deadline_ms=ANSWER_WITHIN_MS)


async def _shard_count(link: RedisLink) -> int | None:
    """How many shards the deployment has; 0 where none has started yet, None if Redis does not answer."""
    try:
        found = await link.ask(keys.META, "HGET", keys.META, "shards")
    except StoreUnavailableError:
        return None
    return int(found or 0)


# --- the commands -----------------------------------------------------------------------------------------------------


def verify(settings: Settings) -> int:
    """Verify every shard, reports on stdout; the exit code."""
    reports: list[ShardReport] = []

    async def work(progress: Progress) -> int:
        async with opened(settings, _tell) as (reader, shards):
            for shard in shards:
                report = await verify_shard(reader, shard, progress)
                reports.append(report)
        return EXIT_FAILURE if any(report.fault for report in reports) else EXIT_OK

    code = _run(work, "verified")
    # After the progress, which owns the terminal while it is shown.
    for report in reports:
        print(report_line(report))
    if code in (EXIT_OK, EXIT_FAILURE):
        print(verdict_line(reports))
    return code


def export(
    settings: Settings,
    *,
    form: Form,
    auction_id: str | None,
    since: int | None,
    until: int | None,
    output: Path | None,
) -> int:
    """Export the records of an auction, of a time, or all, to a file or stdout; the exit code."""
    selection = Selection(
        auction_id,
        None if since is None else EpochMs(since),
        None if until is None else EpochMs(until),
    )

    async def work(progress: Progress) -> int:
        async with opened(settings, _tell) as (reader, shards):
            with _output(output) as out:
                written = await write_records(reader, shards, selection, form, out, progress)
        _tell(f"{written} records written")
        return EXIT_OK

    return _run(work, "written")


def _output(path: Path | None) -> TextIO:
    """Where to write: UTF-8, its owner's alone, line ends as they are given. Bytes that are no UTF-8 stay what they are."""
    target = (
        os.dup(sys.stdout.fileno()) if path is None else os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    )
    return os.fdopen(target, "w", encoding="utf-8", errors="surrogateescape", newline="")


def _run(work: Callable[[Progress], Coroutine[Any, Any, int]], verb: str) -> int:
    """Run a command with its progress on stderr, if that is a terminal; the exit code."""
    console = Console(stderr=True)
    records = 0
    with console.status("reading") as status, asyncio.Runner(loop_factory=loop_factory()) as runner:

        def show(count: int) -> None:
            nonlocal records
            records += count
            status.update(f"{records:,} records {verb}")

        try:
            return runner.run(work(show))
        except (ArchiveUrlError, RedisUrlError, RedisRefusedError, DataDirError) as error:
            _tell(str(error))
            return EXIT_CONFIG
        except BrokenPipeError:  # whoever reads it has seen enough (`| head`)
            return EXIT_FAILURE
        except (StoreUnavailableError, ArchiveUnavailableError, NothingToReadError, OSError) as error:
            _tell(str(error))
            return EXIT_UNAVAILABLE


def _tell(sentence: str) -> None:
    print(f"auction-timer: {sentence}", file=sys.stderr, flush=True)
