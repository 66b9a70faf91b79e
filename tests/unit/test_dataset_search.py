"""Brute-force search against numpy."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from conftest import RedisServer
from lab.dataset import DIM, Dataset, dense, make_content, make_spec, vectors

from embedstream.api.search import Searchable, search, top_k
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.dataset.values import to_columns
from embedstream.errors import OutputError, UsageError
from embedstream_worker.engines.base import Results

Matrix = npt.NDArray[np.float32]


def one(vector: Matrix) -> Results:
    """A query's results: its vector [dim]."""
    return {"dense": vector[None]}


def write(tmp_path: Path, shards: dict[str, Matrix], text: bool = True, normalized: bool = True) -> str:
    """One shard per name, its block the next of part 0; every row of a shard in its block."""
    spec = make_spec(str(tmp_path / "out"), text=text)
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    for number, (name, matrix) in enumerate(shards.items()):
        dataset.write(
            make_content(
                spec,
                name,
                [(0, 10_000 * number)],
                rows_per_block=len(matrix),
                matrix=matrix,
                outputs=(dense(normalized=normalized),),
            )
        )
    dataset.end()
    return spec.output


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("k", [1, 10, 9000, 20_000])
def test_the_best_come_first_as_numpy_says(tmp_path: Path, k: int, normalized: bool) -> None:
    shards = {"c": vectors(700, 1), "a": vectors(9000, 2), "b": vectors(1, 3)}
    if not normalized:
        lengths = np.random.default_rng(5).uniform(0.1, 9, (9000, 1)).astype(np.float32)
        shards = {name: matrix * lengths[: len(matrix)] for name, matrix in shards.items()}
    folder = write(tmp_path, shards, normalized=normalized)
    query = vectors(1, 9)[0] * 3

    everything = np.concatenate(list(shards.values())).astype(np.float64)
    cosine = everything @ query / np.linalg.norm(everything, axis=1) / np.linalg.norm(query)
    starts = [100_000 * number + i for number, matrix in enumerate(shards.values()) for i in range(len(matrix))]
    expected = [starts[i] for i in np.argsort(-cosine)[:k]]
    true_score = dict(zip(starts, cosine.tolist(), strict=True))

    hits = search(folder, one(query), k)
    assert [hit.row for hit in hits[:10]] == expected[:10]
    # Further down scores differ by less than float32 can tell: each place must hold a row of that place's score.
    assert len({hit.row for hit in hits}) == len(expected)
    assert np.allclose([true_score[hit.row or 0] for hit in hits], [true_score[row] for row in expected], atol=1e-6)
    assert np.allclose([hit.score for hit in hits], [true_score[hit.row or 0] for hit in hits], atol=1e-6)
    assert (hits[0].id, hits[0].text) == (f"0-{expected[0]}", f"text 0/{expected[0]} café")


def test_equal_scores_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    row = vectors(1)
    folder = write(tmp_path, {"z": np.repeat(row, 30, axis=0), "a": np.repeat(row, 30, axis=0)})
    assert [hit.row for hit in search(folder, one(row[0]), 35)] == [*range(30), *range(100_000, 100_005)]


@pytest.mark.parametrize("keep_bytes", [0, 9000 * 4 * DIM, 2**20])
def test_rows_stay_in_memory_for_the_next_query_if_all_of_them_fit(tmp_path: Path, keep_bytes: int) -> None:
    folder = write(tmp_path, {"a": vectors(9000, 2), "b": vectors(700, 1)})
    queries = [one(vector) for vector in vectors(3, 9)]
    expected = [search(folder, query) for query in queries]
    dataset = Searchable(folder, keep_bytes=keep_bytes)
    assert [dataset.search(query) for query in queries] == expected
    shutil.rmtree(folder)
    if keep_bytes < 2**20:
        with pytest.raises(OutputError, match=r"no _manifest\.json"):
            dataset.search(queries[0])
    else:
        assert [dataset.search(query) for query in queries] == expected


@pytest.fixture
def prefix() -> str:
    return f"search-{uuid.uuid4().hex[:8]}:"


@pytest.fixture
def hashes(redis_server: RedisServer, prefix: str) -> Dataset:
    """A dataset of 2000 rows in Redis."""
    spec = make_spec(canonical_output(f"redis:?prefix={prefix}"))
    dataset = Dataset(open_sink(spec.output, spec, redis_server.url), spec)
    dataset.write(make_content(spec, matrix=vectors(2000), rows_per_block=2000))
    dataset.end()
    return dataset


def test_hashes_in_redis_are_searched_as_files_are(redis_server: RedisServer, hashes: Dataset) -> None:
    query = vectors(1, 9)[0]
    cosine = vectors(2000).astype(np.float64) @ query / np.linalg.norm(query)
    hits = search(hashes.spec.output, one(query), 20, redis_server.url)
    assert [hit.id for hit in hits] == [f"0-{row}" for row in np.argsort(-cosine)[:20]]
    assert np.allclose([hit.score for hit in hits], np.sort(cosine)[::-1][:20], atol=1e-6)
    assert (hits[0].text, hits[0].row) == (f"text 0/{np.argmax(cosine)} café", None)
    with pytest.raises(UsageError, match="give --redis"):
        search(hashes.spec.output, one(query))


def test_a_hash_with_another_vector_is_said_and_not_compared(
    redis_server: RedisServer, hashes: Dataset, prefix: str
) -> None:
    with redis_server.client() as client:
        client.hset(f"{prefix}0-7", "embedding", b"\0" * (4 * DIM - 1))
    with pytest.raises(OutputError, match=f"{prefix}.*a vector has {4 * DIM - 1} bytes, not {4 * DIM}"):
        search(hashes.spec.output, one(vectors(1)[0]), 1, redis_server.url)


def test_a_row_that_comes_twice_is_one_hit() -> None:
    matrix = vectors(3)
    rows = pa.record_batch({"id": ["a", "b", "c"], "v": to_columns(dense(), matrix)[0]})
    hits = top_k([rows, rows.slice(1)], one(matrix[1]), 3, [dense(name="v")], ["id"])
    assert sorted(hit.id for hit in hits) == ["a", "b", "c"]
    assert hits[0].id == "b"


def test_a_dataset_without_text_gives_hits_without_text(tmp_path: Path) -> None:
    hits = search(write(tmp_path, {"a": vectors(3)}, text=False), one(vectors(3)[1]), 1)
    assert [(hit.row, hit.text) for hit in hits] == [(1, None)]


def test_a_vector_of_zeros_is_far_from_everything(tmp_path: Path) -> None:
    matrix = np.concatenate([np.zeros((1, DIM), np.float32), vectors(1)])
    hits = search(write(tmp_path, {"a": matrix}, normalized=False), one(vectors(1)[0]), 2)
    assert [(hit.row, round(hit.score, 5)) for hit in hits] == [(1, 1.0), (0, 0.0)]


def test_an_empty_dataset_has_no_hits(tmp_path: Path) -> None:
    assert search(write(tmp_path, {"a": vectors(1)[:0]}), one(vectors(1)[0])) == []


def test_what_cannot_be_searched_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": vectors(3)})
    with pytest.raises(UsageError, match="must be at least 1"):
        search(folder, one(vectors(1)[0]), 0)
    with pytest.raises(UsageError, match=r"the query has shape \(1, 7\), vectors of .* have 8 dimensions"):
        search(folder, one(vectors(1)[0][:7]))
    with pytest.raises(OutputError, match="no manifest"):
        search(str(tmp_path), one(vectors(1)[0]))
