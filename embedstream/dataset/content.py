"""What a sink may rely on in the rows it is given, and the order it writes them in."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.jobs import JobSpec
from embedstream.records import ShardContent

_ORDER = ("part", "row", "chunk")


def check_content(content: ShardContent, spec: JobSpec) -> None:
    """Raise `ValueError` unless rows have the job's schema, no nulls where none may be, and the record's counts."""
    record = content.record
    for what, table, schema, rows in (
        ("rows", content.data, dataset_schema(spec, record.outputs), record.rows),
        ("error rows", content.errors, errors_schema(), record.failed),
    ):
        if not table.schema.equals(schema):
            raise ValueError(f"shard {record.name}: {what} have columns\n{table.schema}\nexpected\n{schema}")
        if table.num_rows != rows:
            raise ValueError(f"shard {record.name}: its record says {rows} {what}, there are {table.num_rows}")
        for field in schema:
            if not field.nullable and table.column(field.name).null_count:
                raise ValueError(f"shard {record.name}: null in column {field.name} of its {what}")
    if record.job != spec.job:
        raise ValueError(f"shard {record.name}: of job {record.job}, and this is the output of job {spec.job}")


def in_order(table: pa.Table) -> pa.Table:
    """The rows by (part, row, chunk); the same table if they are in order already."""
    if _ordered(table):
        return table
    return table.sort_by([(name, "ascending") for name in _ORDER])


def _ordered(table: pa.Table) -> bool:
    part, row, chunk = (table.column(name).combine_chunks() for name in _ORDER)
    if len(part) < 2:
        return True
    part0, row0, chunk0 = (column.slice(0, len(column) - 1) for column in (part, row, chunk))
    part1, row1, chunk1 = (column.slice(1) for column in (part, row, chunk))
    later_chunk = pc.and_(pc.equal(row0, row1), pc.less(chunk0, chunk1))
    later_row = pc.and_(pc.equal(part0, part1), pc.or_(pc.less(row0, row1), later_chunk))
    return pc.all(pc.or_(pc.less(part0, part1), later_row)).as_py() is True
