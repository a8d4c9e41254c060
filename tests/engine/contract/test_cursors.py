"""Tests for engine.contract.cursors."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.contract.cursors import START, Cursor, stream_order

UINT64_MAX = 2**64 - 1

numbers = st.one_of(st.integers(0, 3), st.integers(0, UINT64_MAX))
cursors = st.builds(Cursor, st.integers(0, 1023), st.builds("{}-{}".format, numbers, numbers))


@pytest.mark.requirement("B4")
@settings(max_examples=100, deadline=None)
@given(cursors)
def test_a_cursor_reads_back_as_it_was_written(cursor: Cursor) -> None:
    """Every place in every shard's event lane survives the way to a client and back."""
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.requirement("B4")
def test_the_written_form() -> None:
    """A cursor reads `<shard>.<stream id>`."""
    assert str(Cursor(7, "1800000000000-3")) == "7.1800000000000-3"
    assert str(Cursor(0, START)) == "0.0-0"


@pytest.mark.requirement("B4")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0.",
        "0.0",
        "0.0-",
        ".0-0",
        "0.-0",
        "0-0.0",
        "-1.0-0",
        "0.-1-0",
        "0.0-0-0",
        " 0.0-0",
        "0.0-0\n",
        "0.0-0 ",
        "+1.0-0",
        "0.1_0-0",
        "0.0x1-0",
        "0.1e3-0",
        "0.$-0",
        "0.$",
        "0.+",
        "10000.0-0",
        "0.100000000000000000000-0",
        "null",
    ],
)
def test_garbage_is_no_cursor(text: str) -> None:
    """Anything but three plain numbers in the right places is none of ours, and says so without an error."""
    assert Cursor.parse(text) is None


@pytest.mark.requirement("B4")
@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=40), st.text("0123456789.-$+ ", max_size=40)))
@example("00.007-0")
def test_a_text_is_a_cursor_in_one_form_or_not_at_all(text: str) -> None:
    """Reading never fails; what could be read is written in one form, which reads the same."""
    cursor = Cursor.parse(text)
    if cursor is not None:
        assert Cursor.parse(str(cursor)) == cursor
        assert stream_order(cursor.stream_id) >= stream_order(START)


@pytest.mark.parametrize(
    "text", ["\N{ARABIC-INDIC DIGIT THREE}.1-0", "0.\N{DEVANAGARI DIGIT ONE}-0", "0.0-\N{FULLWIDTH DIGIT TWO}"]
)
def test_only_the_ten_digits_are_digits(text: str) -> None:
    """A cursor written in another script's digits is none of ours."""
    assert Cursor.parse(text) is None


@pytest.mark.parametrize("text", [f"0.{UINT64_MAX + 1}-0", f"0.0-{UINT64_MAX + 1}", f"0.{'9' * 20}-0"])
def test_a_stream_id_has_64_bits(text: str) -> None:
    """A number that no Redis stream id can hold is none of ours: XREAD would answer it with an error."""
    assert Cursor.parse(text) is None


@pytest.mark.parametrize("text", [f"0.{UINT64_MAX}-{UINT64_MAX}"])
def test_the_last_stream_id_is_a_place(text: str) -> None:
    """The greatest id that Redis can give is a cursor."""
    assert str(Cursor.parse(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6))
def test_stream_ids_are_ordered_as_numbers(pairs: list[tuple[int, int]]) -> None:
    """Sorting ids by `stream_order` sorts them as pairs of integers, whatever their number of digits."""
    ids = [f"{ms}-{seq}" for ms, seq in pairs]
    assert sorted(ids, key=stream_order) == [f"{ms}-{seq}" for ms, seq in sorted(pairs)]


def test_ids_do_not_compare_as_text() -> None:
    """9-0 comes before 10-0, and 1-9 before 1-10."""
    assert stream_order("9-0") < stream_order("10-0")
    assert stream_order("1-9") < stream_order("1-10")
