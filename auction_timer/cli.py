"""The command line, `auction-timer`. Each command reads its options, and calls what does the work."""

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from auction_timer import __version__
from auction_timer.durations import read_duration
from auction_timer.instants import read_instant
from engine.domain.policy import ExtensionMode
from engine.settings import Settings, SettingsError

app = typer.Typer(
    name="auction-timer",
    help="Realtime auction timers: never early, never twice, never unfair to a bid that was in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
audit_app = typer.Typer(
    name="audit", help="Verify and export the audit log, archive and stream together.", no_args_is_help=True
)
app.add_typer(audit_app)
ops_app = typer.Typer(name="ops", help="What operators do.", no_args_is_help=True)
app.add_typer(ops_app)
troubleshooting_app = typer.Typer(
    name="troubleshooting", help="Commands that could not be applied: look, retry, cancel.", no_args_is_help=True
)
ops_app.add_typer(troubleshooting_app)

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        help="redis://, rediss://, unix://, redis+sentinel://h:p,h:p/SERVICE or redis+cluster://h:p,h:p. "
        "Also AUCTION_TIMER_REDIS_URL.",
        show_default=False,
    ),
]
Host = Annotated[str | None, typer.Option(help="Address to bind.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.", show_default="8080")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the embedded store keeps its data.", show_default="./auction-timer-data")
]
Insecure = Annotated[
    bool | None,
    typer.Option(
        "--insecure", help="Bind a public address although anybody there may read and write.", show_default=False
    ),
]
Url = Annotated[str, typer.Option(help="A gateway.")]
AuditUrl = Annotated[
    str | None,
    typer.Option(
        help="SQL database of the archive; audit.sqlite3 in the data dir if not given. Also AUCTION_TIMER_AUDIT_URL.",
        show_default=False,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Sent to the gateway. Better in AUCTION_TIMER_TOKEN: everyone on a machine may read its command lines.",
        show_default=False,
    ),
]
CommandId = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]
CommandShard = Annotated[
    int | None,
    typer.Option("--shard", min=0, help="Which of several of this id, as `list` shows it.", show_default=False),
]
ErrorCode = Annotated[str | None, typer.Option(help="Only commands with this error.", show_default=False)]
EventTypeName = Annotated[str | None, typer.Option(help="Only commands of this type.", show_default=False)]
Operator = Annotated[str, typer.Option(help="Who is recorded; with a token it is the token's subject.", envvar="USER")]
Parent = Annotated[int | None, typer.Option(hidden=True)]
Alive = Annotated[int | None, typer.Option(hidden=True)]

DEFAULT_URL = "http://127.0.0.1:8080"
EXIT_USAGE = 2
EXIT_CONFIG = 78


def _settings(**options: Any) -> Settings:
    try:
        return Settings.load(**options)
    except SettingsError as error:
        for fault in error.faults:
            typer.echo(f"auction-timer: {fault}", err=True)
        raise typer.Exit(EXIT_CONFIG) from None


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"auction-timer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Realtime auction timers: never early, never twice, never unfair to a bid that was in time."""


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    gateways: Annotated[int, typer.Option(min=1, max=64, help="Gateway processes that share the port.")] = 1,
    insecure: Insecure = None,
) -> None:
    """Run everything on one machine: store, engine, reconciler, gateways.

    Prints `ready http://HOST:PORT` when it is. Without --redis-url it runs a private server that keeps its data in the
    data dir. Ctrl-C drains and stops. The reconciler archives the audit log and repairs drift.
    """
    from auction_timer import roles

    settings = _settings(host=host, port=port, data_dir=data_dir, redis_url=redis_url, insecure=insecure)
    _exit(roles.serve(settings, gateways=gateways))


@app.command()
def engine(redis_url: RedisUrl = None, parent: Parent = None, alive: Alive = None) -> None:
    """Run one engine against a Redis: it claims the shards it can get and keeps them."""
    from auction_timer import roles

    _exit(roles.engine(_settings(redis_url=redis_url), parent=parent, alive=alive))


@app.command()
def gateway(
    redis_url: RedisUrl = None,
    host: Host = None,
    port: Port = None,
    insecure: Insecure = None,
    parent: Parent = None,
    alive: Alive = None,
    fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one gateway against a Redis: HTTP and sockets."""
    from auction_timer import roles

    settings = _settings(redis_url=redis_url, host=host, port=port, insecure=insecure)
    _exit(roles.gateway(settings, parent=parent, alive=alive, fd=fd))


@app.command()
def reconciler(
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    once: Annotated[
        bool, typer.Option("--once", help="One pass, then exit: 0 nothing found, 1 drift, 69 no Redis.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="With --once: print a table of what was found and done.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --once: repair nothing.")] = False,
    parent: Parent = None,
    alive: Alive = None,
) -> None:
    """Run one reconciler against a Redis: it compares every live auction with the audit log, and repairs what drifted.

    It also archives the audit log into SQL (AUCTION_TIMER_AUDIT_URL); without that URL the archive is `audit.sqlite3` in the
    data dir. A single pass leaves the repairs to the reconciler that runs, if there is one.
    """
    settings = _settings(redis_url=redis_url, data_dir=data_dir)
    if once:
        from auction_timer import reconcile

        _exit(reconcile.once(settings, printing=report, repairing=not dry_run))
    if report or dry_run:
        raise typer.BadParameter("--report and --dry-run go with --once")
    from auction_timer import roles

    _exit(roles.reconciler(settings, parent=parent, alive=alive))


def _duration(text: str) -> int:
    try:
        return read_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _instant(text: str) -> int:
    try:
        return read_instant(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def emit(
    file: Annotated[str, typer.Argument(help="JSON Lines, one event a line; - reads stdin.")] = "-",
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send events to a gateway, in batches; prints how many were accepted, duplicate, rejected.

    Exit code 1 if any was rejected, and the reasons with their line numbers on stderr. Sending a file twice is safe.
    """
    from auction_timer import commands

    _exit(commands.emit(file, url=url, token=_settings(token=token).token))


@app.command()
def replay(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE.csv", help="A bid history; `sample` plays the one that comes with the program."),
    ],
    speed: Annotated[float, typer.Option(help="How many times faster than it was; policy durations too.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    window: Annotated[int, typer.Option(parser=_duration, metavar="DURATION", help="Soft-close window.")] = "15m",  # type: ignore[assignment]
    extension: Annotated[int, typer.Option(parser=_duration, metavar="DURATION", help="Extension per bid.")] = "15m",  # type: ignore[assignment]
    total_cap: Annotated[
        int, typer.Option(parser=_duration, metavar="DURATION", help="Most that all extensions may add.")
    ] = "24h",  # type: ignore[assignment]
    mode: Annotated[ExtensionMode, typer.Option(help="How an extension moves the end.")] = ExtensionMode.RESET_TO,
    max_extensions: Annotated[int | None, typer.Option(min=0, help="Most extensions per auction.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Play only the first so many auctions.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="Rows of the table; all if not given.", show_default=False)
    ] = None,
) -> None:
    """Play a bid history against a running server, time compressed, and judge what the server made of it.

    Columns: auction_id,item,duration_days,opening_bid,bid_days,bid,bidder. Ends with a table per auction. Exit code 1 if an
    auction did not end exactly once, closed early, or was extended otherwise than the rules say.
    """
    from auction_timer import commands

    _exit(
        commands.replay(
            file,
            rows_max=rows,
            url=url,
            token=_settings(token=token).token,
            speed=speed,
            window_ms=window,
            extension_ms=extension,
            total_cap_ms=total_cap,
            mode=mode,
            max_extensions=max_extensions,
            limit=limit,
        )
    )


@app.command()
def watch(
    auction_id: Annotated[str, typer.Argument(metavar="AUCTION_ID", help="As it was registered.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Show a live countdown from the socket, with drift and connection state, until the auction is over."""
    from auction_timer import commands

    _exit(commands.watch(auction_id, url=url, token=_settings(token=token).token))


@app.command()
def simulate(
    seed: Annotated[int | None, typer.Option(help="Replays exactly what it did before.", show_default="random")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many seeds, from --seed on, on all cores.")] = 1,
    small: Annotated[
        bool, typer.Option("--small", help="Five auctions in half a minute, with a fault every few seconds.")
    ] = False,
    auctions: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="How many auctions there are.", show_default="100")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0.01, max=366, help="Virtual days in which they start.", show_default="1")
    ] = None,
    faults: Annotated[
        bool, typer.Option(help="Crashes, pauses, failovers, clocks that step, calls that get lost.")
    ] = True,
) -> None:
    """Run engines, gateways and a reconciler on virtual time against seeded work and faults, and judge what they did.

    Prints SEED first. Of one seed it prints what happened, and the hash of all of it last; of several those that fail, each
    with the command that replays it. Exit code 1 if a promise was broken.
    """
    from auction_timer.simulation import report

    if small and (auctions is not None or days is not None):
        raise typer.BadParameter("--small has its own auctions and days")
    if small:
        options = report.small_plans(faults=faults)
    else:
        options = report.plans_of_days(auctions=auctions or 100, days=days or 1, faults=faults)
    _exit(report.play(options, first=seed, seeds=seeds))


@audit_app.command("verify")
def audit_verify(redis_url: RedisUrl = None, data_dir: DataDir = None, audit_url: AuditUrl = None) -> None:
    """Check the hash chain of every shard, from its first record in the archive to its last one in Redis.

    Prints records and head of each shard, and the first broken link of each. Exit code 1 if any is broken. Without a Redis
    that answers it checks the archive alone, and says so.
    """
    from auction_timer import audit

    _exit(audit.verify(_settings(redis_url=redis_url, data_dir=data_dir, audit_url=audit_url)))


@audit_app.command("export")
def audit_export(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; stdout if not given.", show_default=False)
    ] = None,
    form: Annotated[
        Literal["jsonl", "csv"], typer.Option("--format", help="JSON Lines, whose hashes anyone can check, or CSV.")
    ] = "jsonl",
    auction: Annotated[str | None, typer.Option(metavar="ID", help="Only this auction.", show_default=False)] = None,
    since: Annotated[
        int | None,
        typer.Option(parser=_instant, metavar="TIME", help="From this `occurred_at` on: RFC 3339 or epoch ms."),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(parser=_instant, metavar="TIME", help="Before this `occurred_at`: RFC 3339 or epoch ms."),
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    audit_url: AuditUrl = None,
) -> None:
    """Write audit records in order of shard and number, from the archive and, as far as not archived yet, from Redis.

    JSON Lines: `{"shard": 3, "record": {...}}`. A record's `hash` is SHA-256 of its other fields as compact JSON in UTF-8
    with sorted keys; its `prev_hash` is the `hash` of the record before it, 64 zeros before the first.
    """
    from auction_timer import audit

    if since is not None and until is not None and since >= until:
        raise typer.BadParameter("--until must be later than --since: between the two lies nothing")
    settings = _settings(redis_url=redis_url, data_dir=data_dir, audit_url=audit_url)
    _exit(audit.export(settings, form=form, auction_id=auction, since=since, until=until, output=output))


@troubleshooting_app.command("list")
def ops_list(
    error_code: ErrorCode = None,
    event_type: EventTypeName = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most commands to show.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines with the payload, not a table.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List commands in troubleshooting, the longest waiting first."""
    from auction_timer import ops

    _exit(
        ops.show_parked(
            url=url,
            token=_settings(token=token).token,
            error_code=error_code,
            event_type=event_type,
            limit=limit,
            as_json=as_json,
        )
    )


@troubleshooting_app.command("retry")
def ops_retry(
    command_id: CommandId,
    reason: Annotated[str | None, typer.Option(help="Why, for the audit.", show_default=False)] = None,
    operator: Operator = "operator",
    shard: CommandShard = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send a command round again: it enters at the end of the intake, and arrives now."""
    from auction_timer import ops

    token = _settings(token=token).token
    _exit(ops.retry(command_id, url=url, token=token, reason=reason, operator=operator, shard=shard))


@troubleshooting_app.command("cancel")
def ops_cancel(
    command_id: CommandId,
    reason: Annotated[str, typer.Option(help="Why; whoever sent the command is told.")],
    operator: Annotated[
        str | None,
        typer.Option(
            help="Who answers for it; with a token it is the token's subject.", show_default="required without"
        ),
    ] = None,
    shard: CommandShard = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Cancel a command for good."""
    from auction_timer import ops

    token = _settings(token=token).token
    if operator is None and token is None:
        raise typer.BadParameter("name whoever answers for it, or bring a token", param_hint="--operator")
    _exit(ops.cancel(command_id, url=url, token=token, reason=reason, operator=operator, shard=shard))


@troubleshooting_app.command("requeue")
def ops_requeue(
    error_code: ErrorCode = None,
    event_type: EventTypeName = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Most commands to send round.")] = 100,
    operator: Operator = "operator",
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send many commands round again, the longest waiting first, after their cause was mended."""
    from auction_timer import ops

    _exit(
        ops.requeue(
            url=url,
            token=_settings(token=token).token,
            error_code=error_code,
            event_type=event_type,
            limit=limit,
            operator=operator,
        )
    )


@app.command("check-config")
def check_config() -> None:
    """Print the effective settings and everything for which `serve` would refuse to start; exit 1 if there is any.

    Nothing is started and nobody is asked: whether Redis, the archive and the issuer of tokens answer shows later.
    """
    from auction_timer.preflight import Role, faults_of
    from engine import logs

    logs.configure("check-config", form="text", level="warning")
    settings, faults, wrong = Settings.read()
    for name in sorted(set(Settings.model_fields) - wrong):
        value = getattr(settings, name)
        if (name == "token" or name.endswith("_secret")) and value:
            value = "***"
        elif name == "webhook_url" and value:
            value = "***"  # of some services the path is the secret
        elif name == "jwks_url" and value:
            value = logs.without_query(value)
        elif name.endswith("_url") and value:
            value = logs.without_secrets(value)
        typer.echo(f"{name} = {value}")
    faults += faults_of(settings, Role.SERVE)
    for fault in faults:
        typer.echo(f"fault: {fault}", err=True)
    _exit(1 if faults else 0)


def _flowing(text: str) -> str:
    """A docstring without the breaks of its lines, for a terminal of any width; its paragraphs stay."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _group in (app, audit_app, troubleshooting_app):
    for _command in _group.registered_commands:
        assert _command.callback is not None
        _command.help = _flowing(_command.callback.__doc__ or "")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to end
    sys.exit(app())
