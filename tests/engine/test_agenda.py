"""Tests for engine.agenda, against a dictionary that is searched from end to end."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine import agenda as agenda_module
from engine.agenda import Agenda
from engine.domain.instants import EpochMs

KEYS = st.sampled_from("abcdefgh")
INSTANTS = st.integers(0, 30).map(EpochMs)


class AgendaMachine(RuleBasedStateMachine):
    """An agenda and the naive model of one, told the same things."""

    def __init__(self) -> None:
        super().__init__()
        self.agenda = Agenda()
        self.model: dict[str, int] = {}

    @rule(key=KEYS, at=INSTANTS)
    def set(self, key: str, at: EpochMs) -> None:
        """A key is due at one instant, the one last set."""
        self.agenda.set(key, at)
        self.model[key] = at

    @rule(key=KEYS)
    def drop(self, key: str) -> None:
        """A dropped key is due at none."""
        self.agenda.set(key, None)
        self.model.pop(key, None)

    @rule(now=INSTANTS, most=st.integers(0, 9))
    def pop_due(self, now: EpochMs, most: int) -> None:
        """What is due comes earliest first, each once, and no more than asked for."""
        due = sorted((at, key) for key, at in self.model.items() if at <= now)[:most]
        assert self.agenda.pop_due(now, most) == due
        for _, key in due:
            del self.model[key]

    @invariant()
    def agree(self) -> None:
        """Length and next instant are those of the model."""
        assert len(self.agenda) == len(self.model)
        assert self.agenda.next_at() == min(self.model.values(), default=None)


class RebuildingMachine(AgendaMachine):
    """The same with an agenda that is rebuilt all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.floor = agenda_module.STALE_FLOOR
        agenda_module.STALE_FLOOR = 0  # type: ignore[misc]

    def teardown(self) -> None:
        agenda_module.STALE_FLOOR = self.floor  # type: ignore[misc]


TestAgenda = AgendaMachine.TestCase
TestAgenda.settings = settings(max_examples=50)
TestAgenda.__doc__ = "The agenda behaves as the naive model of it, whatever happens to it."
TestRebuilding = RebuildingMachine.TestCase
TestRebuilding.settings = settings(max_examples=50)
TestRebuilding.__doc__ = "And so it does when it is rebuilt at every opportunity."


def test_stale_entries_do_not_pile_up() -> None:
    """A deadline that moves a hundred thousand times leaves a bounded heap behind."""
    agenda = Agenda()
    for at in range(100_000):
        agenda.set("a", EpochMs(at))
    assert len(agenda._heap) <= agenda_module.STALE_FLOOR + 3
    assert agenda.pop_due(EpochMs(10**6), 10) == [(99_999, "a")]


@given(st.dictionaries(st.text(max_size=3), INSTANTS, max_size=30))
def test_everything_is_due_in_the_end(instants: dict[str, EpochMs]) -> None:
    """Popping until nothing is left gives every key once, in the order of instant and key."""
    agenda = Agenda()
    for key, at in instants.items():
        agenda.set(key, at)
    popped = []
    while due := agenda.pop_due(EpochMs(30), 4):
        popped += due
    assert popped == sorted((at, key) for key, at in instants.items())
    assert agenda.next_at() is None
