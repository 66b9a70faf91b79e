"""Stage 4: vectors into shards, shards into the sink, and then the commit. A job that cannot be written waits alone."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import redis

from embedstream.cli.logs import about
from embedstream.errors import OutputError
from embedstream.queue.workers import InHand
from embedstream.records import ShardRecord
from embedstream.server.patience import backoff
from embedstream.server.troubles import trouble
from embedstream_worker.commit import Commits
from embedstream_worker.engines.base import EngineInfo
from embedstream_worker.finish import finish_blocks
from embedstream_worker.held import EmbeddedGroup, release
from embedstream_worker.jobs import LOOK_AGAIN_SECONDS, Jobs
from embedstream_worker.pipeline import Channel, Closed
from embedstream_worker.shards import OpenShards, Shard
from embedstream_worker.shared import RETRIES, Shared
from embedstream_worker.troubles import patience

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""How often a writer that waits for work asks whether a shard should be closed, or tried again."""

OUTPUT_PATIENCE_SECONDS = 60.0
"""What cannot be written for so long is handed back: another worker may be able to write it."""

MOST_WAITING_JOBS = 64
MOST_WAITING_SHARDS = 4
"""Beyond so many jobs, or the memory of so many full shards, what cannot be written is handed back at once. One job
alone may wait with all that this worker has of it."""


@dataclass(eq=False)
class Closing:
    """Closed shards of one job, oldest first. If the first cannot be written or committed, the others wait with it."""

    shards: list[Shard] = field(default_factory=list)
    failures: int = 0
    since: float = 0.0
    """When the first of these failures was."""
    due: float = 0.0
    """When it is tried again."""
    why: str = ""
    """Why it waits, as it was said."""
    output: bool = False
    """Whether the output is why, so that another worker might be able to write it; otherwise Redis is."""

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


class Write:
    """Owns the sinks and its own connection."""

    def __init__(
        self,
        shared: Shared,
        jobs: Jobs,
        info: EngineInfo,
        source: Channel[list[EmbeddedGroup]],
    ) -> None:
        self._broker = shared.broker(RETRIES)
        self._consumer, self._settings = shared.consumer, shared.settings
        self._meter, self._ledger = shared.meter, shared.ledger
        self._life, self._activity, self._held = shared.life, shared.activity, shared.held
        self._jobs = jobs
        self._source = source
        self._open = OpenShards(shared, self._broker)
        self._commits = Commits(shared, self._broker, jobs, info)
        self._closing: dict[str, Closing] = {}
        self._committing = patience("a shard waits to be committed", self._life.stopping.wait)

    def run(self) -> None:
        """Until the source closes; then every shard is tried once more, and handed back if that fails."""
        try:
            while True:
                self._take()
                for shard in self._open.due(self._closing):
                    self._close(shard)
                self._try_again()
                self._bound()
        except Closed:
            for shard in self._open.all():
                if shard.is_told:
                    self._queue(shard)
                else:
                    self._open.close(shard)
                    self._hand_back(Closing([shard]))
            self._last_try()

    def _take(self) -> None:
        if self._too_much() and not self._life.stopping.is_set():
            # Redis takes no commits: nothing that comes now could be committed either.
            self._life.stopping.wait(LOOK_SECONDS)
            return
        for group in self._source.get(timeout=LOOK_SECONDS if self._open or self._closing else None) or ():
            self._add(group)

    def _add(self, group: EmbeddedGroup) -> None:
        try:
            with self._meter.stage("finish"):
                blocks, unfinished = finish_blocks(group)
        except OutputError as error:
            self._jobs.refuse(group.tokenized.job.id, str(error), LOOK_AGAIN_SECONDS)
            blocks, unfinished = [], group.tokenized.blocks
        release(self._broker, self._consumer, self._held, unfinished)
        if not blocks:
            self._ledger.left(group.tokenized)
            return
        job, stream = group.tokenized.job, blocks[0].stream
        shard = self._open.of(job, stream)
        if shard.job is not job:
            self._close(shard)  # of an earlier life of the job
            shard = self._open.of(job, stream)
        for block in blocks:
            older = shard.add(block)
            if older is not None:
                self._commits.forget([older])  # the job was reopened while this worker held the block
        self._ledger.in_shard(shard, job.id, shard.in_hand, group.tokenized)

    def _close(self, shard: Shard) -> None:
        closing = self._queue(shard)
        if not closing.failures:
            self._finish(shard.job.id, closing)

    def _queue(self, shard: Shard) -> Closing:
        closing = self._closing.setdefault(shard.job.id, Closing())
        closing.shards.append(shard)
        self._open.close(shard)
        return closing

    def _finish(self, job: str, closing: Closing) -> None:
        """Write and commit a job's closed shards, or as many as can be at present."""
        while closing.shards:
            begun = time.monotonic()
            try:
                record = self._commits.finish(closing.shards[0])
            except (OutputError, redis.RedisError) as error:
                self._put_off(job, closing, error, begun)
                return
            self._committing.over()
            self._activity.progress()
            closing.failures = 0
            self._count(closing.shards.pop(0), record)
        self._forget(job, closing)

    def _put_off(self, job: str, closing: Closing, error: OutputError | redis.RedisError, begun: float) -> None:
        """Try again later; meanwhile the job is not taken any further."""
        now = time.monotonic()
        closing.failures += 1
        if closing.failures == 1:
            closing.since = begun
        closing.output = isinstance(error, OutputError)
        if isinstance(error, OutputError):
            why, pause = str(error), backoff(closing.failures, base=0.5, cap=15.0)
            if why != closing.why:
                rows = sum(shard.rows for shard in closing.shards)
                log.error("%s; %d rows wait for it, trying again", why, rows, extra=about(job))
        else:
            why, pause = f"its shards wait to be committed: Redis {trouble(error)}", self._committing.met(error)
        if why != closing.why:
            closing.why = why
            self._jobs.stuck(job, why)
        # What fails slowly leaves at least half of the time to others.
        closing.due = now + max(pause, now - begun)

    def _try_again(self) -> None:
        for job, closing in [*self._closing.items()]:
            now = time.monotonic()
            if closing.output and (now - closing.since > OUTPUT_PATIENCE_SECONDS or self._held.awaited):
                self._give_up(job, closing)
            elif now >= closing.due:
                self._finish(job, closing)

    def _too_much(self) -> bool:
        """Whether more waits than may."""
        waiting = self._closing.values()
        most = MOST_WAITING_SHARDS * self._settings.shard_bytes
        return len(waiting) > 1 and (len(waiting) > MOST_WAITING_JOBS or sum(each.bytes for each in waiting) > most)

    def _bound(self) -> None:
        while self._too_much():
            given_up = {job: closing for job, closing in self._closing.items() if closing.output}
            if not given_up:
                return
            job = max(given_up, key=lambda job: given_up[job].bytes)
            self._give_up(job, given_up[job])

    def _give_up(self, job: str, closing: Closing) -> None:
        """Hand a job's closed shards back, and leave the job alone for a while."""
        self._jobs.refuse(job, closing.why, LOOK_AGAIN_SECONDS)
        self._hand_back(closing)
        self._forget(job, closing)

    def _last_try(self) -> None:
        """What has failed before may take its time to fail again, so it comes last."""
        for job, closing in sorted(self._closing.items(), key=lambda item: item[1].failures):
            self._finish(job, closing)
            self._hand_back(closing)
            self._forget(job, closing)

    def _forget(self, job: str, closing: Closing) -> None:
        self._closing.pop(job, None)
        if closing.why:
            self._jobs.stuck(job, "")

    def _count(self, shard: Shard, record: ShardRecord | None) -> None:
        if record is None:
            self._ledger.left(shard)
            return
        self._meter.committed(record)
        some = InHand(record.rows, record.tokens, record.padded)
        self._ledger.commit(shard, record.job, some, self._jobs.open_jobs())

    def _hand_back(self, closing: Closing) -> None:
        for shard in closing.shards:
            self._commits.give_up(shard)
            self._ledger.left(shard)
