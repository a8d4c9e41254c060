"""The fold of the audit log: what the log alone says of every auction, and whether its ends are lawful.

It is written from the records, not with the domain's own `decide`: a fault in the one must not be copied into the other. So
the caps of requirement R15 are derived once more here. `lawful_ends_at` moves with each recorded extension, but by no more
than 15 minutes and the policy's extension at a time, and never past the total cap, whatever kind of record moved the end.

    record               ends_at   lawful_ends_at
    registered              100       100
    extended +15 min        115       115
    extended +20 min        135       130, and a breach is noted
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from engine.contract.intake import SchemaError
from engine.contract.timers import CorruptTimerError, TimerRecord, from_fields, offer_in, policy_in, to_fields
from engine.domain.auction import Auction, Registration
from engine.domain.decide import Fact
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import EXTENSION_MS_MAX, TOTAL_CAP_MS_MAX, Cap

_WITHOUT_EFFECT: Final = frozenset({Fact.BID_ACCEPTED, Fact.LATE_BID_IGNORED})


class LogGapError(Exception):
    """A record cannot be folded: what came before it is missing, or it is damaged. The message names it."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the log says of one auction. `seq` is the number of its last record."""

    record: TimerRecord
    seq: int
    lawful_ends_at: EpochMs
    breach: str | None = None
    """How the log itself breaks a cap, if it does."""

    @property
    def auction(self) -> Auction:
        """The auction as the log has it."""
        return self.record.auction

    @property
    def is_live(self) -> bool:
        """Whether it must stand among the deadlines or the pauses."""
        status = self.auction.status
        return status.is_public and not status.is_terminal

    @property
    def is_closed_early(self) -> bool:
        """Whether it was closed before the end that the log had."""
        ended_at = self.auction.ended_at
        return ended_at is not None and ended_at < self.auction.ends_at

    @property
    def lawful(self) -> TimerRecord:
        """What must stand: what the log says, with the end clipped to the caps while the auction lasts."""
        auction = self.auction
        if auction.ends_at <= self.lawful_ends_at or not self.is_live:
            return self.record
        return replace(self.record, auction=replace(auction, ends_at=self.lawful_ends_at, clipped_by=Cap.TOTAL))


def fold_record(told: Told | None, fields: Mapping[str, str]) -> Told | None:
    """What the log says of an auction after one more of its records.

    Returns:
        None if the record is about an auction whose beginning is not in the log that was read.

    Raises:
        LogGapError: the record cannot be read.
    """
    try:
        return _fold(told, fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LogGapError(f"record {fields.get('seq')} of {fields.get('auction_id')!r}: {error}") from error


def _fold(told: Told | None, fields: Mapping[str, str]) -> Told | None:
    event_type, seq = fields["event_type"], int(fields["seq"])
    if event_type in _WITHOUT_EFFECT or not fields["version"]:
        return None if told is None else replace(told, seq=seq)
    details = orjson.loads(fields["details"])
    if event_type in (Fact.REGISTERED, Fact.TOMBSTONED):
        return _begun(told, fields, details, seq)
    if told is None:
        return None
    if event_type == Fact.CORRECTED:
        return _corrected(told, details["timer"], seq)
    changed = replace(told.auction, version=int(fields["version"]), status=Status(fields["new_status"]))
    changed = _changed(changed, event_type, fields, details)
    record = replace(told.record, auction=changed)
    if event_type == Fact.EXTENDED:
        return _extended(told, record, seq, min(EXTENSION_MS_MAX, changed.policy.extension_ms))
    if event_type == Fact.OUTAGE_EXTENDED:
        return _extended(told, record, seq, EXTENSION_MS_MAX)
    if event_type == Fact.RESCHEDULED:
        # An operator's new end is bound by the cap only, whatever stood before.
        return Told(record, seq, EpochMs(min(changed.ends_at, _cap_of(changed))), _past_cap(changed, seq))
    if event_type == Fact.RESUMED:
        # A pause moves the cap itself.
        lawful = min(told.lawful_ends_at + changed.ends_at - told.auction.ends_at, _cap_of(changed))
        return Told(record, seq, EpochMs(lawful), told.breach or _past_cap(changed, seq))
    return replace(told, record=record, seq=seq)


def _begun(told: Told | None, fields: Mapping[str, str], details: Mapping[str, Any], seq: int) -> Told | None:
    auction_id, at = fields["auction_id"], EpochMs(int(fields["occurred_at"]))
    auction = told.auction if told is not None else Auction(auction_id)
    status, version = Status(fields["new_status"]), int(fields["version"])
    if fields["event_type"] == Fact.TOMBSTONED:
        auction = replace(auction, status=status, version=version, cancelled_at=at, reason=details["reason"])
    elif "policy" not in details:
        return None  # written by a version that did not record what a registration froze
    else:
        registration = Registration(
            auction_id,
            EpochMs(details["starts_at"]),
            EpochMs(details["ends_at"]),
            policy_in(orjson.dumps(details["policy"]).decode()),
            offer_in(orjson.dumps(details["offer"]).decode()),
        )
        auction = replace(
            auction, status=status, version=version, registration=registration, ends_at=registration.ends_at
        )
    record = TimerRecord(auction, fields["trace_id"], fields["correlation_id"])
    return Told(record, seq, auction.ends_at)


def _changed(auction: Auction, event_type: str, fields: Mapping[str, str], details: Mapping[str, Any]) -> Auction:
    """What a record says beyond status and version."""
    at = EpochMs(int(fields["occurred_at"]))
    match event_type:
        case Fact.ENDED:
            return replace(auction, ended_at=EpochMs(details["ends_at"]))
        case Fact.CANCELLED | Fact.OFFER_CANCELLED:
            return replace(auction, cancelled_at=at, reason=details["reason"], paused_at=None, paused_from=None)
        case Fact.PAUSED:
            return replace(auction, paused_at=at, paused_from=Status(fields["prev_status"]), reason=details["reason"])
        case Fact.RESUMED:
            return replace(
                auction,
                ends_at=EpochMs(details["ends_at"]),
                paused_total_ms=auction.paused_total_ms + int(details["paused_ms"]),
                paused_at=None,
                paused_from=None,
                reason=None,
            )
        case Fact.RESCHEDULED:
            return replace(auction, ends_at=EpochMs(details["ends_at"]))
        case Fact.EXTENDED | Fact.OUTAGE_EXTENDED:
            clipped_by = details["clipped_by"]
            return replace(
                auction,
                ends_at=EpochMs(details["ends_at"]),
                extension_count=auction.extension_count + (event_type == Fact.EXTENDED),
                clipped_by=Cap(clipped_by) if clipped_by else None,
            )
    return auction


def _extended(told: Told, record: TimerRecord, seq: int, step_max: int) -> Told:
    before, after = told.auction, record.auction
    moved = after.ends_at - before.ends_at
    lawful = min(told.lawful_ends_at + min(moved, step_max), _cap_of(after))
    breach = _past_cap(after, seq) or told.breach
    if moved > step_max:
        breach = f"record {seq} extends by {moved} ms, at most {step_max} are allowed"
    return Told(record, seq, EpochMs(lawful), breach)


def _past_cap(auction: Auction, seq: int) -> str | None:
    cap = _cap_of(auction)
    if auction.ends_at <= cap:
        return None
    return f"record {seq} moves the end to {auction.ends_at}, past the last one allowed, {cap}"


def _cap_of(auction: Auction) -> int:
    """The last end allowed: at most 24 h, and the policy's cap, from the original end, the time spent paused not counted."""
    registration = auction.registered
    return registration.ends_at + auction.paused_total_ms + min(TOTAL_CAP_MS_MAX, registration.policy.total_cap_ms)


def _corrected(told: Told, stated: Mapping[str, str], seq: int) -> Told:
    """A correction states the whole moving state anew."""
    try:
        record = from_fields({**to_fields(told.record), **stated})
    except CorruptTimerError as error:
        raise SchemaError(str(error)) from None
    assert record is not None
    auction = record.auction
    if auction.registration is None:
        return Told(record, seq, auction.ends_at)
    return Told(record, seq, EpochMs(min(auction.ends_at, _cap_of(auction))), _past_cap(auction, seq))
