"""What a worker has to do for the queue now and then: finalize ended jobs, forget dead consumers."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from embedstream.cli.logs import about
from embedstream.dataset.roots import check_output
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import EmbedstreamError
from embedstream.jobs import JobSpec
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.queue.broker import Broker
from embedstream.queue.job_record import reading_job
from embedstream_worker.troubles import patience

log = logging.getLogger(__name__)

FINALIZE_SECONDS = 1.0
RETIRE_ROUNDS = 60


class Housekeeping:
    """Owns its connection. Any number of workers may do this at once: every step is leased or harmless."""

    def __init__(self, broker: Broker, redis_url: str, roots: tuple[str, ...]) -> None:
        self._broker = broker
        self._redis_url = redis_url
        self._roots = roots
        self._round = 0
        self._failed: dict[str, str] = {}

    def run(self, stopping: Callable[[float], bool]) -> None:
        """`stopping(seconds)` waits and says whether the worker stops."""
        patient = patience("housekeeping", stopping)
        while not stopping(FINALIZE_SECONDS * random.uniform(0.5, 1.5)):
            self._round += 1
            patient.once(self._do)

    def _do(self) -> None:
        self.finalize()
        if self._round % RETIRE_ROUNDS == 0:
            self._retire()

    def hopeless(self) -> frozenset[str]:
        """Jobs of the outbox that this worker could not finalize when it last tried, or may not."""
        return frozenset(self._failed)

    def finalize(self) -> None:
        """Finalize what waits in the outbox and lies below this worker's roots."""
        outbox = self._broker.outbox()
        self._failed = {job: why for job, why in self._failed.items() if job in outbox}
        for job in outbox:
            try:
                with reading_job(job):
                    # A lease that this worker cannot use would hold others up.
                    self._sink(self._broker.status(job).spec)
                    finalized = finalize_job(self._broker, job, self._sink)
                if finalized:
                    log.info("job %s finalized", job, extra=about(job))
            except EmbedstreamError as error:
                self._note(job, str(error))

    def _sink(self, spec: JobSpec) -> Sink:
        """Raises `OutputError` or `UsageError` for an output that this worker may not write."""
        check_output(self._roots, spec.output)
        return open_sink(spec.output, spec, self._redis_url, self._roots)

    def _note(self, job: str, why: str) -> None:
        if self._failed.get(job) != why:
            log.warning("job %s cannot be finalized here: %s", job, why, extra=about(job))
        self._failed = self._failed | {job: why}

    def _retire(self) -> None:
        living = [worker.name for worker in self._broker.workers()]
        for job in self._broker.active_jobs():
            for consumer in self._broker.dead_consumers(job, living):
                self._broker.run(self._broker.retire(self._broker.keys.blocks(job), consumer))
