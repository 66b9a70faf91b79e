"""Stage 1: claim blocks until the window's token estimate or its time is reached."""

from __future__ import annotations

import logging
import random
import time

import redis
from redis.backoff import ExponentialWithJitterBackoff

from embedstream.blocks import decode_block
from embedstream.broker import Broker, Claimed, entry_size
from embedstream.errors import BlockError
from embedstream.jobs import JobState
from embedstream.settings import WorkerSettings
from embedstream_worker.held import Held, HeldBlock, Window
from embedstream_worker.jobs import Jobs, OpenJob
from embedstream_worker.pipeline import Channel, Closed, Life

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""English text under a word-piece vocabulary; only the window's size hangs on it."""

STREAMS_PER_READ = 16
"""Jobs read at once; with more, they take turns."""

IDLE_WAIT_MS = 200
"""How long one read waits for a first block: how late a new job or a stop may be seen."""

LOOK_AGAIN_MS = 50
"""How often a window that waits to be filled asks whether its producers are done."""


class Intake:
    """Forms windows. Owns its connection: its reads block."""

    def __init__(
        self,
        broker: Broker,
        jobs: Jobs,
        held: Held,
        life: Life,
        out: Channel[Window],
        consumer: str,
        settings: WorkerSettings,
        burst: bool,
    ) -> None:
        self._broker = broker
        self._jobs = jobs
        self._held = held
        self._life = life
        self._out = out
        self._consumer = consumer
        self._settings = settings
        self._burst = burst
        self._turn = 0
        self._block_tokens = 8192.0  # running estimate of a block's tokens
        self._next_sweep = 0.0
        self._backoff = ExponentialWithJitterBackoff(base=0.1, cap=5.0)

    def run(self) -> None:
        """Until told to stop, or in burst mode until no unfinished job is left."""
        failures = 0
        while not self._life.stopping.is_set():
            try:
                done = self._step()
                failures = 0
            except (redis.ConnectionError, redis.TimeoutError) as error:
                failures += 1
                log.warning("Redis cannot be reached (%s), trying again", error)
                self._life.stopping.wait(self._backoff.compute(failures))
                continue
            if done:
                return

    def _step(self) -> bool:
        jobs = self._jobs.takeable(self._broker.active_jobs())
        if not jobs:
            if self._burst and not self._broker.unfinished():
                self._life.stop()
                return True
            self._life.stopping.wait(IDLE_WAIT_MS / 1000)
            return False
        blocks = self._window(jobs)
        if not blocks:
            return False
        try:
            self._out.put(Window(blocks))
        except Closed:
            release(self._broker, self._consumer, self._held, blocks)
            self._life.window_done()
            raise
        return False

    def _window(self, jobs: list[OpenJob]) -> list[HeldBlock]:
        """Claim a window's blocks. The window counts as in flight from its first block on."""
        blocks: list[HeldBlock] = []
        tokens, closes = 0.0, 0.0
        while not self._life.stopping.is_set():
            wanted = max(1, int((self._settings.window_tokens - tokens) / self._block_tokens))
            try:
                claimed = self._sweep(jobs, wanted) or self._claim(jobs, wanted, 0)
                if not claimed:
                    if blocks and self._nothing_to_come(blocks):
                        break
                    left_ms = int((closes - time.monotonic()) * 1000) if blocks else IDLE_WAIT_MS
                    claimed = self._claim(jobs, wanted, min(max(left_ms, 1), LOOK_AGAIN_MS if blocks else left_ms))
            except (redis.ConnectionError, redis.TimeoutError) as error:
                log.warning("Redis cannot be reached (%s), trying again", error)
                self._hand_back_unseen(jobs)
                return blocks
            new = [held for c in claimed if (held := self._decode(c, jobs)) is not None]
            if new and not blocks:
                self._life.window_opened()
                closes = time.monotonic() + self._settings.window_ms / 1000
            blocks += new
            for held in new:
                estimate = self._estimate(held)
                tokens += estimate
                self._block_tokens += 0.1 * (estimate - self._block_tokens)
            if not blocks or tokens >= self._settings.window_tokens or time.monotonic() >= closes:
                break
        return blocks

    def _claim(self, jobs: list[OpenJob], wanted: int, wait_ms: int) -> list[Claimed]:
        self._turn += 1
        first = self._turn % len(jobs)
        turn = (jobs[first:] + jobs[:first])[:STREAMS_PER_READ]
        ids, each = [job.id for job in turn], max(1, wanted // len(turn))
        return self._broker.claim(self._consumer, ids, each, wait_ms)

    def _sweep(self, jobs: list[OpenJob], wanted: int) -> list[Claimed]:
        """Take over expired leases and entries that were handed back, now and then."""
        now = time.monotonic()
        if now < self._next_sweep:
            return []
        lease = self._settings.lease_seconds
        self._next_sweep = now + min(lease / 4, 2.0) * random.uniform(0.5, 1.5)
        found: list[Claimed] = []
        for job in jobs:
            if len(found) < wanted:
                found += self._broker.sweep(self._consumer, job.id, int(lease * 1000), wanted - len(found))
        if found:
            self._next_sweep = now
        return found

    def _decode(self, claimed: Claimed, jobs: list[OpenJob]) -> HeldBlock | None:
        job = next(job for job in jobs if self._broker.keys.blocks(job.id) == claimed.stream)
        self._held.add(claimed.stream, [claimed.entry])
        try:
            block = decode_block(claimed.fields, job.spec.keep)
        except BlockError as error:
            self._jobs.refuse(job.id, str(error))
            self._held.remove(claimed.stream, [claimed.entry])
            self._broker.run(self._broker.release(claimed.stream, self._consumer, [claimed.entry]))
            return None
        size = entry_size(claimed.fields)
        return HeldBlock(job, claimed.stream, claimed.entry, size, claimed.deliveries, block)

    def _estimate(self, held: HeldBlock) -> float:
        text = held.block.rows.column("text").nbytes
        return text / BYTES_PER_TOKEN + held.block.rows.num_rows

    def _nothing_to_come(self, blocks: list[HeldBlock]) -> bool:
        """Whether the producers of all the window's jobs are done."""
        jobs = {held.job.id for held in blocks}
        return all(self._broker.state(job) != JobState.SUBMITTING for job in jobs)

    def _hand_back_unseen(self, jobs: list[OpenJob]) -> None:
        """After a lost reply: entries that are pending for this consumer, and that it never saw, go back at once."""
        for job in jobs:
            stream = self._broker.keys.blocks(job.id)
            mine = set(self._held.snapshot().get(stream, ()))
            try:
                unseen = [entry for entry in self._broker.pending(stream, self._consumer) if entry not in mine]
                if unseen:
                    self._broker.run(self._broker.release(stream, self._consumer, unseen))
            except redis.RedisError as error:
                log.warning("Redis is still out of reach (%s): unseen entries come back with their lease", error)
                return


def release(broker: Broker, consumer: str, held: Held, blocks: list[HeldBlock]) -> None:
    """Hand blocks back so that others can claim them at once."""
    streams: dict[str, list[str]] = {}
    for block in blocks:
        streams.setdefault(block.stream, []).append(block.entry)
    for stream, entries in streams.items():
        held.remove(stream, entries)
        try:
            broker.run(broker.release(stream, consumer, entries))
        except redis.RedisError as error:
            log.warning("could not hand %d blocks back (%s): their lease will expire", len(entries), error)
