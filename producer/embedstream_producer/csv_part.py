"""CSV and TSV of a corpus: a header, quotes, and all values as text."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from io import IOBase
from pathlib import PurePath
from typing import Any, cast

import pyarrow as pa
import pyarrow.csv

from embedstream.corpus.records import LONGEST_LINE_BYTES
from embedstream.errors import InputError
from embedstream.records import PartContent
from embedstream_producer.plain import PlainStream
from embedstream_producer.sources import Source, rest_of
from embedstream_producer.tables import BadRow, TablePart, sliced

SUFFIXES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
"""Of names, with what stands between two values."""

_DELIMITERS = ",\t;|"
_FOLLOWING = 32
"""Lines by which JSON lines are told from CSV."""
_LINE_END, _LINE_END_BYTES = re.compile(r"[\r\n]"), re.compile(rb"[\r\n]")
_NAME = re.compile(r"[\w .:/()-]{1,60}")


class _Ended:
    """A stream with one more line at its end. A reader that does not find that line is within quotes.

    Each piece has the end of a line, if it can: of a first one that has none Arrow says that there are no rows.
    """

    closed = False  # asked for by Arrow

    def __init__(self, plain: PlainStream, line: str) -> None:
        self._plain = plain
        self._left = f"\n{line}".encode() if plain.head else b""

    def read(self, size: int, /) -> bytes:
        data = b""
        while len(data) < size and not _LINE_END_BYTES.search(data):
            more = self._plain.read(size - len(data))
            if not more:
                room = size - len(data)
                more, self._left = self._left[:room], self._left[room:]
                return data + more
            data += more
        return data


class CsvTable:
    """A table whose header is read. A value without quotes that is empty is null, one in quotes is an empty text."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._plain = source.plain
        self._bad: deque[Any] = deque()
        names = header(self._plain.head, source.label) or []
        between = delimiter(self._plain.head, source.label)
        # A row of another length than all others; within quotes it would be but two more of them, and go on.
        self._last = '""' if len(names) != 1 else f'""{between}""'
        self._reader = self._opened(names, between)
        self.schema = pa.schema([]) if self._reader is None else self._reader.schema
        if self.schema.names != names or (self._reader is None and _from_header(self._plain.head)):
            # Values of columns that are not known before would be taken for numbers and dates.
            raise InputError(f"{source.label}: its header is damaged, or too long: repair the file")
        self._first = self._next()

    @property
    def empty(self) -> bool:
        return self._first is None and not self._bad

    @property
    def position(self) -> int:
        return self._plain.position

    def rows(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch | BadRow]:
        row, batch = 0, self._first
        while batch is not None:
            batch = batch.select(columns)
            while batch.num_rows:
                # Rows that were skipped lie between those of the batch.
                before = min(self._bad[0].number - 2 - row, batch.num_rows) if self._bad else batch.num_rows
                if before > 0:
                    yield from sliced(batch.slice(0, before))
                    row, batch = row + before, batch.slice(before)
                else:
                    yield self._bad_row()
                    row += 1
            batch = self._next()
        while self._bad:
            yield self._bad_row()

    def content(self) -> PartContent:
        return rest_of(self._plain, self.source)

    def close(self) -> None:
        self.source.close()

    def _opened(self, names: Sequence[str], between: str) -> Any:
        """None: there is not even a header."""
        csv_of: Any = pyarrow.csv
        with self._explained():
            try:
                return csv_of.open_csv(
                    pa.PythonFile(cast("IOBase", _Ended(self._plain, self._last)), mode="r"),
                    # Threads would tell of bad rows without their numbers.
                    read_options=csv_of.ReadOptions(use_threads=False, block_size=LONGEST_LINE_BYTES),
                    parse_options=csv_of.ParseOptions(
                        delimiter=between,
                        newlines_in_values=True,
                        invalid_row_handler=self._skip,
                    ),
                    convert_options=csv_of.ConvertOptions(
                        column_types=dict.fromkeys(names, pa.string()),
                        check_utf8=False,
                        null_values=[""],
                        strings_can_be_null=True,
                        quoted_strings_can_be_null=False,
                    ),
                )
            except pa.ArrowInvalid as error:
                if "Empty CSV" not in str(error):
                    raise
                return None

    def _next(self) -> pa.RecordBatch | None:
        with self._explained():
            for batch in self._reader or ():
                if batch.num_rows:
                    return cast("pa.RecordBatch", batch)
        if self._reader is not None:
            if not self._bad or self._bad.pop().text != self._last:
                raise InputError(f"{self.source.label}: a quote is never closed: repair the file")
            self._reader = None
        return None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error):
                raise
            raise InputError(
                f"{self.source.label}: a row has more than {LONGEST_LINE_BYTES:,} bytes, or a quote is never closed: "
                f"split the row, or repair the file"
            ) from error

    def _skip(self, row: Any) -> str:
        self._bad.append(row)
        return "skip"

    def _bad_row(self) -> BadRow:
        row = self._bad.popleft()
        return BadRow(f"the row has {row.actual_columns} values, the header {row.expected_columns}", row.text)


class CsvPart(TablePart):
    """A CSV or TSV file or stream."""

    what = "CSV file"
    open = CsvTable


def delimiter(head: bytes, name: str) -> str:
    """What stands between two values: the most frequent sign of the first line that is not empty; of equally frequent
    ones that which a name ending in .tsv or .csv says."""
    line = _LINE_END.split(_from_header(head), 1)[0]
    return max(SUFFIXES.get(suffix(name), ",") + _DELIMITERS, key=line.count)


def header(head: bytes, name: str) -> list[str]:
    """The names of the columns; none where there is no header."""
    try:
        return next(csv.reader(io.StringIO(_from_header(head), newline=""), delimiter=delimiter(head, name)), [])
    except csv.Error:  # zero bytes
        return []


def looks_like_csv(head: bytes, name: str) -> bool:
    """Whether the first line is a header of several columns, and none that follows is JSON."""
    names = header(head, name)
    if any(line.lstrip().startswith(b"{") for line in head.splitlines()[1:_FOLLOWING]):
        return False
    return len(names) > 1 and len(set(names)) == len(names) and all(_NAME.fullmatch(name.strip()) for name in names)


def suffix(name: str) -> str:
    """The ending of a name, that of a compression left out."""
    path = PurePath(name.partition("?")[0])
    if path.suffix in (".gz", ".zst"):
        path = path.with_suffix("")
    return path.suffix.lower()


def _from_header(head: bytes) -> str:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n").decode(errors="replace")
