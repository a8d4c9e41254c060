"""Tests for gateway.admission: the handshake rate, and requests beyond the room for connections."""

import pytest
from websockets.http11 import Request

from engine.settings import Settings
from gateway.admission import PLAIN_MIN, Admission, TokenBucket, plain_connections_max
from gateway.problems import RETRY_AFTER_MAX_S
from tests.fakes.clock import ManualClock, Timeline
from tests.gateway.front import front
from tests.gateway.house import House, record
from tests.gateway.peers import Peer
from tests.gateway.test_connection import assert_gone, opened, settled, turns

SECOND_NS = 1_000_000_000


def test_a_bucket_gives_its_rate_and_a_second_of_it_at_once() -> None:
    """A burst of one second's worth, then one for each that is earned; a long rest earns no more than a second."""
    bucket = TokenBucket(4, 0)
    assert [bucket.take(0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [bucket.take(SECOND_NS // 4) for _ in range(2)] == [True, False]
    assert [bucket.take(SECOND_NS // 4 + SECOND_NS // 8) for _ in range(2)] == [False, False]
    assert [bucket.take(SECOND_NS // 2) for _ in range(2)] == [True, False]
    assert [bucket.take(3_600 * SECOND_NS) for _ in range(6)] == [True] * 4 + [False] * 2


def test_a_bucket_keeps_its_rate_however_often_it_is_asked() -> None:
    """Refusals cost nothing: ten thousand who ask in vain delay nobody."""
    bucket = TokenBucket(100, 0)
    taken = sum(bucket.take(step * SECOND_NS // 10_000) for step in range(100_000))
    assert 1_099 <= taken <= 1_100


def admission(**settings: int) -> Admission:
    """An admission on a clock that stands still."""
    return Admission(Settings(_env_file=None, **settings), ManualClock(Timeline(), seed=1))


def test_plain_connections_are_bounded_in_all_and_per_address() -> None:
    """Up to the bound all is well; beyond it requests are refused; beyond twice of it nothing is spent on them."""
    crowd = admission(connections_max=8)
    assert crowd.plain_max == plain_connections_max(8) == PLAIN_MIN
    for number in range(3 * PLAIN_MIN):
        assert crowd.is_crowded("192.0.2.9") is (number > PLAIN_MIN)
        assert crowd.is_flooded("192.0.2.9") is (number > 2 * PLAIN_MIN)
        crowd.arrived(f"198.51.100.{number}")
    one = admission(connections_per_address_max=2)
    for number in range(6):
        assert (one.is_crowded("192.0.2.1"), one.is_flooded("192.0.2.1")) == (number > 2, number > 4)
        assert not one.is_crowded("192.0.2.2")
        one.arrived("192.0.2.1")
    for _ in range(6):
        one.left("192.0.2.1")
    assert (one.plain, one._per_address) == (0, {})


@pytest.mark.requirement("R16")
async def test_requests_beyond_the_bound_are_503_and_liveness_is_not() -> None:
    """The answer says when to come back and ends the connection; the process is not to be restarted for it."""
    async with front(connections_max=1) as made:
        for _ in range(PLAIN_MIN):
            made.door.admission.arrived("192.0.2.1")
        assert (await made.http.get("/openapi.json")).status_code == 200
        made.door.admission.arrived("192.0.2.1")
        refused = await made.http.get("/openapi.json", headers={"X-Correlation-Id": "mine-1"})
        assert (refused.status_code, refused.json()["error_code"]) == (503, "TOO_MANY_CONNECTIONS")
        assert refused.headers["connection"] == "close"
        assert 1 <= int(refused.headers["retry-after"]) <= RETRY_AFTER_MAX_S
        assert refused.json()["correlation_id"] == refused.headers["x-correlation-id"] == "mine-1"
        assert (await made.http.get("/healthz")).status_code == 200
        made.door.admission.left("192.0.2.1")
        assert (await made.http.get("/openapi.json")).status_code == 200


@pytest.mark.requirement("R7")
async def test_handshakes_beyond_the_rate_are_503_and_when_to_try_again() -> None:
    """Who is refused leaves nothing behind, costs no read, and is let in when its time has come."""
    house = House(handshakes_per_second_max=3)
    house.put(record())
    for _ in range(3):
        await opened(house)
    refused = Peer(house.door).knock()
    await settled(house)
    assert (refused.status, refused.problem["error_code"]) == (503, "TOO_MANY_HANDSHAKES")
    assert refused.response is not None
    assert 1 <= int(refused.response.headers["Retry-After"]) <= RETRY_AFTER_MAX_S
    await turns()
    assert_gone(house, refused)
    house.line.advance(334)
    await opened(house)
    assert Peer(house.door).knock().status == 503
    assert house.sample("auctions_gateway_handshakes_total", outcome="too_many_handshakes") == 2


@pytest.mark.requirement("R7")
async def test_pages_from_elsewhere_use_up_no_handshakes() -> None:
    """However many are turned away for their origin, the turn is still there for one who may come in."""
    house = House(handshakes_per_second_max=1)
    house.put(record())

    def from_elsewhere(request: Request) -> None:
        request.headers["Origin"] = "http://evil.example"

    for _ in range(5):
        assert Peer(house.door).knock(from_elsewhere).status == 403
    await opened(house)
    assert Peer(house.door).knock().status == 503
