"""Which jobs this worker may take, and what it must know of each."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import msgspec

from embedstream.broker import Broker
from embedstream.dataset.sink import Sink, open_sink
from embedstream.errors import EmbedstreamError, JobUnknown
from embedstream.jobs import JobSpec, queue_name
from embedstream.roots import allows
from embedstream_worker.engines.base import Engine, EngineInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerModel:
    """The one model that a worker serves, as it was asked for."""

    name: str
    revision: str | None


@dataclass(frozen=True)
class OpenJob:
    """A job that this worker works on."""

    id: str
    spec: JobSpec
    prompt: str
    """What goes in front of every text."""
    max_length: int
    """Tokens, special tokens included."""
    space: str
    sink: Sink


class Jobs:
    """Opens jobs for this worker, once each, and remembers those that are not for it."""

    def __init__(
        self, broker: Broker, redis_url: str, engine: Engine, model: WorkerModel, roots: tuple[str, ...]
    ) -> None:
        self._broker = broker
        self._redis_url = redis_url
        self._engine = engine
        self._model = model
        self._roots = roots
        self._open: dict[str, OpenJob] = {}
        self._refused: dict[str, str] = {}

    def takeable(self, active: list[str]) -> list[OpenJob]:
        """Those of the active jobs that this worker may work on, in their order."""
        for known in (self._open, self._refused):
            for job in [job for job in known if job not in active]:
                del known[job]
        for job in active:
            if job not in self._open and job not in self._refused:
                self._look_at(job)
        return [self._open[job] for job in active if job in self._open]

    def refuse(self, job: str, why: str) -> None:
        """Take no more of this job."""
        self._open.pop(job, None)
        self._refused[job] = why
        log.warning("job %s is not for this worker: %s", job, why)

    def _look_at(self, job: str) -> None:
        try:
            status = self._broker.status(job)
            spec = status.spec
            why = self._unfit(spec)
            if why:
                self.refuse(job, why)
                return
            info = self._engine.info
            prompt = self._engine.prompt(spec.role, spec.prompt, spec.prompt_name)
            max_length = min(spec.max_length or info.max_length, info.max_length)
            space = space_id(info, spec, prompt, max_length)
            if status.space and status.space != space:
                self.refuse(job, f"its vectors are of space {status.space}, this worker's would be of {space}")
                return
            sink = open_sink(spec.output, spec, self._redis_url)
            sink.check()
        except JobUnknown:
            return
        except EmbedstreamError as error:
            self.refuse(job, str(error))
            return
        self._open[job] = OpenJob(job, spec, prompt, max_length, space, sink)

    def _unfit(self, spec: JobSpec) -> str | None:
        if queue_name(spec.model) != queue_name(self._model.name):
            return f"it asks for model {spec.model}, this worker serves {self._model.name}"
        if spec.revision is not None and spec.revision != self._model.revision:
            return f"it asks for revision {spec.revision}, this worker serves {self._model.revision or 'the default'}"
        if not allows(self._roots, spec.output):
            return f"{spec.output} is outside this worker's output roots ({', '.join(self._roots)})"
        return None


def space_id(info: EngineInfo, spec: JobSpec, prompt: str, max_length: int) -> str:
    """What makes vectors comparable, as 16 hex digits: the model, and the settings that change its vectors."""
    parts = (info.fingerprint, spec.role, prompt, max_length, [(name, o.dim) for name, o in info.outputs.items()])
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()
