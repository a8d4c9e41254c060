"""Tests for gateway.offer_routes: the application in this process, with a shard at work behind it."""

from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import orjson
import pytest

from engine.contract.audit import record_hash
from engine.domain.instants import MINUTE_MS
from engine.domain.withdrawal import WithdrawalReason
from engine.store.protocol import StoreUnavailableError
from gateway import commands as commands_module
from tests.fakes.clock import BORN_MS
from tests.gateway.desk import CALLERS, OFFER, Desk, bearing, desk, without_ids
from tests.gateway.issuer import token

WINDOW_ENDS_AT = BORN_MS - 60_000 + 30 * MINUTE_MS
MAY = {
    "buyer": "buyer",
    "maker": "maker",
    "delegate": "maker_delegate",
    "commerce admin": "commerce_admin",
}
"""Who may cancel an offer, and as what they are recorded."""
SEES = {"owner", "operator by role", "operator by scope"}
"""Who may look, and no more."""


async def ahead(made: Desk, offer_id: str = "o-1", caller: str | None = None) -> httpx.Response:
    """The preflight."""
    return await made.http.get(f"/offers/{offer_id}/cancellation", headers=bearing(caller) if caller else {})


async def cancel(made: Desk, offer_id: str = "o-1", caller: str | None = None, **body: Any) -> httpx.Response:
    """A cancellation, for a canned reason."""
    return await made.http.put(
        f"/offers/{offer_id}/cancel",
        json={"reason_code": "changed_mind"} | body,
        headers={"X-Correlation-Id": "mine-1"} | (bearing(caller) if caller else {}),
    )


@pytest.mark.requirement("R20", "R22")
async def test_the_preflight_says_how_long_and_with_which_words() -> None:
    """The remaining window counts down on the auction clock; the reasons and the note's bound are what a page needs."""
    async with desk() as made:
        await made.register()
        made.line.advance(1_000)
        assert (await ahead(made)).json() == {
            "offer_id": "o-1",
            "auction_id": "a-1",
            "status": "ACTIVE",
            "cancellable": True,
            "error_code": None,
            "remaining_window_ms": WINDOW_ENDS_AT - BORN_MS - 1_000,
            "window_ends_at": WINDOW_ENDS_AT,
            "reasons": [reason.value for reason in WithdrawalReason],
            "note_max_chars": 500,
            "server_time": BORN_MS + 1_000,
        }


@pytest.mark.requirement("R20", "R21", "R22")
@pytest.mark.parametrize("late_ms", [-1, 0, 1])
async def test_the_window_closes_for_the_preflight_and_the_command_alike(late_ms: int) -> None:
    """Up to the last millisecond it is possible, from its end on it is not; the maker's own window goes first."""
    async with desk(offer_modification_window_minutes=5) as made:
        await made.register()
        offer = replace(OFFER, offer_id="o-2", modification_window_minutes=2)
        await made.register("a-2", offer)
        made.line.advance(MINUTE_MS + late_ms)
        view = (await ahead(made, "o-2")).json()
        answer = await cancel(made, "o-2")
        if late_ms < 0:
            assert (view["cancellable"], view["remaining_window_ms"]) == (True, 1)
            assert answer.status_code == 200
        else:
            assert (view["cancellable"], view["error_code"]) == (False, "WINDOW_EXPIRED")
            assert view["remaining_window_ms"] == 0
            assert (answer.status_code, answer.json()["error_code"]) == (409, "WINDOW_EXPIRED")
            assert answer.json()["support_reference"].startswith("SUP-")
        assert (await ahead(made)).json()["remaining_window_ms"] == 3 * MINUTE_MS - late_ms


@pytest.mark.requirement("R20", "R23")
async def test_a_cancelled_offer_comes_back_with_its_record() -> None:
    """What the offer is now, the timer, and the record as it stands in the chain."""
    async with desk() as made:
        await made.register()
        body = (await cancel(made, note="two of them", device="phone")).json()
        assert body["offer"] == {
            "offer_id": "o-1", "auction_id": "a-1", "status": "CANCELLED", "cancelled_at": BORN_MS,
            "reason_code": "changed_mind", "note": "two of them", "amount_minor": 900, "currency": "EUR",
        }  # fmt: skip
        assert (body["timer"]["status"], body["timer"]["offer_id"]) == ("CANCELLED", "o-1")
        stored = made.last_record()
        assert body["audit"]["hash"] == stored["hash"] == record_hash(stored)
        assert (body["audit"]["shard"], body["audit"]["seq"]) == (0, int(stored["seq"]))
        assert body["audit"]["details"]["device"] == "phone"
        assert body["audit"]["correlation_id"] == "mine-1"
        again = await cancel(made)
        assert (again.status_code, again.json()["error_code"]) == (409, "ALREADY_CANCELLED")
        assert made.last_record() == stored


@pytest.mark.requirement("R21")
async def test_an_auction_that_is_over_keeps_its_offer() -> None:
    """Also when the preflight comes before the engine has written the close."""
    async with desk() as made:
        await made.register(ends_at=BORN_MS + 1_000)
        made.line.advance(1_000)
        assert (await ahead(made)).json()["error_code"] == "AUCTION_CLOSED"
        answer = await cancel(made)
        assert (answer.status_code, answer.json()["error_code"]) == (409, "AUCTION_CLOSED")
        assert answer.json()["current_status"] == "ENDED"


@pytest.mark.requirement("R20", "R22")
@pytest.mark.parametrize("by", ["its cancellation", "its end", "an end that is not written yet"])
async def test_what_is_over_has_no_window_any_more(by: str) -> None:
    """Nobody counts down to something that cannot be done, whoever looks; when the window would have closed is still told."""
    async with desk(tokens=True, answering=by == "its cancellation") as made:
        await made.register(ends_at=BORN_MS + 1_000)
        if by == "its cancellation":
            assert (await cancel(made, caller="buyer")).status_code == 200
        else:
            made.line.advance(1_000)
        if by == "its end":
            await made.worker.work()
        for caller in ("buyer", "owner"):
            view = (await ahead(made, caller=caller)).json()
            assert (view["cancellable"], view["remaining_window_ms"]) == (False, 0)
            assert view["window_ends_at"] == WINDOW_ENDS_AT


@pytest.mark.requirement("R20", "R24")
@pytest.mark.parametrize("caller", CALLERS)
async def test_who_may_cancel_an_offer(caller: str) -> None:
    """Buyer, maker, delegate and commerce admin; others who may see it are told so, and to the rest it is not there."""
    async with desk(tokens=True) as made:
        await made.register()
        view, answer = await ahead(made, caller=caller), await cancel(made, caller=caller)
        if caller in MAY:
            assert view.json()["cancellable"]
            assert answer.status_code == 200, answer.text
            record = made.last_record()
            assert (record["actor_type"], record["actor_id"]) == (MAY[caller], CALLERS[caller]["sub"])
            return
        assert "offer_cancelled" not in made.facts()
        if caller in SEES:
            assert (view.json()["cancellable"], view.json()["error_code"]) == (False, "NOT_AUTHORIZED")
            assert (answer.status_code, answer.json()["error_code"]) == (403, "NOT_AUTHORIZED")
            return
        for known, unknown in (
            (view, await ahead(made, "o-9", caller=caller)),
            (answer, await cancel(made, "o-9", caller=caller)),
        ):
            assert known.status_code == unknown.status_code == 404
            assert orjson.dumps(without_ids(known)).replace(b"o-1", b"o-9") == orjson.dumps(without_ids(unknown))


@pytest.mark.requirement("R20", "R24")
@pytest.mark.parametrize(
    ("also", "actor"),
    [
        ("maker_id", "maker"),
        ("buyer_id", "buyer"),
        ("maker_delegate_ids", "maker_delegate"),
        ("roles", "commerce_admin"),
    ],
)
async def test_an_owner_who_may_for_another_reason_may(also: str, actor: str) -> None:
    """Somebody who sells their own things owns the auction and is its maker: the reason that admits them is recorded."""
    facts: dict[str, Any] = {"maker_delegate_ids": ("p-1",)} if also == "maker_delegate_ids" else {also: "p-1"}
    claims: dict[str, Any] = {"sub": "p-1"}
    if also == "roles":
        facts, claims = {}, claims | {"roles": ["commerce_admin"]}
    headers = {"Authorization": f"Bearer {token(**claims)}"}
    async with desk(tokens=True) as made:
        await made.register(offer=replace(OFFER, owner_id="p-1", **facts))
        view = await made.http.get("/offers/o-1/cancellation", headers=headers)
        assert (view.status_code, view.json()["cancellable"]) == (200, True)
        body = {"reason_code": "changed_mind"}
        answer = await made.http.put("/offers/o-1/cancel", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert (made.last_record()["actor_type"], made.last_record()["actor_id"]) == (actor, "p-1")


@pytest.mark.requirement("R24")
async def test_somebody_elses_offer_takes_the_store_as_long_as_none() -> None:
    """The same calls, as many of them: nothing is to be learned from time."""
    async with desk(tokens=True) as made:
        await made.register()
        counts = []
        for offer_id in ("o-1", "o-9"):
            made.store.calls.clear()
            await ahead(made, offer_id, caller="stranger")
            counts.append({name: count for name, count in made.store.calls.items() if name in {"timers", "offers"}})
        assert counts[0] == counts[1]


@pytest.mark.requirement("R20")
async def test_an_offer_that_was_put_up_again_stands_for_the_auction_that_runs() -> None:
    """The later start counts, also when the earlier auction closes after it."""
    async with desk() as made:
        await made.register("a-1", ends_at=BORN_MS + 1_000)
        await made.register("a-2")
        made.line.advance(1_000)
        await made.worker.work()
        assert made.facts("a-1")[-1] == "auction_timer_ended"
        view = (await ahead(made)).json()
        assert (view["auction_id"], view["status"], view["cancellable"]) == ("a-2", "ACTIVE", True)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"reason_code": "because"}, "reason_code"),
        ({"reason_code": None}, "reason_code"),
        ({"reason_code": "other", "note": "x" * 501}, "note"),
        ({"reason_code": "other", "note": 7}, "note"),
        ({"reason_code": "other", "device": ""}, "device"),
        ({"reason_code": "other", "device": "x" * 201}, "device"),
        ({}, "reason_code"),
    ],
)
@pytest.mark.requirement("R22")
async def test_reasons_are_canned_and_the_note_is_bounded(body: dict[str, Any], path: str) -> None:
    """422 names the member; the offer is untouched."""
    async with desk() as made:
        await made.register()
        answer = await made.http.put("/offers/o-1/cancel", json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_BODY")
        assert [fault["path"] for fault in answer.json()["errors"]] == [path]
        assert "offer_cancelled" not in made.facts()


@pytest.mark.parametrize("offer_id", ["a/b", "/a//b/", "a/cancel", "cancellation", "50%2F", "a?b#c", "..", "a/../b"])
async def test_an_offer_is_found_whatever_its_id_looks_like(offer_id: str) -> None:
    """Producers choose the ids of offers: whatever a start may name can be looked at and cancelled."""
    async with desk() as made:
        await made.register(offer=replace(OFFER, offer_id=offer_id))
        named = quote(offer_id, safe="").replace(".", "%2E")
        assert (await ahead(made, named)).json()["offer_id"] == offer_id
        answer = await cancel(made, named)
        assert (answer.status_code, answer.json()["offer"]["offer_id"]) == (200, offer_id)


@pytest.mark.parametrize("offer_id", ["o-9", "x" * 129, "%00"])
async def test_an_unknown_offer_is_404(offer_id: str) -> None:
    """What is too long to be one is not asked for."""
    async with desk() as made:
        for answer in (await ahead(made, offer_id), await cancel(made, offer_id)):
            assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_NOT_FOUND")
            assert len(answer.json()["detail"]) < 160
        assert (made.store.calls["offers"] == 0) is (len(offer_id) > 128)


@pytest.mark.requirement("R16")
async def test_a_store_that_is_away_is_503() -> None:
    """Whichever of the two look-ups it is."""
    async with desk() as made:
        await made.register()
        for call in ("offers", "timers"):
            made.store.failing = {call: StoreUnavailableError("away")}
            for answer in (await ahead(made), await cancel(made)):
                assert (answer.status_code, answer.json()["error_code"]) == (503, "DEPENDENCY_UNAVAILABLE")


@pytest.mark.requirement("R24")
async def test_a_cancellation_without_an_answer_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """202 with the place to ask at; the outcome is there once an engine has been there."""
    monkeypatch.setattr(commands_module, "ANSWER_WITHIN_S", 0.02)
    async with desk(answering=False) as made:
        await made.register()
        answer = await cancel(made)
        assert answer.status_code == 202
        await made.worker.work()
        assert (await made.http.get(answer.headers["location"])).json()["fact"] == "offer_cancelled"
