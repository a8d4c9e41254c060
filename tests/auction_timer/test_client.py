"""The client: its clock and session without a network, its HTTP side on a fake transport, its socket on a real loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from auction_timer import client
from auction_timer.client import (
    FIRST_WITHIN_MS,
    HEARTBEAT_MS,
    OVER_WITHIN_MS,
    SMOOTH_MS,
    Api,
    ClientError,
    ConnectionState,
    Frame,
    GatewayAwayError,
    MalformedEventsError,
    RefusedError,
    Retry,
    ServerClock,
    SocketClosedError,
    TimerSession,
    TokenError,
    UnknownAuctionError,
    UrlError,
    gateway_url,
    rfc3339,
    socket_url,
    watch_auction,
)
from engine.clock import MonotonicNs
from engine.domain.instants import EpochMs
from engine.domain.lifecycle import Status
from tests.fakes.clock import Timeline
from tests.fakes.loop import run

NS = 1_000_000
URL = "http://gateway.test:8080"
AUCTION = "a-1"
BORN_MS = 1_700_000_000_000
BIRTH = MonotonicNs(0)
QUICK = Retry(first_ms=1, most_ms=2, deadline_ms=5_000)


def at(ms: float) -> MonotonicNs:
    """An instant of the client's monotonic clock."""
    return MonotonicNs(round(ms * NS))


def timer(**changes: Any) -> dict[str, Any]:
    """A timer that ends 60 s after the birth of the server's time."""
    return {
        "auction_id": AUCTION,
        "status": "ACTIVE",
        "version": 2,
        "ends_at": BORN_MS + 60_000,
        "original_ends_at": BORN_MS + 60_000,
        "final_deadline": BORN_MS + 90_000,
        "extension_count": 0,
        "extension_left_ms": 30_000,
        "at_cap": False,
        "remaining_ms": 60_000,
        "server_time": BORN_MS,
    } | changes


def snapshot(server_time: int = BORN_MS, **changes: Any) -> Frame:
    """The first frame of a socket."""
    frame: Frame = {
        "type": "timer.snapshot",
        "auction_id": AUCTION,
        "cursor": "0.5-0",
        "server_time": server_time,
        "recovered": None,
        "heartbeat_ms": HEARTBEAT_MS,
        "timer": timer(),
    }
    return frame | changes


def event(kind: str, cursor: str, server_time: int = BORN_MS, **fields: Any) -> Frame:
    """A frame of the event lane."""
    return {"type": kind, "auction_id": AUCTION, "cursor": cursor, "server_time": server_time} | fields


def tick(version: int, server_time: int = BORN_MS, **fields: Any) -> Frame:
    """A frame of the tick lane."""
    shown = {"status": "ACTIVE", "ends_at": BORN_MS + 60_000, "remaining_ms": 1} | fields
    return {"type": "timer.tick", "auction_id": AUCTION, "server_time": server_time, "version": version} | shown


def live(now: MonotonicNs = BIRTH, **options: Any) -> TimerSession:
    """A session that has its snapshot."""
    session = TimerSession(AUCTION, **options)
    session.connected(now)
    session.receive(snapshot(), now)
    return session


class TestUrls:
    """What is a gateway's URL, and what follows from it."""

    @pytest.mark.parametrize(
        ("url", "socket"),
        [
            ("http://127.0.0.1:8080", "ws://127.0.0.1:8080/auctions/a-1/updates"),
            ("http://127.0.0.1:8080/", "ws://127.0.0.1:8080/auctions/a-1/updates"),
            ("https://bids.example/timer/", "wss://bids.example/timer/auctions/a-1/updates"),
            ("http://[::1]:80", "ws://[::1]:80/auctions/a-1/updates"),
        ],
    )
    def test_the_socket_is_where_the_gateway_is(self, url: str, socket: str) -> None:
        """The socket's URL has the scheme that belongs to the gateway's, and its path."""
        assert socket_url(url, AUCTION) == socket

    @pytest.mark.parametrize(
        "url", ["", "127.0.0.1:8080", "ws://h", "http://", "http://h:x", "http://h/?q=1", "http://[h"]
    )
    def test_another_url_is_told_at_once(self, url: str) -> None:
        """What cannot be a gateway is refused with the form that could."""
        with pytest.raises(UrlError, match="http://HOST:PORT"):
            gateway_url(url)

    def test_an_id_cannot_leave_its_path(self) -> None:
        """Characters with a meaning in a URL are escaped."""
        assert socket_url(URL, "../x?y#z").endswith("/auctions/..%2Fx%3Fy%23z/updates")

    def test_instants_are_written_in_utc(self) -> None:
        """An instant is RFC 3339 with milliseconds, exactly."""
        assert rfc3339(EpochMs(1_795_328_519_001)) == "2026-11-22T06:21:59.001Z"
        assert rfc3339(EpochMs(1)) == "1970-01-01T00:00:00.001Z"


class TestServerClock:
    """The auction clock as one client estimates it."""

    def test_the_worked_example_of_its_docstring_holds(self) -> None:
        """A correction by 30 ms is a drift of -30 ms and is gone after 0.6 s at 5 %."""
        clock = ServerClock()
        assert clock.hear(BORN_MS - 50, at(10_000)) == 0
        clock.answer(at(10_000), BORN_MS, BORN_MS, at(10_040))
        assert clock.drift_ms == pytest.approx(-30)
        assert clock.rtt_ms == pytest.approx(40)
        assert clock.now_ms(at(10_040)) == pytest.approx(BORN_MS - 10)
        assert clock.now_ms(at(10_640)) == pytest.approx(BORN_MS + 620)
        assert clock.now_ms(at(11_640)) == pytest.approx(BORN_MS + 1_620)

    def test_it_knows_nothing_before_any_evidence(self) -> None:
        """Without a frame there is no time."""
        clock = ServerClock()
        assert clock.now_ms(at(5)) is None
        assert clock.drift_ms is None

    def test_the_shortest_round_trip_counts(self) -> None:
        """An exchange with a long round trip does not spoil a short one."""
        clock = ServerClock()
        clock.answer(at(0), BORN_MS + 1, BORN_MS + 1, at(2))
        clock.answer(at(100), BORN_MS + 190, BORN_MS + 190, at(200))
        assert clock.now_ms(at(200)) == pytest.approx(BORN_MS + 200)
        assert clock.rtt_ms == pytest.approx(2)

    def test_an_old_sample_gives_way(self) -> None:
        """The same short round trip, minutes later, is worth less than a fresh one that is longer."""
        clock = ServerClock()
        clock.answer(at(0), BORN_MS + 1, BORN_MS + 1, at(2))
        clock.answer(at(120_000), BORN_MS + 120_040, BORN_MS + 120_040, at(120_020))
        assert clock.rtt_ms == pytest.approx(20)

    def test_frames_bound_the_clock_from_below_until_it_was_asked(self) -> None:
        """A frame that comes faster than the one before shows that our clock was behind."""
        clock = ServerClock()
        clock.hear(BORN_MS, at(80))
        clock.hear(BORN_MS + 100, at(110))
        assert clock.now_ms(at(10_000)) == pytest.approx(BORN_MS + 9_990)

    @pytest.mark.requirement("R9")
    def test_a_machine_that_slept_believes_the_new_evidence_only(self) -> None:
        """Where two exchanges cannot both be true, the older ones are forgotten and the step is taken at once."""
        clock = ServerClock()
        clock.answer(at(0), BORN_MS + 1, BORN_MS + 1, at(2))
        clock.answer(at(1_000), BORN_MS + 61_010, BORN_MS + 61_010, at(1_020))
        assert clock.now_ms(at(1_020)) == pytest.approx(BORN_MS + 61_020)
        assert clock.drift_ms == pytest.approx(-60_000, abs=10)

    @given(
        st.integers(-(10**12), 10**12),
        st.lists(st.tuples(st.integers(1, 5_000), st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=20),
    )
    def test_the_truth_lies_within_the_best_round_trip(
        self, offset_ms: int, exchanges: list[tuple[int, int, int]]
    ) -> None:
        """However asymmetric the ways, the goal is wrong by at most half the round trip in force and what was cut off."""
        clock = ServerClock()
        now = 0
        for pause, there, back in exchanges:
            asked = now + pause
            now = asked + there + back
            stamp = asked + there + offset_ms
            clock.answer(at(asked), stamp, stamp, at(now))
        assert clock.rtt_ms is not None
        much_later = at(now + 60_000)
        shown = clock.now_ms(much_later)
        assert shown is not None
        assert abs(shown - (now + 60_000 + offset_ms)) <= clock.rtt_ms / 2 + 1

    @pytest.mark.requirement("R9")
    @given(st.lists(st.integers(0, int(SMOOTH_MS) - 1), min_size=1, max_size=30), st.integers(1, 700))
    def test_small_corrections_never_turn_the_clock_back(self, ways: list[int], step_ms: int) -> None:
        """While every correction is below 100 ms, the time that is shown only grows, and no more than 5 % too fast."""
        clock = ServerClock()
        clock.hear(BORN_MS, at(0))
        before, now = BORN_MS, 0
        for way in ways:
            now += step_ms
            clock.answer(at(now - way), BORN_MS + now, BORN_MS + now, at(now))
            shown = clock.now_ms(at(now))
            assert shown is not None
            assert 0.95 * step_ms - 0.01 <= shown - before <= 1.05 * step_ms + 0.01
            before = shown


class TestCountdown:
    """What a session shows."""

    @pytest.mark.requirement("R9")
    def test_it_counts_down_on_the_servers_clock(self) -> None:
        """The remaining time follows from the end and the server's time, rounded up."""
        session = live(at(500))
        assert session.remaining_ms(at(500)) == 60_000
        assert session.remaining_ms(at(1_500.4)) == 59_000
        assert session.remaining_ms(at(60_499.5)) == 1
        assert session.remaining_ms(at(99_999)) == 0

    def test_it_shows_nothing_before_the_snapshot(self) -> None:
        """Before the first frame there is no countdown."""
        session = TimerSession(AUCTION)
        session.connected(at(0))
        assert session.remaining_ms(at(0)) is None
        assert session.status is None

    def test_a_paused_auction_stands_still(self) -> None:
        """While paused the countdown is frozen, and runs again after."""
        session = live()
        paused = timer(status="PAUSED", version=3, paused_remaining_ms=42_000)
        session.receive(event("timer.paused", "0.6-0", timer=paused), at(10))
        assert session.remaining_ms(at(30_000)) == 42_000
        session.receive(tick(4, BORN_MS + 30_000, ends_at=BORN_MS + 72_000), at(30_000))
        assert session.remaining_ms(at(30_000)) == 42_000
        assert session.remaining_ms(at(31_000)) == 41_000

    def test_a_tick_can_tell_of_a_pause(self) -> None:
        """A tick of a paused auction freezes the countdown as the event would."""
        session = live()
        session.receive(tick(3, status="PAUSED", remaining_ms=7_000), at(10))
        assert session.remaining_ms(at(5_000)) == 7_000

    @pytest.mark.parametrize("status", ["ENDED", "CANCELLED"])
    def test_an_auction_that_is_over_has_no_time_left(self, status: str) -> None:
        """After the end, and after a cancellation, the countdown is zero."""
        session = live()
        session.receive(event("timer.ended", "0.6-0", timer=timer(status=status, version=3)), at(10))
        assert session.remaining_ms(at(10)) == 0
        assert session.is_over
        assert session.state is ConnectionState.OVER

    @pytest.mark.requirement("R11")
    @given(st.permutations(range(3, 9)))
    def test_the_newest_version_stands_whatever_the_order(self, versions: list[int]) -> None:
        """Ticks and events of older versions change nothing once a newer one is known."""
        session = live()
        for version in versions:
            ends_at = BORN_MS + version
            if version % 2:
                session.receive(tick(version, ends_at=ends_at), at(1))
            else:
                session.receive(event("timer.extended", "0.6-0", timer=timer(version=version, ends_at=ends_at)), at(1))
        assert session.timer is not None
        assert session.timer["ends_at"] == BORN_MS + 8

    def test_a_resync_may_go_back(self) -> None:
        """After a failover the server's view stands, even if it is older than what was shown."""
        session = live()
        session.receive(event("timer.resynced", "0.1-0", timer=timer(version=1, ends_at=BORN_MS + 5)), at(1))
        assert session.timer is not None
        assert session.timer["version"] == 1


class TestResuming:
    """Cursors, and what is known to be missing."""

    def test_it_resumes_behind_the_last_event(self) -> None:
        """The cursor is the snapshot's, then that of each event; ticks have none."""
        session = live()
        assert session.cursor == "0.5-0"
        session.receive(event("bid.accepted", "0.9-0", bid_id="b"), at(1))
        session.receive(tick(2), at(2))
        assert session.cursor == "0.9-0"

    @pytest.mark.requirement("B4")
    def test_a_snapshot_does_not_overtake_what_it_announces(self) -> None:
        """Missed events follow a recovered snapshot with older cursors: a loss in between must not skip them."""
        session = live()
        session.lost("gone")
        session.connected(at(10))
        session.receive(snapshot(cursor="0.20-0", recovered=True), at(10))
        assert session.cursor == "0.5-0"
        session.receive(event("bid.accepted", "0.11-0"), at(11))
        assert session.cursor == "0.11-0"
        session.receive(tick(2), at(12))
        assert session.cursor == "0.11-0"

    def test_a_tick_proves_that_nothing_was_missed(self) -> None:
        """A tick right after a recovered snapshot means that no event is still to come, so the cursor moves up."""
        session = live()
        session.connected(at(10))
        session.receive(snapshot(cursor="0.20-0", recovered=True), at(10))
        session.receive(tick(2), at(12))
        assert session.cursor == "0.20-0"
        assert (session.reconnects, session.gaps) == (1, 0)

    @pytest.mark.requirement("B4")
    def test_a_gap_is_counted(self) -> None:
        """Where the server could not replay, its snapshot stands and the gap is known."""
        session = live()
        session.receive(event("timer.extended", "0.6-0", timer=timer(version=9)), at(1))
        session.connected(at(10))
        session.receive(snapshot(cursor="0.2-0", recovered=False), at(10))
        assert session.timer is not None
        assert session.timer["version"] == 2
        assert session.cursor == "0.2-0"
        assert session.gaps == 1

    def test_states_tell_a_first_try_from_a_later_one(self) -> None:
        """Before the first frame a lost line is connecting, afterwards reconnecting, and over stays over."""
        session = TimerSession(AUCTION)
        session.lost("refused")
        assert session.state is ConnectionState.CONNECTING
        session.connected(at(0))
        session.receive(snapshot(), at(0))
        assert session.state is ConnectionState.LIVE
        session.lost("gone")
        assert session.state is ConnectionState.RECONNECTING
        session.connected(at(1))
        session.receive(snapshot(timer=timer(status="ENDED")), at(1))
        session.lost("gone")
        assert session.state is ConnectionState.OVER


def messages(session: TimerSession, until_ms: int, answer: bool = True) -> Iterator[tuple[float, Frame]]:
    """What a session sends if it is asked exactly when it wants to be, each answered after 10 ms of ours."""
    now = at(0)
    while now < at(until_ms):
        if (message := session.due_message(now)) is not None:
            yield now / NS, message
            if answer:
                now = MonotonicNs(now + 10 * NS)
                stamp = BORN_MS + now // NS - 5
                session.receive({"type": "sync", "t0": message["t0"], "t1": stamp, "t2": stamp}, now)
        now = MonotonicNs(max(now + 1, session.wake_ns()))


class TestKeepingTime:
    """When a session asks for the time."""

    def test_it_asks_often_first_and_seldom_later(self) -> None:
        """Five exchanges find a short round trip, then one every 15 s keeps it."""
        asked = [round(ms) for ms, _ in messages(live(), 40_000)]
        assert asked == [0, 300, 600, 900, 1_200, 16_200, 31_200]

    @pytest.mark.requirement("B5")
    @given(st.lists(st.integers(0, 2_000), max_size=60), st.integers(-5_000, 5_000))
    def test_it_stays_within_what_the_server_allows(self, pauses: list[int], off_ms: int) -> None:
        """However wrong its clock is found to be by whatever frames, it sends at most five messages in any second."""
        session, now, sent = live(), 0, []
        for pause in pauses:
            now += pause
            session.receive(tick(2, BORN_MS + now + off_ms), at(now))
            if session.due_message(at(now)) is not None:
                sent.append(now)
        for first in sent:
            assert sum(first <= other < first + 1_000 for other in sent) <= 5

    @pytest.mark.requirement("B5")
    def test_it_reports_what_it_measured(self) -> None:
        """From the second exchange on, a message carries drift and round trip."""
        first, second, *_ = [message for _, message in messages(live(), 700)]
        assert "drift_ms" not in first
        assert second["rtt_ms"] == 10
        assert abs(second["drift_ms"]) <= 5

    @pytest.mark.requirement("R9")
    def test_a_frame_from_the_far_side_of_its_clock_makes_it_ask(self) -> None:
        """A frame more than 500 ms ahead is asked about at once, and not again within the second."""
        session = live()
        assert list(messages(session, 2_000))
        session.receive(tick(2, BORN_MS + 5_000), at(4_000))
        assert session.due_message(at(4_000)) is not None
        session.receive(tick(2, BORN_MS + 5_100), at(4_100))
        assert session.due_message(at(4_100)) is None
        assert session.due_message(at(5_000)) is not None

    @pytest.mark.requirement("R9")
    def test_drift_over_250_ms_warns(self) -> None:
        """The viewer is told while the last measurement found more than 250 ms (requirement R9)."""
        session = live()
        message = session.due_message(at(0))
        assert message is not None
        session.receive({"type": "sync", "t0": message["t0"], "t1": BORN_MS + 300, "t2": BORN_MS + 300}, at(0))
        assert session.warns
        assert session.drift_ms == pytest.approx(-300)
        assert session.remaining_ms(at(0)) == 59_700

    def test_an_answer_nobody_asked_for_is_ignored(self) -> None:
        """A `sync` with a foreign `t0` changes nothing."""
        session = live()
        session.receive({"type": "sync", "t0": 1.5, "t1": 9, "t2": 9}, at(1))
        assert session.clock.rtt_ms is None

    def test_without_time_keeping_it_speaks_only_into_silence(self) -> None:
        """A session that keeps no time asks once nothing came for a heartbeat, to see whether anybody is there."""
        asked = [round(ms) for ms, _ in messages(live(keeps_time=False), HEARTBEAT_MS + 1)]
        assert asked == [HEARTBEAT_MS]

    def test_a_silent_line_is_dead_after_two_heartbeats(self) -> None:
        """If not even the question into the silence is answered, the line is given up."""
        session = live()
        assert len(list(messages(session, 2 * HEARTBEAT_MS - 1, answer=False))) > 5
        assert not session.is_silent(at(2 * HEARTBEAT_MS - 1))
        assert session.is_silent(at(2 * HEARTBEAT_MS))

    def test_it_is_quiet_before_the_snapshot_and_after_the_end(self) -> None:
        """Nothing is sent while nothing is known, nor to a server that is about to close, which gets 6 s for it."""
        session = TimerSession(AUCTION)
        session.connected(at(0))
        assert session.due_message(at(0)) is None
        assert session.wake_ns() == at(2 * HEARTBEAT_MS)
        session.receive(snapshot(timer=timer(status="ENDED")), at(5))
        assert session.due_message(at(60_000)) is None
        assert session.wake_ns() == at(5 + OVER_WITHIN_MS)
        assert session.is_farewell_due(at(5 + OVER_WITHIN_MS))

    def test_a_complaint_is_kept(self) -> None:
        """What the server objects to can be read."""
        session = live()
        session.receive({"type": "error", "error_code": "BAD_MESSAGE", "detail": "t0 must be a number"}, at(1))
        assert session.trouble == "t0 must be a number"


Answer = httpx.Response | httpx.TransportError
PROBLEM = {"error_code": "DEPENDENCY_UNAVAILABLE", "detail": "the store is away"}


class Script(httpx.MockTransport):
    """Answers in turn, the last one for ever; keeps what was asked and when, on virtual time."""

    def __init__(self, timeline: Timeline, *answers: Answer) -> None:
        self.requests: list[tuple[float, httpx.Request]] = []
        self._answers = list(answers)
        self._timeline = timeline
        super().__init__(self._next)

    def _next(self, request: httpx.Request) -> httpx.Response:
        self.requests.append((self._timeline.now_ns / NS, request))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, httpx.TransportError):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def asked_at_ms(self) -> list[float]:
        """When each request came."""
        return [ms for ms, _ in self.requests]


def taken(*ids: str) -> httpx.Response:
    """202 for these events."""
    results = [{"id": event_id, "status": "accepted", "arrival_ms": BORN_MS} for event_id in ids]
    return httpx.Response(202, json={"results": results})


def ask(script: Script, timeline: Timeline, question: Callable[[Api], Awaitable[Any]], **retry: Any) -> Any:
    """Ask the API on virtual time."""

    async def scenario() -> Any:
        async with Api(URL, retry=Retry(**retry), transport=script) as api:
            return await question(api)

    return run(timeline, scenario)


class TestApi:
    """The HTTP side, on virtual time."""

    def test_events_are_sent_as_one_array(self) -> None:
        """A batch is one request, and its results come back in order."""
        timeline = Timeline()
        script = Script(timeline, taken("e1", "e2"))
        first, second = ask(script, timeline, lambda api: api.post_events([{"id": "e1"}, {"id": "e2"}]))
        assert (first.event_id, first.arrival_ms, first.is_duplicate) == ("e1", BORN_MS, False)
        assert second.event_id == "e2"
        ((_, request),) = script.requests
        assert orjson.loads(request.content) == [{"id": "e1"}, {"id": "e2"}]
        assert request.headers["Content-Type"] == "application/json"
        assert "Authorization" not in request.headers

    @pytest.mark.requirement("R24")
    def test_a_token_is_sent_with_every_request(self) -> None:
        """As `Authorization: Bearer`, without the newline of a file; who is refused is told what to do."""
        timeline = Timeline()
        script = Script(timeline, httpx.Response(401, json={"error_code": "UNAUTHENTICATED", "detail": "no good"}))

        async def scenario() -> None:
            async with Api(URL, token="h.p.s\n", transport=script) as api:
                with pytest.raises(RefusedError, match="AUCTION_TIMER_TOKEN") as caught:
                    await api.get_timer("a-1")
                assert "h.p.s" not in str(caught.value)

        run(timeline, scenario)
        ((_, request),) = script.requests
        assert request.headers["Authorization"] == "Bearer h.p.s"

    @pytest.mark.parametrize("token", ["", "two words", "a\nb", "a\x00b", "\u201cquoted\u201d"])
    def test_what_cannot_be_a_token_is_not_sent(self, token: str) -> None:
        """Nor repeated in the message."""
        with pytest.raises(TokenError) as caught:
            Api(URL, token=token)
        assert not token or token not in str(caught.value)

    def test_what_may_have_been_taken_is_sent_again_with_the_same_ids(self) -> None:
        """After a 503 or a lost connection the same bytes go out again, later and later."""
        timeline = Timeline()
        lost = httpx.ConnectError("refused")
        script = Script(
            timeline, lost, httpx.Response(502), httpx.ReadTimeout("late"), lost, lost, lost, lost, taken("e1")
        )
        (result,) = ask(script, timeline, lambda api: api.post_events([{"id": "e1"}]))
        assert result.event_id == "e1"
        assert len({request.content for _, request in script.requests}) == 1
        gaps = [later - earlier for earlier, later in zip(script.asked_at_ms, script.asked_at_ms[1:], strict=False)]
        bounds = [100, 200, 400, 800, 1_600, 2_000, 2_000]
        assert all(bound / 2 <= gap <= bound + 1 for gap, bound in zip(gaps, bounds, strict=True))

    def test_retry_after_is_honoured(self) -> None:
        """The pause is at least what the server asks for; a value nobody can read counts as none."""
        timeline = Timeline()
        busy = httpx.Response(503, json=PROBLEM, headers={"Retry-After": "7"})
        odd = httpx.Response(503, json=PROBLEM, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
        script = Script(timeline, busy, odd, taken("e"))
        ask(script, timeline, lambda api: api.post_events([{}]))
        first, second, third = script.asked_at_ms
        assert second - first >= 7_000
        assert third - second <= 201

    def test_one_deadline_bounds_all_attempts(self) -> None:
        """When the gateway stays away, the error says for whom, why, and what to do, and comes at the deadline."""
        timeline = Timeline()
        script = Script(timeline, httpx.ConnectError("connection refused"))
        with pytest.raises(
            GatewayAwayError, match=r"http://gateway.test:8080 .*connection refused.*auction-timer serve"
        ):
            ask(script, timeline, lambda api: api.get_timer(AUCTION), deadline_ms=3_000)
        assert timeline.now_ns / NS == pytest.approx(3_000, abs=2)

    def test_a_url_where_nobody_ever_answered_is_given_up_sooner(self) -> None:
        """Until the first answer the deadline is 5 s; after one, the whole of it counts from the first attempt."""
        timeline = Timeline()
        with pytest.raises(GatewayAwayError):
            ask(Script(timeline, httpx.ConnectError("refused")), timeline, lambda api: api.post_events([{}]))
        assert timeline.now_ns / NS == pytest.approx(FIRST_WITHIN_MS, abs=2)
        timeline = Timeline()
        answers = httpx.ConnectError("refused"), httpx.Response(503), httpx.ConnectError("refused")
        with pytest.raises(GatewayAwayError):
            ask(Script(timeline, *answers), timeline, lambda api: api.post_events([{}]))
        assert timeline.now_ns / NS == pytest.approx(30_000, abs=2)

    def test_a_gateway_that_is_never_ready_is_away_in_its_own_words(self) -> None:
        """The last refusal is the reason that is told."""
        timeline = Timeline()
        script = Script(timeline, httpx.Response(503, json=PROBLEM))
        with pytest.raises(GatewayAwayError, match="the store is away"):
            ask(script, timeline, lambda api: api.post_events([{}]), deadline_ms=500)

    def test_malformed_events_are_named(self) -> None:
        """A refused batch says which events are wrong and how; it is not sent again."""
        timeline = Timeline()
        errors = [
            {"index": 1, "path": "detail.bid_id", "reason": "is required"},
            {"index": 2, "path": "", "reason": "no"},
        ]
        problem = {"error_code": "MALFORMED_EVENTS", "detail": "2 of 3 events are malformed", "errors": errors}
        script = Script(timeline, httpx.Response(400, json=problem))
        with pytest.raises(MalformedEventsError, match=r"event 1: detail.bid_id is required; event 2: no") as caught:
            ask(script, timeline, lambda api: api.post_events([{}, {}, {}]))
        assert [fault.index for fault in caught.value.errors] == [1, 2]
        assert len(script.requests) == 1

    @pytest.mark.parametrize(
        ("answer", "error_code", "detail"),
        [
            (httpx.Response(413, json={"error_code": "BATCH_TOO_LARGE", "detail": "too big"}), "BATCH_TOO_LARGE", "too big"),
            (httpx.Response(500, text="<html>"), "", "something else than a JSON object"),
            (httpx.Response(403, json={}), "", "Forbidden"),
        ],
    )  # fmt: skip
    def test_a_refusal_is_told_and_not_repeated(self, answer: httpx.Response, error_code: str, detail: str) -> None:
        """Every other status is an error with its code and sentence, after one attempt."""
        timeline = Timeline()
        script = Script(timeline, answer)
        with pytest.raises(RefusedError, match=detail) as caught:
            ask(script, timeline, lambda api: api.post_events([{}]))
        assert (caught.value.status, caught.value.error_code) == (answer.status_code, error_code)
        assert len(script.requests) == 1

    def test_a_timer_is_read(self) -> None:
        """The timer of a known auction is what the server says."""
        timeline = Timeline()
        script = Script(timeline, httpx.Response(200, json=timer()))
        assert ask(script, timeline, lambda api: api.get_timer("a:1")) == timer()
        assert script.requests[0][1].url.path == "/auctions/a:1/timer"

    def test_an_unknown_auction_has_an_error_of_its_own(self) -> None:
        """404 says which auction, and how it would become known."""
        timeline = Timeline()
        script = Script(
            timeline, httpx.Response(404, json={"error_code": "RESOURCE_NOT_FOUND", "detail": "no auction"})
        )
        with pytest.raises(UnknownAuctionError, match=r"a-1.*offers.auction.started") as caught:
            ask(script, timeline, lambda api: api.get_timer(AUCTION))
        assert caught.value.auction_id == AUCTION

    def test_auctions_are_listed_page_by_page(self) -> None:
        """Each page's cursor leads to the next, with the same filter, until there is none."""
        timeline = Timeline()
        script = Script(
            timeline,
            httpx.Response(200, json={"auctions": [timer(version=1)], "next_cursor": "n"}),
            httpx.Response(200, json={"auctions": [timer(version=2)], "next_cursor": None}),
        )

        async def read(api: Api) -> list[list[dict[str, Any]]]:
            pages = api.list_auctions(status=Status.ACTIVE, ending_before=EpochMs(9), limit=1)
            return [page async for page in pages]

        assert ask(script, timeline, read) == [[timer(version=1)], [timer(version=2)]]
        first, second = (dict(request.url.params) for _, request in script.requests)
        assert first == {"status": "ACTIVE", "ending_before": "9", "limit": "1"}
        assert second == first | {"cursor": "n"}

    @pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
    def test_readiness_is_asked_once(self, status: int, ready: bool) -> None:
        """503 is an answer here, with the checks that fail and the server's date."""
        timeline = Timeline()
        answer = httpx.Response(
            status,
            json={"ready": ready, "checks": {"redis": "away"}},
            headers={"Date": "Sun, 22 Nov 2026 06:21:59 GMT"},
        )
        script = Script(timeline, answer)
        found = ask(script, timeline, lambda api: api.readyz())
        assert (found.ready, found.checks, found.date_ms) == (ready, {"redis": "away"}, 1_795_328_519_000)
        assert len(script.requests) == 1

    def test_readiness_of_nobody_is_an_error_at_once(self) -> None:
        """If nobody answers, that is told after one attempt."""
        timeline = Timeline()
        script = Script(timeline, httpx.ConnectError("refused"))
        with pytest.raises(GatewayAwayError):
            ask(script, timeline, lambda api: api.readyz())
        assert len(script.requests) == 1

    def test_somebody_else_on_the_port_is_told(self) -> None:
        """A server that is no gateway is refused, whatever it answers."""
        timeline = Timeline()
        with pytest.raises(RefusedError, match="404"):
            ask(Script(timeline, httpx.Response(404, text="nginx")), timeline, lambda api: api.readyz())
        with pytest.raises(RefusedError, match="JSON object"):
            ask(Script(timeline, httpx.Response(200, text="[]")), timeline, lambda api: api.readyz())


Part = Callable[[ServerConnection], Awaitable[None]]


class FakeGateway:
    """A real socket server on the loopback that plays one part per connection, the last one for ever."""

    def __init__(self, *parts: Part | Response) -> None:
        self._parts = list(parts)
        self.url = ""
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.heard: list[dict[str, Any]] = []

    def _part(self) -> Part | Response:
        return self._parts[min(len(self.paths), len(self._parts)) - 1]

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        self.paths.append(request.path)
        self.authorizations.append(request.headers.get("Authorization"))
        part = self._part()
        return part if isinstance(part, Response) else None

    async def _play(self, connection: ServerConnection) -> None:
        part = self._part()
        assert not isinstance(part, Response)
        await part(connection)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with serve(
            self._play, "127.0.0.1", 0, process_request=self._answer, compression=None, close_timeout=0.1
        ) as server:
            (address,) = (socket.getsockname() for socket in server.sockets)
            yield f"http://127.0.0.1:{address[1]}"


def says(*frames: Frame, close: int = 4000, reason: str = "") -> Part:
    """Send frames, then close."""

    async def part(connection: ServerConnection) -> None:
        for frame in frames:
            await connection.send(orjson.dumps(frame), text=True)
        await connection.close(close, reason)

    return part


def status(code: int, **headers: str) -> Response:
    """Refuse the handshake."""
    body = orjson.dumps({"error_code": "X", "detail": "told why"})
    given = Headers(
        {"Content-Length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
    )
    return Response(code, HTTPStatus(code).phrase, given, body)


ENDED = event("timer.ended", "0.8-0", timer=timer(status="ENDED", version=5))


async def watched(gateway: FakeGateway, session: TimerSession | None = None, **options: Any) -> list[str]:
    """The types of all frames until the iteration ends."""
    async with gateway.running() as url:
        frames = watch_auction(url, AUCTION, session=session, **({"retry": QUICK} | options))
        async with contextlib.aclosing(frames):
            return [frame["type"] async for frame in frames]


class TestWatching:
    """The socket, on a real loopback."""

    async def test_it_stops_when_the_auction_is_over(self) -> None:
        """4000 ends the iteration, with everything up to it given to the session."""
        gateway, session = FakeGateway(says(snapshot(), ENDED)), TimerSession(AUCTION)
        assert await watched(gateway, session) == ["timer.snapshot", "timer.ended"]
        assert gateway.paths == [f"/auctions/{AUCTION}/updates"]
        assert session.is_over

    @pytest.mark.requirement("B4")
    @pytest.mark.parametrize("code", [1001, 1011, 4100, 4101, 4102, 4408, 4429])
    async def test_it_comes_back_with_its_cursor(self, code: int) -> None:
        """Every code that is no verdict leads to a new handshake with `since`."""
        reason = '{"retry_after_ms":1,"jitter_ms":1}' if code in (1001, 4100) else ""
        bid = event("bid.accepted", "0.7-0")
        gateway = FakeGateway(
            says(snapshot(), bid, close=code, reason=reason),
            says(snapshot(recovered=True), ENDED),
        )
        session = TimerSession(AUCTION)
        types = await watched(gateway, session)
        assert types == ["timer.snapshot", "bid.accepted", "timer.snapshot", "timer.ended"]
        assert gateway.paths[1] == f"/auctions/{AUCTION}/updates?since=0.7-0"
        assert session.reconnects == 1

    @pytest.mark.parametrize("reason", ["", "bye", "[]", '{"retry_after_ms":"soon","jitter_ms":1}'])
    async def test_a_draining_gateway_need_not_explain_itself(self, reason: str) -> None:
        """Without a readable pause in the reason, our own backoff serves."""
        gateway = FakeGateway(says(snapshot(), close=1001, reason=reason), says(snapshot(recovered=True), ENDED))
        assert (await watched(gateway))[-1] == "timer.ended"

    async def test_a_farewell_that_stays_out_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the server does not close after the last event, the client does."""
        monkeypatch.setattr(client, "OVER_WITHIN_MS", 20)

        async def stays(connection: ServerConnection) -> None:
            await connection.send(orjson.dumps(snapshot()), text=True)
            await connection.send(orjson.dumps(ENDED), text=True)
            await connection.wait_closed()

        assert await watched(FakeGateway(stays)) == ["timer.snapshot", "timer.ended"]

    async def test_an_end_that_was_seen_needs_no_farewell(self) -> None:
        """A line that breaks after the last event is not taken up again."""
        gateway = FakeGateway(says(snapshot(), ENDED, close=1011))
        assert await watched(gateway) == ["timer.snapshot", "timer.ended"]
        assert len(gateway.paths) == 1

    async def test_a_refused_handshake_is_tried_again_while_it_is_not_now(self) -> None:
        """503 with `Retry-After` is waited out."""
        gateway = FakeGateway(status(503, Retry_After="0"), status(502), says(snapshot(), ENDED))
        assert await watched(gateway) == ["timer.snapshot", "timer.ended"]
        assert len(gateway.paths) == 3

    async def test_an_unknown_auction_is_an_error(self) -> None:
        """404 is final, and names the gateway and the auction."""
        with pytest.raises(UnknownAuctionError, match=AUCTION):
            await watched(FakeGateway(status(404)))

    @pytest.mark.parametrize("code", [401, 403, 500])
    async def test_a_handshake_refused_for_good_is_an_error(self, code: int) -> None:
        """Other statuses are not tried again, and say why."""
        with pytest.raises(RefusedError, match="told why") as caught:
            await watched(FakeGateway(status(code)))
        assert caught.value.status == code

    @pytest.mark.parametrize("code", [4400, 4401])
    async def test_a_fault_of_ours_is_an_error(self, code: int) -> None:
        """Closes that coming back does not mend are raised with what to do."""
        with pytest.raises(SocketClosedError, match=str(code)) as caught:
            await watched(FakeGateway(says(snapshot(), close=code, reason="why")))
        assert (caught.value.code, caught.value.reason) == (code, "why")

    async def test_a_token_goes_with_every_handshake(self) -> None:
        """Also with that of the line that takes over from a lost one."""
        gateway = FakeGateway(says(snapshot(), close=1001), says(ENDED))
        async with gateway.running() as url:
            async for _ in watch_auction(url, AUCTION, token="h.p.s", retry=QUICK):
                pass
        assert gateway.authorizations == ["Bearer h.p.s"] * 2

    async def test_nobody_there_is_an_error_within_its_bound(self) -> None:
        """A first connection is given up sooner than one that was live."""
        async with FakeGateway(says(snapshot())).running() as url:
            pass
        with pytest.raises(GatewayAwayError, match="auction-timer serve"):
            async for _ in watch_auction(url, AUCTION, retry=QUICK, first_within_ms=20):
                pass

    async def test_a_silent_line_is_left(self) -> None:
        """A gateway that neither ticks nor answers for two heartbeats is dialled anew."""

        async def silent(connection: ServerConnection) -> None:
            await connection.send(orjson.dumps(snapshot(heartbeat_ms=20)), text=True)
            await connection.wait_closed()

        session = TimerSession(AUCTION)
        types = await watched(FakeGateway(silent, says(snapshot(), ENDED)), session)
        assert types == ["timer.snapshot", "timer.snapshot", "timer.ended"]
        assert session.trouble == "the gateway fell silent"

    @pytest.mark.requirement("B5")
    async def test_it_keeps_time_over_the_socket(self) -> None:
        """The exchanges happen while frames are awaited, and give a round trip."""

        async def answers(connection: ServerConnection) -> None:
            await connection.send(orjson.dumps(snapshot()), text=True)
            asked = orjson.loads(await connection.recv())
            await connection.send(
                orjson.dumps({"type": "sync", "t0": asked["t0"], "t1": BORN_MS, "t2": BORN_MS}), text=True
            )
            await connection.send(orjson.dumps(ENDED), text=True)
            await connection.close(4000)

        session = TimerSession(AUCTION)
        assert "sync" in await watched(FakeGateway(answers), session)
        assert session.clock.rtt_ms is not None
        assert session.clock.rtt_ms < 5_000

    async def test_whoever_stops_listening_hangs_up(self) -> None:
        """Leaving the iteration closes the socket properly."""
        left: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

        async def waits(connection: ServerConnection) -> None:
            await connection.send(orjson.dumps(snapshot()), text=True)
            await connection.wait_closed()
            left.set_result(connection.close_code)

        async with FakeGateway(waits).running() as url:
            async with contextlib.aclosing(watch_auction(url, AUCTION)) as frames:
                async for _ in frames:
                    break
            assert await left == 1000

    def test_every_error_has_one_root(self) -> None:
        """Whoever catches `ClientError` catches them all."""
        for error in (
            UrlError,
            GatewayAwayError,
            UnknownAuctionError,
            RefusedError,
            MalformedEventsError,
            SocketClosedError,
        ):
            assert issubclass(error, ClientError)
