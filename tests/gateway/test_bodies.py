"""Tests for gateway.bodies."""

import orjson
import pytest
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.types import Message

from gateway.bodies import ERRORS_LISTED_MAX, bounded_body, read_body
from gateway.command_routes import CancelBody, PauseBody
from gateway.events import BODY_BYTES_MAX
from gateway.problems import Problem, ProblemType


class Crowd(BaseModel):
    """A model that can be wrong in more ways than are listed."""

    model_config = ConfigDict(strict=True, extra="ignore")
    numbers: list[int]


def request(*chunks: bytes, ends: bool = True) -> Request:
    """A request whose body comes in these pieces; one that does not end is cut off."""
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False} if ends else {"type": "http.disconnect"})

    async def receive() -> Message:
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


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


@pytest.mark.parametrize(
    ("body", "path", "reason"),
    [
        (b"[]", "", "must be an object"),
        (b"null", "", "must be an object"),
        (b'"text"', "", "must be an object"),
        (b'{"reason": 7}', "reason", "must be a string"),
        (b'{"reason": ""}', "reason", "must not be empty"),
        (b'{"reason": null}', "reason", "must be a string"),
        (b'{"reason": "\\u0000"}', "reason", "must not contain control characters other than newline and tab"),
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


async def test_a_body_is_held_up_to_its_bound() -> None:
    """Exactly the bound passes, one byte more does not, and what follows is not read."""
    assert len(await bounded_body(request(b" " * BODY_BYTES_MAX))) == BODY_BYTES_MAX
    half = b" " * (BODY_BYTES_MAX // 2)
    with pytest.raises(Problem) as raised:
        await bounded_body(request(half, half, b" ", ends=False))
    assert raised.value.type is ProblemType.PAYLOAD_TOO_LARGE
    assert raised.value.headers["Connection"] == "close"


async def test_half_a_body_is_none() -> None:
    """Also where the half would be valid."""
    assert (await refused(request(b'{"reason": "a"}', ends=False))).type is ProblemType.MALFORMED_JSON
