"""RQ's job, queue and worker, closed: nothing but `FUNCTIONS` is called, whatever lies in Redis.

What none of our programs can have put there counts as not there, is said once, and ends no process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import zlib
from collections.abc import Callable, Mapping
from inspect import get_annotations
from typing import Any

import msgspec
import redis
from rq import Queue, Worker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer

from embedstream.errors import EmbedstreamError, RecordDamaged
from embedstream.server.foreign import Said, is_about_data, reading
from embedstream.server.troubles import passes
from embedstream.terminal import printable
from embedstream_coordinator.context import Context
from embedstream_coordinator.functions import FUNCTIONS
from embedstream_coordinator.ingesting import Abandoned
from embedstream_coordinator.rq_keys import FAILED_SECONDS, QUEUE, TAKEN, forget, is_name, remove_foreign_types
from embedstream_coordinator.subjects import subject_of

log = logging.getLogger(__name__)

RETRY_SECONDS = (2, 10, 60)
"""Between the tries of one RQ job; then it has failed, where `rq info` shows it."""

TIMEOUT_SECONDS = 30 * 86_400
"""Reading a part takes as long as it takes: what hangs is seen by its heartbeats, not by a clock."""

KEPT_SECONDS = 300
"""How long RQ shows what was done."""

HEARTBEAT_SECONDS = 10
"""How often RQ's own record of a job that runs says so."""

WORKER_SECONDS = 30
"""After which a worker that said nothing is gone, as `rq info` shows it, but for a minute that RQ adds."""

MOST_BYTES = 64 * 1024
"""Of a job's fields in RQ that are read, together, and of its call when it is decompressed: ours have a few hundred."""

_FIELDS = (
    "data",
    "status",
    "created_at",
    "enqueued_at",
    "started_at",
    "ended_at",
    "last_heartbeat",
    "worker_name",
    "description",
    "enqueue_at_front",
    "number_of_retries",
    "retries_left",
)
"""What is read of a job in RQ. The rest is the same for all jobs, or nothing of ours: results, errors, web hooks."""

_CONTEXT: list[Context] = []


_SAID = Said()


class ForeignJob(RecordDamaged, NoSuchJobError):
    """What lies in RQ under the name of a job, and none of our programs put there. For RQ there is no such job."""


class ClosedJob(Job):
    """A job that calls one of `FUNCTIONS`. Hooks by name, web hooks and dependents are none of ours, and do nothing."""

    success_callback = None
    failure_callback = None
    stopped_callback = None

    @property
    def func(self) -> Callable[..., str]:
        function = self._function()
        return lambda *args: function(_CONTEXT[0], *args)

    def _function(self) -> Callable[..., str]:
        function = FUNCTIONS.get(str(self.func_name)) if self.instance is None else None
        if function is None or self.kwargs:
            name = printable(str(self.func_name), 100)
            raise RecordDamaged(f"{name}: is no function of a coordinator, so it is not called")
        return function

    def refresh(self) -> None:
        """Read it from Redis. Raises `NoSuchJobError`, which `ForeignJob` is."""
        try:
            with reading(f"job {self.id} in RQ"):
                there = self._read()
        except RecordDamaged as error:
            if _SAID.new(self.id, str(error)):
                log.warning("%s: %s", self.id, error)
            raise ForeignJob(str(error)) from error
        if not there:
            raise NoSuchJobError(f"no job {self.id} in RQ")

    def _read(self) -> bool:
        """Restore it from Redis, if it is there. Sizes are asked for first, as a field may have 512 MiB."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.exists(self.key)
            for field in _FIELDS:
                pipe.hstrlen(self.key, field)
            there, *sizes = pipe.execute()
        if not there:
            return False
        if sum(sizes) > MOST_BYTES:
            raise _too_large()
        ask: Any = self.connection
        values = ask.hmget(self.key, _FIELDS)
        self.restore({field.encode(): value for field, value in zip(_FIELDS, values, strict=True) if value is not None})
        return True

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """What may differ from job to job is taken from Redis and checked; all else is as `make_queue` makes it."""
        fields = {field.encode(): raw_data[field.encode()] for field in _FIELDS if field.encode() in raw_data}
        with contextlib.suppress(zlib.error):  # RQ takes what is not compressed as it is
            if len(zlib.decompressobj().decompress(fields.get(b"data", b""), MOST_BYTES + 1)) > MOST_BYTES:
                raise _too_large()
        super().restore(fields)
        _, *types, _ = get_annotations(self._function(), eval_str=True).values()
        self.args = [msgspec.convert(arg, type) for arg, type in zip(self.args, types, strict=True)]
        msgspec.json.encode(self.args)  # half of a surrogate pair is no text that Redis takes
        self.origin = QUEUE
        self.timeout, self.result_ttl, self.failure_ttl, self.ttl = TIMEOUT_SECONDS, KEPT_SECONDS, FAILED_SECONDS, None
        self.retries_left = min(self.retries_left or 0, len(RETRY_SECONDS))
        self.retry_intervals = list(RETRY_SECONDS)
        self.repeats_left = self.group_id = None
        self._dependency_ids = []

    def send_webhooks(self, status: Any, *, exc_string: str | None = None) -> None:
        """Nobody is told."""


def _too_large() -> RecordDamaged:
    return RecordDamaged(f"its record in RQ has more than {MOST_BYTES:,} bytes, so it is no coordinator's")


class ClosedQueue(Queue):
    """The queue of such jobs."""

    job_class = ClosedJob

    def enqueue_dependents(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """No job depends on another: what RQ would read here, whole and unchecked, is not from a coordinator."""

    @classmethod
    def lmove(cls, connection: Any, queue_key: str, timeout: int | None) -> tuple[str, bytes] | None:
        """The next name; what is none is passed over. Raises as RQ does."""
        while True:
            try:
                taken: tuple[str, bytes] | None = super().lmove(connection, queue_key, timeout)
            except redis.ResponseError as error:
                if not is_about_data(error):
                    raise
                remove_foreign_types(connection)
                continue
            if taken is None or is_name(taken[1].decode(errors="replace")):
                return taken
            connection.lrem(TAKEN, 1, taken[1])


class ClosedWorker(Worker):
    """One process that takes jobs from the queue, and forks for each."""

    job_class = ClosedJob
    queue_class = ClosedQueue

    should_run_maintenance_tasks = False
    """The dispatcher does what there is to do."""

    max_connection_wait_time = 5.0

    def __init__(self, context: Context, name: str, client: redis.Redis) -> None:
        _CONTEXT[:] = [context]
        self._context = context
        super().__init__(
            [make_queue(client)],
            name=name,
            connection=client,
            serializer=JSONSerializer,
            worker_ttl=WORKER_SECONDS,
            job_monitoring_interval=HEARTBEAT_SECONDS,
        )

    def subscribe(self) -> None:
        """To nothing: nobody gives orders to this process but the coordinator that started it."""

    def execute_job(self, job: Job, queue: Queue) -> None:
        """As RQ does; but keys of the job that are of another type cost that job alone."""
        try:
            super().execute_job(job, queue)
        except redis.ResponseError as error:
            if not is_about_data(error):
                raise
            if self.horse_pid:
                self.kill_horse()
                self.wait_for_horse()
                self._horse_pid = 0
            forget(self.connection, job.id)
            _, _, why = str(error).rpartition("of pipeline caused error: ")
            if _SAID.new(job.id, why):
                log.warning("%s: what RQ keeps of it is damaged and removed: %s", job.id, why)

    def _shutdown(self) -> None:
        """As RQ does; by what no guard takes for a fault of what is being read."""
        try:
            super()._shutdown()  # type: ignore[no-untyped-call]
        except StopRequested:
            raise SystemExit from None

    def handle_warm_shutdown_request(self) -> None:
        """A part may take hours to read, and what is done of it stays: the job goes on elsewhere, at once."""
        if self.horse_pid:
            self.kill_horse()

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Alone: RQ kills its group of processes, which is the whole coordinator's until it has made one of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.horse_pid, sig)

    def handle_job_failure(self, job: Job, queue: Queue, *args: Any, **kwargs: Any) -> None:
        """As RQ does; but what ended because this coordinator stops has not failed."""
        if self._stop_requested:
            job.retries_left = (job.retries_left or 0) + 1
        super().handle_job_failure(job, queue, *args, **kwargs)

    def handle_work_horse_killed(self, job: Job, _pid: Any, status: Any, _usage: Any) -> None:
        """Say what becomes of the job, which others need not wait for."""
        subject = subject_of(job)
        if subject is not None:
            with contextlib.suppress(RecordDamaged), reading(job.id):
                subject.release(self._context)
        if self._stop_requested:
            log.info("%s: handed over, as this coordinator stops", job.id, extra=subject.fields() if subject else None)
        else:
            self._tell(job, f"the coordinator's process for it died (wait status {status}); is there enough memory?")

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """One line for what we raise on purpose, with the traceback for the rest."""
        error = exc_info[1]
        if isinstance(error, Abandoned) or (isinstance(error, redis.RedisError) and passes(error)):
            return  # it goes on elsewhere, or when Redis is well again, of which the coordinator speaks
        if isinstance(error, (EmbedstreamError, redis.RedisError)):
            self._tell(job, str(error))
        else:
            self._tell(job, f"{type(error).__name__}: {error}", exc_info)

    def _tell(self, job: Job, why: str, exc_info: Any = None) -> None:
        """Keep it for `embed-status`, and log it if it is news: it is tried again and again."""
        subject = subject_of(job)
        try:
            news = subject is None or subject.note(self._context, why)
        except (redis.RedisError, EmbedstreamError) as error:
            why, news = f"{why} (which embed-status cannot show: {error})", True
        if news:
            log.warning("%s: %s", job.id, why, exc_info=exc_info, extra=subject.fields() if subject else None)


class RqNoise(logging.Filter):
    """Takes out of RQ's log what we say ourselves, and once: that Redis is in trouble, that a process died."""

    def __init__(self) -> None:
        super().__init__()
        self.error: redis.RedisError | None = None
        """The last trouble with Redis."""

    def filter(self, record: logging.LogRecord) -> bool:
        handled = sys.exc_info()[1]
        if isinstance(handled, redis.RedisError):
            self.error = handled
            return False
        return record.funcName != "monitor_work_horse"


def make_queue(client: redis.Redis) -> ClosedQueue:
    """The queue over a client."""
    return ClosedQueue(QUEUE, connection=client, serializer=JSONSerializer)
