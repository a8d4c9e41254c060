"""Settings of every role: environment `AUCTION_TIMER_*`, a `.env` file, or options of the command line.

One class for all roles, because one environment serves them all, and a name nobody knows must be an error.
"""

import ipaddress
import os
from base64 import b64decode
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.contract.keys import SHARDS_MAX
from engine.domain.instants import HOUR_MS
from engine.domain.withdrawal import WINDOW_MINUTES_MAX
from engine.store.limits import StoreLimits

PREFIX = "AUCTION_TIMER_"


class SettingsError(ValueError):
    """The settings cannot be used. The message lists every fault, each with what to do."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Settings(BaseSettings):
    """The effective settings of a process."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True)

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
    webhook_types: list[str] = Field(
        default_factory=lambda: ["offers.*", "auction_timer_*", "timer.*"],
        description='Types of outbound events that are posted, as a JSON list of patterns such as `["offers.*"]`.',
    )
    webhook_attempts_max: int = Field(
        20, ge=1, le=1_000, description="Attempts to post an event before it is put aside, about 15 minutes by default."
    )
    token: str | None = Field(
        None, repr=False, description="Token that the command line sends to a gateway. Servers do not read it."
    )
    allowed_origins: list[str] = Field(
        default_factory=list,
        description='Origins of pages that may use the API, as a JSON list, e.g. `["https://bids.example"]`. '
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
        25_000,
        ge=0,
        le=600_000,
        description="How long a gateway that stops waits for the close of auctions in their last minute, in ms.",
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
    updates_max: int = Field(100_000, ge=1_000, description="Events per shard that a client can catch up on.")
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
    def load(cls, **options: Any) -> Self:
        """Read the environment and `.env`; `options` that are not None go before both.

        Raises:
            SettingsError: a value is wrong, or an `AUCTION_TIMER_*` name is unknown.
        """
        known = {PREFIX + name.upper() for name in cls.model_fields}
        unknown = [name for name in sorted(os.environ) if name.startswith(PREFIX) and name not in known]
        unknown += [name for name in _env_file_names() if name.startswith(PREFIX) and name not in known]
        faults = [f"{name} is no setting; see docs/configuration.md" for name in unknown]
        try:
            settings = cls(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            faults += [
                f"{PREFIX}{'_'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}"
                for fault in error.errors(include_input=False, include_url=False)
            ]
            raise SettingsError(faults) from None
        if faults:
            raise SettingsError(faults)
        return settings


def _is_secure(url: str) -> bool:
    """Whether nobody on the way can change what a URL answers: https, or http on this machine."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname and (parts.port or 443) > 0) and (
            parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))
        )
    except ValueError:  # such as "http://["
        return False


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

    path = Path(".env")
    return [name.upper() for name in dotenv_values(path)] if path.is_file() else []
