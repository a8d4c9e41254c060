"""Tests for gateway.openapi and its parts: the description is complete, closed, and about the routes that there are."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.routing import Route

from gateway.command_routes import CancelBody
from gateway.events import event_schemas
from gateway.openapi import document
from gateway.openapi_commands import command_paths, command_schemas
from gateway.openapi_watching import watch_paths, watch_schemas
from gateway.problems import MEDIA_TYPE, ProblemType
from gateway.routes import VERSION
from gateway.tokens import OPEN_PATHS
from tests.gateway.desk import bearing, desk
from tests.gateway.front import front

DOCUMENT = document(VERSION)
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}

ELSEWHERE = {
    ProblemType.METHOD_NOT_ALLOWED: "a method that is not described",
    ProblemType.MALFORMED_REQUEST: "what is no HTTP",
    ProblemType.UPGRADE_REQUIRED: "a request to the path of the socket, which is no operation of HTTP",
    ProblemType.HEADERS_TOO_LARGE: "a request whose path was not read to its end",
    ProblemType.REQUEST_TIMEOUT: "a request that never came to its end",
}
"""Problems that belong to no operation, and what they are answers to."""


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every operation with its path and method."""
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield path, method, operation


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


@pytest.mark.requirement("R28")
async def test_the_description_names_exactly_the_routes_that_are_served() -> None:
    """Path by path and method by method; a converter of the router is no part of a path."""
    async with front() as made:
        served = {
            (re.sub(r":[a-z]+}", "}", route.path), method.lower())
            for route in made.gateway.app.routes
            if isinstance(route, Route) and route.include_in_schema
            for method in (route.methods or set()) - {"HEAD"}
        }
    assert {(path, method) for path, method, _ in operations()} == served


@pytest.mark.requirement("R28")
def test_every_reference_is_defined_and_every_definition_is_used() -> None:
    """Nothing points nowhere, and nothing is left over."""
    prefix = "#/components/schemas/"
    named = {node["$ref"].removeprefix(prefix) for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)}
    assert named == DOCUMENT["components"]["schemas"].keys()


@pytest.mark.requirement("R28")
def test_no_name_is_defined_in_two_ways() -> None:
    """The parts are put together by name: where two of them use one, they must mean the same."""
    together: dict[str, Any] = {}
    for part in (event_schemas(), command_schemas(), watch_schemas()):
        for name, schema in part.items():
            assert together.setdefault(name, schema) == schema
            assert DOCUMENT["components"]["schemas"][name] == schema
    paths = [*command_paths(), *watch_paths()]
    assert len(paths) == len(set(paths))


@pytest.mark.requirement("R28")
def test_every_operation_says_what_it_is_and_what_it_needs() -> None:
    """A name of its own, a sentence, and each parameter of its path."""
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))
    for path, _, operation in operations():
        assert operation["summary"]
        described = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert described == set(re.findall(r"{(\w+)}", path))
        assert all(each["required"] for each in operation.get("parameters", []) if each["in"] == "path")


@pytest.mark.requirement("R28")
def test_refusals_are_problems_and_successes_are_not() -> None:
    """Every answer from 400 on carries problem details, but for what a probe reads; a 405 is promised by none."""
    for path, _, operation in operations():
        for status, answer in operation["responses"].items():
            assert status != "405"
            media = set(answer.get("content", {}))
            if int(status) >= 400 and path != "/readyz":
                assert media == {MEDIA_TYPE}
            else:
                assert MEDIA_TYPE not in media


@pytest.mark.requirement("R28")
def test_every_problem_of_the_catalogue_is_described_somewhere() -> None:
    """By its code, at the operation and under the status that it has."""
    described = {
        code
        for _, _, operation in operations()
        for status, answer in operation["responses"].items()
        for code in re.findall(r"`([A-Z_]+)`", answer["description"])
        if code in ProblemType.__members__ and str(ProblemType[code].status) == status
    }
    assert described == {problem.error_code for problem in ProblemType if problem not in ELSEWHERE}


@pytest.mark.requirement("R24", "R28")
def test_only_what_probes_read_is_open() -> None:
    """Everything else may ask for a token, and says so with 401."""
    for path, _, operation in operations():
        if path in OPEN_PATHS:
            assert operation["security"] == []
            assert "401" not in operation["responses"]
        else:
            assert "security" not in operation
            assert "`UNAUTHENTICATED`" in operation["responses"]["401"]["description"]
    assert DOCUMENT["security"] == [{"bearer": []}, {}]


@pytest.mark.requirement("R24", "R28")
async def test_what_is_described_as_an_operators_asks_for_the_scope() -> None:
    """The sentence and the 403 go together with what a token without the scope is told."""
    concrete = {"auction_id": "a-1", "offer_id": "o-1", "command_id": "e-1"}
    async with desk(tokens=True) as made:
        await made.register()
        for path, method, operation in operations():
            if path == "/auctions/{auction_id}/events":
                continue  # a stream, which does not end
            answer = await made.http.request(method, path.format(**concrete), headers=bearing("stranger"))
            codes = operation["responses"].get("403", {}).get("description", "")
            refused = answer.status_code == 403 and answer.json()["error_code"] == "INSUFFICIENT_SCOPE"
            assert refused == ("`INSUFFICIENT_SCOPE`" in codes), (path, method, answer.text)
            assert str(answer.status_code) in operation["responses"], (path, method, answer.text)


@pytest.mark.parametrize("model", [CancelBody])
def test_a_body_is_described_by_the_model_that_reads_it(model: type[BaseModel]) -> None:
    """The schema is generated, so it cannot say anything else."""
    schema = DOCUMENT["components"]["schemas"][model.__name__]
    assert set(schema["properties"]) == set(model.model_fields)
    assert schema["required"] == [name for name, field in model.model_fields.items() if field.is_required()]


def test_the_document_is_made_once() -> None:
    """Whoever asks again gets the same one, and nobody may change it."""
    assert document(VERSION) is DOCUMENT
    assert DOCUMENT["info"]["version"] == VERSION
