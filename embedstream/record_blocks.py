"""Python records as blocks of one part: mappings, strings, or Arrow tables, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeAlias

import pyarrow as pa

from embedstream.blocks import Block, Refusal
from embedstream.duplicates import DuplicateIndex
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec
from embedstream.packing import Packer
from embedstream.records import Record, RecordReader, duplicate_refusal
from embedstream.submission import Part

RECORDS = "records"
"""The name of a part that is no file."""

AT_ONCE = 256
"""Records whose ids are looked up together."""

Records: TypeAlias = "Iterable[Mapping[str, object] | str] | pa.Table | pa.RecordBatch | pa.RecordBatchReader"


def records_part(records: Records, spec: JobSpec, index: DuplicateIndex) -> Part:
    """The one part of a job over Python records. An iterator can be read only once; anything else again and again."""
    source = _source(records)
    return Part(RECORDS, lambda: pack_records(source(), spec, index))


def pack_records(records: Iterable[object], spec: JobSpec, index: DuplicateIndex) -> Iterator[Block]:
    """Judge and pack records in their order. Rows are counted from 0."""
    reader, packer = RecordReader(spec), Packer(0, spec.keep)
    outcomes = (reader.record(row, record) for row, record in enumerate(records))
    while slice := list(islice(outcomes, AT_ONCE)):
        good = [outcome for outcome in slice if isinstance(outcome, Record)]
        earlier = iter(index.check(0, [record.row for record in good], [record.id for record in good]))
        for outcome in slice:
            match outcome:
                case Record() as record:
                    first = next(earlier)
                    if first is None:
                        block = packer.add(record.row, record.id, record.text, record.text_bytes, record.kept)
                    else:
                        block = packer.refuse(duplicate_refusal(record, f"record {first.row}"))
                case Refusal() as refusal:
                    block = packer.refuse(refusal)
                case None:
                    packer.skip()
                    continue
            if block is not None:
                yield block
    last = packer.finish()
    if last is not None:
        yield last


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
