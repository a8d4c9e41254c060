"""Tests for gateway.problems."""

import orjson
import pytest

from gateway.problems import (
    RESERVED_MEMBERS,
    RETRY_AFTER_MAX_S,
    Problem,
    ProblemType,
    problem_body,
    problem_response,
    retry_after,
    unavailable,
)

CATALOGUE = {
    "RESOURCE_NOT_FOUND": 404,
    "MALFORMED_EVENTS": 400,
    "MALFORMED_JSON": 400,
    "BATCH_TOO_LARGE": 400,
    "EMPTY_BATCH": 400,
    "PAYLOAD_TOO_LARGE": 413,
    "INVALID_PARAMETER": 400,
    "METHOD_NOT_ALLOWED": 405,
    "UPGRADE_REQUIRED": 426,
    "FOREIGN_ORIGIN": 403,
    "UNAUTHENTICATED": 401,
    "INSUFFICIENT_SCOPE": 403,
    "INTAKE_FULL": 503,
    "DEPENDENCY_UNAVAILABLE": 503,
    "INTERNAL_ERROR": 500,
    "FSM_TRANSITION_INVALID": 409,
    "FSM_TERMINAL_IMMUTABLE": 409,
}


@pytest.mark.parametrize(("code", "status"), CATALOGUE.items())
def test_codes_and_their_statuses_are_stable(code: str, status: int) -> None:
    """A code of the catalogue keeps its name and its HTTP status: clients branch on both."""
    problem_type = ProblemType[code]
    assert (problem_type.error_code, problem_type.status) == (code, status)


def test_no_two_types_are_the_same() -> None:
    """Every type has a title and a URI of its own, so neither ever stands for two things."""
    assert len({kind.title for kind in ProblemType}) == len({kind.uri for kind in ProblemType}) == len(ProblemType)


def test_the_body_has_every_promised_member() -> None:
    """The reserved members come first, the problem's own ones after them."""
    problem = Problem(ProblemType.MALFORMED_EVENTS, "1 of 2 is wrong", extra={"errors": [{"index": 1}]})
    assert problem_body(problem, "req-1") == {
        "type": "urn:auction-timer:problem:malformed-events",
        "title": "Malformed events",
        "status": 400,
        "detail": "1 of 2 is wrong",
        "error_code": "MALFORMED_EVENTS",
        "correlation_id": "req-1",
        "errors": [{"index": 1}],
    }


def test_a_problem_without_extras_has_only_the_reserved_members() -> None:
    """Nothing else slips into the body, and no header into the answer."""
    problem = Problem(ProblemType.INTERNAL_ERROR, "it broke")
    assert problem_body(problem, "req-1").keys() == RESERVED_MEMBERS
    assert not problem.headers


@pytest.mark.parametrize("member", sorted(RESERVED_MEMBERS))
def test_extras_cannot_replace_a_reserved_member(member: str) -> None:
    """An extra field named like a reserved member is a mistake of ours and fails where it is made."""
    with pytest.raises(AssertionError, match=member):
        Problem(ProblemType.INTERNAL_ERROR, "it broke", extra={member: "other"})


def test_the_answer_is_problem_json_with_status_and_headers() -> None:
    """The response carries the media type of RFC 9457, the type's status, and the headers of the problem."""
    problem = Problem(ProblemType.INTAKE_FULL, "try again", headers={"Retry-After": "2"})
    response = problem_response(problem, "req-1")
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["retry-after"] == "2"
    assert orjson.loads(bytes(response.body)) == problem_body(problem, "req-1")


def test_a_problem_reads_well_in_a_log() -> None:
    """As an exception it says its code and its detail."""
    assert str(Problem(ProblemType.EMPTY_BATCH, "the array holds no event")) == "EMPTY_BATCH: the array holds no event"


def test_when_to_come_back_is_spread() -> None:
    """Whole seconds, as RFC 9110 has them, and not the same for all; so too where a dependency is away."""
    possible = set(range(1, RETRY_AFTER_MAX_S + 1))
    assert {int(retry_after()["Retry-After"]) for _ in range(200)} == possible
    assert {int(unavailable("away").headers["Retry-After"]) for _ in range(200)} == possible
