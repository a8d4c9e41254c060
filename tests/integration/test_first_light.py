"""From an event to a close, as a newcomer sees it: HTTP in, a socket out, real processes between."""

import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.integration.events import bid, bridged, event, fresh_id, started
from tests.live import LiveStack

pytestmark = pytest.mark.integration

LONG_MS = 7_200_000
"""Two hours: so long before its end an auction is ACTIVE, with the default window of 15 minutes."""

TIMER_FIELDS = {
    "auction_id", "status", "version", "starts_at", "ends_at", "original_ends_at", "soft_close_until", "final_deadline",
    "extension_count", "extension_used_ms", "extension_left_ms", "at_cap", "remaining_ms", "server_time", "trace_id",
    "cursor", "stale",
}  # fmt: skip
TICK_FIELDS = {
    "type", "auction_id", "server_time", "trace_id", "status", "version", "ends_at", "remaining_ms", "soft_close_until",
    "final_deadline", "extension_count", "extension_used_ms", "extension_left_ms", "at_cap",
}  # fmt: skip


def now_of(stack: LiveStack) -> int:
    """The auction clock, from a throw-away duplicate-safe event."""
    answer = stack.post(event("offers.cancellation.completed", auction_id=fresh_id(), reason="clock"))
    return int(answer[0]["arrival_ms"])


def socket_url(stack: LiveStack, auction_id: str, query: str = "") -> str:
    return stack.url.replace("http", "ws", 1) + f"/auctions/{auction_id}/updates{query}"


def watch(stack: LiveStack, auction_id: str, query: str = "", **options: Any) -> tuple[list[dict[str, Any]], int]:
    """All frames of a socket until the server closes it, and the close code."""
    frames = []
    with connect(socket_url(stack, auction_id, query), compression=None, **options) as socket:
        try:
            while True:
                frames.append(json.loads(socket.recv(timeout=20)))
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            return frames, closed.rcvd.code


@pytest.mark.requirement("R1", "R4", "R5", "R7", "B1", "B6")
def test_an_auction_runs_from_its_event_to_its_close(live_stack: LiveStack) -> None:
    """A socket sees the snapshot first, ticks, the window, a bid that extends, the close on time, and close code 4000."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now, now + 6_000, soft_close_window_ms=3_000, extension_ms=100))
    live_stack.until_status(auction_id, "ACTIVE")
    frames = []
    with connect(socket_url(live_stack, auction_id), compression=None) as socket:
        bids = 0
        try:
            while True:
                frames.append(json.loads(socket.recv(timeout=20)))
                if frames[-1]["type"] == "timer.closing" and not bids:
                    bids += 1
                    arrival = live_stack.post(bid(auction_id, amount_minor=500, currency="EUR", bidder_id="b-1"))[0][
                        "arrival_ms"
                    ]
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            assert closed.rcvd.code == 4000
    types = [frame["type"] for frame in frames]
    assert types[0] == "timer.snapshot"
    assert set(frames[0]["timer"]) >= TIMER_FIELDS
    assert frames[0]["recovered"] is None
    events = [kind for kind in types if kind != "timer.tick"]
    # The bid arrives at the start of the window, when 3 s are left: an extension to 0.1 s does not move the end.
    assert events == ["timer.snapshot", "timer.closing", "bid.accepted", "timer.ended"]
    (accepted,) = [frame for frame in frames if frame["type"] == "bid.accepted"]
    assert (accepted["amount_minor"], accepted["currency"], accepted["bidder_id"]) == (500, "EUR", "b-1")
    assert accepted["extended"] is False
    assert arrival >= now + 3_000
    for tick in (frame for frame in frames if frame["type"] == "timer.tick"):
        assert set(tick) == TICK_FIELDS
        assert tick["remaining_ms"] == max(0, tick["ends_at"] - tick["server_time"])
    ended = frames[-1]
    assert ended["type"] == "timer.ended"
    assert ended["timer"]["ended_at"] == ended["timer"]["ends_at"] == now + 6_000
    assert ended["server_time"] >= ended["timer"]["ended_at"]
    assert all(frame["trace_id"] for frame in frames)


@pytest.mark.requirement("R15", "B2")
def test_a_bid_in_the_window_extends_and_the_extension_is_what_the_arrival_says(live_stack: LiveStack) -> None:
    """The new end is the arrival plus the extension, and every viewer is told before and after."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now - 5_000, now + 5_000, soft_close_window_ms=6_000, extension_ms=6_000))
    live_stack.until_status(auction_id, "CLOSING")
    placed = bid(auction_id)
    (result,) = live_stack.post(placed)
    frames, code = watch(live_stack, auction_id)
    assert code == 4000
    timer = live_stack.timer(auction_id)
    assert timer["ends_at"] == result["arrival_ms"] + 6_000
    assert timer["extension_count"] == 1
    assert timer["extension_used_ms"] == timer["ends_at"] - (now + 5_000)
    assert frames[-1]["timer"]["ended_at"] == timer["ends_at"]


@pytest.mark.requirement("R4")
def test_ticks_come_at_least_once_a_second_near_the_end_and_in_phase(live_stack: LiveStack) -> None:
    """Two viewers of one auction get the very same ticks, at whole seconds of remaining time."""
    for _ in range(3):
        auction_id, now = fresh_id(), now_of(live_stack)
        live_stack.post(started(auction_id, now - 1_000, now + 5_500, soft_close_window_ms=100, extension_ms=100))
        live_stack.until_status(auction_id, "ACTIVE")
        one, other = (
            [
                frame["remaining_ms"]
                for frame in frames
                if frame["type"] == "timer.tick" and frame["status"] == "ACTIVE" and frame["remaining_ms"] < 3_500
            ]
            for frames in _both(live_stack, auction_id)
        )
        assert one == other
        # Never before a whole second, and not long after it: 250 ms is the drift bound.
        if [-(-left // 1_000) for left in one] == [3, 2, 1] and all(-left % 1_000 <= 250 for left in one):
            return
    pytest.fail(f"three times on end, as a machine that stands still cannot explain: {one}")


def _both(stack: LiveStack, auction_id: str) -> list[list[dict[str, Any]]]:
    frames: list[list[dict[str, Any]]] = [[], []]
    with (
        connect(socket_url(stack, auction_id), compression=None) as one,
        connect(socket_url(stack, auction_id), compression=None) as other,
    ):
        for kept, socket in zip(frames, (one, other), strict=True):
            try:
                while True:
                    kept.append(json.loads(socket.recv(timeout=20)))
            except ConnectionClosed:
                continue
    return frames


@pytest.mark.requirement("R2")
def test_the_same_event_twice_counts_once(live_stack: LiveStack) -> None:
    """A repetition is answered `duplicate` with the arrival of the first, and changes nothing."""
    auction_id, now = fresh_id(), now_of(live_stack)
    start = started(auction_id, now, now + LONG_MS)
    (first,) = live_stack.post(start)
    (second,) = live_stack.post(start)
    assert (first["status"], second["status"]) == ("accepted", "duplicate")
    assert first["arrival_ms"] == second["arrival_ms"]
    same_terms = started(auction_id, now, now + LONG_MS)
    live_stack.post(same_terms)
    assert live_stack.until_status(auction_id, "ACTIVE")["version"] == 2


def test_one_batch_with_a_repetition_takes_the_first_and_names_the_second(live_stack: LiveStack) -> None:
    """Within one request, too, the same id counts once."""
    placed = started(fresh_id(), 1_000, 2_000)
    results = live_stack.post(placed, placed)
    assert [result["status"] for result in results] == ["accepted", "duplicate"]


@pytest.mark.requirement("R19", "R27")
def test_a_cancellation_before_the_start_wins_whatever_names_it(live_stack: LiveStack) -> None:
    """An auction cancelled by its own id, or by its offer's, before its start arrived is registered as CANCELLED."""
    now = now_of(live_stack)
    by_auction, by_offer, offer_id = fresh_id(), fresh_id(), f"offer-{fresh_id()}"
    live_stack.post(bridged("offers.cancellation.completed", auction_id=by_auction, reason="withdrawn"))
    live_stack.post(bridged("offers.cancellation.completed", offer_id=offer_id, reason="withdrawn"))
    assert live_stack.http.get(f"/auctions/{by_auction}/timer").status_code == 404
    live_stack.post(
        started(by_auction, now, now + LONG_MS),
        event("offers.auction.started", auction_id=by_offer, offer_id=offer_id, starts_at=now, ends_at=now + LONG_MS),
    )
    for auction_id in (by_auction, by_offer):
        timer = live_stack.until_status(auction_id, "CANCELLED")
        assert timer["reason"] == "withdrawn"
        assert timer["cancelled_at"] >= now
    live_stack.post(started(by_auction, now, now + LONG_MS))
    assert live_stack.timer(by_auction)["status"] == "CANCELLED"


@pytest.mark.requirement("R19")
def test_a_cancellation_by_offer_reaches_its_auction(live_stack: LiveStack) -> None:
    """A cancellation that names only the offer cancels the auction, and everyone who watches is let go with 4000."""
    auction_id, offer_id, now = fresh_id(), f"offer-{fresh_id()}", now_of(live_stack)
    live_stack.post(
        event("offers.auction.started", auction_id=auction_id, offer_id=offer_id, starts_at=now, ends_at=now + LONG_MS)
    )
    live_stack.until_status(auction_id, "ACTIVE")
    with connect(socket_url(live_stack, auction_id), compression=None) as socket:
        assert json.loads(socket.recv(timeout=10))["timer"]["offer_id"] == offer_id
        live_stack.post(event("offers.cancellation.completed", offer_id=offer_id, reason="sold elsewhere"))
        kinds = []
        try:
            while True:
                kinds.append(json.loads(socket.recv(timeout=20))["type"])
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            assert closed.rcvd.code == 4000
    assert [kind for kind in kinds if kind != "timer.tick"] == ["timer.cancelled"]


def test_a_start_that_is_already_past_closes_at_once_as_of_its_end(live_stack: LiveStack) -> None:
    """`ends_at` in the past at arrival: registered, and closed as of `ends_at`."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now - 60_000, now - 30_000))
    assert live_stack.until_status(auction_id, "ENDED")["ended_at"] == now - 30_000


def test_pause_freezes_and_resume_gives_the_time_back(live_stack: LiveStack) -> None:
    """While paused the remaining time stands still and no deadline is set; after it the end has moved by the pause."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now, now + LONG_MS))
    (paused,) = live_stack.post(event("auctions.pause.requested", auction_id=auction_id, reason="question"))
    timer = live_stack.until_status(auction_id, "PAUSED")
    frozen = now + LONG_MS - paused["arrival_ms"]
    assert timer["remaining_ms"] == timer["paused_remaining_ms"] == frozen
    shard = _shard(live_stack, auction_id)
    assert live_stack.redis("ZSCORE", f"auction:deadlines:{{{shard}}}", auction_id) is None
    (resumed,) = live_stack.post(event("auctions.resume.requested", auction_id=auction_id))
    timer = live_stack.until_status(auction_id, "ACTIVE")
    assert timer["ends_at"] == resumed["arrival_ms"] + frozen
    assert int(live_stack.redis("ZSCORE", f"auction:deadlines:{{{shard}}}", auction_id)) == timer["ends_at"]
    assert timer["extension_used_ms"] == 0


def _shard(stack: LiveStack, auction_id: str) -> int:
    found = [k for k in range(8) if stack.redis("EXISTS", f"auction:timer:{{{k}}}:{auction_id}")]
    assert len(found) == 1
    return found[0]


@pytest.mark.requirement("R1", "R3", "R26")
def test_redis_holds_what_the_contract_names(live_stack: LiveStack) -> None:
    """Hash, deadline, audit with all its fields, event lane, cursor and lease are where the contract says."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now, now + LONG_MS))
    live_stack.until_status(auction_id, "ACTIVE")
    shard = _shard(live_stack, auction_id)
    fields = _pairs(live_stack.redis("HGETALL", f"auction:timer:{{{shard}}}:{auction_id}"))
    assert (fields["status"], fields["ends_at"], fields["version"]) == ("ACTIVE", str(now + LONG_MS), "2")
    assert int(live_stack.redis("ZSCORE", f"auction:deadlines:{{{shard}}}", auction_id)) == now + LONG_MS
    records = [_pairs(row[1]) for row in live_stack.redis("XRANGE", f"auction:audit:{{{shard}}}", "-", "+")]
    mine = [record for record in records if record["auction_id"] == auction_id]
    assert [record["event_type"] for record in mine] == ["auction_timer_registered", "auction_timer_started"]
    wanted = {
        "event_type", "auction_id", "actor_type", "prev_status", "new_status", "occurred_at", "recorded_at",
        "correlation_id", "trace_id", "seq", "prev_hash", "hash",
    }  # fmt: skip
    assert all(set(record) >= wanted for record in mine)
    assert (
        live_stack.redis(
            "EXISTS", f"auction:updates:{{{shard}}}", f"auction:cursor:{{{shard}}}", f"auction:lease:{{{shard}}}"
        )
        == 3
    )
    assert _pairs(live_stack.redis("HGETALL", "auction:meta"))["shards"] == "8"


def _pairs(answer: Any) -> dict[str, str]:
    rows = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in rows}


@pytest.mark.requirement("B4")
def test_a_socket_that_comes_back_gets_what_it_missed(live_stack: LiveStack) -> None:
    """With `since` the missed events follow the snapshot; a cursor nobody knows is told plainly that they do not."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now, now + LONG_MS))
    live_stack.until_status(auction_id, "ACTIVE")
    with connect(socket_url(live_stack, auction_id), compression=None) as socket:
        cursor = json.loads(socket.recv(timeout=10))["cursor"]
    live_stack.post(bid(auction_id, bid_id="b-1"), bid(auction_id, bid_id="b-2"))
    live_stack.post(event("auctions.cancel.requested", auction_id=auction_id, reason="fault"))
    live_stack.until_status(auction_id, "CANCELLED")
    frames, code = watch(live_stack, auction_id, f"?since={cursor}")
    assert code == 4000
    assert frames[0]["recovered"] is True
    assert [(f["type"], f.get("bid_id")) for f in frames[1:]] == [
        ("bid.accepted", "b-1"),
        ("bid.accepted", "b-2"),
        ("timer.cancelled", None),
    ]
    for unknown in ("999.1-0", "nonsense", cursor.split(".")[0] + ".99999999999999-0"):
        frames, _ = watch(live_stack, auction_id, f"?since={unknown}")
        assert frames[0]["recovered"] is False
        assert len(frames) == 1


@pytest.mark.requirement("R8", "B5")
def test_the_socket_answers_clock_questions_and_refuses_what_is_no_question(live_stack: LiveStack) -> None:
    """`sync` is answered with both server times; the third message that is none closes with 4400."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now, now + LONG_MS))
    live_stack.until_status(auction_id, "ACTIVE")
    with connect(socket_url(live_stack, auction_id), compression=None) as socket:
        socket.recv(timeout=10)
        socket.send(json.dumps({"type": "sync", "t0": 123.5, "drift_ms": 4.5, "rtt_ms": 2}))
        answer = _next_not_tick(socket)
        assert (answer["type"], answer["t0"]) == ("sync", 123.5)
        assert now <= answer["t1"] <= answer["t2"]
        for junk in ("{", '{"type":"sync"}', '["sync"]'):
            socket.send(junk)
            refused = _next_not_tick(socket)
            assert (refused["type"], refused["error_code"]) == ("error", "BAD_MESSAGE")
        with pytest.raises(ConnectionClosed) as closed:
            _next_not_tick(socket)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4400


def _next_not_tick(socket: Any) -> dict[str, Any]:
    while True:
        frame: dict[str, Any] = json.loads(socket.recv(timeout=10))
        if frame["type"] != "timer.tick":
            return frame


@pytest.mark.parametrize("auction_id", ["nobody-knows-me", "a%20b", "x" * 129, "..%2f"])
def test_an_unknown_auction_is_404_everywhere(live_stack: LiveStack, auction_id: str) -> None:
    """Timer and socket handshake answer 404 with the same problem."""
    answer = live_stack.http.get(f"/auctions/{auction_id}/timer")
    assert answer.status_code == 404
    assert answer.json()["error_code"] == "RESOURCE_NOT_FOUND"
    assert answer.headers["content-type"] == "application/problem+json"
    with pytest.raises(InvalidStatus) as refused, connect(socket_url(live_stack, auction_id)):
        pass
    assert refused.value.response.status_code == 404


def test_a_page_from_elsewhere_gets_no_socket_and_may_send_nothing(live_stack: LiveStack) -> None:
    """A foreign `Origin` is answered 403, on the socket and on POST; the gateway's own is not."""
    auction_id, now = fresh_id(), now_of(live_stack)
    live_stack.post(started(auction_id, now, now + LONG_MS))
    live_stack.until_status(auction_id, "ACTIVE")
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(socket_url(live_stack, auction_id), origin="http://evil.example"),
    ):
        pass
    assert refused.value.response.status_code == 403
    with connect(socket_url(live_stack, auction_id), origin=live_stack.url) as socket:
        assert socket.recv(timeout=10)
    answer = live_stack.http.post("/events", json=[], headers={"Origin": "http://evil.example"})
    assert (answer.status_code, answer.json()["error_code"]) == (403, "FOREIGN_ORIGIN")
