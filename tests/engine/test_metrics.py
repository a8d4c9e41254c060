"""Tests for engine.metrics: what an engine exposes is the catalogue, no more and no less."""

from typing import Final

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from engine.contract import metrics as catalogue
from engine.contract.metrics import CATALOGUE, Kind
from engine.domain.policy import Cap
from engine.metrics import EngineMetrics, Metrics

PUBLISHED: Final = {
    "auctions_timer_tick_delay_ms": (),
    "auctions_timer_close_lateness_ms": (),
    "auctions_timer_early_closes_total": (),
    "auctions_timer_drift_ms": ("source",),
    "auctions_timer_active": (),
    "auctions_timer_extensions_total": ("clipped_by",),
    "auctions_timer_trigger_lag_ms": (),
    "auctions_intake_lag_events": (),
    "auctions_commit_conflicts_total": (),
    "auctions_troubleshooting_depth": (),
}
"""What the outside contract (section 7) promises of the engine, with its labels."""


def exposed(registry: CollectorRegistry) -> dict[str, str]:
    """The names in a scrape, each with its type."""
    lines = generate_latest(registry).decode().splitlines()
    types = [line.split() for line in lines if line.startswith("# TYPE") and not line.split()[2].endswith("_created")]
    return {name: kind for _, _, name, kind in types}


@pytest.mark.requirement("R13")
def test_an_engine_exposes_its_catalogue() -> None:
    """Every entry under its very name and kind, and nothing that is not in it."""
    registry = CollectorRegistry()
    EngineMetrics(registry)
    assert exposed(registry) == {metric.name: metric.kind.value for metric in catalogue.ENGINE}


@pytest.mark.requirement("R13")
def test_what_the_contract_promises_is_there() -> None:
    """With the labels that alerts and dashboards use."""
    by_name = {metric.name: metric for metric in catalogue.ENGINE}
    assert {name: by_name[name].labels for name in PUBLISHED} == PUBLISHED


def test_the_whole_catalogue_can_be_made() -> None:
    """For every role at once, without a clash of names; each is found by its kind."""
    registry = CollectorRegistry()
    made = Metrics(CATALOGUE, registry)
    for metric in CATALOGUE:
        labels = ["x"] * len(metric.labels)
        if metric.kind is Kind.COUNTER:
            made.counter(metric, *labels).inc()
        elif metric.kind is Kind.HISTOGRAM:
            made.histogram(metric, *labels).observe(1)
        else:
            made.gauge(metric).set(1)
    assert set(exposed(registry)) == {metric.name for metric in CATALOGUE}


def test_a_metric_of_another_kind_is_a_fault() -> None:
    """Asking for a gauge as a counter is a mistake of the program, and is found at its start."""
    made = Metrics(CATALOGUE, CollectorRegistry())
    with pytest.raises(AssertionError):
        made.counter(catalogue.ACTIVE)
    with pytest.raises(AssertionError):
        made.gauge(catalogue.EARLY_CLOSES)
    with pytest.raises(AssertionError):
        made.histogram(catalogue.ACTIVE)


def test_every_label_is_there_from_the_start() -> None:
    """A counter that was never incremented reads 0, so that an alert on its rate works from the first event."""
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    assert set(metrics.extensions) == {None, *(cap.value for cap in Cap)}
    for cap in ("none", *Cap):
        assert registry.get_sample_value("auctions_timer_extensions_total", {"clipped_by": str(cap)}) == 0
    for outcome in ("applied", "unchanged", "late", "refused", "poison"):
        assert registry.get_sample_value("auctions_intake_applied_total", {"outcome": outcome}) == 0
    assert registry.get_sample_value("auctions_timer_drift_ms_count", {"source": "engine"}) == 0
    assert registry.get_sample_value("auctions_timer_early_closes_total") == 0


@pytest.mark.requirement("R23")
def test_the_success_rate_is_that_of_first_requests() -> None:
    """Asking again for what was done is counted, and is no failure: a double click does not raise an alert."""
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    for outcome in ("completed", *["ALREADY_CANCELLED"] * 99, "completed", "completed", "WINDOW_EXPIRED"):
        metrics.offer_cancellation(outcome)
    assert registry.get_sample_value("offers_cancellation_success_rate") == 0.75
    assert registry.get_sample_value("offers_cancellation_total", {"outcome": "already_cancelled"}) == 99
