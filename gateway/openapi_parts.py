"""The words in which `gateway.openapi` and `gateway.openapi_commands` describe routes."""

from typing import Any, Final

from gateway.problems import MEDIA_TYPE, ProblemType

JSON: Final = "application/json"

INSTANT: Final[dict[str, Any]] = {"type": "integer", "description": "ms since the Unix epoch"}
DURATION: Final[dict[str, Any]] = {"type": "integer", "description": "ms"}


def ref(name: str) -> dict[str, str]:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def answer(description: str, schema: dict[str, Any] | None, media_type: str = JSON) -> dict[str, Any]:
    """One answer: what it means, and what it carries."""
    return {"description": description} | ({"content": {media_type: {"schema": schema}}} if schema else {})


def problems(*types: ProblemType) -> dict[str, Any]:
    """The refusals of a route, by status."""
    by_status: dict[str, list[str]] = {}
    for problem in types:
        by_status.setdefault(str(problem.status), []).append(problem.error_code)
    return {
        status: answer(" or ".join(f"`{code}`" for code in codes), ref("Problem"), MEDIA_TYPE)
        for status, codes in by_status.items()
    }


def query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """One parameter of the query string."""
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


AUCTION_ID: Final = {
    "name": "auction_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
}


def path(name: str, pattern: str | None = None) -> dict[str, Any]:
    """One parameter of the path."""
    schema: dict[str, Any] = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema | ({"pattern": pattern} if pattern else {})}


def body(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """What a request carries."""
    return {"required": required, "content": {JSON: {"schema": schema}}}
