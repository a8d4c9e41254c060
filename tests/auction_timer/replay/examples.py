"""Histories and plans for the tests of the replay."""

from auction_timer.replay.history import COLUMNS, PastAuction, parse_history
from auction_timer.replay.plan import PastPolicy, Plan, make_plan
from engine.domain.instants import MINUTE_MS, EpochMs

STARTS_AT = EpochMs(1_800_000_000_000)
SPEED = 1_440.0
"""A day is a minute."""

# Two auctions. The first has two bids in its last quarter of an hour (0.9896 days on), the second one late bid.
ROWS = """\
x1,Watch,1,10,0.5,10,ann
x1,Watch,1,10,0.995,12.5,bob
x1,Watch,1,10,0.998,12,ann
x2,Console,2,1,0.25,1,cleo
x2,Console,2,1,2.5,2,dan
"""


def csv_text(rows: str = ROWS, header: str = ",".join(COLUMNS)) -> str:
    """A file."""
    return f"{header}\n{rows}"


def history(rows: str = ROWS) -> tuple[PastAuction, ...]:
    """The auctions of some rows."""
    return parse_history(csv_text(rows).splitlines(keepends=True))


def plan(rows: str = ROWS, *, speed: float = SPEED, policy: PastPolicy | None = None) -> Plan:
    """A plan for them."""
    wanted = policy or PastPolicy(window_ms=15 * MINUTE_MS)
    return make_plan(history(rows), starts_at=STARTS_AT, speed=speed, policy=wanted, prefix="p")
