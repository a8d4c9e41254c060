"""Tests for auction_timer.roles: what is said where an address cannot be bound."""

import contextlib

import pytest

from auction_timer.roles import listen, url_of


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", 64 * "\N{LATIN SMALL LETTER U WITH DIAERESIS}"], ids=["v4", "v6", "long"]
)
def test_a_host_that_is_not_ours_is_not_a_matter_of_the_port(host: str) -> None:
    """The advice is about the option that is wrong."""
    with pytest.raises(OSError, match="choose another --host"):
        listen(host, 0)


def test_a_port_that_is_taken_is_one() -> None:
    """Another one may be free."""
    with contextlib.closing(listen("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="choose another --port"):
        listen("127.0.0.1", int(url_of(taken).rpartition(":")[2]))
