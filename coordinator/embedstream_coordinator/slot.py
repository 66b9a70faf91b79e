"""One process of a coordinator: an RQ worker. It ends with the coordinator that started it."""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec
import pyarrow as pa

from embedstream.connection import connect
from embedstream.logs import LogFormat, set_up
from embedstream_coordinator.context import Context
from embedstream_coordinator.rq_types import ClosedWorker


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator tells its process, on standard input: a line of JSON, then nothing for as long as it
    lives."""

    name: str
    log_format: LogFormat
    context: Context


def main() -> None:
    """Run until told to stop."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    set_up(plan.log_format)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Arrow's own allocators keep what a part needed and are no faster here.
    pa.set_memory_pool(pa.system_memory_pool())
    worker = ClosedWorker(plan.context, plan.name, connect(plan.context.redis_url))
    worker.log_job_description = False
    worker.work(logging_level="WARNING")


def _leave_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # ends when the other end is closed, however that came
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
