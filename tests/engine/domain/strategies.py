"""Random policies, registrations, events and logs, weighted towards the instants at which something changes."""

from typing import Final

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from engine.domain.auction import Auction, Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.fold import fold
from engine.domain.instants import HOUR_MS, MINUTE_MS, SECOND_MS, EpochMs
from engine.domain.policy import (
    EXTENSION_MS_MAX,
    MAX_EXTENSIONS_MAX,
    SOFT_CLOSE_WINDOW_MS_MAX,
    TICK_INTERVAL_MS_MAX,
    TICK_INTERVAL_MS_MIN,
    TOTAL_CAP_MS_MAX,
    ExtendsOn,
    ExtensionMode,
    Policy,
)
from engine.domain.withdrawal import WithdrawalReason
from tests.engine.domain.examples import AUCTION_ID, T0

Log = list[tuple[InputEvent, EpochMs]]


def gaps_ms() -> SearchStrategy[int]:
    """Time between two things that happen: often none at all, mostly minutes, seldom more than a day."""
    return st.one_of(
        st.sampled_from([0, 1, MINUTE_MS, 5 * MINUTE_MS, 15 * MINUTE_MS]),
        st.integers(0, 5 * MINUTE_MS),
        st.integers(0, 20 * MINUTE_MS),
        st.sampled_from([HOUR_MS, 24 * HOUR_MS, 30 * HOUR_MS]),
    )


def durations_ms() -> SearchStrategy[int]:
    """How long an auction runs: mostly minutes, also a millisecond or a week."""
    return st.one_of(
        st.sampled_from([HOUR_MS, 20 * MINUTE_MS, 1, 2, 7 * 24 * HOUR_MS]),
        st.integers(1, HOUR_MS),
        st.integers(10 * MINUTE_MS, 2 * HOUR_MS),
    )


def _bounded(least: int, usual: list[int], most: int) -> SearchStrategy[int]:
    return st.one_of(st.sampled_from([*usual, least, most]), st.integers(least, max(usual)), st.integers(least, most))


def policies() -> SearchStrategy[Policy]:
    """Any policy inside its bounds: usually bids extend, and often they reach a cap."""
    anything = st.builds(
        Policy,
        soft_close_window_ms=_bounded(0, [15 * MINUTE_MS, 5 * MINUTE_MS, HOUR_MS], SOFT_CLOSE_WINDOW_MS_MAX),
        extension_ms=_bounded(1, [10 * MINUTE_MS, 2 * MINUTE_MS], EXTENSION_MS_MAX),
        mode=st.sampled_from(ExtensionMode),
        total_cap_ms=_bounded(0, [HOUR_MS, 20 * MINUTE_MS], TOTAL_CAP_MS_MAX),
        max_extensions=st.one_of(st.none(), st.none(), st.integers(0, 3), st.integers(0, MAX_EXTENSIONS_MAX)),
        extends_on=st.sampled_from(ExtendsOn),
        tick_interval_ms=_bounded(TICK_INTERVAL_MS_MIN, [5 * SECOND_MS], TICK_INTERVAL_MS_MAX),
    )
    usual = st.sampled_from([Policy(), Policy(mode=ExtensionMode.ADD), Policy(total_cap_ms=30 * MINUTE_MS)])
    return st.one_of(usual, anything, anything)


_OFFERS: Final = [
    Offer(),
    Offer("offer-1", amount_minor=500, auto_reject_threshold_minor=499),
    Offer("offer-2", offer_created_at=EpochMs(T0 - HOUR_MS), modification_window_minutes=75),
    Offer("offer-3", modification_window_minutes=0),
]


@st.composite
def registrations(draw: DrawFn, around: EpochMs = T0, spread_ms: int = 10 * MINUTE_MS) -> Registration:
    """A registration that starts up to `spread_ms` before or after `around`."""
    starts_at = around + draw(st.one_of(st.just(0), st.integers(-spread_ms, spread_ms)))
    ends_at = starts_at + draw(durations_ms())
    return Registration(
        AUCTION_ID, EpochMs(starts_at), EpochMs(ends_at), draw(policies()), draw(st.sampled_from(_OFFERS))
    )


# Drawn in one choice each: logs are what most properties are about, and a draw costs more than the fold of an event.
_REPERTOIRE: Final[list[InputEvent]] = [
    *[Bid("b1"), Bid("b2"), Bid("b3"), Bid("b4"), Bid("own ceiling raised", leader_changed=False)] * 6,
    *[Pause("alarm"), Resume(), Resume("all clear")] * 3,
    *[Reschedule(EpochMs(T0 + minutes * MINUTE_MS)) for minutes in (-30, 0, 20, 30, 40, 60, 75, 120, 25 * 60)],
    *[Register(Registration(AUCTION_ID, T0, EpochMs(T0 + HOUR_MS))), Cancel("withdrawn")],
    Withdraw(WithdrawalReason.OTHER, default_window_minutes=20, note="sorry"),
]
_GAPS_MS: Final = [1, 0, 1, *[minutes * MINUTE_MS for minutes in (1, 1, 2, 3, 4, 5, 5, 6, 8, 10, 14, 15, 16, 30, 600)]]


def events() -> SearchStrategy[InputEvent]:
    """Any input event. Bids are the most frequent, cancellations and registrations the rarest."""
    return st.sampled_from(_REPERTOIRE)


def logs() -> SearchStrategy[Log]:
    """The log of one auction: events at non-decreasing instants, a registration among the first, many near the end."""
    gaps = st.one_of(st.sampled_from(_GAPS_MS), st.sampled_from(_GAPS_MS), st.integers(1, 10 * MINUTE_MS))
    step = st.tuples(events(), gaps, st.booleans())
    later = st.one_of(st.lists(step, max_size=4), st.lists(step, min_size=4, max_size=16))
    return st.builds(_log, st.lists(step, max_size=1), registrations(), gaps, later)


_Steps = list[tuple[InputEvent, int, bool]]


def _log(before: _Steps, registration: Registration, gap_ms: int, later: _Steps) -> Log:
    log: Log = []
    auction, now = Auction(AUCTION_ID), T0 - 10 * MINUTE_MS
    for event, ms, near_the_end in [*before, (Register(registration), gap_ms, False), *later]:
        # The domain itself says where the end stands; it is only asked so that the log is an interesting one.
        now = max(now, auction.ends_at - ms) if near_the_end else now + ms
        log.append((event, EpochMs(now)))
        auction = fold(auction, event, EpochMs(now))[-1].after
    return log
