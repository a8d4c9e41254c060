"""Scenario `steady`, as locust runs it: watchers who read what comes, and bids at a steady rate.

Started by `python -m loadtests`, which registers the auctions and says in the environment which they are:

    LOADTEST_AUCTIONS      ids, separated by commas; watchers take them in turn
    LOADTEST_BIDS_PER_S    bids per second in all
    LOADTEST_OFFSET_MS     the server's clock minus this machine's
    LOADTEST_TOKEN         for the gateway, where it asks for one

Delivery is reported as the response time of the requests `tick` and `bid`, a socket's handshake as `connect`. A bid counts
from its arrival in the intake. A watcher who misses a bid, gets one twice, or loses its socket is a failure. locust has made
`time.sleep` and sockets cooperative before this file is read.
"""

import itertools
import os
import time
from typing import Any, Final

import orjson
from locust import User, constant_throughput, task

from auction_timer.replay.history import read_history, sample_path
from loadtests.budgets import BID, TICK
from loadtests.sockets import Socket, SocketClosedError, SocketRefusedError

AUCTIONS: Final = os.environ["LOADTEST_AUCTIONS"].split(",")
BIDS_PER_S: Final = float(os.environ["LOADTEST_BIDS_PER_S"])
OFFSET_MS: Final = float(os.environ["LOADTEST_OFFSET_MS"])
TOKEN: Final = os.environ.get("LOADTEST_TOKEN")
COME_BACK_S: Final = 1.0

TICK_HEAD: Final = b'{"type":"timer.tick"'
BID_HEAD: Final = b'{"type":"bid.accepted"'
STAMPS: Final = {TICK: b'"server_time":', BID: b'"occurred_at":'}
STAMP_DIGITS: Final = 13

turns = itertools.count()
"""Whose turn it is among the auctions."""


class Watcher(User):
    """Somebody who has the page open."""

    def on_start(self) -> None:
        """Take an auction."""
        self.auction_id = AUCTIONS[next(turns) % len(AUCTIONS)]
        self.number = 0

    @task
    def watch(self) -> None:
        """Watch until the socket is gone; that is a failure."""
        started = time.perf_counter()
        try:
            socket = Socket(f"{self.host}/auctions/{self.auction_id}/updates", token=TOKEN)
        except (SocketRefusedError, SocketClosedError, OSError) as error:
            self._report("connect", 0.0, 0, error)
            time.sleep(COME_BACK_S)
            return
        self._report("connect", (time.perf_counter() - started) * 1_000, 0)
        try:
            for text in socket.texts():
                self._read(text)
        except (SocketClosedError, OSError) as error:
            self._report("socket", 0.0, 0, error)
            time.sleep(COME_BACK_S)
        finally:
            socket.close()

    def _read(self, text: bytes) -> None:
        now_ms = time.time() * 1_000 + OFFSET_MS
        if text.startswith(TICK_HEAD):
            self._report(TICK, now_ms - _stamp(text, TICK), len(text))
        elif text.startswith(BID_HEAD):
            self._report(BID, now_ms - _stamp(text, BID), len(text), self._follow(int(orjson.loads(text)["bid_id"])))

    def _follow(self, number: int) -> Exception | None:
        """What is wrong with a bid's number; None if it is the next one, or the first after a new start."""
        before, self.number = self.number, number
        if not before or number == before + 1:
            return None
        return SequenceError("a bid was seen twice" if number <= before else "a bid was missed")

    def _report(self, name: str, took_ms: float, length: int, fault: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="socket",
            name=name,
            response_time=max(0.0, took_ms),
            response_length=length,
            exception=fault,
            context={},
        )


class SequenceError(Exception):
    """A watcher did not see each bid once."""


class Bidder(User):
    """Everybody who bids, one after the other, with the amounts and in the order of the sample's real auctions."""

    fixed_count = 1
    wait_time = constant_throughput(BIDS_PER_S)

    def on_start(self) -> None:
        """Open the history."""
        import httpx

        headers = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
        self.http = httpx.Client(base_url=str(self.host), headers=headers, trust_env=False, timeout=10.0)
        self.histories = [itertools.cycle(past.bids) for past in read_history(sample_path())]
        self.turns = itertools.count()

    @task
    def bid(self) -> None:
        """Place the next bid, on the next auction."""
        turn, number = divmod(next(self.turns), len(AUCTIONS))
        auction_id, past = AUCTIONS[number], next(self.histories[number % len(self.histories)])
        data: dict[str, Any] = {
            "auction_id": auction_id,
            "bid_id": f"{turn + 1}",
            "amount_minor": past.amount_minor,
            "bidder_id": past.bidder,
        }
        event = {
            "specversion": "1.0",
            "id": f"{auction_id}-{turn + 1}",
            "type": "auctions.bid.accepted",
            "source": "loadtests",
            "data": data,
        }
        started, fault = time.perf_counter(), None
        try:
            self.http.post("/events", json=event).raise_for_status()
        except Exception as error:
            fault = error
        self.environment.events.request.fire(
            request_type="http",
            name="POST /events",
            response_time=(time.perf_counter() - started) * 1_000,
            response_length=0,
            exception=fault,
            context={},
        )

    def on_stop(self) -> None:
        """Hang up."""
        self.http.close()


def _stamp(text: bytes, name: str) -> int:
    at = text.index(STAMPS[name]) + len(STAMPS[name])
    return int(text[at : at + STAMP_DIGITS])
