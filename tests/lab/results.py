"""What a model might have given, of every kind."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedstream.dataset.values import Matrix, Ragged, Values
from embedstream.outputs import Kind, Output

EDGES = [-0.75] * 16 + [0.75] * 16
"""Of the column in int8: a number may lie beyond."""

EVERY_KIND = (
    Output(name="embedding", kind="dense", dtype="float32", dim=16, normalized=True),
    Output(name="half", kind="dense", dtype="float16", dim=16, normalized=True),
    Output(name="short", kind="dense", dtype="float32", dim=8, normalized=True),
    Output(name="small", kind="dense", dtype="int8", dim=16, normalized=True, ranges=struct.pack("<32f", *EDGES)),
    Output(name="bits", kind="dense", dtype="ubinary", dim=16),
    Output(name="sparse", kind="sparse", dtype="float32", dim=100),
    Output(name="multivector", kind="multivector", dtype="float16", dim=4, normalized=True),
    Output(name="score", kind="score", dtype="float32", dim=1),
    Output(name="topic", kind="labels", dtype="float32", dim=3, labels=("art", "law", "sport")),
)


def some_results(kinds: Sequence[Kind], rows: int, seed: int = 0) -> dict[Kind, Values]:
    """Results of so many texts, as they fit `EVERY_KIND`."""
    dice = np.random.default_rng(seed)
    made: dict[Kind, Values] = {}
    for kind in kinds:
        counts = dice.integers(1, 6, rows)
        total = int(counts.sum())
        match kind:
            case "dense":
                made[kind] = _unit(dice.standard_normal((rows, 16)))
            case "sparse":
                indices = [np.sort(dice.choice(100, count, replace=False)) for count in counts]
                weights = dice.uniform(0.1, 3, total).astype(np.float32)
                made[kind] = Ragged(counts, weights, np.concatenate([np.zeros(0), *indices]).astype(np.uint32))
            case "multivector":
                made[kind] = Ragged(counts, _unit(dice.standard_normal((total, 4))))
            case "score":
                made[kind] = dice.standard_normal((rows, 1)).astype(np.float32)
            case "labels":
                made[kind] = dice.uniform(0, 1, (rows, 3)).astype(np.float32)
    return made


def _unit(vectors: npt.NDArray[np.float64]) -> Matrix:
    unit: Matrix = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit
