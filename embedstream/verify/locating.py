"""Which file, and which row of it, holds a row of the corpus: asked for the few that are told of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from embedstream.dataset.folder import BATCH_ROWS, FolderSink
from embedstream.errors import OutputError
from embedstream.records import Manifest, errors_file, part_file
from embedstream.verify.findings import Finding


class Place(NamedTuple):
    """A row of the corpus."""

    part: int
    row: int
    chunk: int = 0


def locate(sink: FolderSink, manifest: Manifest, wanted: set[Place]) -> dict[Place, Finding]:
    """File, row of the file and id of those places that the listed files hold, by a narrow reading of these.

    The findings have no message yet. Files that cannot be read are passed over: whoever read all of them has told.
    """
    located: dict[Place, Finding] = {}
    if not wanted:
        return located
    for shard in manifest.shards:
        file = part_file(shard.name)
        rows = [(file, sink.batches(file, ["part", "row", "chunk", "id"], BATCH_ROWS))]
        rows += [(errors_file(shard.name), sink.errors(shard.name))] if shard.failed else []
        for name, batches in rows:
            start = 0
            try:
                for batch in batches:
                    part, row, chunk = (batch.column(column).to_numpy() for column in ("part", "row", "chunk"))
                    for place in wanted - located.keys():
                        same = (part == place.part) & (row == place.row) & (chunk == place.chunk)
                        for at in np.flatnonzero(same)[:1]:
                            id = batch.column("id")[int(at)].as_py()
                            located[place] = Finding(message="", file=name, row=start + int(at), id=id)
                    start += batch.num_rows
            except OutputError:
                continue
    return located
