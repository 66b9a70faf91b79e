"""What an RQ job is about: where trouble with it is kept for `embed-status`, and what its lines in the log say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rq.exceptions import DeserializationError
from rq.job import Job

from embedstream.cli.logs import about
from embedstream.queue.coordination import find_compaction, note_compacted, note_trouble
from embedstream_coordinator.context import Context

FINALIZE = "finalize"
IDS = "ids"
TROUBLE = "trouble"


def part_trouble(part: int) -> str:
    """The name under which trouble with a part is known."""
    return f"part {part}"


class Subject(Protocol):
    """Something that can be in trouble."""

    def note(self, context: Context, why: str) -> bool:
        """Keep what stands in the way; whether that is news. Raises `redis.RedisError`."""

    def release(self, context: Context) -> None:
        """Let others take what a process held that is dead by now. Raises `redis.RedisError`."""

    def fields(self) -> dict[str, str]:
        """For `extra` of a line in the log."""


@dataclass(frozen=True)
class OfJob:
    """A job of ours, or one of its parts."""

    queue: str
    job: str
    what: str
    part: int | None = None

    def note(self, context: Context, why: str) -> bool:
        return note_trouble(context.broker(self.queue), self.job, self.what, why)

    def release(self, context: Context) -> None:
        if self.what == FINALIZE:
            context.broker(self.queue).free_finalize(self.job)

    def fields(self) -> dict[str, str]:
        return about(self.job, part=self.part)


@dataclass(frozen=True)
class OfCompaction:
    """A dataset whose shards are merged, or one of the new shards."""

    id: str
    shard: str = ""

    def note(self, context: Context, why: str) -> bool:
        broker = context.broker()
        said = f"{self.shard}: {why}" if self.shard else why
        wanted = find_compaction(broker, self.id)
        return wanted is not None and note_compacted(broker, wanted, TROUBLE, said)

    def release(self, context: Context) -> None:
        """Nothing is held."""

    def fields(self) -> dict[str, str]:
        return {}


_SUBJECTS: dict[str, Callable[..., Subject]] = {
    "embedstream.finalize": lambda queue, job: OfJob(queue, job, FINALIZE),
    "embedstream.ingest": lambda queue, job, part: OfJob(queue, job, part_trouble(part), part),
    "embedstream.ids": lambda queue, job: OfJob(queue, job, IDS),
    "embedstream.compact": OfCompaction,
    "embedstream.merge": OfCompaction,
}


def subject_of(job: Job) -> Subject | None:
    """None for what is about nothing in particular, and for jobs that are none of ours."""
    try:
        return _SUBJECTS[str(job.func_name)](*job.args)
    except (KeyError, TypeError, DeserializationError):
        return None
