"""The longest row of a list column, told before it is decoded; and corpora whose lists are larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.arrow_memory import arrow_memory

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.parquet_lists import longest_row, longest_value
from embedstream.dataset.parquet_pages import read_pages
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.settings import MIB
from embedstream_producer.corpus import check_sources


def arrow(codec: Any, version: Any) -> Callable[[pa.Table, Path], object]:
    def write(table: pa.Table, path: Path) -> None:
        pages: Any = {"data_page_version": version, "data_page_size": 500, "write_batch_size": 7}
        pq.write_table(table, path, compression=codec, **pages)

    return write


WRITERS: dict[str, Callable[[pa.Table, Path], object]] = {
    **{
        f"{codec} {version}": arrow(codec, version)
        for codec in ("none", "snappy", "zstd", "gzip", "brotli", "lz4")
        for version in ("1.0", "2.0")
    },
    "page index": lambda table, path: pq.write_table(table, path, data_page_size=500, write_page_index=True),
    "polars": lambda table, path: pl.DataFrame(pl.from_arrow(table)).write_parquet(path),
    "duckdb": lambda table, path: duckdb.connect().from_arrow(table).write_parquet(str(path)),
}


def told(path: Path) -> tuple[int | None, int | None]:
    """Most values of a row of the only column, and bytes of the longest string of its dictionary."""
    found, longest = 0, None
    file, metadata = pa.OSFile(str(path), "rb"), pq.ParquetFile(path)
    with file:
        source: Any = file

        def read(at: int, size: int) -> bytes:
            return bytes(source.read_at(size, at))

        for group in range(metadata.num_row_groups):
            chunk = metadata.metadata.row_group(group).column(0)
            pages = list(read_pages(read, chunk))
            codec = chunk.compression.lower()
            row = longest_row(read, codec, pages, metadata.schema.column(0).max_repetition_level)
            if row is None:
                return None, None
            found = max(found, row)
            if pages[0].shared and chunk.physical_type == "BYTE_ARRAY":
                longest = max(longest or 0, longest_value(read, codec, pages[0]) or 0)
    return found, longest


def size_of(value: object) -> int:
    """Values that a row has on disk: one for nothing at all."""
    return max(1, sum(map(size_of, value))) if isinstance(value, list) else 1


ROWS = [None, [], [1] * 3, [None, 2], [7] * 300, [4], [], [1, 2] * 40, *[[5] * 9] * 50, list(range(1000)), [3]] * 3


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("nested", [False, True], ids=["list", "lists"])
def test_the_longest_row_is_told_as_it_is(writer: str, nested: bool, tmp_path: Path) -> None:
    rows: list[Any] = [None if row is None else [row, [], row] for row in ROWS] if nested else ROWS
    WRITERS[writer](pa.table({"l": pa.array(rows)}), tmp_path / "l.parquet")
    assert told(tmp_path / "l.parquet")[0] == max(map(size_of, rows))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 40).map(lambda size: [1] * size)), min_size=1, max_size=60))
def test_any_lists_are_told(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    pq.write_table(pa.table({"l": pa.array(rows, pa.list_(pa.int64()))}), path, data_page_size=60, write_batch_size=3)
    assert told(path)[0] == max(map(size_of, rows))


def test_the_longest_string_of_a_dictionary_is_told(tmp_path: Path) -> None:
    rows = [["a", "é" * 50, ""], ["b" * 30]]
    pq.write_table(pa.table({"l": pa.array(rows)}), tmp_path / "l.parquet")
    assert told(tmp_path / "l.parquet") == (3, 100)


@given(st.binary(max_size=40), st.integers(1, 2000), st.integers(1, 3))
def test_whatever_stands_for_levels_is_told_as_damage(data: bytes, values: int, highest: int) -> None:
    from embedstream.dataset.parquet_pages import Page

    try:
        row = longest_row(lambda _at, _size: data, "uncompressed", [Page(values, 99, False, 0, 40, len(data))], highest)
    except ValueError:
        return
    assert row is not None
    assert 1 <= row <= values


def read(path: Path, **changed: Any) -> list[dict[str, Any]]:
    [part] = check_sources([str(path)])
    spec = JobSpec(queue="q", output="/out", model="m", parts=(part.name,), **changed)
    with DuplicateIndex() as index:
        return [row for block in part.blocks(spec, index) for row in block.rows.to_pylist()]


def long_strings(rows: int) -> pa.Table:
    """One row that names one string of a kilobyte a third of a million times."""
    tags = pa.ListArray.from_arrays(
        pa.array([*range(rows), rows - 1 + 300_000], pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array([0] * (rows - 1 + 300_000), pa.int32()), pa.array(["x" * 1000])),
    )
    return pa.table({"id": pa.array(range(rows)), "text": ["words"] * rows, "tags": tags})


def equal_numbers(rows: int) -> pa.Table:
    tags = pa.ListArray.from_arrays(
        pa.array([*range(rows), 20_000_000], pa.int32()), pa.repeat(pa.scalar(7, pa.int64()), 20_000_000)
    )
    return pa.table({"id": pa.array(range(rows)), "text": ["words"] * rows, "tags": tags})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (long_strings, r"column tags\S* has a row of 300,000 values that may have more than [\d,]+ bytes: leave"),
        (equal_numbers, r"column tags\S* has a row of 19,999,\d+ values, more than the 524,288 that are read at once"),
    ],
)
def test_a_kept_list_larger_than_memory_is_refused_before_it_is_decoded(
    make: Callable[[int], pa.Table], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(make(10), path, compression="zstd")
    assert path.stat().st_size < 100_000
    with arrow_memory() as peak, pytest.raises(InputError, match=says):
        read(path, keep=("tags",))
    assert peak() < 40 * MIB
    assert len(read(path)) == 10


def test_usual_lists_are_kept_however_many_rows_have_them(tmp_path: Path) -> None:
    rows = 40_000
    tags = [[f"tag {row % 997}", "y" * (row % 800)] * (row % 10) for row in range(rows)]
    table = pa.table({"id": pa.array(range(rows)), "text": ["words"] * rows, "tags": tags})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=rows)
    found = read(tmp_path / "c.parquet", keep=("tags",))
    assert len(found) == rows
    assert found[-1]["tags"].count("tag ") == (rows - 1) % 10


def test_a_field_whose_name_has_dots_is_bounded_as_any(tmp_path: Path) -> None:
    table = long_strings(10).rename_columns(["id", "text", "a.b"])
    pq.write_table(table, tmp_path / "c.parquet", compression="zstd")
    with arrow_memory() as peak, pytest.raises(InputError, match="has a row of 300,000 values"):
        read(tmp_path / "c.parquet", keep=("a.b",))
    assert peak() < 40 * MIB
