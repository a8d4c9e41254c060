"""`GET /offers/{id}/cancellation` and `PUT /offers/{id}/cancel`: the buyer's side of a cancellation (requirements R20-R22).

Whether it may be done is decided by the engine, in the order of the intake. The preflight asks the same pure function with
the present instant, so the two can differ only by what happens in between.
"""

from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.contract.audit import as_json
from engine.contract.intake import CommandType
from engine.contract.keys import shard_of
from engine.contract.timers import TimerRecord
from engine.domain.auction import Offer
from engine.domain.decide import Decision
from engine.domain.events import Withdraw
from engine.domain.fold import fold
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.withdrawal import NOTE_CHARS_MAX, WithdrawalReason, window_ends_at
from engine.store.protocol import StoreError, ViewStore
from gateway.auth import Party, Principal, Role, actor_of, parties, principal_of
from gateway.bodies import read_body
from gateway.command_routes import CommandRoutes, away, json_response, pending, refuse, trace_id
from gateway.commands import Commands
from gateway.events import TEXT_PATTERN
from gateway.offers import auctions_of
from gateway.problems import Problem, ProblemType

OFFER_ID_CHARS_MAX: Final = 128
DEVICE_CHARS_MAX: Final = 200
MAY_CANCEL: Final[frozenset[Party]] = frozenset({Role.BUYER, Role.MAKER, Role.MAKER_DELEGATE, Role.COMMERCE_ADMIN})
REASONS: Final = [reason.value for reason in WithdrawalReason]

Note = Annotated[str, Field(max_length=NOTE_CHARS_MAX, pattern=TEXT_PATTERN)]
Device = Annotated[str, Field(min_length=1, max_length=DEVICE_CHARS_MAX, pattern=TEXT_PATTERN)]


class CancelOfferBody(BaseModel):
    """`{reason_code, note?, device?}`."""

    model_config = ConfigDict(strict=True, extra="ignore")
    reason_code: Annotated[WithdrawalReason, Field(strict=False)]
    note: Note | None = None
    device: Device | None = None


@dataclass(frozen=True, slots=True)
class OfferRoutes:
    """The routes and what they ask."""

    auctions: CommandRoutes
    commands: Commands
    store: ViewStore
    shards: int
    default_window_minutes: int

    def routes(self) -> list[Route]:
        """All routes, in the order of the documentation."""
        return [
            Route("/offers/{offer_id:path}/cancellation", self.preflight, methods=["GET"]),
            Route("/offers/{offer_id:path}/cancel", self.cancel, methods=["PUT"]),
        ]

    async def preflight(self, request: Request) -> Response:
        """Whether an offer can be cancelled now, by whoever asks, and how long that will be so."""
        principal = principal_of(request)
        record = await self._record(principal, request.path_params["offer_id"])
        auction = record.auction
        now = self.auctions.hub.clock.now_ms()
        until = window_ends_at(auction, self.default_window_minutes)
        decided = self._decided(record, now)
        may = bool(_acting_as(principal, auction.registered.offer))
        code = decided.refusal.code.value if decided.refusal is not None else None
        code = code if may else ProblemType.NOT_AUTHORIZED.error_code
        return json_response(
            {
                "offer_id": auction.registered.offer.offer_id,
                "auction_id": auction.auction_id,
                "status": auction.status.value,
                "cancellable": code is None,
                "error_code": code,
                "remaining_window_ms": 0 if decided.before.status.is_terminal else max(0, until - now),
                "window_ends_at": until,
                "reasons": REASONS,
                "note_max_chars": NOTE_CHARS_MAX,
                "server_time": now,
            }
        )

    def _decided(self, record: TimerRecord, now: EpochMs) -> Decision:
        asked = Withdraw(WithdrawalReason.OTHER, self.default_window_minutes)
        return next(decision for decision in fold(record.auction, asked, now) if _is_answer(decision))

    async def cancel(self, request: Request) -> Response:
        """Cancel an offer, and with it its auction."""
        principal = principal_of(request)
        body = await read_body(request, CancelOfferBody)
        record = await self._record(principal, request.path_params["offer_id"])
        auction_id, offer = record.auction.auction_id, record.auction.registered.offer
        acting_as = _acting_as(principal, offer)
        if not acting_as:
            raise Problem(
                ProblemType.NOT_AUTHORIZED,
                "an offer is cancelled by its buyer, its maker, a delegate or a commerce admin",
            )
        event = Withdraw(body.reason_code, self.default_window_minutes, body.note, body.device)
        command_id, answer = await self.commands.ask(
            shard_of(auction_id, self.shards),
            CommandType.OFFER_CANCEL_REQUESTED,
            event,
            auction_id=auction_id,
            actor=actor_of(principal, acting_as),
            correlation_id=request.state.correlation_id,
            trace_id=trace_id(request),
        )
        if answer is None:
            return pending(command_id)
        refuse(answer)
        timer = self.auctions.timer_of(answer)
        return json_response(
            {
                "offer": {
                    "offer_id": offer.offer_id,
                    "auction_id": auction_id,
                    "status": "CANCELLED",
                    "cancelled_at": timer["cancelled_at"],
                    "reason_code": body.reason_code.value,
                    "note": body.note,
                    "amount_minor": offer.amount_minor,
                    "currency": offer.currency,
                },
                "timer": timer,
                "audit": as_json(answer["audit"]),
            }
        )

    async def _record(self, principal: Principal, offer_id: str) -> TimerRecord:
        """The auction of an offer, for somebody who may see it.

        Raises:
            Problem: `RESOURCE_NOT_FOUND`, the same for an offer that is not there and for somebody else's.
        """
        unknown = Problem(ProblemType.RESOURCE_NOT_FOUND, f"no offer {offer_id[:OFFER_ID_CHARS_MAX]}")
        if len(offer_id) > OFFER_ID_CHARS_MAX:
            raise unknown
        try:
            bound = await auctions_of(self.store, self.shards, [offer_id])
        except StoreError:
            raise away() from None
        # One lookup also where there is nothing to look up, so that an unknown offer takes as long as somebody else's.
        record = await self.auctions.record(bound.get(offer_id, "-"))
        if record is None or not parties(principal, record.auction.registered.offer):
            raise unknown
        return record


def _acting_as(principal: Principal, offer: Offer) -> list[Party]:
    """As what a caller may cancel an offer."""
    return [relation for relation in parties(principal, offer) if relation in MAY_CANCEL]


def _is_answer(decision: Decision) -> bool:
    """Whether a decision of the fold is about the request: the others are what time did before it."""
    return decision.refusal is not None or decision.after.status is Status.CANCELLED
