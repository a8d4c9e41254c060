"""The archiver: every record once, whatever happens to it, to Redis and to the database."""

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine.contract.audit import ChainHead, verify
from engine.store.archive import PAGE, ArchiveUnavailableError, AuditArchive
from engine.store.protocol import AuditEntry, AuditStore, StoreUnavailableError
from reconciler import archiver as archiver_module
from reconciler.archiver import REFUSALS_LOGGED_MAX, Archiver
from reconciler.metrics import ReconcilerMetrics
from tests.contracts.stores import until
from tests.engine.store.audit_records import T0, fields, head_of, linked, records
from tests.reconciler.streams import SHARDS, Streams
from tests.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R3"), pytest.mark.requirement("B7")]

RETAINED = 10


class BreakableArchive(AuditArchive):
    """An archive whose database can be away."""

    away = False
    asked = 0

    async def append(self, shard: int, entries: Sequence[AuditEntry]) -> list[AuditEntry]:
        self.asked += 1
        if self.away:
            raise ArchiveUnavailableError("the database is away")
        return await super().append(shard, entries)


class Bench:
    """A stream, an archive, and archivers between them."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.streams = Streams(server)
        self.url = f"sqlite+aiosqlite:///{directory}/audit.sqlite3"
        self.archive = BreakableArchive(self.url)
        self.registry = CollectorRegistry()
        self.metrics = ReconcilerMetrics(self.registry)

    def archiver(self, store: AuditStore | None = None, archive: AuditArchive | None = None) -> Archiver:
        return Archiver(
            store or self.streams.store, archive or self.archive, self.metrics, shards=SHARDS, retained=RETAINED
        )

    async def drain(self, archiver: Archiver | None = None) -> None:
        archiver = archiver or self.archiver()
        while await archiver.archive_once():
            pass

    async def archived(self, shard: int = 0) -> list[AuditEntry]:
        return await self.archive.walk(shard, 0, 100_000)

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"auctions_audit_archive_{name}_events")


@pytest.fixture
async def bench(valkey_server: Server, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(valkey_server, tmp_path)
    try:
        yield made
    finally:
        await made.archive.close()
        await made.streams.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that do not let a test wait."""
    for name in ("POLL_S", "BACKOFF_FIRST_S", "BACKOFF_MAX_S"):
        monkeypatch.setattr(archiver_module, name, 0.01)


def whole(entries: list[AuditEntry], count: int) -> bool:
    return len(entries) == count and verify([entry.fields for entry in entries]) is None


# --- moving records ---------------------------------------------------------------------------------------------------


async def test_records_are_archived_and_the_last_ones_stay(bench: Bench) -> None:
    """All of every shard's stream is in the archive to the letter; the stream keeps the last few, and nothing lags."""
    written = {shard: await bench.streams.grow(shard, 30 + shard) for shard in range(SHARDS)}
    await bench.drain()
    for shard in range(SHARDS):
        assert await bench.archived(shard) == written[shard]
        assert await bench.streams.held(shard) == written[shard][-RETAINED:]
    assert (bench.metric("lag"), bench.metric("refused")) == (0, 0)


async def test_a_backlog_is_moved_page_by_page(bench: Bench) -> None:
    """While there is more than a page the archiver says so; the lag counts down to zero."""
    written = await bench.streams.grow(0, 2 * PAGE + 50)
    archiver, lags = bench.archiver(), []
    while await archiver.archive_once():
        lags.append(bench.metric("lag"))
    assert lags == [PAGE + 50, 50]
    assert bench.metric("lag") == 0
    assert await bench.archived() == written


async def test_what_comes_later_is_moved_later(bench: Bench) -> None:
    """A running archiver takes up where it stopped, record by record."""
    archiver = bench.archiver()
    for count in (1, 3, 20, 1):
        await bench.streams.grow(0, count)
        await bench.drain(archiver)
    assert whole(await bench.archived(), 25)
    assert len(await bench.streams.held(0)) == RETAINED


async def test_a_short_stream_is_not_trimmed(bench: Bench) -> None:
    """Fewer records than are retained all stay; at least the last one stays even if none is to be retained."""
    written = await bench.streams.grow(0, RETAINED)
    await bench.drain()
    assert await bench.streams.held(0) == written
    archiver = Archiver(bench.streams.store, bench.archive, bench.metrics, shards=SHARDS, retained=0)
    await bench.drain(archiver)
    assert await bench.streams.held(0) == written[-1:]


# --- killed, doubled --------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """The archiver is no more."""


class Mortal:
    """Something of which the n-th call kills whoever calls, before or after it took effect."""

    def __init__(self, inner: Any, die: Callable[[], bool]) -> None:
        self._inner = inner
        self._die = die

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            if self._die():
                raise KilledError
            answer = await getattr(self._inner, name)(*args)
            if self._die():
                raise KilledError
            return answer

        return call


async def test_killed_before_and_after_every_single_call(bench: Bench) -> None:
    """Wherever an archiver dies, the next one leaves no gap and no double, and trims nothing that is not archived."""
    total = 0
    for fatal in range(60):
        total += len(await bench.streams.grow(0, 7))
        calls = iter(range(1_000))
        die = lambda calls=calls, fatal=fatal: next(calls) == fatal  # noqa: E731
        with pytest.raises(KilledError) if fatal < 20 else _either():
            await bench.drain(bench.archiver(Mortal(bench.streams.store, die), Mortal(bench.archive, die)))
        held = [int(entry.fields["seq"]) for entry in await bench.streams.held(0)]
        done = [int(entry.fields["seq"]) for entry in await bench.archived()]
        assert sorted({*held, *done}) == list(range(1, total + 1))
    await bench.drain()
    assert whole(await bench.archived(), total)


class _either:  # noqa: N801 - read as a word
    """A long run may be over before its fatal call."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is KilledError


async def test_two_archivers_at_once_are_harmless(bench: Bench) -> None:
    """Two of them, each with connections of its own, on a stream that grows: every record once, chain whole."""
    other_streams, other_archive = Streams(bench.streams.server), AuditArchive(bench.url)
    first, second = bench.archiver(), bench.archiver(other_streams.store, other_archive)
    try:
        for count in (20, 1, 130, 5, 40):
            await bench.streams.grow(0, count)
            await asyncio.gather(bench.drain(first), bench.drain(second))
        assert whole(await bench.archived(), 196)
        assert bench.metric("refused") == 0
    finally:
        await other_streams.close()
        await other_archive.close()


# --- what does not fit ------------------------------------------------------------------------------------------------


async def test_a_record_that_contradicts_the_archive_is_kept_and_told(bench: Bench) -> None:
    """The archive keeps its own, the stream is not trimmed from there on, an error names it, a gauge counts it."""
    written = await bench.streams.grow(0, 40)
    await bench.drain()
    held = await bench.streams.held(0)
    altered = [AuditEntry(entry.stream_id, dict(entry.fields)) for entry in held]
    altered[3].fields["actor_id"] = "somebody else"
    await bench.streams.lose(0, held, head_of(written))
    await bench.streams.put(0, altered)
    with capture_logs() as logs:
        archiver = bench.archiver()
        await bench.drain(archiver)
        await bench.streams.grow(0, 30)
        await bench.drain(archiver)
    refused = [line for line in logs if line["event"] == "audit_record_refused"]
    assert [(line["shard"], line["seq"], line["log_level"]) for line in refused] == [(0, "34", "error")]
    assert bench.metric("refused") == 1
    assert (await bench.archived())[:40] == written
    assert len(await bench.archived()) == 70
    assert (await bench.streams.held(0))[0] == altered[3]


async def test_a_broken_chain_is_archived_as_it_is(bench: Bench) -> None:
    """The archive keeps the evidence: a record whose hash does not fit is moved to the letter, and named in the log."""
    written = records(20)
    written[4].fields["details"] = "forged"
    await bench.streams.put(0, written)
    await bench.streams.set_head(0, head_of(written))
    with capture_logs() as logs:
        await bench.drain()
    broken = [line for line in logs if line["event"] == "audit_chain_broken"]
    assert [(line["seq"], line["reason"]) for line in broken] == [("5", "hash is not the hash of its content")]
    assert await bench.archived() == written


async def test_records_nobody_archived_are_missed(bench: Bench) -> None:
    """A stream that begins behind the archive's end was trimmed by somebody else: the gap is named once, work goes on."""
    written = await bench.streams.grow(0, 30)
    await bench.streams.lose(0, written[:10], head_of(written))
    with capture_logs() as logs:
        await bench.drain()
    events = [line["event"] for line in logs]
    assert events.count("audit_records_missing") == events.count("audit_chain_broken") == 1
    assert await bench.archived() == written[10:]


@pytest.mark.parametrize("later", [True, False], ids=["ids-go-on", "ids-go-back"])
@pytest.mark.parametrize("rewritten", [3, 5, 9])
async def test_a_redis_that_lost_records_and_counts_on(bench: Bench, later: bool, rewritten: int) -> None:
    """A failover lost five archived records: they stay archived, what replaced them is refused, the rest goes on."""
    written = await bench.streams.grow(0, 40)
    archiver = bench.archiver()
    await bench.drain(archiver)
    known = head_of(written[:35])
    await bench.streams.lose(0, written[35:], known)
    news = linked([fields(seq, "lot-9") for seq in range(36, 36 + rewritten)], known)
    # The new primary's clock may be behind that of the old one: its ids are lower than the lost ones.
    first = T0 + 1_000 if later else T0 + 36
    news = [AuditEntry(f"{first}-{1 + number}", entry.fields) for number, entry in enumerate(news)]
    await bench.streams.put(0, news)
    await bench.streams.set_head(0, head_of(news))
    with capture_logs() as logs:
        for _ in range(5):
            await bench.drain(archiver)
    assert await bench.archived() == [*written, *news[5:]]
    refused = [line["seq"] for line in logs if line["event"] == "audit_record_refused"]
    assert refused == [str(seq) for seq in range(36, 36 + min(rewritten, 5))]
    assert bench.metric("refused") == min(rewritten, 5)
    assert [entry for entry in await bench.streams.held(0) if entry in news] == news


async def test_what_a_person_has_put_aside_makes_room(bench: Bench, tmp_path: Path) -> None:
    """The lost rows are exported and deleted: the next archiver takes what replaced them, and the stream is trimmed again."""
    written = await bench.streams.grow(0, 40)
    await bench.drain()
    await bench.streams.lose(0, written[35:], head_of(written[:35]))
    news = linked([fields(seq, "lot-9") for seq in range(36, 66)], head_of(written[:35]))
    await bench.streams.put(0, news)
    await bench.streams.set_head(0, head_of(news))
    await bench.drain()
    assert (bench.metric("refused"), await bench.streams.held(0)) == (5, news)
    with closing(sqlite3.connect(tmp_path / "audit.sqlite3")) as connection, connection:
        connection.execute("DELETE FROM auction_audit_log WHERE shard = 0 AND seq BETWEEN 36 AND 40")
    await bench.drain()
    assert whole(await bench.archived(), 65)
    assert await bench.streams.held(0) == news[-RETAINED:]
    assert bench.metric("refused") == 0


async def test_many_refusals_do_not_fill_the_log(bench: Bench) -> None:
    """Each is counted; the log names the first ones."""
    await bench.archive.create()
    await bench.archive.append(0, linked(fields(seq, "other") for seq in range(1, 101)))
    await bench.streams.grow(0, 100)
    with capture_logs() as logs:
        await bench.drain()
    assert len([line for line in logs if line["event"] == "audit_record_refused"]) == REFUSALS_LOGGED_MAX
    assert bench.metric("refused") == 100


async def test_a_record_without_a_number_does_not_stop_the_rest(bench: Bench) -> None:
    """What somebody added by hand is refused and stays; the records around it are archived."""
    written = await bench.streams.grow(0, 5)
    await bench.streams.put(0, [AuditEntry(f"{T0 + 5}-7", {"seq": "many", "note": "by hand"})])
    more = await bench.streams.grow(0, 5)
    await bench.drain()
    assert await bench.archived() == [*written, *more]
    assert bench.metric("refused") == 1


# --- away and back ----------------------------------------------------------------------------------------------------


async def test_the_database_away_and_back(bench: Bench, quick: None) -> None:
    """It tries again, says so once, the lag grows meanwhile, and afterwards nothing is missing."""
    with capture_logs() as logs:
        running = asyncio.create_task(bench.archiver().run())
        await bench.streams.grow(0, 15)
        await until(lambda: bench.metric("lag") == 0 and bench.archive.asked > 0)
        bench.archive.away = True
        await bench.streams.grow(0, 15)
        asked = bench.archive.asked
        await until(lambda: bench.archive.asked > asked + 5)
        await until(lambda: bench.metric("lag") == 15)
        assert len(await bench.streams.held(0)) == RETAINED + 15
        bench.archive.away = False
        await until(lambda: any(line["event"] == "archiver_resumed" for line in logs))
        assert bench.metric("lag") == 0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert [line["event"] for line in logs] == ["archiver_waiting", "archiver_resumed"]
    assert "the database is away" in logs[0]["error"]
    assert whole(await bench.archived(), 30)


async def test_redis_away_and_back(bench: Bench, quick: None) -> None:
    """A Redis that does not answer is waited for; afterwards nothing is missing."""
    streams = Streams(bench.streams.server, call_deadline_ms=100)
    try:
        with capture_logs() as logs:
            await bench.streams.grow(0, 15)
            running = asyncio.create_task(bench.archiver(streams.store).run())
            await until(lambda: bench.metric("lag") == 0 and bench.archive.asked > 0)
            with bench.streams.server.frozen():
                await until(lambda: any(line["event"] == "archiver_waiting" for line in logs))
            await bench.streams.grow(0, 15)
            await until(lambda: any(line["event"] == "archiver_resumed" for line in logs))
            await until(lambda: bench.archive.asked > 1)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await bench.drain()
        assert [line["event"] for line in logs] == ["archiver_waiting", "archiver_resumed"]
        assert whole(await bench.archived(), 30)
    finally:
        await streams.close()


async def test_waiting_grows_to_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pauses between attempts double up to five seconds, and begin anew after a success."""
    pauses: list[float] = []
    outcomes = iter([StoreUnavailableError("x")] * 9 + [True] + [StoreUnavailableError("x")] * 2 + [False])

    async def once(_self: Archiver) -> bool:
        outcome = next(outcomes, None)
        if outcome is None:
            raise asyncio.CancelledError
        if isinstance(outcome, bool):
            return outcome
        raise outcome

    async def sleep(delay_s: float) -> None:
        pauses.append(delay_s)

    monkeypatch.setattr(Archiver, "archive_once", once)
    monkeypatch.setattr(archiver_module.asyncio, "sleep", sleep)
    archive = AuditArchive(f"sqlite+aiosqlite:///{tmp_path}/audit.sqlite3")
    store: Any = None
    with pytest.raises(asyncio.CancelledError):
        await Archiver(store, archive, ReconcilerMetrics(CollectorRegistry()), shards=1, retained=1).run()
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 0.1, 0.2, 1.0]


async def test_cancelled_anywhere_it_leaves_no_gap(bench: Bench, quick: None) -> None:
    """Stopped at random again and again while records come: every record is archived once in the end."""
    seed = random.randrange(2**32)
    print(f"SEED={seed}")
    chance, total = random.Random(seed), 0
    for _ in range(30):
        running = asyncio.create_task(bench.archiver().run())
        total += len(await bench.streams.grow(0, chance.randrange(1, 30)))
        for _ in range(chance.randrange(40)):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await bench.drain()
    assert whole(await bench.archived(), total)
    assert verify([entry.fields for entry in await bench.streams.held(0)], _before(await bench.streams.held(0))) is None


def _before(entries: list[AuditEntry]) -> ChainHead:
    first = entries[0].fields
    return ChainHead(int(first["seq"]) - 1, first["prev_hash"])
