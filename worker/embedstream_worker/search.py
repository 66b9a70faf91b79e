"""Brute-force search by similarity over a dataset. Needs numpy, which comes with every model library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.redis_hashes import read_schema
from embedstream.dataset.roots import is_redis
from embedstream.dataset.schema import dataset_schema
from embedstream.dataset.sinks import open_sink
from embedstream.dataset.values import Ragged, from_columns
from embedstream.errors import OutputError, UsageError
from embedstream.lifecycle.opening import no_dataset
from embedstream.outputs import DTYPES, Output, describe
from embedstream.records import Manifest
from embedstream.server.connection import mask
from embedstream.terminal import printable

Vector = npt.NDArray[np.float32]

PLACE: tuple[str, ...] = ("part", "row", "chunk")
"""What tells the rows of a dataset in files apart, in the order of the corpus."""

REDIS_PLACE: tuple[str, ...] = ("id",)
"""The same of hashes, which do not say where in the corpus they were."""


@dataclass(frozen=True)
class Hit:
    """A chunk that was found."""

    score: float
    """Cosine of its vector and the query's."""
    id: str
    text: str | None
    """None if the dataset keeps no text."""
    part: int | None = None
    """None, as are row and chunk, in Redis, where a hash does not tell its place in the corpus."""
    row: int | None = None
    chunk: int | None = None


def search(address: str, query: Vector, k: int = 10, redis_url: str | None = None) -> list[Hit]:
    """The `k` chunks nearest to `query` [dim] by cosine, best first; equally near ones by their place in the corpus, or
    in Redis by their ids.

    Reads the dataset once and holds a few thousand rows of it at a time. `redis_url`: the server that
    `redis:?prefix=docs:` means.

    Raises:
        UsageError: `k` is below 1, or the query's length is not the dataset's; or the output needs `redis_url`.
        OutputError: no finished dataset lies there, or one with other columns than its manifest says.
    """
    sink = open_sink(address, queue_url=redis_url)
    manifest = sink.read_manifest()
    if manifest is None:
        raise no_dataset(address)
    if k < 1:
        raise UsageError(f"-k {k}: must be at least 1")
    if not manifest.rows:
        return []
    output = searched(manifest)
    if query.ndim != 1 or len(query) < output.dim:
        raise UsageError(f"the query has shape {query.shape}, vectors of {mask(address)} have {output.dim} dimensions")
    spec = manifest_spec(manifest)
    in_redis = is_redis(sink.output)
    place: Sequence[str] = REDIS_PLACE if in_redis else PLACE
    schema = read_schema(manifest) if in_redis else dataset_schema(spec, manifest.outputs)
    names = [*place, *(["id"] if "id" not in place else []), *(["text"] if spec.text else []), output.name]
    batches = _checked(sink.read(names), [schema.field(name) for name in names], mask(sink.output))
    return top_k(batches, query, k, output, place)


def searched(manifest: Manifest) -> Output:
    """The output that is searched: the first dense one, the most exact first. Raises `UsageError` if there is none."""
    dense = [output for output in manifest.outputs if output.kind == "dense"]
    if not dense:
        raise UsageError(f"only dense vectors can be searched, and this dataset has {describe(manifest.outputs)}")
    return min(dense, key=lambda output: (DTYPES["dense"].index(output.dtype), -output.dim))


def _checked(
    batches: Iterable[pa.RecordBatch], fields: Sequence[pa.Field[Any]], output: str
) -> Iterator[pa.RecordBatch]:
    """The batches as long as they are what the manifest says; raises `OutputError` for others."""
    for batch in batches:
        for field in fields:
            found = batch.schema.field(field.name)
            if not found.equals(field):
                raise OutputError(
                    f"{output}: a shard's column {field.name} is {printable(str(found.type), 60)}, the manifest says "
                    f"{field.type}: restore the file (embed-verify names it)"
                )
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise OutputError(f"{output}: a shard is damaged ({error}): restore it (embed-verify names it)") from error
        yield batch


def top_k(
    batches: Iterable[pa.RecordBatch],
    query: Vector,
    k: int,
    output: Output,
    place: Sequence[str] = PLACE,
) -> list[Hit]:
    """The `k` best rows of all batches by cosine with `query`, at least as long as the vectors of `output`.

    `place`: the columns that tell rows apart; equally good rows come in their order, and a row that comes twice counts
    once.
    """
    query = query[: output.dim] / max(float(np.linalg.norm(query[: output.dim])), 1e-30)
    best = pa.table({})
    for batch in batches:
        vectors = from_columns(output, batch)
        assert not isinstance(vectors, Ragged)
        scores = vectors @ query
        if not (output.normalized and output.dtype == "float32"):
            scores = scores / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
        # Every row that ties with the k-th stays until places decide.
        least = np.partition(scores, -k)[-k] if len(scores) > k else -np.inf
        chosen = np.flatnonzero(scores >= least)
        found = pa.table(batch.drop_columns([output.name]).take(chosen))
        found = found.append_column("score", pa.array(scores[chosen], pa.float32()))
        best = found if not best.num_columns else pa.concat_tables([best, found])
        best = best.sort_by([("score", "descending"), *((name, "ascending") for name in place)])
        best = _each_once(best, place).slice(0, k)
    return [Hit(**{"text": None, **row}) for row in best.to_pylist()]


def _each_once(rows: pa.Table, place: Sequence[str]) -> pa.Table:
    """The rows without those whose place an earlier one has: a server that resizes its table may show a key twice."""
    places = list(zip(*(rows.column(name).to_pylist() for name in place), strict=True))
    firsts = {place: at for at, place in reversed(list(enumerate(places)))}
    return rows if len(firsts) == len(places) else rows.take(sorted(firsts.values()))
