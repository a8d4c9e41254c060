"""Fixtures for every test: real servers, one process per kind and session, empty at the start of each test."""

from collections.abc import Iterator

import pytest
import structlog

from tests.live import live_stack, short_tmp  # noqa: F401 - fixtures
from tests.postgresql import postgresql_server  # noqa: F401 - fixture
from tests.servers import DEBIAN, VALKEY, Kind, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that wait for real processes come first: the short ones fill what is left of each worker's time."""
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


@pytest.fixture(autouse=True)
def _logs_go_where_they_went(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program that a test runs in this process sets up its logs: on the test's own stderr, which is closed after it."""
    configure = structlog.configure
    monkeypatch.setattr(
        structlog, "configure", lambda **options: configure(**options | {"cache_logger_on_first_use": False})
    )
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


def _session(kind: Kind) -> Iterator[Server]:
    if kind.missing is not None:
        pytest.skip(kind.missing)
    server = Server(kind)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def valkey_process() -> Iterator[Server]:
    """The session's Valkey; ask for `valkey_server`, which is empty."""
    yield from _session(VALKEY)


@pytest.fixture(scope="session")
def debian_process() -> Iterator[Server]:
    """The session's Debian Redis; ask for `debian_server`, which is empty."""
    yield from _session(DEBIAN)


@pytest.fixture
def valkey_server(valkey_process: Server) -> Server:
    """A real, empty Valkey."""
    valkey_process.flush()
    return valkey_process


@pytest.fixture
def debian_server(debian_process: Server) -> Server:
    """A real, empty Redis 7.0 as Debian ships it."""
    debian_process.flush()
    return debian_process


@pytest.fixture(params=[pytest.param("valkey_server", id="valkey"), pytest.param("debian_server", id="debian")])
def redis_server(request: pytest.FixtureRequest) -> Server:
    """Each kind of real server in turn, empty."""
    server: Server = request.getfixturevalue(request.param)
    return server
