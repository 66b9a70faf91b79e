"""From the arrays that a model gives for a padded batch to results of each kind. Needs no model library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedstream.dataset.values import Ragged, Values
from embedstream.outputs import Kind

ARRAYS: dict[Kind, int] = {"dense": 1, "sparse": 3, "multivector": 2, "score": 1, "labels": 1}
"""How many there are of each kind."""


def results_of(kind: Kind, arrays: Sequence[npt.NDArray[Any]], rows: int) -> Values:
    """Of n texts, the caller's own.

    `arrays`, by kind:
        dense, score, labels: numbers [n, width];
        multivector: vectors [n, longest, dim], and which of them count [n, longest];
        sparse: of each weight its text, its token in the vocabulary, and itself, [any] each. Of several for the same
        token of a text the greatest counts.
    """
    match kind:
        case "multivector":
            vectors, mask = arrays
            kept = mask.astype(np.bool_)
            return Ragged(kept.sum(axis=1, dtype=np.int64), vectors[kept].astype(np.float32, copy=False))
        case "sparse":
            texts, tokens, weights = arrays
            return _greatest(texts, tokens, weights, rows)
        case _:
            matrix: npt.NDArray[np.float32] = arrays[0].astype(np.float32)
            return matrix


def _greatest(texts: npt.NDArray[Any], tokens: npt.NDArray[Any], weights: npt.NDArray[Any], rows: int) -> Ragged:
    places = texts.astype(np.int64) << 32 | tokens.astype(np.int64)
    weights = weights.astype(np.float32)
    if len(places) and not (np.diff(places) > 0).all():
        order = np.argsort(places, kind="stable")
        places, weights = places[order], weights[order]
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        places, weights = places[starts], np.maximum.reduceat(weights, starts)
    counts = np.bincount(places >> 32, minlength=rows).astype(np.int64)
    return Ragged(counts, weights, (places & 0xFFFFFFFF).astype(np.uint32))
