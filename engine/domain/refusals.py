"""Refusals of the domain: catalogued values with stable codes, never improvised exceptions."""

from dataclasses import dataclass
from enum import StrEnum


class RefusalCode(StrEnum):
    """Why an event was not applied. The codes are part of the outside contract and never change their meaning."""

    UNKNOWN_AUCTION = "UNKNOWN_AUCTION"
    CONFLICTING_REGISTRATION = "CONFLICTING_REGISTRATION"
    FSM_TRANSITION_INVALID = "FSM_TRANSITION_INVALID"
    FSM_TERMINAL_IMMUTABLE = "FSM_TERMINAL_IMMUTABLE"
    SCHEDULE_IN_PAST = "SCHEDULE_IN_PAST"
    SCHEDULE_BEFORE_START = "SCHEDULE_BEFORE_START"
    SCHEDULE_BEYOND_CAP = "SCHEDULE_BEYOND_CAP"
    WINDOW_EXPIRED = "WINDOW_EXPIRED"
    ALREADY_CANCELLED = "ALREADY_CANCELLED"
    AUCTION_CLOSED = "AUCTION_CLOSED"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refusal: its code, a sentence for a person, and the two statuses a 409 answer names."""

    code: RefusalCode
    message: str
    current_status: str
    attempted_status: str
