"""Public keys for tokens, as their issuer publishes them: a JSON Web Key Set (RFC 7517) in a file or at a URL.

The keys are read again every few minutes, so that one that was withdrawn stops to count, and when a token names a key that
nobody knows, so that a new one counts at once. Whoever makes up key ids causes one reading per 10 s at most. While the
source is away, or holds nonsense, the keys that were read last stay in use.
"""

import asyncio
import warnings
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import orjson
import structlog
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, JWKRegistry, Key, OKPKey, RSAKey

from engine.clock import Clock, MonotonicNs
from engine.logs import without_query

REFRESH_EVERY_S: Final = 300.0
"""How long a withdrawn key is still accepted. Raising it asks the issuer less often; lowering it forgets keys sooner."""
READINGS_GAP_MS: Final = 10_000
READ_WITHIN_S: Final = 3.0
JWKS_BYTES_MAX: Final = 262_144
"""A set of a hundred RSA keys with their certificates has less."""
KEYS_MAX: Final = 100
PUBLIC: Final = (RSAKey, ECKey, OKPKey)
"""Key types that may be published. A symmetric key in a set would make everyone who reads it an issuer."""

log = structlog.get_logger()


class KeysError(Exception):
    """A key set cannot be read. The message says why, and names no secret."""


class KeySource(Protocol):
    """Where a key set comes from."""

    async def read(self) -> bytes:
        """The set as it is now, of `JWKS_BYTES_MAX` bytes at most.

        Raises:
            KeysError: it cannot be had.
        """
        ...


class FileSource:
    """A key set in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    async def read(self) -> bytes:
        return await asyncio.to_thread(self.read_now)

    def read_now(self) -> bytes:
        """As `read`, for who has no loop to keep."""
        try:
            with self._path.open("rb") as file:
                body = file.read(JWKS_BYTES_MAX + 1)
        except OSError as error:
            raise KeysError(f"{error.strerror or error}") from None
        _check_size(len(body))
        return body


class UrlSource:
    """A key set at a URL. Neither proxies of the environment nor redirects are followed: the keys come from there alone."""

    def __init__(self, url: str) -> None:
        self._url = url
        # Made once: reading the certificates of the authorities takes some 20 ms, and the loop has sockets to serve.
        self._verify = httpx.create_ssl_context(trust_env=False) if url.startswith("https:") else False

    def __str__(self) -> str:
        return without_query(self._url)

    async def read(self) -> bytes:
        try:
            async with (
                asyncio.timeout(READ_WITHIN_S),
                httpx.AsyncClient(trust_env=False, verify=self._verify, timeout=READ_WITHIN_S) as client,
                # Uncompressed: a bound on what is read is then one on what is held.
                client.stream("GET", self._url, headers={"Accept-Encoding": "identity"}) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    raise KeysError(f"answered {response.status_code}")
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    _check_size(len(body))
                return bytes(body)
        except TimeoutError:
            raise KeysError(f"no answer within {READ_WITHIN_S:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise KeysError(f"{type(error).__name__}: {error}") from None


class PublicKeys:
    """The keys that an issuer signs with now.

    Args:
        source: where they are read.
        clock: for the pace of reading.
    """

    def __init__(self, source: KeySource, clock: Clock) -> None:
        self.is_stale = False
        """Whether the last reading failed: what is known may not be what is published."""
        self._source = source
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._read_ns: MonotonicNs | None = None
        self._reading = asyncio.Lock()

    def named(self, kid: str | None) -> list[Key]:
        """The keys of this id; all of them if it is None."""
        return [key for key in self._keys if kid is None or key.kid == kid]

    async def refresh(self) -> None:
        """Read the set again, unless that was done within the last 10 s. Many callers at once cause one reading."""
        async with self._reading:
            now = self._clock.monotonic_ns()
            if self._read_ns is not None and now - self._read_ns < READINGS_GAP_MS * 1_000_000:
                return
            self._read_ns = now
            try:
                self._keys = parse_jwks(await self._source.read())
            except KeysError as error:
                self.is_stale = True
                log.warning("keys_unreadable", source=str(self._source), error=str(error), keys_kept=len(self._keys))
            else:
                self.is_stale = False
                log.info("keys_read", source=str(self._source), keys=len(self._keys))

    async def run(self) -> None:
        """Keep the keys fresh, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_EVERY_S)


def parse_jwks(body: bytes) -> tuple[Key, ...]:
    """The usable public keys of a set. Others are left out (RFC 7517, section 5), weak and symmetric ones too.

    Raises:
        KeysError: it is no key set, or holds no usable key.
    """
    try:
        listed = orjson.loads(body)["keys"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        raise KeysError('not a JSON object with "keys"') from None
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise KeysError(f'"keys" is not a list of at most {KEYS_MAX} keys')
    keys = tuple(key for entry in listed if (key := _public_key(entry)) is not None)
    if not keys:
        raise KeysError("no usable public key in it")
    return keys


def _public_key(entry: Any) -> Key | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SecurityWarning)  # RSA below 2,048 bits
            key = JWKRegistry.import_key(entry)
    except (JoseError, SecurityWarning, ValueError, TypeError, KeyError, AttributeError):
        return None
    return key if isinstance(key, PUBLIC) and (key.kid is None or isinstance(key.kid, str)) else None


def _check_size(size: int) -> None:
    if size > JWKS_BYTES_MAX:
        raise KeysError(f"more than {JWKS_BYTES_MAX} bytes")
