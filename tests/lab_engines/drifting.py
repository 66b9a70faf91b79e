"""The hashing engine, but a text's vector is another one each time that it is computed: a vector that is the same as
before was taken over."""

from __future__ import annotations

import numpy as np

from embedstream_worker.engines import EngineOptions
from embedstream_worker.engines.base import Results, TokenBatch
from embedstream_worker.engines.hashing import HashingEngine


def load(_options: EngineOptions) -> DriftingHashingEngine:
    """The entry point."""
    return DriftingHashingEngine()


class DriftingHashingEngine(HashingEngine):
    """Vectors of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self._dice = np.random.default_rng()

    def run(self, batch: TokenBatch) -> Results:
        results = super().run(batch)
        vectors = results["dense"] + self._dice.standard_normal(results["dense"].shape).astype(np.float32) / 100
        return {"dense": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}
