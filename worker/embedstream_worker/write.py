"""Stage 4: vectors into shards, shards into the sink, and then the commit."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import redis
from redis.backoff import ExponentialWithJitterBackoff

from embedstream.broker import Broker
from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.sink import BlockRecord, ShardContent, ShardRecord
from embedstream.errors import OutputError
from embedstream.jobs import JobState
from embedstream.settings import WorkerSettings
from embedstream.steps import Answer, Code, CommitBlock
from embedstream_worker.engines.base import EngineInfo
from embedstream_worker.held import EmbeddedGroup, Held, HeldBlock
from embedstream_worker.intake import release
from embedstream_worker.jobs import Jobs, OpenJob
from embedstream_worker.pipeline import Channel, Closed, Life

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""How often a writer that waits for work asks whether a shard should be closed."""

IDLE_SECONDS = 1.0
"""A shard of a job that is still being submitted closes when nothing came for so long."""


@dataclass(frozen=True)
class FinishedBlock:
    """One block with its outcome, ready for a shard."""

    held: HeldBlock
    data: pa.Table
    errors: list[dict[str, object]]
    truncated: int
    tokens: int
    computed: int

    def record(self) -> BlockRecord:
        block = self.held.block
        return BlockRecord(
            part=block.part,
            block=block.number,
            rows=self.data.num_rows,
            failed=len(self.errors),
            skipped=block.skipped,
            sum=block.sum.hex(),
        )

    def to_commit(self) -> CommitBlock:
        held = self.held
        return CommitBlock(held.block.part, held.block.number, held.block.sum, held.entry, held.size)


@dataclass
class OpenShard:
    """Blocks of one job that wait to be written together."""

    job: OpenJob
    opened: float
    blocks: dict[tuple[int, int], FinishedBlock] = field(default_factory=dict)
    bytes: int = 0


class Write:
    """Owns the sinks and its own connection."""

    def __init__(
        self,
        broker: Broker,
        jobs: Jobs,
        info: EngineInfo,
        consumer: str,
        held: Held,
        life: Life,
        source: Channel[list[EmbeddedGroup]],
        settings: WorkerSettings,
    ) -> None:
        self._broker = broker
        self._jobs = jobs
        self._info = info
        self._consumer = consumer
        self._held = held
        self._life = life
        self._source = source
        self._settings = settings
        self._shards: dict[str, OpenShard] = {}
        self._worked = time.monotonic()
        self.rows = 0
        self.tokens = 0

    def run(self) -> None:
        """Until the source closes; then every open shard is committed."""
        try:
            while True:
                groups = self._source.get(timeout=LOOK_SECONDS if self._shards else None)
                now = time.monotonic()
                if groups is not None:
                    for group in groups:
                        self._add(group, now)
                    self._life.window_done()
                    self._worked = now
                for shard in list(self._shards.values()):
                    if self._should_close(shard, now, idle=groups is None):
                        self._close(shard)
        except Closed:
            for shard in list(self._shards.values()):
                self._close(shard)

    def _add(self, group: EmbeddedGroup, now: float) -> None:
        job = group.tokenized.job
        shard = self._shards.setdefault(job.id, OpenShard(job, now))
        for block in finish_blocks(group, self._info):
            key = (block.held.block.part, block.held.block.number)
            if key in shard.blocks:
                # Redis was emptied and refilled while this worker held the block: the newer entry is the one to clear.
                release(self._broker, self._consumer, self._held, [shard.blocks[key].held])
            else:
                shard.bytes += block.data.nbytes
            shard.blocks[key] = block

    def _should_close(self, shard: OpenShard, now: float, idle: bool) -> bool:
        if shard.bytes >= self._settings.shard_bytes or now - shard.opened >= self._settings.shard_seconds:
            return True
        if not idle or self._life.windows_in_flight:
            return False
        if now - self._worked >= IDLE_SECONDS:
            return True
        try:
            return self._broker.state(shard.job.id) != JobState.SUBMITTING
        except redis.RedisError:
            return False

    def _close(self, shard: OpenShard) -> None:
        """Write and commit, without the blocks that turn out to be done by others, until nothing is left to try."""
        del self._shards[shard.job.id]
        blocks = shard.blocks
        while blocks:
            record = self._write(shard.job, list(blocks.values()))
            if record is None:
                release(self._broker, self._consumer, self._held, [block.held for block in blocks.values()])
                return
            answer = self._commit(record, list(blocks.values()))
            if answer is None:
                return
            self._life.progress()
            if answer.code in (Code.CONFLICT, Code.CHANGED):
                log.info("job %s: %d blocks were done by others first", shard.job.id, len(answer.blocks))
                shard.job.sink.discard_shard(record.name)
                refused = [blocks[key].held for key in answer.blocks]
                blocks = {key: block for key, block in blocks.items() if key not in answer.blocks}
                if answer.code is Code.CHANGED:
                    release(self._broker, self._consumer, self._held, refused)
                else:
                    self._forget(refused)
                continue
            self._settle(shard.job, record, answer, [block.held for block in blocks.values()])
            return

    def _settle(self, job: OpenJob, record: ShardRecord, answer: Answer, held: list[HeldBlock]) -> None:
        match answer.code:
            case Code.COMMITTED | Code.ALREADY:
                self.rows += record.rows
                self.tokens += record.tokens
                self._forget(held)
            case Code.DROPPED:
                log.info("job %s is %s: %d rows dropped", job.id, answer.detail, record.rows)
                job.sink.discard_shard(record.name)
                self._forget(held)
            case Code.OTHER_SPACE:
                job.sink.discard_shard(record.name)
                self._jobs.refuse(job.id, f"its vectors are of space {answer.detail}, this worker's of {job.space}")
                release(self._broker, self._consumer, self._held, held)
            case _:
                log.warning("job %s is unknown to Redis now; shard %s stays to be adopted", job.id, record.name)
                self._forget(held)

    def _forget(self, held: list[HeldBlock]) -> None:
        for block in held:
            self._held.remove(block.stream, [block.entry])

    def _write(self, job: OpenJob, blocks: list[FinishedBlock]) -> ShardRecord | None:
        """A durable shard; None if the output stayed unwritable until the worker was told to stop."""
        content = self._content(job, blocks)
        backoff, failures = ExponentialWithJitterBackoff(base=0.5, cap=15.0), 0
        while True:
            try:
                return job.sink.write_shard(content)
            except OutputError as error:
                failures += 1
                log.error("%s; trying again", error)
                if self._life.stopping.wait(backoff.compute(failures)):
                    return None

    def _commit(self, record: ShardRecord, blocks: list[FinishedBlock]) -> Answer | None:
        """The broker's answer; None if Redis stayed away until the worker was told to stop (the shard is adopted)."""
        backoff, failures = ExponentialWithJitterBackoff(base=0.1, cap=5.0), 0
        while True:
            try:
                return self._broker.run(self._broker.commit(record, [block.to_commit() for block in blocks]))
            except (redis.ConnectionError, redis.TimeoutError) as error:
                failures += 1
                log.warning("Redis cannot be reached (%s); shard %s waits to be committed", error, record.name)
                if failures > 3 and self._life.stopping.is_set():
                    return None
                time.sleep(backoff.compute(failures))

    def _content(self, job: OpenJob, blocks: list[FinishedBlock]) -> ShardContent:
        output = next(iter(self._info.outputs.values()))
        data = pa.concat_tables([block.data for block in blocks])
        errors = [error for block in blocks for error in block.errors]
        record = ShardRecord(
            name=uuid.uuid4().hex[:16],
            job=job.id,
            space=job.space,
            blocks=tuple(block.record() for block in blocks),
            rows=data.num_rows,
            failed=len(errors),
            skipped=sum(block.held.block.skipped for block in blocks),
            truncated=sum(block.truncated for block in blocks),
            tokens=sum(block.tokens for block in blocks),
            padded=sum(block.computed for block in blocks),
            dim=output.dim,
            dtype=self._info.dtype,
            normalized=output.normalized,
            engine=self._info.engine,
            worker=socket.gethostname(),
        )
        return ShardContent(record, data, pa.Table.from_pylist(errors, schema=errors_schema()))


def finish_blocks(group: EmbeddedGroup, info: EngineInfo) -> list[FinishedBlock]:
    """A group's blocks as dataset rows and error rows. Columns are built once for the whole group, then sliced."""
    tokenized = group.tokenized
    spec, tokens = tokenized.job.spec, tokenized.tokens
    rows = pa.Table.from_batches([held.block.rows for held in tokenized.blocks])
    parts = np.repeat(
        [held.block.part for held in tokenized.blocks], [held.block.rows.num_rows for held in tokenized.blocks]
    )
    schema = dataset_schema(spec, {name: output.dim for name, output in info.outputs.items()})
    name = next(iter(info.outputs))
    columns: dict[str, pa.Array[Any] | pa.ChunkedArray[Any]] = {
        "part": pa.array(parts, pa.int32()),
        "n_tokens": pa.array(tokens.lengths, pa.int32()),
        "truncated": pa.array(tokens.truncated, pa.bool_()),
        "input_hash": tokenized.input_hashes,
        name: pa.FixedSizeListArray.from_arrays(pa.array(group.vectors.reshape(-1)), type=schema.field(name).type),
    }
    table = pa.table(
        [columns[f.name] if f.name in columns else rows.column(f.name) for f in schema], schema=schema
    )
    good = np.ones(table.num_rows, np.bool_)
    good[list(group.errors)] = False
    finished, start = [], 0
    for held in tokenized.blocks:
        end = start + held.block.rows.num_rows
        data, mine = table.slice(start, end - start), good[start:end]
        errors = [refused_row(held, refusal) for refusal in held.block.refused]
        if not mine.all():
            errors += [failed_row(held, row - start, *group.errors[row]) for row in range(start, end) if not good[row]]
            data = data.filter(pa.array(mine))
        finished.append(
            FinishedBlock(
                held=held,
                data=data,
                errors=errors,
                truncated=int((tokens.truncated[start:end] & mine).sum()),
                tokens=int(tokens.lengths[start:end][mine].sum()),
                computed=int(group.computed[start:end][mine].sum()),
            )
        )
        start = end
    return finished


def refused_row(held: HeldBlock, refusal: msgspec.Struct) -> dict[str, object]:
    """A row that the producer refused, in the errors schema."""
    return {"part": held.block.part, "chunk": 0, **msgspec.structs.asdict(refusal)}


def failed_row(held: HeldBlock, at: int, code: str, message: str) -> dict[str, object]:
    """A row that failed in the model, in the errors schema."""
    rows = held.block.rows
    return {
        "part": held.block.part,
        "row": rows.column("row")[at].as_py(),
        "id": rows.column("id")[at].as_py(),
        "chunk": rows.column("chunk")[at].as_py(),
        "code": code,
        "message": message,
        "original": rows.column("text")[at].as_py()[:ORIGINAL_CHARACTERS],
    }


ORIGINAL_CHARACTERS = 1000
"""How much of a failed text its error row keeps."""
