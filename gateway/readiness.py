"""Readiness: whether this gateway can do its job now, and if not, what is missing, by name."""

from dataclasses import dataclass
from typing import Final

from engine.clock import AuctionClock
from gateway.feeds import EventFeed
from gateway.hub import Hub
from gateway.jwks import PublicKeys

ENGINE_SILENCE_MAX_MS: Final = 3_000


@dataclass(frozen=True, slots=True)
class Readiness:
    """Looks at what the gateway depends on."""

    clock: AuctionClock
    hub: Hub
    feed: EventFeed
    shards: int
    keys: PublicKeys | None = None

    def checks(self) -> dict[str, str]:
        """Each dependency, and `ok` or what is wrong with it."""
        found = {"clock": self._clock(), "redis": self._redis(), "engine": self._engine()}
        return found if self.keys is None else found | {"keys": self._keys(self.keys)}

    def _clock(self) -> str:
        return "ok" if self.clock.synced else "the auction clock has not heard from Redis yet"

    def _redis(self) -> str:
        return "ok" if self.feed.is_fresh else "Redis has not answered for 3 s"

    def _engine(self) -> str:
        if not self.clock.synced:
            return "unknown before the clock is in step"
        now = self.clock.now_ms()
        silent = [
            shard
            for shard in range(self.shards)
            if now - self.hub.engine_seen.get(shard, 0) > ENGINE_SILENCE_MAX_MS
        ]  # fmt: skip
        if not silent:
            return "ok"
        return f"no engine is heard for {len(silent)} of {self.shards} shards: {', '.join(map(str, silent[:10]))}"

    def _keys(self, keys: PublicKeys) -> str:
        # Old keys are good enough: an issuer that is away for an hour should not take the auctions with it.
        return "ok" if keys.named(None) else "the public keys for tokens could not be read yet"
