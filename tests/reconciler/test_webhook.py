"""Tests for reconciler.webhook, against a real receiver."""

import asyncio
import hashlib
import hmac
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from engine.store.protocol import UpdateEntry
from reconciler.webhook import ANSWER_BYTES_MAX, IN_FLIGHT_MAX, Refused, Webhook, cloud_event, event_id
from tests.contracts.stores import until
from tests.fakes.clock import ManualClock
from tests.reconciler.webhook_server import Answer, WebhookServer

SECRET = "sesame-sesame-sesame"
DEADLINE_S = 5.0
ENTRY = UpdateEntry(
    "1700000000123-4", "timer.ended", "auction-1", 7, b'{"type":"timer.ended","occurred_at":1700000000050}'
)


@asynccontextmanager
async def webhook_of(
    url: str, *, attempt_s: float = DEADLINE_S, clock: ManualClock | None = None
) -> AsyncIterator[Webhook]:
    """A webhook that is closed after the block."""
    webhook = Webhook(url, SECRET, clock or ManualClock(), attempt_s=attempt_s)
    try:
        yield webhook
    finally:
        await webhook.close()


def test_an_entry_becomes_a_cloud_event() -> None:
    """CloudEvents 1.0: every attribute that is required, one extension, and `data` as the engine wrote it."""
    assert orjson.loads(cloud_event(3, ENTRY)) == {
        "specversion": "1.0",
        "id": "3-1700000000123-4",
        "source": "/auction-timer",
        "type": "timer.ended",
        "time": "2023-11-14T22:13:20.050Z",
        "subject": "auction-1",
        "auctionversion": 7,
        "datacontenttype": "application/json",
        "data": {"type": "timer.ended", "occurred_at": 1_700_000_000_050},
    }
    assert event_id(3, ENTRY) == "3-1700000000123-4"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"occurred_at":"now"}', b'{"occurred_at":99999999999999999}']
)
def test_a_body_that_is_not_the_engines_is_an_error(body: bytes) -> None:
    """Whoever wrote it: it cannot be posted as an event of ours."""
    with pytest.raises(ValueError):
        cloud_event(0, UpdateEntry("1-0", "timer.ended", "auction-1", 1, body))


async def test_an_attempt_is_signed_as_the_specification_says() -> None:
    """HMAC-SHA256 over id, time of the attempt and the very bytes of the body, computed here from the standard library."""
    clock = ManualClock()
    async with WebhookServer() as server, webhook_of(server.url, clock=clock) as webhook:
        assert await webhook.post("0-1-0", b'{"a": 1}') is None
        (request,) = server.requests
    assert request.path == "/hooks/path-secret"
    assert request.body == b'{"a": 1}'
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert request.headers["webhook-id"] == "0-1-0"
    assert int(request.headers["webhook-timestamp"]) == clock.wall_ms() // 1_000
    signed = f"0-1-0.{request.headers['webhook-timestamp']}.".encode() + request.body
    expected = b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{expected}"


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_a_2xx_is_a_delivery(status: int) -> None:
    """Whatever its body says."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(status, body=b"" if status == 204 else b"thanks"))
        assert await webhook.post("0-1-0", b"{}") is None


@pytest.mark.parametrize("status", [304, 400, 401, 404, 409, 429, 500, 502, 503])
async def test_anything_else_can_be_tried_again(status: int) -> None:
    """The verdict names the status, and is not final."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(status))
        refused = await webhook.post("0-1-0", b"{}")
    assert refused is not None
    assert f"HTTP {status}" in refused.error
    assert not refused.is_final


async def test_gone_is_final() -> None:
    """With 410 a receiver unsubscribes."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(410))
        assert await webhook.post("0-1-0", b"{}") == Refused("HTTP 410", is_final=True)


async def test_a_redirect_is_not_followed() -> None:
    """An event goes where the settings say, and the signature with it to nobody else."""
    async with WebhookServer() as server, WebhookServer() as elsewhere, webhook_of(server.url) as webhook:
        server.answers.append(Answer(307, {"Location": elsewhere.url}))
        refused = await webhook.post("0-1-0", b"{}")
        assert elsewhere.requests == []
    assert refused is not None
    assert "AUCTION_TIMER_WEBHOOK_URL" in refused.error


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("-1", None),
        ("soon", None),
        ("Fri, 31 Dec 9999 99:99:99 GMT", None),
        ("99999999999999999999", 9_999_999_999.0),
    ],
)
async def test_the_pause_that_is_asked_for_is_read(said: str, seconds: float | None) -> None:
    """`Retry-After` in seconds; nonsense is no pause."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(429, {"Retry-After": said}))
        assert await webhook.post("0-1-0", b"{}") == Refused("HTTP 429", seconds)


async def test_the_pause_may_be_a_date() -> None:
    """It counts from now on our own clock; a date that is past is no pause."""
    clock = ManualClock()
    clock.step_wall(1_700_000_000_000 - clock.wall_ms())
    async with WebhookServer() as server, webhook_of(server.url, clock=clock) as webhook:
        server.answers.append(Answer(503, {"Retry-After": "Tue, 14 Nov 2023 22:13:50 GMT"}))
        server.answers.append(Answer(503, {"Retry-After": "Tue, 14 Nov 2023 22:13:10 GMT"}))
        assert await webhook.post("0-1-0", b"{}") == Refused("HTTP 503", 30.0)
        assert await webhook.post("0-1-0", b"{}") == Refused("HTTP 503", 0.0)


async def test_a_receiver_that_does_not_answer_is_given_up() -> None:
    """After the time of an attempt, whichever part of it the receiver holds up."""
    never = asyncio.Event()
    async with WebhookServer() as server, webhook_of(server.url, attempt_s=0.5) as webhook:
        server.answers.append(Answer(after=never))
        assert await webhook.post("0-1-0", b"{}") == Refused("no answer within 0.5 s")
        assert await webhook.post("0-2-0", b"{}") is None


async def test_a_receiver_that_hangs_up_has_not_answered() -> None:
    """Before the status: nobody knows what it has done, so it is tried again."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(hang_up=True))
        assert await webhook.post("0-1-0", b"{}") == Refused("no answer: RemoteProtocolError")


async def test_a_receiver_that_is_not_there() -> None:
    """A refused connection is an attempt like any other, and its error does not name the URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with webhook_of(f"http://user:pass-word@127.0.0.1:{port}/path-secret") as webhook:
        assert await webhook.post("0-1-0", b"{}") == Refused("no answer: ConnectError")


async def test_the_status_decides_when_the_body_breaks_off() -> None:
    """A receiver that said 200 and died has the event."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(200, body=b"thank you very much", cut=True))
        assert await webhook.post("0-1-0", b"{}") is None


@pytest.mark.parametrize("status", [200, 500])
async def test_an_endless_body_is_not_read(status: int) -> None:
    """A little more than the bound is read, whatever is on offer; then the connection is dropped."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.answers.append(Answer(status, endless=True))
        assert (await webhook.post("0-1-0", b"{}") is None) is (status == 200)
        await until(lambda: server.in_flight == 0)
        assert server.endless_bytes < 16_000_000, "more than the buffers of the two sockets hold"
        assert await webhook.post("0-2-0", b"{}") is None
        assert server.connections == 2


async def test_a_connection_is_used_again() -> None:
    """A body within the bound is read to its end, so that the next event needs no new connection; cookies are not kept."""
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.otherwise = lambda _: Answer(200, body=b"x" * ANSWER_BYTES_MAX)
        for number in range(5):
            assert await webhook.post(f"0-{number}-0", b"{}") is None
        assert server.connections == 1
        assert all("cookie" not in request.headers for request in server.requests)


async def test_attempts_at_a_time_are_bounded() -> None:
    """More of them wait their turn, and none is forgotten."""
    release = asyncio.Event()
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        server.otherwise = lambda _: Answer(after=release)
        async with asyncio.TaskGroup() as tasks:
            posted = [tasks.create_task(webhook.post(f"0-{number}-0", b"{}")) for number in range(3 * IN_FLIGHT_MAX)]
            await until(lambda: server.in_flight == IN_FLIGHT_MAX)
            release.set()
        assert [task.result() for task in posted] == [None] * (3 * IN_FLIGHT_MAX)
        assert server.in_flight_most == IN_FLIGHT_MAX


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is signed for the receiver goes to the receiver."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with WebhookServer() as server, webhook_of(server.url) as webhook:
        assert await webhook.post("0-1-0", b"{}") is None


async def test_what_may_be_logged_of_the_url() -> None:
    """Neither the password nor the path, which in many webhooks is the secret."""
    async with webhook_of("https://user:pass-word@hooks.example:8443/path-secret?token=x") as webhook:
        assert webhook.origin == "https://hooks.example:8443"
