"""Parts that are tables: rows come as Arrow columns, whatever the format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import pyarrow as pa

from embedstream.corpus.columns import ColumnReader, kept_types
from embedstream.corpus.records import Outcome
from embedstream.dataset.parquet_rows import RowsRefused
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.queue.refusals import Code, refusal
from embedstream.records import PartContent
from embedstream_producer.sources import Source, SourcePart

BATCH_ROWS = 1024
BATCH_BYTES = 8 * 1024 * 1024
"""Most rows judged at once, and about how many bytes of them."""

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class BadRow(NamedTuple):
    """A row of a table that has no columns."""

    why: str
    text: str


class Table(Protocol):
    """A source that is open as a table, at its beginning."""

    source: Source
    schema: pa.Schema

    @property
    def empty(self) -> bool:
        """Whether it has no rows."""

    @property
    def position(self) -> int:
        """Bytes of the source that are read."""

    def rows(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch | BadRow]:
        """The rows in their order, with these columns, about `BATCH_ROWS` at a time. Once."""

    def content(self) -> PartContent:
        """What all bytes of the source are, once its rows are read."""

    def close(self) -> None: ...


class TablePart(SourcePart[Table]):
    """A table. A row's number is its place in it; how rows lie in the file does not show in blocks.

    Folders of its name such as `lang=en` are columns, too, unless the file has one of that name.
    """

    what: str
    """The format, for messages."""
    open: Callable[[Source], Table]

    @property
    def empty(self) -> bool:
        return self._open().empty

    def outcomes(self, spec: JobSpec, on_position: Callable[[int], None] | None = None) -> Iterator[Sequence[Outcome]]:
        table = self._take()
        with contextlib.closing(table), self._explained(table.source):
            if not table.empty:
                yield from self._judged(table, spec, on_position)
            self.content = table.content()
        self._warn(table.source)

    def hint(self, spec: JobSpec) -> str | None:
        table = self._open()
        if table.empty:
            return None
        with self._explained(table.source):
            schema = self._widened(table.schema)
            lacking = ColumnReader(spec, schema, self.label).lacking
            self.kept_types = kept_types(schema, spec.keep)
        if lacking and self.index == 0:
            raise InputError(lacking)
        return lacking or None

    def _judged(
        self, table: Table, spec: JobSpec, on_position: Callable[[int], None] | None
    ) -> Iterator[Sequence[Outcome]]:
        schema = self._widened(table.schema)
        reader = ColumnReader(spec, schema, self.label, self.index)
        added = {name: value for name, value in self._path_fields(table.schema).items() if name in reader.columns}
        row = 0
        for piece in table.rows([name for name in reader.columns if name not in added]):
            if isinstance(piece, BadRow):
                yield [refusal(row, None, Code.BAD_ROW, piece.why, piece.text.encode(errors="replace"))]
                row += 1
                continue
            for name, value in added.items():
                piece = piece.append_column(name, pa.repeat(value, piece.num_rows))
            yield reader.judge(row, piece)
            row += piece.num_rows
            if on_position is not None:
                on_position(table.position)

    def _path_fields(self, schema: pa.Schema) -> dict[str, Any]:
        return {name: value for name, value in path_fields(self.name).items() if name not in schema.names}

    def _widened(self, schema: pa.Schema) -> pa.Schema:
        for name, value in self._path_fields(schema).items():
            schema = schema.append(pa.field(name, value.type))
        return schema

    def _begin(self, source: Source) -> Table:
        try:
            with self._explained(source):
                return type(self).open(source)
        except InputError:
            source.close()
            raise

    @contextlib.contextmanager
    def _explained(self, source: Source) -> Iterator[None]:
        try:
            yield
        except RowsRefused as error:
            raise InputError(f"{self.label}: {error}") from error
        except (pa.ArrowException, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[0].rstrip(".")
            raise InputError(f"{self.label}: is damaged or no {self.what} ({first}): make or fetch it again") from error
        except OSError as error:
            raise source.cannot_read(error) from error


def path_fields(name: str) -> dict[str, Any]:
    """What folders of a name such as `/data/lang=en/year=2024/part.parquet` say of all rows below them, as scalars:
    whole numbers, or strings."""
    fields = {}
    for folder in name.split("/")[:-1]:
        key, equals, value = folder.partition("=")
        if equals and key:
            value = unquote(value)
            whole = value.removeprefix("-").isdecimal() and str(int(value)) == value and abs(int(value)) < 2**63
            null = value in (_NULL_PARTITION, "")
            fields[unquote(key)] = (
                pa.scalar(None, pa.string()) if null else pa.scalar(int(value)) if whole else pa.scalar(value)
            )
    return fields


def gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in as few batches as the bounds on what is judged at once allow."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if any(pa.types.is_dictionary(type) for type in batch.schema.types):
            yield batch  # its bytes do not tell how long its values are
            continue
        if held and (rows + batch.num_rows > BATCH_ROWS or size + batch.nbytes > BATCH_BYTES):
            yield _joined(held)
            held, rows, size = [], 0, 0
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
    if held:
        yield _joined(held)


def sliced(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch of any size in pieces that are well judged at once."""
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    [batch] = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return batch
