"""A job's hash in Redis, read."""

from __future__ import annotations

from collections.abc import Mapping

from embedstream.errors import BrokerError, JobUnknown
from embedstream.jobs import JobState, JobStatus, decode_spec


def parse_status(job: str, raw: Mapping[bytes, bytes], now: float) -> JobStatus:
    """A job's hash as a status. Raises `JobUnknown` if there is none, `BrokerError` if it makes no sense."""
    if not raw:
        raise JobUnknown(f"no job {job} on this server: it never was, or has expired (embed-status lists them)")
    try:
        value = {key.decode(): text.decode() for key, text in raw.items()}
        number = {
            name: int(value[name])
            for name in ("submitted", "rows", "failed", "skipped", "truncated", "tokens", "padded", "done")
        }
        return JobStatus(
            job=job,
            state=JobState(value["state"]),
            spec=decode_spec(value["spec"]),
            created=int(value["created"]) / 1000,
            ended=int(value["ended"]) / 1000 if value["ended"] else None,
            now=now,
            pushed=int(value["pushed"]) / 1000,
            committed=int(value["committed"]) / 1000,
            blocks=int(value["added"]),
            queued_bytes=int(value["queued"]),
            sealed=int(value["sealed"]) == int(value["parts"]),
            space=value["space"],
            max_errors=value["max_errors"],
            workers={name[3:]: int(rows) for name, rows in value.items() if name.startswith("by:")},
            verdict=value["verdict"],
            reason=value["reason"],
            manifest=value["manifest"],
            **number,
        )
    except (KeyError, ValueError) as error:
        raise BrokerError(f"its record in Redis is damaged: {error!r}") from error
