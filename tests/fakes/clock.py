"""Time for tests is the time of simulations: see `auction_timer.simulation.timeline`."""

from auction_timer.simulation.timeline import BORN_MS, EARLY_NS_MAX, Authority, ManualClock, Timeline

__all__ = ["BORN_MS", "EARLY_NS_MAX", "Authority", "ManualClock", "Timeline"]
