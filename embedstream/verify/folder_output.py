"""Whether a dataset in files is what its manifest says: one pass over its files, memory of a bit a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from itertools import zip_longest
from typing import Any, cast

import msgspec
import numpy as np
import pyarrow as pa

from embedstream.dataset.card import CARD
from embedstream.dataset.changes import KINDS, count_changes, read_changes
from embedstream.dataset.folder import BATCH_ROWS, ERRORS, MANIFEST, FolderSink
from embedstream.dataset.input_hash import entered, text_digests
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.schema import ErrorRow, dataset_schema
from embedstream.errors import OutputError
from embedstream.jobs import differing_field
from embedstream.queue.blocks import MOST_INPUT_ROWS
from embedstream.records import BlockRecord, Manifest, ManifestShard, errors_file, part_file
from embedstream.verify.block_spans import BlockSpans
from embedstream.verify.findings import Finding, Findings, Kind
from embedstream.verify.locating import locate
from embedstream.verify.manifest_sums import check_footer
from embedstream.verify.places import PAGE_ROWS, Mask, Numbers, PlaceNumbers, Places, Rows
from embedstream.verify.rows import Located, bad_column, id_numbers, kept_numbers, text_numbers

_TOTALS = ("skipped", "truncated", "duplicates", "reused", "tokens", "padded")
"""What a manifest adds up over its shards, beside rows and error rows."""

MOST_CHUNKS = 1 << 19
"""Of one text: one of 8 MiB has no more chunks of 16 bytes."""

MOST_SECTIONS = 4 * MOST_CHUNKS
"""Of all parts together that are followed where texts are cut: a section of few rows takes some 200 bytes."""

_SPARE_PAGES = 4096
_PAGES_PER_FULL_ONE = 64
"""How thinly rows may be spread: a corpus with 63 blank lines for each row is still followed."""


class FolderCheck:
    """One reading of a dataset. `compare`: also keep what is needed to compare it with its corpus."""

    def __init__(
        self,
        sink: FolderSink,
        manifest: Manifest,
        findings: Findings,
        compare: bool = False,
        on_rows: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_rows`: called with how many more rows of the dataset are checked."""
        self.sink = sink
        self.manifest = manifest
        self.spec = manifest_spec(manifest)
        self._on_rows = on_rows
        self.findings = findings
        most = _SPARE_PAGES + _PAGES_PER_FULL_ONE * ((manifest.rows + manifest.failed) // PAGE_ROWS + 1)
        if self.spec.chunking is not None:
            most += min(manifest.rows + manifest.failed, MOST_SECTIONS)
        self.good, self.failed = Places(most), Places(most)
        """The rows of the dataset, and those of its errors."""
        self.numbers = PlaceNumbers(3) if compare else None
        """By place: hashes of id, of what entered the model, and of kept fields; the latter two 0 in error rows."""
        self.bytes = 0
        """Read so far."""
        self._names = set(sink.files.names())
        self._per_part = np.zeros((len(self.spec.parts), 2), np.int64)
        self._spans = BlockSpans(self.spec.chunking is not None)
        self._totals = dict.fromkeys(_TOTALS, 0)
        self._errors_sound = True
        """Whether nothing was wrong with the files of error rows, so that they can be told as people read them."""
        self._whole = True
        """Whether every file could be read to its end, so that counts over all of them mean something."""

    def run(self) -> None:
        """Read every listed file once; the next one is hashed while one is decoded."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[_Sums] | None = None
            for shard, after in zip_longest(self.manifest.shards, self.manifest.shards[1:]):
                sums = (ahead or pool.submit(self._sums, shard)).result()
                ahead = None if after is None else pool.submit(self._sums, after)
                self._check_shard(shard, sums)
        self._check_changes()
        if self._whole:
            for part, said in enumerate(self.manifest.parts):
                source = f"part {part} ({said.name}): "
                self._count(None, "rows", said.rows, int(self._per_part[part, 0]), source)
                self._count(None, "error rows", said.failed, int(self._per_part[part, 1]), source)
            for what, found in self._totals.items():
                self._count(MANIFEST, f"{what} (by the shards' footers)", getattr(self.manifest, what), found)
            if self.numbers is None:
                self._check_order()
            if self._errors_sound:
                self._check_lines()

    def unlisted(self) -> list[str]:
        """Names in the folder that the manifest does not list, in order: harmless, as no reader opens them."""
        listed = {MANIFEST, ERRORS, CARD, *(each.file for each in self.manifest.changes)}
        for shard in self.manifest.shards:
            listed.update(_files(shard))
        return sorted(self._names - listed)

    def _check_changes(self) -> None:
        """What updates changed: as many rows of each kind as the manifest says."""
        for changes in self.manifest.changes:
            if changes.file not in self._names:
                self._lost(Kind.MISSING_FILE, "the manifest lists this file, and it is not there", changes.file)
                continue
            try:
                found = count_changes(read_changes(self.sink, changes))
            except OutputError as error:
                self._lost(Kind.UNREADABLE, self._why(changes.file, error), changes.file)
                continue
            for kind in KINDS:
                self._count(changes.file, f"rows {kind}", getattr(changes, kind), found.get(kind, 0))

    def _sums(self, shard: ManifestShard) -> _Sums:
        sums: _Sums = []
        for name in _files(shard):
            try:
                sums.append((name, self.sink.files.sha256(name) if name in self._names else None))
            except OutputError as error:
                sums.append((name, error))
        return sums

    def _check_shard(self, shard: ManifestShard, sums: _Sums) -> None:
        blocks: Sequence[BlockRecord] = ()
        for name, found in sums:
            if found is None:
                self._lost(Kind.MISSING_FILE, "the manifest lists this file, and it is not there", name)
                continue
            if isinstance(found, OutputError):
                self._lost(Kind.UNREADABLE, self._why(name, found), name)
                continue
            before = self.findings.total
            size, sha256 = found
            self.bytes += size
            is_data = name == part_file(shard.name)
            said = shard.sha256 if is_data else shard.errors_sha256
            if is_data and size != shard.bytes:
                self.findings.add(Kind.CHECKSUM, f"has {size:,} bytes, was committed with {shard.bytes:,}", name)
            elif sha256 != said:
                self.findings.add(Kind.CHECKSUM, f"is not as it was committed: {sha256}, committed {said}", name)
            try:
                if is_data:
                    blocks = self._check_data(shard, name)
                else:
                    self._check_errors(shard, name, blocks)
            except OutputError as error:
                self._lost(Kind.UNREADABLE, self._why(name, error), name)
            if not is_data and self.findings.total > before:
                self._errors_sound = False

    def _why(self, name: str, error: OutputError) -> str:
        """What an error says beside the file's name."""
        return str(error).removeprefix(f"{self.sink.files.path(name)}: ")

    def _lost(self, kind: Kind, message: str, name: str) -> None:
        self.findings.add(kind, message, name)
        self._whole = False

    def _check_data(self, shard: ManifestShard, name: str) -> Sequence[BlockRecord]:
        """The shard's rows. Returns its blocks, if they are the corpus's: not those of rows that were run again."""
        footer, count = self.sink.footer(name)
        record, columns, expected = footer.shard, self._columns(), dataset_schema(self.spec, self.manifest.outputs)
        check_footer(self.findings, self.manifest, shard, record, name)
        if differing_field(footer.job_spec(), self.spec) is not None:
            self.findings.add(Kind.FOOTER, "was made by a job with another spec", name)
        self._count(name, "rows", shard.rows, count)
        blocks = record.blocks if shard.blocks else ()
        spans, sums, start = self._spans.file(blocks, failed=False, rows=count), np.zeros(2, np.int64), 0
        for batch in self.sink.batches(name, columns, BATCH_ROWS):
            try:
                batch.validate(full=True)
            except pa.ArrowInvalid as error:
                raise OutputError(f"rows from {start:,} on are damaged ({error})") from error
            wrong = [c for c in columns if not batch.schema.field(c).equals(expected.field(c))]
            if wrong:
                found, said = (_typed(schema.field(wrong[0])) for schema in (batch.schema, expected))
                self._lost(Kind.COLUMNS, f"column {wrong[0]} is {found}, expected {said}", name)
                return blocks
            self._check_rows(batch, Located(self.findings, name, start, batch))
            sums += [_sum(batch.column("n_tokens")), _sum(batch.column("truncated"))]
            spans.add(start, batch.column("row").to_numpy())
            start += batch.num_rows
            self._on_rows(batch.num_rows)
        for what in _TOTALS:
            self._totals[what] += getattr(record, what)
        self._count(name, "tokens", record.tokens, int(sums[0]))
        self._count(name, "truncated texts", record.truncated, int(sums[1]))
        return blocks

    def _check_errors(self, shard: ManifestShard, name: str, blocks: Sequence[BlockRecord]) -> None:
        """The shard's error rows; `blocks` are those of its rows."""
        count = sum(batch.num_rows for batch in self.sink.errors(shard.name))
        self._count(name, "rows", shard.failed, count)
        spans, start = self._spans.file(blocks, failed=True, rows=count), 0
        for batch in self.sink.errors(shard.name):
            self._check_error_rows(batch, Located(self.findings, name, start, batch))
            spans.add(start, batch.column("row").to_numpy())
            start += batch.num_rows

    def _columns(self) -> list[str]:
        columns = ["part", "row", "id", "chunk", "n_tokens", "truncated"]
        columns += [name for output in self.manifest.outputs for name in output.columns]
        if self.numbers is not None:
            columns += ["input_hash", *(["text"] if self.spec.text else []), *self.spec.keep]
        return columns

    def _count(self, name: str | None, of: str, said: int, found: int, where: str = "") -> None:
        if said != found:
            self.findings.add(Kind.COUNT, f"{where}{found:,} {of}, expected {said:,}", name)

    def _check_rows(self, batch: pa.RecordBatch, located: Located) -> None:
        outputs = self.manifest.outputs
        for output in outputs:
            for kind, bad in bad_column(output, batch, alone=len(outputs) == 1).items():
                located.add(kind, bad)
        numbers = None if self.numbers is None else self._numbers_of(batch, located)
        for section, chosen, rows in self._places(batch, located):
            doubled, beyond = self.good.add(section, rows)
            located.add(Kind.DOUBLED, _widened(chosen, doubled))
            located.add(Kind.PLACE, _widened(chosen, beyond))
            located.add(Kind.IN_BOTH, _widened(chosen, self.failed.has(section, rows)))
            self._per_part[section % len(self.spec.parts), 0] += len(rows)
            if numbers is not None and self.numbers is not None:
                self.numbers.put(section, rows[~beyond], numbers[chosen][~beyond])

    def _check_error_rows(self, batch: pa.RecordBatch, located: Located) -> None:
        numbers = np.zeros((batch.num_rows, 3), np.uint64)
        if self.numbers is not None:
            numbers[:, 0] = id_numbers(batch.column("id"))
        for section, chosen, rows in self._places(batch, located):
            doubled, beyond = self.failed.add(section, rows)
            located.add(Kind.DOUBLED, _widened(chosen, doubled))
            located.add(Kind.PLACE, _widened(chosen, beyond))
            located.add(Kind.IN_BOTH, _widened(chosen, self.good.has(section, rows)))
            self._per_part[section % len(self.spec.parts), 1] += len(rows)
            if self.numbers is not None:
                self.numbers.put(section, rows[~beyond], numbers[chosen][~beyond])

    def _numbers_of(self, batch: pa.RecordBatch, located: Located) -> Numbers:
        """What is compared with the corpus, [n, 3]; texts that are not those of their own hash are told at once."""
        numbers = np.zeros((batch.num_rows, 3), np.uint64)
        numbers[:, 0] = id_numbers(batch.column("id"))
        numbers[:, 1] = text_numbers(batch.column("input_hash"))
        if self.spec.keep:
            numbers[:, 2] = kept_numbers(batch, self.spec)
        if self.spec.text:
            digests = text_digests(entered(batch, self.spec.query_field), self.manifest.prompt)
            own = np.frombuffer(digests, np.uint64).reshape(-1, 2)[:, 0]
            located.add(Kind.OTHER_TEXT, own != numbers[:, 1])
        return numbers

    def _places(self, batch: pa.RecordBatch, located: Located) -> Iterator[tuple[int, Mask, Rows]]:
        """The batch by section: its number, which rows are of it, and their row numbers. Impossible places are told."""
        part, row, chunk = (batch.column(name).to_numpy() for name in ("part", "row", "chunk"))
        most = 1 if self.spec.chunking is None else MOST_CHUNKS
        impossible = (part < 0) | (part >= len(self.spec.parts)) | (row < 0) | (row >= MOST_INPUT_ROWS)
        impossible |= (chunk < 0) | (chunk >= most)
        located.add(Kind.PLACE, impossible)
        for each, chosen in by_section(part, chunk, len(self.spec.parts)):
            chosen &= ~impossible
            if chosen.any():
                yield each, chosen, row[chosen].astype(np.int64)

    def _check_order(self) -> None:
        """What a corpus would tell better: rows that are not between those of the neighbouring blocks."""
        misplaced = self._spans.misplaced()
        told = list(misplaced)[: max(0, self.findings.room(Kind.PLACE))]
        located = locate(self.sink, self.manifest, set(told))
        for place in told:
            there = located.get(place, Finding(message=""))
            message = f"part {place.part} row {place.row}: {misplaced[place]}"
            self.findings.add(Kind.PLACE, message, there.file, there.row, there.id)
        self.findings.count(Kind.PLACE, len(misplaced) - len(told))

    def _check_lines(self) -> None:
        """`_errors.jsonl` is made of the shards' error rows, in the manifest's order, and of nothing else."""
        if ERRORS not in self._names:
            if self.manifest.failed:
                message = f"{self.manifest.failed:,} rows failed, and this file is not there"
                self.findings.add(Kind.MISSING_FILE, message, ERRORS)
            return
        lines, differs = 0, ""
        try:
            with self.sink.files.open(ERRORS) as file:
                expected = self.sink.error_lines(self.manifest, self.spec.parts)
                for line, row in zip_longest(BufferedReader(cast(Any, file)), expected):
                    lines += line is not None
                    if not differs and (line is None or row is None or line != row + b"\n"):
                        differs = f"line {lines + (line is None)} differs: expected {_shown(row)}"
        except OSError as error:
            self._lost(Kind.UNREADABLE, self._why(ERRORS, self.sink.files.cannot_read(ERRORS, error)), ERRORS)
            return
        except OutputError as error:
            self._lost(Kind.UNREADABLE, self._why(ERRORS, error), ERRORS)
            return
        if differs:
            self.findings.add(Kind.ERRORS, f"{lines:,} lines, {self.manifest.failed:,} rows failed; {differs}", ERRORS)


def by_section(part: Any, chunk: Any, parts: int) -> Iterator[tuple[int, Mask]]:
    """Rows by part and chunk, which make a section (`chunk * parts + part`): its number, and which rows are of it."""
    section = chunk.astype(np.int64) * parts + part
    for each in np.unique(section):
        yield int(each), section == each


_Sums = list[tuple[str, tuple[int, str] | OutputError | None]]
"""By file: size and SHA-256, why it cannot be read, or None if it is not there."""


def _files(shard: ManifestShard) -> list[str]:
    return [part_file(shard.name), *([errors_file(shard.name)] if shard.errors else [])]


def _shown(line: bytes | None) -> str:
    """A line of `_errors.jsonl` in short."""
    if line is None:
        return "the end"
    row = msgspec.json.decode(line, type=ErrorRow)
    return f"{row.code} of {row.file}:{row.line}{'' if row.id is None else f' (id {row.id})'}"


def _typed(field: pa.Field[Any]) -> str:
    """A column's type with all that counts of it: vectors say of their numbers whether they may be null."""
    return str(field.type) if field.nullable else f"{field.type} not null"


def _sum(column: Any) -> int:
    return int(column.to_numpy(zero_copy_only=False).sum())


def _widened(chosen: Mask, bad: Mask) -> Mask:
    wide = chosen.copy()
    wide[chosen] = bad
    return wide
