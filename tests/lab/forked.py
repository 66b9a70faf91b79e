"""Commands as forks of a process that has loaded them once: for a short command, loading is most of what it takes.

A fork runs the entry point of the installed program, with arguments, environment and working folder of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from embedstream.cli.main import COMMANDS

_LOADED = [
    "embedstream.api.client",
    "embedstream_coordinator.compaction",
    "embedstream_producer.status",
    "embedstream_producer.submit",
    "embedstream_producer.verify",
    *(entry.partition(":")[0] for name, entry in COMMANDS.items() if name not in ("worker", "search", "cache")),
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_LOADED)


def can_fork(command: str, environment: dict[str, str]) -> bool:
    """Whether the program loads nothing that a fork could not take, and reads no variable as it is loaded."""
    name = command.removeprefix("embed-")
    return name not in ("worker", "search", "coordinator") and "EMBEDSTREAM_FAILPOINTS" not in environment


def run_forked(argv: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text. Raises `subprocess.TimeoutExpired`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _processes.Process(target=_run, args=(argv, environment, str(Path.cwd()), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        return subprocess.CompletedProcess(argv, process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def _run(argv: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in (os.devnull, 0), (out, 1), (err, 2):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    sys.argv = list(argv)
    module = COMMANDS[Path(argv[0]).name.removeprefix("embed-")].partition(":")[0]
    importlib.import_module(module).main()
