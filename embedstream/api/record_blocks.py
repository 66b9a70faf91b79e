"""Python records as blocks of one part: mappings, strings, or the rows of a table or data frame, as a stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

from embedstream.corpus.advice import SAMPLE_ROWS, Sample
from embedstream.corpus.columns import ColumnReader, kept_types
from embedstream.corpus.parts import Part
from embedstream.corpus.records import Outcome, RecordReader
from embedstream.errors import InputError, UsageError
from embedstream.jobs import JobSpec, KeptType
from embedstream.lifecycle.opening import with_types
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import HOPELESS
from embedstream.terminal import counted

RECORDS = "records"
"""The name of a part that is no file."""

AT_ONCE = 256
"""Records whose ids are looked up together."""


class ArrowStream(Protocol):
    """Has Arrow's own interface: a table, batch or reader of pyarrow, a data frame of pandas or polars, and others."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...


Records: TypeAlias = "Iterable[Mapping[str, object] | str] | ArrowStream"


def records_part(records: Records) -> RecordsPart:
    """The one part of a job over Python records. An iterator can be read only once; anything else again and again.

    Raises:
        UsageError: these are no records.
    """
    if isinstance(records, (str, bytes, Mapping)):
        raise UsageError("records: give a list or another iterable of records, or a table, not one record")
    return _Columns(records) if _is_table(records) else _Rows(records)


class RecordsPart(Part):
    """Python records."""

    def __init__(self, records: Any) -> None:
        super().__init__(0, RECORDS, RECORDS, once=isinstance(records, Iterator))
        self._records = records
        self._taken = False

    def typed(self, spec: JobSpec) -> JobSpec:
        """The spec with the types of the kept fields; raises `UsageError` as `with_types`."""
        return with_types(spec, [self.types_of(spec.keep)])

    def types_of(self, keep: Sequence[str]) -> Mapping[str, KeptType]:
        """Types of the kept columns; rows of Python do not tell any."""
        return dict.fromkeys(keep, "string")

    def check(self, spec: JobSpec) -> None:
        """Raise `InputError` if no row can be used, or has a field that the job names; or if a table lacks columns."""
        if lacking := self.lacking(spec):
            raise InputError(lacking)

    @abstractmethod
    def lacking(self, spec: JobSpec) -> str:
        """A sentence on why no row can be used, or which fields of the job no row has; empty if all is well."""

    @abstractmethod
    def judged(self, spec: JobSpec) -> Iterator[Sequence[Outcome]]: ...

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:  # noqa: ARG002
        if self.once and self._taken:
            raise InputError(
                "Redis lost blocks, and the records came from an iterator that cannot be read again: "
                "submit them once more into the same output"
            )
        self._taken = True
        return self.judged(spec)


class _Rows(RecordsPart):
    def __init__(self, records: Any) -> None:
        try:
            iter(records)
        except TypeError as error:
            raise UsageError(f"records: {type(records).__name__} is not iterable") from error
        super().__init__(records.to_pylist() if isinstance(records, pa.Array | pa.ChunkedArray) else records)

    def lacking(self, spec: JobSpec) -> str:
        if self.once:
            return ""
        reader = RecordReader(spec)
        first = [reader.record(row, record) for row, record in enumerate(islice(self._records, SAMPLE_ROWS))]
        refused = [outcome for outcome in first if isinstance(outcome, Refusal) and outcome.code in HOPELESS]
        if refused and len(refused) == len(first):
            lacking = f"the first {counted(len(first), 'record')} cannot be used: {refused[0].message}"
        else:
            lacking = Sample(self._records).lacking(spec)
        return lacking and f"{RECORDS}: {lacking}"

    def judged(self, spec: JobSpec) -> Iterator[Sequence[Outcome]]:
        reader = RecordReader(spec)
        outcomes = (reader.record(row, record) for row, record in enumerate(self._records))
        while batch := list(islice(outcomes, AT_ONCE)):
            yield batch


class _Columns(RecordsPart):
    def __init__(self, records: Any) -> None:
        super().__init__(records)
        self._opened: list[pa.RecordBatchReader] = [_stream(records)]
        self._schema = self._opened[0].schema
        self._empty = hasattr(records, "__len__") and not len(records)  # no row tells a column's type

    def types_of(self, keep: Sequence[str]) -> Mapping[str, KeptType]:
        return {} if self._empty else kept_types(self._schema, keep)

    def lacking(self, spec: JobSpec) -> str:
        return "" if self._empty else ColumnReader(spec, self._schema, RECORDS).lacking

    def judged(self, spec: JobSpec) -> Iterator[Sequence[Outcome]]:
        if self._empty:
            return
        columns, row = ColumnReader(spec, self._schema, RECORDS), 0
        for batch in self._opened.pop() if self._opened else _stream(self._records):
            for start in range(0, batch.num_rows, AT_ONCE):
                rows = batch.slice(start, AT_ONCE)
                yield columns.judge(row, rows)
                row += rows.num_rows


def _is_table(records: object) -> bool:
    """Whether its rows are to be had as Arrow columns; not those of a series, which are its values."""
    if hasattr(records, "__arrow_c_stream__"):
        return hasattr(records, "columns") or not (hasattr(records, "to_list") or isinstance(records, pa.ChunkedArray))
    if hasattr(type(records), "columns"):  # what it gives when iterated over are the names of these
        raise UsageError(
            f"records: {type(records).__name__} has columns, and no interface to Arrow: give a list of mappings, or "
            f"collect it into a pyarrow table or a data frame of pandas or polars"
        )
    return False


def _stream(records: Any) -> pa.RecordBatchReader:
    try:
        return pa.RecordBatchReader.from_stream(records)
    except (pa.ArrowException, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError(
            f"records: {type(records).__name__} cannot be had as Arrow data ({why}): "
            f"give each column a name and a type of its own"
        ) from error
