"""Which pages may use the API: browsers say where a page came from, and a page from elsewhere is refused.

Without this any web page could open sockets to, or post events at, a gateway on somebody's own machine (cross-site WebSocket
hijacking), or reach it under a name of its own that resolves to 127.0.0.1 (DNS rebinding).
"""

import ipaddress
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

LOCAL_ENDS: Final = (".localhost", ".localdomain")
"""Of names that no public DNS gives out (RFC 6761, section 6.3)."""


class OriginRule:
    """Decides on an `Origin` header.

    Args:
        allowed: origins that always may, such as `https://bids.example`.
        loopback_only: the gateway is bound to loopback; its own origin then has a loopback name.
        is_open: nobody needs a token.
    """

    def __init__(self, allowed: Sequence[str], *, loopback_only: bool, is_open: bool) -> None:
        self.allowed = frozenset(origin.rstrip("/").lower() for origin in allowed)
        self._names = {urlsplit(origin).hostname for origin in self.allowed - {"*"}}
        self._loopback_only = loopback_only
        self._is_open = is_open

    def admits(self, origin: str | None, host: str | None) -> bool:
        """Whether a request with this `Origin` and `Host` may pass. Programs send no origin, and pass."""
        if origin is None or origin.lower() in self.allowed:
            return True
        try:
            parts = urlsplit(origin.lower())
        except ValueError:  # such as "http://["
            return False
        if not host or parts.netloc != host.lower():
            return False
        return not self._loopback_only or _is_loopback(parts.hostname or "")

    def answers_to(self, host: str | None) -> bool:
        """Whether a request that only reads may name this `Host`.

        A page that has its own name resolve to 127.0.0.1 reads what is there as its own, and sends no `Origin`. Where
        everybody on this machine may read everything, the name is all that tells it from a program of this machine. Such
        a name is one of the public DNS: it has a dot, and is no address.
        """
        if not host or not self._loopback_only or not self._is_open:
            return True
        try:
            name = urlsplit(f"//{host.lower()}").hostname or ""
        except ValueError:
            return False
        return "." not in name.rstrip(".") or name.endswith(LOCAL_ENDS) or name in self._names or _is_address(name)


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
