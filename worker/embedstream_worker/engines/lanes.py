"""How a batch gets to the device and its vectors back: directly, or through pinned memory beside the computing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from embedstream_worker.engines.base import TokenBatch

Vectors = npt.NDArray[np.float32]

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(flat ids, int32 [total]; where texts begin, int32 [n + 1]) on the device -> vectors there, float32 [n, dim]."""


class Lanes(Protocol):
    """Ways to a device and back. Callable from several threads."""

    count: int
    """Batches that may be on their way at once."""

    def run(self, batch: TokenBatch, compute: Compute) -> Vectors:
        """The batch's vectors, [n, dim], the caller's own. Raises what `compute` raises."""


class DirectLanes:
    """To the device and back in the caller's thread: the CPU, and devices without streams."""

    count = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, batch: TokenBatch, compute: Compute) -> Vectors:
        ids = torch.from_numpy(batch.ids).to(self._device)
        starts = torch.from_numpy(batch.offsets.astype(np.int32)).to(self._device)
        return compute(ids, starts).cpu().numpy()


class CudaLanes:
    """While one batch computes, the next one's ids have been copied and its kernels are queued behind it.

    All batches compute on one stream: side by side they would only share the chip, and each needs memory. The host
    never waits for the device but for a batch's own vectors. Three, as with a small model the host takes as long for a
    batch as the device: one computes, one is launched, one comes back.
    """

    def __init__(self, device: torch.device, count: int = 3) -> None:
        self.count = count
        self._computing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._launching = threading.Lock()
        self._free: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(count):
            self._free.put(_Lane(device))

    def run(self, batch: TokenBatch, compute: Compute) -> Vectors:
        lane = self._free.get()
        try:
            ids, starts = lane.send(batch)
            # Under a lock, so that kernels of two batches do not alternate: both would then end late.
            with self._launching, torch.cuda.stream(self._computing):
                self._computing.wait_event(lane.sent)
                vectors = compute(ids, starts).contiguous()
                lane.computed.record(self._computing)
            return lane.fetch(vectors)
        except BaseException:
            # Kernels that were launched before the error still read what the lane's next batch would overwrite.
            with contextlib.suppress(RuntimeError):  # of a device that is lost: the first error says more
                self._computing.synchronize()
            raise
        finally:
            self._free.put(lane)


class _Lane:
    """One batch's memory on both sides, and its copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sending, self._fetching = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.sent, self.computed = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Sleep while waiting: tokenizing needs the processor.
        self._fetched = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._inputs = torch.empty(0, dtype=torch.int32)
        self._inputs_there = torch.empty(0, dtype=torch.int32)
        self._outputs = torch.empty(0, dtype=torch.float32)

    def send(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a batch's ids and starts to the device; they are there once `sent` has come."""
        total, count = len(batch.ids), len(batch.ids) + len(batch.offsets)
        if len(self._inputs) < count:
            self._inputs = torch.empty(_roomy(count), dtype=torch.int32, pin_memory=True)
            self._inputs_there = torch.empty(_roomy(count), dtype=torch.int32, device=self._device)
        inputs = self._inputs.numpy()
        inputs[:total] = batch.ids
        inputs[total:count] = batch.offsets
        with torch.cuda.stream(self._sending):
            self._inputs_there[:count].copy_(self._inputs[:count], non_blocking=True)
            self.sent.record(self._sending)
        return self._inputs_there[:total], self._inputs_there[total:count]

    def fetch(self, vectors: torch.Tensor) -> Vectors:
        """Copy vectors back as soon as `computed` has come."""
        count = vectors.numel()
        if len(self._outputs) < count:
            self._outputs = torch.empty(_roomy(count), dtype=torch.float32, pin_memory=True)
        outputs = self._outputs[:count]
        with torch.cuda.stream(self._fetching):
            self._fetching.wait_event(self.computed)
            outputs.copy_(vectors.view(-1), non_blocking=True)
            self._fetched.record(self._fetching)
        self._fetched.synchronize()
        return outputs.numpy().reshape(vectors.shape).copy()


def _roomy(count: int) -> int:
    """The next power of two: allocating pinned memory stops the device, so it must be rare."""
    return 1 << max(count - 1, 1).bit_length()
