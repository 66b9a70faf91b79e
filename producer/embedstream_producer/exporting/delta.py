"""What a target that holds an older generation of a dataset has to be told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embedstream.dataset.changes import read_changes
from embedstream.errors import UsageError
from embedstream.server.connection import mask
from embedstream_producer.exporting.rows import Key, Source, keys_of


class Delta:
    """The rows that differ between an older generation of a dataset and the newest; they are held in memory by id."""

    def __init__(self, source: Source, since: int) -> None:
        """`since`: the older generation.

        Raises:
            UsageError: there is no such generation.
            OutputError: what changed cannot be read.
        """
        manifest = source.manifest
        if not 0 <= since <= manifest.generation:
            raise UsageError(
                f"--since {since}: {mask(source.address)} has generations 0 to {manifest.generation}: name the one "
                f"that the target holds"
            )
        last: dict[Key, str] = {}
        for changes in manifest.changes:
            if changes.generation > since:
                table = read_changes(source.sink, changes)
                last |= zip(keys_of(table), map(str, table.column("change").to_pylist()), strict=True)
        self.gone = [key for key, change in last.items() if change == "removed"]
        """Ids and chunks of rows that are not there any more."""
        differing = [f"{chunk} {id}" for (id, chunk), change in last.items() if change != "removed"]
        self._names: Any = pa.array(differing, pa.string())
        self._retried = {shard.name for shard in manifest.shards if not shard.blocks}
        self.rows = len(self._names)
        """Rows that are new or changed, about: those that were run again after they had failed come on top."""

    def batches(self, source: Source) -> Iterator[pa.RecordBatch]:
        """The rows of the newest generation that a target has to be told, as `Source.batches` has them."""
        for shard, batch in source.batches_by_shard():
            some = batch if shard in self._retried else batch.filter(self._differ(batch))
            if some.num_rows:
                yield some

    def _differ(self, batch: pa.RecordBatch) -> Any:
        ids: Any = batch.column("id")
        chunks: Any = batch.column("chunk").cast(pa.string())
        names: Any = pc.binary_join_element_wise(chunks, ids, " ")
        return pc.is_in(names, self._names)
