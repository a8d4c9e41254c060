"""The bounds of what a store keeps."""

from dataclasses import dataclass

from engine.domain.instants import HOUR_MS


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """The bounds of what a store keeps. All lengths are per shard."""

    stamp_bound_ms: int = 250
    """How far a server clock may falsify a stamp (architecture section 4)."""
    seen_ms: int = 48 * HOUR_MS
    """How long a repetition of an event is recognised. Longer costs about 150 bytes per event and day."""
    intake_max: int = 1_000_000
    """Entries of the intake, applied ones that are not yet trimmed included."""
    updates_max: int = 100_000
    """Entries of the event lane that can be replayed to a client."""
    troubleshooting_max: int = 100_000
    """Commands in troubleshooting; beyond, producers are refused, so that nothing has to be dropped."""
    replies_max: int = 1_000
    """Answers kept for one who asked and has not read them."""
    reconciliations_max: int = 10_000
    """Entries of the stream of reconciliations, which is one for all shards."""
    attendant: str = ""
    """The gateway that uses this store; empty for every other process, whose writing proves nothing about producers."""
    outage_ms: int = 5_000
    """A shard that no gateway could write to for longer than this had an outage. Gateways beat every second."""
    outage_extension_ms: int = 0
    """By how much an outage in its closing window extends an auction; 0 leaves outages alone."""
    closed_retention_ms: int = 30 * 24 * HOUR_MS
    """How long a closed auction can be read, and replays of its start are recognised as such."""
