"""How many of the nearest rows an approximate target finds: asked of rows of the dataset, against exact search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedstream.dataset.values import Matrix, Vectors
from embedstream_producer.exporting.rows import Key, Source

QUERIES = 100
K = 10

EQUAL = 1e-6
"""Cosines that differ less are equally near: which of such rows a target finds is its own affair."""


class Sample:
    """Rows that are asked about, spread evenly over a dataset; taken while it passes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._step = max(1, -(-source.rows // QUERIES))
        self._passed = 0
        self._taken: list[pa.RecordBatch] = []

    def see(self, batch: pa.RecordBatch) -> None:
        """The next rows."""
        first = -self._passed % self._step
        chosen = np.arange(first, batch.num_rows, self._step)
        self._passed += batch.num_rows
        if len(chosen):
            self._taken.append(batch.take(chosen))

    def __len__(self) -> int:
        return sum(some.num_rows for some in self._taken)

    @property
    def vectors(self) -> Vectors:
        """As targets hold them."""
        found: Vectors = np.concatenate([self._source.split(some).vectors for some in self._taken])
        return found

    @property
    def floats(self) -> Matrix:
        return np.concatenate([self._source.floats(some) for some in self._taken])


def recall(source: Source, sample: Sample, found: Sequence[Sequence[Key]], batches: Iterator[pa.RecordBatch]) -> float:
    """Of the `K` rows nearest to each row of the sample, by the cosine: how many a target found, from 0 to 1.

    A row that is as near as the last of them counts, too. `batches`: all rows of the source.
    """
    queries = _unit(sample.floats)
    asked: dict[Key, list[int]] = {}
    for query, keys in enumerate(found):
        for key in dict.fromkeys(keys):
            asked.setdefault(key, []).append(query)
    ids = pa.array(sorted({id for id, _ in asked}), pa.string())
    best = np.full((len(queries), K), -np.inf, np.float32)
    scores: list[list[float]] = [[] for _ in queries]
    for batch in batches:
        products = queries @ _unit(source.floats(batch)).T
        best = np.partition(np.concatenate([best, products], axis=1), -K, axis=1)[:, -K:]
        for row in np.flatnonzero(np.asarray(pc.is_in(batch.column("id"), ids))).tolist():
            key = batch.column("id")[row].as_py(), batch.column("chunk")[row].as_py()
            for query in asked.get(key, ()):
                scores[query].append(float(products[query, row]))
    there = np.isfinite(best).sum(axis=1)
    least = [row[np.isfinite(row)].min() - EQUAL for row in best]
    hits = [min(int(n), sum(s >= lowest for s in own)) for n, lowest, own in zip(there, least, scores, strict=True)]
    return float(sum(hits) / there.sum())


def _unit(vectors: Matrix) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    return unit
