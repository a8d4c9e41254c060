"""Tests for gateway.bodies."""

import orjson
import pytest
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.types import Message

from gateway.bodies import DISCARDED_BYTES_MAX, ERRORS_LISTED_MAX, bounded_body, read_body
from gateway.command_routes import CancelBody, PauseBody
from gateway.events import BODY_BYTES_MAX
from gateway.offer_routes import CancelOfferBody
from gateway.problems import Problem, ProblemType


class Crowd(BaseModel):
    """A model that can be wrong in more ways than are listed."""

    model_config = ConfigDict(strict=True, extra="ignore")
    numbers: list[int]


def request(
    *chunks: bytes, ends: bool = True, headers: dict[str, str] | None = None, messages: list[Message] | None = None
) -> Request:
    """A request whose body comes in these pieces; one that does not end is cut off. `messages`: gets what is not read yet."""
    left: list[Message] = [] if messages is None else messages
    left += [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    left.append({"type": "http.request", "body": b"", "more_body": False} if ends else {"type": "http.disconnect"})

    async def receive() -> Message:
        return left.pop(0)

    given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "headers": given}, receive)


async def refused(asked: Request, model: type[BaseModel] = CancelBody) -> Problem:
    """The problem that a body is refused with."""
    with pytest.raises(Problem) as raised:
        await read_body(asked, model)
    return raised.value


@pytest.mark.parametrize("body", [b"", b" \n\t", b"{}"])
async def test_no_body_is_an_empty_object(body: bytes) -> None:
    """A command without anything to say needs no braces."""
    assert (await read_body(request(body), PauseBody)) == PauseBody()
    problem = await refused(request(body))
    assert problem.extra["errors"] == [{"path": "reason", "reason": "is required"}]


async def test_a_body_in_pieces_is_one_body() -> None:
    """However it is cut on its way; unknown members are ignored."""
    body = b'{"reason": "withdrawn", "actor": {"type": "maker", "id": "m-1"}, "more": [1, 2]}'
    read = await read_body(request(*(body[at : at + 7] for at in range(0, len(body), 7))), CancelBody)
    assert (read.reason, read.actor and read.actor.id) == ("withdrawn", "m-1")


@pytest.mark.parametrize(
    "body", [b"x", b"{", b'{"reason": NaN}', b"\xff\xfe", b'{"reason": "\\ud800"}', b"[" * 2_000, b'{"reason": "a"} x']
)
async def test_what_is_not_json_is_named_so(body: bytes) -> None:
    """Also what some parsers would let pass."""
    assert (await refused(request(body))).type is ProblemType.MALFORMED_JSON


@pytest.mark.parametrize("depth", [10, 400, 1_000])
async def test_nesting_in_a_value_that_is_one_of_a_few_is_only_a_wrong_value(depth: int) -> None:
    """Also where the message about it would name the value level by level."""
    problem = await refused(request(b'{"reason_code": %b%b}' % (b"[" * depth, b"]" * depth)), CancelOfferBody)
    assert problem.type is ProblemType.INVALID_BODY
    assert problem.extra["errors"]


@pytest.mark.parametrize(
    ("body", "path", "reason"),
    [
        (b"[]", "", "must be an object"),
        (b"null", "", "must be an object"),
        (b'"text"', "", "must be an object"),
        (b'{"reason": 7}', "reason", "must be a string"),
        (b'{"reason": ""}', "reason", "must not be empty"),
        (b'{"reason": null}', "reason", "must be a string"),
        (
            b'{"reason": "\\u0000"}',
            "reason",
            "must not be blank, nor contain control characters other than newline and tab",
        ),
        (b'{"reason": "a", "actor": {"type": "maker"}}', "actor.id", "is required"),
        (b'{"reason": "a", "actor": "maker"}', "actor", "must be an object"),
        (orjson.dumps({"reason": "x" * 501}), "reason", "must have at most 500 characters"),
    ],
)
async def test_every_fault_has_its_path_and_its_reason(body: bytes, path: str, reason: str) -> None:
    """In the words of the catalogue, and without the value that was sent."""
    problem = await refused(request(body))
    assert problem.type is ProblemType.INVALID_BODY
    assert problem.extra["errors"] == [{"path": path, "reason": reason}]
    assert problem.detail == f"{path or 'the body'} {reason}"


async def test_no_more_faults_are_listed_than_the_bound() -> None:
    """A body can be wrong in a million places; the answer stays short."""
    problem = await refused(request(orjson.dumps({"numbers": ["x"] * 1_000})), Crowd)
    assert len(problem.extra["errors"]) == ERRORS_LISTED_MAX


async def too_large(asked: Request) -> Problem:
    """The problem that a body of too many bytes is refused with."""
    with pytest.raises(Problem) as raised:
        await bounded_body(asked)
    assert raised.value.type is ProblemType.PAYLOAD_TOO_LARGE
    return raised.value


async def test_a_body_is_held_up_to_its_bound() -> None:
    """Exactly the bound passes and one byte more does not. That one is read to its end, so the connection can stay."""
    assert len(await bounded_body(request(b" " * BODY_BYTES_MAX))) == BODY_BYTES_MAX
    half = b" " * (BODY_BYTES_MAX // 2)
    left: list[Message] = []
    problem = await too_large(request(half, half, b" ", b" ", messages=left))
    assert left == []
    assert "Connection" not in problem.headers


async def test_what_is_thrown_away_has_a_bound_too() -> None:
    """Who goes on sending is not listened to for ever: the connection ends."""
    piece = b" " * BODY_BYTES_MAX
    left: list[Message] = []
    problem = await too_large(request(*[piece] * (DISCARDED_BYTES_MAX // BODY_BYTES_MAX), b" ", b" ", messages=left))
    assert len(left) == 2
    assert problem.headers["Connection"] == "close"


@pytest.mark.parametrize(
    ("headers", "is_read"),
    [
        ({"content-length": str(BODY_BYTES_MAX + 1)}, True),
        ({"content-length": str(DISCARDED_BYTES_MAX)}, True),
        ({"content-length": str(DISCARDED_BYTES_MAX + 1)}, False),
        ({"content-length": str(BODY_BYTES_MAX + 1), "expect": "100-continue"}, False),
        ({"content-length": str(BODY_BYTES_MAX + 1), "expect": "100-Continue"}, False),
    ],
)
async def test_a_claim_is_refused_unread_only_where_nobody_is_cut_off(headers: dict[str, str], is_read: bool) -> None:
    """A sender who waits for leave gets the answer instead; one who sends at once is read, unless that is far too much."""
    left: list[Message] = []
    problem = await too_large(request(b" " * (BODY_BYTES_MAX + 1), headers=headers, messages=left))
    assert (left == []) is is_read
    assert ("Connection" in problem.headers) is not is_read


async def test_a_small_body_that_waits_for_leave_gets_it() -> None:
    """The first look at the body is what gives it."""
    headers = {"content-length": "2", "expect": "100-continue"}
    assert await bounded_body(request(b"{}", headers=headers)) == b"{}"


async def test_half_a_body_is_none() -> None:
    """Also where the half would be valid."""
    assert (await refused(request(b'{"reason": "a"}', ends=False))).type is ProblemType.MALFORMED_JSON
