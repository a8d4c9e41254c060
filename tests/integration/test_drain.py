"""A deploy in the last minute of an auction: real gateways that are told to stop."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest

from auction_timer.stack import drain_ms
from engine.settings import Settings
from gateway.door import DRAIN_LOOK_EVERY_S, LAST_MINUTE_MS, OVER_LINGER_S
from tests.integration.crowd import DEADLINE_S, Watcher, crowd, gaps, lane, port_of, until
from tests.integration.events import bid, fresh_id, started
from tests.integration.own_role import OwnGateway
from tests.live import LiveStack

pytestmark = pytest.mark.integration

HOUR_MS: Final = 3_600_000
COME_BACK: Final = {"retry_after_ms": 500, "jitter_ms": 3_000}
FAR_WATCHERS: Final = 40
NEAR_WATCHERS: Final = 20
CLOSE_MS: Final = 6_000
"""From registration to the end of the auction that is in its last minute."""
AFTER_CLOSE_S: Final = 5.0
"""What the contract promises for the farewell 4000."""


@pytest.fixture(scope="module")
def stack() -> Iterator[LiveStack]:
    """One stack for all gateways of this module."""
    with TemporaryDirectory(prefix="at-") as directory:
        made = LiveStack(Path(directory))
        try:
            yield made
        finally:
            made.stop()


async def registered(stack: LiveStack, ends_in_ms: int, status: str = "ACTIVE", **policy: Any) -> str:
    """An auction that runs."""
    auction_id = fresh_id()
    now = (await asyncio.to_thread(stack.post, bid(fresh_id())))[0]["arrival_ms"]
    await asyncio.to_thread(stack.post, started(auction_id, now, now + ends_in_ms, **policy))
    await asyncio.to_thread(stack.until_status, auction_id, status)
    return auction_id


async def ended(gateway: OwnGateway) -> int:
    """Wait until a gateway has stopped by itself; its exit code."""
    await until(lambda: gateway.process.poll() is not None, "the gateway has stopped")
    return gateway.stop()


@pytest.mark.requirement("B9", "B4")
async def test_a_deploy_does_not_hit_the_last_minute(stack: LiveStack) -> None:
    """Watchers of far auctions go at once and lose nothing; those of a last minute see its bids and its end, then 4000."""
    gateway = await asyncio.to_thread(OwnGateway, stack)
    try:
        far = await registered(stack, 2 * HOUR_MS)
        near = await registered(stack, CLOSE_MS, "CLOSING", soft_close_window_ms=HOUR_MS, max_extensions=0)
        many = [Watcher(far) for _ in range(FAR_WATCHERS)]
        few = [Watcher(near) for _ in range(NEAR_WATCHERS)]
        async with crowd(*many, *few, port=gateway.port):
            for watcher in (*many, *few):
                watcher.port = port_of(stack.url)
            began = time.monotonic()
            gateway.terminate()
            gateway.terminate()  # as `timeout` and many a process manager do: it is one signal
            await until(lambda: all(watcher.closes for watcher in many), "the far ones are sent away", many)
            assert not any(watcher.closes for watcher in few), "before the others, which wait for the close"
            assert {watcher.closes[0][0] for watcher in many} == {1001}
            assert [json.loads(watcher.closes[0][1]) for watcher in many] == [COME_BACK] * FAR_WATCHERS
            # Both auctions go on meanwhile.
            await asyncio.to_thread(stack.post, bid(far), bid(near))
            await until(lambda: all(watcher.is_over for watcher in few), "the near ones are let go", few)
            assert await ended(gateway) == 0
            assert time.monotonic() - began < CLOSE_MS / 1_000 + AFTER_CLOSE_S + 2
            assert [watcher.closes for watcher in few] == [[(4000, "the auction is over")]] * NEAR_WATCHERS
            for watcher in few:
                assert [name for _, name in watcher.events] == ["bid.accepted", "timer.ended"]
            await until(
                lambda: all(watcher.connected and watcher.events for watcher in many), "the far ones are back", many
            )
            assert all([shot["recovered"] for shot in watcher.snapshots] == [None, True] for watcher in many)
            lanes = await asyncio.to_thread(lane, stack, [far, near])
            assert gaps((*many, *few), lanes) == []
    finally:
        gateway.stop()


@pytest.mark.requirement("B9", "B4")
async def test_a_last_minute_that_does_not_end_holds_a_deploy_up_for_so_long_and_no_longer(stack: LiveStack) -> None:
    """At the deadline its watchers are sent away with the others' words, resume elsewhere, and the gateway exits with 0."""
    drain_ms = 1_500
    gateway = await asyncio.to_thread(OwnGateway, stack, DRAIN_MS=drain_ms)
    try:
        near = await registered(stack, 50_000, "CLOSING", soft_close_window_ms=HOUR_MS, max_extensions=0)
        watchers = [Watcher(near) for _ in range(NEAR_WATCHERS)]
        async with crowd(*watchers, port=gateway.port):
            for watcher in watchers:
                watcher.port = port_of(stack.url)
            began = time.monotonic()
            gateway.terminate()
            await until(lambda: all(watcher.closes for watcher in watchers), "everyone is sent away", watchers)
            assert time.monotonic() - began > drain_ms / 1_000
            assert await ended(gateway) == 0
            assert {code for watcher in watchers for code, _ in watcher.closes} == {1001}
            await asyncio.to_thread(stack.post, bid(near))
            await until(
                lambda: all(watcher.connected and watcher.events for watcher in watchers), "all are back", watchers
            )
            assert gaps(watchers, await asyncio.to_thread(lane, stack, [near])) == []
    finally:
        gateway.stop()


async def refused(port: int) -> None:
    """Return when a newcomer is refused at once. Until then, each must be served or cut off: none is left waiting."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            await reader.read()
        writer.close()


@pytest.mark.requirement("B9")
async def test_stopping_everything_lets_a_last_minute_come_to_its_end(short_tmp: Path) -> None:
    """SIGTERM to `serve`, also when it comes twice at once, stops the gateways first: newcomers are refused by all of them
    at once, the engine still closes the auction, its watchers read it, exit code 0."""
    stack = await asyncio.to_thread(LiveStack, short_tmp, "--gateways", "2")
    try:
        near = await registered(stack, CLOSE_MS + 4_000, "CLOSING", soft_close_window_ms=HOUR_MS)
        watchers = [Watcher(near) for _ in range(NEAR_WATCHERS)]
        async with crowd(*watchers, port=port_of(stack.url)), asyncio.timeout(DEADLINE_S):
            stack.process.send_signal(signal.SIGTERM)
            stack.process.send_signal(signal.SIGTERM)
            await refused(port_of(stack.url))
            assert not any(watcher.closes for watcher in watchers), "while the others wait for the close"
            await until(lambda: stack.process.poll() is not None, "everything has stopped", watchers)
            for watcher in watchers:
                assert [name for _, name in watcher.events] == ["timer.ended"]
                assert watcher.closes == [(4000, "the auction is over")]
    finally:
        assert await asyncio.to_thread(stack.stop) == 0


@pytest.mark.requirement("B9")
@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_the_wait_for_a_last_minute(short_tmp: Path, again: signal.Signals) -> None:
    """Ctrl-C and Ctrl-C again: `serve` sends its watchers away, although they wait for a close, and stops in order."""
    stack = await asyncio.to_thread(LiveStack, short_tmp, env={"AUCTION_TIMER_DRAIN_MS": "600000"})
    try:
        near = await registered(stack, 50_000, "CLOSING", soft_close_window_ms=HOUR_MS, max_extensions=0)
        watchers = [Watcher(near) for _ in range(NEAR_WATCHERS)]
        async with crowd(*watchers, port=port_of(stack.url)):
            stack.process.send_signal(signal.SIGINT)
            await refused(port_of(stack.url))
            assert not any(watcher.closes for watcher in watchers), "at the first one they stay"

            def gone() -> bool:
                stack.process.send_signal(again)  # what comes close behind the first one does not count yet
                return all(watcher.closes for watcher in watchers)

            await until(gone, "everyone is sent away", watchers)
            assert {code for watcher in watchers for code, _ in watcher.closes} == {1001}
            await until(lambda: stack.process.poll() is not None, "everything has stopped")
    finally:
        assert await asyncio.to_thread(stack.stop) == 0


def test_a_gateway_waits_for_all_of_a_last_minute_and_serve_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default covers a close a minute away and its farewell; nobody waits so long for a Ctrl-C, unless it was set."""
    monkeypatch.delenv("AUCTION_TIMER_DRAIN_MS", raising=False)
    unset = Settings(_env_file=None)
    assert unset.drain_ms > LAST_MINUTE_MS + (OVER_LINGER_S + DRAIN_LOOK_EVERY_S) * 1_000
    assert drain_ms(unset) == 25_000
    for chosen in (0, 65_000, 90_000):
        assert drain_ms(Settings(_env_file=None, drain_ms=chosen)) == chosen
