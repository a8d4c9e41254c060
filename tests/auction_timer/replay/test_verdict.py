"""The judgement of one auction: what is expected, and what counts as a fault."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auction_timer.replay.plan import PlannedAuction
from auction_timer.replay.verdict import Ending, Extending, Observed, expect, judge, percentile
from engine.contract.timers import TimerRecord, timer
from engine.domain.instants import EpochMs
from tests.auction_timer.replay.examples import STARTS_AT, plan

END = EpochMs(STARTS_AT + 60_000)
WINDOW_MS = 625
"""15 minutes at the speed of the examples."""


def auction() -> PlannedAuction:
    """The first auction of the examples: a minute long, its second and third bid in the window of 0.6 s."""
    return plan().auctions[0]


def observed(*arrivals: int, **changes: Any) -> Observed:
    """What a perfect server shows if the bids arrive then, in ms after the start."""
    planned = auction()
    seen = Observed(registered_at=EpochMs(STARTS_AT - 1_000))
    seen.arrivals = [
        (bid, EpochMs(STARTS_AT + ms))
        for bid, ms in zip(planned.bids, arrivals or (30_000, 59_700, 59_880), strict=True)
    ]
    after = expect(planned, seen).auction
    seen.final = timer(TimerRecord(after), after.ends_at, None)
    seen.endings = [Ending(EpochMs(after.ends_at + 3), after.ends_at, after.ended_at)]
    if after.extension_count:
        seen.extendings = [Extending(END, after.ends_at)]
    for name, value in changes.items():
        setattr(seen, name, value)
    return seen


def test_the_expected_end_follows_from_the_arrivals() -> None:
    """The bid that changed the leader in the window moves the end to its arrival and an extension; the other does not."""
    expected = expect(auction(), observed())
    assert expected.auction.ends_at == STARTS_AT + 59_700 + WINDOW_MS
    assert expected.auction.ended_at == expected.auction.ends_at
    assert (expected.auction.extension_count, expected.late_bids) == (1, 0)


def test_a_bid_at_the_end_is_late() -> None:
    """A bid that arrives at the very end does not count, one millisecond earlier it does."""
    assert expect(auction(), observed(30_000, 60_000, 60_000)).late_bids == 2
    assert expect(auction(), observed(30_000, 59_999, 59_999)).late_bids == 0


def test_a_registration_after_the_end_still_has_one() -> None:
    """An auction that became known too late is closed as of its end."""
    expected = expect(auction(), Observed(registered_at=EpochMs(END + 5)))
    assert expected.auction.ended_at == END


def test_a_perfect_server_has_no_faults() -> None:
    """The row carries the server's own figures, and lateness is from the end to the sending of the frame."""
    row = judge(auction(), observed())
    assert row.faults == ()
    assert (row.lateness_ms, row.early, row.extension_count, row.clipped_by) == (3, False, 1, None)
    assert row.original_ends_at == END


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"status": "CLOSING"}, "status is CLOSING, expected ENDED"),
        ({"ends_at": END}, f"ends_at is {END}, expected"),
        ({"ended_at": None}, "ended_at is None, expected"),
        ({"original_ends_at": END + 1}, "original_ends_at"),
        ({"extension_count": 2}, "extension_count is 2, expected 1"),
        ({"clipped_by": "total"}, "clipped_by is total, expected None"),
        ({"ends_at": END + 86_400_000}, "the end moved by 86400000 ms in all"),
    ],
)
def test_each_field_of_the_final_timer_counts(changes: dict[str, Any], told: str) -> None:
    """A field that is not as the fold says is named with both values."""
    seen = observed()
    assert seen.final is not None
    seen.final |= changes
    assert any(told in fault for fault in judge(auction(), seen).faults)


def test_frames_are_judged_too() -> None:
    """Two ends, none, an early one, one that contradicts itself, and extensions that nobody announced are faults."""
    ending = observed().endings[0]
    end = ending.ends_at
    for endings, told in (
        ([ending, ending], "received 2 times"),
        ([], "received 0 times"),
        ([Ending(EpochMs(end - 1), end, end)], "before the end"),
        ([Ending(EpochMs(end + 1), end, EpochMs(end - 1))], "says ended_at"),
    ):
        assert any(told in fault for fault in judge(auction(), observed(endings=endings)).faults)
    for extendings, told in (
        ([], "received 0 times for 1"),
        ([Extending(END, EpochMs(END + 626))], "moved the end by 626 ms"),
        ([Extending(END, END)], "moved the end by 0 ms"),
    ):
        assert any(told in fault for fault in judge(auction(), observed(extendings=extendings)).faults)


def test_a_gap_excuses_what_is_missing_but_nothing_else() -> None:
    """After an admitted gap fewer frames are right; two ends, or more extensions than there were, never are."""
    ending = observed().endings[0]
    assert judge(auction(), observed(endings=[], extendings=[], gaps=1)).faults == ()
    assert judge(auction(), observed(endings=[ending, ending], gaps=1)).faults
    moved = Extending(END, EpochMs(END + 10))
    assert judge(auction(), observed(extendings=[moved, moved], gaps=1)).faults


def test_an_auction_that_could_not_be_watched_says_why() -> None:
    """The trouble of a socket is the first fault, and what is unknown is taken from the expectation."""
    row = judge(auction(), observed(trouble="did not end", final=None, endings=[]))
    assert row.faults[0] == "did not end"
    assert row.lateness_ms is None
    assert row.ends_at == STARTS_AT + 59_700 + WINDOW_MS


@pytest.mark.requirement("R15")
@given(st.lists(st.integers(0, 80_000), min_size=3, max_size=3).map(sorted))
def test_any_arrivals_have_one_verdict(arrivals: list[int]) -> None:
    """Whenever the bids arrive, a server that follows the rules has no faults, within the caps."""
    planned = auction()
    seen = observed(*arrivals)
    expected = expect(planned, seen).auction
    assert END <= expected.ends_at <= END + planned.registration.policy.total_cap_ms
    if expected.extension_count <= 1:
        assert judge(planned, seen).faults == ()


@given(st.lists(st.integers(0, 1_000), max_size=50), st.floats(0, 100))
def test_percentiles_are_values_that_were_measured(values: list[int], percent: float) -> None:
    """The nearest rank is one of the values, at least as large as its share of them, and nothing of nothing."""
    ascending = sorted(values)
    found = percentile(ascending, percent)
    if not ascending:
        assert found is None
        return
    assert found in ascending
    assert sum(value <= found for value in ascending) >= len(ascending) * percent / 100 - 1e-9
    assert percentile(ascending, 100) == ascending[-1]
    assert percentile(ascending, 0) == ascending[0]
