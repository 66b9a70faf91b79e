"""Every metric, named in one place. `python -m embedstream.metrics.metrics` prints the table of docs/operations.md.

Names follow Prometheus' conventions: base units, `_total` for what only grows. Whoever exposes metrics makes them from
these (`embedstream.metrics.exposition`); nothing here needs a library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""From a hashed batch to a shard that is written over a slow line."""

TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
"""From a single text to the fullest batch of a large GPU."""


@dataclass(frozen=True)
class Metric:
    """One metric as it is exposed."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("queue",)
    buckets: tuple[float, ...] = ()


# What one worker counts since it was started

CLAIMED_BLOCKS = Metric("embedstream_claimed_blocks_total", "counter", "Blocks that this worker claimed.")
REDELIVERED_BLOCKS = Metric(
    "embedstream_redelivered_blocks_total", "counter", "Claimed blocks that an earlier worker held when it died."
)
COMMITTED_SHARDS = Metric("embedstream_committed_shards_total", "counter", "Shards that this worker committed.")
COMMITTED_BLOCKS = Metric("embedstream_committed_blocks_total", "counter", "Blocks in committed shards.")
COMMITTED_ROWS = Metric("embedstream_committed_rows_total", "counter", "Rows with a vector in committed shards.")
FAILED_ROWS = Metric(
    "embedstream_failed_rows_total",
    "counter",
    "Error rows in committed shards: refused by the producer, or failed in this worker.",
)
TRUNCATED_ROWS = Metric(
    "embedstream_truncated_rows_total", "counter", "Rows in committed shards that were longer than the model takes."
)
DUPLICATE_ROWS = Metric(
    "embedstream_duplicate_rows_total",
    "counter",
    "Rows in committed shards that took the results of an equal text, so that the model did not run for them.",
)
COMMITTED_TOKENS = Metric("embedstream_committed_tokens_total", "counter", "Tokens of the rows in committed shards.")
PADDING_TOKENS = Metric("embedstream_padding_tokens_total", "counter", "Padding tokens computed in addition to them.")
BATCH_TOKENS = Metric(
    "embedstream_batch_tokens",
    "histogram",
    "Tokens of one batch, padding excluded; interactive requests included.",
    buckets=TOKENS,
)
STAGE_SECONDS = Metric(
    "embedstream_stage_seconds",
    "histogram",
    "One piece of work of a stage: decode (a block), tokenize (a window), infer (a batch), finish (a window's rows), "
    "write (a shard), commit (a shard).",
    ("queue", "stage"),
    SECONDS,
)
DEVICE_BUSY = Metric(
    "embedstream_device_busy_seconds_total", "counter", "Time in which at least one batch was in the model."
)
WARM_UP = Metric("embedstream_warm_up_seconds", "gauge", "How long the batches before readiness took.")
READY = Metric("embedstream_ready", "gauge", "1 while the worker takes work: warm, and not told to stop.")
WORKER_INFO = Metric(
    "embedstream_worker_info",
    "gauge",
    "1 once the model is loaded; the labels describe the worker.",
    ("queue", "worker", "model", "engine", "device", "dtype"),
)

# What lies in Redis, whoever asks: the same from every worker and coordinator, so take the maximum over instances

REDIS_UP = Metric("embedstream_redis_up", "gauge", "1 if Redis answered; otherwise the following are left out.", ())
QUEUE_BYTES = Metric("embedstream_queue_bytes", "gauge", "Bytes of blocks that are not committed yet.")
QUEUE_BLOCKS = Metric("embedstream_queue_blocks", "gauge", "Blocks that are not committed yet.")
QUEUE_CLAIMED = Metric(
    "embedstream_queue_claimed_blocks", "gauge", "Blocks that a worker has claimed and not committed yet."
)
QUEUE_OLDEST = Metric(
    "embedstream_queue_oldest_block_age_seconds",
    "gauge",
    "Age of the oldest block that is not committed yet; 0 if there is none.",
)
QUEUE_TOKENS = Metric(
    "embedstream_queue_tokens",
    "gauge",
    "Tokens of the blocks that a live worker accepts, estimated from their bytes and from recent commits.",
)
QUEUE_PACE = Metric(
    "embedstream_queue_worker_tokens_per_second",
    "gauge",
    "Tokens per second of one worker, from recent commits; kept for 30 days. Before the first commit a guess: 1000.",
)
QUEUE_DRAIN = Metric(
    "embedstream_queue_drain_seconds",
    "gauge",
    "Seconds to drain: queued tokens / (tokens per second of one worker x ready workers, at least one).",
)
QUEUE_WORKERS = Metric(
    "embedstream_queue_workers", "gauge", "Live workers by state: starting, ready, draining.", ("queue", "state")
)
QUEUE_JOBS = Metric(
    "embedstream_queue_jobs",
    "gauge",
    "Jobs that have not ended, by state: submitting, running, finalizing.",
    ("queue", "state"),
)
QUEUE_STALLED = Metric(
    "embedstream_queue_stalled_jobs", "gauge", "Jobs that neither producer nor worker has moved for a minute."
)

# What one gateway counts since it was started

GATEWAY_REQUESTS = Metric(
    "embedstream_gateway_requests_total",
    "counter",
    "Requests by route, method and status; 499: the client left before the answer.",
    ("route", "method", "status"),
)
GATEWAY_SECONDS = Metric(
    "embedstream_gateway_request_seconds",
    "histogram",
    "From a request's head to the end of its answer.",
    ("route",),
    SECONDS,
)
GATEWAY_OPEN = Metric("embedstream_gateway_open_requests", "gauge", "Requests that are being read or answered.", ())

WORKER_METRICS = (
    CLAIMED_BLOCKS,
    REDELIVERED_BLOCKS,
    COMMITTED_SHARDS,
    COMMITTED_BLOCKS,
    COMMITTED_ROWS,
    FAILED_ROWS,
    TRUNCATED_ROWS,
    DUPLICATE_ROWS,
    COMMITTED_TOKENS,
    PADDING_TOKENS,
    BATCH_TOKENS,
    STAGE_SECONDS,
    DEVICE_BUSY,
    WARM_UP,
    READY,
    WORKER_INFO,
)
QUEUE_METRICS = (
    REDIS_UP,
    QUEUE_BYTES,
    QUEUE_BLOCKS,
    QUEUE_CLAIMED,
    QUEUE_OLDEST,
    QUEUE_TOKENS,
    QUEUE_PACE,
    QUEUE_DRAIN,
    QUEUE_WORKERS,
    QUEUE_JOBS,
    QUEUE_STALLED,
)

GATEWAY_METRICS = (GATEWAY_REQUESTS, GATEWAY_SECONDS, GATEWAY_OPEN)


def metrics_table(metrics: tuple[Metric, ...]) -> str:
    """Markdown."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |".replace("|  |", "| |")
        for metric in metrics
    ]
    return "\n".join(["| metric | kind | labels | what |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(f"{metrics_table(WORKER_METRICS)}\n\n{metrics_table(QUEUE_METRICS)}\n\n{metrics_table(GATEWAY_METRICS)}")
