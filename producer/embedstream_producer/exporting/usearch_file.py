"""USearch: a graph (HNSW) in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from usearch.index import BatchMatches, Index

from embedstream.dataset.values import Vectors
from embedstream.outputs import Dtype, Output
from embedstream_producer.exporting.index_files import IndexFiles
from embedstream_producer.exporting.rows import Key, Source

KINDS: dict[Dtype, str] = {"float32": "f32", "float16": "f16", "int8": "f32", "ubinary": "b1"}


class UsearchFile(IndexFiles):
    """By the cosine, or of bits by their Hamming distance."""

    errors = (RuntimeError, ValueError, OSError, pa.ArrowException)

    def __init__(self, place: str, source: Source) -> None:
        self._graph = _Graph(source.output)
        super().__init__(place, source, self._graph)

    def search(self, queries: Vectors, k: int) -> list[list[Key]]:
        numbers = self._graph.search(queries, k)
        keys = self.keys(np.concatenate(numbers))
        return [[keys[number] for number in some.tolist()] for some in numbers]


class _Graph:
    def __init__(self, output: Output) -> None:
        metric = "hamming" if output.dtype == "ubinary" else "cos"
        self._index: Any = Index(ndim=output.dim, metric=metric, dtype=KINDS[output.dtype])

    def add(self, vectors: Vectors) -> None:
        first = len(self._index)
        self._index.add(np.arange(first, first + len(vectors)), np.ascontiguousarray(vectors))

    def search(self, queries: Vectors, k: int) -> list[Any]:
        found = self._index.search(np.ascontiguousarray(queries), k)
        if not isinstance(found, BatchMatches):  # of one query
            return [found.keys.astype(np.int64)]
        return [keys[:count].astype(np.int64) for keys, count in zip(found.keys, found.counts, strict=True)]

    def save(self, path: Path) -> None:
        self._index.save(str(path))
