"""Processes of an earlier run: told apart from strangers that got their pid, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import msgspec

from embedstream.cli.starting import environment, find_executable

_PROC = Path("/proc/self/stat").exists()
_POLL_SECONDS = 0.02


class Process(msgspec.Struct, frozen=True):
    """One process forever: a pid alone is given to somebody else after its process has ended."""

    pid: int
    started: str
    """When it began, as the system tells it; only good for comparing."""


def identify(pid: int) -> Process | None:
    """The process that has this pid now; None if there is none (a zombie has ended)."""
    started = _started_by_proc(pid) if _PROC else _started_by_ps(pid)
    return None if started is None else Process(pid, started)


def is_running(process: Process) -> bool:
    """Whether this very process still runs."""
    return identify(process.pid) == process


def wait_ended(process: Process, seconds: float) -> bool:
    """Wait for a process that is not our child; False if it still runs after so long."""
    deadline = time.monotonic() + seconds
    while is_running(process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def end(process: Process, grace_seconds: float) -> bool:
    """SIGTERM, then SIGKILL after the grace; nothing if it has ended. False if it survives both, or is not ours."""
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
        if not is_running(process):
            return True
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        if wait_ended(process, seconds):
            return True
    return False


def _started_by_proc(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before may hold blanks and parentheses
    state, threads, ticks = fields[0], int(fields[17]), fields[19]
    ended = state == b"X" or (state == b"Z" and threads <= 1)  # with more, its files may still be open
    return None if ended else f"{boot}:{ticks.decode()}"


def _started_by_ps(pid: int) -> str | None:
    answer = subprocess.run(
        [find_executable("ps") or "/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)],
        env={**environment(), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    state, _, started = answer.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()
