"""Milvus: entities of a collection, on a server or in a file of Milvus Lite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from embedstream.dataset.values import Vectors
from embedstream.errors import UsageError
from embedstream.server.connection import mask
from embedstream.settings import MIB
from embedstream_producer.exporting.rows import Key, Rows, Source, in_requests, plain, uuid_of
from embedstream_producer.exporting.target import MARK, origin_of, refuse_other

KEY = "embedstream_key"
"""The primary field: a UUID made of id and chunk, which lie beside it."""

VECTOR = "vector"
"""The field of vectors whose column has a name that Milvus does not take."""

REQUEST_BYTES = 16 * MIB
"""Of a request: a server takes 64 MiB."""

KEYS_AT_ONCE = 1000
"""Entities that are removed by one request."""


class MilvusCollection:
    """Rows of several datasets may lie in one collection, if their vectors can be compared."""

    errors = (MilvusException, ValueError, RuntimeError, OSError)

    def __init__(self, place: str, collection: str, source: Source) -> None:
        output = source.output
        if output.dtype == "ubinary":
            raise UsageError("milvus: vectors of bits are not exported there: export other vectors (--column)")
        self._vector = output.name if output.name.isidentifier() and output.name.isascii() else VECTOR
        if taken := {KEY, self._vector}.intersection(source.payload.names):
            raise UsageError(f"milvus: a kept field is called {min(taken)}, as a field of its own is: export elsewhere")
        self._collection, self._output = collection.replace("-", "_"), output
        self._where = f"{mask(place)}: collection {self._collection}"
        self._origin = origin_of(source)
        self._place = place

    def _connected(self) -> closing[MilvusClient]:
        return closing(MilvusClient(self._place, token=os.environ.get("MILVUS_TOKEN", "")))

    def check(self) -> bool:
        with self._connected() as client:
            if not client.has_collection(self._collection):
                return False
            properties = client.describe_collection(self._collection).get("properties") or {}
            refuse_other(self._where, properties.get(MARK), self._origin, ignored=["job"])
            client.load_collection(self._collection)  # the program that used it last may have released it
            return True

    def write(self, rows: Iterator[Rows]) -> None:
        with self._connected() as client:
            if not client.has_collection(self._collection):
                self._create(client)
            self._put(client, rows)

    def _create(self, client: MilvusClient) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field(KEY, DataType.VARCHAR, is_primary=True, max_length=36)
        schema.add_field(self._vector, DataType.FLOAT_VECTOR, dim=self._output.dim)
        index = client.prepare_index_params()
        graph = {"M": 16, "efConstruction": 200}
        index.add_index(self._vector, index_type="HNSW", metric_type="COSINE", params=graph)
        marked = {MARK: self._origin.encode()}
        client.create_collection(self._collection, schema=schema, index_params=index, properties=marked)

    def merge(self, rows: Iterator[Rows]) -> None:
        with self._connected() as client:
            self._put(client, rows)

    def _put(self, client: MilvusClient, rows: Iterator[Rows]) -> None:
        for some in rows:
            for each in in_requests(some, REQUEST_BYTES, 4):
                client.upsert(self._collection, self._entities(each))

    def remove(self, keys: Sequence[Key]) -> None:
        with self._connected() as client:
            for start in range(0, len(keys), KEYS_AT_ONCE):
                client.delete(self._collection, ids=[uuid_of(key) for key in keys[start : start + KEYS_AT_ONCE]])

    def search(self, queries: Vectors, k: int) -> list[list[Key]]:
        with self._connected() as client:
            found: Any = client.search(
                self._collection, list(queries.astype(np.float32)), limit=k, output_fields=["id", "chunk"]
            )
        return [[(hit["entity"]["id"], hit["entity"]["chunk"]) for hit in hits] for hits in found]

    def _entities(self, rows: Rows) -> list[dict[str, Any]]:
        return [
            {**plain(row), KEY: uuid_of(key), self._vector: vector}
            for row, key, vector in zip(
                rows.payload.to_pylist(), rows.keys, rows.vectors.astype(np.float32), strict=True
            )
        ]
