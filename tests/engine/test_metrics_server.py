"""Tests for engine.metrics_server: a scrape of a process that serves no HTTP of its own."""

import urllib.request
from urllib.error import URLError

import pytest
from prometheus_client import CollectorRegistry

from engine.metrics import EngineMetrics
from engine.metrics_server import metrics_server
from tests.topologies import free_ports


def test_metrics_can_be_scraped_while_the_context_is_open() -> None:
    """On loopback, in Prometheus's form; afterwards the port is free again."""
    registry, (port,) = CollectorRegistry(), free_ports(1)
    EngineMetrics(registry).early_closes.inc(0)
    url = f"http://127.0.0.1:{port}/metrics"
    with metrics_server(port, registry), urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.status == 200
        assert b"auctions_timer_early_closes_total 0.0" in answer.read()
    with pytest.raises(URLError):
        urllib.request.urlopen(url, timeout=10)


def test_without_a_port_nothing_is_served() -> None:
    """The default."""
    with metrics_server(None, CollectorRegistry()):
        pass
