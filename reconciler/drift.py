"""Drift: where two views of one auction differ. Pure: it is handed what was observed, and names what is wrong.

What the log says is right, because everything else is derived from it in the same atomic step; whatever says something else
was changed afterwards, by a hand or by a fault. Where the log cannot be read, the hash is believed over the sorted set.

    view                        compared with                       a difference is
    hash                        fold of the log                     HASH_*, END_PAST_CAP
    sorted set                  fold of the log                     ENTRY_*, SCORE_WRONG, CLOSED_IN_DEADLINES
    last tick on the wire       fold of the log, at its version     TICK_DIFFERS
    the engine's own view       digest of what is kept              MEMORY_DIFFERS
    fold of the log             the caps, the clock                 CAP_BREACHED, CLOSED_EARLY, OVERDUE
    the log                     its own chain, the shard's head     LOG_CONTRADICTED
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from engine.contract.timers import CorruptTimerError, TimerRecord, to_fields
from engine.domain.fold import next_due
from engine.domain.instants import HOUR_MS, EpochMs
from engine.domain.lifecycle import Status
from engine.store.protocol import Group, Standing
from reconciler.ledger import Told

DRIFT_MS_MAX: Final = 250
"""Requirement R12: above this, a wrong end is severe."""
OVERDUE_MS: Final = 3_000
"""An auction that is not closed so long after its end is nobody's work: an engine that was killed is replaced within 2 s."""
TOLD_FOR_MS: Final = 24 * HOUR_MS
"""What went wrong with an auction that is over is reported for so long; afterwards the log alone tells it."""


class Severity(StrEnum):
    """How bad a drift is."""

    NOTICE = "notice"
    """Nobody would have been told a wrong end by more than 250 ms."""
    SEVERE = "severe"
    """Somebody was, or an auction would have closed at a wrong time, or never."""


class DriftKind(StrEnum):
    """What is wrong. The names are labels of `auctions_timer_corrections_total`."""

    ENTRY_MISSING = "entry_missing"
    ENTRY_EXTRA = "entry_extra"
    SCORE_WRONG = "score_wrong"
    HASH_MISSING = "hash_missing"
    HASH_UNREADABLE = "hash_unreadable"
    HASH_CHANGED = "hash_changed"
    END_PAST_CAP = "end_past_cap"
    CAP_BREACHED = "cap_breached"
    CLOSED_IN_DEADLINES = "closed_in_deadlines"
    CLOSED_EARLY = "closed_early"
    OVERDUE = "overdue"
    TICK_DIFFERS = "tick_differs"
    LOG_MISSING = "log_missing"
    LOG_CONTRADICTED = "log_contradicted"
    MEMORY_DIFFERS = "memory_differs"
    HEARTBEAT_FROZEN = "heartbeat_frozen"
    ENGINE_SILENT = "engine_silent"
    SHARD_TAKEN_OVER = "shard_taken_over"


@dataclass(frozen=True, slots=True)
class Tick:
    """The last tick of an auction that was seen on the wire."""

    version: int
    status: str
    ends_at: int


@dataclass(frozen=True, slots=True)
class Views:
    """One auction, seen from everywhere as of one place in the log.

    `told` is None if the log says nothing of it; `log_whole` whether that is to be believed, and `seq` is then the number
    of the last record that names it.
    """

    auction_id: str
    standing: Standing
    told: Told | None
    tick: Tick | None = None
    log_whole: bool = True
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing that is wrong: `before` was found, `after` should be. `auction_id` is empty if it is about a whole shard."""

    kind: DriftKind
    shard: int
    auction_id: str = ""
    before: str = ""
    after: str = ""
    ms_moved: int = 0
    severity: Severity = Severity.SEVERE
    evidence: Mapping[str, object] = field(default_factory=dict)
    is_over: bool = False
    """Of an auction that is over nothing is changed any more."""


def compare(shard: int, views: Views, now: EpochMs) -> list[Drift]:
    """Everything that is wrong with one auction, the cause of the rest first."""
    auction_id, told = views.auction_id, views.told
    if told is None:
        return list(_without_log(shard, views))
    found: list[Drift] = []
    found += _of_log(shard, auction_id, told, now)
    found += _of_hash(shard, auction_id, told, views.standing)
    found += _of_place(shard, auction_id, told.lawful, views.standing.scores)
    if not found and views.tick is not None:
        found += _of_tick(shard, auction_id, told, views.tick)
    return found


def judge(shard: int, told: Told, now: EpochMs) -> Iterator[Drift]:
    """What the log itself says against an auction that is over, if that was lately."""
    auction = told.auction
    if max(auction.ended_at or 0, auction.cancelled_at or 0) + TOLD_FOR_MS < now:
        return
    yield from _of_caps(shard, told)
    if told.is_closed_early:
        assert auction.ended_at is not None
        yield Drift(
            DriftKind.CLOSED_EARLY,
            shard,
            auction.auction_id,
            str(auction.ended_at),
            str(auction.ends_at),
            auction.ends_at - auction.ended_at,
            evidence={"record": told.seq, "version": auction.version},
            is_over=True,
        )


def _of_caps(shard: int, told: Told) -> Iterator[Drift]:
    ends_at, lawful = told.auction.ends_at, told.lawful_ends_at
    if told.breach is not None and ends_at > lawful:
        yield Drift(
            DriftKind.CAP_BREACHED,
            shard,
            told.auction.auction_id,
            str(ends_at),
            str(lawful),
            lawful - ends_at,
            evidence={"breach": told.breach},
            is_over=not told.is_live,
        )


def _of_log(shard: int, auction_id: str, told: Told, now: EpochMs) -> Iterator[Drift]:
    auction = told.auction
    if told.is_live:
        yield from _of_caps(shard, told)
    due = next_due(auction)
    if due is not None and due[0] + OVERDUE_MS < now:
        yield Drift(
            DriftKind.OVERDUE,
            shard,
            auction_id,
            auction.status.value,
            evidence={"due_at": due[0], "now": now, "late_ms": now - due[0]},
        )


def _of_hash(shard: int, auction_id: str, told: Told, standing: Standing) -> Iterator[Drift]:
    said, record = told.record, standing.record
    # With a wrong checksum an engine would not believe it, however right it is.
    if record == said and standing.sealed:
        return
    after = str(said.auction.ends_at)
    if record is None:
        # The hash of what is over is kept for a while only.
        if told.is_live:
            yield Drift(DriftKind.HASH_MISSING, shard, auction_id, "", after)
        return
    if isinstance(record, CorruptTimerError):
        yield Drift(DriftKind.HASH_UNREADABLE, shard, auction_id, "", after, evidence={"error": str(record)})
        return
    found, right = to_fields(record), to_fields(said)
    differing = {name: [found[name], right[name]] for name in right if found[name] != right[name]}
    moved = said.auction.ends_at - record.auction.ends_at
    registration = said.auction.registration
    past_cap = registration is not None and record.auction.ends_at > said.auction.cap_ends_at
    yield Drift(
        DriftKind.END_PAST_CAP if past_cap else DriftKind.HASH_CHANGED,
        shard,
        auction_id,
        str(record.auction.ends_at),
        after,
        moved,
        _severity(moved, other=differing.keys() - {"ends_at"} or not standing.sealed),
        {"found_and_right": differing, "sealed": standing.sealed},
    )


def _severity(moved: int, other: object = ()) -> Severity:
    return Severity.SEVERE if abs(moved) > DRIFT_MS_MAX or other else Severity.NOTICE


def _of_place(shard: int, auction_id: str, said: TimerRecord, scores: Mapping[Group, int]) -> Iterator[Drift]:
    auction = said.auction
    group, score = Group.CLOSED, None
    if auction.status is Status.PAUSED:
        group, score = Group.PAUSED, auction.paused_at
    elif auction.status.is_public and not auction.status.is_terminal:
        group, score = Group.LIVE, auction.ends_at
    strayed = {name.value: at for name, at in scores.items() if name is not group}
    if group is Group.CLOSED:
        # Forgotten after a while, so it need not stand there; but it may stand nowhere else.
        if strayed:
            yield Drift(DriftKind.CLOSED_IN_DEADLINES, shard, auction_id, str(strayed), auction.status.value)
        return
    assert score is not None
    if group not in scores:
        yield Drift(DriftKind.ENTRY_MISSING, shard, auction_id, "", str(score), evidence={"set": group.value})
    elif scores[group] != score:
        moved = score - scores[group]
        yield Drift(
            DriftKind.SCORE_WRONG,
            shard,
            auction_id,
            str(scores[group]),
            str(score),
            moved,
            _severity(moved),
            {"set": group.value},
        )
    if strayed:
        yield Drift(DriftKind.ENTRY_EXTRA, shard, auction_id, str(strayed), "", evidence={"stands_in": group.value})


def _of_tick(shard: int, auction_id: str, told: Told, tick: Tick) -> Iterator[Drift]:
    auction = told.auction
    # An older tick is what was right when it was sent; the next one is at most 15 s away.
    if tick.version < auction.version or not told.is_live:
        return
    if (tick.version, tick.status, tick.ends_at) != (auction.version, auction.status.value, auction.ends_at):
        moved = auction.ends_at - tick.ends_at
        yield Drift(
            DriftKind.TICK_DIFFERS,
            shard,
            auction_id,
            str(tick.ends_at),
            str(auction.ends_at),
            moved,
            evidence={"tick": [tick.version, tick.status], "log": [auction.version, auction.status.value]},
        )


def _without_log(shard: int, views: Views) -> Iterator[Drift]:
    record, scores = views.standing.record, views.standing.scores
    shown = str({group.value: at for group, at in scores.items()})
    if record is None:
        if scores:
            kind = DriftKind.ENTRY_EXTRA if views.log_whole else DriftKind.HASH_MISSING
            yield Drift(kind, shard, views.auction_id, shown, "")
    elif isinstance(record, CorruptTimerError):
        yield Drift(DriftKind.HASH_UNREADABLE, shard, views.auction_id, "", "", evidence={"error": str(record)})
    elif views.log_whole:
        yield Drift(DriftKind.LOG_MISSING, shard, views.auction_id, shown, str(record.auction.ends_at))
    elif not views.standing.sealed:
        # What it should say nobody knows but an engine that has held it since before it was changed.
        found = str(record.auction.ends_at)
        yield Drift(DriftKind.HASH_CHANGED, shard, views.auction_id, found, "", evidence={"sealed": False})
    else:
        yield from _of_place(shard, views.auction_id, record, scores)
