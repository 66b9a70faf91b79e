"""The dispatcher: whatever the broker says is to be done has a job in RQ. It looks again and again, and remembers
nothing that matters: a coordinator that takes over looks the same way.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from rq import Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import JobStatus
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer

from embedstream.broker import Broker
from embedstream.connection import connect
from embedstream.coordination import (
    Compaction,
    compacted,
    compactions,
    compared_parts,
    due_to_finalize,
    forget_ingest,
    to_ingest,
    unsealed_parts,
)
from embedstream.errors import EmbedstreamError, JobUnknown
from embedstream.jobs import JobState
from embedstream.logs import about
from embedstream.roots import allows
from embedstream_coordinator.context import Context
from embedstream_coordinator.rq_types import QUEUE, ClosedJob, make_queue

log = logging.getLogger(__name__)

RETRY_SECONDS = (2, 10, 60)
"""Between the tries of one RQ job; then it has failed, where `rq info` shows it."""

TIMEOUT_SECONDS = 30 * 86_400
"""Reading a part takes as long as it takes: what hangs is seen by its heartbeats, not by a clock."""

KEPT_SECONDS = 300
FAILED_SECONDS = 86_400
"""How long RQ shows what was done, and what failed."""

PARTS_AHEAD = 64
"""Parts of one job that wait in RQ at once: more than run anywhere, few enough that RQ's queue stays short."""

PATIENCE = {
    JobStatus.QUEUED: 30.0,
    JobStatus.STARTED: 40.0,
    JobStatus.SCHEDULED: 120.0,
    JobStatus.FINISHED: 2.0,
    JobStatus.FAILED: 300.0,
}
"""Seconds in which a job's record in RQ may stay as it is while its work still waits; then the job is put there anew. A
job that runs changes its record every ten seconds. It is this process' own clock, so no two are compared."""

OTHERWISE_SECONDS = 60.0


EXPIRE_SECONDS = 3600.0
"""Between two looks for what nobody will come back to: it is kept for weeks."""


@dataclass(frozen=True)
class _Seen:
    record: tuple[object, ...]
    since: float


class Dispatcher:
    """Owns its connection. Any number of coordinators may dispatch at once: duplicates are harmless."""

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._client = connect(context.redis_url)
        self._nowhere = Broker(self._client, "")
        self._queue = make_queue(self._client)
        self._scheduler = RQScheduler([QUEUE], self._client, logging_level=logging.WARNING, serializer=JSONSerializer)
        self._seen: dict[str, _Seen] = {}
        self._refused: dict[str, str] = {}
        self._next_expiry = clock()

    def round(self) -> None:
        """One look at everything. Raises `redis.RedisError`; `BrokerError` for what is damaged there."""
        asked: set[str] = set()
        for queue in self._nowhere.queues():
            broker = Broker(self._client, queue)
            for job in due_to_finalize(broker):
                asked |= self._finalize(broker, job)
            for job in to_ingest(broker):
                asked |= self._ingest(broker, job)
            if self._clock() >= self._next_expiry:
                asked |= self._ensure(f"expire-{_digest(queue)}", "embedstream.expire", queue)
        if self._clock() >= self._next_expiry:
            self._next_expiry = self._clock() + EXPIRE_SECONDS
        self._enqueue_retries()
        for wanted in compactions(self._client):
            asked |= self._compact(wanted)
        self._seen = {name: seen for name, seen in self._seen.items() if name in asked}

    def _finalize(self, broker: Broker, job: str) -> set[str]:
        try:
            output = broker.status(job).spec.output
        except JobUnknown:
            return set()
        except EmbedstreamError as error:
            self._refuse(job, str(error))
            return set()
        if not allows(self._context.output_roots, output):
            return set()  # a worker's or another coordinator's, who may write there
        return self._ensure(f"finalize-{job}", "embedstream.finalize", broker.queue, job, first=True)

    def _ingest(self, broker: Broker, job: str) -> set[str]:
        try:
            status = broker.status(job)
        except JobUnknown:
            forget_ingest(broker, job)
            return set()
        except EmbedstreamError as error:
            self._refuse(job, str(error))
            return set()
        if status.state is not JobState.SUBMITTING:
            forget_ingest(broker, job)
            return set()
        asked: set[str] = set()
        unread, compared = unsealed_parts(broker, job, len(status.spec.parts)), {0, *compared_parts(broker, job)}
        if not compared.issuperset(unread):
            asked |= self._ensure(f"ids-{job}", "embedstream.ids", broker.queue, job, first=True)
        for part in [part for part in unread if part in compared][:PARTS_AHEAD]:
            asked |= self._ensure(f"ingest-{job}-{part}", "embedstream.ingest", broker.queue, job, part)
        return asked

    def _compact(self, wanted: Compaction) -> set[str]:
        if not allows(self._context.output_roots, wanted.output):
            return set()
        there = compacted(self._client, wanted)
        missing = [shard for shard in wanted.groups if shard not in there]
        if not missing:
            return self._ensure(f"compact-{wanted.id}", "embedstream.compact", wanted.id)
        asked: set[str] = set()
        for shard in missing[:PARTS_AHEAD]:
            asked |= self._ensure(f"merge-{shard}", "embedstream.merge", wanted.id, shard)
        return asked

    def _ensure(self, name: str, function: str, *args: object, first: bool = False) -> set[str]:
        """See to it that RQ has a job of this name that is getting on."""
        try:
            job = ClosedJob.fetch(name, connection=self._client, serializer=JSONSerializer)
        except NoSuchJobError:
            self._enqueue(name, function, args, first)
            return {name}
        status = job.get_status(refresh=False)
        record = (status, job.last_heartbeat, job.retries_left, job.enqueued_at)
        seen, now = self._seen.get(name), self._clock()
        if seen is None or seen.record != record:
            self._seen[name] = _Seen(record, now)
        elif now - seen.since > PATIENCE.get(status, OTHERWISE_SECONDS):
            if status is JobStatus.QUEUED and self._queue.get_job_position(name) is not None:
                return {name}  # it waits for its turn
            job.delete()
            self._enqueue(name, function, args, first)
        return {name}

    def _enqueue(self, name: str, function: str, args: tuple[object, ...], first: bool) -> None:
        self._seen.pop(name, None)
        try:
            self._queue.enqueue_call(
                function,
                args=args,
                job_id=name,
                unique=True,
                at_front=first,
                timeout=TIMEOUT_SECONDS,
                result_ttl=KEPT_SECONDS,
                failure_ttl=FAILED_SECONDS,
                retry=Retry(max=len(RETRY_SECONDS), interval=list(RETRY_SECONDS)),
                description=f"{function.rpartition('.')[2]} {' '.join(map(str, args))}",
            )
        except DuplicateJobError:
            return  # another dispatcher was first

    def _enqueue_retries(self) -> None:
        """What failed and is to be tried again now: RQ's own scheduler, without a process of its own."""
        if self._scheduler.acquire_locks():
            try:
                self._scheduler.enqueue_scheduled_jobs()
            finally:
                self._scheduler.release_locks()

    def _refuse(self, job: str, why: str) -> None:
        if self._refused.get(job) != why:
            self._refused[job] = why
            log.warning("job %s: %s", job, why, extra=about(job))


def _digest(queue: str) -> str:
    """RQ's names have no room for every character of ours."""
    return hashlib.blake2b(queue.encode(), digest_size=8).hexdigest()
