"""What must hold for every decision, whatever led to it."""

from engine.domain.auction import Auction
from engine.domain.decide import Decision, Fact
from engine.domain.events import Event, Reschedule, Withdraw
from engine.domain.lifecycle import ATTEMPTED, LIFECYCLE, Verdict
from engine.domain.refusals import RefusalCode

# Requirement R15, in its own words: not the constants of the domain, which could be wrong.
_INCREMENT_MS = 15 * 60 * 1_000
_TOTAL_MS = 24 * 60 * 60 * 1_000

_UNREACHABLE_END = {
    RefusalCode.SCHEDULE_IN_PAST,
    RefusalCode.SCHEDULE_BEFORE_START,
    RefusalCode.SCHEDULE_BEYOND_CAP,
}
_OUT_OF_REACH = _UNREACHABLE_END | {RefusalCode.WINDOW_EXPIRED}
"""Refusals that name instants; the others name the auction."""


def check_decision(before: Auction, event: Event, decision: Decision) -> None:
    """`decision` is what the cell of the life-cycle table says, and keeps the promises every decision makes."""
    _check_promises(before, decision)
    cell = LIFECYCLE[before.status][event.trigger]
    if cell.verdict in (Verdict.MOVE, Verdict.STAY):
        if isinstance(event, Reschedule) and not decision.changed:
            _check_reschedule_without_effect(before, event, decision)
        elif isinstance(event, Withdraw) and not decision.changed:
            _check_refused(before, event, decision)
            assert decision.refusal is not None
            assert decision.refusal.code is RefusalCode.WINDOW_EXPIRED
        else:
            assert decision.fact is not None
            assert decision.after.status in (cell.to or (before.status,))
    elif cell.verdict is Verdict.LATE:
        assert decision.after is before
        assert decision.fact is Fact.LATE_BID_IGNORED
    elif cell.verdict is Verdict.REFUSE:
        _check_refused(before, event, decision)
        assert decision.refusal is not None
        assert decision.refusal.code is cell.code
    elif cell.verdict is Verdict.COMPARE and decision.refusal is not None:
        _check_refused(before, event, decision)
        assert decision.refusal.code is RefusalCode.CONFLICTING_REGISTRATION
    else:
        assert decision.after is before
        assert decision.fact is None
        assert decision.refusal is None


def _check_promises(before: Auction, decision: Decision) -> None:
    after = decision.after
    assert decision.before is before
    assert decision.fact is None or decision.refusal is None, "a fact and a refusal at once"
    assert decision.fact is not None or after is before, "no fact, yet something changed"
    assert decision.changed == (after is not before)
    if decision.changed:
        assert after.version == before.version + 1, "a change is exactly one version"
        assert not before.status.is_terminal, "a terminal auction changed"
    assert (after.status == "PAUSED") == (after.paused_at is not None) == (after.paused_from is not None)
    assert (after.status == "ENDED") == (after.ended_at is not None)
    assert (after.status in ("CANCELLED", "TOMBSTONE")) == (after.cancelled_at is not None)


def _check_refused(before: Auction, event: Event, decision: Decision) -> None:
    assert decision.after is before
    assert decision.refusal is not None
    assert decision.refusal.current_status == before.status.value
    assert decision.refusal.attempted_status == ATTEMPTED[event.trigger].value
    assert before.auction_id in decision.refusal.message or decision.refusal.code in _OUT_OF_REACH


def _check_reschedule_without_effect(before: Auction, event: Reschedule, decision: Decision) -> None:
    if decision.refusal is None:
        assert event.ends_at == before.ends_at
    else:
        _check_refused(before, event, decision)
        assert decision.refusal.code in _UNREACHABLE_END


def check_auction(auction: Auction, paused_ms: int) -> None:
    """The caps of requirement R15 hold for a registered auction that has been paused for `paused_ms` in all."""
    registered = auction.registered
    cap_ms = min(registered.policy.total_cap_ms, _TOTAL_MS)
    assert auction.ends_at <= registered.ends_at + paused_ms + cap_ms
    assert 0 <= auction.extension_used_ms <= cap_ms
    assert auction.extension_left_ms >= 0
    if registered.policy.max_extensions is not None:
        assert auction.extension_count <= registered.policy.max_extensions


def check_extension(decision: Decision) -> None:
    """One extension moves the end forward, by at most 15 minutes and at most the policy's own step."""
    moved_ms = decision.after.ends_at - decision.before.ends_at
    assert 0 < moved_ms <= min(_INCREMENT_MS, decision.before.policy.extension_ms)
    assert decision.after.extension_count == decision.before.extension_count + 1
    assert decision.details["previous_ends_at"] == decision.before.ends_at
    assert decision.details["ends_at"] == decision.after.ends_at
