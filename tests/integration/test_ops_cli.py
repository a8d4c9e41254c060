"""`auction-timer ops troubleshooting` as an operator types it, against a running stack."""

import json
import os
import re
import signal
import subprocess
from uuid import uuid4

import pytest

from engine.contract.keys import shard_of
from tests.live import SCRIPT, LiveStack, until

pytestmark = pytest.mark.integration


def ops(stack: LiveStack, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SCRIPT, "ops", "troubleshooting", *args, "--url", stack.url], capture_output=True, text=True, timeout=30
    )


def lost_bid(stack: LiveStack, *, reply_to: str | None = None) -> tuple[str, str]:
    """A bid for an auction that nobody knows: its event id, and the auction's."""
    auction_id, event_id = f"a-{uuid4().hex}", f"e-{uuid4().hex}"
    detail = {"auction_id": auction_id, "bid_id": "b-1"} | ({"reply_to": reply_to} if reply_to else {})
    stack.post({"id": event_id, "detail-type": "auctions.bid.accepted", "source": "test", "detail": detail})
    until(lambda: event_id in ops(stack, "list", "--json", "--limit", "10000").stdout, "the bid is in troubleshooting")
    return event_id, auction_id


@pytest.mark.requirement("R29")
@pytest.mark.requirement("R30")
def test_a_command_is_listed_and_cancelled(live_stack: LiveStack) -> None:
    """`list` shows what failed and why; `cancel` needs a reason, tells whoever sent it, and works once."""
    reply_to = f"inbox-{uuid4().hex}"
    event_id, _ = lost_bid(live_stack, reply_to=reply_to)
    shown = ops(live_stack, "list", "--error-code", "UNKNOWN_AUCTION", "--limit", "10000")
    assert event_id in shown.stdout
    assert "in troubleshooting" in shown.stdout
    without = ops(live_stack, "cancel", event_id, "--operator", "jane@example.com")
    assert (without.returncode, "--reason" in without.stderr) == (2, True)
    nobody = ops(live_stack, "cancel", event_id, "--reason", "a test bid")
    assert (nobody.returncode, "--operator" in nobody.stderr) == (2, True)
    done = ops(live_stack, "cancel", event_id, "--reason", "a test bid", "--operator", "jane@example.com")
    assert (done.returncode, done.stdout) == (0, f"{event_id} is CANCELED, and {reply_to} was told\n")
    (_, fields) = live_stack.redis("XRANGE", f"auction:replies:{reply_to}", "-", "+")[-1]
    assert fields[b"outcome"] == b"CANCELED"
    body = json.loads(fields[b"body"])
    assert (body["error"], body["operator"]) == ("a test bid", "jane@example.com")
    again = ops(live_stack, "cancel", event_id, "--reason", "twice", "--operator", "jane@example.com")
    assert (again.returncode, "INVALID_OPERATION" in again.stderr) == (1, True)
    assert event_id not in ops(live_stack, "list", "--json", "--limit", "10000").stdout


@pytest.mark.requirement("R32")
def test_what_failed_is_sent_round_again_once_its_cause_is_mended(live_stack: LiveStack) -> None:
    """`retry` takes one, `requeue` many; what fails again comes back with one more attempt, what does not is applied."""
    event_id, _ = lost_bid(live_stack)
    assert ops(live_stack, "retry", event_id).returncode == 0

    def attempts() -> int | None:
        lines = ops(live_stack, "list", "--json", "--limit", "10000").stdout.splitlines()
        return next(
            (command["attempts"] for command in map(json.loads, lines) if command["command_id"] == event_id), None
        )

    until(lambda: attempts() == 2, "the bid failed once more")
    other_id, auction_id = lost_bid(live_stack)
    now = live_stack.http.post("/events", json=[started(auction_id, live_stack)]).json()["results"][0]["arrival_ms"]
    assert now > 0
    done = ops(live_stack, "requeue", "--error-code", "UNKNOWN_AUCTION", "--limit", "1000")
    assert (done.returncode, "refused 0" in done.stdout) == (0, True)
    until(
        lambda: live_stack.http.get(f"/commands/{other_id}").json().get("outcome") != "IN_TROUBLESHOOTING_QUEUE",
        "applied",
    )
    assert other_id not in ops(live_stack, "list", "--json", "--limit", "10000").stdout


def started(auction_id: str, stack: LiveStack) -> dict[str, object]:
    now = int(stack.redis("TIME")[0]) * 1_000
    detail = {"auction_id": auction_id, "starts_at": now - 1_000, "ends_at": now + 3_600_000}
    return {"id": f"s-{auction_id}", "detail-type": "offers.auction.started", "source": "test", "detail": detail}


@pytest.mark.requirement("R30")
def test_of_commands_of_one_id_each_is_reached_by_its_shard(live_stack: LiveStack) -> None:
    """`list` shows the shards, and without one of them an operator is asked for it."""
    event_id = f"e-{uuid4().hex}"
    auction_ids = [
        next(name for name in iter(lambda: f"a-{uuid4().hex}", "") if shard_of(name, 8) == n) for n in (2, 5)
    ]
    for auction_id in auction_ids:
        detail = {"auction_id": auction_id, "bid_id": "b-1"}
        live_stack.post({"id": event_id, "detail-type": "auctions.bid.accepted", "source": "test", "detail": detail})

    def shards() -> list[int]:
        lines = ops(live_stack, "list", "--json", "--limit", "10000").stdout.splitlines()
        return sorted(each["shard"] for each in map(json.loads, lines) if each["command_id"] == event_id)

    until(lambda: shards() == [2, 5], "both bids are in troubleshooting")
    why = ("--reason", "a test bid", "--operator", "jane@example.com")
    asked = ops(live_stack, "cancel", event_id, *why)
    assert (asked.returncode, "2, 5" in asked.stderr) == (1, True)
    assert ops(live_stack, "cancel", event_id, *why, "--shard", "5").returncode == 0
    assert shards() == [2]
    assert ops(live_stack, "cancel", event_id, *why).returncode == 0


def test_what_cannot_be_sent_is_said_plainly(live_stack: LiveStack) -> None:
    """Arguments that are no text, and ids that fit into no URL: one line that says which."""
    for arguments, said in (
        (("retry", "nobody-\udcff"), "UTF-8"),
        (("cancel", "nobody", "--reason", "\udcff", "--operator", "jane"), "UTF-8"),
        (("retry", "x" * 100_000), "1024 characters"),
    ):
        done = ops(live_stack, *arguments)
        assert done.returncode == (2 if said == "UTF-8" else 1)
        assert (done.stderr.count("\n"), said in done.stderr) == (1, True), done.stderr


def test_an_order_that_is_not_answered_yet_can_be_followed(live_stack: LiveStack) -> None:
    """With the engine away the order is taken, the id under which it can be asked for is told, and then it is done."""
    event_id, _ = lost_bid(live_stack)
    (engine,) = live_stack.pids("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        asked = ops(live_stack, "cancel", event_id, "--reason", "a test bid", "--operator", "jane")
    finally:
        os.kill(engine, signal.SIGCONT)
    (path,) = re.findall(r"/commands/cmd-\S+", asked.stderr)
    assert asked.returncode == 1
    until(lambda: live_stack.http.get(path).json()["outcome"] == "APPLIED", "the order is carried out")


def test_an_unknown_command_and_a_missing_gateway_are_said_plainly(live_stack: LiveStack) -> None:
    """Each failure is one line on stderr and a non-zero exit."""
    unknown = ops(live_stack, "retry", "nobody-knows")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (1, 1)
    assert "RESOURCE_NOT_FOUND" in unknown.stderr
