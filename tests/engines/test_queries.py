"""What embed-search compares is what the libraries compare that such models are made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from e2e.harness import run
from engines.kinds import bge_m3, colbert, cross_encoder, inference_free, pylate, splade, stanford
from engines.model_shapes import Shape
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

from embedstream import open_dataset
from embedstream.api.search import Searchable, search
from embedstream.dataset.similarity import Scores, similarity
from embedstream.dataset.values import from_columns, to_columns
from embedstream.errors import ModelError
from embedstream.outputs import Kind, Output
from embedstream_worker.batching import gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import Engine, OwnQueries, Results
from embedstream_worker.model_folder import Trust
from embedstream_worker.searching import QueryModel, show_nearest

Folder = Callable[[Shape], Path]

DOCUMENTS = 50


def documents(engine: Engine, texts: list[str]) -> Results:
    prompt = engine.prompt("document", None, None)
    tokens = engine.tokenizer().encode([prompt + text for text in texts], engine.info.max_length)
    return engine.run(gather_batch(tokens, np.arange(len(texts)), 0, "document"))


def similarities(path: Path, kind: Kind, texts: list[str], queries: list[str]) -> tuple[Engine, Scores]:
    """Of documents as a dataset has them to queries, [queries, documents]; the engine, too."""
    engine = load_engine(EngineOptions(str(path), engine="torch", dtype="float32"))
    info = engine.info.outputs[kind]
    output = Output(name=kind, kind=kind, dtype="float32", dim=info.dim, normalized=info.normalized)
    columns = to_columns(output, documents(engine, texts)[kind])
    found = from_columns(output, pa.record_batch(columns, names=list(output.columns)))
    assert isinstance(engine, OwnQueries)
    return engine, np.stack([similarity(output, engine.query(query, None)[kind], found) for query in queries])


@pytest.mark.parametrize("shape", [splade, inference_free])
def test_sparse_vectors_are_as_near_as_sparse_encoder_has_them(shape: Shape, folder: Folder, texts: list[str]) -> None:
    path, some, queries = folder(shape), texts[:DOCUMENTS], texts[60:64]
    engine, ours = similarities(path, "sparse", some, queries)
    reference: Any = SparseEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.similarity(reference.encode_query(queries), reference.encode_document(some))
    np.testing.assert_allclose(ours, theirs.to_dense().numpy(), rtol=1e-4, atol=1e-4)
    before = documents(engine, some)["sparse"]
    np.testing.assert_array_equal(before.values, documents(engine, some)["sparse"].values)


@pytest.mark.parametrize("shape", [colbert, pylate, stanford])
def test_vectors_of_tokens_are_as_near_as_multi_vector_encoder_has_them(
    shape: Shape, folder: Folder, texts: list[str]
) -> None:
    path, some, queries = folder(shape), texts[:DOCUMENTS], texts[60:64]
    _, ours = similarities(path, "multivector", some, queries)
    reference: Any = MultiVectorEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.similarity(reference.encode_query(queries), reference.encode_document(some))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_a_query_does_not_change_how_documents_run(folder: Folder, texts: list[str]) -> None:
    engine: Any = load_engine(EngineOptions(str(folder(splade)), engine="torch", dtype="float32"))
    before = documents(engine, texts[:9])["sparse"]
    engine.query(texts[10], None)
    assert engine.sliced
    np.testing.assert_array_equal(documents(engine, texts[:9])["sparse"].values, before.values)


def test_a_model_for_pairs_has_no_queries(folder: Folder) -> None:
    engine: Any = load_engine(EngineOptions(str(folder(cross_encoder)), engine="torch"))
    with pytest.raises(ModelError, match="scores pairs and labels, which are not searched"):
        engine.query("a query", None)


@pytest.fixture
def three(folder: Folder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of BGE-M3's three kinds, made as users make it."""
    monkeypatch.setenv("EMBEDSTREAM_CACHE_DIR", str(tmp_path / "cache"))
    rows = [json.dumps({"id": f"t{at}", "text": text}) for at, text in enumerate(texts[:DOCUMENTS])]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    arguments = (tmp_path / "corpus.jsonl", "--model", folder(bge_m3), "-o", tmp_path / "out")
    made = run("embed-submit", *arguments, EMBEDSTREAM_ALLOW_PICKLE="1", EMBEDSTREAM_CACHE_DIR=str(tmp_path / "cache"))
    assert made.returncode == 0, made.stderr
    return str(tmp_path / "out")


def test_a_dataset_of_three_kinds_is_searched_by_each_and_by_all(
    three: str, folder: Folder, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = open_dataset(three).to_table(columns=["id", "sparse"]).to_pylist()
    best = max(weights, key=lambda row: len(row["sparse"]["indices"]))["id"]
    query = texts[int(best[1:])]

    kinds: tuple[Kind, ...] = ("dense", "sparse", "multivector")
    results = QueryModel(Searchable(three), trust=Trust(pickle=True)).embed(query)

    def nearest(by: Kind) -> dict[str, float]:
        return {hit.id: hit.score for hit in search(three, results, DOCUMENTS, by=by)}

    reference = SentenceTransformer(str(folder(bge_m3)), device="cpu", local_files_only=True)
    cosines = reference.similarity(reference.encode([query]), reference.encode(texts[:DOCUMENTS])).numpy()[0]
    assert nearest("dense") == pytest.approx({f"t{at}": cosine for at, cosine in enumerate(cosines)}, abs=1e-4)
    assert next(iter(nearest("multivector"))) == best
    assert best in nearest("sparse")
    ranks = [{id: rank for rank, id in enumerate(nearest(by), 1)} for by in kinds]
    expected = {f"t{at}": sum(1 / (60 + kind[f"t{at}"]) for kind in ranks if f"t{at}" in kind) for at in range(50)}
    show_nearest(three, query, DOCUMENTS, trust=Trust(pickle=True))
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert {id: float(score) for score, id in shown} == pytest.approx(expected, abs=1e-4)

    with pytest.raises(ModelError, match=r"has changed since you used it: .* with --allow-pickle if you did so then"):
        show_nearest(three, query, 3)
    with pytest.raises(ModelError, match=r"gives dense alone, the dataset has dense, sparse, multivector: .*-pickle"):
        show_nearest(three, query, 3, str(folder(bge_m3)))
