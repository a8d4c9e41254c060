"""A whole gateway in this process, on the memory store: its application behind an HTTP client without a network."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
from prometheus_client import CollectorRegistry

from engine.store.redis import RedisStore
from gateway.app import Gateway, build
from tests.gateway.house import House


class Front(House):
    """A house with its front door: what `gateway.app.build` makes, and a client."""

    def __init__(self, *, shards: int = 1, **settings: Any) -> None:
        super().__init__(shards=shards, **settings)
        self.registry = CollectorRegistry()
        # `build` asks no more of a store than the protocols that `MemoryStore` implements.
        self.gateway: Gateway = build(cast(RedisStore, self.store), self.machine, self.settings, self.registry)
        self.hub, self.door, self.clock = self.gateway.hub, self.gateway.door, self.gateway.clock
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.gateway.app, raise_app_exceptions=False),
            base_url="http://127.0.0.1:8080",
        )


@asynccontextmanager
async def front(*, shards: int = 1, **settings: Any) -> AsyncIterator[Front]:
    """A front that is up: clock in step, feeds running."""
    made = Front(shards=shards, **settings)
    async with made.gateway.app.router.lifespan_context(made.gateway.app), made.http:
        yield made
