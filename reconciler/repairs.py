"""Repairs: which input events bring drifted auctions back. Pure, and bounded.

A repair is an event for the shard's intake like any other. The one writer of the shard applies it, behind the guards of every
commit, so the reconciler can be wrong, late or doubled without doing harm: what has been decided meanwhile stands
(`engine.domain.correction`), and nothing closes before its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from engine.contract.intake import AUCTION_ID, Actor, CommandType, Context, Correct, IntakeEvent, encode
from engine.contract.timers import TimerRecord, to_fields
from engine.domain.correction import VERSION_MAX
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.store.protocol import Draft
from reconciler.drift import Drift, DriftKind, Views

RECONCILER: Final = Actor("system", "reconciler")

REPORTED_ONLY: Final = frozenset(
    {
        DriftKind.CLOSED_EARLY,
        DriftKind.OVERDUE,
        DriftKind.LOG_MISSING,
        DriftKind.LOG_CONTRADICTED,
        DriftKind.MEMORY_DIFFERS,
        DriftKind.HEARTBEAT_FROZEN,
        DriftKind.ENGINE_SILENT,
        DriftKind.SHARD_TAKEN_OVER,
    }
)
"""What no event can mend: a person must look. A hash without any log may be an auction, so it is never removed."""


@dataclass(frozen=True, slots=True)
class Repair:
    """One input event that mends everything found about one auction."""

    shard: int
    auction_id: str
    drifts: tuple[Drift, ...]
    draft: Draft
    correlation_id: str

    @property
    def cause(self) -> DriftKind:
        """The drift that explains the others."""
        return self.drifts[0].kind


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done about the drifts of a pass. `deferred` waits for the next one, `reported` for a person."""

    repairs: tuple[Repair, ...] = ()
    deferred: tuple[Drift, ...] = ()
    reported: tuple[Drift, ...] = ()


def plan(drifts: Sequence[Drift], views: Mapping[str, Views], repairs_max: int) -> Plan:
    """One repair for each drifted auction, at most `repairs_max`, severe ones first.

    Args:
        views: what was seen of each auction that a drift names.
    """
    by_auction: dict[str, list[Drift]] = {}
    for drift in drifts:
        if not _is_reported(drift):
            by_auction.setdefault(drift.auction_id, []).append(drift)
    ordered = sorted(by_auction.values(), key=lambda found: min(drift.severity != "severe" for drift in found))
    repairs = tuple(_repair(found, views[found[0].auction_id]) for found in ordered[:repairs_max])
    return Plan(
        repairs,
        tuple(drift for found in ordered[repairs_max:] for drift in found),
        tuple(drift for drift in drifts if _is_reported(drift)),
    )


def _highest_shown(views: Views) -> int:
    """The highest version that anybody was shown: by the hash, or by a tick, which may have told what a failover lost."""
    record, tick = views.standing.record, views.tick
    versions = [record.auction.version] if isinstance(record, TimerRecord) else []
    versions += [tick.version] if tick is not None else []
    return max((version for version in versions if 0 <= version < VERSION_MAX), default=0)


def _is_reported(drift: Drift) -> bool:
    # What can be no auction's id can be in no event either.
    return drift.is_over or drift.kind in REPORTED_ONLY or AUCTION_ID.fullmatch(drift.auction_id) is None


def _repair(drifts: Sequence[Drift], views: Views) -> Repair:
    first = drifts[0]
    record = views.standing.record
    found = record.auction if isinstance(record, TimerRecord) else None
    order = Correct(
        cause=first.kind.value,
        fields=to_fields(views.told.lawful) if views.told is not None else {},
        found_version=_highest_shown(views),
        found_ends_at=EpochMs(found.ends_at) if found is not None and 0 < found.ends_at <= EPOCH_MS_MAX else None,
        unknown=views.told is None and views.log_whole,
    )
    # The same finding asks for the same event, which the intake knows again: an engine that is away finds one, not one
    # of each pass. Once it is applied the log has one record more about the auction, so the next damage has an id of its own.
    seq = views.told.seq if views.told is not None else views.seq
    shown = repr(
        (views.auction_id, seq, order.found_version, [(each.kind, each.before, each.after) for each in drifts])
    )
    event_id = f"repair-{sha256(shown.encode()).hexdigest()[:32]}"
    trace_id = views.told.record.trace_id if views.told is not None else event_id
    correlation_id = f"rec-{event_id.removeprefix('repair-')}"
    context = Context(event_id, CommandType.CORRECTION_REQUESTED, trace_id, correlation_id, RECONCILER)
    body = encode(IntakeEvent(context, order, views.auction_id))
    return Repair(first.shard, views.auction_id, tuple(drifts), Draft(event_id, body), correlation_id)
