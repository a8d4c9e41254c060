"""`serve` as a process: starts, says so, survives what happens to its parts, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.sync.client import connect

from auction_timer.processes import parent_death_hook
from auction_timer.roles import NICENESS
from tests.integration.events import bid, event, fresh_id, started
from tests.live import DEADLINE_S, SCRIPT, LiveStack, alive, children_of, until

pytestmark = pytest.mark.integration

LONG_MS = 7_200_000
ROLES = ("engine", "gateway", "reconciler")


@pytest.fixture
def stack(short_tmp: Path):
    """A stack of one test's own, because the test breaks it."""
    made = LiveStack(short_tmp)
    yield made
    made.stop()


def now_of(stack: LiveStack) -> int:
    answer = stack.post(event("offers.cancellation.completed", auction_id=fresh_id(), reason="clock"))
    return int(answer[0]["arrival_ms"])


def test_children_are_named_and_none_is_left(short_tmp: Path) -> None:
    """The process list shows the roles by their command; SIGTERM ends them all, with exit code 0."""
    stack = LiveStack(short_tmp)
    children = children_of(stack.process.pid)
    commands = " ".join(children.values())
    assert "auction-timer engine" in commands
    assert "auction-timer gateway" in commands
    assert "auction-timer reconciler" in commands
    assert len(children) == 4
    assert stack.ready_line.startswith("ready http://127.0.0.1:")
    (gateway,) = stack.pids("gateway")
    assert b"AUCTION_TIMER_DRAIN_MS=25000" in Path(f"/proc/{gateway}/environ").read_bytes().split(b"\0")
    base = os.getpriority(os.PRIO_PROCESS, 0)

    def priorities() -> dict[str, list[int]]:
        return {role: [os.getpriority(os.PRIO_PROCESS, pid) for pid in stack.pids(role)] for role in ROLES}

    # The gateway is ready; the reconciler may still be about to give way.
    expected = {"engine": [base], "gateway": [base], "reconciler": [base + NICENESS]}
    until(lambda: priorities() == expected, "the reconciler gives way, and nobody else")
    assert stack.stop() == 0
    assert not [pid for pid in children if alive(pid)]


def test_a_killed_serve_takes_everything_with_it(short_tmp: Path) -> None:
    """SIGKILL of the parent leaves no engine, no gateway, no reconciler and no store, whoever watches a last minute."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_DRAIN_MS": "60000"})
    children = list(children_of(stack.process.pid))
    try:
        auction_id, now = fresh_id(), now_of(stack)
        stack.post(started(auction_id, now, now + 55_000))
        stack.until_status(auction_id, "CLOSING")
        with connect(f"{stack.url.replace('http', 'ws')}/auctions/{auction_id}/updates") as watcher:
            watcher.recv()
            os.kill(stack.process.pid, signal.SIGKILL)
            stack.process.wait()
            until(lambda: not any(alive(pid) for pid in children), "every child is gone")
    finally:
        stack.stop()


@pytest.mark.requirement("R10")
def test_state_survives_a_restart_of_everything(short_tmp: Path) -> None:
    """Auctions, their order of events and their audit are there again after a stop and a start."""
    stack = LiveStack(short_tmp)
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + LONG_MS))
    before = stack.until_status(auction_id, "ACTIVE")
    assert stack.stop() == 0
    again = LiveStack(short_tmp)
    try:
        after = again.timer(auction_id)
        assert {name: after[name] for name in ("status", "version", "ends_at", "trace_id")} == {
            name: before[name] for name in ("status", "version", "ends_at", "trace_id")
        }
        again.post(event("auctions.cancel.requested", auction_id=auction_id, reason="enough"))
        assert again.until_status(auction_id, "CANCELLED")["version"] == before["version"] + 1
    finally:
        again.stop()


@pytest.mark.requirement("R10", "B2")
def test_an_engine_killed_over_a_deadline_closes_as_of_it_and_counts_the_bid_that_was_in_time(stack: LiveStack) -> None:
    """A bid that arrived while no engine ran still extends; the close that was missed is stamped with its deadline."""
    saved, missed, now = fresh_id(), fresh_id(), now_of(stack)
    policy = {"soft_close_window_ms": 6_000, "extension_ms": 6_000}
    stack.post(started(saved, now, now + 6_000, **policy), started(missed, now, now + 6_000, **policy))
    stack.until_status(saved, "CLOSING")
    (engine,) = stack.pids("engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        (placed,) = stack.post(
            {
                "specversion": "1.0", "id": fresh_id(), "type": "auctions.bid.accepted", "source": "t",
                "data": {"auction_id": saved, "bid_id": "late-night"},
            }
        )  # fmt: skip
        assert placed["arrival_ms"] < now + 6_000
        # Past both deadlines on the auction clock, with nobody to act on them.
        until(lambda: now_of(stack) > now + 6_050, "the deadline has passed")
        assert stack.timer(saved)["status"] == "CLOSING"
    finally:
        os.kill(engine, signal.SIGKILL)
    assert stack.until_status(missed, "ENDED")["ended_at"] == now + 6_000
    timer = stack.until_status(saved, "ENDED")
    assert timer["extension_count"] == 1
    assert timer["ended_at"] == placed["arrival_ms"] + 6_000


@pytest.mark.parametrize("role", ["engine", "gateway", "reconciler", "valkey-server"])
def test_each_part_is_restarted_when_it_is_killed(stack: LiveStack, role: str) -> None:
    """SIGKILL of any one part is an interruption: it is started again, and what was accepted before is still there."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + LONG_MS))
    stack.until_status(auction_id, "ACTIVE")
    until(stack.is_flushed, "the kernel has what was accepted")
    killed = stack.kill(role)
    until(lambda: [pid for pid in stack.pids(role) if pid != killed], f"another {role} runs")
    until(lambda: _ready(stack), "ready again")
    again = event("auctions.cancel.requested", auction_id=auction_id, reason="enough")
    until(lambda: _posted(stack, again), "events are taken again")
    assert stack.until_status(auction_id, "CANCELLED")["version"] == 3


def _ready(stack: LiveStack) -> bool:
    import httpx

    try:
        return stack.http.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def _posted(stack: LiveStack, payload: dict[str, object]) -> bool:
    import httpx

    try:
        return stack.http.post("/events", json=payload).status_code == 202
    except httpx.HTTPError:
        return False


@pytest.mark.requirement("B4")
def test_who_watched_a_gateway_that_was_killed_gets_what_was_missed(stack: LiveStack) -> None:
    """The next gateway knows the events from before its own start: a client comes back with `since` and misses nothing."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + LONG_MS))
    stack.until_status(auction_id, "ACTIVE")
    socket_url = stack.url.replace("http", "ws", 1) + f"/auctions/{auction_id}/updates"
    with connect(socket_url, compression=None) as socket:
        cursor = json.loads(socket.recv(timeout=10))["cursor"]
        stack.post(bid(auction_id, bid_id="b-1"))
        killed = stack.kill("gateway")
    until(lambda: [pid for pid in stack.pids("gateway") if pid != killed], "another gateway runs")
    until(lambda: _posted(stack, bid(auction_id, bid_id="b-2")), "events are taken again")
    until(lambda: _seen(stack, auction_id) >= 2, "both bids are announced")
    with connect(f"{socket_url}?since={cursor}", compression=None) as socket:
        snapshot = json.loads(socket.recv(timeout=10))
        bids: list[str] = []
        while len(bids) < 2:
            frame = json.loads(socket.recv(timeout=10))
            bids += [frame["bid_id"]] if frame["type"] == "bid.accepted" else []
    assert snapshot["recovered"] is True
    assert bids == ["b-1", "b-2"]


def _seen(stack: LiveStack, auction_id: str) -> int:
    """Bids of an auction on the event lane, as Redis holds it."""
    lanes = [stack.redis("XRANGE", f"auction:updates:{{{shard}}}", "-", "+") for shard in range(8)]
    return sum(repr(row).count(auction_id) > 0 and "bid.accepted" in repr(row) for lane in lanes for row in lane)


@pytest.mark.requirement("R16")
def test_without_its_store_the_gateway_answers_from_memory_and_says_so(stack: LiveStack) -> None:
    """While Redis is away: 200 with `stale` for a known auction, 503 for an unknown one, and `/readyz` names what fails."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + LONG_MS))
    stack.until_status(auction_id, "ACTIVE")
    (store,) = stack.pids("valkey-server")
    os.kill(store, signal.SIGSTOP)
    try:
        until(lambda: stack.timer(auction_id)["stale"], "what is remembered is marked stale")
        answer = stack.http.get("/auctions/never-seen/timer")
        assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        readiness = stack.http.get("/readyz")
        assert readiness.status_code == 503
        assert readiness.json()["checks"]["redis"] != "ok"
        assert stack.http.get("/healthz").status_code == 200
    finally:
        os.kill(store, signal.SIGCONT)
    until(lambda: not stack.timer(auction_id)["stale"] and _ready(stack), "fresh and ready again")


def test_a_second_serve_on_the_same_data_says_who_holds_it(stack: LiveStack) -> None:
    """It exits at once, names the pid that holds the directory, whatever else that holds, and changes nothing."""
    for port in ("0", stack.url.rpartition(":")[2]):
        second = _run("serve", "--port", port, "--data-dir", str(stack.data_dir))
        assert second.returncode == 78
        assert str(stack.process.pid) in second.stderr
        assert "--data-dir" in second.stderr
        assert "--port" not in second.stderr
    assert _ready(stack)


def test_several_gateways_share_the_port(short_tmp: Path) -> None:
    """With `--gateways 2` both run, one URL reaches them, and one scrape adds them up."""
    stack = LiveStack(short_tmp, "--gateways", "2")
    try:
        assert len(stack.pids("gateway")) == 2
        auction_id, now = fresh_id(), now_of(stack)
        stack.post(started(auction_id, now, now + LONG_MS))
        stack.until_status(auction_id, "ACTIVE")
    finally:
        assert stack.stop() == 0


def test_a_port_in_use_and_a_public_address_are_explained(stack: LiveStack, short_tmp: Path) -> None:
    """A taken port exits 69, an open public address 78; both messages say what to do."""
    port = stack.url.rpartition(":")[2]
    taken = _run("serve", "--port", port, "--data-dir", str(short_tmp / "other"))
    assert (taken.returncode, "--port" in taken.stderr) == (69, True)
    public = _run("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(short_tmp / "other"))
    assert (public.returncode, "--insecure" in public.stderr) == (78, True)


def test_a_role_without_a_redis_says_so() -> None:
    """`engine`, `gateway` and `reconciler` need a Redis, and say where to name it."""
    for role in ("engine", "gateway", "reconciler"):
        alone = _run(role)
        assert alone.returncode == 78
        assert "--redis-url" in alone.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_gateway_that_waits_for_its_redis_can_be_stopped(short_tmp: Path, number: signal.Signals) -> None:
    """A start that may never end does not keep the process: it leaves with exit code 0, and without a traceback."""
    with _started(short_tmp, "gateway", "--port", "0", AUCTION_TIMER_REDIS_URL="redis://127.0.0.1:1") as gateway:
        until(lambda: "clock_sample_failed" in gateway.said(), "it waits for its Redis")
        gateway.process.send_signal(number)
        assert gateway.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in gateway.said()


def test_a_serve_that_waits_for_its_store_can_be_stopped(short_tmp: Path) -> None:
    """Nobody who pressed Ctrl-C waits until a large file is loaded: the store goes, and `serve` with it, exit code 0."""
    silent = short_tmp / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o700)
    with _started(
        short_tmp, "serve", "--port", "0", "--data-dir", "data", AUCTION_TIMER_SERVER_BINARY=str(silent)
    ) as serve:
        until(lambda: "store_starting" in serve.said(), "it waits for its store")
        (store,) = children_of(serve.process.pid)
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(DEADLINE_S) == 0
        assert not alive(store)
        assert "Traceback" not in serve.said()


def test_another_shard_count_is_refused(short_tmp: Path) -> None:
    """The shard count is fixed at the first start; a mismatch names both and what to do."""
    stack = LiveStack(short_tmp)
    assert stack.stop() == 0
    other = _run("serve", "--port", "0", "--data-dir", str(stack.data_dir), env={"AUCTION_TIMER_SHARDS": "4"})
    assert other.returncode == 78
    assert "AUCTION_TIMER_SHARDS=8" in other.stderr


def test_check_config_prints_settings_and_every_fault(short_tmp: Path) -> None:
    """Good settings exit 0; every unknown name, wrong value and contradiction is listed, exit 1; no secret is shown."""
    good = _run("check-config", env={"AUCTION_TIMER_REDIS_URL": "redis://user:hunter2@127.0.0.1:6379"}, cwd=short_tmp)
    assert good.returncode == 0
    assert "shards = 8" in good.stdout
    assert "hunter2" not in good.stdout + good.stderr
    bad = _run("check-config", env={"AUCTION_TIMER_SHARD": "8", "AUCTION_TIMER_PORT": "x"}, cwd=short_tmp)
    assert bad.returncode == 1
    assert "AUCTION_TIMER_SHARD is no setting" in bad.stderr
    assert "AUCTION_TIMER_PORT" in bad.stderr
    torn = _run("check-config", env={"AUCTION_TIMER_HEARTBEAT_MS": "1900"}, cwd=short_tmp)
    assert (torn.returncode, "heartbeat_ms" in torn.stderr) == (1, True)


def test_help_names_every_command() -> None:
    """`--help` lists the commands of the contract that this version has."""
    shown = _run("--help")
    assert shown.returncode == 0
    for command in ("serve", "engine", "gateway", "reconciler", "audit", "emit", "replay", "watch", "check-config"):
        assert command in shown.stdout


def _run(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    return subprocess.run(
        [*SCRIPT, *arguments],
        env=clean | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@dataclass
class _Started:
    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def _started(directory: Path, *arguments: str, **env: str) -> Iterator[_Started]:
    """A command that runs on its own, and is gone at the end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    log = directory / "said.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*SCRIPT, *arguments],
            cwd=directory,
            env=clean | env,
            stdout=output,
            stderr=output,
            preexec_fn=parent_death_hook(),
        )
    try:
        yield _Started(process, log)
    finally:
        process.kill()
        process.wait()


def test_the_package_runs_as_a_module() -> None:
    """`python -m auction_timer` is the same command."""
    shown = subprocess.run(
        [sys.executable, "-m", "auction_timer", "--version"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert shown.stdout.startswith("auction-timer ")
