"""Python records as blocks of one part: mappings, strings, or Arrow tables, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeAlias

import pyarrow as pa

from embedstream.corpus.parts import Part
from embedstream.corpus.records import Outcome, RecordReader
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec

RECORDS = "records"
"""The name of a part that is no file."""

AT_ONCE = 256
"""Records whose ids are looked up together."""

Records: TypeAlias = "Iterable[Mapping[str, object] | str] | pa.Table | pa.RecordBatch | pa.RecordBatchReader"


def records_part(records: Records) -> Part:
    """The one part of a job over Python records. An iterator can be read only once; anything else again and again."""
    return _RecordsPart(_source(records))


class _RecordsPart(Part):
    def __init__(self, source: Callable[[], Iterable[object]]) -> None:
        super().__init__(0, RECORDS, RECORDS, once=isinstance(source, _Once))
        self._source = source

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[list[Outcome]]:  # noqa: ARG002
        reader = RecordReader(spec)
        outcomes = (reader.record(row, record) for row, record in enumerate(self._source()))
        while batch := list(islice(outcomes, AT_ONCE)):
            yield batch


def _source(records: Records) -> Callable[[], Iterable[object]]:
    if isinstance(records, (str, bytes, Mapping)):
        raise UsageError("records: give a list or another iterable of records, not one record")
    if isinstance(records, pa.Table):
        return lambda: _rows(records.to_batches())
    if isinstance(records, pa.RecordBatch):
        return lambda: _rows([records])
    stream: Iterable[object] = _rows(records) if isinstance(records, pa.RecordBatchReader) else records
    try:
        once = iter(stream) is stream
    except TypeError as error:
        raise UsageError(f"records: {type(records).__name__} is not iterable") from error
    return _Once(stream) if once else lambda: stream


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[object]:
    for batch in batches:
        for start in range(0, batch.num_rows, AT_ONCE):
            yield from batch.slice(start, AT_ONCE).to_pylist()


class _Once:
    """An iterator that can be taken once."""

    def __init__(self, stream: Iterable[object]) -> None:
        self._stream: Iterable[object] | None = stream

    def __call__(self) -> Iterable[object]:
        if self._stream is None:
            raise InputError(
                "Redis lost blocks, and the records came from an iterator that cannot be read again: "
                "submit them once more into the same output"
            )
        stream, self._stream = self._stream, None
        return stream
