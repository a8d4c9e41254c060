"""What the reconciler sees: the log as it grows, the wire as it is heard, and what is kept, each page in one step.

The log is the measure, so it is brought to the very place as of which a page was read (`Observed.chain`). Then what is
compared is one instant, and a busy shard gives no false alarm.

What makes a record part of the log is that the chain leads from it to the head that the shard keeps. The archive may know of
records that a failover took back; they do not link, and whoever folded them would 'repair' an auction to what never was.
"""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice
from typing import Final

import orjson
import structlog

from engine.clock import Clock, MonotonicNs
from engine.contract.audit import ChainHead
from engine.contract.cursors import START
from engine.contract.timers import Holding
from engine.domain.decide import Fact
from engine.store.archive import PAGE, ArchiveUnavailableError, AuditArchive, Selection, misfit, seq_of
from engine.store.audit_reader import AuditReader
from engine.store.protocol import AuditEntry, Group, Lease, Observed, Placed, ReconcilerStore, StoreUnavailableError
from reconciler.drift import Tick, Views
from reconciler.ledger import LogGapError, Told, fold_record

OBSERVED_MAX: Final = 50
"""Auctions read in one step: Redis pauses half a millisecond for them, and serves a commit or a tick before the next ones.
With 200 a pass took as long, and ticks waited twice as long for it."""
PLACES_MAX: Final = 1_000
TICKS_MAX: Final = 1_000_000
"""Auctions whose last tick is remembered, about 400 bytes each; beyond, those heard longest ago are forgotten."""
OVER_KEPT: Final = 4_096
"""Auctions per shard that are over and remembered, so that one left among the deadlines is known."""
SUSPECT_KEPT: Final = 1_000
"""Auctions per shard that are over and of which the log tells something unlawful."""
UNKNOWN_KEPT: Final = 10_000
"""Ids per shard of which the archive knows nothing either, so that it need not be asked in every pass; and of which the log
names no state, so that each time they were repaired is told from the next."""
LISTEN_AGAIN_S: Final = 0.5

log = structlog.get_logger()


class LogMovedBackError(Exception):
    """The log is not the one that was read any more: a failover lost its end. Read it from its beginning."""


class Ledger:
    """The fold of one shard's audit log, up to a place in it."""

    def __init__(self, store: ReconcilerStore, archive: AuditArchive | None, shard: int) -> None:
        self._store = store
        self._archive = archive
        self._shard = shard
        self.begin()

    def begin(self) -> None:
        """Know nothing yet."""
        self.chain = ChainHead()
        self.whole = True
        """Whether the log was read from its very first record on."""
        self.broken: str | None = None
        """Where the log does not link, if it does not. Nothing before that place is counted on."""
        self._links_from = 1
        """The number from which on every record links to the last one."""
        self.told: dict[str, Told] = {}
        self._over: OrderedDict[str, Told] = OrderedDict()
        self.suspect: dict[str, Told] = {}
        """Auctions that are over, closed early or past a cap by their own log."""
        self._after = START
        self._ahead: deque[AuditEntry] = deque()
        self._unknown: set[str] = set()
        self._named: OrderedDict[str, int] = OrderedDict()

    def of(self, auction_id: str) -> Told | None:
        """What the log says of an auction."""
        return self.told.get(auction_id) or self._over.get(auction_id)

    def last_named(self, auction_id: str) -> int:
        """The number of the last record about an auction of which the log does not tell the state; 0 if there is none."""
        return self._named.get(auction_id, 0)

    async def catch_up(self, *, broken_too: bool = True) -> None:
        """Read what the log holds by now: at first all of it, afterwards what is new.

        Raises:
            StoreUnavailableError, ArchiveUnavailableError: one of the two does not answer.
            LogMovedBackError: see `advance`. Or what was read does not link, and that is not wanted: it may have moved
                meanwhile, and reading it once more tells.
        """
        if self.chain.seq > 0:
            await self.advance((await self._store.head(self._shard)).chain)
            return
        await self._read_all()
        if self.broken is not None and not broken_too:
            raise LogMovedBackError(f"the log of shard {self._shard} does not link: {self.broken}")

    async def _read_all(self) -> None:
        walking = AuditReader(self._store, self._archive).surviving(self._shard)
        async with aclosing(walking):
            async for page in walking:
                for entry in page:
                    self._take(entry)
                await asyncio.sleep(0)
        # The id of what came from the archive may be one of a history that is lost.
        self._after = START

    async def advance(self, to: ChainHead) -> None:
        """Fold up to a place that the log has reached.

        Raises:
            LogMovedBackError: that place is before this one, or another record stands here now.
        """
        while self.chain.seq < to.seq:
            if not self._ahead:
                self._ahead.extend(await self._store.audit_entries(self._shard, self._after, PAGE))
            if not self._ahead:
                raise LogMovedBackError(f"record {to.seq} of shard {self._shard} is not in its stream")
            entry = self._ahead.popleft()
            self._after = entry.stream_id
            if (seq_of(entry.fields) or 0) <= self.chain.seq:
                continue  # read before, or no record: what is behind it must link all the same
            if reason := misfit(entry.fields, self.chain):
                raise LogMovedBackError(f"record {self.chain.seq + 1} of shard {self._shard} does not follow: {reason}")
            self._fold(entry.fields)
        if self.chain.seq > to.seq or (to.seq > 0 and self.chain.hash != to.hash):
            raise LogMovedBackError(f"the log of shard {self._shard} went back to record {to.seq}")

    def _take(self, entry: AuditEntry) -> None:
        fields = entry.fields
        seq = seq_of(fields)
        if seq is None:
            return
        before = self.chain
        if before.seq == 0 and seq > 1:
            # Nobody has kept what came before: that contradicts nothing.
            self.whole, self._links_from = False, seq
            before = ChainHead(seq - 1, fields.get("prev_hash", ""))
        if reason := misfit(fields, before):
            self._break_at(seq, fields, reason)
        else:
            self._fold(fields)

    def _break_at(self, seq: int, fields: Mapping[str, str], reason: str) -> None:
        """What came before a record that does not follow is another history, and the record itself is not to be trusted."""
        self.whole, self._links_from = False, seq + 1
        self.chain = ChainHead(seq, fields.get("hash", ""))
        self.broken = f"record {seq}: {reason}"
        for known in (self.told, self._over, self.suspect):
            known.clear()

    def _fold(self, fields: Mapping[str, str]) -> None:
        self.chain = ChainHead(int(fields["seq"]), fields["hash"])
        auction_id = fields.get("auction_id", "")
        if not auction_id:
            return
        try:
            told = fold_record(self.of(auction_id), fields)
        except LogGapError:
            log.exception("audit_record_unreadable", shard=self._shard)
            self.whole = False
            told = None
        if told is None and fields.get("event_type") == Fact.REGISTERED:
            self.whole = False  # by a version that did not record what a registration froze
        self._unknown.discard(auction_id)
        self._keep(auction_id, told)
        if told is None:
            self._named[auction_id] = self.chain.seq
            self._named.move_to_end(auction_id)
            if len(self._named) > UNKNOWN_KEPT:
                self._named.popitem(last=False)

    def _keep(self, auction_id: str, told: Told | None) -> None:
        self.told.pop(auction_id, None)
        self._over.pop(auction_id, None)
        self.suspect.pop(auction_id, None)
        if told is not None and told.is_live:
            self.told[auction_id] = told
        elif told is not None:
            self._over[auction_id] = told
            if len(self._over) > OVER_KEPT:
                self._over.popitem(last=False)
            if (told.breach is not None or told.is_closed_early) and len(self.suspect) < SUSPECT_KEPT:
                self.suspect[auction_id] = told

    async def look_up(self, auction_id: str) -> Told | None:
        """What the log says of an auction that is over for so long that it was forgotten here."""
        told = self.of(auction_id)
        if told is not None or self._archive is None or auction_id in self._unknown:
            return told
        selection, behind = Selection(auction_id), self._links_from - 1
        if await self._archive.walk(self._shard, behind, 1, selection):
            walking = AuditReader(self._store, self._archive).surviving(self._shard, selection, after_seq=behind)
            async with aclosing(walking):
                async for page in walking:
                    for entry in page:
                        if (seq_of(entry.fields) or 0) <= self.chain.seq:
                            with contextlib.suppress(LogGapError):
                                told = fold_record(told, entry.fields)
        if told is None and len(self._unknown) < UNKNOWN_KEPT:
            self._unknown.add(auction_id)
        self._keep(auction_id, told)
        return told


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last line by which an engine said that it is alive."""

    heard: MonotonicNs
    instance: str
    epoch: int
    holding: Holding


class Wire:
    """The tick lane as it was heard last."""

    def __init__(self, store: ReconcilerStore, clock: Clock, shards: int) -> None:
        self._store = store
        self._clock = clock
        self._shards = range(shards)
        self._ticks: OrderedDict[bytes, bytes] = OrderedDict()
        self.heartbeats: dict[int, Heartbeat] = {}
        self.listening_since: MonotonicNs | None = None
        """Since when nothing was missed; None while the lane is lost."""

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            with contextlib.suppress(StoreUnavailableError):
                async with aclosing(self._lane()) as lane:
                    self.listening_since = self._clock.monotonic_ns()
                    async for shard, payload in lane:
                        self.hear(shard, payload)
            self.listening_since = None
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _lane(self) -> AsyncGenerator[tuple[int, bytes], None]:
        lane: AsyncGenerator[tuple[int, bytes], None] = self._store.ticks(self._shards)  # type: ignore[assignment]
        return lane

    def hear(self, shard: int, payload: bytes) -> None:
        """Take one message of the lane. Ticks are kept as they came, and read when they are compared."""
        for line in payload.split(b"\n"):
            auction_id, _, rest = line.partition(b" ")
            if auction_id == b"!":
                with contextlib.suppress(ValueError):
                    self._hear_heartbeat(shard, rest)
                continue
            self._ticks[auction_id] = rest
            self._ticks.move_to_end(auction_id)
        while len(self._ticks) > TICKS_MAX:
            self._ticks.popitem(last=False)

    def _hear_heartbeat(self, shard: int, rest: bytes) -> None:
        instance, epoch, live, seq, digest, _ = rest.split(b" ")
        holding = Holding(int(live), int(seq), int(digest, 16))
        self.heartbeats[shard] = Heartbeat(self._clock.monotonic_ns(), instance.decode(), int(epoch), holding)

    def tick(self, auction_id: str) -> Tick | None:
        """The last tick of an auction; None if none was heard, or it cannot be read."""
        line = self._ticks.get(auction_id.encode())
        if line is None:
            return None
        version, _, payload = line.partition(b" ")
        try:
            frame = orjson.loads(payload)
            return Tick(int(version), str(frame["status"]), int(frame["ends_at"]))
        except (ValueError, KeyError, TypeError):
            return None

    def forget(self, auction_ids: Iterable[str]) -> None:
        """What was heard of these auctions does not count any more."""
        for auction_id in auction_ids:
            self._ticks.pop(auction_id.encode(), None)


@dataclass(frozen=True, slots=True)
class Beat:
    """A lease, and since when it stands as it stands."""

    lease: Lease
    since: MonotonicNs


class Trust(Enum):
    """Which log a look counts on."""

    WHOLE = auto()
    """One in which every record links to the next."""
    BROKEN_TOO = auto()
    """Of one that does not, what stands behind the place where it is broken."""
    NO_LOG = auto()
    """None: hash and sorted sets measure each other."""


class ShardEye:
    """Looks at one shard."""

    def __init__(self, store: ReconcilerStore, archive: AuditArchive | None, wire: Wire, shard: int) -> None:
        self.shard = shard
        self.ledger = Ledger(store, archive, shard)
        self._store = store
        self._wire = wire

    async def views(self, trust: Trust = Trust.BROKEN_TOO) -> AsyncGenerator[tuple[Observed, list[Views]], None]:
        """Every auction that is live by any view, a page at a time, each page as of one instant.

        Raises:
            StoreUnavailableError: Redis does not answer.
            LogMovedBackError: the log is another one now, or not of the kind that is trusted; begin again.
        """
        whole = trust is not Trust.NO_LOG and await self._read_log(trust)
        placed = [at.auction_id async for at in self._placed()]
        wanted = dict.fromkeys([*placed, *self.ledger.told])
        ids = iter(wanted)
        while page := list(islice(ids, OBSERVED_MAX)):
            # Before the page is read: a tick that is heard afterwards may tell of a later state.
            ticks = {auction_id: self._wire.tick(auction_id) for auction_id in page}
            observed = await self._store.observe(self.shard, page)
            if whole:
                await self.ledger.advance(observed.chain)
            found = []
            for auction_id, standing in observed.standings.items():
                told = await self.ledger.look_up(auction_id) if whole else None
                known = whole and self.ledger.whole
                found.append(
                    Views(auction_id, standing, told, ticks[auction_id], known, self.ledger.last_named(auction_id))
                )
            yield observed, found
            await asyncio.sleep(0)

    async def _read_log(self, trust: Trust) -> bool:
        try:
            await self.ledger.catch_up(broken_too=trust is Trust.BROKEN_TOO)
        except ArchiveUnavailableError as error:
            log.warning("audit_log_unreadable", shard=self.shard, error=str(error))
            self.ledger.begin()
            return False
        return True

    async def _placed(self) -> AsyncIterator[Placed]:
        for group in (Group.LIVE, Group.PAUSED):
            after: Placed | None = None
            while page := await self._store.page(self.shard, group, after, PLACES_MAX):
                for placed in page:
                    yield placed
                after = page[-1]
