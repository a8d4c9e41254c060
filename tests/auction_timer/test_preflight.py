"""Tests for auction_timer.preflight: what is found before anything is started."""

import sys
from pathlib import Path
from typing import Any

import pytest

from auction_timer.preflight import Role, faults_of, usable
from engine.settings import PREFIX, Settings, SettingsError
from tests.gateway.issuer import key, key_set

REDIS = {"redis_url": "redis://127.0.0.1:6379"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory without `.env`, and an environment without settings."""
    import os

    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{}")
    (tmp_path / "keys.json").write_bytes(key_set(key("first")))
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {},
        REDIS,
        {"redis_url": "redis+sentinel://h:1,h:2/main"},
        {"redis_url": "redis+cluster://h:1"},
        {"data_dir": "not/yet/there"},
        {"audit_url": "postgresql+asyncpg://u:p@h/d"},
        {"jwks_file": "keys.json"},
        {"jwt_secret": "s" * 32, "host": "0.0.0.0"},
        {"server_binary": sys.executable},
    ],
)
def test_what_can_be_started_is_not_refused(nowhere: Path, options: dict[str, Any]) -> None:
    """And nothing is created by looking."""
    before = sorted(nowhere.iterdir())
    settings = Settings.load(**options)
    assert usable(settings, Role.SERVE) is settings
    assert sorted(nowhere.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"redis_url": "foo://x"}, "redis_url: the scheme 'foo'"),
        ({"redis_url": "redis+sentinel://h"}, "redis_url: "),
        ({"redis_url": "redis://h:99999"}, "redis_url: host and port cannot be read"),
        ({"redis_url": "redis://h?db=x"}, "redis_url: "),
        ({"server_binary": "/nope"}, "server_binary: "),
        ({"audit_url": "garbage"}, "AUCTION_TIMER_AUDIT_URL: audit_url"),
        ({"audit_url": "mysql://h/d"}, "AUCTION_TIMER_AUDIT_URL: audit_url"),
        ({"connections_max": 2**40}, "connections_max"),
        ({"jwks_file": "file"}, "jwks_file file: not a JSON object"),
        ({"allowed_origins": ["foo"]}, "allowed_origins"),
        ({"data_dir": "file"}, "data_dir: "),
        ({"data_dir": "file/below"}, "data_dir: "),
        ({"data_dir": "~nobody-of-that-name/x"}, "data_dir: "),
        ({"data_dir": "x" * 300}, "data_dir: "),
        ({"heartbeat_ms": 700}, "heartbeat_ms"),
    ],
)
def test_what_cannot_be_started_is_a_fault_that_names_its_setting(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    """In one sentence, before a child process finds it out."""
    monkeypatch.setattr("gateway.descriptors.resource.getrlimit", lambda _which: (1_024, 1 << 20))
    (fault,) = faults_of(Settings.load(**options), Role.SERVE)
    assert fault.startswith(words)
    with pytest.raises(SettingsError):
        usable(Settings.load(**options), Role.SERVE)


def test_a_public_key_is_no_secret() -> None:
    """It would let everybody sign."""
    (fault,) = faults_of(Settings.load(jwt_secret=key("first").as_pem(private=False).decode()), Role.SERVE)
    assert fault.startswith("AUCTION_TIMER_JWT_SECRET")


def test_every_fault_is_listed() -> None:
    """Those that are seen without looking at anything as well as the others."""
    wrong = Settings.load(heartbeat_ms=700, server_binary="/nope", audit_url="garbage", data_dir="file")
    assert len(faults_of(wrong, Role.SERVE)) == 4


@pytest.mark.parametrize("role", [Role.ENGINE, Role.GATEWAY, Role.RECONCILER])
def test_a_role_needs_a_redis_and_what_it_uses_itself(role: Role) -> None:
    """Another role's faults are not its own: it may run on another machine."""
    with pytest.raises(SettingsError, match="--redis-url"):
        usable(Settings.load(), role)
    with pytest.raises(SettingsError, match="redis_url"):
        usable(Settings.load(redis_url="foo://x"), role)
    odd = REDIS | {"server_binary": "/nope", "data_dir": "file", "audit_url": "garbage"}
    assert len(faults_of(Settings.load(**odd), role)) == (role is not Role.ENGINE)


def test_a_gateway_does_not_judge_its_key_file() -> None:
    """It may be written just now: a gateway that runs reads it again, and says in `/readyz` that it has no keys."""
    assert faults_of(Settings.load(**REDIS, jwks_file="file"), Role.GATEWAY) == []
