"""Rows in the order of the corpus, whatever their number: sorted on disk, in bounded memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

from embedstream.errors import OutputError


class Place(NamedTuple):
    """Which chunk of the corpus a row is."""

    part: int
    row: int
    chunk: int


class Ordering:
    """Values by their places. A context manager; its temporary file vanishes with the process, however that ends."""

    def __init__(self) -> None:
        # An empty name is a database in an unnamed file, of which a few megabytes are held in memory.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._run("PRAGMA journal_mode = OFF")
        self._run(
            "CREATE TABLE rows (part INTEGER, row INTEGER, chunk INTEGER, value BLOB, PRIMARY KEY (part, row, chunk)) "
            "WITHOUT ROWID"
        )
        self._run("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def put(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        """Add rows (part, row, chunk, value); one that is there already is replaced. Raises `OutputError`."""
        self._run_all("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", rows)

    def remove(self, places: Iterable[tuple[int, int, int]]) -> None:
        """Remove what is there of these. Raises `OutputError`."""
        self._run_all("DELETE FROM rows WHERE part = ? AND row = ? AND chunk = ?", places)

    def __len__(self) -> int:
        return int(next(self._run("SELECT count(*) FROM rows"))[0])

    def values(self) -> Iterator[bytes]:
        """Every value, in order."""
        return (value for (value,) in self._run("SELECT value FROM rows ORDER BY part, row, chunk"))

    def of_part(self, part: int) -> Iterator[tuple[Place, bytes]]:
        """The rows of one part, in order."""
        found = self._run("SELECT part, row, chunk, value FROM rows WHERE part = ? ORDER BY row, chunk", (part,))
        return ((Place(*place), value) for *place, value in found)

    def _run(self, sql: str, values: tuple[int, ...] = ()) -> Iterator[Any]:
        try:
            return self._database.execute(sql, values)
        except sqlite3.Error as error:
            raise _failed(error) from error

    def _run_all(self, sql: str, rows: Iterable[tuple[object, ...]]) -> None:
        try:
            self._database.executemany(sql, rows)
        except sqlite3.Error as error:
            raise _failed(error) from error


def _failed(error: sqlite3.Error) -> OutputError:
    return OutputError(f"error rows cannot be sorted on disk ({error}): make room, or name another folder (TMPDIR)")
