"""From texts to vectors as the worker goes, and as sentence-transformers does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.base import Engine, Role

Vectors = npt.NDArray[np.float32]

MODEL_VARIABLE = "EMBEDSTREAM_TEST_MODEL"

MINILM = os.environ.get(MODEL_VARIABLE, "sentence-transformers/all-MiniLM-L6-v2")
"""The real model: of an installed package, or a folder with all of it."""


def load_reference(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def embed(
    engine: Engine,
    texts: list[str],
    role: Role = "document",
    prompt: str | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    budget: int = 2048,
) -> Vectors:
    """The worker's way, in one place."""
    limit = max_length or engine.info.max_length
    chosen = engine.prompt(role, prompt, prompt_name)
    tokenizer = engine.tokenizer()
    tokens = tokenizer.encode([chosen + text for text in texts], limit)
    prompt_length = tokenizer.prompt_length(chosen, limit)
    vectors = np.full((len(texts), engine.info.outputs["dense"].dim), np.nan, np.float32)
    for rows in cut_batches(tokens.lengths, budget, engine.info.padded):
        vectors[rows] = engine.run(gather_batch(tokens, rows, prompt_length, role))["dense"]
    return vectors


def lowest_cosine(ours: Vectors, theirs: Vectors) -> float:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())
