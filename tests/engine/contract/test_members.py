"""Tests for engine.contract.members: a name for whatever stands in a sorted set."""

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.contract.intake import AUCTION_ID
from engine.contract.members import NAME_CHARS_MAX, member_of, name_of

pytestmark = pytest.mark.requirement("R12")


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (b"lot-7", "lot-7"),
        (b"\xff\xfe bad", "%FF%FE%20bad"),
        (b"bad id\n", "%62ad%20id%0A"),
        (b"", "%"),
        (b"%", "%25"),
        (b"%62ad", "%2562ad"),
        (b"x" * 129, "%78" + 128 * "x"),
        (b"\xff" * 300, None),
    ],
)
def test_names(member: bytes, name: str | None) -> None:
    """An id is its own name, what is none is percent-encoded, and what would be too long has none."""
    assert name_of(member) == name


@given(st.binary(max_size=600))
@example(b"%41")
@example(b"~")
def test_a_name_leads_back_to_its_member(member: bytes) -> None:
    """To that one alone; it fits JSON, and is sorted before every auction id of the same score."""
    name = name_of(member)
    if name is None:
        assert len(member) > NAME_CHARS_MAX // 3 - 1
        return
    assert member_of(name) == member
    assert len(name) <= NAME_CHARS_MAX
    assert orjson.loads(orjson.dumps(name)) == name
    if not AUCTION_ID.fullmatch(name):
        assert name < min("-.:_0Aa")
