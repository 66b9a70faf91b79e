"""Pages of Parquet files as their headers tell them, and how much of a column may be decoded at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.dataset.parquet_pages import Page, read_pages, values_at_once

ROWS = 20_000
TABLE = pa.table({"id": pa.array(range(ROWS)), "text": [f"text {i % 700} " * (i % 30) for i in range(ROWS)]})

WRITERS: dict[str, Callable[[Path], object]] = {
    "dictionary": lambda path: pq.write_table(TABLE, path),
    "plain": lambda path: pq.write_table(TABLE, path, use_dictionary=False, compression="zstd"),
    "version 2": lambda path: pq.write_table(TABLE, path, data_page_version="2.0", data_page_size=10_000),
    "delta": lambda path: pq.write_table(
        TABLE, path, use_dictionary=False, column_encoding={"id": "DELTA_BINARY_PACKED", "text": "DELTA_BYTE_ARRAY"}
    ),
    "checksums": lambda path: pq.write_table(TABLE, path, write_page_checksum=True, compression="none"),
    "polars": lambda path: pl.DataFrame(pl.from_arrow(TABLE)).write_parquet(path),
    "duckdb": lambda path: duckdb.connect().from_arrow(TABLE).write_parquet(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_pages_of_a_column_add_up_to_what_its_footer_says(writer: str, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path / "c.parquet")
    metadata = pq.read_metadata(tmp_path / "c.parquet")
    file: Any = pa.OSFile(str(tmp_path / "c.parquet"), "rb")
    with file:
        for group in range(metadata.num_row_groups):
            for column in range(2):
                chunk = metadata.row_group(group).column(column)
                pages = list(read_pages(lambda at, size: file.read_at(size, at), chunk))
                assert sum(page.values for page in pages) == chunk.num_values
                headers = chunk.total_uncompressed_size - sum(page.bytes for page in pages)
                assert 10 * len(pages) <= headers <= 300 * len(pages)
                assert pages[0].shared is (chunk.has_dictionary_page or "DELTA_BYTE_ARRAY" in chunk.encodings)


@given(
    st.lists(st.builds(Page, st.integers(0, 40), st.integers(0, 100), st.just(False)), max_size=12),
    st.integers(1, 64),
    st.integers(1, 300),
)
def test_rows_decoded_at_once_never_lie_in_more_than_the_bound(pages: list[Page], most: int, bound: int) -> None:
    at_once = values_at_once(pages, most, bound)
    owners = [at for at, page in enumerate(pages) for _ in range(page.values)]
    assert 1 <= at_once <= most
    for first in range(len(owners) if at_once > 1 else 0):
        touched = range(owners[first], owners[min(first + at_once, len(owners)) - 1] + 1)
        assert sum(pages[at].bytes for at in touched if pages[at].values) <= bound


def test_values_that_share_their_bytes_are_counted_as_long_as_a_page_each() -> None:
    assert values_at_once([Page(0, 1000, True), Page(50_000, 10, False)], 1024, 64_000) == 64
    assert values_at_once([Page(0, 1000, False), Page(50_000, 10, False)], 1024, 64_000) == 1024
    assert values_at_once([Page(0, 70_000, True)], 1024, 64_000) == 1


@given(st.binary(max_size=60))
def test_whatever_stands_for_a_page_is_told_as_damage(data: bytes) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE.slice(0, 10), sink, use_dictionary=False)
    chunk = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0).column(0)
    held = bytes(chunk.data_page_offset) + data
    try:
        for page in read_pages(lambda at, size: held[at : at + size], chunk):
            assert page.values >= 0 <= page.bytes
    except ValueError:
        return
