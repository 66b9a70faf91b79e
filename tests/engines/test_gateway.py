"""Scores and labels over HTTP are those of the libraries that the models are made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import pytest
import transformers
from conftest import RedisServer
from e2e.harness import fleet, wait_until
from engines.kinds import classifier, colbert, cross_encoder, splade
from engines.model_shapes import Shape
from lab.worker import worker_lab
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

from embedstream_worker.engines import EngineOptions, load_engine

Folder = Callable[[Shape], Path]


@contextmanager
def served(path: Path, server: RedisServer, folder: Path) -> Iterator[tuple[str, str]]:
    """The address of a gateway over a worker of this model, and the model's name there."""
    with worker_lab(server.url, folder) as lab, fleet(server.url, folder) as running:
        options = EngineOptions(str(path), engine="torch", dtype="float32")
        lab.start(load_engine(options), batch_tokens=2048)  # a short warm-up
        name = lab.broker.queue
        wait_until(lambda: any(worker.state == "ready" for worker in lab.broker.workers()), "the worker is ready")
        _, url = running.start_gateway()
        yield url, name


def test_reranking_by_every_api_orders_texts_by_the_scores_of_cross_encoder(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, query, some = folder(cross_encoder), texts[30], texts[:12]
    reference: Any = CrossEncoder(str(path), device="cpu", local_files_only=True)
    scores = reference.predict([(query, text) for text in some]).tolist()
    best = sorted(range(len(some)), key=lambda at: -scores[at])
    with served(path, redis_server, tmp_path) as (url, name):
        ranked = cohere.ClientV2(api_key="none", base_url=url).rerank(
            model=name, query=query, documents=some, top_n=3, max_tokens_per_doc=256
        )
        assert [each.relevance_score for each in ranked.results] == pytest.approx(
            [scores[at] for at in best[:3]], abs=1e-4
        )
        jina = {"model": name, "query": query, "documents": [{"text": text} for text in some], "return_documents": True}
        found = httpx.post(f"{url}/v1/rerank", json={**jina, "max_tokens_per_doc": 256}, timeout=30).json()
        assert found["usage"]["total_tokens"] > 0
        for result in found["results"]:
            assert result["document"]["text"] == some[result["index"]]
            assert result["relevance_score"] == pytest.approx(scores[result["index"]], abs=1e-4)
        tei = {"query": query, "texts": some, "return_text": True, "truncate": True}
        ranks = httpx.post(f"{url}/rerank", params={"model": name}, json=tei, timeout=30).json()
        assert [rank["score"] for rank in ranks] == pytest.approx([scores[at] for at in best], abs=1e-4)
        assert all(rank["text"] == some[rank["index"]] for rank in ranks)
        long = {"query": query, "texts": ["word " * 2000]}
        assert httpx.post(f"{url}/rerank", params={"model": name}, json=long, timeout=30).status_code == 413
        kind = httpx.get(f"{url}/info", params={"model": name}).json()["model_type"]
        assert list(kind) == ["reranker"]


def test_labels_are_those_of_a_pipeline_the_best_first(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, some = folder(classifier), texts[:5]
    pipeline: Any = transformers.pipeline("text-classification", model=str(path), top_k=None, device="cpu")
    with served(path, redis_server, tmp_path) as (url, name):
        found = httpx.post(f"{url}/predict", params={"model": name}, json={"inputs": [[text] for text in some]}).json()
        assert len(found) == len(some), found
        one = httpx.post(f"{url}/predict", params={"model": name}, json={"inputs": some[0]}).json()
        for mine, theirs in zip([*found, one], pipeline([*some, some[0]]), strict=True):
            assert [each["label"] for each in mine] == [each["label"] for each in theirs]
            assert [each["score"] for each in mine] == pytest.approx([each["score"] for each in theirs], abs=1e-4)


def test_weights_of_tokens_are_those_of_sparse_encoder(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, some = folder(splade), texts[:40]
    reference: Any = SparseEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.encode_document(some, convert_to_sparse_tensor=False).numpy()
    with served(path, redis_server, tmp_path) as (url, name):
        answer = httpx.post(f"{url}/embed_sparse", params={"model": name}, json={"inputs": some, "truncate": True})
        assert answer.status_code == 200, answer.text
        for mine, weights in zip(answer.json(), theirs, strict=True):
            made = np.zeros_like(weights)
            made[[each["index"] for each in mine]] = [each["value"] for each in mine]
            np.testing.assert_allclose(made, weights, atol=1e-3)
        refused = httpx.post(f"{url}/embed_all", params={"model": name}, json={"inputs": some})
        assert (refused.status_code, "does not give multivector" in refused.text) == (400, True)


def test_vectors_of_tokens_are_those_of_multi_vector_encoder(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, some = folder(colbert), texts[:40]
    reference: Any = MultiVectorEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.encode_document(some)
    with served(path, redis_server, tmp_path) as (url, name):
        answer = httpx.post(f"{url}/embed_all", params={"model": name}, json={"inputs": some, "truncate": True})
        assert answer.status_code == 200, answer.text
        for mine, vectors in zip(answer.json(), theirs, strict=True):
            np.testing.assert_allclose(mine, np.asarray(vectors), atol=1e-3)
