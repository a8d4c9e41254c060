"""What the reconciler measures."""

from prometheus_client import CollectorRegistry

from engine.contract import metrics as catalogue
from engine.metrics import ClockVerdicts, Metrics
from reconciler.drift import DriftKind


class ReconcilerMetrics:
    """The metrics of one reconciler."""

    def __init__(self, registry: CollectorRegistry) -> None:
        made = Metrics(catalogue.RECONCILER, registry)
        self.archive_lag = made.gauge(catalogue.ARCHIVE_LAG)
        self.archive_refused = made.gauge(catalogue.ARCHIVE_REFUSED)
        self.webhook_lag = made.gauge(catalogue.WEBHOOK_LAG)
        self.pass_ms = made.histogram(catalogue.PASS_MS)
        self.clock = ClockVerdicts(made, "reconciler")
        self.clock_corrections = made.counter(catalogue.CORRECTIONS, "clock")
        self.drift_ms = made.histogram(catalogue.DRIFT, "reconciler")
        self.corrections = {kind: made.counter(catalogue.CORRECTIONS, kind.value) for kind in DriftKind}
        self.webhook_deliveries = {
            outcome: made.counter(catalogue.WEBHOOK_DELIVERIES, outcome)
            for outcome in ("delivered", "retried", "undelivered", "lost")
        }
