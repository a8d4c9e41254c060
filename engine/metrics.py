"""Prometheus objects for the catalogue in `engine.contract.metrics`."""

from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.contract import metrics as catalogue
from engine.contract.clock_vote import Verdict
from engine.contract.metrics import Kind, Metric


class Metrics:
    """The metrics of one process, made from the catalogue, so that an undocumented one cannot exist."""

    def __init__(self, metrics: Iterable[Metric], registry: CollectorRegistry) -> None:
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        for metric in metrics:
            if metric.kind is Kind.COUNTER:
                made: Counter | Gauge | Histogram = Counter(
                    metric.name.removesuffix("_total"), metric.meaning, metric.labels, registry=registry
                )
            elif metric.kind is Kind.GAUGE:
                made = Gauge(metric.name, metric.meaning, metric.labels, registry=registry, multiprocess_mode="livesum")
            else:
                made = Histogram(metric.name, metric.meaning, metric.labels, registry=registry, buckets=metric.buckets)
            self._made[metric.name] = made

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """The counter of a catalogue entry."""
        made = self._made[metric.name]
        assert isinstance(made, Counter)
        return made.labels(*labels) if labels else made

    def gauge(self, metric: Metric) -> Gauge:
        """The gauge of a catalogue entry."""
        made = self._made[metric.name]
        assert isinstance(made, Gauge)
        return made

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """The histogram of a catalogue entry."""
        made = self._made[metric.name]
        assert isinstance(made, Histogram)
        return made.labels(*labels) if labels else made


class ClockVerdicts:
    """Counts what the witnesses of one role's clock say."""

    def __init__(self, made: Metrics, source: str) -> None:
        self._counters = {verdict: made.counter(catalogue.CLOCK_VERDICTS, source, verdict.value) for verdict in Verdict}

    def count(self, verdict: Verdict) -> None:
        """One look said so."""
        self._counters[verdict].inc()


OFFER_OUTCOMES_KEPT = 1_000
"""Cancellations that the success rate looks back on."""


class EngineMetrics:
    """What the engine measures, with the label children looked up once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        made = Metrics(catalogue.ENGINE, registry)
        self.tick_delay_ms = made.histogram(catalogue.TICK_DELAY)
        self.close_lateness_ms = made.histogram(catalogue.CLOSE_LATENESS)
        self.early_closes = made.counter(catalogue.EARLY_CLOSES)
        self.drift_ms = made.histogram(catalogue.DRIFT, "engine")
        self.clock = ClockVerdicts(made, "engine")
        self.active = made.gauge(catalogue.ACTIVE)
        self.trigger_lag_ms = made.histogram(catalogue.TRIGGER_LAG)
        self.intake_lag = made.gauge(catalogue.INTAKE_LAG)
        self.commit_conflicts = made.counter(catalogue.COMMIT_CONFLICTS)
        self.held = made.counter(catalogue.HELD)
        self.store_retries = made.counter(catalogue.STORE_RETRIES)
        self.parked = made.gauge(catalogue.PARKED)
        self.extensions = {
            cap: made.counter(catalogue.EXTENSIONS, cap or "none") for cap in (None, "count", "increment", "total")
        }
        self._offer_success = made.gauge(catalogue.OFFER_CANCELLATION_SUCCESS)
        self._offer_success.set(1)
        self._offer_outcomes: deque[bool] = deque(maxlen=OFFER_OUTCOMES_KEPT)
        self._offer_cancellations = {
            outcome: made.counter(catalogue.OFFER_CANCELLATIONS, outcome)
            for outcome in ("completed", "window_expired", "already_cancelled", "auction_closed", "unknown_auction")
        }
        self.applied = {
            outcome: made.counter(catalogue.APPLIED, outcome)
            for outcome in ("applied", "unchanged", "late", "refused", "poison")
        }

    def offer_cancellation(self, outcome: str) -> None:
        """Count a request to cancel an offer: `completed`, or the code of its refusal."""
        self._offer_cancellations[outcome.lower()].inc()
        if outcome == "ALREADY_CANCELLED":
            return  # asked again for what was done: neither a success nor a failure
        self._offer_outcomes.append(outcome == "completed")
        self._offer_success.set(sum(self._offer_outcomes) / len(self._offer_outcomes))
