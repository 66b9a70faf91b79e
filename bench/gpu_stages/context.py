"""What a stage works with: the device, folders, and where its figures go."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from gpu_stages.results import OK, Results

if TYPE_CHECKING:
    import torch

log = logging.getLogger("gpu_stages")


@dataclass(frozen=True)
class Bench:
    """One stage's run."""

    stage: str
    results: Results
    scratch: Path
    """On disk, shared by all stages of a run, as `memory` is."""
    memory: Path
    """A folder in memory, where the system has such."""
    brought: Path
    """What `gpu_pack.py` made; may be missing."""
    tiny: bool

    def note(self, what: str, **figure: Any) -> None:
        """Keep a figure, and print it into the log."""
        self.results.note(self.stage, what=what, **figure)
        print(f"{what}: {figure}", flush=True)

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Around a part of a stage that the rest can do without: what it raises is a figure."""
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            log.exception("%s failed after %.1f s", what, time.monotonic() - begun)
            self.note(what, failed=" ".join(f"{type(error).__name__}: {error}".split())[:400])

    @cached_property
    def device(self) -> torch.device:
        """The first GPU; with `tiny`, the CPU where there is none. Raises `SystemExit`."""
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        if not self.tiny:
            raise SystemExit("no CUDA device here: run this on a machine with one, or try it with --tiny")
        torch.set_num_threads(1)  # such small products only wait for their threads
        _stand_in()
        return torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        import torch

        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def seconds(self) -> float:
        """How long a rate is measured."""
        return 0.05 if self.tiny else 3.0

    @property
    def packs(self) -> bool:
        """False if the kernels of packed attention failed in this run."""
        ends = [figure["ended"] for figure in self.results.find("kernels") if "ended" in figure]
        failed = [figure for figure in self.results.find("kernels") if "failed" in figure]
        return not failed and all(end == OK for end in ends)


def _stand_in() -> None:
    """Let the CPU count as a device that takes all texts at once, by the tests' own attention, and compile by the
    compiler's front half alone: so the benchmark's whole way can be tried there.
    """
    from embedstream_worker.engines import compiling, headed_engine, packed_attention, torch_engine

    importlib.import_module("engines.cpu_attention")  # which registers the kernel

    def always(_device: torch.device, _dtype: torch.dtype) -> bool:
        return True

    for module in (packed_attention, torch_engine, headed_engine):
        mock.patch.object(module, "is_fast", always).start()
    mock.patch.object(compiling, "BACKEND", "aot_eager").start()
