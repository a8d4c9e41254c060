"""Event streams over real HTTP: a whole auction, resumption, the end, and a reader that does not read."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from gateway import event_stream
from tests.gateway.house import AUCTION
from tests.gateway.test_event_stream import events_in
from tests.gateway.test_slow_reader import KERNEL_BYTES, OUTBOX_BYTES_MAX, Live, live, until
from tests.integration.events import bid, fresh_id, started
from tests.live import LiveStack, alive
from tests.live import until as live_until

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R16")]


def now_ms() -> int:
    """The wall clock, near enough to the auction clock on one machine."""
    return time.time_ns() // 1_000_000


def streamed(stack: LiveStack, auction_id: str, **headers: str) -> Iterator[dict[str, str]]:
    """The events of a stream, as they come, until it ends."""
    text = b""
    with stack.http.stream("GET", f"/auctions/{auction_id}/events", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "text/event-stream"
        for chunk in answer.iter_raw():
            text += chunk
            *whole, text = text.split(b"\n\n")
            for block in whole:
                yield from events_in(block)


@pytest.mark.requirement("R4", "B4")
def test_an_auction_is_followed_to_its_end_and_resumed_from_any_place(live_stack: LiveStack) -> None:
    """Snapshot, ticks, every event with its id, `close`; from each id the rest comes again; after the last one 204."""
    auction_id = fresh_id()
    now = now_ms()
    live_stack.post(
        started(auction_id, now - 1_000, now + 7_000, soft_close_window_ms=4_000, extension_ms=4_000, max_extensions=1)
    )
    live_stack.until_status(auction_id, "ACTIVE")
    stream = streamed(live_stack, auction_id)
    events = [next(stream)]
    while events[-1]["event"] != "timer.closing":
        events.append(next(stream))
    live_stack.post(bid(auction_id, amount_minor=100, currency="EUR", bidder_id="b-1"))
    events += stream
    kinds = [event["event"] for event in events]
    assert kinds[0] == "timer.snapshot"
    assert "timer.tick" in kinds
    lane = [event for event in events[1:] if event["event"] != "timer.tick"]
    assert [event["event"] for event in lane] == [
        "timer.closing",
        "bid.accepted",
        "timer.extended",
        "timer.ended",
        "close",
    ]
    assert orjson.loads(lane[-1]["data"])["code"] == 4000
    for event in events[1:-1]:
        body = orjson.loads(event["data"])
        assert (body["type"], body.get("cursor")) == (event["event"], event.get("id"))
    # From every place but the last the rest comes again, the same.
    for at, event in enumerate(lane[:-2]):
        again = [e for e in streamed(live_stack, auction_id, **{"Last-Event-ID": event["id"]}) if "id" in e]
        assert [(e["event"], e["id"]) for e in again] == [(e["event"], e["id"]) for e in lane[at + 1 : -1]]
    answer = live_stack.http.get(f"/auctions/{auction_id}/events", headers={"Last-Event-ID": lane[-2]["id"]})
    assert answer.status_code == 204


@pytest.mark.requirement("B9")
def test_a_gateway_that_goes_away_says_so_and_goes(short_tmp: Path) -> None:
    """SIGTERM: an open stream gets `close` with 1001 and its orderly end, within the time for a drain; it resumes."""
    stack = LiveStack(short_tmp)
    try:
        auction_id = fresh_id()
        stack.post(started(auction_id, 1_000, 4_000_000_000_000))
        stack.until_status(auction_id, "ACTIVE")
        stream = streamed(stack, auction_id)
        snapshot = next(stream)
        (pid,) = stack.pids("gateway")
        os.kill(pid, signal.SIGTERM)
        *_, farewell = stream
        assert (farewell["event"], orjson.loads(farewell["data"])["code"]) == ("close", 1001)
        live_until(lambda: not alive(pid), "the gateway is gone", within_s=10)
        live_until(lambda: stack.pids("gateway") not in ([], [pid]) and is_ready(stack), "its successor is there")
        again = next(streamed(stack, auction_id, **{"Last-Event-ID": snapshot["id"]}))
        assert orjson.loads(again["data"])["recovered"] is True
    finally:
        stack.stop()


def is_ready(stack: LiveStack) -> bool:
    """Whether a gateway answers that it is."""
    try:
        return stack.http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


class Raw:
    """A TCP client with a small buffer that asks for a stream, and reads when told to."""

    def __init__(self, made: Live) -> None:
        self.port = made.port
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        self.socket.setblocking(False)
        self.data = b""

    async def ask(self) -> "Raw":
        """Connect and ask."""
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        await loop.sock_sendall(self.socket, b"GET /auctions/%b/events HTTP/1.1\r\nHost: x\r\n\r\n" % AUCTION.encode())
        return self

    async def read(self) -> bool:
        """Read once; False at the end, whether orderly or not."""
        try:
            got = await asyncio.get_running_loop().sock_recv(self.socket, 65_536)
        except ConnectionResetError:
            return False
        self.data += got
        return bool(got)

    async def read_until(self, text: bytes) -> None:
        """Read until this has arrived."""
        async with asyncio.timeout(20):
            while text not in self.data:
                assert await self.read(), "it ended too early"


@pytest.mark.requirement("B3")
@pytest.mark.parametrize("bound", ["age", "bytes"])
async def test_one_that_never_reads_is_cut_and_delays_nobody(bound: str) -> None:
    """It costs its bounds and no more, its connection is dropped in time, and another gets every event meanwhile."""
    limits = {"outbox_age_max_ms": 300, "outbox_bytes_max": OUTBOX_BYTES_MAX if bound == "bytes" else 1 << 26}
    async with live(**limits) as made:
        # One that is cut has read nothing since its greeting; whoever reads in time gets a `close` event instead.
        stuck, other = await Raw(made).ask(), await Raw(made).ask()
        try:
            await stuck.read_until(b"timer.snapshot")
            await other.read_until(b"timer.snapshot")
            (room,) = made.hub.streaming()
            version = 1
            async with asyncio.timeout(20):
                while len(room.streams) == 2:
                    for _ in range(20):
                        version += 1
                        made.publish(version)
                    await other.read_until(b'"version":%d,' % version)
            assert made.sample("auctions_gateway_disconnects_total", code="4101") == 1
            assert other.data.count(b"event: timer.extended") == version - 1
            await until(lambda: len(made.door._streams) == 1, "the stuck one is gone")
            async with asyncio.timeout(20):
                while await stuck.read():
                    pass
            assert not stuck.data.endswith(b"0\r\n\r\n"), "an orderly end would have waited for its reader"
        finally:
            stuck.socket.close()
            other.socket.close()
        await until(lambda: not made.door._streams, "everyone has gone")
        assert not made.hub.streaming()


async def test_a_disconnect_is_noticed_at_once_also_in_silence() -> None:
    """Nothing has to be written to find out that nobody reads."""
    async with live() as made:
        reader = await Raw(made).ask()
        await reader.read_until(b"timer.snapshot")
        reader.socket.close()
        await until(lambda: not made.door._streams, "it is forgotten")
        assert made.sample("auctions_gateway_connections") == 0


async def test_a_silent_stream_gets_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment arrives where no event does."""
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.05)
    async with live() as made:
        reader = await Raw(made).ask()
        await reader.read_until(b"\r\n:\n\n\r\n")
        reader.socket.close()
        await until(lambda: not made.door._streams, "it is forgotten")


async def test_streams_leave_room_for_requests() -> None:
    """What counts as a stream does not count as a plain connection, whatever ends it; nobody is counted for ever."""
    async with live() as made, httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.port}", trust_env=False) as http:
        before = made.door.admission.plain
        for path in (f"/auctions/{AUCTION}/events", "/auctions/unknown/events"):
            with contextlib.suppress(httpx.HTTPError):
                async with http.stream("GET", path) as answer:
                    assert answer.status_code in (200, 404)
        await until(lambda: not made.door._streams, "everyone has gone")
        assert made.door.admission.plain == before
        assert not made.door._per_address
