"""Settings of every role: environment `AUCTION_TIMER_*`, a `.env` file, or options of the command line.

One class for all roles, because one environment serves them all, and a name nobody knows must be an error.
"""

import ipaddress
import json
import os
from base64 import b64decode
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.contract.keys import SHARDS_MAX
from engine.domain.instants import HOUR_MS
from engine.domain.withdrawal import WINDOW_MINUTES_MAX
from engine.store.limits import StoreLimits

PREFIX = "AUCTION_TIMER_"
ENV_FILE: Final = Path(".env")


class SettingsError(ValueError):
    """The settings cannot be used. The message lists every fault, each with what to do."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _listed(value: Any) -> Any:
    """The items of a list that came as text: JSON, or with commas between them."""
    if not isinstance(value, str):
        return value
    if not value.strip().startswith("["):
        return [item for part in value.split(",") if (item := part.strip())]
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("must be a JSON list, or items with commas between them") from None


Texts = Annotated[list[str], NoDecode, BeforeValidator(_listed)]


class Settings(BaseSettings):
    """The effective settings of a process."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=ENV_FILE, extra="ignore", frozen=True)

    redis_url: str | None = Field(
        None,
        description="Redis or Valkey, 7.0 or newer: `redis://`, `rediss://`, `unix://`, `redis+sentinel://h:p,h:p/SERVICE`, "
        "`redis+cluster://h:p,h:p`. "
        "Unset, `serve` runs a private server of its own.",
    )
    server_binary: Path | None = Field(
        None,
        description="The server program of the embedded store. Unset: the one installed with us, else one on PATH.",
    )
    data_dir: Path = Field(Path("auction-timer-data"), description="Where `serve` keeps the embedded store's data.")
    shards: int = Field(
        8,
        ge=1,
        le=SHARDS_MAX,
        description="Shards of the deployment. Fixed at its first start; a mismatch is an error.",
    )
    durability: Literal["local", "replicated"] = Field(
        "local",
        description="`local`: the append-only file, synced every second. `replicated`: also on a replica before anybody is "
        "told, so that a failover loses nothing that was told; see docs/deployment.md.",
    )
    host: str = Field(
        "127.0.0.1", description="Address the gateway binds. Any but loopback needs tokens or `--insecure`."
    )
    port: int = Field(8080, ge=0, le=65535, description="Port the gateway binds; 0 takes a free one.")
    insecure: bool = Field(False, description="Bind a public address although anybody there may then read and write.")
    jwt_secret: str | None = Field(
        None,
        repr=False,
        min_length=1,
        description="Secret for HS256 tokens; RFC 7518 asks for 32 bytes. With it, or with keys, every caller needs a token.",
    )
    jwks_url: str | None = Field(
        None, description="Where the public keys for tokens are (RFC 7517): https, or http on loopback."
    )
    jwks_file: Path | None = Field(None, description="File with the public keys for tokens (RFC 7517).")
    jwt_issuer: str | None = Field(None, description="`iss` that every token must carry. Unset: any.")
    jwt_audience: str | None = Field(None, description="`aud` that every token must carry. Unset: any.")
    offer_modification_window_minutes: int = Field(
        30,
        ge=0,
        le=WINDOW_MINUTES_MAX,
        description="How long after its creation an offer can be cancelled, where its registration does not say, in minutes.",
    )
    troubleshooting_max: int = Field(
        100_000,
        ge=100,
        description="Commands in troubleshooting per shard; beyond, producers get 503 until somebody looks at them.",
    )
    audit_url: str | None = Field(
        None,
        repr=False,
        description="SQL database of the audit archive, an SQLAlchemy URL: `sqlite+aiosqlite:///PATH` or "
        "`postgresql+asyncpg://…`. Unset: `audit.sqlite3` in the data dir.",
    )
    audit_retained: int = Field(
        1_000, ge=0, description="Archived audit records per shard that also stay in Redis, for fast reading."
    )
    webhook_url: str | None = Field(
        None, repr=False, description="Where outbound events are posted: https, or http on loopback. Unset: nowhere."
    )
    webhook_secret: str | None = Field(
        None, repr=False, min_length=1, description="Secret that signs what is posted to the webhook (HMAC-SHA256)."
    )
    webhook_types: Texts = Field(
        default_factory=lambda: ["offers.*", "auction_timer_*", "timer.*"],
        description="Types of outbound events that are posted, as a list of patterns such as `offers.*`.",
    )
    webhook_attempts_max: int = Field(
        20, ge=1, le=1_000, description="Attempts to post an event before it is put aside, about 15 minutes by default."
    )
    token: str | None = Field(
        None, repr=False, description="Token that the command line sends to a gateway. Servers do not read it."
    )
    allowed_origins: Texts = Field(
        default_factory=list,
        description="Origins of pages that may use the API, such as `https://bids.example`. "
        "The gateway's own origin always may.",
    )
    connections_max: int = Field(
        20_000,
        ge=1,
        description="Sockets per gateway process; more are answered 503. Unset, fewer where the limit of open files is low.",
    )
    connections_per_address_max: int = Field(
        20_000,
        ge=1,
        description="Sockets per client address and gateway process. Lower it where no proxy stands in front.",
    )
    handshakes_per_second_max: int = Field(
        2_000,
        ge=1,
        description="Socket handshakes per second and gateway process, as many at once after a quiet second; "
        "more are answered 503.",
    )
    drain_ms: int = Field(
        65_000,
        ge=0,
        le=600_000,
        description="How long a gateway that stops waits for the close of auctions in their last minute, in ms. Unset, those "
        "of `serve` wait 25,000. Whoever stops the process must wait longer: see docs/deployment.md.",
    )
    frozen_ms: int = Field(
        20_000,
        ge=5_000,
        le=3_600_000,
        description="How long an engine, gateway or reconciler of `serve` may stand still before it is killed and started "
        "again, in ms. An outage that hits 100,000 auctions of one shard holds its engine up for 4 s.",
    )
    outbox_bytes_max: int = Field(
        262_144,
        ge=4_096,
        description="Bytes buffered for one socket that does not read; beyond, it is closed with 4101.",
    )
    outbox_age_max_ms: int = Field(
        5_000, ge=100, description="How long a socket may not read before it is closed with 4101, in ms."
    )
    lease_ms: int = Field(
        1_500,
        ge=300,
        le=60_000,
        description="An engine whose heartbeat stands still for so long has lost its shards, in ms.",
    )
    heartbeat_ms: int = Field(
        300, ge=50, le=20_000, description="How often an engine beats, in ms; at most a third of `lease_ms`."
    )
    instance: str = Field(
        default_factory=lambda: f"{os.uname().nodename}-{os.getpid()}",
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
        description="Name of an engine. One that restarts under the same name takes its shards back at once.",
    )
    outage_extension_ms: int = Field(
        120_000,
        ge=0,
        le=900_000,
        description="By how much an auction is extended if no gateway could take bids for more than 5 s of its closing "
        "window, in ms; 0 turns it off. The same for every engine and gateway.",
    )
    reconcile_interval_ms: int = Field(
        10_000,
        ge=200,
        le=3_600_000,
        description="How often the reconciler compares every live auction with the log, in ms.",
    )
    reconcile_repairs_max: int = Field(
        100, ge=0, le=10_000, description="Repairs the reconciler asks for in one pass; more wait for the next one."
    )
    batch_max: int = Field(
        32,
        ge=1,
        le=1_000,
        description="Intake entries per commit. Redis pauses about 45 µs for each; more than 32 was not faster.",
    )
    intake_max: int = Field(1_000_000, ge=1_000, description="Intake entries per shard; beyond, producers get 503.")
    intake_retained: int = Field(
        100_000, ge=0, description="Applied intake entries kept per shard, for people who look into a fault."
    )
    updates_max: int = Field(
        100_000,
        ge=1_000,
        description="Entries per shard that the event lane keeps. So far back a client can catch up, but not beyond 100,000 "
        "of them, nor on more than 1 MiB.",
    )
    seen_ms: int = Field(48 * HOUR_MS, ge=60_000, description="How long a repeated event is recognised as one, in ms.")
    closed_retention_ms: int = Field(
        30 * 24 * HOUR_MS, ge=60_000, description="How long a closed auction can still be read, in ms."
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port on loopback where `engine`, or a `reconciler` started alone, serves its metrics. Unset: none.",
    )
    log_format: Literal["json", "text"] = Field("text", description="Form of the log lines on stderr.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe line that is logged."
    )

    @field_validator("redis_url", "jwks_url", "webhook_url", "token")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        return value or None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return _is_loopback(self.host)

    @property
    def wants_tokens(self) -> bool:
        """Whether callers need a token; if not, the gateway is open to whoever reaches it."""
        return bool(self.jwt_secret or self.jwks_url or self.jwks_file)

    def store_limits(self) -> StoreLimits:
        """The store's bounds."""
        return StoreLimits(
            seen_ms=self.seen_ms,
            intake_max=self.intake_max,
            troubleshooting_max=self.troubleshooting_max,
            updates_max=self.updates_max,
            closed_retention_ms=self.closed_retention_ms,
            outage_extension_ms=self.outage_extension_ms,
        )

    def faults(self) -> list[str]:
        """Every inconsistency between settings, as sentences that say what to do; empty if there is none."""
        found = []
        if 3 * self.heartbeat_ms > self.lease_ms:
            found.append(
                f"heartbeat_ms ({self.heartbeat_ms}) is more than a third of lease_ms ({self.lease_ms}): "
                "one lost heartbeat would cost the shards; lower heartbeat_ms or raise lease_ms"
            )
        if self.durability == "replicated" and self.redis_url is None:
            found.append(
                "durability is 'replicated' and the embedded server has no replica: name a Redis that has, or use 'local'"
            )
        if self.jwks_url and self.jwks_file:
            found.append("jwks_url and jwks_file both name the public keys: unset AUCTION_TIMER_JWKS_URL or _JWKS_FILE")
        if self.jwks_url and not _is_secure(self.jwks_url):
            found.append(
                "jwks_url is neither https nor http on loopback: whoever is on the way could put keys of their own there"
            )
        if self.jwks_file and not self.jwks_file.is_file():
            found.append(f"jwks_file {self.jwks_file} is no file: put the keys there, or unset AUCTION_TIMER_JWKS_FILE")
        if not self.is_loopback and not self.insecure and not self.wants_tokens:
            found.append(
                f"host {self.host} can be reached from outside and nothing authenticates whoever calls: set "
                "AUCTION_TIMER_JWT_SECRET, _JWKS_URL or _JWKS_FILE, or bind 127.0.0.1 behind a proxy that authenticates, "
                "or add --insecure if anybody there may read and write"
            )
        found += [
            f"allowed_origins names {origin!r}, which is no origin: write scheme://host or scheme://host:port"
            for origin in self.allowed_origins
            if not _is_origin(origin)
        ]
        if self.intake_retained * 2 > self.intake_max:
            found.append("intake_retained is more than half of intake_max: the intake would be full of applied entries")
        return found + self._webhook_faults()

    def _webhook_faults(self) -> list[str]:
        if self.webhook_url is None:
            return []
        found = []
        if not _is_secure(self.webhook_url):
            found.append(
                "webhook_url is neither https nor http on loopback: whoever is on the way could read every event"
            )
        if self.webhook_secret is None:
            found.append(
                "webhook_url is set and webhook_secret is not: the receiver could not tell our events from anybody's; "
                "set AUCTION_TIMER_WEBHOOK_SECRET"
            )
        elif not _is_signing_secret(self.webhook_secret):
            found.append(
                "webhook_secret begins with whsec_, and what follows is no base64: copy it again, without spaces"
            )
        return found

    @classmethod
    def load(cls, **options: Any) -> "Settings":
        """Read the environment and `.env`; `options` that are not None go before both.

        Raises:
            SettingsError: a value is wrong, or an `AUCTION_TIMER_*` name is unknown.
        """
        reading = cls.read(**options)
        if reading.faults:
            raise SettingsError(reading.faults)
        return reading.settings

    @classmethod
    def read(cls, **options: Any) -> "Reading":
        """As `load`, but what is wrong is told beside what is not."""
        given = {name: value for name, value in options.items() if value is not None}
        env_file: Path | None = ENV_FILE
        faults: list[str] = []
        names = sorted(os.environ)
        try:
            names += _env_file_names()
        except (UnicodeDecodeError, OSError) as error:
            env_file = None
            faults.append(_env_file_fault(error))
        known = {PREFIX + name.upper() for name in cls.model_fields}
        faults += [
            f"{name} is no setting; see docs/configuration.md"
            for name in names
            if name.upper().startswith(PREFIX) and name.upper() not in known
        ]
        try:
            return Reading(cls(_env_file=env_file, **given), faults, frozenset())
        except ValidationError as error:
            found = error.errors(include_input=False, include_url=False)
        faults += [f"{_named(fault, given)} {_wording(fault)}" for fault in found]
        wrong = frozenset(str(fault["loc"][0]) for fault in found)
        instead = {name: cls.model_fields[name].get_default(call_default_factory=True) for name in wrong}
        return Reading(cls(_env_file=env_file, **(given | instead)), faults, wrong)


class Reading(NamedTuple):
    """What was found where settings come from."""

    settings: Settings
    """With the default in place of each wrong value."""
    faults: list[str]
    """Wrong values and unknown names, each with what to do."""
    wrong: frozenset[str]
    """The settings whose values are wrong."""


_WORDINGS: Final = {
    "bool_parsing": "must be true or false",
    "greater_than_equal": "must be at least {ge}",
    "int_parsing": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must not be empty",
    "value_error": "{error}",
}
"""Of the faults that a value from the environment can have; pydantic's own words stand for the others."""


def _wording(fault: ErrorDetails) -> str:
    words = _WORDINGS.get(fault["type"])
    return fault["msg"] if words is None else words.format(**fault.get("ctx", {}))


def _named(fault: ErrorDetails, options: Collection[str]) -> str:
    """Where a wrong value came from: the option, else the environment or the file."""
    name, *inside = fault["loc"]
    source = f"--{name}".replace("_", "-") if name in options else f"{PREFIX}{name}".upper()
    return source + "".join(f"[{part}]" for part in inside) + ":"


def _is_secure(url: str) -> bool:
    """Whether nobody on the way can change what a URL answers: https, or http on this machine."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname and (parts.port or 443) > 0) and (
            parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))
        )
    except ValueError:  # such as "http://["
        return False


def _is_origin(text: str) -> bool:
    """Whether a browser can name this as the origin of a page (RFC 6454, section 6.1); it may end in a slash."""
    text = text.lower().removesuffix("/")
    try:
        parts = urlsplit(text)
        is_whole = bool(parts.scheme and parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
    return is_whole and text == f"{parts.scheme}://{parts.netloc}" and not set("*@ ") & set(parts.netloc)


def _is_signing_secret(secret: str) -> bool:
    """Whether a secret is plain, or `whsec_` and base64 (Standard Webhooks)."""
    if not secret.startswith("whsec_"):
        return True
    try:
        return bool(b64decode(secret.removeprefix("whsec_"), validate=True))
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _env_file_names() -> list[str]:
    from dotenv import dotenv_values

    return list(dotenv_values(ENV_FILE)) if ENV_FILE.is_file() else []


def _env_file_fault(error: UnicodeDecodeError | OSError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{ENV_FILE} is not UTF-8 (byte {error.start}): save it as UTF-8, or set the environment instead"
    return f"{ENV_FILE} cannot be read ({error.strerror or error}): correct its mode, or set the environment instead"
