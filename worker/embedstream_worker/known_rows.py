"""Rows of the dataset that a job updates: found by what entered the model, and taken over as they lie there."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_digest
from embedstream.dataset.roots import check_output
from embedstream.dataset.sinks import open_sink
from embedstream.dataset.values import from_columns, to_columns
from embedstream.errors import ModelError, OutputError
from embedstream.jobs import JobSpec
from embedstream.outputs import Output, without_ranges
from embedstream.records import Manifest, part_file
from embedstream.server.connection import mask
from embedstream.temporary import temporary_folder
from embedstream_worker.calibration import in_float32

Rows = npt.NDArray[np.int64]

ROWS_AT_ONCE = 65_536
"""Of an index that is made."""

ROW_BITS = 32
"""Of a place; the bits above are the number of the shard."""

MOST_OPEN_BYTES = 4 * 2**30
"""Of shards that lie decoded in temporary files, which are let go when they are closed: the last ones looked into."""


class _Shard(NamedTuple):
    """A shard's results, uncompressed, in a file that is mapped into memory and has no name any more."""

    batches: list[pa.RecordBatch]
    starts: Rows
    bytes: int


class KnownRows:
    """Takes 24 bytes of memory for each row of the dataset. May be shared between threads."""

    def __init__(self, sink: FolderSink, manifest: Manifest, outputs: Sequence[Output], *, whole: bool) -> None:
        """`outputs`: columns that are taken over. `whole`: without rows whose text was cut. Raises `OutputError`."""
        self._sink = sink
        self._shards = [shard for shard in manifest.shards if shard.rows]
        self._outputs = {output.name: output for output in manifest.outputs}
        self._wanted = in_float32(outputs)
        self._columns = ["n_tokens", "truncated", *(name for output in outputs for name in output.columns)]
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        hashes, places = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        for number, shard in enumerate(self._shards):
            start = number << ROW_BITS
            for batch in sink.batches(part_file(shard.name), ["input_hash", "truncated"], ROWS_AT_ONCE):
                flat = _halves(batch.column("input_hash"))
                rows = np.arange(start, start + len(flat))
                if whole:
                    kept = ~batch.column("truncated").to_numpy(zero_copy_only=False)
                    flat, rows = flat[kept], rows[kept]
                hashes.append(flat.copy())
                places.append(rows)
                start += batch.num_rows
        joined, where = np.concatenate(hashes), np.concatenate(places)
        order = np.lexsort((joined[:, 1], joined[:, 0]))
        self._hashes, self._places = joined[order], where[order]

    def __len__(self) -> int:
        return len(self._places)

    def find(self, hashes: pa.FixedSizeBinaryArray) -> Rows:
        """Where rows with these `input_hash`es [n] lie; -1: nowhere."""
        wanted = _halves(hashes)
        found = np.full(len(wanted), -1)
        first = np.searchsorted(self._hashes[:, 0], wanted[:, 0])
        left = np.arange(len(wanted))
        while len(left):  # twice, but for halves of hashes that are equal
            at = first[left]
            inside = at < len(self._places)
            left, at = left[inside], at[inside]
            same = self._hashes[at, 0] == wanted[left, 0]
            left, at = left[same], at[same]
            equal = self._hashes[at, 1] == wanted[left, 1]
            found[left[equal]] = self._places[at[equal]]
            left = left[~equal]
            first[left] += 1
        return found

    def take(self, places: Rows) -> pa.Table:
        """`n_tokens`, `truncated` and the columns of the outputs, in the order of `places`; int8 as float32.

        Raises:
            OutputError: the dataset cannot be read, or is not as it was committed.
        """
        numbers = places >> ROW_BITS
        pieces: list[pa.RecordBatch] = []
        order = [np.empty(0, np.int64)]
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            rows = places[mine] & ((1 << ROW_BITS) - 1)
            sorted_ = np.argsort(rows, kind="stable")
            mine, rows = mine[sorted_], rows[sorted_]
            shard = self._shard(number)
            ends = np.searchsorted(rows, np.append(shard.starts[1:], np.iinfo(np.int64).max))
            begin = 0
            for at, end in enumerate(ends.tolist()):
                if end > begin:
                    pieces.append(shard.batches[at].take(_indices(rows[begin:end] - shard.starts[at])))
                    begin = end
            order.append(mine)
        back = np.empty(len(places), np.int64)
        back[np.concatenate(order)] = np.arange(len(places))
        return pa.Table.from_batches([self._in_float32(piece) for piece in pieces]).take(_indices(back))

    def _in_float32(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """int8 as numbers that are rounded to the same int8 again."""
        for output in self._wanted:
            stored = self._outputs[output.name]
            if stored.dtype == "int8":
                [column] = to_columns(output, from_columns(stored, batch, middle=True))
                batch = batch.set_column(batch.schema.get_field_index(output.name), output.name, column)
        return batch

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            shard = self._open.pop(number, None) or self._decoded(number)
            self._open[number] = shard
            while len(self._open) > 1 and sum(each.bytes for each in self._open.values()) > MOST_OPEN_BYTES:
                self._open.popitem(last=False)
            return shard

    def _decoded(self, number: int) -> _Shard:
        shard = self._shards[number]
        name = part_file(shard.name)
        path = self._sink.files.path(name)
        if self._sink.files.sha256(name)[1] != shard.sha256:
            raise OutputError(f"{path}: was changed since it was committed: restore the file")
        batches = self._sink.batches(name, self._columns, ROWS_AT_ONCE)
        try:
            with tempfile.NamedTemporaryFile(dir=temporary_folder(), prefix="embedstream-") as file:
                writer = None
                for batch in batches:
                    writer = writer or pa.ipc.new_file(cast("Any", file), batch.schema)
                    writer.write_batch(batch)
                if writer is None:
                    raise OutputError(f"{path}: has no rows, and the manifest says {shard.rows:,}: restore the file")
                writer.close()
                file.flush()
                size = file.tell()
                reader = pa.ipc.open_file(pa.memory_map(file.name))
        except OSError as error:
            raise OutputError(
                f"no room for {path} decoded ({error.strerror or error}): make room, or name another folder (TMPDIR)"
            ) from error
        found = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        starts = np.cumsum([0, *(len(batch) for batch in found)])[:-1]
        return _Shard(found, starts, size)


def _halves(hashes: Any) -> npt.NDArray[np.uint64]:
    """A column of 16 bytes each as numbers, [n, 2]."""
    buffer = hashes.buffers()[1]
    if buffer is None:
        return np.empty((0, 2), np.uint64)
    whole = np.frombuffer(buffer, np.uint64).reshape(-1, 2)
    return whole[hashes.offset : hashes.offset + len(hashes)]


def _indices(rows: Rows) -> Any:
    return pa.array(rows, pa.int64())


def known_rows(
    spec: JobSpec, space: str, outputs: Sequence[Output], roots: Sequence[str]
) -> tuple[KnownRows | None, str]:
    """What a job may take over of the dataset that it updates, or why it may take nothing.

    Raises:
        OutputError: the dataset is not below `roots`, or cannot be read.
        ModelError: it is another one than the job began with, so that the job is of no use.
    """
    update = spec.update
    if update is None:
        return None, ""
    address = update.source or spec.output
    check_output(roots, address)
    sink = open_sink(address, roots=roots)
    manifest = sink.read_manifest()
    if manifest is None:
        raise OutputError(f"{mask(address)}: the dataset that this update began with is gone: bring it back")
    if manifest_digest(manifest) != update.manifest:
        raise ModelError(f"{mask(address)}: another run wrote a manifest meanwhile: run the same command again")
    assert isinstance(sink, FolderSink), "refused before the job was made"
    if manifest.space != space:
        return None, (
            f"all texts are embedded again: the vectors of {mask(address)} are of space {manifest.space}, and the "
            f"model, or its prompt or length, makes vectors of space {space}"
        )
    there = without_ranges(manifest.outputs)
    lacking = [output for output in without_ranges(outputs) if output not in there]
    if lacking:
        return (
            None,
            f"all texts are embedded again: {mask(address)} has no column {lacking[0].name} as it is wanted now",
        )
    return KnownRows(sink, manifest, outputs, whole=spec.on_long == "error"), ""


def put_in(columns: dict[str, Any], known: pa.Table, rows: Rows) -> dict[str, Any]:
    """The columns [n], by name, with these values in these rows."""
    replaced = dict(columns)
    for name in known.column_names:
        mine = columns[name]
        index = np.arange(len(mine))
        index[rows] = len(mine) + np.arange(len(rows))
        pieces = [*(mine.chunks if isinstance(mine, pa.ChunkedArray) else [mine]), *known.column(name).chunks]
        replaced[name] = pa.concat_arrays([piece.cast(mine.type) for piece in pieces]).take(_indices(index))
    return replaced
