"""Reading one part of a job's corpus where the coordinator runs, as `embed-submit` would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from embedstream.blocks import Block
from embedstream.broker import Broker
from embedstream.connection import mask
from embedstream.coordination import unsealed_parts
from embedstream.errors import EmbedstreamError, InputError
from embedstream.input.duplicates import DuplicateIndex
from embedstream.jobs import JobSpec, JobState
from embedstream.objects import is_object
from embedstream.plans import drive
from embedstream.settings import Settings
from embedstream.submission import Part, Pushed, push_part
from embedstream_coordinator.context import Context
from embedstream_producer.corpus import CorpusPart, open_part


class Abandoned(EmbedstreamError):
    """Whoever started this process is gone; somebody else will go on."""


def ingest_part(context: Context, broker: Broker, job: str, part: int) -> str:
    """Submit and seal what is missing of one part; returns how that ended.

    Parts are read at the same time, by several processes and machines. An id counts as used if an earlier part has it,
    so their ids are gone through first: the blocks are those that one reader of all parts would make.

    Raises:
        InputError: a part may not be read, or cannot be.
        CorpusChanged: it is not what was submitted before.
        JobUnknown: there is no such job.
        redis.RedisError: as redis-py raises it.
    """
    status = broker.status(job)
    if status.state is not JobState.SUBMITTING or part not in unsealed_parts(broker, job, len(status.spec.parts)):
        return "was read already, or is no longer wanted"
    spec, parent = status.spec, os.getppid()

    def still_wanted() -> None:
        if os.getppid() != parent:
            raise Abandoned("the coordinator is gone")

    bound = broker.memory_bound(Settings.from_environment().queue_bytes)
    with DuplicateIndex() as index:
        for earlier in range(part):
            for _ in _open(context, spec, earlier).ids(spec, index):
                still_wanted()
        mine = _open(context, spec, part)

        def blocks() -> Iterator[Block]:
            return mine.blocks(spec, index)

        plan = push_part(broker, job, part, Part(mine.label, blocks), bound)
        pushed = drive(plan, broker, url=mask(context.redis_url), tick=still_wanted)
    return {Pushed.SEALED: "read", Pushed.ENDED: "the job ended", Pushed.LOST: "Redis does not know the job"}[pushed]


def _open(context: Context, spec: JobSpec, part: int) -> CorpusPart:
    source = spec.parts[part]
    context.check_input(source)
    if not is_object(source) and Path(source).exists() and not Path(source).is_file():
        raise InputError(f"{source}: is no regular file, so it cannot be read by a coordinator")
    return open_part(part, source)
