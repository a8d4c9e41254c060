"""`auction-timer ops troubleshooting`: what could not be applied, and what an operator does about it (R29, R30, R32)."""

import asyncio
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import orjson
from rich.console import Console
from rich.table import Table

from auction_timer.client import Api, ClientError
from auction_timer.processes import EXIT_USAGE
from auction_timer.roles import EXIT_FAILURE, EXIT_OK, loop_factory

WIDTH_PIPED: Final = 200
"""Columns where stdout is no terminal: wide enough that a row stays a line."""

T = TypeVar("T")


def show_parked(
    *, url: str, token: str | None, error_code: str | None, event_type: str | None, limit: int, as_json: bool
) -> int:
    """Print up to `limit` commands, the longest waiting first, as a table or as JSON Lines; the exit code."""

    async def work(api: Api) -> int:
        filters = {name: value for name, value in (("error_code", error_code), ("event_type", event_type)) if value}
        found, depth = await api.parked(limit=limit, **filters)
        if as_json:
            for command in found:
                print(orjson.dumps(command).decode())
        else:
            _print_table(found, depth)
        return EXIT_OK

    return _run(work, error_code, event_type, url=url, token=token)


def retry(command_id: str, *, url: str, token: str | None, reason: str | None, operator: str, shard: int | None) -> int:
    """Send one command round again; the exit code."""

    async def work(api: Api) -> int:
        await api.retry_parked(command_id, reason=reason, operator=operator, shard=shard)
        print(f"{command_id} is in the intake again; `ops troubleshooting list` shows it if it fails once more")
        return EXIT_OK

    return _run(work, command_id, reason, operator, url=url, token=token)


def cancel(
    command_id: str, *, url: str, token: str | None, reason: str, operator: str | None, shard: int | None
) -> int:
    """Cancel one command for good; the exit code."""

    async def work(api: Api) -> int:
        command = await api.cancel_parked(command_id, reason=reason, operator=operator, shard=shard)
        told = f", and {command['reply_to']} was told" if command.get("reply_to") else ""
        print(f"{command_id} is CANCELED{told}")
        return EXIT_OK

    return _run(work, command_id, reason, operator, url=url, token=token)


def requeue(
    *, url: str, token: str | None, error_code: str | None, event_type: str | None, limit: int, operator: str
) -> int:
    """Send up to `limit` commands round again; the exit code, non-zero if one was refused."""

    async def work(api: Api) -> int:
        counts = await api.requeue(limit=limit, error_code=error_code, event_type=event_type, operator=operator)
        print("  ".join(f"{name} {counts[name]}" for name in ("requeued", "refused", "pending")))
        return EXIT_FAILURE if counts["refused"] else EXIT_OK

    return _run(work, error_code, event_type, operator, url=url, token=token)


def _run(work: Any, *said: str | None, url: str, token: str | None) -> int:
    try:
        "".join(filter(None, said)).encode()
    except UnicodeEncodeError:
        print("auction-timer: an argument, or USER in the environment, holds bytes that are no UTF-8", file=sys.stderr)
        return EXIT_USAGE

    async def connected() -> int:
        async with Api(url, token=token) as api:
            return int(await work(api))

    try:
        return _finish(connected())
    except ClientError as error:
        print(f"auction-timer: {error}", file=sys.stderr)
        return EXIT_FAILURE


def _finish(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)


def _print_table(commands: list[dict[str, Any]], depth: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_PIPED)
    if commands:
        table = Table("command", "shard", "type", "first seen", "attempts", "error", box=None, pad_edge=False)
        for command in commands:
            table.add_row(
                str(command["command_id"]),
                str(command["shard"]),
                str(command.get("event_type") or "?"),
                _moment(command.get("first_seen_at")),
                str(command.get("attempts", "?")),
                f"{command.get('error_code')}: {command.get('error')}",
            )
        console.print(table)
    console.print(f"{depth} in troubleshooting" + (f", {len(commands)} shown" if len(commands) != depth else ""))


def _moment(at: object) -> str:
    if not isinstance(at, int):
        return "?"
    return datetime.fromtimestamp(at / 1_000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
