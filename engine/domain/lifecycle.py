"""The life cycle of an auction, as one complete table.

Rules of this file:

1. Everything that decides whether an auction may change its status stands in `LIFECYCLE`; no `if` elsewhere adds a way.
2. Every status has a cell for every trigger, also where nothing can happen. A test walks the full product.

    UNREGISTERED ─▶ SCHEDULED ─▶ ACTIVE ⇄ CLOSING ─▶ ENDED
         │              │           │ ⇅      ⇅ │
         ▼              │           │ PAUSED   │
     TOMBSTONE          ▼           ▼   ▼      ▼
         └──────────▶ CANCELLED ◀────────────────

`UNREGISTERED` and `TOMBSTONE` are never shown outside: the first is an auction nobody has heard of, the second one that
was cancelled before its start arrived (requirement R19). `CLOSING ─▶ ACTIVE` happens only when an operator moves the end
so far that the soft-close window is no longer open; a bid never re-opens the quiet phase.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from engine.domain.refusals import RefusalCode


class Status(StrEnum):
    """Where an auction stands."""

    UNREGISTERED = "UNREGISTERED"
    TOMBSTONE = "TOMBSTONE"
    SCHEDULED = "SCHEDULED"
    ACTIVE = "ACTIVE"
    CLOSING = "CLOSING"
    PAUSED = "PAUSED"
    ENDED = "ENDED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can change any more (requirement R25)."""
        return self is Status.ENDED or self is Status.CANCELLED

    @property
    def is_public(self) -> bool:
        """Whether readers may see an auction in this status; the others answer "not found"."""
        return self is not Status.UNREGISTERED and self is not Status.TOMBSTONE


class Trigger(StrEnum):
    """What can happen to an auction. The first three are done by time, the rest by events."""

    START = "start"
    OPEN_WINDOW = "open_window"
    REACH_DEADLINE = "reach_deadline"
    REGISTER = "register"
    BID = "bid"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RESCHEDULE = "reschedule"
    WITHDRAW = "withdraw"


class Verdict(StrEnum):
    """What a cell of the table says."""

    MOVE = "move"
    """The status changes to one of `to`; a named guard in `decide` picks which where there are two."""
    STAY = "stay"
    """The event counts, the status stays."""
    COMPARE = "compare"
    """A registration again: no effect if identical, else refused."""
    LATE = "late"
    """A bid after the end: recorded, without effect on the timer."""
    IGNORE = "ignore"
    """A wake-up that no longer applies: nothing happens, nothing is written."""
    REFUSE = "refuse"
    """Refused with `code`; nothing is written."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table."""

    verdict: Verdict
    to: tuple[Status, ...] = ()
    code: RefusalCode | None = None


def _move(*to: Status) -> Cell:
    return Cell(Verdict.MOVE, to)


_STAY: Final = Cell(Verdict.STAY)
_COMPARE: Final = Cell(Verdict.COMPARE)
_LATE: Final = Cell(Verdict.LATE)
_IGNORE: Final = Cell(Verdict.IGNORE)
_UNKNOWN: Final = Cell(Verdict.REFUSE, code=RefusalCode.UNKNOWN_AUCTION)
_INVALID: Final = Cell(Verdict.REFUSE, code=RefusalCode.FSM_TRANSITION_INVALID)
_IMMUTABLE: Final = Cell(Verdict.REFUSE, code=RefusalCode.FSM_TERMINAL_IMMUTABLE)

_ALREADY: Final = Cell(Verdict.REFUSE, code=RefusalCode.ALREADY_CANCELLED)
_CLOSED: Final = Cell(Verdict.REFUSE, code=RefusalCode.AUCTION_CLOSED)

_CANCELLED: Final = _move(Status.CANCELLED)

LIFECYCLE: Final[dict[Status, dict[Trigger, Cell]]] = {
    Status.UNREGISTERED: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _move(Status.SCHEDULED),
        Trigger.BID: _UNKNOWN,
        Trigger.CANCEL: _move(Status.TOMBSTONE),
        Trigger.PAUSE: _UNKNOWN,
        Trigger.RESUME: _UNKNOWN,
        Trigger.RESCHEDULE: _UNKNOWN,
        Trigger.WITHDRAW: _UNKNOWN,
    },
    Status.TOMBSTONE: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _CANCELLED,
        Trigger.BID: _LATE,
        Trigger.CANCEL: _IMMUTABLE,
        Trigger.PAUSE: _IMMUTABLE,
        Trigger.RESUME: _IMMUTABLE,
        Trigger.RESCHEDULE: _IMMUTABLE,
        Trigger.WITHDRAW: _ALREADY,
    },
    Status.SCHEDULED: {
        Trigger.START: _move(Status.ACTIVE),
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _COMPARE,
        Trigger.BID: _STAY,
        Trigger.CANCEL: _CANCELLED,
        Trigger.PAUSE: _INVALID,
        Trigger.RESUME: _INVALID,
        Trigger.RESCHEDULE: _STAY,
        Trigger.WITHDRAW: _CANCELLED,
    },
    Status.ACTIVE: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _move(Status.CLOSING),
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _COMPARE,
        Trigger.BID: _STAY,
        Trigger.CANCEL: _CANCELLED,
        Trigger.PAUSE: _move(Status.PAUSED),
        Trigger.RESUME: _INVALID,
        Trigger.RESCHEDULE: _STAY,
        Trigger.WITHDRAW: _CANCELLED,
    },
    Status.CLOSING: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _move(Status.ENDED),
        Trigger.REGISTER: _COMPARE,
        Trigger.BID: _STAY,
        Trigger.CANCEL: _CANCELLED,
        Trigger.PAUSE: _move(Status.PAUSED),
        Trigger.RESUME: _INVALID,
        Trigger.RESCHEDULE: _move(Status.CLOSING, Status.ACTIVE),
        Trigger.WITHDRAW: _CANCELLED,
    },
    Status.PAUSED: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _COMPARE,
        Trigger.BID: _STAY,
        Trigger.CANCEL: _CANCELLED,
        Trigger.PAUSE: _INVALID,
        Trigger.RESUME: _move(Status.ACTIVE, Status.CLOSING),
        # The end of a paused auction is a remaining time, not an instant: resume it first.
        Trigger.RESCHEDULE: _INVALID,
        Trigger.WITHDRAW: _CANCELLED,
    },
    Status.ENDED: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _COMPARE,
        Trigger.BID: _LATE,
        Trigger.CANCEL: _IMMUTABLE,
        Trigger.PAUSE: _IMMUTABLE,
        Trigger.RESUME: _IMMUTABLE,
        Trigger.RESCHEDULE: _IMMUTABLE,
        Trigger.WITHDRAW: _CLOSED,
    },
    Status.CANCELLED: {
        Trigger.START: _IGNORE,
        Trigger.OPEN_WINDOW: _IGNORE,
        Trigger.REACH_DEADLINE: _IGNORE,
        Trigger.REGISTER: _COMPARE,
        Trigger.BID: _LATE,
        Trigger.CANCEL: _IMMUTABLE,
        Trigger.PAUSE: _IMMUTABLE,
        Trigger.RESUME: _IMMUTABLE,
        Trigger.RESCHEDULE: _IMMUTABLE,
        Trigger.WITHDRAW: _ALREADY,
    },
}

ATTEMPTED: Final[dict[Trigger, Status]] = {
    Trigger.START: Status.ACTIVE,
    Trigger.OPEN_WINDOW: Status.CLOSING,
    Trigger.REACH_DEADLINE: Status.ENDED,
    Trigger.REGISTER: Status.SCHEDULED,
    Trigger.BID: Status.CLOSING,
    Trigger.CANCEL: Status.CANCELLED,
    Trigger.PAUSE: Status.PAUSED,
    Trigger.RESUME: Status.ACTIVE,
    Trigger.RESCHEDULE: Status.ACTIVE,
    Trigger.WITHDRAW: Status.CANCELLED,
}
"""The status a trigger aims at: the `attempted_status` of a refusal."""
