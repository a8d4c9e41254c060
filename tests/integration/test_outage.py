"""Nobody could bid near the end: the auction gets the time back, once, and the audit says why (requirement B8)."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from engine.contract.keys import shard_of
from tests.integration.events import bid, fresh_id, started
from tests.integration.records import SHARDS, announced, records_of
from tests.integration.test_first_light import now_of
from tests.live import LiveStack, alive, until

pytestmark = [pytest.mark.integration, pytest.mark.requirement("B8")]

EXTENSION_MS = 4_000
EXTENDED = "auction_timer_extended_for_outage"
INTAKE_MAX = 3_000
"""Enough for the engine to trim what it has applied."""
LASTS_S = 7.0
"""Longer than the 5 s that count as an outage."""


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    """A stack that gives four seconds back."""
    with TemporaryDirectory(prefix="at-") as directory:
        made = LiveStack(Path(directory), env={"AUCTION_TIMER_OUTAGE_EXTENSION_MS": str(EXTENSION_MS)})
        try:
            yield made
        finally:
            made.stop()


def auction(stack: LiveStack, lasts_ms: int, window_ms: int) -> str:
    """An auction that runs."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + lasts_ms, soft_close_window_ms=window_ms, extension_ms=60_000))
    stack.until_status(auction_id, "CLOSING" if window_ms >= lasts_ms else "ACTIVE")
    return auction_id


def lapse(seconds: float) -> None:
    """Let an outage last: it is measured by the clock of Redis, which no test can turn."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end, "time passes", within_s=seconds + 5)


def facts(stack: LiveStack, auction_id: str) -> list[str]:
    """What happened to an auction."""
    return [record["event_type"] for record in records_of(stack, auction_id)]


def assert_given_back(stack: LiveStack, auction_id: str) -> dict[str, Any]:
    """It was extended once for the outage, closed once, at its new end; the details of the extension."""
    ended = stack.until_status(auction_id, "ENDED")
    seen = facts(stack, auction_id)
    assert (seen.count(EXTENDED), seen.count("auction_timer_ended")) == (1, 1), seen
    assert seen.index(EXTENDED) < seen.index("auction_timer_ended")
    (record,) = [each for each in records_of(stack, auction_id) if each["event_type"] == EXTENDED]
    details: dict[str, Any] = record["details"]
    assert details["outage_until"] - details["outage_since"] > 5_000
    assert details["ends_at"] == max(details["previous_ends_at"], details["outage_until"]) + EXTENSION_MS
    assert ended["ended_at"] == details["ends_at"]
    assert record["occurred_at"] < details["previous_ends_at"]
    assert record["actor_type"] == "system"
    (frame,) = [each for each in announced(stack, auction_id) if each["type"] == "timer.extended"]
    assert (frame["reason"], frame["timer"]["ends_at"]) == ("outage", details["ends_at"])
    return details


@pytest.mark.requirement("B1")
def test_every_gateway_killed_across_a_closing_window(stack: LiveStack) -> None:
    """The close waits for a gateway, the first one that is back tells of the outage, and the end moves. Others stay."""
    hit = auction(stack, 12_000, 12_000)
    outside = auction(stack, 3_600_000, 1_000)
    (gateway,) = stack.pids("gateway")
    os.kill(gateway, signal.SIGKILL)
    until(lambda: not alive(gateway), "the gateway is gone")
    # `serve` starts another: it is kept from working until the outage has lasted.
    (gateway,) = until(lambda: stack.pids("gateway"), "the next gateway starts")
    os.kill(gateway, signal.SIGSTOP)
    try:
        lapse(LASTS_S + 5)
    finally:
        os.kill(gateway, signal.SIGCONT)
    until(lambda: _answers(stack), "the gateway is back")
    assert_given_back(stack, hit)
    assert EXTENDED not in facts(stack, outside)
    assert stack.timer(outside)["version"] <= 2


def test_the_store_stopped_across_a_closing_window(stack: LiveStack) -> None:
    """Nobody could write at all: what comes first when it goes on is the guard, not the overdue close."""
    outside = auction(stack, 60_000, 20_000)
    hit = auction(stack, 8_000, 8_000)
    (store,) = stack.pids("valkey-server")
    os.kill(store, signal.SIGSTOP)
    try:
        lapse(LASTS_S + 2)
    finally:
        os.kill(store, signal.SIGCONT)
    until(lambda: _answers(stack), "the gateway answers again")
    assert_given_back(stack, hit)
    assert EXTENDED not in facts(stack, outside)


def test_an_intake_that_is_full_across_a_closing_window(short_tmp: Path) -> None:
    """Gateways live and beat, and every bid is refused: that is an outage to whoever bids, and the end moves for it."""
    settings = {"OUTAGE_EXTENSION_MS": EXTENSION_MS, "INTAKE_MAX": INTAKE_MAX, "INTAKE_RETAINED": 0}
    stack = LiveStack(short_tmp, env={f"AUCTION_TIMER_{name}": str(value) for name, value in settings.items()})
    try:
        hit = auction(stack, 20_000, 20_000)
        while shard_of(other := fresh_id(), SHARDS) != shard_of(hit, SHARDS):
            pass
        (engine,) = stack.pids("engine")
        os.kill(engine, signal.SIGSTOP)
        try:
            for size in (500, 100, 10, 1):
                until(lambda size=size: _bids(stack, other, size) == 503, "the intake has no room for as many")
            lapse(stack.timer(hit)["remaining_ms"] / 1_000 + 1)
            assert _bids(stack, hit, 1) == 503
        finally:
            os.kill(engine, signal.SIGCONT)
        details = assert_given_back(stack, hit)
        assert details["outage_until"] > details["previous_ends_at"]
        until(lambda: _bids(stack, other, 1) == 202, "bids are taken again")
    finally:
        stack.stop()


def _bids(stack: LiveStack, auction_id: str, count: int) -> int:
    return stack.http.post("/events", json=[bid(auction_id) for _ in range(count)]).status_code


def _answers(stack: LiveStack) -> bool:
    import httpx

    try:
        return stack.http.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False
