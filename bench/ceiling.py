"""What one Redis carries without any model: submit, claim, commit, over and over; and what a large job leaves in it."""

from __future__ import annotations

import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpora
from fleet import Server, cpu_seconds
from measure import table
from peers.protocol import peak_mib

from embedstream.dataset.sinks import open_sink
from embedstream.lifecycle.finalizing import finalize_job
from embedstream.lifecycle.opening import make_spec, open_job
from embedstream.outputs import Output
from embedstream.queue.blocks import Entry, encode_block
from embedstream.queue.broker import Broker
from embedstream.queue.packing import Packer
from embedstream.queue.steps import CommitBlock
from embedstream.records import BlockRecord, ShardRecord, part_file
from embedstream.server.connection import connect
from embedstream.settings import BLOCK_LIMITS

OUTPUT = Output(name="embedding", kind="dense", dtype="float32", dim=384, normalized=True)

BLOCKS_PER_SHARD = 64
"""Of 256 chunks with 384 dimensions and 500 characters each: some 32 MiB, at which a worker closes a shard."""

INTERLEAVED = 4
"""For the size of a job: no two blocks of a shard follow each other, which is the manifest's worst case."""

NO_BOUND = 1 << 40


@dataclass(frozen=True)
class Load:
    """One client: its job's blocks go in, come out and are counted, a shard's worth at a time."""

    url: str
    output: str
    queue: str
    body: Entry
    shards: int = 0
    """How many; 0: until the time is up."""
    seconds: float = float("inf")
    interleaved: int = 1
    """Shards that are filled at the same time, a block each in turn: what so many workers make of one corpus."""


def block_of(characters: int) -> Entry:
    """A full block of such texts, as it travels."""
    packer = Packer(0)
    made = []
    for i, text in enumerate(corpora.synthetic_texts(BLOCK_LIMITS.chunks, characters)):
        made.append(packer.add(i, str(i), text, len(text), ()))
    block = next(block for block in [*made, packer.finish()] if block is not None)
    return encode_block(block)


def turn_over(load: Load) -> tuple[int, float]:
    """Blocks that went through, and in how many seconds. The job stays unsealed."""
    spec = make_spec(
        queue=load.queue, output=load.output, model="hashing", revision=None, parts=["corpus.jsonl"], settings={}
    )
    broker = Broker(connect(load.url), load.queue)
    sink = open_sink(load.output, spec, load.url)
    sink.check()
    open_job(broker, spec, sink, max_errors="", visible=True)
    rows, body, done, begun = load.body.rows, load.body, 0, time.perf_counter()
    at_once = BLOCKS_PER_SHARD * load.interleaved
    while done // BLOCKS_PER_SHARD < (load.shards or sys.maxsize) and time.perf_counter() - begun < load.seconds:
        numbers = range(done, done + at_once)
        for number in numbers:
            expect("OK", broker.run(broker.submit(spec.job, numbered(body, number), NO_BOUND)).code.value)
        claimed = broker.claim("bench", [spec.job], at_once, 0)
        blocks = [
            CommitBlock(0, n, n.to_bytes(8, "big"), c.entry, body.size) for n, c in zip(numbers, claimed, strict=True)
        ]
        for shard in range(load.interleaved):
            held = blocks[shard :: load.interleaved]
            record = ShardRecord(
                name=f"{done + shard:012x}", job=spec.job, space="space", rows=rows * len(held), failed=0, skipped=0,
                blocks=tuple(BlockRecord(0, b.block, rows, 0, 0, b.sum.hex()) for b in held), truncated=0, tokens=1,
                padded=1, outputs=(OUTPUT,), dtype="float32", engine="hashing", worker="bench",
                sha256= "0" * 64,
            )  # fmt: skip
            expect("COMMITTED", broker.run(broker.commit(record, held)).code.value)
        done += at_once
    return done, time.perf_counter() - begun


def numbered(body: Entry, number: int) -> Entry:
    """The same block under another number; its number is its sum."""
    return Entry(
        part=0, block=number, rows=body.rows, refused_rows=0, skipped=0, text_bytes=body.text_bytes,
        sum=number.to_bytes(8, "big"), body=body.body, refused=b"",
    )  # fmt: skip


def expect(wanted: str, told: str) -> None:
    if told != wanted:
        raise SystemExit(f"Redis answered {told}, {wanted} was expected")


def measure_ceiling(server: Server, place: Path, seconds: float) -> str:
    """A table: clients, blocks and texts per second, and what each block costs Redis' one thread."""
    rows = []
    for characters in (500, 8):
        body = block_of(characters)
        for clients in (1, 2, 4):
            loads = [
                Load(server.url, str(place / f"c{characters}-{clients}-{i}"), "ceiling", body, seconds=seconds)
                for i in range(clients)
            ]
            used, begun = cpu_seconds(server.pid), time.perf_counter()
            with multiprocessing.get_context("spawn").Pool(clients) as pool:
                told = pool.map(turn_over, loads)
            used, wall = cpu_seconds(server.pid) - used, time.perf_counter() - begun
            blocks, per_second = sum(n for n, _ in told), sum(n / s for n, s in told)
            each = used / blocks
            rows.append([
                f"{characters} characters, {body.size / 1024:,.0f} KiB a block", str(clients), f"{per_second:,.0f}",
                f"{per_second * body.rows:,.0f}", f"{per_second * each:.0%}", f"{1e6 * each:.0f}", f"{1 / each:,.0f}",
                f"{body.rows / each:,.0f}",
            ])  # fmt: skip
            print(rows[-1], f"{wall:.1f} s", file=sys.stderr)
            empty(server)
    head = [
        "texts", "clients", "blocks/s", "texts/s", "of Redis' core", "Redis CPU, µs/block",
        "blocks/s with its core full", "texts/s with its core full",
    ]  # fmt: skip
    return table(head, rows)


def empty(server: Server) -> None:
    """The next load meets the server, which is this benchmark's own, as if it were new."""
    connect(server.url).flushall()


def measure_size(server: Server, place: Path, millions: float) -> list[str]:
    """What a job of so many million chunks leaves in Redis, and what its manifest takes; in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_size, (server, place, millions))


def _size(server: Server, place: Path, millions: float) -> list[str]:
    shards = INTERLEAVED * round(millions * 1e6 / BLOCK_LIMITS.chunks / BLOCKS_PER_SHARD / INTERLEAVED)
    queue, output = f"size-{shards}", place / f"size-{shards}"
    turn_over(Load(server.url, str(output), queue, block_of(8), shards=shards, interleaved=INTERLEAVED))
    broker = Broker(connect(server.url), queue)
    client: Any = broker.client
    job = broker.active_jobs()[0]
    keys = [broker.keys.job(job), broker.keys.done(job, 0), broker.keys.sums(job, 0), broker.keys.shards(job)]
    keys += [broker.keys.blocks(job)]
    sizes = [int(client.memory_usage(key, samples=0) or 0) for key in keys]
    for name in broker.shard_names(job):  # what finalizing looks at: a file of the right size, 0 here
        (output / part_file(name)).touch()
    broker.run(broker.seal(job, 0, shards * BLOCKS_PER_SHARD))
    before, begun = peak_mib(_pid()), time.perf_counter()
    if not finalize_job(broker, job, lambda spec: open_sink(spec.output, spec, server.url)):
        raise SystemExit(f"job {job} cannot be finalized")
    taken = time.perf_counter() - begun
    manifest = (output / "_manifest.json").stat().st_size
    row = [
        f"{shards * BLOCKS_PER_SHARD * BLOCK_LIMITS.chunks:,}", f"{shards * BLOCKS_PER_SHARD:,}", f"{shards:,}",
        f"{sum(sizes) / 2**20:.2f}", f"{(sizes[1] + sizes[2]) / 2**20:.3f}", f"{sizes[3] / 2**20:.2f}", f"{taken:.2f}",
        f"{peak_mib(_pid()) - before:,.0f}", f"{manifest / 2**20:.2f}",
    ]  # fmt: skip
    print(row, file=sys.stderr)
    empty(server)
    return row


def _pid() -> int:
    return multiprocessing.current_process().pid or 0


SIZE_HEAD = [
    "chunks", "blocks", "shards", "Redis MiB", "of it bits and sums", "of it shards' records", "finalize, s",
    "its memory grows by, MiB", "manifest, MiB",
]  # fmt: skip
