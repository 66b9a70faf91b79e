"""Shards of a few kilobytes that say that they hold gigabytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.parquet import FOOTER_KEY, Footer
from embedstream.dataset.storage import Folder
from embedstream.jobs import JobSpec
from lab.dataset import Dataset, make_content, make_spec, vectors

ROWS = 8192
LONG = "x" * 100_000


def long_texts(data: pa.Table) -> pa.Table:
    """One long text, and all rows name it."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * len(data), pa.int32()), pa.array([LONG]))
    return data.set_column(data.schema.get_field_index("text"), pa.field("text", texts.type, nullable=False), texts)


def one_long_vector(data: pa.Table) -> pa.Table:
    """Lists of no length, and one of thirty million equal numbers."""
    whole = 30_000_000
    lists = pa.ListArray.from_arrays(
        pa.array([0, *[whole] * len(data)], pa.int32()),
        pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), whole), pa.array([0.5], pa.float32())),
    )
    return data.set_column(data.schema.get_field_index("embedding"), "embedding", lists)


def write_dataset(folder: Path, change: Any, same_schema: bool = True) -> JobSpec:
    """A finished dataset whose one shard holds other rows than it says; its manifest has the shard's checksum."""
    spec = make_spec(str(folder))
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    content = make_content(spec, matrix=vectors(ROWS), rows_per_block=ROWS)
    record = dataset.write(content)
    dataset.end()
    path, table = folder / f"part-{record.name}.parquet", change(content.data)
    footer = Footer(shard=record, spec=msgspec.Raw(spec.encode()))
    said = content.data.schema if same_schema else table.schema
    schema = base64.b64encode(said.serialize().to_pybytes()).decode()
    with pq.ParquetWriter(path, table.schema, store_schema=False, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER_KEY: msgspec.json.encode(footer).decode(), "ARROW:schema": schema})
    size, sha256 = Folder(folder).sha256(path.name)
    manifest = json.loads((folder / "_manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": size, "sha256": sha256}
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    return spec
