"""Commands: appended to the intake like every other event, decided by the engine in order, answered by its commit.

A gateway asks with a `reply_to` of its own, one per shard and in that shard's hash slot, and follows these streams together
with the event lane. So the answer is the one the commit wrote, and what the commit announced has been seen before it.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final
from uuid import uuid4

import orjson
import structlog

from engine.clock import AuctionClock
from engine.contract import intake
from engine.contract.cursors import START
from engine.contract.intake import Actor, CommandType, Context, Discard, EventType, IntakeEvent, Retry
from engine.domain.events import InputEvent
from engine.store.protocol import Draft, Intake, IntakeFullError, ReplyEntry, StoreError
from gateway.problems import RETRY_AFTER_S, Problem, ProblemType, unavailable

ANSWER_WITHIN_S: Final = 2.0
"""After this the caller is told where to ask again."""
WAITING_MAX: Final = 10_000
"""Callers that wait for an answer at once."""
COMMAND_ID: Final = re.compile(r"cmd-(0|[1-9][0-9]{0,3})-[0-9a-f]{32}")
"""What gateways name their commands: by shard, and so that nobody can guess it."""

log = structlog.get_logger()


class Commands:
    """Asks the engine, and hands its answers to whoever waits for them."""

    def __init__(self, store: Intake, clock: AuctionClock, shards: int) -> None:
        self._store = store
        self._clock = clock
        # The braces are a hash tag: the reply is written by the commit of the shard, which may not leave its slot.
        self._reply_to = [f"{{{shard}}}:gateway-{uuid4().hex}" for shard in range(shards)]
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.positions: dict[str, str] = dict.fromkeys(self._reply_to, START)
        """How far the answers were read, per reply stream."""

    async def ask(
        self,
        shard: int,
        event_type: EventType | CommandType,
        event: InputEvent | Retry | Discard,
        *,
        auction_id: str | None,
        actor: Actor,
        correlation_id: str,
        trace_id: str,
    ) -> tuple[str, dict[str, Any] | None]:
        """Append a command and wait for its answer: the command id, and the answer or None if there is none yet.

        Raises:
            Problem: `TOO_MANY_COMMANDS`, `INTAKE_FULL`, or `DEPENDENCY_UNAVAILABLE`, which names the command id.
        """
        if len(self._waiting) >= WAITING_MAX:
            raise Problem(
                ProblemType.TOO_MANY_COMMANDS,
                f"{WAITING_MAX} commands wait for an answer already",
                headers={"Retry-After": RETRY_AFTER_S},
            )
        command_id = f"cmd-{shard}-{uuid4().hex}"
        context = Context(
            command_id,
            event_type.value,
            trace_id,
            correlation_id,
            actor,
            self._reply_to[shard],
            submitted_by=actor.id or None,
        )
        draft = Draft(command_id, intake.encode(IntakeEvent(context, event, auction_id)))
        answer = self._waiting[command_id] = asyncio.get_running_loop().create_future()
        try:
            await self._append(shard, draft)
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return command_id, await answer
        except TimeoutError:
            return command_id, None
        finally:
            del self._waiting[command_id]

    async def _append(self, shard: int, draft: Draft) -> None:
        try:
            await self._store.append(shard, [draft], self._clock.now_ms(), draft.event_id, urgent=True)
        except IntakeFullError as error:
            raise Problem(ProblemType.INTAKE_FULL, str(error), headers={"Retry-After": RETRY_AFTER_S}) from None
        except StoreError:
            raise unavailable(
                f"the command may or may not have been taken: ask for /commands/{draft.event_id} before you repeat it",
                extra={"command_id": draft.event_id},
            ) from None

    def on_replies(self, reply_to: str, entries: Sequence[ReplyEntry]) -> None:
        """Take answers, in order. One that nobody waits for any more is kept by the store for whoever asks."""
        for entry in entries:
            self.positions[reply_to] = entry.stream_id
            waiting = self._waiting.get(entry.command_id)
            if waiting is None or waiting.done():
                continue
            try:
                waiting.set_result(orjson.loads(entry.body))
            except orjson.JSONDecodeError:
                log.exception("reply_unreadable", command_id=entry.command_id)

    def rewind(self) -> None:
        """A failover may have taken answers back: read the streams from their beginning. What is known is passed over."""
        self.positions = dict.fromkeys(self._reply_to, START)


def shard_in(command_id: str, shards: int) -> int | None:
    """The shard of a command that a gateway made; None if the id is somebody else's: producers may begin theirs alike."""
    made = COMMAND_ID.fullmatch(command_id)
    return int(made[1]) if made is not None and int(made[1]) < shards else None
