"""The Python API over a connection that blocks: submit, find a job, run a few texts now."""

from __future__ import annotations

import importlib
import logging
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, Unpack, overload

import redis

from embedstream.api import interactive
from embedstream.api.embeddings import Embeddings, embeddings
from embedstream.api.interactive import EmbedReply, EmbedRequest, make_pairs, make_request
from embedstream.api.job import Job, warn
from embedstream.api.record_blocks import RECORDS, Records, records_part
from embedstream.corpus.chunking import with_tokenizer
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import EmbedstreamError, JobUnknown, RequestError, UsageError
from embedstream.jobs import JobSpec, JobState, model_address, parse_max_errors, queue_name
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
from embedstream.outputs import OutputSpec
from embedstream.queue.broker import Broker
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import REQUEST_TIMEOUT_SECONDS, connect, explaining, with_redis
from embedstream.server.patience import Patience, Stopped
from embedstream.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

log = logging.getLogger(__name__)


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
        self,
        records: Records,
        spec: JobSpec,
        max_errors: str,
        patience: Patience,
        *,
        trust_unchanged: bool,
        roots: Sequence[str] = (),
    ) -> Job:
        """What `submit` does with its spec. `roots`: as `open_sink` takes them. Raises `Stopped` as `patience` does."""
        part = records_part(records)
        spec = part.typed(spec)
        part.check(spec)
        broker, sink = Broker(self._redis, spec.queue), open_sink(spec.output, spec, self.url, roots)
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
        spec = make_spec(
            queue=self.settings.queue,
            output=output,
            model=model or self.settings.model,
            revision=revision,
            parts=(RECORDS,),
            settings=settings,
        )
        return with_tokenizer(spec)

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

    @overload
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
        outputs: None = None,
    ) -> npt.NDArray[np.float32]: ...

    @overload
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
        outputs: Sequence[OutputSpec | str],
    ) -> Embeddings: ...

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
        outputs: Sequence[OutputSpec | str] | None = None,
    ) -> npt.NDArray[np.float32] | Embeddings:
        """Vectors of a few texts now, ahead of all jobs: float32 [n, dim].

        `role` chooses the model's prompt unless `prompt` (a text) or `prompt_name` is given. `timeout` in seconds.

        With `outputs`, each written as `--emit` takes it, a dictionary by the outputs' names: of `dense` an array
        [n, dim], of `dense:ubinary` one of bytes [n, dim / 8], of `sparse` a `SparseVector` for each text, and of
        `multivector` an array [tokens, dim] for each text. Sparse and multi-vector models embed queries by the
        library's `encode_query`, at most 64 at once.

        Raises:
            RequestError: no worker answered in time (the message says whether one is alive), or a text failed.
            BrokerError: Redis could not be used in this time, or refuses. A server that hangs costs some seconds more.
        """
        request = make_request(texts, role, prompt, prompt_name, max_length, outputs=outputs)
        reply = self.asked(request, timeout, model)
        return interactive.vectors(reply, len(request.texts)) if outputs is None else embeddings(reply, request)

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

    def workers(self) -> dict[str, list[WorkerRecord]]:
        """The live workers of each queue that had a sign of life in the last 30 days. Raises `BrokerError`."""
        nowhere = Broker(self._requests, "")
        with explaining(self.url):
            return {queue: nowhere.of(queue).workers() for queue in nowhere.queues()}

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


def find_queue(broker: Broker, job: str, queue: str | None = None) -> str:
    """The queue that a job is on; `queue`: look at no other. Raises `JobUnknown`."""
    for name in broker.queues() if queue is None else (queue,):
        if broker.of(name).knows(job):
            return name
    where = (
        "this server" if queue is None else f"queue {queue} (without --queue and EMBEDSTREAM_QUEUE all are looked at)"
    )
    raise JobUnknown(f"no job {job} on {where}: it never was, or has expired (embed-status lists them)")


def start_command(model: str, url: str, queue: str) -> str:
    """The command that starts a worker for a queue, as `with_redis` writes it."""
    model = model_address(model)
    named = "" if queue_name(model) == queue else f" --queue {shlex.quote(queue)}"
    return with_redis(f"embed-worker --model {shlex.quote(model)}{named}", url)
