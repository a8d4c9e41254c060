"""Audit records: who did what to which auction when, each chained to the one before it by SHA-256 (requirement B7).

    hash = SHA-256( canonical JSON of every other field, `seq` and `prev_hash` included )

All values are strings, because that is what a Redis stream holds; canonical means sorted keys, no spaces, UTF-8. The
chain runs per shard, from `GENESIS`. Anyone can check it with a JSON library and SHA-256: changing, removing or
re-ordering one record breaks the chain at that record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import orjson

from engine.contract.intake import COMMAND_WITHIN, Actor, readable
from engine.contract.timers import moving_fields
from engine.contract.values import unguarded
from engine.domain.decide import Decision, Fact
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status

GENESIS: Final = "0" * 64
"""`prev_hash` of the first record of a shard."""


@unguarded
@dataclass(frozen=True, slots=True)
class ChainHead:
    """The last record of a shard's chain."""

    seq: int = 0
    hash: str = GENESIS


def record_hash(fields: Mapping[str, str]) -> str:
    """The hash a record must carry, from all its fields but `hash`."""
    content = dict(fields)
    content.pop("hash", None)
    return sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def chained(head: ChainHead, fields: dict[str, str]) -> tuple[ChainHead, dict[str, str]]:
    """Link a record to the chain: the new head, and the record with `seq`, `prev_hash` and `hash`."""
    seq = head.seq + 1
    linked = fields | {"seq": str(seq), "prev_hash": head.hash}
    linked["hash"] = sha256(orjson.dumps(linked, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return ChainHead(seq, linked["hash"]), linked


def record(
    decision: Decision,
    *,
    actor: Actor,
    event_id: str,
    intake_id: str,
    trace_id: str,
    correlation_id: str,
    recorded_at: EpochMs,
    submitted_by: str | None = None,
) -> dict[str, str]:
    """The audit record of a decision that has a fact, not yet chained (fields of requirement R26, and our own).

    `submitted_by` is whose token an event came with: it is recorded where that is somebody else than the event names.
    """
    assert decision.fact is not None
    before, after = decision.before.status, decision.after.status
    kept = _kept(decision)
    details: Mapping[str, object] = decision.details | kept if kept else decision.details
    if submitted_by is not None and submitted_by != actor.id:
        details = {**details, "submitted_by": submitted_by}
    return {
        "event_type": decision.fact.value,
        "auction_id": decision.after.auction_id,
        "actor_type": actor.type,
        "actor_id": actor.id,
        "prev_status": "" if before is Status.UNREGISTERED else before.value,
        "new_status": after.value,
        "version": str(decision.after.version),
        "occurred_at": str(decision.at),
        "recorded_at": str(recorded_at),
        "correlation_id": correlation_id,
        "trace_id": trace_id,
        "event_id": event_id,
        "intake_id": intake_id,
        "details": orjson.dumps(details).decode(),
    }


def _kept(decision: Decision) -> dict[str, object]:
    """What a later fold of the log needs beyond the details: what a registration froze, what a correction stated."""
    registration = decision.after.registration
    if decision.fact is Fact.REGISTERED and registration is not None:
        return {"starts_at": registration.starts_at, "policy": registration.policy, "offer": registration.offer}
    if decision.fact is Fact.CORRECTED:
        return {"timer": moving_fields(decision.after)}
    return {}


def operation(
    event_type: str,
    *,
    auction_id: str,
    prev_status: str,
    new_status: str,
    actor: Actor,
    event_id: str,
    intake_id: str,
    trace_id: str,
    correlation_id: str,
    occurred_at: EpochMs,
    recorded_at: EpochMs,
    details: Mapping[str, object],
) -> dict[str, str]:
    """The audit record of what an operator did to a command, not yet chained. It has no version: no auction changed."""
    return {
        "event_type": event_type,
        "auction_id": auction_id,
        "actor_type": actor.type,
        "actor_id": actor.id,
        "prev_status": prev_status,
        "new_status": new_status,
        "version": "",
        "occurred_at": str(occurred_at),
        "recorded_at": str(recorded_at),
        "correlation_id": correlation_id,
        "trace_id": trace_id,
        "event_id": event_id,
        "intake_id": intake_id,
        "details": orjson.dumps(details).decode(),
    }


def as_json(fields: Mapping[str, str]) -> dict[str, object]:
    """A record for readers of JSON: numbers as numbers, `details` as an object, nothing as null.

    The hash is over the strings: a number is written in decimal digits, `details` as compact JSON, null as "".
    """
    shown: dict[str, object] = {name: _text(value) or None for name, value in fields.items()}
    for name in ("shard", "seq", "version", "occurred_at", "recorded_at"):
        value = fields.get(name, "")
        # A number is what is written the one way that numbers are, so that an altered record stays one that differs, and
        # what every reader of JSON can hold: 2**53 has 16 digits.
        if len(value) < 16 and value.isascii() and value.isdigit() and str(int(value)) == value:
            shown[name] = int(value)
    details = fields.get("details") or "{}"
    shown["details"] = readable(details.encode(errors="surrogateescape"), levels_around=COMMAND_WITHIN)
    return shown


def _text(value: str) -> str:
    """A value that can be shown: bytes that are no UTF-8 are U+FFFD in it."""
    return value if value.isascii() else value.encode(errors="surrogateescape").decode(errors="replace")


OPERATOR_CANCEL: Final = "OPERATOR_CANCEL"
OPERATOR_RETRY: Final = "OPERATOR_RETRY"
CLOCK_CORRECTED: Final = "clock_corrected"
"""The clock of the shard's Redis stepped, and what is added to it was set anew."""
ENTRY_REMOVED: Final = "deadline_entry_removed"
"""A sorted set named an auction that the log knows nothing of."""


def verify(records: list[dict[str, str]], head: ChainHead | None = None) -> int | None:
    """Walk consecutive records from `head` (the genesis by default); the `seq` of the first broken link, or None."""
    head = head or ChainHead()
    for fields in records:
        expected_seq = head.seq + 1
        if (
            fields.get("seq") != str(expected_seq)
            or fields.get("prev_hash") != head.hash
            or fields.get("hash") != record_hash(fields)
        ):
            return expected_seq
        head = ChainHead(expected_seq, fields["hash"])
    return None
