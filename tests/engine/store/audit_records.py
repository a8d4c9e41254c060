"""Audit records for tests: chained as the engine chains them, with contents that are odd in every way a stream can hold."""

from collections.abc import Iterable

from engine.contract.audit import ChainHead, chained
from engine.store.protocol import AuditEntry

T0 = 1_800_000_000_000


def fields(number: int, auction_id: str = "lot-1", **more: str) -> dict[str, str]:
    """What the engine records of a bid, not yet chained."""
    return {
        "event_type": "bid_accepted",
        "auction_id": auction_id,
        "actor_type": "service",
        "actor_id": "",
        "prev_status": "ACTIVE",
        "new_status": "ACTIVE",
        "version": str(number),
        "occurred_at": str(T0 + number),
        "recorded_at": str(T0 + number + 1),
        "correlation_id": f"req-{number}",
        "trace_id": "trace",
        "event_id": f"event-{number}",
        "intake_id": f"{T0 + number}-0",
        "details": f'{{"bid_id":"b-{number}"}}',
    } | more


def linked(contents: Iterable[dict[str, str]], head: ChainHead | None = None) -> list[AuditEntry]:
    """Records chained one behind the other, as they stand in a stream."""
    head, entries = head or ChainHead(), []
    for content in contents:
        head, record = chained(head, content)
        entries.append(AuditEntry(f"{T0 + head.seq}-0", record))
    return entries


def records(count: int, head: ChainHead | None = None, auctions: int = 3) -> list[AuditEntry]:
    """`count` records of a few auctions in turn."""
    start = (head or ChainHead()).seq + 1
    return linked((fields(seq, f"lot-{seq % auctions}") for seq in range(start, start + count)), head)


def head_of(entries: list[AuditEntry]) -> ChainHead:
    """The head of the chain behind these records."""
    last = entries[-1].fields
    return ChainHead(int(last["seq"]), last["hash"])
