"""No Parquet file crashes the producer or takes more memory than its bound: blocks or errors of the family come out."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab.arrow_memory import arrow_memory

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.parquet_rows import COLUMN_BYTES
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream_producer.corpus import check_sources

ROWS = 300
DATA = pa.table(
    {
        "id": [f"id-{row}" for row in range(ROWS)],
        "title": [None if row % 3 else f"title {row}" for row in range(ROWS)],
        "text": [f"text {row % 40} " * (row % 7 + 1) for row in range(ROWS)],
        "lang": pa.array([["en", "fr"][: row % 3] for row in range(ROWS)]),
    }
)


def encoded(**options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(DATA, sink, row_group_size=100, **options)  # type: ignore[arg-type]
    return sink.getvalue().to_pybytes()


FILES = [
    encoded(),
    encoded(use_dictionary=False, compression="zstd", data_page_version="2.0"),
    encoded(compression="none"),
]


def reads_or_says_why(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with arrow_memory() as most:
        with contextlib.suppress(InputError):
            [part] = check_sources([str(path)])
            spec = JobSpec(queue="q", output="/out", model="m", parts=(part.name,), keep=("lang",))
            part.hint(spec)
            with DuplicateIndex() as index:
                for block in part.blocks(spec, index):
                    block.rows.validate(full=True)
        assert most() < 4 * COLUMN_BYTES, f"Arrow took {most():,} bytes"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5),
    st.booleans(),
)
def test_a_mutated_file(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, edits: list[tuple[float, bytes]], in_footer: bool
) -> None:
    data = bytearray(whole)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    first, size = (footer, len(data) - footer) if in_footer else (0, footer)
    for place, piece in edits:
        at = first + int(place * size)
        data[at : at + len(piece)] = piece
    reads_or_says_why(tmp_path_factory.getbasetemp() / "mutated.parquet", bytes(data))


@pytest.mark.parametrize("whole", FILES, ids=["dictionaries", "pages of version 2", "uncompressed"])
def test_a_file_that_is_cut_anywhere(whole: bytes, tmp_path: Path) -> None:
    for at in sorted(random.Random(3).sample(range(4, len(whole)), 40)):
        reads_or_says_why(tmp_path / "cut.parquet", whole[:at])
        reads_or_says_why(tmp_path / "cut.parquet", whole[:at] + whole[-(len(whole) - at) // 2 :])
