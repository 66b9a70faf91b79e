"""Looking after a job while it is being pushed, and until it has ended."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import redis

from embedstream.api.looks import without_worker
from embedstream.errors import EmbedstreamError, JobUnknown, OutputError, WorkerError
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.watching import look, lost_blocks
from embedstream.queue.broker import Broker
from embedstream.queue.queues import rate_of
from embedstream.queue.workers import WorkerRecord, in_hand_of
from embedstream.server.connection import connect
from embedstream.server.patience import Patience
from embedstream.settings import Settings
from embedstream.terminal import counted
from embedstream_producer.progress import Progress

WORKERS_SECONDS = 2.0
"""Between two looks at what workers say of themselves, which they say as often."""

AGE_SHARE = 0.01
"""The end of a young job is looked for more often: so that its wait is a small share of what it took."""

LEAST_SECONDS = 0.02

FINALIZE_TRIES_SECONDS = 10.0
"""Between two tries at a manifest that could not be written from here; a worker may be able to."""


class Watch:
    """One look after another, with a connection of its own. Between `start` and `stop` a thread does the looking."""

    def __init__(
        self, url: str, spec: JobSpec, settings: Settings, progress: Progress, *, seconds: float, embedded: bool
    ) -> None:
        """`seconds` between two looks. `embedded`: there is no fleet to speak of, and nobody else to finalize."""
        self._url = url
        self._spec = spec
        self._settings = settings
        self._progress = progress
        self._seconds = seconds
        self._embedded = embedded
        self._broker = Broker(connect(url), spec.queue)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_workers = 0.0
        self._next_finalize = 0.0
        self._patience = Patience(progress.notice, url)
        self._finalize_trouble = ""
        self._without_worker = False
        self._stalled = False
        self._lost = False
        self._refusals: set[str] = set()
        self._waits: set[str] = set()
        self._remarks: set[str] = set()
        self.done = 0
        """Blocks committed at the last look."""
        self.failure: Exception | None = None

    def __enter__(self) -> Self:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what the looking thread met."""
        if self.failure is not None:
            raise self.failure

    def wait(self, check: Callable[[], None]) -> JobStatus | None:
        """Until the job has ended; None if Redis lost blocks or all of the job, so that it must be pushed again.

        `check` is called before every look and may raise.
        """
        while True:
            check()
            try:
                status = self.look()
            except JobUnknown:
                return None
            if status is not None and status.state.ended:
                return status
            if status is not None and status.state is JobState.SUBMITTING:
                return None
            age = status.seconds if status is not None else math.inf
            time.sleep(min(self._seconds, max(LEAST_SECONDS, AGE_SHARE * age)))

    def look(self) -> JobStatus | None:
        """One look; None while Redis cannot be used. Raises `JobUnknown`."""
        now = time.monotonic()
        try:
            workers = self._broker.workers()
            try:
                may_finalize = now >= self._next_finalize
                status = look(
                    self._broker, self._spec.job, self._url, self._settings, self._spec, may_finalize=may_finalize
                )
            except OutputError as error:
                if self._embedded:
                    raise
                self._next_finalize = now + FINALIZE_TRIES_SECONDS
                if str(error) != self._finalize_trouble:
                    self._finalize_trouble = str(error)
                    self._progress.tell(f"{error}; trying again, or leaving the manifest to a worker")
                status = self._broker.status(self._spec.job)
            if now >= self._next_workers and not status.state.ended:
                self._next_workers = now + WORKERS_SECONDS
                self._look_at_workers(status, workers)
        except redis.RedisError as error:
            self._patience.met(error)
            return None
        self._patience.over()
        self.done = status.done
        if workers and not status.state.ended:
            self._progress.phase(starting(workers))
        job = self._spec.job
        remarks = {worker.remarks[job] for worker in workers if job in worker.remarks}
        for remark in sorted(remarks - self._remarks):
            self._progress.tell(remark)
        self._remarks |= remarks
        self._progress.update(status, in_hand_of(job, workers, status.workers), rate_of(job, workers))
        return status

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.look()
            except JobUnknown:
                pass  # the one who pushes finds out, and makes the job again
            except (redis.RedisError, EmbedstreamError) as error:
                self.failure = error
                return

    def _look_at_workers(self, status: JobStatus, workers: list[WorkerRecord]) -> None:
        refusals = {worker.refused.get(self._spec.job, "") for worker in workers}
        if refusals and "" not in refusals and refusals != self._refusals:
            self._refusals = refusals
            why = "; ".join(sorted(refusals))
            if self._embedded:
                raise WorkerError(f"the worker will not take this job: {why}")
            self._progress.tell(f"no worker of queue {self._spec.queue} will take this job: {why}")
        waits = {worker.waits[self._spec.job] for worker in workers if self._spec.job in worker.waits}
        for why in sorted(waits - self._waits):
            self._progress.tell(f"a worker waits, and tries again: {why}")
        self._waits |= waits
        if self._embedded:
            return
        if not workers and status.state is not JobState.FINALIZING:
            if not self._without_worker:
                self._without_worker = True
                self._progress.notice(without_worker(self._broker, self._spec, self._url))
        elif self._without_worker:
            self._without_worker = False
            self._progress.notice("")
            self._progress.tell(f"{counted(len(workers), 'worker')} on queue {self._spec.queue}")
        self._look_for_lost_blocks(status, workers)
        if status.stalled != self._stalled:
            self._stalled = status.stalled
            if status.stalled and workers:
                self._progress.tell(
                    "nothing was committed for a minute: the workers are busy, or refuse the job (see their logs)"
                )

    def _look_for_lost_blocks(self, status: JobStatus, workers: list[WorkerRecord]) -> None:
        if not workers:
            return
        lost = lost_blocks(self._broker, status.job, workers)
        if lost or self._lost:
            self._progress.notice(lost)
        self._lost = bool(lost)


def starting(workers: Sequence[WorkerRecord]) -> str:
    """What is waited for while no worker is ready; empty if one is."""
    if any(worker.state != "starting" for worker in workers):
        return ""
    return f"the worker is {workers[0].phase or 'starting'}"
