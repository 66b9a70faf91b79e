"""Drives batches to their ends: checks the input, submits the job, waits for it, and writes the two files.

Every step may be repeated, so any gateway that finds a batch without a driver goes on with it, from where another
gateway has died. A lock keeps two gateways from doing the same work; if two do it all the same, that does no harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedstream.api.client import Client
from embedstream.api.job import Job
from embedstream.dataset.ordering import Ordering
from embedstream.dataset.sinks import open_sink
from embedstream.errors import BrokerError, EmbedstreamError, JobUnknown, OutputError
from embedstream.jobs import JobStatus, job_id
from embedstream.lifecycle.watching import why_ended
from embedstream.outputs import NAMES
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect, explaining
from embedstream.server.foreign import leaving_out
from embedstream.server.patience import Patience, Stopped
from embedstream_gateway.batch_lines import LineError, Records, check_lines
from embedstream_gateway.batch_records import (
    CANCEL,
    ENDED,
    INPUT,
    LINES,
    LOCK,
    VECTORS,
    BatchFolder,
    Checked,
    End,
    Ended,
    Made,
    Progress,
)
from embedstream_gateway.batch_results import COLUMNS, Answers, ordered
from embedstream_gateway.store import Store, remove, write_json

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks for batches that no gateway drives."""

HELD_SECONDS = 3.0
"""Until a batch that another gateway drives is looked at again: that gateway may die."""

FAILED_SECONDS = 10.0
"""Until one that did not get on is tried again."""

MOST_AT_ONCE = 8
"""Batches that one gateway drives; the work itself is the workers'."""

SWEEP_SECONDS = 600.0
"""Between two looks for what is kept long enough."""


class BatchRunner:
    """Threads of one gateway, from `start` to `stop`."""

    def __init__(self, store: Store, redis_url: str) -> None:
        self._store = store
        self._url = redis_url
        self._stopping = threading.Event()
        self._driven: dict[str, threading.Thread] = {}
        self._later: dict[str, float] = {}
        """When those are tried again that another gateway drives, or that failed: they keep no other from its turn."""
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._said: dict[str, str] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends soon; the next gateway goes on with what is half done."""
        self._stopping.set()

    def _run(self) -> None:
        swept = 0.0
        while not self._stopping.is_set():
            try:
                if time.monotonic() - swept > SWEEP_SECONDS or not swept:
                    swept = time.monotonic()
                    self._sweep(time.time())
                self._look()
            except Exception as error:  # noqa: BLE001 - the next look may do better
                self._say("", f"batches cannot be looked at ({type(error).__name__}: {error}), trying again")
            self._stopping.wait(LOOK_SECONDS)

    def _look(self) -> None:
        self._driven = {id: thread for id, thread in self._driven.items() if thread.is_alive()}
        for id in self._store.batch_names():
            if len(self._driven) >= MOST_AT_ONCE:
                return
            if id in self._driven or self._later.get(id, 0.0) > time.monotonic():
                continue
            if not (self._store.batches / id / ENDED).exists():
                thread = threading.Thread(target=self._drive_alone, args=(id,), name=id, daemon=True)
                self._driven[id] = thread
                thread.start()

    def _sweep(self, now: float) -> None:
        self._store.sweep(now)
        ids = self._store.batch_names()
        for gone in self._later.keys() - set(ids):
            del self._later[gone]
        for id in ids:
            with leaving_out(id):
                ended = BatchFolder(self._store.batches / id).ended()
                if ended is not None and self._store.expiry(ended.at) < now:
                    remove(self._store.batches / id)
        self._end_returned()

    def _end_returned(self) -> None:
        """End the jobs of batches that are over: a Redis that went back to an earlier copy has them again."""
        with connect(self._url) as redis, explaining(self._url):
            nowhere = Broker(redis, "")
            for broker in map(nowhere.of, nowhere.queues()):
                for job in broker.active_jobs():
                    with leaving_out(f"job {job}"):
                        output = Path(broker.status(job).spec.output)
                        ours = output.name == VECTORS and output.parent.parent == self._store.batches
                        if ours and (output.parent / ENDED).exists():
                            broker.run(broker.cancel(job))

    def _drive_alone(self, id: str) -> None:
        folder = BatchFolder(self._store.batches / id)
        try:
            with locked(folder.path / LOCK) as held:
                if not held:
                    self._later[id] = time.monotonic() + HELD_SECONDS
                elif (made := folder.made()) is not None and folder.ended() is None:
                    self._drive(folder, made)
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - a batch must not end the others; it is tried again
            self._say(id, f"batch {id} does not get on ({type(error).__name__}: {error}), trying again")
            self._later[id] = time.monotonic() + FAILED_SECONDS

    def _drive(self, folder: BatchFolder, made: Made) -> None:
        checked = self._check(folder)
        if checked is None:
            return
        with contextlib.closing(Client(self._url, queue=made.queue)) as client:
            job = self._submit(client, folder, made, checked)
            if job is None:
                return
            why = ""
            try:
                why = why_ended(job.wait(check=False, progress=lambda status: self._watch(folder, made, job, status)))
            except JobUnknown:
                if wanted_end(folder, made) is None:
                    raise  # Redis lost it: the next try makes it again
            self._finish(folder, made, checked, why)

    def _check(self, folder: BatchFolder) -> Checked | None:
        """What the input holds; None if the batch is over by that."""
        checked = folder.checked()
        if checked is not None:
            return checked
        lines = check_lines(folder.path / INPUT)
        if lines.errors:
            end(folder, Ended(status="failed", at=int(time.time()), errors=lines.errors))
            return None
        checked = Checked(at=int(time.time()), total=lines.total, inputs=lines.inputs, role=lines.role)
        write_json(folder.path / LINES, checked)
        return checked

    def _submit(self, client: Client, folder: BatchFolder, made: Made, checked: Checked) -> Job | None:
        """The job; None if the batch is over, as it cannot be submitted."""
        output = str(folder.path / VECTORS)
        # So that a batch can be ended from here, too, when no worker is there.
        (folder.path / VECTORS).mkdir(exist_ok=True)

        def tick() -> None:
            if self._stopping.is_set():
                raise Stopped
            if wanted_end(folder, made) is not None:
                raise _EndsEarly

        patience = Patience(self._warn(made.id), self._url, wait=self._stopping.wait, tick=tick)
        try:
            spec = client.make_spec(
                output, made.model_address, None, {"role": checked.role, "outputs": ["dense"], "text": False}
            )
            return client.push(Records(folder.path / INPUT), spec, "", patience, trust_unchanged=True)
        except _EndsEarly:
            broker = Broker(connect(self._url), made.queue)
            job = Job(spec.job, broker, self._url, client.settings, open_sink(output), spec)
            with contextlib.suppress(JobUnknown):
                job.cancel()
            return job
        except BrokerError:
            raise
        except EmbedstreamError as error:
            errors = (LineError("cannot_be_submitted", str(error), None),)
            end(folder, Ended(status="failed", at=int(time.time()), errors=errors))
            return None

    def _watch(self, folder: BatchFolder, made: Made, job: Job, status: JobStatus) -> None:
        """Between two looks at a job. Raises `Stopped`."""
        if self._stopping.is_set():
            raise Stopped
        if wanted_end(folder, made) is not None and not status.verdict:
            job.cancel()

    def _finish(self, folder: BatchFolder, made: Made, checked: Checked, why: str) -> None:
        """Write both files, then that the batch has ended. `why`: its job did, if that was early."""
        finalizing, status = int(time.time()), wanted_end(folder, made)
        sink = open_sink(str(folder.path / VECTORS))
        manifest = sink.read_manifest()
        dense = next((each for each in manifest.outputs if each.name == NAMES["dense"]), None) if manifest else None
        answers = Answers(made.id, made.model, dense)
        missing = "batch_expired" if status == "expired" else "batch_cancelled" if status else "batch_failed"
        created = {"created": finalizing}
        with (
            Ordering() as ordering,
            self._store.writing(
                f"{made.id}_output.jsonl", "batch_output", file_id(made.id, "output"), **created
            ) as output,
            self._store.writing(
                f"{made.id}_error.jsonl", "batch_output", file_id(made.id, "error"), **created
            ) as error,
        ):
            results: Iterator[Any] = iter(())
            if manifest is not None:
                rows = iter(()) if dense is None else sink.read(COLUMNS)
                results = ordered(ordering, rows, sink.read_errors())
            for good, line in answers.lines(results, folder.path / INPUT, missing):
                (output if good else error).write(line)
                if self._stopping.is_set():
                    raise Stopped
            totals = answers.totals
            output_id = output.finish().id if totals.completed else None
            error_id = error.finish().id if totals.failed else None
        ended = Ended(
            status=status or ("failed" if totals.missing else "completed"),
            errors=(LineError("job_failed", why, None),) if totals.missing and not status else (),
            at=int(time.time()),
            finalizing_at=finalizing,
            counts=totals.counts(checked.total),
            output_file_id=output_id,
            error_file_id=error_id,
            tokens=totals.tokens,
        )
        end(folder, ended)

    def _warn(self, id: str) -> Any:
        return lambda notice: self._say(id, f"batch {id}: {notice}") if notice else None

    def _say(self, id: str, what: str) -> None:
        """Log each thing once, while it stays the same."""
        if self._said.get(id) != what:
            self._said[id] = what
            log.warning("%s", what)


class _EndsEarly(Stopped):
    """A batch that is to end before all of it was submitted."""


def end(folder: BatchFolder, ended: Ended) -> None:
    """The batch is over: its answers are files, and the rest is not needed any more."""
    write_json(folder.path / ENDED, ended)
    shutil.rmtree(folder.path / VECTORS, ignore_errors=True)
    (folder.path / INPUT).unlink(missing_ok=True)


def wanted_end(folder: BatchFolder, made: Made) -> End | None:
    """Why the batch is to end early; None if it is not."""
    if (folder.path / CANCEL).exists():
        return "cancelled"
    return "expired" if time.time() > made.expires_at else None


def progress(client: Client, folder: BatchFolder, made: Made) -> Progress:
    """What is done of a batch's job; nothing before it is submitted. Raises `BrokerError`."""
    try:
        status = client.job(job_id(made.queue, str(folder.path / VECTORS))).status()
    except JobUnknown:
        return Progress()
    return Progress(status.rows, status.failed, status.state.ended or status.state == "finalizing")


def file_id(batch: str, purpose: str) -> str:
    """The id of a batch's file, the same in every try."""
    return "file-" + hashlib.blake2b(f"{batch} {purpose}".encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process has the lock; the system releases it when the process ends, however it ends."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield False  # the batch is gone
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be locked: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
