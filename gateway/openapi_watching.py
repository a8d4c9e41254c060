"""The part of `/openapi.json` about watching an auction: its event stream, clock sync, and where the frames are described."""

from typing import Any, Final

from gateway.openapi_parts import AUCTION_ID, INSTANT, answer, body, problems, query, ref
from gateway.problems import ProblemType
from gateway.sync_routes import SyncBody

_SYNCED: Final[dict[str, Any]] = {
    "type": "object",
    "description": "Offset of the client: ((t1 - t0) + (t2 - t3)) / 2, where t3 is its clock when this arrives",
    "properties": {
        "t0": {"type": "number", "description": "as it was sent"},
        "t1": INSTANT | {"description": "when the request was received, ms since the Unix epoch"},
        "t2": INSTANT | {"description": "when this was sent, ms since the Unix epoch"},
        "timer": ref("Timer"),
    },
    "required": ["t0", "t1", "t2", "timer"],
}


def watch_schemas() -> dict[str, Any]:
    """JSON schemas by name."""
    return {"SyncBody": SyncBody.model_json_schema(), "Synced": _SYNCED}


def watch_paths() -> dict[str, Any]:
    """The routes, by path."""
    return {
        "/auctions/{auction_id}/events": {
            "get": {
                "operationId": "streamEvents",
                "summary": "The frames of the socket as Server-Sent Events; see `/asyncapi.json`",
                "parameters": [
                    AUCTION_ID,
                    query(
                        "since", "`id` of the last event that was read: what came after it is sent", {"type": "string"}
                    ),
                    query("token", "a token, where the header cannot be set", {"type": "string"}),
                    {
                        "name": "Last-Event-ID",
                        "in": "header",
                        "required": False,
                        "description": "as `since`, and before it: what a browser sends by itself",
                        "schema": {"type": "string"},
                    },
                ],
                "responses": {
                    "200": answer("Events until the auction is over", {"type": "string"}, "text/event-stream"),
                    "204": answer("The auction is over and its end was read: do not come back", None),
                    **problems(
                        ProblemType.FOREIGN_ORIGIN,
                        ProblemType.RESOURCE_NOT_FOUND,
                        ProblemType.TOO_MANY_CONNECTIONS,
                        ProblemType.TOO_MANY_HANDSHAKES,
                        ProblemType.DRAINING,
                        ProblemType.DEPENDENCY_UNAVAILABLE,
                        ProblemType.INTERNAL_ERROR,
                    ),
                },
            }
        },
        "/timers/sync": {
            "post": {
                "operationId": "syncClock",
                "summary": "The time by the auction clock, for a client whose drift is over 500 ms and that has no socket",
                "requestBody": body(ref("SyncBody")),
                "responses": {
                    "200": answer("When it was received and sent, and the timer", ref("Synced")),
                    **problems(
                        ProblemType.MALFORMED_JSON,
                        ProblemType.FOREIGN_ORIGIN,
                        ProblemType.RESOURCE_NOT_FOUND,
                        ProblemType.PAYLOAD_TOO_LARGE,
                        ProblemType.INVALID_BODY,
                        ProblemType.INTERNAL_ERROR,
                        ProblemType.DEPENDENCY_UNAVAILABLE,
                    ),
                },
            }
        },
    }
