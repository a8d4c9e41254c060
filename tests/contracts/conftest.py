"""The stores that the contract suite runs against."""

from collections.abc import AsyncIterator

import pytest

from tests.contracts.stores import Bench, MemoryBench, RedisBench


@pytest.fixture(
    params=[
        pytest.param(None, id="memory"),
        pytest.param("valkey_server", id="valkey", marks=pytest.mark.integration),
        pytest.param("debian_server", id="debian-redis", marks=pytest.mark.integration),
    ]
)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Each store in turn, empty."""
    made = MemoryBench() if request.param is None else RedisBench(request.getfixturevalue(request.param))
    try:
        yield made
    finally:
        await made.close()
