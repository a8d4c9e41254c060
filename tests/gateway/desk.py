"""A gateway's front with somebody behind it: an engine's shard at work on the same memory store, in the same process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx

from engine.contract.intake import EventType
from engine.domain.auction import Offer, Registration
from engine.domain.events import Bid, Register
from engine.domain.instants import HOUR_MS, EpochMs
from engine.domain.policy import Policy
from engine.store.protocol import Draft
from tests.fakes.clock import BORN_MS
from tests.fakes.events import draft
from tests.fakes.world import Worker, World
from tests.gateway.front import Front
from tests.gateway.issuer import SECRET, token

OFFER: Final = Offer(
    offer_id="o-1",
    owner_id="owner-1",
    maker_id="maker-1",
    buyer_id="buyer-1",
    maker_delegate_ids=("help-1",),
    offer_created_at=EpochMs(BORN_MS - 60_000),
    amount_minor=900,
    currency="EUR",
    auto_reject_threshold_minor=500,
)
ENDS_AT: Final = EpochMs(BORN_MS + HOUR_MS)

CALLERS: Final[dict[str, dict[str, Any]]] = {
    "owner": {"sub": "owner-1"},
    "buyer": {"sub": "buyer-1"},
    "maker": {"sub": "maker-1"},
    "delegate": {"sub": "help-1"},
    "commerce admin": {"sub": "admin-1", "roles": ["commerce_admin"]},
    "operator by role": {"sub": "op-1", "roles": ["operator"]},
    "operator by scope": {"sub": "op-2", "scope": "ops"},
    "producer": {"sub": "system-1", "scope": "events:write"},
    "stranger": {"sub": "stranger-1"},
}
"""Everybody a token can make somebody, by what they are to the auction of `OFFER`."""


def bearing(caller: str) -> dict[str, str]:
    """The header of a caller's token."""
    return {"Authorization": f"Bearer {token(**CALLERS[caller])}"}


class Desk(Front):
    """A front on one shard, and the worker of that shard."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(shards=1, **settings)
        world = World()
        world.line, world.authority, world.store = self.line, self.authority, self.memory
        self.worker = Worker(world)
        self._drafts = 0

    async def append(self, *drafts: Draft) -> None:
        """Events reach the intake now, and are applied."""
        self._drafts += 1
        await self.memory.append(0, drafts, self.authority.now_ms, f"draft-{self._drafts}")
        await self.worker.work()

    async def register(
        self,
        auction_id: str = "a-1",
        offer: Offer = OFFER,
        *,
        ends_at: int = ENDS_AT,
        starts_at: int = BORN_MS - 60_000,
    ) -> None:
        """An auction is registered, by default one that runs."""
        registration = Registration(
            auction_id, EpochMs(starts_at), EpochMs(ends_at), Policy(soft_close_window_ms=0), offer
        )  # fmt: skip
        event_id = f"start-{auction_id}-{self._drafts}"
        await self.append(draft(event_id, EventType.AUCTION_STARTED, Register(registration), auction_id))

    async def park(self, *names: str, auction_id: str = "missing", reply_to: str | None = None) -> None:
        """Bids for an auction that nobody knows: they wait in troubleshooting under these ids."""
        for name in names:
            self.line.advance(1)
            bid = Bid(f"bid-{name}")
            await self.append(draft(name, EventType.BID_ACCEPTED, bid, auction_id, reply_to=reply_to))

    async def labour(self) -> None:
        """Work on whatever comes, until cancelled."""
        while True:
            await self.worker.work()
            await self.memory.read_intake({0: self.worker.shard.read_to}, 1, 1_000)

    def facts(self, auction_id: str = "a-1") -> list[str]:
        """What has happened to an auction, by its records."""
        return [record["event_type"] for record in self.memory.shards[0].audit if record["auction_id"] == auction_id]

    def last_record(self) -> dict[str, str]:
        """The record that was written last."""
        return self.memory.shards[0].audit[-1]


@asynccontextmanager
async def desk(*, tokens: bool = False, answering: bool = True, **settings: Any) -> AsyncIterator[Desk]:
    """A desk that is open. `tokens`: callers need one. `answering`: an engine is at work."""
    made = Desk(**({"jwt_secret": SECRET} if tokens else {}), **settings)
    await made.worker.begin()
    async with made.gateway.app.router.lifespan_context(made.gateway.app), made.http:
        at_work = asyncio.create_task(made.labour()) if answering else None
        try:
            yield made
        finally:
            if at_work is not None:
                at_work.cancel()
                await asyncio.gather(at_work, return_exceptions=True)


def without_ids(answer: httpx.Response) -> dict[str, Any]:
    """The body of a problem without what differs between any two requests."""
    return {name: value for name, value in answer.json().items() if name != "correlation_id"}
