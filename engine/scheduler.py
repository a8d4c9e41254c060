"""The scheduler: one per engine, on the auction clock. It proposes; the store's guard decides.

Two agendas: what time will do to auctions (start, window, deadline), and ticks. Each wake-up is only a proposal: timers
fire early by their resolution (uvloop: 376 of 1,000 `call_at` did), so whatever surfaces is compared with the clock
again, and because no single timer is trusted to be the one that closes, the loop looks at least once a second anyway.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import structlog

from engine.agenda import Agenda
from engine.clock import AuctionClock
from engine.contract.keys import shard_of
from engine.contract.timers import TimerRecord, heartbeat_line, tick_line
from engine.domain.cadence import next_tick_at
from engine.domain.fold import next_due
from engine.domain.instants import EpochMs
from engine.metrics import EngineMetrics
from engine.pace import REALTIME, Pace
from engine.shard import Shard
from engine.store.protocol import ShardStore, StoreUnavailableError

PASS_MAX: Final = 2_000
"""Auctions handled before the loop yields: about 20 ms of ticks, so sockets and commits are not kept waiting."""

log = structlog.get_logger()


class Scheduler:
    """Knows when each auction of this engine starts, opens its window, closes and ticks."""

    def __init__(
        self,
        clock: AuctionClock,
        store: ShardStore,
        shards: Mapping[int, Shard],
        *,
        shard_count: int,
        instance: str,
        metrics: EngineMetrics,
        pace: Pace = REALTIME,
    ) -> None:
        self._clock = clock
        self._store = store
        self._shards = shards
        self._shard_count = shard_count
        self._instance = instance
        self._metrics = metrics
        self._pace = pace
        self._dues = Agenda()
        self._ticks = Agenda()
        self._wake = asyncio.Event()
        self._heartbeat_at = EpochMs(0)
        self._round_at = EpochMs(0)
        """Not before then is the next round of ticks."""

    def enter(self, records: Iterable[TimerRecord], *, tick_now: bool) -> None:
        """See `engine.shard.Calendar`."""
        now = self._clock.now_ms()
        for record in records:
            auction = record.auction
            due = next_due(auction)
            self._dues.set(auction.auction_id, due[0] if due else None)
            tick_at = next_tick_at(auction, now)
            self._ticks.set(auction.auction_id, now if tick_now and tick_at is not None else tick_at)
        self._wake.set()

    def wake_at(self, auction_id: str, at: EpochMs) -> None:
        """See `engine.shard.Calendar`."""
        self._dues.set(auction_id, at)
        self._wake.set()

    def forget(self, shard: Shard) -> None:
        """A shard is no longer ours: none of its auctions is due or ticks here."""
        for auction_id in shard.live:
            self._dues.set(auction_id, None)
            self._ticks.set(auction_id, None)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            now = self._clock.now_ms()
            self._propose_due(now)
            more = await self._send_ticks(now)
            wake_at = now if more else self._next_at(now)
            self._wake.clear()
            await self._clock.clock.sleep_until(self._clock.monotonic_at(wake_at), self._wake)

    def _next_at(self, now: EpochMs) -> EpochMs:
        due_at, tick_at = self._dues.next_at(), self._ticks.next_at()
        if tick_at is not None:
            tick_at = max(tick_at, self._round_at)
        candidates = [at for at in (due_at, tick_at) if at is not None]
        return EpochMs(min(now + self._pace.look_again_ms, self._heartbeat_at, *candidates))

    def _propose_due(self, now: EpochMs) -> None:
        by_shard: dict[int, list[str]] = {}
        while due := self._dues.pop_due(now, PASS_MAX):
            for _, auction_id in due:
                by_shard.setdefault(shard_of(auction_id, self._shard_count), []).append(auction_id)
        for number, auction_ids in by_shard.items():
            if (shard := self._shards.get(number)) is not None:
                shard.fall_due(auction_ids)

    async def _send_ticks(self, now: EpochMs) -> bool:
        """Send what ticks now, one message per shard; whether more is due already."""
        is_round = not 0 < self._round_at - now <= self._pace.tick_round_ms
        due = self._ticks.pop_due(now, PASS_MAX) if is_round else []
        if due and self._pace.tick_round_ms:
            self._round_at = EpochMs(now + self._pace.tick_round_ms)
        lines: dict[int, list[bytes]] = {}
        sent_for: list[EpochMs] = []
        for tick_at, auction_id in due:
            number = shard_of(auction_id, self._shard_count)
            shard = self._shards.get(number)
            record = shard.live.get(auction_id) if shard else None
            if record is None:
                continue
            following = next_tick_at(record.auction, now)
            if following is None and record.auction.ends_at <= now:
                continue  # its close is under way, and that is news of its own
            lines.setdefault(number, []).append(tick_line(record, now))
            sent_for.append(tick_at)
            self._ticks.set(auction_id, following)
        # A clock that was found to be ahead is set back: what was to come by it is not waited for.
        if not 0 < self._heartbeat_at - now <= self._pace.heartbeat_ms:
            self._heartbeat_at = EpochMs(now + self._pace.heartbeat_ms)
            for number, shard in self._shards.items():
                lines.setdefault(number, []).append(heartbeat_line(self._instance, shard.epoch, now, shard.holding()))
        if lines:
            try:
                await self._store.publish({number: b"\n".join(rows) for number, rows in lines.items()})
            except StoreUnavailableError as error:
                # Ticks are disposable: the next ones say the same with a newer time.
                log.warning("ticks_not_sent", error=str(error))
                return False
            done = self._clock.now_ms()
            observe: Callable[[float], None] = self._metrics.tick_delay_ms.observe
            for tick_at in sent_for:
                observe(done - tick_at)
        return len(due) == PASS_MAX
