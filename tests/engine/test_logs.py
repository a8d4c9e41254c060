"""Tests for engine.logs: one event a line, and no secret in any of them."""

import json
import sys
from collections.abc import Iterator

import pytest
import structlog

from engine.logs import configure, without_secrets


@pytest.mark.parametrize(
    ("url", "logged"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://bob:s3cret@cache:7000/1", "redis://***@cache:7000/1"),
        ("rediss://:s3cret@cache", "rediss://***@cache"),
        ("redis://s3cret@cache", "redis://***@cache"),
        ("redis+sentinel://bob:s3cret@a:1,b:2/main", "redis+sentinel://***@a:1,b:2/main"),
        ("unix://bob:s3cret@/run/redis.sock?db=1", "unix://***@/run/redis.sock?db=1"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("redis://bob:s3@cret@cache", "redis://***@cache"),
        ("redis://cache/0?username=bob&password=s3cret", "redis://cache/0?username=***&password=***"),
        ("unix:///run/redis.sock?password=s3cret&db=1", "unix:///run/redis.sock?password=***&db=1"),
    ],
)
def test_a_url_is_logged_without_its_secrets(url: str, logged: str) -> None:
    """User and password are replaced, wherever redis-py takes them from; everything else is kept."""
    assert without_secrets(url) == logged
    assert "s3cret" not in without_secrets(url)


@pytest.fixture
def as_before() -> Iterator[None]:
    """structlog as it was."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_a_log_line_is_json(as_before: None, capsys: pytest.CaptureFixture[str]) -> None:
    """With the role, the time in UTC, the level and its own values, on stderr."""
    configure("engine", form="json", level="info")
    log = structlog.get_logger()
    log.debug("not_wanted")
    log.info("shard_claimed", shard=3)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    read = json.loads(line)
    assert out == ""
    assert (read["event"], read["shard"], read["role"], read["level"]) == ("shard_claimed", 3, "engine", "info")
    assert read["timestamp"].endswith("Z")


def test_a_log_line_is_text(as_before: None, capsys: pytest.CaptureFixture[str]) -> None:
    """For people; an exception comes along; where stderr is no terminal there are no colours."""
    configure("gateway", form="text", level="warning")
    log = structlog.get_logger()
    log.info("not_wanted")
    log.error("went_wrong", shard=3, exc_info=RuntimeError("a fault of ours"))
    err = capsys.readouterr().err
    assert "went_wrong" in err
    assert "shard=3" in err
    assert "RuntimeError: a fault of ours" in err
    assert "not_wanted" not in err
    assert "\x1b" not in err or sys.stderr.isatty()
