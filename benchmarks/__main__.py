"""Run the benchmarks: `python -m benchmarks [NAME ...] [--smoke] [--no-save]`."""

import argparse
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks import (
    closing,
    engines,
    failover,
    fanout,
    fanout_delivery,
    fanout_storm,
    intake,
    reconcile,
    recovery,
    simulation,
)
from benchmarks.harness import run

SIZES: dict[str, tuple[Callable[..., Awaitable[dict[str, Any]]], dict[str, Any], dict[str, Any] | None]] = {
    "closing": (closing.measure, {"auctions": 100}, {"auctions": 10}),
    "engines": (engines.measure, {"seconds": 120.0, "auctions": 200, "runs": 3}, {"seconds": 4.0, "auctions": 12}),
    "failover": (
        failover.measure,
        {"runs": 10, "auctions": 100},
        # Auctions must end before, during and after an outage of seconds, on seven servers of their own: half a minute.
        None,
    ),
    "fanout": (
        fanout.measure,
        {"sizes": [1_000, 10_000], "rounds": 9, "deliveries": 100_000},
        {"sizes": [50], "rounds": 2, "deliveries": 200},
    ),
    "fanout_delivery": (
        fanout_delivery.measure,
        {"sockets": 1_000, "seconds": 10.0, "rounds": 5},
        {"sockets": 40, "seconds": 0.5, "rounds": 1},
    ),
    "fanout_storm": (
        fanout_storm.measure,
        {"sockets": 5_000, "seconds": 20.0, "missed": 300},
        {"sockets": 50, "seconds": 2.0, "missed": 10},
    ),
    "intake": (
        intake.measure,
        {"events": 100_000, "rate": 10_500, "seconds": 10.0},
        {"events": 1_000, "rate": 500, "seconds": 0.5},
    ),
    "reconcile": (
        reconcile.measure,
        {"auctions": 10_000, "seconds": 15.0},
        {"auctions": 200, "seconds": 0.5},
    ),
    "recovery": (recovery.measure, {"sizes": [100_000, 1_000_000]}, {"sizes": [1_000]}),
    "simulation": (
        simulation.measure,
        {"seeds": 1_000, "auctions": 1_000, "days": 7.0},
        {"seeds": 4, "auctions": 5, "days": 0.1},
    ),
}
"""Each benchmark with its full size and its smoke size, in which the test suite runs it so that it cannot rot; None where
even the smallest takes too long for that."""


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SIZES, []], help="which; all if none is named")
    parser.add_argument("--smoke", action="store_true", help="the size the test suite uses; nothing is saved")
    parser.add_argument("--no-save", action="store_true", help="print only, do not write benchmarks/results/")
    options = parser.parse_args()
    for name in options.names or SIZES:
        measure, full, smoke = SIZES[name]
        size = smoke if options.smoke else full
        if size is None:
            print(f"{name}: has no smoke size")
            continue
        run(measure(**size, save=not (options.smoke or options.no_save)))


if __name__ == "__main__":
    main()
