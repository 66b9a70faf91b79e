"""FAISS: a flat index, which compares with every vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from embedstream.dataset.values import Vectors
from embedstream.outputs import Output
from embedstream_producer.exporting.index_files import IndexFiles
from embedstream_producer.exporting.rows import Source


class FaissFile(IndexFiles):
    """By inner product, or of bits by their Hamming distance."""

    errors = (RuntimeError, OSError, pa.ArrowException)

    def __init__(self, place: str, source: Source) -> None:
        super().__init__(place, source, _Flat(source.output))


class _Flat:
    def __init__(self, output: Output) -> None:
        self._binary = output.dtype == "ubinary"
        self._index: Any
        if self._binary:
            self._index = faiss.IndexBinaryFlat(output.dim)
        elif output.dtype == "float16":
            half = faiss.ScalarQuantizer.QT_fp16
            self._index = faiss.IndexScalarQuantizer(output.dim, half, faiss.METRIC_INNER_PRODUCT)
        else:
            self._index = faiss.IndexFlatIP(output.dim)

    def add(self, vectors: Vectors) -> None:
        if self._binary:
            self._index.add(np.ascontiguousarray(vectors))
            return
        floats = np.ascontiguousarray(vectors, dtype=np.float32)
        # So that the inner product is the cosine; rounded vectors have other lengths, whatever the model does.
        self._index.add(floats / np.maximum(np.linalg.norm(floats, axis=1, keepdims=True), np.finfo(np.float32).tiny))

    def save(self, path: Path) -> None:
        (faiss.write_index_binary if self._binary else faiss.write_index)(self._index, str(path))
