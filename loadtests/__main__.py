"""Run a load test: `python -m loadtests [--url URL] [--watchers N] [--seconds S] [--phase spread|one]`.

Scenario `steady`: watchers on a hundred auctions (`spread`), then as many on one (`one`), while bids are placed. Without
`--url` it starts a stack of its own. Ends with a table, and with exit code 1 if a budget (loadtests/budgets.toml) is broken.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from uuid import uuid4

import httpx
import orjson

from auction_timer.processes import console_script
from loadtests.budgets import BUDGETS, Budget, breaches, lines, read_budgets, table
from loadtests.sockets import Socket

ROOT: Final = Path(__file__).parent.parent
SCENARIO: Final = "steady"
PHASES: Final = ("spread", "one")
BIDS_PER_S: Final = {"spread": 20.0, "one": 1.0}
"""In all. One on a crowded auction is already a thousand notifications."""
SPAWN_PER_S: Final = 200
READY_WITHIN_S: Final = 60.0
STOP_WITHIN_S: Final = 60.0
KNOWN_WITHIN_S: Final = 10.0
SYNCS: Final = 5
"""A client may send so many messages in a second."""
AFTERWARDS_MS: Final = 600_000
"""Auctions end so long after the run."""


def main() -> int:
    """Read the options and run; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    parser.add_argument("--url", help="of a running gateway; a stack is started if none is given")
    parser.add_argument("--token", default=os.environ.get("AUCTION_TIMER_TOKEN"), help="for a gateway that wants one")
    parser.add_argument("--watchers", type=int, default=1_000)
    parser.add_argument("--auctions", type=int, default=100, help="in the phase `spread`, at most 500")
    parser.add_argument("--seconds", type=int, default=60, help="of each phase, after everybody is there")
    parser.add_argument("--phase", action="append", choices=PHASES, help="both if none is named")
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    options = parser.parse_args()
    try:
        budgets = read_budgets(options.budgets, SCENARIO)
        with contextlib.ExitStack() as running:
            url = options.url or running.enter_context(own_stack())
            broken = [told for phase in options.phase or PHASES for told in _run(phase, url, options, budgets[phase])]
    except (ValueError, KeyError, OSError, LoadTestError, httpx.HTTPError) as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 2
    for told in broken:
        print(f"broken: {told}")
    return 1 if broken else 0


class LoadTestError(Exception):
    """The test could not be run. The message says why."""


@contextlib.contextmanager
def own_stack() -> Iterator[str]:
    """A stack on a free port, in a directory of its own; its URL.

    Raises:
        LoadTestError: it did not start; it has said why.
    """
    with TemporaryDirectory(prefix="at-load-") as directory:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        argv = [*console_script(), "serve", "--port", "0", "--data-dir", f"{directory}/data"]
        process = subprocess.Popen(
            argv,
            cwd=directory,
            env=environment | {"AUCTION_TIMER_LOG_LEVEL": "error"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if not ready.startswith("ready "):
                raise LoadTestError("the stack did not start; what it said stands above")
            yield ready.removeprefix("ready ").strip()
        finally:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _run(phase: str, url: str, options: argparse.Namespace, budget: Budget) -> list[str]:
    """One phase; how its budget is broken."""
    count = options.auctions if phase == "spread" else 1
    auctions = _register(url, options.token, count, options.seconds + options.watchers // SPAWN_PER_S)
    found = lines(_locust(phase, url, auctions, options))
    print(table(f"{SCENARIO}.{phase}", found), end="\n\n", flush=True)
    return [f"{SCENARIO}.{phase}: {told}" for told in breaches(found, budget)]


def _register(url: str, token: str | None, count: int, seconds: int) -> list[str]:
    """Register auctions in their soft close, and wait until the gateway knows them; their ids."""
    run = uuid4().hex[:8]
    names = [f"load-{run}-{number}" for number in range(count)]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=10.0) as http:
        now = round(time.time() * 1_000)
        end = now + seconds * 1_000 + AFTERWARDS_MS
        events = [_start(name, now, end) for name in names]
        answer = http.post("/events", json=events)
        if answer.status_code != httpx.codes.ACCEPTED:
            raise LoadTestError(f"the auctions were not accepted: {answer.status_code} {answer.text[:500]}")
        give_up = time.monotonic() + KNOWN_WITHIN_S
        for name in names:
            while http.get(f"/auctions/{name}/timer").status_code != httpx.codes.OK:
                if time.monotonic() > give_up:
                    raise LoadTestError(f"{name} is not known after {KNOWN_WITHIN_S:g} s: does an engine run?")
                time.sleep(0.05)
    return names


def _start(name: str, now: int, end: int) -> dict[str, Any]:
    data = {
        "auction_id": name,
        "starts_at": now,
        "ends_at": end,
        "policy": {"soft_close_window_ms": end - now, "extension_ms": end - now},
    }
    return {"specversion": "1.0", "id": name, "type": "offers.auction.started", "source": "loadtests", "data": data}


def offset_ms(url: str, auction_id: str, token: str | None) -> float:
    """The server's clock minus ours, from the quickest of some `sync` exchanges on a socket."""
    socket = Socket(f"{url}/auctions/{auction_id}/updates", token=token)
    try:
        found: list[tuple[float, float]] = []
        texts = socket.texts()
        for _ in range(SYNCS):
            socket.send(orjson.dumps({"type": "sync", "t0": time.time() * 1_000}))
            answer = next(body for text in texts if (body := orjson.loads(text))["type"] == "sync")
            back = time.time() * 1_000
            found.append((back - answer["t0"], ((answer["t1"] - answer["t0"]) + (answer["t2"] - back)) / 2))
    finally:
        socket.close()
    return min(found)[1]


def _locust(phase: str, url: str, auctions: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run locust; its statistics."""
    env = os.environ | {
        "LOADTEST_AUCTIONS": ",".join(auctions),
        "LOADTEST_BIDS_PER_S": str(BIDS_PER_S[phase]),
        "LOADTEST_OFFSET_MS": f"{offset_ms(url, auctions[0], options.token):.3f}",
    }
    if options.token:
        env["LOADTEST_TOKEN"] = options.token
    users = options.watchers + 1
    seconds = options.seconds + users // SPAWN_PER_S + 1
    argv = [
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "steady.py"), "--headless", "--json"),
        *("--host", url, "-u", str(users), "-r", str(SPAWN_PER_S), "-t", f"{seconds}s", "--stop-timeout", "5"),
        *("--exit-code-on-error", "0", "--loglevel", "WARNING"),
    ]
    done = subprocess.run(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=False, timeout=seconds + STOP_WITHIN_S)
    if done.returncode != 0:
        raise LoadTestError(f"locust ended with exit code {done.returncode}; what it said stands above")
    stats: list[dict[str, Any]] = json.loads(done.stdout)
    return stats


if __name__ == "__main__":
    sys.exit(main())
