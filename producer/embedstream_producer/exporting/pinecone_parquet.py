"""Parquet as Pinecone imports it in bulk: `id`, `values`, and `metadata` as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.errors import UsageError
from embedstream_producer.exporting.file_place import refuse_no_file, remove_left, sync, temporary
from embedstream_producer.exporting.rows import Rows, Source, plain
from embedstream_producer.exporting.target import MARK, origin_of, refuse_other


class PineconeParquet:
    """One file, replaced whole. A chunk's id is the row's, a `#` and its number, from the second one on."""

    errors = (pa.ArrowException, OSError)

    def __init__(self, place: str, source: Source) -> None:
        if source.output.dtype == "ubinary":
            raise UsageError("Pinecone has no vectors of bits: export other vectors (--column)")
        self._path = Path(place)
        self._origin = origin_of(source)
        values: Any = pa.list_(pa.float32())
        fields: list[pa.Field[Any]] = [
            pa.field("id", pa.string(), nullable=False),
            pa.field("values", values, nullable=False),
            pa.field("metadata", pa.string()),
        ]
        self._schema = pa.schema(fields, metadata={MARK: self._origin.encode()})

    def check(self) -> bool:
        refuse_no_file(self._path)
        if not self._path.exists():
            return False
        mark = None
        with suppress(pa.ArrowException, OSError):
            mark = (pq.read_schema(self._path).metadata or {}).get(MARK.encode())
        refuse_other(str(self._path), mark, self._origin)
        return True

    def write(self, rows: Iterator[Rows]) -> None:
        new = temporary(self._path)
        try:
            with pq.ParquetWriter(new, self._schema, compression="zstd") as writer:
                for some in rows:
                    writer.write_batch(self._batch(some))
            sync(new)
            new.replace(self._path)
            sync(self._path.parent)
            remove_left(self._path)
        finally:
            new.unlink(missing_ok=True)

    def _batch(self, rows: Rows) -> pa.RecordBatch:
        ids = [f"{id}#{chunk}" if chunk else id for id, chunk in rows.keys]
        metadata = []
        for row in rows.payload.to_pylist():
            kept = {name: value for name, value in plain(row).items() if name not in ("id", "chunk")}
            metadata.append(msgspec.json.encode(kept).decode())
        vectors: Any = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(rows.vectors, np.float32).reshape(-1)), rows.vectors.shape[1]
        )
        columns = [pa.array(ids), vectors.cast(self._schema.field("values").type), pa.array(metadata, pa.string())]
        return pa.record_batch(columns, schema=self._schema)
