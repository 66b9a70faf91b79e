"""A dataset in files: Parquet shards, `_errors.jsonl`, and `_manifest.json`, which says which shards count; beside them
a card for people."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.dataset.card import CARD, is_card, render_card
from embedstream.dataset.content import check_content, in_order
from embedstream.dataset.error_files import encode_errors, read_errors
from embedstream.dataset.files import TEMPORARY
from embedstream.dataset.manifest import (
    decode_manifest,
    list_shard,
    manifest_digest,
    manifest_pieces,
    manifest_spec,
    refuse_other_spec,
)
from embedstream.dataset.ordering import Ordering
from embedstream.dataset.parquet import Footer, encode_data, read_footer
from embedstream.dataset.parquet_rows import RowsRefused, rows_at_once
from embedstream.dataset.schema import ErrorRow, dataset_schema, errors_schema, placed_errors
from embedstream.dataset.storage import Storage, storage_of
from embedstream.errors import OutputError
from embedstream.jobs import JobSpec
from embedstream.records import Manifest, ManifestShard, ShardContent, ShardRecord, errors_file, part_file
from embedstream.server.connection import mask
from embedstream.settings import MIB

log = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
ERRORS = "_errors.jsonl"
OURS = (MANIFEST, ERRORS, "part-", "_errors-", "_changes-")
"""Beginnings of the names that make a folder a dataset, finished or not. Readers of a folder of Parquet pass over what
begins with `_`: they see vectors alone."""

BATCH_ROWS = 8192
BATCH_BYTES = 32 * MIB
"""Most rows of a batch in reading, and about how many bytes of them."""

MOST_ROW_VALUES = 2**24
"""In reading, numbers in the vectors of one row's tokens: of 16,384 tokens with 1,024 dimensions."""

KEPT_ROWS = 8192
"""Error rows of a shard that takes over those of older ones."""

PLACE = ("part", "row", "chunk")


class FolderSink:
    """A folder of Parquet shards, on a disk or in a bucket. Needs no lock: shards have names of their own, the manifest
    replaces itself whole.

    `spec` may be left out for reading a dataset that has its manifest.
    """

    def __init__(self, output: str, spec: JobSpec | None = None, roots: Sequence[str] = ()) -> None:
        self.output = output
        self.files: Storage = storage_of(output, roots)
        self._spec = spec

    def check(self) -> None:
        """Create the folder if need be and prove that it can be written.

        Raises:
            OutputError: it cannot, or the folder holds something else than a dataset.
            SpecDiffers: it holds rows of a job with other settings (if the sink has a spec).
        """
        self.files.prepare()
        names = self.files.names()
        if not any(name.removeprefix(".").startswith(OURS) for name in names):
            self._refuse_foreign(names)
        self.files.prove_writable()
        # One shard speaks for all: whoever wrote the others has passed here too.
        next(self._footers(), None)

    def _refuse_foreign(self, names: list[str]) -> None:
        # Hidden files (of file managers, of another writer's probe) and a disk's lost+found say nothing of use.
        foreign = sorted(name for name in names if not name.startswith(".") and name not in ("lost+found", CARD))
        if foreign:
            raise OutputError(
                f"{mask(self.output)}: not empty and not a dataset (it holds {foreign[0]}): choose another output (-o)"
            )

    def write_shard(self, content: ShardContent) -> ShardRecord:
        """Write `_errors-X.arrow` if rows failed, then `part-X.parquet`, each durable before the next step.

        `part-X.parquet` is always written, and its being there means that the shard is whole. Rows are put in order.

        Raises:
            OutputError: the disk or folder refuses; what was there before still is, and trying again is harmless.
            ValueError: rows and record do not fit each other.
        """
        spec, record = self._spec, content.record
        if spec is None:
            raise ValueError("a sink without a job's spec is for reading only")
        check_content(content, spec)
        if record.failed:
            errors = encode_errors(in_order(content.errors))
            _, sha256 = self.files.write(errors_file(record.name), [errors])
            record = msgspec.structs.replace(record, errors_sha256=sha256)
        encoded = encode_data(in_order(content.data), Footer(shard=record, spec=msgspec.Raw(spec.encode())))
        size, sha256 = self.files.write(part_file(record.name), [encoded])
        return msgspec.structs.replace(record, bytes=size, sha256=sha256)

    def discard_shard(self, name: str) -> None:
        """Remove a shard's files; from the first removal on it is no shard any more.

        Raises:
            OutputError: they cannot be removed.
        """
        self.files.remove([part_file(name), errors_file(name)])

    def find_shards(self, known: Container[str] = ()) -> Iterator[ShardRecord]:
        """Whole shards of this job that are not `known` by name, in name order; hashes their files. Damaged ones are
        left alone, with a warning.

        Raises:
            SpecDiffers: a shard with rows was made by a job with other settings (checked if the sink has a spec).
            OutputError: the folder cannot be read.
        """
        for record in list(self._footers(known)):
            if self._spec is not None and record.job != self._spec.job:
                continue
            try:
                found = self._whole_shard(record)
            except OutputError as error:
                log.warning("ignored: %s", error)
                continue
            yield found

    def _footers(self, known: Container[str] = ()) -> Iterator[ShardRecord]:
        """What each readable shard says of itself, but for the `known` ones, in name order."""
        for name in self._part_files():
            if name.removeprefix("part-").removesuffix(".parquet") in known:
                continue
            try:
                footer, rows = self.footer(name)
                if part_file(footer.shard.name) != name or rows != footer.shard.rows:
                    raise OutputError(
                        f"{self.files.path(name)}: says it is shard {footer.shard.name}, with {footer.shard.rows} rows"
                    )
            except OutputError as error:
                log.warning("ignored: %s", error)
                continue
            if self._spec is not None:
                made = footer.job_spec()
                if self._spec.updates and footer.shard.job != self._spec.job:
                    continue  # of the generation that stands, or of another update that came to nothing
                if not footer.shard.rows and made != self._spec:
                    continue  # of a job that failed; what has no row cannot be mixed up with ours
                refuse_other_spec(self.output, made, self._spec)
            yield footer.shard

    def footer(self, name: str) -> tuple[Footer, int]:
        """What a shard's file says of itself, and how many rows it has. Raises `OutputError`."""
        with self.files.open(name) as file:
            return read_footer(file, self.files.path(name))

    def _part_files(self) -> list[str]:
        return [name for name in self.files.names() if name.startswith("part-") and name.endswith(".parquet")]

    def _whole_shard(self, record: ShardRecord) -> ShardRecord:
        part, errors = part_file(record.name), errors_file(record.name)
        if record.failed and self.files.sha256(errors)[1] != record.errors_sha256:
            raise OutputError(f"{self.files.path(part)}: its error rows are not those of {errors}")
        size, sha256 = self.files.sha256(part)
        return msgspec.structs.replace(record, bytes=size, sha256=sha256)

    def read_manifest(self) -> Manifest | None:
        """The manifest; None before the job's end. Raises `OutputError` for one that cannot be read."""
        data = self.files.read(MANIFEST)
        return None if data is None else decode_manifest(data, self.files.path(MANIFEST))

    def finalize(self, manifest: Manifest) -> None:
        """Write `_errors.jsonl` if a row failed (or one is there already), then the manifest, then the card.

        A job that ended before its first shard may have no folder yet, and gets one.

        Raises:
            OutputError: a listed shard is not there, or a file cannot be written.
        """
        sizes = self.files.sizes()
        for shard in manifest.shards:
            name = part_file(shard.name)
            size = sizes.get(name)
            if size != shard.bytes:
                now = "is gone" if size is None else f"has {size} bytes"
                raise OutputError(
                    f"{self.files.path(name)}: {now}, was committed with {shard.bytes} bytes: restore the file"
                )
        if not manifest.shards:
            self.files.prepare()
        # A retry takes rows out of the errors: dying in between, it leaves one too many there, none too few.
        steps = [self._write_errors, self._write_manifest]
        for step in reversed(steps) if manifest.retries or manifest.generation else steps:
            step(manifest)
        self._write_card(manifest)
        self._tidy(manifest)

    def _tidy(self, manifest: Manifest) -> None:
        """Remove what no reader needs once the manifest stands. What cannot be removed counts for nothing."""
        # What writers left that died; one that is still at it will see, and write again.
        names = set(self.files.names())
        left = {name for name in names if name.removeprefix(".").startswith((*OURS, CARD)) and TEMPORARY in name}
        # Error rows that were run again: those that are left of them lie in newer shards.
        left |= {errors_file(shard.name) for shard in manifest.shards if not shard.failed} & names
        left |= self._older(manifest) & names
        try:
            if left:
                self.files.remove(sorted(left))
        except OutputError as error:
            log.warning("%s; it counts for nothing, as the manifest does not list it", error)

    def _older(self, manifest: Manifest) -> set[str]:
        """Files of older generations, and of updates that came to nothing. Not of one that begins now."""
        if manifest_spec(manifest).update is None:
            return set()
        found, digest = set[str](), manifest_digest(manifest)
        for footer in self.unlisted(manifest):
            job, update = footer.shard.job, footer.job_spec().update
            if job in manifest.before or (update is not None and job != manifest.job and update.manifest != digest):
                found |= {part_file(footer.shard.name), errors_file(footer.shard.name)}
        return found

    def unlisted(self, manifest: Manifest) -> Iterator[Footer]:
        """What shards say of themselves that the manifest does not list. Damaged ones, and others' files, are left
        out."""
        listed = {part_file(shard.name) for shard in manifest.shards}
        for name in self._part_files():
            if name not in listed:
                with suppress(OutputError):
                    footer, _ = self.footer(name)
                    if part_file(footer.shard.name) == name:
                        yield footer

    def mend(self, manifest: Manifest) -> None:
        """Write `_errors.jsonl` again if its lines are not as many as the manifest says, and the card if it is not the
        manifest's; remove what is not needed."""
        lines = 0
        if ERRORS in self.files.names():
            with self.files.open(ERRORS) as file:
                while some := file.read(1 << 20):
                    lines += some.count(b"\n")
        if lines != manifest.failed:
            self._write_errors(manifest)
        self._write_card(manifest)
        self._tidy(manifest)

    def _write_errors(self, manifest: Manifest) -> None:
        if manifest.failed or ERRORS in self.files.names():
            sources = manifest_spec(manifest).parts
            self.files.write(ERRORS, (row + b"\n" for row in self.error_lines(manifest, sources)))

    def _write_manifest(self, manifest: Manifest) -> None:
        self.files.write(MANIFEST, manifest_pieces(manifest))

    def _write_card(self, manifest: Manifest) -> None:
        """Unless a file of the user's lies there. One that cannot be written costs no dataset."""
        card = render_card(manifest).encode()
        try:
            there = self.files.read(CARD)
            if there is None or (is_card(there) and there != card):
                self.files.write(CARD, [card])
        except OutputError as error:
            log.warning("%s; the dataset is finished without it", error)

    def error_lines(self, manifest: Manifest, sources: Sequence[str]) -> Iterator[bytes]:
        """The listed shards' error rows as JSON, in the order of the corpus."""
        with Ordering() as ordering:
            for shard in manifest.shards:
                for batch in self._error_batches(shard, len(sources)):
                    ordering.put(placed_errors(batch, sources))
            yield from ordering.values()

    def _error_batches(self, shard: ManifestShard | ShardRecord, parts: int) -> Iterator[pa.RecordBatch]:
        """A shard's error rows, if they are those that were committed. Raises `OutputError`."""
        if not shard.failed:
            return
        name = errors_file(shard.name)
        if self.files.sha256(name)[1] != shard.errors_sha256:
            raise OutputError(f"{self.files.path(name)}: was changed since it was committed: restore the file")
        yield from self._of_parts(name, self.errors(shard.name), parts)

    def _of_parts(self, name: str, batches: Iterable[pa.RecordBatch], parts: int) -> Iterator[pa.RecordBatch]:
        """Rows with their places, found to be of `parts` parts. Raises `OutputError`."""
        schema, path = errors_schema(), self.files.path(name)
        for batch in batches:
            if not all(batch.schema.field(column).equals(schema.field(column)) for column in PLACE):
                raise OutputError(f"{path}: other columns than {', '.join(PLACE)}: restore the file")
            if not all(part in range(parts) for part in batch.column("part").unique().to_pylist()):
                raise OutputError(f"{path}: names a part that the job does not have: restore the file")
            yield batch

    def block_sums(self) -> dict[tuple[int, int], str]:
        """From the footers of the listed shards. Raises `OutputError`."""
        footers = (self.footer(part_file(shard.name))[0] for shard in self._listed().shards if shard.blocks)
        return {(block.part, block.block): block.sum for footer in footers for block in footer.shard.blocks}

    def keep_errors(self, manifest: Manifest, retried: Sequence[ShardRecord]) -> list[ManifestShard]:
        """Write shards without rows, of the error rows that stay; the same ones each time. Raises `OutputError`."""
        with Ordering() as ordering:
            for shard in manifest.shards:
                for batch in self._error_batches(shard, len(manifest.parts)):
                    ordering.put((*place, msgspec.json.encode(row)) for place, row in _placed(batch))
            for record in retried:
                name, parts = part_file(record.name), len(manifest.parts)
                good = self._of_parts(name, self.batches(name, list(PLACE), BATCH_ROWS), parts)
                for batch in chain(good, self._error_batches(record, parts)):
                    ordering.remove(place for place, _ in _placed(batch))
            expected = manifest.failed - sum(record.rows + record.failed for record in retried)
            if len(ordering) != expected:
                raise OutputError(
                    f"{mask(self.output)}: {len(ordering)} error rows are left of those in its manifest, and not "
                    f"{expected}: _errors-*.arrow were changed: restore them"
                )
            rows = (msgspec.json.decode(value) for value in ordering.values())
            batches = iter(lambda: list(islice(rows, KEPT_ROWS)), [])
            return [self._keep(retried[0], number, batch) for number, batch in enumerate(batches)]

    def _keep(self, like: ShardRecord, number: int, errors: list[dict[str, object]]) -> ManifestShard:
        record = msgspec.structs.replace(
            like,
            name=f"{like.job}-{number}",
            blocks=(),
            rows=0,
            failed=len(errors),
            skipped=0,
            truncated=0,
            duplicates=0,
            reused=0,
            tokens=0,
            padded=0,
            bytes=0,
            sha256="",
            errors_sha256="",
        )
        assert self._spec is not None, "only a job's finalizer keeps errors"
        data = dataset_schema(self._spec, record.outputs).empty_table()
        written = self.write_shard(ShardContent(record, data, pa.Table.from_pylist(errors, schema=errors_schema())))
        return list_shard(written)

    def read(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The listed shards' rows, shard by shard; a few thousand rows are held at a time.

        Raises:
            OutputError: there is no manifest yet, or a listed shard or column is not there.
        """
        manifest = self._listed()
        names = None if columns is None else list(columns)
        for shard in manifest.shards:
            yield from self.batches(part_file(shard.name), names, BATCH_ROWS)

    def read_errors(self) -> Iterator[ErrorRow]:
        """The listed shards' error rows, in the order of the corpus. Raises as `read` does."""
        manifest = self._listed()
        lines = self.error_lines(manifest, manifest_spec(manifest).parts)
        return (msgspec.json.decode(line, type=ErrorRow) for line in lines)

    def _listed(self) -> Manifest:
        manifest = self.read_manifest()
        if manifest is None:
            raise OutputError(f"{mask(self.output)}: no {MANIFEST}: not a dataset, or its job has not ended yet")
        return manifest

    def describe(self) -> str:
        """A shell line that shows some rows."""
        shown = "['id', 'text']" if self._spec is None or self._spec.text else "['id']"
        code = f"import embedstream; print(embedstream.open_dataset({self.output!r}).head(5, columns={shown}))"
        return 'python -c "' + re.sub(r'([\\"$`])', r"\\\1", code) + '"'

    def batches(self, name: str, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        """A Parquet file's rows in bounded memory, at most `rows` at a time. Raises `OutputError`."""
        with self._reading(name) as source, pq.ParquetFile(source) as file:
            there = file.schema_arrow.names
            unknown = set(columns or ()) - set(there)
            if unknown:
                raise OutputError(f"{self.files.path(name)}: no column {min(unknown)} (there are: {', '.join(there)})")
            for group in range(file.num_row_groups):
                most = rows_at_once(
                    file,
                    source,
                    group,
                    columns,
                    rows,
                    BATCH_BYTES,
                    self.files.quick_piece,
                    most_list_values=MOST_ROW_VALUES,
                )
                yield from file.iter_batches(batch_size=most, row_groups=[group], columns=columns)

    def errors(self, shard: str) -> Iterator[pa.RecordBatch]:
        """A shard's error rows, some at a time, in bounded memory. Raises `OutputError`."""
        name = errors_file(shard)
        with self._reading(name) as file:
            yield from read_errors(file)

    @contextmanager
    def _reading(self, name: str) -> Iterator[pa.NativeFile]:
        path = self.files.path(name)
        try:
            with self.files.open(name) as file:
                yield file
        except RowsRefused as error:
            raise OutputError(f"{path}: {error}") from error
        except (pa.ArrowException, ValueError) as error:
            raise OutputError(f"{path}: damaged ({error}): restore the file") from error
        except OSError as error:
            raise self.files.cannot_read(name, error) from error


def _placed(batch: pa.RecordBatch) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
    """Rows with their part, row and chunk."""
    return (((row["part"], row["row"], row["chunk"]), row) for row in batch.to_pylist())
