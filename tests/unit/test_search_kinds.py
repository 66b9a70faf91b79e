"""Search by sparse vectors, by a vector for each token, and by several kinds at once, against plain loops."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RedisServer
from lab.dataset import Dataset, make_content, make_spec
from lab.results import EVERY_KIND, some_results

from embedstream.api.search import search
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.similarity import similarity
from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.dataset.values import Ragged, Values
from embedstream.errors import OutputError, UsageError
from embedstream.outputs import Kind, Output
from embedstream_worker.engines.base import Results

ROWS = 150
SPARSE, TOKENS = (output for output in EVERY_KIND if output.kind in ("sparse", "multivector"))
QUERY = cast("Results", some_results(["dense", "sparse", "multivector"], 1, seed=77))


def written(dataset: Dataset, outputs: tuple[Output, ...] = EVERY_KIND) -> str:
    """Two shards of results; in files their rows are 0 to 149 and 200 to 349."""
    for name, block in (("a", 0), ("b", 20)):
        content = make_content(dataset.spec, name, [(0, block)], rows_per_block=ROWS, outputs=outputs)
        dataset.write(content)
    dataset.end()
    return dataset.spec.output


@pytest.fixture
def folder(tmp_path: Path) -> str:
    spec = make_spec(str(tmp_path / "out"))
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    return written(dataset)


def plain(kind: Kind, query: Values, rows: list[dict[str, Any]]) -> list[float]:
    """The score of each row, by the definition."""
    if kind == "dense":
        assert not isinstance(query, Ragged)
        return [float(np.dot(row["embedding"], query[0]) / np.linalg.norm(query[0])) for row in rows]
    assert isinstance(query, Ragged)
    if kind == "multivector":
        tokens = query.values.astype(np.float64)
        return [sum(max(float(np.dot(mine, own)) for own in row["multivector"]) for mine in tokens) for row in rows]
    assert query.indices is not None
    weights = dict(zip(query.indices.tolist(), query.values.tolist(), strict=True))
    pairs = [zip(row["sparse"]["indices"], row["sparse"]["values"], strict=True) for row in rows]
    return [sum(weights.get(token, 0) * weight for token, weight in row) for row in pairs]


def ranked(kind: Kind, rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Ids and scores, best first."""
    scores = plain(kind, QUERY[kind], rows)
    order = sorted(range(len(rows)), key=lambda at: (-scores[at], rows[at]["row"]))
    return [(rows[at]["id"], scores[at]) for at in order if kind != "sparse" or scores[at] > 0]


def rows_of(folder: str) -> list[dict[str, Any]]:
    return pa.Table.from_batches(list(open_sink(folder).read())).to_pylist()


@pytest.mark.parametrize("kind", ["dense", "sparse", "multivector"])
def test_the_best_by_one_kind_come_first(folder: str, kind: Kind) -> None:
    expected = ranked(kind, rows_of(folder))
    hits = search(folder, QUERY, 1000, by=kind)
    assert [hit.id for hit in hits[:20]] == [id for id, _ in expected[:20]]
    assert len(hits) == len(expected)
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], rtol=0, atol=1e-5)
    assert hits[0].text == f"text {hits[0].id.replace('-', '/')} café"


def test_a_row_without_a_token_of_the_query_is_not_found_by_sparse_vectors(folder: str) -> None:
    rows = rows_of(folder)
    found = {hit.id for hit in search(folder, QUERY, len(rows), by="sparse")}
    tokens = set(QUERY["sparse"].indices.tolist())  # type: ignore[union-attr]
    assert found == {row["id"] for row in rows if tokens & set(row["sparse"]["indices"])}
    assert 0 < len(found) < len(rows)


def fused(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    scores: Counter[str] = Counter()
    for kind in ("dense", "sparse", "multivector"):
        for rank, (id, _) in enumerate(ranked(kind, rows)[:100], 1):
            scores[id] += 1 / (60 + rank)  # type: ignore[assignment]
    order = sorted(rows, key=lambda row: (-scores[row["id"]], row["row"]))
    return [(row["id"], float(scores[row["id"]])) for row in order]


def test_the_ranks_of_all_kinds_are_fused(folder: str) -> None:
    expected = fused(rows_of(folder))[:12]
    hits = search(folder, QUERY, 12)
    assert [hit.id for hit in hits] == [id for id, _ in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], rtol=1e-9)


def test_a_kind_of_which_the_query_has_nothing_has_no_say(folder: str) -> None:
    query: Results = {"dense": QUERY["dense"]}
    assert search(folder, query, 9) == search(folder, QUERY, 9, by="dense")


def test_hashes_are_searched_as_files_are(redis_server: RedisServer, folder: str) -> None:
    spec = make_spec(canonical_output(f"redis:?prefix=kinds-{uuid.uuid4().hex[:8]}:"))
    hashes = written(Dataset(open_sink(spec.output, spec, redis_server.url), spec))
    for kind in ("dense", "sparse", "multivector"):
        there = search(hashes, QUERY, 20, redis_server.url, by=kind)
        here = search(folder, QUERY, 20, by=kind)
        assert [hit.id for hit in there] == [hit.id for hit in here]
        np.testing.assert_allclose([hit.score for hit in there], [hit.score for hit in here], atol=1e-6)
    there, here = (search(output, QUERY, 3, redis_server.url) for output in (hashes, folder))
    assert [hit.id for hit in there] == [hit.id for hit in here]


def test_a_text_of_no_tokens_is_far_from_everything() -> None:
    query = Ragged(np.array([2]), np.eye(2, 4, dtype=np.float32))
    found = Ragged(np.array([0, 1, 0]), np.ones((1, 4), np.float32))
    assert similarity(TOKENS, query, found).tolist() == [-np.inf, 2, -np.inf]
    nothing = Ragged(np.array([0, 0]), np.zeros((0, 4), np.float32))
    assert similarity(TOKENS, query, nothing).tolist() == [-np.inf, -np.inf]
    empty = Ragged(np.array([0, 0]), np.zeros(0, np.float32), np.zeros(0, np.uint32))
    assert similarity(SPARSE, QUERY["sparse"], empty).tolist() == [0, 0]


def test_a_row_with_more_tokens_than_weights_is_said(folder: str) -> None:
    path = next(Path(folder).glob("part-*.parquet"))
    table = pq.read_table(path)
    rows: list[Any] = table.column("sparse").to_pylist()
    rows[3]["indices"], rows[4]["values"] = [1, 2, 3], [1.0]
    column = pa.array(rows, table.schema.field("sparse").type)
    pq.write_table(table.set_column(table.schema.names.index("sparse"), table.schema.field("sparse"), column), path)
    with pytest.raises(OutputError, match=r"a row has more or fewer indices than weights.*embed-verify names it"):
        search(folder, QUERY)


def test_what_cannot_be_compared_is_said(folder: str, tmp_path: Path) -> None:
    wide: Results = {"multivector": Ragged(np.array([1]), np.ones((1, 5), np.float32))}
    with pytest.raises(UsageError, match=r"the query has shape \(1, 5\), vectors of .* have 4 dimensions"):
        search(folder, wide)
    with pytest.raises(UsageError, match="the query has no sparse results of one text"):
        search(folder, {"sparse": Ragged(np.zeros(0, np.int64), np.zeros(0, np.float32))})
    spec = make_spec(str(tmp_path / "scores"))
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    scores = written(dataset, EVERY_KIND[7:])
    with pytest.raises(UsageError, match="only dense, sparse, multivector can be searched, this dataset has score"):
        search(scores, QUERY)
    with pytest.raises(UsageError, match="--by sparse: there is none, this dataset has score"):
        search(scores, QUERY, by="sparse")


def test_each_token_of_a_long_query_counts_however_many_tokens_texts_have() -> None:
    dice = np.random.default_rng(5)
    counts = np.array([1, 0, 29_999, 70_000])
    found = Ragged(counts, dice.standard_normal((100_000, 4)).astype(np.float32))
    query = Ragged(np.array([150]), dice.standard_normal((150, 4)).astype(np.float32))
    texts = np.split(found.values, found.offsets[1:-1])
    best = [(text @ query.values.T).max(axis=0).sum() if len(text) else -np.inf for text in texts]
    np.testing.assert_allclose(similarity(TOKENS, query, found), best, rtol=1e-5)


@pytest.mark.parametrize("named", ["dot", "euclidean", "manhattan"])
def test_dense_vectors_are_compared_as_their_model_says(named: Any) -> None:
    dice = np.random.default_rng(6)
    query, found = dice.standard_normal((1, 8)).astype(np.float32), dice.standard_normal((20, 8)).astype(np.float32)
    output = Output(name="embedding", kind="dense", dtype="float32", dim=8, similarity=named)
    away = found - query
    expected = {
        "dot": (found * query).sum(axis=1),
        "euclidean": -np.sqrt((away**2).sum(axis=1)),
        "manhattan": -np.abs(away).sum(axis=1),
    }
    np.testing.assert_allclose(similarity(output, query, found), expected[named], rtol=1e-5)


def test_sparse_vectors_may_be_compared_by_the_cosine() -> None:
    found = Ragged(np.array([2, 1, 0]), np.array([3, 4, 5], np.float32), np.array([1, 2, 2], np.uint32))
    query = Ragged(np.array([2]), np.array([6, 8], np.float32), np.array([1, 2], np.uint32))
    output = Output(name="sparse", kind="sparse", dtype="float32", dim=100, similarity="cosine")
    np.testing.assert_allclose(similarity(output, query, found), [1, 0.8, 0], rtol=1e-6)
