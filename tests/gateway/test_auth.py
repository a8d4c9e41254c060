"""Tests for gateway.auth: what a principal is to an auction, and which routes are open to whom."""

from typing import Any

import pytest

from engine.contract.intake import ANONYMOUS, Actor
from engine.domain.auction import Offer
from engine.domain.instants import EpochMs
from gateway.auth import LOCAL, Principal, Role, Scope, actor_of, parties
from gateway.tokens import OPEN_PATHS
from tests.gateway.front import front
from tests.gateway.house import AUCTION, record
from tests.gateway.issuer import BORN_S, SECRET, assembled, claims, key, key_set, publisher, token

OFFER = Offer(
    offer_id="o-1", owner_id="owner-1", maker_id="maker-1", buyer_id="buyer-1", maker_delegate_ids=("help-1", "help-2")
)
STRANGER = "stranger-1"


def who(subject: str, *, scopes: set[str] | None = None, roles: set[str] | None = None) -> Principal:
    """A principal with a token for a while."""
    return Principal(subject, frozenset(scopes or ()), frozenset(roles or ()), EpochMs(BORN_S * 1_000))


# What a caller is to an auction.


@pytest.mark.requirement("R20", "R24")
@pytest.mark.parametrize(
    ("principal", "relations"),
    [
        (who("owner-1"), ["owner"]),
        (who("buyer-1"), [Role.BUYER]),
        (who("maker-1"), [Role.MAKER]),
        (who("help-1"), [Role.MAKER_DELEGATE]),
        (who("help-2"), [Role.MAKER_DELEGATE]),
        (who(STRANGER, roles={"commerce_admin"}), [Role.COMMERCE_ADMIN]),
        (who(STRANGER, roles={"operator"}), [Role.OPERATOR]),
        (who(STRANGER, scopes={"ops"}), [Role.OPERATOR]),
        (
            who("buyer-1", scopes={"ops"}, roles={"operator", "commerce_admin"}),
            [Role.BUYER, Role.COMMERCE_ADMIN, Role.OPERATOR],
        ),
        (who(STRANGER, scopes={"ops"}, roles={"commerce_admin"}), [Role.COMMERCE_ADMIN, Role.OPERATOR]),
        (LOCAL, [Role.COMMERCE_ADMIN, Role.OPERATOR]),
        (who(STRANGER), []),
        (who(STRANGER, scopes={"events:write"}), []),
        # A role in a token says what somebody is elsewhere; what they are here, the registration says.
        (who(STRANGER, roles={"buyer", "maker", "maker_delegate", "owner"}), []),
        (who("OWNER-1"), []),
        (who("owner-1 "), []),
        (who("o-1"), []),
    ],
)
def test_what_a_caller_is_to_an_auction(principal: Principal, relations: list[str]) -> None:
    """By the ids of the registration first, then by what the token allows everywhere."""
    assert parties(principal, OFFER) == relations


@pytest.mark.requirement("R20", "R24")
def test_one_person_may_be_several() -> None:
    """Each relation counts, in one order; who acts is recorded as the first that may."""
    everything = Offer(owner_id="p-1", buyer_id="p-1", maker_id="p-1", maker_delegate_ids=("p-1",))
    found = parties(who("p-1"), everything)
    assert found == ["owner", Role.BUYER, Role.MAKER, Role.MAKER_DELEGATE]
    assert actor_of(who("p-1"), found) == Actor("owner", "p-1")
    assert actor_of(who("p-1"), found[2:]) == Actor("maker", "p-1")


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("subject", ["", "None", "null", "owner-1"])
def test_nobody_is_anything_to_an_auction_without_facts(subject: str) -> None:
    """An offer that names nobody belongs to nobody: only admins, operators and open mode see it."""
    assert parties(who(subject), Offer()) == []
    assert parties(who(subject, scopes={"ops"}), Offer()) == [Role.OPERATOR]
    assert parties(LOCAL, Offer())


def test_in_open_mode_everything_is_allowed_and_nobody_is_named() -> None:
    """Whoever is on this machine has every scope and every role, and never expires."""
    assert all(LOCAL.may(scope) for scope in Scope)
    assert all(LOCAL.has(role) for role in Role)
    assert not LOCAL.is_expired(EpochMs(10**15))
    assert actor_of(LOCAL, parties(LOCAL, OFFER)) is ANONYMOUS


def test_scopes_and_roles_are_what_the_token_says() -> None:
    """No scope implies another, and no role implies a scope."""
    assert [scope for scope in Scope if who("x", scopes={"ops"}, roles={"operator"}).may(scope)] == [Scope.OPS]
    assert [scope for scope in Scope if who("x", roles={"operator", "commerce_admin"}).may(scope)] == []
    assert [role for role in Role if who("x", scopes={"ops"}, roles={"buyer"}).has(role)] == [Role.BUYER]


# Which routes are open to whom.

CALLERS: dict[str, str | None] = {
    "nobody": None,
    "forged": token("a secret that somebody made up, 41 bytes.."),
    "unsigned": assembled({"alg": "none"}, claims(scope="ops events:write")),
    "expired": token(exp=BORN_S - 31, scope="ops events:write"),
    "viewer": token(sub="viewer-1"),
    "producer": token(sub="bids", scope="events:write"),
    "operator": token(sub="ops-1", scope="ops"),
    "admin": token(sub="admin-1", roles=["commerce_admin", "operator"]),
    "both": token(sub="robot-1", scope="ops events:write"),
}
REFUSED = ("nobody", "forged", "unsigned", "expired")
ROUTES: dict[str, dict[str, int]] = {
    "GET /auctions": {"*": 200},
    f"GET /auctions/{AUCTION}/timer": {"*": 200},
    "GET /auctions/unknown/timer": {"*": 404},
    "POST /events": {"*": 403, "producer": 400, "both": 400},
    "GET /metrics": {"*": 403, "operator": 200, "both": 200},
    "POST /auctions/unknown/pause": {"*": 403, "operator": 400, "both": 400},
    "POST /auctions/unknown/resume": {"*": 403, "operator": 400, "both": 400},
    "POST /auctions/unknown/cancel": {"*": 400},
    "GET /auctions/unknown/audit": {"*": 404},
    "GET /offers/unknown/cancellation": {"*": 404},
    "PUT /offers/unknown/cancel": {"*": 400},
    "GET /commands/unknown": {"*": 404},
    "GET /ops/troubleshooting": {"*": 403, "operator": 200, "both": 200},
    "POST /ops/troubleshooting/requeue": {"*": 403, "operator": 400, "both": 400},
    "POST /ops/troubleshooting/unknown/retry": {"*": 403, "operator": 400, "both": 400},
    "POST /ops/troubleshooting/unknown/cancel": {"*": 403, "operator": 400, "both": 400},
    "DELETE /events": {"*": 405},
    "GET /no/such/route": {"*": 404},
    "OPTIONS /auctions": {"*": 405},
}
CODES = {400: "MALFORMED_JSON", 403: "INSUFFICIENT_SCOPE", 404: "RESOURCE_NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("route", ROUTES)
async def test_each_route_is_open_to_whom_it_should_be(route: str, caller: str) -> None:
    """Without a good token every route is 401, with the same body whatever there is; with one, the scope decides."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1))
        method, path = route.split()
        made_token = CALLERS[caller]
        headers = {"X-Correlation-Id": "mine-1"} | ({"Authorization": f"Bearer {made_token}"} if made_token else {})
        answer = await made.http.request(
            method, path, headers=headers, content=b"{" if method in {"POST", "PUT"} else None
        )
        assert answer.headers["x-correlation-id"] == "mine-1"
        if caller in REFUSED:
            assert answer.status_code == 401
            assert answer.json()["error_code"] == "UNAUTHENTICATED"
            challenge = answer.headers["www-authenticate"]
            assert challenge.startswith("Bearer ")
            assert ("invalid_token" in challenge) is (caller != "nobody")
            assert made.store.calls["view"] == 0
        else:
            wanted = ROUTES[route].get(caller, ROUTES[route]["*"])
            assert answer.status_code == wanted
            if wanted != 200:
                assert answer.json()["error_code"] == CODES[wanted]
            if wanted == 403:
                assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
        if answer.status_code >= 400:
            assert answer.json()["correlation_id"] == "mine-1"
            assert made_token is None or made_token not in answer.text


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("path", sorted(OPEN_PATHS - {"/asyncapi.json"}))
async def test_probes_and_descriptions_need_no_token(path: str) -> None:
    """Nor do they mind a bad one; nothing but these exact paths is open."""
    async with front(jwt_secret=SECRET) as made:
        for headers in ({}, {"Authorization": "Bearer garbage"}):
            assert (await made.http.get(path, headers=headers)).status_code in (200, 503)
        for close in (f"{path}/", f"{path}/x", f"/auctions{path}", path.upper()):
            assert (await made.http.get(close)).status_code == 401


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("caller", ["viewer", "producer"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/auctions/{}/cancel", {"reason": "mine now"}),
        ("GET", "/auctions/{}/audit", None),
    ],
)
async def test_what_belongs_to_others_looks_like_what_is_not_there(
    caller: str, method: str, path: str, body: dict[str, str] | None
) -> None:
    """Status, headers and body of the two answers differ in nothing but the id that was asked for."""
    async with front(jwt_secret=SECRET) as made:
        made.put(record(version=1))
        headers = {"Authorization": f"Bearer {CALLERS[caller]}", "X-Correlation-Id": "mine-1"}
        foreign = await made.http.request(method, path.format("a-1"), headers=headers, json=body)
        unknown = await made.http.request(method, path.format("a-2"), headers=headers, json=body)
        assert foreign.status_code == 404
        assert foreign.headers == unknown.headers
        assert foreign.text == unknown.text.replace("a-2", "a-1")


async def test_every_documented_operation_says_whether_it_asks_for_a_token() -> None:
    """`/openapi.json` names 401 exactly where the gateway gives it."""
    async with front(jwt_secret=SECRET) as made:
        document = (await made.http.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                answer = await made.http.request(method, path.replace("{", "").replace("}", ""))
                assert ("401" in operation["responses"]) is (answer.status_code == 401), f"{method} {path}"
                assert (operation.get("security") == []) is (path in OPEN_PATHS)


@pytest.mark.parametrize("route", ROUTES)
async def test_in_open_mode_no_token_is_asked_for(route: str) -> None:
    """Everybody may everything, with a bad token too."""
    async with front() as made:
        made.put(record(version=1))
        method, path = route.split()
        headers = {"Authorization": "Bearer garbage"}
        answer = await made.http.request(
            method, path, headers=headers, content=b"{" if method in {"POST", "PUT"} else None
        )
        assert answer.status_code not in (401, 403)


async def test_keys_that_cannot_be_read_are_no_reason_to_send_somebody_away_for_good() -> None:
    """503 and when to try again, and `/readyz` says why; with the keys the same token is good, in any gateway."""
    mine = key("mine")
    headers = {"Authorization": f"Bearer {token(mine)}"}
    with publisher() as issuer:
        issuer.status = 500
        async with front(jwks_url=issuer.url) as made:
            answer = await made.http.get("/auctions", headers=headers)
            assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")
            assert 1 <= int(answer.headers["retry-after"]) <= 5
            assert "keys" in (await made.http.get("/readyz")).json()["checks"]["keys"]
            issuer.status, issuer.body = 200, key_set(mine)
            made.line.advance(10_000)
            assert (await made.http.get("/auctions", headers=headers)).status_code == 200
            assert (await made.http.get("/readyz")).json()["checks"]["keys"] == "ok"
            forged: dict[str, Any] = {"Authorization": f"Bearer {token(key('theirs'))}"}
            assert (await made.http.get("/auctions", headers=forged)).status_code == 401
