"""Tests for gateway.commands: asking, waiting and answering, on virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import pytest

from engine.contract.cursors import START
from engine.contract.intake import CommandType, Context, Discard, EventType, IntakeEvent, decode
from engine.domain.events import Pause
from engine.domain.instants import EpochMs
from engine.store.link import RedisRefusedError
from engine.store.protocol import Draft, IntakeFullError, ReplyEntry, StoreUnavailableError
from gateway import commands as module
from gateway.commands import ANSWER_WITHIN_S, Commands, shard_in
from gateway.problems import Problem, ProblemType
from tests.fakes.clock import BORN_MS
from tests.fakes.events import MAKER
from tests.fakes.loop import run
from tests.fakes.world import World
from tests.gateway.house import WatchedStore


class Asker:
    """Commands on a memory store that nobody answers, unless the test does."""

    def __init__(self, shards: int = 1) -> None:
        self.world = World()
        self.store: Any = WatchedStore(self.world.store)
        self.commands = Commands(self.store, self.world.clock(), shards)
        self._entries = 0

    def play(self, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a scenario on virtual time."""
        run(self.world.line, scenario)

    def ask(self, shard: int = 0) -> Coroutine[Any, Any, tuple[str, dict[str, Any] | None]]:
        """Ask for a pause."""
        return self.commands.ask(
            shard,
            EventType.PAUSE_REQUESTED,
            Pause("why"),
            auction_id="a-1",
            actor=MAKER,
            correlation_id="req-1",
            trace_id="trace-1",
        )

    async def asked(self, shard: int = 0) -> IntakeEvent:
        """The command that stands in the intake, once there is one."""
        while not (events := self.world.store.shards[shard].events):
            await asyncio.sleep(0.001)
        return decode(events[-1].event_id, events[-1].body)

    def answer(self, context: Context, body: bytes) -> None:
        """An answer is read from the reply stream."""
        assert context.reply_to is not None
        self._entries += 1
        entry = ReplyEntry(f"{self._entries}-0", context.event_id, body)
        self.commands.on_replies(context.reply_to, [entry])


def test_who_asks_is_told_what_the_commit_said() -> None:
    """The command is an intake event like any other; its answer is handed over as it was written."""
    asker = Asker()

    async def scenario() -> None:
        asking = asyncio.create_task(asker.ask())
        event = await asker.asked()
        assert (event.auction_id, event.event) == ("a-1", Pause("why"))
        context = event.context
        assert (context.actor, context.correlation_id, context.trace_id) == (MAKER, "req-1", "trace-1")
        asker.answer(context, orjson.dumps({"outcome": "APPLIED"}))
        assert await asking == (context.event_id, {"outcome": "APPLIED"})
        # Read once more, after a failover say: nobody waits, nothing happens.
        asker.answer(context, orjson.dumps({"outcome": "APPLIED"}))
        assert asker.commands.positions[context.reply_to or ""] == "2-0"

    asker.play(scenario)


def test_the_reply_stream_lies_in_the_slot_of_the_shard_that_writes_it() -> None:
    """A commit of a cluster may not leave its slot; and two gateways never share a stream."""
    asker, other = Asker(shards=3), Asker(shards=3)

    async def scenario() -> None:
        for shard in range(3):
            asking = asyncio.create_task(asker.ask(shard))
            context = (await asker.asked(shard)).context
            assert context.reply_to in asker.commands.positions
            assert (context.reply_to or "").startswith(f"{{{shard}}}:")
            assert shard_in(context.event_id, 3) == shard
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asker.play(scenario)
    assert not asker.commands.positions.keys() & other.commands.positions.keys()


@pytest.mark.requirement("R24")
def test_an_answer_that_does_not_come_is_none_after_its_time() -> None:
    """Two seconds, to the millisecond; one that comes later is passed over, and the place in the stream moves on."""
    asker = Asker()

    async def scenario() -> None:
        began_ns = asker.world.line.now_ns
        command_id, answer = await asker.ask()
        assert answer is None
        assert asker.world.line.now_ns - began_ns == pytest.approx(ANSWER_WITHIN_S * 1e9, abs=1e6)
        context = (await asker.asked()).context
        assert context.event_id == command_id
        asker.answer(context, b"{}")
        assert asker.commands.positions[context.reply_to or ""] == "1-0"

    asker.play(scenario)


def test_an_answer_nobody_can_read_is_none() -> None:
    """It ends neither the feed nor the request before its time; the outcome that the store keeps can be asked for."""
    asker = Asker()

    async def scenario() -> None:
        asking = asyncio.create_task(asker.ask())
        context = (await asker.asked()).context
        asker.answer(context, b"{not json")
        assert (await asking)[1] is None

    asker.play(scenario)


def test_answers_to_others_wake_nobody() -> None:
    """Each waits for its own."""
    asker = Asker()

    async def scenario() -> None:
        asking = asyncio.create_task(asker.ask())
        context = (await asker.asked()).context
        asker.commands.on_replies(context.reply_to or "", [ReplyEntry("1-0", "cmd-0-somebody-else", b'{"n": 1}')])
        await asyncio.sleep(1)
        assert not asking.done()
        asker.answer(context, b'{"n": 2}')
        assert (await asking)[1] == {"n": 2}

    asker.play(scenario)


def test_no_more_callers_wait_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is refused before anything is appended; whoever goes away makes room."""
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    asker = Asker()

    async def scenario() -> None:
        waiting = [asyncio.create_task(asker.ask()) for _ in range(2)]
        await asker.asked()
        with pytest.raises(Problem) as raised:
            await asker.ask()
        assert raised.value.type is ProblemType.TOO_MANY_COMMANDS
        assert raised.value.headers["Retry-After"] == "1"
        assert len(asker.world.shard.events) == 2
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        assert (await asker.ask())[1] is None
        await asyncio.gather(*waiting, return_exceptions=True)

    asker.play(scenario)


@pytest.mark.requirement("R16")
@pytest.mark.parametrize(
    ("fault", "problem_type", "names_command"),
    [
        (IntakeFullError("the intake of shard 0 is full"), ProblemType.INTAKE_FULL, False),
        (StoreUnavailableError("secret-host is away"), ProblemType.DEPENDENCY_UNAVAILABLE, True),
        (RedisRefusedError("NOPERM"), ProblemType.DEPENDENCY_UNAVAILABLE, True),
    ],
)
def test_a_store_that_takes_nothing_is_a_problem(
    fault: Exception, problem_type: ProblemType, names_command: bool
) -> None:
    """Where it is not known whether the command was taken, the answer says by which id to ask."""
    asker = Asker()
    asker.store.failing["append"] = fault

    async def scenario() -> None:
        with pytest.raises(Problem) as raised:
            await asker.ask()
        problem = raised.value
        assert problem.type is problem_type
        assert 1 <= int(problem.headers["Retry-After"]) <= 5
        assert ("command_id" in problem.extra) is names_command
        assert "secret-host" not in problem.detail
        if names_command:
            assert f"/commands/{problem.extra['command_id']}" in problem.detail

    asker.play(scenario)


def test_after_a_failover_the_answers_are_read_from_their_beginning() -> None:
    """A store that went back may write an answer again, behind an id that was read already."""
    asker = Asker(shards=2)
    streams = list(asker.commands.positions)
    asker.commands.on_replies(streams[1], [ReplyEntry("7-0", "cmd-1-x", b"{}")])
    assert list(asker.commands.positions.values()) == [START, "7-0"]
    asker.commands.rewind()
    assert asker.commands.positions == dict.fromkeys(streams, START)


@pytest.mark.requirement("R30")
def test_people_are_let_in_where_troubleshooting_is_full() -> None:
    """Or nobody could empty it, and one producer's poison would keep everybody from cancelling."""
    asker = Asker()
    asker.world.store._troubleshooting_max = 0

    async def scenario() -> None:
        with pytest.raises(IntakeFullError):
            await asker.world.store.append(0, [Draft("e-1", b"")], EpochMs(BORN_MS), "call-1")
        _, answer = await asker.ask()
        assert answer is None
        assert (await asker.asked()).event == Pause("why")
        _, answer = await asker.commands.ask(
            0,
            CommandType.DISCARD_REQUESTED,
            Discard("e-1", "why"),
            auction_id=None,
            actor=MAKER,
            correlation_id="req-1",
            trace_id="trace-1",
        )
        assert answer is None
        assert (await asker.asked()).event == Discard("e-1", "why")

    asker.play(scenario)


@pytest.mark.parametrize(
    ("command_id", "shard"),
    [
        ("cmd-0-" + "0a" * 16, 0),
        ("cmd-7-" + "f9" * 16, 7),
        ("cmd-007-" + "f9" * 16, None),
        ("cmd-8-" + "f9" * 16, None),
        ("cmd-7-" + "F9" * 16, None),
        ("cmd-7-" + "f9" * 17, None),
        ("cmd-0-abc", None),
        ("cmd-0-", None),
        ("cmd-0", None),
        ("cmd--a", None),
        ("cmd-x-a", None),
        ("cmd-²-a", None),
        ("cmd-٣-a", None),
        ("cmd-00000-a", None),
        ("cmd-" + "9" * 5_000 + "-a", None),
        ("CMD-0-a", None),
        ("e-1", None),
        ("", None),
    ],
)
def test_a_command_id_tells_its_shard(command_id: str, shard: int | None) -> None:
    """Only one of a gateway's making, letter by letter, and only a shard that there is."""
    assert shard_in(command_id, 8) == shard
