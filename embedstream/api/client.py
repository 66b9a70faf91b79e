"""The Python API over a connection that blocks: submit, follow a job, read its vectors, run a few texts now."""

from __future__ import annotations

import importlib
import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, Unpack

import msgspec
import pyarrow as pa
import redis

from embedstream.api import interactive
from embedstream.api.interactive import EmbedReply, EmbedRequest, RequestTask
from embedstream.api.record_blocks import RECORDS, Records, records_part
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.schema import ErrorRow
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import (
    EmbedstreamError,
    JobCancelled,
    JobFailed,
    JobUnknown,
    OutputError,
    RequestError,
    UsageError,
)
from embedstream.jobs import JobSpec, JobState, JobStatus, model_address, parse_max_errors, queue_name
from embedstream.lifecycle.opening import (
    SpecSettings,
    finished_manifest,
    is_visible,
    make_spec,
    open_job,
    refuse_forbidden,
)
from embedstream.lifecycle.submission import Pushed, push_job
from embedstream.lifecycle.unchanged import refuse_changed
from embedstream.lifecycle.watching import look, why_ended
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Answer, Code
from embedstream.server.connection import REQUEST_TIMEOUT_SECONDS, connect, explaining, mask, with_redis
from embedstream.server.patience import Patience, Stopped
from embedstream.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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


class Client:
    """Everything that a program needs of a fleet, or of this machine. Do not share it between threads while it submits.

    Without a Redis URL it starts a private Redis server and a worker for each model that is used, as `embed-submit`
    does; that needs `embedstream[local]`. Outputs are folders then. Server and worker end with `close`, or with this
    process, however it ends; the same submission continues an unfinished job.
    """

    def __init__(self, redis_url: str | None = None, queue: str | None = None) -> None:
        """`redis_url`: None means EMBEDSTREAM_REDIS_URL; `queue`: None means EMBEDSTREAM_QUEUE, else the model's.

        Raises:
            UsageError: the URL is not one of Redis.
        """
        self.settings = Settings.from_environment(redis_url=redis_url, queue=queue)
        self._embedded = None if self.settings.redis_url is not None else embedded_fleet(self.settings)
        self.check: Callable[[], None] = lambda: None
        """Raises what makes waiting for a worker pointless."""
        if self.settings.redis_url is None:
            return
        self.url = self.settings.redis_url
        self._redis = connect(self.url)
        # A request is repeated by `ask`, as long as its caller waits.
        self._requests = connect(self.url, retries=0, timeout=REQUEST_TIMEOUT_SECONDS)

    def close(self) -> None:
        """Close the connections. Without a Redis URL, end the private server and the workers, too."""
        if self._embedded is not None:
            self._embedded.close()
            return
        self._redis.close()
        self._requests.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        records: Records,
        *,
        output: str,
        model: str | None = None,
        revision: str | None = None,
        max_errors: str = "",
        trust_unchanged: bool = False,
        **settings: Unpack[SpecSettings],
    ) -> Job:
        """Submit records as one job and return when all are with the workers; they are read as a stream.

        `records`: mappings with `id` and `text` (or the other usual fields, as in files), strings (their positions are
        their ids), or a table: of pyarrow, a data frame of pandas or polars, or anything else with Arrow's interface. A
        bad record becomes a row of `_errors.jsonl`. `output`: a folder, an S3 or a Redis URL, as workers see it.
        `model`: None means EMBEDSTREAM_MODEL. `max_errors`: the job fails if more rows fail than this: `100` or `0.5%`.

        The same records into the same output again: what is done is not done again. If all is, they are read and
        compared with what was embedded, unless `trust_unchanged`. Of an output in Redis only the number of rows
        can be compared; of one that cannot be read from here, nothing.

        Raises:
            UsageError: settings cannot be used.
            SpecDiffers: the output holds a job with other settings.
            CorpusDiffers: the output is finished, and was made of other records.
            CorpusChanged: the unfinished job in this output began with other records.
            OutputError: no live worker may write there; without Redis: another run writes there.
            InputError: a table lacks a column that is named or needed; or Redis lost blocks and the records cannot be
                read again.
            BrokerError: Redis refuses.
            Exception: whatever the records raise. The job is then cancelled, and the same submission continues it.
        """
        if self._embedded is not None:
            client = self._embedded.to_write(output, model, revision)
            return client.submit(
                records,
                output=output,
                model=model,
                revision=revision,
                max_errors=max_errors,
                trust_unchanged=trust_unchanged,
                **settings,
            )
        spec, patience = self.make_spec(output, model, revision, settings), Patience(warn, self.url, tick=self.check)
        return self.push(records, spec, max_errors, patience, trust_unchanged=trust_unchanged)

    def push(
        self, records: Records, spec: JobSpec, max_errors: str, patience: Patience, *, trust_unchanged: bool
    ) -> Job:
        """What `submit` does with its spec. Raises `Stopped` as `patience` does."""
        part = records_part(records)
        spec = part.typed(spec)
        part.check(spec)
        broker, sink = Broker(self._redis, spec.queue), open_sink(spec.output, spec, self.url)
        with explaining(self.url), DuplicateIndex() as index:
            bound = patience(lambda: broker.memory_bound(self.settings.queue_bytes))
            pushed, begun = Pushed.LOST, False
            try:
                while pushed is Pushed.LOST and patience(
                    lambda: open_for_records(broker, spec, sink, max_errors, patience)
                ):
                    begun = True
                    pushed = push_job(broker, spec.job, [part], lambda part: part.blocks(spec, index), bound, patience)
            except (EmbedstreamError, Stopped, CancelledError, redis.RedisError):
                raise
            except Exception as error:  # of the caller's records: workers would wait for the rest of them forever
                reason = f"its records ended early: {type(error).__name__}: {error}; submit them again to go on"
                broker.run(broker.cancel(spec.job, JobState.CANCELLED, reason))
                raise
        if not begun and not trust_unchanged and (manifest := finished_manifest(sink, spec)) is not None:
            for remark in refuse_changed(manifest, spec, sink, [part]):
                log.warning(remark)
        return Job(spec.job, broker, self.url, self.settings, sink, spec, self.check)

    def make_spec(self, output: str, model: str | None, revision: str | None, settings: SpecSettings) -> JobSpec:
        """What `submit` is told, checked. Raises `UsageError`."""
        return make_spec(
            queue=self.settings.queue,
            output=output,
            model=model or self.settings.model,
            revision=revision,
            parts=(RECORDS,),
            settings=settings,
        )

    def job(self, id: str, *, output: str | None = None) -> Job:
        """A job by its id, on any queue. `output`: where its vectors lie, for `Job.results`.

        Raises:
            JobUnknown: there is no such job.
            UsageError: the output cannot be used.
        """
        if self._embedded is not None:
            raise UsageError(
                f"job {id}: without Redis there are no jobs but those that submit() returns: give redis_url"
            )
        sink = None if output is None else open_sink(output, queue_url=self.url)
        with explaining(self.url):
            nowhere = Broker(self._redis, "")
            return Job(id, nowhere.of(find_queue(nowhere, id)), self.url, self.settings, sink)

    def embed(
        self,
        texts: Sequence[str] | str,
        role: Literal["document", "query"] = "query",
        prompt: str | None = None,
        prompt_name: str | None = None,
        timeout: float = 30.0,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Vectors of a few texts now, ahead of all jobs: float32 [n, dim].

        `role` chooses the model's prompt unless `prompt` (a text) or `prompt_name` is given. `timeout` in seconds.

        Raises:
            RequestError: no worker answered in time (the message says whether one is alive), or a text failed.
            BrokerError: Redis could not be used in this time, or refuses. A server that hangs costs some seconds more.
        """
        request = make_request(texts, role, prompt, prompt_name, max_length)
        return interactive.vectors(self.asked(request, timeout, model), len(request.texts))

    def rerank(
        self,
        query: str,
        texts: Sequence[str],
        timeout: float = 30.0,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> list[float]:
        """How well each of a few texts fits the query, now: the scores of pairs, by a model that gives these.

        Raises as `embed`.
        """
        request = make_pairs(query, texts, max_length)
        return interactive.scores(self.asked(request, timeout, model), len(request.texts))

    def classify(
        self,
        texts: Sequence[str] | str,
        timeout: float = 30.0,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> list[tuple[str, float]]:
        """The best label of each of a few texts, and its score, now, by a model that gives labels.

        Raises as `embed`.
        """
        request = make_request(texts, "document", None, None, max_length, "classify")
        return interactive.labels(self.asked(request, timeout, model), len(request.texts))

    def asked(self, request: EmbedRequest, timeout: float, model: str | None) -> EmbedReply:
        """The reply to a request. Raises as `embed`, but for what the reply says."""
        if self._embedded is not None:
            return self._embedded.to_embed(model).asked(request, timeout, model)
        broker = Broker(self._requests, self.queue_of(model))
        with explaining(self.url):
            reply = interactive.ask(broker, request, timeout)
        if reply is None:
            raise self.unanswered(timeout, model)
        return reply

    def queue_of(self, model: str | None) -> str:
        """The queue of requests for a model."""
        return self.settings.queue or queue_name(model or self.settings.model)

    def unanswered(self, timeout: float, model: str | None) -> RequestError:
        """Why nothing came, as far as can be told."""
        queue = self.queue_of(model)
        with explaining(self.url):
            ready = [each for each in Broker(self._requests, queue).workers() if each.state == "ready"]
        if ready:
            return RequestError(
                f"queue {queue}: no answer in {timeout:g} s though {len(ready)} worker(s) are alive: "
                f"they are busy; wait longer (timeout), or start more"
            )
        return RequestError(
            f"queue {queue}: no answer in {timeout:g} s, as no worker is ready: "
            f"start one with {start_command(model or self.settings.model, self.url, queue)}"
        )


def checked(status: JobStatus) -> JobStatus:
    """The status of an ended job. Raises `JobFailed` or `JobCancelled`."""
    if status.state is JobState.COMPLETED:
        return status
    why = why_ended(status)
    raised = JobFailed if status.state is JobState.FAILED else JobCancelled
    raise raised(f"job {status.job} {status.state}" + (f": {why}" if why else ""))


def warn(notice: str) -> None:
    """What a submission waits for."""
    if notice:
        log.warning(notice)


class Fleet(Protocol):
    """What a `Client` without Redis works with: `embedstream_producer.embedded_client.EmbeddedFleet`."""

    def to_write(self, output: str, model: str | None, revision: str | None) -> Client: ...

    def to_embed(self, model: str | None) -> Client: ...

    def close(self) -> None: ...


def embedded_fleet(settings: Settings) -> Fleet:
    """The applications know this package, not the other way round: theirs is found by its name."""
    fleet: Fleet = importlib.import_module("embedstream_producer.embedded_client").EmbeddedFleet(settings)
    return fleet


def needed_url(settings: Settings) -> str:
    """The URL of Redis. Raises `UsageError` if there is none."""
    if settings.redis_url is None:
        raise UsageError("no Redis: give redis_url='redis://host:6379/0', or set EMBEDSTREAM_REDIS_URL")
    return settings.redis_url


def open_for_records(broker: Broker, spec: JobSpec, sink: Sink, max_errors: str, patience: Patience) -> bool:
    """Open a job that is about to be submitted; False if it is finished, so that nothing is to be done."""
    parse_max_errors(max_errors)
    workers = broker.workers()
    if finished_manifest(sink, spec) is not None and broker.state(spec.job) is JobState.COMPLETED:
        return False
    refuse_forbidden(workers, spec.output)
    visible = is_visible(workers, spec.output)
    opened = open_job(broker, spec, sink, max_errors=max_errors, visible=visible, patience=patience)
    return not opened.state.ended


def make_request(
    texts: Sequence[str] | str,
    role: Literal["document", "query"],
    prompt: str | None,
    prompt_name: str | None,
    max_length: int | None,
    task: RequestTask = "embed",
) -> EmbedRequest:
    """A request. Raises `UsageError` for what are no texts."""
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    for at, text in enumerate(texts):
        check_text(task, f"text {at}", text)
    return EmbedRequest(
        texts=texts, role=role, prompt=prompt, prompt_name=prompt_name, max_length=max_length, task=task
    )


def make_pairs(query: str, texts: Sequence[str], max_length: int | None) -> EmbedRequest:
    """A request for scores. Raises `UsageError` for what are no texts."""
    check_text("rerank", "the query", query)
    request = make_request(texts, "document", None, None, max_length, "rerank")
    return msgspec.structs.replace(request, query=query)


def check_text(task: RequestTask, name: str, text: str) -> None:
    """Raise `UsageError` for what is no text."""
    if not isinstance(text, str):
        raise UsageError(f"{task}() takes strings")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} has half of a UTF-16 surrogate pair (character {error.start}); repair it") from error


def find_queue(broker: Broker, job: str, queue: str | None = None) -> str:
    """The queue that a job is on; `queue`: look at no other. Raises `JobUnknown`."""
    for name in broker.queues() if queue is None else (queue,):
        if broker.of(name).knows(job):
            return name
    where = (
        "this server" if queue is None else f"queue {queue} (without --queue and EMBEDSTREAM_QUEUE all are looked at)"
    )
    raise JobUnknown(f"no job {job} on {where}: it never was, or has expired (embed-status lists them)")


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


def was_cancelled(job: str, answer: Answer) -> bool:
    """What the cancel step answered. Raises `JobUnknown`."""
    if answer.code is Code.UNKNOWN_JOB:
        raise JobUnknown(f"no job {job} on this server: it never was, or has expired (embed-status lists them)")
    return answer.code is Code.OK


def start_command(model: str, url: str, queue: str) -> str:
    """The command that starts a worker for a queue, as `with_redis` writes it."""
    model = model_address(model)
    named = "" if queue_name(model) == queue else f" --queue {shlex.quote(queue)}"
    return with_redis(f"embed-worker --model {shlex.quote(model)}{named}", url)
