"""Tests for engine.domain.lifecycle: the table against the contract, and `decide` against the table."""

from typing import Final

import pytest

from engine.domain.decide import Fact, decide
from engine.domain.events import Register, Reschedule
from engine.domain.instants import HOUR_MS, MINUTE_MS, EpochMs
from engine.domain.lifecycle import ATTEMPTED, LIFECYCLE, Status, Trigger, Verdict
from engine.domain.refusals import RefusalCode
from tests.engine.domain.checks import check_decision
from tests.engine.domain.examples import FOR_TRIGGER, IN_STATUS, PAUSED_WHILE_CLOSING, at, registration

PRODUCT: Final = [(status, trigger) for status in Status for trigger in Trigger]

# The table a second time, as a person would draw it. A status: the auction moves there; `stay`: it counts; `same?`: no
# effect if identical; `late`: recorded only; `-`: a wake-up that no longer applies; `!`: refused, with the code below.
DRAWN: Final = """
              start   open_window  reach_deadline  register   bid       cancel     pause       resume          reschedule
UNREGISTERED  -       -            -               SCHEDULED  !unknown  TOMBSTONE  !unknown    !unknown        !unknown
TOMBSTONE     -       -            -               CANCELLED  late      !terminal  !terminal   !terminal       !terminal
SCHEDULED     ACTIVE  -            -               same?      stay      CANCELLED  !invalid    !invalid        stay
ACTIVE        -       CLOSING      -               same?      stay      CANCELLED  PAUSED      !invalid        stay
CLOSING       -       -            ENDED           same?      stay      CANCELLED  PAUSED      !invalid        CLOSING|ACTIVE
PAUSED        -       -            -               same?      stay      CANCELLED  !invalid    ACTIVE|CLOSING  !invalid
ENDED         -       -            -               same?      late      !terminal  !terminal   !terminal       !terminal
CANCELLED     -       -            -               same?      late      !terminal  !terminal   !terminal       !terminal

              withdraw
UNREGISTERED  !unknown
TOMBSTONE     !already
SCHEDULED     CANCELLED
ACTIVE        CANCELLED
CLOSING       CANCELLED
PAUSED        CANCELLED
ENDED         !closed
CANCELLED     !already
"""

WORDS: Final = {
    "stay": (Verdict.STAY, None),
    "same?": (Verdict.COMPARE, None),
    "late": (Verdict.LATE, None),
    "-": (Verdict.IGNORE, None),
    "!unknown": (Verdict.REFUSE, RefusalCode.UNKNOWN_AUCTION),
    "!invalid": (Verdict.REFUSE, RefusalCode.FSM_TRANSITION_INVALID),
    "!terminal": (Verdict.REFUSE, RefusalCode.FSM_TERMINAL_IMMUTABLE),
    "!already": (Verdict.REFUSE, RefusalCode.ALREADY_CANCELLED),
    "!closed": (Verdict.REFUSE, RefusalCode.AUCTION_CLOSED),
}


def drawn() -> dict[tuple[str, str], str]:
    """The cells of `DRAWN`, by status and trigger."""
    cells = {}
    for part in DRAWN.strip().split("\n\n"):
        header, *rows = [line.split() for line in part.splitlines()]
        cells |= {(row[0], trigger): word for row in rows for trigger, word in zip(header, row[1:], strict=True)}
    return cells


@pytest.mark.requirement("R25")
def test_the_table_is_complete() -> None:
    """Every status has a cell for every trigger, and nothing else is in the table."""
    assert set(LIFECYCLE) == set(Status)
    assert all(set(row) == set(Trigger) for row in LIFECYCLE.values())


@pytest.mark.requirement("R25")
@pytest.mark.parametrize(("status", "trigger"), PRODUCT)
def test_the_table_is_the_one_that_was_agreed(status: Status, trigger: Trigger) -> None:
    """Each cell says what the drawing of the life cycle says."""
    cell, word = LIFECYCLE[status][trigger], drawn()[status.value, trigger.value]
    if word in WORDS:
        assert (cell.verdict, cell.code) == WORDS[word]
        assert cell.to == ()
    else:
        assert cell.verdict is Verdict.MOVE
        assert cell.code is None
        assert [target.value for target in cell.to] == word.split("|")


@pytest.mark.requirement("R25")
@pytest.mark.parametrize(("status", "trigger"), PRODUCT)
def test_decide_does_what_the_cell_says(status: Status, trigger: Trigger) -> None:
    """For each status and trigger the verdict of the table is what `decide` does, no more and no less."""
    (before, instant), event = IN_STATUS[status], FOR_TRIGGER[trigger]
    assert before.status is status
    decision = decide(before, event, instant)
    assert decision.at == instant
    check_decision(before, event, decision)
    if LIFECYCLE[status][trigger].verdict is Verdict.MOVE:
        assert decision.changed


@pytest.mark.requirement("R25")
@pytest.mark.parametrize(
    ("status", "trigger"),
    [pair for pair in PRODUCT if LIFECYCLE[pair[0]][pair[1]].verdict is Verdict.REFUSE],
)
def test_a_refusal_writes_nothing(status: Status, trigger: Trigger) -> None:
    """A refused event returns the very object that came in, without a fact, naming both statuses of a 409 answer."""
    before, instant = IN_STATUS[status]
    decision = decide(before, FOR_TRIGGER[trigger], instant)
    assert decision.after is before
    assert not decision.changed
    assert decision.fact is None
    assert decision.details == {}
    assert decision.refusal is not None
    assert decision.refusal.code is LIFECYCLE[status][trigger].code
    assert decision.refusal.current_status == status.value
    assert decision.refusal.attempted_status == ATTEMPTED[trigger].value
    assert "lot-7" in decision.refusal.message


@pytest.mark.requirement("R25")
@pytest.mark.parametrize("trigger", Trigger)
@pytest.mark.parametrize("status", [status for status in Status if status.is_terminal])
def test_a_terminal_auction_is_immutable(status: Status, trigger: Trigger) -> None:
    """Nothing that can happen changes an auction that ended or was cancelled."""
    before, instant = IN_STATUS[status]
    decision = decide(before, FOR_TRIGGER[trigger], instant)
    assert decision.after is before
    assert decision.fact in (None, Fact.LATE_BID_IGNORED)


@pytest.mark.requirement("R2")
@pytest.mark.parametrize("status", [status for status in Status if status not in ("UNREGISTERED", "TOMBSTONE")])
def test_an_identical_registration_has_no_effect_in_any_status(status: Status) -> None:
    """Registering again with the same terms changes nothing and is not refused either."""
    before, instant = IN_STATUS[status]
    decision = decide(before, Register(registration()), instant)
    assert (decision.after, decision.fact, decision.refusal) == (before, None, None)
    assert decision.after is before


@pytest.mark.requirement("R2")
@pytest.mark.parametrize("status", [status for status in Status if status not in ("UNREGISTERED", "TOMBSTONE")])
def test_another_registration_conflicts_in_every_status(status: Status) -> None:
    """Registering again with other terms is refused as a conflict and changes nothing."""
    before, instant = IN_STATUS[status]
    event = Register(registration(ends_at=at(61 * MINUTE_MS)))
    decision = decide(before, event, instant)
    check_decision(before, event, decision)
    assert decision.refusal is not None
    assert decision.refusal.code is RefusalCode.CONFLICTING_REGISTRATION
    assert decision.after is before


@pytest.mark.requirement("R25")
def test_both_targets_of_a_resume_are_reached() -> None:
    """A resumed auction is back in the status it was paused from: active or closing."""
    paused, instant = IN_STATUS[Status.PAUSED]
    assert decide(paused, FOR_TRIGGER[Trigger.RESUME], instant).after.status is Status.ACTIVE
    later = at(55 * MINUTE_MS)
    assert decide(PAUSED_WHILE_CLOSING, FOR_TRIGGER[Trigger.RESUME], later).after.status is Status.CLOSING


@pytest.mark.requirement("R25")
@pytest.mark.parametrize(
    ("ends_at", "status"),
    [
        (at(64 * MINUTE_MS), Status.CLOSING),
        (at(65 * MINUTE_MS), Status.CLOSING),
        (EpochMs(at(65 * MINUTE_MS) + 1), Status.ACTIVE),
        (at(2 * HOUR_MS), Status.ACTIVE),
    ],
)
def test_both_targets_of_a_reschedule_are_reached(ends_at: EpochMs, status: Status) -> None:
    """Moving the end of a closing auction keeps it closing exactly as long as the window is still open."""
    closing, instant = IN_STATUS[Status.CLOSING]
    decision = decide(closing, Reschedule(ends_at), instant)
    assert (decision.after.status, decision.after.ends_at) == (status, ends_at)
    assert decision.after.version == closing.version + 1


@pytest.mark.requirement("R25")
def test_what_is_terminal() -> None:
    """Ended and cancelled are terminal, a tombstone is not: the late registration still turns it into a cancelled one."""
    assert {status for status in Status if status.is_terminal} == {Status.ENDED, Status.CANCELLED}


def test_what_readers_may_see() -> None:
    """An auction nobody registered is not shown, whether or not it was cancelled already."""
    hidden = {status for status in Status if not status.is_public}
    assert hidden == {Status.UNREGISTERED, Status.TOMBSTONE}


def test_every_trigger_aims_at_a_status() -> None:
    """`ATTEMPTED` names, for every trigger, a status readers may see."""
    assert set(ATTEMPTED) == set(Trigger)
    assert all(status.is_public for status in ATTEMPTED.values())


@pytest.mark.parametrize(("status", "trigger"), PRODUCT)
def test_a_move_aims_where_the_refusal_would_have_said(status: Status, trigger: Trigger) -> None:
    """Where one status is reached by a trigger that is refused elsewhere, `attempted_status` is a status it can reach."""
    reached = {target for row in LIFECYCLE.values() for target in row[trigger].to}
    if trigger is not Trigger.BID:
        assert ATTEMPTED[trigger] in reached
