"""The Lua scripts, each a file with a KEYS / ARGV / returns header, loaded by name."""

from hashlib import sha1
from importlib.resources import files


class Script:
    """One script: its source, and the SHA-1 under which Redis knows it."""

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = files(__name__).joinpath(f"{name}.lua").read_bytes()
        self.sha = sha1(self.source, usedforsecurity=False).hexdigest()


APPEND = Script("append")
COMMIT = Script("commit")
DELIVER = Script("deliver")
CLAIM = Script("claim")
RENEW = Script("renew")
RELEASE = Script("release")
VIEW = Script("view")
ROWS = Script("rows")
OBSERVE = Script("observe")
PENDING = Script("pending")
FORWARD = Script("forward")
