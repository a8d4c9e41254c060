"""The HTTP routes: each reads what was asked, asks the hub or the store, and answers. Problems are raised, not returned."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final
from uuid import uuid4

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.contract import intake
from engine.contract.cursors import Cursor
from engine.contract.intake import IntakeEvent
from engine.contract.keys import shard_of
from engine.contract.timers import timer
from engine.domain.cadence import tick_step_ms
from engine.domain.events import Bid, Register
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.lifecycle import Status
from engine.domain.policy import TICK_INTERVAL_MS_MAX
from engine.store.protocol import Appended, Draft, Intake, IntakeFullError, StoreError, StoreUnavailableError, ViewStore
from gateway import asyncapi
from gateway.auth import Scope, require
from gateway.bodies import bounded_body
from gateway.command_routes import json_response, room_of
from gateway.events import parse_events
from gateway.hub import Hub
from gateway.listing import Place, list_auctions
from gateway.metrics import exposition
from gateway.offers import auctions_of
from gateway.openapi import document
from gateway.problems import RETRY_AFTER_S, Problem, ProblemType, unavailable
from gateway.queries import integer_of, invalid, limit_of
from gateway.readiness import Readiness

VERSION: Final = version("auction-timer")
NEXT_POLL: Final = "Next-Poll-Ms"


@dataclass(frozen=True, slots=True)
class Api:
    """The routes and what they ask."""

    hub: Hub
    intake: Intake
    store: ViewStore
    shards: int
    readiness: Readiness
    registry: CollectorRegistry

    def routes(self) -> list[Route]:
        """All routes, in the order of the documentation."""
        return [
            Route("/events", self.post_events, methods=["POST"]),
            Route("/auctions", self.list_auctions, methods=["GET"]),
            Route("/auctions/{auction_id}/timer", self.get_timer, methods=["GET"]),
            Route("/auctions/{auction_id}/updates", self.updates, methods=["GET"], include_in_schema=False),
            Route("/healthz", self.healthz, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/asyncapi.json", self.asyncapi, methods=["GET"]),
        ]

    # Events.

    async def post_events(self, request: Request) -> Response:
        """Accept one event or a batch, all or nothing, and answer with each one's arrival."""
        principal = require(request, Scope.EVENTS_WRITE)
        body = await bounded_body(request)
        events = parse_events(
            body,
            correlation_id=request.state.correlation_id,
            traceparent=request.headers.get("traceparent"),
            new_trace_id=lambda: uuid4().hex,
            submitted_by=principal.subject or None,
        )
        appended = await self._append(events)
        results = [
            {
                "id": event.context.event_id,
                "status": "accepted" if result.accepted else "duplicate",
                "arrival_ms": result.at,
            }
            for event, result in zip(events, appended, strict=True)
        ]
        return json_response({"results": results}, 202)

    async def _append(self, events: list[IntakeEvent]) -> list[Appended]:
        """Append each event to the shard of its auction, or of the auction that its offer stands for.

        Which shard that is may not be known anywhere yet. Then every shard gets the cancellation in its own order, and keeps
        it until a start names the offer (docs/decisions/0006).
        """
        auctions = await self._auctions_of_offers(events)
        by_shard: dict[int, list[tuple[int, Draft]]] = {}
        for index, event in enumerate(events):
            draft = _draft(_known_as_relisted(event, auctions))
            auction_id = event.auction_id or auctions.get(event.offer_id or "")
            targets = range(self.shards) if auction_id is None else (shard_of(auction_id, self.shards),)
            for shard in targets:
                by_shard.setdefault(shard, []).append((index, draft))
        est = self.hub.clock.now_ms()
        command_id = uuid4().hex
        answers = await asyncio.gather(
            *(
                self.intake.append(shard, [draft for _, draft in drafts], est, command_id)
                for shard, drafts in by_shard.items()
            ),
            return_exceptions=True,
        )
        results: dict[int, Appended] = {}
        for drafts, answer in zip(by_shard.values(), answers, strict=True):
            if isinstance(answer, BaseException):
                raise _intake_problem(answer)
            for (index, _), result in zip(drafts, answer, strict=True):
                known = results.get(index)
                results[index] = result if known is None else _later(known, result)
        return [results[index] for index in range(len(events))]

    async def _auctions_of_offers(self, events: list[IntakeEvent]) -> dict[str, str]:
        named = {offer_id for offer_id in map(_offer_named_in, events) if offer_id is not None}
        if not named:
            return {}
        try:
            return await auctions_of(self.store, self.shards, named)
        except StoreError:
            raise unavailable("no event was taken: send them again with the same ids") from None

    # Auctions.

    async def get_timer(self, request: Request) -> Response:
        """The countdown of one auction."""
        room = await room_of(self.hub, request.path_params["auction_id"])
        view = self.hub.timer(room)
        again_ms = next_poll_ms(view)
        etag = f'"{room.version}"'
        # A 304 has no body to say it in, and most answers to a poller are one.
        headers = {"ETag": etag, "Cache-Control": "no-cache", NEXT_POLL: str(again_ms)}
        if not view["stale"] and _matches(request.headers.get("if-none-match"), etag):
            return Response(status_code=304, headers=headers)
        return json_response(view | {"next_poll_ms": again_ms}, headers=headers)

    async def updates(self, _request: Request) -> Response:
        """The path of the socket, which is none of HTTP; a handshake never comes here."""
        raise Problem(
            ProblemType.UPGRADE_REQUIRED,
            "a WebSocket is here: connect with a client for those; /auctions/{id}/events tells the same over HTTP",
            headers={"Connection": "Upgrade", "Upgrade": "websocket"},
        )

    async def list_auctions(self, request: Request) -> Response:
        """A page of auctions, next to close first."""
        query = request.query_params
        place = None
        if (cursor := query.get("cursor")) is not None:
            place = Place.decode(cursor)
            if place is None:
                raise invalid("cursor", "must be the next_cursor of an earlier answer")
        # As of before the reading: whoever follows a listed auction from there misses nothing of what came meanwhile.
        cursors = {shard: str(Cursor(shard, stream_id)) for shard, stream_id in self.hub.positions.items()}
        try:
            found, next_place = await list_auctions(
                self.store,
                self.shards,
                status=_status(query.get("status")),
                ending_before=_instant(query.get("ending_before")),
                limit=limit_of(query.get("limit")),
                place=place,
            )
        except StoreUnavailableError:
            raise unavailable("auctions cannot be listed now") from None
        now = self.hub.clock.now_ms()
        return json_response(
            {
                "auctions": [
                    timer(
                        record,
                        now,
                        cursors.get(shard_of(record.auction.auction_id, self.shards)),
                        stale=self.hub.stale(),
                    )
                    for record in found
                ],
                "next_cursor": next_place.encode() if next_place else None,
            }
        )

    # Operations.

    async def healthz(self, _request: Request) -> Response:
        """Whether the process is alive."""
        return json_response({"status": "alive", "version": VERSION})

    async def readyz(self, _request: Request) -> Response:
        """Whether the gateway can do its job, and what is missing if not."""
        checks = self.readiness.checks()
        ready = all(found == "ok" for found in checks.values())
        return json_response({"ready": ready, "checks": checks}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Metrics in the Prometheus text format."""
        require(request, Scope.OPS)
        return Response(exposition(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, _request: Request) -> Response:
        """This description."""
        return json_response(document(VERSION))

    async def asyncapi(self, _request: Request) -> Response:
        """The description of the socket and of the event stream."""
        return json_response(asyncapi.document(VERSION))


def next_poll_ms(view: dict[str, Any]) -> int:
    """When a client that cannot hold a socket should ask again: as often as it would have been sent a tick."""
    if view["status"] not in {Status.SCHEDULED, Status.ACTIVE, Status.CLOSING}:
        return TICK_INTERVAL_MS_MAX
    return tick_step_ms(view["remaining_ms"], TICK_INTERVAL_MS_MAX)


def _intake_problem(error: BaseException) -> BaseException:
    """What the caller is told of an append that failed; a fault of ours stays what it is."""
    if isinstance(error, IntakeFullError):
        return Problem(
            ProblemType.INTAKE_FULL,
            f"{error}; send the same events again, those that were taken count once",
            headers={"Retry-After": RETRY_AFTER_S},
        )
    if isinstance(error, StoreError):
        return unavailable("the events may or may not have been taken: send them again with the same ids")
    return error


def _offer_named_in(event: IntakeEvent) -> str | None:
    return event.event.registration.offer.offer_id if isinstance(event.event, Register) else event.offer_id


def _known_as_relisted(event: IntakeEvent, auctions: Mapping[str, str]) -> IntakeEvent:
    """A start whose offer stands for another auction says so: what its shard remembers of the offer was about that one."""
    if not isinstance(event.event, Register):
        return event
    known = auctions.get(_offer_named_in(event) or "", event.auction_id)
    return replace(event, context=replace(event.context, relisted=known != event.auction_id))


def _draft(event: IntakeEvent) -> Draft:
    # The same bid announced under two event ids is one bid: it must not extend an auction twice. With spaces, which no id
    # has, its mark is nobody's event id, and names one bid of one auction.
    bid = event.event
    seen_ids = (f"bid {event.auction_id} {bid.bid_id}",) if isinstance(bid, Bid) else ()
    # An event id is unique only where its producer says so: about another auction it is another event.
    subject = event.auction_id or f"offer {event.offer_id}"
    return Draft(event.context.event_id, intake.encode(event), seen_ids, subject)


def _later(one: Appended, other: Appended) -> Appended:
    """An event that went to several shards: accepted if any took it, at the latest arrival."""
    return Appended(one.event_id, one.accepted or other.accepted, EpochMs(max(one.at, other.at)))


def _matches(if_none_match: str | None, etag: str) -> bool:
    """RFC 9110, section 13.1.2: weak comparison with each entity tag of the list."""
    if if_none_match is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return "*" in tags or etag in tags


def _status(text: str | None) -> Status | None:
    if text is None:
        return None
    public = [status.value for status in Status if status.is_public]
    if text not in public:
        raise invalid("status", f"must be one of {', '.join(public)}")
    return Status(text)


def _instant(text: str | None) -> EpochMs | None:
    value = integer_of("ending_before", text, 1, EPOCH_MS_MAX)
    return None if value is None else EpochMs(value)
