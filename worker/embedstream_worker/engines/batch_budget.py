"""How many tokens a batch on a GPU should have: from what batches of growing size take there in time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from embedstream_worker.engines.base import OutOfMemory

SMALLEST = 8_192
MOST = 262_144
"""Beyond it no model gains, and interactive requests wait for a whole batch."""

_WORTHWHILE = 1.03  # twice the tokens for less gain than this is only longer to wait for
_MEMORY_SHARE = 0.7  # of what is free: texts to come may be longer, and the allocator loses some between its blocks
_ROUNDS = 2
_BATCHES_EACH = 2  # for each place under way, so that the first and the last, which nothing hides, count less


@dataclass(frozen=True)
class Probe:
    """What a full batch of some size took."""

    seconds: float
    peak_bytes: int


def seconds_a_batch(run: Callable[[], object], at_once: int) -> float:
    """What a batch takes when as many are under way as the worker keeps there: launching one hides behind another.

    Raises what `run` raises.
    """
    count = _BATCHES_EACH * at_once
    seconds = []
    with ThreadPoolExecutor(at_once) as pool:
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            for done in [pool.submit(run) for _ in range(count)]:
                done.result()
            seconds.append((time.perf_counter() - begun) / count)
    return min(seconds)


def find_budget(probe: Callable[[int], Probe], free_bytes: int) -> int:
    """The smallest budget, `SMALLEST` times a power of two, that is nearly as fast as any, and fits.

    `probe(tokens)` runs full batches of that many tokens; it is not called with sizes that the one before shows not
    to fit into `free_bytes` (memory grows with the tokens).
    """
    budget, rate, tokens = SMALLEST, 0.0, SMALLEST
    while tokens <= MOST:
        try:
            taken = probe(tokens)
        except OutOfMemory:
            break
        if taken.peak_bytes > free_bytes * _MEMORY_SHARE:
            break
        now = tokens / taken.seconds
        if now < rate * _WORTHWHILE:
            break
        budget, rate = tokens, now
        if 2 * taken.peak_bytes > free_bytes * _MEMORY_SHARE:
            break
        tokens *= 2
    return budget
