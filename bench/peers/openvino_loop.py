"""A bare loop over embedstream's own OpenVINO engine, without Redis, stages or files. Arguments: model, texts.

It runs in the project's environment. Texts are tokenized at once and sorted over the whole corpus; batches run in as
many threads as the engine wants in flight.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from peers.protocol import serve

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine


class Loop:
    """Settings: `dtype`, `tokens` in a batch (null: the engine's choice)."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.tokens = self.computed = 0
        self.model_seconds = 0.0

    def configure(self, settings: dict[str, Any]) -> None:
        self._engine = load_engine(EngineOptions(self._model, engine="openvino", dtype=settings["dtype"]))
        self._budget = settings["tokens"] or self._engine.info.batch_tokens
        self._engine.warm_up(self._budget)
        self._tokenizer = self._engine.tokenizer()

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        tokens = self._tokenizer.encode(texts, self._engine.info.max_length)
        lengths = tokens.lengths
        batches = cut_batches(lengths, self._budget, padded=True)
        vectors = np.empty((len(texts), self._engine.info.outputs["dense"].dim), np.float32)

        def run(rows: np.ndarray[Any, Any]) -> None:
            vectors[rows] = self._engine.run(gather_batch(tokens, rows, 0, "document"))["dense"]

        begun = time.perf_counter()
        with ThreadPoolExecutor(self._engine.in_flight) as pool:
            list(pool.map(run, batches))
        self.model_seconds = time.perf_counter() - begun
        self.tokens += int(lengths.sum())
        self.computed += sum(int(lengths[rows].max()) * len(rows) for rows in batches)
        return vectors


logging.basicConfig(level=logging.INFO, stream=sys.stderr)
serve(Loop(sys.argv[1]))
