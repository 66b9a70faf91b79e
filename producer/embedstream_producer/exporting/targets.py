"""The choice of a target by its kind: `faiss:corpus.faiss`."""

from __future__ import annotations

import re

from embedstream.errors import UsageError
from embedstream_producer.exporting.rows import Source
from embedstream_producer.exporting.target import Target

PLACES = {
    "lance": "a folder or a URL of a bucket",
    "faiss": "a file",
    "usearch": "a file",
    "qdrant": "a server's URL or a folder",
    "milvus": "a server's URL or a file NAME.db",
    "pgvector": "a database's URL",
    "pinecone-parquet": "a file",
}
"""What lies behind the colon."""

FILES = ("faiss", "usearch", "pinecone-parquet")
"""Kinds that have no tables."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def split_target(target: str, table: str | None) -> tuple[str, str]:
    """Kind and place. Raises `UsageError`."""
    kind, _, place = target.partition(":")
    if kind not in PLACES or not place:
        known = ", ".join(f"{kind}:PLACE ({what})" for kind, what in PLACES.items())
        raise UsageError(f"{target}: names no target: give {known}")
    if table is not None and kind in FILES:
        raise UsageError(f"--table {table}: {kind} has no tables: leave it out")
    if table is not None and not _NAME.fullmatch(table):
        raise UsageError(f"--table {table}: letters, digits, _ and - make a name")
    return kind, place


def open_target(target: str, table: str | None, source: Source) -> Target:
    """The target; `table`: or collection, of those that have some; None: `default_table`.

    Raises:
        UsageError: it is none, or cannot hold such vectors.
        ModuleNotFoundError: its library is not installed.
    """
    kind, place = split_target(target, table)
    table = table or default_table(source.address)
    match kind:
        case "lance":
            from embedstream_producer.exporting.lance_table import LanceTable

            return LanceTable(place, table, source)
        case "faiss":
            from embedstream_producer.exporting.faiss_file import FaissFile

            return FaissFile(place, source)
        case "usearch":
            from embedstream_producer.exporting.usearch_file import UsearchFile

            return UsearchFile(place, source)
        case "qdrant":
            from embedstream_producer.exporting.qdrant_collection import QdrantCollection

            return QdrantCollection(place, table, source)
        case "milvus":
            from embedstream_producer.exporting.milvus_collection import MilvusCollection

            return MilvusCollection(place, table, source)
        case "pinecone-parquet":
            from embedstream_producer.exporting.pinecone_parquet import PineconeParquet

            return PineconeParquet(place, source)
        case _:
            from embedstream_producer.exporting.pgvector_table import PgvectorTable

            return PgvectorTable(place, table, source)


def default_table(address: str) -> str:
    """The dataset's name up to its first dot: `corpus` of `corpus.jsonl.vectors`."""
    name = address.partition("?")[0].rstrip("/").rpartition("/")[2].partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:48]
    return name if _NAME.fullmatch(name) else f"_{name}"
