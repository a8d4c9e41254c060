"""Tests for auction_timer.commands: what the commands say where, and with which exit code."""

import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pytest

from auction_timer import commands
from auction_timer.replay import ReplayProgress
from auction_timer.replay.player import Phase


class Gateway(BaseHTTPRequestHandler):
    """Takes every event."""

    def do_POST(self) -> None:
        """Answer 202 with an arrival for each."""
        events = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
        body = orjson.dumps(
            {"results": [{"id": event["id"], "status": "accepted", "arrival_ms": 1} for event in events]}
        )
        self.send_response(202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    """Where a gateway listens."""
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


LINES = b'{"id": "e1"}\n{"id": "e\xff"}\n{"id": "e3"}\n'


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryIO]:
    """The writing end of what is stdin."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as feed, os.fdopen(reading, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield feed


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C counts, as at a terminal; a suite that is run in the background may have been started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("source", ["file", "-"])
def test_a_byte_that_is_not_utf_8_costs_its_own_line_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], feed: BinaryIO, url: str, source: str
) -> None:
    """From a file and from stdin: the line is named and counted, the others are sent, nothing is altered."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(LINES)
    feed.write(LINES)
    feed.close()
    assert commands.emit(str(path) if source == "file" else "-", url=url, token=None) == 1
    said = capsys.readouterr()
    assert said.out == "accepted 2  duplicate 0  rejected 1\n"
    assert said.err.startswith("line 2: is not JSON")


@pytest.mark.usefixtures("interruptible")
def test_an_emit_that_is_interrupted_tells_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], feed: BinaryIO, url: str
) -> None:
    """Ctrl-C while it waits for more: the counts so far, and the exit code of an interrupt."""
    feed.write(b'{"id": "e1"}\n}{\n')
    emit_lines = commands.emit_lines

    async def interrupted(*arguments: Any, on_progress: Any, **options: Any) -> Any:
        def show(result: Any) -> None:
            on_progress(result)
            signal.raise_signal(signal.SIGINT)

        return await emit_lines(*arguments, on_progress=show, **options)

    monkeypatch.setattr(commands, "emit_lines", interrupted)
    assert commands.emit("-", url=url, token=None) == 130
    assert capsys.readouterr().out.startswith("accepted 1  duplicate 0  rejected ")


def test_a_replay_that_is_interrupted_tells_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts of the last look, and the exit code of an interrupt."""

    async def play(_path: Path, *, on_progress: Any) -> Any:
        on_progress(ReplayProgress(next(iter(Phase)), 12, 12, 12, bids=240, sent=7, ended=1, extensions=2))
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "play", play)
    assert commands.replay("sample", rows_max=None) == 130
    assert "7/240 bids, 1/12 ended, 2 extensions" in capsys.readouterr().out


def test_what_cannot_be_watched_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Stdout is for the countdown: who reads it must not find an error there."""
    assert commands.watch("a-1", url="nonsense", token=None) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("auction-timer: ")
