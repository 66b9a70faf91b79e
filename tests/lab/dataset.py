"""Shards with known content, and the job they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.sink import Sink
from embedstream.dataset.values import to_columns
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.completing import finalize
from embedstream.outputs import Kind, Output
from embedstream.records import BlockRecord, Manifest, ShardContent, ShardRecord
from lab.results import some_results

DIM = 8


def dense(dim: int = DIM, normalized: bool = True, **changed: Any) -> Output:
    """Vectors as they are."""
    made = Output(name="embedding", kind="dense", dtype="float32", dim=dim, normalized=normalized)
    return msgspec.structs.replace(made, **changed)


def make_spec(output: str, **changed: Any) -> JobSpec:
    spec = JobSpec(queue="q", output=output, model="m", parts=("/data/a.jsonl", "/data/b.jsonl"), keep=("lang",))
    return msgspec.structs.replace(spec, **changed)


def vectors(rows: int, seed: int = 0, dim: int = DIM) -> npt.NDArray[np.float32]:
    """Unit vectors [rows, dim]."""
    raw = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    return raw


def make_content(
    spec: JobSpec,
    name: str = "a",
    blocks: Sequence[tuple[int, int]] = ((0, 0),),
    rows_per_block: int = 3,
    errors: Sequence[dict[str, object]] = (),
    matrix: npt.NDArray[np.float32] | None = None,
    outputs: Sequence[Output] = (),
    **changed: Any,
) -> ShardContent:
    """A shard of whole blocks; the errors are counted in the first. Block n of a part begins at row 10 n.

    `outputs`: one dense one if none are given; of several, or another kind, those of `EVERY_KIND`.
    """
    count = rows_per_block
    places = [(part, 10 * block + i) for part, block in blocks for i in range(count)]
    seed = int(hashlib.md5(name.encode()).hexdigest()[:6], 16)
    results: dict[Kind, Any] = {"dense": vectors(len(places), seed) if matrix is None else matrix}
    if [output.kind for output in outputs] not in ([], ["dense"]):
        results = some_results([output.kind for output in outputs], len(places), seed)
    outputs = outputs or (dense(results["dense"].shape[1]),)
    schema = dataset_schema(spec, outputs)
    texts = [f"text {part}/{row} café" for part, row in places]
    columns: dict[str, pa.Array[Any]] = {
        "part": pa.array([part for part, _ in places], pa.int32()),
        "row": pa.array([row for _, row in places], pa.int64()),
        "id": pa.array([f"{part}-{row}" for part, row in places], pa.string()),
        "chunk": pa.array([0] * len(places), pa.int32()),
        "start": pa.array([7 * row for _, row in places], pa.int64()),
        "end": pa.array([7 * row + len(text) for (_, row), text in zip(places, texts, strict=True)], pa.int64()),
        "text": pa.array(texts, pa.string()),
        "n_tokens": pa.array([4] * len(places), pa.int32()),
        "truncated": pa.array([row % 10 == 1 for _, row in places], pa.bool_()),
        "input_hash": pa.array([hashlib.md5(text.encode()).digest() for text in texts], pa.binary(16)),
        "query": pa.array([f"question {row % 2}" for _, row in places], pa.string()),
        "lang": pa.array(["en" if row % 2 else None for _, row in places], pa.string()),
        "stars": pa.array([row if row % 3 else None for _, row in places], pa.int64()),
        "share": pa.array([row / 7 if row % 5 else float("nan") for _, row in places], pa.float64()),
        "is.new": pa.array([row % 2 == 0 for _, row in places], pa.bool_()),
    }
    for output in outputs:
        columns |= zip(output.columns, to_columns(output, results[output.kind]), strict=True)
    record = ShardRecord(
        name=name,
        job=spec.job,
        space="space",
        blocks=tuple(
            BlockRecord(part, block, count, len(errors) if i == 0 else 0, 0, f"{part:08x}{block:08x}")
            for i, (part, block) in enumerate(blocks)
        ),
        rows=len(places),
        failed=len(errors),
        skipped=0,
        truncated=sum(row % 10 == 1 for _, row in places),
        tokens=4 * len(places),
        padded=5 * len(places),
        outputs=tuple(outputs),
        dtype="float32",
        engine="hashing",
        worker="test",
    )
    return ShardContent(
        msgspec.structs.replace(record, **changed),
        pa.table([columns[f.name] for f in schema], schema=schema),
        pa.Table.from_pylist(list(errors), schema=errors_schema()),
    )


def make_error(part: int = 0, row: int = 300, **changed: object) -> dict[str, object]:
    error: dict[str, object] = {
        "part": part,
        "row": row,
        "id": f"bad-{row}",
        "chunk": 0,
        "code": "empty_text",
        "message": "the text is empty",
        "original": '{"text": ""}',
    }
    return error | changed


def make_status(spec: JobSpec, blocks: int, **changed: Any) -> JobStatus:
    status = JobStatus(
        job=spec.job,
        state=JobState.FINALIZING,
        spec=spec,
        created=1000.0,
        ended=None,
        now=1010.0,
        pushed=1001.0,
        committed=1009.0,
        submitted=0,
        rows=0,
        failed=0,
        skipped=0,
        truncated=0,
        tokens=0,
        padded=0,
        blocks=blocks,
        done=blocks,
        queued_bytes=0,
        sealed=True,
        space="space",
        max_errors="",
    )
    return msgspec.structs.replace(status, **changed)


@dataclass
class Dataset:
    """A job that is written through a sink and ended."""

    sink: Sink
    spec: JobSpec
    records: list[ShardRecord] = field(default_factory=list)

    def write(self, content: ShardContent) -> ShardRecord:
        self.records.append(self.sink.write_shard(content))
        return self.records[-1]

    def end(self, state: JobState = JobState.COMPLETED, ended: float = 1010.5, **changed: Any) -> Manifest:
        status = make_status(self.spec, sum(len(record.blocks) for record in self.records), **changed)
        return finalize(self.sink, status, self.records, state, ended)


def contents_of(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """Batches as one table, by id."""
    return pa.Table.from_batches(batches).sort_by("id")
