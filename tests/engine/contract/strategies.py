"""Random events, records and bodies as they cross the border of the core."""

from dataclasses import replace
from typing import Any, Final

import orjson
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from engine.contract.intake import (
    AMOUNT_MINOR_MAX,
    Actor,
    CommandType,
    Context,
    Correct,
    CorrectClock,
    Discard,
    EventType,
    IntakeEvent,
    Outage,
    Request,
    Resync,
    Retry,
)
from engine.contract.timers import TimerRecord
from engine.domain.auction import Auction, Offer, Registration
from engine.domain.events import Bid, Cancel, InputEvent, Pause, Register, Reschedule, Resume, Withdraw
from engine.domain.fold import fold
from engine.domain.instants import EPOCH_MS_MAX, EpochMs
from engine.domain.withdrawal import NOTE_CHARS_MAX, WINDOW_MINUTES_MAX, WithdrawalReason
from tests.engine.domain.examples import AUCTION_ID
from tests.engine.domain.strategies import logs, policies

ID_CHARACTERS: Final = "ABCXYZabcxyz0189._:-"

texts = st.text(max_size=20)
maybe_texts = st.none() | texts
reasons = st.text(min_size=1, max_size=20)
amounts = st.none() | st.integers(0, AMOUNT_MINOR_MAX)
instants = st.one_of(st.sampled_from([1, EPOCH_MS_MAX]), st.integers(1, EPOCH_MS_MAX)).map(EpochMs)
auction_ids = st.text(ID_CHARACTERS, min_size=1, max_size=128)

offers = st.builds(
    Offer,
    offer_id=maybe_texts,
    owner_id=maybe_texts,
    maker_id=maybe_texts,
    buyer_id=maybe_texts,
    maker_delegate_ids=st.lists(texts, max_size=3).map(tuple),
    offer_created_at=st.none() | instants,
    modification_window_minutes=st.none() | st.integers(0, WINDOW_MINUTES_MAX),
    amount_minor=amounts,
    currency=maybe_texts,
    auto_reject_threshold_minor=amounts,
)
actors = st.builds(Actor, texts, texts)
bids = st.builds(
    Bid,
    bid_id=texts,
    amount_minor=amounts,
    currency=maybe_texts,
    bidder_id=maybe_texts,
    leader_changed=st.booleans(),
    origin=maybe_texts,
)
withdrawals = st.builds(
    Withdraw,
    reason_code=st.sampled_from(WithdrawalReason),
    default_window_minutes=st.integers(0, WINDOW_MINUTES_MAX),
    note=st.none() | st.text(max_size=NOTE_CHARS_MAX),
    device=maybe_texts,
)


@st.composite
def full_registrations(draw: DrawFn, auction_id: str = AUCTION_ID) -> Registration:
    """A registration with every optional term drawn."""
    starts_at = draw(st.integers(1, EPOCH_MS_MAX - 1))
    ends_at = draw(st.one_of(st.just(EPOCH_MS_MAX), st.integers(starts_at + 1, EPOCH_MS_MAX)))
    return Registration(auction_id, EpochMs(starts_at), EpochMs(ends_at), draw(policies()), draw(offers))


def events(event_type: EventType | CommandType, auction_id: str) -> SearchStrategy[InputEvent | Request]:
    """An event of this type."""
    match event_type:
        case EventType.AUCTION_STARTED:
            return full_registrations(auction_id).map(Register)
        case EventType.BID_ACCEPTED:
            return bids
        case EventType.OFFER_CANCELLED | EventType.CANCEL_REQUESTED:
            return st.builds(Cancel, reasons)
        case EventType.PAUSE_REQUESTED:
            return st.builds(Pause, maybe_texts)
        case EventType.RESUME_REQUESTED:
            return st.builds(Resume, maybe_texts)
        case EventType.SCHEDULE_CHANGED:
            return st.builds(Reschedule, instants, maybe_texts)
        case CommandType.OFFER_CANCEL_REQUESTED:
            return withdrawals
        case CommandType.RETRY_REQUESTED:
            return st.builds(Retry, texts, maybe_texts)
        case CommandType.DISCARD_REQUESTED:
            return st.builds(Discard, texts, reasons)
        case CommandType.CORRECTION_REQUESTED:
            fields = st.dictionaries(st.sampled_from(["auction_id", "status", "version"]), st.text(max_size=8))
            return st.builds(Correct, reasons, fields, st.integers(0, 2**53), st.none() | instants, st.booleans())
        case CommandType.OUTAGE_OBSERVED:
            return st.builds(Outage, instants, instants, st.integers(0, 900_000))
        case CommandType.CLOCK_CORRECTED:
            evidence = st.dictionaries(st.text(max_size=8), st.integers(-(2**53), 2**53), max_size=4)
            return st.builds(CorrectClock, st.integers(-(10**14), 10**14), reasons, evidence)
        case CommandType.RESYNC_REPORTED:
            return st.builds(Resync, st.integers(-(2**53), 2**53), st.none() | st.integers(0, 2**53))


@st.composite
def intake_events(draw: DrawFn, types: tuple[EventType | CommandType, ...] = (*EventType, *CommandType)) -> IntakeEvent:
    """A readable input event of any of `types`; a cancelled offer may be named by its offer id alone."""
    event_type, auction_id = draw(st.sampled_from(types)), draw(auction_ids)
    context = Context(
        event_id=draw(texts),
        event_type=event_type.value,
        trace_id=draw(texts),
        correlation_id=draw(texts),
        actor=draw(actors),
        reply_to=draw(maybe_texts),
        occurred_at=draw(st.none() | instants),
        submitted_by=draw(maybe_texts),
        relisted=draw(st.booleans()),
    )
    event = draw(events(event_type, auction_id))
    if isinstance(event, Retry | Discard):
        return IntakeEvent(context, event, None)
    if event_type is EventType.OFFER_CANCELLED and draw(st.booleans()):
        return IntakeEvent(context, event, None, draw(texts))
    return IntakeEvent(context, event, auction_id)


json_values: Final[SearchStrategy[Any]] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every path into the nested objects of a JSON object."""
    found = []
    for name, inner in value.items():
        found.append((*prefix, name))
        if isinstance(inner, dict):
            found += paths(inner, (*prefix, name))
    return found


@st.composite
def mutated(draw: DrawFn, bodies: SearchStrategy[bytes]) -> bytes:
    """A valid body in which one to three fields were removed or overwritten with any JSON value."""
    body = orjson.loads(draw(bodies))
    for _ in range(draw(st.integers(1, 3))):
        *way, name = draw(st.sampled_from(paths(body)))
        inner = body
        for step in way:
            inner = inner[step]
        if draw(st.booleans()):
            inner[name] = draw(json_values)
        else:
            del inner[name]
        if not body:
            break
    return orjson.dumps(body)


_FULL_OFFER: Final = Offer("o", "owner", "maker", "buyer", ("d1", "d2"), EpochMs(1), 30, 1, "EUR", AMOUNT_MINOR_MAX)


@st.composite
def timer_records(draw: DrawFn, *, registered: bool = True) -> TimerRecord:
    """An auction in any state that a log leads to, with or without terms of an offer; `registered`: no tombstone."""
    log, offer = draw(logs()), draw(st.sampled_from([Offer(), _FULL_OFFER]))
    states = []
    auction = Auction(AUCTION_ID)
    for event, arrival in log:
        if isinstance(event, Register):
            event = Register(replace(event.registration, offer=offer))
        for decision in fold(auction, event, arrival):
            auction = decision.after
            if auction.version and (auction.registration is not None or not registered):
                states.append(auction)
    return TimerRecord(draw(st.sampled_from(states)), draw(texts), "req-1")
