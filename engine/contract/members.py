r"""Members of the sorted sets: auction ids, and what else a hand has put there.

What is no auction id needs a name nevertheless, by which it is listed and written down. The name is the member,
percent-encoded from its first byte on, so it begins as no auction id does and sorts before them all.

    b"lot-7"          lot-7
    b"\xff\xfe bad"   %FF%FE%20bad
    b"bad id"         %62ad%20id
    b""               %
"""

from typing import Final
from urllib.parse import quote, unquote_to_bytes

from engine.contract.intake import AUCTION_ID

NAME_CHARS_MAX: Final = 512


def name_of(member: bytes) -> str | None:
    """The name of a member of a sorted set; None if it is none of ours and too long to be named."""
    text = member.decode("latin-1")
    if AUCTION_ID.fullmatch(text):
        return text
    name = f"%{member[0]:02X}{quote(member[1:], safe='')}" if member else "%"
    return name if len(name) <= NAME_CHARS_MAX else None


def member_of(name: str) -> bytes:
    """The member that has this name."""
    if not name.startswith("%"):
        return name.encode()
    return b"" if name == "%" else unquote_to_bytes(name)
