"""The functions that an RQ job may name, and no others: `FUNCTIONS` is all that is ever called by a name from Redis.

Each may be run at any time, twice, by two at once, or be killed in the middle: what must happen once is a step of the
broker. Each ends early when nothing is left to do. What they raise is told by the process that runs them.
"""

from __future__ import annotations

from collections.abc import Callable

from embedstream.dataset.roots import allows
from embedstream.errors import JobUnknown
from embedstream.jobs import JobState
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.queue.coordination import clear_troubles
from embedstream_coordinator import compacting
from embedstream_coordinator.context import ELSEWHERE, Context
from embedstream_coordinator.expiring import expire_queue
from embedstream_coordinator.ingesting import compare_ids, ingest_part
from embedstream_coordinator.subjects import FINALIZE, IDS, part_trouble

Function = Callable[..., str]


def finalize(context: Context, queue: str, job: str) -> str:
    """Write a job's manifest if it waits for that."""
    broker = context.broker(queue)
    try:
        spec = broker.status(job).spec
        if not allows(context.output_roots, spec.output):
            return ELSEWHERE
        context.sink(spec)  # a lease that this coordinator cannot use would hold others up
        done = finalize_job(broker, job, context.sink)
    except JobUnknown:
        return "the job is gone"
    if not done and broker.state(job) is JobState.FINALIZING:
        return "another program holds its lease, or has died with it"
    clear_troubles(broker, job, [FINALIZE])
    return "finalized" if done else "was finalized by another program"


def ingest(context: Context, queue: str, job: str, part: int) -> str:
    """Read one part of a corpus into blocks."""
    broker = context.broker(queue)
    try:
        ended = ingest_part(context, broker, job, part)
    except JobUnknown:
        return "the job is gone"
    clear_troubles(broker, job, [part_trouble(part)])
    return ended


def ids(context: Context, queue: str, job: str) -> str:
    """Compare the ids of a job's parts."""
    broker = context.broker(queue)
    try:
        ended = compare_ids(context, broker, job)
    except JobUnknown:
        return "the job is gone"
    clear_troubles(broker, job, [IDS])
    return ended


def compact(context: Context, id: str) -> str:
    """Look which shards of a dataset are to be merged; with all merged ones there, write the manifest."""
    return compacting.plan_or_finish(context, id)


def merge(context: Context, id: str, shard: str) -> str:
    """Write one merged shard."""
    return compacting.merge(context, id, shard)


def expire(context: Context, queue: str) -> str:
    """Forget jobs that no program will come back to."""
    return expire_queue(context.broker(queue), context.sink)


FUNCTIONS: dict[str, Function] = {
    "embedstream.finalize": finalize,
    "embedstream.ingest": ingest,
    "embedstream.ids": ids,
    "embedstream.compact": compact,
    "embedstream.merge": merge,
    "embedstream.expire": expire,
}
"""By the names that jobs in Redis carry."""
