"""The catalogue of metrics: each name, what it measures, and what to do when it looks wrong (source of `docs/metrics.md`)."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """The Prometheus type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` is the name as it is scraped; a counter's ends in `_total`."""

    name: str
    kind: Kind
    meaning: str
    remedy: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Dense where the promises are (10 ms, 25 ms, 100 ms, 250 ms), sparse where only a fault leads.
LATENESS_BUCKETS_MS: Final = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 15_000, 60_000)
DRIFT_BUCKETS_MS: Final = (0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 5_000, 60_000)

TICK_DELAY: Final = Metric(
    "auctions_timer_tick_delay_ms",
    Kind.HISTOGRAM,
    "From the instant a tick was due to the instant the engine had handed it to Redis.",
    "Above 100 ms: the engine or Redis lacks CPU; look at auctions_intake_lag_events, then move shards to another engine.",
    buckets=LATENESS_BUCKETS_MS,
)
CLOSE_LATENESS: Final = Metric(
    "auctions_timer_close_lateness_ms",
    Kind.HISTOGRAM,
    "From `ends_at` to the stamp of the commit that closed it. Fairness does not depend on it: bids are judged by arrival.",
    "Above 1000 ms: the engine was down, or behind (auctions_intake_lag_events); after a restart a burst is expected, once.",
    buckets=LATENESS_BUCKETS_MS,
)
EARLY_CLOSES: Final = Metric(
    "auctions_timer_early_closes_total",
    Kind.COUNTER,
    "Closes whose commit was stamped before `ends_at`. The commit makes it impossible; the counter is there to show that.",
    "Must be 0. If not: stop the engines, keep Redis as it is, and report a bug with the audit export.",
)
DRIFT: Final = Metric(
    "auctions_timer_drift_ms",
    Kind.HISTOGRAM,
    "Distance of a clock from the auction clock: `engine` and `gateway` their own estimate, `client` what bidders saw; "
    "`reconciler`: of an auction's end, between what is kept and what the audit log says.",
    "Above 250 ms for engine or gateway: a clock stepped; check time synchronisation on the hosts and on Redis.",
    labels=("source",),
    buckets=DRIFT_BUCKETS_MS,
)
CLOCK_VERDICTS: Final = Metric(
    "auctions_clock_verdicts_total",
    Kind.COUNTER,
    "Looks at the three clocks of a process, about one a second, by the one that was odd by more than 250 ms: `authority` "
    "(Redis), `wall` (the date of this host), `monotonic` (this host stood still), `no_majority`, or `none`.",
    "`authority`: the date of the Redis host was set; the reconciler corrects that within seconds, so there is time to mend "
    "it. `wall`: the same for this host. `monotonic`: this host slept or was paused. `no_majority`: the dates of both.",
    labels=("source", "verdict"),
)
ACTIVE: Final = Metric(
    "auctions_timer_active",
    Kind.GAUGE,
    "Auctions this engine holds that are not over.",
    "A fall to 0 without closes: the engine lost its leases; look at its log.",
)
EXTENSIONS: Final = Metric(
    "auctions_timer_extensions_total",
    Kind.COUNTER,
    "Extensions by soft close; `clipped_by` names the cap that cut one (`none` if none did).",
    "Many clipped by `total`: an auction is being kept open on purpose; look at its audit.",
    labels=("clipped_by",),
)
TRIGGER_LAG: Final = Metric(
    "auctions_timer_trigger_lag_ms",
    Kind.HISTOGRAM,
    "From the event time its producer stated to the registration of the timer (requirement R31).",
    "Above 1000 ms: the bus in front of the gateway is slow, or producer clocks are off.",
    buckets=(*LATENESS_BUCKETS_MS, 300_000, 3_600_000),
)
INTAKE_LAG: Final = Metric(
    "auctions_intake_lag_events",
    Kind.GAUGE,
    "Intake entries that the engine has read and not yet committed.",
    "Growing: the engine is at its limit (see benchmarks) or Redis refuses writes; look at auctions_commit_conflicts_total.",
)
APPLIED: Final = Metric(
    "auctions_intake_applied_total",
    Kind.COUNTER,
    "Intake entries applied, by what they did.",
    "Many `refused`: a producer sends commands for auctions that are over.",
    labels=("outcome",),
)
HELD: Final = Metric(
    "auctions_timers_held_total",
    Kind.COUNTER,
    "Timers that an engine found damaged when it loaded its shard, and holds until the reconciler has restored them.",
    "Somebody or something writes to Redis besides the engine; find out who. Held auctions neither close nor take bids: see "
    "that a reconciler runs, or run `auction-timer reconciler --once --report`, then retry what waits in troubleshooting.",
)
COMMIT_CONFLICTS: Final = Metric(
    "auctions_commit_conflicts_total",
    Kind.COUNTER,
    "Commits refused because the shard was not where the engine thought; it then loads the shard again.",
    "Steadily above 0: two engines fight for a shard, or somebody edits Redis by hand.",
)
STORE_RETRIES: Final = Metric(
    "auctions_store_retries_total",
    Kind.COUNTER,
    "Calls to Redis that had to be repeated.",
    "Bursts are failovers; a steady rate is a network or memory problem of Redis.",
)
PARKED: Final = Metric(
    "auctions_troubleshooting_depth",
    Kind.GAUGE,
    "Commands in troubleshooting, over the shards of this engine.",
    "List them (`auction-timer ops troubleshooting list`), mend their cause, then retry, requeue or cancel them.",
)
OFFER_CANCELLATIONS: Final = Metric(
    "offers_cancellation_total",
    Kind.COUNTER,
    "Requests to cancel an offer, by outcome: `completed`, or the refusal (requirement R23).",
    "Many `window_expired`: the maker's window is shorter than buyers expect; many `auction_closed`: a page is old.",
    labels=("outcome",),
)
OFFER_CANCELLATION_SUCCESS: Final = Metric(
    "offers_cancellation_success_rate",
    Kind.GAUGE,
    "Share of the requests to cancel an offer that were completed, 0 to 1, of the last 1,000 that were no repetition of one; "
    "1 before the first.",
    "Below 0.95: look at offers_cancellation_total by outcome, then at the makers' modification windows.",
)
CONNECTIONS: Final = Metric(
    "auctions_gateway_connections",
    Kind.GAUGE,
    "Open sockets and event streams of this gateway.",
    "Near AUCTION_TIMER_CONNECTIONS_MAX: start another gateway.",
)
HANDSHAKES: Final = Metric(
    "auctions_gateway_handshakes_total",
    Kind.COUNTER,
    "Socket handshakes by outcome.",
    "Many `foreign_origin`: a page embeds the socket without leave; many `resource_not_found`: clients hold stale links.",
    labels=("outcome",),
)
DELIVERY: Final = Metric(
    "auctions_gateway_delivery_ms",
    Kind.HISTOGRAM,
    "From the server time a frame was made with to the end of its fan-out in this gateway.",
    "Above 100 ms: the gateway lacks CPU for its sockets; start another one.",
    labels=("lane",),
    buckets=LATENESS_BUCKETS_MS,
)
CONFLATED: Final = Metric(
    "auctions_gateway_conflated_ticks_total",
    Kind.COUNTER,
    "Ticks that a lagging socket did not get because a newer one took their place.",
    "Normal for slow networks; sudden growth for all sockets means the gateway's own network is slow.",
)
DISCONNECTS: Final = Metric(
    "auctions_gateway_disconnects_total",
    Kind.COUNTER,
    "Sockets and event streams closed by the gateway, by code: our own, and 1002, 1007 or 1009 for what breaks RFC 6455.",
    "4101: readers too slow; 4102: a failover took the registration of an auction back, send it again; 4408: peers vanish "
    "without a word, look at the network; 4400, 4429 and those of RFC 6455: a client is at fault.",
    labels=("code",),
)
RESUMES: Final = Metric(
    "auctions_gateway_resumes_total",
    Kind.COUNTER,
    "Sockets and event streams that came back with a cursor, by whether the missed events could be replayed.",
    "Many `false`: clients stay away longer than the event lane is kept (AUCTION_TIMER_UPDATES_MAX) or miss more than 1 MiB; "
    "or they came back while Redis was away, or after a failover.",
    labels=("recovered",),
)
RESYNCS: Final = Metric(
    "auctions_gateway_client_resyncs_total",
    Kind.COUNTER,
    "Drifts that clients reported, by what became of them: `small` is under the threshold of 500 ms; above it a report is "
    "`announced` as auction_timer_resynced, `limited` if too many came at once, or `lost` if Redis did not take it.",
    "Many above the threshold: look at auctions_timer_drift_ms of engine and gateway; if those are fine, it is the clients.",
    labels=("outcome",),
)
ARCHIVE_LAG: Final = Metric(
    "auctions_audit_archive_lag_events",
    Kind.GAUGE,
    "Audit records in the streams that are not archived yet.",
    "Grows while the reconciler is down or its database does not answer (its log says which): Redis keeps every record "
    "until then. Mend that; nothing is lost meanwhile, but Redis fills up.",
)
ARCHIVE_REFUSED: Final = Metric(
    "auctions_audit_archive_refused_events",
    Kind.GAUGE,
    "Audit records in the streams that contradict the archive: another record has their number, or they have none.",
    "Must be 0. If not: run `auction-timer audit verify`, keep copies of Redis and of the archive, and find out who wrote. "
    "Redis lost records in a failover, or somebody changed one of the two. Their shard's stream is not trimmed meanwhile: if "
    "it was a failover, export the rows that verify names, delete them from the archive, and restart the reconciler.",
)
WEBHOOK_DELIVERIES: Final = Metric(
    "auctions_webhook_deliveries_total",
    Kind.COUNTER,
    "Outbound events by what became of them at the webhook: `delivered`; `retried`, once for each attempt that failed and is "
    "followed by another; `undelivered`, put aside; `lost`, trimmed from the event lane before they were posted.",
    "`undelivered`: read `auction:undelivered:{k}`, where each stands with its last error. `lost`: the webhook was away for "
    "too long; read the auctions anew, then raise AUCTION_TIMER_UPDATES_MAX or lower AUCTION_TIMER_WEBHOOK_ATTEMPTS_MAX.",
    labels=("outcome",),
)
WEBHOOK_LAG: Final = Metric(
    "auctions_webhook_lag_events",
    Kind.GAUGE,
    "Entries of the event lane that the forwarder has not passed yet, over the shards it holds.",
    "Growing: the webhook is slow or refuses events (see auctions_webhook_deliveries_total); each shard waits for one answer "
    "at a time, so let the receiver accept first and work later, or post fewer types (AUCTION_TIMER_WEBHOOK_TYPES).",
)

CORRECTIONS: Final = Metric(
    "auctions_timer_corrections_total",
    Kind.COUNTER,
    "Drifts that the reconciler found and asked to repair or, where no event can mend them, wrote down; by what was wrong.",
    "Read `auction:timer:reconciliations`: each has its cause, before, after and evidence. `heartbeat_frozen`, "
    "`engine_silent`, `shard_taken_over`: look at that engine. `cap_breached`, `closed_early`, `memory_differs`, "
    "`log_missing`: must be 0; keep Redis as it is, and report a bug. `log_contradicted`: a shard's audit log does not "
    "link to its head, and nothing before the break is counted on: run `auction-timer audit verify`, mend the archive "
    "from a copy, and restart the reconciler. `clock`: the date of the Redis host was set, counted once per shard; check "
    "its time synchronisation. The others: somebody or something writes to Redis besides the engine; find out who.",
    labels=("kind",),
)
PASS_MS: Final = Metric(
    "auctions_reconciler_pass_ms",
    Kind.HISTOGRAM,
    "How long the reconciler's passes over all live auctions took.",
    "Near AUCTION_TIMER_RECONCILE_INTERVAL_MS: too many live auctions for one reconciler at this interval; raise it.",
    buckets=LATENESS_BUCKETS_MS,
)

ENGINE: Final = (
    TICK_DELAY, CLOSE_LATENESS, EARLY_CLOSES, DRIFT, CLOCK_VERDICTS, ACTIVE, EXTENSIONS, TRIGGER_LAG, INTAKE_LAG, APPLIED,
    COMMIT_CONFLICTS, HELD, STORE_RETRIES, PARKED, OFFER_CANCELLATIONS, OFFER_CANCELLATION_SUCCESS,
)  # fmt: skip
GATEWAY: Final = (CONNECTIONS, HANDSHAKES, DELIVERY, CONFLATED, DISCONNECTS, RESUMES, RESYNCS, DRIFT, CLOCK_VERDICTS)
RECONCILER: Final = (
    ARCHIVE_LAG, ARCHIVE_REFUSED, WEBHOOK_DELIVERIES, WEBHOOK_LAG, CORRECTIONS, PASS_MS, DRIFT, CLOCK_VERDICTS,
)  # fmt: skip
CATALOGUE: Final = tuple(dict.fromkeys((*ENGINE, *GATEWAY, *RECONCILER)))
