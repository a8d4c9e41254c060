"""Tests for engine.settings: where settings come from, which are refused, and with which words."""

import typing
from pathlib import Path
from typing import Any

import pytest

from engine.settings import PREFIX, Settings, SettingsError


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory without `.env`, and an environment without settings."""
    import os

    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_defaults_are_consistent_and_local() -> None:
    """Without any setting: no faults, loopback only, eight shards, an embedded store."""
    settings = Settings.load()
    assert settings.faults() == []
    assert settings.is_loopback
    assert (settings.shards, settings.redis_url, settings.durability) == (8, None, "local")


def test_two_engines_of_one_machine_have_different_names() -> None:
    """The default name of an engine is made of host and process."""
    import os

    assert Settings.load().instance == f"{os.uname().nodename}-{os.getpid()}"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AUCTION_TIMER_*`, as text, in capitals or not."""
    monkeypatch.setenv("AUCTION_TIMER_SHARDS", "32")
    monkeypatch.setenv("auction_timer_redis_url", "redis://cache:7000")
    settings = Settings.load()
    assert (settings.shards, settings.redis_url) == (32, "redis://cache:7000")


LISTS = [name for name, field in Settings.model_fields.items() if typing.get_origin(field.annotation) is list]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("text", ['["http://a", "http://b:1"]', "http://a,http://b:1", " http://a , http://b:1,, "])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_list_is_written_as_json_or_with_commas(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, in_file: bool
) -> None:
    """Whichever comes to mind, in the environment and in the file, for every setting that is a list."""
    if in_file:
        (nowhere / ".env").write_text(f"{PREFIX}{name.upper()}='{text}'\n")
    else:
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    assert getattr(Settings.load(), name) == ["http://a", "http://b:1"]
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "")
    assert getattr(Settings.load(), name) == []


def test_a_list_that_is_none_is_a_fault_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torn JSON, and JSON of something else than text."""
    for text, words in (('["http://a"', "must be a JSON list"), ('["http://a", 7]', "[1]: ")):
        monkeypatch.setenv("AUCTION_TIMER_ALLOWED_ORIGINS", text)
        with pytest.raises(SettingsError) as raised:
            Settings.load()
        (fault,) = raised.value.faults
        assert fault.startswith("AUCTION_TIMER_ALLOWED_ORIGINS")
        assert words in fault


def test_settings_come_from_a_file(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env` of the working directory; the environment goes before it, and an option before both."""
    (nowhere / ".env").write_text("AUCTION_TIMER_SHARDS=16\nAUCTION_TIMER_PORT=9000\nOTHER=1\n")
    monkeypatch.setenv("AUCTION_TIMER_PORT", "9001")
    settings = Settings.load(host="localhost", port=None)
    assert (settings.shards, settings.port, settings.host) == (16, 9001, "localhost")
    assert Settings.load(port=9002).port == 9002


def test_an_unknown_name_is_an_error(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo is never silently ignored, in the environment or in the file; every one is named."""
    monkeypatch.setenv("AUCTION_TIMER_SHARD", "4")
    monkeypatch.setenv("AUCTION_TIMER_FROB", "4")
    monkeypatch.setenv("OTHER_SHARD", "4")
    (nowhere / ".env").write_text("AUCTION_TIMER_REDIS=redis://x\n")
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    assert [fault.split()[0] for fault in raised.value.faults] == [
        "AUCTION_TIMER_FROB",
        "AUCTION_TIMER_SHARD",
        "AUCTION_TIMER_REDIS",
    ]
    assert "docs/configuration.md" in str(raised.value)


def test_a_typo_in_small_letters_is_one_too(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names count in any letters, so an unknown one does as well; it is shown as it was written."""
    monkeypatch.setenv("auction_timer_prot", "4")
    (nowhere / ".env").write_text("auction_timer_Redis=redis://x\n")
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    assert [fault.split()[0] for fault in raised.value.faults] == ["auction_timer_prot", "auction_timer_Redis"]


def test_a_file_that_cannot_be_read_is_a_fault(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a traceback: the sentence names the file, and what is wrong elsewhere is said as well."""
    (nowhere / ".env").write_bytes(b"AUCTION_TIMER_PORT=9000\nNAME=\xe9\n")
    monkeypatch.setenv("AUCTION_TIMER_SHARDS", "0")
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    file, shards = raised.value.faults
    assert file.startswith(".env is not UTF-8")
    assert shards.startswith("AUCTION_TIMER_SHARDS: ")


def test_what_can_be_read_is_read_beside_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value has its default, and is named; the others are as they were set."""
    monkeypatch.setenv("AUCTION_TIMER_SHARDS", "many")
    monkeypatch.setenv("AUCTION_TIMER_PORT", "9000")
    reading = Settings.read()
    assert (reading.settings.shards, reading.settings.port) == (8, 9000)
    assert reading.wrong == {"shards"}
    assert len(reading.faults) == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "65536", "must be at most 65535"),
        ("SHARDS", "0", "must be at least 1"),
        ("SHARDS", "many", "must be a whole number"),
        ("INSECURE", "perhaps", "must be true or false"),
        ("DURABILITY", "wished", "must be 'local' or 'replicated'"),
        ("WEBHOOK_SECRET", "", "must not be empty"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    """Not in those of the library that has found it."""
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    assert raised.value.faults == [f"{PREFIX}{name}: {words}"]


def test_a_wrong_option_is_named_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wrote `--port` need not look for a variable."""
    monkeypatch.setenv("AUCTION_TIMER_PORT", "9000")
    with pytest.raises(SettingsError) as raised:
        Settings.load(port=70_000)
    assert raised.value.faults == ["--port: must be at most 65535"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHARDS", "0"),
        ("SHARDS", "1025"),
        ("SHARDS", "many"),
        ("PORT", "65536"),
        ("DURABILITY", "wished"),
        ("LEASE_MS", "299"),
        ("BATCH_MAX", "1001"),
        ("INSTANCE", "two words"),
        ("INSTANCE", ""),
        ("LOG_LEVEL", "loud"),
        ("OUTBOX_BYTES_MAX", "1"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """The message says which setting and what is wrong with it."""
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    (fault,) = raised.value.faults
    assert fault.startswith(f"{PREFIX}{name}: ")


def test_every_wrong_value_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to start five times to find five mistakes."""
    monkeypatch.setenv("AUCTION_TIMER_SHARDS", "0")
    monkeypatch.setenv("AUCTION_TIMER_PORT", "-1")
    monkeypatch.setenv("AUCTION_TIMER_FROB", "1")
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    assert len(raised.value.faults) == 3


def test_a_secret_is_not_shown() -> None:
    """Neither in the settings' own text nor in the message of an error about another setting."""
    assert "s3cret" not in repr(Settings.load(jwt_secret="s3cret"))
    with pytest.raises(SettingsError) as raised:
        Settings.load(jwt_secret="s3cret", shards=0)
    assert "s3cret" not in str(raised.value)


def test_an_empty_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files like to set it."""
    for name in ("REDIS_URL", "JWKS_URL", "TOKEN"):
        monkeypatch.setenv(PREFIX + name, "")
    settings = Settings.load()
    assert (settings.redis_url, settings.jwks_url, settings.token) == (None, None, None)
    assert not settings.wants_tokens


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"heartbeat_ms": 700}, "heartbeat_ms"),
        ({"lease_ms": 700}, "heartbeat_ms"),
        ({"durability": "replicated"}, "replicated"),
        ({"jwks_url": "http://keys.example/jwks"}, "jwks_url"),
        ({"jwks_url": "https://"}, "jwks_url"),
        ({"jwks_url": "https://keys.example:99999/jwks"}, "jwks_url"),
        ({"jwks_url": "http://["}, "jwks_url"),
        ({"jwks_url": "ftp://127.0.0.1/jwks"}, "jwks_url"),
        ({"jwks_file": "keys.json"}, "jwks_file"),
        ({"webhook_url": "http://hooks.example/x", "webhook_secret": "s"}, "webhook_url"),
        ({"webhook_url": "hooks.example", "webhook_secret": "s"}, "webhook_url"),
        ({"webhook_url": "https://hooks.example/x"}, "AUCTION_TIMER_WEBHOOK_SECRET"),
        ({"webhook_url": "https://hooks.example/x", "webhook_secret": "whsec_"}, "whsec_"),
        ({"webhook_url": "http://127.0.0.1:1/x", "webhook_secret": "whsec_no base64"}, "whsec_"),
        ({"jwks_url": "https://keys.example/jwks", "jwks_file": __file__}, "jwks_url and jwks_file"),
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"intake_max": 100_000}, "intake_retained"),
        *(
            ({"allowed_origins": [origin]}, repr(origin))
            for origin in (
                *("foo", "*", "null", "https://*.example", "https://a.example/bids", "https://a.example//"),
                *(
                    "https://ada@a.example",
                    "https://a.example:x",
                    "https://[",
                    "//a.example",
                    "https://",
                    "a.example:443",
                ),
            )
        ),
    ],
)
def test_an_inconsistency_is_a_fault(options: dict[str, Any], word: str) -> None:
    """One sentence for each, which names the setting at fault."""
    (fault,) = Settings.load(**options).faults()
    assert word in fault


def test_an_origin_is_what_a_browser_names() -> None:
    """Scheme and host, and a port where it is an unusual one; a slash behind it and capitals do no harm."""
    origins = ["https://bids.example", "http://localhost:3000/", "HTTPS://Bids.Example", "http://[::1]:80", "app://x"]
    assert Settings.load(allowed_origins=origins).faults() == []


def test_every_inconsistency_is_listed() -> None:
    """Not only the first."""
    assert len(Settings.load(lease_ms=300, durability="replicated", host="::", intake_max=1_000).faults()) == 4


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_leave(host: str) -> None:
    """Only this machine can come in."""
    settings = Settings.load(host=host)
    assert settings.is_loopback
    assert settings.faults() == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "bids.example", "127.0.0.1.example", ""])
def test_another_address_needs_leave(host: str) -> None:
    """Without tokens anybody there could read and write: a fault, unless that is what was asked for."""
    settings = Settings.load(host=host)
    assert not settings.is_loopback
    assert any("--insecure" in fault for fault in settings.faults())
    assert Settings.load(host=host, insecure=True).faults() == []


@pytest.mark.requirement("R24")
@pytest.mark.parametrize(
    "options",
    [
        {"jwt_secret": "s" * 32},
        {"jwks_url": "https://keys.example/jwks"},
        {"jwks_url": "http://127.0.0.1:9000/jwks"},
        {"jwks_file": __file__},
        {"jwt_secret": "s" * 32, "jwks_file": __file__},
    ],
)
def test_with_tokens_any_address_may_be_bound(options: dict[str, Any]) -> None:
    """A secret or public keys, or both, let whoever comes from outside be asked who they are."""
    settings = Settings.load(host="0.0.0.0", **options)
    assert settings.wants_tokens
    assert settings.faults() == []


def test_limits_of_the_store_follow_the_settings() -> None:
    """Each bound is the setting of its name."""
    settings = Settings.load(
        seen_ms=61_000, intake_max=5_000, troubleshooting_max=700, updates_max=2_000, closed_retention_ms=62_000
    )
    limits = settings.store_limits()
    assert (limits.seen_ms, limits.intake_max, limits.updates_max, limits.closed_retention_ms) == (
        61_000,
        5_000,
        2_000,
        62_000,
    )
    assert limits.troubleshooting_max == 700
    assert limits.stamp_bound_ms == 250


def test_every_setting_is_described() -> None:
    """The configuration reference is generated from these sentences."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.rstrip("`").endswith("."), name
