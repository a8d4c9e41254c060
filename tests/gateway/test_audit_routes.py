"""Tests for gateway.audit_routes: one auction's records, from the stream and a real archive."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from engine.contract.audit import record_hash, verify
from engine.contract.cursors import START
from engine.store.archive import ArchiveUnavailableError, AuditArchive
from engine.store.protocol import AuditEntry, StoreUnavailableError
from tests.engine.store.archives import postgresql_database
from tests.gateway.desk import CALLERS, Desk, bearing, desk, without_ids
from tests.postgresql import PostgreSQL


@asynccontextmanager
async def archive_of(directory: Path) -> AsyncIterator[AuditArchive]:
    """The archive that a desk with this data dir reads."""
    archive = AuditArchive(f"sqlite+aiosqlite:///{directory}/audit.sqlite3")
    await archive.create()
    try:
        yield archive
    finally:
        await archive.close()


async def move(made: Desk, archive: AuditArchive, *, keep: int = 0) -> None:
    """What an archiver does: insert everything, then trim but for the last `keep`."""
    entries = await made.memory.audit_entries(0, START, 1_000)
    await archive.append(0, entries)
    memory = made.memory.shards[0]
    memory.audit = memory.audit[len(memory.audit) - keep :]


async def pages(made: Desk, limit: int, auction_id: str = "a-1") -> list[dict[str, Any]]:
    """All records, page by page."""
    found: list[dict[str, Any]] = []
    query = {"limit": str(limit)}
    while True:
        answer = await made.http.get(f"/auctions/{auction_id}/audit", params=query)
        assert answer.status_code == 200, answer.text
        found += answer.json()["records"]
        if answer.json()["next_cursor"] is None:
            return found
        query["cursor"] = answer.json()["next_cursor"]


async def busy(made: Desk) -> None:
    """Two auctions with records in turn: nine of `a-1`."""
    await made.register("a-1")
    await made.register("a-2")
    for _ in range(3):
        for auction_id in ("a-1", "a-2"):
            for command in ("pause", "resume"):
                await made.http.post(f"/auctions/{auction_id}/{command}")
    await made.http.post("/auctions/a-1/cancel", json={"reason": "Größe \N{WARNING SIGN}"})


@pytest.mark.requirement("R26", "R34")
@pytest.mark.parametrize("limit", [1, 2, 3, 9, 500])
@pytest.mark.parametrize("archived", ["nothing", "the half", "everything"])
async def test_pages_cover_an_auction_once_wherever_its_records_lie(tmp_path: Path, limit: int, archived: str) -> None:
    """In order, each as it was written, with its shard and its number; nothing of the other auction."""
    async with desk(data_dir=tmp_path) as made, archive_of(tmp_path) as archive:
        await made.register("a-1")
        await made.register("a-2")
        for number in range(3):
            if archived == "the half" and number == 1:
                await move(made, archive, keep=2)
            for auction_id in ("a-1", "a-2"):
                for command in ("pause", "resume"):
                    await made.http.post(f"/auctions/{auction_id}/{command}")
        await made.http.post("/auctions/a-1/cancel", json={"reason": "Größe \N{WARNING SIGN}"})
        if archived == "everything":
            await move(made, archive)
        records = await pages(made, limit)
        facts = [record["event_type"].removeprefix("auction_timer_") for record in records]
        assert facts == ["registered", "started", *["paused", "resumed"] * 3, "cancelled"]
        assert [record["seq"] for record in records] == sorted({record["seq"] for record in records})
        assert all((record["shard"], record["auction_id"]) == (0, "a-1") for record in records)
        assert records[-1]["details"] == {"reason": "Größe \N{WARNING SIGN}"}
        assert records[0]["prev_status"] is None


@pytest.mark.integration
@pytest.mark.requirement("R3", "R26", "R34")
@pytest.mark.parametrize("limit", [2, 500])
async def test_pages_are_the_same_out_of_postgresql(postgresql_server: PostgreSQL, limit: int) -> None:
    """Records of archive and stream, and the 404 of an auction that has none."""
    with postgresql_database(postgresql_server) as database:
        archive = AuditArchive(database.url)
        await archive.create()
        try:
            async with desk(audit_url=database.url) as made:
                await busy(made)
                whole = await pages(made, 500)
                await move(made, archive, keep=4)
                assert await pages(made, limit) == whole
                assert len(whole) == 9
                unknown = await made.http.get("/auctions/a-9/audit")
                assert unknown.status_code == 404
        finally:
            await archive.close()


@pytest.mark.requirement("B7")
async def test_the_chain_can_be_checked_from_what_is_shown(tmp_path: Path) -> None:
    """Numbers as decimal digits, details as compact JSON, null as nothing: that gives the very hash."""
    async with desk(data_dir=tmp_path) as made, archive_of(tmp_path):
        await busy(made)
        shown = sorted([*(await pages(made, 4)), *(await pages(made, 500, "a-2"))], key=lambda record: record["seq"])
        texts = []
        for record in shown:
            fields = {name: "" if value is None else str(value) for name, value in record.items() if name != "shard"}
            texts.append(fields | {"details": orjson.dumps(record["details"]).decode()})
        assert verify(texts) is None
        assert [record_hash(text) for text in texts] == [record["hash"] for record in shown]


@pytest.mark.requirement("R34")
async def test_a_record_that_is_archived_while_it_is_read_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archiver that comes between two steps of the reader, whichever they are, hides nothing."""
    async with desk(data_dir=tmp_path) as made, archive_of(tmp_path) as archive:
        await made.register()
        whole = await pages(made, 500)
        stream = list(made.memory.shards[0].audit)
        for step in ("walk", "last", "stream"):
            made.memory.shards[0].audit = list(stream)
            with monkeypatch.context() as patch:
                _archive_before(patch, made, archive, step)
                assert await pages(made, 500) == whole, step


def _archive_before(patch: pytest.MonkeyPatch, made: Desk, archive: AuditArchive, step: str) -> None:
    """Have everything archived and trimmed right after the reader's first look of this kind."""
    done: list[str] = []

    async def once(name: str) -> None:
        if name == step and not done:
            done.append(name)
            await move(made, archive)

    real_walk, real_last, real_entries = AuditArchive.walk, AuditArchive.last, made.memory.audit_entries

    async def walk(self: AuditArchive, *args: Any, **kwargs: Any) -> list[AuditEntry]:
        found = await real_walk(self, *args, **kwargs)
        await once("walk")
        return found

    async def last(self: AuditArchive, *args: Any, **kwargs: Any) -> AuditEntry | None:
        found = await real_last(self, *args, **kwargs)
        await once("last")
        return found

    async def entries(*args: Any) -> list[AuditEntry]:
        found = await real_entries(*args)
        if not done and step == "stream":
            done.append(step)
            await archive.append(0, found)
            made.memory.shards[0].audit = []
        return found

    patch.setattr(AuditArchive, "walk", walk)
    patch.setattr(AuditArchive, "last", last)
    patch.setattr(made.memory, "audit_entries", entries)


# Who may.


@pytest.mark.requirement("R24", "R34")
@pytest.mark.parametrize("caller", CALLERS)
async def test_who_may_read_the_audit(tmp_path: Path, caller: str) -> None:
    """The owner and the scope `ops`; to everybody else the auction is not there."""
    async with desk(tokens=True, data_dir=tmp_path) as made, archive_of(tmp_path):
        await made.register()
        known = await made.http.get("/auctions/a-1/audit", headers=bearing(caller))
        unknown = await made.http.get("/auctions/a-2/audit", headers=bearing(caller))
        assert unknown.status_code == 404
        if caller in {"owner", "operator by scope"}:
            assert known.status_code == 200
            assert len(known.json()["records"]) == 2
            return
        assert known.status_code == 404
        assert orjson.dumps(without_ids(known)).replace(b"a-1", b"a-2") == orjson.dumps(without_ids(unknown))


@pytest.mark.requirement("R34")
async def test_the_records_of_a_forgotten_auction_are_the_operators(tmp_path: Path) -> None:
    """Who its owner was is forgotten with the timer; the records stay."""
    async with desk(tokens=True, data_dir=tmp_path) as made, archive_of(tmp_path) as archive:
        await made.register()
        await move(made, archive)
        made.memory.shards[0].timers.clear()
        for caller, status in (("owner", 404), ("operator by scope", 200)):
            assert (await made.http.get("/auctions/a-1/audit", headers=bearing(caller))).status_code == status


# What goes wrong.


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "501"}, "limit"),
        *(({"cursor": cursor}, "cursor") for cursor in ("", "x", "-1", "1" + "0" * 15)),
    ],
)
async def test_a_bad_query_names_its_parameter(query: dict[str, str], parameter: str) -> None:
    """Before anything is looked up."""
    async with desk() as made:
        answer = await made.http.get("/auctions/a-1/audit", params=query)
        assert (answer.status_code, answer.json()["parameter"]) == (400, parameter)
        assert made.store.calls["timers"] == 0


async def test_a_cursor_behind_the_last_record_is_an_empty_page(tmp_path: Path) -> None:
    """It is not a 404: whoever polls has read everything so far."""
    async with desk(data_dir=tmp_path) as made, archive_of(tmp_path):
        await made.register()
        answer = await made.http.get("/auctions/a-1/audit", params={"cursor": "2"})
        assert (answer.status_code, answer.json()) == (200, {"records": [], "next_cursor": None})


@pytest.mark.requirement("R24")
async def test_an_auction_that_is_not_there_is_404_wherever_one_begins(tmp_path: Path) -> None:
    """With a cursor as without one; of a forgotten auction, whose records are there, the end is an empty page."""
    async with desk(data_dir=tmp_path) as made, archive_of(tmp_path):
        await made.register()
        made.memory.shards[0].timers.clear()
        for query in ({}, {"cursor": "0"}, {"cursor": "1"}, {"cursor": "999"}):
            unknown = await made.http.get("/auctions/a-9/audit", params=query)
            assert (unknown.status_code, unknown.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
            assert (await made.http.get("/auctions/a-1/audit", params=query)).status_code == 200


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("cursor", [None, "1", "999"])
async def test_somebody_elses_audit_takes_the_store_as_long_as_none(tmp_path: Path, cursor: str | None) -> None:
    """The same calls, as many of them: nothing is to be learned from time, whoever asks without being a party."""
    async with desk(tokens=True, data_dir=tmp_path) as made, archive_of(tmp_path):
        await made.register()
        reads = {"timers", "audit_entries", "outcome", "offers"}
        for caller in ("stranger", "buyer", "producer"):
            counts = []
            for auction_id in ("a-1", "a-9"):
                made.store.calls.clear()
                query = {} if cursor is None else {"cursor": cursor}
                answer = await made.http.get(f"/auctions/{auction_id}/audit", params=query, headers=bearing(caller))
                assert answer.status_code == 404
                counts.append({name: count for name, count in made.store.calls.items() if name in reads})
            assert counts[0] == counts[1] == {"timers": 1}


@pytest.mark.requirement("R16")
@pytest.mark.parametrize("what", ["store", "stream", "archive"])
async def test_what_cannot_be_read_now_is_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:  # fmt: skip
    """A page with a gap would be worse than none; no URL of a database is in the answer."""
    async with desk(data_dir=tmp_path) as made, archive_of(tmp_path):
        await made.register()
        if what == "archive":

            async def away(*_args: Any, **_kwargs: Any) -> None:
                raise ArchiveUnavailableError("sqlite:///secret-place is away")

            monkeypatch.setattr(AuditArchive, "walk", away)
            made.memory.shards[0].audit.clear()  # all of it was archived and trimmed
        else:
            call = "timers" if what == "store" else "audit_entries"
            made.store.failing[call] = StoreUnavailableError("secret-place is away")
        answer = await made.http.get("/auctions/a-1/audit")
        assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert "secret-place" not in answer.text
