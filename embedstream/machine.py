"""What this machine has for us: cores and memory, or a container's share of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cpu_cores() -> int:
    """Cores that this process may use: those it may run on, or as many as a container's quota pays for, if less."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = _limits("cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return max(1, min([own, *(math.ceil(quota / period) for quota, period in quotas if period > 0)]))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or what a container may take, if less."""
    own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([own, *(most for (most,) in _limits("memory", ("memory.max",), ("memory.limit_in_bytes",)))])


def _limits(controller: str, unified: tuple[str, ...], legacy: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """The numbers in these files of each control group that this process is in, theirs and those above.

    `unified`: the files of version 2; `legacy`: those of version 1.
    """
    try:
        lines = (_PROC / "self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            root, files = _CGROUPS, unified
        elif controller in controllers.split(","):
            root, files = _CGROUPS / controller, legacy
        else:
            continue
        # In a container the root is often its own group, by whatever name it goes outside.
        within = PurePosixPath(name.lstrip("/"))
        for folder in {root, *(root / part for part in (within, *within.parents) if ".." not in part.parts)}:
            with contextlib.suppress(OSError, ValueError):  # no such group; `max`: no limit
                numbers = tuple(map(int, " ".join((folder / file).read_text() for file in files).split()))
                if numbers[0] > 0:  # -1: no limit
                    yield numbers
