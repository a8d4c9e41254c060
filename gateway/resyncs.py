"""Which of the drifts that clients report are announced as `auction_timer_resynced`.

Who announces is the engine, in a commit, like everything else on the outbound bus. So a report goes through the intake. It
is worth little one by one, and after an outage every client has one: only drifts above the threshold go that way, and only
so many a second. Nobody waits for it, and nobody is told if it is lost: the counter says how many were.
"""

from typing import Final
from uuid import uuid4

import structlog

from engine.contract import intake
from engine.contract.intake import ANONYMOUS, Actor, CommandType, Context, IntakeEvent, Resync
from engine.store.protocol import Draft, Intake, StoreError
from gateway.admission import TokenBucket
from gateway.auth import Principal
from gateway.door import Door
from gateway.room import Room

DRIFT_MAX_MS: Final = 500
"""Requirement R9: a clock that is off by more is put right at once, others correct themselves."""
ANNOUNCED_PER_SECOND_MAX: Final = 5
"""Per gateway. The intake takes thousands; but each is remembered there for days, and tells little beside the metric."""

log = structlog.get_logger()


class Resyncs:
    """Announces large drifts, within a bound."""

    def __init__(self, door: Door, store: Intake) -> None:
        self._door = door
        self._store = store
        self._bucket = TokenBucket(ANNOUNCED_PER_SECOND_MAX, door.now_ns())

    def report(
        self,
        room: Room,
        drift_ms: float,
        rtt_ms: float | None,
        principal: Principal,
        correlation_id: str,
        *,
        trace_id: str | None = None,
    ) -> None:
        """Take what one client measured.

        Args:
            drift_ms: how far the client's clock was ahead of the auction clock; negative: behind.
            correlation_id: of the request, or of the socket's handshake.
            trace_id: of the request; None: the auction's.
        """
        metrics = self._door.metrics
        if abs(drift_ms) <= DRIFT_MAX_MS:
            metrics.resync("small")
        elif not self._bucket.take(self._door.now_ns()):
            metrics.resync("limited")
        else:
            context = Context(
                event_id=f"resync-{uuid4().hex}",
                event_type=CommandType.RESYNC_REPORTED.value,
                trace_id=trace_id or room.timer["trace_id"],
                correlation_id=correlation_id,
                actor=ANONYMOUS if principal.is_local else Actor("client", principal.subject),
            )
            resync = Resync(round(drift_ms), None if rtt_ms is None else round(rtt_ms))
            self._door.spawn(self._announce(room.shard, IntakeEvent(context, resync, room.auction_id)))

    async def _announce(self, shard: int, event: IntakeEvent) -> None:
        draft = Draft(event.context.event_id, intake.encode(event))
        try:
            await self._store.append(shard, [draft], self._door.hub.clock.now_ms(), draft.event_id)
        except StoreError as error:
            log.debug("resync_lost", auction_id=event.auction_id, error=str(error))
            self._door.metrics.resync("lost")
        else:
            self._door.metrics.resync("announced")
