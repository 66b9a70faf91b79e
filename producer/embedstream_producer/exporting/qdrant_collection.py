"""Qdrant: points of a collection, on a server or in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from embedstream.dataset.values import Vectors
from embedstream.errors import UsageError
from embedstream.server.connection import mask
from embedstream.settings import MIB
from embedstream_producer.exporting.rows import Key, Rows, Source, in_requests, plain, uuid_of
from embedstream_producer.exporting.target import MARK, origin_of, refuse_other

REQUEST_BYTES = 8 * MIB
"""Of a request, by an estimate that characters which JSON escapes may double: a server takes 32 MiB."""

NUMBER_BYTES = 24
"""Of a vector's number in JSON."""

KEYS_AT_ONCE = 10_000
"""Points that are removed by one request."""

SECONDS = 60
"""For a request."""


class QdrantCollection:
    """Rows of several datasets may lie in one collection, if their vectors can be compared."""

    errors = (ApiException, ValueError, RuntimeError, OSError)

    def __init__(self, place: str, collection: str, source: Source) -> None:
        if source.output.dtype == "ubinary":
            raise UsageError("Qdrant has no vectors of bits: export other vectors (--column)")
        self._collection, self._output = collection, source.output
        self._where = f"{mask(place)}: collection {collection}"
        self._origin = origin_of(source)
        self._at: dict[str, Any] = {"path": place}
        if "://" in place:
            self._at = {"url": place, "api_key": os.environ.get("QDRANT_API_KEY"), "timeout": SECONDS}

    def _connected(self) -> closing[QdrantClient]:
        return closing(QdrantClient(**self._at, check_compatibility=False))

    def check(self) -> bool:
        with self._connected() as client:
            if not client.collection_exists(self._collection):
                return False
            metadata = client.get_collection(self._collection).config.metadata or {}
            refuse_other(self._where, metadata.get(MARK), self._origin, ignored=["job"])
            return True

    def remove(self, keys: Sequence[Key]) -> None:
        with self._connected() as client:
            for start in range(0, len(keys), KEYS_AT_ONCE):
                ids: Any = [uuid_of(key) for key in keys[start : start + KEYS_AT_ONCE]]
                client.delete(self._collection, models.PointIdsList(points=ids))

    def write(self, rows: Iterator[Rows]) -> None:
        with self._connected() as client:
            if not client.collection_exists(self._collection):
                client.create_collection(
                    self._collection,
                    models.VectorParams(
                        size=self._output.dim,
                        distance=models.Distance.COSINE,
                        datatype=models.Datatype.FLOAT16
                        if self._output.dtype == "float16"
                        else models.Datatype.FLOAT32,
                    ),
                    metadata={MARK: self._origin.encode()},
                )
            self._put(client, rows)

    def merge(self, rows: Iterator[Rows]) -> None:
        with self._connected() as client:
            self._put(client, rows)

    def _put(self, client: QdrantClient, rows: Iterator[Rows]) -> None:
        for some in rows:
            for points in batches(some):
                client.upsert(self._collection, points)

    def search(self, queries: Vectors, k: int) -> list[list[Key]]:
        requests = [
            models.QueryRequest(query=query, limit=k, with_payload=["id", "chunk"])
            for query in queries.astype(np.float32).tolist()
        ]
        with self._connected() as client:
            answers = client.query_batch_points(self._collection, requests)
        payloads: list[list[Any]] = [[hit.payload for hit in answer.points] for answer in answers]
        return [[(payload["id"], payload["chunk"]) for payload in hits] for hits in payloads]


def batches(rows: Rows) -> Iterator[models.Batch]:
    """The rows as points of one or more requests that a server takes."""
    for some in in_requests(rows, REQUEST_BYTES, NUMBER_BYTES):
        yield models.Batch(
            ids=[uuid_of(key) for key in some.keys],
            vectors=some.vectors.astype(np.float32).tolist(),
            payloads=[plain(row) for row in some.payload.to_pylist()],
        )
