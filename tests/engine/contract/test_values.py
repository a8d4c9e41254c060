"""Tests for engine.contract.values: what is made quickly is the same value as before."""

from dataclasses import dataclass, field, replace

import pytest

from engine.contract.values import unguarded

pytestmark = pytest.mark.requirement("R5")


@dataclass(frozen=True, slots=True)
class Guarded:
    """As it is written."""

    name: str
    at: int = 7
    rest: dict[str, int] = field(default_factory=dict, hash=False)


@unguarded
@dataclass(frozen=True, slots=True)
class Quick:
    """The same, without the guard."""

    name: str
    at: int = 7
    rest: dict[str, int] = field(default_factory=dict, hash=False)


def test_it_is_the_same_value_without_the_guard() -> None:
    """Arguments, defaults, equality, hash, `replace` and patterns; each one gets a default of its own."""
    made = Quick("a")
    assert (made.name, made.at, made.rest) == ("a", 7, {})
    assert Quick("a", 8, {"b": 1}) == Quick(rest={"b": 1}, at=8, name="a")
    assert made.rest is not Quick("a").rest
    assert made != Quick("b")
    assert hash(made) == hash(Quick("a")) == hash(Guarded("a"))
    assert replace(made, at=9) == Quick("a", 9)
    assert repr(made) == repr(Guarded("a")).replace("Guarded", "Quick")
    match made:
        case Quick(name, at):
            assert (name, at) == ("a", 7)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        Quick()  # type: ignore[call-arg]


def test_a_name_that_is_no_field_is_still_refused() -> None:
    """The slots hold the fields, and nothing else."""
    with pytest.raises(AttributeError):
        Quick("a").nmae = "b"  # type: ignore[attr-defined]
