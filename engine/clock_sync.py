"""Keeps an `AuctionClock` in step with its authority: a burst of samples at the start, then one a second.

Each sample is also a look at the three witnesses (`engine.contract.clock_vote`). What two looks in a row say is said
aloud: in the log once for each change, in the metrics, and to the other processes (`engine.clock_board`).

    authority odd     the sample is refused, the clock coasts; the reconciler corrects the authority
    wall odd          nothing follows; after a minute the wall clock is followed again from where it then is
    monotonic odd     this machine slept: it gives away what it holds, and takes up the authority again

A process that starts has no past to hold the authority against. If its own date differs, it listens for a while to those who
have: should they find that the authority stepped, it takes their time instead.

The wall clock is a witness of *steps*. Its distance from the auction clock is remembered while all three agree, so a
host whose date is wrong by two seconds, but steadily, can still tell that the authority stepped.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.exceptions import RedisError

from engine.clock import AuctionClock, MonotonicNs
from engine.clock_board import ClockBoard
from engine.contract.clock_vote import STEP_US, ClockReport, Verdict, is_contradicted, vote
from engine.pace import REALTIME
from engine.store.protocol import StoreError

BURST: Final = 8
"""Samples at the start: enough that one of them met an idle server."""
RETRY_S: Final = 0.25
READINGS: Final = 5
ONE_INSTANT_NS: Final = 10_000_000
"""Two clocks that were read further apart are read again: between them this process may have stood still for a second."""
WALL_RETURNS_NS: Final = 60_000_000_000
"""A wall clock that stays odd for a minute was set on purpose: from then on it is a witness again, as it stands."""
OUTVOTED_AFTER_NS: Final = 4_000_000_000
"""Four looks of the others: a step of the authority they would have noticed by then as well."""
ASK_AROUND_NS: Final = 3_500_000_000
"""Long enough to hear everybody who lives twice, and for a step just before the start to be noticed by them."""
ASK_AROUND_EVERY_S: Final = 0.05
"""A statement is a sample of its author's clock that is uncertain by half of this."""
OTHERS_MIN: Final = 2
"""So many others at least, to be believed more than two witnesses of our own."""

log = structlog.get_logger()


class Witnesses:
    """The wall clock and the monotonic extrapolation of this process, beside each sample of the authority."""

    def __init__(self, clock: AuctionClock) -> None:
        self._clock = clock
        self._wall_ahead_us: int | None = None
        """How far the auction clock was ahead of the wall clock when all three last agreed."""
        self._slept_ns = 0
        """How long this machine had slept then."""
        self._wall_odd_since: MonotonicNs | None = None
        self._last = Verdict.NONE
        self.said = Verdict.NONE
        """What the last two looks that agreed have said."""

    def vote(self, sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> Verdict:
        """What the witnesses say of an authority that read `authority_us` between `sent` and `received`."""
        authority_us, wall_us, monotonic_us = self._now(sent, received, authority_us)
        slack_us = self._clock.slack_us((received - sent) // 2_000)
        slept_ns = self._clock.clock.slept_ns()
        slept_us = None if slept_ns is None else (slept_ns - self._slept_ns) // 1_000
        return vote(authority_us, wall_us, monotonic_us, slack_us=slack_us, slept_us=slept_us)

    def look(self, sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> None:
        """Take one look, before the sample is observed."""
        verdict = self.vote(sent, received, authority_us)
        self._follow_wall(verdict, received)
        if verdict is self._last:
            self.said = verdict
        self._last = verdict

    def forgive(self) -> None:
        """The estimate was given up for the authority: what was said is over."""
        self._last = self.said = Verdict.NONE

    def begin_anew(self) -> None:
        """The estimate was given up for that of others: where the wall clock stands beside it is seen at the next look."""
        self._wall_ahead_us = None
        self.forgive()

    def _now(self, sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> tuple[int, int, int]:
        """The three clocks in one instant, in microseconds."""
        now, wall_us, monotonic_us = self._machine()
        if self._wall_ahead_us is None:
            self._wall_ahead_us, self._slept_ns = monotonic_us - wall_us, self._clock.clock.slept_ns() or 0
        return authority_us + (now - (sent + received) // 2) // 1_000, wall_us + self._wall_ahead_us, monotonic_us

    def _machine(self) -> tuple[MonotonicNs, int, int]:
        """The two clocks of this machine in one instant: it in ns, the wall clock and the estimate in microseconds."""
        machine = self._clock.clock
        for _ in range(READINGS):
            before, wall_us, monotonic_us = machine.monotonic_ns(), machine.wall_ms() * 1_000, self._clock.now_us()
            now = machine.monotonic_ns()
            if now - before < ONE_INSTANT_NS:
                break
        return now, wall_us, monotonic_us

    def _follow_wall(self, verdict: Verdict, now: MonotonicNs) -> None:
        if verdict in (Verdict.WALL, Verdict.NO_MAJORITY):
            self._wall_odd_since = now if self._wall_odd_since is None else self._wall_odd_since
            if now - self._wall_odd_since < WALL_RETURNS_NS:
                return
        self._wall_odd_since = None
        if verdict in (Verdict.NONE, Verdict.WALL, Verdict.NO_MAJORITY):
            self._wall_ahead_us = self.wall_ahead_us()
        if verdict is Verdict.NONE:
            self._slept_ns = self._clock.clock.slept_ns() or 0

    def wall_ahead_us(self) -> int:
        """How far the auction clock is ahead of this machine's date, in microseconds."""
        _, wall_us, monotonic_us = self._machine()
        return monotonic_us - wall_us


class ClockSync:
    """Samples `authority_us` (Redis `TIME` and the sequenced offset) and feeds the clock.

    Args:
        board: where what the clock shows is stated and what others state is read; None: nowhere.
        is_free: whether this process holds nothing that its clock decides on, so that the clock may jump.
        judged: gets the verdict of every look.
    """

    def __init__(
        self,
        clock: AuctionClock,
        authority_us: Callable[[], Awaitable[int]],
        *,
        every_s: float = REALTIME.sample_every_s,
        board: ClockBoard | None = None,
        is_free: Callable[[], bool] = lambda: True,
        judged: Callable[[Verdict], None] = lambda _verdict: None,
    ) -> None:
        self.witnesses = Witnesses(clock)
        self.in_step = True
        """False while it is this process's own clock that is wrong."""
        self._clock = clock
        self._authority_us = authority_us
        self._every_s = every_s
        self._board = board
        self._is_free = is_free
        self._judged = judged
        self._logged = Verdict.NONE
        self._coasting_since: MonotonicNs | None = None
        self._is_away = False

    @property
    def verdict(self) -> Verdict:
        """The witness that is odd, as of the last looks."""
        return self.witnesses.said

    async def sample(self) -> bool:
        """Take one sample; False if the authority did not answer or its answer was refused as a step."""
        clock = self._clock.clock
        sent = clock.monotonic_ns()
        try:
            authority_us = await self._authority_us()
        except (RedisError, StoreError, OSError) as error:
            if not self._is_away:  # once, not four times a second for as long as it lasts
                self._is_away = True
                log.warning("clock_sample_failed", error=str(error))
            return False
        if self._is_away:
            self._is_away = False
            log.warning("clock_sampled_again")
        received = clock.monotonic_ns()
        if self._clock.synced:
            self.witnesses.look(sent, received, authority_us)
            self._judged(self.verdict)
            if self.verdict is Verdict.MONOTONIC:
                self.in_step = False
            if not self.in_step and self._is_free():
                self._step_in(sent, received, authority_us)
                return True
        return self._clock.observe(sent, received, authority_us)

    def _step_in(self, sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> None:
        before_us = self._clock.now_us()
        self._clock.adopt(sent, received, authority_us)
        self.witnesses.forgive()
        self.in_step = True
        log.warning("clock_adopted", moved_ms=(self._clock.now_us() - before_us) // 1_000)

    async def start(self) -> None:
        """Return once the clock is in step. Waits for an authority that is away."""
        taken = 0
        while taken < BURST:
            if await self.sample():
                taken += 1
                self._clock.settle()  # each time: good samples must not be steps because the first one was slow
            else:
                await asyncio.sleep(RETRY_S)
        apart_us = self.witnesses.wall_ahead_us()
        if abs(apart_us) > STEP_US:
            log.warning("wall_clock_differs", by_ms=apart_us // 1_000, advice="check time synchronisation of this host")
            if self._board is not None:
                await self._ask_around(self._board)

    async def _ask_around(self, board: ClockBoard) -> None:
        """Take the time of those who coast, if they are more than those who are in step with the authority."""
        machine = self._clock.clock
        began = previous = machine.monotonic_ns()
        heard: dict[str, ClockReport] = {}
        samples: dict[str, tuple[MonotonicNs, MonotonicNs]] = {}
        while machine.monotonic_ns() - began < ASK_AROUND_NS:
            asked = machine.monotonic_ns()
            living = await board.others()
            if not board.is_used:
                return
            for name in living:
                if name not in heard or heard[name].at != living[name].at:
                    samples[name] = (previous, machine.monotonic_ns())
            heard, previous = living, asked
            await asyncio.sleep(ASK_AROUND_EVERY_S)
        coasting = [name for name, report in heard.items() if report.verdict is Verdict.AUTHORITY]
        if not is_contradicted(Verdict.AUTHORITY, [report.verdict for report in heard.values()]) and coasting:
            name = min(coasting, key=lambda name: samples[name][1] - samples[name][0])
            before_us = self._clock.now_us()
            self._clock.adopt(*samples[name], heard[name].at * 1_000)
            self.witnesses.begin_anew()
            log.warning("clock_taken_over", of=name, moved_ms=(self._clock.now_us() - before_us) // 1_000)

    async def run(self, observed: Callable[[float], None] = lambda _ms: None) -> None:
        """Keep the clock in step until cancelled; `observed` gets the estimate's error, in ms."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.sample()
            observed(abs(self._clock.error_us()) / 1_000)
            self._say()
            if self._board is not None and self._clock.synced:
                await self._board.state(self.report(self._board.role))
                await self._heed_others(self._board)

    def report(self, role: str) -> ClockReport:
        """What there is to state about this clock."""
        clock = self._clock
        return ClockReport(
            role,
            self.witnesses.wall_ahead_us() / 1_000,
            clock.uncertainty_us() / 1_000,
            clock.error_us() / 1_000,
            clock.steps_refused,
            self.verdict,
            clock.now_ms(),
        )

    def _say(self) -> None:
        if self.verdict is not self._logged:
            self._logged = self.verdict
            log.warning("clock_verdict", odd=self.verdict.value, advice=_ADVICE[self.verdict])

    async def _heed_others(self, board: ClockBoard) -> None:
        """Whoever alone finds the authority wrong is wrong himself: a machine that stood still, wall clock and all."""
        now = self._clock.clock.monotonic_ns()
        if self.verdict is not Verdict.AUTHORITY:
            self._coasting_since = None
            return
        others = [report.verdict for report in (await board.others()).values()]
        if self._coasting_since is None:
            self._coasting_since = now
        agreeing = sum(other is Verdict.NONE for other in others)
        if now - self._coasting_since >= OUTVOTED_AFTER_NS and agreeing >= OTHERS_MIN and 2 * agreeing > len(others):
            self.in_step = False
            log.warning("clock_outvoted", others=len(others), agreeing_with_redis=agreeing)


_ADVICE: Final = {
    Verdict.NONE: "all witnesses agree again",
    Verdict.AUTHORITY: "Redis and this host disagree by over 250 ms: check time synchronisation of the Redis host",
    Verdict.WALL: "the date of this host was set: check its time synchronisation",
    Verdict.MONOTONIC: "this host slept: its shards are given away until its clock is in step",
    Verdict.NO_MAJORITY: "three clocks differ by over 250 ms each: check time synchronisation of both hosts",
}
