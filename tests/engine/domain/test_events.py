"""Tests for engine.domain.events."""

from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from engine.domain.events import Bid, Cancel, Event, InputEvent, Pause, Reschedule, Resume, TimeEvent
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Trigger
from tests.engine.domain.examples import FOR_TRIGGER


def test_every_trigger_has_exactly_one_event() -> None:
    """The event classes and the triggers of the table are in one-to-one correspondence."""
    triggers = [kind.trigger for kind in get_args(Event)]
    assert sorted(triggers) == sorted(Trigger)


def test_time_does_three_things_and_people_the_rest() -> None:
    """Start, window and deadline are the time events; no input event can claim to be one."""
    assert {kind.trigger for kind in get_args(TimeEvent)} == {
        Trigger.START,
        Trigger.OPEN_WINDOW,
        Trigger.REACH_DEADLINE,
    }
    assert not set(get_args(TimeEvent)) & set(get_args(InputEvent))


@pytest.mark.parametrize("trigger", Trigger)
def test_the_examples_fit_their_trigger(trigger: Trigger) -> None:
    """The example event of each trigger, which the other tests use, really carries that trigger."""
    assert FOR_TRIGGER[trigger].trigger is trigger


def test_what_a_producer_may_leave_out() -> None:
    """A bid changes the leader unless it says otherwise; reasons of pause, resume and reschedule may be absent."""
    assert Bid("b") == Bid("b", None, None, None, leader_changed=True, origin=None)
    assert Pause().reason is Resume().reason is Reschedule(EpochMs(1)).reason is None


def test_events_are_values() -> None:
    """Two events with the same content are equal, and neither can be edited."""
    event = Cancel("withdrawn")
    assert event == Cancel("withdrawn")
    with pytest.raises(FrozenInstanceError):
        event.reason = "other"  # type: ignore[misc]
