"""pgvector: a table of a PostgreSQL database, with an index (HNSW)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from embedstream.dataset.values import Vectors
from embedstream.errors import UsageError
from embedstream.outputs import Dtype
from embedstream.server.connection import mask
from embedstream_producer.exporting.rows import Key, Rows, Source
from embedstream_producer.exporting.target import MARK, origin_of, refuse_other

KINDS: dict[Dtype, tuple[str, str, str, int]] = {
    "float32": ("vector", "vector_cosine_ops", "<=>", 2000),
    "float16": ("halfvec", "halfvec_cosine_ops", "<=>", 4000),
    "int8": ("vector", "vector_cosine_ops", "<=>", 2000),
    "ubinary": ("bit", "bit_hamming_ops", "<~>", 64_000),
}
"""Type, what its index is ordered by, the operator for that, and the most dimensions of such an index."""

TYPES: dict[pa.DataType, str] = {
    pa.string(): "text",
    pa.int32(): "int4",
    pa.int64(): "int8",
    pa.float64(): "float8",
    pa.bool_(): "bool",
}

LONGEST_NAME = 63
"""Bytes; PostgreSQL cuts longer ones."""


class PgvectorTable:
    """Rows of several datasets may lie in one table, if their vectors can be compared."""

    errors = (psycopg.Error,)

    def __init__(self, place: str, table: str, source: Source) -> None:
        if "://" not in place:
            raise UsageError("pgvector: give the database's URL: pgvector:postgresql://user@host/database")
        self._output = source.output
        self._where = f"{mask(place)}: table {table}"
        self._place = place
        self._table = sql.Identifier(table)
        self._origin = origin_of(source)
        self._types = [TYPES[field.type] for field in source.payload]
        self._columns = [*source.payload.names, self._output.name]
        for name in (table, *self._columns):
            if len(name.encode()) > LONGEST_NAME or "\0" in name:
                raise UsageError(f"{name[:60]}: PostgreSQL takes names of at most {LONGEST_NAME} bytes")
        self._type, self._ordered, self._operator, most = KINDS[self._output.dtype]
        self._indexed = self._output.dim <= most

    def check(self) -> bool:
        with psycopg.connect(self._place) as database:
            name = self._table.as_string(database)
            found = database.execute(
                "SELECT to_regclass(%s), obj_description(to_regclass(%s))", (name, name)
            ).fetchone()
            assert found is not None
            if found[0] is None:
                return False
            mark = (found[1] or "").removeprefix(f"{MARK}: ")
            refuse_other(self._where, mark, self._origin, ignored=["job"])
            return True

    def write(self, rows: Iterator[Rows]) -> None:
        with psycopg.connect(self._place) as database:
            database.execute("CREATE EXTENSION IF NOT EXISTS vector")
            if database.execute("SELECT to_regclass(%s)", (self._table.as_string(database),)).fetchone() == (None,):
                self._create(database)
        self.merge(rows)

    def _create(self, database: psycopg.Connection[Any]) -> None:
        kinds = [sql.SQL(kind) for kind in self._types] + [sql.SQL(f"{self._type}({self._output.dim}) NOT NULL")]
        columns = [
            sql.SQL("{} {}").format(sql.Identifier(name), kind) for name, kind in zip(self._columns, kinds, strict=True)
        ]
        database.execute(
            sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY (id, chunk))").format(self._table, sql.SQL(", ").join(columns))
        )
        database.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(self._table, f"{MARK}: {self._origin.encode()}"))

    def remove(self, keys: Sequence[Key]) -> None:
        gone = sql.SQL("DELETE FROM {} WHERE id = %s AND chunk = %s").format(self._table)
        with psycopg.connect(self._place) as database, database.cursor() as cursor:
            cursor.executemany(gone, [(id.replace("\0", "\ufffd"), chunk) for id, chunk in keys])

    def merge(self, rows: Iterator[Rows]) -> None:
        columns = sql.SQL(", ").join(map(sql.Identifier, self._columns))
        renewed = sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(n)) for n in self._columns)
        begin = sql.SQL("CREATE TEMP TABLE new (LIKE {}) ON COMMIT DROP").format(self._table)
        copy = sql.SQL("COPY new ({}) FROM STDIN (FORMAT BINARY)").format(columns)
        move = sql.SQL("INSERT INTO {0} ({1}) SELECT {1} FROM new ON CONFLICT (id, chunk) DO UPDATE SET {2}").format(
            self._table, columns, renewed
        )
        with psycopg.connect(self._place, autocommit=True) as database:
            for some in rows:
                with database.transaction(), database.cursor() as cursor:
                    cursor.execute(begin)
                    with cursor.copy(copy) as into:
                        into.set_types([*self._types, "bytea"])  # these bytes are the vector as pgvector sends it
                        fields = [_without_nul(column).to_pylist() for column in some.payload.columns]
                        for row in zip(*fields, self._sent(some.vectors), strict=True):
                            into.write_row(row)
                    cursor.execute(move)
            if self._indexed:
                self._index(database)

    def _index(self, database: psycopg.Connection[Any]) -> None:
        """Unless the vectors have one. PostgreSQL names it: any name that is chosen here may be taken."""
        there = (
            "SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] "
            "WHERE indrelid = to_regclass(%s) AND attname = %s"
        )
        if database.execute(there, (self._table.as_string(database), self._output.name)).fetchone() is None:
            column, order = sql.Identifier(self._output.name), sql.SQL(self._ordered)
            create = sql.SQL("CREATE INDEX ON {} USING hnsw ({} {})")
            database.execute(create.format(self._table, column, order))

    def search(self, queries: Vectors, k: int) -> list[list[Key]]:
        column, by = sql.Identifier(self._output.name), sql.SQL(self._operator)
        kind = sql.SQL(f"{self._type}({self._output.dim})")
        query = sql.SQL("SELECT id, chunk FROM {} ORDER BY {} {} {}::{} LIMIT {}")
        # Without parameters, as a name may have a character `%`.
        asked = [query.format(self._table, column, by, self._text(vector), kind, k) for vector in queries]
        with psycopg.connect(self._place) as database:
            return [database.execute(each).fetchall() for each in asked]

    def _sent(self, vectors: Vectors) -> list[bytes]:
        """Vectors in pgvector's binary form: dimensions and numbers, all big-endian; of bits their number and they."""
        if self._type == "bit":
            head = self._output.dim.to_bytes(4, "big")
        else:
            head = self._output.dim.to_bytes(2, "big") + b"\0\0"
        numbers: Any = vectors.astype(vectors.dtype.newbyteorder(">"))
        return [head + row.tobytes() for row in numbers]

    def _text(self, vector: Any) -> str:
        if self._type == "bit":
            return "".join(map(str, np.unpackbits(vector)))
        return str(vector.astype(np.float64).tolist())


def _without_nul(column: pa.Array[Any]) -> pa.Array[Any]:
    """PostgreSQL's text takes any character but this one."""
    return pc.replace_substring(column, "\0", "\ufffd") if pa.types.is_string(column.type) else column
