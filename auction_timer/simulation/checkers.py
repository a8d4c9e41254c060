"""The judges. Each looks at what truly happened and at what the store holds in the end, and says what is wrong with it.

They share nothing with the workload, and with what they judge only the domain, which has an oracle of its own. The limits
are written out here as the requirements name them; the constants of the domain could be wrong.

After a failover that lost a suffix, "the log" is what survived: the intake, the audit and the event lane as they stand at the
end. What was lost is judged too where a promise was given at the time: no close may have been early, lost or not. A client
may have been told of something that is lost; what it then must be told is that there was a break.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import orjson

from auction_timer.simulation.clients import Client, Stretch
from auction_timer.simulation.witness import Witness
from engine.contract import audit
from engine.contract.cursors import Cursor, stream_order
from engine.contract.frames import is_frame
from engine.contract.intake import IntakeEvent, Outage, SchemaError, decode
from engine.contract.keys import shard_of
from engine.domain.auction import Auction
from engine.domain.decide import Decision
from engine.domain.events import Bid, Cancel, InputEvent, Register
from engine.domain.fold import elapse, fold
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from engine.domain.outage import extend_over
from engine.store.memory import MemoryStore, ShardMemory
from engine.store.protocol import AuditEntry, Entry, Group, UpdateEntry

STAMP_BOUND_MS: Final = 250
EXTENSION_MS: Final = 15 * 60 * 1_000
TOTAL_MS: Final = 24 * 60 * 60 * 1_000
LEFT_MS: Final = 5_000
"""So much of its closing window an outage may take without giving it back."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is judged."""

    witness: Witness
    store: MemoryStore
    clients: list[Client]
    archived: Mapping[int, Mapping[int, AuditEntry]]
    """What the archive holds, by shard and number."""
    ended_at: EpochMs
    """When the simulation ended, true time."""

    @property
    def shards(self) -> dict[int, ShardMemory]:
        """What the store holds in the end; the audit whole, with what was trimmed."""
        held = self.store.shards
        return {
            shard: replace(held[shard], audit=history.audit(held[shard].audit))
            for shard, history in self.witness.shards.items()
        }


def never_early(evidence: Evidence) -> list[str]:
    """No close took effect before its deadline by the true time, but for the 250 ms that a stamp may be wrong (B1)."""
    found = []
    for history in evidence.witness.shards.values():
        for commit in (*history.commits, *history.lost):
            found += [
                f"{close.auction_id} was closed {close.ends_at - commit.true_ms} ms early by {commit.incarnation}"
                for close in commit.closes
                if commit.true_ms < close.ends_at - STAMP_BOUND_MS
            ]
    for memory in evidence.shards.values():
        found += _before_its_recorded_end(memory, evidence.witness.misled)
    return found


def _before_its_recorded_end(memory: ShardMemory, misled: set[str]) -> list[str]:
    """Auctions that were loaded from a damaged hash, and closed by its end instead of the one that the records say."""
    found = []
    ends: dict[str, int] = {}
    for record in memory.audit:
        auction_id, details = record["auction_id"], orjson.loads(record["details"])
        if (
            record["event_type"] == "auction_timer_ended"
            and details["ends_at"] < ends[auction_id]
            and auction_id in misled
        ):
            found.append(f"{auction_id} was closed as of {details['ends_at']}, its records say {ends[auction_id]}")
        ends[auction_id] = details.get("ends_at", ends.get(auction_id, 0))
    return found


def closed_once(evidence: Evidence) -> list[str]:
    """Every auction whose deadline has passed was closed exactly once, in the audit and on the event lane (R5, B1)."""
    found = []
    for memory in evidence.shards.values():
        records: defaultdict[str, int] = defaultdict(int)
        frames: defaultdict[str, int] = defaultdict(int)
        for record in memory.audit:
            records[record["auction_id"]] += record["event_type"] == "auction_timer_ended"
        for update in memory.updates:
            frames[update.auction_id] += update.type == "timer.ended"
        for auction_id, fields in memory.timers.items():
            wanted = int(fields["status"] == "ENDED")
            if (records[auction_id], frames[auction_id]) != (wanted, wanted):
                found.append(
                    f"{auction_id} is {fields['status']}, with {records[auction_id]} closes in the audit "
                    f"and {frames[auction_id]} on the event lane"
                )
        found += [
            f"{auction_id} was due at {ends_at} and is still open at {evidence.ended_at}"
            for auction_id, ends_at in memory.groups[Group.LIVE].items()
            if ends_at <= evidence.ended_at
        ]
    return found


def no_bid_ignored(evidence: Evidence) -> list[str]:
    """A bid that arrived before the end that stood counts, however late it was applied (B2); each has one record."""
    found = []
    for memory in evidence.shards.values():
        arrivals = {entry.stream_id: entry for entry in memory.events}
        bids: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        over: dict[str, int] = {}
        known: dict[str, tuple[int, int]] = {}
        for record in memory.audit:
            auction_id, kind = record["auction_id"], record["event_type"]
            if kind == "auction_timer_registered":
                known[auction_id] = stream_order(record["intake_id"])
            if record["new_status"] in ("ENDED", "CANCELLED") and kind != "late_bid_ignored":
                over.setdefault(auction_id, int(record["occurred_at"]))
            if kind in ("bid_accepted", "auction_timer_extended", "late_bid_ignored"):
                bids[record["intake_id"]].append(record)
        for stream_id, entry in arrivals.items():
            event = _readable(entry)
            if event is None or not isinstance(event.event, Bid):
                continue
            auction_id = event.auction_id or ""
            # A bid on an auction whose hash was damaged waits in troubleshooting until an operator sends it round again.
            waits = auction_id in evidence.witness.misled and entry.event_id in memory.troubleshooting
            if auction_id not in known or stream_order(stream_id) < known[auction_id] or waits:
                continue
            records = bids[stream_id]
            if len(records) != 1:
                found.append(f"bid {entry.event_id} has {len(records)} records")
                continue
            assert entry.at is not None
            late = records[0]["event_type"] == "late_bid_ignored"
            ends_at = over.get(auction_id)
            if late and (ends_at is None or entry.at < ends_at):
                found.append(f"bid {entry.event_id} arrived at {entry.at}, before the end {ends_at}, and was ignored")
            if not late and ends_at is not None and entry.at > ends_at:
                found.append(f"bid {entry.event_id} arrived at {entry.at}, after the end {ends_at}, and counted")
    return found


_MOVES_THE_END: Final = ("auction_timer_extended", "auction_timer_extended_for_outage", "auction_timer_rescheduled")


def caps(evidence: Evidence) -> list[str]:
    """An extension moves the end by at most 15 min, all of them by at most 24 h and the policy's own cap (R15)."""
    found = []
    for memory in evidence.shards.values():
        paused_ms: defaultdict[str, int] = defaultdict(int)
        for record in memory.audit:
            auction_id, kind = record["auction_id"], record["event_type"]
            details = orjson.loads(record["details"])
            if kind == "auction_timer_resumed":
                paused_ms[auction_id] += details["paused_ms"]
            if kind not in _MOVES_THE_END:
                continue
            fields = memory.timers[auction_id]
            policy_ms = orjson.loads(fields["policy"])["total_cap_ms"]
            last = int(fields["original_ends_at"]) + paused_ms[auction_id] + min(policy_ms, TOTAL_MS)
            if details["ends_at"] > last:
                found.append(f"{auction_id}: the end moved to {details['ends_at']}, past the last one allowed, {last}")
            moved_ms = details["ends_at"] - details["previous_ends_at"]
            if kind != "auction_timer_rescheduled" and not 0 < moved_ms <= EXTENSION_MS:
                found.append(f"{auction_id}: one extension moved the end by {moved_ms} ms")
    return found


def audit_is_the_fold(evidence: Evidence) -> list[str]:
    """The chain is whole, and audit and timers are what the intake folds to, by the domain alone (B7, R3, R26)."""
    found = []
    for shard, memory in evidence.shards.items():
        broken = audit.verify(memory.audit)
        if broken is not None:
            found.append(f"shard {shard}: the audit chain is broken at record {broken}")
        behind = [
            entry for entry in memory.events if stream_order(entry.stream_id) > stream_order(memory.intake_cursor)
        ]
        if behind:
            found.append(f"shard {shard}: {len(behind)} entries are not applied, the first is {behind[0].event_id}")
        folded = Fold()
        for entry in memory.events:
            folded.apply(entry)
        folded.elapse(EpochMs(memory.last_at))
        found += _against_the_fold(memory, folded, evidence.witness.misled)
    return found


def _against_the_fold(memory: ShardMemory, folded: "Fold", misled: set[str]) -> list[str]:
    """A correction states anew what stands, and counts as a version: then the other records are judged without theirs."""
    found = []
    corrected: set[str] = set()
    written: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for record in memory.audit:
        if record["event_type"] == "auction_timer_corrected":
            corrected.add(record["auction_id"])
        elif not record["event_type"].startswith("OPERATOR_"):
            written[record["auction_id"]].append(tuple(record[name] for name in _WRITTEN))
    for auction_id in sorted((written.keys() | folded.facts.keys()) - misled):
        facts, wanted_facts = written[auction_id], folded.facts[auction_id]
        if auction_id in corrected:
            versions = [int(fact[_VERSION]) for fact in facts if fact[_VERSION]]
            if versions != sorted(versions):
                found.append(f"{auction_id}: the versions of its records are not in order")
            facts, wanted_facts = _without_versions(facts), _without_versions(wanted_facts)
        if facts != wanted_facts:
            at, was, wanted = _first_difference(facts, wanted_facts)
            found.append(f"{auction_id}: record {at} is {was}, the fold says {wanted}")
    for auction_id in folded.auctions.keys() - misled:
        auction, fields = folded.auctions[auction_id], memory.timers.get(auction_id, {})
        version = fields.get("version") if auction_id in corrected else str(auction.version)
        stands = (fields.get("status"), fields.get("version"), fields.get("ends_at"))
        wanted_stand = (auction.status.value, version, str(auction.ends_at))
        if auction.version and stands != wanted_stand:
            found.append(f"{auction_id}: the store says {stands}, the fold {wanted_stand}")
    return sorted(found)


_WRITTEN: Final = ("event_type", "prev_status", "new_status", "version", "occurred_at", "event_id")
_VERSION: Final = _WRITTEN.index("version")


def _without_versions(facts: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [fact[:_VERSION] + fact[_VERSION + 1 :] for fact in facts]


class Fold:
    """The intake of one shard folded by the domain, without any of the engine around it."""

    def __init__(self) -> None:
        self.auctions: dict[str, Auction] = {}
        self.facts: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
        self._auction_of: dict[str, str] = {}
        self._cancelled_first: dict[str, tuple[Cancel, str, EpochMs]] = {}

    def apply(self, entry: Entry) -> None:
        """One entry, in the order of the log."""
        event = _readable(entry)
        if event is not None and isinstance(event.event, Outage):
            for auction in list(self.auctions.values()):
                for decision in extend_over(auction, event.event.since, event.event.until, event.event.extension_ms):
                    self._keep(decision, entry.event_id)
        if event is None or not isinstance(event.event, InputEvent):
            return
        assert entry.at is not None
        asked = event.event
        if event.auction_id is None:
            offer_id = event.offer_id or ""
            auction_id = self._auction_of.get(offer_id)
            if auction_id is None:
                assert isinstance(asked, Cancel)
                self._cancelled_first.setdefault(offer_id, (asked, entry.event_id, entry.at))
                return
        else:
            auction_id = event.auction_id
        if isinstance(asked, Register):
            self._register(auction_id, asked, entry)
        else:
            self._decide(auction_id, asked, entry.at, entry.event_id)

    def _register(self, auction_id: str, asked: Register, entry: Entry) -> None:
        assert entry.at is not None
        offer_id = asked.registration.offer.offer_id
        before = self.auctions.get(auction_id, Auction(auction_id))
        cancelled = self._cancelled_first.get(offer_id) if offer_id and offer_id not in self._auction_of else None
        if cancelled is not None and before.status is Status.UNREGISTERED:
            self._decide(auction_id, cancelled[0], cancelled[2], cancelled[1])
        self._decide(auction_id, asked, entry.at, entry.event_id)
        if offer_id and before.registration is None and self.auctions[auction_id].registration is not None:
            self._auction_of[offer_id] = auction_id

    def _decide(self, auction_id: str, asked: InputEvent, at: EpochMs, event_id: str) -> None:
        for decision in fold(self.auctions.get(auction_id, Auction(auction_id)), asked, at):
            self._keep(decision, event_id)

    def elapse(self, until: EpochMs) -> None:
        """Time passes to the end."""
        for auction in list(self.auctions.values()):
            for decision in elapse(auction, until):
                self._keep(decision, "")

    def _keep(self, decision: Decision, event_id: str) -> None:
        after = decision.after
        self.auctions[after.auction_id] = after
        if decision.fact is None:
            return
        by_time = decision.fact.value in ("auction_timer_started", "auction_timer_closing", "auction_timer_ended")
        before = "" if decision.before.status is Status.UNREGISTERED else decision.before.status.value
        self.facts[after.auction_id].append(
            (
                decision.fact.value,
                before,
                after.status.value,
                str(after.version),
                str(decision.at),
                "" if by_time else event_id,
            )
        )


def convergence(evidence: Evidence) -> list[str]:
    """Every client ends with the store's state, and has every event once, or was told that there was a break (B4)."""
    found = []
    # Each lane that there was, the one of the end last.
    histories = {
        shard: [_by_auction(lane) for lane in (*history.lanes, evidence.store.shards[shard].updates)]
        for shard, history in evidence.witness.shards.items()
    }
    for number, client in enumerate(evidence.clients):
        shard = shard_of(client.auction_id, len(evidence.witness.shards))
        memory = evidence.store.shards[shard]
        fields = memory.timers.get(client.auction_id)
        if fields is None or not Status(fields["status"]).is_public:
            continue
        shown = (client.timer.get("status"), str(client.timer.get("version")), str(client.timer.get("ends_at")))
        stands = (fields["status"], fields["version"], fields["ends_at"])
        # A correction of what is over raises its version, and is announced to nobody.
        is_over = Status(fields["status"]).is_terminal
        if shown[::2] != stands[::2] or (shown != stands and not is_over):
            found.append(f"client {number} of {client.auction_id} was shown {shown}, the store has {stands}")
        lanes = [lane.get(client.auction_id, []) for lane in histories[shard]]
        found += [
            f"client {number} of {client.auction_id} was not told of a break behind {stretch.since}"
            for stretch in client.stretches
            if not any(_is_whole(stretch, lane) for lane in lanes)
        ]
        if client.stretches:
            last = client.stretches[-1]
            if not _is_whole(last, lanes[-1], to_the_end=True):
                found.append(f"client {number} of {client.auction_id} lacks the last events behind {last.since}")
    return found


def _by_auction(lane: list[UpdateEntry]) -> dict[str, list[tuple[int, int]]]:
    """The places of each auction's frames in a lane, in order."""
    places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for update in lane:
        if is_frame(update.type):
            places[update.auction_id].append(stream_order(update.stream_id))
    return places


def _is_whole(stretch: Stretch, lane: list[tuple[int, int]], *, to_the_end: bool = False) -> bool:
    """Whether the client got exactly what a lane held between its beginning and what it got last."""
    got = [_order(cursor) for cursor in stretch.cursors]
    since = _order(stretch.since)
    until = (got[-1] if got else since) if not to_the_end else (lane[-1] if lane else since)
    return got == [order for order in lane if since < order <= until]


def _order(cursor: str) -> tuple[int, int]:
    read = Cursor.parse(cursor)
    assert read is not None
    return stream_order(read.stream_id)


def one_holder_per_epoch(evidence: Evidence) -> list[str]:
    """No epoch of a shard has commits of two processes (fencing)."""
    found = []
    for shard, history in evidence.witness.shards.items():
        holders: dict[int, str] = {}
        for commit in history.commits:
            holder = holders.setdefault(commit.epoch, commit.incarnation)
            if holder != commit.incarnation:
                found.append(f"shard {shard}: epoch {commit.epoch} has commits of {holder} and {commit.incarnation}")
    return found


def outages(evidence: Evidence) -> list[str]:
    """What no gateway could write to for too long is told once; who lost time near the end by it has it back once (B8)."""
    found = []
    limits = evidence.store.limits
    for shard, memory in evidence.shards.items():
        attended = evidence.witness.shards[shard].attended
        gaps = [gap for gap in pairwise(attended) if gap[1][1] - gap[0][0] > limits.outage_ms - 2 * STAMP_BOUND_MS]
        told = _outages(memory)
        for entry, outage in told:
            if not any(_is_of(outage, gap) for gap in gaps):
                found.append(f"shard {shard}: {entry.event_id} was told, and there was no such outage")
        for gap in gaps:
            times = sum(_is_of(outage, gap) for _, outage in told)
            is_certain = gap[1][0] - gap[0][1] > limits.outage_ms + 2 * STAMP_BOUND_MS
            if times > 1 or (times == 0 and is_certain):
                found.append(f"shard {shard}: the outage {gap} was told {times} times")
        found += _given_back_once(memory, told)
    return found


def _given_back_once(memory: ShardMemory, told: list[tuple[Entry, Outage]]) -> list[str]:
    found = []
    given: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    lives: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for record in memory.audit:
        if record["event_type"] == "auction_timer_extended_for_outage":
            given[record["intake_id"], record["auction_id"]].append(orjson.loads(record["details"]))
        if record["event_id"] and record["version"]:
            lives[record["auction_id"]].append(record)
    for entry, outage in told:
        for auction_id, records in lives.items():
            wanted = _given_back(memory.timers[auction_id], records, entry, outage)
            got = given.pop((entry.stream_id, auction_id), [])
            shown = [{name: details[name] for name in wanted} if wanted else details for details in got]
            if shown != ([wanted] if wanted else []):
                found.append(f"{auction_id}: for {entry.event_id} it was given {got}, and not {wanted}")
    return found + [f"{auction_id} was extended for an outage that nobody told" for _, auction_id in given]


def _outages(memory: ShardMemory) -> list[tuple[Entry, Outage]]:
    events = [(entry, _readable(entry)) for entry in memory.events if entry.event_id.startswith("outage-")]
    return [(entry, event.event) for entry, event in events if event is not None and isinstance(event.event, Outage)]


def _is_of(outage: Outage, gap: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether an outage lies between two writes, each stamped at some time from when it was sent to when it arrived."""
    return all(
        sent - 2 * STAMP_BOUND_MS <= at <= came + 2 * STAMP_BOUND_MS
        for at, (sent, came) in zip((outage.since, outage.until), gap, strict=True)
    )


def _given_back(fields: dict[str, str], records: list[dict[str, str]], entry: Entry, outage: Outage) -> dict[str, Any]:
    """What an outage must have given an auction, by the records of what was asked before it; {} for nothing.

    Time itself need not be looked at: what it had ended before the outage lies outside of it.
    """
    if not fields["policy"] or int(fields["starts_at"]) >= outage.until:
        return {}
    policy = orjson.loads(fields["policy"])
    ends_at = original = int(fields["original_ends_at"])
    status, paused_ms, place = "", 0, stream_order(entry.stream_id)
    for record in records:
        if stream_order(record["intake_id"]) < place:
            details = orjson.loads(record["details"])
            ends_at, status = details.get("ends_at", ends_at), record["new_status"]
            paused_ms += details.get("paused_ms", 0)
    opens_at = max(int(fields["starts_at"]), ends_at - policy["soft_close_window_ms"])
    if (
        status not in ("SCHEDULED", "ACTIVE", "CLOSING")
        or min(outage.until, ends_at) - max(outage.since, opens_at) <= LEFT_MS
    ):
        return {}
    cap = original + paused_ms + min(policy["total_cap_ms"], TOTAL_MS)
    given = min(max(ends_at, outage.until) + outage.extension_ms, ends_at + EXTENSION_MS, max(cap, ends_at))
    if given == ends_at:
        return {}
    return {
        "reason": "outage",
        "previous_ends_at": ends_at,
        "ends_at": given,
        "outage_since": outage.since,
        "outage_until": outage.until,
    }


def damage(evidence: Evidence) -> list[str]:
    """Whatever was changed by hand is put right by the first pass that can, and nothing of it stands in the end (R12)."""
    found = []
    for harm in evidence.witness.damages:
        what = f"{harm.auction_id}: {harm.kind} at {harm.since_ms}"
        if harm.overlooked:
            found.append(f"{what} stood there still when the next pass began")
        if harm.stands(evidence.store.shards[harm.shard]):
            found.append(f"{what} stands there in the end")
    return found


def archived(evidence: Evidence) -> list[str]:
    """What was taken out of the audit stream stands in the archive, to the letter (B7)."""
    found = []
    for shard, history in evidence.witness.shards.items():
        held = evidence.archived.get(shard, {})
        for record in history.trimmed:
            kept = held.get(int(record["seq"]))
            if kept is None or kept.fields != record:
                found.append(f"shard {shard}: record {record['seq']} was trimmed, the archive has {kept}")
    return found


def nobody_fell(evidence: Evidence) -> list[str]:
    """No process ended by itself: whatever goes wrong around it, it goes on."""
    return [f"{name} ended by itself" for name in evidence.witness.ended_by_themselves]


CHECKERS: Final[dict[str, Callable[[Evidence], list[str]]]] = {
    "no early close": never_early,
    "exactly one close": closed_once,
    "no bid in time ignored": no_bid_ignored,
    "caps": caps,
    "audit is the fold of the intake": audit_is_the_fold,
    "every client converged": convergence,
    "one holder per epoch": one_holder_per_epoch,
    "outages are given back once": outages,
    "damage is repaired": damage,
    "what is trimmed is archived": archived,
    "nobody fell": nobody_fell,
}


def _readable(entry: Entry) -> IntakeEvent | None:
    if entry.at is None:
        return None
    try:
        return decode(entry.event_id, entry.body)
    except SchemaError:
        return None


def _first_difference(left: list[Any], right: list[Any]) -> tuple[int, Any, Any]:
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at, one, other
    at = min(len(left), len(right))
    return at, left[at] if at < len(left) else None, right[at] if at < len(right) else None
