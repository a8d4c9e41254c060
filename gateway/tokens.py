"""From a request to a principal: where the token stands, and whether it is good.

Tokens are signed JWTs (RFC 7519). The algorithm that a token claims picks the kind of key, never the other way round: HS256
only ever meets the secret, the algorithms with public keys only ever meet keys of their own type, and `none` meets nothing.
So a token "signed" with a public key as its secret finds no key to agree with.

    HTTP     Authorization: Bearer JWT                                        (RFC 6750, section 2.1)
    socket   the same · Sec-WebSocket-Protocol: auction-timer.v1, bearer.JWT · ?token=JWT
    stream   as HTTP · ?token=JWT
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import parse_qs

import structlog
from joserfc import jwt
from joserfc.errors import (
    BadSignatureError,
    ClaimError,
    ExpiredTokenError,
    JoseError,
    SecurityWarning,
    UnsupportedAlgorithmError,
)
from joserfc.jwa import JWSAlgModel
from joserfc.jwk import Key, OctKey
from joserfc.jws import JWSRegistry
from joserfc.jwt import ClaimsOption, JWTClaimsRegistry
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.clock import AuctionClock
from engine.domain.instants import EPOCH_MS_MAX, SECOND_MS, EpochMs
from engine.settings import Settings, SettingsError
from gateway.auth import LEEWAY_MS, LOCAL, Principal
from gateway.jwks import FileSource, PublicKeys, UrlSource
from gateway.problems import Problem, ProblemType, problem_response, unavailable

TOKEN_BYTES_MAX: Final = 8_192
SUBJECT: Final = re.compile(r"[!-~]{1,128}")
"""The identifiers that an auction is registered with look the same: a subject is compared with them."""
SECRET_BYTES_WANTED: Final = 32
"""RFC 7518, section 3.2: a key for HS256 is no shorter than its hash."""

WITH_SECRET: Final = frozenset({"HS256"})
WITH_PUBLIC_KEY: Final = frozenset(
    {
        *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
        *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
    }
)
"""What is not in one of these two sets is refused, whatever the library may support."""

SUBPROTOCOL: Final = "auction-timer.v1"
BEARER_SUBPROTOCOL: Final = "bearer."

EVENT_STREAM_PATH: Final = re.compile(r"/auctions/[^/]+/events")
"""A browser's EventSource sets no header, so here alone of HTTP the query may hold the token."""

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/openapi.json", "/asyncapi.json"})
"""What probes and tools read before anybody gave them a token. None of it tells anything about an auction."""

log = structlog.get_logger()


class TokenError(Exception):
    """A token is not accepted. The message says why, and holds nothing of the token."""


class UnknownKeyError(TokenError):
    """No key is known that could have signed it. Reading the keys again may mend that."""


class KeysUnavailableError(Exception):
    """No key is known that could have signed it, and the keys cannot be read now."""


class Tokens:
    """Verifies tokens.

    Args:
        clock: what `exp` and `nbf` are held against: the one clock of the deployment.
        secret: for HS256; None accepts none.
        keys: for the algorithms with public keys; None accepts none.
        issuer: the `iss` a token must carry; None: any.
        audience: the `aud` a token must carry; None: any.

    Raises:
        ValueError: the secret is a public key.
    """

    def __init__(
        self,
        clock: AuctionClock,
        *,
        secret: str | None = None,
        keys: PublicKeys | None = None,
        issuer: str | None = None,
        audience: str | None = None,
    ) -> None:
        self.keys = keys
        self._secret = None if secret is None else _secret_key(secret)
        self._algorithms = _AllowList(
            (WITH_SECRET if secret is not None else frozenset())
            | (WITH_PUBLIC_KEY if keys is not None else frozenset())
        )
        wanted: dict[str, ClaimsOption] = {"sub": {"essential": True}, "exp": {"essential": True}}
        if issuer is not None:
            wanted["iss"] = {"essential": True, "value": issuer}
        if audience is not None:
            wanted["aud"] = {"essential": True, "value": audience}
        self._claims = JWTClaimsRegistry(
            now=lambda: clock.now_ms() // SECOND_MS, leeway=LEEWAY_MS // SECOND_MS, **wanted
        )

    async def principal(self, token: str) -> Principal:
        """Whom a token names; the keys are read again where that may help.

        Raises:
            TokenError: it is not accepted.
            KeysUnavailableError: nobody can tell now.
        """
        try:
            return self.verify(token)
        except UnknownKeyError:
            assert self.keys is not None
            await self.keys.refresh()
        try:
            return self.verify(token)
        except UnknownKeyError:
            if self.keys.is_stale:
                raise KeysUnavailableError from None
            raise

    def verify(self, token: str) -> Principal:
        """Whom a token names, by the keys that are known.

        Raises:
            TokenError: it is not accepted. `UnknownKeyError` if no key that is known could have signed it.
        """
        if len(token) > TOKEN_BYTES_MAX:
            raise TokenError(f"the token has more than {TOKEN_BYTES_MAX} bytes")
        try:
            claims = jwt.decode(token, self._key_of, registry=self._algorithms).claims
            self._claims.validate(claims)
        except TokenError:
            raise
        except ExpiredTokenError:
            raise TokenError("the token has expired: renew it") from None
        except ClaimError as error:
            raise TokenError(f"the token's claim {error.claim} is missing, or not what is accepted here") from None
        except BadSignatureError:
            raise TokenError("the token's signature is wrong") from None
        except UnsupportedAlgorithmError:
            raise TokenError("the token's algorithm is not accepted here") from None
        except Exception:
            raise TokenError("the token cannot be read") from None
        return _principal(claims)

    def _key_of(self, signed: Any) -> Key:
        """The key that a token must have been signed with, by its unverified header."""
        header = signed.headers()
        algorithm, kid = header["alg"], header.get("kid")
        if algorithm in WITH_SECRET:
            assert self._secret is not None, "the allow-list admits HS256 only with a secret"
            return self._secret
        assert self.keys is not None, "the allow-list admits these only with keys"
        fitting = [key for key in self.keys.named(kid) if _fits(self._algorithms.get_alg(algorithm), key)]
        if not fitting:
            raise UnknownKeyError("no key is known that could have signed the token")
        if kid is None and len(fitting) > 1:
            raise TokenError("the token names no key (kid), and more than one fits")
        return fitting[0]


class _AllowList(JWSRegistry):
    """Exactly these algorithms. Unknown header parameters are ignored, as RFC 7515 (section 4) wants, unless critical."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(strict_check_header=False)
        self._names = names

    def get_alg(self, name: str) -> JWSAlgModel:
        # Not the library's own: for an empty list it falls back to its defaults, and it warns of EdDSA, a mere rename.
        if name not in self._names:
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


def _fits(algorithm: JWSAlgModel, key: Key) -> bool:
    try:
        algorithm.check_key(key)
        key.check_key_op("verify")
    except JoseError:
        return False
    return True


def _secret_key(secret: str) -> OctKey:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # we say it ourselves, in the log
        return OctKey.import_key(secret)


def _principal(claims: dict[str, Any]) -> Principal:
    subject, expires_s = claims["sub"], claims["exp"]
    if not SUBJECT.fullmatch(subject):
        raise TokenError("the token's claim sub is not 1-128 printable ASCII characters without spaces")
    expires_at = EpochMs(int(min(expires_s, EPOCH_MS_MAX // SECOND_MS) * SECOND_MS))
    return Principal(subject, _names(claims, "scope"), _names(claims, "roles"), expires_at)


def _names(claims: dict[str, Any], claim: str) -> frozenset[str]:
    """A claim that lists names: a string with spaces between them (RFC 8693, section 4.2), or a list."""
    listed = claims.get(claim)
    if listed is None:
        return frozenset()
    names = listed.split() if isinstance(listed, str) else listed
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TokenError(f"the token's claim {claim} is neither a string nor a list of strings")
    return frozenset(names)


def tokens_of(settings: Settings, clock: AuctionClock) -> Tokens | None:
    """What the settings ask for; None in open mode.

    Raises:
        SettingsError: the secret cannot be used.
    """
    secret = settings.jwt_secret
    if not settings.wants_tokens:
        return None
    keys = None
    if settings.jwks_file is not None:
        keys = PublicKeys(FileSource(settings.jwks_file), clock.clock)
    elif settings.jwks_url:
        keys = PublicKeys(UrlSource(settings.jwks_url), clock.clock)
    if secret is not None and len(secret.encode()) < SECRET_BYTES_WANTED:
        log.warning(
            "secret_too_short",
            detail=f"AUCTION_TIMER_JWT_SECRET has less than {SECRET_BYTES_WANTED} bytes: it may be guessed from a token; "
            "make one with `openssl rand -base64 48`",
        )
    try:
        return Tokens(clock, secret=secret, keys=keys, issuer=settings.jwt_issuer, audience=settings.jwt_audience)
    except ValueError:
        raise SettingsError(
            [
                "AUCTION_TIMER_JWT_SECRET is a public key, which is no secret: put it in a key set, AUCTION_TIMER_JWKS_FILE"
            ]
        ) from None


# Where a token stands.


def bearer(authorization: Sequence[str]) -> str | None:
    """The token of an `Authorization` header; None if there is none, or more than one header."""
    if len(authorization) != 1:
        return None
    scheme, _, token = authorization[0].strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def handshake_token(authorization: Sequence[str], protocols: Iterable[str], query: str) -> str | None:
    """The token of a socket's handshake: from the header, else among the subprotocols, else from the query."""
    if (token := bearer(authorization)) is not None:
        return token
    for protocol in protocols:
        if protocol.startswith(BEARER_SUBPROTOCOL):
            return protocol.removeprefix(BEARER_SUBPROTOCOL)
    return parse_qs(query).get("token", [None])[-1]


def chosen_subprotocol(offered: Sequence[str]) -> str | None:
    """What a handshake is answered with. Browsers fail unless it is one that they offered, so a lone `bearer.` is echoed."""
    if SUBPROTOCOL in offered:
        return SUBPROTOCOL
    return next((protocol for protocol in offered if protocol.startswith(BEARER_SUBPROTOCOL)), None)


# What it is worth.


async def authenticate(tokens: Tokens | None, token: str | None) -> Principal:
    """Who calls.

    Raises:
        Problem: `UNAUTHENTICATED`, with the challenge of RFC 6750, section 3; `DEPENDENCY_UNAVAILABLE` if nobody can tell.
    """
    if tokens is None:
        return LOCAL
    if token is None:
        raise Problem(
            ProblemType.UNAUTHENTICATED,
            "a token is needed: Authorization: Bearer <JWT>",
            headers={"WWW-Authenticate": 'Bearer realm="auction-timer"'},
        )
    try:
        return await tokens.principal(token)
    except TokenError as refused:
        raise Problem(
            ProblemType.UNAUTHENTICATED,
            str(refused),
            headers={"WWW-Authenticate": 'Bearer realm="auction-timer", error="invalid_token"'},
        ) from None
    except KeysUnavailableError:
        raise unavailable("the keys that would prove the token cannot be read now; try again") from None


class Authenticate:
    """ASGI middleware: who sent a request (`gateway.auth.principal_of`), or 401 before anything else is said."""

    def __init__(self, app: ASGIApp, tokens: Tokens | None) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            token = bearer(Headers(scope=scope).getlist("authorization"))
            if token is None and EVENT_STREAM_PATH.fullmatch(scope["path"]):
                token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [None])[-1]
            scope["state"]["principal"] = await authenticate(self._tokens, token)
        except Problem as refused:
            await problem_response(refused, scope["state"]["correlation_id"])(scope, receive, send)
            return
        await self._app(scope, receive, send)
