"""LanceDB: a table of a database in a folder or a bucket, without an index, so that it compares with every vector."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedstream.server.connection import mask
from embedstream_producer.exporting.rows import Key, Rows, Source
from embedstream_producer.exporting.target import MARK, origin_of, refuse_other

os.environ.setdefault("LANCEDB_LOG", "error")  # a new table is worth a warning to it
import lancedb

NUMBERS: dict[str, Any] = {"float16": pa.float16(), "ubinary": pa.uint8()}
"""Float32 otherwise."""

KEYS_AT_ONCE = 500
"""Rows that are removed by one condition."""


class LanceTable:
    """The whole table is replaced in one commit, or some rows of it."""

    errors = (ValueError, OSError, RuntimeError)

    def __init__(self, place: str, table: str, source: Source) -> None:
        self._place, self._table = place, table
        self._where = f"{mask(place)}: table {table}"
        self._origin = origin_of(source)
        output = source.output
        width = output.dim // 8 if output.dtype == "ubinary" else output.dim
        self._vectors: Any = pa.list_(NUMBERS.get(output.dtype, pa.float32()), width)
        fields = [*source.payload, pa.field(output.name, self._vectors, nullable=False)]
        # LanceDB takes a dot for the way into a struct.
        fields = [field.with_name(field.name.replace(".", "_")) for field in fields]
        self._schema = pa.schema(fields, metadata={MARK: self._origin.encode()})

    def check(self) -> bool:
        try:
            table = lancedb.connect(self._place).open_table(self._table)
        except ValueError as error:
            if "was not found" in str(error):  # its folder may be there, with what a killed export left
                return False
            raise
        refuse_other(self._where, (table.schema.metadata or {}).get(MARK.encode()), self._origin)
        return True

    def write(self, rows: Iterator[Rows]) -> None:
        lancedb.connect(self._place).create_table(self._table, self._reader(rows), mode="overwrite")

    def remove(self, keys: Sequence[Key]) -> None:
        table = lancedb.connect(self._place).open_table(self._table)
        for start in range(0, len(keys), KEYS_AT_ONCE):
            some = (
                "(id = '{}' AND chunk = {})".format(id.replace("'", "''"), chunk)
                for id, chunk in keys[start : start + KEYS_AT_ONCE]
            )
            table.delete(" OR ".join(some))

    def merge(self, rows: Iterator[Rows]) -> None:
        table = lancedb.connect(self._place).open_table(self._table)
        step = table.merge_insert(["id", "chunk"]).when_matched_update_all().when_not_matched_insert_all()
        step.execute(self._reader(rows))

    def _reader(self, rows: Iterator[Rows]) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(self._schema, (self._batch(some) for some in rows))

    def _batch(self, rows: Rows) -> pa.RecordBatch:
        flat = pa.array(np.ascontiguousarray(rows.vectors).reshape(-1))
        vectors: Any = pa.FixedSizeListArray.from_arrays(flat, type=self._vectors)
        return pa.record_batch([*rows.payload.columns, vectors], schema=self._schema)
