"""Columns of a dataset and of its errors, from a job's spec alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa

from embedstream.jobs import JobSpec
from embedstream.outputs import Dtype, Output
from embedstream.queue.kept import COLUMN_TYPES

INPUT_HASH_BYTES = 16
"""Of the exact text that entered the model, prompt included."""


class ErrorRow(msgspec.Struct, frozen=True):
    """A row that failed, as `_errors.jsonl` and the Redis sink show it."""

    file: str
    """The part's source."""
    line: int
    """1 for the first line or record of the part."""
    id: str | None
    chunk: int
    code: str
    message: str
    original: str
    """The original line or text, cut at a bound."""


_NUMBERS: dict[Dtype, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


def _list(type: pa.DataType, size: int = -1) -> pa.DataType:
    """A list without nulls in it."""
    return pa.list_(pa.field("element", type, nullable=False), size)


def output_fields(output: Output) -> list[pa.Field[Any]]:
    """The columns of one output.

    dense: `fixed_size_list<T>[dim]`, or `fixed_size_binary[dim / 8]` for ubinary. sparse: `struct<indices:
    list<uint32>, values: list<T>>`, indices ascending. multivector: `list<fixed_size_list<T>[dim]>`, a vector for each
    token. score: `float32`. labels: the best `string`, its `float32` and all of them as `fixed_size_list<float32>`.
    """
    names = output.columns
    if output.dtype == "ubinary":
        return [pa.field(names[0], pa.binary(output.dim // 8), nullable=False)]
    number = _NUMBERS[output.dtype]
    types: list[pa.DataType]
    match output.kind:
        case "dense":
            types = [_list(number, output.dim)]
        case "sparse":
            indices = pa.field("indices", _list(pa.uint32()), nullable=False)
            types = [pa.struct([indices, pa.field("values", _list(number), nullable=False)])]
        case "multivector":
            types = [_list(_list(number, output.dim))]
        case "score":
            types = [number]
        case "labels":
            types = [pa.string(), number, _list(number, output.dim)]
    return [pa.field(name, type, nullable=False) for name, type in zip(names, types, strict=True)]


def dataset_schema(spec: JobSpec, outputs: Sequence[Output]) -> pa.Schema:
    """Columns of a job's shards, in order. (`part`, `row`, `chunk`) says which chunk a row is."""
    fields: list[pa.Field[Any]] = [
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        *([pa.field("start", pa.int64()), pa.field("end", pa.int64())] if spec.chunking else []),
        *([pa.field("text", pa.string(), nullable=False)] if spec.text else []),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("input_hash", pa.binary(INPUT_HASH_BYTES), nullable=False),
        *(pa.field(name, COLUMN_TYPES[spec.keep_types.get(name, "string")]) for name in spec.keep),
        *(field for output in outputs for field in output_fields(output)),
    ]
    return pa.schema(fields)


def errors_schema() -> pa.Schema:
    """Columns of the rows that failed: refused by the producer, or failed in the worker."""
    fields: list[pa.Field[Any]] = [
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("original", pa.string(), nullable=False),
    ]
    return pa.schema(fields)


def placed_errors(errors: pa.Table | pa.RecordBatch, sources: Sequence[str]) -> Iterator[tuple[int, int, int, bytes]]:
    """Part, row and chunk of each row in errors schema, and the row as people read it, in JSON."""
    places = (errors.column(name).to_pylist() for name in ("part", "row", "chunk"))
    for part, row, chunk, error in zip(*places, error_rows(errors, sources), strict=True):
        yield part, row, chunk, msgspec.json.encode(error)


def error_rows(errors: pa.Table | pa.RecordBatch, sources: Sequence[str]) -> Iterator[ErrorRow]:
    """Rows in errors schema as people read them; `sources[part]` becomes the file."""
    for row in errors.to_pylist():
        yield ErrorRow(
            file=sources[row["part"]],
            line=row["row"] + 1,
            id=row["id"],
            chunk=row["chunk"],
            code=row["code"],
            message=row["message"],
            original=row["original"],
        )
