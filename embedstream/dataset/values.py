"""Results of a model as numbers, and as columns of a dataset. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.dataset.schema import output_fields
from embedstream.outputs import WIDEST_RANGE, Dtype, Output

Matrix = npt.NDArray[np.float32]
"""[n, width]: vectors, the scores of all labels, or one score."""

Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint8]
"""Of a dense output, as its column holds them: see `stored_vectors`."""


@dataclass(frozen=True)
class Ragged:
    """Numbers of n texts, flat, each text's behind those of the one before."""

    counts: npt.NDArray[np.int64]  # [n]: tokens of a text
    values: npt.NDArray[np.float32]  # [total] weights, or [total, dim] vectors
    indices: npt.NDArray[np.uint32] | None = None  # [total]: which token of the vocabulary a weight is of

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where texts begin, [n + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    def any_of(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Of which texts any number is in the mask [total]: [n]."""
        rows = np.repeat(np.arange(len(self)), self.counts)
        return np.bincount(rows[mask], minlength=len(self)).astype(np.bool_)

    def where(self, mask: npt.NDArray[np.bool_]) -> Ragged:
        """The numbers in the mask [total] alone."""
        rows = np.repeat(np.arange(len(self)), self.counts)[mask]
        counts = np.bincount(rows, minlength=len(self)).astype(np.int64)
        return Ragged(counts, self.values[mask], None if self.indices is None else self.indices[mask])

    def take(self, rows: npt.NDArray[np.int64]) -> Ragged:
        """These texts, in this order."""
        counts = self.counts[rows]
        ends = np.cumsum(counts)
        chosen = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(self.offsets[rows] - (ends - counts), counts)
        return Ragged(counts, self.values[chosen], None if self.indices is None else self.indices[chosen])


Values = Matrix | Ragged
"""Of n texts, by kind: a matrix for dense, score and labels; ragged for sparse and multivector."""


class Results(TypedDict, total=False):
    """What a model gives for n texts, by kind of output."""

    dense: Matrix  # [n, dim]
    sparse: Ragged
    multivector: Ragged
    score: Matrix  # [n, 1]
    labels: Matrix  # [n, labels]: the score of each


_NUMPY: dict[Dtype, Any] = {"float32": np.float32, "float16": np.float16}


def to_columns(output: Output, values: Values) -> list[pa.Array[Any]]:
    """The output's columns (see `output_fields`) of what the model gave for n texts.

    A dense vector is cut to the output's dimensions, and has length 1 again if the model normalizes, as
    sentence-transformers' `truncate_dim` does; then its numbers are rounded as its `quantize_embeddings` does, for int8
    by the output's ranges.
    """
    types: list[Any] = [field.type for field in output_fields(output)]
    if isinstance(values, Ragged):
        with np.errstate(over="ignore"):  # infinity, to be found
            numbers = values.values.astype(_NUMPY[output.dtype], copy=False)
        if values.indices is None:
            return [_lists(values, _vectors(numbers, types[0].value_type), types[0])]
        indices = values.indices
        if not numbers.all():  # rounded to 0, they are none
            kept = numbers != 0
            values, indices, numbers = values.where(kept), indices[kept], numbers[kept]
        fields = [types[0].field(name) for name in ("indices", "values")]
        halves = (pa.array(indices), pa.array(numbers))
        lists = [_lists(values, half, field.type) for half, field in zip(halves, fields, strict=True)]
        return [pa.StructArray.from_arrays(lists, fields=fields)]
    match output.kind:
        case "dense":
            vectors = cut(values, output)
            if output.dtype == "ubinary":
                bits = pa.py_buffer(np.packbits(vectors > 0, axis=1).tobytes())
                return [pa.Array.from_buffers(types[0], len(vectors), [None, bits])]
            if output.dtype == "int8":
                return [_vectors(quantized(vectors, output), types[0])]
            with np.errstate(over="ignore"):
                return [_vectors(vectors.astype(_NUMPY[output.dtype], copy=False), types[0])]
        case "score":
            return [pa.array(values[:, 0], pa.float32())]
        case _:
            best = values.argmax(axis=1) if len(values) else np.zeros(0, np.int64)
            names = pa.array(output.labels, pa.string()).take(pa.array(best))
            return [names, pa.array(values[np.arange(len(values)), best], pa.float32()), _vectors(values, types[2])]


def cut(vectors: Matrix, output: Output) -> Matrix:
    """Vectors [n, any] with the first `output.dim` dimensions, of length 1 if the model normalizes."""
    if vectors.shape[1] <= output.dim:
        return vectors
    vectors = vectors[:, : output.dim]
    if not output.normalized:
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    shorter: Matrix = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return shorter


def quantized(vectors: Matrix, output: Output) -> npt.NDArray[np.int8]:
    """Vectors [n, dim] in int8 by the output's ranges, as sentence-transformers' `quantize_embeddings` has it."""
    lows, steps = _steps(output)
    with np.errstate(over="ignore"):  # what is far beyond a range is clipped, too
        places = np.clip(np.floor((vectors - lows) / steps), 0, 255)
    numbers: npt.NDArray[np.int8] = (places - 128).astype(np.int8)
    return numbers


def ranges_of(vectors: Iterable[Matrix]) -> bytes:
    """`Output.ranges` from the least to the greatest number of each dimension of vectors, each [some, dim]."""
    lows, highs = zip(*((some.min(axis=0), some.max(axis=0)) for some in vectors if len(some)), strict=True)
    ranges = np.stack([np.min(lows, axis=0), np.max(highs, axis=0)])
    bounded: npt.NDArray[np.float32] = np.clip(ranges, -WIDEST_RANGE / 2, WIDEST_RANGE / 2).astype("<f4")
    return bounded.tobytes()


def _steps(output: Output) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What -128 stands for, and how far the next number is, [dim] each."""
    lows, highs = np.frombuffer(output.ranges, "<f4").reshape(2, output.dim)
    steps = (highs - lows) / 255
    return lows, np.where(steps == 0, np.float32(1), steps)


def from_columns(output: Output, batch: pa.RecordBatch, middle: bool = False) -> Values:
    """What the output's columns hold, as `to_columns` was given it, within its dtype; int8 as the lower end of its
    step, as sentence-transformers has it, or as its middle, which is rounded to the same number; ubinary as 1 and -1.

    Not of rows that are `uneven`.
    """
    column: Any = batch.column(output.columns[0])
    if output.dtype == "ubinary":
        return np.unpackbits(_bytes(column), axis=1).astype(np.float32) * 2 - 1
    match output.kind:
        case "dense" if output.dtype == "int8":
            lows, steps = _steps(output)
            numbers = _matrix(column, output.dim)  # of our own, as they were converted
            numbers += 128.5 if middle else 128
            numbers *= steps
            numbers += lows
            return numbers
        case "dense":
            return _matrix(column, output.dim)
        case "sparse":
            indices, values = column.field("indices"), column.field("values")
            counts = np.diff(values.offsets.to_numpy()).astype(np.int64)
            return Ragged(counts, _floats(values.flatten()), indices.flatten().to_numpy())
        case "multivector":
            counts = np.diff(column.offsets.to_numpy()).astype(np.int64)
            return Ragged(counts, _matrix(column.flatten(), output.dim))
        case "score":
            return _floats(column).reshape(-1, 1)
        case "labels":
            return _matrix(batch.column(output.columns[2]), output.dim)


def stored_vectors(output: Output, batch: pa.RecordBatch) -> Vectors:
    """Dense vectors [n, dim] as nearly as another store can hold them: float32 or float16 as they lie there; ubinary as
    bytes, uint8[n, dim / 8]; int8 as `from_columns` has it, as no other store knows the ranges."""
    column: Any = batch.column(output.name)
    if output.dtype == "ubinary":
        return _bytes(column)
    if output.dtype == "float16":
        return np.asarray(column.flatten().to_numpy()).reshape(len(column), output.dim)
    vectors = from_columns(output, batch)
    assert not isinstance(vectors, Ragged), "dense"
    return vectors


def uneven(output: Output, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Which rows [n] of a sparse output have more or fewer indices than weights, so that they cannot be read."""
    if output.kind != "sparse":
        return np.zeros(batch.num_rows, np.bool_)
    column: Any = batch.column(output.name)
    indices, values = (np.diff(column.field(name).offsets.to_numpy()) for name in ("indices", "values"))
    differ: npt.NDArray[np.bool_] = indices != values
    return differ


def _bytes(column: Any) -> npt.NDArray[np.uint8]:
    """Of a column of fixed-size binary, [n, width]."""
    width = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :]
    return flat[: len(column) * width].reshape(len(column), -1)


def _lists(values: Ragged, items: Any, type: Any) -> pa.Array[Any]:
    offsets: Any = pa.array(values.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, items, type=type)


def _vectors(numbers: npt.NDArray[Any], type: Any) -> pa.Array[Any]:
    flat = pa.array(np.ascontiguousarray(numbers).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=type)


def _matrix(column: Any, dim: int) -> Matrix:
    return _floats(column.flatten()).reshape(len(column), dim)


def _floats(column: Any) -> Matrix:
    numbers: Matrix = column.to_numpy().astype(np.float32, copy=False)
    return numbers
