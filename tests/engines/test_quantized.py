"""Dense vectors in other dtypes are those that sentence-transformers makes of the same vectors, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sentence_transformers.util.quantization import _dequantize_embeddings, quantize_embeddings

from embedstream.dataset.values import Matrix, from_columns, quantized, ranges_of, to_columns
from embedstream.outputs import Output


@pytest.fixture(scope="module")
def vectors() -> Matrix:
    """One dimension is the same for all texts, and one nearly."""
    dice = np.random.default_rng(13)
    made = dice.standard_normal((2000, 48)).astype(np.float32)
    made[:, 3], made[:, 4] = 0.25, 0.25 + 1e-9 * made[:, 4]
    unit: Matrix = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit


@pytest.mark.holds("Right")
@pytest.mark.parametrize("rows", [2, 100, 2000])
def test_int8_by_the_ranges_of_some_rows(vectors: Matrix, rows: int) -> None:
    output = Output(name="small", kind="dense", dtype="int8", dim=48, ranges=ranges_of([vectors[:rows]]))
    ranges: Any = np.frombuffer(output.ranges, "<f4").reshape(2, 48)
    theirs: Any = quantize_embeddings(vectors, "int8", ranges=ranges)
    np.testing.assert_array_equal(quantized(vectors, output), theirs)
    np.testing.assert_array_equal(theirs[:rows], quantize_embeddings(vectors[:rows], "int8"))
    batch: Any = {"small": to_columns(output, vectors)[0]}
    read: Any = from_columns(output, pa.RecordBatch.from_pydict(batch))
    np.testing.assert_allclose(read, _dequantize_embeddings(theirs, "int8", ranges), rtol=0, atol=1e-6)


@pytest.mark.holds("Right")
def test_ubinary(vectors: Matrix) -> None:
    output = Output(name="bits", kind="dense", dtype="ubinary", dim=48)
    [column] = to_columns(output, vectors)
    rows: list[Any] = column.to_pylist()
    packed = np.stack([np.frombuffer(row, np.uint8) for row in rows])
    np.testing.assert_array_equal(packed, quantize_embeddings(vectors, "ubinary"))
