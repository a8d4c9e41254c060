"""The store contract of what the reconciler and the outage guard need, run against every store."""

from dataclasses import replace
from typing import Any

import pytest

from engine.contract.audit import chained
from engine.contract.intake import Outage, decode
from engine.contract.timers import CorruptTimerError
from engine.domain.instants import EpochMs
from engine.store.limits import StoreLimits
from engine.store.protocol import (
    OUTAGE_HOLD_MS,
    Committed,
    Displace,
    Draft,
    Group,
    IntakeFullError,
    Observed,
    Park,
    PlaceClosed,
    PlaceLive,
    PlacePaused,
    Superseded,
    Unattended,
    Undrained,
)
from tests.contracts.stores import Bench
from tests.contracts.test_store_commit import batch_on, put, record

pytestmark = pytest.mark.requirement("R12")

LIMITS = StoreLimits(attendant="gateway-1", outage_extension_ms=120_000)


async def test_auctions_are_observed_with_the_place_in_the_log(bench: Bench) -> None:
    """Hash and scores of each auction, None and nothing of one that is not there, and the head of the chain."""
    await bench.store.claim(0, "me", None)
    batch = await batch_on(
        bench, put("a"), PlaceLive("a", EpochMs(50)), PlacePaused("p", EpochMs(7)), PlaceClosed("c", EpochMs(9))
    )
    batch.chain, _ = chained(batch.chain, {"event_type": "x"})
    assert isinstance(await bench.store.commit(batch), Committed)
    seen: Observed = await bench.store.observe(0, ["a", "p", "c", "nobody"])
    assert seen.chain == batch.chain
    assert seen.standings["a"].record == record("a")
    assert [dict(seen.standings[name].scores) for name in ("a", "p", "c", "nobody")] == [
        {Group.LIVE: 50},
        {Group.PAUSED: 7},
        {Group.CLOSED: 9},
        {},
    ]
    assert seen.standings["nobody"].record is None
    await bench.damage(0, "a", "policy", "{")
    assert isinstance((await bench.store.observe(0, ["a"])).standings["a"].record, CorruptTimerError)


async def test_what_is_displaced_stands_nowhere(bench: Bench) -> None:
    """Its entry goes from every set, and others stay."""
    await bench.store.claim(0, "me", None)
    await bench.store.commit(await batch_on(bench, PlaceLive("a", EpochMs(5)), PlaceLive("b", EpochMs(6))))
    await bench.store.commit(await batch_on(bench, Displace("a")))
    seen = (await bench.store.observe(0, ["a", "b"])).standings
    assert (dict(seen["a"].scores), dict(seen["b"].scores)) == ({}, {Group.LIVE: 6})


@pytest.mark.requirement("R11")
@pytest.mark.parametrize(("found", "said"), [("7", 7), ("x", None)])
async def test_an_edited_version_is_named(bench: Bench, found: str, said: int | None) -> None:
    """Which auction it is, and the version that its hash has; a cursor that is wrong names none."""
    await bench.store.claim(0, "me", None)
    await bench.store.commit(await batch_on(bench, put("a"), put("b")))
    await bench.damage(0, "b", "version", found)
    answer = await bench.store.commit(await batch_on(bench, versions={"a": 3, "b": 3}))
    assert isinstance(answer, Superseded)
    assert (answer.auction_id, answer.version) == ("b", said)
    batch = await batch_on(bench)
    answer = await bench.store.commit(replace(batch, after=replace(batch.after, intake="5-0")))
    assert isinstance(answer, Superseded)
    assert answer.auction_id is None


# Attendance (requirement B8). The estimate falsifies the stamp by at most 250 ms, so time passes by `shift_authority`.


async def beat(
    bench: Bench, by_ms: int, *drafts: Draft, limits: StoreLimits = LIMITS, store: Any = None, urgent: bool = False
) -> EpochMs:
    """A gateway writes `by_ms` after the test's beginning; about the stamp it got."""
    store = store or bench.store
    store.limits, before = limits, store.limits
    est = EpochMs(bench.born + by_ms)
    await bench.shift_authority(0, est - bench.now())
    try:
        await store.append(0, list(drafts), est, f"beat-{by_ms}-{len(drafts)}", urgent=urgent)
    finally:
        store.limits = before
    return est


async def intake(bench: Bench) -> list[Any]:
    """What stands in the intake."""
    found = await bench.store.read_intake({0: "0-0"}, 100, 0)
    return list(found.get(0, []))


def draft(event_id: str) -> Draft:
    """An event."""
    return Draft(event_id, b"{}")


@pytest.mark.requirement("B8")
async def test_an_outage_is_told_before_what_ends_it(bench: Bench) -> None:
    """The first call after more than 5 s appends from when to when nobody wrote, who noticed, and by how much it extends."""
    await beat(bench, 0)
    await beat(bench, 4_000)
    assert await intake(bench) == []
    await beat(bench, 11_000, draft("bid-1"))
    outage, bid = await intake(bench)
    assert (bid.event_id, outage.at) == ("bid-1", bid.at)
    event = decode(outage.event_id, outage.body)
    assert isinstance(event.event, Outage)
    assert (event.context.actor.id, event.event.extension_ms) == ("gateway-1", 120_000)
    assert event.event.until == outage.at
    assert 6_500 <= event.event.until - event.event.since <= 7_500
    await beat(bench, 12_000)
    assert len(await intake(bench)) == 2


@pytest.mark.requirement("B8")
async def test_who_is_no_gateway_proves_nothing(bench: Bench) -> None:
    """An event of another process neither begins nor ends an outage; and events alone begin no attendance."""
    await beat(bench, 0, draft("first"))
    await beat(bench, 20_000, draft("second"))
    assert len(await intake(bench)) == 2
    await beat(bench, 20_100)
    await beat(bench, 29_000, draft("third"), limits=StoreLimits())
    await beat(bench, 30_000)
    assert [entry.event_id[:6] for entry in await intake(bench)] == ["first", "second", "third", "outage"]


@pytest.mark.requirement("B8")
async def test_a_beat_that_comes_late_does_not_take_back_what_a_later_one_has_shown(bench: Bench) -> None:
    """Sent at 1 s and arrived after that of 4 s: nobody was away for more than 5 s when the next comes at 8.5 s."""
    for by_ms in (0, 4_000, 1_000, 8_500):
        await beat(bench, by_ms)
    assert await intake(bench) == []
    await beat(bench, 14_500)
    assert len(await intake(bench)) == 1


@pytest.mark.requirement("B8")
@pytest.mark.parametrize("full", ["intake", "troubleshooting"])
async def test_who_would_be_refused_does_not_count_as_there(bench: Bench, full: str) -> None:
    """Beats, repetitions and operators' commands reach a shard that takes nothing from producers: to them it is away."""
    await beat(bench, 0, draft("first"))
    await beat(bench, 0)
    if full == "intake":
        tight = bench.with_intake_max(1)
    else:
        tight = bench.with_troubleshooting_max(1)
        await bench.store.commit(await batch_on(bench, Park("c-1", EpochMs(5), b"{}")))
    limits = replace(tight.limits, attendant="gateway-1", outage_extension_ms=120_000)
    await beat(bench, 2_000, store=tight, limits=limits)
    await beat(bench, 4_000, draft("first"), store=tight, limits=limits)
    for urgent in (False, True) if full == "intake" else (False,):
        with pytest.raises(IntakeFullError):
            await beat(bench, 6_000, draft("second"), store=tight, limits=limits, urgent=urgent)
    if full == "troubleshooting":
        await beat(bench, 6_500, draft("order"), store=tight, limits=limits, urgent=True)
    await beat(bench, 7_000, store=tight, limits=limits)
    assert "outage" not in [entry.event_id[:6] for entry in await intake(bench)]
    await beat(bench, 8_000)
    outage = decode((await intake(bench))[-1].event_id, (await intake(bench))[-1].body).event
    assert isinstance(outage, Outage)
    assert 7_500 <= outage.until - outage.since <= 8_500


@pytest.mark.requirement("B8")
@pytest.mark.requirement("B1")
async def test_a_close_waits_for_attendance(bench: Bench) -> None:
    """Unattended near its end it waits; with an outage unapplied too; after 15 minutes no more."""
    await bench.store.claim(0, "me", None)
    began = await beat(bench, 0)
    bench.store.limits = LIMITS

    async def closing(at: int, now: int, **changes: Any) -> Any:
        est = EpochMs(bench.born + now)
        batch = replace(await batch_on(bench), closes_at=EpochMs(began + at), est=est, **changes)
        await bench.shift_authority(0, est - bench.now())
        return await bench.store.commit(batch)

    assert isinstance(await closing(4_000, 4_100), Committed)
    assert isinstance(await closing(8_000, 8_100), Unattended)
    await beat(bench, 9_000)
    assert isinstance(await closing(8_000, 9_100), Undrained)
    (outage,) = await intake(bench)
    assert isinstance(await closing(8_000, 9_200, intake=outage.stream_id), Committed)
    assert isinstance(await closing(8_000, 9_300), Committed)
    assert isinstance(await closing(20_000, 20_000 + OUTAGE_HOLD_MS + 5_000), Committed)
