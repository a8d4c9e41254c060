"""Tests for engine.domain.correction: which of two states stands, and how it is stated anew."""

from dataclasses import replace

import pytest

from engine.domain.correction import VERSION_MAX, correct, true_one
from engine.domain.decide import Fact
from engine.domain.lifecycle import Status
from tests.engine.domain.examples import IN_STATUS, T0, at

CLOSING = IN_STATUS[Status.CLOSING][0]
ENDED = IN_STATUS[Status.ENDED][0]

pytestmark = pytest.mark.requirement("R11")


def test_where_only_one_is_known_it_stands() -> None:
    """An engine that holds nothing takes what the log says; a log that says nothing leaves what the engine holds."""
    assert true_one(None, CLOSING) is CLOSING
    assert true_one(CLOSING, None) is CLOSING
    assert true_one(None, None) is None


@pytest.mark.parametrize("behind", [0, 1])
def test_the_log_stands_over_a_state_that_is_not_ahead_of_it(behind: int) -> None:
    """At the version that the log has, or below, what differs from the log is damage."""
    damaged = replace(CLOSING, version=CLOSING.version - behind, ends_at=at(1))
    assert true_one(damaged, CLOSING) is CLOSING


@pytest.mark.requirement("B1")
def test_a_close_that_came_meanwhile_is_never_taken_back() -> None:
    """What was decided after the log was read has a higher version, and stands."""
    closed = replace(ENDED, version=CLOSING.version + 1)
    assert true_one(closed, CLOSING) is closed


@pytest.mark.parametrize(
    ("found", "version"), [(0, 4), (3, 4), (99, 100), (VERSION_MAX - 1, VERSION_MAX), (VERSION_MAX, 4), (-5, 4)]
)
def test_the_version_passes_every_one_that_was_shown(found: int, version: int) -> None:
    """It is above ours and above the one found, unless that is no version anybody can count on from."""
    assert CLOSING.version == 3
    assert correct(CLOSING, T0, cause="x", found_version=found, found_ends_at=None).after.version == version


def test_a_correction_changes_nothing_but_the_version() -> None:
    """It is recorded with its cause and the end that was found, and the state is what it was."""
    decision = correct(CLOSING, T0, cause="end_past_cap", found_version=3, found_ends_at=at(9))
    assert decision.fact is Fact.CORRECTED
    assert replace(decision.after, version=CLOSING.version) == CLOSING
    assert decision.details == {
        "cause": "end_past_cap",
        "previous_ends_at": at(9),
        "ends_at": CLOSING.ends_at,
        "found_version": 3,
    }
