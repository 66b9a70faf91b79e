"""A job's hash in Redis, read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from embedstream.errors import JobUnknown, UsageError
from embedstream.jobs import JobSpec, JobState, JobStatus, decode_spec, parse_max_errors, refuse_other_version
from embedstream.server.foreign import reading

T = TypeVar("T")
X = TypeVar("X")

MOST = 2**53
"""Of any number: what every reader of JSON can count to, and a float holds exactly."""

_COUNTERS = ("submitted", "rows", "failed", "skipped", "truncated", "duplicates", "reused", "tokens", "padded", "done")

_VERDICTS = ("", JobState.CANCELLED, JobState.FAILED)


def reading_job(job: str) -> AbstractContextManager[None]:
    """`reading` for what lies in Redis about a job."""
    return reading(f"job {job}'s record in Redis", f"embed-cancel {job} removes it, then submit it again")


def read_spec(job: str, raw: bytes | str) -> JobSpec:
    """A job's spec out of Redis.

    Raises:
        RecordDamaged: it is none.
        UsageError: it is of another format version: it is whole, and others can read it.
    """
    with reading_job(job):
        refuse_other_version(raw, "job spec", UsageError)
        return _checked(decode_spec, raw)


def parse_status(job: str, raw: Mapping[bytes, bytes], now: float) -> JobStatus:
    """A job's hash as a status.

    Raises:
        JobUnknown: there is none.
        RecordDamaged: it makes no sense.
        UsageError: its spec is of another format version.
    """
    if not raw:
        raise JobUnknown(f"no job {job} on this server: it never was, or has expired (embed-status lists them)")
    with reading_job(job):
        value = {key.decode(): text.decode() for key, text in raw.items()}
        spec = read_spec(job, raw[b"spec"])
        _checked(parse_max_errors, value["max_errors"])
        if counter(value["parts"]) != len(spec.parts):
            raise ValueError(f"parts is {value['parts']}, and the spec names {len(spec.parts)}")
        if value["verdict"] not in _VERDICTS:
            raise ValueError(f"verdict is {value['verdict']}")
        return JobStatus(
            job=job,
            state=JobState(value["state"]),
            spec=spec,
            created=_seconds(value["created"]),
            ended=_seconds(value["ended"]) if value["ended"] else None,
            now=now,
            pushed=_seconds(value["pushed"]),
            committed=_seconds(value["committed"]),
            blocks=counter(value["added"]),
            queued_bytes=counter(value["queued"]),
            sealed=counter(value["sealed"]) == len(spec.parts),
            space=value["space"],
            max_errors=value["max_errors"],
            workers={name[3:]: counter(rows) for name, rows in value.items() if name.startswith("by:")},
            verdict=value["verdict"],
            reason=value["reason"],
            manifest=value["manifest"],
            **{name: counter(value[name]) for name in _COUNTERS},
        )


def _checked(read: Callable[[X], T], value: X) -> T:
    """Here a value that cannot be used is no usage of ours."""
    try:
        return read(value)
    except UsageError as error:
        raise ValueError(error) from error


def _seconds(text: str) -> float:
    return counter(text) / 1000


def counter(text: str | bytes | None) -> int:
    """A counter of Redis; 0 if it is not there. Raises `ValueError` for what is none."""
    number = int(text or b"0")
    if not 0 <= number <= MOST:
        raise ValueError(f"{number} is out of bounds")
    return number
