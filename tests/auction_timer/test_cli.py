"""Tests for auction_timer.cli: what the command line itself says."""

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from auction_timer import cli, roles
from engine.settings import PREFIX, Settings


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory without `.env`, and an environment without settings."""
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(*arguments: str, **settings: str) -> Result:
    """What a command made of its arguments and of the settings in its environment."""
    env: dict[str, Any] = {PREFIX + name: value for name, value in settings.items()}
    return CliRunner().invoke(cli.app, list(arguments), env=env | {"TERMINAL_WIDTH": "500", "COLUMNS": "500"})


def test_check_config_prints_what_it_can_beside_what_it_cannot() -> None:
    """A wrong value hides neither the others nor the faults that are found otherwise."""
    result = ran("check-config", SHARDS="many", PORT="9000", AUDIT_URL="garbage", HEARTBEAT_MS="700")
    assert result.exit_code == 1
    assert "port = 9000" in result.stdout
    assert "shards = " not in result.stdout
    faults = result.stderr.splitlines()
    assert all(fault.startswith("fault: ") for fault in faults)
    assert [word in result.stderr for word in ("AUCTION_TIMER_SHARDS", "audit_url", "heartbeat_ms")] == [True] * 3
    assert len(faults) == 3


def test_check_config_says_what_is_weak_and_no_fault(nowhere: Path) -> None:
    """A short secret is a warning, on stderr and without the secret."""
    result = ran("check-config", JWT_SECRET="s3cret-one")
    assert result.exit_code == 0
    assert "AUCTION_TIMER_JWT_SECRET has less than 32 bytes" in result.stderr
    assert "s3cret-one" not in result.output


def test_a_url_that_cannot_be_read_hides_what_may_be_its_password() -> None:
    """And is no traceback."""
    result = ran("check-config", JWKS_URL="https://ada:hunter2@[")
    assert result.exit_code == 1
    assert "jwks_url = ***" in result.stdout
    assert "hunter2" not in result.output


@pytest.mark.parametrize("text", ["http://x", "http://x,http://y:1", '["http://x"]'])
def test_no_spelling_of_a_list_ends_a_command_in_a_traceback(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every command reads the settings, if only for its token."""
    monkeypatch.setattr(cli, "_exit", lambda code: None)
    monkeypatch.setattr("auction_timer.commands.watch", lambda *_args, **_options: 0)
    result = ran("watch", "a-1", ALLOWED_ORIGINS=text)
    assert (result.exit_code, result.exception) == (0, None)


def test_a_wrong_setting_or_option_is_a_sentence_and_exit_code_78(nowhere: Path) -> None:
    """Also where the file is not UTF-8."""
    assert "--port: must be at most 65535" in ran("serve", "--port", "70000").stderr
    (nowhere / ".env").write_bytes(b"A=\xff\n")
    result = ran("serve")
    assert (result.exit_code, ".env is not UTF-8" in result.stderr) == (78, True)


def test_serve_refuses_before_it_starts_anything(nowhere: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever a child would find out: one sentence, exit code 78, and no data directory."""
    settings = Settings.load(redis_url="foo://x", audit_url="garbage")
    assert roles.serve(settings, gateways=1) == 78
    said = capfd.readouterr().err
    assert "redis_url: " in said
    assert "audit_url" in said
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("serve", "keeps its data in the data dir."),
        ("reconciler", "the archive is `audit.sqlite3` in the data dir."),
        ("audit verify", "Without a Redis that answers"),
        ("watch", "As it was registered."),
    ],
)
def test_help_flows(command: str, words: str) -> None:
    """On a wide terminal no sentence breaks where its docstring does, and every argument is explained."""
    assert words in ran(*command.split(), "--help").stdout
