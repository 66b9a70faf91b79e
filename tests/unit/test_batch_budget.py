"""How large a GPU's batches become, from probes that are made up."""

from __future__ import annotations

import threading

import pytest

from embedstream_worker.engines.base import OutOfMemory
from embedstream_worker.engines.batch_budget import MOST, SMALLEST, Probe, find_budget, seconds_a_batch

GIB = 1 << 30


class Device:
    """Takes `overhead` and a time for each token; memory by the token."""

    def __init__(self, overhead: float, bytes_per_token: int = 1, refuses: int | None = None) -> None:
        self.asked: list[int] = []
        self._overhead, self._bytes, self._refuses = overhead, bytes_per_token, refuses

    def __call__(self, tokens: int) -> Probe:
        self.asked.append(tokens)
        if self._refuses is not None and tokens >= self._refuses:
            raise OutOfMemory("full")
        return Probe(self._overhead + tokens * 1e-6, tokens * self._bytes)


def test_batches_grow_while_that_pays() -> None:
    assert find_budget(Device(overhead=10.0), GIB) == MOST
    assert find_budget(Device(overhead=0.0), GIB) == SMALLEST
    middle = find_budget(Device(overhead=1e-3), GIB)
    assert SMALLEST < middle < MOST


def test_no_batch_is_tried_that_cannot_fit() -> None:
    device = Device(overhead=10.0, bytes_per_token=10_000)
    budget = find_budget(device, GIB)
    assert budget == 65_536  # 0.65 GB of 1.07; twice as much is more than there is
    assert max(device.asked) == budget


def test_memory_that_runs_out_ends_the_search_at_what_worked() -> None:
    assert find_budget(Device(overhead=10.0, refuses=4 * SMALLEST), GIB) == 2 * SMALLEST
    assert find_budget(Device(overhead=10.0, refuses=SMALLEST), GIB) == SMALLEST


def test_a_margin_of_memory_stays_free() -> None:
    device = Device(overhead=10.0, bytes_per_token=1)
    assert find_budget(device, SMALLEST * 2) == SMALLEST  # twice as much would take all


def test_batches_are_timed_with_as_many_under_way_as_the_worker_has() -> None:
    together = threading.Barrier(3)
    assert seconds_a_batch(lambda: together.wait(10), at_once=3) > 0  # a batch alone would wait in vain


def test_a_timed_batch_that_does_not_fit_says_so() -> None:
    def run() -> None:
        raise OutOfMemory("full")

    with pytest.raises(OutOfMemory, match="full"):
        seconds_a_batch(run, at_once=2)
