"""Tests for engine.contract.metrics."""

import pytest

from engine.contract.metrics import CATALOGUE, ENGINE, GATEWAY, RECONCILER, Kind, Metric

NAMED = [pytest.param(metric, id=metric.name) for metric in CATALOGUE]


@pytest.mark.requirement("R13")
def test_every_metric_is_in_the_catalogue_once() -> None:
    """The catalogue is what the roles expose, and no two metrics share a name."""
    assert set(CATALOGUE) == {*ENGINE, *GATEWAY, *RECONCILER}
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.requirement("R13")
def test_the_published_engine_metrics_exist() -> None:
    """The names that alerts and dashboards use are there, as the contract spells them."""
    assert {
        "auctions_timer_tick_delay_ms",
        "auctions_timer_close_lateness_ms",
        "auctions_timer_early_closes_total",
        "auctions_timer_drift_ms",
        "auctions_timer_active",
        "auctions_timer_extensions_total",
        "auctions_timer_trigger_lag_ms",
        "auctions_intake_lag_events",
        "auctions_commit_conflicts_total",
        "auctions_troubleshooting_depth",
    } <= {metric.name for metric in ENGINE}


@pytest.mark.parametrize("metric", NAMED)
def test_a_name_says_kind_and_unit(metric: Metric) -> None:
    """A counter ends in `_total`, a histogram in its unit, and only a histogram has buckets, in rising order."""
    assert metric.name.startswith(("auctions_", "offers_"))
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets) == metric.name.endswith("_ms")
    assert list(metric.buckets) == sorted(set(metric.buckets))


@pytest.mark.parametrize("metric", NAMED)
def test_every_metric_says_what_to_do(metric: Metric) -> None:
    """Meaning and remedy are sentences."""
    assert metric.meaning.endswith(".")
    assert metric.remedy.endswith(".")
