"""Stage 1: claim blocks until the window's token estimate or its time is reached."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow.compute as pc

from embedstream.cli.logs import about
from embedstream.errors import BlockError, RecordDamaged
from embedstream.jobs import JobState
from embedstream.queue.blocks import Block, decode_block
from embedstream.queue.broker import Claimed, entry_size
from embedstream.server.patience import Refused, Stopped
from embedstream.settings import BLOCK_LIMITS
from embedstream_worker.ahead import Ahead
from embedstream_worker.held import HeldBlock, Window, hand_back, release
from embedstream_worker.jobs import LOOK_AGAIN_SECONDS, Jobs, OpenJob
from embedstream_worker.pipeline import Channel, Closed
from embedstream_worker.shared import Shared
from embedstream_worker.suspects import ALONE, BY_CHUNK
from embedstream_worker.troubles import may_pass, patience

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""English text under a word-piece vocabulary; only the window's size hangs on it."""

OTHER_BYTES_PER_TOKEN = 64
"""Kept fields and refused rows cost no model time, but memory: so many bytes of a block count as one token."""

REFUSED_ROW_BYTES = 512
"""What a refused row takes as Python objects, beside what its entry says of it."""

LEAST_BLOCK_TOKENS = 256
"""What the smallest block counts, one that holds nothing but refused rows: a window is at most some hundred blocks."""

MOST_PER_CLAIM = 128
"""Blocks claimed at once, however small the last ones were: the next ones may be as large as blocks can be."""

STREAMS_PER_READ = 16
"""Jobs read at once; with more, they take turns."""

IDLE_WAIT_MS = 50
"""How long one read waits for a first block: how late a new job or a stop may be seen."""

LOOK_AGAIN_MS = 50
"""How often a window that waits to be filled asks whether its producers are done."""

COUNT_SECONDS = 2.0
"""How often a worker counts the others."""

EVEN_SHARES = 2
"""At the end of its jobs a window is this part of an even share of what is left, again and again: all end together."""


class Intake:
    """Forms windows. Owns its connection: its reads block.

    That connection must not repeat commands by itself: blocks whose claim was answered into the void would be held by
    no worker until their lease expires.
    """

    def __init__(
        self,
        shared: Shared,
        jobs: Jobs,
        ahead: Ahead,
        out: Channel[Window],
        burst: bool = False,
        hopeless: Callable[[], Container[str]] = frozenset,
    ) -> None:
        """`hopeless` says which jobs of the outbox this worker cannot finalize: `burst` does not wait for them."""
        self._broker = shared.broker(0)
        self._consumer, self._settings, self._meter = shared.consumer, shared.settings, shared.meter
        self._life, self._activity, self._held = shared.life, shared.activity, shared.held
        self._jobs = jobs
        self._ahead = ahead
        self._out = out
        self._burst = burst
        self._hopeless = hopeless
        self._turn = 0
        self._block_tokens = 8192.0  # running estimate of what a block counts
        self._next_sweep = 0.0
        self._workers, self._next_count = 1, 0.0
        self._unseen = False  # whether a claim may have been answered into the void
        self._careful = False  # whether blocks are there with which workers have died

    def run(self) -> None:
        """Until told to stop, or in burst mode until no unfinished job is left for this worker."""
        claiming = patience("claiming blocks", self._life.stopping.wait)
        with suppress(Stopped):
            while not self._life.stopping.is_set():
                if claiming(self._step):
                    self._life.stop()

    def _step(self) -> bool:
        """One window, or one look for work. Whether a burst worker is done."""
        jobs = self._jobs.takeable()
        if not jobs:
            if self._burst and self._nothing_left():
                return True
            self._life.stopping.wait(IDLE_WAIT_MS / 1000)
            return False
        if self._unseen:
            self._hand_back_unseen(jobs)
            self._unseen = False
        if self._ahead.enough():
            self._life.stopping.wait(LOOK_AGAIN_MS / 1000)
            return False
        blocks: list[HeldBlock] = []
        try:
            self._fill(blocks, jobs)
        except BaseException as error:
            self._unseen = True
            if not isinstance(error, Refused) or not may_pass(error):
                release(self._broker, self._consumer, self._held, blocks)
                raise
            if not blocks:
                raise
            log.warning("Redis cannot be used (%s), going on with what is here", error)
        if blocks:
            self._ahead.claimed(sum(held.tokens for held in blocks))
            try:
                self._out.put(Window(blocks))
            except Closed:
                release(self._broker, self._consumer, self._held, blocks)
                raise
        return False

    def _fill(self, blocks: list[HeldBlock], jobs: list[OpenJob]) -> None:
        """Claim a window's blocks."""
        if self._held.empty:
            self._meter.take_worked()  # for requests: no shard's work, and none of the queue's pace
        streams = {self._broker.keys.blocks(job.id): job for job in jobs}
        if self._careful:
            self._fill_with_one(blocks, jobs, streams)
            return
        tokens, closes = 0.0, 0.0
        full, most, alone = self._ahead.window_tokens, math.inf, self._is_alone()
        prompts = BLOCK_LIMITS.chunks * max(job.prompt_length for job in jobs)
        while not self._life.stopping.is_set():
            wanted = min(MOST_PER_CLAIM, max(1, int((full - tokens) / max(self._block_tokens, prompts))))
            if not alone:  # how many are left is asked with the first block in hand: idle workers are many
                wanted = int(min(wanted, max(1, most - len(blocks)))) if blocks else 1
            claimed = self._sweep(jobs, wanted) or self._claim(jobs, wanted, 0)
            if not claimed:
                if blocks and self._nothing_to_come(blocks):
                    return
                left_ms = max(1, int((closes - time.monotonic()) * 1000)) if blocks else IDLE_WAIT_MS
                claimed = self._claim(jobs, wanted, min(left_ms, LOOK_AGAIN_MS) if blocks else left_ms)
            # All are held before the first is looked at: what happens there must not lose the others.
            new = self._without_suspects([c for c in claimed if self._held.add(c.stream, c.entry)])
            decoded = [held for c in new if (held := self._decode(c, streams[c.stream])) is not None]
            begins = bool(decoded and not blocks)
            blocks += decoded
            for held in decoded:
                rows = held.block.rows
                # Results may fill the memory before their texts are much work.
                share = self._ahead.memory_share(rows.num_rows, held.tokens, rows.nbytes + held.size)
                weight = max(held.tokens, full * share)
                tokens += weight
                self._block_tokens += 0.1 * (weight - self._block_tokens)
            if begins:
                self._activity.progress()
                closes = time.monotonic() + self._settings.window_ms / 1000
                most = math.inf if alone else self._share(jobs, full)
            is_full = tokens >= full or len(blocks) >= most
            if not blocks or self._careful or is_full or time.monotonic() >= closes:
                return

    def _is_alone(self) -> bool:
        """Whether no other worker is on the queue."""
        if time.monotonic() >= self._next_count:
            self._workers = self._broker.count_workers(self._settings.expire_seconds)
            self._next_count = time.monotonic() + COUNT_SECONDS
        return self._workers <= 1

    def _share(self, jobs: list[OpenJob], full: float) -> float:
        """Most blocks of a window; no bound while there is enough for all, or more to come."""
        ids = [job.id for job in jobs]
        if len(ids) > STREAMS_PER_READ:
            return math.inf
        left = sum(look.blocks - look.claimed for look in self._broker.run(self._broker.look(ids)))
        share = math.ceil(left / (EVEN_SHARES * self._workers))
        if share * self._block_tokens >= full:
            return math.inf
        if any(self._is_submitted(job) for job in ids):
            return math.inf
        return max(1, share)

    def _without_suspects(self, claimed: list[Claimed]) -> list[Claimed]:
        """Hand back, for later, what holders may have died of: the next death shall count against one only."""
        suspects = [c for c in claimed if c.deliveries >= ALONE]
        for c in suspects:
            self._careful = True
            self._held.remove(c.stream, [c.entry])
            hand_back(self._broker, c.stream, self._consumer, [c.entry])
        return [c for c in claimed if c.deliveries < ALONE]

    def _fill_with_one(self, blocks: list[HeldBlock], jobs: list[OpenJob], streams: dict[str, OpenJob]) -> None:
        """When all that was held is committed, claim one block that was handed back or whose lease expired."""
        while not self._held.wait_for_none(IDLE_WAIT_MS / 1000):
            if self._life.stopping.is_set():
                return
        self._next_sweep = 0.0
        claimed = self._sweep(jobs, 1)
        self._careful = bool(claimed)
        for c in claimed:
            self._held.add(c.stream, c.entry)
            held = self._decode(c, streams[c.stream])
            if held is not None:
                self._activity.progress()
                blocks.append(held)

    def _claim(self, jobs: list[OpenJob], wanted: int, wait_ms: int) -> list[Claimed]:
        self._turn += 1
        first = self._turn % len(jobs)
        turn = (jobs[first:] + jobs[:first])[:STREAMS_PER_READ]
        ids, each = [job.id for job in turn], max(1, wanted // len(turn))
        begun = time.monotonic()
        try:
            claimed = self._broker.claim(self._consumer, ids, each, wait_ms)
        except RecordDamaged:
            # One of several: what was claimed with it goes back, and each is asked alone.
            self._hand_back_unseen(turn)
            claimed = []
            for id in ids:
                with self._refusing(id):
                    claimed += self._broker.claim(self._consumer, [id], each, 0)
        if not claimed:
            # A stream that is gone ends a read at once; without this its job would be asked for in a tight loop.
            self._life.stopping.wait(max(0.0, begun + wait_ms / 1000 - time.monotonic()))
        return claimed

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
                with self._refusing(job.id):
                    if self._careful and not self._takes_notes(job.id):
                        continue
                    found += self._broker.sweep(self._consumer, job.id, int(lease * 1000), wanted - len(found))
        if found:
            self._next_sweep = now
        return found

    def _decode(self, claimed: Claimed, job: OpenJob) -> HeldBlock | None:
        self._meter.claimed(claimed.deliveries)
        try:
            with self._meter.stage("decode"):
                block = decode_block(claimed.fields, job.spec.keep, len(job.spec.parts), job.spec.keep_types)
        except BlockError as error:
            self._held.remove(claimed.stream, [claimed.entry])
            self._jobs.fail(job.id, str(error))
            return None
        if claimed.deliveries >= BY_CHUNK:
            log.warning(
                "job %s: block %d:%d has been in the hands of %d workers that died: its chunks are tried one by one",
                job.id,
                block.part,
                block.number,
                claimed.deliveries - 1,
                extra=about(job.id, (block.part, block.number)),
            )
        size = entry_size(claimed.fields)
        tokens = estimate_tokens(block, size, job.max_length, job.prompt_length, job.spec.query_field)
        return HeldBlock(job, claimed.stream, claimed.entry, size, claimed.deliveries, block, tokens)

    def _nothing_to_come(self, blocks: list[HeldBlock]) -> bool:
        """Whether the producers of all the window's jobs are done."""
        return not any(self._is_submitted(job) for job in {held.job.id for held in blocks})

    def _takes_notes(self, job: str) -> bool:
        """Whether chunks can be noted before they are tried; without that a block would come back at once, forever."""
        state = self._broker.state(job)
        if state is None or not state.open:
            why = f"it is {state or 'unknown to Redis'}, and blocks of it are left"
            self._jobs.refuse(job, why, LOOK_AGAIN_SECONDS)
            return False
        return True

    def _is_submitted(self, job: str) -> bool:
        """Whether a producer may add to it."""
        state = None
        with self._refusing(job):
            state = self._broker.state(job)
        return state is JobState.SUBMITTING

    @contextmanager
    def _refusing(self, job: str) -> Iterator[None]:
        """A job that turns out to be damaged is left alone for a while; the others go on."""
        try:
            yield
        except RecordDamaged as error:
            self._jobs.refuse(job, str(error), LOOK_AGAIN_SECONDS)

    def _nothing_left(self) -> bool:
        """Whether no job is left that this worker could work on or finalize."""
        refused, hopeless = self._jobs.refused(), self._hopeless()
        active, outbox = self._broker.active_jobs(), self._broker.outbox()
        if any(job not in refused for job in active) or any(job not in hopeless for job in outbox):
            return False
        if active or outbox:
            log.warning("leaving %d unfinished jobs that are not for this worker", len({*active, *outbox}))
        return True

    def _hand_back_unseen(self, jobs: list[OpenJob]) -> None:
        """After a lost reply: entries that are pending for this consumer, and that it never saw, go back at once."""
        for job in jobs:
            stream = self._broker.keys.blocks(job.id)
            mine = self._held.entries(stream)
            unseen = [entry for entry in self._broker.pending(stream, self._consumer) if entry not in mine]
            if unseen:
                log.info(
                    "job %s: %d blocks handed back whose claim was never answered",
                    job.id,
                    len(unseen),
                    extra=about(job.id),
                )
                hand_back(self._broker, stream, self._consumer, unseen)


def estimate_tokens(
    block: Block, size: int, max_length: int, prompt_length: int, query_field: str | None = None
) -> float:
    """What a block counts in a window. `size`: bytes of its entry; `max_length`: most tokens of a text, its prompt's
    `prompt_length` included; `query_field`: as in `JobSpec`.
    """
    rows = block.rows
    columns: list[Any] = [rows.column(name) for name in ("text", query_field) if name is not None]
    sizes = sum(pc.fill_null(pc.binary_length(column), 0).to_numpy() for column in columns)
    text = float(np.minimum(sizes / BYTES_PER_TOKEN + prompt_length, max_length).sum()) + rows.num_rows
    others = rows.nbytes + size + len(block.refused) * REFUSED_ROW_BYTES
    return max(LEAST_BLOCK_TOKENS, text, others / OTHER_BYTES_PER_TOKEN)
