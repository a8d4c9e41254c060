"""Tests for gateway.correlation."""

import pytest

from gateway.correlation import correlation_id_of, new_correlation_id


@pytest.mark.parametrize("given", ["mine-1", "!", "~" * 128])
def test_an_id_that_can_be_echoed_is_kept(given: str) -> None:
    """Visible ASCII, 128 characters at most."""
    assert correlation_id_of(given) == given


@pytest.mark.parametrize("given", ["", "a b", "a\r\nSet-Cookie: b", "\u00fc", "x" * 129])
def test_what_cannot_be_echoed_is_replaced(given: str) -> None:
    """Nothing that would end a header or spoil a log goes back out."""
    assert correlation_id_of(given).startswith("req-")


def test_new_ids_are_their_own() -> None:
    """A new id has its prefix and is used once."""
    ids = {new_correlation_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(name.startswith("req-") for name in ids)
