"""RQ's own keys of our queue: anything may lie there, and nothing there is needed, as the dispatcher asks again.

So what is of another type, or is no name, is removed; and what RQ's maintenance would do is done here, without reading
what others may have put there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Container, Mapping
from typing import Any

import redis

QUEUE = "embedstream"
"""RQ's queue for all jobs of all queues of a server: a thousand-part corpus there is no more than a list of names."""

FAILED_SECONDS = 86_400
"""How long RQ shows what failed."""

WAITING = f"rq:queue:{QUEUE}"
TAKEN = f"{WAITING}:intermediate"
RUNNING, FINISHED, FAILED, SCHEDULED = (f"rq:{what}:{QUEUE}" for what in ("wip", "finished", "failed", "scheduled"))
WORKERS = f"rq:workers:{QUEUE}"

_TYPES = {
    WAITING: b"list",
    TAKEN: b"list",
    **dict.fromkeys((RUNNING, FINISHED, FAILED, SCHEDULED, f"rq:deferred:{QUEUE}", f"rq:canceled:{QUEUE}"), b"zset"),
    **dict.fromkeys((WORKERS, "rq:workers", "rq:queues"), b"set"),
}

_NAME = re.compile(r"[0-9A-Za-z_-]{1,100}")

AT_ONCE = 1000
"""Members of a key looked at in one go."""


def is_name(text: str) -> bool:
    """Whether RQ takes it as the name of a job."""
    return _NAME.fullmatch(text) is not None


def remove_foreign_types(client: redis.Redis) -> list[str]:
    """Remove RQ's keys of our queue that are of another type, and records of its workers; returns their names.

    Raises:
        redis.RedisError: as redis-py raises it.
    """
    ask: Any = client
    wrong = _remove_others(client, _TYPES)
    workers = [raw.decode(errors="replace") for raw in ask.smembers(WORKERS)]
    return wrong + _remove_others(client, {key: b"hash" for key in workers if key.startswith("rq:worker:")})


def remove_foreign_record(client: redis.Redis, worker: str) -> None:
    """Remove what lies in the place of a worker's record, if it is none: RQ does not list the worker any more."""
    _remove_others(client, {f"rq:worker:{worker}": b"hash"})


def _remove_others(client: redis.Redis, types: Mapping[str, bytes]) -> list[str]:
    """Remove those of the keys that are of another type than theirs."""
    with client.pipeline(transaction=False) as pipe:
        for key in types:
            pipe.type(key)
        found = pipe.execute()
    wrong = [key for key, type in zip(types, found, strict=True) if type not in (b"none", types[key])]
    if wrong:
        client.unlink(*wrong)
    return wrong


def forget(client: redis.Redis, name: str) -> None:
    """Remove a job of RQ, whatever its keys hold. Raises `redis.RedisError`."""
    job = f"rq:job:{name}"
    with client.pipeline() as pipe:
        pipe.unlink(job, f"{job}:dependents", f"{job}:dependencies", f"rq:executions:{name}", f"rq:results:{name}")
        for key in (FINISHED, FAILED, SCHEDULED):
            pipe.zrem(key, name)
        pipe.lrem(WAITING, 0, name)
        pipe.execute()


def due_again(client: redis.Redis) -> list[str]:
    """Take the jobs that are to be tried again now: each comes to one of those who ask. What is no name is dropped.

    Raises:
        redis.RedisError: as redis-py raises it.
    """
    ask: Any = client
    members = ask.zrangebyscore(SCHEDULED, "-inf", time.time(), start=0, num=AT_ONCE)
    names = [raw.decode(errors="replace") for raw in members if ask.zrem(SCHEDULED, raw)]
    return [name for name in names if is_name(name)]


def keep_short(client: redis.Redis, wanted: Container[str]) -> None:
    """Take out of RQ's lists what is over. What a process died with expires, unless it is `wanted`.

    Raises:
        redis.RedisError: as redis-py raises it.
    """
    ask: Any = client
    now = time.time()
    for key in (FINISHED, FAILED):
        ask.zremrangebyscore(key, 0, now)
    for execution in ask.zrangebyscore(RUNNING, 0, now, start=0, num=AT_ONCE):
        ask.zrem(RUNNING, execution)
        name = execution.partition(b":")[0].decode(errors="replace")
        if is_name(name) and name not in wanted:
            ask.expire(f"rq:job:{name}", FAILED_SECONDS)
    if ask.lrange(TAKEN, AT_ONCE, AT_ONCE):
        ask.unlink(TAKEN)  # of processes that died as they took something
    for worker in ask.smembers(WORKERS):
        if not ask.exists(worker):
            ask.srem(WORKERS, worker)
            ask.srem("rq:workers", worker)
