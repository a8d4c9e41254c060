"""Who calls, and what they may do.

A caller is a `Principal`: a subject with scopes and roles. Scopes open a route (`require`), and stand for the whole
deployment. What somebody may do with one auction follows from the facts that were registered with it (`parties`): its owner,
its maker, the maker's delegates and its buyer are named there by the same ids that tokens carry as `sub`.

    Authorization: Bearer … ──▶ Tokens.verify ──▶ Principal ──▶ require(scope) · parties(offer) · actor_of(parties)

In open mode (no secret, no keys) nobody is asked, and everybody is `LOCAL`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from starlette.requests import Request

from engine.contract.intake import ANONYMOUS, Actor
from engine.domain.auction import Offer
from engine.domain.instants import EpochMs
from gateway.problems import Problem, ProblemType

LEEWAY_MS: Final = 30_000
"""How far the clock of whoever makes tokens may be from ours."""


class Scope(StrEnum):
    """What a token may carry in `scope` that means something here."""

    EVENTS_WRITE = "events:write"
    """Post events: for the systems that register auctions and accept bids."""
    OPS = "ops"
    """Operate: metrics, pause and resume, troubleshooting, every auction."""


class Role(StrEnum):
    """What a token may carry in `roles` that means something here, and what a subject may be to an auction."""

    BUYER = "buyer"
    MAKER = "maker"
    MAKER_DELEGATE = "maker_delegate"
    COMMERCE_ADMIN = "commerce_admin"
    OPERATOR = "operator"


Party = Role | Literal["owner"]
"""What a caller is to an auction."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever calls.

    Args:
        subject: the `sub` of the token; empty in open mode.
        scopes: of the token, known ones and others.
        roles: of the token, known ones and others.
        expires_at: the `exp` of the token; None in open mode.
        is_local: open mode, where whoever reaches the gateway may do everything.
    """

    subject: str
    scopes: frozenset[str]
    roles: frozenset[str]
    expires_at: EpochMs | None = None
    is_local: bool = False

    def may(self, scope: Scope) -> bool:
        """Whether routes of this scope are open."""
        return self.is_local or scope in self.scopes

    def is_expired(self, now: EpochMs) -> bool:
        """Whether the token has expired at `now`, by the same leeway that it was accepted with."""
        return self.expires_at is not None and now >= self.expires_at + LEEWAY_MS

    def has(self, role: Role) -> bool:
        """Whether the token names this role."""
        return self.is_local or role in self.roles


LOCAL: Final = Principal("", frozenset(), frozenset(), is_local=True)
"""Open mode: whoever is on this machine."""


def principal_of(request: Request) -> Principal:
    """Who sent a request."""
    found: Principal = request.state.principal
    return found


def require(request: Request, scope: Scope) -> Principal:
    """Who sent a request, if the scope is theirs.

    Raises:
        Problem: `INSUFFICIENT_SCOPE`, with the challenge of RFC 6750, section 3.1.
    """
    principal = principal_of(request)
    if not principal.may(scope):
        raise Problem(
            ProblemType.INSUFFICIENT_SCOPE,
            f"this needs a token with the scope {scope}",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
        )
    return principal


def parties(principal: Principal, offer: Offer) -> list[Party]:
    """Everything that a caller is to an auction, by the facts registered with it and by the token; nothing for a stranger.

    By subject first: who is the buyer acts as the buyer, whatever else the token allows, wherever a buyer may act. One person
    may be several of them: somebody who sells their own things is owner and maker.
    """
    found: list[Party] = []
    if not principal.is_local:
        subject = principal.subject
        named: dict[Party, bool] = {
            "owner": subject == offer.owner_id,
            Role.BUYER: subject == offer.buyer_id,
            Role.MAKER: subject == offer.maker_id,
            Role.MAKER_DELEGATE: subject in offer.maker_delegate_ids,
        }
        found += [relation for relation, is_it in named.items() if is_it]
    if principal.has(Role.COMMERCE_ADMIN):
        found.append(Role.COMMERCE_ADMIN)
    if principal.has(Role.OPERATOR) or principal.may(Scope.OPS):
        found.append(Role.OPERATOR)
    return found


def actor_of(principal: Principal, acting_as: Sequence[Party]) -> Actor:
    """Who the records name for what a caller does: the first of the `parties` that may do it."""
    return ANONYMOUS if principal.is_local else Actor(str(acting_as[0]), principal.subject)
