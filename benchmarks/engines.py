"""Two engines under fire: killed, stopped and restarted at random while auctions run and close. Does the log explain all?

    python -m benchmarks.engines --seconds 120 --auctions 200 --seed 7 --runs 3

Real processes: two `auction-timer engine` share eight shards of one Valkey. Each is, at random and without regard for the
other, killed (SIGKILL), stopped for up to six seconds (SIGSTOP; a lease lasts one and a half) and continued, stopped and
then killed, or restarted in order; now and then both are away. It comes back under its old name or a new one. Bids come all
the time, late ones too, and cancellations, pauses, resumptions, other ends and replays of starts; auctions end all the time.
Afterwards the intake is folded by the pure domain, and `benchmarks.engines_judge` holds audit, event lane, timers and answers
against that fold. Everything it counts must be 0.

The seed decides what is done to whom and for how long; the machine decides at which instruction that meets them.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from benchmarks.engines_judge import SHARDS, Reference, Verdict, drained, judge, recorded, reference, witness
from benchmarks.harness import Bench, bench, percentiles, report, run
from engine.clock_sync import ClockSync
from engine.contract import intake
from engine.contract.intake import Actor, Context, EventType, IntakeEvent
from engine.contract.keys import shard_of
from engine.domain.auction import Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume
from engine.domain.instants import HOUR_MS, EpochMs
from engine.domain.policy import ExtendsOn, ExtensionMode, Policy
from engine.store.protocol import Draft
from tests.live import SCRIPT

ENGINES: Final = ("left", "right")
UPTIME_S: Final = (0.0, 4.0)
"""Of an engine that has begun: from before it has taken its share to well into its work."""
AWAY_S: Final = (0.0, 3.0)
STOPPED_S: Final = ((0.02, 6.0), (1.4, 2.2))
"""A lease lasts 1.5 s: some pauses end unnoticed, most find the shards with somebody else, the second kind at that moment."""
FAULTS: Final = {"kill": 4, "stop": 5, "stop and kill": 1, "restart": 1}
SAME_NAME: Final = 0.5
"""Under its old name an engine takes its shards back at once, under a new one it waits for the lease."""
REGISTERED_WITHIN: Final = 0.75
"""The part of the time in which auctions are registered."""
LASTS_S: Final = (1.5, 15.0)
LASTING: Final = 10
"""Each tenth auction outlives the run: it is judged while it is live."""
EXTENSION_MS: Final = 1_000
CAP_MS: Final = 5_000
CLIENTS: Final = 6
EVERY_S: Final = (0.02, 0.15)
RECENT: Final = 40
"""Clients are about the auctions that were registered last; some of these have ended."""
START_WITHIN_S: Final = 15.0
STOP_WITHIN_S: Final = 15.0
APPLIED_WITHIN_S: Final = 60.0
QUIET_MS: Final = 60_000
CLIENT: Final = Actor("service", "benchmark")


class EnginePlace:
    """A place that an engine runs in: one process at a time, each killed by its own pid."""

    def __init__(self, name: str, url: str, directory: Path) -> None:
        self._name = name
        self._generation = 0
        self._url = url
        self._log = (directory / f"{name}.log").open("ab+")
        self.died: list[int] = []
        """Exit codes of processes that ended by themselves. None should."""
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._starts_before = self._starts()
        own = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
        own |= {"AUCTION_TIMER_SHARDS": str(SHARDS), "AUCTION_TIMER_INSTANCE": f"{self._name}-{self._generation}"}
        command = [*SCRIPT, "engine", "--redis-url", self._url, "--parent", str(os.getpid())]
        return subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=self._log)

    def _starts(self) -> int:
        return self.logged().count("engine_starting")

    async def works(self) -> None:
        """Wait until the process has come to the point where it asks the store for shards, or is dead."""
        give_up = time.monotonic() + START_WITHIN_S
        while self._process.poll() is None and self._starts() == self._starts_before and time.monotonic() < give_up:
            await asyncio.sleep(0.05)

    def _note_death(self) -> None:
        if (code := self._process.poll()) is not None:
            self.died.append(code)

    def kill(self) -> None:
        """SIGKILL."""
        self._note_death()
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections, and what it has sent may still be applied."""
        self._note_death()
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self._note_death()
        self._process.terminate()
        try:
            code = await asyncio.to_thread(self._process.wait, STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -signal.SIGKILL
        if code:
            self.died.append(code)

    def start(self, *, same_name: bool) -> None:
        """Start the next process here."""
        self._generation += not same_name
        self._process = self._start()

    def logged(self) -> str:
        """What its processes have said."""
        return Path(self._log.name).read_text(errors="replace")

    def close(self) -> None:
        """End whatever runs here."""
        if self._process.poll() is None:
            self.kill()
        self._log.close()


async def _fire(place: EnginePlace, chance: random.Random, over: asyncio.Event, done: Counter[str]) -> None:
    """Do one thing after the other to an engine. It runs when this ends."""
    while not over.is_set():
        await place.works()
        await asyncio.sleep(chance.uniform(*UPTIME_S))
        (fault,) = chance.choices([*FAULTS], [*FAULTS.values()])
        done[fault] += 1
        if fault.startswith("stop"):
            place.freeze()
            await asyncio.sleep(chance.uniform(*chance.choice(STOPPED_S)))
            if fault == "stop":
                place.thaw()
                continue
        if fault == "restart":
            await place.stop()
        else:
            place.kill()
        await asyncio.sleep(chance.uniform(*AWAY_S))
        place.start(same_name=chance.random() < SAME_NAME)


@dataclass(slots=True)
class Load:
    """What all clients together have sent, and what they were told."""

    made: Bench
    seconds: float
    registered: list[Registration] = field(default_factory=list)
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Arrival in ms, by event id."""

    async def register(self, auctions: int, chance: random.Random) -> None:
        """Register auctions, evenly over the first part of the time."""
        begun = time.monotonic()
        for number in range(auctions):
            await asyncio.sleep(begun + number * REGISTERED_WITHIN * self.seconds / auctions - time.monotonic())
            now = self.made.clock.now_ms()
            starts_at = EpochMs(now + chance.choice([-500, 0, 700]))
            lasts_ms = HOUR_MS if number % LASTING == 0 else int(1_000 * chance.uniform(*LASTS_S))
            policy = Policy(
                soft_close_window_ms=chance.choice([0, 1_500, 4_000, HOUR_MS]),
                extension_ms=EXTENSION_MS,
                mode=chance.choice(list(ExtensionMode)),
                total_cap_ms=CAP_MS,
                max_extensions=chance.choice([None, None, 2]),
                extends_on=chance.choice(list(ExtendsOn)),
            )
            auction_id = f"auction-{_drawn(chance)}"
            registration = Registration(auction_id, starts_at, EpochMs(starts_at + lasts_ms), policy)
            await self._send(chance, auction_id, (EventType.AUCTION_STARTED, Register(registration)))
            self.registered.append(registration)

    async def client(self, chance: random.Random, over: asyncio.Event) -> None:
        """One client: does what comes to its mind until the load is over."""
        while not over.is_set():
            await asyncio.sleep(chance.uniform(*EVERY_S))
            if self.registered:
                await self._act(chance, chance.choice(self.registered[-RECENT:]))

    async def _act(self, chance: random.Random, about: Registration) -> None:
        kinds = {"bid": 10, "storm": 1, "stranger": 0.3, "tombstone": 0.1, "replay": 0.5, "conflict": 0.2}
        kinds |= {"pause": 1.5, "resume": 3, "reschedule": 1.5, "cancel": 0.2}
        (what,) = chance.choices([*kinds], [*kinds.values()])
        auction_id, reason = about.auction_id, f"{what}, said the client"
        asked: list[tuple[str, InputEvent]] = []
        match what:
            case "bid" | "storm":
                bids = 10 if what == "storm" else 1
                asked = [(EventType.BID_ACCEPTED, _bid(chance)) for _ in range(bids)]
            case "stranger":
                auction_id, asked = f"unknown-{_drawn(chance)}", [(EventType.BID_ACCEPTED, _bid(chance))]
            case "tombstone":
                auction_id, asked = f"unknown-{_drawn(chance)}", [(EventType.OFFER_CANCELLED, Cancel(reason))]
            case "replay":
                asked = [(EventType.AUCTION_STARTED, Register(about))]
            case "conflict":
                other = Registration(auction_id, about.starts_at, EpochMs(about.ends_at + 1), about.policy)
                asked = [(EventType.AUCTION_STARTED, Register(other))]
            case "pause":
                asked = [(EventType.PAUSE_REQUESTED, Pause(reason))]
            case "resume":
                asked = [(EventType.RESUME_REQUESTED, Resume(reason))]
            case "reschedule":
                ends_at = EpochMs(self.made.clock.now_ms() + chance.choice([-1_000, 500, 2_000, 4_000, 2 * HOUR_MS]))
                asked = [(EventType.SCHEDULE_CHANGED, Reschedule(ends_at, reason))]
            case _:
                asked = [(EventType.CANCEL_REQUESTED, Cancel(reason))]
        reply_to = f"client-{chance.randrange(CLIENTS)}" if chance.random() < 0.3 else None
        await self._send(chance, auction_id, *asked, reply_to=reply_to)

    async def resume_all(self, chance: random.Random) -> None:
        """Let every auction go on that somebody has paused."""
        for registration in self.registered:
            await self._send(chance, registration.auction_id, (EventType.RESUME_REQUESTED, Resume("the run is over")))

    async def _send(
        self, chance: random.Random, auction_id: str, *asked: tuple[str, InputEvent], reply_to: str | None = None
    ) -> None:
        """Append events as a gateway does, and now and then once more: then they must be known, with their arrival."""
        drafts = []
        for event_type, event in asked:
            event_id = _drawn(chance)
            context = Context(event_id, event_type, _drawn(chance), f"req-{_drawn(chance)}", CLIENT, reply_to)
            seen_ids = (f"bid {auction_id} {event.bid_id}",) if isinstance(event, Bid) else ()
            drafts.append(Draft(event_id, intake.encode(IntakeEvent(context, event, auction_id)), seen_ids))
        shard = shard_of(auction_id, SHARDS)
        for accepted in [True, False][: 1 + (chance.random() < 0.1)]:
            answers = await self.made.store.append(shard, drafts, self.made.clock.now_ms(), uuid4().hex)
            assert all(answer.accepted is accepted for answer in answers)
            for answer in answers:
                assert self.acknowledged.setdefault(answer.event_id, answer.at) == answer.at


def _drawn(chance: random.Random) -> str:
    return UUID(int=chance.getrandbits(128)).hex


def _bid(chance: random.Random) -> Bid:
    return Bid(_drawn(chance), chance.randrange(100, 10_000), "EUR", leader_changed=chance.random() < 0.8)


async def one_run(*, seconds: float, auctions: int, seed: int) -> tuple[Verdict, dict[str, Any]]:
    """One run: what is wrong, and what was done."""
    print(f"SEED={seed}", flush=True)
    chance = random.Random(seed)
    async with bench() as made:
        path = made.url.removeprefix("unix://")
        keeping = asyncio.create_task(ClockSync(made.clock, made.store.time_us).run())
        with tempfile.TemporaryDirectory(prefix="at-") as directory:
            places = [EnginePlace(name, made.url, Path(directory)) for name in ENGINES]
            try:
                async with witness(path) as seen:
                    load, done = Load(made, seconds), Counter[str]()
                    await _under_fire(places, load, done, auctions, chance)
                    with Redis(unix_socket_path=path, retry=Retry(NoBackoff(), 0)) as client:
                        expected = await _applied(client, made)
                        await seen.caught_up(client)
                        verdict = judge(client, expected, seen, load.acknowledged)
                    died = [code for place in places for code in place.died]
                    failed = sum(place.logged().count("Traceback") for place in places)
                    if died or failed:
                        print(f"exit codes {died}", *(place.logged() for place in places), sep="\n", file=sys.stderr)
            finally:
                keeping.cancel()
                for place in places:
                    place.close()
        commits = sum(map(len, seen.accepted.values()))
    late = percentiles(sorted(verdict.lateness_ms)) if verdict.lateness_ms else {}
    return verdict, {
        "seed": seed, "faults": dict(done), "events": len(load.acknowledged), "records": verdict.records,
        "commits": commits, "claims": seen.claims, "refused": seen.refused, "closed": verdict.closed,
        "cancelled": verdict.cancelled, "lateness_ms": late, "died": len(died), "tracebacks": failed,
        "wrong": verdict.counts(),
    }  # fmt: skip


async def _under_fire(
    places: list[EnginePlace], load: Load, done: Counter[str], auctions: int, chance: random.Random
) -> None:
    over = asyncio.Event()
    seeds = [random.Random(chance.getrandbits(64)) for _ in range(len(places) + CLIENTS)]
    async with asyncio.TaskGroup() as tasks:
        for place in places:
            tasks.create_task(_fire(place, seeds.pop(), over, done))
        for _ in range(CLIENTS):
            tasks.create_task(load.client(seeds.pop(), over))
        tasks.create_task(load.register(auctions, chance))
        await asyncio.sleep(load.seconds)
        over.set()
    await load.resume_all(chance)


async def _applied(client: Redis, made: Bench) -> Reference:
    """Wait until everything that was asked, and everything that time does to it soon, has been applied; its fold."""
    give_up = time.monotonic() + APPLIED_WITHIN_S
    while True:
        expected = await asyncio.to_thread(reference, client)
        expected.elapse(made.clock.now_ms())
        due = expected.at_rest_until()
        at_rest = due is None or due > made.clock.now_ms() + QUIET_MS
        wanted = sum(map(len, expected.records.values()))
        if at_rest and drained(client) and recorded(client) >= wanted:
            return expected
        if time.monotonic() > give_up:
            return expected  # the judge says what is missing
        await asyncio.sleep(0.5)


async def measure(
    *, seconds: float, auctions: int, save: bool, runs: int = 1, seed: int | None = None
) -> dict[str, Any]:
    """Runs in a row, each on a server of its own, as tables; the second has the seed of the first and one, and so on."""
    first = random.randrange(2**32) if seed is None else seed
    rows = []
    for number in range(runs):
        verdict, measured = await one_run(seconds=seconds, auctions=auctions, seed=first + number)
        rows.append(measured)
        print("\n".join(f"{name:>18}  {value}" for name, value in measured.items() if name != "wrong"))
        print("\n".join(f"{'wrong ' + kind:>18}  {count}" for kind, count in verdict.counts().items()))
        print("\n".join(verdict.findings), flush=True)
    parameters = {"seconds": seconds, "auctions": auctions, "shards": SHARDS, "engines": len(ENGINES)}
    return report("engines", parameters, {"runs": rows}, save=save)


def main() -> None:
    """Read the options and run; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--auctions", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, help="what is done to whom; drawn if it is not given")
    parser.add_argument("--no-save", action="store_true", help="print only, do not write benchmarks/results/")
    options = parser.parse_args()
    made = run(
        measure(
            seconds=options.seconds,
            auctions=options.auctions,
            runs=options.runs,
            seed=options.seed,
            save=not options.no_save,
        )
    )
    sys.exit(any(any(row["wrong"].values()) or row["died"] or row["tracebacks"] for row in made["measured"]["runs"]))


if __name__ == "__main__":
    main()
