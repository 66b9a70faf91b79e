"""Taking ended jobs from the outbox and writing their manifests: done by whoever is there, at most one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from embedstream.dataset.manifest import encode_manifest
from embedstream.dataset.roots import is_redis
from embedstream.dataset.sink import Sink
from embedstream.errors import BrokerError, EmbedstreamError
from embedstream.jobs import JobSpec, JobState, JobStatus, parse_max_errors, verdict
from embedstream.lifecycle.completing import finalize, is_finished
from embedstream.lifecycle.retry_completing import finalize_retry
from embedstream.lifecycle.update_completing import finalize_update
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Code, Lease
from embedstream.records import Manifest, PartContent, ShardRecord
from embedstream.server.foreign import reading
from embedstream.settings import Settings

LEASE_MS = 60_000
"""Above what a manifest takes by far; after it, somebody else tries. Two who do it at once do no harm."""

MOST_PAUSE_MS = 300_000
"""Between two tries to write a manifest: what is damaged stays so until somebody mends it."""

FINISHED = "its dataset is finished already, by its manifest"

_DAY_MS = 86_400_000


def finalize_job(
    broker: Broker, job: str, sink_for: Callable[[JobSpec], Sink], settings: Settings | None = None
) -> bool:
    """Finalize a job if it waits in the outbox and nobody else is at it. Whether it was finalized here and now.

    Raises:
        OutputError: the manifest cannot be written, or the shards do not add up; the next may try after a pause.
        RecordDamaged: what lies in Redis of the job makes no sense; the same.
        redis.RedisError: as redis-py raises it.
    """
    with reading(f"job {job}"):
        lease = broker.run(broker.take_finalize(job, LEASE_MS))
        if lease is None:
            return False
        try:
            with reading(f"job {job}"):
                return _finalize(broker, lease, sink_for, settings or Settings.from_environment())
        except EmbedstreamError:
            broker.run(broker.finalized(lease, JobState.FINALIZING, MOST_PAUSE_MS))
            raise


def end_finished(broker: Broker, spec: JobSpec, sink: Sink, settings: Settings | None = None) -> bool:
    """End a job whose dataset is finished, and that Redis, gone back to an earlier state, still takes for unfinished.

    Returns whether it was such a job. Its keys expire then, as those of every ended job.

    Raises:
        OutputError: the manifest cannot be read.
        redis.RedisError: as redis-py raises it.
    """
    if not is_finished(sink.read_manifest(), spec):
        return False
    # Should the manifest go away meanwhile, the job ends as one that the same command goes on with.
    broker.run(broker.cancel(spec.job, JobState.CANCELLED, FINISHED))
    finalize_job(broker, spec.job, lambda _: sink, settings)
    return True


def _finalize(broker: Broker, lease: Lease, sink_for: Callable[[JobSpec], Sink], settings: Settings) -> bool:
    job = lease.job
    status = broker.status(job)
    shards = (_decode_record(job, raw) for raw in broker.shard_records(job))
    contents = broker.contents(job, len(status.spec.parts))
    state, manifest = _write_manifest(sink_for(status.spec), status, shards, contents, lease)
    copy = encode_manifest(manifest).decode() if manifest is not None and is_redis(status.spec.output) else ""
    days = settings.job_days if state is JobState.COMPLETED else settings.failed_days
    answer = broker.run(broker.finalized(lease, state, int(days * _DAY_MS), copy))
    return answer.code is Code.OK


def _write_manifest(
    sink: Sink,
    status: JobStatus,
    shards: Iterator[ShardRecord],
    contents: Sequence[PartContent | None],
    lease: Lease,
) -> tuple[JobState, Manifest | None]:
    """How the job ends, and the manifest that says so."""
    spec, bound = status.spec, parse_max_errors(status.max_errors)
    by_rows = verdict(status.rows, status.failed, bound) if spec.retry is None else JobState.COMPLETED
    state = JobState(lease.verdict) if lease.verdict else by_rows
    if spec.retry is None and not spec.updates:
        ended = finalize(sink, status, shards, state, lease.now / 1000, contents)
        return JobState(ended.state), ended
    if state is not JobState.COMPLETED and not is_finished(sink.read_manifest(), spec):
        return state, None  # the dataset stays as it was; the same command goes on
    if spec.updates:
        manifest = finalize_update(sink, status, list(shards), lease.now / 1000, contents)
    else:
        manifest = finalize_retry(sink, status, list(shards))
    return JobState.FAILED if manifest is None else JobState.COMPLETED, manifest


def _decode_record(job: str, raw: bytes) -> ShardRecord:
    try:
        return msgspec.json.decode(raw, type=ShardRecord)
    except msgspec.MsgspecError as error:
        raise BrokerError(f"job {job}: a shard's record in Redis cannot be read: {error}") from error
