"""The part of `/openapi.json` about commands: cancel, pause, resume, audit, offers, troubleshooting."""

from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from engine.contract.keys import SHARDS_MAX
from gateway.command_routes import CancelBody, PauseBody
from gateway.offer_routes import CancelOfferBody
from gateway.openapi_parts import AUCTION_ID, DURATION, INSTANT, answer, body, path, problems, query, ref
from gateway.ops_routes import DiscardBody, RequeueBody, RetryBody
from gateway.problems import ProblemType
from gateway.queries import LIMIT_MAX

_BODIES: Final[tuple[type[BaseModel], ...]] = (
    CancelBody, PauseBody, CancelOfferBody, RetryBody, DiscardBody, RequeueBody,
)  # fmt: skip
_READ_PROBLEMS: Final = (ProblemType.RESOURCE_NOT_FOUND, ProblemType.DEPENDENCY_UNAVAILABLE, ProblemType.INTERNAL_ERROR)
_COMMAND_PROBLEMS: Final = (
    ProblemType.MALFORMED_JSON,
    ProblemType.FOREIGN_ORIGIN,
    ProblemType.RESOURCE_NOT_FOUND,
    ProblemType.IN_TROUBLESHOOTING,
    ProblemType.PAYLOAD_TOO_LARGE,
    ProblemType.INVALID_BODY,
    ProblemType.INTERNAL_ERROR,
    ProblemType.INTAKE_FULL,
    ProblemType.TOO_MANY_COMMANDS,
    ProblemType.DEPENDENCY_UNAVAILABLE,
)
_FSM_PROBLEMS: Final = (ProblemType.FSM_TRANSITION_INVALID, ProblemType.FSM_TERMINAL_IMMUTABLE)
_NULLABLE_TEXT: Final = {"type": ["string", "null"]}
_NULLABLE_INTEGER: Final = {"type": ["integer", "null"]}

_RECORD: Final[dict[str, Any]] = {
    "type": "object",
    "description": "One audit record. Its hash is SHA-256 over the canonical JSON of its other fields but `shard`, as "
    "strings: sorted keys, no spaces; numbers in decimal digits, `details` as compact JSON, null as an empty string.",
    "properties": {
        "shard": {"type": "integer"},
        "seq": {"type": "integer", "minimum": 1},
        "event_type": {"type": "string"},
        "auction_id": _NULLABLE_TEXT,
        "actor_type": _NULLABLE_TEXT,
        "actor_id": _NULLABLE_TEXT,
        "prev_status": _NULLABLE_TEXT,
        "new_status": _NULLABLE_TEXT,
        "version": _NULLABLE_INTEGER,
        "occurred_at": INSTANT,
        "recorded_at": INSTANT,
        "correlation_id": _NULLABLE_TEXT,
        "trace_id": _NULLABLE_TEXT,
        "event_id": _NULLABLE_TEXT,
        "intake_id": _NULLABLE_TEXT,
        "details": {"type": "object"},
        "prev_hash": {"type": "string"},
        "hash": {"type": "string"},
    },
    "required": [
        "shard",
        "seq",
        "event_type",
        "auction_id",
        "prev_status",
        "new_status",
        "occurred_at",
        "recorded_at",
        "details",
        "prev_hash",
        "hash",
    ],
}

_COMMAND: Final[dict[str, Any]] = {
    "type": "object",
    "description": "A command that could not be applied",
    "properties": {
        "command_id": {
            "type": "string",
            "description": "the id of its event; where another command of that id waits already, its place in the intake",
        },
        "event_id": _NULLABLE_TEXT,
        "event_type": _NULLABLE_TEXT,
        "status": {"enum": ["IN_TROUBLESHOOTING_QUEUE", "RETRIED", "CANCELED"]},
        "error_code": _NULLABLE_TEXT,
        "error": _NULLABLE_TEXT,
        "attempts": {"type": "integer", "minimum": 0, "maximum": SHARDS_MAX - 1},
        "first_seen_at": INSTANT,
        "payload": {},
        "reply_to": _NULLABLE_TEXT,
        "asked_by": {"type": ["string", "null"], "description": "the subject of the token it came with"},
        "shard": {"type": "integer"},
        "reason": {"type": "string"},
        "operator": {"type": "string"},
        "canceled_at": INSTANT,
    },
    "required": ["command_id"],
}

_OUTCOME: Final[dict[str, Any]] = {
    "type": "object",
    "description": "What became of a command: `PENDING` while it waits for an engine; `PROCESSED` where one has been there "
    "and what it decided is not kept (bids and starts). Of several events of one id in different shards one is told.",
    "properties": {
        "command_id": {"type": "string"},
        "outcome": {
            "enum": [
                "PENDING",
                "PROCESSED",
                "APPLIED",
                "UNCHANGED",
                "LATE",
                "REFUSED",
                "IN_TROUBLESHOOTING_QUEUE",
                "CANCELED",
            ]
        },
        "event_type": _NULLABLE_TEXT,
        "auction_id": _NULLABLE_TEXT,
        "offer_id": {"type": "string", "description": "of a cancellation that waits for the start of its offer"},
        "correlation_id": _NULLABLE_TEXT,
        "operator": {"type": "string", "description": "who cancelled it in troubleshooting"},
        "operator_correlation_id": {"type": "string", "description": "of the request by which that was done"},
        "arrival_ms": INSTANT,
        "asked_by": {"type": ["string", "null"], "description": "the subject of the token it came with"},
        "error_code": _NULLABLE_TEXT,
        "error": _NULLABLE_TEXT,
        "current_status": _NULLABLE_TEXT,
        "attempted_status": _NULLABLE_TEXT,
        "support_reference": {"type": "string"},
        "fact": {"type": "string", "description": "what happened, as the audit names it"},
        "audit": ref("AuditRecord"),
        "timer": ref("Timer"),
        "command": ref("TroubleshootingCommand"),
    },
    "required": ["command_id", "outcome"],
}

_PREFLIGHT: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "offer_id": {"type": "string"},
        "auction_id": {"type": "string"},
        "status": {"type": "string"},
        "cancellable": {"type": "boolean"},
        "error_code": {"type": ["string", "null"], "description": "why not; null if it is cancellable"},
        "remaining_window_ms": DURATION | {"minimum": 0, "description": "ms; 0 once the auction is over"},
        "window_ends_at": INSTANT,
        "reasons": {"type": "array", "items": {"type": "string"}},
        "note_max_chars": {"type": "integer"},
        "server_time": INSTANT,
    },
    "required": [
        "offer_id",
        "auction_id",
        "cancellable",
        "error_code",
        "remaining_window_ms",
        "reasons",
        "note_max_chars",
    ],
}

_OFFER_CANCELLED: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "offer": {
            "type": "object",
            "properties": {
                "offer_id": {"type": "string"},
                "auction_id": {"type": "string"},
                "status": {"const": "CANCELLED"},
                "cancelled_at": INSTANT,
                "reason_code": {"type": "string"},
                "note": _NULLABLE_TEXT,
                "amount_minor": _NULLABLE_INTEGER,
                "currency": _NULLABLE_TEXT,
            },
            "required": ["offer_id", "auction_id", "status", "cancelled_at", "reason_code"],
        },
        "timer": ref("Timer"),
        "audit": ref("AuditRecord"),
    },
    "required": ["offer", "timer", "audit"],
}


def command_schemas() -> dict[str, Any]:
    """JSON schemas by name: the bodies, and what the answers carry."""
    _, top = models_json_schema(
        [(model, "validation") for model in _BODIES], ref_template="#/components/schemas/{model}"
    )
    return dict(top["$defs"]) | {
        "AuditRecord": _RECORD,
        "TroubleshootingCommand": _COMMAND,
        "CommandOutcome": _OUTCOME,
        "OfferCancellation": _PREFLIGHT,
        "CancelledOffer": _OFFER_CANCELLED,
    }


def _page(name: str, schema: str, **further: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "array", "items": ref(schema)}, "next_cursor": _NULLABLE_TEXT} | further,
        "required": [name, "next_cursor", *further],
    }


_PENDING: Final = {
    "202": answer("In the intake; no engine has answered within 2 s: ask `Location`", ref("CommandOutcome"))
}


def _auction_command(
    operation: str, summary: str, schema: str, *further: ProblemType, required: bool
) -> dict[str, Any]:
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "parameters": [AUCTION_ID],
            "requestBody": body(ref(schema), required=required),
            "responses": {
                "200": answer("Done: the timer as it now stands", ref("Timer")),
                **_PENDING,
                **problems(*_COMMAND_PROBLEMS, *_FSM_PROBLEMS, *further),
            },
        }
    }


def _operation(operation: str, summary: str, schema: str, *, required: bool) -> dict[str, Any]:
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "parameters": [
                path("command_id"),
                query(
                    "shard",
                    "which of several commands of this id, as the list says",
                    {"type": "integer", "minimum": 0, "maximum": SHARDS_MAX - 1},
                ),
            ],
            "requestBody": body(ref(schema), required=required),
            "responses": {
                "200": answer("Done: the command as it left troubleshooting", ref("TroubleshootingCommand")),
                **_PENDING,
                **problems(
                    *_COMMAND_PROBLEMS,
                    ProblemType.INVALID_PARAMETER,
                    ProblemType.INVALID_OPERATION,
                    ProblemType.INSUFFICIENT_SCOPE,
                ),
            },
        }
    }


def command_paths() -> dict[str, Any]:
    """The routes, by path."""
    limit = query("limit", "entries per page", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX})
    cursor = query("cursor", "`next_cursor` of the page before", {"type": "string"})
    seq = query("cursor", "`next_cursor` of the page before", {"type": "string", "pattern": "^[0-9]{1,15}$"})
    return {
        "/auctions/{auction_id}/cancel": _auction_command(
            "cancelAuction", "Cancel an auction", "CancelBody", required=True
        ),
        "/auctions/{auction_id}/pause": _auction_command(
            "pauseAuction",
            "Freeze the remaining time; scope `ops`",
            "PauseBody",
            ProblemType.INSUFFICIENT_SCOPE,
            required=False,
        ),
        "/auctions/{auction_id}/resume": _auction_command(
            "resumeAuction",
            "Go on with the remaining time; scope `ops`",
            "PauseBody",
            ProblemType.INSUFFICIENT_SCOPE,
            required=False,
        ),
        "/auctions/{auction_id}/audit": {
            "get": {
                "operationId": "getAudit",
                "summary": "What happened to an auction, in order; for its owner, or scope `ops`",
                "parameters": [AUCTION_ID, limit, seq],
                "responses": {
                    "200": answer("One page", _page("records", "AuditRecord")),
                    **problems(*_READ_PROBLEMS, ProblemType.INVALID_PARAMETER),
                },
            }
        },
        "/commands/{command_id}": {
            "get": {
                "operationId": "getCommand",
                "summary": "What became of a command, by the id that a 202 answer or an event gave it",
                "parameters": [path("command_id")],
                "responses": {
                    "200": answer("Its outcome", ref("CommandOutcome")),
                    **problems(*_READ_PROBLEMS),
                },
            }
        },
        "/offers/{offer_id}/cancellation": {
            "get": {
                "operationId": "preflightOfferCancellation",
                "summary": "Whether an offer can be cancelled now, for how long still, and with which reasons",
                "parameters": [path("offer_id")],
                "responses": {
                    "200": answer("The preflight", ref("OfferCancellation")),
                    **problems(*_READ_PROBLEMS),
                },
            }
        },
        "/offers/{offer_id}/cancel": {
            "put": {
                "operationId": "cancelOffer",
                "summary": "Cancel an offer within its window, and with it its auction",
                "parameters": [path("offer_id")],
                "requestBody": body(ref("CancelOfferBody")),
                "responses": {
                    "200": answer("Cancelled", ref("CancelledOffer")),
                    **_PENDING,
                    **problems(
                        *_COMMAND_PROBLEMS,
                        ProblemType.NOT_AUTHORIZED,
                        ProblemType.WINDOW_EXPIRED,
                        ProblemType.ALREADY_CANCELLED,
                        ProblemType.AUCTION_CLOSED,
                    ),
                },
            }
        },
        "/ops/troubleshooting": {
            "get": {
                "operationId": "listTroubleshooting",
                "summary": "Commands that could not be applied, the longest waiting first; scope `ops`",
                "parameters": [
                    query("error_code", "only commands with this error", {"type": "string"}),
                    query("event_type", "only commands of this type", {"type": "string"}),
                    limit,
                    cursor,
                ],
                "responses": {
                    "200": answer("One page", _page("commands", "TroubleshootingCommand", depth={"type": "integer"})),
                    **problems(
                        ProblemType.INVALID_PARAMETER,
                        ProblemType.INSUFFICIENT_SCOPE,
                        ProblemType.DEPENDENCY_UNAVAILABLE,
                    ),
                },
            }
        },
        "/ops/troubleshooting/requeue": {
            "post": {
                "operationId": "requeue",
                "summary": "Send many commands round again, the longest waiting first; scope `ops`",
                "requestBody": body(ref("RequeueBody"), required=False),
                "responses": {
                    "200": answer(
                        "How many",
                        {
                            "type": "object",
                            "properties": {
                                "requeued": {"type": "integer"},
                                "refused": {"type": "integer"},
                                "pending": {"type": "integer"},
                            },
                            "required": ["requeued", "refused", "pending"],
                        },
                    ),
                    **problems(*_COMMAND_PROBLEMS, ProblemType.INSUFFICIENT_SCOPE),
                },
            }
        },
        "/ops/troubleshooting/{command_id}/retry": _operation(
            "retryCommand", "Send a command round again; scope `ops`", "RetryBody", required=False
        ),
        "/ops/troubleshooting/{command_id}/cancel": _operation(
            "cancelCommand", "Cancel a command for good; scope `ops`", "DiscardBody", required=True
        ),
    }
