"""The pairs of a run that was scored, best first for each query, as a run in TREC's format."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pyarrow as pa

from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.sinks import open_sink
from embedstream.errors import UsageError
from embedstream.jobs import RUN_FIELDS
from embedstream.lifecycle.opening import no_dataset
from embedstream.server.connection import mask

TAG = "embedstream"
"""The last column of a run: what made it."""


def show_run(output: str, k: int | None = None, redis_url: str | None = None) -> None:
    """Print the run of a dataset; see `ranked_run`."""
    for line in ranked_run(output, k, redis_url):
        click.echo(line)


def ranked_run(output: str, k: int | None = None, redis_url: str | None = None) -> Iterator[str]:
    """Lines of a run, query by query in the order of their ids, the `k` best documents of each. Equally good ones come
    in the order of their ids. Memory: ids and scores of all pairs.

    Raises:
        UsageError: the dataset was not made of a run; or the output needs `redis_url`.
        OutputError: no finished dataset lies there.
    """
    sink = open_sink(output, queue_url=redis_url)
    manifest = sink.read_manifest()
    if manifest is None:
        raise no_dataset(output)
    score = next((each.name for each in manifest.outputs if each.kind == "score"), None)
    if not manifest_spec(manifest).run or (score is None and manifest.rows):
        raise UsageError(f"--run: {mask(output)} has no scores of a run: make it by embed-submit --run")
    if score is None:
        return
    _, query_id, doc_id = RUN_FIELDS
    names = [query_id, doc_id, score]
    batches = [batch.select(names) for batch in sink.read(names)]
    if not batches:
        return
    pairs = pa.Table.from_batches(batches).rename_columns(["query", "document", "score"])
    pairs = pairs.sort_by([("query", "ascending"), ("score", "descending"), ("document", "ascending")])
    before, rank = None, 0
    for batch in pairs.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            rank = rank + 1 if row["query"] == before else 1
            before = row["query"]
            if k is None or rank <= k:
                yield f"{row['query']} Q0 {row['document']} {rank} {row['score']:.9g} {TAG}"
