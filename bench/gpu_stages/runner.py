"""Runs one stage as a process in a session of its own, for so long and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpu_stages.results import OK

_LOG_TAIL_BYTES = 20_000


def run_stage(
    command: Sequence[str],
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
    begun: Callable[[int], None] = lambda _pid: None,
) -> str:
    """How it ended: `OK`, or what went wrong in one line. What it prints is appended to `log`.

    It and all that it started in its session are gone when this returns or raises. `begun` is called with its process
    id.
    """
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        begun(process.pid)
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"killed: it took longer than {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # the stage ended, and left nothing
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return OK if code == 0 else f"failed with exit code {code}: {_last_line(log, start)}"


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
