"""Which auction an offer stands for: the one that was registered with it last, whichever shard that lives in."""

import asyncio
from collections.abc import Collection

from engine.contract.offers import bound_in
from engine.store.protocol import ViewStore


async def auctions_of(store: ViewStore, shards: int, offer_ids: Collection[str]) -> dict[str, str]:
    """The auction of each offer; an offer that is bound to none is left out. One call per shard.

    Raises:
        StoreError: a shard cannot be read.
    """
    names = sorted(offer_ids)
    rows = await asyncio.gather(*(store.offers(shard, names) for shard in range(shards)))
    found: dict[str, str] = {}
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        bound = [each for each in map(bound_in, values) if each is not None]
        if bound:
            found[name] = max(bound).auction_id
    return found
