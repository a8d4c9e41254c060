"""The webhook: one event, one attempt, one verdict. Who tries again, and when, is `reconciler.forwarder`'s affair."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

import httpx
import orjson

from engine.clock import Clock
from engine.domain.instants import EpochMs
from engine.store.protocol import UpdateEntry
from reconciler.signature import key_of, signed_headers

ATTEMPT_S: Final = 10.0
"""One attempt, from the connection to the status. Whoever needs longer should accept first and work later."""
DRAIN_S: Final = 1.0
ANSWER_BYTES_MAX: Final = 4_096
"""An answer's body says nothing to us. A short one is read so that the connection can be used again; a longer one is not."""
IN_FLIGHT_MAX: Final = 16
"""Attempts at a time, over all shards: a receiver sees no more connections than this from one process."""

SOURCE: Final = "/auction-timer"
CONTENT_TYPE: Final = "application/cloudevents+json"
_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_GONE: Final = 410


@dataclass(frozen=True, slots=True)
class Refused:
    """An attempt that failed. `is_final`: another one is not wanted. `retry_after_s`: not before, if the receiver said so."""

    error: str
    retry_after_s: float | None = None
    is_final: bool = False


def event_id(shard: int, entry: UpdateEntry) -> str:
    """The id under which a receiver knows an event, the same at every attempt: `<shard>-<stream id>`."""
    return f"{shard}-{entry.stream_id}"


def cloud_event(shard: int, entry: UpdateEntry) -> bytes:
    """An entry of the event lane as CloudEvents 1.0 in JSON; `data` is the entry's body.

    `auctionversion` is an extension: the version of the auction, which never goes back, so that a receiver can order events.

    Raises:
        ValueError: the body is not what the engine writes; the entry came from somebody else.
    """
    data = orjson.loads(entry.body)
    occurred_at = data.get("occurred_at", data.get("server_time")) if isinstance(data, dict) else None
    if not isinstance(occurred_at, int):
        raise ValueError("the body is no JSON object with occurred_at or server_time")  # noqa: TRY004 - as for broken JSON
    return orjson.dumps(
        {
            "specversion": "1.0",
            "id": event_id(shard, entry),
            "source": SOURCE,
            "type": entry.type,
            "time": _rfc3339(EpochMs(occurred_at)),
            "subject": entry.auction_id,
            "auctionversion": entry.version,
            "datacontenttype": "application/json",
            "data": data,
        }
    )


def _rfc3339(at: EpochMs) -> str:
    try:
        instant = _UNIX_EPOCH + timedelta(milliseconds=at)
    except OverflowError:
        raise ValueError("the body's time is out of range") from None
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Webhook:
    """A receiver, and the connections to it.

    Args:
        url: https, or http on loopback. It may hold a password or be a secret itself, so it stands in no error and no log.
        secret: see `reconciler.signature.key_of`.
        clock: its wall clock dates the attempts; receivers compare it with their own.
        attempt_s: how long one attempt may take.
    """

    def __init__(self, url: str, secret: str, clock: Clock, *, attempt_s: float = ATTEMPT_S) -> None:
        self._url = url
        self._key = key_of(secret)
        self._clock = clock
        self._attempt_s = attempt_s
        self._slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._client = httpx.AsyncClient(
            trust_env=False,  # no proxy and no certificates but those of this program's own settings
            follow_redirects=False,
            timeout=None,  # noqa: S113 - one deadline around the whole attempt, instead of one for each of its parts
        )

    @property
    def origin(self) -> str:
        """What may be logged of the URL: scheme, host and port."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    async def post(self, message_id: str, body: bytes) -> Refused | None:
        """Make one attempt; None if the receiver has the event (a 2xx status).

        A redirect is a failure. `410 Gone` is final: the specification lets a receiver unsubscribe with it.
        """
        async with self._slots:
            headers = signed_headers(self._key, message_id, self._clock.wall_ms() // 1_000, body)
            headers |= {"content-type": CONTENT_TYPE, "user-agent": "auction-timer"}
            try:
                async with asyncio.timeout(self._attempt_s):
                    response = await self._client.send(
                        self._client.build_request("POST", self._url, content=body, headers=headers), stream=True
                    )
            except TimeoutError:
                return Refused(f"no answer within {self._attempt_s:g} s")
            except (httpx.HTTPError, OSError) as error:
                # Its class only: some messages of httpx name the URL.
                return Refused(f"no answer: {type(error).__name__}")
            await _drain(response)
            # Nobody logs in here: cookies would only pile up.
            self._client.cookies.clear()
        return self._verdict(response)

    def _verdict(self, response: httpx.Response) -> Refused | None:
        status = response.status_code
        if 200 <= status < 300:
            return None
        if 300 <= status < 400:
            return Refused(
                f"HTTP {status}: redirects are not followed, set AUCTION_TIMER_WEBHOOK_URL to where it leads"
            )
        return Refused(f"HTTP {status}", self._retry_after_s(response), is_final=status == _GONE)

    def _retry_after_s(self, response: httpx.Response) -> float | None:
        """`Retry-After` in seconds from now (RFC 9110, 10.2.3: seconds, or a date)."""
        text = response.headers.get("retry-after", "").strip()
        if text.isascii() and text.isdigit():
            return float(text[:10])
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        if date.tzinfo is None:
            return None
        return max(0.0, date.timestamp() - self._clock.wall_ms() / 1_000)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()


async def _drain(response: httpx.Response) -> None:
    """Read a short body; give up a long, slow or broken one. The status has said everything."""
    with suppress(TimeoutError, httpx.HTTPError, OSError):
        try:
            async with asyncio.timeout(DRAIN_S):
                read = 0
                async for piece in response.aiter_raw():
                    read += len(piece)
                    if read > ANSWER_BYTES_MAX:
                        return
        finally:
            await response.aclose()
