"""The Parquet as other programs read it."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_lab import DIM, Dataset, make_content, make_spec, vectors

from embedstream.dataset.folder import FolderSink

ROWS = 40
MATRIX = vectors(ROWS)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    spec = make_spec(str(tmp_path / "it's $out"))
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    dataset.write(make_content(spec, matrix=MATRIX, rows_per_block=ROWS))
    dataset.end()
    return dataset


def path_of(dataset: Dataset) -> str:
    return str(Path(dataset.spec.output) / "part-a.parquet")


def test_pyarrow_reads_the_schema_with_its_not_nulls(dataset: Dataset) -> None:
    schema = pq.read_schema(path_of(dataset))
    text = pa.string()
    columns = [(field.name, field.type, field.nullable) for field in schema]
    assert columns == [
        ("part", pa.int32(), False),
        ("row", pa.int64(), False),
        ("id", text, False),
        ("chunk", pa.int32(), False),
        ("text", text, False),
        ("n_tokens", pa.int32(), False),
        ("truncated", pa.bool_(), False),
        ("input_hash", pa.binary(16), False),
        ("lang", text, True),
        ("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False), DIM), False),
    ]
    assert pq.read_table(path_of(dataset)).equals(make_content(dataset.spec, matrix=MATRIX, rows_per_block=ROWS).data)


def test_the_file_itself_requires_vectors_at_both_levels_and_splits_their_bytes(dataset: Dataset) -> None:
    file = pq.ParquetFile(path_of(dataset))
    leaf = file.schema.column(len(file.schema) - 1)
    assert (leaf.path, leaf.max_definition_level) == ("embedding.list.element", 1)
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["embedding.list.element"].encodings
    assert not columns["embedding.list.element"].has_dictionary_page
    assert columns["lang"].has_dictionary_page
    assert columns["row"].has_column_index
    assert {c.compression for name, c in columns.items() if name != "input_hash"} == {"ZSTD"}


def test_rows_are_grouped_by_about_a_hundred_megabytes(dataset: Dataset) -> None:
    wide = vectors(20_000, dim=1536)  # 123 MB
    dataset.sink.write_shard(make_content(dataset.spec, "wide", matrix=wide, rows_per_block=len(wide)))
    metadata = pq.read_metadata(Path(dataset.spec.output) / "part-wide.parquet")
    assert metadata.num_row_groups == 2
    assert metadata.row_group(0).num_rows > 15_000


def test_duckdb_reads_vectors_as_float_lists_and_computes_with_them(dataset: Dataset) -> None:
    connection = duckdb.connect()
    described = connection.execute("DESCRIBE SELECT * FROM read_parquet($1)", [path_of(dataset)]).fetchall()
    assert {column[0]: column[1] for column in described}["embedding"] == "FLOAT[]"
    query = f"SELECT id, array_cosine_similarity(embedding::FLOAT[{DIM}], $2::FLOAT[{DIM}]) s FROM read_parquet($1)"
    best = connection.execute(f"{query} ORDER BY s DESC LIMIT 1", [path_of(dataset), MATRIX[7].tolist()]).fetchall()
    ((id, score),) = best
    assert id == "0-7"
    assert score == pytest.approx(1.0, abs=1e-6)


def test_polars_reads_vectors_as_arrays(dataset: Dataset) -> None:
    frame = polars.read_parquet(path_of(dataset))
    assert frame.schema["embedding"] == polars.Array(polars.Float32, DIM)
    assert np.array_equal(frame["embedding"].to_numpy(), MATRIX)


def described_rows(dataset: Dataset) -> list[str]:
    """The ids that the advised line selects, run as its shell would."""
    match = re.fullmatch(r'duckdb -c "(.*)"', dataset.sink.describe())
    assert match is not None
    sql = re.sub(r'\\([\\"$`])', r"\1", match[1]).replace(" LIMIT 5", "")
    return sorted(row[0] for row in duckdb.connect().execute(sql).fetchall())


def test_the_advised_line_reads_the_dataset_and_nothing_that_is_unlisted(dataset: Dataset) -> None:
    ids = sorted(f"0-{i}" for i in range(ROWS))
    assert "part-*.parquet" in dataset.sink.describe()
    assert described_rows(dataset) == ids
    dataset.sink.write_shard(make_content(dataset.spec, "unlisted", [(1, 0)]))
    assert described_rows(dataset) == ids
