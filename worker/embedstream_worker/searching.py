"""Brute force over a dataset, the query embedded as the dataset was."""

from __future__ import annotations

import re

import click
import numpy as np
import numpy.typing as npt

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.search import search
from embedstream.dataset.sink import Manifest, canonical_output
from embedstream.errors import ModelError, OutputError
from embedstream.jobs import JobSpec
from embedstream_worker.engines import EngineName, make_engine
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.jobs import space_id
from embedstream_worker.model_folder import NOTHING, Trust

TEXT_WIDTH = 200
"""Characters of a text that are shown."""


def show_nearest(folder: str, query: str, k: int, trust: Trust = NOTHING) -> None:
    """Print the `k` chunks of the dataset in `folder` that are nearest to the query.

    Raises:
        OutputError: no finished dataset lies there, or it is empty.
        ModelError: as `embed_query`.
    """
    sink = FolderSink(canonical_output(folder))
    manifest = sink.read_manifest()
    if manifest is None:
        raise OutputError(f"{folder}: no manifest: not a dataset, or its job has not ended yet")
    if not manifest.rows:
        raise OutputError(f"{folder}: the dataset is empty")
    vector = embed_query(query, manifest, manifest_spec(manifest), trust)
    for hit in search(folder, vector, k):
        click.echo(f"{hit.score:.3f}  {printable(hit.id)}")
        if hit.text is not None:
            click.echo(f"       {printable(hit.text)}")


def embed_query(query: str, manifest: Manifest, spec: JobSpec, trust: Trust = NOTHING) -> npt.NDArray[np.float32]:
    """The query's vector [dim], by the dataset's own model and settings, in the role of a query.

    Raises:
        ModelError: the model is not the one that made the dataset any more.
    """
    name: EngineName = "hashing" if manifest.engines == ("hashing",) else "auto"
    dtype: Dtype = "int8" if any(shard.dtype == "int8" for shard in manifest.shards) else "auto"
    engine, _ = make_engine(name, spec.model, spec.revision, dtype=dtype, trust=trust)
    engine.start()
    info = engine.info
    max_length = spec.max_length or info.max_length
    if space_id(info, spec, engine.prompt(spec.role, spec.prompt, spec.prompt_name), max_length) != manifest.space:
        raise ModelError(f"{spec.model} is no longer the model that made this dataset: its vectors cannot be compared")
    prompt = engine.prompt("query", None, None)
    tokenizer = engine.tokenizer()
    tokens = tokenizer.encode([prompt + query], max_length)
    prompt_length = tokenizer.prompt_length(prompt, max_length) if prompt else 0
    batch = TokenBatch(tokens.ids, tokens.offsets, len(tokens.ids), prompt_length, "query")
    vector: npt.NDArray[np.float32] = next(iter(engine.embed(batch).values()))[0]
    return vector


def printable(text: str) -> str:
    """One line of visible characters, cut at `TEXT_WIDTH`."""
    line = "".join(c if c.isprintable() else " " for c in re.sub(r"\s+", " ", text[: 4 * TEXT_WIDTH])).strip()
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"
