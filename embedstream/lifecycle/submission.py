"""Pushing a corpus: from blocks to a sealed job, under backpressure, healing what Redis forgot."""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import redis

from embedstream.corpus.parts import Part
from embedstream.errors import BrokerError, CorpusChanged
from embedstream.queue.blocks import Block, encode_block
from embedstream.queue.broker import Broker
from embedstream.queue.steps import Answer, Code, Step
from embedstream.server.patience import NotYet, Patience
from embedstream.server.troubles import is_out_of_memory

SUMS_AT_ONCE = 4096
"""Sums fetched in one read when blocks that Redis has already are compared: 32 KiB."""

SHORTEST_PAUSE = 0.02
LONGEST_PAUSE = 0.2
"""Seconds between two tries on a full queue: a worker commits every few seconds at most, nobody is kept waiting."""


class Pushed(enum.Enum):
    """How pushing ended."""

    SEALED = enum.auto()  # all blocks are with the workers
    ENDED = enum.auto()  # the job was ended by somebody else, or needs no more
    LOST = enum.auto()  # Redis does not know the job any more: create it again, adopt its shards, push again


class _GoBack(Exception):
    """Redis lacks blocks that it had acknowledged."""

    def __init__(self, next_block: int) -> None:
        self.next_block = next_block


class _Stop(Exception):
    def __init__(self, pushed: Pushed) -> None:
        self.pushed = pushed


def push_job(
    broker: Broker,
    job: str,
    parts: Sequence[Part],
    read: Callable[[Part], Iterator[Block]],
    bound: int,
    patience: Patience,
    jitter: Callable[[], float] = random.random,
) -> Pushed:
    """Submit and seal parts of a job; others may be pushed at the same time from elsewhere.

    Blocks that Redis has already are compared, not sent. `read` gives a part's blocks, each time from the
    first on. `bound` is the limit on the queue's bytes; `jitter` draws from [0, 1).

    Raises:
        CorpusChanged: a block is not what an earlier run submitted under its number.
        InputError: from the parts; also if one must be read again and cannot.
        redis.RedisError, Stopped: as `Patience` raises them.
    """
    pushing = _Pushing(broker, job, read, bound, patience, jitter)
    try:
        for part in parts:
            pushing.compare(part)
        for part in parts:
            pushing.push(part)
    except _Stop as stop:
        return stop.pushed
    return Pushed.SEALED


@dataclass(frozen=True)
class _Pushing:
    broker: Broker
    job: str
    read: Callable[[Part], Iterator[Block]]
    bound: int
    patience: Patience
    jitter: Callable[[], float]

    def compare(self, part: Part) -> None:
        """Refuse a part that changed before any of it is submitted, if it has holes to be filled.

        Were the blocks in the holes submitted as they are now, the corpus that was there before could not come back.
        """
        if part.once or not self._has_holes(part.index):
            return
        known, first, past, count = b"", 0, False, 0
        for block in self.read(part):
            count = block.number + 1
            at = (block.number - first) * 8
            if at >= len(known) and not past:
                first, at = block.number, 0
                known = self._sums(part.index, first)
                past = not known
            there = known[at : at + 8]
            if any(there) and there != block.sum:
                raise CorpusChanged(part.label, block.number, block.span)
        if self._sums(part.index, count, 1):
            raise CorpusChanged(part.label, count)

    def push(self, part: Part) -> None:
        """Submit and seal the part. Raises `_Stop`."""
        have = self.patience(lambda: self.broker.next_block(self.job, part.index))
        while True:
            try:
                self._seal(part, self._submit_from(have, part))
                return
            except _GoBack as back:
                have = back.next_block

    def _has_holes(self, number: int) -> bool:
        """Whether blocks are known behind others that are not, as after adoption."""
        first = 0
        while known := self._sums(number, first):
            if any(not any(known[at : at + 8]) for at in range(0, len(known), 8)):
                return True
            first += SUMS_AT_ONCE
        return False

    def _sums(self, number: int, first: int, count: int = SUMS_AT_ONCE) -> bytes:
        return self.patience(lambda: self.broker.sums(self.job, number, first, count))

    def _submit_from(self, have: int, part: Part) -> int:
        """Submit the blocks from `have` on; returns how many the part has."""
        known, first, count = b"", 0, 0
        for block in self.read(part):
            count = block.number + 1
            if block.number < have:
                at = (block.number - first) * 8
                if at >= len(known):
                    first, at = block.number, 0
                    known = self._sums(part.index, first, min(SUMS_AT_ONCE, have - first))
                    if len(known) < 8:
                        raise _Stop(Pushed.LOST)
                if known[at : at + 8] != block.sum:
                    raise CorpusChanged(part.label, block.number, block.span)
            else:
                self._submit(part, block)
        if count < have:
            raise CorpusChanged(part.label, count)
        return count

    def _submit(self, part: Part, block: Block) -> None:
        step = self.broker.submit(self.job, encode_block(block), self.bound)
        pauses = (min(SHORTEST_PAUSE * 1.5**n, LONGEST_PAUSE) for n in itertools.count())
        answer = self._run(step, "the queue is full, waiting for workers", pauses)
        match answer.code:
            case Code.OK | Code.DUPLICATE:
                return
            case Code.GAP:
                raise _GoBack(answer.number)
            case Code.CHANGED:
                raise CorpusChanged(part.label, block.number, block.span)
            case _:
                raise _stopped(answer)

    def _seal(self, part: Part, count: int) -> None:
        step, pauses = self.broker.seal(self.job, part.index, count, part.content), itertools.repeat(LONGEST_PAUSE)
        answer = self._run(step, "Redis is out of memory, waiting for workers", pauses)
        match answer.code:
            case Code.OK:
                return
            case Code.MISSING:
                raise _GoBack(answer.number)
            case Code.CHANGED:
                raise CorpusChanged(part.label, count)
            case _:
                raise _stopped(answer)

    def _run(self, step: Step[Answer], full: str, pauses: Iterator[float]) -> Answer:
        """The answer, once there is room: `full` says what is waited for."""

        def act() -> Answer:
            try:
                answer = self.broker.run(step)
            except redis.RedisError as error:
                if not is_out_of_memory(error):
                    raise
                answer = Answer(Code.FULL)
            if answer.code is Code.FULL:
                raise NotYet(full, next(pauses) * (0.5 + self.jitter()))
            return answer

        return self.patience(act)


def _stopped(answer: Answer) -> Exception:
    if answer.code is Code.ENDED:
        return _Stop(Pushed.ENDED)
    if answer.code is Code.UNKNOWN_JOB:
        return _Stop(Pushed.LOST)
    return BrokerError(f"Redis answered {answer.code} to a block: is another version at work?")
