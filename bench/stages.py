"""One row's way, stage by stage: the functions that producer and worker call, called here on one thread and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import corpora
import numpy as np
import pyarrow as pa
from fleet import Server
from measure import table

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.records import Record, RecordReader
from embedstream.dataset.input_hash import input_hashes
from embedstream.dataset.schema import errors_schema
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobSpec
from embedstream.lifecycle.opening import make_spec, open_job
from embedstream.outputs import Output
from embedstream.queue.blocks import decode_block, encode_block
from embedstream.queue.broker import Broker
from embedstream.queue.packing import Packer
from embedstream.records import ShardContent, ShardRecord
from embedstream.server.connection import connect
from embedstream_producer.lines import LineStream
from embedstream_producer.plain import PlainStream
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines.hashing import HashingEngine
from embedstream_worker.finish import finish_blocks
from embedstream_worker.held import EmbeddedGroup, HeldBlock, TokenizedGroup
from embedstream_worker.jobs import OpenJob
from embedstream_worker.recipe import recipe_of

OUTPUT = Output(name="embedding", kind="dense", dtype="float32", dim=384, normalized=True)

CHUNKS = 20_480
ROUNDS = 5

T = TypeVar("T")


class Clock:
    """Seconds by stage, the least of all rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, work: Callable[[], T]) -> T:
        begun = time.perf_counter()
        result = work()
        taken = time.perf_counter() - begun
        self.seconds[stage] = min(taken, self.seconds.get(stage, taken))
        return result


def measure_stages(server: Server, place: Path) -> str:
    """A table in microseconds per chunk of 500 characters."""
    corpus = corpora.write_corpus(place / "stages.jsonl", corpora.synthetic_texts(CHUNKS))
    clock = Clock()
    for number in range(ROUNDS):
        _once(server, corpus, place / f"stages-{number}", clock)
    rows = [[stage, f"{1e6 * seconds / CHUNKS:.2f}"] for stage, seconds in clock.seconds.items()]
    rows.append(["**all**", f"**{1e6 * sum(clock.seconds.values()) / CHUNKS:.2f}**"])
    return table(["stage", "µs a chunk"], rows)


def _once(server: Server, corpus: Path, output: Path, clock: Clock) -> None:
    spec = make_spec(
        queue=f"stages-{output.name}", output=str(output), model="hashing", revision=None,
        parts=[str(corpus)], settings={},
    )  # fmt: skip
    broker = Broker(connect(server.url), spec.queue)
    sink = open_sink(spec.output, spec, server.url)
    sink.check()  # makes the folder
    open_job(broker, spec, sink, max_errors="", visible=True)
    entries = _produce(broker, spec, corpus, clock)
    claimed = clock.time("worker: claim (Redis)", lambda: _claim(broker, spec.job, entries))
    blocks = clock.time("worker: decode", lambda: [decode_block(entry.fields, spec.keep) for entry in claimed])
    engine = HashingEngine()
    length = engine.info.max_length
    job = OpenJob(spec.job, spec, "", 0, length, "space", (OUTPUT,), sink, recipe_of(engine.info, spec, "", length))
    held = [
        HeldBlock(job, broker.keys.blocks(spec.job), entry.entry, 0, 1, block, 1.0)
        for entry, block in zip(claimed, blocks, strict=True)
    ]
    column: Any = pa.chunked_array([block.rows.column("text") for block in blocks])
    inputs = clock.time("worker: texts to strings", column.to_pylist)
    tokenizer = engine.tokenizer()
    tokens = clock.time("worker: tokenize", lambda: tokenizer.encode(inputs, job.max_length))
    hashes = clock.time("worker: input hashes", lambda: input_hashes(inputs))
    cut = clock.time("worker: cut batches", lambda: cut_batches(tokens.lengths, engine.info.batch_tokens, False))
    batches = clock.time("worker: gather", lambda: [gather_batch(tokens, rows, 0, "document") for rows in cut])
    found = clock.time("worker: embed (hashing)", lambda: [engine.run(batch)["dense"] for batch in batches])
    vectors = np.zeros((CHUNKS, 384), np.float32)

    def land() -> None:
        for rows, part in zip(cut, found, strict=True):
            vectors[rows] = part
            assert np.isfinite(part).all()

    clock.time("worker: back to their rows", land)
    group = EmbeddedGroup(
        TokenizedGroup(job, held, tokens, hashes), {"dense": vectors}, tokens.lengths, np.ones(CHUNKS, np.bool_), {},
        np.zeros(CHUNKS, np.bool_),
    )  # fmt: skip
    finished, _ = clock.time("worker: finish", lambda: finish_blocks(group))
    record = ShardRecord(
        name=f"{output.name}", job=spec.job, space="space", blocks=tuple(block.record() for block in finished),
        rows=CHUNKS, failed=0, skipped=0, truncated=0, tokens=int(tokens.lengths.sum()),
        padded=int(tokens.lengths.sum()), outputs=(OUTPUT,), dtype="float32", engine="hashing", worker="bench",
    )  # fmt: skip
    data = pa.concat_tables([block.data for block in finished])
    content = ShardContent(record, data, pa.Table.from_pylist([], schema=errors_schema()))
    written = clock.time("worker: Parquet, SHA-256, fsync", lambda: sink.write_shard(content))
    step = broker.commit(written, [block.commit for block in finished])
    clock.time("worker: commit (Redis)", lambda: broker.run(step))


def _produce(broker: Broker, spec: JobSpec, corpus: Path, clock: Clock) -> int:
    """The producer's stages; how many blocks lie in Redis."""

    def read() -> list[bytes]:
        with LineStream(PlainStream(corpus.open("rb", buffering=0), corpus.name), corpus.name) as stream:
            return [line for _, lines in stream.batches() for line in lines if line]

    lines = clock.time("producer: read lines", read)
    reader = RecordReader(spec)
    outcomes = clock.time("producer: parse and judge", lambda: [reader.line(i, line) for i, line in enumerate(lines)])
    records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    assert len(records) == CHUNKS

    def check() -> None:
        with DuplicateIndex() as index:
            for start in range(0, CHUNKS, 1024):
                some = records[start : start + 1024]
                index.check(0, [r.row for r in some], [r.id for r in some])

    clock.time("producer: duplicates", check)
    packer = Packer(0)

    def pack() -> list[Any]:
        made = [packer.add(r.row, r.id, r.text, r.text_bytes, r.kept) for r in records]
        return [block for block in [*made, packer.finish()] if block is not None]

    blocks = clock.time("producer: pack, content sum", pack)
    entries = clock.time("producer: Arrow and zstd", lambda: [encode_block(block) for block in blocks])
    steps = [broker.submit(spec.job, entry, 1 << 33) for entry in entries]
    clock.time("producer: submit (Redis)", lambda: [broker.run(step) for step in steps])
    return len(entries)


def _claim(broker: Broker, job: str, count: int) -> list[Any]:
    return broker.claim("bench", [job], count, 0)
