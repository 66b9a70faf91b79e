"""Reading one part of a job's corpus where the coordinator runs, as `embed-submit` would."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from embedstream.corpus.duplicates import DuplicateIndex, Position
from embedstream.errors import EmbedstreamError, InputError
from embedstream.jobs import JobSpec, JobState
from embedstream.lifecycle.submission import Pushed, push_job
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import Repeated, note_repeated, repeated_rows, unsealed_parts
from embedstream.server.patience import Patience
from embedstream.settings import Settings
from embedstream_coordinator.context import Context
from embedstream_producer.corpus import open_part
from embedstream_producer.sources import SourcePart

MOST_REPEATED = 1_000_000
"""Rows with ids of earlier parts, over all parts: so that Redis stays small."""


class Abandoned(EmbedstreamError):
    """Whoever started this process is gone; somebody else will go on."""


def ingest_part(context: Context, broker: Broker, job: str, part: int) -> str:
    """Submit and seal what is missing of one part; returns how that ended.

    Parts are read at the same time, by several processes and machines. Which rows have an id of an earlier part was
    found by `compare_ids`: so the blocks are those that one reader of all parts would make.

    Raises:
        InputError: a part may not be read, or cannot be.
        CorpusChanged: it is not what was submitted before.
        JobUnknown: there is no such job.
        redis.RedisError: as redis-py raises it.
    """
    status = broker.status(job)
    unsealed = unsealed_parts(broker, job, len(status.spec.parts))
    if status.state is not JobState.SUBMITTING or part not in unsealed:
        return "was read already, or is no longer wanted"
    spec, still_wanted = status.spec, _wanted_by(os.getppid())
    bound = broker.memory_bound(Settings.from_environment().queue_bytes)
    repeated = repeated_rows(broker, job, part) if part else []
    if repeated is None:
        return "waits until its ids are compared with those of earlier parts"
    with EarlierIds(repeated) as index:
        mine = _open(context, spec, part)
        if mine.empty and len(unsealed) == 1 and not status.blocks:
            raise InputError(f"{mine.label}: has no records, nor has any other part")
        patience = Patience(tick=still_wanted)
        pushed = push_job(broker, job, [mine], lambda part: part.blocks(spec, index), bound, patience)
    return {Pushed.SEALED: "read", Pushed.ENDED: "the job ended", Pushed.LOST: "Redis does not know the job"}[pushed]


def compare_ids(context: Context, broker: Broker, job: str) -> str:
    """Go through the ids of all parts, in their order, and keep which rows of a part have an id of an earlier one.

    Twice is harmless, and so is dying in the middle: the next one begins anew. Raises as `ingest_part` does.
    """
    status, still_wanted = broker.status(job), _wanted_by(os.getppid())
    if status.state is not JobState.SUBMITTING:
        return "no longer wanted"
    spec, found = status.spec, 0
    with DuplicateIndex() as index:
        for part in range(len(spec.parts)):
            rows: Repeated = []
            for seen in _open(context, spec, part).ids(spec, index):
                rows += [(row, first.part, first.row) for row, first in seen if first.part != part]
                still_wanted()
                if found + len(rows) > MOST_REPEATED:
                    raise InputError(
                        f"more than {MOST_REPEATED:,} rows have ids of earlier files: submit without --server-side"
                    )
            found += len(rows)
            note_repeated(broker, job, part, rows)
    return f"{found} rows have ids of earlier parts"


class EarlierIds(DuplicateIndex):
    """The ids of one part, with what is known of its rows whose ids earlier parts have."""

    def __init__(self, repeated: Repeated) -> None:
        super().__init__()
        self._repeated = {row: Position(part, first) for row, part, first in repeated}

    def check(self, part: int, rows: Sequence[int], ids: Sequence[str]) -> list[Position | None]:
        own = super().check(part, rows, ids)
        return [self._repeated.get(row, position) for row, position in zip(rows, own, strict=True)]


def _wanted_by(parent: int) -> Callable[[], None]:
    """What raises `Abandoned` once the process that this one was made by is gone."""

    def check() -> None:
        if os.getppid() != parent:
            raise Abandoned("the coordinator is gone")

    return check


def _open(context: Context, spec: JobSpec, part: int) -> SourcePart[Any]:
    source = spec.parts[part]
    context.check_input(source)
    return open_part(part, source, opener=context.open_input, format=spec.format)
