"""The part of `/openapi.json` about watching an auction: its event stream, clock sync, and where the frames are described."""

from typing import Any

from gateway.openapi_parts import AUCTION_ID, answer, problems, query
from gateway.problems import ProblemType


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
    }
