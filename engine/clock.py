"""Time: the only module that reads a clock.

Two kinds of instant that must never be mixed have two types: `MonotonicNs` (this process, arbitrary origin) and `EpochMs`
(the auction clock, shared by everyone). `AuctionClock` translates between them.

The idea: one authority, Redis `TIME`. A process asks it now and then, and keeps

    authority = monotonic + offset

A sample (asked at s, answered at r, answer T) says that at the instant T the monotonic clock stood somewhere in [s, r]; the
middle is wrong by at most (r - s) / 2. So the sample with the shortest round trip is the best one, and an old sample is
worth less, because the two oscillators drift apart. The offset moves towards the best sample by at most 0.5 ms per second:
no viewer ever sees a countdown jump, and the estimate never runs backwards.

A sample further than 250 ms from the estimate is no drift but a step. It is not followed: the process coasts on its
monotonic clock and says so (`steps_refused`). Whose step it was is for `engine.clock_sync` to judge, with the wall clock
as the third witness; only if it is the monotonic clock that is wrong does the estimate jump (`adopt`).

Worked example: asked at 10.000 s, answered at 10.004 s, with T = 1,700,000,000.000 s. The middle is 10.002 s, so the
offset is 1,699,999,989.998 s, give or take 2 ms.
"""

import asyncio
import sys
import time
from collections import deque
from typing import Final, NewType, Protocol

from engine.contract.clock_vote import STEP_US
from engine.domain.instants import EpochMs

MonotonicNs = NewType("MonotonicNs", int)

SLEW_PPM: Final = 500
"""0.5 ms per second. Raising it follows the authority faster; lowering it hides its jitter better. A countdown that is
0.05 % off is not visible; NTP itself slews at the same rate (adjtime(3))."""

DRIFT_PPM: Final = 100
"""How fast two oscillators may drift apart: twice what a bad quartz does, used to age samples."""

SAMPLES_MAX: Final = 16
"""Samples kept. At one a second the best of the last 16 s counts."""


class Clock(Protocol):
    """What a process can read and wait for. The fake of the tests is hostile: random origin, drift, steps."""

    def monotonic_ns(self) -> MonotonicNs:
        """Time that never steps, from an arbitrary origin, in ns."""
        ...

    def wall_ms(self) -> EpochMs:
        """This machine's own idea of the date: a witness, never an authority."""
        ...

    def slept_ns(self) -> int | None:
        """How long this machine has been asleep since it started, in ns: the monotonic time stands still meanwhile.

        None where it cannot tell.
        """
        ...

    async def sleep_until(self, at: MonotonicNs, wake: asyncio.Event) -> None:
        """Return at `at`, or earlier when `wake` is set; early and late returns happen, so the caller looks again."""
        ...


class SystemClock:
    """The real clocks of this machine."""

    def monotonic_ns(self) -> MonotonicNs:
        return MonotonicNs(time.monotonic_ns())

    def wall_ms(self) -> EpochMs:
        return EpochMs(time.time_ns() // 1_000_000)

    def slept_ns(self) -> int | None:
        if sys.platform != "linux":
            return None
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()

    async def sleep_until(self, at: MonotonicNs, wake: asyncio.Event) -> None:
        delay_s = (at - time.monotonic_ns()) / 1e9
        if delay_s <= 0 or wake.is_set():
            # Give the loop one turn even then: a scheduler that is behind must not starve the sockets.
            await asyncio.sleep(0)
            return
        handle = asyncio.get_running_loop().call_later(delay_s, wake.set)
        try:
            await wake.wait()
        finally:
            handle.cancel()


class UnsyncedClockError(RuntimeError):
    """The auction clock was read before the first sample of its authority. Await the first `ClockSync.sample()`."""


class _Sample:
    __slots__ = ("at_us", "half_rtt_us", "offset_us")

    def __init__(self, at_us: int, offset_us: int, half_rtt_us: int) -> None:
        self.at_us = at_us
        self.offset_us = offset_us
        self.half_rtt_us = half_rtt_us

    def uncertainty_us(self, now_us: int) -> int:
        return self.half_rtt_us + (now_us - self.at_us) * DRIFT_PPM // 1_000_000


class AuctionClock:
    """This process's estimate of the auction clock.

    Feed it with `observe`; read it with `now_ms`. Reading is monotone: a later call never returns less, unless the estimate
    was found to be wrong and given up (`adopt`).
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps_refused = 0
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES_MAX)
        self._synced = False
        # The offset in force is `_from_us` at `_from_at_us`, moving towards `_goal_us` at the slew rate.
        self._from_us = 0
        self._from_at_us = 0
        self._goal_us = 0

    @property
    def synced(self) -> bool:
        """Whether at least one sample was taken."""
        return self._synced

    def observe(self, sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> bool:
        """Take one sample: `authority_us` was read somewhere between `sent` and `received`.

        Returns:
            False if it was refused as a step.
        """
        sample = _taken(sent, received, authority_us)
        at_us = sample.at_us
        if not self._synced:
            self._synced = True
            self._from_us, self._from_at_us, self._goal_us = sample.offset_us, at_us, sample.offset_us
        elif abs(sample.offset_us - self._offset_us(at_us)) > STEP_US + self.slack_us(sample.half_rtt_us):
            self.steps_refused += 1
            return False
        self._samples.append(sample)
        best = min(self._samples, key=lambda kept: kept.uncertainty_us(at_us))
        self._from_us, self._from_at_us, self._goal_us = self._offset_us(at_us), at_us, best.offset_us
        return True

    def adopt(self, sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> None:
        """Give the estimate up for this sample, at once. Only while nobody is promised anything by it."""
        self._samples.clear()
        self._synced = False
        self.observe(sent, received, authority_us)

    def settle(self) -> None:
        """Adopt the best sample at once, without slewing. Only for the start, before anyone read the clock."""
        now_us = self.clock.monotonic_ns() // 1_000
        best = min(self._samples, key=lambda kept: kept.uncertainty_us(now_us))
        self._from_us, self._from_at_us, self._goal_us = best.offset_us, now_us, best.offset_us

    def now_us(self) -> int:
        """The auction clock, in microseconds.

        Raises:
            UnsyncedClockError: no sample was taken yet.
        """
        if not self._synced:
            raise UnsyncedClockError("the auction clock has not heard from its authority yet")
        mono_us = self.clock.monotonic_ns() // 1_000
        return mono_us + self._offset_us(mono_us)

    def now_ms(self) -> EpochMs:
        """The auction clock, in milliseconds, rounded down: an instant is never reported before it is reached."""
        return EpochMs(self.now_us() // 1_000)

    def monotonic_at(self, instant: EpochMs) -> MonotonicNs:
        """When, on this process's monotonic clock, `instant` will be reached, as far as one can tell now."""
        now_us = self.now_us()
        return MonotonicNs(self.clock.monotonic_ns() + (instant * 1_000 - now_us) * 1_000)

    def error_us(self) -> int:
        """How far the offset in force is from the best sample, in microseconds: what is still to be slewed."""
        return self._goal_us - self._offset_us(self.clock.monotonic_ns() // 1_000)

    def uncertainty_us(self) -> int:
        """Half the round trip of the best sample, aged, in microseconds: the bound of this estimate's own error."""
        now_us = self.clock.monotonic_ns() // 1_000
        return min((sample.uncertainty_us(now_us) for sample in self._samples), default=0)

    def slack_us(self, half_rtt_us: int) -> int:
        """By how much a sample may be off, beside drift and steps, because it and the estimate's own were on their way."""
        # The estimate itself may be wrong by so much: a slow first sample must not make a step of every good one.
        return half_rtt_us + min((kept.half_rtt_us for kept in self._samples), default=0)

    def _offset_us(self, mono_us: int) -> int:
        reach_us = (mono_us - self._from_at_us) * SLEW_PPM // 1_000_000
        missing_us = self._goal_us - self._from_us
        return self._from_us + max(-reach_us, min(reach_us, missing_us))


def _taken(sent: MonotonicNs, received: MonotonicNs, authority_us: int) -> _Sample:
    half_rtt_us = (received - sent) // 2_000
    return _Sample(received // 1_000, authority_us - (sent // 1_000 + half_rtt_us), half_rtt_us)
