"""Jobs as a gateway may handle them: looked at freely, written and read below its output roots alone. Calls block."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from embedstream.api.client import Client
from embedstream.api.job import readable
from embedstream.api.looks import JobLook, fleet_object, look_at_job, look_at_jobs, queue_object
from embedstream.api.record_blocks import RECORDS
from embedstream.api.search import Hit, Searchable
from embedstream.corpus.chunking import with_tokenizer
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.objects import is_object, parse_object
from embedstream.dataset.roots import check_output
from embedstream.dataset.schema import ErrorRow
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.errors import InputError, JobUnknown, OutputError, UsageError
from embedstream.jobs import JobSpec, JobState
from embedstream.lifecycle.handing_over import hand_over
from embedstream.lifecycle.opening import SpecSettings, is_here, make_spec, no_dataset, with_types
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import CoordinatorRecord, coordinators, unsealed_parts
from embedstream.queue.queues import QueueLook
from embedstream.records import Manifest
from embedstream.server.connection import connect, explaining
from embedstream.server.patience import Patience, Stopped
from embedstream_gateway.refusals import Refusal, bad, unavailable

_ID = re.compile(r"[0-9a-f]{16}")

_HERE = frozenset(("-", RECORDS))
"""Parts that were with the program that submitted them: standard input, and records of Python."""

SUBMIT_SECONDS = 50.0
"""How long a submission waits for room in the queue, or for Redis: less than its caller waits for the thread."""

MOST_COUNTED = 200_000
"""Failed rows that are read to count them by kind: some seconds."""


@dataclass(frozen=True)
class Details:
    """A job with what lies in its output."""

    look: JobLook
    unsealed: frozenset[int]
    """Parts that are not read to their end."""
    manifest: Manifest | None
    """None before the end, and where the output is none of this gateway's."""
    kinds: list[tuple[str, int]]
    """Failed rows by their codes, the most frequent first; empty if they cannot be read, or are too many."""


class Desk:
    """All jobs of a Redis."""

    def __init__(self, url: str, roots: Sequence[str]) -> None:
        """`roots`: below which jobs may write and datasets be read; empty: nowhere."""
        self._url = url
        self._roots = tuple(roots)
        self._nowhere = Broker(connect(url), "")

    def look(self, id: str) -> JobLook:
        """One job. Raises `JobUnknown`, `BrokerError`."""
        with explaining(self._url):
            return look_at_job(self._nowhere, _checked(id), None, self._url)

    def queues(self) -> list[tuple[QueueLook, list[JobLook]]]:
        """All queues with their jobs and workers. Raises `BrokerError`."""
        with explaining(self._url):
            return [look_at_jobs(self._nowhere.of(name)) for name in self._nowhere.queues()]

    def fleet(self) -> dict[str, Any]:
        """All that is known, as JSON. Raises `BrokerError`."""
        queues = [queue_object(look, jobs) for look, jobs in self.queues()]
        with explaining(self._url):
            return {**fleet_object(self._nowhere), "queues": queues}

    def coordinators(self) -> list[CoordinatorRecord]:
        """Those that live. Raises `BrokerError`."""
        with explaining(self._url):
            return coordinators(self._nowhere)

    def details(self, id: str) -> Details:
        """One job in full. Raises as `look`."""
        found = self.look(id)
        status, spec = found.status, found.status.spec
        unsealed: frozenset[int] = frozenset()
        manifest, kinds = None, list[tuple[str, int]]()
        if not status.sealed:
            with explaining(self._url):
                unsealed = frozenset(unsealed_parts(self._nowhere.of(spec.queue), id, len(spec.parts)))
        if status.state.ended and self.allows(spec.output):
            with contextlib.suppress(OutputError):  # what Redis knows is shown
                sink = readable(status, open_sink(spec.output, None, self._url, self._roots))
                manifest = sink.read_manifest()
                if manifest is not None and 0 < manifest.failed <= MOST_COUNTED:
                    kinds = Counter(row.code for row in sink.read_errors()).most_common()
        return Details(found, unsealed, manifest, kinds)

    def allows(self, output: str) -> bool:
        """Whether this gateway may read and write an output."""
        try:
            self._refuse_outside(output)
        except Refusal:
            return False
        return True

    def manifest(self, output: str) -> Manifest:
        """Of a finished dataset. Raises `Refusal`, `OutputError`."""
        address = canonical_output(output)
        self._refuse_outside(address)
        found = open_sink(address, None, self._url, self._roots).read_manifest()
        if found is None:
            raise no_dataset(address)
        return found

    @staticmethod
    def queue_of(manifest: Manifest) -> str:
        """The queue whose model made a dataset."""
        return manifest_spec(manifest).queue

    def search(
        self, output: str, manifest: Manifest, query: npt.NDArray[np.float32], fingerprint: str, k: int
    ) -> list[Hit]:
        """The `k` rows of a dataset nearest to a vector [1, dim]. Raises `Refusal`, `UsageError`, `OutputError`."""
        made_by = {recipe.fingerprint for recipe in manifest.recipes}
        if made_by and made_by != {fingerprint}:
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"{output} was made by another model than the workers of queue {self.queue_of(manifest)} have now: "
                f"their vectors cannot be compared",
                "other_model",
                "output",
            )
        self._refuse_outside(canonical_output(output))
        return Searchable(output, self._url, kinds=["dense"], roots=self._roots).search({"dense": query}, k)

    def spec(
        self,
        queue: str,
        model: str,
        output: str,
        revision: str | None,
        corpus: Sequence[str] | None,
        settings: dict[str, Any],
    ) -> JobSpec:
        """A job's spec. Raises `UsageError`, `OutputError`, `Refusal`, and `ModelError` if its texts are to be cut into
        chunks, and the model's tokenizer is not to be had here.
        """
        if not is_object(output) and not output.startswith(("/", "redis", "unix:")):
            raise bad(f"`output` is no absolute path, nor the address of a bucket or a Redis: {output}", "output")
        parts = (RECORDS,) if corpus is None else tuple(map(_part, corpus))
        if len(set(parts)) != len(parts):
            raise bad("`corpus` names a file twice", "corpus")
        given = cast("SpecSettings", settings)
        spec = make_spec(queue=queue, output=output, model=model, revision=revision, parts=parts, settings=given)
        self._refuse_outside(spec.output)
        return with_tokenizer(with_types(spec))

    def hand_over(self, spec: JobSpec, max_errors: str) -> None:
        """Have coordinators read the corpus of a job. Raises `Refusal`: no coordinator may, or not in time."""
        try:
            with _in_time() as tick, _of_the_output():
                sink = self._sink(spec)
                hand_over(self._url, spec, sink, max_errors, lambda _: None, needs_reader=True, tick=tick)
        except InputError as error:
            raise Refusal(HTTPStatus.CONFLICT, str(error), "no_coordinator", "corpus") from error

    def push(self, records: Sequence[Any], spec: JobSpec, max_errors: str) -> None:
        """Submit records. Raises as `Client.submit`, and `Refusal` if they are not in the queue in time."""
        with _in_time() as tick, _of_the_output(), Client(self._url, queue=spec.queue) as client:
            if is_here(spec.output):
                self._sink(spec).check()
            patience = Patience(url=self._url, tick=tick)
            client.push(records, spec, max_errors, patience, trust_unchanged=False, roots=self._roots)

    def cancel(self, id: str) -> bool:
        """End a job; False: it has ended already. Raises `JobUnknown`."""
        with Client(self._url) as client:
            state = client.job(_checked(id)).status().state
            return not state.ended and client.job(id).cancel()

    def retry(self, id: str) -> None:
        """Go on with a job that was cancelled or failed. Raises `Refusal`, `JobUnknown`."""
        status = self.look(id).status
        if status.state not in (JobState.CANCELLED, JobState.FAILED):
            raise Refusal(HTTPStatus.CONFLICT, f"job {id} is {status.state}: nothing is to be gone on with", "state")
        if not may_reread(status.spec):
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"job {id}: its rows were read by the program that submitted them: submit them there again",
                "not_here",
            )
        self._refuse_outside(status.spec.output)
        self.hand_over(status.spec, status.max_errors)

    def errors(self, id: str) -> Iterator[ErrorRow]:
        """The failed rows of an ended job. Raises `JobUnknown`, `Refusal`, `OutputError`."""
        status = self.look(id).status
        if not status.state.ended:
            raise Refusal(HTTPStatus.CONFLICT, f"job {id} is {status.state}: its errors are read at its end", "state")
        self._refuse_outside(status.spec.output)
        with _of_the_output():
            return readable(status, open_sink(status.spec.output, None, self._url, self._roots)).read_errors()

    def _sink(self, spec: JobSpec) -> Sink:
        return open_sink(spec.output, spec, self._url, self._roots)

    def _refuse_outside(self, output: str) -> None:
        """Raise `Refusal` for an output that this gateway has nothing to do with."""
        if not self._roots:
            message = "this gateway has no output roots: start it with --output-root FOLDER"
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, message, "no_roots", "output")
        try:
            check_output(self._roots, output)
        except (OutputError, UsageError) as error:
            message = str(error).replace("this worker's", "this gateway's")
            raise Refusal(HTTPStatus.FORBIDDEN, message, "outside", "output") from error


def may_reread(spec: JobSpec) -> bool:
    """Whether coordinators can read a job's rows once more. A run, and what was with its program, they cannot."""
    return spec.retry is None and not spec.run and not _HERE.intersection(spec.parts)


@contextlib.contextmanager
def _in_time() -> Iterator[Callable[[], None]]:
    """What a `Patience` does before each try, so that no thread waits on when its caller has gone. Raises `Refusal`."""
    end = time.monotonic() + SUBMIT_SECONDS

    def tick() -> None:
        if time.monotonic() > end:
            raise Stopped

    try:
        yield tick
    except Stopped:
        raise unavailable("the queue is full, or Redis is away: try again; the same request goes on") from None


@contextlib.contextmanager
def _of_the_output() -> Iterator[None]:
    """Raises `Refusal` for what is wrong with the output that a caller named, and no fault of this gateway."""
    try:
        yield
    except OutputError as error:
        raise Refusal(HTTPStatus.CONFLICT, str(error), "output", "output") from error


def _checked(id: str) -> str:
    """Raises `JobUnknown` for what no job has as its id."""
    if not _ID.fullmatch(id):
        raise JobUnknown(f"no job {id!r}: ids have 16 hex digits")
    return id


def _part(source: str) -> str:
    """A part of a corpus as a spec names it. Raises `Refusal`, `UsageError`."""
    if is_object(source):
        return parse_object(source, "corpus").url
    if not source.startswith("/") or os.path.normpath(source) != source or "\0" in source:
        raise bad(f"`corpus`: {source!r} is no absolute path in its plain spelling, nor an s3:// address", "corpus")
    return source
