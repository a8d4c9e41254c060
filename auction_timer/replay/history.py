"""A bid history: the auctions of a CSV file, checked, in the order in which the file first names them.

    auction_id,item,duration_days,opening_bid,bid_days,bid,bidder
    1638843936,Cartier wristwatch,7,500,0.478368,500,bidder-1

One row is one bid. `bid_days` counts from the auction's start, so the file needs no dates. Numbers are decimal, and money is
read exactly: 0.29 is 29 minor units, which a binary fraction would make 28.

Which bid changed the leader does not stand in the file. The rule: a bid did iff it is strictly higher than every earlier bid
of its auction *and* by another bidder than the one who leads. Worked example, bids in order:

    a 500    leads, nobody did before           leader changed
    b 800    higher, another bidder             leader changed
    a 600    lower than 800 (a proxy bid)       -
    b 900    higher, but b leads already        -
    a 900    not strictly higher                -
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Final

from engine.contract.intake import AMOUNT_MINOR_MAX

COLUMNS: Final = ("auction_id", "item", "duration_days", "opening_bid", "bid_days", "bid", "bidder")
DAYS_MAX: Final = Decimal(3_650)
"""Ten years. A larger number is a date, or milliseconds, in the wrong column."""
AUCTIONS_MAX: Final = 20_000
"""Each is watched over a socket of its own, and one gateway process takes that many."""
BIDS_MAX: Final = 5_000_000
ITEM_CHARS_MAX: Final = 200
BIDDER_CHARS_MAX: Final = 128


class HistoryError(ValueError):
    """The file is no bid history. `line` and `column` say where; column is None if it is the line as a whole."""

    def __init__(self, line: int, column: str | None, fault: str) -> None:
        where = f"line {line}" if column is None else f"line {line}, column {column}"
        super().__init__(f"{where}: {fault}")
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class PastBid:
    """One bid of the history."""

    at_days: Decimal
    """Days since the auction's start."""
    amount_minor: int
    bidder: str
    leader_changed: bool


@dataclass(frozen=True, slots=True)
class PastAuction:
    """One auction of the history. `bids` are in the order of their time; equal times keep the order of the file."""

    auction_id: str
    item: str
    duration_days: Decimal
    bids: tuple[PastBid, ...]

    @property
    def late_bids(self) -> int:
        """Bids at or after the end that the auction was announced with."""
        return sum(bid.at_days >= self.duration_days for bid in self.bids)


def sample_path() -> Path:
    """The history that comes with the package: twelve real auctions, with late bids and every duration of the full set."""
    return Path(str(resources.files("auction_timer.samples") / "ebay-sample.csv"))


def read_history(path: Path, *, limit: int | None = None) -> tuple[PastAuction, ...]:
    """Read a file; with `limit`, only its first so many auctions (the rest of the file is checked all the same).

    Raises:
        HistoryError: a column is missing, a value is wrong, or there is no bid at all.
        OSError: the file cannot be read.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return parse_history(file, limit=limit)


def parse_history(lines: Iterable[str], *, limit: int | None = None) -> tuple[PastAuction, ...]:
    """The same, from lines.

    Raises:
        HistoryError: as above.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    auctions: dict[str, list[_Row]] = {}
    for count, row in enumerate(_rows(lines), start=1):
        if count > BIDS_MAX:
            raise HistoryError(row.line, None, f"a history has at most {BIDS_MAX} bids")
        rows = auctions.setdefault(row.auction_id, [])
        if rows:
            _check_same(rows[0], row)
        rows.append(row)
        if len(auctions) > AUCTIONS_MAX and limit is None:
            raise HistoryError(row.line, "auction_id", f"more than {AUCTIONS_MAX} auctions: replay fewer, with a limit")
    if not auctions:
        raise HistoryError(1, None, "there is no bid in the file")
    return tuple(_auction(rows) for rows in islice(auctions.values(), limit))


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    auction_id: str
    item: str
    duration_days: Decimal
    bid_days: Decimal
    amount_minor: int
    bidder: str


def _rows(lines: Iterable[str]) -> Iterator[_Row]:
    reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        places = _places(header)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise HistoryError(reader.line_num, None, f"has {len(cells)} values, the header names {len(header)}")
            yield _row(reader.line_num, {name: cells[place].strip() for name, place in places.items()})
    except csv.Error as error:
        raise HistoryError(reader.line_num, None, f"is not CSV: {error}") from None


def _places(header: list[str]) -> dict[str, int]:
    for name in COLUMNS:
        if header.count(name) != 1:
            fault = "is missing" if name not in header else "stands there twice"
            raise HistoryError(1, name, f"{fault}; the columns are {','.join(COLUMNS)}")
    return {name: header.index(name) for name in COLUMNS}


def _row(line: int, cells: dict[str, str]) -> _Row:
    duration_days = _number(line, "duration_days", cells)
    if not 0 < duration_days <= DAYS_MAX:
        raise HistoryError(line, "duration_days", f"must be more than 0 and at most {DAYS_MAX}, not {duration_days}")
    bid_days = _number(line, "bid_days", cells)
    if not 0 <= bid_days <= DAYS_MAX:
        raise HistoryError(line, "bid_days", f"must be from 0 to {DAYS_MAX} days after the start, not {bid_days}")
    _minor(line, "opening_bid", cells)
    return _Row(
        line,
        _text(line, "auction_id", cells, 128),
        _text(line, "item", cells, ITEM_CHARS_MAX),
        duration_days,
        bid_days,
        _minor(line, "bid", cells),
        _bidder(line, cells),
    )


def _number(line: int, column: str, cells: dict[str, str]) -> Decimal:
    try:
        value = Decimal(cells[column])
    except InvalidOperation:
        raise HistoryError(line, column, f"is not a number: {cells[column][:40]!r}") from None
    if not value.is_finite():
        raise HistoryError(line, column, f"is not a number: {cells[column][:40]!r}")
    return value


def _minor(line: int, column: str, cells: dict[str, str]) -> int:
    """Money in minor units (cents); digits below are rounded half to even."""
    amount = _number(line, column, cells)
    if not 0 <= amount <= AMOUNT_MINOR_MAX // 100:
        raise HistoryError(line, column, f"must be from 0 to {AMOUNT_MINOR_MAX // 100}, not {amount}")
    return round(amount * 100)


def _text(line: int, column: str, cells: dict[str, str], chars_max: int) -> str:
    text = cells[column]
    if not 1 <= len(text) <= chars_max or not text.isprintable():
        raise HistoryError(line, column, f"must be 1-{chars_max} printable characters, not {text[:40]!r}")
    return text


def _bidder(line: int, cells: dict[str, str]) -> str:
    bidder = _text(line, "bidder", cells, BIDDER_CHARS_MAX)
    if not bidder.isascii() or " " in bidder:
        raise HistoryError(line, "bidder", f"must be ASCII characters without spaces, not {bidder[:40]!r}")
    return bidder


def _check_same(first: _Row, row: _Row) -> None:
    """What an auction is does not change from bid to bid. Its opening bid may: nothing here depends on it, and the real
    data has an auction with two (3019271858: 0.01 and 1)."""
    for column in ("item", "duration_days"):
        if getattr(first, column) != getattr(row, column):
            raise HistoryError(
                row.line,
                column,
                f"is {getattr(row, column)}, but line {first.line} of the same auction says {getattr(first, column)}",
            )


def _auction(rows: list[_Row]) -> PastAuction:
    ordered = sorted(rows, key=lambda row: row.bid_days)
    changes = leader_changes((row.amount_minor, row.bidder) for row in ordered)
    bids = tuple(
        PastBid(row.bid_days, row.amount_minor, row.bidder, changed)
        for row, changed in zip(ordered, changes, strict=True)
    )
    return PastAuction(rows[0].auction_id, rows[0].item, rows[0].duration_days, bids)


def leader_changes(bids: Iterable[tuple[int, str]]) -> Iterator[bool]:
    """For each bid (amount, bidder) in the order of time: whether it changed the leader."""
    highest, leader = -1, None
    for amount, bidder in bids:
        higher = amount > highest
        yield higher and bidder != leader
        if higher:
            highest, leader = amount, bidder
