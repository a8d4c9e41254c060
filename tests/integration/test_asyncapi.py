"""Every type of frame that a running stack sends, held against what `/asyncapi.json` says of it."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from engine.contract.keys import shard_of
from tests.gateway.test_asyncapi import DOCUMENT, faults_of
from tests.gateway.test_event_stream import events_in
from tests.integration.events import bid, event, fresh_id, started
from tests.live import LiveStack, until

pytestmark = pytest.mark.integration


class Watcher:
    """A socket that keeps every frame."""

    def __init__(self, stack: LiveStack, auction_id: str) -> None:
        url = f"{stack.url.replace('http', 'ws', 1)}/auctions/{auction_id}/updates"
        self._open = ExitStack()
        self.socket: ClientConnection = self._open.enter_context(connect(url, compression=None, proxy=None))
        self.frames: list[dict[str, Any]] = []
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for message in self.socket:
                self.frames.append(json.loads(message))
        except ConnectionClosed:
            pass

    def has(self, *kinds: str) -> None:
        """Wait until frames of these types have come."""
        until(lambda: set(kinds) <= {frame["type"] for frame in self.frames}, f"{kinds} in {self.frames}")

    def close(self) -> None:
        """Hang up."""
        self._open.close()
        self._reader.join()


def now_ms() -> int:
    """The wall clock, near enough to the auction clock on one machine."""
    return time.time_ns() // 1_000_000


@pytest.mark.requirement("R7", "R28")
def test_every_frame_of_a_running_stack_is_as_described(short_tmp: Path) -> None:
    """One auction through its whole life, one cancelled, one whose lane is lost: each type is seen, each frame valid."""
    stack = LiveStack(short_tmp)
    watchers: list[Watcher] = []
    try:
        assert stack.http.get("/asyncapi.json").json()["channels"] == DOCUMENT["channels"]
        whole, cancelled, lost = fresh_id(), fresh_id(), fresh_id()
        now = now_ms()
        policy = {"soft_close_window_ms": 4_000, "extension_ms": 1_000, "mode": "add", "max_extensions": 1}
        stack.post(
            started(whole, now + 6_000, now + 14_000, **policy),
            started(cancelled, 1_000, now + 3_600_000),
            started(lost, 1_000, now + 3_600_000),
        )
        stack.until_status(whole, "SCHEDULED")
        stack.until_status(cancelled, "ACTIVE")
        stack.until_status(lost, "ACTIVE")
        watchers += [Watcher(stack, auction_id) for auction_id in (whole, cancelled, lost)]
        life, other, third = watchers
        other.socket.send('{"type":"sync","t0":1.5,"drift_ms":-3,"rtt_ms":null}')
        other.socket.send('{"type":"sing"}')
        other.has("timer.snapshot", "sync", "error")
        stack.post(event("auctions.cancel.requested", auction_id=cancelled, reason="a test"))
        other.has("timer.cancelled")
        # The lane is gone, as after a failover that lost it: the gateway finds its place beyond the end.
        stack.redis("DEL", f"auction:updates:{{{shard_of(lost, 8)}}}")
        stack.redis("CLIENT", "KILL", "TYPE", "normal")
        third.has("timer.resynced")
        life.has("timer.started")
        stack.post(event("auctions.pause.requested", auction_id=whole, reason="a test"))
        life.has("timer.paused")
        stack.post(event("auctions.resume.requested", auction_id=whole))
        life.has("timer.resumed")
        ends_at = stack.timer(whole)["ends_at"]
        stack.post(event("auctions.schedule.changed", auction_id=whole, ends_at=ends_at + 100))
        life.has("timer.rescheduled", "timer.closing")
        stack.post(bid(whole, amount_minor=1_000, currency="EUR", bidder_id="b-1"), bid(whole))
        life.has("timer.ended")
        until(lambda: life.socket.close_code == 4000, "the socket is closed")
        frames = [frame for watcher in watchers for frame in watcher.frames]
        assert {frame["type"] for frame in frames} == DOCUMENT["components"]["schemas"].keys() - {
            "Timer",
            "client.sync",
            "stream.close",
        }
        faults = [fault for frame in frames for fault in faults_of(frame)]
        assert faults == []
        streamed = events_in(stack.http.get(f"/auctions/{whole}/events").content)
        assert [one["event"] for one in streamed] == ["timer.snapshot", "close"]
        assert faults_of(json.loads(streamed[0]["data"])) == []
        assert faults_of(json.loads(streamed[1]["data"]), "stream.close") == []
    finally:
        for watcher in watchers:
            watcher.close()
        stack.stop()
