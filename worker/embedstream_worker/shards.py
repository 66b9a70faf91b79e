"""Shards while they are filled: what is written together, and when that begins."""

from __future__ import annotations

import time
import uuid
from collections.abc import Container
from dataclasses import dataclass, field

import redis

from embedstream.errors import RecordDamaged
from embedstream.jobs import JobState
from embedstream.queue.broker import Broker
from embedstream.queue.workers import InHand
from embedstream.records import ShardRecord
from embedstream.server.foreign import reading
from embedstream_worker.calibration import CALIBRATION_ROWS, has_int8
from embedstream_worker.finish import FinishedBlock
from embedstream_worker.jobs import OpenJob
from embedstream_worker.shared import Shared

ASK_SECONDS = 0.1
"""How often Redis is asked, per shard, whether its job has more to come."""

CANCELLED_SECONDS = 0.5
"""How often it is asked while more of the job is in the pipeline: of one that was cancelled, what is there counts."""

IDLE_SECONDS = 1.0
"""A shard of a job that is still being submitted closes when nothing came for so long."""

UNTOLD_SECONDS = 3.0
"""The same for one whose few rows would say what int8 numbers stand for in the whole job."""

SHARD_ROWS = 131_072
"""A shard closes at so many rows, error rows included, however small they are."""

MOST_OPEN_SHARDS = 4
"""Open shards, of many jobs, take no more memory than so many full ones."""


@dataclass(eq=False)
class Shard:
    """Blocks of one job that are written together, and how far that is."""

    job: OpenJob
    stream: str
    opened: float
    grown: float
    asked: float = 0.0
    blocks: dict[tuple[int, int], FinishedBlock] = field(default_factory=dict)
    rows: int = 0
    """Error rows included."""
    bytes: int = 0
    in_hand: InHand = field(default_factory=InHand)
    worked: float = 0.0
    """Seconds that the worker was at work for it."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    written: ShardRecord | None = None
    """Once it is durable."""

    @property
    def is_told(self) -> bool:
        """Whether its rows suffice to say what int8 numbers stand for in the whole job, or need not."""
        needed = has_int8(self.job.outputs) and not self.job.calibration.ranges
        return not needed or not 0 < self.in_hand.rows < CALIBRATION_ROWS

    def write_anew(self) -> None:
        """What was written of it is of no use: it is another shard from here on."""
        self.name, self.written = uuid.uuid4().hex[:16], None

    def add(self, block: FinishedBlock) -> FinishedBlock | None:
        """The same block as another entry, if it is here already: the newer entry is the one to clear."""
        older = self.blocks.get(block.address)
        self.blocks[block.address] = block
        if older is None:
            self.rows += block.rows
            self.bytes += block.bytes
            self.in_hand += InHand(block.data.num_rows, block.tokens, block.computed)
        return older if older is not None and older.entry != block.entry else None

    def leave_out(self, addresses: Container[tuple[int, int]]) -> None:
        """Without these blocks it is another shard, which has to be written anew."""
        self.blocks = {address: block for address, block in self.blocks.items() if address not in addresses}
        self.write_anew()


class OpenShards:
    """One for each job of which blocks came since its last one was closed."""

    def __init__(self, shared: Shared, broker: Broker) -> None:
        self._broker = broker
        self._held, self._life, self._settings = shared.held, shared.life, shared.settings
        self._shards: dict[str, Shard] = {}

    def __bool__(self) -> bool:
        return bool(self._shards)

    def all(self) -> list[Shard]:
        """Callable from any thread."""
        return [*self._shards.values()]

    def of(self, job: OpenJob, stream: str) -> Shard:
        """The job's open shard; a new one if it has none."""
        now = time.monotonic()
        shard = self._shards.setdefault(job.id, Shard(job, stream, now, now))
        shard.grown = now
        return shard

    def close(self, shard: Shard) -> None:
        self._shards.pop(shard.job.id, None)

    def due(self, waiting: Container[str]) -> list[Shard]:
        """Those to be closed now. Of jobs that are `waiting` to be written, only those that are full or old."""
        shards = sorted(self._shards.values(), key=lambda shard: shard.bytes)
        due = [shard for shard in shards if self._is_full(shard) or self._is_over(shard, waiting)]
        left = [shard for shard in shards if shard not in due]
        while sum(shard.bytes for shard in left) > MOST_OPEN_SHARDS * self._settings.shard_bytes:
            due.append(left.pop())
        return due

    def _is_full(self, shard: Shard) -> bool:
        if shard.bytes >= self._settings.shard_bytes or shard.rows >= SHARD_ROWS:
            return True
        return shard.is_told and time.monotonic() - shard.opened >= self._settings.shard_seconds

    def _is_over(self, shard: Shard, waiting: Container[str]) -> bool:
        """Whether nothing is to be expected that could still come into it."""
        if self._life.stopping.is_set():
            return shard.is_told  # what is in the model may not come back in time
        if shard.job.id in waiting:
            return False
        more = bool(self._held.entries(shard.stream) - {block.entry for block in shard.blocks.values()})
        awaited = self._held.awaited and not more
        if awaited and shard.is_told:
            return True
        now = time.monotonic()
        if now - shard.asked < (CANCELLED_SECONDS if more else ASK_SECONDS):
            return False
        shard.asked = now
        try:
            with reading(f"job {shard.job.id}'s record"):
                idle = 0.0 if more else now - shard.grown
                match self._broker.state(shard.job.id):
                    case JobState.SUBMITTING | JobState.RUNNING if awaited:
                        return self._is_told_now(shard, idle, awaited)
                    case JobState.SUBMITTING:
                        return idle >= IDLE_SECONDS and (shard.is_told or self._is_told_now(shard, idle))
                    case JobState.RUNNING:
                        return not more and not self._broker.unclaimed(shard.job.id)
        except redis.RedisError:
            return False
        except RecordDamaged:
            pass  # the commit will say what becomes of it
        return True

    def _is_told_now(self, shard: Shard, idle: float, awaited: bool = False) -> bool:
        """Whether another worker has said it, or no more rows come: a producer may wait until these are committed, and
        so may this worker's next block (`awaited`)."""
        shard.job.calibration.ranges = self._broker.ranges(shard.job.id)
        if shard.job.calibration.ranges:
            return True
        return idle >= UNTOLD_SECONDS and (awaited or not self._broker.unclaimed(shard.job.id))
