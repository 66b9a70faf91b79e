"""A few pairs are scored, and a few texts classified, by a worker at once, as their libraries do it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import RedisServer
from engines.kinds import bge_m3, classifier, colbert, cross_encoder, splade
from engines.model_shapes import Shape
from lab.worker import worker_lab
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

from embedstream import AsyncClient, Client, RequestError, SparseVector, UsageError
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import Engine
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.model_folder import Trust

Folder = Callable[[Shape], Path]


@contextmanager
def client_of(engine: Engine, server: RedisServer, folder: Path) -> Iterator[Client]:
    """A client of a worker with this engine."""
    with worker_lab(server.url, folder) as lab:
        lab.start(engine, batch_tokens=2048)
        with Client(server.url, queue=lab.broker.queue) as client:
            yield client


async def rerank(client: Client, query: str, texts: list[str]) -> list[float]:
    async with AsyncClient(client.url, queue=client.settings.queue) as same:
        return await same.rerank(query, texts)


async def classify(client: Client, texts: list[str]) -> list[tuple[str, float]]:
    async with AsyncClient(client.url, queue=client.settings.queue) as same:
        return await same.classify(texts)


def test_scores_of_a_query_and_texts_are_those_of_cross_encoder(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, some = folder(cross_encoder), [*texts[:20], *texts[-3:]]
    reference: Any = CrossEncoder(str(path), device="cpu", local_files_only=True)
    theirs = reference.predict([(texts[30], text) for text in some]).tolist()
    with client_of(
        load_engine(EngineOptions(str(path), engine="torch", dtype="float32")), redis_server, tmp_path
    ) as client:
        assert client.rerank(texts[30], some) == pytest.approx(theirs, abs=1e-4)
        assert asyncio.run(rerank(client, texts[30], some)) == pytest.approx(theirs, abs=1e-4)
        assert client.rerank(texts[30], []) == []
        with pytest.raises(RequestError, match=r"^classify\(\) needs a model that gives labels, .* scores of pairs$"):
            client.classify(some)
        with pytest.raises(RequestError, match=r"^embed\(\) needs a model that gives dense vectors, .* of pairs$"):
            client.embed(some)
        with pytest.raises(UsageError, match=r"rerank\(\) needs one that is not empty"):
            client.rerank("", some)
        with pytest.raises(UsageError, match="the query has half of a UTF-16 surrogate pair"):
            client.rerank("\ud800", some)


def test_labels_of_texts_are_those_of_a_pipeline(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, some = folder(classifier), [*texts[:20], *texts[-3:]]
    pipeline: Any = transformers.pipeline("text-classification", model=str(path), truncation=True, device="cpu")
    theirs: list[Any] = [(found["label"], pytest.approx(found["score"], abs=1e-4)) for found in pipeline(some)]
    with client_of(
        load_engine(EngineOptions(str(path), engine="torch", dtype="float32")), redis_server, tmp_path
    ) as client:
        assert client.classify(some) == theirs
        assert asyncio.run(classify(client, some)) == theirs
        assert client.classify(some[4]) == theirs[4:5]
        assert client.classify([]) == []
        with pytest.raises(RequestError, match=r"^rerank\(\) needs a model that gives scores of pairs, .* labels$"):
            client.rerank("a query", some)


async def embed(client: Client, texts: list[str], **how: Any) -> Any:
    async with AsyncClient(client.url, queue=client.settings.queue) as same:
        return await same.embed(texts, **how)


def test_bge_m3_gives_its_three_outputs_at_once_as_they_are_in_a_dataset(
    folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path = folder(bge_m3)
    engine = load_engine(EngineOptions(str(path), engine="torch", dtype="float32", trust=Trust(pickle=True)))
    some, asked = [*texts[:20], *texts[-3:]], ["dense", "sparse", "dense=bits:ubinary", "multivector=t:float16"]
    with worker_lab(redis_server.url, tmp_path) as lab, Client(redis_server.url, queue=lab.broker.queue) as client:
        lab.start(engine, model=str(path), batch_tokens=2048)
        job = client.submit(some, output=str(tmp_path / "out"), model=str(path), outputs=asked, role="query")
        assert job.wait().rows == len(some)
        rows = [row for batch in job.results() for row in batch.to_pylist()]
        rows.sort(key=lambda row: row["row"])
        for found in (client.embed(some, outputs=asked), asyncio.run(embed(client, some, outputs=asked))):
            assert list(found) == ["embedding", "sparse", "bits", "t"]
            np.testing.assert_allclose(found["embedding"], [row["embedding"] for row in rows], atol=1e-6)
            assert [bytes(bits) for bits in found["bits"]] == [row["bits"] for row in rows]
            for weights, vectors, row in zip(found["sparse"], found["t"], rows, strict=True):
                assert weights.indices.tolist() == row["sparse"]["indices"]
                np.testing.assert_allclose(weights.values, row["sparse"]["values"], atol=1e-6)
                np.testing.assert_allclose(vectors, row["t"], atol=2e-3)
        assert client.embed([], outputs=["sparse"]) == {"sparse": []}
        one: Any = client.embed("one", outputs=["dense:16"])
        assert one["embedding"].shape == (1, 16)


@pytest.mark.parametrize(("shape", "library"), [(splade, SparseEncoder), (colbert, MultiVectorEncoder)])
def test_queries_to_sparse_and_multivector_models_are_embedded_as_their_library_does(
    shape: Shape, library: Any, folder: Folder, texts: list[str], redis_server: RedisServer, tmp_path: Path
) -> None:
    path, some = folder(shape), [*texts[3:9], texts[-1]]
    reference = library(str(path), device="cpu", local_files_only=True)
    kind, given = ("sparse", "sparse vectors") if shape is splade else ("multivector", "a vector for each token")
    with client_of(
        load_engine(EngineOptions(str(path), engine="torch", dtype="float32")), redis_server, tmp_path
    ) as client:
        roles: dict[Any, Any] = {"query": reference.encode_query, "document": reference.encode_document}
        for role, encode in roles.items():
            found = client.embed(some, role=role, outputs=[kind])[kind]
            for mine, their in zip(found, encode(some, show_progress_bar=False), strict=True):
                if isinstance(mine, SparseVector):
                    dense = np.zeros(their.shape[-1], np.float32)
                    dense[mine.indices] = mine.values
                    np.testing.assert_allclose(dense, their.to_dense().numpy().reshape(-1), atol=1e-4)
                else:
                    np.testing.assert_allclose(mine, their, atol=1e-4)
        assert client.embed([], outputs=[kind]) == {kind: []}
        with pytest.raises(RequestError, match=r"^queries to this model take neither prompt_name nor max_length"):
            client.embed(some, outputs=[kind], max_length=7)
        with pytest.raises(RequestError, match=r"^65 queries in one request: at most 64"):
            client.embed(["a"] * 65, outputs=[kind])
        with pytest.raises(RequestError, match=f"^--emit dense:float32: this model gives {given}$"):
            client.embed(some, outputs=["dense"])
        with pytest.raises(RequestError, match=r"^embed\(\) needs a model that gives dense vectors"):
            client.embed(some)


def test_outputs_that_no_request_has_are_refused(redis_server: RedisServer, tmp_path: Path) -> None:
    with client_of(HashingEngine(), redis_server, tmp_path) as client:
        for outputs, says in (
            ([], "without any output"),
            (["dense:int8"], "int8 has the ranges of a whole job"),
            (["score"], r"only embed\(\) gives dense"),
            (["dense", "dense"], "has a column embedding already"),
            (["dens"], "begin with dense"),
            (["dense:float99"], "not its one dtype"),
        ):
            with pytest.raises(UsageError, match=says):
                client.embed("a text", outputs=outputs)
        with pytest.raises(RequestError, match="this model gives dense vectors"):
            client.embed("a text", outputs=["sparse"])
        with pytest.raises(RequestError, match="the model's vectors have 384 dimensions"):
            client.embed("a text", outputs=["dense:400"])


def test_a_model_of_vectors_neither_scores_nor_classifies(redis_server: RedisServer, tmp_path: Path) -> None:
    with client_of(HashingEngine(), redis_server, tmp_path) as client:
        assert client.embed("a text").shape == (1, HashingEngine().info.outputs["dense"].dim)
        with pytest.raises(RequestError, match=r"^rerank\(\) needs .*, this one gives dense vectors$"):
            client.rerank("a query", ["a text"])
