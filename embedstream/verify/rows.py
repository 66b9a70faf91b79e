"""Checks of many rows at once: what their vectors are, and numbers by which rows are compared. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedstream.dataset.input_hash import text_digests
from embedstream.dataset.values import Ragged, Values, from_columns, to_columns, uneven
from embedstream.jobs import JobSpec
from embedstream.outputs import Kind as OutputKind
from embedstream.outputs import Output
from embedstream.queue.kept import typed
from embedstream.verify.findings import Findings, Kind
from embedstream.verify.places import Mask

NORM_TOLERANCE = 1e-3
"""How far from 1 the length of a normalized vector may be; float32 gives 1e-6, this allows for bfloat16."""

WORDS = {
    Kind.PLACE: "is at a place that no corpus has",
    Kind.DOUBLED: "comes a second time",
    Kind.IN_BOTH: "is in the dataset and in its errors",
    Kind.NOT_FINITE: "its vector holds NaN or infinity",
    Kind.ZERO: "its vector is all zeros",
    Kind.NORM: "the length of its vector is not 1, and the model normalizes",
    Kind.VALUES: "its results are none that the model gives",
    Kind.OTHER_TEXT: "its text is not the one that its input_hash was made of",
}


class Located:
    """A batch of a file's rows, for saying which of them are bad."""

    def __init__(self, findings: Findings, file: str, start: int, batch: pa.RecordBatch) -> None:
        """`start`: where in the file the batch begins."""
        self._findings = findings
        self._file = file
        self._start = start
        self._batch = batch

    def add(self, kind: Kind, bad: Mask) -> None:
        """Count the rows in the mask [n]; the first of a kind are told."""
        if not bad.any():
            return
        rows = np.flatnonzero(bad)
        told = rows[: max(0, self._findings.room(kind))]
        for at in told:
            part, row, chunk, id = (
                self._batch.column(name)[int(at)].as_py() for name in ("part", "row", "chunk", "id")
            )
            piece = f" chunk {chunk}" if chunk else ""
            message = f"part {part} row {row}{piece}: {WORDS[kind]}"
            self._findings.add(kind, message, self._file, self._start + int(at), id)
        self._findings.count(kind, len(rows) - len(told))


def bad_vectors(vectors: npt.NDArray[np.float32], normalized: bool) -> dict[Kind, Mask]:
    """What is wrong with vectors [n, dim], by kind a mask [n]."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
        not_finite, zero = ~np.isfinite(squares), squares == 0
        # Squares overflow and vanish before numbers do: the few such rows are looked at again.
        not_finite[not_finite] = ~np.isfinite(vectors[not_finite]).all(axis=1)
        zero[zero] = ~vectors[zero].any(axis=1)
        far = ~(np.abs(np.sqrt(squares) - 1) <= NORM_TOLERANCE) if normalized else np.zeros(len(squares), np.bool_)
    return {Kind.NOT_FINITE: not_finite, Kind.ZERO: zero, Kind.NORM: far & ~not_finite & ~zero}


def bad_values(
    kind: OutputKind, values: Values, normalized: bool = False, dim: int = 0, alone: bool = True
) -> dict[Kind, Mask]:
    """What is wrong with results of n texts, by kind of fault a mask [n].

    `dim`: of `Output`. `alone`: there is no other output, so that a sparse vector without weights says nothing at all.
    """
    if not isinstance(values, Ragged):
        if kind == "dense":
            return bad_vectors(values, normalized)
        return {Kind.NOT_FINITE: ~np.isfinite(values.sum(axis=1, dtype=np.float64))}
    if kind == "multivector":
        found = {each: values.any_of(mask) for each, mask in bad_vectors(values.values, normalized).items()}
        return {**found, Kind.ZERO: found[Kind.ZERO] | (values.counts == 0)}
    assert values.indices is not None
    follows = np.ones(len(values.values), np.bool_)
    follows[1:] = values.indices[1:] > values.indices[:-1]
    follows[values.offsets[:-1][values.counts > 0]] = True
    known = np.isfinite(values.values)
    wrong = ~follows | (values.indices >= dim) | (known & (values.values <= 0))
    return {
        Kind.NOT_FINITE: values.any_of(~known),
        Kind.ZERO: (values.counts == 0) & alone,
        Kind.VALUES: values.any_of(wrong),
    }


def bad_column(output: Output, batch: pa.RecordBatch, alone: bool) -> dict[Kind, Mask]:
    """What is wrong with an output's columns, by kind of fault a mask [n]."""
    if (differ := uneven(output, batch)).any():
        return {Kind.VALUES: differ}
    if output.dtype == "int8":  # each stands for a number, and a short vector may be 0 once it is rounded
        return {}
    values = from_columns(output, batch)
    found = bad_values(output.kind, values, output.normalized, output.dim, alone)
    if output.kind == "labels":
        said = [batch.column(name) for name in output.columns[:2]]
        meant = to_columns(output, values)[:2]
        equal = [pc.equal(one, other).to_numpy(zero_copy_only=False) for one, other in zip(said, meant, strict=True)]
        found[Kind.VALUES] = ~(equal[0] & equal[1]) & ~found[Kind.NOT_FINITE]
    return found


def id_numbers(column: Any) -> npt.NDArray[np.uint64]:
    """A hash of each id, [n]; 0 for null."""
    ids = column.to_pylist()
    numbers = _numbers([id or "" for id in ids])
    numbers[np.array([id is None for id in ids], np.bool_)] = 0
    return numbers


def text_numbers(column: Any) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each `input_hash`, [n]."""
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :][: len(column) * width]
    return data.view(np.uint64).reshape(len(column), -1)[:, 0].copy()


def kept_numbers(batch: pa.RecordBatch, spec: JobSpec) -> npt.NDArray[np.uint64]:
    """A hash of each row's kept fields, [n]: the same for a block's text and for the dataset's values."""
    types = spec.keep_types
    columns = [typed(batch.column(name), types.get(name, "string")).to_pylist() for name in spec.keep]
    return _numbers([msgspec.json.encode(fields).decode() for fields in zip(*columns, strict=True)])


def _numbers(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(text_digests(texts), np.uint64).reshape(-1, 2)[:, 0].copy()
