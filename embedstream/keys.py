"""Every Redis key, built in one place.

All keys of a queue carry `{queue}` as their hash tag, so one queue lives in one Redis Cluster slot and any script may
touch any of them. Keys of a job hang below `Keys.job`, so that scripts derive the per-part ones from it.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "workers"
"""The consumer group of every stream."""

RELEASED = "released"
"""The consumer that owns entries which a worker handed back: always idle, so claimable at once."""

QUEUES = "embedstream:queues"
"""Sorted set of queue names, scored by the last sign of life in Redis seconds. A hint for listings only."""

COORDINATORS = "embedstream:coordinators"
"""Sorted set of coordinators by last heartbeat (ms). They serve every queue of a server."""

COMPACTIONS = "embedstream:compactions"
"""Hash: id -> `Compaction` as JSON, of datasets whose shards are to be merged by coordinators."""


def compaction(id: str) -> str:
    """Hash: merged shard -> its record as JSON, and `trouble`. Expires by itself."""
    return f"embedstream:compaction:{id}"


def coordinator(name: str) -> str:
    """What one live coordinator says of itself; expires when it stops saying it."""
    return f"embedstream:coordinator:{name}"


@dataclass(frozen=True)
class Keys:
    """The keys of one queue."""

    queue: str

    @property
    def prefix(self) -> str:
        return f"embedstream:{{{self.queue}}}"

    @property
    def jobs(self) -> str:
        """Sorted set: active jobs by creation time (ms)."""
        return f"{self.prefix}:jobs"

    @property
    def recent(self) -> str:
        """Sorted set: ended jobs by end time (ms), for listings."""
        return f"{self.prefix}:recent"

    @property
    def bytes(self) -> str:
        """Counter: body bytes queued over all active jobs."""
        return f"{self.prefix}:bytes"

    @property
    def finalize(self) -> str:
        """Sorted set, the outbox: jobs to finalize by the time (ms) from which they may be taken."""
        return f"{self.prefix}:finalize"

    @property
    def ingest(self) -> str:
        """Sorted set: jobs whose parts are to be read by a coordinator, by the time (ms) that it was asked for."""
        return f"{self.prefix}:ingest"

    @property
    def pace(self) -> str:
        """Hash, tokens and bytes committed in so many ms of workers' time lately; it outlives workers and jobs."""
        return f"{self.prefix}:pace"

    @property
    def interactive(self) -> str:
        """Stream of small requests."""
        return f"{self.prefix}:interactive"

    @property
    def workers(self) -> str:
        """Sorted set: worker names by last heartbeat (ms)."""
        return f"{self.prefix}:workers"

    def worker(self, name: str) -> str:
        """What one live worker says of itself; expires when it stops saying it."""
        return f"{self.prefix}:worker:{name}"

    def reply(self, request: str) -> str:
        """List that receives the answer to one interactive request."""
        return f"{self.prefix}:reply:{request}"

    def caller(self, request: str) -> str:
        """Exists while the caller of an interactive request still waits."""
        return f"{self.prefix}:caller:{request}"

    def job(self, job: str) -> str:
        """Hash: spec, state, counters, and per part `next:`, `sealed:` and `content:<part>`."""
        return f"{self.prefix}:job:{job}"

    def blocks(self, job: str) -> str:
        """The job's stream."""
        return f"{self.job(job)}:blocks"

    def done(self, job: str, part: int) -> str:
        """Bitmap, one bit per block of the part."""
        return f"{self.job(job)}:done:{part}"

    def sums(self, job: str, part: int) -> str:
        """String of 8-byte block sums, one per block of the part."""
        return f"{self.job(job)}:sums:{part}"

    def shards(self, job: str) -> str:
        """Hash: shard name -> `ShardRecord` as JSON."""
        return f"{self.job(job)}:shards"

    def suspect(self, job: str) -> str:
        """Hash: `<part>:<block>` -> chunks that killed their holders, the last being tried alone just now."""
        return f"{self.job(job)}:suspect"

    def troubles(self, job: str) -> str:
        """Hash: what a coordinator cannot do for the job at present -> why. Expires by itself."""
        return f"{self.job(job)}:troubles"

    def repeated(self, job: str) -> str:
        """Hash: part -> which of its rows have an id of an earlier part, and where that is. Expires by itself."""
        return f"{self.job(job)}:repeated"


def job_of(keys: Keys, key: str) -> str:
    """The job that a key is about; empty if it is about none."""
    head, _, rest = key.partition(keys.job(""))
    return "" if head else rest.partition(":")[0]


def job_keys(keys: Keys, job: str, parts: int) -> list[str]:
    """Every key that a job may have, its stream excepted once it ended."""
    per_part = [key for part in range(parts) for key in (keys.done(job, part), keys.sums(job, part))]
    return [keys.job(job), keys.shards(job), keys.suspect(job), *per_part]
