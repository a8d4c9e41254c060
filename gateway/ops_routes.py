"""`/ops/troubleshooting`: what could not be applied, and what operators do about it (requirements R29, R30, R32)."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.contract.intake import COMMAND_ID_CHARS_MAX, Actor, CommandType, Discard, Retry
from engine.contract.keys import SHARDS_MAX
from engine.store.protocol import Group, Placed, StoreError, ViewStore
from gateway.auth import Principal, Role, Scope, require
from gateway.bodies import read_body
from gateway.command_routes import as_command, away, json_response, pending, refuse, trace_id
from gateway.commands import Commands
from gateway.events import ACTOR_ID_CHARS_MAX, NAME_PATTERN, Reason, SaidReason
from gateway.listing import Place, next_places
from gateway.problems import Problem, ProblemType
from gateway.queries import integer_of, invalid, limit_of

ROUNDS_MAX: Final = 20
"""Pages looked at for one answer: a filter that matches little gets a short page and a cursor to go on from."""
REQUEUE_MAX: Final = 1_000
REQUEUE_DEFAULT: Final = 100
REQUEUED_AT_ONCE: Final = 32

Name = Annotated[str, Field(min_length=1, max_length=ACTOR_ID_CHARS_MAX, pattern=NAME_PATTERN)]
Filter = Annotated[str, Field(min_length=1, max_length=128)]


class RetryBody(BaseModel):
    """`{reason?, operator?}`. Whoever brings a token is the operator; without tokens the body may name one."""

    model_config = ConfigDict(strict=True, extra="ignore")
    reason: Reason | None = None
    operator: Name | None = None


class DiscardBody(BaseModel):
    """`{reason, operator?}`, as above."""

    model_config = ConfigDict(strict=True, extra="ignore")
    reason: SaidReason
    operator: Name | None = None


class RequeueBody(RetryBody):
    """`{error_code?, event_type?, limit?, reason?, operator?}`: which commands, the longest waiting first."""

    error_code: Filter | None = None
    event_type: Filter | None = None
    limit: Annotated[int, Field(ge=1, le=REQUEUE_MAX)] = REQUEUE_DEFAULT


@dataclass(frozen=True, slots=True)
class OpsRoutes:
    """The routes and what they ask."""

    commands: Commands
    store: ViewStore
    shards: int

    def routes(self) -> list[Route]:
        """All routes, in the order of the documentation."""
        return [
            Route("/ops/troubleshooting", self.list_parked, methods=["GET"]),
            Route("/ops/troubleshooting/requeue", self.requeue, methods=["POST"]),
            Route("/ops/troubleshooting/{command_id:path}/retry", self.retry, methods=["POST"]),
            Route("/ops/troubleshooting/{command_id:path}/cancel", self.discard, methods=["POST"]),
        ]

    async def list_parked(self, request: Request) -> Response:
        """A page of troubleshooting, the longest waiting first."""
        require(request, Scope.OPS)
        query = request.query_params
        place = None
        if (cursor := query.get("cursor")) is not None:
            place = Place.decode(cursor)
            if place is None or place.group is not Group.PARKED:
                raise invalid("cursor", "must be the next_cursor of an earlier answer")
        wanted = _Wanted(query.get("error_code"), query.get("event_type"))
        try:
            found, after = await self._page(wanted, place.after if place else None, limit_of(query.get("limit")))
            depths = await asyncio.gather(*(self.store.parked(shard) for shard in range(self.shards)))
        except StoreError:
            raise away() from None
        next_cursor = Place(Group.PARKED, after).encode() if after is not None else None
        return json_response({"commands": found, "next_cursor": next_cursor, "depth": sum(depths)})

    async def _page(
        self, wanted: "_Wanted", after: Placed | None, limit: int
    ) -> tuple[list[dict[str, Any]], Placed | None]:
        found: list[dict[str, Any]] = []
        for _ in range(ROUNDS_MAX):
            row = await self._row(after, limit)
            for placed, command in row:
                after = placed
                if command is not None and wanted.matches(command):
                    found.append(command)
                    if len(found) == limit:
                        return found, after
            if len(row) < limit:
                return found, None
        return found, after

    async def _row(self, after: Placed | None, count: int) -> list[tuple[Placed, dict[str, Any] | None]]:
        """The next `count` commands over all shards; None for one that has left meanwhile."""
        merged, by_shard = await next_places(self.store, self.shards, Group.PARKED, after, count)
        answers = await asyncio.gather(*(self.store.parked_commands(shard, ids) for shard, ids in by_shard.items()))
        bodies = {
            (shard, command_id): body
            for (shard, ids), answer in zip(by_shard.items(), answers, strict=True)
            for command_id, body in zip(ids, answer, strict=True)
        }
        return [
            (placed, None if body is None else as_command(placed.auction_id, body) | {"shard": shard})
            for placed, shard in merged
            for body in (bodies[shard, placed.auction_id],)
        ]

    async def retry(self, request: Request) -> Response:
        """Send a command round again: it enters at the end of the intake, and arrives now."""
        principal = require(request, Scope.OPS)
        body = await read_body(request, RetryBody)
        command_id = request.path_params["command_id"]
        order = Retry(command_id, body.reason)
        return await self._operate(request, order, _operator(principal, body.operator))

    async def discard(self, request: Request) -> Response:
        """Cancel a command for good: whoever sent it is told why."""
        principal = require(request, Scope.OPS)
        body = await read_body(request, DiscardBody)
        order = Discard(request.path_params["command_id"], body.reason)
        return await self._operate(request, order, _operator(principal, body.operator))

    async def _operate(self, request: Request, order: Retry | Discard, actor: Actor) -> Response:
        wanted = integer_of("shard", request.query_params.get("shard"), 0, SHARDS_MAX - 1)
        among = [shard for shard in range(self.shards) if wanted in (None, shard)]  # none has it that there is not
        shard = await self._shard_of(order.command_id, among)
        asked, answer = await self._ask(request, shard, order, actor)
        if answer is None:
            return pending(asked)
        refuse(answer)
        return json_response(answer["command"])

    async def _ask(
        self, request: Request, shard: int, order: Retry | Discard, actor: Actor
    ) -> tuple[str, dict[str, Any] | None]:
        return await self.commands.ask(
            shard,
            CommandType.RETRY_REQUESTED if isinstance(order, Retry) else CommandType.DISCARD_REQUESTED,
            order,
            auction_id=None,
            actor=actor,
            correlation_id=request.state.correlation_id,
            trace_id=trace_id(request),
        )

    async def _shard_of(self, command_id: str, shards: Sequence[int]) -> int:
        """The one of these shards that has a command in troubleshooting.

        Raises:
            Problem: `RESOURCE_NOT_FOUND`, `INVALID_OPERATION` for a command that is known and not there, or
                `INVALID_PARAMETER` where commands of this id wait in several.
        """
        unknown = Problem(ProblemType.RESOURCE_NOT_FOUND, f"no command {command_id[:128]}")
        if len(command_id) > COMMAND_ID_CHARS_MAX:
            raise unknown
        try:
            parked = await asyncio.gather(*(self.store.parked_commands(shard, [command_id]) for shard in shards))
            having = [shard for shard, (body,) in zip(shards, parked, strict=True) if body is not None]
            if len(having) > 1:
                raise invalid(
                    "shard", f"must be one of {', '.join(map(str, having))}: a command of this id waits in each"
                )
            if having:
                return having[0]
            outcomes = await asyncio.gather(*(self.store.outcome(shard, command_id) for shard in shards))
            applied = await asyncio.gather(*(self.store.is_applied(shard, command_id) for shard in shards))
        except StoreError:
            raise away() from None
        status = next((orjson.loads(body)["outcome"] for body in outcomes if body is not None), None)
        if status is None and all(found is None for found in applied):
            raise unknown
        raise Problem(
            ProblemType.INVALID_OPERATION,
            f"command {command_id} is not in troubleshooting",
            extra={} if status is None else {"current_status": status},
        )

    async def requeue(self, request: Request) -> Response:
        """Send many commands round again, the longest waiting first."""
        principal = require(request, Scope.OPS)
        body = await read_body(request, RequeueBody)
        actor = _operator(principal, body.operator)
        try:
            chosen = await self._choose(_Wanted(body.error_code, body.event_type), body.limit)
        except StoreError:
            raise away() from None
        counts = {"requeued": 0, "refused": 0, "pending": 0}
        for start in range(0, len(chosen), REQUEUED_AT_ONCE):
            answers = await asyncio.gather(
                *(
                    self._ask(request, command["shard"], Retry(command["command_id"], body.reason), actor)
                    for command in chosen[start : start + REQUEUED_AT_ONCE]
                )
            )
            for _, answer in answers:
                counts[_counted(answer)] += 1
        return json_response(counts)

    async def _choose(self, wanted: "_Wanted", limit: int) -> list[dict[str, Any]]:
        """All of them before the first is sent round: one that fails again must not be met again."""
        chosen, after = await self._page(wanted, None, limit)
        while after is not None and len(chosen) < limit:
            more, after = await self._page(wanted, after, limit)
            chosen += more
        return chosen[:limit]


@dataclass(frozen=True, slots=True)
class _Wanted:
    error_code: str | None
    event_type: str | None

    def matches(self, command: dict[str, Any]) -> bool:
        return self.error_code in {None, command.get("error_code")} and self.event_type in {
            None,
            command.get("event_type"),
        }


def _counted(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "pending"
    return "refused" if "error_code" in answer else "requeued"


def _operator(principal: Principal, named: str | None) -> Actor:
    return Actor(Role.OPERATOR.value, (named or "local") if principal.is_local else principal.subject)
