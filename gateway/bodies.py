"""What a request carries in its body: bounded, JSON, and checked against a model, with the path of every fault."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from gateway.events import BODY_BYTES_MAX, TOO_DEEP, reason_of
from gateway.problems import Problem, ProblemType

ERRORS_LISTED_MAX: Final = 20
DISCARDED_BYTES_MAX: Final = 64 * BODY_BYTES_MAX
"""What is read of a body that is refused. It costs as much as 64 bodies that are not; the body's deadline stands too."""

M = TypeVar("M", bound=BaseModel)


async def bounded_body(request: Request) -> bytes:
    """The body, never holding more than the bound of it, whatever its sender claims.

    What is too large is read to its end and thrown away, within a bound: many a client reads no answer before it has sent
    everything, and a close with unread bytes is a reset, which takes the 413 with it.

    Raises:
        Problem: `PAYLOAD_TOO_LARGE`, or `MALFORMED_JSON` where it ends early.
    """
    _refuse_claimed(request)
    body, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= BODY_BYTES_MAX:
                body += chunk
            elif size > DISCARDED_BYTES_MAX:
                raise _too_large(headers={"Connection": "close"})
            else:
                body.clear()
    except ClientDisconnect:
        raise Problem(ProblemType.MALFORMED_JSON, "the connection ended before the body did") from None
    if size > BODY_BYTES_MAX:
        raise _too_large()
    return bytes(body)


def _refuse_claimed(request: Request) -> None:
    """Refuse what need not be read at all: its sender says that it is far too large, or waits for leave to send it."""
    claimed = int(request.headers.get("content-length", 0))  # h11 lets nothing pass that is not digits
    waits = request.headers.get("expect", "").lower() == "100-continue"
    if claimed > (BODY_BYTES_MAX if waits else DISCARDED_BYTES_MAX):
        raise _too_large(headers={"Connection": "close"})


def _too_large(headers: Mapping[str, str] = MappingProxyType({})) -> Problem:
    return Problem(
        ProblemType.PAYLOAD_TOO_LARGE,
        f"a body has at most {BODY_BYTES_MAX} bytes",
        extra={"body_bytes_max": BODY_BYTES_MAX},
        headers=headers,
    )


async def read_body(request: Request, model: type[M]) -> M:
    """The body of a command. An empty one counts as `{}`.

    Raises:
        Problem: `PAYLOAD_TOO_LARGE`, `MALFORMED_JSON`, or `INVALID_BODY` with `errors: [{path, reason}]`.
    """
    body = await bounded_body(request)
    raw: Any = {}
    if body.strip():
        try:
            raw = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Problem(ProblemType.MALFORMED_JSON, str(error)) from None
    try:
        return model.model_validate(raw)
    except RecursionError:
        raise Problem(
            ProblemType.INVALID_BODY, TOO_DEEP, extra={"errors": [{"path": "", "reason": TOO_DEEP}]}
        ) from None
    except ValidationError as error:
        faults = [
            {"path": ".".join(str(step) for step in fault["loc"]), "reason": reason_of(fault)}
            for fault in error.errors(include_url=False, include_input=False)[:ERRORS_LISTED_MAX]
        ]
        named = "; ".join(f"{fault['path'] or 'the body'} {fault['reason']}" for fault in faults)
        raise Problem(ProblemType.INVALID_BODY, named, extra={"errors": faults}) from None
