"""One closed shard: into the sink, and then the commit."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pyarrow as pa
import redis

from embedstream.cli.logs import about
from embedstream.errors import BrokerError, OutputError, RecordDamaged
from embedstream.outputs import Output, encode_ranges, with_ranges
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Answer, Code
from embedstream.records import ShardContent, ShardRecord
from embedstream.server.foreign import reading
from embedstream.server.troubles import passes
from embedstream_worker.calibration import calibrated, has_int8, rounded
from embedstream_worker.engines.base import EngineInfo
from embedstream_worker.finish import FinishedBlock
from embedstream_worker.held import Delivered, release
from embedstream_worker.jobs import LOOK_AGAIN_SECONDS, Jobs, OpenJob
from embedstream_worker.shards import Shard
from embedstream_worker.shared import Shared

log = logging.getLogger(__name__)


class Commits:
    """Writes shards and commits them."""

    def __init__(self, shared: Shared, broker: Broker, jobs: Jobs, info: EngineInfo) -> None:
        self._broker = broker
        self._consumer, self._held, self._meter = shared.consumer, shared.held, shared.meter
        self._jobs = jobs
        self._info = info

    def finish(self, shard: Shard) -> ShardRecord | None:
        """Write and commit, without the blocks that turn out to be done by others, until nothing is left to try.

        Returns what was committed; None if nothing of it counts. What is raised may pass: the shard remembers how far
        it is, and may be tried again, or given up.

        Raises:
            OutputError: it cannot be written at present.
            redis.RedisError: it cannot be committed at present.
        """
        while shard.blocks:
            if shard.written is None:
                shard.written = self._write(shard)
                shard.worked += self._meter.take_worked()
            record = shard.written
            answer = None if record is None else self._commit(shard, record)
            if record is None or answer is None:
                self._release(shard)
                return None
            if answer.code is Code.OTHER_RANGES:  # of an earlier life of the job
                self._discard(shard.job, record.name)
                shard.write_anew()
                continue
            if answer.code not in (Code.CONFLICT, Code.CHANGED):
                return self._settle(shard, record, answer)
            refused = [shard.blocks[address] for address in answer.blocks if address in shard.blocks]
            if not refused:
                raise BrokerError(f"job {shard.job.id}: Redis answered {answer} to shard {record.name}, which has none")
            self._discard(shard.job, record.name)
            shard.leave_out(answer.blocks)
            if answer.code is Code.CONFLICT:
                log.info(
                    "job %s: %d blocks were done by others first", shard.job.id, len(refused), extra=about(shard.job.id)
                )
                self.forget(refused)
            else:
                self._drop_changed(shard, refused)
        return None

    def give_up(self, shard: Shard) -> None:
        """Hand its blocks back. What is written of it stays to be adopted; what may be half-written is removed."""
        if shard.written is None:
            self._discard(shard.job, shard.name)
        self._release(shard)

    def forget(self, blocks: Iterable[Delivered]) -> None:
        """Hold their entries no longer."""
        for block in blocks:
            self._held.remove(block.stream, [block.entry])

    def _write(self, shard: Shard) -> ShardRecord | None:
        """A durable shard; None if the job's record is damaged. Raises `OutputError` and `redis.RedisError`."""
        self._jobs.check_root(shard.job)
        data = pa.concat_tables([block.data for block in shard.blocks.values()])
        outputs = self._outputs(shard.job, data)
        if outputs is None:
            return None
        with self._meter.stage("write"):
            return shard.job.sink.write_shard(self._content(shard, outputs, rounded(outputs, data)))

    def _outputs(self, job: OpenJob, data: pa.Table) -> tuple[Output, ...] | None:
        """The job's outputs, with the ranges of int8 if there are rows: those that all workers use, which are of these
        rows if there were none. None if the job's record is damaged."""
        if not has_int8(job.outputs) or not data.num_rows:
            return job.outputs
        ranges = job.calibration.ranges or encode_ranges(calibrated(job.outputs, data))
        try:
            with reading(f"job {job.id}'s record"):
                answer = self._broker.run(self._broker.calibrate(job.id, ranges))
                job.calibration.ranges = answer.detail if answer.code is Code.OTHER_RANGES else ranges
                return with_ranges(job.outputs, job.calibration.ranges)
        except RecordDamaged as error:
            self._jobs.refuse(job.id, str(error), LOOK_AGAIN_SECONDS)
            return None

    def _commit(self, shard: Shard, record: ShardRecord) -> Answer | None:
        """The broker's answer; None if Redis refuses for good. Raises `redis.RedisError` for what passes."""
        blocks = [block.commit for block in shard.blocks.values()]
        worked = 0.0 if record.reused else shard.worked  # what is taken over says nothing of this worker's pace
        step = self._broker.commit(record, blocks, shard.job.stored, round(1000 * worked))
        try:
            with reading(f"job {record.job}'s record"), self._meter.stage("commit"):
                return self._broker.run(step)
        except RecordDamaged as error:
            self._jobs.refuse(record.job, str(error), LOOK_AGAIN_SECONDS)
        except redis.RedisError as error:
            if passes(error):
                raise
            self._jobs.refuse(record.job, f"Redis refuses shard {record.name}: {error}")
        return None

    def _settle(self, shard: Shard, record: ShardRecord, answer: Answer) -> ShardRecord | None:
        job, blocks = shard.job, shard.blocks.values()
        match answer.code:
            case Code.COMMITTED | Code.ALREADY:
                self.forget(blocks)
                return record
            case Code.DROPPED:
                log.info("job %s is %s: %d rows dropped", job.id, answer.detail, record.rows, extra=about(job.id))
                self._discard(job, record.name)
                self.forget(blocks)
            case Code.OTHER_SPACE:
                self._discard(job, record.name)
                self._jobs.refuse(job.id, f"its vectors are of space {answer.detail}, this worker's of {job.space}")
                self._release(shard)
            case Code.UNKNOWN_JOB:
                log.warning(
                    "job %s is unknown to Redis now; shard %s stays to be adopted",
                    job.id,
                    record.name,
                    extra=about(job.id),
                )
                self.forget(blocks)
            case _:
                raise BrokerError(f"job {job.id}: Redis answered {answer.code} to a shard: is another version at work?")
        return None

    def _drop_changed(self, shard: Shard, refused: list[FinishedBlock]) -> None:
        """Blocks of a corpus from before Redis was emptied have no entries any more. One that still has its own was put
        there past the submit step: given back it would come again forever.
        """
        log.warning(
            "job %s: %d blocks are of another corpus, dropped", shard.job.id, len(refused), extra=about(shard.job.id)
        )
        self.forget(refused)
        try:
            pending = set(self._broker.pending(shard.stream, self._consumer))
        except redis.RedisError as error:
            log.warning(
                "Redis cannot be used (%s); the lease of these blocks will expire", error, extra=about(shard.job.id)
            )
            return
        for block in refused:
            if block.entry in pending:
                name = "block {}:{}".format(*block.address)
                self._jobs.fail(shard.job.id, f"{name} in the queue is not the one that was submitted under its number")
                return

    def _release(self, shard: Shard) -> None:
        release(self._broker, self._consumer, self._held, shard.blocks.values())

    def _discard(self, job: OpenJob, name: str) -> None:
        try:
            job.sink.discard_shard(name)
        except OutputError as error:
            log.warning("%s; it counts for nothing, as no manifest will list it", error, extra=about(job.id))

    def _content(self, shard: Shard, outputs: tuple[Output, ...], data: pa.Table) -> ShardContent:
        job, blocks = shard.job, [*shard.blocks.values()]
        errors = pa.concat_tables([block.errors for block in blocks])
        record = ShardRecord(
            name=shard.name,
            job=job.id,
            space=job.space,
            blocks=tuple(block.record() for block in blocks),
            rows=data.num_rows,
            failed=errors.num_rows,
            skipped=sum(block.skipped for block in blocks),
            truncated=sum(block.truncated for block in blocks),
            duplicates=sum(block.duplicates for block in blocks),
            reused=sum(block.reused for block in blocks),
            tokens=sum(block.tokens for block in blocks),
            padded=sum(block.computed for block in blocks),
            outputs=outputs,
            dtype=self._info.dtype,
            engine=self._info.engine,
            worker=self._consumer,
            prompt=job.prompt,
            recipe=job.recipe,
        )
        return ShardContent(record, data, errors)
