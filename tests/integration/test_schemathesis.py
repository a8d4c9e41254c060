"""Schemathesis against the real server: what `/openapi.json` promises is what comes back, for good data and for bad."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from tests.gateway.issuer import SECRET, signed
from tests.integration.events import bid, event, started
from tests.live import LiveStack, until

pytestmark = pytest.mark.integration

SEED: Final = 20_260_101
FAR: Final = 4_000_000_000_000
KNOWN: Final = 0.7
"""How often a path names something that exists; otherwise it is made up."""

NOT_IN_A_SCHEMA: Final = {
    "must be an integer": "to JSON Schema 7.0 is an integer; here what is written with a fraction is none",
    "must be whole epoch milliseconds or an RFC 3339 date-time with a zone": "the same of instants",
    "ends_at must be after starts_at": "JSON Schema cannot compare two members",
    "is a day that no calendar has": "the format date-time is checked by shape, not by calendar",
    "is a leap second at a time of day that has none": "the format date-time allows one at any time of day",
    "must be between 1 and 253402300799999 in epoch milliseconds": "a date-time has no bounds in JSON Schema",
}
"""Reasons that a good request may be refused for, and why no schema can say so."""
OPAQUE_CURSORS: Final = {"GET /auctions", "GET /ops/troubleshooting"}
"""Only a cursor that was handed out is a good one, and no schema can list those."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that failed."""

    operation: str
    check: str
    message: str
    request: str


def excused(operation: str, check: str, response: Response | None) -> bool:
    """Whether data that the schema allows was refused for a reason that no schema can state."""
    if check != "positive_data_acceptance" or response is None or response.status_code not in {400, 422}:
        return False
    problem = orjson.loads(response.content)
    if problem["error_code"] == "INVALID_PARAMETER":
        return operation in OPAQUE_CURSORS and problem["parameter"] == "cursor"
    reasons = {fault["reason"] for fault in problem.get("errors", ())}
    return bool(reasons) and reasons <= NOT_IN_A_SCHEMA.keys()


class Run:
    """One run of every operation: what was found, and which answers were seen."""

    def __init__(self, stack: LiveStack, examples: int, **config: Any) -> None:
        self.findings: list[Finding] = []
        self.statuses: Counter[tuple[str, int]] = Counter()
        settings = {
            "seed": SEED,
            "workers": 1,
            "continue-on-failure": True,
            "generation": {"deterministic": True, "max-examples": examples, "database": "none", "no-shrink": True},
            "phases": {"examples": {"enabled": False}, "stateful": {"enabled": False}},
            # Its boundary cases, of 14 envelopes alone and in a batch, are 6,000 and take half a minute; they have a suite
            # of their own, tests/gateway/test_events.py. Here it gets random ones.
            "operations": [
                {
                    "include-name": "POST /events",
                    "phases": {"coverage": {"enabled": False}},
                },
                # It answers for as long as its auction runs: tests/integration/test_event_stream.py.
                {"include-name": "GET /auctions/{auction_id}/events", "enabled": False},
            ],
        }
        schema = schemathesis.openapi.from_url(
            f"{stack.url}/openapi.json", config=SchemathesisConfig.from_dict(settings | config)
        )
        for happened in from_schema(schema).execute():
            assert not isinstance(happened, FatalError | NonFatalError), happened
            if isinstance(happened, ScenarioFinished):
                self._take(happened)

    def _take(self, scenario: ScenarioFinished) -> None:
        operation = scenario.label or ""
        for case_id, interaction in scenario.recorder.interactions.items():
            response = interaction.response
            if response is not None:
                self.statuses[operation, response.status_code] += 1
            for check in scenario.recorder.checks.get(case_id, ()):
                if check.failure_info is not None and not excused(operation, check.name, response):
                    self.findings.append(
                        Finding(
                            operation,
                            check.name,
                            check.failure_info.failure.message,
                            check.failure_info.code_sample,
                        )
                    )

    def answered(self, operation: str) -> set[int]:
        """The statuses that an operation answered with."""
        return {status for name, status in self.statuses if name == operation}


def furnish(stack: LiveStack) -> dict[str, list[str]]:
    """Auctions, offers and commands that requests can be about."""
    auctions = [f"furnished-{number}" for number in range(12)]
    starts = [started(auction_id, 1_000, FAR) for auction_id in auctions]
    for start, auction_id in zip(starts, auctions, strict=True):
        start["data"] |= {"offer_id": f"offer-of-{auction_id}", "modification_window_minutes": 525_600} | {
            "offer_created_at": FAR - 1
        }
    parked = [bid(f"missing-{number}") | {"id": f"furnished-bid-{number}"} for number in range(12)]
    cancelled = event("auctions.cancel.requested", auction_id=auctions[0], reason="furnishing")
    cancelled["id"] = "furnished-cancellation"
    stack.post(*starts, *parked, cancelled)
    stack.until_status(auctions[0], "CANCELLED")
    for auction_id in auctions[1:]:
        stack.until_status(auction_id, "ACTIVE")
    until(lambda: stack.http.get("/ops/troubleshooting").json()["depth"] >= len(parked), "the strange bids are parked")
    return {
        "auctions": auctions,
        "offers": [f"offer-of-{auction_id}" for auction_id in auctions],
        "commands": [sent["id"] for sent in [*parked, cancelled]],
    }


def known(furniture: dict[str, list[str]]) -> dict[str, Any]:
    """The part of a configuration that names what exists."""
    names = {"path.auction_id": "auctions", "path.offer_id": "offers", "path.command_id": "commands"}
    return {
        "dictionaries": {name: {"values": values} for name, values in furniture.items()},
        "parameters": {parameter: {"dictionary": name, "probability": KNOWN} for parameter, name in names.items()},
    }


@pytest.mark.requirement("R25", "R28")
def test_schemathesis_finds_nothing(live_stack: LiveStack) -> None:
    """Every operation, with data good and bad, about things that exist and things that do not: all as described."""
    run = Run(live_stack, 12, **known(furnish(live_stack)))
    assert run.findings == []
    # A run that reached nothing would find nothing. What one of two takes away the other may not find any more.
    parked = "POST /ops/troubleshooting/{command_id}"
    for one, other in (
        ("POST /auctions/{auction_id}/cancel", "PUT /offers/{offer_id}/cancel"),
        (f"{parked}/retry", f"{parked}/cancel"),
    ):
        assert run.answered(one) | run.answered(other) >= {200, 404, 405, 409, 422}
    assert run.answered("POST /events") >= {202, 400}
    assert run.answered("GET /auctions/{auction_id}/audit") >= {200, 400, 404, 405}


@pytest.mark.requirement("R24", "R28")
def test_schemathesis_finds_nothing_with_a_token_that_allows_little(short_tmp: Path) -> None:
    """The refusals of a gateway that asks for tokens are described as well: 401 with none, 403 and 404 with a weak one."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_JWT_SECRET": SECRET})
    try:
        owner = signed({"alg": "HS256"}, SECRET, {"sub": "owner-1", "exp": FAR // 1_000, "scope": "events:write ops"})
        stack.http.headers["Authorization"] = f"Bearer {owner}"
        furniture = known(furnish(stack))
        stranger = signed({"alg": "HS256"}, SECRET, {"sub": "stranger-1", "exp": FAR // 1_000})
        phases = {name: {"enabled": False} for name in ("examples", "coverage", "stateful")}
        for headers, refused_with in (({}, 401), ({"Authorization": f"Bearer {stranger}"}, 403)):
            run = Run(stack, 3, **furniture, phases=phases, headers=headers)
            assert run.findings == []
            assert run.answered("POST /ops/troubleshooting/requeue") == {refused_with}
            assert run.answered("POST /events") == {refused_with}
        assert run.answered("POST /auctions/{auction_id}/cancel") <= {400, 404, 422}
    finally:
        stack.stop()
