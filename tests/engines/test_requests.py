"""A few pairs are scored, and a few texts classified, by a worker at once, as their libraries do it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import RedisServer
from engines.kinds import classifier, cross_encoder
from engines.model_shapes import Shape
from lab.worker import worker_lab
from sentence_transformers import CrossEncoder

from embedstream import AsyncClient, Client, RequestError, UsageError
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import Engine
from embedstream_worker.engines.hashing import HashingEngine

Folder = Callable[[Shape], Path]


@contextmanager
def client_of(engine: Engine, server: RedisServer, folder: Path) -> Iterator[Client]:
    """A client of a worker with this engine."""
    with worker_lab(server.url, folder) as lab:
        lab.start(engine)
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
    with client_of(load_engine(EngineOptions(str(path))), redis_server, tmp_path) as client:
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
    with client_of(load_engine(EngineOptions(str(path))), redis_server, tmp_path) as client:
        assert client.classify(some) == theirs
        assert asyncio.run(classify(client, some)) == theirs
        assert client.classify(some[4]) == theirs[4:5]
        assert client.classify([]) == []
        with pytest.raises(RequestError, match=r"^rerank\(\) needs a model that gives scores of pairs, .* labels$"):
            client.rerank("a query", some)


def test_a_model_of_vectors_neither_scores_nor_classifies(redis_server: RedisServer, tmp_path: Path) -> None:
    with client_of(HashingEngine(), redis_server, tmp_path) as client:
        assert client.embed("a text").shape == (1, HashingEngine().info.outputs["dense"].dim)
        with pytest.raises(RequestError, match=r"^rerank\(\) needs .*, this one gives dense vectors$"):
            client.rerank("a query", ["a text"])
