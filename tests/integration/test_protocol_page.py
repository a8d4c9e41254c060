"""docs/protocol.md: its clients run against a real stack, its arithmetic and its tables are right."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.asyncapi import frame_schemas
from gateway.closing import CloseCode
from gateway.connection import MESSAGE_EARNED_NS
from gateway.door import JITTER_MS, RETRY_AFTER_MS
from tests.gateway.test_asyncapi import faults_of
from tests.integration.events import bid, event, fresh_id, started
from tests.live import LiveStack, until

pytestmark = pytest.mark.integration

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
FAR = 4_000_000_000_000


def section(title: str) -> str:
    """The text of one section."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def code_in(title: str, language: str) -> str:
    """The one block of code of a section."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)
    return str(code)


def follow(command: list[str], stack: LiveStack, auction_id: str, directory: Path) -> list[str]:
    """Run a client on an auction through bids, a killed gateway and a cancellation; the lines that it printed."""
    output = directory / "output"
    with output.open("w") as sink:
        client = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=directory)

    def count(what: str) -> int:
        return output.read_text().count(what)

    try:
        until(lambda: count("timer.snapshot") == 1 and count("sync") == 1, output.read_text())
        stack.post(bid(auction_id), bid(auction_id))
        until(lambda: count("bid.accepted") == 2, "two bids are told")
        stack.kill("gateway")
        until(lambda: count("timer.snapshot") == 2, "it came back")
        stack.post(bid(auction_id), event("auctions.cancel.requested", auction_id=auction_id, reason="a test"))
        assert client.wait(30) == 0, output.read_text()
    finally:
        client.kill()
        client.wait()
    return output.read_text().splitlines()


def check(lines: list[str]) -> None:
    """Every bid was told once, the countdown was known, and the end was seen."""
    kinds = [line.split()[0] for line in lines]
    assert kinds[0] == "timer.snapshot"
    assert kinds.count("bid.accepted") == 3
    assert kinds.count("timer.cancelled") == 1
    assert lines[-1].split()[:2] == ["timer.cancelled", "CANCELLED"]
    left = [float(line.split()[2]) for line in lines]
    assert all(abs(one - other) < 60 for one, other in pairwise(left))


@pytest.mark.requirement("R9", "B4")
def test_the_client_in_python_follows_an_auction(short_tmp: Path) -> None:
    """Forty lines: it counts down, survives the death of its gateway without a gap or a double, and stops at the end."""
    source = code_in("A client in Python", "python")
    assert len(source.splitlines()) <= 55
    (short_tmp / "watch.py").write_text(source)
    stack = LiveStack(short_tmp)
    try:
        auction_id = fresh_id()
        stack.post(started(auction_id, 1_000, FAR))
        stack.until_status(auction_id, "ACTIVE")
        url = f"{stack.url.replace('http', 'ws', 1)}/auctions/{auction_id}/updates"
        check(follow([sys.executable, "-W", "error", "watch.py", url], stack, auction_id, short_tmp))
        gone = subprocess.run(
            [sys.executable, "watch.py", url.replace(auction_id, "nobody")],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=short_tmp,
        )
        assert gone.returncode == 1
        assert "refused with 404" in gone.stderr
    finally:
        stack.stop()


def node() -> str | None:
    """Node.js with a WebSocket of its own, which browsers have too; None if there is none."""
    program = shutil.which("node")
    if program is None:
        return None
    has = [program, "--experimental-websocket", "-e", "process.exit(typeof WebSocket === 'function' ? 0 : 1)"]
    return program if subprocess.run(has, capture_output=True, timeout=30).returncode == 0 else None


@pytest.mark.requirement("R9", "B4")
def test_the_client_in_javascript_follows_an_auction(short_tmp: Path) -> None:
    """The same in thirty lines of JavaScript, run by Node.js."""
    program = node()
    if program is None:
        pytest.skip("no Node.js with WebSocket")
    source = code_in("A client in JavaScript", "js")
    assert len(source.splitlines()) <= 35
    printing = "(frame, timer, left) => console.log(frame.type, timer.status, (left() / 1000).toFixed(1), 's left')"
    (short_tmp / "watch.mjs").write_text(f"{source}\nwatch(process.argv[2], {printing});\n")
    stack = LiveStack(short_tmp)
    try:
        auction_id = fresh_id()
        stack.post(started(auction_id, 1_000, FAR))
        stack.until_status(auction_id, "ACTIVE")
        url = f"{stack.url.replace('http', 'ws', 1)}/auctions/{auction_id}/updates"
        command = [program, "--experimental-websocket", "--no-warnings", "watch.mjs", url]
        check(follow(command, stack, auction_id, short_tmp))
    finally:
        stack.stop()


@pytest.mark.requirement("R8", "B5")
def test_the_worked_example_is_right() -> None:
    """The numbers of the page, by the formulas of the page."""
    t0, t1, t2, t3 = 5_000, 1_700_000_000_020, 1_700_000_000_021, 5_041
    assert (t3 - t0) - (t2 - t1) == 40
    offset = ((t1 - t0) + (t2 - t3)) / 2
    assert offset == 1_699_999_995_000
    assert 6_000 + offset == 1_700_000_001_000
    text = section("Clock sync")
    for number in (t0, t1, t2, t3, int(offset), 1_700_000_001_000):
        assert f"{number:,}" in text


def test_the_tables_are_complete() -> None:
    """Every close code and every type of frame is on the page, and the advice of a drain is the one that is given."""
    codes = {int(code) for code in re.findall(r"^\| (\d{4})\b", section("Close codes"), re.MULTILINE)}
    assert codes - {1006} == {code.value for code in CloseCode}
    assert all(f"`{kind}`" in PAGE for kind in frame_schemas())
    assert f'{{"retry_after_ms": {RETRY_AFTER_MS}, "jitter_ms": {JITTER_MS}}}' in PAGE
    assert f"every {MESSAGE_EARNED_NS // 1_000_000} ms" in section("What you may send")


def test_the_fields_of_an_event_are_those_it_has() -> None:
    """What the table of events names is in the schema of each type, and what every such frame has is named."""
    schemas = frame_schemas()
    common = {"type", "timer", *schemas["timer.ended"]["required"]}
    rows = re.findall(r"^\| (`[^|]*) \|[^|]*\|([^|]*)\|$", section("Two lanes"), re.MULTILINE)
    told = {
        kind: set(re.findall(r"`(\w+)`", fields)) for kinds, fields in rows for kind in re.findall(r"`([^`]+)`", kinds)
    }
    assert told.keys() == schemas.keys() - {"timer.snapshot", "timer.tick", "sync", "error"}
    for kind, fields in told.items():
        assert fields <= schemas[kind]["properties"].keys(), kind
        assert set(schemas[kind]["required"]) - common <= fields, kind


def test_the_example_of_a_snapshot_is_one() -> None:
    """What the page shows is valid by `/asyncapi.json`."""
    assert faults_of(json.loads(code_in("The first frame", "json"))) == []
