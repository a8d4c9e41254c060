"""Tests for gateway.origins."""

import pytest

from gateway.origins import OriginRule

OWN = "127.0.0.1:8080"


@pytest.mark.parametrize(
    ("origin", "host", "admitted"),
    [
        (None, OWN, True),
        (None, None, True),
        ("http://127.0.0.1:8080", OWN, True),
        ("HTTP://127.0.0.1:8080", OWN, True),
        ("http://localhost:8080", "localhost:8080", True),
        ("http://LocalHost:8080", "localhost:8080", True),
        ("http://127.8.9.10", "127.8.9.10", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("http://127.0.0.1:8081", OWN, False),
        ("http://localhost:8080", OWN, False),
        ("http://evil.example", OWN, False),
        ("http://evil.example", "evil.example", False),  # DNS rebinding: a name of theirs for our address
        ("http://192.0.2.1:8080", "192.0.2.1:8080", False),
        ("http://127.0.0.1:8080", None, False),
        ("http://127.0.0.1:8080", "", False),
        ("null", OWN, False),
        ("null", "null", False),
        ("", "", False),
        ("", OWN, False),
        ("http://[", "[", False),
        ("http://[::1", "[::1", False),
        ("http://[nonsense]", "[nonsense]", False),
        ("http://127.0.0.1:8080@evil.example", "evil.example", False),
    ],
)
def test_on_loopback_only_its_own_pages_may(origin: str | None, host: str | None, admitted: bool) -> None:
    """Programs send no origin and pass; a page passes only under a loopback name that is the one it was asked by."""
    assert OriginRule([], loopback_only=True, is_open=True).admits(origin, host) is admitted


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("https://bids.example", True),
        ("https://BIDS.example", True),
        ("http://bids.example", False),
        ("https://bids.example:444", False),
        ("https://evil.bids.example", False),
        ("https://bids.example.evil", False),
        ("http://127.0.0.1:8080", True),
        ("https://[", False),
    ],
)
def test_named_origins_may_besides(origin: str, admitted: bool) -> None:
    """An allowed origin is scheme, name and port together; a slash at its end does not matter."""
    assert OriginRule(["https://Bids.example/"], loopback_only=True, is_open=True).admits(origin, OWN) is admitted


def test_behind_a_proxy_the_own_name_is_any_name() -> None:
    """A gateway that is not bound to loopback is reached by the name the proxy passes on."""
    rule = OriginRule([], loopback_only=False, is_open=True)
    assert rule.admits("https://bids.example", "bids.example")
    assert not rule.admits("https://evil.example", "bids.example")


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        (None, True),
        ("", True),
        (OWN, True),
        ("localhost", True),
        ("LocalHost:8080", True),
        ("[::1]:8080", True),
        ("bids.example:8080", True),
        ("Bids.example", True),
        ("gateway:8080", True),
        ("app.localhost:8080", True),
        ("localhost.localdomain", True),
        ("localhost.evil.example", False),
        ("192.0.2.1:8080", True),
        ("evil.example:8080", False),
        ("evil.example.", False),
        ("evil.bids.example", False),
        ("[", False),
        ("127.0.0.1@evil.example", False),
    ],
)
def test_without_tokens_only_names_of_this_machine_are_answered_to(host: str | None, answered: bool) -> None:
    """A page that has its name resolve to 127.0.0.1 reads as little as it changes: a name of the public DNS, with a dot."""
    assert OriginRule(["https://Bids.example/", "*"], loopback_only=True, is_open=True).answers_to(host) is answered
    assert OriginRule([], loopback_only=True, is_open=False).answers_to(host)
    assert OriginRule([], loopback_only=False, is_open=True).answers_to(host)
