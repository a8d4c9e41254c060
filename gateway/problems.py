"""What an HTTP answer says when it says no: problem details (RFC 9457) from one catalogue of stable codes.

A route raises `Problem`; the application turns it into an answer at one place. A client branches on `error_code`, a
person reads `detail`, and `correlation_id` finds the request in the logs:

    {"type": "urn:auction-timer:problem:resource-not-found", "title": "Not found", "status": 404,
     "detail": "no auction a-17", "error_code": "RESOURCE_NOT_FOUND", "correlation_id": "req-5f1c"}
"""

import random
from collections.abc import Mapping
from enum import Enum, unique
from types import MappingProxyType
from typing import Any, Final

import orjson
from starlette.responses import Response

MEDIA_TYPE: Final = "application/problem+json"
_URN: Final = "urn:auction-timer:problem:"
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@unique
class ProblemType(Enum):
    """The catalogue. A member's name is its `error_code`: part of the outside contract, its meaning never changes."""

    RESOURCE_NOT_FOUND = (404, "Not found")
    MALFORMED_EVENTS = (400, "Malformed events")
    MALFORMED_JSON = (400, "Body is not JSON")
    BATCH_TOO_LARGE = (400, "Too many events in one request")
    EMPTY_BATCH = (400, "No event in the request")
    PAYLOAD_TOO_LARGE = (413, "Body is too large")
    INVALID_PARAMETER = (400, "Invalid parameter")
    METHOD_NOT_ALLOWED = (405, "Method not allowed")
    UPGRADE_REQUIRED = (426, "This is a WebSocket")
    FOREIGN_ORIGIN = (403, "Origin is not allowed")
    UNAUTHENTICATED = (401, "A valid token is needed")
    INSUFFICIENT_SCOPE = (403, "The token does not allow this")
    MALFORMED_REQUEST = (400, "Malformed request")
    REQUEST_TIMEOUT = (408, "Request took too long")
    HEADERS_TOO_LARGE = (431, "Headers are too large")
    TOO_MANY_CONNECTIONS = (503, "Too many connections")
    TOO_MANY_HANDSHAKES = (503, "Too many handshakes")
    DRAINING = (503, "Going away")
    INTAKE_FULL = (503, "Intake is full")
    DEPENDENCY_UNAVAILABLE = (503, "A dependency is unavailable")
    INTERNAL_ERROR = (500, "Internal error")
    INVALID_BODY = (422, "Invalid body")
    NOT_AUTHORIZED = (403, "Not allowed for you")
    WINDOW_EXPIRED = (409, "The time for this is over")
    ALREADY_CANCELLED = (409, "Cancelled already")
    AUCTION_CLOSED = (409, "Auction is closed")
    INVALID_OPERATION = (409, "Not in troubleshooting")
    IN_TROUBLESHOOTING = (409, "Needs an operator")
    TOO_MANY_COMMANDS = (503, "Too many commands wait for an answer")
    FSM_TRANSITION_INVALID = (409, "Not possible in the current status")
    FSM_TERMINAL_IMMUTABLE = (409, "Auction is over")

    def __init__(self, status: int, title: str) -> None:
        self.status: Final = status
        self.title: Final = title

    @property
    def error_code(self) -> str:
        """The code a client branches on."""
        return self.name

    @property
    def uri(self) -> str:
        """The problem type as a URI (RFC 9457, section 3.1.1). A URN: it identifies, and promises no page behind it."""
        return _URN + self.name.lower().replace("_", "-")


RESERVED_MEMBERS: Final = frozenset({"type", "title", "status", "detail", "error_code", "correlation_id"})
"""Members that every problem has; no extra field may take their place."""


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """An answer other than success, raised by whoever knows why.

    Args:
        problem_type: the entry of the catalogue.
        detail: one sentence about this occurrence, for a person.
        extra: further members of the body (JSON values), such as `errors` or `current_status`.
        headers: of the answer, such as `Retry-After` or `Allow`.
    """

    def __init__(
        self,
        problem_type: ProblemType,
        detail: str,
        *,
        extra: Mapping[str, Any] = _NOTHING,
        headers: Mapping[str, str] = _NOTHING,
    ) -> None:
        super().__init__(f"{problem_type.error_code}: {detail}")
        taken = RESERVED_MEMBERS & extra.keys()
        assert not taken, f"extra members may not replace {sorted(taken)}"
        self.type: Final = problem_type
        self.detail: Final = detail
        self.extra: Final = extra
        self.headers: Final = headers


def problem_body(problem: Problem, correlation_id: str) -> dict[str, Any]:
    """The body of the answer: the reserved members, then the extra ones."""
    return {
        "type": problem.type.uri,
        "title": problem.type.title,
        "status": problem.type.status,
        "detail": problem.detail,
        "error_code": problem.type.error_code,
        "correlation_id": correlation_id,
        **problem.extra,
    }


def problem_response(problem: Problem, correlation_id: str) -> Response:
    """The answer itself, with the problem's headers, as `application/problem+json`."""
    return Response(
        orjson.dumps(problem_body(problem, correlation_id)),
        status_code=problem.type.status,
        headers=dict(problem.headers),
        media_type=MEDIA_TYPE,
    )


RETRY_AFTER_S: Final = "1"
"""When it is worth while to try again what could not be done now."""
RETRY_AFTER_MAX_S: Final = 5


def retry_after() -> dict[str, str]:
    """When to come back, spread so that those who were refused together do not come back together."""
    return {"Retry-After": str(random.randint(1, RETRY_AFTER_MAX_S))}  # noqa: S311 - it only has to spread


def unavailable(detail: str, *, extra: Mapping[str, Any] = _NOTHING) -> Problem:
    """503: something this needs does not answer."""
    return Problem(ProblemType.DEPENDENCY_UNAVAILABLE, detail, extra=extra, headers=retry_after())
