"""One range a dimension for a whole job: vectors for int8 columns stay float32 in a shard until it is written. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa

from embedstream.dataset.schema import output_fields
from embedstream.dataset.values import Matrix, Ragged, from_columns, ranges_of, to_columns
from embedstream.outputs import Output

CALIBRATION_ROWS = 1000
"""Ranges are taken from so many rows, unless all that a worker has of a job are fewer. From 100 rows on
sentence-transformers calls them stable; of further rows, each number lies beyond those of 1,000 once in 500 times."""


def has_int8(outputs: Sequence[Output]) -> bool:
    """Whether a column needs ranges."""
    return any(output.dtype == "int8" for output in outputs)


def in_float32(outputs: Sequence[Output]) -> tuple[Output, ...]:
    """The outputs before int8 numbers are made."""
    return tuple(
        msgspec.structs.replace(each, dtype="float32", ranges=b"") if each.dtype == "int8" else each for each in outputs
    )


def calibrated(outputs: Sequence[Output], data: pa.Table) -> tuple[Output, ...]:
    """The outputs with ranges over these rows, one at least, whose columns are those of `in_float32`."""
    return tuple(
        msgspec.structs.replace(each, ranges=ranges_of(_vectors(each, data))) if each.dtype == "int8" else each
        for each in outputs
    )


def rounded(outputs: Sequence[Output], data: pa.Table) -> pa.Table:
    """The rows with the outputs' own columns instead of those of `in_float32`. Without rows, ranges are not needed."""
    for output in outputs:
        if output.dtype == "int8":
            [field] = output_fields(output)
            chunks: list[Any] = [column for some in _vectors(output, data) for column in to_columns(output, some)]
            place = data.schema.get_field_index(output.name)
            data = data.set_column(place, field, pa.chunked_array(chunks, field.type))
    return data


def _vectors(output: Output, data: pa.Table) -> Iterator[Matrix]:
    """A column of `in_float32`, in pieces [some, dim]."""
    [whole] = in_float32([output])
    for batch in data.select([output.name]).to_batches():
        vectors = from_columns(whole, batch)
        assert not isinstance(vectors, Ragged)
        yield vectors
