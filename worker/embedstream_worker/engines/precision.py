"""In what precision to compute, which of them this machine's processor has natively, and how its cores are shared."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Literal

from embedstream.machine import cpu_cores

Dtype = Literal["auto", "float32", "bfloat16", "int8"]
Precision = Literal["float32", "bfloat16", "int8"]

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86 (two), Arm
_CPU_DESCRIPTION = Path("/proc/cpuinfo")


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


def tokenizer_threads() -> int:
    """Threads that tokenize, in a process whose engine is started.

    Some hundred thousand tokens a second come from one that works by itself. If each hands its texts to the pool that
    the tokenizers library has, a few keep that busy; more would keep the thread waiting that feeds the device.
    """
    pooled = os.environ.get("TOKENIZERS_PARALLELISM", "false") == "true"
    return min(3 if pooled else 8, cpu_cores())


def streams_for(cores: int) -> int:
    """Batches that are computed at the same moment.

    With 2 cores, one core a batch is 15 % faster than both on one batch: no core waits for the other. On large
    machines 4 cores share a batch, so that its time stays short and the caches hold what is worked on.
    """
    return max(min(cores, 2), cores // 4)


def threads_of_a_stream() -> int:
    """Cores that share a batch."""
    return max(1, cpu_cores() // streams_for(cpu_cores()))
