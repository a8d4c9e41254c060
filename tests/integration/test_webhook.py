"""Outbound events from the commit to the webhook, as `serve` runs it."""

import asyncio
from pathlib import Path

import pytest

from engine.clock import SystemClock
from engine.contract.keys import ShardKeys
from engine.domain.instants import HOUR_MS
from tests import live
from tests.contracts.stores import until
from tests.integration.events import event, fresh_id
from tests.live import LiveStack
from tests.reconciler.webhook_server import Answer, WebhookServer

pytestmark = pytest.mark.integration

OFFER_CANCELLED = [
    "timer.cancelled",
    "offers.cancelled",
    "offers.cancellation.completed",
    "offers.payment_hold.release_requested",
    "offers.cancellation.high_value",
]


@pytest.mark.requirement("R14", "R23")
async def test_a_cancelled_offer_reaches_the_webhook(short_tmp: Path) -> None:
    """Start and cancellation of an offer's auction arrive signed and in order, though the receiver fails first."""
    async with WebhookServer() as server:
        server.answers.append(Answer(500))
        env = {"AUCTION_TIMER_WEBHOOK_URL": server.url, "AUCTION_TIMER_WEBHOOK_SECRET": "sesame-sesame-sesame"}
        stack = await asyncio.to_thread(LiveStack, short_tmp, env=env)
        try:
            # What happened before the forwarder had a place is not for this webhook.
            await asyncio.to_thread(live.until, lambda: _has_begun(stack), "every shard has its place")
            await asyncio.to_thread(_cancel_an_offer, stack, fresh_id())
            await until(lambda: len(set(server.ids)) == 2 + len(OFFER_CANCELLED), within_s=20)
        finally:
            await asyncio.to_thread(stack.stop)
    assert server.ids[0] == server.ids[1], "what failed came again"
    types = [request.event["type"] for request in server.requests[1:]]
    assert types == ["timer.started", "auction_timer_started", *OFFER_CANCELLED]
    completed = server.requests[-1].event["data"]
    assert (completed["amount_minor"], completed["currency"]) == (90_000, "EUR")
    assert all(request.headers["webhook-signature"].startswith("v1,") for request in server.requests)


def _has_begun(stack: LiveStack) -> bool:
    return all(stack.redis("HEXISTS", ShardKeys.of(shard).forwarder, "cursor") for shard in range(8))


def _cancel_an_offer(stack: LiveStack, auction_id: str) -> None:
    now = SystemClock().wall_ms()
    offer = {"offer_id": f"offer-of-{auction_id}", "owner_id": "owner-1", "maker_id": "maker-1", "buyer_id": "buyer-1"}
    money = {"amount_minor": 90_000, "currency": "EUR", "auto_reject_threshold_minor": 50_000}
    stack.post(
        event(
            "offers.auction.started",
            auction_id=auction_id,
            starts_at=now - 1_000,
            ends_at=now + HOUR_MS,
            offer_created_at=now - 1_000,
            **offer,
            **money,
        )
    )
    stack.until_status(auction_id, "ACTIVE")
    answer = stack.http.put(f"/offers/offer-of-{auction_id}/cancel", json={"reason_code": "changed_mind"})
    assert answer.status_code == 200, answer.text
