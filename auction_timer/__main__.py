"""`python -m auction_timer` is the command `auction-timer`."""

from auction_timer.cli import main

main()
