"""An engine whose memory is bounded, given more than fits."""

from __future__ import annotations

import subprocess
import sys


def assert_it_goes_on_after_a_batch_too_large(module: str, engine: str, room_mib: int, dim: int) -> None:
    """In a process of its own: the batch is told apart by an `OutOfMemory`, and a smaller one gets its vectors.

    `engine` is a call of what `embedstream_worker.engines.<module>` has; `room_mib` is what the process may take more
    than it has after a first batch.
    """
    program = f"""
import resource
import numpy as np
from embedstream_worker.engines.base import OutOfMemory, TokenBatch
from embedstream_worker.engines.{module} import *
from embedstream_worker.models import resolve_model

def batch(rows):
    return TokenBatch(np.full(rows * 100, 7, np.int32), np.arange(rows + 1) * 100, 100, 0, "document")

engine = {engine}
engine.run(batch(50))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + ({room_mib} << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    engine.run(batch(100_000))
except OutOfMemory as error:
    print(error)
print(engine.run(batch(50))["dense"].shape)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1:] == [f"(50, {dim})"], run.stderr
    assert run.stdout.startswith("100000 texts of up to 100 tokens: ")
