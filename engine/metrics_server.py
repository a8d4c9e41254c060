"""Metrics of a process that serves no HTTP of its own: a small exposition on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server


@contextmanager
def metrics_server(port: int | None, registry: CollectorRegistry) -> Iterator[None]:
    """Serve `/metrics` on loopback while the context is open; nothing if `port` is None."""
    if port is None:
        yield
        return
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
