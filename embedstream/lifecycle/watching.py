"""Looking after a job until it has ended: one look at a time, by whoever waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import RecordDamaged
from embedstream.jobs import JobSpec, JobState, JobStatus, differing_field, parse_max_errors
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.lifecycle.opening import is_here
from embedstream.queue.broker import Broker
from embedstream.queue.workers import WorkerRecord
from embedstream.settings import Settings, WorkerSettings

_REPLACED = "another run wrote a manifest meanwhile: run the same command again"


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
        return _REPLACED
    if status.spec.updates and status.rows:
        return too_many_errors(status) or _REPLACED
    return too_many_errors(status) or "every row failed"


def lost_blocks(broker: Broker, job: str, workers: Sequence[WorkerRecord]) -> str:
    """What to say of blocks whose worker is gone without a word; empty if there are none. `workers`: those alive.

    Raises:
        redis.RedisError: as redis-py raises it.
    """
    blocks = sum(broker.lost(job, [worker.name for worker in workers]).values())
    lease = max((worker.lease_seconds for worker in workers), default=WorkerSettings().lease_seconds)
    return f"{blocks:,} block(s) of a lost worker wait for its lease, at most {lease:g} s" if blocks else ""


def look(
    broker: Broker, job: str, redis_url: str, settings: Settings, own: JobSpec | None, *, may_finalize: bool = True
) -> JobStatus:
    """One look at a job: ends it if too many rows failed, finalizes it if it waits for that and its output is here.

    `own`: the spec that this process submitted. Only that is finalized, and nothing without it: an address out of Redis
    is where others say that this user should write.

    Raises:
        JobUnknown: Redis does not know the job.
        RecordDamaged: its spec is not `own`.
        OutputError: its manifest cannot be written.
        redis.RedisError: as redis-py raises it.
    """
    status = broker.status(job)
    if status.state in (JobState.SUBMITTING, JobState.RUNNING):
        reason = too_many_errors(status)
        if reason:
            broker.run(broker.cancel(job, JobState.FAILED, reason))
            return broker.status(job)
    if own is None or status.state.ended:
        return status
    refuse_changed(job, own, status.spec)

    def own_sink(found: JobSpec) -> Sink:
        refuse_changed(job, own, found)
        return open_sink(own.output, own, redis_url)

    if (
        status.state is JobState.FINALIZING
        and may_finalize
        and is_here(own.output)
        and finalize_job(broker, job, own_sink, settings)
    ):
        return broker.status(job)
    return status


def refuse_changed(job: str, own: JobSpec, found: JobSpec) -> None:
    """Raise `RecordDamaged` if a job's spec in Redis is not the one that was submitted."""
    if found != own:
        raise RecordDamaged(
            f"job {job}: its {differing_field(found, own) or 'output'} in Redis is not the one that was submitted: "
            f"nothing is written from here: see who else may write to this Redis, and submit into another output (-o)"
        )
