"""How often an engine looks, although nothing has called it: the periods of its loops, in one place."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Pace:
    """Periods of an engine. The defaults are those of a real one; a simulated week is idle most of the time and looks less.

    None of them decides anything: a longer period costs lateness after a fault, never correctness.
    """

    sample_every_s: float = 1.0
    """Between two samples of the authority's clock."""
    look_again_ms: int = 1_000
    """The scheduler's longest sleep. Lower costs wake-ups, higher lets a lost timer go unnoticed for longer."""
    tick_round_ms: int = 0
    """Between two rounds of ticks, at least: what is due meanwhile ticks with the next one. 0 keeps the phase of each."""
    heartbeat_ms: int = 1_000
    """Between two heartbeats on the tick lane."""
    read_block_ms: int = 1_000
    """The longest wait of one read of the intake."""
    read_again_ms: int = 20
    """The same while a shard is left out of it: the others' next look must not come much later."""
    observe_every_s: float = 2.0
    """Between two looks at the gauges."""


REALTIME: Final = Pace()
