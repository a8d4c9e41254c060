"""The schedule of a replay."""

from decimal import Decimal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auction_timer.replay.history import PastAuction, PastBid
from auction_timer.replay.plan import PastPolicy, PlanError, make_plan
from engine.domain.events import Register
from engine.domain.instants import HOUR_MS, MINUTE_MS
from engine.domain.policy import ExtensionMode, Policy
from gateway.events import parse_events
from tests.auction_timer.replay.examples import SPEED, STARTS_AT, history, plan


def test_the_worked_example_of_the_module_holds() -> None:
    """At speed 7,200 a week is 84 s, and a bid 86.4 s before the end is due 12 ms before it."""
    made = plan("a,i,7,1,6.999,1,b\n", speed=7_200)
    (auction,) = made.auctions
    assert auction.registration.ends_at == STARTS_AT + 84_000
    assert auction.bids[0].due_ms == 83_988
    assert auction.registration.policy.soft_close_window_ms == 125


def test_every_duration_of_the_rules_shrinks() -> None:
    """Window, extension and total cap are divided by the speed; how often people look is not."""
    policy = PastPolicy(30 * MINUTE_MS, 10 * MINUTE_MS, ExtensionMode.ADD, HOUR_MS, 4).compressed(60)
    assert policy == Policy(
        soft_close_window_ms=30_000,
        extension_ms=10_000,
        mode=ExtensionMode.ADD,
        total_cap_ms=60_000,
        max_extensions=4,
    )


def test_an_extension_keeps_a_millisecond() -> None:
    """However fast the replay, an extension still extends; a window may vanish."""
    policy = PastPolicy(window_ms=100, extension_ms=100).compressed(1_000_000)
    assert (policy.soft_close_window_ms, policy.extension_ms) == (0, 1)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_speed_has_its_bounds(speed: float) -> None:
    """A speed that is no speed is told as one."""
    with pytest.raises(PlanError, match="speed must be"):
        plan(speed=speed)


def test_rules_the_domain_forbids_are_told_before_anything_is_sent() -> None:
    """Slow motion makes an extension too long; the message names the field and the bound."""
    with pytest.raises(PlanError, match=r"at speed 0\.5: .*_ms must be between"):
        plan(speed=0.5)
    with pytest.raises(PlanError, match="max_extensions"):
        plan(policy=PastPolicy(max_extensions=-1))


def test_an_id_that_is_none_is_told() -> None:
    """An auction id with its prefix must be one the intake takes, with room for what happens to it."""
    for auction_id in ("a b", "x" * 120):
        with pytest.raises(PlanError, match="is no auction id"):
            plan(f"{auction_id},i,1,1,0,1,b\n")


def test_bids_are_due_in_order() -> None:
    """The whole schedule is ordered by time, and within an auction by its history."""
    made = plan()
    assert [(bid.auction_id, bid.bid.bid_id) for bid in made.bids] == [
        ("p-x2", "bid-1"),
        ("p-x1", "bid-1"),
        ("p-x1", "bid-2"),
        ("p-x1", "bid-3"),
        ("p-x2", "bid-2"),
    ]
    assert made.ends_at == STARTS_AT + 120_000


def test_a_bid_after_the_end_is_planned_like_any_other() -> None:
    """Late bids of the history are kept: the server has to find out."""
    late = plan().bids[-1]
    assert late.due_ms == 150_000
    assert plan().auctions[1].registration.ends_at == STARTS_AT + 120_000


def test_the_intake_reads_back_what_was_planned() -> None:
    """Registrations and bids, as the real gateway parses them, are the very values the verdict folds."""
    made = plan(policy=PastPolicy(max_extensions=3, mode=ExtensionMode.ADD))
    events = [auction.event() for auction in made.auctions] + [bid.event() for bid in made.bids]
    parsed = parse_events(orjson.dumps(events), correlation_id="c", traceparent=None, new_trace_id=lambda: "t")
    wanted = [*(Register(auction.registration) for auction in made.auctions), *(bid.bid for bid in made.bids)]
    assert [event.event for event in parsed] == wanted
    assert len({event.context.event_id for event in parsed}) == len(events)


days = st.decimals(min_value=0, max_value=30, places=6, allow_nan=False)


@given(
    st.lists(days, max_size=30), st.decimals(min_value=Decimal("0.01"), max_value=30, places=2), st.integers(1, 100_000)
)
def test_compression_keeps_order_and_proportion(bid_days: list[Decimal], duration: Decimal, speed: int) -> None:
    """For any history, what came first is due first, each at its share of the time, to the half millisecond."""
    bids = tuple(PastBid(at, 100, "b", leader_changed=True) for at in sorted(bid_days))
    past = PastAuction("a", "i", duration, bids)
    policy = PastPolicy(window_ms=0, extension_ms=1)
    made = make_plan((past, *history()), starts_at=STARTS_AT, speed=speed, policy=policy, prefix="p")
    assert [bid.due_ms for bid in made.bids] == sorted(bid.due_ms for bid in made.bids)
    mine = [bid for bid in made.bids if bid.auction_id == "p-a"]
    assert [bid.event_id for bid in mine] == [f"p-a:bid-{number}" for number in range(1, len(bids) + 1)]
    for bid, planned in zip(bids, mine, strict=True):
        assert abs(planned.due_ms - bid.at_days * 86_400_000 / speed) <= Decimal("0.5")


def test_the_examples_speed_makes_a_day_a_minute() -> None:
    """The other tests of the replay count in minutes because of this."""
    assert plan(speed=SPEED).auctions[0].registration.ends_at == STARTS_AT + 60_000
