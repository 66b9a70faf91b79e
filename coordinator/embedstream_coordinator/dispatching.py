"""The dispatcher: whatever the broker says is to be done has a job in RQ. It looks again and again, and remembers
nothing that matters: a coordinator that takes over looks the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rq import Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from embedstream.cli.logs import about
from embedstream.dataset.roots import allows
from embedstream.errors import EmbedstreamError, JobUnknown, RecordDamaged
from embedstream.jobs import JobState
from embedstream.keys import COMPACTIONS, QUEUES
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import (
    Compaction,
    compacted,
    compactions,
    compared_parts,
    due_to_finalize,
    forget_ingest,
    to_ingest,
    unsealed_parts,
)
from embedstream.server.connection import connect
from embedstream.server.foreign import Said, reading
from embedstream.terminal import printable
from embedstream_coordinator.context import Context
from embedstream_coordinator.rq_keys import (
    FAILED_SECONDS,
    SCHEDULED,
    due_again,
    forget,
    is_name,
    keep_short,
    remove_foreign_types,
)
from embedstream_coordinator.rq_types import (
    KEPT_SECONDS,
    RETRY_SECONDS,
    TIMEOUT_SECONDS,
    ClosedJob,
    ForeignJob,
    make_queue,
)

log = logging.getLogger(__name__)

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

TIDY_SECONDS = 60.0
"""Between two looks for what is over in RQ's lists."""

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
        self._seen: dict[str, _Seen] = {}
        self._said = Said()
        self._next_expiry = self._next_tidying = clock()

    def round(self) -> None:
        """One look at everything. What is damaged is refused, each thing alone. Raises `redis.RedisError`."""
        asked: set[str] = set()
        for key in remove_foreign_types(self._client):
            self._refuse(key, f"{key} was of another type than RQ makes it, and is removed")
        expires = self._clock() >= self._next_expiry
        with self._guard(QUEUES):
            for queue in self._nowhere.queues():
                with self._guard(f"queue {printable(queue)}"):
                    asked |= self._look_at_queue(queue, expires)
        if expires:
            self._next_expiry = self._clock() + EXPIRE_SECONDS
        with self._guard(SCHEDULED):
            self._enqueue_retries()
        with self._guard(COMPACTIONS):
            for wanted in compactions(self._nowhere):
                with self._guard(f"compaction {wanted.id}"):
                    asked |= self._compact(wanted)
        self._seen = {name: seen for name, seen in self._seen.items() if name in asked}
        if self._clock() >= self._next_tidying:
            self._next_tidying = self._clock() + TIDY_SECONDS
            with self._guard("what RQ keeps"):
                keep_short(self._client, asked)

    def _look_at_queue(self, queue: str, expires: bool) -> set[str]:
        asked: set[str] = set()
        broker = self._nowhere.of(queue)
        for jobs, look in ((due_to_finalize, self._finalize), (to_ingest, self._ingest)):
            with self._guard(f"queue {printable(queue)}"):
                for job in jobs(broker):
                    with self._guard(f"job {printable(job)}", job):
                        asked |= look(broker, job)
        if expires:
            asked |= self._ensure(f"expire-{_digest(queue)}", "embedstream.expire", queue)
        return asked

    @contextlib.contextmanager
    def _guard(self, what: str, job: str | None = None) -> Iterator[None]:
        """Refuse `what`, which others may have written, whatever reading it raises; it is said once."""
        try:
            with reading(what):
                yield
        except EmbedstreamError as error:
            why = str(error)
            self._refuse(what, why if why.startswith(what) else f"{what}: {why}", job)

    def _finalize(self, broker: Broker, job: str) -> set[str]:
        try:
            output = broker.status(job).spec.output
        except JobUnknown:
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
        there = compacted(self._nowhere, wanted)
        missing = [shard for shard in wanted.groups if shard not in there]
        if not missing:
            return self._ensure(f"compact-{wanted.id}", "embedstream.compact", wanted.id)
        asked: set[str] = set()
        for shard in missing[:PARTS_AHEAD]:
            asked |= self._ensure(f"merge-{shard}", "embedstream.merge", wanted.id, shard)
        return asked

    def _ensure(self, name: str, function: str, *args: object, first: bool = False) -> set[str]:
        """See to it that RQ has a job of this name that is getting on. Raises `RecordDamaged` for what is no name."""
        if not is_name(name):
            raise RecordDamaged("its id is none: letters, digits, _ and - are")
        try:
            job = ClosedJob.fetch(name, connection=self._client, serializer=JSONSerializer)
        except NoSuchJobError as error:
            if isinstance(error, ForeignJob):
                forget(self._client, name)
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
            forget(self._client, name)
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
        """What failed and is to be tried again now; what is lost on the way here is found by its record, later."""
        for name in due_again(self._client):
            with contextlib.suppress(NoSuchJobError):
                job = ClosedJob.fetch(name, connection=self._client, serializer=JSONSerializer)
                self._queue.enqueue_job(job, at_front=job.should_enqueue_at_front())

    def _refuse(self, what: str, why: str, job: str | None = None) -> None:
        if self._said.new(what, why):
            log.warning(why, extra=about(job) if job else None)


def _digest(queue: str) -> str:
    """RQ's names have no room for every character of ours."""
    return hashlib.blake2b(queue.encode(), digest_size=8).hexdigest()
