"""How many may come in, and how fast: the bounds that keep one gateway from running out of descriptors or of time.

A connection is plain until its handshake is read, and again for as long as it asks over HTTP. Sockets and plain
connections are bounded apart, so that neither can take the other's room. Addresses are those of the peers:
`X-Forwarded-For` is what anybody may write, and is not read.
"""

from collections import Counter
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.clock import Clock
from engine.settings import Settings
from gateway.problems import Problem, ProblemType, problem_response, retry_after

PLAIN_MIN: Final = 256
"""Plain connections that fit however few sockets do."""


def plain_connections_max(connections_max: int) -> int:
    """Plain connections that are served beside so many sockets; beyond twice as many they are cut without an answer.

    A quarter: everyone who comes back after a fall is plain for some milliseconds, but not all at the same time.
    """
    return max(PLAIN_MIN, connections_max // 4)


class TokenBucket:
    """`per_second` in the long run, and as many at once after a quiet second."""

    __slots__ = ("_left", "_per_second", "_since_ns")

    def __init__(self, per_second: int, now_ns: int) -> None:
        self._per_second = per_second
        self._left = float(per_second)
        self._since_ns = now_ns

    def take(self, now_ns: int) -> bool:
        """Take one, if one is there."""
        earned = (now_ns - self._since_ns) / 1e9 * self._per_second
        self._left = min(self._per_second, self._left + earned)
        self._since_ns = now_ns
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Admission:
    """The plain connections of one gateway process, and its handshakes."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.plain_max = plain_connections_max(settings.connections_max)
        self._per_address_max = settings.connections_per_address_max
        self._clock = clock
        self._handshakes = TokenBucket(settings.handshakes_per_second_max, clock.monotonic_ns())
        self._per_address: Counter[str] = Counter()
        self.plain = 0

    def arrived(self, address: str) -> None:
        """A connection was accepted."""
        self._count(address, 1)

    def left(self, address: str) -> None:
        """A connection is gone, or has become a socket."""
        self._count(address, -1)

    def _count(self, address: str, by: int) -> None:
        self.plain += by
        self._per_address[address] += by
        if not self._per_address[address]:
            del self._per_address[address]

    def is_crowded(self, address: str) -> bool:
        """Whether what an address asks for is refused."""
        return self.plain > self.plain_max or self._per_address[address] > self._per_address_max

    def is_flooded(self, address: str) -> bool:
        """Whether not even a refusal can be afforded."""
        return self.plain > 2 * self.plain_max or self._per_address[address] > 2 * self._per_address_max

    def takes_handshake(self) -> bool:
        """Whether one more handshake fits the rate."""
        return self._handshakes.take(self._clock.monotonic_ns())


class Admit:
    """ASGI middleware: requests beyond the bound are answered 503, and their connections closed.

    Not the liveness of the process: who restarts a gateway because it is full makes everyone come back at once.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz" and self._admission.is_crowded(address_of(scope)):
            refused = Problem(
                ProblemType.TOO_MANY_CONNECTIONS,
                "too many connections; try again",
                headers={"Connection": "close", **retry_after()},
            )
            await problem_response(refused, scope["state"]["correlation_id"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


def address_of(scope: Scope) -> str:
    """The address of the peer; empty if it has none, as on a Unix socket."""
    client = scope.get("client")
    return client[0] if client else ""
