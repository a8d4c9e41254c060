"""`/openapi.json`: every route with its answers (requirement R28). A test holds it to the running server."""

from functools import cache
from typing import Any, Final

from engine.domain.lifecycle import Status
from gateway.events import event_schemas
from gateway.openapi_commands import command_paths, command_schemas
from gateway.openapi_parts import AUCTION_ID, DURATION, INSTANT, JSON, answer, problems, query, ref
from gateway.openapi_watching import watch_paths, watch_schemas
from gateway.problems import ProblemType
from gateway.queries import LIMIT_MAX
from gateway.tokens import OPEN_PATHS

_STATUSES: Final = [status.value for status in Status if status.is_public]

TIMER: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "auction_id": {"type": "string"},
        "offer_id": {"type": "string"},
        "status": {"enum": _STATUSES},
        "version": {"type": "integer", "minimum": 1},
        "starts_at": INSTANT,
        "ends_at": INSTANT,
        "original_ends_at": INSTANT,
        "soft_close_until": {"type": ["integer", "null"], "description": "null before the window opened, then the end"},
        "final_deadline": INSTANT | {"description": "the last possible end, ms since the Unix epoch"},
        "extension_count": {"type": "integer", "minimum": 0},
        "extension_used_ms": DURATION,
        "extension_left_ms": DURATION,
        "at_cap": {"type": "boolean"},
        "clipped_by": {"enum": ["count", "increment", "total"]},
        "remaining_ms": DURATION | {"minimum": 0},
        "paused_remaining_ms": DURATION,
        "ended_at": INSTANT,
        "cancelled_at": INSTANT,
        "reason": {"type": "string"},
        "server_time": INSTANT,
        "trace_id": {"type": "string"},
        "cursor": {"type": ["string", "null"], "description": "where the event lane stood; hand it back as `since`"},
        "stale": {"type": "boolean", "description": "Redis is away: this is from memory"},
    },
    "required": [
        "auction_id", "status", "version", "starts_at", "ends_at", "original_ends_at", "soft_close_until",
        "final_deadline", "extension_count", "extension_used_ms", "extension_left_ms", "at_cap", "remaining_ms",
        "server_time", "trace_id", "cursor", "stale",
    ],
}  # fmt: skip

_PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "description": "RFC 9457 problem details",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "error_code": {"enum": sorted(problem.error_code for problem in ProblemType)},
        "correlation_id": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail", "error_code", "correlation_id"],
}

_RESULTS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "results": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "status": {"enum": ["accepted", "duplicate"]},
                    "arrival_ms": INSTANT | {"description": "the stamp that decides, ms since the Unix epoch"},
                },
                "required": ["id", "status", "arrival_ms"],
            },
        }
    },
    "required": ["results"],
}


def _paths() -> dict[str, Any]:
    timer_with_poll = {
        "allOf": [
            ref("Timer"),
            {"type": "object", "properties": {"next_poll_ms": DURATION}, "required": ["next_poll_ms"]},
        ]
    }
    page = {
        "type": "object",
        "properties": {
            "auctions": {"type": "array", "items": ref("Timer")},
            "next_cursor": {"type": ["string", "null"]},
        },
        "required": ["auctions", "next_cursor"],
    }
    readiness = {
        "type": "object",
        "properties": {
            "ready": {"type": "boolean"},
            "checks": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "required": ["ready", "checks"],
    }
    health = {"type": "object", "properties": {"status": {"const": "alive"}, "version": {"type": "string"}}}
    return {
        "/events": {
            "post": {
                "operationId": "postEvents",
                "summary": "Accept one event or a batch of up to 500, all or nothing",
                "requestBody": {"required": True, "content": {JSON: {"schema": ref("EventsRequest")}}},
                "responses": {
                    "202": answer("Taken, with the arrival of each", ref("EventResults")),
                    **problems(
                        ProblemType.MALFORMED_JSON,
                        ProblemType.MALFORMED_EVENTS,
                        ProblemType.EMPTY_BATCH,
                        ProblemType.BATCH_TOO_LARGE,
                        ProblemType.FOREIGN_ORIGIN,
                        ProblemType.INSUFFICIENT_SCOPE,
                        ProblemType.PAYLOAD_TOO_LARGE,
                        ProblemType.INTAKE_FULL,
                        ProblemType.DEPENDENCY_UNAVAILABLE,
                    ),
                },
            }
        },
        "/auctions": {
            "get": {
                "operationId": "listAuctions",
                "summary": "Auctions, next to close first, then paused ones, then closed ones with the latest first",
                "parameters": [
                    query("status", "only auctions in this status", {"enum": _STATUSES}),
                    query("ending_before", "only auctions that end before this instant", INSTANT | {"minimum": 1}),
                    query("limit", "auctions per page", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX}),
                    query("cursor", "`next_cursor` of the page before", {"type": "string"}),
                ],
                "responses": {
                    "200": answer("One page", page),
                    **problems(ProblemType.INVALID_PARAMETER, ProblemType.DEPENDENCY_UNAVAILABLE),
                },
            }
        },
        "/auctions/{auction_id}/timer": {
            "get": {
                "operationId": "getTimer",
                "summary": "The countdown of one auction",
                "parameters": [AUCTION_ID],
                "responses": {
                    "200": answer("The timer", timer_with_poll),
                    "304": answer(
                        "Unchanged since the version in `If-None-Match`; the header `Next-Poll-Ms` says when to ask again",
                        None,
                    ),
                    **problems(
                        ProblemType.RESOURCE_NOT_FOUND,
                        ProblemType.INTERNAL_ERROR,
                        ProblemType.DEPENDENCY_UNAVAILABLE,
                    ),
                },
            }
        },
        "/healthz": {
            "get": {
                "operationId": "health",
                "summary": "Whether the process is alive",
                "responses": {"200": answer("Alive", health)},
            }
        },
        "/readyz": {
            "get": {
                "operationId": "readiness",
                "summary": "Whether the gateway can do its job, and what is missing if not",
                "responses": {"200": answer("Ready", readiness), "503": answer("Not ready", readiness)},
            }
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Metrics in the Prometheus text format",
                "responses": {
                    "200": answer("Metrics", {"type": "string"}, "text/plain"),
                    **problems(ProblemType.INSUFFICIENT_SCOPE),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This description",
                "responses": {"200": answer("OpenAPI 3.1", {"type": "object"})},
            }
        },
        "/asyncapi.json": {
            "get": {
                "operationId": "asyncapi",
                "summary": "The description of the socket and of the event stream",
                "responses": {"200": answer("AsyncAPI 3.0", {"type": "object"})},
            }
        },
    }


def _guarded(paths: dict[str, Any]) -> dict[str, Any]:
    """The same paths: those that are always open say so, and all others may ask for a token."""
    asked = problems(ProblemType.UNAUTHENTICATED, ProblemType.DEPENDENCY_UNAVAILABLE)
    for path, operations in paths.items():
        for operation in operations.values():
            if path in OPEN_PATHS:
                operation["security"] = []
            else:
                operation["responses"] = asked | operation["responses"]
    return paths


_BEARER: Final = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "Claims `sub` and `exp`, and `scope` and `roles` where a route asks for them. A gateway without a secret "
    "and without keys is open, and asks for none.",
}


@cache
def document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "auction-timer",
            "version": version,
            "description": "Realtime auction timers. Every answer carries `X-Correlation-Id`, echoed or generated. "
            "The socket at `/auctions/{auction_id}/updates` is not HTTP: `/asyncapi.json` describes it.",
        },
        "paths": _guarded(_paths() | watch_paths() | command_paths()),
        "security": [{"bearer": []}, {}],
        "components": {
            "securitySchemes": {"bearer": _BEARER},
            "schemas": event_schemas()
            | command_schemas()
            | watch_schemas()
            | {"Timer": TIMER, "Problem": _PROBLEM, "EventResults": _RESULTS},
        },
    }
