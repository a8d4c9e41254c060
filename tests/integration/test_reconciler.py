"""What is damaged behind the engine's back is found within a pass, repaired, written down, counted, and told to sockets."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
from websockets.sync.client import ClientConnection, connect

from engine.contract import audit
from engine.contract.intake import SCHEDULER
from engine.contract.keys import RECONCILIATIONS, ShardKeys, shard_of
from engine.contract.timers import checksum, from_fields
from engine.domain.decide import Decision, Fact
from engine.domain.instants import EpochMs
from tests.integration.events import bid, fresh_id, started
from tests.integration.own_role import OwnRole
from tests.integration.records import SHARDS, facts_of, keys_of, records_of, stream
from tests.integration.test_first_light import now_of, socket_url
from tests.live import SCRIPT, LiveStack, until

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R12")]

INTERVAL_MS: Final = 400
LEASE_MS: Final = 1_500
FOUND_WITHIN_S: Final = 9.0
"""A beat that stands still for longer than a lease, as the watch over the beats sees it, on a busy machine."""
FROZEN_S: Final = 12.0
LONG_MS: Final = 3_600_000
WINDOW: Final = {"soft_close_window_ms": 600_000, "extension_ms": 60_000}


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    """A stack whose reconciler looks often."""
    with TemporaryDirectory(prefix="at-") as directory:
        # An outage would give time back, and move the ends that are judged here.
        often = {"RECONCILE_INTERVAL_MS": INTERVAL_MS, "OUTAGE_EXTENSION_MS": 0}
        made = LiveStack(Path(directory), env={f"AUCTION_TIMER_{name}": str(value) for name, value in often.items()})
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def auction(stack: LiveStack) -> str:
    """An auction in its closing window, with five minutes left."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + 300_000, **WINDOW))
    stack.until_status(auction_id, "CLOSING")
    return auction_id


def found(stack: LiveStack, auction_id: str) -> list[dict[str, str]]:
    """What was written down about an auction."""
    return [entry for entry in stream(stack, RECONCILIATIONS) if entry["auction_id"] == auction_id]


def causes(stack: LiveStack, auction_id: str) -> list[str]:
    """Why, each time. It is written down after it was asked for, so it may be done before it is there."""
    return [entry["cause"] for entry in found(stack, auction_id)]


def count_of(stack: LiveStack, kind: str) -> float:
    """The counter of a kind of drift, over all processes."""
    lines = stack.http.get("/metrics").text.splitlines()
    prefix = f'auctions_timer_corrections_total{{kind="{kind}"}} '
    return sum(float(line.removeprefix(prefix)) for line in lines if line.startswith(prefix))


def resynced(socket: ClientConnection) -> dict[str, Any]:
    """The next frame of a socket that says that the timer was corrected."""
    while True:
        frame: dict[str, Any] = json.loads(socket.recv(timeout=20))
        if frame["type"] == "timer.resynced":
            return frame
        assert frame["type"] != "timer.ended", "it was closed"


def hash_of(stack: LiveStack, auction_id: str) -> dict[str, str]:
    """The hash as it is kept."""
    kept = stack.redis("HGETALL", keys_of(auction_id).timer(auction_id))
    return {name.decode(): value.decode() for name, value in kept.items()}


def score_of(stack: LiveStack, auction_id: str) -> int | None:
    """The deadline in the sorted set."""
    score = stack.redis("ZSCORE", keys_of(auction_id).deadlines, auction_id)
    return None if score is None else int(float(score))


@dataclass(frozen=True)
class Damage:
    """What a hand does to Redis, and what is to be written down about it, in ms from the end that is right."""

    cause: str
    found_ms: int | None = None
    """Where the end or score was found; None if there was none."""
    before: str | None = None
    """What stands in `before` where that is no instant."""
    after: int | str = 0
    """From the right end too, or what stands in `after`."""
    evidence: frozenset[str] = frozenset()


DAMAGES: Final = {
    "entry-missing": Damage("entry_missing", evidence=frozenset({"set"})),
    "score-earlier": Damage("score_wrong", -10_000, evidence=frozenset({"set"})),
    "score-later": Damage("score_wrong", 10_000, evidence=frozenset({"set"})),
    "hash-changed": Damage("hash_changed", -200_000, evidence=frozenset({"found_and_right", "sealed"})),
    "hash-unsealed": Damage("hash_changed", 0, evidence=frozenset({"found_and_right", "sealed"})),
    "hash-unreadable": Damage("hash_unreadable", evidence=frozenset({"error"})),
    "hash-missing": Damage("hash_missing"),
    "end-past-cap": Damage("end_past_cap", 30 * 3_600_000, evidence=frozenset({"found_and_right", "sealed"})),
    "entry-extra": Damage("entry_extra", before="{'paused': 5}", after="", evidence=frozenset({"stands_in"})),
}


def damage(stack: LiveStack, auction_id: str, name: str) -> None:
    """Do it."""
    names, key = keys_of(auction_id), keys_of(auction_id).timer(auction_id)
    at = stack.timer(auction_id)["ends_at"] + (DAMAGES[name].found_ms or 0)
    commands: dict[str, list[Any]] = {
        "entry-missing": ["ZREM", names.deadlines, auction_id],
        "score-earlier": ["ZADD", names.deadlines, at, auction_id],
        "score-later": ["ZADD", names.deadlines, at, auction_id],
        "hash-changed": ["HSET", key, "ends_at", at, "version", 77],
        "hash-unsealed": ["HDEL", key, "checksum"],
        "hash-unreadable": ["HSET", key, "policy", "{"],
        "hash-missing": ["DEL", key],
        "end-past-cap": ["HSET", key, "ends_at", at],
        "entry-extra": ["ZADD", names.paused, 5, auction_id],
    }
    stack.redis(*commands[name])


def passes(stack: LiveStack) -> float:
    """How many passes the reconciler has made."""
    prefix = "auctions_reconciler_pass_ms_count "
    lines = stack.http.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(prefix)) for line in lines if line.startswith(prefix))


def passed_since(stack: LiveStack, before: float) -> bool:
    """Whether a pass that began after there had been so many is over: the one that was under way may have looked already."""
    return passes(stack) >= before + 2


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_in_one_pass_repaired_and_told(stack: LiveStack, auction: str, name: str) -> None:
    """Hash, sorted set and socket say again what the log says; stream, audit and metrics tell what happened."""
    expected = DAMAGES[name]
    before = stack.timer(auction)
    counted = count_of(stack, expected.cause)
    with connect(socket_url(stack, auction), compression=None) as socket:
        damage(stack, auction, name)
        passed = passes(stack)
        # A pass that began after the damage and is over has found it, or it was not found within one.
        until(lambda: found(stack, auction) or passed_since(stack, passed), "a pass is over")
        (entry,) = found(stack, auction)
        frame = resynced(socket)
    assert (frame["cause"], frame["timer"]["ends_at"]) == (expected.cause, before["ends_at"])
    assert frame["timer"]["version"] > before["version"]

    kept = hash_of(stack, auction)
    assert (int(kept["ends_at"]), kept["status"]) == (before["ends_at"], "CLOSING")
    assert int(kept["version"]) == frame["timer"]["version"]
    assert json.loads(kept["policy"])["extension_ms"] == WINDOW["extension_ms"]
    assert score_of(stack, auction) == before["ends_at"]
    assert stack.redis("ZSCORE", keys_of(auction).paused, auction) is None

    found_at = "" if expected.found_ms is None else str(before["ends_at"] + expected.found_ms)
    after = expected.after if isinstance(expected.after, str) else str(before["ends_at"] + expected.after)
    assert (entry["cause"], entry["action"], entry["severity"]) == (expected.cause, "requested", "severe")
    assert (entry["before"], entry["after"]) == (found_at if expected.before is None else expected.before, after)
    assert entry["ms_moved"] == str(-(expected.found_ms or 0))
    assert json.loads(entry["evidence"]).keys() == expected.evidence
    last = records_of(stack, auction)[-1]
    assert (last["event_type"], last["actor_id"]) == ("auction_timer_corrected", "reconciler")
    assert last["correlation_id"] == entry["correlation_id"]
    assert last["details"]["cause"] == expected.cause
    until(lambda: count_of(stack, expected.cause) > counted, "it is counted")


@pytest.mark.requirement("B1")
@pytest.mark.parametrize("unsealed", [False, True], ids=["edited", "edited-and-unsealed"])
def test_an_edited_end_that_an_engine_loads_closes_nothing(stack: LiveStack, unsealed: bool) -> None:
    """Hash and sorted set say that it is over, and the engine is new: it holds the auction until a pass has restored it.

    Also where whoever edited the hash took its checksum away.
    """
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + 300_000, **WINDOW))
    before = stack.until_status(auction_id, "CLOSING")
    names = keys_of(auction_id)
    (reconciler,) = stack.pids("reconciler")
    os.kill(reconciler, signal.SIGSTOP)
    try:
        (engine,) = stack.pids("engine")
        os.kill(engine, signal.SIGSTOP)
        stack.redis("HSET", names.timer(auction_id), "ends_at", now_of(stack) - 1_000)
        if unsealed:
            stack.redis("HDEL", names.timer(auction_id), "checksum")
        stack.redis("ZADD", names.deadlines, now_of(stack) - 1_000, auction_id)
        os.kill(engine, signal.SIGKILL)
        until(lambda: f"timer {auction_id!r}" in stack.logged(), "the next engine has found it")
        # Whatever else it has loaded is at work: a shard that can commit could have closed this one, too.
        other = fresh_id()
        stack.post(started(other, now, now + LONG_MS))
        stack.until_status(other, "ACTIVE")
        assert hash_of(stack, auction_id)["status"] == "CLOSING"
    finally:
        os.kill(reconciler, signal.SIGCONT)
    until(lambda: hash_of(stack, auction_id)["ends_at"] == str(before["ends_at"]), "the end is what the log says")
    assert score_of(stack, auction_id) == before["ends_at"]
    facts = [record["event_type"] for record in records_of(stack, auction_id)]
    assert "auction_timer_ended" not in facts
    assert facts[-1] == "auction_timer_corrected"
    until(lambda: "hash_changed" in causes(stack, auction_id), "it is written down")
    stack.post(bid(auction_id))
    until(
        lambda: "bid_accepted" in [record["event_type"] for record in records_of(stack, auction_id)], "bids count again"
    )


def forge_reschedule(stack: LiveStack, auction_id: str, ends_at: int) -> None:
    """An end that no engine would write, in hash, sorted set and log alike, sealed and chained as commits do it."""
    names = keys_of(auction_id)
    (engine,) = stack.pids("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        record = from_fields(hash_of(stack, auction_id))
        assert record is not None
        before = record.auction
        after = replace(before, ends_at=EpochMs(ends_at), version=before.version + 1)
        details = {"previous_ends_at": before.ends_at, "ends_at": ends_at, "reason": "forged"}
        now = EpochMs(before.ends_at - 1)
        decision = Decision(before, after, now, Fact.RESCHEDULED, details=details)
        fields = audit.record(
            decision, actor=SCHEDULER, event_id="forged", intake_id="1-0", trace_id=record.trace_id,
            correlation_id="req-1", recorded_at=now,
        )  # fmt: skip
        seq, chain_hash = stack.redis("HMGET", names.cursor, "seq", "hash")
        head, fields = audit.chained(audit.ChainHead(int(seq), chain_hash.decode()), fields)
        stack.redis("XADD", names.audit, "*", *(part for pair in fields.items() for part in pair))
        stack.redis("HSET", names.cursor, "seq", head.seq, "hash", head.hash)
        key = names.timer(auction_id)
        stack.redis("HSET", key, "ends_at", ends_at, "version", after.version, "checksum", checksum(after))
        stack.redis("ZADD", names.deadlines, ends_at, auction_id)
    finally:
        os.kill(engine, signal.SIGCONT)


@pytest.mark.requirement("R15")
def test_a_log_that_breaks_a_cap_is_found_and_clipped(stack: LiveStack, auction: str) -> None:
    """Every view agrees on an end past the cap; only the caps, derived once more, tell, and the last lawful end stands."""
    before = stack.timer(auction)
    counted = count_of(stack, "cap_breached")
    cap = before["final_deadline"]
    with connect(socket_url(stack, auction), compression=None) as socket:
        forge_reschedule(stack, auction, cap + 60_000)
        while (frame := resynced(socket))["cause"] != "cap_breached":
            pass
    assert frame["timer"]["ends_at"] == cap
    until(lambda: hash_of(stack, auction)["ends_at"] == str(cap), "the end is clipped")
    assert score_of(stack, auction) == cap
    until(lambda: "cap_breached" in causes(stack, auction), "it is written down")
    (entry,) = [each for each in found(stack, auction) if each["cause"] == "cap_breached"]
    assert (entry["action"], entry["severity"], entry["ms_moved"]) == ("requested", "severe", "-60000")
    assert (entry["before"], entry["after"]) == (str(cap + 60_000), str(cap))
    assert "past the last one allowed" in json.loads(entry["evidence"])["breach"]
    until(lambda: count_of(stack, "cap_breached") > counted, "it is counted")


@pytest.mark.requirement("R15")
def test_an_end_that_is_pushed_past_the_cap_by_hand_comes_back(stack: LiveStack, auction: str) -> None:
    """Hash and sorted set agree on it, and the log says otherwise: nobody is told, or bids by, an end past the cap."""
    before = stack.timer(auction)
    past = before["final_deadline"] + 60_000
    with connect(socket_url(stack, auction), compression=None) as socket:
        stack.redis("ZADD", keys_of(auction).deadlines, past, auction)
        stack.redis("HSET", keys_of(auction).timer(auction), "ends_at", past)
        frame = resynced(socket)
    assert frame["timer"]["ends_at"] == before["ends_at"]
    until(lambda: score_of(stack, auction) == before["ends_at"], "the deadline is what the log says")
    until(lambda: hash_of(stack, auction)["ends_at"] == str(before["ends_at"]), "the hash is what the log says")
    until(lambda: "end_past_cap" in causes(stack, auction), "it is written down")


FOREIGN: Final = b"\xff\xfe bad"
WRITTEN_OVER: Final = {
    "score_wrong": "a score that is no instant",
    "entry_extra": "a member that is no text",
    "hash_unreadable": "a timer of another type",
    "entry_missing": "a sorted set of another type",
}
"""By what the reconciler calls it."""


def write_over(stack: LiveStack, auction_id: str, kind: str) -> str:
    """What a hand does to Redis that no commit could; the name under which it is written down."""
    names = keys_of(auction_id)
    if kind == "score_wrong":
        stack.redis("ZADD", names.deadlines, "+inf", auction_id)
    elif kind == "entry_extra":
        stack.redis("ZADD", names.deadlines, now_of(stack) + LONG_MS, FOREIGN)
        return "%FF%FE%20bad"
    elif kind == "hash_unreadable":
        stack.redis("SET", names.timer(auction_id), "x")
    else:
        stack.redis("SET", names.deadlines, "x")
    return auction_id


def other_id(auction_id: str, *, same_shard: bool) -> str:
    """Another auction, of the same shard or of another one."""
    while (keys_of(other := fresh_id()) == keys_of(auction_id)) is not same_shard:
        pass
    return other


@pytest.mark.requirement("R10")
@pytest.mark.requirement("R29")
@pytest.mark.parametrize("kind", list(WRITTEN_OVER), ids=list(WRITTEN_OVER.values()))
def test_what_a_hand_has_written_over_is_restored_and_costs_nobody_else(
    stack: LiveStack, auction: str, kind: str
) -> None:
    """Also when the engine dies over it: the next one loads what it can, others close, no process exits or answers 500."""
    ends_at, now = stack.timer(auction)["ends_at"], now_of(stack)
    neighbour, stranger = other_id(auction, same_shard=True), other_id(auction, same_shard=False)
    stack.post(*(started(each, now, now + 8_000, soft_close_window_ms=1_000) for each in (neighbour, stranger)))
    for each in (neighbour, stranger):
        stack.until_status(each, "ACTIVE")
    (reconciler,), (gateway,) = stack.pids("reconciler"), stack.pids("gateway")
    os.kill(reconciler, signal.SIGSTOP)
    try:
        named = write_over(stack, auction, kind)
        stack.kill("engine")
        # It has loaded the shard before it applies anything of it.
        other = other_id(auction, same_shard=True)
        stack.post(started(other, now, now + LONG_MS))
        stack.until_status(other, "ACTIVE")
        (engine,) = stack.pids("engine")
        listed = stack.http.get("/auctions", params={"limit": 100})
        assert listed.status_code == 200, listed.text
        assert stranger in [each["auction_id"] for each in listed.json()["auctions"]]
    finally:
        os.kill(reconciler, signal.SIGCONT)
    until(
        lambda: kind in causes(stack, named) and stack.timer(auction)["status"] == "CLOSING",
        "it is written down",
    )
    deadlines = keys_of(auction).deadlines
    until(lambda: stack.redis("TYPE", deadlines) == b"zset", "the deadlines are a sorted set")
    stack.redis("ZREM", deadlines, FOREIGN)  # which is left to a person
    until(lambda: stack.redis("ZRANGE", deadlines, ends_at, ends_at, "BYSCORE"), "the score is back")
    until(lambda: stack.redis("TYPE", keys_of(auction).timer(auction)) == b"hash", "the hash is a hash")
    until(lambda: hash_of(stack, auction)["ends_at"] == str(ends_at), "the hash is back")
    for each in (neighbour, stranger):
        ended = stack.until_status(each, "ENDED")
        assert ended["ended_at"] == ended["original_ends_at"]
        assert facts_of(stack, each).count("auction_timer_ended") == 1
    stack.post(bid(auction))
    until(lambda: "bid_accepted" in facts_of(stack, auction), "bids count")
    assert "auction_timer_ended" not in facts_of(stack, auction)
    assert [stack.pids(role) for role in ("engine", "gateway", "reconciler")] == [[engine], [gateway], [reconciler]]


@pytest.mark.requirement("R11")
def test_a_bid_over_an_edited_hash_counts_on_what_the_log_says(stack: LiveStack, auction: str) -> None:
    """A bid that comes before the repair is folded over what the engine holds, whatever version the hash was given."""
    ends_at = stack.timer(auction)["ends_at"]
    stack.redis("HSET", keys_of(auction).timer(auction), "ends_at", ends_at - 290_000, "version", 500)
    stack.post(bid(auction))
    bids = until(
        lambda: [each for each in records_of(stack, auction) if each["event_type"] == "bid_accepted"], "the bid counts"
    )
    assert len(bids) == 1
    until(lambda: hash_of(stack, auction)["ends_at"] == str(ends_at), "the hash says what the log says")
    assert stack.timer(auction)["status"] == "CLOSING"


def test_a_closed_auction_among_the_deadlines_is_taken_out(stack: LiveStack) -> None:
    """It is not closed a second time, and its entry goes."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + 500, soft_close_window_ms=100))
    ended = stack.until_status(auction_id, "ENDED")
    stack.redis("ZADD", keys_of(auction_id).deadlines, ended["ends_at"] + 60_000, auction_id)
    until(lambda: score_of(stack, auction_id) is None, "the entry is gone")
    facts = [record["event_type"] for record in records_of(stack, auction_id)]
    assert facts.count("auction_timer_ended") == 1
    assert facts[-1] == "auction_timer_corrected"
    until(lambda: causes(stack, auction_id) == ["closed_in_deadlines"], "it is written down once")


def test_an_entry_for_an_auction_that_never_was_goes(stack: LiveStack) -> None:
    """Nobody waits for the end of nothing; the audit says what was removed."""
    auction_id = fresh_id()
    stack.redis("ZADD", keys_of(auction_id).deadlines, now_of(stack) + LONG_MS, auction_id)
    until(lambda: score_of(stack, auction_id) is None, "the entry is gone")
    until(lambda: causes(stack, auction_id) == ["entry_extra"], "it is written down once")


def frozen_in(stack: LiveStack, auction_id: str) -> list[dict[str, str]]:
    """What was written down about the heartbeat of an auction's shard."""
    shard = str(shard_of(auction_id, SHARDS))
    entries = stream(stack, RECONCILIATIONS)
    return [each for each in entries if (each["cause"], each["shard"]) == ("heartbeat_frozen", shard)]


@pytest.mark.requirement("R10")
def test_a_frozen_engine_is_reported_and_closes_late_but_never_early(stack: LiveStack) -> None:
    """Its silence is found, once, and the overdue close; when it goes on after a while it closes once, as of its end."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + 5_000, soft_close_window_ms=1_000))
    stack.until_status(auction_id, "ACTIVE")
    (engine,) = stack.pids("engine")
    # A loaded machine has let it stand still for longer than a lease before, too.
    before = len(frozen_in(stack, auction_id))
    os.kill(engine, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        frozen = until(lambda: frozen_in(stack, auction_id)[before:], "the frozen heartbeat is found")
        assert time.monotonic() - stopped < FOUND_WITHIN_S
        assert (frozen[0]["after"], frozen[0]["severity"], frozen[0]["ms_moved"]) == ("a beat", "severe", "0")
        assert json.loads(frozen[0]["evidence"])["beat_stands_still_ms"] > LEASE_MS
        until(lambda: "overdue" in causes(stack, auction_id), "the late close is found")
        until(lambda: time.monotonic() - stopped > FROZEN_S, "the engine stood still for long")
    finally:
        os.kill(engine, signal.SIGCONT)
    assert frozen_in(stack, auction_id)[before:] == frozen
    assert len(frozen) == 1
    ended = stack.until_status(auction_id, "ENDED")
    assert ended["ended_at"] == ended["original_ends_at"]
    facts = [record["event_type"] for record in records_of(stack, auction_id)]
    assert facts.count("auction_timer_ended") == 1
    assert count_of(stack, "heartbeat_frozen") > 0


@pytest.mark.requirement("R10")
def test_a_takeover_is_written_down_without_a_pass(short_tmp: Path) -> None:
    """One of two engines stands still: the other has its shards long before a pass, and both is told, once for each shard."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_RECONCILE_INTERVAL_MS": "3600000"})
    try:
        (first,) = stack.pids("engine")
        with OwnRole(stack, "engine", INSTANCE="other"):
            leases = [ShardKeys.of(shard).lease for shard in range(SHARDS)]

            def held() -> list[int]:
                holders = [stack.redis("HGET", lease, "holder") for lease in leases]
                return [shard for shard, holder in enumerate(holders) if holder == b"other"]

            until(lambda: len(held()) == SHARDS // 2, "the other engine has its share")
            # A loaded machine lets engines stand still before, too.
            before, counted = len(stream(stack, RECONCILIATIONS)), count_of(stack, "shard_taken_over")
            os.kill(first, signal.SIGSTOP)
            try:
                taken = set(range(SHARDS)) - set(held())
                until(lambda: len(held()) == SHARDS, "it has all of them")
                both = ("heartbeat_frozen", "shard_taken_over")
                until(lambda: len(stream(stack, RECONCILIATIONS)) >= before + 2 * len(taken), "it is written down")
                told = stream(stack, RECONCILIATIONS)[before:]
            finally:
                os.kill(first, signal.SIGCONT)
            expected = {(cause, str(shard)) for cause in both for shard in taken}
            assert taken
            assert sorted((each["cause"], each["shard"]) for each in told) == sorted(expected)
            assert {each["after"] for each in told if each["cause"] == "shard_taken_over"} == {"other"}
            until(lambda: count_of(stack, "shard_taken_over") >= counted + len(taken), "it is counted")
    finally:
        stack.stop()


@pytest.mark.requirement("R10", "R16")
def test_what_stands_still_is_replaced(short_tmp: Path) -> None:
    """A stopped engine is found and started anew, and closes as of the end, once; so are a gateway and a reconciler."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_FROZEN_MS": "5000"})
    try:
        auction_id, now = fresh_id(), now_of(stack)
        stack.post(started(auction_id, now, now + 5_000, soft_close_window_ms=1_000))
        stack.until_status(auction_id, "ACTIVE")
        (engine,) = stack.pids("engine")
        os.kill(engine, signal.SIGSTOP)
        until(lambda: stack.pids("engine") not in ([], [engine]), "another engine runs")
        ended = stack.until_status(auction_id, "ENDED")
        assert ended["ended_at"] == ended["original_ends_at"]
        assert facts_of(stack, auction_id).count("auction_timer_ended") == 1
        assert "heartbeat_frozen" in {each["cause"] for each in stream(stack, RECONCILIATIONS)}
        for role in ("gateway", "reconciler"):
            (stopped,) = stack.pids(role)
            os.kill(stopped, signal.SIGSTOP)
            until(lambda role=role, stopped=stopped: stack.pids(role) not in ([], [stopped]), f"another {role} runs")
        assert stack.timer(auction_id)["status"] == "ENDED"
        assert stack.logged().count("child_frozen") >= 3
    finally:
        stack.stop()


def edit_the_archive(stack: LiveStack, auction_id: str) -> None:
    """What stood in the stream stands in the archive only, and there somebody has changed a record."""
    shard, path = shard_of(auction_id, SHARDS), stack.data_dir / "audit.sqlite3"
    seq = int(stack.redis("HGET", keys_of(auction_id).cursor, "seq"))
    with closing(sqlite3.connect(path)) as archive:
        query = "SELECT max(seq) FROM auction_audit_log WHERE shard = ?"
        until(lambda: archive.execute(query, (shard,)).fetchone()[0] == seq, "all of it is archived")
        with archive:
            archive.execute("UPDATE auction_audit_log SET details = '{}' WHERE auction_id = ?", (auction_id,))
    stack.redis("XTRIM", keys_of(auction_id).audit, "MAXLEN", 1)


def once(stack: LiveStack, *options: str) -> subprocess.CompletedProcess[str]:
    """A single pass by the command line."""
    url = f"unix://{stack.data_dir / 'valkey.sock'}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    command = [*SCRIPT, "reconciler", "--once", "--redis-url", url, "--data-dir", str(stack.data_dir), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_single_pass_reports(short_tmp: Path) -> None:
    """Exit code 0 with nothing found, 1 with drift that it leaves or repairs, 69 without a Redis."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_RECONCILE_INTERVAL_MS": "3600000"})
    try:
        auction_id, now = fresh_id(), now_of(stack)
        stack.post(started(auction_id, now, now + LONG_MS))
        stack.until_status(auction_id, "ACTIVE")
        clean = once(stack, "--report")
        assert (clean.returncode, "0 drifts" in clean.stdout) == (0, True), clean
        damage(stack, auction_id, "entry-missing")
        dry = once(stack, "--report", "--dry-run")
        assert (dry.returncode, auction_id in dry.stdout, "entry_missing" in dry.stdout) == (1, True, True), dry
        assert score_of(stack, auction_id) is None
        left = once(stack, "--report")
        assert left.returncode == 1
        assert "another reconciler is at work" in left.stdout
        # Stopped, it holds the lease and does not beat: whoever looks once may act.
        (running,) = stack.pids("reconciler")
        os.kill(running, signal.SIGSTOP)
        try:
            acted = once(stack, "--report")
        finally:
            os.kill(running, signal.SIGCONT)
        assert (acted.returncode, "requested" in acted.stdout) == (1, True), acted
        until(lambda: score_of(stack, auction_id) is not None, "the entry is back")
        edit_the_archive(stack, auction_id)
        broken = once(stack, "--report", "--dry-run")
        assert (broken.returncode, "log_contradicted" in broken.stdout) == (1, True), broken
        assert score_of(stack, auction_id) == stack.timer(auction_id)["ends_at"]
    finally:
        stack.stop()
    assert once(stack, "--report").returncode == 69
