"""The stage `real`: a real model's vectors, every way that it can run here, against those in float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.base import Tokens
from embedstream_worker.engines.torch_engine import TorchEngine
from gpu_stages import material
from gpu_stages.context import Bench
from gpu_stages.measuring import start_engine

LOWEST_COSINE = 0.999
_BUDGET = 16_384
_ALONE = 40  # texts that are also embedded alone

Vectors = npt.NDArray[np.float32]


def compare(bench: Bench) -> None:
    """Packed, padded and compiled: the lowest cosine, and that of texts alone to themselves in a batch."""
    folder = material.minilm(bench)
    texts, references = material.reference_vectors(bench)
    for form, padded, compiles in (("packed", False, False), ("padded", True, False), ("compiled", False, True)):
        if not (padded or bench.packs):
            continue
        with bench.part(form):
            started = start_engine(bench, folder, padded=padded, compiles=compiles)
            engine = started.engine
            tokens = engine.tokenizer().encode(texts, engine.info.max_length)
            together = _embed(engine, tokens, _BUDGET)
            alone = _embed(engine, engine.tokenizer().encode(texts[:_ALONE], engine.info.max_length), 1)
            cosines = _cosines(together, references)
            bench.note(
                form,
                texts=len(texts),
                lowest_cosine=round(float(cosines.min()), 6),
                mean_cosine=round(float(cosines.mean()), 6),
                alone_and_together=round(float(_cosines(alone, together[:_ALONE]).min()), 6),
                **started.figures,
            )
            if not cosines.min() >= LOWEST_COSINE:
                raise ArithmeticError(f"lowest cosine {cosines.min():.6f}, below {LOWEST_COSINE}")
            engine.close()


def _embed(engine: TorchEngine, tokens: Tokens, budget: int) -> Vectors:
    vectors = np.full((len(tokens.lengths), engine.info.outputs["dense"].dim), np.nan, np.float32)
    for rows in cut_batches(tokens.lengths, budget, engine.info.padded):
        vectors[rows] = engine.run(gather_batch(tokens, rows, 0, "document"))["dense"]
    return vectors


def _cosines(ours: Vectors, theirs: Vectors) -> Vectors:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines: Vectors = (ours * theirs).sum(axis=1) / norms
    return cosines
