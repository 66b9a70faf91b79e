"""Stage 4: vectors into shards, shards into the sink, and then the commit."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import redis
from redis.backoff import ExponentialWithJitterBackoff

from embedstream.broker import Broker
from embedstream.dataset.schema import errors_schema
from embedstream.dataset.sink import ShardContent, ShardRecord
from embedstream.errors import BrokerError, OutputError, RecordDamaged
from embedstream.jobs import JobState
from embedstream.keys import GROUP, RELEASED
from embedstream.logs import about
from embedstream.settings import WorkerSettings
from embedstream.steps import Answer, Code
from embedstream.troubles import passes
from embedstream.workers import InHand
from embedstream_worker.engines.base import EngineInfo
from embedstream_worker.finish import FinishedBlock, finish_blocks
from embedstream_worker.held import EmbeddedGroup, Held, HeldBlock, release
from embedstream_worker.jobs import LOOK_AGAIN_SECONDS, Jobs, OpenJob
from embedstream_worker.meter import Meter
from embedstream_worker.pipeline import Channel, Closed, Life
from embedstream_worker.troubles import Outage

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""How often a writer that waits for work asks whether a shard should be closed."""

ASK_SECONDS = 0.1
"""How often Redis is asked, per shard, whether its job has more to come."""

IDLE_SECONDS = 1.0
"""A shard of a job that is still being submitted closes when nothing came for so long."""

OUTPUT_PATIENCE_SECONDS = 60.0
"""An output that cannot be written for so long is given up for a while: other jobs wait behind it."""

MOST_OPEN_SHARDS = 4
"""Open shards, of many jobs, take no more memory than so many full ones."""


@dataclass(eq=False)
class OpenShard:
    """Blocks of one job that wait to be written together."""

    job: OpenJob
    stream: str
    opened: float
    grown: float
    asked: float = 0.0
    blocks: dict[tuple[int, int], FinishedBlock] = field(default_factory=dict)
    bytes: int = 0
    in_hand: InHand = field(default_factory=InHand)


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
        meter: Meter,
    ) -> None:
        self._broker = broker
        self._jobs = jobs
        self._info = info
        self._consumer = consumer
        self._held = held
        self._life = life
        self._source = source
        self._settings = settings
        self._meter = meter
        self._shards: dict[str, OpenShard] = {}
        self._closing: OpenShard | None = None
        self.total = InHand()
        """All that was committed."""
        self.committed: dict[str, InHand] = {}
        """By job, of those that are still worked on."""

    def run(self) -> None:
        """Until the source closes; then every open shard is committed."""
        try:
            while True:
                groups = self._source.get(timeout=LOOK_SECONDS if self._shards else None)
                for group in groups or ():
                    self._add(group)
                for shard in self._to_close():
                    self._close(shard)
        except Closed:
            for shard in list(self._shards.values()):
                self._close(shard)

    def in_hand(self) -> dict[str, InHand]:
        """What lies in open shards, by job. Callable from any thread."""
        closing = self._closing
        shards = [*self._shards.values(), *([closing] if closing else [])]
        return {
            job: sum((shard.in_hand for shard in shards if shard.job.id == job), InHand())
            for job in {shard.job.id for shard in shards}
        }

    def _add(self, group: EmbeddedGroup) -> None:
        with self._meter.stage("finish"):
            blocks, unfinished = finish_blocks(group, self._info)
        release(self._broker, self._consumer, self._held, unfinished)
        if not blocks:
            return
        job, now = group.tokenized.job, time.monotonic()
        shard = self._shards.get(job.id)
        if shard is not None and shard.job is not job:
            self._close(shard)  # from before Redis was emptied
            shard = None
        if shard is None:
            shard = self._shards[job.id] = OpenShard(job, blocks[0].held.stream, now, now)
        shard.grown = now
        for block in blocks:
            older = shard.blocks.get(block.address)
            if older is None:
                shard.bytes += block.data.nbytes
                shard.in_hand += InHand(block.data.num_rows, block.tokens, block.computed)
            elif older.held.entry != block.held.entry:
                # The job was reopened while this worker held the block: the newer entry is the one to clear.
                self._forget([older.held])
            shard.blocks[block.address] = block

    def _to_close(self) -> list[OpenShard]:
        shards = sorted(self._shards.values(), key=lambda shard: shard.bytes)
        closing = [shard for shard in shards if self._should_close(shard)]
        left = [shard for shard in shards if shard not in closing]
        while sum(shard.bytes for shard in left) > MOST_OPEN_SHARDS * self._settings.shard_bytes:
            closing.append(left.pop())
        return closing

    def _should_close(self, shard: OpenShard) -> bool:
        now = time.monotonic()
        if shard.bytes >= self._settings.shard_bytes or now - shard.opened >= self._settings.shard_seconds:
            return True
        if self._life.stopping.is_set():
            return True  # what is in the model may not come back in time
        if self._held.entries(shard.stream) - {block.held.entry for block in shard.blocks.values()}:
            return False  # more of the job is in the pipeline
        if self._held.awaited:
            return True
        if now - shard.asked < ASK_SECONDS:
            return False
        shard.asked = now
        try:
            match self._broker.state(shard.job.id):
                case JobState.SUBMITTING:
                    return now - shard.grown >= IDLE_SECONDS
                case JobState.RUNNING:
                    return not self._is_unclaimed(shard.job.id)
                case _:
                    return True
        except RecordDamaged:
            return True  # its commit says what is wrong
        except redis.RedisError:
            return False

    def _is_unclaimed(self, job: str) -> bool:
        """Whether blocks of a job are in nobody's hands."""
        client: Any = self._broker.client
        pending = client.xpending(self._broker.keys.blocks(job), GROUP)
        held: int = sum(owner["pending"] for owner in pending["consumers"] or () if owner["name"].decode() != RELEASED)
        return self._broker.backlog(job) > held

    def _close(self, shard: OpenShard) -> None:
        """Write and commit, without the blocks that turn out to be done by others, until nothing is left to try."""
        self._closing = shard
        self._shards.pop(shard.job.id, None)
        try:
            self._write_and_commit(shard)
        finally:
            self._closing = None

    def _write_and_commit(self, shard: OpenShard) -> None:
        blocks, worked = shard.blocks, 0.0
        while blocks:
            held = [block.held for block in blocks.values()]
            record = self._write(shard.job, list(blocks.values()))
            worked += self._meter.take_worked()
            answer = None if record is None else self._commit(shard.job, record, list(blocks.values()), worked)
            if record is None or answer is None:
                release(self._broker, self._consumer, self._held, held)
                return
            self._life.progress()
            if answer.code not in (Code.CONFLICT, Code.CHANGED):
                self._settle(shard.job, record, answer, held)
                return
            refused = [blocks[address].held for address in answer.blocks if address in blocks]
            if not refused:
                raise BrokerError(f"job {shard.job.id}: Redis answered {answer} to shard {record.name}, which has none")
            self._discard(shard.job, record.name)
            blocks = {address: block for address, block in blocks.items() if address not in answer.blocks}
            if answer.code is Code.CONFLICT:
                log.info(
                    "job %s: %d blocks were done by others first", shard.job.id, len(refused), extra=about(shard.job.id)
                )
                self._forget(refused)
            else:
                self._drop_changed(shard, refused)

    def _drop_changed(self, shard: OpenShard, refused: list[HeldBlock]) -> None:
        """Blocks of a corpus from before Redis was emptied have no entries any more. One that still has its own was put
        there past the submit step: given back it would come again for ever.
        """
        log.warning(
            "job %s: %d blocks are of another corpus, dropped", shard.job.id, len(refused), extra=about(shard.job.id)
        )
        self._forget(refused)
        try:
            pending = set(self._broker.pending(shard.stream, self._consumer))
        except redis.RedisError as error:
            log.warning(
                "Redis cannot be used (%s); the lease of these blocks will expire", error, extra=about(shard.job.id)
            )
            return
        for held in refused:
            if held.entry in pending:
                name = f"block {held.block.part}:{held.block.number}"
                self._jobs.fail(shard.job.id, f"{name} in the queue is not the one that was submitted under its number")
                return

    def _settle(self, job: OpenJob, record: ShardRecord, answer: Answer, held: list[HeldBlock]) -> None:
        match answer.code:
            case Code.COMMITTED | Code.ALREADY:
                self._count(record)
                self._forget(held)
            case Code.DROPPED:
                log.info("job %s is %s: %d rows dropped", job.id, answer.detail, record.rows, extra=about(job.id))
                self._discard(job, record.name)
                self._forget(held)
            case Code.OTHER_SPACE:
                self._discard(job, record.name)
                self._jobs.refuse(job.id, f"its vectors are of space {answer.detail}, this worker's of {job.space}")
                release(self._broker, self._consumer, self._held, held)
            case Code.UNKNOWN_JOB:
                log.warning(
                    "job %s is unknown to Redis now; shard %s stays to be adopted",
                    job.id,
                    record.name,
                    extra=about(job.id),
                )
                self._forget(held)
            case _:
                raise BrokerError(f"job {job.id}: Redis answered {answer.code} to a shard: is another version at work?")

    def _count(self, record: ShardRecord) -> None:
        self._meter.committed(record)
        self._closing = None  # counted below
        some = InHand(record.rows, record.tokens, record.padded)
        open_jobs = self._jobs.open_jobs()
        self.total += some
        self.committed = {job: done for job, done in self.committed.items() if job in open_jobs} | {
            record.job: self.committed.get(record.job, InHand()) + some
        }

    def _forget(self, held: list[HeldBlock]) -> None:
        for block in held:
            self._held.remove(block.stream, [block.entry])

    def _discard(self, job: OpenJob, name: str) -> None:
        try:
            job.sink.discard_shard(name)
        except OutputError as error:
            log.warning("%s; it counts for nothing, as no manifest will list it", error, extra=about(job.id))

    def _write(self, job: OpenJob, blocks: list[FinishedBlock]) -> ShardRecord | None:
        """A durable shard; None if the output could not be written for long, or until the worker was told to stop."""
        content = self._content(job, blocks)
        backoff, failures, begun = ExponentialWithJitterBackoff(base=0.5, cap=15.0), 0, time.monotonic()
        said = ""
        while True:
            try:
                self._jobs.check_root(job)
                with self._meter.stage("write"):
                    record = job.sink.write_shard(content)
                if said:
                    self._jobs.stuck(job.id, "")
                return record
            except OutputError as error:
                failures += 1
                if str(error) != said:
                    said = str(error)
                    self._jobs.stuck(job.id, said)
                    log.error("%s; %d rows wait for it, trying again", error, content.record.rows, extra=about(job.id))
                given_up = time.monotonic() - begun > OUTPUT_PATIENCE_SECONDS
                if given_up:
                    self._jobs.refuse(job.id, str(error), LOOK_AGAIN_SECONDS)
                if given_up or self._life.stopping.wait(backoff.compute(failures)):
                    self._jobs.stuck(job.id, "")
                    self._discard(job, content.record.name)
                    return None

    def _commit(self, job: OpenJob, record: ShardRecord, blocks: list[FinishedBlock], worked: float) -> Answer | None:
        """The broker's answer; None if it has none. `worked`: seconds that the worker was at work for this shard.

        That is when Redis stays away while the worker is told to stop (the shard lies there to be adopted), or refuses
        for good.
        """
        step = self._broker.commit(record, [block.to_commit() for block in blocks], job.spec, round(1000 * worked))
        backoff, failures = ExponentialWithJitterBackoff(base=0.1, cap=5.0), 0
        outage = Outage(f"shard {record.name} waits to be committed", about(job.id))
        while True:
            last = self._life.stopping.is_set()
            try:
                with self._meter.stage("commit"):
                    answer = self._broker.run(step)
                outage.over()
                return answer
            except RecordDamaged as error:
                self._jobs.refuse(job.id, str(error), LOOK_AGAIN_SECONDS)
                return None
            except redis.RedisError as error:
                if not passes(error):
                    self._jobs.refuse(record.job, f"Redis refuses shard {record.name}: {error}")
                    return None
                failures += 1
                outage.met(error)
                if last:
                    return None
                self._life.stopping.wait(backoff.compute(failures))

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
            worker=self._consumer,
            prompt=job.prompt,
        )
        return ShardContent(record, data, pa.Table.from_pylist(errors, schema=errors_schema()))
