"""Looking after a job until it has ended: one look at a time, by whoever waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from embedstream.broker import Broker
from embedstream.dataset.sink import open_sink
from embedstream.finalizing import finalize_job
from embedstream.jobs import JobState, JobStatus, parse_max_errors
from embedstream.opening import is_here
from embedstream.settings import Settings, WorkerSettings
from embedstream.workers import WorkerRecord


def too_many_errors(status: JobStatus) -> str:
    """Why an open job is sure to fail by its `max_errors`; empty if it is not. Running failed rows again never does."""
    if status.spec.retry is not None:
        return ""
    most = parse_max_errors(status.max_errors)
    certain = most.count is not None or status.sealed
    if certain and most.exceeded(status.failed, status.submitted):
        rows = f"{status.failed} row{'' if status.failed == 1 else 's'}"
        return f"{rows} failed, more than the {most} that --max-errors allows"
    return ""


def why_ended(status: JobStatus) -> str:
    """Why an ended job is not complete; empty for a complete one, and for one that was cancelled without a word."""
    if status.reason or status.state is not JobState.FAILED:
        return status.reason
    if status.spec.retry is not None:
        return "another run wrote a manifest meanwhile: run the same command again"
    return too_many_errors(status) or "every row failed"


def lost_blocks(broker: Broker, job: str, workers: Sequence[WorkerRecord]) -> str:
    """What to say of blocks whose worker is gone without a word; empty if there are none. `workers`: those alive.

    Raises:
        redis.RedisError: as redis-py raises it.
    """
    blocks = sum(broker.lost(job, [worker.name for worker in workers]).values())
    lease = max((worker.lease_seconds for worker in workers), default=WorkerSettings().lease_seconds)
    return f"{blocks:,} block(s) of a lost worker wait for its lease, at most {lease:g} s" if blocks else ""


def look(broker: Broker, job: str, redis_url: str, settings: Settings, *, may_finalize: bool = True) -> JobStatus:
    """One look at a job: ends it if too many rows failed, finalizes it if it waits for that and its output is here.

    Raises:
        JobUnknown: Redis does not know the job.
        OutputError: its manifest cannot be written.
        redis.RedisError: as redis-py raises it.
    """
    status = broker.status(job)
    if status.state in (JobState.SUBMITTING, JobState.RUNNING):
        reason = too_many_errors(status)
        if reason:
            broker.run(broker.cancel(job, JobState.FAILED, reason))
            return broker.status(job)
    if (
        status.state is JobState.FINALIZING
        and may_finalize
        and is_here(status.spec.output)
        and finalize_job(broker, job, lambda spec: open_sink(spec.output, spec, redis_url), settings)
    ):
        return broker.status(job)
    return status
