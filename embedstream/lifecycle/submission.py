"""Pushing a corpus: from blocks to a sealed job, under backpressure, healing what Redis forgot."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from embedstream.errors import BrokerError, CorpusChanged
from embedstream.queue.blocks import Block, encode_block
from embedstream.queue.plans import NextBlock, Pause, Plan, Sums
from embedstream.queue.steps import Answer, Code, Steps
from embedstream.records import PartContent

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


@dataclass(frozen=True)
class Part:
    """One part of a corpus as blocks."""

    source: str
    blocks: Callable[[], Iterable[Block]]
    """Reads the part from its beginning each time it is called. A source that can be read only once raises
    `InputError` at the second call."""
    once: bool = False
    """Whether it is such a source."""
    content: Callable[[], PartContent | None] = lambda: None
    """What `blocks` read when it last came to its end; None for what are no bytes that others can read."""


class _GoBack(Exception):
    """Redis lacks blocks that it had acknowledged."""

    def __init__(self, next_block: int) -> None:
        self.next_block = next_block


class _Stop(Exception):
    def __init__(self, pushed: Pushed) -> None:
        self.pushed = pushed


def push_job(
    steps: Steps, job: str, parts: Sequence[Part], bound: int, jitter: Callable[[], float] = random.random
) -> Plan[Pushed]:
    """The plan that submits and seals every part of a job. Blocks that Redis has already are compared, not sent.

    `bound` is the limit on the queue's bytes, `jitter` draws from [0, 1).

    Raises:
        CorpusChanged: a block is not what an earlier run submitted under its number.
        InputError: from the parts; also if one must be read again and cannot.
    """
    try:
        for number, part in enumerate(parts):
            if not part.once and (yield from _has_holes(job, number)):
                yield from _compare(job, number, part)
        for number, part in enumerate(parts):
            yield from _push_part(steps, job, number, part, bound, jitter)
    except _Stop as stop:
        return stop.pushed
    return Pushed.SEALED


def push_part(
    steps: Steps, job: str, number: int, part: Part, bound: int, jitter: Callable[[], float] = random.random
) -> Plan[Pushed]:
    """The same for one part; others may be pushed at the same time from elsewhere."""
    try:
        if not part.once and (yield from _has_holes(job, number)):
            yield from _compare(job, number, part)
        yield from _push_part(steps, job, number, part, bound, jitter)
    except _Stop as stop:
        return stop.pushed
    return Pushed.SEALED


def _has_holes(job: str, number: int) -> Plan[bool]:
    """Whether blocks are known behind others that are not, as after adoption."""
    first = 0
    while known := (yield Sums(job, number, first, SUMS_AT_ONCE)):
        if any(not any(known[at : at + 8]) for at in range(0, len(known), 8)):
            return True
        first += SUMS_AT_ONCE
    return False


def _compare(job: str, number: int, part: Part) -> Plan[None]:
    """Refuse a part that changed before any of it is submitted.

    Were the blocks in the holes submitted as they are now, the corpus that was there before could not come back.
    """
    known, first, past, count = b"", 0, False, 0
    for block in part.blocks():
        count = block.number + 1
        at = (block.number - first) * 8
        if at >= len(known) and not past:
            first, at = block.number, 0
            known = yield Sums(job, number, first, SUMS_AT_ONCE)
            past = not known
        there = known[at : at + 8]
        if any(there) and there != block.sum:
            raise CorpusChanged(part.source, block.number, block.span)
    if (yield Sums(job, number, count, 1)):
        raise CorpusChanged(part.source, count)


def _push_part(steps: Steps, job: str, number: int, part: Part, bound: int, jitter: Callable[[], float]) -> Plan[None]:
    have = yield NextBlock(job, number)
    while True:
        try:
            count = yield from _push_blocks(steps, job, number, part, have, bound, jitter)
            yield from _seal(steps, job, number, part, count, jitter)
            return
        except _GoBack as back:
            have = back.next_block


def _push_blocks(
    steps: Steps, job: str, number: int, part: Part, have: int, bound: int, jitter: Callable[[], float]
) -> Plan[int]:
    """Submit the blocks from `have` on; returns how many the part has."""
    known, first, count = b"", 0, 0
    blocks: Iterator[Block] = iter(part.blocks())
    for block in blocks:
        count = block.number + 1
        if block.number < have:
            at = (block.number - first) * 8
            if at >= len(known):
                first, at = block.number, 0
                known = yield Sums(job, number, first, min(SUMS_AT_ONCE, have - first))
                if len(known) < 8:
                    raise _Stop(Pushed.LOST)
            if known[at : at + 8] != block.sum:
                raise CorpusChanged(part.source, block.number, block.span)
            continue
        yield from _submit(steps, job, part, block, bound, jitter)
    if count < have:
        raise CorpusChanged(part.source, count)
    return count


def _submit(steps: Steps, job: str, part: Part, block: Block, bound: int, jitter: Callable[[], float]) -> Plan[None]:
    step, pause = steps.submit(job, encode_block(block), bound), SHORTEST_PAUSE
    while True:
        answer: Answer = yield step
        match answer.code:
            case Code.OK | Code.DUPLICATE:
                return
            case Code.FULL:
                yield Pause(pause * (0.5 + jitter()), "the queue is full, waiting for workers")
                pause = min(pause * 1.5, LONGEST_PAUSE)
            case Code.GAP:
                raise _GoBack(answer.number)
            case Code.CHANGED:
                raise CorpusChanged(part.source, block.number, block.span)
            case _:
                raise _stopped(answer)


def _seal(steps: Steps, job: str, number: int, part: Part, count: int, jitter: Callable[[], float]) -> Plan[None]:
    while True:
        answer: Answer = yield steps.seal(job, number, count, part.content())
        match answer.code:
            case Code.OK:
                return
            case Code.FULL:
                yield Pause(LONGEST_PAUSE * (0.5 + jitter()), "Redis is out of memory, waiting for workers")
            case Code.MISSING:
                raise _GoBack(answer.number)
            case Code.CHANGED:
                raise CorpusChanged(part.source, count)
            case _:
                raise _stopped(answer)


def _stopped(answer: Answer) -> Exception:
    if answer.code is Code.ENDED:
        return _Stop(Pushed.ENDED)
    if answer.code is Code.UNKNOWN_JOB:
        return _Stop(Pushed.LOST)
    return BrokerError(f"Redis answered {answer.code} to a block: is another version at work?")
