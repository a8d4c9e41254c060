"""Tests for gateway.metrics."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.values import MultiProcessValue

from engine.contract import metrics as catalogue
from gateway.closing import CloseCode
from gateway.metrics import EVENT_LANE, TICK_LANE, GatewayMetrics, exposition
from gateway.problems import ProblemType


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may himself be measured."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def test_everything_the_gateway_counts_is_in_the_exposition() -> None:
    """Each metric appears under its name and labels of the contract, section 7, with the value it was given."""
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    metrics.connections.set(3)
    metrics.conflated_ticks.inc()
    metrics.handshake("accepted")
    metrics.disconnect(4000)
    metrics.resync("small")
    metrics.delivery_ms[TICK_LANE].observe(4)
    metrics.delivery_ms[EVENT_LANE].observe(5)
    metrics.resumes[True].inc()
    metrics.resumes[False].inc(2)
    metrics.drift_ms["client"].observe(6)
    metrics.drift_ms["gateway"].observe(7)
    lines = exposition(registry).decode().splitlines()
    for line in (
        "auctions_gateway_connections 3.0",
        "auctions_gateway_conflated_ticks_total 1.0",
        'auctions_gateway_handshakes_total{outcome="accepted"} 1.0',
        'auctions_gateway_disconnects_total{code="4000"} 1.0',
        'auctions_gateway_client_resyncs_total{outcome="small"} 1.0',
        'auctions_gateway_delivery_ms_sum{lane="tick"} 4.0',
        'auctions_gateway_delivery_ms_sum{lane="event"} 5.0',
        'auctions_gateway_resumes_total{recovered="true"} 1.0',
        'auctions_gateway_resumes_total{recovered="false"} 2.0',
        'auctions_timer_drift_ms_sum{source="client"} 6.0',
        'auctions_timer_drift_ms_sum{source="gateway"} 7.0',
    ):
        assert line in lines


def test_what_the_catalogue_tells_to_look_at_exists() -> None:
    """Every outcome and every close code that is named in a text can be seen in the metric."""
    outcomes = {"accepted", "malformed"} | {kind.error_code.lower() for kind in ProblemType}
    named = set(re.findall(r"`(\w+)`", catalogue.HANDSHAKES.remedy))
    assert named
    assert named <= outcomes
    codes = {code.value for code in CloseCode} | {1002, 1007, 1009}
    named_codes = {
        int(code) for code in re.findall(r"\d{4}", catalogue.DISCONNECTS.meaning + catalogue.DISCONNECTS.remedy)
    }
    assert named_codes
    assert named_codes - {6455} <= codes


def test_under_serve_one_scrape_adds_up_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a directory of counters the answer holds what other processes wrote there, and nothing of this registry alone."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for pid, times in ((101, 2), (102, 5)):
        value = MultiProcessValue(process_identifier=lambda pid=pid: pid)
        name = "auctions_gateway_conflated_ticks"
        value("counter", name, f"{name}_total", (), (), "Ticks").inc(times)
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    text = exposition(registry).decode()
    assert "auctions_gateway_conflated_ticks_total 7.0" in text
    assert "auctions_gateway_connections" not in text
