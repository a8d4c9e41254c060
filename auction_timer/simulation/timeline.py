"""Time that passes only when told to, and that every clock shows differently.

One `Timeline` is what really happens. A `ManualClock` is one machine's view of it: its monotonic clock starts at a random
origin and runs at its own rate, its wall clock is somewhere and steps. The authority (Redis `TIME`) is a view as well.
Nothing here sleeps: on an ordinary event loop somebody calls `advance`; on a `VirtualLoop` (auction_timer.simulation.loop)
time passes by itself as soon as nobody has anything left to do.
"""

import asyncio
import heapq
import random
from collections.abc import Callable
from itertools import count
from typing import Final

from engine.clock import MonotonicNs
from engine.domain.instants import EpochMs

BORN_MS: Final = EpochMs(1_800_000_000_000)
"""What the authority's clock shows when a timeline begins."""
EARLY_NS_MAX: Final = 1_000_000
"""How much too early a hostile sleep ends: uvloop's `call_at` fires up to its resolution, 1 ms, before its time."""


class Timeline:
    """What really happens: nanoseconds since the beginning, and what is to happen at which of them."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = count()
        self._revocable: set[int] = set()
        self._revoked: set[int] = set()

    @property
    def now_ms(self) -> EpochMs:
        """The true time, as an undisturbed authority would tell it, rounded down."""
        return EpochMs(BORN_MS + self.now_ns // 1_000_000)

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when time reaches `at_ns`; what is returned takes that back."""
        serial = next(self._serial)
        self._revocable.add(serial)
        heapq.heappush(self._waiting, (at_ns, serial, callback))

        def take_back() -> None:
            if serial in self._revocable:
                self._revocable.remove(serial)
                self._revoked.add(serial)

        return take_back

    def call_in(self, ms: float, callback: Callable[[], None]) -> None:
        """Call `callback` in `ms` milliseconds."""
        heapq.heappush(self._waiting, (self.now_ns + round(ms * 1_000_000), next(self._serial), callback))

    @property
    def next_ns(self) -> int | None:
        """When the next callback is due."""
        waiting = self._waiting
        while waiting and waiting[0][1] in self._revoked:
            self._revoked.remove(heapq.heappop(waiting)[1])
        return waiting[0][0] if waiting else None

    def advance_to(self, at_ns: int) -> None:
        """Let time pass up to `at_ns`; what is due on the way happens in its order, each at its own time."""
        waiting = self._waiting
        while waiting and waiting[0][0] <= at_ns:
            due_ns, serial, callback = heapq.heappop(waiting)
            if serial in self._revoked:
                self._revoked.remove(serial)
                continue
            self._revocable.discard(serial)
            if due_ns > self.now_ns:
                self.now_ns = due_ns
            callback()
        if at_ns > self.now_ns:
            self.now_ns = at_ns

    def advance(self, ms: float) -> None:
        """Let `ms` milliseconds pass."""
        self.advance_to(self.now_ns + round(ms * 1_000_000))


class ManualClock:
    """Implements `engine.clock.Clock`: one machine's clocks on a timeline.

    Args:
        timeline: shared by machines that live at the same time.
        seed: decides the origin, and the whims of a hostile sleep.
        drift_ppm: how much faster than real time the monotonic clock runs.
        hostile: sleeps may end up to a millisecond early, as real timers do.
    """

    def __init__(
        self, timeline: Timeline | None = None, *, seed: int = 0, drift_ppm: int = 0, hostile: bool = True
    ) -> None:
        self.timeline = timeline or Timeline()
        self.drift_ppm = drift_ppm
        self._random = random.Random(seed)  # noqa: S311 - what is wanted is a sequence that a seed repeats
        self._origin_ns = self._random.randrange(10**15)
        self._wall_ms = BORN_MS + self._random.randrange(-200, 200)
        self._hostile = hostile
        self.slept_ms = 0
        """For how long the monotonic clock stood still, as far as the machine knows."""

    def monotonic_ns(self) -> MonotonicNs:
        now_ns = self.timeline.now_ns
        return MonotonicNs(self._origin_ns + now_ns + now_ns * self.drift_ppm // 1_000_000)

    def wall_ms(self) -> EpochMs:
        return EpochMs(self._wall_ms + self.timeline.now_ns // 1_000_000)

    def slept_ns(self) -> int | None:
        return self.slept_ms * 1_000_000

    def step_wall(self, ms: int) -> None:
        """Somebody sets the date."""
        self._wall_ms += ms

    def advance(self, ms: float) -> None:
        """Let `ms` milliseconds pass, for everyone on the timeline."""
        self.timeline.advance(ms)

    async def sleep_until(self, at: MonotonicNs, wake: asyncio.Event) -> None:
        left_ns = at - self.monotonic_ns()
        if left_ns <= 0 or wake.is_set():
            await asyncio.sleep(0)
            return
        if self._hostile and left_ns > EARLY_NS_MAX and self._random.random() < 0.4:
            left_ns -= self._random.randrange(EARLY_NS_MAX)
        # One nanosecond more than the drift says, so that rounding cannot leave a sleeper short of its time for ever.
        real_ns = left_ns * 1_000_000 // (1_000_000 + self.drift_ppm) + 1
        take_back = self.timeline.call_at(self.timeline.now_ns + real_ns, wake.set)
        try:
            await wake.wait()
        finally:
            take_back()


class Authority:
    """The authority's clock (Redis `TIME`) on a timeline; it may be set, as somebody's wall clock can."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.offset_us = 0

    def __call__(self) -> int:
        """Microseconds since the Unix epoch."""
        return BORN_MS * 1_000 + self._timeline.now_ns // 1_000 + self.offset_us

    @property
    def now_ms(self) -> EpochMs:
        """The same in milliseconds, rounded down."""
        return EpochMs(self() // 1_000)

    def step(self, ms: int) -> None:
        """Somebody sets the date of the Redis host."""
        self.offset_us += ms * 1_000
