"""Tests for gateway.event_stream."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from starlette.requests import Request
from starlette.responses import Response

from engine.contract.timers import CorruptTimerError, tick_line
from engine.domain.lifecycle import Status
from engine.store.protocol import StoreUnavailableError
from gateway import event_stream
from gateway.auth import LOCAL, Principal
from gateway.closing import CloseCode
from gateway.event_stream import HEARTBEAT, EventStreamResponse, EventStreamRoutes, event_text, farewell_text
from gateway.hub import HEARTBEAT_MS
from gateway.problems import Problem, ProblemType
from gateway.ring import Ring
from gateway.room import Frame
from tests.fakes.clock import BORN_MS
from tests.fakes.loop import run
from tests.gateway.front import front
from tests.gateway.house import AUCTION, ENDS_AT, House, record
from tests.live import DEADLINE_S

pytestmark = [pytest.mark.requirement("R4", "R16")]


def events_in(data: bytes) -> list[dict[str, str]]:
    """The events of a stream, as a browser reads them: fields by name; comments and lone `retry` lines fall away."""
    found = []
    for block in data.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append(fields)
    return found


class Reader:
    """The other end of one stream: takes what is sent, or lets it wait, and can hang up. Also the transport's owner."""

    def __init__(self, house: House, **options: Any) -> None:
        self.house = house
        self.start: MutableMapping[str, Any] = {}
        self.data = b""
        self.is_complete = False
        self.answer: Response | EventStreamResponse | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self.hung_up = asyncio.Event()
        self._asked = False
        self._request = request(**options)

    async def open(self) -> None:
        """Ask, and read until the answer is over."""
        self.answer = await EventStreamRoutes(self.house.door).get_events(self._request)
        await self.answer(self._request.scope, self.receive, self.send)

    async def receive(self) -> MutableMapping[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.start = message
        else:
            self.data += message.get("body", b"")
            self.is_complete = not message.get("more_body", False)

    @property
    def events(self) -> list[dict[str, str]]:
        """What has arrived."""
        return events_in(self.data)

    @property
    def kinds(self) -> list[str]:
        """The types of what has arrived."""
        return [event["event"] for event in self.events]


def request(
    auction_id: str = AUCTION,
    *,
    since: str | None = None,
    last_event_id: str | None = None,
    method: str = "GET",
    address: str = "192.0.2.1",
    origin: str | None = None,
    principal: Principal = LOCAL,
) -> Request:
    """A request for the stream of an auction."""
    headers = [(b"host", b"127.0.0.1:8080")]
    if last_event_id is not None:
        headers.append((b"last-event-id", last_event_id.encode()))
    if origin is not None:
        headers.append((b"origin", origin.encode()))
    return Request(
        {
            "type": "http",
            "method": method,
            "path": f"/auctions/{auction_id}/events",
            "path_params": {"auction_id": auction_id},
            "query_string": b"" if since is None else f"since={since}".encode(),
            "headers": headers,
            "client": (address, 50_000),
            "server": ("127.0.0.1", 8080),
            "scheme": "http",
            "state": {"principal": principal},
        }
    )


@asynccontextmanager
async def opened(house: House, **options: Any) -> AsyncIterator[Reader]:
    """A stream that is open, its greeting read."""
    reader = Reader(house, **options)
    task = asyncio.create_task(reader.open())
    try:
        await turns(lambda: reader.events or task.done())
        yield reader
    finally:
        reader.hung_up.set()
        reader.reads.set()
        await task


async def turns(condition: Any) -> None:
    """Let the loop turn until a condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


def extend(house: House, version: int) -> str:
    """The end moves with each version; the stream id of what says so."""
    return house.announce("timer.extended", record(version=version, ends_at=ENDS_AT + version * 1_000)).stream_id


def tick(house: House, version: int = 2) -> None:
    """The engine sends a tick."""
    house.hub.on_ticks(0, tick_line(record(version=version), house.clock.now_ms()))


async def test_a_stream_carries_the_frames_of_the_socket() -> None:
    """Snapshot first, then events with their cursor as id and ticks without one; headers keep proxies from buffering."""
    house = House()
    house.put(record())
    async with opened(house) as reader:
        assert reader.start["status"] == 200
        headers = dict(reader.start["headers"])
        assert headers[b"content-type"] == b"text/event-stream"
        assert headers[b"cache-control"] == b"no-store, no-transform"
        assert headers[b"x-accel-buffering"] == b"no"
        assert reader.data.startswith(b"retry: ")
        stream_id = extend(house, 3)
        await house.read_lane()
        await turns(lambda: len(reader.events) == 2)
        tick(house, 3)
        await turns(lambda: len(reader.events) == 3)
        assert reader.kinds == ["timer.snapshot", "timer.extended", "timer.tick"]
        bodies = [orjson.loads(event["data"]) for event in reader.events]
        assert [body["type"] for body in bodies] == reader.kinds
        assert [event.get("id") for event in reader.events] == ["0.0-0", f"0.{stream_id}", None]
        assert [body.get("cursor") for body in bodies] == ["0.0-0", f"0.{stream_id}", None]
        assert bodies[0]["recovered"] is None
    assert not house.hub.streaming()


async def test_a_frame_is_made_into_text_once_for_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams watch an auction, each frame is read and framed once; without streams, never."""
    house = House()
    house.put(record())
    await house.hub.room(AUCTION)
    made: list[bytes] = []
    loads = orjson.loads

    def counted(data: bytes) -> Any:
        made.append(data)
        return loads(data)

    async with opened(house) as one, opened(house) as other, opened(house) as third:
        monkeypatch.setattr(event_stream.orjson, "loads", counted)
        tick(house)
        await turns(lambda: all(len(reader.events) == 2 for reader in (one, other, third)))
        monkeypatch.undo()
        assert len(made) == 1
        assert one.events[1] == other.events[1] == third.events[1]


@pytest.mark.requirement("B4")
async def test_a_stream_resumes_as_a_socket_does() -> None:
    """`Last-Event-ID`, before `since`, brings what was missed, in order, and says so; an unknown place is said to be one."""
    house = House()
    house.put(record())
    await house.hub.room(AUCTION)
    ids = [f"0.{extend(house, version)}" for version in range(3, 7)]
    await house.read_lane()
    for options in ({"last_event_id": ids[1]}, {"since": ids[1]}, {"since": "0.0-0", "last_event_id": ids[1]}):
        async with opened(house, **options) as reader:
            assert orjson.loads(reader.events[0]["data"])["recovered"] is True
            assert [event.get("id") for event in reader.events] == [None, ids[2], ids[3]]
    async with opened(house, last_event_id="not-a-cursor") as reader:
        assert orjson.loads(reader.events[0]["data"])["recovered"] is False
        assert reader.events[0]["id"] == ids[3]
    async with opened(house, last_event_id=ids[3]) as reader:
        assert orjson.loads(reader.events[0]["data"])["recovered"] is True
        assert reader.events[0]["id"] == ids[3]


@pytest.mark.requirement("B4")
async def test_a_stream_that_was_away_for_long_resumes_as_a_socket_does() -> None:
    """What this gateway has forgotten is looked up; what the lane has forgotten is said to be lost."""
    house = House()
    house.hub._rings[0] = Ring(2)
    house.hub.start_at(0, "0-0")
    house.put(record())
    ids = [f"0.{extend(house, version)}" for version in range(3, 13)]
    await house.read_lane()
    async with opened(house, last_event_id=ids[1]) as reader:
        assert orjson.loads(reader.events[0]["data"])["recovered"] is True
        assert [event.get("id") for event in reader.events] == [None, *ids[2:]]
    del house.memory.shards[0].updates[:3]
    async with opened(house, last_event_id=ids[1]) as reader:
        assert orjson.loads(reader.events[0]["data"])["recovered"] is False
        assert reader.kinds == ["timer.snapshot"]


@pytest.mark.requirement("R16")
async def test_an_auction_that_a_failover_takes_while_somebody_waits_is_unknown_or_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the look at the room and the place in it the room may go: 404, or 503 if nobody knows."""
    house = House()
    house.put(record())

    async def gone(*_asked: object) -> None:
        return None

    async def away(*_asked: object) -> None:
        raise StoreUnavailableError("away")

    for entrance, problem in ((gone, ProblemType.RESOURCE_NOT_FOUND), (away, ProblemType.DEPENDENCY_UNAVAILABLE)):
        monkeypatch.setattr(house.hub, "entrance", entrance)
        with pytest.raises(Problem) as refused:
            await Reader(house).open()
        assert refused.value.type is problem
    assert house.sample("auctions_gateway_connections") == 0


@pytest.mark.requirement("B4")
async def test_a_stream_that_breaks_in_its_greeting_loses_nothing() -> None:
    """The snapshot stands at the end of what follows it, so it has no id where something follows: an old place stays."""
    house = House()
    house.put(record())
    await house.hub.room(AUCTION)
    extend(house, 3)
    await house.read_lane()
    async with opened(house, since="0.0-0") as reader:
        assert "id" not in reader.events[0]
        assert "id" in reader.events[1]


async def test_a_stream_ends_with_its_auction() -> None:
    """After the end comes `close` with 4000, and the answer is complete."""
    house = House()
    house.put(record())
    async with opened(house) as reader:
        house.announce("timer.ended", record(version=3, status=Status.ENDED))
        await house.read_lane()
        room = house.hub.known(AUCTION)
        assert room is not None
        room.part(CloseCode.AUCTION_OVER, "the auction is over")
        await turns(lambda: reader.is_complete)
        assert reader.kinds == ["timer.snapshot", "timer.ended", "close"]
        assert orjson.loads(reader.events[-1]["data"]) == {
            "type": "close",
            "code": 4000,
            "reason": "the auction is over",
        }
    assert house.sample("auctions_gateway_disconnects_total", code="4000") == 1
    assert house.sample("auctions_gateway_connections") == 0


async def test_who_comes_back_to_what_is_over_is_told_to_stop() -> None:
    """204 for whoever has read the end, the end for whoever missed it, the snapshot and a place for whoever comes fresh."""
    house = House()
    house.put(record())
    await house.hub.room(AUCTION)
    seen = f"0.{extend(house, 3)}"
    end = f"0.{house.announce('timer.ended', record(version=4, status=Status.ENDED)).stream_id}"
    await house.read_lane()
    async with opened(house, last_event_id=end) as reader:
        assert reader.start["status"] == 204
        assert reader.is_complete
        assert reader.data == b""
    async with opened(house, last_event_id=seen) as reader:
        assert reader.kinds == ["timer.snapshot", "timer.ended"]
        assert reader.events[-1]["id"] == end
    for fresh in (None, "not-a-cursor"):
        async with opened(house, last_event_id=fresh) as reader:
            assert reader.kinds == ["timer.snapshot"]
            place = reader.events[0]["id"]
        async with opened(house, last_event_id=place) as reader:
            assert reader.start["status"] == 204


def test_a_silent_stream_is_kept_alive() -> None:
    """Where nothing else is sent a comment is, well before a client may suspect its connection; never where something is."""
    house = House()
    house.put(record())

    async def scenario() -> None:
        async with opened(house) as reader:
            for _ in range(10):
                heard, since_ns = len(reader.data), house.line.now_ns
                while len(reader.data) == heard:
                    await asyncio.sleep(0.5)
                assert 9e9 <= house.line.now_ns - since_ns <= 11e9 < HEARTBEAT_MS * 1e6
            assert reader.data.endswith(10 * HEARTBEAT)
            assert reader.kinds == ["timer.snapshot"]
            for _ in range(10):
                tick(house)
                await asyncio.sleep(5)
            assert reader.data.count(HEARTBEAT) == 10

    run(house.line, scenario)


@pytest.mark.requirement("B3")
async def test_a_reader_that_pauses_loses_no_event_and_gets_the_newest_tick() -> None:
    """While it does not read, events wait in order and ticks conflate."""
    house = House()
    house.put(record())
    async with opened(house) as reader:
        reader.reads.clear()
        tick(house)  # this one is on its way, and waits in the transport
        await turns(lambda: True)
        await asyncio.sleep(0)
        for version in range(3, 6):
            extend(house, version)
            await house.read_lane()
            tick(house, version)
        reader.reads.set()
        await turns(lambda: reader.kinds[-1] == "timer.tick" and len(reader.events) > 4)
        bodies = [orjson.loads(event["data"]) for event in reader.events]
        assert [body["timer"]["version"] for body in bodies if body["type"] == "timer.extended"] == [3, 4, 5]
        assert [body["version"] for body in bodies if body["type"] == "timer.tick"][-1] == 5
    assert house.sample("auctions_gateway_conflated_ticks_total") >= 2


@pytest.mark.requirement("B3")
async def test_a_reader_that_does_not_read_is_cut_by_bytes() -> None:
    """Past the bound its buffer is dropped and the stream closed: memory stays bounded."""
    house = House(outbox_bytes_max=4_096)
    house.put(record())
    async with opened(house) as reader:
        reader.reads.clear()
        tick(house)
        await asyncio.sleep(0)
        for version in range(3, 13):
            extend(house, version)
        await house.read_lane()
        assert house.hub.streaming() == []
        reader.reads.set()
        await turns(lambda: reader.is_complete)
        assert reader.kinds[-1] == "close"
        assert orjson.loads(reader.events[-1]["data"])["code"] == 4101
        assert "timer.extended" not in reader.kinds
    assert house.sample("auctions_gateway_disconnects_total", code="4101") == 1


@pytest.mark.requirement("B3")
def test_a_reader_that_does_not_read_is_cut_by_age() -> None:
    """A write that is not taken within the bound ends the stream and drops the connection; one that is only late does not."""
    house = House(outbox_age_max_ms=5_000)
    house.put(record())

    async def scenario() -> None:
        reader = Reader(house)
        task = asyncio.create_task(reader.open())
        await asyncio.sleep(60)
        for _ in range(3):
            reader.reads.clear()
            tick(house)
            await asyncio.sleep(4.9)
            assert house.hub.streaming()
            reader.reads.set()
            await asyncio.sleep(0.1)
        reader.reads.clear()
        tick(house)
        await asyncio.sleep(6.1)
        assert not house.hub.streaming()
        assert house.sample("auctions_gateway_disconnects_total", code="4101") == 1
        assert not task.done()
        reader.hung_up.set()  # what cutting the transport brings about
        await task
        assert not reader.is_complete
        assert house.sample("auctions_gateway_connections") == 0

    run(house.line, scenario)


async def test_a_client_that_hangs_up_is_forgotten() -> None:
    """The stream leaves its room and is no longer counted."""
    house = House()
    house.put(record())
    async with opened(house) as reader:
        assert house.sample("auctions_gateway_connections") == 1
        reader.hung_up.set()
        await turns(lambda: not house.hub.streaming())
    assert house.sample("auctions_gateway_connections") == 0
    assert not reader.is_complete


async def test_streams_count_as_sockets_do() -> None:
    """One more than the limit is refused with 503 and when to come back, and a refusal takes no place."""
    house = House(connections_per_address_max=1)
    house.put(record())
    async with opened(house):
        for _ in range(2):
            with pytest.raises(Problem) as refused:
                await Reader(house).open()
            assert refused.value.type is ProblemType.TOO_MANY_CONNECTIONS
            assert "Retry-After" in refused.value.headers
        async with opened(house, address="192.0.2.2") as other:
            assert other.kinds == ["timer.snapshot"]
    async with opened(house) as reader:
        assert reader.kinds == ["timer.snapshot"]


async def test_foreign_pages_and_unknown_auctions_are_refused() -> None:
    """403 for a foreign origin, 404 for no auction, 503 while it cannot be read, 500 for a damaged one; no place is kept."""
    house = House()
    house.put(record())
    with pytest.raises(Problem) as refused:
        await Reader(house, origin="https://elsewhere.example").open()
    assert refused.value.type is ProblemType.FOREIGN_ORIGIN
    for auction_id in ("a-2", "no%id", "x" * 129):
        with pytest.raises(Problem) as refused:
            await Reader(house, auction_id=auction_id).open()
        assert refused.value.type is ProblemType.RESOURCE_NOT_FOUND
    for error, wanted in (
        (StoreUnavailableError("away"), ProblemType.DEPENDENCY_UNAVAILABLE),
        (CorruptTimerError("damaged"), ProblemType.INTERNAL_ERROR),
    ):
        house.store.failing["view"] = error
        with pytest.raises(Problem) as refused:
            await Reader(house).open()
        assert refused.value.type is wanted
    assert house.sample("auctions_gateway_connections") == 0


async def test_head_answers_without_a_stream() -> None:
    """HEAD tells the headers and opens nothing."""
    house = House()
    house.put(record())
    reader = Reader(house, method="HEAD")
    await reader.open()
    assert reader.start["status"] == 200
    assert reader.data == b""
    assert house.sample("auctions_gateway_connections") == 0


@pytest.mark.requirement("B9")
async def test_a_stream_is_sent_away_by_a_drain_once() -> None:
    """Draining ends it with 1001 and the advice that sockets get; a second farewell changes nothing."""
    house = House()
    house.put(record())
    async with opened(house) as reader:
        await house.door.drain(0.5)
        await turns(lambda: reader.is_complete)
        assert orjson.loads(reader.events[-1]["data"])["code"] == 1001
    assert house.sample("auctions_gateway_disconnects_total", code="1001") == 1


async def test_streams_come_back_spread_out() -> None:
    """Each is told a pause of its own, so that a broken gateway is not followed by a stampede."""
    house = House()
    house.put(record())
    pauses = set()
    for _ in range(20):
        async with opened(house) as reader:
            line = reader.data.partition(b"\n")[0]
            pauses.add(int(line.removeprefix(b"retry: ")))
    least, most = event_stream.RETRY_MS
    assert all(least <= pause <= most for pause in pauses)
    assert len(pauses) > 10


async def test_a_token_ends_a_stream_as_it_ends_a_socket() -> None:
    """An expired token ends it with 4401, but not in the last minute of the auction."""
    async with front(jwt_secret="s" * 48) as house:
        house.put(record())
        house.put(record("a-2", ends_at=BORN_MS + 50_000))
        principal = Principal("p", frozenset(), frozenset(), expires_at=house.clock.now_ms())
        async with (
            opened(house, principal=principal) as reader,
            opened(house, principal=principal, auction_id="a-2") as near_its_end,
        ):
            house.line.advance(40_000)
            house.door._part_with_expired()
            await turns(lambda: reader.is_complete)
            assert orjson.loads(reader.events[-1]["data"])["code"] == 4401
            assert not near_its_end.is_complete


async def test_the_query_may_hold_the_token_of_a_stream() -> None:
    """A browser's EventSource cannot set a header: here the query counts, elsewhere it does not."""
    async with front(jwt_secret="s" * 48) as house:
        for path, problem in (
            (f"/auctions/{AUCTION}/events?token=x", "the token cannot be read"),
            (f"/auctions/{AUCTION}/events", "a token is needed: Authorization: Bearer <JWT>"),
            (f"/auctions/{AUCTION}/timer?token=x", "a token is needed: Authorization: Bearer <JWT>"),
        ):
            answer = await house.http.get(path)
            assert answer.status_code == 401
            assert answer.json()["detail"] == problem


def test_what_an_event_looks_like() -> None:
    """The exact bytes, as WHATWG HTML section 9.2.6 reads them."""
    frame = Frame(b'{"type":"bid.accepted","bid_id":"b"}', "0.1-0")
    wanted = b'event: bid.accepted\nid: 0.1-0\ndata: {"type":"bid.accepted","bid_id":"b"}\n\n'
    assert event_text(frame) == wanted
    assert event_text(frame, with_id=False) == wanted.replace(b"id: 0.1-0\n", b"")
    assert farewell_text(CloseCode.FEED_LOST, "gone").startswith(b'event: close\ndata: {"type":"close","code":4102')
