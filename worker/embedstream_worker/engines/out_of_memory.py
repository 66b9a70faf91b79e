"""A device that had no memory for a batch, as torch says it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embedstream_worker.engines.base import OutOfMemory, Results, TokenBatch

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle takes memory, too
)
"""MPS, the CPU's allocator and CUDA's libraries have no exception type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def within_memory(batch: TokenBatch, run: Callable[[], Results]) -> Results:
    """What `run` gives of a batch. Raises `OutOfMemory`, and whatever else it raises."""
    try:
        return run()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Out here the error's frames no longer hold the batch's tensors, so its memory can be had again.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(f"{len(batch)} texts of up to {batch.longest} tokens: {reason}")
