"""Tests for gateway.descriptors: the limit of open files, raised or advised about."""

import resource

import pytest

from engine.settings import Settings, SettingsError
from gateway import descriptors
from gateway.admission import PLAIN_MIN, plain_connections_max
from gateway.descriptors import FILES, connections_that_fit, descriptors_needed, make_room


class Limits:
    """A process's limit of open files."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, which: int) -> tuple[int, int]:
        """As in `resource`."""
        assert which == resource.RLIMIT_NOFILE
        return self.now

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        """As in `resource`."""
        assert which == resource.RLIMIT_NOFILE
        assert limits[0] <= limits[1] or limits[1] == resource.RLIM_INFINITY
        self.now = limits

    RLIMIT_NOFILE = resource.RLIMIT_NOFILE
    RLIM_INFINITY = resource.RLIM_INFINITY


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """The usual limit of a shell, which a process may raise without bound."""
    limits = Limits(1_024, resource.RLIM_INFINITY)
    monkeypatch.setattr(descriptors, "resource", limits)
    return limits


def settings(**chosen: int) -> Settings:
    """Settings of which only these were chosen."""
    return Settings(_env_file=None, **chosen)


def test_what_fits_is_the_most_that_fits() -> None:
    """One socket more would need more; where not even one fits, the number says so."""
    for limit in (*range(0, 4_000, 7), 20_000, 65_536, 1_048_576):
        fit = connections_that_fit(limit)
        if fit < 1:
            assert descriptors_needed(1) > limit
        else:
            assert descriptors_needed(fit) <= limit
            assert descriptors_needed(fit + 4) > limit


def test_what_is_needed_is_the_sum_of_the_bounds() -> None:
    """Sockets, plain connections up to where they are cut, and what a gateway opens besides."""
    assert descriptors_needed(1) == 1 + 2 * PLAIN_MIN + FILES
    assert descriptors_needed(20_000) == 20_000 + 2 * plain_connections_max(20_000) + FILES


def test_a_low_limit_is_raised_to_what_is_needed(limited: Limits) -> None:
    """No higher: some programs count up to it."""
    assert make_room(settings()).connections_max == 20_000
    assert limited.now == (descriptors_needed(20_000), resource.RLIM_INFINITY)


@pytest.mark.parametrize("soft", [100_000, resource.RLIM_INFINITY])
def test_a_limit_that_is_high_enough_is_left_alone(limited: Limits, soft: int) -> None:
    """It is never lowered."""
    limited.now = (soft, soft)
    make_room(settings())
    assert limited.now == (soft, soft)


def test_a_default_becomes_what_fits(limited: Limits) -> None:
    """Nobody has asked for 20,000 sockets: a gateway starts with those there can be."""
    limited.now = (1_024, 4_096)
    fitting = make_room(settings(shards=3))
    assert fitting.connections_max == connections_that_fit(4_096) == 2_560
    assert fitting.shards == 3
    assert limited.now == (descriptors_needed(2_560), 4_096)


@pytest.mark.parametrize(("hard", "chosen", "advised"), [(4_096, {"connections_max": 2_561}, 2_560), (500, {}, 1)])
def test_a_choice_that_does_not_fit_is_an_error_with_advice(
    limited: Limits, hard: int, chosen: dict[str, int], advised: int
) -> None:
    """The message says what is needed, what there is, and both ways out; nothing was changed."""
    limited.now = (256, hard)
    with pytest.raises(SettingsError) as refused:
        make_room(settings(**chosen))
    (fault,) = refused.value.faults
    assert str(hard) in fault
    assert "LimitNOFILE" in fault
    assert f"AUCTION_TIMER_CONNECTIONS_MAX to {advised} or less" in fault
    assert limited.now == (256, hard)
