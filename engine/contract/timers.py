"""One auction in Redis and on the wire: the hash `auction:timer:{k}:<id>`, the `Timer` object and the `TimerTick`.

Every moving value is a plain field of the hash, readable by a person with `HGETALL`; what the registration froze is two
JSON fields, `policy` and `offer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from zlib import crc32

import orjson

from engine.contract.intake import read_offer, read_policy
from engine.contract.values import unguarded
from engine.domain.auction import Auction, Offer, Registration
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import Cap, Policy

FIELDS: Final = (
    "auction_id",
    "status",
    "version",
    "starts_at",
    "ends_at",
    "original_ends_at",
    "extension_count",
    "clipped_by",
    "paused_at",
    "paused_from",
    "paused_total_ms",
    "ended_at",
    "cancelled_at",
    "reason",
    "policy",
    "offer",
    "trace_id",
    "correlation_id",
    "checksum",
)
"""The fields of the hash, in the order in which a row is read."""

SEALED: Final = FIELDS[: FIELDS.index("policy")]
"""What the checksum is over: all that says when the auction ends. `policy` is JSON, which another version may spell anew."""


@unguarded
@dataclass(frozen=True, slots=True)
class TimerRecord:
    """An auction with the ids that follow it through every frame and audit record."""

    auction: Auction
    trace_id: str = ""
    correlation_id: str = ""


class CorruptTimerError(ValueError):
    """A timer hash cannot be read. The message names the auction and the field at fault."""


class UnsealedTimerError(CorruptTimerError):
    """A timer hash can be read, but its checksum is that of other values: an engine may not take it at its word.

    `record` is what it says. People may be shown that, until the reconciler has restored what the audit log says.
    """

    def __init__(self, record: TimerRecord) -> None:
        super().__init__(f"timer {record.auction.auction_id!r}: its values are not those that a commit wrote")
        self.record = record


def to_fields(record: TimerRecord) -> dict[str, str]:
    """All fields of the hash but the checksum; an absent value is the empty string."""
    registration = record.auction.registration
    return _sealed_fields(record.auction) | {
        "policy": orjson.dumps(registration.policy).decode() if registration else "",
        "offer": orjson.dumps(registration.offer).decode() if registration else "",
        "trace_id": record.trace_id,
        "correlation_id": record.correlation_id,
    }


def sealed(record: TimerRecord) -> dict[str, str]:
    """All fields of the hash, as a commit writes a timer whole."""
    return to_fields(record) | {"checksum": checksum(record.auction)}


def _sealed_fields(auction: Auction) -> dict[str, str]:
    registration = auction.registration
    return moving_fields(auction) | {
        "auction_id": auction.auction_id,
        "starts_at": _text(registration.starts_at if registration else None),
        "original_ends_at": _text(registration.ends_at if registration else None),
    }


def moving_fields(auction: Auction) -> dict[str, str]:
    """The fields that a change can touch."""
    return {
        "status": auction.status.value,
        "version": str(auction.version),
        "ends_at": str(auction.ends_at),
        "extension_count": str(auction.extension_count),
        "clipped_by": _text(auction.clipped_by),
        "paused_at": _text(auction.paused_at),
        "paused_from": _text(auction.paused_from),
        "paused_total_ms": str(auction.paused_total_ms),
        "ended_at": _text(auction.ended_at),
        "cancelled_at": _text(auction.cancelled_at),
        "reason": _text(auction.reason),
    }


def _text(value: int | str | None) -> str:
    return "" if value is None else str(value)


def checksum(auction: Auction) -> str:
    """The field `checksum` of an auction's hash: CRC-32 of `SEALED`, against faults and hands, not against malice."""
    fields = _sealed_fields(auction)
    return _crc([fields[name].encode() for name in SEALED])


def is_sealed(row: Sequence[bytes | None]) -> bool:
    """Whether a row of `FIELDS` has the checksum of its values, or is no timer at all.

    Every commit writes one: where there is none, somebody has taken it away.
    """
    if row[-1] is None:
        return all(value is None for value in row)
    return row[-1].decode(errors="replace") == _crc([value or b"" for value in row[: len(SEALED)]])


def _crc(values: list[bytes]) -> str:
    return f"{crc32(b'|'.join(values)):08x}"


def from_fields(fields: Mapping[str, str]) -> TimerRecord | None:
    """Read one auction from the fields of its hash. Raises as `from_row` does."""
    return from_row(to_row(fields))


def to_row(fields: Mapping[str, str]) -> list[bytes | None]:
    """The values of `FIELDS`, in their order, as a server that holds these fields gives them."""
    return [fields[name].encode() if name in fields else None for name in FIELDS]


def from_row(row: Sequence[bytes | None]) -> TimerRecord | None:
    """Read one auction from the values of `FIELDS`, in their order; None if there is no such hash.

    Raises:
        CorruptTimerError: the hash exists but cannot be read.
    """
    if all(value is None for value in row):
        return None
    try:
        record = _record([b"".decode() if value is None else value.decode() for value in row])
        _check(record.auction)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = (row[0] or b"").decode(errors="replace")
        raise CorruptTimerError(f"timer {name!r}: {error}") from None
    return record


def read_row(row: Sequence[bytes | None]) -> TimerRecord | CorruptTimerError | None:
    """As `from_row`; what cannot be read is returned as its error, because others stand beside it."""
    try:
        return from_row(row)
    except CorruptTimerError as error:
        return error


def read_sealed_row(row: Sequence[bytes | None]) -> TimerRecord | CorruptTimerError | None:
    """As `read_row`; a timer that is not sealed is an `UnsealedTimerError`."""
    timer = read_row(row)
    return UnsealedTimerError(timer) if isinstance(timer, TimerRecord) and not is_sealed(row) else timer


def _check(auction: Auction) -> None:
    """What every timer of ours satisfies, whoever wrote the hash.

    Raises:
        ValueError: it does not.
    """
    if not auction.auction_id:
        raise ValueError("the hash names no auction")
    if auction.version < 0 or auction.extension_count < 0 or auction.paused_total_ms < 0:
        raise ValueError("a count is negative")
    if not 0 <= auction.ends_at <= 2 * EPOCH_MS_MAX:
        raise ValueError(f"ends_at {auction.ends_at} is no instant")
    if auction.registration is None and auction.status.is_public:
        raise ValueError(f"{auction.status} without a policy")
    if (auction.status is Status.PAUSED) != (auction.paused_at is not None and auction.paused_from is not None):
        raise ValueError("paused_at and paused_from do not fit the status")


def _record(text: list[str]) -> TimerRecord:
    (
        auction_id, status, version, starts_at, ends_at, original_ends_at, extension_count, clipped_by,
        paused_at, paused_from, paused_total_ms, ended_at, cancelled_at, reason, policy, offer, trace_id, correlation_id, _,
    ) = text  # fmt: skip
    registration = None
    if policy:
        registration = Registration(
            auction_id,
            EpochMs(int(starts_at)),
            EpochMs(int(original_ends_at)),
            policy_in(policy),
            offer_in(offer),
        )
    auction = Auction(
        auction_id=auction_id,
        status=Status(status),
        version=int(version),
        registration=registration,
        ends_at=EpochMs(int(ends_at)),
        extension_count=int(extension_count),
        clipped_by=Cap(clipped_by) if clipped_by else None,
        paused_at=EpochMs(int(paused_at)) if paused_at else None,
        paused_from=Status(paused_from) if paused_from else None,
        paused_total_ms=int(paused_total_ms),
        ended_at=EpochMs(int(ended_at)) if ended_at else None,
        cancelled_at=EpochMs(int(cancelled_at)) if cancelled_at else None,
        reason=reason or None,
    )
    return TimerRecord(auction, trace_id, correlation_id)


# A house has few policies and, often, no offer facts: 100,000 auctions then share a handful of these immutable values,
# which makes a restart twice as fast and an engine half as large.
@lru_cache(maxsize=4_096)
def policy_in(text: str) -> Policy:
    """The policy that a JSON text states; equal texts give the same value. Raises as `read_policy` does."""
    return read_policy(orjson.loads(text))


@lru_cache(maxsize=4_096)
def offer_in(text: str) -> Offer:
    """The offer that a JSON text states; equal texts give the same value. Raises as `read_offer` does."""
    return read_offer(orjson.loads(text))


def soft_close_until(auction: Auction) -> EpochMs | None:
    """None before the soft-close window opened, then the end that now stands."""
    phase = auction.paused_from if auction.status is Status.PAUSED else auction.status
    return auction.ends_at if phase is Status.CLOSING or phase is Status.ENDED else None


def timer(record: TimerRecord, server_time: EpochMs, cursor: str | None, *, stale: bool = False) -> dict[str, Any]:
    """The `Timer` object of the outside contract, as of `server_time`."""
    auction = record.auction
    registration = auction.registered
    view: dict[str, Any] = {
        "auction_id": auction.auction_id,
        "status": auction.status.value,
        "version": auction.version,
        "starts_at": registration.starts_at,
        "ends_at": auction.ends_at,
        "original_ends_at": registration.ends_at,
        "soft_close_until": soft_close_until(auction),
        "final_deadline": auction.final_deadline,
        "extension_count": auction.extension_count,
        "extension_used_ms": auction.extension_used_ms,
        "extension_left_ms": auction.extension_left_ms,
        "at_cap": auction.at_cap,
        "remaining_ms": auction.remaining_ms(server_time),
        "server_time": server_time,
        "trace_id": record.trace_id,
        "cursor": cursor,
        "stale": stale,
    }
    optional = {
        "offer_id": registration.offer.offer_id,
        "clipped_by": auction.clipped_by,
        "paused_remaining_ms": auction.paused_remaining_ms,
        "ended_at": auction.ended_at,
        "cancelled_at": auction.cancelled_at,
        "reason": auction.reason,
    }
    view |= {name: value for name, value in optional.items() if value is not None}
    return view


def as_of(view: dict[str, Any], server_time: EpochMs, cursor: str | None, *, stale: bool = False) -> dict[str, Any]:
    """The same `Timer`, seen at another time: what a gateway does with the one it remembers."""
    frozen = view.get("paused_remaining_ms")
    remaining_ms = max(0, view["ends_at"] - server_time) if frozen is None else frozen
    return view | {"remaining_ms": remaining_ms, "server_time": server_time, "cursor": cursor, "stale": stale}


def tick_line(record: TimerRecord, server_time: EpochMs) -> bytes:
    """One line of the tick lane: `<auction_id> <version> <frame>`; a gateway splits it and never parses the frame."""
    auction = record.auction
    left_ms = auction.extension_left_ms
    frame = orjson.dumps(
        {
            "type": "timer.tick",
            "auction_id": auction.auction_id,
            "server_time": server_time,
            "trace_id": record.trace_id,
            "status": auction.status.value,
            "version": auction.version,
            "ends_at": auction.ends_at,
            "remaining_ms": auction.remaining_ms(server_time),
            "soft_close_until": soft_close_until(auction),
            "final_deadline": auction.final_deadline,
            "extension_count": auction.extension_count,
            "extension_used_ms": auction.extension_used_ms,
            "extension_left_ms": left_ms,
            "at_cap": left_ms == 0,
        }
    )
    return b"%b %d %b" % (auction.auction_id.encode(), auction.version, frame)


def mark(auction: Auction) -> int:
    """A number that tells this state of an auction from others; those of a shard's live auctions, XORed, are its digest."""
    return crc32(f"{auction.auction_id} {auction.version} {auction.status} {auction.ends_at}".encode())


@dataclass(frozen=True, slots=True)
class Holding:
    """What an engine holds of a shard: how many live auctions, as of which audit record, and the digest of them."""

    live: int
    seq: int
    digest: int


NOTHING: Final = Holding(0, 0, 0)


def heartbeat_line(instance: str, epoch: int, server_time: EpochMs, holding: Holding = NOTHING) -> bytes:
    """A line of the tick lane that is no tick: the shard's engine is alive, and this is what it holds.

    `!` cannot begin an auction id, and the time comes last: that is all a gateway reads.
    """
    return b"! %b %d %d %d %x %d" % (
        instance.encode(), epoch, holding.live, holding.seq, holding.digest, server_time,
    )  # fmt: skip
