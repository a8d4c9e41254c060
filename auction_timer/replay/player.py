"""The driver of a replay: registers the auctions, sends each bid when it is due, watches every auction over its own socket.

    register all ──▶ open sockets ──▶ bids, one request at a time ──▶ wait for the last end ──▶ read final timers ──▶ judge

Two rules make the verdict certain. One request is in flight at a time, so that the order in which an auction's bids count is
the order in which they were sent. And the time is the server's: it is estimated from the arrival stamps that the intake
answers with, so the machine of the replay may have another date than the one of the server.

The server may go away in the middle. Requests are repeated with the same ids until it is back, sockets resume where they
were; bids that were due meanwhile are sent then, and judged at the arrival they got.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final
from uuid import uuid4

import httpx

from auction_timer.client import (
    EVENTS_MAX,
    Api,
    ClientError,
    EventResult,
    Frame,
    Retry,
    ServerClock,
    TimerSession,
    UnknownAuctionError,
    watch_auction,
)
from auction_timer.replay.history import read_history
from auction_timer.replay.plan import EventBody, PastPolicy, Plan, PlannedAuction, make_plan
from auction_timer.replay.verdict import Ending, Extending, Observed, ReplayReport, expect, judge
from engine.clock import Clock, SystemClock
from engine.contract.frames import TIMER_ENDED, TIMER_EXTENDED
from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.policy import ExtensionMode

LEAD_MS: Final = 1_500
"""From now to the start of the auctions: 503 are registered and watched within a second on two cores."""
BATCH_WITHIN_MS: Final = 3
"""Bids due so close together go in one request. About half of what a request takes, and a fortieth of the shortest window
that makes sense (125 ms)."""
SETTLE_MS: Final = 30_000
"""After the last end that is expected: the bound of the wait for the announcements."""
DATE_OFF_MS: Final = 2_000
"""The wall clocks of two machines may differ by so much before the server's is believed; its header is cut to the second."""
AWAY_MS: Final = 120_000
"""How long the server may be away before the replay gives up."""
HANDSHAKES_AT_ONCE: Final = 64
REQUESTS_AT_ONCE: Final = 16
REGISTERED_WITHIN_MS: Final = 10_000
"""From the intake's answer to the engine's: until then a handshake may be answered 404."""
REGISTERED_POLL_S: Final = 0.05

_NS: Final = 1_000_000


class ReplayError(ClientError):
    """The replay could not be played, or not to its end. A verdict that is bad is no error but a report."""


class Phase(StrEnum):
    """What a replay is doing."""

    REGISTERING = "registering"
    OPENING = "opening sockets"
    PLAYING = "playing"
    CLOSING = "waiting for the last ends"
    JUDGING = "judging"


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """How far a replay is."""

    phase: Phase
    auctions: int
    registered: int
    watched: int
    bids: int
    sent: int
    ended: int
    extensions: int


OnProgress = Callable[[ReplayProgress], None]
Watcher = Callable[..., AsyncGenerator[Frame, None]]
"""`watch_auction`, or what stands in for it."""


async def replay(
    path: Path,
    *,
    url: str,
    token: str | None = None,
    speed: float,
    window_ms: int = 15 * MINUTE_MS,
    extension_ms: int = 15 * MINUTE_MS,
    mode: ExtensionMode = ExtensionMode.RESET_TO,
    total_cap_ms: int = 24 * HOUR_MS,
    max_extensions: int | None = None,
    limit: int | None = None,
    auction_prefix: str | None = None,
    lead_ms: int = LEAD_MS,
    on_progress: OnProgress | None = None,
    clock: Clock | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    watcher: Watcher | None = None,
) -> ReplayReport:
    """Play the history in `path` against the server at `url`, and judge what it did.

    Args:
        token: what the server knows the caller by, with the scope `events:write`; one in open mode needs none.
        speed: how many times faster than it was.
        window_ms, extension_ms, mode, total_cap_ms, max_extensions: the closing rules, in the history's own time.
        limit: play only the first so many auctions.
        auction_prefix: goes before every auction id. Must be new to the server; a random one if None.
        lead_ms: from now to the start of all auctions.
        on_progress: called after every request and every close.
        clock: of this process.
        transport, watcher: the HTTP side and the socket; for tests.

    Raises:
        HistoryError: the file is no bid history.
        PlanError: speed, rules or ids are out of bounds.
        ReplayError: the prefix is not new, or the server is not ready.
        ClientError: the server is away for longer than two minutes, or refuses.
        OSError: the file cannot be read.
    """
    clock = clock or SystemClock()
    history = read_history(path, limit=limit)
    policy = PastPolicy(window_ms, extension_ms, mode, total_cap_ms, max_extensions)
    prefix = auction_prefix or f"replay-{uuid4().hex[:8]}"
    # Planned once without a server, so that a plan that cannot be is told before anybody is asked.
    make_plan(history, starts_at=clock.wall_ms(), speed=speed, policy=policy, prefix=prefix)
    async with Api(url, token=token, retry=Retry(deadline_ms=AWAY_MS), transport=transport) as api:
        server_now = await _server_now(api, clock)
        starts_at = EpochMs(server_now + lead_ms)
        plan = make_plan(history, starts_at=starts_at, speed=speed, policy=policy, prefix=prefix)
        watcher = watcher or partial(watch_auction, token=token)
        player = _Player(api, plan, watcher, clock, on_progress or (lambda _progress: None))
        player.believe(server_now)
        return await player.play()


async def _server_now(api: Api, clock: Clock) -> EpochMs:
    """The server's date, roughly: ours, unless its own header says that it is another."""
    readiness = await api.readyz()
    if not readiness.ready:
        failing = ", ".join(f"{name}: {found}" for name, found in readiness.checks.items() if found != "ok")
        raise ReplayError(f"the gateway at {api.url} is not ready ({failing}): wait until /readyz answers 200")
    wall_ms, date_ms = clock.wall_ms(), readiness.date_ms
    return wall_ms if date_ms is None or abs(date_ms - wall_ms) <= DATE_OFF_MS else date_ms


class _Player:
    """One run."""

    def __init__(self, api: Api, plan: Plan, watcher: Watcher, clock: Clock, on_progress: OnProgress) -> None:
        self._api = api
        self._plan = plan
        self._watcher = watcher
        self._clock = clock
        self._began_ns = clock.monotonic_ns()
        self._server = ServerClock()
        self._on_progress = on_progress
        self._seen = {auction.auction_id: Observed() for auction in plan.auctions}
        self._handshakes = asyncio.Semaphore(HANDSHAKES_AT_ONCE)
        self._phase = Phase.REGISTERING
        self._registered = self._watched = self._sent = self._ended = self._extensions = 0
        self._all_watched = asyncio.Event()

    def believe(self, server_now: EpochMs) -> None:
        """Take a first idea of the server's time; the arrival stamps make it better."""
        self._server.hear(server_now, self._clock.monotonic_ns())

    async def play(self) -> ReplayReport:
        """Play it to its end, and judge."""
        await self._register()
        self._enter(Phase.OPENING)
        watchers = [asyncio.create_task(self._watch(auction)) for auction in self._plan.auctions]
        try:
            await self._all_watched.wait()
            self._enter(Phase.PLAYING)
            await self._send_bids()
            self._enter(Phase.CLOSING)
            await self._settle(watchers)
        finally:
            for watcher in watchers:
                watcher.cancel()
            outcomes = await asyncio.gather(*watchers, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        self._enter(Phase.JUDGING)
        await self._read_finals()
        return self._report()

    # Events.

    async def _register(self) -> None:
        resent = self._api.resent
        for first in range(0, len(self._plan.auctions), EVENTS_MAX):
            batch = self._plan.auctions[first : first + EVENTS_MAX]
            results = await self._post([auction.event() for auction in batch])
            if self._api.resent == resent and any(result.is_duplicate for result in results):
                raise ReplayError(
                    f"auctions named {batch[0].auction_id} are known to the server: choose another auction prefix"
                )
            for auction, result in zip(batch, results, strict=True):
                self._seen[auction.auction_id].registered_at = result.arrival_ms
            self._registered += len(batch)
            self._tell()

    async def _send_bids(self) -> None:
        bids, starts_at = self._plan.bids, self._plan.starts_at
        while self._sent < len(bids):
            first = self._sent
            now_ms = await self._reach(starts_at + bids[first].due_ms)
            last = first + 1
            while (
                last < len(bids)
                and last - first < EVENTS_MAX
                and starts_at + bids[last].due_ms <= now_ms + BATCH_WITHIN_MS
            ):
                last += 1
            batch = bids[first:last]
            results = await self._post([bid.event() for bid in batch])
            for bid, result in zip(batch, results, strict=True):
                self._seen[bid.auction_id].arrivals.append((bid, result.arrival_ms))
            self._sent = last
            self._tell()

    async def _post(self, events: Sequence[EventBody]) -> list[EventResult]:
        """Send a batch, and take its arrival stamps as readings of the server's clock."""
        resent, sent_ns = self._api.resent, self._clock.monotonic_ns()
        results = await self._api.post_events(events)
        now_ns = self._clock.monotonic_ns()
        if self._api.resent == resent:
            stamp = max(result.arrival_ms for result in results)
            self._server.answer(sent_ns, stamp, stamp, now_ns)
        return results

    async def _reach(self, instant_ms: int) -> float:
        """Wait until the server's clock shows `instant_ms`, as far as can be told here; what it shows then."""
        while True:
            now_ms = self._server_ms()
            if now_ms >= instant_ms:
                return now_ms
            # In parts: the estimate gets better while bids are sent, and a long sleep would not hear of it.
            await asyncio.sleep(min(1.0, (instant_ms - now_ms) / SECOND_MS))

    def _server_ms(self) -> float:
        now_ms = self._server.now_ms(self._clock.monotonic_ns())
        assert now_ms is not None
        return now_ms

    # Sockets.

    async def _watch(self, auction: PlannedAuction) -> None:
        """Watch an auction until it is over, or cannot be watched; never fails the run."""
        seen = self._seen[auction.auction_id]
        session = TimerSession(auction.auction_id, keeps_time=False)
        try:
            await self._handshakes.acquire()
            opening = contextlib.ExitStack()
            opening.callback(self._opened)
            with opening:
                await self._follow(session, seen, opening)
        except ClientError as error:
            seen.trouble = str(error)
        finally:
            seen.gaps, seen.reconnects = session.gaps, session.reconnects

    def _opened(self) -> None:
        self._handshakes.release()
        self._watched += 1
        if self._watched == len(self._plan.auctions):
            self._all_watched.set()

    async def _follow(self, session: TimerSession, seen: Observed, opening: contextlib.ExitStack) -> None:
        give_up_ns = self._clock.monotonic_ns() + REGISTERED_WITHIN_MS * _NS
        while True:
            try:
                await self._listen(session, seen, opening)
            except UnknownAuctionError:
                # The intake took it; the engine may not have come to it yet.
                if self._clock.monotonic_ns() > give_up_ns:
                    raise
                await asyncio.sleep(REGISTERED_POLL_S)
            else:
                return

    async def _listen(self, session: TimerSession, seen: Observed, opening: contextlib.ExitStack) -> None:
        frames = self._watcher(
            self._api.url,
            session.auction_id,
            session=session,
            clock=self._clock,
            retry=Retry(deadline_ms=AWAY_MS),
            first_within_ms=AWAY_MS,
        )
        async with contextlib.aclosing(frames):
            async for frame in frames:
                opening.close()
                self._on_frame(frame, seen)

    def _on_frame(self, frame: Frame, seen: Observed) -> None:
        if frame["type"] == TIMER_ENDED:
            timer = frame["timer"]
            seen.endings.append(Ending(frame["server_time"], timer["ends_at"], timer.get("ended_at")))
            self._ended += 1
            self._tell()
        elif frame["type"] == TIMER_EXTENDED:
            seen.extendings.append(Extending(frame["previous_ends_at"], frame["timer"]["ends_at"]))
            self._extensions += 1

    # The end.

    async def _settle(self, watchers: "list[asyncio.Task[None]]") -> None:
        """Wait for every socket to be over. The bound is no guess: the last end follows from the arrivals."""
        last_ms = max(
            expect(auction, self._seen[auction.auction_id]).auction.ends_at for auction in self._plan.auctions
        )
        left_ms = max(0.0, last_ms - self._server_ms()) + SETTLE_MS
        _, waiting = await asyncio.wait(watchers, timeout=left_ms / SECOND_MS)
        for auction, watcher in zip(self._plan.auctions, watchers, strict=True):
            if watcher in waiting:
                self._seen[
                    auction.auction_id
                ].trouble = f"did not end within {SETTLE_MS // SECOND_MS} s of its last end"

    async def _read_finals(self) -> None:
        requests = asyncio.Semaphore(REQUESTS_AT_ONCE)

        async def read(auction: PlannedAuction) -> None:
            seen = self._seen[auction.auction_id]
            async with requests:
                try:
                    seen.final = await self._api.get_timer(auction.auction_id)
                except ClientError as error:
                    seen.trouble = seen.trouble or str(error)

        await asyncio.gather(*(read(auction) for auction in self._plan.auctions))

    def _report(self) -> ReplayReport:
        rows = [judge(auction, self._seen[auction.auction_id]) for auction in self._plan.auctions]
        return ReplayReport(
            speed=self._plan.speed,
            elapsed_ms=(self._clock.monotonic_ns() - self._began_ns) // _NS,
            reconnects=sum(seen.reconnects for seen in self._seen.values()),
            gaps=sum(seen.gaps for seen in self._seen.values()),
            resent=self._api.resent,
            rows=tuple(sorted(rows, key=lambda row: (row.ends_at, row.auction_id))),
        )

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._tell()

    def _tell(self) -> None:
        self._on_progress(
            ReplayProgress(
                self._phase,
                len(self._plan.auctions),
                self._registered,
                self._watched,
                len(self._plan.bids),
                self._sent,
                self._ended,
                self._extensions,
            )
        )
