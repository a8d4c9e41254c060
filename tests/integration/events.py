"""Events as producers send them."""

from typing import Any
from uuid import uuid4


def event(event_type: str, **data: Any) -> dict[str, Any]:
    """A CloudEvent with a fresh id."""
    return {"specversion": "1.0", "id": uuid4().hex, "type": event_type, "source": "tests", "data": data}


def bridged(event_type: str, **detail: Any) -> dict[str, Any]:
    """An EventBridge event with a fresh id."""
    return {"id": uuid4().hex, "detail-type": event_type, "source": "tests", "detail": detail}


def started(auction_id: str, starts_at: int, ends_at: int, **policy: Any) -> dict[str, Any]:
    """The start of an auction."""
    return event("offers.auction.started", auction_id=auction_id, starts_at=starts_at, ends_at=ends_at, policy=policy)


def bid(auction_id: str, **data: Any) -> dict[str, Any]:
    """An accepted bid with a fresh bid id."""
    return event("auctions.bid.accepted", auction_id=auction_id, **({"bid_id": uuid4().hex} | data))


def fresh_id() -> str:
    """An auction id nobody has used."""
    return f"auction-{uuid4().hex[:12]}"
