"""Whether the hashes of a job in Redis are what its manifest says, and what its corpus says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.redis_hashes import Fields, RedisSink
from embedstream.dataset.redis_values import from_fields
from embedstream.dataset.schema import output_fields
from embedstream.queue.blocks import Block
from embedstream.records import Manifest
from embedstream.verify.corpus_rows import Listed
from embedstream.verify.findings import Findings, Kind
from embedstream.verify.rows import WORDS, bad_column

_KEYS_PART = (1 << 24) - 1
"""The part under which keys are entered in an index, beside ids of a corpus's parts."""


class HashCheck:
    """One reading of a job's hashes."""

    def __init__(
        self, sink: RedisSink, manifest: Manifest, findings: Findings, on_rows: Callable[[int], None] = lambda _: None
    ) -> None:
        """`on_rows`: called with how many more hashes are checked."""
        self.sink = sink
        self.manifest = manifest
        self.findings = findings
        self.spec = manifest_spec(manifest)
        self._on_rows = on_rows
        self.bytes = 0
        """Of vectors, read so far."""
        self.foreign: list[str] = []
        """Some keys below the prefix that are of another job, or of none."""
        self.foreign_count = 0
        self.compared: int | None = None
        self._listed = Listed(manifest)
        self._columns = [field for output in manifest.outputs for field in output_fields(output)]
        self._jobs = {job.encode() for job in (manifest.job, *manifest.retries)}

    def compare(self, block: Block, label: str) -> None:
        """Look up each row of a block of the corpus; `label` is its part's name."""
        if not self._listed.has(block.part, block.number):
            return
        self.compared = (self.compared or 0) + block.total
        rows: list[Any] = block.rows.column("row").to_pylist()
        columns: dict[str, list[Any]] = {name: block.rows.column(name).to_pylist() for name in self._kept()}
        ids: list[Any] = block.rows.column("id").to_pylist()
        chunks: list[Any] = block.rows.column("chunk").to_pylist()
        errors = self.sink.look_at_errors([(block.part, row, chunk) for row, chunk in zip(rows, chunks, strict=True)])
        keys, found = self.sink.look(ids, chunks, ["job", *columns])
        for at, (key, fields) in enumerate(zip(keys, found, strict=True)):
            place, name = f"{label}:{rows[at] + 1}", key.decode(errors="replace")
            error = errors[at]
            if fields[0] not in self._jobs:
                if error is None or error.id != ids[at]:
                    self.findings.add(Kind.NOT_IN_DATASET, f"{place}: is not in the dataset", name, id=ids[at])
                continue
            if error is not None and error.id == ids[at]:
                self.findings.add(Kind.IN_BOTH, f"{place}: {WORDS[Kind.IN_BOTH]}", name, id=ids[at])
            for (column, values), value in zip(columns.items(), fields[1:], strict=True):
                wanted = None if values[at] is None else values[at].encode()
                if value != wanted:
                    kind = Kind.OTHER_TEXT if column == "text" else Kind.OTHER_FIELDS
                    self.findings.add(kind, f"{place}: has another {column} than the dataset", name, id=ids[at])
        failed = self.sink.look_at_errors([(block.part, refusal.row, 0) for refusal in block.refused])
        for refusal, error in zip(block.refused, failed, strict=True):
            if error is None:
                message = f"{label}:{refusal.row + 1}: is refused, and is not in the dataset's errors"
                self.findings.add(Kind.NOT_IN_DATASET, message, id=refusal.id)

    def run(self, index: DuplicateIndex) -> None:
        """Read every key below the prefix. `index` holds the ids of the corpus if that was compared, else nothing."""
        known = 0
        for keys, found in self.sink.scan(["job", "id", "chunk", *(field.name for field in self._columns)]):
            mine = [at for at, fields in enumerate(found) if fields[0] in self._jobs]
            self._note_foreign([keys[at] for at in range(len(keys)) if found[at][0] not in self._jobs])
            names = [(found[at][1] or b"").decode(errors="replace") for at in mine]
            chunks = [_number(found[at][2]) for at in mine]
            entered = names if self.compared is not None else [f"{c}:{n}" for c, n in zip(chunks, names, strict=True)]
            earlier = index.check(_KEYS_PART, range(known, known + len(mine)), entered)
            known += len(mine)
            for at, name, chunk, position in zip(mine, names, chunks, earlier, strict=True):
                key = keys[at].decode(errors="replace")
                if self.compared is not None and position is None:
                    self.findings.add(Kind.NOT_IN_CORPUS, "no such id in the corpus", key, id=name)
                if keys[at] != self.sink.key(name, chunk):
                    self.findings.add(Kind.OTHER_ID, "the hash has another id than its key", key, id=name)
            self._check_results([keys[at] for at in mine], [[*found[at][:2], *found[at][3:]] for at in mine])
            self._on_rows(len(mine))
        if self.compared is None and len(index) != self.manifest.rows:
            message = (
                f"{len(index):,} keys, the manifest says {self.manifest.rows:,} rows (keys may expire or be evicted)"
            )
            self.findings.add(Kind.COUNT, message)
        errors = self.sink.count_errors()
        if errors < self.manifest.failed:
            self.findings.add(Kind.ERRORS, f"{errors:,} error rows, the manifest says {self.manifest.failed:,}")

    def _kept(self) -> list[str]:
        return [*(["text"] if self.spec.text else []), *self.spec.keep]

    def _note_foreign(self, keys: Sequence[bytes]) -> None:
        self.foreign_count += len(keys)
        self.foreign += [key.decode(errors="replace") for key in keys[: 10 - len(self.foreign)]]

    def _check_results(self, keys: Sequence[bytes], found: Sequence[Fields]) -> None:
        if not keys:
            return
        self.bytes += sum(len(value or b"") for fields in found for value in fields[2:])
        whole = list(range(len(keys)))
        try:
            batch = self._batch(found)
        except _Unreadable:
            whole = [at for at in whole if self._is_readable(keys[at], found[at])]
            batch = self._batch([found[at] for at in whole])
        outputs = self.manifest.outputs
        for output in outputs:
            for kind, bad in bad_column(output, batch, alone=len(outputs) == 1).items():
                for which in np.flatnonzero(bad):
                    at = whole[int(which)]
                    id = (found[at][1] or b"").decode(errors="replace")
                    self.findings.add(kind, WORDS[kind], keys[at].decode(errors="replace"), id=id)

    def _is_readable(self, key: bytes, fields: Fields) -> bool:
        try:
            self._batch([fields])
        except _Unreadable as error:
            self.findings.add(Kind.COLUMNS, str(error), key.decode(errors="replace"))
            return False
        return True

    def _batch(self, found: Sequence[Fields]) -> pa.RecordBatch:
        """The columns of results. Raises `_Unreadable`."""
        arrays = []
        for field, *values in zip(self._columns, *(fields[2:] for fields in found), strict=True):
            if None in values:
                raise _Unreadable(f"{field.name}: it is not there")
            try:
                arrays.append(from_fields(values, field.type))
            except (ValueError, pa.ArrowException) as error:
                raise _Unreadable(f"{field.name}: {error}") from error
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(self._columns))


def _number(field: bytes | None) -> int:
    """Which chunk a hash says that it is."""
    # Python refuses to convert thousands of digits; more than these are no chunk's number.
    return int(field[:10]) if field is not None and field.isdigit() else 0


class _Unreadable(Exception):
    """Fields of a hash are no results."""
