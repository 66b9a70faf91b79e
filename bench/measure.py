"""What all benchmarks share: medians, tables in Markdown, and what machine this is."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "openvino", "redis", "pyarrow", "numpy")
CPU_SIGNS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> str:
    """One line for the head of a report: processor, cores, versions, load."""
    described = Path("/proc/cpuinfo").read_text()
    fields = dict(line.partition(":")[::2] for line in described.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [sign for sign in CPU_SIGNS if sign in fields.get("flags", "").split()]
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{fields.get('model name', platform.machine())}, {cores} cores, {' '.join(flags)}; "
        f"Python {platform.python_version()}, {versions}; {time.strftime('%Y-%m-%d')}; load at the start {load}"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and, in brackets, the lowest and the highest."""
    median = statistics.median(values)
    return f"{median:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, the nearest one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
