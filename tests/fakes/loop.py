"""The event loop of tests on virtual time is the one of simulations: see `auction_timer.simulation.loop`."""

from auction_timer.simulation.loop import NothingEndsError, NothingWillHappenError, run

__all__ = ["NothingEndsError", "NothingWillHappenError", "run"]
