"""The correlation id of a request: what a client may bring to find its request in our logs, and is told if it brings none."""

import re
from typing import Final
from uuid import uuid4

HEADER: Final = "X-Correlation-Id"
_ECHOED: Final = re.compile(r"[!-~]{1,128}")


def correlation_id_of(given: str) -> str:
    """The id that a request brought, if it can be echoed into a header and a log; else a new one."""
    return given if _ECHOED.fullmatch(given) else new_correlation_id()


def new_correlation_id() -> str:
    """An id for a request that brought none."""
    return f"req-{uuid4().hex}"
