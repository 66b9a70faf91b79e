"""Indexes that lie in a file and know rows by numbers only: the ids lie beside it, in Parquet, in the same order.

At each moment one of three things is there: nothing, the ids alone, or ids and index of one export. So a reader never
takes the ids of one export for those of another, whatever is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.dataset.values import Vectors
from embedstream_producer.exporting.file_place import refuse_no_file, remove_left, sync, temporary
from embedstream_producer.exporting.rows import Key, Rows, Source, keys_of
from embedstream_producer.exporting.target import MARK, origin_of, refuse_other

IDS = ".ids.parquet"
"""What is appended to the name of the index: row n is the index's number n."""


class Index(Protocol):
    """An index in memory."""

    def add(self, vectors: Vectors) -> None:
        """Under the next numbers."""

    def save(self, path: Path) -> None:
        """Write it to a new file."""


class IndexFiles:
    """An index and its ids."""

    def __init__(self, place: str, source: Source, index: Index) -> None:
        self._path, self._ids = Path(place), Path(place + IDS)
        self._index = index
        self._origin = origin_of(source)
        self._schema = source.payload.with_metadata({MARK: self._origin.encode()})

    def check(self) -> bool:
        refuse_no_file(self._path)
        if not self._ids.exists() and not self._path.exists():
            return False
        mark = None
        with suppress(pa.ArrowException, OSError):
            mark = (pq.read_schema(self._ids).metadata or {}).get(MARK.encode())
        refuse_other(str(self._path), mark, self._origin)
        return True

    def write(self, rows: Iterator[Rows]) -> None:
        new, new_ids = temporary(self._path), temporary(self._ids)
        try:
            with pq.ParquetWriter(new_ids, self._schema, compression="zstd") as writer:
                for some in rows:
                    self._index.add(some.vectors)
                    writer.write_batch(some.payload.cast(self._schema))
            self._index.save(new)
            sync(new, new_ids)
            self._path.unlink(missing_ok=True)
            new_ids.replace(self._ids)
            new.replace(self._path)
            sync(self._path.parent)
            remove_left(self._path)
            remove_left(self._ids)
        finally:
            new.unlink(missing_ok=True)
            new_ids.unlink(missing_ok=True)

    def keys(self, numbers: npt.NDArray[np.int64]) -> dict[int, Key]:
        """The ids of these rows of the index, by their numbers."""
        wanted = np.unique(numbers)
        table = pq.read_table(self._ids, columns=["id", "chunk"]).take(wanted)
        return dict(zip(wanted.tolist(), keys_of(table), strict=True))
