"""Commands as forks of a process that has loaded them once: for a short command, loading is most of what it takes.

A fork runs the entry point of the installed program, with arguments, environment and working folder of its own.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import embedstream_worker
from embedstream import failpoints
from embedstream.cli.main import COMMANDS

_LOADED = [
    "__main__",  # else each fork would load that of pytest
    "embedstream.api.client",
    "embedstream_coordinator.compaction",
    "embedstream_coordinator.serving",
    "embedstream_gateway.serving",
    "embedstream_producer.status",
    "embedstream_producer.submit",
    "embedstream_producer.verify",
    "embedstream_worker.engines.hashing",
    "embedstream_worker.searching",
    "embedstream_worker.serving",
    *(entry.partition(":")[0] for entry in COMMANDS.values()),
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_LOADED)


class Forked:
    """A fork that runs, to be used as a `subprocess.Popen` without pipes."""

    def __init__(self, argv: list[str], environment: dict[str, str], err: Path, out: Path = Path(os.devnull)) -> None:
        """What it prints is added to the two files."""
        self.args = argv
        where = (str(Path.cwd()), str(out), str(err))
        self._process = _processes.Process(target=_run, args=(argv, environment, *where))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(argv: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text. Raises `subprocess.TimeoutExpired`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Forked(argv, environment, err, out)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        return subprocess.CompletedProcess(argv, code, out.read_text("utf-8"), err.read_text("utf-8"))


def _run(argv: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in (os.devnull, 0), (out, 1), (err, 2):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    sys.argv = list(argv)
    # What the environment decides while a program is loaded, and what loading sets there.
    added = list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = added
    if "PYTHONFAULTHANDLER" in environment:
        faulthandler.enable()
    for customizing in (Path(entry, "sitecustomize.py") for entry in added):
        if customizing.exists():
            runpy.run_path(str(customizing))
    failpoints.arm(environment.get(failpoints.VARIABLE, ""))
    importlib.reload(embedstream_worker)
    module = COMMANDS[Path(argv[0]).name.removeprefix("embed-")].partition(":")[0]
    importlib.import_module(module).main()
