"""Room for descriptors: every connection is one, and what the shell allows by default is 1,024."""

import resource
from typing import Final

import structlog

from engine.settings import Settings, SettingsError
from gateway.admission import PLAIN_MIN, plain_connections_max

FILES: Final = 256
"""Descriptors of a gateway beside its connections: Redis, the archive, webhooks, logs, libraries."""

log = structlog.get_logger()


def descriptors_needed(connections_max: int) -> int:
    """Descriptors of a gateway that holds so many sockets, all its bounds reached."""
    return connections_max + 2 * plain_connections_max(connections_max) + FILES


def connections_that_fit(descriptors: int) -> int:
    """The most sockets for which so many descriptors are enough; 0 or less if not even one."""
    free = descriptors - FILES
    return min(free * 2 // 3, free - 2 * PLAIN_MIN)  # half as many plain ones, or the least of them


def fitting(settings: Settings) -> Settings:
    """The settings that fit this process's hard limit of open files.

    Where nobody chose `connections_max`, it becomes what fits.

    Raises:
        SettingsError: the chosen `connections_max` does not fit, or nothing does.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = descriptors_needed(settings.connections_max)
    if hard == resource.RLIM_INFINITY or needed <= hard:
        return settings
    fit = connections_that_fit(hard)
    if "connections_max" in settings.model_fields_set or fit < 1:
        advice = (
            f"connections_max ({settings.connections_max}) needs {needed} open files and this process may have "
            f"{hard}: raise the limit (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile of Docker) or set "
            f"AUCTION_TIMER_CONNECTIONS_MAX to {max(fit, 1)} or less"
        )
        raise SettingsError([advice])
    return settings.model_copy(update={"connections_max": fit})


def make_room(settings: Settings) -> Settings:
    """Raise this process's limit of open files to what `connections_max` needs; the settings that hold then.

    Not to the hard limit: that may be 2^30, and programs that close everything before they start another take it for a
    number worth counting to. Raises as `fitting` does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = fitting(settings)
    if held is not settings:
        log.warning(
            "connections_limited",
            connections_max=held.connections_max,
            open_files=hard,
            wanted=settings.connections_max,
        )
    needed = descriptors_needed(held.connections_max)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return held
