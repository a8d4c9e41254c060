"""What does it cost to send one frame to one socket, and to keep a socket that is idle?

CPU time of the server process for each frame that arrived, and its resident memory for each socket, with 1,000 and with
10,000 sockets on one auction. The gateway is the real one, a process as `serve` starts it: each frame is published on the
tick lane of Redis, so splitting the line and finding the room are in its figure, as is all it does besides. Its peers and
its floors (`benchmarks.fanout_servers`) are told on stdin to send the same bytes.

All servers hold their sockets at the same time, each in a process of its own on one core; clients and Redis are on another.
A round sends some frames to every socket of one server, the next one when the last has arrived everywhere; servers take
turns; what is compared are medians of rounds. CPU time says nothing of how long it took, and depends less than that on who
else is on the machine.
"""

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from auction_timer.roles import listen
from benchmarks.fanout_processes import Part, client, gateway_process, part
from benchmarks.fanout_servers import KINDS
from benchmarks.harness import Bench, bench, report
from benchmarks.machine import cpu_ns, on_client_core, rss_bytes
from engine.contract.keys import ShardKeys
from engine.contract.timers import TimerRecord, heartbeat_line, sealed, tick_line
from engine.domain.auction import Auction, Registration
from engine.domain.events import Register
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, EpochMs
from gateway.room import text_frame

GATEWAY: Final = "gateway"
AUCTION: Final = "auction-1638843936"
WARM_SOCKETS: Final = 8
"""Opened and closed before memory is read first, so that modules loaded on the first handshake do not count."""
SETTLE_S: Final = 1.0

Send = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A server with its client."""

    name: str
    pid: int
    port: int
    send: Send
    watchers: Part


async def measure(*, sizes: list[int], rounds: int, deliveries: int, save: bool) -> dict[str, Any]:
    """Send about `deliveries` frames in each of `rounds` rounds, to each of `sizes` sockets."""
    measured: dict[str, Any] = {}
    async with bench() as made:
        with on_client_core(made.server_pid):
            record = await _register(made)
            line = tick_line(record, made.clock.now_ms())
            for size in sizes:
                measured[str(size)] = await _compare(made, line, size, rounds, max(1, deliveries // size))
    frame_bytes = len(text_frame(_payload(line)))
    return report(
        "fanout",
        {"sizes": sizes, "rounds": rounds, "deliveries_per_round": deliveries, "frame_bytes": frame_bytes},
        measured,
        save=save,
    )


async def _register(made: Bench) -> TimerRecord:
    """An auction that the gateway can load. No engine runs, so nothing but our frames is sent."""
    now = made.clock.now_ms()
    registration = Registration(AUCTION, EpochMs(now - HOUR_MS), EpochMs(now + 24 * HOUR_MS))
    auction = fold(Auction(AUCTION), Register(registration), now)[-1].after
    record = TimerRecord(auction, f"{0xAF7651916CD43DD8448EB211C80319C:032x}", f"req-{1:032x}")
    fields = [part for pair in sealed(record).items() for part in pair]
    await made.link.commands.execute_command("HSET", ShardKeys.of(0).timer(AUCTION), *fields)
    return record


def _payload(line: bytes) -> bytes:
    return line.split(b" ", 2)[2]


async def _compare(made: Bench, line: bytes, size: int, rounds: int, frames: int) -> dict[str, Any]:
    frame_bytes = len(text_frame(_payload(line)))
    async with AsyncExitStack() as running:
        pairs = await asyncio.gather(*(_start(running, made, name, line) for name in (GATEWAY, *KINDS)))
        grown = await asyncio.gather(*(_open(pair, size, frame_bytes) for pair in pairs))
        rss = {pair.name: bytes_each for pair, bytes_each in zip(pairs, grown, strict=True)}
        costs: dict[str, list[float]] = {pair.name: [] for pair in pairs}
        for pair in pairs:
            await _round(pair, size, 1)  # the first write to a socket is not like the others
        for number in range(rounds):
            # Another one first each time: whoever comes first after a pause finds its core as cold as any.
            for pair in pairs[number % len(pairs) :] + pairs[: number % len(pairs)]:
                costs[pair.name].append(await _round(pair, size, frames))
    return _judged(costs, rss)


async def _start(running: AsyncExitStack, made: Bench, name: str, line: bytes) -> Pair:
    watchers = await running.enter_async_context(client())
    if name == GATEWAY:
        gateway = await running.enter_async_context(gateway_process(made, shards=1))
        await running.enter_async_context(_heartbeats(made))

        async def publish() -> None:
            await made.store.publish({0: line})

        return Pair(name, gateway.pid, gateway.port, publish, watchers)
    listener = running.enter_context(listen("127.0.0.1", 0))
    server = await running.enter_async_context(
        part("benchmarks.fanout_servers", name, str(listener.fileno()), pass_fds=(listener.fileno(),))
    )
    server.tell_line(_payload(line))
    await server.answer()

    async def tell() -> None:
        server.tell_line(b"")

    return Pair(name, server.pid, listener.getsockname()[1], tell, watchers)


@asynccontextmanager
async def _heartbeats(made: Bench) -> AsyncIterator[None]:
    """What an engine sends once a second. A gateway that hears none sends ticks of its own, marked `stale`."""

    async def beat() -> None:
        while True:
            await made.store.publish({0: heartbeat_line("bench", 1, made.clock.now_ms())})
            await asyncio.sleep(1)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


async def _open(pair: Pair, size: int, frame_bytes: int) -> float:
    """Open the sockets; what each adds to the server's resident memory, in bytes."""
    async with client() as warm:
        await warm.ask("open", port=pair.port, auctions=[AUCTION], sockets=WARM_SOCKETS)
    await asyncio.sleep(SETTLE_S)
    before = rss_bytes(pair.pid)
    await pair.watchers.ask("open", port=pair.port, auctions=[AUCTION], sockets=size, frame_bytes=frame_bytes)
    await asyncio.sleep(SETTLE_S)
    return (rss_bytes(pair.pid) - before) / size


async def _round(pair: Pair, size: int, frames: int) -> float:
    """CPU time for each frame, in µs."""
    before = cpu_ns(pair.pid)
    for _ in range(frames):
        pair.watchers.tell(do="expect", frames=size)
        await pair.send()
        await pair.watchers.answer()
    return (cpu_ns(pair.pid) - before) / 1_000 / (size * frames)


def _judged(costs: dict[str, list[float]], rss: dict[str, float]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in costs.items()}
    return {
        "cpu_us_per_frame": {
            name: {"median": round(medians[name], 3), "min": round(min(values), 3), "max": round(max(values), 3)}
            for name, values in costs.items()
        },
        "gateway_to": {name: round(medians[GATEWAY] / medians[name], 3) for name in KINDS},
        "rss_bytes_per_idle_socket": {name: round(value) for name, value in rss.items()},
    }
