"""Tests for engine.contract.clock_vote: who is odd, by table and by property, and what is stated about it."""

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract.clock_vote import STEP_US, ClockReport, Verdict, is_contradicted, read_report, vote
from engine.domain.instants import EpochMs

pytestmark = pytest.mark.requirement("R12")

S = 1_000_000
NOON = 1_800_000_000 * S
times = st.integers(NOON - 3_600 * S, NOON + 3_600 * S)
small = st.integers(-STEP_US // 2, STEP_US // 2)
far = st.integers(2 * STEP_US + 1, 3_600 * S).flatmap(lambda by: st.sampled_from([by, -by]))


@pytest.mark.parametrize(
    ("authority", "wall", "monotonic", "named"),
    [
        (0, 0, 0, Verdict.NONE),
        (STEP_US, 0, 0, Verdict.NONE),
        (STEP_US + 1, 0, 0, Verdict.AUTHORITY),
        (-STEP_US - 1, 0, 0, Verdict.AUTHORITY),
        (10 * S, 0, 0, Verdict.AUTHORITY),
        (0, 10 * S, 0, Verdict.WALL),
        (0, -3_600 * S, 0, Verdict.WALL),
        (10 * S, 10 * S, 0, Verdict.MONOTONIC),
        (-10 * S, -10 * S, 0, Verdict.MONOTONIC),
        (10 * S, 20 * S, 0, Verdict.NO_MAJORITY),
        (10 * S, -10 * S, 0, Verdict.NO_MAJORITY),
        # Along a drift each agrees with the next one.
        (200_000, 0, -200_000, Verdict.NONE),
        (0, 200_000, -200_000, Verdict.NONE),
    ],
)
def test_who_is_odd(authority: int, wall: int, monotonic: int, named: Verdict) -> None:
    """The one that two others leave alone, by more than 250 ms."""
    assert vote(NOON + authority, NOON + wall, NOON + monotonic) is named


@given(times, small, small, far)
def test_the_one_that_leaves_the_others_is_named(now: int, one: int, other: int, by: int) -> None:
    """Whoever it is, in whatever direction, however the other two differ within the bound."""
    named = (Verdict.AUTHORITY, Verdict.WALL, Verdict.MONOTONIC)
    for odd, left, right in permutations(range(3)):
        clocks = [now] * 3
        clocks[left] += one // 2
        clocks[right] += other // 2
        clocks[odd] += by
        assert vote(*clocks) is named[odd]


@given(times, times, times, st.integers(-(10**12), 10**12))
def test_only_differences_count(authority: int, wall: int, monotonic: int, shift: int) -> None:
    """The same vote at any other date."""
    assert vote(authority, wall, monotonic) is vote(authority + shift, wall + shift, monotonic + shift)


@given(times, times, times, st.integers(0, 10 * S))
def test_nobody_is_named_who_agrees_with_another(authority: int, wall: int, monotonic: int, slack_us: int) -> None:
    """And slack never makes a machine of two clocks that agree the odd ones."""
    named = vote(authority, wall, monotonic, slack_us=slack_us)
    if abs(wall - monotonic) <= STEP_US:
        assert named in (Verdict.NONE, Verdict.AUTHORITY)
    if abs(authority - monotonic) <= STEP_US + slack_us:
        assert named in (Verdict.NONE, Verdict.WALL)
    if abs(authority - wall) <= STEP_US + slack_us:
        assert named in (Verdict.NONE, Verdict.MONOTONIC)


@pytest.mark.parametrize(
    ("slept_us", "named"),
    [
        (None, Verdict.MONOTONIC),
        (10 * S, Verdict.MONOTONIC),
        (10 * S - STEP_US, Verdict.MONOTONIC),
        (10 * S - STEP_US - 1, Verdict.AUTHORITY),
        (0, Verdict.AUTHORITY),
        (3_600 * S, Verdict.AUTHORITY),
    ],
)
def test_only_a_sleep_explains_a_monotonic_clock_that_is_late(slept_us: int | None, named: Verdict) -> None:
    """A machine that knows that it was awake knows that its date was set, and that Redis has the same one."""
    assert vote(NOON + 10 * S, NOON + 10 * S, NOON, slept_us=slept_us) is named
    assert vote(NOON, NOON + 10 * S, NOON, slept_us=slept_us) is Verdict.WALL
    assert vote(NOON + 10 * S, NOON, NOON, slept_us=slept_us) is Verdict.AUTHORITY


def test_an_answer_that_was_long_on_its_way_names_nobody() -> None:
    """What the round trip can explain is no step."""
    assert vote(NOON + 2 * S, NOON, NOON, slack_us=2 * S) is Verdict.NONE
    assert vote(NOON + 2 * S + STEP_US + 1, NOON, NOON, slack_us=2 * S) is Verdict.AUTHORITY


REPORT = ClockReport("engine", -10_000.25, 0.5, 0.125, 3, Verdict.AUTHORITY, EpochMs(1_800_000_000_000))


@given(st.sampled_from(Verdict), st.floats(-1e12, 1e12), st.integers(0, 10**9))
def test_a_statement_reads_back(verdict: Verdict, offset_ms: float, refused: int) -> None:
    """What was stated is what is read."""
    report = replace(REPORT, verdict=verdict, offset_ms=offset_ms, steps_refused=refused)
    assert read_report(report.encode()) == report


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"7", b"\xff", REPORT.encode().replace(b"authority", b"me"), b'{"role":"engine"}']
)
def test_what_is_no_statement_is_not_there(body: bytes) -> None:
    """Anybody can write to Redis: nothing is raised."""
    assert read_report(body) is None


@given(st.binary(max_size=40))
def test_nothing_that_is_read_can_raise(body: bytes) -> None:
    """Any bytes at all."""
    read_report(body)


@pytest.mark.parametrize(
    ("others", "contradicted"),
    [
        ([], False),
        ([Verdict.NONE], True),
        ([Verdict.AUTHORITY, Verdict.NONE], False),
        ([Verdict.NONE, Verdict.MONOTONIC, Verdict.AUTHORITY], True),
        ([Verdict.WALL, Verdict.NO_MAJORITY], False),
    ],
)
def test_more_who_find_the_authority_right_contradict(others: list[Verdict], contradicted: bool) -> None:
    """One that is in doubt itself has no vote, and with nobody else there one's own counts."""
    assert is_contradicted(Verdict.AUTHORITY, others) is contradicted
    assert not is_contradicted(Verdict.WALL, others)
