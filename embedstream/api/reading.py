"""Reading a finished dataset."""

from __future__ import annotations

import os

import pyarrow.dataset as ds

from embedstream.dataset.folder import MANIFEST, FolderSink
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.objects import file_system, is_object, parse_object
from embedstream.dataset.roots import is_redis
from embedstream.dataset.schema import dataset_schema
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import OutputError, UsageError
from embedstream.masking import mask
from embedstream.records import Manifest


def open_dataset(output: str | os.PathLike[str], *, partial: bool = False) -> ds.Dataset:
    """The rows that the manifest of a finished dataset lists, as a `pyarrow.dataset.Dataset`.

    Nothing is read before you ask for it. Vectors are `fixed_size_list<float32>[dim]`. `output` is a folder or
    `s3://bucket/prefix`. A file that the manifest does not list, of an interrupted run for example, is left out.
    `partial`: open it also if its job ended early, so that rows are missing.

    Raises:
        OutputError: there is no finished dataset, or rows are missing from it.
        UsageError: the output is in Redis, which has no files.
    """
    sink, manifest = read_finished(output, partial=partial)
    address = sink.output
    files = [shard.file for shard in manifest.shards if shard.rows]
    schema = dataset_schema(manifest_spec(manifest), manifest.outputs)
    if is_object(address):
        place = parse_object(address, "output")
        return ds.dataset(
            [f"{place.path}/{file}" for file in files], schema, format="parquet", filesystem=file_system(place)
        )
    return ds.dataset([f"{address}/{file}" for file in files], schema, format="parquet")


def read_finished(output: str | os.PathLike[str], *, partial: bool = False) -> tuple[FolderSink, Manifest]:
    """A finished dataset in files, for reading, and its manifest. Raises as `open_dataset`."""
    address = canonical_output(os.fspath(output))
    if is_redis(address):
        raise UsageError(f"{mask(address)}: is in Redis, which has no files: read its hashes with RedisVL or redis-py")
    sink = FolderSink(address)
    manifest = sink.read_manifest()
    if manifest is None:
        raise OutputError(f"{address}: no {MANIFEST}: not a dataset, or its job has not ended yet")
    if manifest.partial and not partial:
        raise OutputError(
            f"{address}: its job was {manifest.state} before all rows were embedded: run the same embed-submit again, "
            f"or read what is there with open_dataset(…, partial=True)"
        )
    return sink, manifest
