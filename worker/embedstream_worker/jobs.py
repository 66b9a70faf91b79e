"""Which jobs this worker may take, and what it must know of each."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from embedstream.cli.logs import about
from embedstream.dataset.roots import check_output
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import EmbedstreamError, JobUnknown, ModelError, OutputError, RecordDamaged
from embedstream.jobs import JobSpec, JobState, JobStatus, queue_name
from embedstream.lifecycle.finalizing import FINISHED, end_finished
from embedstream.lifecycle.opening import is_here
from embedstream.masking import mask
from embedstream.outputs import Output
from embedstream.queue.broker import Broker
from embedstream.queue.job_record import reading_job
from embedstream.records import Recipe
from embedstream.server.patience import Refused
from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.base import HARMLESS, Engine, EngineInfo
from embedstream_worker.families import missing
from embedstream_worker.giving import resolve_outputs
from embedstream_worker.known_rows import KnownRows, known_rows
from embedstream_worker.recipe import NOWHERE, in_words, recipe_of

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 30.0
"""When a job is looked at again whose output could not be written: disks are emptied and mounted."""


FOR_GOOD = float("inf")


class PromptBeingTried(Exception):
    """Another worker tries the job's prompt at present, or died of it a moment ago: look again soon."""


@dataclass
class Calibration:
    """What this worker knows of the ranges of a job's int8 columns. The thread that writes shards alone looks at it."""

    ranges: str = ""
    """As `encode_ranges` gives them; empty: there are none, or they are not known yet."""


@dataclass(frozen=True, eq=False)
class OpenJob:
    """A job that this worker works on. Two of the same id are two lives of it: Redis was emptied between them."""

    id: str
    spec: JobSpec
    prompt: str
    """What goes in front of every text."""
    prompt_length: int
    """How many leading tokens of a text belong to the prompt."""
    max_length: int
    """Tokens, special tokens included."""
    space: str
    outputs: tuple[Output, ...]
    """What the dataset has of it."""
    sink: Sink
    recipe: Recipe
    stored: bytes = b""
    """The spec as it lies in Redis: another version may leave fields out, or have more."""
    calibration: Calibration = field(default_factory=Calibration)
    known: KnownRows | None = None
    """Rows of the dataset that the job updates, whose results it takes over."""
    anew: str = ""
    """Why it takes over none of them."""


class NotForThisWorker(EmbedstreamError):
    """The job asks for what this worker does not have."""


@dataclass(frozen=True)
class _Refused:
    why: str
    until: float


class Jobs:
    """Opens jobs for this worker, once each, and remembers those that are not for it. Shared between threads."""

    def __init__(
        self,
        broker: Broker,
        redis_url: str,
        engine: Engine,
        options: EngineOptions,
        roots: tuple[str, ...],
        prompt_length: Callable[[str, JobSpec, str, int], int],
        clock: Callable[[], float] = time.monotonic,
        speak: Callable[[], None] = lambda: None,
    ) -> None:
        """`prompt_length` of job, spec, prompt and max length: see `Prompts.length`. `speak`: there is a new remark."""
        self._broker = broker
        self._redis_url = redis_url
        self._engine = engine
        self._tokenizer = engine.tokenizer()
        self._options = options
        self._roots = roots
        self._prompt_length = prompt_length
        self._clock = clock
        self._speak = speak
        self._lives: dict[str, float] = {}
        self._open: dict[str, OpenJob] = {}
        self._refused: dict[str, _Refused] = {}
        self._stuck: dict[str, str] = {}
        self._lock = threading.Lock()

    def takeable(self) -> list[OpenJob]:
        """Those of the active jobs that this worker may work on, oldest first. Raises `redis.RedisError`."""
        # Another birth under the same id means that Redis was emptied meanwhile.
        active = self._broker.births()
        with self._lock:
            for job in [job for job, made in self._lives.items() if active.get(job) != made]:
                self._lives.pop(job)
                self._open.pop(job, None)
                self._refused.pop(job, None)
            unknown = [job for job in active if job not in self._open and self._may_look(job)]
            self._lives |= {job: active[job] for job in unknown}
        for job in unknown:
            self._look_at(job)
        with self._lock:
            return [self._open[job] for job in active if job in self._open and job not in self._stuck]

    def open_jobs(self) -> frozenset[str]:
        """Ids of the jobs that this worker works on."""
        with self._lock:
            return frozenset(self._open)

    def refused(self) -> dict[str, str]:
        """The active jobs that are not for this worker, and why."""
        with self._lock:
            return {job: refused.why for job, refused in self._refused.items()}

    def refused_for_good(self) -> dict[str, str]:
        """Those of them that this worker will not look at again."""
        with self._lock:
            return {job: refused.why for job, refused in self._refused.items() if refused.until == FOR_GOOD}

    def waits(self) -> dict[str, str]:
        """Those of them that it will look at again, and those whose shard cannot be written at present."""
        with self._lock:
            again = {job: refused.why for job, refused in self._refused.items() if refused.until != FOR_GOOD}
            return self._stuck | again

    def remarks(self) -> dict[str, str]:
        """What is to be known of the jobs that this worker works on."""
        with self._lock:
            return {id: "\n".join(self._remarks(job)) for id, job in self._open.items()}

    def _remarks(self, job: OpenJob) -> list[str]:
        warning = missing(self._engine.info, job.spec.role) if job.recipe.prompt_from == NOWHERE else ""
        return [in_words(job.recipe), *([warning] if warning else []), *([job.anew] if job.anew else [])]

    def stuck(self, job: str, why: str) -> None:
        """A shard of the job cannot be written, and that is tried again: no more of it is taken until then.

        With no reason: it is written, or given up.
        """
        with self._lock:
            self._stuck.pop(job, None)
            if why:
                self._stuck[job] = why

    def refuse(self, job: str, why: str, seconds: float = FOR_GOOD) -> None:
        """Take no more of this job, for so long."""
        with self._lock:
            before = self._refused.get(job)
            self._open.pop(job, None)
            self._refused[job] = _Refused(why, self._clock() + seconds)
        if before is None or before.why != why:
            log.warning("job %s is not for this worker: %s", job, why, extra=about(job))

    def fail(self, job: str, why: str) -> None:
        """End a job that no worker can ever serve, and say why to the clients that wait for it."""
        self.refuse(job, why, LOOK_AGAIN_SECONDS)
        try:
            self._broker.run(self._broker.cancel(job, JobState.FAILED, why))
        except Refused as error:
            log.warning("job %s could not be ended (%s): the next worker will try", job, error, extra=about(job))

    def check_root(self, job: OpenJob) -> None:
        """Raise `OutputError` if the job's output is not below the roots any more: a folder may have become a link."""
        check_output(self._roots, job.spec.output)

    def _may_look(self, job: str) -> bool:
        refused = self._refused.get(job)
        return refused is None or self._clock() >= refused.until

    def _look_at(self, job: str) -> None:
        try:
            with reading_job(job):
                opened = self._openable(job)
            length = self._prompt_length(job, opened.spec, opened.prompt, opened.max_length)
            opened = replace(opened, prompt_length=length)
        except PromptBeingTried:
            return
        except (JobUnknown, OutputError, RecordDamaged) as error:
            self.refuse(job, str(error), LOOK_AGAIN_SECONDS)
        except ModelError as error:
            self.fail(job, str(error))
        except EmbedstreamError as error:
            self.refuse(job, str(error))
        else:
            with self._lock:
                self._open[job] = opened
                if self._refused.pop(job, None) is not None:
                    log.info("job %s can be worked on now", job, extra=about(job))
            recipe, *warnings = self._remarks(opened)
            log.info("job %s: %s", job, recipe, extra=about(job))
            for warning in warnings:
                log.warning("job %s: %s", job, warning, extra=about(job))
            self._speak()  # before a block is taken: whoever waits for a small job reads it, too

    def _openable(self, job: str) -> OpenJob:
        """Without the length of its prompt. Raises `NotForThisWorker`, and whatever reading the job may raise."""
        stored = self._broker.stored_spec(job)  # before it is read: of a job that is replaced meanwhile, nothing counts
        status = self._broker.status(job)
        self._broker.prove_keys(job, len(status.spec.parts))
        if not status.state.open:
            raise RecordDamaged(f"it is {status.state}, and listed among the jobs with blocks to do")
        why = self._unfit(status.spec)
        if why:
            raise NotForThisWorker(why)
        opened = replace(self._opened(job, status), stored=stored)
        if status.space and status.space != opened.space:
            raise NotForThisWorker(f"its vectors are of space {status.space}, this worker's would be of {opened.space}")
        if status.done and not is_here(status.spec.output):
            # Made anew, it would hide what was written before: a disk is not mounted, or somebody moved it.
            raise OutputError(
                f"{status.spec.output}: the folder is gone, with the {status.done} blocks written so far: "
                f"bring it back, or cancel the job"
            )
        opened.sink.check()
        if end_finished(self._broker, status.spec, opened.sink):
            raise OutputError(f"{mask(status.spec.output)}: {FINISHED}")
        return _with_known(opened, self._roots)

    def _opened(self, job: str, status: JobStatus) -> OpenJob:
        """Raises `ModelError` if the model cannot serve it."""
        spec, info = status.spec, self._engine.info
        outputs = resolve_outputs(spec, info)
        prompt = self._engine.prompt(spec.role, spec.prompt, spec.prompt_name)
        max_length = spec.max_length or info.max_length
        self._tokenizer.encode([HARMLESS], max_length)  # proves that the length is possible
        return OpenJob(
            id=job,
            spec=spec,
            prompt=prompt,
            prompt_length=0,
            max_length=max_length,
            space=space_id(info, spec, prompt, max_length),
            outputs=outputs,
            sink=open_sink(spec.output, spec, self._redis_url, self._roots),
            recipe=recipe_of(info, spec, prompt, max_length),
            calibration=Calibration(spec.retry.ranges if spec.retry else ""),
        )

    def _unfit(self, spec: JobSpec) -> str | None:
        if queue_name(spec.model) != queue_name(self._options.model):
            return f"it asks for model {spec.model}, this worker serves {self._options.model}"
        if spec.revision is not None and spec.revision != self._options.revision:
            return f"it asks for revision {spec.revision}, this worker serves {self._options.revision or 'the default'}"
        try:
            check_output(self._roots, spec.output)
        except EmbedstreamError as error:
            return str(error)
        return None


def _with_known(job: OpenJob, roots: tuple[str, ...]) -> OpenJob:
    """The job with what it may take over. Raises `OutputError`."""
    known, anew = known_rows(job.spec, job.space, job.outputs, roots)
    ranges = job.spec.update.ranges if job.spec.update and known is not None else job.calibration.ranges
    return replace(job, known=known, anew=anew, calibration=Calibration(ranges))


def space_id(info: EngineInfo, spec: JobSpec, prompt: str, max_length: int) -> str:
    """What makes vectors comparable, as 16 hex digits: the model, and the settings that change its vectors."""
    parts = (info.fingerprint, spec.role, prompt, max_length, [(kind, o.dim) for kind, o in info.outputs.items()])
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()
