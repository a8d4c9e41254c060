"""The catalogue of close codes: what each means, and what a client does.

4000-4099 the auction is over: stop. 4100-4199 ours: come back with `since`. 4400-4499 the client's: mend it, then come back.
The code is also the label of `auctions_gateway_disconnects_total`.
"""

import ast
import inspect
from enum import IntEnum
from functools import cache


class CloseCode(IntEnum):
    """Why the gateway closes a socket."""

    GOING_AWAY = 1001
    """Draining. The reason is `{"retry_after_ms","jitter_ms"}`: come back with `since` after the jitter."""
    AUCTION_OVER = 4000
    """Nothing more will come. Stop."""
    SLOW_CONSUMER = 4101
    """The socket did not read within its bounds. Come back with `since`."""
    FEED_LOST = 4102
    """The gateway cannot follow the auction any more. Come back."""
    BAD_MESSAGES = 4400
    """Three messages that are not in the protocol."""
    TOKEN_EXPIRED = 4401
    """The token has expired; never in the last minute of an auction. Renew it, then come back with `since`."""
    HEARTBEAT_MISSED = 4408
    """No answer to a ping."""
    TOO_MANY = 4429
    """More messages than allowed. Back off."""


@cache
def meanings() -> dict[CloseCode, str]:
    """What each code means and what a client does: the docstrings of the catalogue, for the pages made from it."""
    (catalogue,) = ast.parse(inspect.getsource(CloseCode)).body
    assert isinstance(catalogue, ast.ClassDef)
    said = {}
    for node, behind in zip(catalogue.body, catalogue.body[1:], strict=False):
        if isinstance(node, ast.Assign) and isinstance(behind, ast.Expr):
            assert isinstance(node.targets[0], ast.Name)
            assert isinstance(behind.value, ast.Constant)
            said[CloseCode[node.targets[0].id]] = str(behind.value.value)
    return said
