"""The Parquet as other programs read it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from lab.dataset import DIM, Dataset, make_content, make_spec, vectors
from lab.results import EVERY_KIND
from lab.verify import Made, make_dataset, run_again

from embedstream.dataset.folder import FolderSink
from embedstream.lifecycle.retry_completing import finalize_retry
from embedstream_coordinator.compaction import compact


def queried(sql: str) -> pa.Table:
    with duckdb.connect() as connection:
        found: Any = connection.sql(sql)
        table: pa.Table = found.to_arrow_table()
    return table


READERS: dict[str, Callable[[str], pa.Table]] = {
    "pyarrow.dataset": lambda folder: pa.dataset.dataset(folder).to_table(),
    "pyarrow.dataset, told the format": lambda folder: pa.dataset.dataset(folder, format="parquet").to_table(),
    "pyarrow.parquet, as pandas does": lambda folder: pq.read_table(folder),
    "polars, a pattern": lambda folder: polars.read_parquet(f"{folder}/*.parquet").to_arrow(),
    "polars, a deep pattern": lambda folder: polars.scan_parquet(f"{folder}/**/*.parquet").collect().to_arrow(),
    "DuckDB, a pattern": lambda folder: queried(f"FROM '{folder}/*.parquet'"),
    "DuckDB, a deep pattern": lambda folder: queried(f"FROM '{folder}/**/*.parquet'"),
    "DuckDB, the folder": lambda folder: queried(f"FROM read_parquet('{folder}')"),
}
"""Ways to read a folder of Parquet."""

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


def failed_rows(home: Path) -> Made:
    return make_dataset(home, rows=300)


def run_again_and_failed_in_part(home: Path) -> Made:
    made = make_dataset(home, rows=300)
    status, shards = run_again(made, fail_every=3)
    assert finalize_retry(FolderSink(made.spec.output, status.spec), status, shards) is not None
    return made


def merged(home: Path) -> Made:
    made = make_dataset(home, rows=300)
    assert compact(made.spec.output) == (3, 1)
    return made


@pytest.mark.parametrize("made", [failed_rows, run_again_and_failed_in_part, merged])
@pytest.mark.parametrize("how", READERS)
def test_readers_of_the_folder_see_vectors_and_no_failed_row(
    tmp_path: Path, made: Callable[[Path], Made], how: str
) -> None:
    folder = made(tmp_path).folder
    manifest = FolderSink(str(folder)).read_manifest()
    assert manifest is not None
    assert manifest.failed == len((folder / "_errors.jsonl").read_text().splitlines()) > 0
    seen = READERS[how](str(folder))
    assert (seen.num_rows, seen["embedding"].null_count) == (manifest.rows, 0)
    assert "code" not in seen.column_names


def test_error_rows_of_a_shard_are_an_arrow_file(tmp_path: Path) -> None:
    made = failed_rows(tmp_path)
    seen = polars.concat([polars.read_ipc(path) for path in made.folder.glob("_errors-*.arrow")])
    assert len(seen) == made.manifest.failed
    assert {"invalid_json", "not_finite"} <= set(seen["code"])


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_duckdb_reads_vectors_of_each_dtype_as_they_are(tmp_path: Path, dtype: str) -> None:
    (output,) = [each for each in EVERY_KIND if each.dtype == dtype and each.kind == "dense" and each.dim == 16]
    spec = make_spec(str(tmp_path / "out"))
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    content = make_content(spec, outputs=[output, *EVERY_KIND[5:6]])
    dataset.write(content)
    seen = queried(f"FROM '{spec.output}/*.parquet' ORDER BY part, row")
    assert seen[output.name].to_pylist() == content.data[output.name].to_pylist()


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


def test_the_advised_line_reads_the_dataset_and_nothing_that_is_unlisted(dataset: Dataset) -> None:
    dataset.sink.write_shard(make_content(dataset.spec, "unlisted", [(1, 0)]))
    command = (
        dataset.sink.describe().replace("python -c", f"{shlex.quote(sys.executable)} -c").replace("head(5", "head(99")
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "id: string" in done.stdout
    assert '"0-39"' in done.stdout
    assert '"1-0"' not in done.stdout
    assert "embedding" not in done.stdout
