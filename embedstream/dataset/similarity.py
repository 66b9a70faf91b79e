"""How near results of texts are to those of a query, as sentence-transformers' `similarity` has it. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedstream.dataset.values import Matrix, Ragged, Values, cut
from embedstream.outputs import Output

Scores = npt.NDArray[np.float32]

_AT_ONCE = 4 * 1024 * 1024
"""Products of a text's and a query's tokens that are held at once."""


def similarity(output: Output, query: Values, found: Values) -> Scores:
    """Of n texts to one query, [n].

    As the output's `similarity` says, or else: dense: the cosine, by the first dimensions of a query that has more.
    sparse: the dot product; 0 without a common token. multivector: MaxSim, the sum over the query's tokens of the
    greatest dot product with one of the text's; of a text without tokens -inf.
    """
    if not isinstance(query, Ragged):
        assert not isinstance(found, Ragged)
        return _dense(output, cut(query, output)[0], found)
    assert isinstance(found, Ragged)
    if found.indices is None:
        scores = _maxsim(query.values, found)
        return scores / np.float32(max(1, len(query.values))) if output.similarity == "meanmaxsim" else scores
    scores = _dot(query, found)
    if output.similarity != "cosine":
        return scores
    rows = np.repeat(np.arange(len(found)), found.counts)
    squares = np.bincount(rows, weights=found.values.astype(np.float64) ** 2, minlength=len(found))
    lengths = np.sqrt(squares) * np.linalg.norm(query.values)
    cosines: Scores = (scores / np.maximum(lengths, 1e-30)).astype(np.float32)
    return cosines


def _dense(output: Output, query: Scores, vectors: Matrix) -> Scores:
    scores: Scores
    match output.similarity:
        case "dot":
            scores = vectors @ query
        case "euclidean":
            scores = -np.linalg.norm(vectors - query, axis=1)
        case "manhattan":
            scores = -np.abs(vectors - query).sum(axis=1)
        case _:
            scores = _cosine(query, vectors, output.normalized and output.dtype == "float32")
    return scores


def _cosine(query: Scores, vectors: Matrix, normalized: bool) -> Scores:
    scores: Scores = vectors @ (query / max(float(np.linalg.norm(query)), 1e-30))
    return scores if normalized else scores / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)


def _dot(query: Ragged, found: Ragged) -> Scores:
    assert query.indices is not None
    assert found.indices is not None
    weights = np.zeros(int(query.indices.max(initial=0)) + 2, np.float32)  # and 0 for all tokens beyond
    weights[query.indices] = query.values
    products = weights[np.minimum(found.indices, len(weights) - 1)] * found.values
    scores = np.zeros(len(found), np.float32)
    some = found.counts > 0
    if some.any():
        scores[some] = np.add.reduceat(products, found.offsets[:-1][some], dtype=np.float64)
    return scores


def _maxsim(query: Matrix, found: Ragged) -> Scores:
    scores = np.full(len(found), -np.inf, np.float32)
    some = found.counts > 0
    starts = found.offsets[:-1][some]
    if not len(starts):
        return scores
    step = max(1, _AT_ONCE // len(found.values))
    sums = np.zeros(len(starts), np.float32)
    for first in range(0, len(query), step):
        products = found.values @ query[first : first + step].T
        sums += np.maximum.reduceat(products, starts, axis=0).sum(axis=1)
    scores[some] = sums
    return scores
