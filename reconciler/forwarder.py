"""The forwarder: outbound events of the event lane, posted to a webhook in order, at least once.

Each shard has a cursor in Redis and one forwarder that holds its lease. The rule is one line: read behind the cursor, post,
then move the cursor. Whoever dies in between has posted something that is posted again by the next one, under the same id;
nothing is passed over. What the receiver does not take after its attempts is put aside, in the step that moves the cursor.

A shard posts one event at a time, so the events of an auction arrive in their order. Shards do not wait for each other.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import count
from typing import Final

import structlog

from engine.clock import Clock
from engine.contract.cursors import START
from engine.lease import LeaseKeeper
from engine.settings import Settings
from engine.store.forwarder import ForwarderStore, Pending
from engine.store.protocol import StoreUnavailableError, UpdateEntry, ViewStore
from reconciler.metrics import ReconcilerMetrics
from reconciler.webhook import Refused, Webhook, cloud_event, event_id

READ_MAX: Final = 64
"""Entries per shard and read: about 130 kB, re-read whole after a lost lease."""
LISTEN_MS: Final = 1_000
LISTEN_AGAIN_MS: Final = 20
"""While some shards are at work the wait for news leaves them out, and must not keep them out for long."""
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 60.0
RETRY_AFTER_MAX_S: Final = 300.0
"""A receiver may ask for a longer pause than our own, up to this: beyond, it would hold its shard up for hours."""
STORE_AGAIN_S: Final = 1.0
"""Between calls to a store that is away; each of them has tried for seconds already."""
RELEASE_WITHIN_S: Final = 2.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Lane:
    """One shard that is ours: where it stands, and whether it has anything to do."""

    shard: int
    epoch: int
    cursor: str = START
    behind: int = 0
    is_idle: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Forwarder:
    """Forwards the shards whose forwarder lease it can get.

    Two of them share the work as engines do: whoever came first holds the shards, the other takes over what stands still.

    Args:
        sleep: waits so many seconds before the next attempt.
    """

    def __init__(
        self,
        store: ForwarderStore,
        updates: ViewStore,
        webhook: Webhook,
        clock: Clock,
        settings: Settings,
        metrics: ReconcilerMetrics,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._updates = updates
        self._webhook = webhook
        self._types = tuple(settings.webhook_types)
        self._attempts_max = settings.webhook_attempts_max
        self._metrics = metrics
        self._sleep = sleep
        self._lanes: dict[int, _Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._some_idle = asyncio.Event()
        self.leases = LeaseKeeper(
            store,
            clock,
            settings.instance,
            settings.shards,
            lease_ms=settings.lease_ms,
            heartbeat_ms=settings.heartbeat_ms,
            gained=self._gain,
            lost=self._lose,
        )

    async def run(self) -> None:
        """Forward until cancelled, then give the leases back and hang up."""
        log.info("forwarder_starting", webhook=self._webhook.origin, types=self._types)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._group = tasks
                tasks.create_task(self.leases.run(), name="forwarder-leases")
                tasks.create_task(self._listen(), name="forwarder-listener")
        finally:
            with contextlib.suppress(StoreUnavailableError, TimeoutError):
                async with asyncio.timeout(RELEASE_WITHIN_S):
                    await self.leases.release()
            await self._webhook.close()

    async def _gain(self, shard: int, epoch: int) -> None:
        lane = self._lanes[shard] = _Lane(shard, epoch)
        self._tasks[shard] = self._group.create_task(self._work(lane), name=f"forwarder-{shard}")

    async def _lose(self, shard: int) -> None:
        self._lanes.pop(shard, None)
        self._show_lag()
        task = self._tasks.pop(shard, None)
        if task is not None:
            task.cancel()

    # Reading.

    async def _work(self, lane: _Lane) -> None:
        """Forward one shard for as long as it is ours."""
        is_away = False
        while True:
            try:
                pending = await self._store.pending(lane.shard, lane.epoch, READ_MAX)
            except StoreUnavailableError as error:
                if not is_away:
                    log.warning("event_lane_unreadable", shard=lane.shard, error=str(error))
                is_away = True
                await asyncio.sleep(STORE_AGAIN_S)
                continue
            is_away = False
            if pending is None:
                # From a task of its own: dropping cancels this one.
                self._group.create_task(self.leases.drop(lane.shard))
                return
            self._note(lane, pending)
            if pending.entries:
                await self._forward(lane, pending)
            else:
                await self._rest(lane)

    def _note(self, lane: _Lane, pending: Pending) -> None:
        lane.cursor, lane.behind = pending.cursor, pending.behind
        self._show_lag()
        match pending.standing:
            case "begun":
                log.info("forwarding_begins", shard=lane.shard, cursor=pending.cursor)
            case "back":
                log.warning("event_lane_went_back", shard=lane.shard, now=pending.cursor)
        if pending.lost:
            self._metrics.webhook_deliveries["lost"].inc(pending.lost)
            log.error("events_trimmed_before_forwarded", shard=lane.shard, events=pending.lost)

    def _show_lag(self) -> None:
        self._metrics.webhook_lag.set(sum(lane.behind for lane in self._lanes.values()))

    async def _rest(self, lane: _Lane) -> None:
        """Wait for news. Not for ever: the lane may have been changed in ways that ring no bell."""
        lane.news.clear()
        lane.is_idle = True
        self._some_idle.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_MS / 1_000):
                await lane.news.wait()
        lane.is_idle = False

    async def _listen(self) -> None:
        """Wake the shards that wait when their lane has something behind their cursor."""
        while True:
            self._some_idle.clear()
            idle = {shard: lane.cursor for shard, lane in self._lanes.items() if lane.is_idle}
            if not idle:
                await self._some_idle.wait()
                continue
            block_ms = LISTEN_MS if len(idle) == len(self._lanes) else LISTEN_AGAIN_MS
            try:
                found = await self._updates.read_updates(idle, 1, block_ms)
            except StoreUnavailableError:
                # The shards say so themselves, and look again.
                await asyncio.sleep(STORE_AGAIN_S)
                continue
            for shard in found:
                if shard in self._lanes:
                    self._lanes[shard].is_idle = False
                    self._lanes[shard].news.set()

    # Forwarding.

    async def _forward(self, lane: _Lane, pending: Pending) -> None:
        """Offer what was read to the webhook. If the cursor turns out to stand elsewhere, what is left is read again."""
        passed = 0
        for entry in pending.entries:
            passed += 1
            is_wanted = any(fnmatchcase(entry.type, pattern) for pattern in self._types)
            put_aside = await self._deliver(lane.shard, entry) if is_wanted else None
            if is_wanted or entry is pending.entries[-1]:
                if not await self._advance(lane, entry.stream_id, passed, put_aside):
                    return
                passed = 0

    async def _advance(self, lane: _Lane, to: str, passed: int, put_aside: Mapping[str, str | bytes] | None) -> bool:
        """Move the cursor, however long the store is away: what was delivered shall not be delivered again."""
        while True:
            try:
                moved = await self._store.advance(
                    lane.shard, lane.epoch, after=lane.cursor, to=to, passed=passed, put_aside=put_aside
                )
            except StoreUnavailableError as error:
                log.warning("forwarder_not_committed", shard=lane.shard, cursor=to, error=str(error))
                await asyncio.sleep(STORE_AGAIN_S)
                continue
            if moved:
                lane.cursor = to
                lane.behind = max(0, lane.behind - passed)
                self._show_lag()
            return moved

    async def _deliver(self, shard: int, entry: UpdateEntry) -> dict[str, str | bytes] | None:
        """Post one event until the receiver has it; otherwise what is to be put aside."""
        name = event_id(shard, entry)
        try:
            body = cloud_event(shard, entry)
        except ValueError as error:
            return self._put_aside(name, entry, 0, str(error))
        for attempt in count(1):
            refused = await self._webhook.post(name, body)
            if refused is None:
                self._metrics.webhook_deliveries["delivered"].inc()
                break
            if refused.is_final or attempt >= self._attempts_max:
                return self._put_aside(name, entry, attempt, refused.error)
            wait_s = _wait_s(attempt, refused)
            self._metrics.webhook_deliveries["retried"].inc()
            log.info("webhook_retried", event_id=name, attempt=attempt, error=refused.error, wait_s=round(wait_s, 1))
            await self._sleep(wait_s)
        return None

    def _put_aside(self, name: str, entry: UpdateEntry, attempts: int, error: str) -> dict[str, str | bytes]:
        self._metrics.webhook_deliveries["undelivered"].inc()
        log.error("event_undelivered", event_id=name, type=entry.type, attempts=attempts, error=error)
        return {
            "event_id": name,
            "type": entry.type,
            "auction_id": entry.auction_id,
            "version": str(entry.version),
            "body": entry.body,
            "attempts": str(attempts),
            "error": error,
        }


def _wait_s(attempt: int, refused: Refused) -> float:
    """How long after attempt number `attempt` the next one is made: doubling, and not all shards at the same instant."""
    backoff_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 16)) * random.uniform(0.75, 1)  # noqa: S311
    asked_s = min(RETRY_AFTER_MAX_S, refused.retry_after_s or 0)
    return max(backoff_s, asked_s)
