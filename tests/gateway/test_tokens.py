"""Tests for gateway.tokens: which tokens are good, and where they may stand."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import ECKey, OKPKey, RSAKey
from websockets.typing import Subprotocol

from engine.clock import AuctionClock, MonotonicNs
from engine.domain.instants import EPOCH_MS_MAX
from engine.domain.lifecycle import Status
from engine.settings import Settings, SettingsError
from gateway import tokens as module
from gateway.auth import LEEWAY_MS, LOCAL, Principal
from gateway.jwks import PublicKeys
from gateway.tokens import (
    SUBPROTOCOL,
    TOKEN_BYTES_MAX,
    WITH_PUBLIC_KEY,
    KeysUnavailableError,
    TokenError,
    Tokens,
    UnknownKeyError,
    authenticate,
    bearer,
    chosen_subprotocol,
    handshake_token,
    tokens_of,
)
from tests.fakes.clock import BORN_MS, Authority, ManualClock, Timeline
from tests.gateway.front import Front, front
from tests.gateway.house import AUCTION, record
from tests.gateway.issuer import BORN_S, HOUR_S, SECRET, assembled, claims, key, key_set, signed, token
from tests.gateway.peers import PATH, Peer
from tests.gateway.test_jwks import Shelf

OTHER = "another secret that has more than 32 bytes"
KIND = {"RS": "RSA", "PS": "RSA", "ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "Ed": "Ed25519"}


class Desk:
    """Tokens on a timeline, with keys that a test hands out."""

    def __init__(self, *published: Any, secret: str | None = SECRET, **options: Any) -> None:
        self.line = Timeline()
        machine = ManualClock(self.line, seed=3)
        clock = AuctionClock(machine)
        now = machine.monotonic_ns()
        clock.observe(now, MonotonicNs(now), Authority(self.line)())
        self.shelf = Shelf(key_set(*published))
        keys = PublicKeys(self.shelf, machine) if published else None
        self.tokens = Tokens(clock, secret=secret, keys=keys, **options)

    async def principal(self, made: str) -> Principal:
        """Whom a token names."""
        return await self.tokens.principal(made)

    async def refused(self, made: str) -> str:
        """Why a token is not accepted; it must not be, and the reason must not quote it."""
        with pytest.raises(TokenError) as raised:
            await self.tokens.principal(made)
        error = raised.value
        assert error.__suppress_context__ or error.__context__ is None, "a traceback would show what was parsed"
        assert not any(len(part) > 6 and part in str(error) for part in made.split("."))
        return str(error)


# What a good token says.


@pytest.mark.requirement("R24")
@pytest.mark.parametrize(
    ("changes", "scopes", "roles"),
    [
        ({}, set(), set()),
        ({"scope": "ops"}, {"ops"}, set()),
        ({"scope": "ops  events:write other"}, {"ops", "events:write", "other"}, set()),
        ({"scope": ["ops", "events:write"]}, {"ops", "events:write"}, set()),
        ({"scope": "", "roles": []}, set(), set()),
        ({"roles": "buyer"}, set(), {"buyer"}),
        ({"roles": ["maker", "commerce_admin"]}, set(), {"maker", "commerce_admin"}),
    ],
)
async def test_a_token_names_its_subject_scopes_and_roles(changes: Any, scopes: set[str], roles: set[str]) -> None:
    """Scope and roles may be lists, or strings with spaces; the expiry is kept in ms."""
    found = await Desk().principal(token(sub="user|42", **changes))
    assert found == Principal("user|42", frozenset(scopes), frozenset(roles), BORN_MS + HOUR_S * 1_000)  # type: ignore[arg-type]
    assert not found.is_local


@pytest.mark.parametrize("algorithm", sorted(WITH_PUBLIC_KEY))
async def test_every_algorithm_of_the_list_works(algorithm: str) -> None:
    """With a key of its type, read from what the issuer publishes; and only that key."""
    kind = KIND.get(algorithm) or KIND[algorithm[:2]]
    desk = Desk(key("mine", kind), key("noise", "P-256"), secret=None)
    assert (await desk.principal(token(key("mine", kind), algorithm))).subject == "somebody"
    assert "no key" in await desk.refused(token(key("theirs", kind), algorithm))
    stolen = signed({"alg": algorithm, "kid": "mine"}, key("theirs", kind), claims())
    assert "signature" in await desk.refused(stolen)


async def test_header_parameters_that_nobody_knows_are_ignored() -> None:
    """Issuers add their own (RFC 7515, section 4); only what is marked critical must be understood."""
    made = signed({"alg": "HS256", "cat": "session", "kid": "of theirs"}, SECRET, claims())
    assert (await Desk().principal(made)).subject == "somebody"


async def test_a_secret_and_keys_serve_side_by_side() -> None:
    """HS256 tokens are held against the secret, all others against the keys."""
    desk = Desk(key("mine"))
    assert (await desk.principal(token())).subject == "somebody"
    assert (await desk.principal(token(key("mine")))).subject == "somebody"


# What is refused.


REFUSED: dict[str, tuple[str, str]] = {
    "nothing": ("", "cannot be read"),
    "a word": ("token", "cannot be read"),
    "dots": ("..", "cannot be read"),
    "two parts": (token().rpartition(".")[0], "cannot be read"),
    "four parts": (token() + ".x", "cannot be read"),
    "five parts": ("a.b.c.d.e", "cannot be read"),
    "no ASCII": ("é" + token(), "cannot be read"),
    "padding": (token() + "=", "signature"),
    "a surrogate": ("\udcff", "cannot be read"),
    "header a list": (assembled([], claims()), "cannot be read"),
    "header a number": (assembled(7, claims()), "cannot be read"),
    "header empty": (assembled({}, claims()), "cannot be read"),
    "alg a number": (assembled({"alg": 7}, claims()), "cannot be read"),
    "alg a list": (assembled({"alg": ["HS256"]}, claims()), "cannot be read"),
    "crit a number": (assembled({"alg": "HS256", "crit": 7}, claims()), "cannot be read"),
    "crit unknown": (signed({"alg": "HS256", "crit": ["x"], "x": 1}, SECRET, claims()), "cannot be read"),
    "kid a number": (assembled({"alg": "HS256", "kid": 7}, claims()), "cannot be read"),
    "alg none": (assembled({"alg": "none"}, claims()), "algorithm"),
    "alg nOnE": (assembled({"alg": "nOnE"}, claims()), "algorithm"),
    "alg None": (assembled({"alg": "None"}, claims(), b"x"), "algorithm"),
    "alg HS384": (token(SECRET, "HS384"), "algorithm"),
    "alg HS512": (token(SECRET, "HS512"), "algorithm"),
    "alg RS256 without keys": (token(key("mine", "RSA"), "RS256"), "algorithm"),
    "no signature": (token().rpartition(".")[0] + ".", "signature"),
    "another secret": (token(OTHER), "signature"),
    "claims no object": (signed({"alg": "HS256"}, SECRET, [claims()]), "cannot be read"),
    "expired": (token(exp=BORN_S - 31), "expired"),
    "exp missing": (token(exp=None), "exp"),
    "exp text": (token(exp=str(BORN_S + 60)), "exp"),
    "exp true": (token(exp=True), "exp"),
    "exp NaN": (token(exp=float("nan")), "exp"),
    "exp infinite": (token(exp=float("inf")), "exp"),
    "not yet valid": (token(nbf=BORN_S + 31), "nbf"),
    "nbf text": (token(nbf="soon"), "nbf"),
    "issued in the future": (token(iat=BORN_S + 31), "iat"),
    "sub missing": (token(sub=None), "sub"),
    "sub empty": (token(sub=""), "sub"),
    "sub a number": (token(sub=7), "sub"),
    "sub with a space": (token(sub="two words"), "sub"),
    "sub with a newline": (token(sub="mine\n"), "sub"),
    "sub no ASCII": (token(sub="é"), "sub"),
    "sub too long": (token(sub="x" * 129), "sub"),
    "scope a number": (token(scope=7), "scope"),
    "scope an object": (token(scope={"ops": True}), "scope"),
    "roles of numbers": (token(roles=[1]), "roles"),
    "too long": (token(padding="x" * TOKEN_BYTES_MAX), "bytes"),
}  # fmt: skip


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_good_token_is_refused(name: str) -> None:
    """Each with a reason that a person can act on, and that quotes nothing of it."""
    made, reason = REFUSED[name]
    assert reason in await Desk().refused(made)


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({"iss": "https://id.example", "aud": "auction-timer"}, True),
        ({"iss": "https://id.example", "aud": ["other", "auction-timer"]}, True),
        ({"iss": "https://id.example", "aud": "other"}, False),
        ({"iss": "https://id.example", "aud": []}, False),
        ({"iss": "https://id.example", "aud": {"auction-timer": 1}}, False),
        ({"iss": "https://id.example"}, False),
        ({"iss": "https://evil.example", "aud": "auction-timer"}, False),
        ({"iss": ["https://id.example"], "aud": "auction-timer"}, False),
        ({"aud": "auction-timer"}, False),
    ],
)
async def test_issuer_and_audience_must_be_ours_where_they_are_set(changes: dict[str, Any], accepted: bool) -> None:
    """A token for somebody else's service, or of another issuer, is refused; without the settings any will do."""
    desk = Desk(issuer="https://id.example", audience="auction-timer")
    if accepted:
        assert (await desk.principal(token(**changes))).subject == "somebody"
    else:
        assert "claim" in await desk.refused(token(**changes))
    if isinstance(changes.get("iss", ""), str) and not isinstance(changes.get("aud"), dict):
        assert (await Desk().principal(token(**changes))).subject == "somebody"


async def test_expiry_is_held_against_the_auction_clock() -> None:
    """Accepted until 30 s after `exp`, from 30 s before `nbf`; a socket that was let in ends at the same instant."""
    desk, made = Desk(), token(exp=BORN_S + 60, nbf=BORN_S + 60)
    assert "nbf" in await desk.refused(made)
    desk.line.advance(60_000 - LEEWAY_MS)
    found = await desk.principal(made)
    desk.line.advance(2 * LEEWAY_MS - 1)
    assert await desk.principal(made) == found
    assert not found.is_expired(BORN_MS + 60_000 + LEEWAY_MS - 1)  # type: ignore[arg-type]
    desk.line.advance(1)
    assert "expired" in await desk.refused(made)
    assert found.is_expired(BORN_MS + 60_000 + LEEWAY_MS)  # type: ignore[arg-type]


@pytest.mark.parametrize("expires_s", [1e300, 10**4_000, EPOCH_MS_MAX])
async def test_an_expiry_beyond_all_dates_is_the_last_one(expires_s: Any) -> None:
    """What cannot be an instant counts as the latest there is."""
    assert (await Desk().principal(token(exp=expires_s))).expires_at == EPOCH_MS_MAX // 1_000 * 1_000


async def test_a_public_key_is_never_a_secret() -> None:
    """HS256 over any spelling of a published key: refused without a secret, and a wrong signature with one."""
    mine = key("mine", "RSA")
    assert isinstance(mine, RSAKey)
    for spelling in (mine.as_pem(private=False), mine.as_der(private=False), orjson.dumps(mine.as_dict(private=False))):
        forged = _hs256({"alg": "HS256", "kid": "mine"}, spelling)
        assert "algorithm" in await Desk(mine, secret=None).refused(forged)
        assert "signature" in await Desk(mine).refused(forged)


def _hs256(header: dict[str, Any], secret: bytes) -> str:
    """HS256 with whatever bytes; the library would refuse these."""
    import hmac
    from base64 import urlsafe_b64encode

    body = assembled(header, claims()).rpartition(".")[0]
    digest = hmac.new(secret, body.encode(), "sha256").digest()
    return f"{body}.{urlsafe_b64encode(digest).rstrip(b'=').decode()}"


async def test_a_key_that_comes_with_the_token_is_not_believed() -> None:
    """`jwk`, `jku` and `x5u` in the header are the sender's own words: only the keys of the settings count."""
    mine, theirs = key("mine"), key("theirs")
    desk = Desk(mine, secret=None)
    evil = "https://evil.example"
    for name, value in (("jwk", theirs.as_dict(private=False)), ("jku", evil), ("x5u", evil)):
        forged = signed({"alg": "EdDSA", "kid": "mine", name: value}, theirs, claims())
        assert "signature" in await desk.refused(forged)


async def test_a_key_is_used_for_what_it_is() -> None:
    """The id alone is not enough: type, curve, `use`, `alg` and `key_ops` of the key must fit the token's algorithm."""
    assert "no key" in await Desk(key("mine", "P-256"), secret=None).refused(
        signed({"alg": "RS256", "kid": "mine"}, key("mine", "RSA"), claims())
    )
    assert "no key" in await Desk(key("mine", "P-384"), secret=None).refused(
        signed({"alg": "ES256", "kid": "mine"}, key("mine", "P-256"), claims())
    )
    for members in ({"use": "enc"}, {"alg": "ES384"}, {"key_ops": ["sign"]}):
        desk = Desk(key("mine", "P-256"), secret=None)
        desk.shelf.body = key_set(key("mine", "P-256"), **members)
        assert "no key" in await desk.refused(token(key("mine", "P-256"), "ES256"))
    exchange = OKPKey.generate_key("X25519", {"kid": "mine"})
    desk = Desk(exchange, secret=None)
    await desk.refused(signed({"alg": "EdDSA", "kid": "mine"}, key("mine"), claims()))


async def test_without_a_key_id_the_key_must_be_clear() -> None:
    """One key that fits is used; of two, nobody guesses."""
    one, two, other = key("one"), key("two"), key("other", "P-256")
    made = signed({"alg": "EdDSA"}, one, claims())
    assert (await Desk(one, other, secret=None).principal(made)).subject == "somebody"
    assert "more than one fits" in await Desk(one, two, secret=None).refused(made)


async def test_a_key_that_is_unknown_is_looked_for_once_more() -> None:
    """Rotation: the token that names the new key first makes the gateway read the keys, and is accepted."""
    desk = Desk(key("old"), secret=None)
    await desk.principal(token(key("old")))
    desk.shelf.body = key_set(key("old"), key("new"))
    desk.line.advance(10_000)
    assert (await desk.principal(token(key("new")))).subject == "somebody"
    assert desk.shelf.asked == 2


async def test_while_the_keys_are_away_nobody_can_tell() -> None:
    """An unknown key is then no proof of a bad token: try again later. Tokens of keys that are known stay good."""
    desk = Desk(key("old"), secret=None)
    await desk.principal(token(key("old")))
    desk.shelf.body = None
    desk.line.advance(10_000)
    with pytest.raises(KeysUnavailableError):
        await desk.principal(token(key("new")))
    assert (await desk.principal(token(key("old")))).subject == "somebody"


@given(
    made=st.text(max_size=60) | st.lists(st.text(alphabet="eyJhbGciOiJ9._-=", max_size=40), max_size=6).map(".".join)
)
def test_noise_is_refused_and_nothing_else_happens(made: str) -> None:
    """Whatever the text, the answer is a refusal."""
    with pytest.raises(TokenError):
        DESK.tokens.verify(made)


@given(data=st.data())
def test_a_token_with_one_character_changed_is_refused(data: st.DataObject) -> None:
    """No bit of a token is without meaning, also not the last ones of each part."""
    made = token()
    at = data.draw(st.integers(0, len(made) - 1))
    other = data.draw(st.sampled_from("ABCDwxyz0189-_.")).replace(made[at], "E")
    with pytest.raises(TokenError):
        DESK.tokens.verify(made[:at] + other + made[at + 1 :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
HEADERS = st.dictionaries(
    st.sampled_from(["alg", "kid", "crit", "b64", "typ", "jwk"]),
    st.sampled_from(["HS256", "EdDSA", "none", "mine", "b64"]) | JSON,
)


@given(header=HEADERS, content=st.dictionaries(st.text(), st.integers()), signature=st.binary(max_size=40))
def test_a_header_of_any_shape_is_refused(header: Any, content: Any, signature: bytes) -> None:
    """JSON of every shape where names are expected; none of it reaches the caller as another error."""
    with pytest.raises(TokenError):
        BOTH.tokens.verify(assembled(header, content, signature))


DESK = Desk()
BOTH = Desk(key("mine"))


# What the settings ask for.


def _settings(**options: Any) -> Settings:
    return Settings(_env_file=None, **options)


def test_without_a_secret_and_keys_the_gateway_is_open() -> None:
    """No setting, no tokens."""
    assert tokens_of(_settings(), AuctionClock(ManualClock())) is None


def test_a_short_secret_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works, and the log says what is wrong with it, without saying it."""
    said: list[dict[str, str]] = []
    monkeypatch.setattr(module.log, "warning", lambda event, **values: said.append({"event": event} | values))
    assert tokens_of(_settings(jwt_secret="x" * 32), AuctionClock(ManualClock())) is not None
    assert said == []
    assert tokens_of(_settings(jwt_secret="s3cret"), AuctionClock(ManualClock())) is not None
    (warning,) = said
    assert warning["event"] == "secret_too_short"
    assert "s3cret" not in str(warning)


def test_a_public_key_as_the_secret_is_an_error() -> None:
    """Who mixes the two settings up would accept tokens from everyone who has read the public key."""
    mine = key("mine", "P-256")
    assert isinstance(mine, ECKey)
    with pytest.raises(SettingsError, match="AUCTION_TIMER_JWKS_FILE"):
        tokens_of(_settings(jwt_secret=mine.as_pem(private=False).decode()), AuctionClock(ManualClock()))


# Where a token stands.


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], None),
        (["Bearer abc"], "abc"),
        (["bearer  abc "], "abc"),
        (["Bearer"], None),
        (["Bearer "], None),
        (["Basic abc"], None),
        (["abc"], None),
        (["Bearer abc", "Bearer abc"], None),
    ],
)
def test_a_bearer_token_stands_in_one_header(headers: list[str], found: str | None) -> None:
    """The scheme in any case, exactly one header."""
    assert bearer(headers) == found


@pytest.mark.parametrize(
    ("headers", "protocols", "query", "found"),
    [
        (["Bearer h"], ["bearer.p"], "token=q", "h"),
        (["Basic h"], ["auction-timer.v1", "bearer.p"], "token=q", "p"),
        ([], ["auction-timer.v1"], "since=1&token=q", "q"),
        ([], [], "token=a&token=q", "q"),
        ([], [], "token=", None),
        ([], [], "", None),
    ],
)
def test_a_handshake_has_three_places_for_a_token(
    headers: list[str], protocols: list[str], query: str, found: str | None
) -> None:
    """The header goes before the subprotocol, and that before the query."""
    assert handshake_token(headers, protocols, query) == found


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([], None),
        (["chat"], None),
        (["bearer.x", SUBPROTOCOL], SUBPROTOCOL),
        (["chat", "bearer.x"], "bearer.x"),
    ],
)
def test_the_answer_to_a_handshake_is_a_subprotocol_that_was_offered(offered: list[str], chosen: str | None) -> None:
    """Ours if it is among them; the token itself only where nothing else could be said."""
    assert chosen_subprotocol(offered) == chosen


async def test_in_open_mode_everybody_is_local() -> None:
    """Nobody looks at a token, not even at a bad one."""
    assert await authenticate(None, None) is LOCAL
    assert await authenticate(None, "garbage") is LOCAL


# Sockets.


def _by_header(made: str) -> tuple[Callable[[Any], None], list[str], str]:
    def edit(request: Any) -> None:
        request.headers["Authorization"] = f"Bearer {made}"

    return edit, [], PATH


def _by_protocol(made: str) -> tuple[Callable[[Any], None], list[str], str]:
    return (lambda _request: None), [SUBPROTOCOL, f"bearer.{made}"], PATH


def _by_lone_protocol(made: str) -> tuple[Callable[[Any], None], list[str], str]:
    return (lambda _request: None), [f"bearer.{made}"], PATH


def _by_query(made: str) -> tuple[Callable[[Any], None], list[str], str]:
    return (lambda _request: None), [], f"{PATH}?token={made}"


WAYS = [_by_header, _by_protocol, _by_lone_protocol, _by_query]


async def _knocked(made: Front, way: tuple[Callable[[Any], None], list[str], str]) -> Peer:
    edit, protocols, path = way
    peer = Peer(made.door, path)
    peer.client.available_subprotocols = [Subprotocol(name) for name in protocols] or None
    peer.knock(edit)
    while made.door._tasks:
        await _turn(made)
    return peer


async def _turn(made: Front) -> None:
    import asyncio

    await asyncio.gather(*made.door._tasks)
    await asyncio.sleep(0)


@pytest.mark.requirement("R7", "R24")
@pytest.mark.parametrize("way", WAYS)
async def test_a_socket_opens_with_a_token_in_any_of_its_places(way: Any) -> None:
    """Header, subprotocol or query; the answer names a subprotocol exactly if one was offered."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1))
        asked = way(token(sub="viewer-1"))
        peer = await _knocked(made, asked)
        assert peer.status == 101
        assert orjson.loads(peer.frames[0].data)["type"] == "timer.snapshot"
        assert peer.connection.principal.subject == "viewer-1"
        assert peer.client.subprotocol == (asked[1][0] if asked[1] else None)


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("way", [*WAYS, lambda _made: ((lambda _request: None), [], PATH)])
@pytest.mark.parametrize("path", [PATH, "/auctions/unknown/updates", "/nowhere"])
async def test_without_a_good_token_a_socket_is_told_nothing(way: Any, path: str) -> None:
    """401 with a challenge, the same for auctions there are and there are not; the store is not asked."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1))
        edit, protocols, own_path = way(token(OTHER))
        peer = await _knocked(made, (edit, protocols, own_path.replace(PATH, path)))
        assert (peer.status, peer.problem["error_code"]) == (401, "UNAUTHENTICATED")
        assert peer.response is not None
        assert peer.response.headers["WWW-Authenticate"].startswith("Bearer ")
        assert peer.problem["correlation_id"].startswith("req-")
        assert made.store.calls["view"] == 0
        assert made.sample("auctions_gateway_handshakes_total", outcome="unauthenticated") == 1


async def test_a_foreign_page_is_refused_before_its_token_is_looked_at() -> None:
    """A good token does not make a foreign origin a good one."""
    async with front(jwt_secret=SECRET) as made:

        def edit(request: Any) -> None:
            request.headers["Authorization"] = f"Bearer {token()}"
            request.headers["Origin"] = "https://evil.example"

        peer = await _knocked(made, (edit, [], PATH))
        assert (peer.status, peer.problem["error_code"]) == (403, "FOREIGN_ORIGIN")


async def test_a_peer_that_leaves_while_its_token_is_looked_at_is_forgotten() -> None:
    """Nothing is written to a connection that is gone, whatever the token is worth."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1))
        for worth in (token(), token(OTHER), token()):
            peer = Peer(made.door, f"{PATH}?token={worth}").knock()
            peer.transport.abort()
            while made.door._tasks:
                await _turn(made)
            assert bytes(peer.transport.taken) == b""
            # Now with the room in memory, where no reading stands between the token and the place in it.
            room = await made.hub.room(AUCTION)
            assert room is not None
            assert not room.is_watched
        assert made.door._connections == set()
        assert made.sample("auctions_gateway_handshakes_total", outcome="accepted") == 0


async def _pass(made: Front, seconds: int, *peers: Peer) -> None:
    """Let time pass while the peers give signs of life, with a look each few seconds."""
    for _ in range(seconds // 5):
        made.line.advance(5_000)
        for peer in peers:
            if not peer.transport.is_closing() and peer.farewell is None:
                peer.say({"type": "sync", "t0": 1})
        made.door._look()


@pytest.mark.requirement("R24")
async def test_a_socket_ends_with_its_token() -> None:
    """4401 once the token has expired, with the leeway it was accepted with; one with a longer token stays."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1, ends_at=BORN_MS + 3_600_000))
        short = await _knocked(made, _by_query(token(exp=BORN_S + 60)))
        long = await _knocked(made, _by_query(token()))
        await _pass(made, 85, short, long)
        assert short.farewell is None
        await _pass(made, 5, short, long)
        assert short.farewell is not None
        assert short.farewell[0] == 4401
        assert long.farewell is None
        assert made.sample("auctions_gateway_disconnects_total", code="4401") == 1


async def test_a_token_that_expires_in_the_last_minute_lasts_to_the_end() -> None:
    """Nobody misses an end over a renewal; when an extension moves the end away, the token's own end counts again."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1, ends_at=BORN_MS + 150_000))
        peer = await _knocked(made, _by_query(token(exp=BORN_S + 60)))
        await _pass(made, 140, peer)
        assert peer.farewell is None
        made.announce("timer.extended", record(version=2, ends_at=BORN_MS + 140_000 + 60_001))
        await made.read_lane()
        made.door._look()
        assert peer.farewell is not None
        assert peer.farewell[0] == 4401


async def test_whoever_watched_to_the_end_reads_it_whatever_became_of_the_token() -> None:
    """After the end nobody is sent away for a token: the farewell is 4000."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1, ends_at=BORN_MS + 120_000))
        peer = await _knocked(made, _by_query(token(exp=BORN_S + 60)))
        await _pass(made, 120, peer)
        made.announce("timer.ended", record(version=2, status=Status.ENDED, ends_at=BORN_MS + 120_000))
        await made.read_lane()
        made.door._look()
        assert peer.farewell is None
        made.door._farewell(made.hub.known(AUCTION))  # type: ignore[arg-type]
        assert peer.farewell == (4000, "the auction is over")


async def test_a_cancelled_auction_is_over_however_far_its_end_was() -> None:
    """Between the cancellation and its farewell no token matters."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1))
        peer = await _knocked(made, _by_query(token(exp=BORN_S + 60)))
        made.announce("timer.cancelled", record(version=2, status=Status.CANCELLED))
        await made.read_lane()
        made.line.advance(10_000)
        peer.connection.principal = await Desk().principal(token(exp=BORN_S - 29))
        made.line.advance(10_000)
        made.door._look()
        assert peer.farewell is None


async def test_a_paused_auction_has_no_last_minute() -> None:
    """Its end stands still while its token's does not."""
    async with front(jwt_secret=SECRET) as made:
        stopped = {"paused_at": BORN_MS, "paused_from": Status.ACTIVE}
        made.put(record(version=1, status=Status.PAUSED, ends_at=BORN_MS + 10_000, **stopped))
        peer = await _knocked(made, _by_query(token(exp=BORN_S + 60)))
        await _pass(made, 90, peer)
        assert peer.farewell is not None
        assert peer.farewell[0] == 4401


async def test_unknown_keys_are_told_apart_from_bad_tokens() -> None:
    """`UnknownKeyError` is what makes the gateway look again: a signature that is wrong does not."""
    desk = Desk(key("mine"), secret=None)
    with pytest.raises(UnknownKeyError):
        desk.tokens.verify(token(key("mine")))
    await desk.principal(token(key("mine")))
    desk.line.advance(10_000)
    await desk.refused(signed({"alg": "EdDSA", "kid": "mine"}, key("theirs"), claims()))
    assert desk.shelf.asked == 1
