"""The inside of a gateway for tests: a hub and its door on the memory store, its contents written by hand."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson
from prometheus_client import CollectorRegistry

from engine.clock import AuctionClock, MonotonicNs
from engine.contract.cursors import START
from engine.contract.keys import shard_of
from engine.contract.timers import TimerRecord, sealed, timer
from engine.domain.auction import Auction, Registration
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.settings import Settings
from engine.store.memory import MemoryStore
from engine.store.protocol import Group, UpdateEntry, View
from gateway.closing import CloseCode
from gateway.door import Door
from gateway.hub import Hub
from gateway.metrics import GatewayMetrics
from gateway.room import Frame
from tests.fakes.clock import BORN_MS, Authority, ManualClock, Timeline

AUCTION = "a-1"
ENDS_AT = EpochMs(BORN_MS + 3_600_000)

_GROUP = {
    Status.PAUSED: Group.PAUSED,
    Status.ENDED: Group.CLOSED,
    Status.CANCELLED: Group.CLOSED,
}


def record(
    auction_id: str = AUCTION,
    *,
    version: int = 2,
    status: Status = Status.ACTIVE,
    ends_at: int = ENDS_AT,
    **changes: Any,
) -> TimerRecord:
    """An auction as the engine keeps it; its end tells versions apart where a test wants that."""
    registration = None
    if status is not Status.TOMBSTONE:
        registration = Registration(auction_id, EpochMs(BORN_MS - 60_000), ENDS_AT)
    auction = Auction(
        auction_id,
        status,
        version,
        registration,
        EpochMs(ends_at),
        ended_at=EpochMs(ends_at) if status is Status.ENDED else None,
        cancelled_at=EpochMs(BORN_MS) if status is Status.CANCELLED else None,
        **changes,
    )
    return TimerRecord(auction, f"trace-{auction_id}", f"req-{auction_id}")


class WatchedStore:
    """`MemoryStore` that counts its calls, fails when told to, and can hold back a view before and after it is taken."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()
        self.failing: dict[str, Exception] = {}
        self.before_view = asyncio.Event()
        self.after_view = asyncio.Event()
        self.before_view.set()
        self.after_view.set()

    async def view(self, shard: int, auction_id: str) -> View:
        """See `ViewStore`; taken between the two gates."""
        self._called("view")
        await self.before_view.wait()
        view = await self.inner.view(shard, auction_id)
        await self.after_view.wait()
        return view

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.failing:
            raise self.failing[name]

    def __getattr__(self, name: str) -> Any:
        """Every other call: counted, and passed on unless it fails."""
        method = getattr(self.inner, name)
        if name in ("connections", "ticks", "shards"):
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._called(name)
            return await method(*args, **kwargs)

        return call


class House:
    """A hub and its door, with a store whose contents are written by hand."""

    def __init__(self, *, shards: int = 1, **settings: Any) -> None:
        self.shards = shards
        self.line = Timeline()
        self.authority = Authority(self.line)
        self.machine = ManualClock(self.line, seed=7)
        self.memory = MemoryStore(self.authority)
        self.store: Any = WatchedStore(self.memory)
        self.clock = AuctionClock(self.machine)
        now = self.machine.monotonic_ns()
        self.clock.observe(now, MonotonicNs(now), self.authority())
        self.registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self.registry)
        self.settings = Settings(_env_file=None, shards=shards, **settings)
        self.hub = Hub(self.store, self.clock, shards, self.metrics)
        self.door = Door(self.hub, self.settings, self.machine, self.metrics)
        for shard in range(shards):
            self.hub.start_at(shard, START)

    def put(self, record: TimerRecord) -> TimerRecord:
        """The store holds this auction now."""
        auction = record.auction
        memory = self.memory.shards[shard_of(auction.auction_id, self.shards)]
        memory.timers[auction.auction_id] = sealed(record)
        for members in memory.groups.values():
            members.pop(auction.auction_id, None)
        if auction.status.is_public:
            memory.groups[_GROUP.get(auction.status, Group.LIVE)][auction.auction_id] = auction.ends_at
        return record

    def announce(self, update_type: str, record: TimerRecord, **added: Any) -> UpdateEntry:
        """The auction changes, and the event lane says so; the gateway has not read it yet."""
        self.put(record)
        auction = record.auction
        body = {
            "type": update_type,
            "auction_id": auction.auction_id,
            "server_time": self.authority.now_ms,
            "trace_id": record.trace_id,
            **added,
        }
        if update_type.startswith("timer."):
            body["timer"] = timer(record, self.authority.now_ms, None)
        return self.append(auction.auction_id, update_type, orjson.dumps(body), auction.version)

    def append(self, auction_id: str, update_type: str, body: bytes, version: int = 1) -> UpdateEntry:
        """An entry of the event lane, whatever it holds."""
        memory = self.memory.shards[shard_of(auction_id, self.shards)]
        entry = UpdateEntry(memory.next_id(), update_type, auction_id, version, body)
        memory.updates.append(entry)
        return entry

    async def read_lane(self, count: int = 1_000) -> None:
        """The gateway reads on, at most `count` entries per shard."""
        found = await self.memory.read_updates(self.hub.positions, count, 0)
        for shard, entries in found.items():
            self.hub.on_updates(shard, entries)

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        return self.registry.get_sample_value(name, labels) or 0.0


class Listener:
    """Implements `gateway.room.Subscriber`: remembers what it was given, and how."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.writes = 0
        self.kept: list[bytes] = []
        self.ticks: list[bytes] = []
        self.closed: list[CloseCode] = []

    def send(self, data: bytes) -> None:
        self.sent += split(data)
        self.writes += 1

    def keep_event(self, frame: bytes) -> None:
        self.kept.append(frame)

    def keep_tick(self, frame: bytes) -> None:
        self.ticks.append(frame)

    def close(self, code: CloseCode, reason: str) -> None:
        self.closed.append(code)


def split(data: bytes) -> list[bytes]:
    """The unmasked text frames of one write."""
    found = []
    while data:
        assert data[0] == 0x81
        long = {126: 2, 127: 8}.get(data[1], 0)
        end = 2 + long + (int.from_bytes(data[2 : 2 + long]) if long else data[1])
        found.append(data[:end])
        data = data[end:]
    return found


def payload(frame: bytes) -> bytes:
    """What an unmasked text frame carries."""
    assert frame[0] == 0x81
    if frame[1] < 126:
        return frame[2:]
    return frame[4:] if frame[1] == 126 else frame[10:]


def told(frames: Iterable[bytes | Frame]) -> list[dict[str, Any]]:
    """Text frames as the objects they carry."""
    return [orjson.loads(payload(frame.socket if isinstance(frame, Frame) else frame)) for frame in frames]
