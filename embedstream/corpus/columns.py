"""Rows that come as Arrow columns -> what the job needs of them, or the reason why not; judged by the column.

Every row ends as `RecordReader.record` would end it. Rows in which anything is unusual are handed to that, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute

from embedstream.corpus.advice import unknown
from embedstream.corpus.records import (
    INVISIBLE,
    LONGEST_ID_BYTES,
    LONGEST_KEPT_BYTES,
    Outcome,
    Record,
    RecordReader,
    Unreadable,
    kept_value,
)
from embedstream.errors import InputError
from embedstream.jobs import JobSpec, KeptType
from embedstream.queue.kept import fits, kept_type
from embedstream.queue.refusals import Code, RowRefused, refusal
from embedstream.terminal import printable

Column = Any
"""A `pa.Array`."""

pc: Any = pyarrow.compute
"""Untyped, as the stubs know only the simplest form of each function."""

_VISIBLE = f"[^{INVISIBLE}]"

NAMED_COLUMNS = 50
NAME_CHARACTERS = 60
"""How many column names, and how much of each, a message repeats."""


class ColumnReader:
    """Judges the rows of one job in batches of one schema."""

    def __init__(self, spec: JobSpec, schema: pa.Schema, label: str, part: int = 0) -> None:
        """`label` names the input in messages; `part` is its number.

        Raises:
            InputError: no column for id or text, or one of a type that cannot be used; tells the columns there are.
        """
        self._rows = RecordReader(spec, part)
        self._spec = spec
        self._schema = schema
        self._label = label
        self._ids = [] if spec.number_rows else self._usable(self._rows.ids, "id", "--number-rows, or --id-field")
        self._texts = self._usable(self._rows.texts, "text", "--text-field")
        title = self._rows.title
        self._title = title if title != self._texts[0] and _type(schema, title) is not None else None
        if spec.title_field and _type(schema, title) is None:
            raise self._missing(f"column {_named(title)}", "--title-field")
        if self._title is not None and not _is_title(_type(schema, title)):
            raise self._not_usable(title, "a title must be a string; --title-field takes another")
        self._absent = [name for name in spec.keep if _type(schema, name) is None]
        kept = [name for name in spec.keep if name not in self._absent]
        wanted = [*self._ids, *self._texts, *([] if self._title is None else [self._title]), *kept]
        self.columns = list(dict.fromkeys(wanted))
        """The columns to read; those of a struct with dots (`body.input`)."""
        for name in self.columns:
            head = name if name in schema.names else name.partition(".")[0]
            if schema.names.count(head) > 1:
                raise InputError(f"{label}: has {schema.names.count(head)} columns called {_named(head)}: rename one")

    @property
    def lacking(self) -> str:
        """A sentence on fields that the job keeps and no row has, if there are any."""
        if not self._absent:
            return ""
        return f"{self._label}: has no column {' or '.join(self._absent)} (--keep): " + unknown(
            self._absent, self._schema.names
        )

    def judge(self, row: int, batch: pa.RecordBatch) -> Sequence[Outcome]:
        """How the rows end. `batch` has `columns`; `row` is the position of its first row in the part."""
        plain, broken = self._plain(batch)
        ids, texts, sizes, clean, titles = self._judged(row, plain)
        kept, clean = self._kept(plain, clean)
        sources = map(_Row, repeat(plain), range(batch.num_rows))
        rows = range(row, row + batch.num_rows)
        outcomes: list[Outcome] = list(
            map(Record, rows, ids.to_pylist(), texts.to_pylist(), sizes.to_pylist(), kept, sources, titles)
        )
        for at in pc.indices_nonzero(pc.invert(clean)).to_pylist():
            source = _Row(plain, at)
            outcomes[at] = self._rows.record(row + at, dict(source))
        for at, name in broken.items():
            message = f'column "{_named(name)}" has bytes that are not UTF-8; convert the file'
            outcomes[at] = refusal(row + at, None, Code.NOT_UTF8, message, _Row(plain, at))
        return outcomes

    def _judged(self, row: int, batch: pa.RecordBatch) -> tuple[Column, Column, Column, Column, Iterable[str]]:
        """Ids, texts with their titles in front, their bytes of UTF-8, in which rows nothing is unusual so far, and
        the titles that are not in front."""
        if self._rows.numbered is None:
            id_column: Column = batch.column(self._ids[0])
            ids = id_column if pa.types.is_string(id_column.type) else id_column.cast(pa.string())
        else:
            ids = pa.array([f"{self._rows.numbered}{at}" for at in range(row, row + batch.num_rows)], pa.string())
        texts: Column = batch.column(self._texts[0])
        clean = pc.and_(ids.is_valid(), texts.is_valid())
        titles: Iterable[str] = repeat("", batch.num_rows)
        title: Column = None if self._title is None else batch.column(self._title)
        if title is not None and pa.types.is_string(title.type):
            titled = pc.greater(pc.binary_length(title), 0).fill_null(False)
            empty = pc.equal(pc.binary_length(texts), 0).fill_null(True)
            blank = pc.invert(pc.match_substring_regex(title, _VISIBLE)).fill_null(False)
            clean = pc.and_not(clean, pc.and_(titled, pc.or_(empty, blank)))
            if self._rows.joins:
                joined = pc.binary_join_element_wise(title, texts, self._rows.title_sep)
                texts = pc.if_else(titled, joined, texts)
            else:
                clean = pc.and_not(clean, pc.match_substring(title, "\0").fill_null(False))
                titles = pc.fill_null(title, "").to_pylist()
        sizes = pc.binary_length(texts)
        id_sizes = pc.binary_length(ids)
        for within in (
            pc.and_(pc.greater(sizes, 0), pc.less_equal(sizes, self._rows.longest_text_bytes)),
            pc.and_(pc.greater(id_sizes, 0), pc.less_equal(id_sizes, LONGEST_ID_BYTES)),
            pc.invert(pc.or_(pc.match_substring(texts, "\0"), pc.match_substring(ids, "\0"))),
            pc.match_substring_regex(texts, _VISIBLE),
        ):
            clean = pc.and_(clean, within.fill_null(False))
        return ids, texts, sizes, clean, titles

    def _kept(self, batch: pa.RecordBatch, clean: Column) -> tuple[Iterator[tuple[str | None, ...]], Column]:
        """The kept fields of each row; and `clean` without the rows in which they are unusual."""
        if not self._spec.keep:
            return repeat((), batch.num_rows), clean
        columns, total = [], pa.repeat(pa.scalar(0, pa.int64()), batch.num_rows)
        for name in self._spec.keep:
            if name in self._absent:
                columns.append([None] * batch.num_rows)
                continue
            values, readable = _as_strings(batch.column(name))
            if name == self._spec.query_field and not pa.types.is_string(batch.column(name).type):
                readable = pc.and_(readable, values.is_null())  # `RecordReader` refuses each such row
            texts = values.to_pylist()
            unusual = pc.match_substring(values, "\0").fill_null(False)
            clean = pc.and_(clean, pc.and_not(readable, unusual))
            wanted = self._spec.keep_types.get(name, "string")
            if wanted not in ("string", kept_type(batch.column(name).type)):
                fitting = [text is None or fits(text, wanted) for text in texts]
                clean = pc.and_(clean, pa.array(fitting, pa.bool_()))
            total = pc.add(total, pc.binary_length(values).fill_null(0))
            columns.append(texts)
        return zip(*columns, strict=True), pc.and_(clean, pc.less_equal(total, LONGEST_KEPT_BYTES))

    def _plain(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, str]]:
        """The columns in simple types, and the rows that hold what is no UTF-8, with the column's name; null there."""
        columns: list[Column] = []
        broken: dict[int, str] = {}
        for name in self.columns:
            column = _column(batch, name)
            if pa.types.is_dictionary(column.type):
                values = column.dictionary
                if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
                    values = values.cast(pa.binary())  # views cannot be decoded
                column = pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
            if isinstance(column.type, pa.UuidType):
                column = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
            elif isinstance(column.type, pa.JsonType):
                column = column.storage
            if _is_string(column.type):
                column, rows = _checked(column)
                broken |= dict.fromkeys(rows, name)
            elif pa.types.is_timestamp(column.type) and column.type.unit == "ns":
                # Python's dates end at microseconds.
                column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, names=self.columns), broken

    def _usable(self, names: tuple[str, ...], usual: str, flag: str) -> list[str]:
        """Those of the columns, at least one, that can be an id or a text; the first of them is, unless it is null."""
        there = [name for name in names if _type(self._schema, name) is not None]
        if not there:
            what = f"column {_named(names[0])}" if len(names) == 1 else f"{usual} column ({', '.join(names)})"
            raise self._missing(what, flag)
        fits = _is_id if usual == "id" else _is_text
        usable = [name for name in there if fits(_type(self._schema, name))]
        if not usable:
            rule = "an id must be a string or a whole number" if usual == "id" else "a text must be a string"
            raise self._not_usable(there[0], f"{rule}; --{usual}-field takes another")
        return usable

    def _missing(self, what: str, flag: str) -> InputError:
        every = list(_paths(self._schema))
        names = [_named(name) for name in every[:NAMED_COLUMNS]]
        more = len(every) - len(names)
        there = ", ".join(names) + (f" and {more} more" if more else "")
        return InputError(f"{self._label}: has no {what} (there are: {there or 'none'}): name one ({flag})")

    def _not_usable(self, name: str, rule: str) -> InputError:
        type = printable(str(_type(self._schema, name)), NAME_CHARACTERS)
        return InputError(f"{self._label}: column {_named(name)} is {type}; {rule}")


def kept_types(schema: pa.Schema, keep: Sequence[str]) -> dict[str, KeptType]:
    """The types that kept columns have in the dataset, unless the job says others; of those that are there, and hold
    more than nulls.
    """
    found = {name: _type(schema, name) for name in keep}
    return {name: kept_type(type) for name, type in found.items() if type is not None and not pa.types.is_null(type)}


class _Row(Mapping[str, object]):
    """One row of a batch, looked up when it is asked for."""

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
    except Exception:  # noqa: BLE001 - years beyond 9999, zones that are not known here, bytes that are no UTF-8 in a list
        return Unreadable(printable(str(scalar.type), NAME_CHARACTERS))


def _checked(column: Column) -> tuple[Column, list[int]]:
    """The strings with null for those that are no UTF-8, and where these are: Parquet's readers do not look."""
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    column = column.cast(pa.string(), safe=False)
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


def _type(schema: pa.Schema, name: str) -> Any:
    """The type of a column, or of a field of a struct (`body.input`), without its coding; None if there is none."""
    if name in schema.names:
        type = schema.types[schema.names.index(name)]
        return type.value_type if pa.types.is_dictionary(type) else type
    head, dot, rest = name.partition(".")
    inside = _type(schema, head) if dot else None
    return _type(pa.schema(list(inside)), rest) if inside is not None and pa.types.is_struct(inside) else None


def _paths(fields: Iterable[Any], above: str = "") -> Iterator[str]:
    """The names of columns; in place of a struct those of its fields, with dots (`body.input`)."""
    for field in fields:
        if pa.types.is_struct(field.type) and "." not in field.name:
            yield from _paths(field.type, f"{above}{field.name}.")
        else:
            yield above + field.name


def _column(batch: Any, name: str) -> Column:
    """A column, or a field of a struct, null where the struct is."""
    if name in batch.schema.names:
        return batch.column(name)
    head, _, rest = name.partition(".")
    struct = batch.column(head)
    fields = pa.RecordBatch.from_arrays(struct.flatten(), [field.name for field in struct.type])
    return _column(fields, rest)


def _is_string(type: pa.DataType) -> bool:
    """Also where a column of bytes was not said to be of characters, as by Spark and Impala: UTF-8, as far as it is."""
    return (
        pa.types.is_string(type)
        or pa.types.is_large_string(type)
        or pa.types.is_string_view(type)
        or pa.types.is_binary(type)
        or pa.types.is_large_binary(type)
        or pa.types.is_binary_view(type)
        or pa.types.is_fixed_size_binary(type)
    )


def _is_text(type: pa.DataType) -> bool:
    return _is_string(type) or isinstance(type, pa.JsonType)


def _is_title(type: pa.DataType) -> bool:
    return _is_text(type) or pa.types.is_null(type)


def _is_id(type: pa.DataType) -> bool:
    whole = pa.types.is_integer(type) or (pa.types.is_decimal(type) and type.scale == 0)
    return _is_string(type) or whole or isinstance(type, pa.UuidType)


def _named(name: str) -> str:
    return printable(name, NAME_CHARACTERS)
