"""Where auctions are kept: one protocol, a memory and a Redis implementation, one contract suite for both."""
