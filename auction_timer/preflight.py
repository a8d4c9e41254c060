"""What keeps settings from being used, found before anything is started: `check-config`, `serve` and each role ask here.

`Settings.faults` holds the settings against each other. Here is also looked at what they name: URLs, files, programs, the
limits of this process. Nothing is created and nobody is asked. Each check imports what it needs only where there is something
to check: a role that is restarted in the last seconds of an auction must not wait for libraries it has no use for.
"""

from collections.abc import Callable
from enum import Enum, unique

from auction_timer.errors import DataDirError, ServerBinaryError
from engine.settings import Settings, SettingsError


@unique
class Role(Enum):
    """What is to be started."""

    SERVE = "serve"
    ENGINE = "engine"
    GATEWAY = "gateway"
    RECONCILER = "reconciler"


def faults_of(settings: Settings, role: Role) -> list[str]:
    """Everything that is wrong with the settings of a role, each with what to do; empty if nothing is."""
    return settings.faults() + [fault for check in _CHECKS[role] for fault in check(settings)]


def usable(settings: Settings, role: Role) -> Settings:
    """The same settings, if the role can be started with them.

    Raises:
        SettingsError: with every fault, each with what to do. A role that is started alone has no embedded Redis, so
            not to name one is a fault of all but `serve`.
    """
    if role is not Role.SERVE and settings.redis_url is None:
        raise SettingsError(
            [
                "no Redis is named: give --redis-url or AUCTION_TIMER_REDIS_URL, or run everything with `auction-timer serve`"
            ]
        )
    if faults := faults_of(settings, role):
        raise SettingsError(faults)
    return settings


def _redis_url(settings: Settings) -> list[str]:
    if settings.redis_url is None:
        return []
    from engine.clock import SystemClock
    from engine.store.link import RedisLink, RedisUrlError

    try:
        RedisLink(settings.redis_url, SystemClock())
    except (RedisUrlError, ValueError) as error:  # redis-py's own for a query that it cannot read
        return [f"redis_url: {error}"]
    return []


def _audit_url(settings: Settings) -> list[str]:
    if settings.audit_url is None:
        return []
    from engine.store.archive import ArchiveUrlError, AuditArchive

    try:
        AuditArchive(settings.audit_url)
    except ArchiveUrlError as error:
        return [f"AUCTION_TIMER_AUDIT_URL: {error}"]
    return []


def _server_binary(settings: Settings) -> list[str]:
    if settings.redis_url is not None:
        return []
    from auction_timer.embedded import find_server_binary

    try:
        find_server_binary(settings.server_binary)
    except ServerBinaryError as error:
        return [f"server_binary: {error}"]
    return []


def _data_dir(settings: Settings) -> list[str]:
    if settings.redis_url is not None:
        return []  # then it holds the archive at most, which is tried again until it can be written
    from auction_timer.embedded import refuse_unusable, socket_path_for

    try:
        data_dir = settings.data_dir.expanduser().absolute()
        refuse_unusable(data_dir)
        socket_path_for(data_dir.resolve())
    except (DataDirError, RuntimeError) as error:  # pathlib's own for `~somebody` who has no home
        return [f"data_dir: {error}"]
    return []


def _open_files(settings: Settings) -> list[str]:
    from gateway.descriptors import fitting

    try:
        fitting(settings)
    except SettingsError as error:
        return error.faults
    return []


def _tokens(settings: Settings) -> list[str]:
    if not settings.wants_tokens:
        return []
    from engine.clock import AuctionClock, SystemClock
    from gateway.tokens import tokens_of

    try:
        tokens_of(settings, AuctionClock(SystemClock()))
    except SettingsError as error:
        return error.faults
    return []


def _key_file(settings: Settings) -> list[str]:
    """Only of a first start: a gateway that runs again waits for a file that is just being written."""
    if settings.jwks_file is None or not settings.jwks_file.is_file():
        return []
    from gateway.jwks import FileSource, KeysError, parse_jwks

    try:
        parse_jwks(FileSource(settings.jwks_file).read_now())
    except KeysError as error:
        return [f"jwks_file {settings.jwks_file}: {error}; put a key set there (RFC 7517)"]
    return []


_CHECKS: dict[Role, tuple[Callable[[Settings], list[str]], ...]] = {
    Role.SERVE: (_redis_url, _server_binary, _data_dir, _audit_url, _open_files, _tokens, _key_file),
    Role.ENGINE: (_redis_url,),
    Role.GATEWAY: (_redis_url, _audit_url, _open_files),
    Role.RECONCILER: (_redis_url, _audit_url),
}
