"""Datasets made of a corpus through the producer's reading and the sink, and damage to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.input_hash import input_hashes
from embedstream.dataset.parquet import FOOTER_KEY
from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.sink import Sink
from embedstream.dataset.storage import Folder
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.completing import finalize
from embedstream.queue.blocks import Block
from embedstream.records import BlockRecord, Manifest, ShardContent, ShardRecord
from embedstream_producer.corpus import check_sources
from embedstream_producer.retry_failed import FailedRows
from lab.dataset import dense, make_status
from lab.dataset import vectors as unit_vectors

PROMPT = "passage: "


def write_lines(path: Path, rows: int, first: int = 0) -> None:
    """A corpus with titles, a kept field, blank lines, and now and then an empty text, a bad line, a doubled id."""
    lines = []
    for i in range(first, first + rows):
        record: dict[str, object] = {
            "id": f"{path.stem}-{i}",
            "text": f"text {i} café",
            "lang": "en" if i % 3 else None,
        }
        if i % 5 == 0:
            record["title"] = f"Title {i}"
        if i % 50 == 7:
            record["text"] = " "
        if i % 100 == 8:
            record["id"] = f"{path.stem}-{i - 2}"
        lines.append("{oops" if i % 100 == 9 else json.dumps(record))
        if i % 40 == 11:
            lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass
class Made:
    """A finished dataset and what it was made of."""

    spec: JobSpec
    corpus: list[Path]
    records: list[ShardRecord]
    manifest: Manifest

    @property
    def folder(self) -> Path:
        return Path(self.spec.output)

    def part(self, at: int = 0) -> Path:
        return self.folder / f"part-{self.records[at].name}.parquet"

    def errors(self) -> Path:
        return sorted(self.folder.glob("_errors-*.arrow"))[0]


@dataclass
class Maker:
    """Writes a dataset as workers would; every `fail_every`-th accepted row fails in the worker."""

    spec: JobSpec
    sink: Sink
    fail_every: int = 97
    prefix: str = ""
    """Of the shards' names."""
    records: list[ShardRecord] = field(default_factory=list)

    def blocks(self) -> list[Block]:
        with DuplicateIndex() as index:
            return [block for part in check_sources(self.spec.parts) for block in part.blocks(self.spec, index)]

    def write(self, blocks: Sequence[Block]) -> None:
        rows: Any = pa.Table.from_batches([block.rows for block in blocks])
        parts = np.repeat([block.part for block in blocks], [block.rows.num_rows for block in blocks])
        schema = dataset_schema(self.spec, [dense()])
        count = rows.num_rows
        matrix = unit_vectors(count, seed=len(self.records))
        lengths = pa.array([3 + i % 4 for i in range(count)], pa.int32())
        made: dict[str, Any] = {
            "part": pa.array(parts, pa.int32()),
            "n_tokens": lengths,
            "truncated": pa.array([i % 10 == 1 for i in range(count)]),
            "input_hash": input_hashes(rows.column("text").to_pylist(), PROMPT),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(matrix.reshape(-1)), type=schema.field("embedding").type
            ),
        }
        table: Any = pa.table([made.get(name) or rows.column(name) for name in schema.names], schema=schema)
        bad = np.arange(count) % self.fail_every == self.fail_every - 1
        owner = np.repeat(np.arange(len(blocks)), [block.rows.num_rows for block in blocks])
        errors: list[dict[str, object]] = [
            {"part": block.part, "chunk": 0, **msgspec.structs.asdict(refusal)}
            for block in blocks
            for refusal in block.refused
        ]
        for row in table.filter(pa.array(bad)).to_pylist():
            failed = {name: row[name] for name in ("part", "row", "id", "chunk")}
            errors.append(failed | {"code": "not_finite", "message": "NaN", "original": row.get("text", "")})
        data = table.filter(pa.array(~bad))
        record = ShardRecord(
            name=f"{self.prefix}{len(self.records):04x}",
            job=self.spec.job,
            space="space",
            blocks=tuple(
                BlockRecord(
                    block.part,
                    block.number,
                    int((~bad[owner == i]).sum()),
                    len(block.refused) + int(bad[owner == i].sum()),
                    block.skipped,
                    block.sum.hex(),
                )
                for i, block in enumerate(blocks)
            ),
            rows=data.num_rows,
            failed=len(errors),
            skipped=sum(block.skipped for block in blocks),
            truncated=sum(data.column("truncated").to_pylist()),
            tokens=sum(data.column("n_tokens").to_pylist()),
            padded=5 * count,
            outputs=(dense(),),
            dtype="float32",
            engine="test",
            worker="test",
            prompt=PROMPT,
        )
        content = ShardContent(record, data, pa.Table.from_pylist(errors, schema=errors_schema()))
        self.records.append(self.sink.write_shard(content))

    def end(self, state: JobState = JobState.COMPLETED, **changed: Any) -> Manifest:
        done = sum(len(record.blocks) for record in self.records)
        return finalize(self.sink, make_status(self.spec, done, **changed), self.records, state, 1010.5)


def make_spec(folder: Path, corpus: Sequence[Path], **changed: Any) -> JobSpec:
    spec = JobSpec(queue="q", output=str(folder), model="m", parts=tuple(map(str, corpus)), keep=("lang",))
    return msgspec.structs.replace(spec, **changed)


def make_dataset(home: Path, rows: int = 700, **changed: Any) -> Made:
    """Two parts in several blocks, dealt out to three shards as if by several workers."""
    corpus = [home / "a.jsonl", home / "b.jsonl"]
    for path in corpus:
        write_lines(path, rows)
    spec = make_spec(home / "out", corpus, **changed)
    sink = FolderSink(spec.output, spec)
    sink.check()
    maker = Maker(spec, sink)
    blocks = maker.blocks()
    for i in range(3):
        maker.write(blocks[i::3])
    return Made(spec, corpus, maker.records, maker.end())


def run_again(made: Made, fail_every: int = 10**9) -> tuple[JobStatus, list[ShardRecord]]:
    """A job over the failed rows, of which every `fail_every`-th fails again: computed, and not finalized yet."""
    sink = FolderSink(made.spec.output, made.spec)
    with FailedRows(sink, made.spec) as failed, DuplicateIndex() as index:
        assert len(failed) > 0
        maker = Maker(failed.spec, FolderSink(made.spec.output, failed.spec), fail_every=fail_every, prefix="again-")
        blocks = [
            block
            for part in check_sources(made.spec.parts)
            for block in failed.blocks(part.index, part.label, part.blocks(made.spec, index))
        ]
        maker.write(blocks)
    return make_status(failed.spec, len(blocks)), maker.records


def edit_manifest(made: Made, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as JSON."""
    path = made.folder / "_manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rewrite(made: Made, path: Path, change: Callable[[pa.Table], pa.Table], **footer: object) -> None:
    """Rewrite a shard's file with other rows or another footer, and let the manifest have the file's new checksum."""
    is_data = path.suffix == ".parquet"
    table = change(read_rows(path))
    if is_data:
        raw = json.loads((pq.read_metadata(path).metadata or {})[FOOTER_KEY.encode()])
        raw["shard"] |= msgspec.to_builtins(footer)
        table = table.replace_schema_metadata({FOOTER_KEY: json.dumps(raw)})
    with (pq.ParquetWriter if is_data else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)
    size, sha256 = Folder(path.parent).sha256(path.name)

    def note(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            if path.name == shard["file"]:
                shard |= {"bytes": size, "sha256": sha256}
            elif path.name == shard.get("errors", {}).get("file"):
                shard["errors"]["sha256"] = sha256

    edit_manifest(made, note)


def read_rows(path: Path) -> pa.Table:
    """Rows, or error rows, of a shard's file."""
    return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path.read_bytes()).read_all()


def replaced(table: pa.Table, column: str, values: Sequence[object]) -> pa.Table:
    """The table with other values in a column."""
    at = table.schema.get_field_index(column)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def with_vectors(table: pa.Table, change: Callable[[Any], None]) -> pa.Table:
    """The table after `change` was made to its vectors [n, dim]."""
    type = table.schema.field("embedding").type
    vectors: Any = table.column("embedding").combine_chunks()
    matrix = vectors.flatten().to_numpy().reshape(len(table), -1).copy()
    change(matrix)
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), type=type)
    at = table.schema.get_field_index("embedding")
    return table.set_column(at, table.schema.field(at), column)
