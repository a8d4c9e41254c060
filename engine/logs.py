"""Structured logs on stderr: one event a line, a name and its values. Secrets never get here: URLs are logged without
their user part, bodies and tokens not at all."""

import logging
import re
import sys
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import structlog


def configure(role: str, *, form: str, level: str) -> None:
    """Set the process's log form (`json` or `text`) and least level; `role` stands on every line."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s [%(levelname)s] %(name)s %(message)s"
    )


def without_secrets(url: str) -> str:
    """A URL as it may be logged: user and password replaced, also where they stand in the query."""
    try:
        parts = urlsplit(url)
    except ValueError:  # such as "http://[": where its password ends nobody can tell
        return "***"
    userinfo, at, host = parts.netloc.rpartition("@")
    shown = urlunsplit(parts._replace(netloc=f"***@{host}")) if at and userinfo else url
    return re.sub("(?<=username=|password=)[^&]*", "***", shown)


def without_query(url: str) -> str:
    """As `without_secrets`, for a URL of somebody's service, where every value of the query may be a key or a signature."""
    shown, mark, _ = without_secrets(url).partition("?")
    return f"{shown}?***" if mark else shown
