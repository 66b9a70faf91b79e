"""What is exported of a dataset: the rows' ids, texts and kept fields, and one column of dense vectors."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from embedstream.api.reading import read_finished
from embedstream.dataset.checked import checked
from embedstream.dataset.folder import BATCH_ROWS
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.schema import dataset_schema
from embedstream.dataset.values import Matrix, Ragged, Vectors, from_columns, stored_vectors
from embedstream.errors import UsageError
from embedstream.outputs import Output, describe
from embedstream.records import part_file
from embedstream.server.connection import mask

OURS = frozenset({"part", "row", "n_tokens", "truncated", "input_hash"})
"""Columns that a dataset has for its own sake. They are not exported."""

Key = tuple[str, int]
"""What tells rows apart: id and chunk."""


@dataclass(frozen=True)
class Rows:
    """Some rows on their way to a target."""

    payload: pa.RecordBatch
    """`id`, `chunk`, and what goes with a vector: the text if the dataset has it, kept fields."""
    vectors: Vectors
    """[n, dim] in float32 or float16; of bits uint8[n, dim / 8]."""

    @property
    def keys(self) -> list[Key]:
        return keys_of(self.payload)


def uuid_of(key: Key) -> str:
    """A UUID made of a row's own id, for places that take no other."""
    id, chunk = key
    whole = uuid.uuid5(uuid.NAMESPACE_URL, id)
    return str(uuid.uuid5(whole, str(chunk)) if chunk else whole)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A payload without what JSON lacks: NaN and infinity; and without nulls."""
    return {
        name: value
        for name, value in row.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def in_requests(rows: Rows, most_bytes: int, number_bytes: int) -> Iterator[Rows]:
    """The rows in pieces that a server takes, by an estimate: `number_bytes` are those of a vector's number."""
    count = len(rows.vectors)
    size = number_bytes * rows.vectors.size + 3 * rows.payload.nbytes
    if count > 1 and size > most_bytes:
        half = count // 2
        yield from in_requests(Rows(rows.payload.slice(0, half), rows.vectors[:half]), most_bytes, number_bytes)
        yield from in_requests(Rows(rows.payload.slice(half), rows.vectors[half:]), most_bytes, number_bytes)
    elif count:
        yield rows


def keys_of(rows: pa.RecordBatch | pa.Table) -> list[Key]:
    """By their `id` and `chunk`, which are never null."""
    ids: list[Any] = rows.column("id").to_pylist()
    chunks: list[Any] = rows.column("chunk").to_pylist()
    return list(zip(ids, chunks, strict=True))


class Source:
    """A finished dataset in files, and the vectors that are exported of it."""

    def __init__(self, address: str, column: str | None = None) -> None:
        """`column`: of the vectors; None: the only dense ones.

        Raises:
            OutputError: there is no finished dataset, or rows are missing from it.
            UsageError: the output is in Redis, or has no such vectors, or several.
        """
        self.sink, self.manifest = read_finished(address)
        self.address = self.sink.output
        self.output = self._choose(column)
        schema = dataset_schema(manifest_spec(self.manifest), self.manifest.outputs)
        results = {name for output in self.manifest.outputs for name in output.columns}
        self.payload = pa.schema([field for field in schema if field.name not in OURS | results])
        self._fields = [*self.payload, schema.field(self.output.name)]

    def _choose(self, column: str | None) -> Output:
        dense = {output.name: output for output in self.manifest.outputs if output.kind == "dense"}
        if column is None and len(dense) > 1:
            raise UsageError(
                f"{mask(self.address)}: has several dense vectors: choose one: --column {' | '.join(dense)}"
            )
        if not dense or (column is not None and column not in dense):
            wanted = "dense vectors" if column is None else f"dense vectors {column}"
            has = describe(self.manifest.outputs) or "no rows"
            raise UsageError(f"{mask(self.address)}: there are no {wanted} to export: the dataset has {has}")
        return dense[column] if column is not None else next(iter(dense.values()))

    @property
    def rows(self) -> int:
        return self.manifest.rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows with all columns that are exported, some thousands at a time. Raises `OutputError`."""
        return (batch for _, batch in self.batches_by_shard())

    def batches_by_shard(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        """The same, with the name of their shard."""
        names = [field.name for field in self._fields]
        for shard in self.manifest.shards:
            if shard.rows:
                found = self.sink.batches(part_file(shard.name), names, BATCH_ROWS)
                for batch in checked(found, self._fields, [self.output], mask(self.address)):
                    yield shard.name, batch

    def split(self, batch: pa.RecordBatch) -> Rows:
        """A batch as targets take it."""
        return Rows(batch.select(self.payload.names), stored_vectors(self.output, batch))

    def floats(self, batch: pa.RecordBatch) -> Matrix:
        """A batch's vectors for comparing, float32[n, dim]; bits as 1 and -1."""
        vectors = from_columns(self.output, batch)
        assert not isinstance(vectors, Ragged), "dense"
        return vectors
