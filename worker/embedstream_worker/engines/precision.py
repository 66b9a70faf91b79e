"""In what precision to compute, which of them this machine's processor has natively, and how its cores are shared."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "int8"]
Precision = Literal["float32", "bfloat16", "int8"]

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86 (two), Arm
_CPU_DESCRIPTION = Path("/proc/cpuinfo")
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively; elsewhere it is emulated, and slower than float32.

    Only Linux says; False where it cannot be known.
    """
    return not _BFLOAT16_FLAGS.isdisjoint(_describe("flags", "Features").split())


def cpu_name() -> str:
    """What decides how a model is compiled here: the processor's name and what it can do."""
    return f"{platform.machine()} {_describe('model name')} {_describe('flags', 'Features')}"


@functools.cache
def _describe(*fields: str) -> str:
    try:
        description = _CPU_DESCRIPTION.read_text("utf-8", "replace")
    except OSError:
        return ""
    # The same for all cores, so the first line is enough.
    line = next((line for line in description.splitlines() if line.startswith(fields)), "")
    return line.partition(":")[2].strip()


def cpu_cores() -> int:
    """Cores that this process may use: those it may run on, or as many as a container's quota pays for, if less."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([own, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores by the quota of each control group that this process is in, theirs and those above; version 1 and 2."""
    try:
        lines = (_PROC / "self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    files: tuple[str, ...]
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            root, files = _CGROUPS, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, files = _CGROUPS / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        # In a container the root is often its own group, by whatever name it goes outside.
        within = PurePosixPath(name.lstrip("/"))
        for folder in {root, *(root / part for part in (within, *within.parents) if ".." not in part.parts)}:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such group; `max`, or -1: no quota
                quota, period = map(int, " ".join((folder / file).read_text() for file in files).split())
                if quota > 0:
                    yield quota / period


def tokenizer_threads() -> int:
    """Threads that tokenize, in a process whose engine is started.

    Some hundred thousand tokens a second come from one that works by itself. If each hands its texts to the pool that
    the tokenizers library has, a few keep that busy; more would keep the thread waiting that feeds the device.
    """
    pooled = os.environ.get("TOKENIZERS_PARALLELISM", "false") == "true"
    return min(3 if pooled else 8, cpu_cores())


def streams_for(cores: int) -> int:
    """Batches that are computed at the same moment.

    With 2 cores, one core a batch is 15 % faster than both on one batch: nobody waits for the other half. On large
    machines 4 cores share a batch, so that its time stays short and the caches hold what is worked on.
    """
    return max(min(cores, 2), cores // 4)
