"""What a request carries in its body: bounded, JSON, and checked against a model, with the path of every fault."""

from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from gateway.events import BODY_BYTES_MAX, reason_of
from gateway.problems import Problem, ProblemType

ERRORS_LISTED_MAX: Final = 20

M = TypeVar("M", bound=BaseModel)


async def bounded_body(request: Request) -> bytes:
    """The body, never holding more than the bound of it, whatever its sender claims.

    Raises:
        Problem: `PAYLOAD_TOO_LARGE`, or `MALFORMED_JSON` where it ends early.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES_MAX:
                raise Problem(
                    ProblemType.PAYLOAD_TOO_LARGE,
                    f"a body has at most {BODY_BYTES_MAX} bytes",
                    extra={"body_bytes_max": BODY_BYTES_MAX},
                    headers={"Connection": "close"},
                )
    except ClientDisconnect:
        raise Problem(ProblemType.MALFORMED_JSON, "the connection ended before the body did") from None
    return bytes(body)


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
    except ValidationError as error:
        faults = [
            {"path": ".".join(str(step) for step in fault["loc"]), "reason": reason_of(fault)}
            for fault in error.errors(include_url=False, include_input=False)[:ERRORS_LISTED_MAX]
        ]
        named = "; ".join(f"{fault['path'] or 'the body'} {fault['reason']}" for fault in faults)
        raise Problem(ProblemType.INVALID_BODY, named, extra={"errors": faults}) from None
