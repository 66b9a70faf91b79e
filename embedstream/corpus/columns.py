"""Rows that come as Arrow columns -> what the job needs of them, or the reason why not; judged by the column.

Every row ends as `RecordReader.record` would end it. Rows in which anything is unusual are handed to that, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute

from embedstream.corpus.records import (
    LONGEST_ID_BYTES,
    LONGEST_KEPT_BYTES,
    Outcome,
    Record,
    RecordReader,
    Unreadable,
    kept_value,
)
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.queue.refusals import Code, RowRefused, refusal
from embedstream.settings import BLOCK_LIMITS
from embedstream.terminal import printable

Column = Any
"""A `pa.Array`."""

pc: Any = pyarrow.compute
"""Untyped, as the stubs know only the simplest form of each function."""

NAMED_COLUMNS = 50
NAME_CHARACTERS = 60
"""How many column names, and how much of each, a message repeats."""


class ColumnReader:
    """Judges the rows of one job in batches of one schema."""

    def __init__(self, spec: JobSpec, schema: pa.Schema, label: str) -> None:
        """`label` names the input in messages.

        Raises:
            InputError: no column for id or text, or one of a type that cannot be used; tells the columns there are.
        """
        self._rows = RecordReader(spec)
        self._spec = spec
        self._schema = schema
        self._label = label
        self._id = self._one_of(self._rows.ids, "id", "--id-field")
        self._text = self._one_of(self._rows.texts, "text", "--text-field")
        title = self._rows.title
        self._title = title if title is not None and title in schema.names else None
        if title is not None and spec.title_field is not None and self._title is None:
            raise self._missing(f"column {_named(spec.title_field)}", "--title-field")
        self._check_type(self._id, _is_id, "an id must be a string or a whole number; --id-field takes another")
        self._check_type(self._text, _is_text, "a text must be a string; --text-field takes another")
        if self._title is not None:
            self._check_type(self._title, _is_title, "a title must be a string; --title-field takes another")
        self.absent = tuple(name for name in spec.keep if name not in schema.names)
        """Fields that the job keeps and no row has."""
        kept = [name for name in spec.keep if name not in self.absent]
        wanted = [self._id, self._text, *([] if self._title is None else [self._title]), *kept]
        self.columns = list(dict.fromkeys(wanted))
        """The columns to read."""
        for name in self.columns:
            if schema.names.count(name) > 1:
                raise InputError(f"{label}: has {schema.names.count(name)} columns called {_named(name)}: rename one")

    def judge(self, row: int, batch: pa.RecordBatch) -> Sequence[Outcome]:
        """How the rows end. `batch` has `columns`; `row` is the position of its first row in the part."""
        plain, broken = self._plain(batch)
        ids, texts, sizes, clean = self._texts(plain)
        kept, clean = self._kept(plain, clean)
        sources = map(_Row, repeat(plain), range(batch.num_rows))
        rows = range(row, row + batch.num_rows)
        outcomes: list[Outcome] = list(
            map(Record, rows, ids.to_pylist(), texts.to_pylist(), sizes.to_pylist(), kept, sources)
        )
        for at in pc.indices_nonzero(pc.invert(clean)).to_pylist():
            source = _Row(plain, at)
            outcomes[at] = self._rows.record(row + at, dict(source))
        for at, name in broken.items():
            message = f'column "{_named(name)}" has bytes that are not UTF-8; convert the file'
            outcomes[at] = refusal(row + at, None, Code.NOT_UTF8, message, _Row(plain, at))
        return outcomes

    def _texts(self, batch: pa.RecordBatch) -> tuple[Column, Column, Column, Column]:
        """Ids, texts with their titles in front, their bytes of UTF-8, and in which rows nothing is unusual so far."""
        id_column: Column = batch.column(self._id)
        ids = id_column if pa.types.is_string(id_column.type) else id_column.cast(pa.string())
        texts: Column = batch.column(self._text)
        clean = pc.and_(ids.is_valid(), texts.is_valid())
        title: Column = None if self._title is None else batch.column(self._title)
        if title is not None and pa.types.is_string(title.type):
            titled = pc.greater(pc.binary_length(title), 0).fill_null(False)
            empty = pc.equal(pc.binary_length(texts), 0).fill_null(True)
            blank = pc.utf8_is_space(title).fill_null(False)
            clean = pc.and_not(clean, pc.and_(titled, pc.or_(empty, blank)))
            joined = pc.binary_join_element_wise(title, texts, self._rows.title_sep)
            texts = pc.if_else(titled, joined, texts)
        sizes = pc.binary_length(texts)
        id_sizes = pc.binary_length(ids)
        for within in (
            pc.and_(pc.greater(sizes, 0), pc.less_equal(sizes, BLOCK_LIMITS.longest_text_bytes)),
            pc.and_(pc.greater(id_sizes, 0), pc.less_equal(id_sizes, LONGEST_ID_BYTES)),
            pc.invert(pc.or_(pc.match_substring(texts, "\0"), pc.match_substring(ids, "\0"))),
            pc.invert(pc.utf8_is_space(texts)),
        ):
            clean = pc.and_(clean, within.fill_null(False))
        return ids, texts, sizes, clean

    def _kept(self, batch: pa.RecordBatch, clean: Column) -> tuple[Iterator[tuple[str | None, ...]], Column]:
        """The kept fields of each row; and `clean` without the rows in which they are unusual."""
        if not self._spec.keep:
            return repeat((), batch.num_rows), clean
        columns, total = [], pa.repeat(pa.scalar(0, pa.int64()), batch.num_rows)
        for name in self._spec.keep:
            if name in self.absent:
                columns.append([None] * batch.num_rows)
                continue
            values, readable = _as_strings(batch.column(name))
            unusual = pc.match_substring(values, "\0").fill_null(False)
            clean = pc.and_(clean, pc.and_not(readable, unusual))
            total = pc.add(total, pc.binary_length(values).fill_null(0))
            columns.append(values.to_pylist())
        return zip(*columns, strict=True), pc.and_(clean, pc.less_equal(total, LONGEST_KEPT_BYTES))

    def _plain(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, str]]:
        """The columns in simple types, and the rows that hold what is no UTF-8, with the column's name; null there."""
        columns: list[Column] = []
        broken: dict[int, str] = {}
        for name in self.columns:
            column: Column = batch.column(name)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if _is_string(column.type):
                column, rows = _checked(column)
                broken |= dict.fromkeys(rows, name)
            elif pa.types.is_timestamp(column.type) and column.type.unit == "ns":
                # Python's dates end at microseconds.
                column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, names=self.columns), broken

    def _one_of(self, names: tuple[str, ...], usual: str, flag: str) -> str:
        name = next((name for name in names if name in self._schema.names), None)
        if name is None:
            what = f"column {_named(names[0])}" if len(names) == 1 else f"{usual} column ({', '.join(names)})"
            raise self._missing(what, flag)
        return name

    def _missing(self, what: str, flag: str) -> InputError:
        names = [_named(name) for name in self._schema.names[:NAMED_COLUMNS]]
        more = len(self._schema.names) - len(names)
        there = ", ".join(names) + (f" and {more} more" if more else "")
        return InputError(f"{self._label}: has no {what} (there are: {there or 'none'}): name one ({flag})")

    def _check_type(self, name: str, fits: Any, rule: str) -> None:
        type = self._schema.types[self._schema.names.index(name)]
        type = type.value_type if pa.types.is_dictionary(type) else type
        if not fits(type):
            raise InputError(f"{self._label}: column {_named(name)} is {printable(str(type), NAME_CHARACTERS)}; {rule}")


class _Row(Mapping[str, object]):
    """One row of a batch, looked up when somebody asks."""

    __slots__ = ("_at", "_batch")

    def __init__(self, batch: pa.RecordBatch, at: int) -> None:
        self._batch = batch
        self._at = at

    def __getitem__(self, name: str) -> object:
        return _python(self._batch.column(name)[self._at])

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns


def _as_strings(column: Column) -> tuple[Column, Column]:
    """A kept column as the dataset shows it, and which rows it can be shown of."""
    type = column.type
    all_rows = pa.repeat(pa.scalar(True), len(column))
    if pa.types.is_string(type):
        return column, all_rows
    if pa.types.is_integer(type) or pa.types.is_boolean(type) or pa.types.is_null(type):
        return column.cast(pa.string()), all_rows  # as JSON writes them
    values: list[str | None] = []
    readable: list[bool] = []
    for scalar in column:
        try:
            values.append(kept_value(_python(scalar)))
            readable.append(True)
        except RowRefused:
            values.append(None)
            readable.append(False)
    return pa.array(values, pa.string()), pa.array(readable, pa.bool_())


def _python(scalar: Any) -> object:
    """A value as Python has it."""
    try:
        return scalar.as_py()
    except Exception:  # noqa: BLE001 - years beyond 9999, zones that nobody knows, bytes that are no UTF-8 in a list
        return Unreadable(printable(str(scalar.type), NAME_CHARACTERS))


def _checked(column: Column) -> tuple[Column, list[int]]:
    """The strings with null for those that are no UTF-8, and where these are: Parquet's readers do not look."""
    column = column.cast(pa.string())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        broken: list[int] = []
        values: list[str | None] = []
        for at, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                values.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                broken.append(at)
                values.append(None)
        return pa.array(values, pa.string()), broken
    return column, []


def _is_string(type: pa.DataType) -> bool:
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _is_text(type: pa.DataType) -> bool:
    return _is_string(type)


def _is_title(type: pa.DataType) -> bool:
    return _is_string(type) or pa.types.is_null(type)


def _is_id(type: pa.DataType) -> bool:
    return _is_string(type) or pa.types.is_integer(type)


def _named(name: str) -> str:
    return printable(name, NAME_CHARACTERS)
