"""The store contract, run against every store: producers, leases, reading, the tick lane. Commits: test_store_commit.py."""

import asyncio
from contextlib import aclosing

import pytest

from engine.contract.cursors import START, stream_order
from engine.contract.timers import CorruptTimerError, TimerRecord, UnsealedTimerError, checksum, to_fields
from engine.domain.instants import EpochMs
from engine.store import memory, redis
from engine.store.protocol import (
    Announce,
    BindOffer,
    DeploymentMismatchError,
    Draft,
    Group,
    IntakeFullError,
    Lease,
    Park,
    Placed,
    PlaceLive,
    PlacePaused,
    PutTimer,
    ShardHead,
    View,
)
from tests.contracts.stores import LONG_AGO_MS, WITHIN_S, Bench, MemoryBench, until
from tests.contracts.test_store_commit import PLACE, commit, put, record


def drafts(*event_ids: str) -> list[Draft]:
    """Events with these ids and some body."""
    return [Draft(event_id, f"body of {event_id}".encode()) for event_id in event_ids]


async def stamp_of(bench: Bench, event_id: str, est: int, shard: int = 0) -> int:
    """The arrival of one new event, appended with an estimate."""
    (appended,) = await bench.store.append(shard, drafts(event_id), EpochMs(est), f"command of {event_id}")
    assert appended.accepted
    return appended.at


# Stamps.


async def test_the_clock_of_the_store_is_the_authority(bench: Bench) -> None:
    """`time_us` is the authority's clock in microseconds, and passes."""
    before = bench.now()
    us = await bench.store.time_us()
    assert before - 50 <= us // 1_000 <= bench.now() + 50
    assert us >= 10**15


async def test_an_arrival_is_stamped_with_the_authoritys_time(bench: Bench) -> None:
    """With an estimate that agrees, the stamp is what the authority's clock shows."""
    before = bench.now()
    stamp = await stamp_of(bench, "e-1", before)
    assert before - 1 <= stamp <= bench.now() + 1


async def test_an_arrival_never_lies_more_than_250_ms_from_the_estimate(bench: Bench) -> None:
    """An authority far from the caller's estimate, on either side, falsifies a stamp by at most 250 ms."""
    behind = bench.now() - LONG_AGO_MS
    assert await stamp_of(bench, "e-1", behind) == behind + 250
    ahead = bench.now() + LONG_AGO_MS
    assert await stamp_of(bench, "e-2", ahead) == ahead - 250


async def test_arrivals_never_go_back(bench: Bench) -> None:
    """Once a stamp was given, no later one of the shard is smaller, whatever the estimate; other shards are unaffected."""
    high = await stamp_of(bench, "e-1", bench.now() + LONG_AGO_MS)
    assert await stamp_of(bench, "e-2", bench.now()) == high
    assert await stamp_of(bench, "e-3", bench.now() - LONG_AGO_MS) == high
    assert (await bench.store.head(0)).last_at == high
    assert await stamp_of(bench, "e-4", bench.now(), shard=1) < high


async def test_the_sequenced_offset_corrects_the_authority(bench: Bench) -> None:
    """The stamp is the authority's time plus the shard's offset."""
    await bench.shift_authority(0, 100)
    before = bench.now()
    stamp = await stamp_of(bench, "e-1", before)
    assert before + 99 <= stamp <= bench.now() + 101


@pytest.mark.parametrize("step_ms", [3_600_000, -3_600_000])
async def test_a_step_of_the_authority_moves_a_stamp_by_250_ms_at_most(step_ms: int) -> None:
    """The Redis host's clock steps by an hour: stamps stay within 250 ms of the truth and do not go back."""
    bench = MemoryBench()
    truth = bench.now()
    assert await stamp_of(bench, "e-1", truth) == truth
    bench.authority.step(step_ms)
    stamp = await stamp_of(bench, "e-2", truth + 1_000)
    assert truth <= stamp
    assert abs(stamp - (truth + 1_000)) <= 250


async def test_one_call_has_one_stamp(bench: Bench) -> None:
    """Events of one call arrive at the same instant, in the order in which they were given."""
    appended = await bench.store.append(0, drafts("e-2", "e-1", "e-3"), bench.now(), "c-1")
    assert [one.event_id for one in appended] == ["e-2", "e-1", "e-3"]
    assert len({one.at for one in appended}) == 1
    entries = (await bench.store.read_intake({0: START}, 10, 0))[0]
    assert [entry.event_id for entry in entries] == ["e-2", "e-1", "e-3"]
    assert {entry.at for entry in entries} == {appended[0].at}


# Repetitions.


@pytest.mark.requirement("R2")
async def test_an_event_id_counts_once(bench: Bench) -> None:
    """The same event again is a duplicate: nothing is added, and its arrival is that of the first."""
    (first,) = await bench.store.append(0, drafts("e-1"), bench.now() - LONG_AGO_MS, "c-1")
    (again,) = await bench.store.append(0, drafts("e-1"), bench.now(), "c-2")
    assert first.accepted
    assert not again.accepted
    assert again.at == first.at
    assert len((await bench.store.read_intake({0: START}, 10, 0))[0]) == 1


@pytest.mark.requirement("R2")
async def test_an_event_id_counts_once_for_each_subject(bench: Bench) -> None:
    """About something else it is another event, in any order, in one call or in several; each is recognised again."""
    about = {name: Draft("e-1", name.encode(), (), name) for name in ("a", "b", "c")}
    appended = await bench.store.append(0, [about["a"], about["b"], about["a"]], bench.now() - LONG_AGO_MS, "call-1")
    assert [one.accepted for one in appended] == [True, True, False]
    again = await bench.store.append(0, [about["c"], about["b"], about["a"], about["c"]], bench.now(), "call-2")
    assert [one.accepted for one in again] == [True, False, False, False]
    assert again[1].at == again[2].at == appended[0].at
    entries = (await bench.store.read_intake({0: START}, 10, 0))[0]
    assert [entry.body for entry in entries] == [b"a", b"b", b"c"]
    repeated = await bench.store.append(0, [about["a"], about["b"], about["a"]], bench.now(), "call-1")
    assert [one.accepted for one in repeated] == [True, True, False]


@pytest.mark.requirement("R2")
async def test_a_seen_id_counts_as_the_event(bench: Bench) -> None:
    """An event any of whose seen ids was appended before is a duplicate, whether that was a seen id or an event id."""
    await bench.store.append(0, [Draft("e-1", b"", ("bid-1", "auction-1/bid-1"))], bench.now(), "c-1")
    again = await bench.store.append(
        0, [Draft("e-2", b"", ("bid-1",)), Draft("bid-1", b""), Draft("e-3", b"", ("e-1",))], bench.now(), "c-2"
    )
    assert [one.accepted for one in again] == [False, False, False]
    assert len((await bench.store.read_intake({0: START}, 10, 0))[0]) == 1


@pytest.mark.requirement("R2")
async def test_a_duplicate_leaves_no_mark(bench: Bench) -> None:
    """The other ids of a duplicate are not used up by it."""
    await bench.store.append(0, drafts("e-1"), bench.now(), "c-1")
    await bench.store.append(0, [Draft("e-2", b"", ("e-1",))], bench.now(), "c-2")
    (appended,) = await bench.store.append(0, drafts("e-2"), bench.now(), "c-3")
    assert appended.accepted


@pytest.mark.requirement("R2")
async def test_an_event_twice_in_one_call_counts_once(bench: Bench) -> None:
    """The second of two equal events in one call is a duplicate, also when the call is repeated."""
    call = (0, drafts("e-1", "e-1"), bench.now(), "c-1")
    first = await bench.store.append(*call)
    assert [one.accepted for one in first] == [True, False]
    assert await bench.store.append(*call) == first
    assert len((await bench.store.read_intake({0: START}, 10, 0))[0]) == 1


@pytest.mark.requirement("R2")
async def test_repeating_a_command_repeats_its_answer(bench: Bench) -> None:
    """A call whose answer was lost is repeated with its command id: same answer, nothing added, no stamp moved."""
    await bench.store.append(0, drafts("e-1"), bench.now() - LONG_AGO_MS, "c-1")
    call = drafts("e-2", "e-1", "e-3")
    first = await bench.store.append(0, call, bench.now(), "c-2")
    held = await bench.dump()
    assert [one.accepted for one in first] == [True, False, True]
    assert await bench.store.append(0, call, EpochMs(bench.now() + 5), "c-2") == first
    assert await bench.dump() == held


async def test_shards_know_nothing_of_each_other(bench: Bench) -> None:
    """The same event id in another shard is another event."""
    await bench.store.append(0, drafts("e-1"), bench.now(), "c-1")
    (appended,) = await bench.store.append(1, drafts("e-1"), bench.now(), "c-1")
    assert appended.accepted


async def test_a_full_intake_takes_nothing(bench: Bench) -> None:
    """A call that would exceed the bound adds none of its events and moves no stamp; what fits is taken."""
    tight = bench.with_intake_max(3)
    await tight.append(0, drafts("e-1", "e-2"), bench.now(), "c-1")
    held = await bench.dump()
    with pytest.raises(IntakeFullError):
        await tight.append(0, drafts("e-3", "e-4"), EpochMs(bench.now() + 100), "c-2")
    assert await bench.dump() == held
    (appended,) = await tight.append(0, drafts("e-3"), bench.now(), "c-3")
    assert appended.accepted


async def test_a_command_that_filled_the_intake_can_be_repeated(bench: Bench) -> None:
    """The call that took the last places gets its answer again, not "full": its events were added."""
    tight = bench.with_intake_max(2)
    first = await tight.append(0, drafts("e-1", "e-2"), bench.now(), "c-1")
    assert await tight.append(0, drafts("e-1", "e-2"), bench.now(), "c-1") == first
    (again,) = await tight.append(0, drafts("e-1"), bench.now(), "c-2")
    assert not again.accepted


# The deployment.


async def test_the_shard_count_is_fixed_at_the_first_start(bench: Bench) -> None:
    """Another shard count than that of the first start is refused, naming both; the same one is not."""
    await bench.store.deployment(4)
    await bench.store.deployment(4)
    with pytest.raises(DeploymentMismatchError, match=r"4 shards.*8"):
        await bench.store.deployment(8)
    await bench.store.deployment(4)


# Leases.


async def test_a_free_lease_is_taken(bench: Bench) -> None:
    """Nobody held it: the claim returns it as ours, under the first epoch."""
    assert await bench.store.lease(0) == Lease("", 0, 0)
    assert await bench.store.claim(0, "a", None) == Lease("a", 1, 0)
    assert await bench.store.lease(0) == Lease("a", 1, 0)
    assert await bench.store.lease(1) == Lease("", 0, 0)


async def test_a_held_lease_is_not_taken(bench: Bench) -> None:
    """A claim without having watched the holder gets the lease as it stands, and changes nothing."""
    await bench.store.claim(0, "a", None)
    assert await bench.store.claim(0, "b", None) == Lease("a", 1, 0)
    assert await bench.store.lease(0) == Lease("a", 1, 0)


async def test_ones_own_lease_is_taken_again_under_a_new_epoch(bench: Bench) -> None:
    """An engine that comes back under its name need not wait, and fences what it was before."""
    await bench.store.claim(0, "a", None)
    await bench.store.renew(0, "a", 1)
    assert await bench.store.claim(0, "a", None) == Lease("a", 2, 0)
    assert not await bench.store.renew(0, "a", 1)


async def test_a_lease_that_stood_still_is_taken(bench: Bench) -> None:
    """A claim that names exactly what it saw succeeds, and of two such claims only the first."""
    seen = await bench.store.claim(0, "a", None)
    assert await bench.store.claim(0, "b", seen) == Lease("b", 2, 0)
    assert await bench.store.claim(0, "c", seen) == Lease("b", 2, 0)


async def test_a_lease_that_beat_is_not_taken(bench: Bench) -> None:
    """One heartbeat after it was seen is enough to keep it."""
    seen = await bench.store.claim(0, "a", None)
    assert await bench.store.renew(0, "a", 1)
    assert await bench.store.claim(0, "b", seen) == Lease("a", 1, 1)


async def test_only_the_holder_renews(bench: Bench) -> None:
    """A beat counts only from the holder under the epoch in force."""
    await bench.store.claim(0, "a", None)
    assert await bench.store.renew(0, "a", 1)
    assert await bench.store.renew(0, "a", 1)
    assert await bench.store.lease(0) == Lease("a", 1, 2)
    assert not await bench.store.renew(0, "b", 1)
    assert not await bench.store.renew(0, "a", 2)
    assert not await bench.store.renew(1, "a", 1)
    assert await bench.store.lease(0) == Lease("a", 1, 2)


async def test_a_released_lease_is_free_and_its_epoch_is_not_given_out_again(bench: Bench) -> None:
    """After a release anyone may claim at once, under a higher epoch; only the holder can release."""
    await bench.store.claim(0, "a", None)
    await bench.store.release(0, "b", 1)
    await bench.store.release(0, "a", 2)
    assert (await bench.store.lease(0)).holder == "a"
    await bench.store.release(0, "a", 1)
    assert (await bench.store.lease(0)).holder == ""
    assert not await bench.store.renew(0, "a", 1)
    assert await bench.store.claim(0, "b", None) == Lease("b", 2, 0)


# Reading the intake.


async def test_the_head_of_an_untouched_shard(bench: Bench) -> None:
    """Before anything happened a shard stands at the start of its intake, with an empty audit chain."""
    head = await bench.store.head(0)
    assert head == ShardHead(START, head.chain, EpochMs(0))
    assert (head.chain.seq, head.chain.hash) == (0, "0" * 64)


async def test_the_intake_is_read_in_order_in_pieces(bench: Bench) -> None:
    """Reading behind the last id read, at most `count` at a time, gives every entry once, in order, as it was written."""
    names = [f"e-{number:02}" for number in range(23)]
    for name in names:
        await bench.store.append(0, [Draft(name, b"\x00\xff" + name.encode())], bench.now(), f"c-{name}")
    since, read = START, []
    while found := await bench.store.read_intake({0: since}, 5, 0):
        assert len(found[0]) <= 5
        read += found[0]
        since = found[0][-1].stream_id
    assert [entry.event_id for entry in read] == names
    assert all(entry.body == b"\x00\xff" + entry.event_id.encode() for entry in read)
    assert sorted(stream_order(entry.stream_id) for entry in read) == [stream_order(entry.stream_id) for entry in read]


async def test_several_shards_are_read_at_once(bench: Bench) -> None:
    """One read covers several shards, each from its own place and up to `count`; silent ones are left out."""
    await bench.store.append(0, drafts("a-1", "a-2", "a-3"), bench.now(), "c-1")
    await bench.store.append(2, drafts("b-1"), bench.now(), "c-2")
    first = (await bench.store.read_intake({0: START}, 1, 0))[0][0]
    found = await bench.store.read_intake({0: first.stream_id, 1: START, 2: START}, 1, 0)
    assert {shard: [entry.event_id for entry in entries] for shard, entries in found.items()} == {
        0: ["a-2"],
        2: ["b-1"],
    }


async def test_an_entry_without_a_stamp_is_read_as_poison(bench: Bench) -> None:
    """What was not written by `append` is delivered with no arrival, so that it can be set aside, and the rest behind it."""
    await bench.inject(0, surprise="!")
    await bench.inject(0, at="yesterday", id="e-1", body="{}")
    await bench.store.append(0, drafts("e-2"), bench.now(), "c-1")
    entries = (await bench.store.read_intake({0: START}, 10, 0))[0]
    assert [entry.at is None for entry in entries] == [True, True, False]
    assert entries[2].event_id == "e-2"


async def test_a_waiting_reader_is_woken(bench: Bench) -> None:
    """A read that found nothing waits, and returns as soon as an event is appended to any of its shards."""
    reading = asyncio.create_task(bench.store.read_intake({0: START, 1: START}, 10, 1_000))
    await until(bench.blocked)
    await bench.store.append(1, drafts("e-1"), bench.now(), "c-1")
    found = await asyncio.wait_for(reading, WITHIN_S) or await bench.store.read_intake({0: START, 1: START}, 10, 0)
    assert [entry.event_id for entry in found[1]] == ["e-1"]
    assert 0 not in found


async def test_a_reader_waits_no_longer_than_told(bench: Bench) -> None:
    """Without events a read returns nothing: at once if it may not wait, else after its time."""
    assert await bench.store.read_intake({0: START}, 10, 0) == {}
    assert await asyncio.wait_for(bench.store.read_intake({0: START}, 10, 20), WITHIN_S) == {}


async def test_trimming_forgets_only_what_lies_before(bench: Bench) -> None:
    """Entries from the given id on survive a trim, and the ids that follow go on."""
    for number in range(300):
        await bench.store.append(0, drafts(f"e-{number}"), bench.now(), f"c-{number}")
    entries = (await bench.store.read_intake({0: START}, 1_000, 0))[0]
    await bench.store.trim_intake(0, entries[250].stream_id)
    left = (await bench.store.read_intake({0: START}, 1_000, 0))[0]
    assert left[-50:] == entries[250:]
    assert len(left) < 300
    await bench.store.append(0, drafts("new"), bench.now(), "c-new")
    assert (await bench.store.read_intake({0: entries[-1].stream_id}, 10, 0))[0][0].event_id == "new"


# Reading timers.


async def test_timers_come_in_the_order_asked_for(bench: Bench) -> None:
    """Each auction as it was put, None where there is none, and a damaged one as the error that says so."""
    await commit(bench, put("a"), put("b"), put("c"))
    await bench.damage(0, "b", "ends_at", "soon")
    c, unknown, b, a = await bench.store.timers(0, ["c", "unknown", "b", "a"])
    assert c == record("c")
    assert unknown is None
    assert isinstance(b, CorruptTimerError)
    assert "'b'" in str(b)
    assert a == record("a")
    assert await bench.store.timers(1, ["a"]) == [None]
    assert await bench.store.timers(0, []) == []


async def test_an_edited_timer_is_not_taken_at_its_word(bench: Bench) -> None:
    """Whoever loads it gets the error that says so, with what the hash says; a commit that writes it anew makes it good."""
    sealed = PutTimer("a", to_fields(record("a")) | {"checksum": checksum(record("a").auction)})
    await commit(bench, sealed, PlaceLive("a", EpochMs(5)))
    assert await bench.store.timers(0, ["a"]) == [record("a")]
    await bench.damage(0, "a", "ends_at", "7")
    (found,) = await bench.store.timers(0, ["a"])
    assert isinstance(found, UnsealedTimerError)
    assert found.record.auction.ends_at == 7
    assert [[type(timer) for timer in page] async for page in bench.store.live(0)] == [[UnsealedTimerError]]
    assert (await bench.store.view(0, "a")).record == found.record
    standing = (await bench.store.observe(0, ["a"])).standings["a"]
    assert (standing.record, standing.sealed) == (found.record, False)
    await commit(bench, sealed)
    assert await bench.store.timers(0, ["a"]) == [record("a")]


async def test_everything_not_over_is_live(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """`live` pages through all auctions with a deadline or paused, damaged ones as errors, and leaves closed ones out."""
    for module in (memory, redis):
        monkeypatch.setattr(module, "PAGE_MAX", 3)
    names = [f"a-{number}" for number in range(8)]
    operations = []
    for number, name in enumerate(names):
        operations += [put(name), PlaceLive(name, EpochMs(1_000 + number))]
    operations += [put("p"), PlacePaused("p", EpochMs(5)), put("q"), PlacePaused("q", EpochMs(5)), *closed("over")]
    await commit(bench, *operations)
    await bench.damage(0, "a-3", "version", "many")
    pages = [page async for page in bench.store.live(0)]
    assert all(len(page) <= 3 for page in pages)
    found = [timer for page in pages for timer in page]
    live = [timer.auction.auction_id for timer in found if isinstance(timer, TimerRecord)]
    assert sorted(live) == sorted([name for name in names if name != "a-3"] + ["p", "q"])
    assert sum(isinstance(timer, CorruptTimerError) for timer in found) == 1
    assert [page async for page in bench.store.live(1)] == []


async def test_offers_come_in_the_order_asked_for(bench: Bench) -> None:
    """What each offer id was last bound to, None where it was not."""
    await commit(bench, BindOffer("o-1", "auction a", forget=False), BindOffer("o-2", "cancelled {}", forget=True))
    assert await bench.store.offers(0, ["o-2", "o-3", "o-1"]) == ["cancelled {}", None, "auction a"]
    await commit(bench, BindOffer("o-2", "auction b", forget=False))
    assert await bench.store.offers(0, ["o-2"]) == ["auction b"]
    assert await bench.store.offers(1, ["o-2"]) == [None]


@pytest.mark.requirement("R20")
async def test_what_is_kept_for_the_retention_takes_no_offer_from_another(bench: Bench) -> None:
    """An auction that closes keeps its own offer for a while, and leaves alone one that was put up again since."""
    await commit(bench, BindOffer("o-1", "auction a", forget=False), BindOffer("o-2", "auction a", forget=False))
    await commit(bench, BindOffer("o-2", "auction b", forget=False))
    await commit(bench, *[BindOffer(offer_id, "auction a", forget=True) for offer_id in ("o-1", "o-2", "o-3")])
    assert await bench.store.offers(0, ["o-1", "o-2", "o-3"]) == ["auction a", "auction b", "auction a"]


@pytest.mark.requirement("R20")
async def test_what_is_kept_for_the_retention_stays_what_it_is(bench: Bench) -> None:
    """An auction that closes does not know when its start arrived: what was bound knows, and a longer id is another one."""
    await commit(bench, BindOffer("o-1", "auction a 7", forget=False), BindOffer("o-2", "auction ab 7", forget=False))
    await commit(bench, *[BindOffer(offer_id, "auction a", forget=True) for offer_id in ("o-1", "o-2")])
    assert await bench.store.offers(0, ["o-1", "o-2"]) == ["auction a 7", "auction ab 7"]


async def test_parked_commands_are_counted(bench: Bench) -> None:
    """Each command counts once, however often it is parked."""
    assert await bench.store.parked(0) == 0
    await commit(bench, *[Park(name, EpochMs(5), b"{}") for name in ("c-1", "c-2", "c-1")])
    assert await bench.store.parked(0) == 2
    assert await bench.store.parked(1) == 0


# The gateway's side.


async def test_a_view_of_nothing(bench: Bench) -> None:
    """An unknown auction in a shard without updates."""
    assert await bench.store.view(0, "a") == View(None, START)


async def test_a_view_shows_a_timer_and_its_place(bench: Bench) -> None:
    """The auction as it stands, and the id of the last entry of the event lane."""
    await commit(bench, put("a"), Announce("timer.started", "a", 1, b"{}"), Announce("timer.closing", "a", 2, b"{}"))
    view = await bench.store.view(0, "a")
    assert view.record == record("a")
    entries = (await bench.store.read_updates({0: START}, 10, 0))[0]
    assert view.stream_id == entries[-1].stream_id == await bench.store.last_update(0)
    assert (await bench.store.view(0, "other")) == View(None, entries[-1].stream_id)


async def test_a_view_of_a_damaged_timer_is_an_error(bench: Bench) -> None:
    """A hash that cannot be read is never shown as if it were absent."""
    await commit(bench, put("a"))
    await bench.damage(0, "a", "status", "SLEEPING")
    with pytest.raises(CorruptTimerError, match="'a'"):
        await bench.store.view(0, "a")


@pytest.mark.requirement("B4")
async def test_a_view_and_its_place_belong_together(bench: Bench) -> None:
    """While commits go on, a view's version is always that of the last update at its place: nothing lies in between."""
    await commit(bench, put("a", version=0))

    async def write() -> None:
        for version in range(1, 60):
            await commit(bench, put("a", version=version), Announce("timer.extended", "a", version, b"{}"))
            await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    views = []
    while not writing.done():
        views.append(await bench.store.view(0, "a"))
        await asyncio.sleep(0)
    await writing
    entries = (await bench.store.read_updates({0: START}, 1_000, 0))[0]
    version_at = {entry.stream_id: entry.version for entry in entries} | {START: 0}
    assert len({view.stream_id for view in views}) > 5
    assert all(view.record.auction.version == version_at[view.stream_id] for view in views)


async def test_updates_are_read_in_order_from_a_place(bench: Bench) -> None:
    """Entries of the event lane come as they were announced, behind the id given, at most `count` per shard."""
    assert await bench.store.last_update(0) == START
    assert await bench.store.read_updates({0: START}, 10, 0) == {}
    await commit(bench, *[Announce("timer.extended", f"a-{n}", n, b'{"n":%d}' % n) for n in range(5)])
    await commit(bench, Announce("timer.ended", "z", 9, b"{}"), shard=1)
    found = await bench.store.read_updates({0: START, 1: START}, 3, 0)
    assert [(entry.type, entry.auction_id, entry.version, entry.body) for entry in found[0]] == [
        ("timer.extended", f"a-{n}", n, b'{"n":%d}' % n) for n in range(3)
    ]
    assert [entry.auction_id for entry in found[1]] == ["z"]
    rest = await bench.store.read_updates({0: found[0][-1].stream_id}, 10, 0)
    assert [entry.auction_id for entry in rest[0]] == ["a-3", "a-4"]
    assert rest[0][-1].stream_id == await bench.store.last_update(0)
    assert await bench.store.recent_updates(0, 2) == rest[0]
    assert [entry.version for entry in await bench.store.recent_updates(0, 100)] == [0, 1, 2, 3, 4]
    assert await bench.store.recent_updates(2, 5) == []


async def test_the_recent_updates_are_the_last_ones_in_order(bench: Bench) -> None:
    """The last `count` entries of the event lane, oldest first; all of them where there are fewer."""
    assert await bench.store.recent_updates(0, 3) == []
    await commit(bench, *[Announce("timer.extended", f"a-{n}", n, b"{}") for n in range(5)])
    recent = await bench.store.recent_updates(0, 3)
    assert [entry.auction_id for entry in recent] == ["a-2", "a-3", "a-4"]
    everything = (await bench.store.read_updates({0: START}, 10, 0))[0]
    assert await bench.store.recent_updates(0, 100) == everything
    assert recent == everything[-3:]
    assert await bench.store.recent_updates(1, 3) == []


async def test_the_updates_up_to_a_place_are_the_last_ones_before_it(bench: Bench) -> None:
    """The entry of that id itself comes last; an id that no entry has is a place between two all the same."""
    await commit(bench, *[Announce("timer.extended", f"a-{n}", n, b"{}") for n in range(4)])
    lane = (await bench.store.read_updates({0: START}, 10, 0))[0]
    for at, entry in enumerate(lane):
        assert await bench.store.recent_updates(0, 2, upto=entry.stream_id) == lane[max(0, at - 1) : at + 1]
    ms, _, seq = lane[-1].stream_id.partition("-")
    assert await bench.store.recent_updates(0, 1, upto=f"{ms}-{int(seq) + 7}") == lane[-1:]
    assert await bench.store.recent_updates(0, 10, upto=f"{int(ms) + 1}-0") == lane
    assert await bench.store.recent_updates(0, 10, upto=START) == []
    assert await bench.store.recent_updates(1, 10, upto=lane[-1].stream_id) == []


async def test_a_waiting_reader_of_updates_is_woken(bench: Bench) -> None:
    """A commit that announces something ends the wait of a reader of that shard; without one it ends by itself."""
    reading = asyncio.create_task(bench.store.read_updates({0: START}, 10, 1_000))
    await until(bench.blocked)
    await commit(bench, Announce("timer.started", "a", 1, b"{}"))
    found = await asyncio.wait_for(reading, WITHIN_S) or await bench.store.read_updates({0: START}, 10, 0)
    assert [entry.auction_id for entry in found[0]] == ["a"]
    assert await bench.store.read_updates({0: found[0][-1].stream_id}, 10, 20) == {}


def closed(auction_id: str, at: int = 1) -> list:
    """An auction that is over."""
    return [put(auction_id), in_group(Group.CLOSED, auction_id, at)]


def in_group(group: Group, auction_id: str, score: int) -> object:
    """The operation that puts an auction, or a parked command, into a group."""
    if group is Group.PARKED:
        return Park(auction_id, EpochMs(score), b"{}")
    return PLACE[group](auction_id, EpochMs(score))


async def all_pages(bench: Bench, group: Group, count: int) -> list[Placed]:
    """A whole group, read in pages of at most `count`; never more pages than it has auctions."""
    found: list[Placed] = []
    for _ in range(100):
        page = await bench.store.page(0, group, found[-1] if found else None, count)
        assert len(page) <= count
        if not page:
            return found
        found += page
    raise AssertionError("paging never ends")


SCORES = {"d": 5, "a": 7, "c": 7, "b": 7, "e": 9, "f": 2}


@pytest.mark.parametrize("group", list(Group))
@pytest.mark.parametrize("count", [1, 2, 3, 6, 10])
async def test_a_group_is_paged_in_its_order(bench: Bench, group: Group, count: int) -> None:
    """Earliest first, of closed ones latest first, equal ones by id; page by page nothing is lost or shown twice."""
    operations = []
    for name, score in SCORES.items():
        operations += [put(name), in_group(group, name, score)]
    await commit(bench, *operations)
    expected = sorted((Placed(score, name) for name, score in SCORES.items()), key=lambda at: (at.score, at.auction_id))
    if group is Group.CLOSED:
        expected.reverse()
    pages = await all_pages(bench, group, count)
    assert pages == expected
    others = [other for other in Group if other is not group]
    assert [await bench.store.page(0, other, None, 10) for other in others] == [[], [], []]


@pytest.mark.parametrize("group", list(Group))
async def test_a_page_goes_on_behind_a_place_that_is_gone(bench: Bench, group: Group) -> None:
    """A continuation names a place, not a member: it holds when that auction has left the group meanwhile."""
    operations = []
    for name in "abcd":
        operations += [put(name), in_group(group, name, 7)]
    await commit(bench, *operations)
    rest = await bench.store.page(0, group, Placed(7, "bb"), 10)
    assert [at.auction_id for at in rest] == (["b", "a"] if group is Group.CLOSED else ["c", "d"])


async def test_paging_survives_many_equal_scores(bench: Bench) -> None:
    """More auctions with one deadline than fit a page: every page goes on where the last one ended."""
    operations = []
    for number in range(50):
        operations += [put(f"a-{number:02}"), in_group(Group.LIVE, f"a-{number:02}", 7)]
    await commit(bench, *operations)
    pages = await all_pages(bench, Group.LIVE, 7)
    assert [at.auction_id for at in pages] == [f"a-{number:02}" for number in range(50)]


# The tick lane.


async def test_ticks_reach_whoever_listens(bench: Bench) -> None:
    """Lines published for a shard come to those who listen to it, in order, and to nobody else."""
    heard: list[tuple[int, bytes]] = []

    async def listen() -> None:
        async with aclosing(bench.store.ticks([0, 2])) as lines:
            async for line in lines:
                heard.append(line)
                if len(heard) == 3:
                    return

    await bench.store.publish({0: b"nobody hears this"})
    listening = asyncio.create_task(listen())
    await until(lambda: bench.listening(0))
    await bench.store.publish({0: b"one\ntwo", 1: b"not for us"})
    await bench.store.publish({2: b"three"})
    await bench.store.publish({0: b"four"})
    await asyncio.wait_for(listening, WITHIN_S)
    assert heard == [(0, b"one\ntwo"), (2, b"three"), (0, b"four")]
    await until(lambda: negated(bench.listening(0)))


async def negated(held: object) -> bool:
    """The opposite of an awaitable condition."""
    return not await held  # type: ignore[misc]


async def test_a_reader_that_is_not_asked_still_gets_what_it_missed_nothing_of(bench: Bench) -> None:
    """Ticks that come faster than they are taken wait for the reader, in order."""
    async with aclosing(bench.store.ticks([0])) as lines:
        first = asyncio.ensure_future(anext(lines))
        await until(lambda: bench.listening(0))
        for number in range(20):
            await bench.store.publish({0: b"%d" % number})
        assert await asyncio.wait_for(first, WITHIN_S) == (0, b"0")
        rest = [await asyncio.wait_for(anext(lines), WITHIN_S) for _ in range(19)]
    assert rest == [(0, b"%d" % number) for number in range(1, 20)]
