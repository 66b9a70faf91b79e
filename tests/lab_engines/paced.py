"""The hashing engine at the speed of a device: a fixed time per token, slept away. For measuring how a fleet scales.

PACED_ENGINE_TOKENS_PER_SECOND says how many tokens a second the device computes. The vectors are the hashing engine's.
"""

from __future__ import annotations

import os
import time

from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.base import Results, TokenBatch
from embedstream_worker.engines.hashing import HashingEngine


def load(_options: EngineOptions) -> PacedHashingEngine:
    """The entry point."""
    return PacedHashingEngine(float(os.environ["PACED_ENGINE_TOKENS_PER_SECOND"]))


class PacedHashingEngine(HashingEngine):
    """A batch of n tokens takes n / tokens_per_second seconds, what the vectors themselves take included."""

    def __init__(self, tokens_per_second: float, dim: int = 384) -> None:
        super().__init__(dim)
        self._tokens_per_second = tokens_per_second

    def run(self, batch: TokenBatch) -> Results:
        ends = time.monotonic() + len(batch.ids) / self._tokens_per_second
        vectors = super().run(batch)
        time.sleep(max(0.0, ends - time.monotonic()))
        return vectors
