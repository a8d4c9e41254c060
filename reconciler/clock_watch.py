"""Watches the authority's clock of every shard, and has a step of it taken back by a sequenced correction.

A shard stamps by `TIME + offset`. When the host of Redis has its date set, every process refuses the samples and coasts;
so the offset that makes `TIME + offset` what it was before can be measured, and is appended to the shard's intake as
`clock.corrected`. Once the engine has committed it, samples agree again and the coasting is over. When the date is set back,
the same happens the other way round.

    TIME        offset      authority    estimate
    12:00:00         0      12:00:00     12:00:00
    12:00:11         0      12:00:11     12:00:01     authority odd: steady over four looks
    12:00:15   -10,000      12:00:05     12:00:05     corrected

It is asked for only if the step is steady over several looks, if this process's own witnesses name the authority, and if no
majority of the other processes finds the authority right; and at most every ten seconds for a shard.
"""

import asyncio
from collections import deque
from itertools import islice
from typing import Final
from uuid import uuid4

import orjson
import structlog
from redis.exceptions import RedisError

from engine.clock import AuctionClock, MonotonicNs
from engine.clock_board import ClockBoard
from engine.clock_sync import Witnesses
from engine.contract.clock_vote import ClockReport, Verdict, is_contradicted
from engine.contract.intake import CommandType, Context, CorrectClock, IntakeEvent, encode
from engine.store.protocol import Draft, IntakeFullError, ReconcilerStore, ShardClock, StoreError
from reconciler.metrics import ReconcilerMetrics
from reconciler.repairs import RECONCILER

LOOK_EVERY_S: Final = 1.0
LOOKS: Final = 4
"""So many looks in a row must measure the same step: a date that is still being set, or slewed, is waited out."""
STEADY_MS: Final = 50
"""How far these may lie apart."""
INTERVAL_NS: Final = 10_000_000_000
"""The least time between two corrections of a shard: whatever is wrong, they are never more than six a minute."""
SHARDS_PER_LOOK: Final = 64
"""Shards read in one look, each a round trip; of more, the others are read in the next ones."""
REASON: Final = "TIME stepped"

log = structlog.get_logger()


class _Track:
    """What was measured of one shard in a row: the offsets that would be right."""

    __slots__ = ("asked", "offsets_ms", "right_ms")

    def __init__(self) -> None:
        self.offsets_ms: deque[int] = deque(maxlen=LOOKS)
        self.asked: MonotonicNs | None = None
        self.right_ms: int | None = None
        """The offset the shard had when its clock was last in order, or was asked to have since."""

    def steady_ms(self) -> int | None:
        """The offset that all looks agree on."""
        if len(self.offsets_ms) < LOOKS or max(self.offsets_ms) - min(self.offsets_ms) > STEADY_MS:
            return None
        return sorted(self.offsets_ms)[LOOKS // 2]


class ClockWatch:
    """Looks at the clocks of all shards, and asks for corrections."""

    def __init__(
        self,
        store: ReconcilerStore,
        clock: AuctionClock,
        witnesses: Witnesses,
        board: ClockBoard,
        metrics: ReconcilerMetrics,
        *,
        shards: int,
    ) -> None:
        self._store = store
        self._clock = clock
        self._witnesses = witnesses
        self._board = board
        self._metrics = metrics
        self._tracks = {shard: _Track() for shard in range(shards)}
        self._turn: deque[int] = deque(range(shards))

    async def run(self) -> None:
        """Look every second until cancelled, as soon as the clock is in step."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._clock.synced:
                continue
            try:
                await self.look()
            except (StoreError, RedisError, OSError) as error:
                log.warning("clock_watch_waiting", error=str(error))

    async def look(self) -> None:
        """Look at the next shards once, and ask for what is steadily wrong.

        Raises:
            StoreUnavailableError, redis.exceptions.RedisError, OSError: Redis does not answer.
        """
        others = await self._board.others()
        shards = list(islice(self._turn, SHARDS_PER_LOOK))
        self._turn.rotate(-len(shards))
        for shard in shards:
            await self._look_at(shard, others)

    async def _look_at(self, shard: int, others: dict[str, ClockReport]) -> None:
        machine, track = self._clock.clock, self._tracks[shard]
        sent = machine.monotonic_ns()
        shown = await self._store.shard_clock(shard)
        received = machine.monotonic_ns()
        if self._witnesses.vote(sent, received, shown.now_us) is not Verdict.AUTHORITY:
            track.offsets_ms.clear()
            track.right_ms = shown.offset_ms
            return
        estimate_us = self._clock.now_us() - (machine.monotonic_ns() - (sent + received) // 2) // 1_000
        track.offsets_ms.append(round((estimate_us - shown.time_us) / 1_000))
        offset_ms = track.steady_ms()
        if offset_ms is None or (track.asked is not None and received - track.asked < INTERVAL_NS):
            return
        verdicts = [report.verdict for report in others.values()]
        # What others say is about the clock that all look at. Another node of a Cluster may be wrong all the same.
        if self._witnesses.said is Verdict.AUTHORITY and is_contradicted(Verdict.AUTHORITY, verdicts):
            log.warning("clock_correction_withheld", shard=shard, offset_ms=offset_ms, others=len(verdicts))
            track.offsets_ms.clear()
            return
        # Shards on one server have one clock, so they get one offset, also where one of them was steady a look later.
        known = (other.right_ms for other in self._tracks.values() if other.right_ms is not None)
        offset_ms = next((same for same in known if abs(same - offset_ms) <= STEADY_MS), offset_ms)
        track.asked, track.right_ms = received, offset_ms
        await self._correct(shard, shown, offset_ms, others)

    async def _correct(self, shard: int, shown: ShardClock, offset_ms: int, others: dict[str, ClockReport]) -> None:
        # The next correction of this shard has one name, whoever asks and however often: until it is applied there is one.
        event_id = f"clock-{shard}-{shown.corrections + 1}"
        stepped_ms = shown.offset_ms - offset_ms
        evidence = {
            "stepped_ms": stepped_ms,
            "previous_offset_ms": shown.offset_ms,
            "measured_ms": list(self._tracks[shard].offsets_ms),
            "uncertainty_ms": self._clock.uncertainty_us() / 1_000,
            "authority_odd_for": sum(report.verdict is Verdict.AUTHORITY for report in others.values()),
            "others": len(others),
        }
        context = Context(event_id, CommandType.CLOCK_CORRECTED, event_id, f"rec-{event_id}", RECONCILER)
        body = encode(IntakeEvent(context, CorrectClock(offset_ms, REASON, evidence), None))
        now = self._clock.now_ms()
        try:
            (appended,) = await self._store.append(shard, [Draft(event_id, body)], now, uuid4().hex, urgent=True)
        except IntakeFullError as error:
            log.warning("clock_correction_refused", shard=shard, error=str(error))
            return
        if not appended.accepted:
            return
        self._metrics.clock_corrections.inc()
        log.warning("clock_correction_requested", shard=shard, offset_ms=offset_ms, stepped_ms=stepped_ms)
        await self._store.record_reconciliation(
            {
                "cause": CommandType.CLOCK_CORRECTED.value,
                "auction_id": "",
                "shard": str(shard),
                "severity": "severe",
                "action": "requested",
                "before": str(shown.offset_ms),
                "after": str(offset_ms),
                "ms_moved": str(stepped_ms),
                "evidence": orjson.dumps(evidence).decode(),
                "correlation_id": context.correlation_id,
                "at": str(now),
            }
        )
