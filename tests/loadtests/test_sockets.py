"""The greenlets' WebSocket client, against a real gateway. Without gevent here: it is a plain blocking client as well."""

import orjson
import pytest

from loadtests.__main__ import offset_ms
from loadtests.sockets import Socket, SocketClosedError, SocketRefusedError
from tests.integration.events import event, fresh_id, started
from tests.live import LiveStack

pytestmark = pytest.mark.integration


@pytest.fixture
def auction_id(live_stack: LiveStack) -> str:
    """An auction that runs for an hour."""
    auction_id = fresh_id()
    (arrival,) = live_stack.post(event("offers.cancellation.completed", auction_id=fresh_id(), reason="clock"))
    now = arrival["arrival_ms"]
    live_stack.post(started(auction_id, now, now + 3_600_000))
    live_stack.until_status(auction_id, "ACTIVE")
    return auction_id


def test_the_first_text_is_the_snapshot(live_stack: LiveStack, auction_id: str) -> None:
    """Frames that come together with the answer to the handshake are not lost."""
    socket = Socket(f"{live_stack.url}/auctions/{auction_id}/updates")
    try:
        assert orjson.loads(next(socket.texts()))["type"] == "timer.snapshot"
    finally:
        socket.close()


def test_the_clocks_are_compared(live_stack: LiveStack, auction_id: str) -> None:
    """On one machine the server's clock and ours are about the same."""
    assert abs(offset_ms(live_stack.url, auction_id, None)) < 1_000


def test_a_socket_that_the_server_closes_says_so(live_stack: LiveStack, auction_id: str) -> None:
    """When the auction is over, the end is read first, then the close is an error with its code."""
    socket = Socket(f"{live_stack.url}/auctions/{auction_id}/updates")
    try:
        texts = socket.texts()
        seen = [orjson.loads(next(texts))["type"]]
        live_stack.post(event("auctions.cancel.requested", auction_id=auction_id, reason="test"))
        with pytest.raises(SocketClosedError, match="4000"):
            seen.extend(orjson.loads(text)["type"] for text in texts)
        assert seen[-1] == "timer.cancelled"
    finally:
        socket.close()


def test_a_refused_handshake_says_why(live_stack: LiveStack) -> None:
    """An unknown auction: the status is in the error."""
    with pytest.raises(SocketRefusedError, match="404 Not Found"):
        Socket(f"{live_stack.url}/auctions/{fresh_id()}/updates")


def test_no_server_is_an_os_error() -> None:
    """Nobody listens there."""
    with pytest.raises(OSError, match="refused"):
        Socket("http://127.0.0.1:9/auctions/a/updates")
