"""The run of one embed-submit: from checked parts to the end of their job, on a fleet or on this machine alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.parts import Part
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import ModelError
from embedstream.jobs import JobSpec, JobState, JobStatus, parse_max_errors
from embedstream.lifecycle.opening import (
    Opened,
    finished_manifest,
    is_visible,
    open_job,
    refuse_forbidden,
)
from embedstream.lifecycle.settling import settle_finished
from embedstream.lifecycle.submission import Pushed, push_job
from embedstream.lifecycle.unchanged import refuse_changed
from embedstream.lifecycle.watching import why_ended
from embedstream.queue.blocks import Block, Refusal
from embedstream.queue.broker import Broker
from embedstream.records import Manifest
from embedstream.server.connection import connect, explaining, with_redis
from embedstream.server.patience import Patience
from embedstream.server.preflight import check, shortcomings
from embedstream.settings import Settings
from embedstream.terminal import counted, echo, echo_json
from embedstream_producer import report
from embedstream_producer.changed_model import refuse_changed_model
from embedstream_producer.corpus import total_bytes
from embedstream_producer.embedded import OutputLock
from embedstream_producer.embedded_run import Embedded, check_installed, made_folders
from embedstream_producer.options import Options
from embedstream_producer.progress import Progress
from embedstream_producer.refusals import Refusals
from embedstream_producer.retry_failed import FailedRows
from embedstream_producer.updating import Updating
from embedstream_producer.watch import Watch

DETACHED = 130

UNSEEN = (
    "this job is completed already, in an output that cannot be read from here: whether the corpus is still the one "
    "that was embedded was not looked at"
)

FLEET_SECONDS = 0.25
EMBEDDED_SECONDS = 0.1
"""Between two looks at a job: many producers may look at a fleet's Redis, one at an embedded one."""

SMALL_BYTES = 256 * 1024
"""Fewer than a window has."""


class Run:
    """The run of one command."""

    def __init__(
        self,
        options: Options,
        spec: JobSpec,
        sink: Sink,
        parts: Sequence[Part],
        progress: Progress,
        failed: FailedRows | None = None,
        updating: Updating | None = None,
    ) -> None:
        """`failed`: run these rows only, and `spec` is their job. `updating`: take over what this dataset has."""
        self.options = options
        self.spec = spec
        self.sink = sink
        self.result: report.Report | None = None
        self.reason = ""
        self.was_finished = False
        self.stays = False
        """Whether the output still holds what was to be updated."""
        self.spent: report.Spent | None = None
        self._parts = parts
        self._failed = failed
        self._updating = updating
        self._progress = progress
        self._settings = Settings.from_environment(model=options.model)
        self._refusals = Refusals(progress.tell)
        self._tried = False
        self._opened = False

    def run(self) -> int:
        """To the end of the job, or of the pushing; returns the exit code."""
        if self._updating is not None and (manifest := self._begin_update(self._updating)) is not None:
            self.was_finished = True
            self.sink.mend(manifest)
            return self._finish(report.from_manifest(manifest))
        manifest = self._finished()
        if manifest is not None:
            self.was_finished = True
            if not self.options.trust_unchanged:
                self._compare(manifest)
                refuse_changed_model(manifest, self.spec)
            if manifest.retries or manifest.generation:
                self.sink.mend(manifest)
            if self.options.redis_url is not None:
                settle_finished(self.options.redis_url, self.spec, self.sink)
            return self._finish(report.from_manifest(manifest))
        if self._failed is not None:
            self._progress.tell(f"running {len(self._failed):,} failed rows again")
        for part in self._parts:
            self._progress.tell(part.advice or "")
        if self.options.redis_url is None:
            return self._embedded()
        with made_folders(self.spec.output):
            return self._fleet(self.options.redis_url)

    def _finished(self) -> Manifest | None:
        """The manifest of a job of which nothing is left to do."""
        if self._failed is not None:
            return None if len(self._failed) else self._failed.manifest
        return None if self.spec.updates else finished_manifest(self.sink, self.spec)

    def _begin_update(self, updating: Updating) -> Manifest | None:
        """Make the job one that updates; returns the manifest of a dataset that is up to date instead."""
        self._progress.phase("comparing the corpus with the one that was embedded")
        spec = updating.spec(self._parts, self._progress.reading)
        self._progress.phase("")
        if spec is None:
            return updating.manifest
        self.spec, self.sink = spec, open_sink(spec.output, spec, self.options.redis_url)
        return None

    def _compare(self, manifest: Manifest) -> None:
        """Raise `CorpusDiffers` if the finished dataset was made of another corpus."""
        self._progress.phase("comparing the corpus with the one that was embedded")
        for remark in refuse_changed(manifest, self.spec, self.sink, self._parts, self._progress.reading):
            self._progress.tell(remark)
        self._progress.phase("")

    def interrupted(self) -> int:
        """After Ctrl-C."""
        if self.options.redis_url is None:
            self._progress.say("stopped; the same command goes on from here")
        elif self._opened:
            look_again = with_redis(f"embed-status {self.spec.job}", self.options.redis_url)
            self._progress.say(
                f"detached from job {self.spec.job}; to follow it: {look_again}; "
                f"if not all rows are submitted yet, run the same command again"
            )
        return DETACHED

    def _fleet(self, url: str) -> int:
        client, patience = connect(url), Patience(self._progress.notice, url)
        check(connect(url, retries=0), url, self._progress.notice)
        with explaining(url):
            for shortcoming in patience(lambda: shortcomings(client, url)):
                self._progress.tell(shortcoming)
            broker = Broker(client, self.spec.queue)
            workers = patience(broker.workers)
            refuse_forbidden(workers, self.spec.output)
            visible = is_visible(workers, self.spec.output)
            if visible or not workers:
                self.sink.check()
            watch = Watch(url, self.spec, self._settings, self._progress, seconds=FLEET_SECONDS, embedded=False)
            patience = Patience(self._progress.notice, url, tick=watch.check)
            status = self._work(broker, watch, patience, lambda: self._open(broker, patience, visible=visible))
        if status is None:
            self._say_detached(url)
            return 0
        return self._end(status)

    def _embedded(self) -> int:
        check_installed(self.spec.model)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(OutputLock(self.spec.output))
            self.sink.check()
            self._progress.phase("starting a private Redis")
            embedded = stack.enter_context(Embedded(self.spec, lock, self._progress.tell, self._worker_flags()))
            stack.enter_context(explaining(embedded.url))
            broker = Broker(connect(embedded.url), self.spec.queue)
            watch = Watch(
                embedded.url, self.spec, self._settings, self._progress, seconds=EMBEDDED_SECONDS, embedded=True
            )
            started = False

            def open_and_start() -> Opened:
                nonlocal started
                patience(lambda: self._end_others(broker))
                opened = self._open(broker, patience, visible=True)
                if not started:
                    started = True
                    embedded.start_worker(lambda: watch.done)
                    self._progress.phase("starting the worker")
                return opened

            def check_all() -> None:
                embedded.check()
                watch.check()

            patience = Patience(self._progress.notice, embedded.url, tick=check_all)
            status = self._work(broker, watch, patience, open_and_start)
            assert status is not None, "embedded mode never detaches"
            return self._end(status)

    def _end_others(self, broker: Broker) -> None:
        """Before an update, end what was broken off in its output: with another corpus, or other settings."""
        for job in broker.births():
            if job != self.spec.job and self.spec.update is not None:
                broker.run(broker.cancel(job, JobState.CANCELLED, "an update of the same output was begun since"))

    def _worker_flags(self) -> tuple[str, ...]:
        """Of embed-worker. A corpus that fits into one window is embedded before a warm-up would have been over."""
        size, flags = total_bytes(self._parts), self.options.worker
        small = size is not None and size <= SMALL_BYTES and "--no-warmup" not in flags
        return (*flags, "--no-warmup") if small else flags

    def _open(self, broker: Broker, patience: Patience, *, visible: bool) -> Opened:
        # A try whose reply was lost has made the job, and has not adopted what lies in its output.
        again, self._tried = self._tried, True
        opened = open_job(
            broker,
            self.spec,
            self.sink,
            max_errors=self.options.max_errors,
            visible=visible,
            always_adopt=again,
            patience=patience,
        )
        first, self._opened = not self._opened, True
        self._say_opened(opened, first)
        return opened

    def _work(
        self, broker: Broker, watch: Watch, patience: Patience, open_it: Callable[[], Opened]
    ) -> JobStatus | None:
        """Push and wait, from the beginning whenever Redis lost the job; None if detached."""
        bound = patience(lambda: broker.memory_bound(self._settings.queue_bytes))
        with DuplicateIndex() as index:
            read = functools.partial(self._blocks, index)
            while True:
                opened = patience(open_it)
                if opened.state is JobState.COMPLETED and not self.options.trust_unchanged and self._failed is None:
                    self._progress.tell(UNSEEN)
                if opened.state is JobState.FINALIZING:
                    # Perhaps of a cancelled job, whose manifest is not written yet: it goes on after that.
                    ended = watch.wait(patience.tick)
                    if ended is None or ended.state is not JobState.COMPLETED:
                        opened = patience(open_it)
                if not opened.state.ended:
                    with watch:
                        pushed = push_job(broker, self.spec.job, self._parts, read, bound, patience)
                    if pushed is Pushed.LOST:
                        self._progress.tell("Redis does not know the job any more: submitting it again")
                        continue
                for line in self._refusals.summary():
                    self._progress.tell(line)
                if self.options.detach:
                    return None
                status = watch.wait(patience.tick)
                if status is not None:
                    return status
                self._progress.tell("Redis lost blocks: submitting them again")

    def _blocks(self, index: DuplicateIndex, part: Part) -> Iterator[Block]:
        def refused(refusal: Refusal) -> None:
            if self._failed is None:
                self._refusals.add(part.index, part.label, refusal)

        whole = part.blocks(self.spec, index, refused, lambda read: self._progress.position(part.index, read))
        return whole if self._failed is None else self._failed.blocks(part.index, part.label, whole)

    def _end(self, status: JobStatus) -> int:
        self.spent = self._progress.spent()
        if status.state is JobState.FAILED and status.reason and not status.done:
            raise ModelError(status.reason)  # before the first row, only a model that cannot serve the job fails it
        manifest = self._read_manifest(status)
        self.reason = why_ended(status)
        self.stays = status.spec.updates and status.state is not JobState.COMPLETED
        return self._finish(report.from_status(status) if manifest is None else report.from_manifest(manifest))

    def _read_manifest(self, status: JobStatus) -> Manifest | None:
        """This end's manifest; None where the output cannot be seen from here."""
        manifest = self.sink.read_manifest()
        if manifest is None:
            return None
        ended = manifest.state == status.state and (manifest.job == status.job or not status.spec.updates)
        mine = ended if status.spec.retry is None else status.job in manifest.retries
        return manifest if mine else None

    def _finish(self, result: report.Report) -> int:
        self.result = result
        return report.exit_code(result, parse_max_errors(self.options.max_errors))

    def _say_opened(self, opened: Opened, first: bool) -> None:
        adopted = opened.adopted
        if first and opened.resumed and opened.state is JobState.SUBMITTING:
            self._progress.tell(f"job {self.spec.job} continues where it was")
        if adopted.rows:
            self._progress.tell(f"adopted {adopted.rows:,} rows that lay in the output already")
        if adopted.refused:
            self._progress.tell(
                f"{counted(adopted.refused, 'shard')} in the output not used: their rows are in other shards"
            )

    def _say_detached(self, url: str) -> None:
        if self.options.json:
            broker = Broker(connect(url), self.spec.queue)
            submitted = Patience(self._progress.notice, url)(lambda: broker.status(self.spec.job))
            self.result = report.from_status(submitted)
        else:
            echo(self.spec.job)
            self._progress.tell(
                f"all rows are submitted; job {self.spec.job} continues without this command; to follow it: "
                f"{with_redis(f'embed-status {self.spec.job}', url)}"
            )


def show(options: Options, run: Run) -> None:
    """The last words: one object on standard output, or lines for people."""
    assert run.result is not None
    if options.json:
        echo_json(run.result)
        if run.reason:
            echo(run.reason, err=True)
        return
    if run.was_finished:
        echo(f"{run.result.output} is finished already; nothing was done")
    for line in report.lines(run.result, run.sink, run.reason, run.spent, run.options.redis_url, run.stays):
        echo(line)
