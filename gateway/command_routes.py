"""`POST /auctions/{id}/cancel`, `/pause`, `/resume`, and `GET /commands/{id}` for an answer that took longer."""

import asyncio
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.contract.audit import as_json
from engine.contract.cursors import Cursor
from engine.contract.intake import AUCTION_ID, COMMAND_ID_CHARS_MAX, COMMAND_WITHIN, Actor, EventType, readable
from engine.contract.keys import shard_of
from engine.contract.timers import CorruptTimerError, TimerRecord, UnsealedTimerError, as_of
from engine.domain.events import Cancel, InputEvent, Pause, Resume
from engine.store.protocol import StoreError, ViewStore
from gateway.auth import Principal, Role, Scope, actor_of, parties, principal_of, require
from gateway.bodies import read_body
from gateway.commands import COMMAND_ID, Commands, shard_in
from gateway.events import ActorInput, Reason, SaidReason, trace_id_of
from gateway.hub import Hub
from gateway.problems import RETRY_AFTER_S, Problem, ProblemType, unavailable
from gateway.room import Room

PENDING: Final = "PENDING"
"""It waits in the intake."""
PROCESSED: Final = "PROCESSED"
"""It has been applied, and nobody asked what became of it."""
REFUSALS: Final = frozenset(problem.error_code for problem in ProblemType)


class CancelBody(BaseModel):
    """`{reason, actor?}`. Whoever brings a token is the actor; without tokens the body may name one."""

    model_config = ConfigDict(strict=True, extra="ignore")
    reason: SaidReason
    actor: ActorInput | None = None


class PauseBody(BaseModel):
    """`{reason?, actor?}`, also of a resumption."""

    model_config = ConfigDict(strict=True, extra="ignore")
    reason: Reason | None = None
    actor: ActorInput | None = None


@dataclass(frozen=True, slots=True)
class CommandRoutes:
    """The routes and what they ask."""

    hub: Hub
    commands: Commands
    store: ViewStore
    shards: int

    def routes(self) -> list[Route]:
        """All routes, in the order of the documentation."""
        return [
            Route("/auctions/{auction_id}/cancel", self.cancel, methods=["POST"]),
            Route("/auctions/{auction_id}/pause", self.pause, methods=["POST"]),
            Route("/auctions/{auction_id}/resume", self.resume, methods=["POST"]),
            Route("/commands/{command_id:path}", self.get_command, methods=["GET"]),
        ]

    async def cancel(self, request: Request) -> Response:
        """Cancel an auction (requirement R24): for its owner, its maker and the maker's delegates, and for operators."""
        principal = principal_of(request)
        body = await read_body(request, CancelBody)
        record = await self.record(request.path_params["auction_id"])
        offer = record.auction.registered.offer if record else None
        # Everyone who may see the auction may cancel it, but its buyer as such, who has the offer to cancel.
        acting_as = [relation for relation in parties(principal, offer) if relation is not Role.BUYER] if offer else []
        if record is None or not acting_as:
            raise unknown_auction(request.path_params["auction_id"])
        actor = _actor(principal, body.actor, actor_of(principal, acting_as))
        return await self._ask(request, record, EventType.CANCEL_REQUESTED, Cancel(body.reason), actor)

    async def pause(self, request: Request) -> Response:
        """Freeze the remaining time of an auction."""
        return await self._operate(request, EventType.PAUSE_REQUESTED, Pause)

    async def resume(self, request: Request) -> Response:
        """Let a paused auction go on with its remaining time."""
        return await self._operate(request, EventType.RESUME_REQUESTED, Resume)

    async def _operate(self, request: Request, event_type: EventType, event: type[Pause | Resume]) -> Response:
        principal = require(request, Scope.OPS)
        body = await read_body(request, PauseBody)
        record = await self.record(request.path_params["auction_id"])
        if record is None:
            raise unknown_auction(request.path_params["auction_id"])
        actor = _actor(principal, body.actor, actor_of(principal, [Role.OPERATOR]))
        return await self._ask(request, record, event_type, event(body.reason), actor)

    async def record(self, auction_id: str) -> TimerRecord | None:
        """A public auction with the facts it was registered with, always from the store: who asks for somebody else's
        auction waits as long as who asks for one that is not there.

        Raises:
            Problem: `DEPENDENCY_UNAVAILABLE`, or `INTERNAL_ERROR` for a damaged one.
        """
        if not AUCTION_ID.fullmatch(auction_id):
            return None
        try:
            (found,) = await self.store.timers(shard_of(auction_id, self.shards), [auction_id])
        except StoreError:
            raise away() from None
        if isinstance(found, UnsealedTimerError):
            found = found.record  # the engine knows better, and decides
        if found is not None and not isinstance(found, TimerRecord):
            raise Problem(ProblemType.INTERNAL_ERROR, "what is stored of this auction cannot be read")
        return found if found is not None and found.auction.status.is_public else None

    async def _ask(
        self, request: Request, record: TimerRecord, event_type: EventType, event: InputEvent, actor: Actor
    ) -> Response:
        auction_id = record.auction.auction_id
        command_id, answer = await self.commands.ask(
            shard_of(auction_id, self.shards),
            event_type,
            event,
            auction_id=auction_id,
            actor=actor,
            correlation_id=request.state.correlation_id,
            trace_id=trace_id(request),
        )
        if answer is None:
            return pending(command_id)
        refuse(answer)
        return json_response(self.timer_of(answer))

    def timer_of(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The timer that an answer carries, as of now."""
        shard = shard_of(answer["auction_id"], self.shards)
        return as_of(answer["timer"], self.hub.clock.now_ms(), str(Cursor(shard, self.hub.positions[shard])))

    async def get_command(self, request: Request) -> Response:
        """What became of a command: an HTTP one that was answered 202, or any other by its event id."""
        command_id = request.path_params["command_id"]
        unknown = Problem(ProblemType.RESOURCE_NOT_FOUND, f"no command {command_id[:128]}")
        if not 0 < len(command_id) <= COMMAND_ID_CHARS_MAX:
            raise unknown
        shard = shard_in(command_id, self.shards)
        shards = range(self.shards) if shard is None else [shard]
        try:
            found = await asyncio.gather(*(self._outcome(number, command_id) for number in shards))
        except StoreError:
            raise away() from None
        outcomes = sorted((outcome for outcome in found if outcome is not None), key=_by_what_it_tells)
        principal = principal_of(request)
        if not outcomes or not _may_know(principal, outcomes[0]):
            raise unknown
        return json_response(outcomes[0])

    async def _outcome(self, shard: int, command_id: str) -> dict[str, Any] | None:
        if (known := await self._known(shard, command_id)) is not None:
            return known
        applied = await self.store.is_applied(shard, command_id)
        if applied is None:
            return None
        if not applied:
            return {"command_id": command_id, "outcome": PENDING}
        # Applied since it was looked for: what became of it was written by the same commit.
        return await self._known(shard, command_id) or {"command_id": command_id, "outcome": PROCESSED}

    async def _known(self, shard: int, command_id: str) -> dict[str, Any] | None:
        body = await self.store.outcome(shard, command_id)
        (parked,) = await self.store.parked_commands(shard, [command_id])
        if parked is not None:
            return as_command(command_id, parked) | {"outcome": "IN_TROUBLESHOOTING_QUEUE"}
        return None if body is None else _outcome_in(body)


def _may_know(principal: Principal, outcome: dict[str, Any]) -> bool:
    """Whoever's token it came with, and operators. Of what is only known to have come no name is kept: producers may ask,
    whose ids these are, and whoever has the id of a gateway's command, which cannot be guessed."""
    if principal.may(Scope.OPS) or outcome.get("asked_by") == principal.subject:
        return True
    is_a_gateways = COMMAND_ID.fullmatch(outcome["command_id"]) is not None
    return outcome["outcome"] in {PENDING, PROCESSED} and (is_a_gateways or principal.may(Scope.EVENTS_WRITE))


def _by_what_it_tells(outcome: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Of the outcomes of one id in several shards, the one that comes first is told: what was decided, best of an auction."""
    stands = outcome["outcome"]
    return stands in {PENDING, PROCESSED}, stands == PENDING, not outcome.get("auction_id")


def _outcome_in(body: bytes) -> dict[str, Any]:
    outcome: dict[str, Any] = orjson.loads(body)
    return outcome | ({"audit": as_json(outcome["audit"])} if "audit" in outcome else {})


def _actor(principal: Principal, named: ActorInput | None, known: Actor) -> Actor:
    return Actor(named.type, named.id) if principal.is_local and named is not None else known


def as_command(command_id: str, body: bytes) -> dict[str, Any]:
    """A command in troubleshooting as it was parked; one that somebody has spoiled since is shown as it is."""
    command = readable(body, levels_around=COMMAND_WITHIN)
    shown = command if isinstance(command, dict) else {"payload": body.decode(errors="replace")}
    return {**shown, "command_id": command_id}


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def pending(command_id: str) -> Response:
    """202: the command is in the intake, and no engine has answered yet."""
    headers = {"Location": f"/commands/{command_id}", "Retry-After": RETRY_AFTER_S}
    return json_response({"command_id": command_id, "outcome": PENDING}, 202, headers)


def refuse(answer: dict[str, Any]) -> None:
    """Raise what an answer refuses; return if it refuses nothing.

    Raises:
        Problem: by the refusal's code, with the members that a client branches on.
    """
    code = answer.get("error_code")
    if code is None:
        return
    if code == "UNKNOWN_AUCTION":
        raise unknown_auction(answer["auction_id"])
    names = ("current_status", "attempted_status", "support_reference", "command_id")
    extra = {name: answer[name] for name in names if name in answer}
    problem_type = ProblemType[code] if code in REFUSALS else ProblemType.IN_TROUBLESHOOTING
    raise Problem(problem_type, answer.get("error", "refused"), extra=extra)


async def room_of(hub: Hub, auction_id: str) -> Room:
    """The room of an auction that somebody asks for.

    Raises:
        Problem: `RESOURCE_NOT_FOUND`, `DEPENDENCY_UNAVAILABLE`, or `INTERNAL_ERROR` for a damaged one.
    """
    room = None
    if AUCTION_ID.fullmatch(auction_id):
        try:
            room = await hub.room(auction_id)
        except StoreError:
            raise away() from None
        except CorruptTimerError:
            raise Problem(ProblemType.INTERNAL_ERROR, "what is stored of this auction cannot be read") from None
    if room is None:
        raise unknown_auction(auction_id)
    return room


def unknown_auction(auction_id: str) -> Problem:
    """404: there is no such auction, or not for this caller."""
    return Problem(ProblemType.RESOURCE_NOT_FOUND, f"no auction {auction_id[:128]}")


def away() -> Problem:
    """503: Redis does not answer, and nothing was done."""
    return unavailable("this cannot be read now")


def trace_id(request: Request) -> str:
    """The trace a request belongs to, or a new one."""
    return trace_id_of(request.headers.get("traceparent")) or uuid4().hex
