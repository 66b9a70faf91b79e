"""Batches through a device whose streams run late, and in any order that events allow."""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embedstream_worker.engines import lanes
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.lanes import CudaLanes

LANES = 3


class Device:
    """Streams keep what they are given until somebody waits for an event; then any of them may get on."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._streams: list[Stream] = []
        self.cuda = SimpleNamespace(Stream=lambda _device: Stream(self), Event=lambda **_: Event(self), stream=self._on)
        self.lost = False

    def add(self, stream: Stream) -> None:
        with self._lock:
            self._streams.append(stream)

    def later(self, stream: Stream, run: Callable[[], object], after: Callable[[], bool] = lambda: True) -> None:
        with self._lock:
            stream.waiting.append((run, after))

    def run_until(self, done: Callable[[], bool]) -> None:
        """Work, in any order, at least until it is done."""
        with self._lock:
            if self.lost:
                raise RuntimeError("CUDA error: the device is lost")
            while not done():
                able = [stream for stream in self._streams if stream.waiting and stream.waiting[0][1]()]
                run, _ = self._random.choice(able).waiting.popleft()
                run()

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        with Copying(self, stream):
            yield


class Stream:
    def __init__(self, device: Device) -> None:
        self.waiting: deque[tuple[Callable[[], object], Callable[[], bool]]] = deque()
        self._device = device
        device.add(self)

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self._device.later(self, lambda: None, lambda: event.reached >= number)

    def synchronize(self) -> None:
        self._device.run_until(lambda: not self.waiting)


class Event:
    def __init__(self, device: Device) -> None:
        self.recorded = self.reached = 0
        self._device = device

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def reach() -> None:
            self.reached = max(self.reached, number)

        self._device.later(stream, reach)

    def synchronize(self) -> None:
        number = self.recorded
        self._device.run_until(lambda: self.reached >= number)


class Copying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies are left to the stream; what else is called here makes no numbers."""

    def __init__(self, device: Device, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._stream = device, stream

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            self._device.later(self._stream, lambda: func(target, source))
            return target
        return func(*args, **(kwargs or {}))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[CudaLanes, Device]]:
    def make_lanes(seed: int) -> tuple[CudaLanes, Device]:
        device = Device(seed)

        def empty(count: int, dtype: torch.dtype, device: object = None, pin_memory: bool = False) -> torch.Tensor:
            assert device is None or not pin_memory
            return torch.full((count,), -1, dtype=dtype)

        fake = SimpleNamespace(cuda=device.cuda, empty=empty, int32=torch.int32, float32=torch.float32)
        monkeypatch.setattr(lanes, "torch", fake)
        return CudaLanes(torch.device("cpu"), LANES), device

    return make_lanes


def model(device: Device, made: CudaLanes) -> lanes.Compute:
    """Each text's sum and length; computed when the computing stream gets there."""

    def compute(ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        vectors = torch.full((len(starts) - 1, 2), -1.0)

        def run() -> None:
            places = starts.tolist()
            for row, (start, stop) in enumerate(itertools.pairwise(places)):
                vectors[row] = torch.tensor([float(ids[start:stop].sum()), float(stop - start)])

        device.later(made._computing, run)  # type: ignore[arg-type]
        return vectors

    return compute


def batch(number: int) -> TokenBatch:
    lengths = [1 + (number + row) % 7 for row in range(1 + number % 5)]
    offsets = np.cumsum([0, *lengths])
    return TokenBatch(np.arange(offsets[-1], dtype=np.int32) + 100 * number, offsets, max(lengths), 0, "document")


def expected(one: TokenBatch) -> npt.NDArray[np.float32]:
    sums = np.add.reduceat(one.ids, one.offsets[:-1])
    return np.stack([sums, one.lengths], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_in_whatever_order_streams_get_on_each_batch_gets_its_own_vectors(
    seed: int, make: Callable[[int], tuple[CudaLanes, Device]]
) -> None:
    made, device = make(seed)
    batches = [batch(number) for number in range(40)]
    with ThreadPoolExecutor(LANES + 1) as pool:
        answers = [*pool.map(lambda one: made.run(one, model(device, made)), batches)]
    for one, vectors in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(vectors, expected(one))


def test_an_error_leaves_its_lane_to_the_next_batch_only_once_the_device_is_through(
    make: Callable[[int], tuple[CudaLanes, Device]],
) -> None:
    made, device = make(0)
    right = model(device, made)
    seen: list[list[int]] = []

    def fail(ids: torch.Tensor, _starts: torch.Tensor) -> torch.Tensor:
        device.later(made._computing, lambda: seen.append(ids.tolist()))  # type: ignore[arg-type]
        raise ValueError("no such token")

    for number in range(2 * LANES):
        with pytest.raises(ValueError, match="no such token"):
            made.run(batch(number), fail)
        one = batch(number + 50)
        np.testing.assert_array_equal(made.run(one, right), expected(one))
    assert seen == [batch(number).ids.tolist() for number in range(2 * LANES)]


def test_of_a_lost_device_the_first_error_is_told(make: Callable[[int], tuple[CudaLanes, Device]]) -> None:
    made, device = make(0)

    def fail(*_: torch.Tensor) -> torch.Tensor:
        device.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for _ in range(LANES + 1):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            made.run(batch(0), fail)
