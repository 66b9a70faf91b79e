"""A job as a program sees it: follow it, read its vectors, end it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from embedstream.dataset.schema import ErrorRow
from embedstream.dataset.sink import Sink
from embedstream.errors import JobCancelled, JobFailed, JobUnknown, OutputError, UsageError
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.watching import look, why_ended
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Answer, Code
from embedstream.server.connection import explaining, mask
from embedstream.server.patience import Patience
from embedstream.settings import Settings

log = logging.getLogger(__name__)

GRACE_MS = 5_000
"""How long the workers of a job that is cancelled may take to write and commit what they have computed of it."""

FIRST_POLL_SECONDS = 0.05
LAST_POLL_SECONDS = 1.0
"""Between two looks at a job: soon for a small one, seldom for a long one."""


class Job:
    """One job, by its id. Redis knows its progress; its vectors are read from its output."""

    def __init__(
        self,
        id: str,
        broker: Broker,
        url: str,
        settings: Settings,
        sink: Sink | None,
        spec: JobSpec | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`sink`: its output, as the caller names it. `spec`: as this process submitted it. `check`: see `Client`."""
        self.id = id
        self._broker = broker
        self._url = url
        self._settings = settings
        self._sink = sink
        self._spec = spec
        self._check = check

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    @property
    def queue(self) -> str:
        return self._broker.queue

    def status(self) -> JobStatus:
        """The job's state now. Raises `JobUnknown` if it never existed or has expired, or if Redis was emptied."""
        with explaining(self._url):
            return self._broker.status(self.id)

    def wait(
        self,
        timeout: float | None = None,
        *,
        check: bool = True,
        progress: Callable[[JobStatus], object] | None = None,
    ) -> JobStatus:
        """Wait until the job has ended, and return its last status. Rows may have failed: see `failed` there, and
        `errors`.

        `check`: raise if the job failed or was cancelled. `progress` is called with each status, at most once a second.

        In the process that submitted the job this also writes the manifest, if the process can reach the output. For a
        job of `Client.job` a worker or coordinator writes it. While Redis cannot be used, this waits, with one line in
        the log.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on.
            JobFailed: it failed, and `check` is true.
            JobCancelled: it was cancelled, and `check` is true.
            BrokerError: Redis refuses, or could not be used when `timeout` was over.
            RecordDamaged: its spec in Redis is not the one that was submitted.
            JobUnknown: as `status`.
            OutputError: the manifest cannot be written.
            ModelError, WorkerError, ServerError: without Redis: the worker or the server here has ended.
        """
        waiting = Waiting(timeout)
        while not (status := self.look(Patience(warn, self._url, until=waiting.end))).state.ended:
            if progress is not None:
                progress(status)
            time.sleep(waiting.pause(status))
        return checked(status) if check else status

    def look(self, patience: Patience) -> JobStatus:
        """One look of `wait`."""
        self._check()
        with explaining(self._url):
            return patience(lambda: look(self._broker, self.id, self._url, self._settings, self._spec))

    def results(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of an ended job, shard by shard, in no promised order; `columns`: only these.

        Raises:
            UsageError: the job was found by its id, and its output was not named.
            OutputError: the job has no manifest yet, or its output cannot be read from here, or holds another job.
        """
        return readable(self.status(), self._sink).read(columns)

    def errors(self) -> Iterator[ErrorRow]:
        """The failed rows of an ended job, in the order of the corpus. Raises as `results`."""
        return readable(self.status(), self._sink).read_errors()

    def cancel(self) -> bool:
        """End the job; what is written stays, and the same submission continues it. False: it has ended in another way.

        Workers have some seconds to commit what they have computed of it; `wait` returns after that.

        Raises:
            JobUnknown: as `status`.
        """
        with explaining(self._url):
            return was_cancelled(self.id, self._broker.run(self._broker.cancel(self.id, grace_ms=GRACE_MS)))


class Waiting:
    """For the end of a job: until when, and how long between two looks at it."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._pause = FIRST_POLL_SECONDS
        self.end = None if timeout is None else time.monotonic() + timeout

    def pause(self, status: JobStatus) -> float:
        """Seconds until the next look. Raises `TimeoutError`."""
        pause, self._pause = self._pause, min(self._pause * 1.5, LAST_POLL_SECONDS)
        left = pause if self.end is None else self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"job {status.job} is {status.state} after {self._timeout:g} s "
                f"({status.done} of {status.blocks} blocks): it goes on"
            )
        return min(pause, left)


def checked(status: JobStatus) -> JobStatus:
    """The status of an ended job. Raises `JobFailed` or `JobCancelled`."""
    if status.state is JobState.COMPLETED:
        return status
    why = why_ended(status)
    raised = JobFailed if status.state is JobState.FAILED else JobCancelled
    raise raised(f"job {status.job} {status.state}" + (f": {why}" if why else ""))


def readable(status: JobStatus, sink: Sink | None) -> Sink:
    """The output of an ended job, as the caller names it. Raises as `Job.results`."""
    if not status.state.ended:
        raise OutputError(f"job {status.job} is {status.state}: wait for its end before reading its results")
    if sink is None:
        raise UsageError(
            f"job {status.job}: where its vectors lie is not taken from Redis, where others may write, too: "
            f"name it: client.job({status.job!r}, output=...)"
        )
    manifest = sink.read_manifest()
    if manifest is not None and status.job not in (manifest.job, *manifest.retries):
        raise OutputError(
            f"{mask(sink.output)} holds job {manifest.job}, not {status.job}: name the output of that job"
        )
    return sink


def was_cancelled(job: str, answer: Answer) -> bool:
    """What the cancel step answered. Raises `JobUnknown`."""
    if answer.code is Code.UNKNOWN_JOB:
        raise JobUnknown(f"no job {job} on this server: it never was, or has expired (embed-status lists them)")
    return answer.code is Code.OK


def warn(notice: str) -> None:
    """What a submission waits for."""
    if notice:
        log.warning(notice)
