"""What an update changed: the rows of two generations of a dataset, compared by id and chunk, in bounded memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.schema import INPUT_HASH_BYTES
from embedstream.errors import OutputError
from embedstream.records import Changes, Manifest, part_file
from embedstream.temporary import temporary_folder

_FIELDS: list[pa.Field[Any]] = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("chunk", pa.int32(), nullable=False),
    pa.field("change", pa.string(), nullable=False),
]

CHANGES_SCHEMA = pa.schema(_FIELDS)
"""`change` is one of `KINDS`."""

_SUMMED = pa.schema([*_FIELDS[:2], pa.field("sum", pa.binary(INPUT_HASH_BYTES))])

KINDS = ("added", "changed", "removed")

ROWS_AT_ONCE = 1 << 20
"""Rows of both generations that are compared at once, about."""

BATCH_ROWS = 65_536


def changes_file(job: str) -> str:
    """The name of the file in which the job that made a generation says what it changed."""
    return f"_changes-{job}.arrow"


def write_changes(sink: FolderSink, old: Manifest, new: Manifest) -> Changes:
    """Compare two generations in one output, and write what differs; the same bytes each time.

    A row is changed if its text is another one, or a kept field, or where in a text it lies, or if it had failed and
    was run again since the older generation was made: who reads that may not have it. If the spaces or the columns of
    results differ, all rows that stay are changed.

    Raises:
        OutputError: shards cannot be read, or the file cannot be written.
    """
    columns = sorted({*manifest_spec(old).keep, *manifest_spec(new).keep})
    if manifest_spec(new).chunking is not None or manifest_spec(old).chunking is not None:
        columns += ["start", "end"]
    same_results = (old.space, old.outputs) == (new.space, new.outputs)
    pieces = (old.rows + new.rows) // ROWS_AT_ONCE + 1
    counts = Counter[Any](dict.fromkeys(KINDS, 0))
    buffer = pa.BufferOutputStream()
    with ExitStack() as stack:
        olds, news = (_split(stack, _rows(sink, each, columns), pieces) for each in (old, new))
        writer = stack.enter_context(
            pa.ipc.new_file(buffer, CHANGES_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        )
        for before, after in zip(olds, news, strict=True):
            found = _compared(before(), after(), same_results=same_results)
            counts.update(count_changes(found))
            writer.write_table(found, BATCH_ROWS)
    name = changes_file(new.job)
    _, sha256 = sink.files.write(name, [buffer.getvalue()])
    return Changes(generation=old.generation + 1, file=name, sha256=sha256, **counts)


def read_changes(sink: FolderSink, changes: Changes) -> pa.Table:
    """`id`, `chunk` and `change` of each row that differs. Raises `OutputError`."""
    path = sink.files.path(changes.file)
    try:
        if sink.files.sha256(changes.file)[1] != changes.sha256:
            raise OutputError(f"{path}: was changed since it was written: restore the file")
        with sink.files.open(changes.file) as file:
            table = pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{path}: cannot be read ({error}): restore the file") from error
    if not table.schema.equals(CHANGES_SCHEMA):
        raise OutputError(f"{path}: other columns than {', '.join(CHANGES_SCHEMA.names)}: restore the file")
    return table


def count_changes(table: pa.Table) -> dict[Any, int]:
    """How many rows of each kind, of those that are there."""
    kinds, numbers = pc.value_counts(table.column("change")).flatten()
    found: list[Any] = numbers.to_pylist()
    return dict(zip(kinds.to_pylist(), found, strict=True))


def _rows(sink: FolderSink, manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Id, chunk, and a sum over the text and the columns, of every row. A column that is not there is null."""
    spec = manifest_spec(manifest)
    there = [name for name in columns if name in spec.keep or (name in ("start", "end") and spec.chunking is not None)]
    for shard in manifest.shards:
        if shard.rows:
            run_again = not shard.blocks
            for batch in sink.batches(part_file(shard.name), ["id", "chunk", "input_hash", *there], BATCH_ROWS):
                sums = _sums(batch, columns) if columns else batch.column("input_hash")
                if run_again:
                    sums = pa.repeat(pa.scalar(bytes(INPUT_HASH_BYTES), sums.type), len(batch))
                yield pa.RecordBatch.from_arrays([batch.column("id"), batch.column("chunk"), sums], schema=_SUMMED)


def _sums(batch: pa.RecordBatch, columns: Sequence[str]) -> Any:
    nulls: list[Any] = [None] * len(batch)
    lists = [
        batch.column(name).to_pylist() if name in batch.schema.names else nulls for name in ("input_hash", *columns)
    ]
    # Whatever the fields hold, a row takes as much memory, and NaN is like NaN.
    rows = (msgspec.msgpack.encode(row) for row in zip(*lists, strict=True))
    return pa.array([blake2b(row, digest_size=INPUT_HASH_BYTES).digest() for row in rows], _SUMMED.field("sum").type)


def _split(stack: ExitStack, batches: Iterator[pa.RecordBatch], pieces: int) -> list[Any]:
    """Rows by hash of their ids, each piece as a function that reads it: in files, if there is more than one."""
    if pieces == 1:
        table = _table(batches)
        return [lambda: table]
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=temporary_folder(), prefix="embedstream-")))
        writers: list[Any] = [None] * pieces
        for batch in batches:
            of = np.fromiter(
                (crc32(str(id).encode()) % pieces for id in batch.column("id").to_pylist()), np.int64, len(batch)
            )
            for piece in np.unique(of).tolist():
                rows = batch.take(pa.array(np.flatnonzero(of == piece), pa.int64()))
                writers[piece] = writers[piece] or pa.ipc.new_file(str(folder / str(piece)), rows.schema)
                writers[piece].write_batch(rows)
        for writer in writers:
            if writer is not None:
                writer.close()
    except OSError as error:
        raise OutputError(
            f"what changed cannot be compared on disk ({error.strerror or error}): make room, or name another folder "
            f"(TMPDIR)"
        ) from error

    def read(piece: int) -> Any:
        path = folder / str(piece)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all() if path.exists() else None

    return [lambda piece=piece: read(piece) for piece in range(pieces)]


def _table(batches: Iterator[pa.RecordBatch]) -> pa.Table | None:
    found = list(batches)
    return pa.Table.from_batches(found) if found else None


def _compared(before: pa.Table | None, after: pa.Table | None, *, same_results: bool) -> pa.Table:
    """Rows of two tables that are in one of them alone, or differ, in the order of their ids."""
    before = _SUMMED.empty_table() if before is None else before
    after = (_SUMMED.empty_table() if after is None else after).rename_columns(["id", "chunk", "new sum"])
    joined = before.join(after, ["id", "chunk"], join_type="full outer", use_threads=False)
    was: Any = joined.column("sum")
    now: Any = joined.column("new sum")
    kinds: Any = pc.if_else(pc.is_null(was), "added", pc.if_else(pc.is_null(now), "removed", "changed"))
    found = pa.table([joined.column("id"), joined.column("chunk"), kinds], names=CHANGES_SCHEMA.names)
    if same_results:
        found = found.filter(pc.invert(pc.fill_null(pc.equal(was, now), False)))
    return found.sort_by([("id", "ascending"), ("chunk", "ascending")]).cast(CHANGES_SCHEMA)
