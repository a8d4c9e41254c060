"""What the gateway measures, and how one scrape sees every process of the machine."""

import os

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector  # type: ignore[attr-defined,unused-ignore]

from engine.contract import metrics as catalogue
from engine.metrics import ClockVerdicts, Metrics

TICK_LANE = "tick"
EVENT_LANE = "event"


class GatewayMetrics:
    """The gateway's metrics, with the label children looked up once where there are few."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._made = Metrics(catalogue.GATEWAY, registry)
        made = self._made
        self.connections = made.gauge(catalogue.CONNECTIONS)
        self.conflated_ticks = made.counter(catalogue.CONFLATED)
        self.delivery_ms = {lane: made.histogram(catalogue.DELIVERY, lane) for lane in (TICK_LANE, EVENT_LANE)}
        self.resumes = {
            recovered: made.counter(catalogue.RESUMES, str(recovered).lower()) for recovered in (True, False)
        }
        self.clock = ClockVerdicts(made, "gateway")
        self.drift_ms = {source: made.histogram(catalogue.DRIFT, source) for source in ("gateway", "client")}

    def handshake(self, outcome: str) -> None:
        """Count a socket handshake."""
        self._made.counter(catalogue.HANDSHAKES, outcome).inc()

    def resync(self, outcome: str) -> None:
        """Count a drift that a client reported."""
        self._made.counter(catalogue.RESYNCS, outcome).inc()

    def disconnect(self, code: int) -> None:
        """Count a socket that the gateway closed."""
        self._made.counter(catalogue.DISCONNECTS, str(code)).inc()


def exposition(registry: CollectorRegistry) -> bytes:
    """The metrics as Prometheus scrapes them.

    Under `serve` the processes share a directory of counters (`PROMETHEUS_MULTIPROC_DIR`), so whichever gateway answers,
    the answer holds the engine's and every gateway's figures.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
