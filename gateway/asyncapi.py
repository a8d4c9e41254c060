"""`/asyncapi.json`: every frame of the socket and of the event stream, every close code, every parameter (AsyncAPI 3.0).

A test validates the frames of a running system against it, and that no frame has a field that is not described.
"""

from functools import cache
from typing import Any, Final

from engine.contract import frames
from gateway.closing import meanings
from gateway.connection import (
    BAD_MESSAGES_MAX,
    CLIENT_FRAME_BYTES_MAX,
    MESSAGES_PER_SECOND_MAX,
    REPORTED_MS_MAX,
)
from gateway.event_stream import CLOSE
from gateway.hub import ANNOUNCE_AT_MS, HEARTBEAT_MS
from gateway.openapi import TIMER
from gateway.openapi_parts import DURATION, INSTANT, ref
from gateway.tokens import BEARER_SUBPROTOCOL, SUBPROTOCOL

SNAPSHOT: Final = "timer.snapshot"
TICK: Final = "timer.tick"
RESYNCED: Final = "timer.resynced"
SYNC: Final = "sync"
ERROR: Final = "error"

_TEXT: Final = {"type": "string"}
_NULLABLE_TEXT: Final = {"type": ["string", "null"]}
_NULLABLE_INSTANT: Final = INSTANT | {"type": ["integer", "null"]}
_REPORTED: Final = {"type": ["number", "null"], "minimum": -REPORTED_MS_MAX, "maximum": REPORTED_MS_MAX}
_CURSOR: Final = _TEXT | {"description": "where this frame stands in the event lane; hand the last one back as `since`"}
_TIMER: Final = ref("Timer")

_HEAD: Final[dict[str, Any]] = {
    "auction_id": _TEXT,
    "server_time": INSTANT | {"description": "when this was made, by the auction clock"},
    "trace_id": _TEXT,
}
_COMMITTED: Final[dict[str, Any]] = {
    "correlation_id": _TEXT,
    "occurred_at": INSTANT | {"description": "as of when it counts: the arrival of a bid, the deadline of a close"},
    "committed_at": INSTANT | {"description": "when it was decided and written"},
}
_TICKED: Final = (
    "status", "version", "ends_at", "remaining_ms", "soft_close_until", "final_deadline", "extension_count",
    "extension_used_ms", "extension_left_ms", "at_cap",
)  # fmt: skip


def _frame(kind: str, fields: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}} | fields | optional,
        "required": ["type", *fields],
    }


def _event(kind: str, optional: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A frame of the event lane. One that a gateway makes itself, after a failover, has not been committed."""
    return _frame(kind, _HEAD | {"cursor": _CURSOR} | fields, _COMMITTED | (optional or {}))


def frame_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every frame that a client may be sent over a socket, by its type."""
    clipped_by = {"enum": [*TIMER["properties"]["clipped_by"]["enum"], None]}
    bid = {"bid_id": _TEXT, "amount_minor": {"type": ["integer", "null"]}} | {
        "currency": _NULLABLE_TEXT,
        "bidder_id": _NULLABLE_TEXT,
        "extended": {"type": "boolean", "description": "whether `timer.extended` follows"},
    }
    moved = {"previous_ends_at": INSTANT, "reason": _NULLABLE_TEXT}
    schemas = [
        _event(
            SNAPSHOT,
            timer=_TIMER,
            recovered={
                "type": ["boolean", "null"],
                "description": "whether what was missed follows; null without `since`, false with an empty one",
            },
            heartbeat_ms=DURATION | {"const": HEARTBEAT_MS},
            announce_at_ms={"type": "array", "items": DURATION, "default": list(ANNOUNCE_AT_MS)},
        ),
        _frame(
            TICK,
            _HEAD | {name: TIMER["properties"][name] for name in _TICKED},
            {"stale": {"const": True, "description": "from memory: Redis is away, or no engine is heard"}},
        ),
        _event(frames.TIMER_STARTED, timer=_TIMER),
        _event(frames.TIMER_CLOSING, timer=_TIMER),
        _event(
            frames.TIMER_EXTENDED,
            {"reason": {"const": "outage", "description": "nobody could bid for a while: no bid moved the end"}},
            timer=_TIMER,
            previous_ends_at=INSTANT,
            bid_id=_NULLABLE_TEXT,
            clipped_by=clipped_by,
        ),
        _event(frames.TIMER_RESCHEDULED, timer=_TIMER, **moved),
        _event(frames.TIMER_PAUSED, timer=_TIMER, reason=_NULLABLE_TEXT),
        _event(frames.TIMER_RESUMED, timer=_TIMER, **moved),
        _event(frames.TIMER_ENDED, timer=_TIMER),
        _event(frames.TIMER_CANCELLED, timer=_TIMER, reason=_NULLABLE_TEXT),
        _event(frames.BID_ACCEPTED, {"clipped_by": clipped_by}, **bid),
        _event(RESYNCED, {"previous_ends_at": _NULLABLE_INSTANT}, timer=_TIMER, cause=_TEXT),
        _frame(SYNC, _HEAD | {"t0": {"type": "number"}, "t1": INSTANT, "t2": INSTANT}, {}),
        _frame(ERROR, _HEAD | {"error_code": _TEXT, "detail": _TEXT}, {}),
    ]
    return {schema["properties"]["type"]["const"]: schema for schema in schemas}


_SUMMARIES: Final = {
    SNAPSHOT: "The first frame, always",
    TICK: "The countdown: at least every 15 s, every 5 s in the last 10 min, every second in the last minute",
    frames.TIMER_STARTED: "The auction has started",
    frames.TIMER_CLOSING: "The soft-close window is open: bids extend",
    frames.TIMER_EXTENDED: "A bid moved the end",
    frames.TIMER_RESCHEDULED: "An operator moved the end",
    frames.TIMER_PAUSED: "The remaining time is frozen",
    frames.TIMER_RESUMED: "The remaining time runs again",
    frames.TIMER_ENDED: "Over. The socket is closed with 4000",
    frames.TIMER_CANCELLED: "Over, without a result. The socket is closed with 4000",
    frames.BID_ACCEPTED: "A bid was accepted",
    RESYNCED: "The server's own view was rebuilt: forget what you know, and begin from this",
    SYNC: "The answer to the client's `sync`",
    ERROR: f"A client message was wrong; the {BAD_MESSAGES_MAX}rd closes the socket with 4400",
}

_CLIENT_SYNC: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "type": {"const": SYNC},
        "t0": {"type": "number", "description": "the client's clock when it sends, in ms"},
        "drift_ms": _REPORTED
        | {"description": "how far its countdown was ahead when it last measured; null: not known"},
        "rtt_ms": _REPORTED | {"minimum": 0, "description": "the round trip of that measurement"},
    },
    "required": ["type", "t0"],
}
_CLOSE: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"type": {"const": CLOSE}, "code": {"enum": [code.value for code in meanings()]}, "reason": _TEXT},
    "required": ["type", "code", "reason"],
}

_SINCE: Final = {
    "type": "string",
    "description": "the cursor of the last frame that was read: what came after it is sent, or the snapshot says it is not",
}
_TOKEN: Final = {
    "type": "string",
    "description": "a token, only where neither the header nor the subprotocol can be set",
}
_QUERY: Final = {"type": "object", "properties": {"since": _SINCE, "token": _TOKEN}}
_PARAMETERS: Final = {"auction_id": {"description": "1-128 of `A-Z a-z 0-9 . _ : -`"}}


def _message(kind: str, schema: str, summary: str) -> dict[str, Any]:
    return {"name": kind, "title": kind, "summary": summary, "payload": ref(schema)}


def _channel(name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/{name}"}


def _of_channel(channel: str, *messages: str) -> list[dict[str, str]]:
    return [{"$ref": f"#/channels/{channel}/messages/{message}"} for message in messages]


def _components(names: list[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/messages/{name}"} for name in names}


CLIENT_SYNC: Final = "client.sync"
_STREAM_CLOSE: Final = "stream.close"


@cache
def document(version: str) -> dict[str, Any]:
    """The AsyncAPI 3.0 document. `send` and `receive` are seen from the gateway."""
    schemas = frame_schemas()
    told = list(schemas)
    streamed = [kind for kind in told if kind not in (SYNC, ERROR)]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "auction-timer",
            "version": version,
            "description": "Realtime auction timers. Times are ms since the Unix epoch, durations ms, both integers. Ignore "
            "fields and types that are not described here: more may come.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "gateway": {
                "host": "{host}",
                "protocol": "ws",
                "description": "Every gateway; `wss` behind a proxy that ends TLS",
                "variables": {"host": {"default": "127.0.0.1:8080"}},
                "security": [{"$ref": "#/components/securitySchemes/bearer"}],
            }
        },
        "channels": {
            "updates": {
                "address": "/auctions/{auction_id}/updates",
                "title": "Socket",
                "summary": "One auction over a WebSocket, one JSON text per frame",
                "description": f"Subprotocols: `{SUBPROTOCOL}`, and `{BEARER_SUBPROTOCOL}<JWT>` to bring a token. A client "
                f"sends `sync` only, at most {CLIENT_FRAME_BYTES_MAX} bytes, {MESSAGES_PER_SECOND_MAX} a second and as many "
                "at once. A handshake is refused with a problem document: 401, 403, 404, 503.",
                "parameters": _PARAMETERS,
                "messages": _components([*told, CLIENT_SYNC]),
                "bindings": {"ws": {"method": "GET", "query": _QUERY, "bindingVersion": "0.1.0"}},
                "x-subprotocols": [SUBPROTOCOL, f"{BEARER_SUBPROTOCOL}<JWT>"],
                "x-close-codes": [{"code": code.value, "meaning": said} for code, said in meanings().items()],
            },
            "events": {
                "address": "/auctions/{auction_id}/events",
                "title": "Event stream",
                "summary": "The same frames as Server-Sent Events",
                "description": "`event` is the frame's type, `id` its cursor, `data` the frame. The header `Last-Event-ID` "
                "goes before `since`. 204: the auction is over and its end was read, do not come back.",
                "parameters": _PARAMETERS,
                "messages": _components([*streamed, _STREAM_CLOSE]),
                "x-protocol": "text/event-stream",
            },
        },
        "operations": {
            "sendFrames": {
                "action": "send",
                "channel": _channel("updates"),
                "summary": "What a client is told",
                "messages": _of_channel("updates", *(kind for kind in told if kind not in (SYNC, ERROR))),
            },
            "receiveSync": {
                "action": "receive",
                "channel": _channel("updates"),
                "summary": "Clock sync",
                "messages": _of_channel("updates", CLIENT_SYNC),
                "reply": {"channel": _channel("updates"), "messages": _of_channel("updates", SYNC, ERROR)},
            },
            "streamFrames": {
                "action": "send",
                "channel": _channel("events"),
                "summary": "What a stream is told",
                "messages": _of_channel("events", *streamed, _STREAM_CLOSE),
                "bindings": {"http": {"method": "GET", "query": _QUERY, "bindingVersion": "0.3.0"}},
            },
        },
        "components": {
            "messages": {kind: _message(kind, kind, _SUMMARIES[kind]) for kind in told}
            | {
                CLIENT_SYNC: _message(SYNC, CLIENT_SYNC, "The only message of a client"),
                _STREAM_CLOSE: _message(CLOSE, _STREAM_CLOSE, "The last event, in place of a close frame"),
            },
            "schemas": schemas | {"Timer": TIMER, CLIENT_SYNC: _CLIENT_SYNC, _STREAM_CLOSE: _CLOSE},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
            },
        },
    }
