"""RQ's job, queue and worker, closed: nothing but `FUNCTIONS` is called, whatever lies in Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis
from rq import Queue, Worker
from rq.job import Job
from rq.serializers import JSONSerializer

from embedstream.coordination import note_trouble
from embedstream.errors import EmbedstreamError
from embedstream.terminal import printable
from embedstream_coordinator.context import Context
from embedstream_coordinator.functions import FUNCTIONS, TROUBLE_OF

log = logging.getLogger(__name__)

QUEUE = "embedstream"
"""RQ's queue for all jobs of all queues of a server: a thousand-part corpus there is no more than a list of names."""

HEARTBEAT_SECONDS = 10
"""How often RQ's own record of a job that runs says so."""

WORKER_SECONDS = 30
"""After which a worker that said nothing is gone, as `rq info` shows it, but for a minute that RQ adds."""

_CONTEXT: list[Context] = []


class ForeignJob(EmbedstreamError):
    """A job that none of our programs put there."""


class ClosedJob(Job):
    """A job that calls one of `FUNCTIONS`. Hooks by name, web hooks and dependents are none of ours, and do nothing."""

    success_callback = None
    failure_callback = None
    stopped_callback = None

    @property
    def func(self) -> Callable[..., str]:
        function = FUNCTIONS.get(str(self.func_name)) if self.instance is None else None
        if function is None or self.kwargs:
            name = printable(str(self.func_name), 100)
            raise ForeignJob(f"{name}: is no function of a coordinator, so it is not called: remove the job {self.id}")
        return lambda *args: function(_CONTEXT[0], *args)

    def send_webhooks(self, status: Any, *, exc_string: str | None = None) -> None:
        """Nobody is told."""


class ClosedQueue(Queue):
    """The queue of such jobs."""

    job_class = ClosedJob


class ClosedWorker(Worker):
    """One process that takes jobs from the queue, and forks for each."""

    job_class = ClosedJob
    queue_class = ClosedQueue

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
            maintenance_interval=60,
            work_horse_killed_handler=self._note_killed,
        )

    def handle_warm_shutdown_request(self) -> None:
        """A part may take hours to read, and what is done of it stays: the job goes on elsewhere, at once."""
        if self.horse_pid:
            self.kill_horse()

    def handle_job_failure(self, job: Job, queue: Queue, *args: Any, **kwargs: Any) -> None:
        """As RQ does; but what ended because this coordinator stops has not failed."""
        if self._stop_requested:
            job.retries_left = (job.retries_left or 0) + 1
        super().handle_job_failure(job, queue, *args, **kwargs)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """One line for what we raise on purpose; RQ's own words, with the traceback, for the rest."""
        error = exc_info[1]
        if isinstance(error, (EmbedstreamError, redis.RedisError)):
            log.warning("%s: %s", job.id, error)
            return
        super().handle_exception(job, *exc_info)

    def _note_killed(self, job: Job, _pid: int, status: int, _usage: Any) -> None:
        what = TROUBLE_OF.get(str(job.func_name))
        if what is None or self._stop_requested:
            return
        queue, name, *rest = job.args
        why = f"the coordinator's process for it died (wait status {status}); is there enough memory?"
        note_trouble(self._context.broker(queue), name, what(*rest), why)


def make_queue(client: redis.Redis) -> ClosedQueue:
    """The queue over a client."""
    return ClosedQueue(QUEUE, connection=client, serializer=JSONSerializer)
