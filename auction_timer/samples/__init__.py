"""Data that comes with the package: a few real auctions to replay (see `auction_timer.replay.history.sample_path`)."""
