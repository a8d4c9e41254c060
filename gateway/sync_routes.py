"""`POST /timers/sync`: clock sync for whoever has no socket, and a countdown to go on with (requirement R8).

The exchange of NTP (RFC 5905, section 8), as in the socket's `sync` frames: the client sends `t0` by its own clock, the
answer brings it back with `t1` (received) and `t2` (sent) by the auction clock; with `t3`, the client's clock at the answer:

    offset = ((t1 - t0) + (t2 - t3)) / 2        round trip = (t3 - t0) - (t2 - t1)
"""

from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import principal_of
from gateway.bodies import read_body
from gateway.command_routes import json_response, room_of
from gateway.connection import REPORTED_MS_MAX
from gateway.events import AuctionId, Identifier, trace_id_of
from gateway.hub import Hub
from gateway.metrics import GatewayMetrics
from gateway.resyncs import Resyncs

EXACT_MAX: Final = 2**53
"""Beyond, a double does not tell one millisecond from the next."""

Drift = Annotated[float, Field(ge=-REPORTED_MS_MAX, le=REPORTED_MS_MAX, allow_inf_nan=False)]
RoundTrip = Annotated[float, Field(ge=0, le=REPORTED_MS_MAX, allow_inf_nan=False)]


class SyncBody(BaseModel):
    """`{auction_id, t0, drift_ms, rtt_ms?, trace_id?}`. A client that does not know its drift yet says `null`."""

    model_config = ConfigDict(strict=True, extra="ignore")
    auction_id: AuctionId
    t0: Annotated[float, Field(ge=-EXACT_MAX, le=EXACT_MAX, allow_inf_nan=False)]
    drift_ms: Drift | None
    rtt_ms: RoundTrip | None = None
    trace_id: Identifier | None = None


@dataclass(frozen=True, slots=True)
class SyncRoutes:
    """The route and what it asks."""

    hub: Hub
    resyncs: Resyncs
    metrics: GatewayMetrics

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/timers/sync", self.sync, methods=["POST"])]

    async def sync(self, request: Request) -> Response:
        """Answer with the time of receipt and of sending, and the timer as of now; take note of the drift."""
        received_at = self.hub.clock.now_ms()
        body = await read_body(request, SyncBody)
        room = await room_of(self.hub, body.auction_id)
        if body.drift_ms is not None:
            self.metrics.drift_ms["client"].observe(abs(body.drift_ms))
            self.resyncs.report(
                room,
                body.drift_ms,
                body.rtt_ms,
                principal_of(request),
                trace_id=body.trace_id or trace_id_of(request.headers.get("traceparent")),
                correlation_id=request.state.correlation_id,
            )
        t0 = int(body.t0) if body.t0.is_integer() else body.t0
        timer = self.hub.timer(room)
        return json_response(
            {"t0": t0, "t1": received_at, "t2": self.hub.clock.now_ms(), "timer": timer},
            headers={"Cache-Control": "no-store"},
        )
