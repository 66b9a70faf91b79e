"""One process of a coordinator: an RQ worker. It ends with the coordinator that started it, and when Redis refuses it;
why, it says on standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading

import msgspec
import pyarrow as pa
import redis

from embedstream.cli.logs import LogFormat, identify, set_up
from embedstream.server.connection import connect, explain
from embedstream.server.troubles import trouble, waiting
from embedstream_coordinator.context import Context
from embedstream_coordinator.rq_keys import remove_foreign_record
from embedstream_coordinator.rq_types import ClosedWorker, RqNoise


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator tells its process, on standard input: a line of JSON, then nothing for as long as it
    lives."""

    coordinator: str
    name: str
    log_format: LogFormat
    context: Context


def main() -> None:
    """Run until told to stop."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    set_up(plan.log_format)
    identify(coordinator=plan.coordinator)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Arrow's own allocators keep what a part needed and are no faster here.
    pa.set_memory_pool(pa.system_memory_pool())
    noise = RqNoise()
    logging.getLogger("rq.worker").addFilter(noise)
    client = connect(plan.context.redis_url)
    try:
        worker = ClosedWorker(plan.context, plan.name, client)
        worker.log_job_description = False
        worker.work(logging_level="WARNING")
    except redis.RedisError as error:
        noise.error = error
    with contextlib.suppress(redis.RedisError):
        remove_foreign_record(client, plan.name)
    if noise.error is not None:
        clause, url = trouble(noise.error), plan.context.redis_url
        words = waiting(clause, url) if clause else explain(noise.error, url)
        with contextlib.suppress(BrokenPipeError):  # then nobody is there who would start another process
            os.write(sys.stdout.fileno(), words.encode())


def _leave_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # ends when the other end is closed, however that came
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
