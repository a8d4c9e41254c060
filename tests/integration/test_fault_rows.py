"""The server takes no more clients, its disk is full, its sentinels fail while they mend: what was told stays true.

Real processes, and each fault as an operator meets it. An auction whose end falls into the fault closes once and not early.
"""

import asyncio
import contextlib
import errno
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from auction_timer.roles import listen, url_of
from tests.integration.crowd import Watcher, crowd, gaps, lane, port_of, until
from tests.integration.events import bid, fresh_id, started
from tests.integration.own_role import OwnRole
from tests.integration.records import records_of
from tests.integration.test_first_light import now_of
from tests.live import DEADLINE_S, LiveStack
from tests.live import until as polled
from tests.topologies import SERVICE, Member, SentinelGroup, stopping
from tests.topologies import until as answered

pytestmark = [pytest.mark.integration, pytest.mark.requirement("R5", "R16", "B1")]

HOUR_MS: Final = 3_600_000
EXTENDED_BY_NOBODY: Final[dict[str, Any]] = {
    "tick_interval_ms": 1_000,
    "soft_close_window_ms": 3 * HOUR_MS,
    "max_extensions": 0,
}
BIDDERS: Final = 4
BIDS: Final = 20
"""So many acknowledgements say that bids are taken again."""
NO_EXTENSION: Final = {"AUCTION_TIMER_OUTAGE_EXTENSION_MS": "0"}
"""What is judged here is the end that was told, and not the time that is given back after an outage."""
NEW: Final[dict[str, Any]] = {"INSTANCE": "newcomer", "DRAIN_MS": 0, "OUTAGE_EXTENSION_MS": 0}
REPLICATED: Final = {"AUCTION_TIMER_DURABILITY": "replicated", "AUCTION_TIMER_DRAIN_MS": "0"} | NO_EXTENSION
REFUSED: Final = b"-ERR max number of clients reached\r\n"
DISK_BYTES: Final = 8 * 1024 * 1024
BLOCK_BYTES: Final = 4_096
FAILOVER_TIMEOUT_MS: Final = 1_500
"""Twice this is how long the sentinels leave a failover to a leader that they have heard nothing of."""
CRASHED: Final = 99
"""The exit code of a sentinel that crashes because it was asked to."""


def auction(stack: LiveStack, lasts_ms: int) -> tuple[str, int]:
    """An auction in its closing window that no bid extends, and its end."""
    auction_id, now = fresh_id(), now_of(stack)
    stack.post(started(auction_id, now, now + lasts_ms, **EXTENDED_BY_NOBODY))
    stack.until_status(auction_id, "CLOSING", "ENDED")
    return auction_id, now + lasts_ms


def until_after(stack: LiveStack, auction_id: str, instant: int) -> dict[str, Any]:
    """What is told of an auction once an instant has passed."""

    def view() -> dict[str, Any] | None:
        found = stack.timer(auction_id)
        return found if found["server_time"] > instant else None

    found: dict[str, Any] = polled(view, "the instant has passed")
    return found


def assert_closed_once(stack: LiveStack, auction_id: str, ends_at: int) -> None:
    """The log has one close, at the end that was told, and written not before it."""
    stack.until_status(auction_id, "ENDED")
    (close,) = [record for record in records_of(stack, auction_id) if record["event_type"] == "auction_timer_ended"]
    assert close["occurred_at"] == ends_at
    assert close["recorded_at"] >= ends_at


@contextlib.contextmanager
def full_house(path: Path) -> Iterator[None]:
    """The server at a socket takes no client but those it has."""
    with Redis(unix_socket_path=str(path), single_connection_client=True, retry=Retry(NoBackoff(), 0)) as operator:
        before = operator.config_get("maxclients")["maxclients"]
        operator.config_set("maxclients", 1)
        try:
            yield
        finally:
            operator.config_set("maxclients", before)


def first_word_of(path: Path) -> bytes:
    """What a server says to a client that has said nothing yet."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(path))
        return client.recv(1_000)


@pytest.mark.requirement("B3")
async def test_a_server_that_takes_no_more_clients_stops_nobody_it_has(short_tmp: Path) -> None:
    """The auction closes, and is announced, over the connections there are; who comes anew waits and gets in later."""
    stack = await asyncio.to_thread(LiveStack, short_tmp, env=NO_EXTENSION)
    door = stack.data_dir / "valkey.sock"
    try:
        auction_id, ends_at = await asyncio.to_thread(auction, stack, 3_000)
        watcher = Watcher(auction_id)
        with listen("127.0.0.1", 0) as listener, contextlib.ExitStack() as newcomers:
            async with crowd(watcher, port=port_of(stack.url)):
                with full_house(door):
                    assert first_word_of(door) == REFUSED
                    fd = listener.fileno()
                    engine = newcomers.enter_context(OwnRole(stack, "engine", **NEW))
                    gateway = newcomers.enter_context(OwnRole(stack, "gateway", "--fd", str(fd), fds=(fd,), **NEW))
                    (placed,) = await asyncio.to_thread(stack.post, bid(auction_id))
                    assert placed["status"] == "accepted"
                    await until(lambda: watcher.is_over, "the close is announced", [watcher])
                    await until(lambda: "clock_sample_failed" in gateway.logged(), "the new gateway complains")
                    await until(lambda: "engine_starting" in engine.logged(), "the new engine has begun")
                    assert first_word_of(door) == REFUSED
                    assert "shards_claimed" not in engine.logged()
                    assert (engine.process.poll(), gateway.process.poll()) == (None, None)
            with httpx.Client(base_url=url_of(listener), trust_env=False, timeout=10) as http:
                await asyncio.to_thread(polled, lambda: http.get("/readyz").status_code == 200, "it is ready")
            await until(lambda: "shards_claimed" in engine.logged(), "the new engine has its share")
        assert (len(watcher.snapshots), [code for code, _ in watcher.closes]) == (1, [4000])
        assert gaps([watcher], await asyncio.to_thread(lane, stack, [auction_id])) == []
        await asyncio.to_thread(assert_closed_once, stack, auction_id, ends_at)
    finally:
        await asyncio.to_thread(stack.stop)


@pytest.fixture
def small_disk(short_tmp: Path) -> Iterator[Path]:
    """A directory whose `data` is a disk of its own, and small."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if mount is None or unmount is None:
        pytest.skip("no program here mounts a disk")
    data = short_tmp / "data"
    data.mkdir(mode=0o700)
    options = f"size={DISK_BYTES},mode=0700"
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", options, "none", str(data)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a disk is not permitted here: {mounted.stderr.strip()}")
    try:
        yield short_tmp
    finally:
        subprocess.run([unmount, str(data)], check=True, capture_output=True)


def fill(ballast: Path) -> None:
    """Leave no free block."""
    with contextlib.suppress(FileNotFoundError), ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(BLOCK_BYTES))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@pytest.mark.requirement("B3")
async def test_a_full_disk_refuses_writes_and_nothing_else(small_disk: Path) -> None:
    """Timers are answered, sockets stay and count down; bids are 503 and no close is announced until there is space again."""
    archive = {"AUCTION_TIMER_AUDIT_URL": f"sqlite+aiosqlite:///{small_disk / 'audit.sqlite3'}"}
    stack = await asyncio.to_thread(LiveStack, small_disk, env=NO_EXTENSION | archive)
    ballast = stack.data_dir / "ballast"
    acknowledged: list[str] = []

    def is_taken(auction_id: str) -> bool:
        placed = bid(auction_id)
        answer = stack.http.post("/events", json=[placed])
        if answer.status_code == 202:
            acknowledged.append(placed["id"])
            return True
        assert answer.status_code == 503, answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        return False

    def is_full(auction_id: str) -> bool:
        fill(ballast)
        is_taken(auction_id)
        return bool(stack.redis("INFO", "persistence")["aof_last_write_status"] == "err")

    try:
        lasting, _ = await asyncio.to_thread(auction, stack, HOUR_MS)
        auction_id, ends_at = await asyncio.to_thread(auction, stack, 10_000)
        watchers = [Watcher(auction_id), Watcher(lasting)]
        async with crowd(*watchers, port=port_of(stack.url)):
            await asyncio.to_thread(polled, lambda: is_full(lasting), "the server cannot write")
            ticks = len(watchers[1].ticks)
            assert not await asyncio.to_thread(is_taken, lasting)
            await until(lambda: len(watchers[1].ticks) >= ticks + 3, "the countdown goes on", watchers)
            assert "tick_lane_lost" not in stack.logged(), "a server that refuses a ping is taken for gone"
            view = await asyncio.to_thread(until_after, stack, auction_id, ends_at)
            assert view["status"] == "CLOSING"
            assert not watchers[0].is_over
            ballast.unlink()
            await until(lambda: watchers[0].is_over, "the close is announced", watchers)
            await asyncio.to_thread(polled, lambda: is_taken(lasting), "bids are taken")
            told = len(acknowledged)
            await until(lambda: len(watchers[1].events) >= told, "every bid is told", watchers)
            assert [len(watcher.snapshots) for watcher in watchers] == [1, 1]
        await asyncio.to_thread(assert_closed_once, stack, auction_id, ends_at)
        assert gaps(watchers, await asyncio.to_thread(lane, stack, [auction_id, lasting])) == []
        recorded = {record["event_id"] for record in await asyncio.to_thread(records_of, stack, lasting)}
        assert set(acknowledged) <= recorded
    finally:
        await asyncio.to_thread(stack.stop)


class Bidders:
    """Bidders on an auction that lasts; each sends a bid again, with its own id, until it is acknowledged."""

    def __init__(self, stack: LiveStack) -> None:
        self._stack = stack
        self.auction_id, _ = auction(stack, HOUR_MS)
        self.acknowledged: list[str] = []

    @contextlib.asynccontextmanager
    async def bidding(self) -> AsyncIterator[None]:
        """All of them bid; none may fail."""
        async with httpx.AsyncClient(base_url=self._stack.url, trust_env=False, timeout=10) as http:
            tasks = [asyncio.create_task(self._bid(http)) for _ in range(BIDDERS)]
            try:
                yield
                assert not any(task.done() for task in tasks), tasks
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _bid(self, http: httpx.AsyncClient) -> None:
        while True:
            placed = bid(self.auction_id)
            while (answer := await http.post("/events", json=[placed])).status_code != 202:
                assert answer.status_code == 503, answer.text
                await asyncio.sleep(0.05)
            self.acknowledged.append(placed["id"])
            await asyncio.sleep(0.05)

    async def until_taken(self) -> None:
        """Wait until bids are acknowledged that were not yet."""
        wanted = len(self.acknowledged) + BIDS
        await until(lambda: len(self.acknowledged) >= wanted, "bids are taken")

    def assert_all_recorded(self) -> None:
        """Every bid that was acknowledged is in the log, once."""
        recorded = [record["event_id"] for record in records_of(self._stack, self.auction_id) if record["event_id"]]
        assert set(self.acknowledged) <= set(recorded)
        assert len(recorded) == len(set(recorded))


@pytest.fixture
def group() -> Iterator[SentinelGroup]:
    """A group of its own: what a failover leaves behind is nobody else's beginning."""
    with stopping(SentinelGroup()) as made:
        yield made


@pytest.fixture
def stack(group: SentinelGroup, short_tmp: Path) -> Iterator[LiveStack]:
    """A stack behind the group."""
    made = LiveStack(short_tmp, env=REPLICATED | {"AUCTION_TIMER_REDIS_URL": group.url})
    try:
        yield made
    finally:
        made.stop()


def named_by(sentinels: list[Member], group: SentinelGroup, old: Member) -> Member | None:
    """The primary after `old`, once these sentinels agree and it says so itself."""
    said = {str(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) for sentinel in sentinels}
    (found,) = [member for member in group.members if str(member.port) in said] if len(said) == 1 else [old]
    return found if found is not old and found.role() == "master" else None


@pytest.mark.requirement("B10")
async def test_an_old_primary_that_wakes_up_takes_nothing_back(group: SentinelGroup, stack: LiveStack) -> None:
    """It stops until the failover is over, and goes on believing that it leads: no bid is lost, no auction closes twice."""
    bidders = await asyncio.to_thread(Bidders, stack)
    old = group.primary
    async with bidders.bidding():
        await bidders.until_taken()
        within = await asyncio.to_thread(auction, stack, 1_500)
        old.freeze()
        try:
            await asyncio.to_thread(answered, lambda: named_by(group.sentinels, group, old), "there is a new primary")
            await bidders.until_taken()
        finally:
            old.thaw()
        behind = await asyncio.to_thread(auction, stack, 1_500)
        await asyncio.to_thread(answered, lambda: old.role() == "slave", "the old primary follows")
        await bidders.until_taken()
        for auction_id, ends_at in (within, behind):
            await asyncio.to_thread(assert_closed_once, stack, auction_id, ends_at)
    await asyncio.to_thread(bidders.assert_all_recorded)


@pytest.mark.requirement("B10")
async def test_a_failover_outlives_the_sentinel_that_leads_it(group: SentinelGroup, stack: LiveStack) -> None:
    """The leader crashes right after its election: another one ends the failover, no bid is lost, the auction closes once."""
    bidders = await asyncio.to_thread(Bidders, stack)
    old = group.primary
    for sentinel in group.sentinels:
        sentinel.ask("SENTINEL", "SET", SERVICE, "failover-timeout", FAILOVER_TIMEOUT_MS)
    async with bidders.bidding():
        await bidders.until_taken()
        auction_id, ends_at = await asyncio.to_thread(auction, stack, 1_500)
        for sentinel in group.sentinels:
            sentinel.ask("SENTINEL", "SIMULATE-FAILURE", "crash-after-election")
        old.kill()
        await until(lambda: any(each.process.poll() is not None for each in group.sentinels), "the leader crashes")
        survivors = [sentinel for sentinel in group.sentinels if sentinel.process.poll() is None]
        for sentinel in survivors:
            # Any word that asks for no failure takes the others back.
            sentinel.ask("SENTINEL", "SIMULATE-FAILURE", "help")
        assert [each.process.poll() for each in group.sentinels if each not in survivors] == [CRASHED]
        await asyncio.to_thread(answered, lambda: named_by(survivors, group, old), "there is a new primary")
        await bidders.until_taken()
        await asyncio.to_thread(assert_closed_once, stack, auction_id, ends_at)
    await asyncio.to_thread(bidders.assert_all_recorded)
