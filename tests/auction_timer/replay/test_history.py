"""Reading a bid history: what it means, and what is wrong with it."""

from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auction_timer.replay.history import (
    COLUMNS,
    HistoryError,
    leader_changes,
    parse_history,
    read_history,
    sample_path,
)
from tests.auction_timer.replay.examples import ROWS, csv_text, history

SAMPLE_BYTES_MAX = 40_000
QUARTER_HOUR_DAYS = Decimal(15) / 1_440


def test_rows_become_auctions() -> None:
    """Auctions come in the order in which the file names them, each with its bids in exact minor units."""
    first, second = history()
    assert (first.auction_id, first.item, first.duration_days) == ("x1", "Watch", Decimal(1))
    assert [(bid.amount_minor, bid.bidder) for bid in first.bids] == [(1_000, "ann"), (1_250, "bob"), (1_200, "ann")]
    assert [bid.leader_changed for bid in first.bids] == [True, True, False]
    assert second.late_bids == 1


def test_bids_are_put_into_the_order_of_their_time() -> None:
    """A file may name bids in any order; equal times keep the file's."""
    (auction,) = history("a,i,1,1,0.5,2,x\na,i,1,1,0.1,1,y\na,i,1,1,0.5,3,z\n")
    assert [bid.bidder for bid in auction.bids] == ["y", "x", "z"]


def test_columns_may_stand_anywhere() -> None:
    """Order, further columns, blank lines, spaces and a byte-order mark do not matter."""
    text = "bidder, bid ,note,bid_days,opening_bid,duration_days,item,auction_id\nann,5,hello,0.1,1,1,Watch,x\n\n"
    (auction,) = parse_history(text.splitlines(keepends=True))
    assert auction.bids[0].amount_minor == 500


def test_quotes_are_csv() -> None:
    """An item may hold a comma when it is quoted."""
    (auction,) = history('a,"Watch, gold",1,1,0,1,x\n')
    assert auction.item == "Watch, gold"


@pytest.mark.parametrize(
    ("rows", "line", "column", "fault"),
    [
        ("x,i,1,1,0.1,ten,b\n", 2, "bid", "not a number: 'ten'"),
        ("x,i,1,1,0.1,1,b\nx,i,1,1,,1,b\n", 3, "bid_days", "not a number: ''"),
        ("x,i,1,1,nan,1,b\n", 2, "bid_days", "not a number"),
        ("x,i,1,1,1e999,1,b\n", 2, "bid_days", "from 0 to 3650"),
        ("x,i,1,1,-0.1,1,b\n", 2, "bid_days", "from 0 to 3650"),
        ("x,i,0,1,0.1,1,b\n", 2, "duration_days", "more than 0"),
        ("x,i,-7,1,0.1,1,b\n", 2, "duration_days", "more than 0"),
        ("x,i,1795328519000,1,0.1,1,b\n", 2, "duration_days", "at most 3650"),
        ("x,i,1,?,0.1,1,b\n", 2, "opening_bid", "not a number"),
        ("x,i,1,1,0.1,-1,b\n", 2, "bid", "from 0"),
        ("x,i,1,1,0.1,1e18,b\n", 2, "bid", "from 0"),
        (",i,1,1,0.1,1,b\n", 2, "auction_id", "1-128 printable"),
        ("x,,1,1,0.1,1,b\n", 2, "item", "1-200 printable"),
        ("x,i,1,1,0.1,1,b b\n", 2, "bidder", "without spaces"),
        ("x,i,1,1,0.1,1,\u00fc\n", 2, "bidder", "ASCII"),
        ("x,i,1,1,0.1,1,b\nx,j,1,1,0.2,1,b\n", 3, "item", "line 2 of the same auction says i"),
        ("x,i,1,1,0.1,1,b\nx,i,2,1,0.2,1,b\n", 3, "duration_days", "line 2 of the same auction says 1"),
        ("x,i,1,1,0.1,1\n", 2, None, "has 6 values, the header names 7"),
        ('x,i,1,1,0.1,1,"b\n', 2, None, "not CSV"),
        ("", 1, None, "no bid"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column(rows: str, line: int, column: str | None, fault: str) -> None:
    """Every fault says where it is and what was expected there."""
    with pytest.raises(HistoryError, match=fault) as caught:
        history(rows)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert f"line {line}" in str(caught.value)
    assert column is None or f"column {column}" in str(caught.value)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(name: str) -> None:
    """Each column is needed, and once."""
    header = ",".join(other for other in COLUMNS if other != name)
    with pytest.raises(HistoryError, match=f"column {name}: is missing"):
        parse_history(csv_text("", header).splitlines(keepends=True))
    with pytest.raises(HistoryError, match=f"column {name}: stands there twice"):
        parse_history(csv_text("", f"{','.join(COLUMNS)},{name}").splitlines(keepends=True))


def test_an_opening_bid_may_differ_from_row_to_row() -> None:
    """The real data has such an auction, and nothing depends on it."""
    (auction,) = history("x,i,1,0.01,0.1,1,b\nx,i,1,1,0.2,2,c\n")
    assert len(auction.bids) == 2


def test_a_limit_takes_the_first_auctions_and_still_checks_the_rest(tmp_path: Path) -> None:
    """With a limit fewer are played, but a broken file stays broken."""
    path = tmp_path / "h.csv"
    path.write_text("\ufeff" + csv_text())
    assert [auction.auction_id for auction in read_history(path, limit=1)] == ["x1"]
    path.write_text(csv_text(ROWS + "x3,i,1,1,0.1,oops,b\n"))
    with pytest.raises(HistoryError, match="line 7, column bid"):
        read_history(path, limit=1)
    with pytest.raises(ValueError, match="at least 1"):
        read_history(path, limit=0)


def test_the_leader_rule_of_the_docstring_holds() -> None:
    """Strictly higher than all before, and by another bidder than the one who leads."""
    bids = [(500, "a"), (800, "b"), (600, "a"), (900, "b"), (900, "a")]
    assert list(leader_changes(bids)) == [True, True, False, False, False]


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abc"))))
def test_the_leader_changes_when_the_name_at_the_top_does(bids: list[tuple[int, str]]) -> None:
    """Against the plain definition: the leader is whoever first bid the highest amount so far."""

    def leader(seen: list[tuple[int, str]]) -> str | None:
        top = max((amount for amount, _ in seen), default=None)
        return next((bidder for amount, bidder in seen if amount == top), None)

    leaders = [leader(bids[:count]) for count in range(len(bids) + 1)]
    assert list(leader_changes(bids)) == [before != after for before, after in pairwise(leaders)]


def test_the_sample_is_small_and_has_what_it_is_for() -> None:
    """Twelve real auctions, all durations, and bids in the last quarter of an hour of each."""
    assert sample_path().stat().st_size < SAMPLE_BYTES_MAX
    auctions = read_history(sample_path())
    assert len(auctions) == 12
    assert {auction.duration_days for auction in auctions} == {3, 5, 7}
    for auction in auctions:
        window = auction.duration_days - QUARTER_HOUR_DAYS
        assert sum(bid.at_days > window for bid in auction.bids) >= 6
        assert auction.late_bids == 0
