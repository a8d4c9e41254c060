"""The Python client: events in over HTTP, one auction out over a socket.

The idea: everything that can be decided without a network is decided in `TimerSession`, which takes frames and readings of a
monotonic clock and never awaits. `watch_auction` is the shell around it: it connects, hands frames over, sends what the
session wants sent, and comes back with `since` when it is thrown out.

    Api ──POST /events, GET ...──▶ gateway ──frames──▶ watch_auction ──receive(frame, now)──▶ TimerSession
                                                      ▲                                           │
                                                      └──────── due_message(now), cursor ─────────┘

ClientError
├── UrlError               the URL names no gateway
├── TokenError             the token is none
├── GatewayAwayError       nobody answers there, or only "not now", for longer than we wait
├── UnknownAuctionError    the gateway knows no such auction
├── RefusedError           the gateway answers no: `status`, `error_code`, `detail`
│   └── MalformedEventsError   `errors` says what is wrong with which event; none of the batch was taken
└── SocketClosedError      the gateway closed the socket with a code that coming back does not mend
"""

import asyncio
import contextlib
import math
import random
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import httpx
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from engine.clock import Clock, MonotonicNs, SystemClock
from engine.contract.intake import COMMAND_ID_CHARS_MAX
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from gateway.closing import CloseCode

Frame = dict[str, Any]
Timer = dict[str, Any]

EVENTS_MAX: Final = 500
BODY_BYTES_MAX: Final = 1_048_576
"""The bounds of one `POST /events` (contract, section 2)."""

CONNECT_TIMEOUT_S: Final = 3.0
ANSWER_TIMEOUT_S: Final = 10.0
"""The gateway itself answers 503 after 3 s without its store; later than this the connection is dead."""
CLOSE_TIMEOUT_S: Final = 2.0
FRAME_BYTES_MAX: Final = 1_048_576
RETRY_AFTER_MS_MAX: Final = 60_000
"""A pause somebody else asks for is honoured up to here."""
STEADY_MS: Final = 5_000
"""A socket that lived so long was a good one: the next pause starts small again. One that is thrown out at once does not."""
OVER_WITHIN_MS: Final = 6_000
"""The server closes within 5 s of the last event; a second more and we hang up ourselves."""

CLOSE_DRAINING: Final = 4100

SMOOTH_MS: Final = 100.0
WARN_MS: Final = 250.0
SYNC_MS: Final = 500.0
"""Requirement R9: below the first a correction is smoothed, above the second the viewer is warned, above the third the
session asks for the time at once."""

SLEW: Final = 0.05
"""A countdown that corrects itself runs at most 5 % fast or slow: 100 ms are gone after two seconds, and nobody sees a digit
twice. Ten times faster than the servers slew, because what is corrected here is only what one person sees."""
SAMPLES_MAX: Final = 8
AGE_PPM: Final = 600
"""How fast an old sample loses its worth: the servers slew by up to 500 ppm, two quartzes part by up to 100."""
CUT_MS: Final = 1.0
"""`t1` and `t2` are cut to the millisecond."""

SYNC_BURST: Final = 5
SYNC_BURST_GAP_MS: Final = 300
"""Five exchanges in the first 1.5 s find a short round trip; the server allows five messages a second."""
SYNC_EVERY_MS: Final = 15_000
SYNC_URGENT_GAP_MS: Final = 1_000
HEARTBEAT_MS: Final = 20_000
"""Until the snapshot says otherwise."""

_NS: Final = 1_000_000
_TOKEN: Final = re.compile(r"[!-~]+")
_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_OVER: Final = frozenset({Status.ENDED.value, Status.CANCELLED.value})
_TICK_FIELDS: Final = (
    "status",
    "version",
    "ends_at",
    "remaining_ms",
    "soft_close_until",
    "final_deadline",
    "extension_count",
    "extension_left_ms",
    "at_cap",
    "server_time",
)


class ClientError(Exception):
    """The root: whoever drives the client catches this and prints the message."""


class UrlError(ClientError):
    """The URL is not one of a gateway."""


class TokenError(ClientError):
    """The token cannot be one, and is not sent."""


class GatewayAwayError(ClientError):
    """Nobody answers, or only "not now", for longer than we wait."""

    def __init__(self, url: str, trouble: str) -> None:
        super().__init__(
            f"no gateway answers at {url} ({trouble}): start one with `auction-timer serve`, or name another with --url"
        )
        self.url = url
        self.trouble = trouble


class UnknownAuctionError(ClientError):
    """The gateway knows no such auction."""

    def __init__(self, url: str, auction_id: str) -> None:
        super().__init__(
            f"the gateway at {url} knows no auction {auction_id}: register it with an offers.auction.started event, "
            f"or look at {url}/auctions for the ids there are"
        )
        self.auction_id = auction_id


class PendingError(ClientError):
    """No engine has answered an order yet. It stands in the intake, and will be carried out."""

    def __init__(self, url: str, command_id: str) -> None:
        super().__init__(
            f"no engine has answered yet: the order stands, and {url}/commands/{command_id} tells what becomes of it"
        )
        self.command_id = command_id


class RefusedError(ClientError):
    """The gateway answered no. `error_code` is one of its catalogue, or empty if the answer is no problem document."""

    def __init__(self, status: int, error_code: str, detail: str) -> None:
        super().__init__(f"the gateway refused with {status} {error_code}".rstrip() + f": {detail}")
        self.status = status
        self.error_code = error_code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class EventFault:
    """One thing that is wrong with one event of a batch; an empty path is the event as a whole."""

    index: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}".strip()


class MalformedEventsError(RefusedError):
    """Events of a batch are malformed, and nothing of the batch was taken. `errors` names every bad event at least once."""

    def __init__(self, detail: str, errors: Sequence[EventFault]) -> None:
        shown = "; ".join(f"event {fault.index}: {fault}" for fault in errors[:3])
        super().__init__(400, "MALFORMED_EVENTS", f"{detail} ({shown})" if shown else detail)
        self.errors = tuple(errors)


class SocketClosedError(ClientError):
    """The gateway closed the socket, and coming back would not mend it."""

    def __init__(self, code: int, reason: str, remedy: str) -> None:
        super().__init__(f"the gateway closed the socket with {code} ({reason or 'no reason'}): {remedy}")
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and for how long something is tried again: pauses double from `first_ms` to `most_ms`, each shortened by up
    to a half at random so that clients do not march in step, until `deadline_ms` after the first attempt."""

    first_ms: float = 100
    most_ms: float = 2_000
    deadline_ms: float = 30_000

    def pauses_ms(self) -> Iterator[float]:
        """The pauses, without end."""
        pause_ms = self.first_ms
        while True:
            yield pause_ms * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, protects nothing
            pause_ms = min(self.most_ms, pause_ms * 2)


SOCKET_RETRY: Final = Retry(most_ms=5_000, deadline_ms=120_000)
"""For a socket that was live before: its gateway may restart, or its machine."""
FIRST_WITHIN_MS: Final = 5_000
"""For one that never was: somebody sits there and may have mistyped the URL."""


def gateway_url(url: str) -> str:
    """`url` without its trailing slash.

    Raises:
        UrlError: it is not `http://HOST…` or `https://HOST…`.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise UrlError(f"{url!r} is not the URL of a gateway: write it as http://HOST:PORT")
    return url.rstrip("/")


def socket_url(url: str, auction_id: str) -> str:
    """Where the socket of an auction is, for a gateway at `url`."""
    base = gateway_url(url)
    return f"ws{base.removeprefix('http')}/auctions/{quote(auction_id, safe=':')}/updates"


def rfc3339(at: EpochMs) -> str:
    """An instant as people read it: UTC, to the millisecond."""
    return (_UNIX_EPOCH + timedelta(milliseconds=at)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class EventResult:
    """What became of one posted event. `arrival_ms` is the stamp that decides, on the auction clock."""

    event_id: str
    status: str
    arrival_ms: EpochMs

    @property
    def is_duplicate(self) -> bool:
        """Whether the id was taken before: the arrival is then that of the first time."""
        return self.status == "duplicate"


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of `/readyz`. `date_ms` is the gateway's wall clock, cut to the second; None if it does not tell."""

    ready: bool
    checks: dict[str, str]
    date_ms: EpochMs | None


class Api:
    """The HTTP side. An `async with` block; environment proxies are ignored, because a loopback gateway is behind none.

    Args:
        url: of the gateway, `http://HOST:PORT`.
        token: what the gateway knows the caller by; one in open mode needs none.
        retry: for requests that may be repeated: all of these, since events carry their own ids.
        transport: for tests.

    Raises:
        UrlError, TokenError: one of the two cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        retry: Retry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = gateway_url(url)
        self.retry = retry or Retry()
        self.resent = 0
        """Requests that were sent once more."""
        self._answered = False
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=_authorization(token),
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def post_events(self, events: Sequence[Mapping[str, Any]]) -> list[EventResult]:
        """Send 1 to 500 events, of 1 MiB at most together, and wait until they are taken; retried with the same ids.

        Raises:
            MalformedEventsError: some are malformed; none was taken.
            RefusedError: the request as a whole is refused.
            GatewayAwayError: not taken within the deadline. They may or may not have been: send the same ids again.
        """
        return await self.post_encoded([orjson.dumps(event) for event in events])

    async def post_encoded(self, events: Sequence[bytes]) -> list[EventResult]:
        """The same, for events that are JSON already."""
        response = await self._request(
            "POST", "/events", content=b"[%b]" % b",".join(events), headers={"Content-Type": "application/json"}
        )
        if response.status_code != httpx.codes.ACCEPTED:
            raise _refusal(response)
        return [
            EventResult(result["id"], result["status"], EpochMs(result["arrival_ms"]))
            for result in _json(response)["results"]
        ]

    async def get_timer(self, auction_id: str) -> Timer:
        """The countdown of one auction.

        Raises:
            UnknownAuctionError: there is none.
            RefusedError, GatewayAwayError: as for `post_events`.
        """
        response = await self._request("GET", f"/auctions/{quote(auction_id, safe=':')}/timer")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise UnknownAuctionError(self.url, auction_id)
        return _json(_ok(response))

    async def list_auctions(
        self, *, status: Status | None = None, ending_before: EpochMs | None = None, limit: int = 500
    ) -> AsyncIterator[list[Timer]]:
        """All auctions, page by page of at most `limit`, next to close first.

        Raises:
            RefusedError, GatewayAwayError: as for `post_events`.
        """
        query: dict[str, str | int] = {"limit": limit}
        if status is not None:
            query["status"] = status.value
        if ending_before is not None:
            query["ending_before"] = ending_before
        while True:
            page = _json(_ok(await self._request("GET", "/auctions", params=query)))
            yield page["auctions"]
            if page["next_cursor"] is None:
                return
            query["cursor"] = page["next_cursor"]

    async def parked(self, *, limit: int, **filters: str) -> tuple[list[dict[str, Any]], int]:
        """Up to `limit` commands in troubleshooting, the longest waiting first, and how many there are in all.

        Args:
            filters: `error_code`, `event_type`.

        Raises:
            RefusedError, GatewayAwayError: as for `post_events`.
        """
        found: list[dict[str, Any]] = []
        query: dict[str, str | int] = dict(filters)
        while True:
            query["limit"] = min(limit - len(found), 500)
            page = _json(_ok(await self._request("GET", "/ops/troubleshooting", params=query)))
            found += page["commands"]
            if page["next_cursor"] is None or len(found) >= limit:
                return found, int(page["depth"])
            query["cursor"] = page["next_cursor"]

    async def retry_parked(
        self, command_id: str, *, reason: str | None, operator: str, shard: int | None = None
    ) -> dict[str, Any]:
        """Send a command in troubleshooting round again; `shard` says which of several of this id.

        Raises:
            RefusedError: it is not in troubleshooting (`INVALID_OPERATION`), not known, or one of several.
            PendingError: the order was taken, and no engine has answered.
            GatewayAwayError: as for `post_events`; it may have been sent round or not.
        """
        return await self._operate(command_id, "retry", shard, {"reason": reason, "operator": operator})

    async def cancel_parked(
        self, command_id: str, *, reason: str, operator: str | None, shard: int | None = None
    ) -> dict[str, Any]:
        """Cancel a command in troubleshooting for good. With a token its subject is the operator.

        Raises:
            RefusedError, PendingError, GatewayAwayError: as for `retry_parked`.
        """
        return await self._operate(command_id, "cancel", shard, {"reason": reason, "operator": operator})

    async def requeue(self, **wanted: str | int | None) -> dict[str, int]:
        """Send many commands round again: `requeued`, `refused`, `pending`.

        Args:
            wanted: `limit`, `error_code`, `event_type`, `operator`, `reason`.

        Raises:
            RefusedError, GatewayAwayError: as for `post_events`.
        """
        return _json(_ok(await self._request("POST", "/ops/troubleshooting/requeue", json=wanted)))

    async def _operate(
        self, command_id: str, what: str, shard: int | None, body: dict[str, str | None]
    ) -> dict[str, Any]:
        if len(command_id) > COMMAND_ID_CHARS_MAX:
            raise ClientError(f"an id has at most {COMMAND_ID_CHARS_MAX} characters, not {len(command_id)}")
        path = f"/ops/troubleshooting/{quote(command_id, safe='')}/{what}"
        response = await self._request("POST", path, json=body, params={} if shard is None else {"shard": shard})
        if response.status_code == httpx.codes.ACCEPTED:
            raise PendingError(self.url, str(_json(response)["command_id"]))
        return _json(_ok(response))

    async def readyz(self) -> Readiness:
        """Whether the gateway can do its job. Asked once: whoever wants to wait asks again.

        Raises:
            GatewayAwayError: nobody answers.
            RefusedError: somebody answers who is no gateway.
        """
        try:
            response = await self._http.get("/readyz")
        except httpx.TransportError as error:
            raise GatewayAwayError(self.url, _trouble(error)) from error
        if response.status_code not in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE):
            raise _refusal(response)
        self._answered = True
        body = _json(response)
        return Readiness(body.get("ready") is True, dict(body.get("checks") or {}), _date_ms(response))

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send until it is answered with anything but "not now", within one deadline for all attempts.

        The deadline is a short one until anybody has answered here: a wrong URL should not take half a minute to be told.
        """
        within_ms = self.retry.deadline_ms if self._answered else min(self.retry.deadline_ms, FIRST_WITHIN_MS)
        trouble, cause = "no answer yet", None
        try:
            async with asyncio.timeout(within_ms / 1_000) as bound:
                for own_pause_ms in self.retry.pauses_ms():
                    pause_ms = own_pause_ms
                    try:
                        response = await self._http.request(method, path, **options)
                    except httpx.TransportError as error:
                        trouble, cause = _trouble(error), error
                    else:
                        self._extend(bound)
                        if response.status_code not in _NOT_NOW:
                            return response
                        trouble, cause = str(_refusal(response)), None
                        pause_ms = max(pause_ms, _retry_after_ms(response.headers.get("Retry-After")))
                    await asyncio.sleep(pause_ms / 1_000)
                    self.resent += 1
        except TimeoutError:
            raise GatewayAwayError(self.url, trouble) from cause
        raise AssertionError("the pauses have no end")

    def _extend(self, bound: asyncio.Timeout) -> None:
        """Somebody is there: from now on it is worth waiting for."""
        if not self._answered:
            self._answered = True
            due_s = bound.when()
            assert due_s is not None
            bound.reschedule(due_s + max(0, self.retry.deadline_ms - FIRST_WITHIN_MS) / 1_000)


_NOT_NOW: Final = frozenset({429, 502, 503, 504})
"""The gateway's own 503, its rate limit, and what a proxy in front says while no gateway is behind it."""


def _authorization(token: str | None) -> dict[str, str]:
    """The header that carries a token (RFC 6750, section 2.1).

    Raises:
        TokenError: it holds what no header can carry.
    """
    if token is None:
        return {}
    token = token.strip()  # as a file that was read ends with a newline
    if not _TOKEN.fullmatch(token):
        raise TokenError(
            "the token is not one of printable ASCII characters without spaces: look for quotes or line breaks"
        )
    return {"Authorization": f"Bearer {token}"}


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        raise RefusedError(response.status_code, "", f"{response.url} answers with something else than a JSON object")
    return body


def _ok(response: httpx.Response) -> httpx.Response:
    if response.status_code != httpx.codes.OK:
        raise _refusal(response)
    return response


def _refusal(response: httpx.Response) -> RefusedError:
    """The problem document of an answer (RFC 9457), as an error."""
    try:
        problem = _json(response)
    except RefusedError as error:
        return error
    error_code, detail = str(problem.get("error_code", "")), str(problem.get("detail", ""))
    if error_code == "MALFORMED_EVENTS":
        errors = problem.get("errors") or []
        return MalformedEventsError(
            detail, [EventFault(int(fault["index"]), str(fault["path"]), str(fault["reason"])) for fault in errors]
        )
    if error_code == "UNAUTHENTICATED":
        detail += " (give one with AUCTION_TIMER_TOKEN or --token)"
    return RefusedError(response.status_code, error_code, detail or response.reason_phrase)


def _trouble(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _retry_after_ms(value: str | None) -> float:
    """`Retry-After` in seconds (RFC 9110, section 10.2.3). Its other form, a date, needs a common clock: ours serves then."""
    if value is None or not (value.isascii() and value.isdigit()):
        return 0
    return min(int(value) * 1_000, RETRY_AFTER_MS_MAX)


def _date_ms(response: httpx.Response) -> EpochMs | None:
    try:
        return EpochMs(int(parsedate_to_datetime(response.headers["Date"]).timestamp()) * 1_000)
    except (KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class _Sample:
    at_ns: MonotonicNs
    offset_ms: float
    rtt_ms: float

    def uncertainty_ms(self, now: MonotonicNs) -> float:
        return self.rtt_ms / 2 + CUT_MS + (now - self.at_ns) / _NS * AGE_PPM / 1_000_000


class ServerClock:
    """The auction clock as one client knows it: its own monotonic clock plus an offset.

    Two kinds of evidence. A frame that says `server_time` cannot have been sent later than it came, so it bounds the offset
    from below. An exchange (`t0` sent, `t1` received there, `t2` answered there, and now) bounds it from both sides: the
    middle is wrong by at most half the round trip, so the shortest round trip counts.

    Worked example. Sent at 10.000 s of ours, received and answered at 1,700,000,000.000 s of theirs, back at 10.040 s: the
    offset is 1,699,999,989.980 s, give or take 20 ms. If 30 ms less were in force until now, `drift_ms` is -30, and the
    countdown runs 5 % fast for 0.6 s.

    A new exchange that cannot be true together with the best one means that a clock stepped, or that this machine slept
    (its monotonic clock stands still meanwhile): then only the new one counts.
    """

    def __init__(self) -> None:
        self.drift_ms: float | None = None
        """How far what was shown stood from the best evidence when it last came in; positive: ahead of the server."""
        self.rtt_ms: float | None = None
        """The round trip of the exchange in force."""
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES_MAX)
        # What is shown is `_from_ms` at `_from_ns`, moving towards `_goal_ms`.
        self._from_ms = 0.0
        self._from_ns = MonotonicNs(0)
        self._goal_ms: float | None = None

    def hear(self, server_time: float, now: MonotonicNs) -> float:
        """Take the time a frame says it was sent.

        Returns:
            How far the frame's time is ahead of ours, in ms; negative: behind, as it is by the time it travelled.
        """
        offset_ms = server_time - now / _NS
        if self._goal_ms is None:
            self._from_ms, self._from_ns, self._goal_ms = offset_ms, now, offset_ms
        ahead_ms = offset_ms - self._offset_ms(now)
        if not self._samples and offset_ms > self._goal_ms:
            self._aim(offset_ms, now)
        return ahead_ms

    def answer(self, t0_ns: MonotonicNs, t1: float, t2: float, now: MonotonicNs) -> None:
        """Take an exchange: asked at `t0_ns`, received there at `t1`, answered there at `t2` (ms), back `now`."""
        rtt_ms = max(0.0, (now - t0_ns) / _NS - (t2 - t1))
        sample = _Sample(now, ((t1 - t0_ns / _NS) + (t2 - now / _NS)) / 2, rtt_ms)
        if self._samples and self._contradicts(sample, now):
            self._samples.clear()
        self._samples.append(sample)
        best = self._best(now)
        self.rtt_ms = best.rtt_ms
        if self._goal_ms is None:
            self._from_ms, self._from_ns, self._goal_ms = best.offset_ms, now, best.offset_ms
        self._aim(best.offset_ms, now)

    def now_ms(self, now: MonotonicNs) -> float | None:
        """The auction clock at `now`, in ms; None before any evidence."""
        return None if self._goal_ms is None else now / _NS + self._offset_ms(now)

    def _best(self, now: MonotonicNs) -> _Sample:
        return min(self._samples, key=lambda sample: sample.uncertainty_ms(now))

    def _contradicts(self, sample: _Sample, now: MonotonicNs) -> bool:
        best = self._best(now)
        return abs(sample.offset_ms - best.offset_ms) > sample.uncertainty_ms(now) + best.uncertainty_ms(now)

    def _aim(self, goal_ms: float, now: MonotonicNs) -> None:
        shown_ms = self._offset_ms(now)
        self.drift_ms = shown_ms - goal_ms
        self._from_ms = shown_ms if abs(self.drift_ms) < SMOOTH_MS else goal_ms
        self._from_ns, self._goal_ms = now, goal_ms

    def _offset_ms(self, now: MonotonicNs) -> float:
        assert self._goal_ms is not None
        reach_ms = (now - self._from_ns) / _NS * SLEW
        return self._from_ms + max(-reach_ms, min(reach_ms, self._goal_ms - self._from_ms))


class ConnectionState(StrEnum):
    """How the session stands with the server."""

    CONNECTING = "connecting"
    LIVE = "live"
    RECONNECTING = "reconnecting"
    OVER = "over"


class TimerSession:
    """One watched auction: what is known of it, and what to say to the server. Sans I/O: it is told frames and the time.

    Args:
        auction_id: which.
        keeps_time: ask for the time regularly. Without, only when the line is silent, to see whether anybody is there.
    """

    def __init__(self, auction_id: str, *, keeps_time: bool = True) -> None:
        self.auction_id = auction_id
        self.state = ConnectionState.CONNECTING
        self.clock = ServerClock()
        self.timer: Timer | None = None
        """The newest timer that is known, a copy of ours."""
        self.cursor: str | None = None
        """Where to resume: everything up to here was received."""
        self.recovered: bool | None = None
        """What the last snapshot said: all that was missed follows, or not; None if nothing was asked for."""
        self.reconnects = 0
        self.gaps = 0
        """Reconnects after which events are missing."""
        self.trouble: str | None = None
        """Why the line was lost last, or what the server complained of."""
        self._keeps_time = keeps_time
        self._heartbeat_ms = HEARTBEAT_MS
        self._behind_replay: str | None = None
        self._asked: dict[float, MonotonicNs] = {}
        self._asks = 0
        self._asked_ns = MonotonicNs(0)
        self._next_sync_ns = MonotonicNs(0)
        self._heard_ns: MonotonicNs | None = None
        self._over_ns: MonotonicNs | None = None

    @property
    def status(self) -> str | None:
        """The auction's status; None before the first frame."""
        return None if self.timer is None else str(self.timer["status"])

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.status in _OVER

    @property
    def drift_ms(self) -> float | None:
        """How far the countdown stood from the server's when that was last measured, in ms."""
        return self.clock.drift_ms

    @property
    def warns(self) -> bool:
        """Whether the drift is one that a viewer should know of (requirement R9)."""
        return self.drift_ms is not None and abs(self.drift_ms) > WARN_MS

    def remaining_ms(self, now: MonotonicNs) -> int | None:
        """The countdown, in ms: 0 when it is over, frozen while paused, None before the first frame.

        Rounded up, so that 0 is not shown before the end is reached.
        """
        server_now_ms = self.clock.now_ms(now)
        if self.timer is None or server_now_ms is None:
            return None
        if self.is_over:
            return 0
        frozen: int | None = self.timer.get("paused_remaining_ms")
        return max(0, math.ceil(self.timer["ends_at"] - server_now_ms)) if frozen is None else frozen

    # The line.

    def connected(self, now: MonotonicNs) -> None:
        """The handshake is done; a snapshot is to come."""
        if self._heard_ns is not None:
            self.reconnects += 1
        self._heard_ns = now
        self._asked.clear()
        self._asks = 0
        self._behind_replay = None
        self._next_sync_ns = now

    def lost(self, trouble: str) -> None:
        """The line is gone, or could not be had."""
        self.trouble = trouble
        if not self.is_over:
            self.state = ConnectionState.CONNECTING if self.timer is None else ConnectionState.RECONNECTING

    def is_silent(self, now: MonotonicNs) -> bool:
        """Whether nothing came for two heartbeats, although one was asked for in between: the line is dead."""
        return self._heard_ns is not None and now - self._heard_ns >= 2 * self._heartbeat_ms * _NS

    def is_farewell_due(self, now: MonotonicNs) -> bool:
        """Whether the auction is over and the server had its time to close."""
        return self._over_ns is not None and now - self._over_ns >= OVER_WITHIN_MS * _NS

    def wake_ns(self) -> MonotonicNs:
        """When to look again if no frame comes."""
        assert self._heard_ns is not None
        instants = [self._heard_ns + 2 * self._heartbeat_ms * _NS]
        if self._speaks:
            instants.append(self._message_ns())
        if self._over_ns is not None:
            instants.append(self._over_ns + OVER_WITHIN_MS * _NS)
        return MonotonicNs(min(instants))

    def due_message(self, now: MonotonicNs) -> Frame | None:
        """What is to be sent now, if anything; it counts as sent."""
        if not self._speaks or now < self._message_ns():
            return None
        self._asks += 1
        gap_ms = SYNC_BURST_GAP_MS if self._keeps_time and self._asks < SYNC_BURST else SYNC_EVERY_MS
        self._asked_ns, self._next_sync_ns = now, MonotonicNs(now + gap_ms * _NS)
        t0 = round(now / _NS, 3)
        self._asked = dict([*self._asked.items()][-SYNC_BURST:]) | {t0: now}
        message: Frame = {"type": "sync", "t0": t0}
        if self.clock.rtt_ms is not None and self.drift_ms is not None:
            message |= {"drift_ms": round(self.drift_ms, 3), "rtt_ms": round(self.clock.rtt_ms, 3)}
        return message

    @property
    def _speaks(self) -> bool:
        """Not before the snapshot, and not to a server that is about to close."""
        return self.timer is not None and not self.is_over

    def _message_ns(self) -> int:
        """When the next message is due. A silent line gets one however the session keeps time."""
        assert self._heard_ns is not None
        silence_ns = max(self._heard_ns + self._heartbeat_ms * _NS, self._next_sync_ns)
        return min(silence_ns, self._next_sync_ns) if self._keeps_time else silence_ns

    # Frames.

    def receive(self, frame: Frame, now: MonotonicNs) -> None:
        """Take a frame that came in at `now`."""
        self._heard_ns = now
        kind = frame.get("type")
        if kind == "sync":
            self._on_sync(frame, now)
            return
        if kind == "error":
            self.trouble = str(frame.get("detail"))
            return
        if isinstance(server_time := frame.get("server_time"), int):
            self._hear(server_time, now)
        if kind == "timer.snapshot":
            self._on_snapshot(frame)
        elif kind == "timer.tick":
            self._on_tick(frame)
        else:
            self._on_event(frame)
        if self.is_over:
            self.state = ConnectionState.OVER
            self._over_ns = self._over_ns or now

    def _hear(self, server_time: int, now: MonotonicNs) -> None:
        """A frame from the far side of our clock: ask for the time now, not in 15 s."""
        ahead_ms = self.clock.hear(server_time, now)
        if abs(ahead_ms) > SYNC_MS:
            urgent_ns = max(now, self._asked_ns + SYNC_URGENT_GAP_MS * _NS)
            self._next_sync_ns = MonotonicNs(min(self._next_sync_ns, urgent_ns))

    def _on_sync(self, frame: Frame, now: MonotonicNs) -> None:
        t0_ns = self._asked.pop(frame["t0"], None)
        if t0_ns is not None:
            self.clock.answer(t0_ns, frame["t1"], frame["t2"], now)

    def _on_snapshot(self, frame: Frame) -> None:
        self.state = ConnectionState.LIVE
        self.recovered = frame.get("recovered")
        self._heartbeat_ms = frame.get("heartbeat_ms") or HEARTBEAT_MS
        if self.recovered:
            # What was missed follows, with older cursors than this one: until it is here, we have not got so far.
            self._behind_replay = frame.get("cursor")
            self._show(frame["timer"])
            return
        if self.recovered is False:
            self.gaps += 1
        # Not by version: after a failover the server may truly stand behind what it said before.
        self.timer = dict(frame["timer"])
        self.cursor = frame.get("cursor") or self.cursor

    def _on_tick(self, frame: Frame) -> None:
        if self._behind_replay is not None:
            # A tick is sent after everything that was missed, and nothing was.
            self.cursor, self._behind_replay = self._behind_replay, None
        if self.timer is None or frame["version"] < self.timer["version"]:
            return
        self.timer |= {name: frame[name] for name in _TICK_FIELDS if name in frame}
        if frame["status"] == Status.PAUSED:
            self.timer["paused_remaining_ms"] = frame["remaining_ms"]
        else:
            self.timer.pop("paused_remaining_ms", None)

    def _on_event(self, frame: Frame) -> None:
        if (cursor := frame.get("cursor")) is not None:
            self.cursor, self._behind_replay = cursor, None
        if "timer" not in frame:
            return
        if frame.get("type") == "timer.resynced":
            self.timer = dict(frame["timer"])
        else:
            self._show(frame["timer"])

    def _show(self, timer: Timer) -> None:
        if self.timer is None or timer["version"] >= self.timer["version"]:
            self.timer = dict(timer)


@dataclass(frozen=True, slots=True)
class _Lost:
    """Why there is no line, and how long to stay away at least; None: as long as the backoff says."""

    trouble: str
    pause_ms: float | None = None


async def watch_auction(
    url: str,
    auction_id: str,
    *,
    token: str | None = None,
    session: TimerSession | None = None,
    clock: Clock | None = None,
    retry: Retry = SOCKET_RETRY,
    first_within_ms: float = FIRST_WITHIN_MS,
) -> AsyncGenerator[Frame, None]:
    """Yield the frames of an auction until it is over, across lost connections. Put it into `contextlib.aclosing`.

    Args:
        url: of the gateway, `http://HOST:PORT`.
        token: what the gateway knows the caller by; one in open mode needs none.
        session: what keeps the state; read it while iterating. Every frame was given to it before it is yielded.
        clock: what the session's time is read from.
        retry: its deadline bounds how long a line that was live may be away; its pauses are those between attempts.
        first_within_ms: the same bound for a line that never was.

    Raises:
        TokenError: the token holds what no header can carry.
        UnknownAuctionError: the handshake was answered 404.
        RefusedError: the handshake was refused for good.
        SocketClosedError: closed with 4400 or 4401.
        GatewayAwayError: no line within the bound.
    """
    session = session or TimerSession(auction_id)
    clock = clock or SystemClock()
    uri = socket_url(url, auction_id)
    pauses = retry.pauses_ms()
    alone_ns = clock.monotonic_ns()
    within_ms = first_within_ms
    while True:
        line = await _open(uri, session, token)
        if isinstance(line, ClientConnection):
            opened_ns = clock.monotonic_ns()
            session.connected(opened_ns)
            try:
                while isinstance(got := await _next(line, session, clock), dict):
                    yield got
            finally:
                await line.close()
            if got is None:
                return
            if session.timer is not None:
                within_ms = retry.deadline_ms
            alone_ns = clock.monotonic_ns()
            if alone_ns - opened_ns > STEADY_MS * _NS:
                pauses = retry.pauses_ms()
            lost = got
        else:
            lost = line
        session.lost(lost.trouble)
        if (clock.monotonic_ns() - alone_ns) / _NS > within_ms:
            raise GatewayAwayError(gateway_url(url), lost.trouble)
        await asyncio.sleep((next(pauses) if lost.pause_ms is None else lost.pause_ms) / 1_000)


async def _open(uri: str, session: TimerSession, token: str | None) -> ClientConnection | _Lost:
    if session.cursor is not None:
        uri += f"?since={quote(session.cursor)}"
    try:
        return await connect(
            uri,
            additional_headers=_authorization(token),
            compression=None,
            proxy=None,
            max_size=FRAME_BYTES_MAX,
            open_timeout=CONNECT_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            # The session listens for the heartbeat of the contract, and asks where it stays out.
            ping_interval=None,
        )
    except InvalidStatus as refused:
        return _on_refused(refused, uri, session.auction_id)
    except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
        return _Lost(_trouble(error))


def _on_refused(refused: InvalidStatus, uri: str, auction_id: str) -> _Lost:
    response = refused.response
    origin = urlsplit(uri)
    url = f"http{origin.scheme.removeprefix('ws')}://{origin.netloc}{origin.path.rpartition('/auctions/')[0]}"
    if response.status_code == httpx.codes.NOT_FOUND:
        raise UnknownAuctionError(url, auction_id)
    if response.status_code not in _NOT_NOW:
        raise _refusal(
            httpx.Response(response.status_code, content=bytes(response.body or b""), request=httpx.Request("GET", url))
        )
    pause_ms = _retry_after_ms(response.headers.get("Retry-After"))
    return _Lost(f"the handshake was answered {response.status_code}", pause_ms or None)


async def _next(line: ClientConnection, session: TimerSession, clock: Clock) -> Frame | _Lost | None:
    """The next frame; `_Lost` if the line is; None if the auction is over and so is the line."""
    while True:
        now = clock.monotonic_ns()
        if session.is_farewell_due(now):
            return None
        if session.is_silent(now):
            return _Lost("the gateway fell silent")
        message = session.due_message(now)
        if message is not None:
            # A line that is closed takes no message, but it may hold frames that came before the close: read on.
            with contextlib.suppress(ConnectionClosed):
                await line.send(orjson.dumps(message), text=True)
        try:
            async with asyncio.timeout(max(0, session.wake_ns() - now) / 1e9):
                data = await line.recv(decode=False)
        except TimeoutError:
            continue
        except ConnectionClosed as closed:
            return _on_closed(closed, session)
        frame = orjson.loads(data)
        session.receive(frame, clock.monotonic_ns())
        return dict(frame)


def _on_closed(closed: ConnectionClosed, session: TimerSession) -> _Lost | None:
    """What a close code asks for (contract, section 4)."""
    code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
    if code == CloseCode.AUCTION_OVER or session.is_over:
        return None
    if code == CloseCode.BAD_MESSAGES:
        raise SocketClosedError(
            code, reason, "this client and the gateway speak different protocols; use equal versions"
        )
    if code == CloseCode.TOKEN_EXPIRED:
        raise SocketClosedError(code, reason, "renew the token and watch again")
    drained = code in (CloseCode.GOING_AWAY, CLOSE_DRAINING)
    return _Lost(f"closed with {code}: {reason or 'the connection broke'}", _come_back_ms(reason) if drained else None)


def _come_back_ms(reason: str) -> float | None:
    """The pause a draining gateway asks for: `retry_after_ms`, and a random part of `jitter_ms`."""
    try:
        asked = orjson.loads(reason)
        after_ms, jitter_ms = float(asked["retry_after_ms"]), float(asked["jitter_ms"])
    except (orjson.JSONDecodeError, TypeError, KeyError, ValueError):
        return None
    pause_ms = max(0.0, after_ms) + random.uniform(0, max(0.0, jitter_ms))  # noqa: S311 - spreads a reconnect storm
    return min(pause_ms, RETRY_AFTER_MS_MAX)
