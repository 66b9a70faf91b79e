"""One worker process: its signals, its parent, and its end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

import pyarrow as pa

from embedstream.cli.commands import on_signals
from embedstream.cli.logs import identify
from embedstream.machine import cpu_cores
from embedstream.metrics.exposition import Exposition, QueueCollector
from embedstream.server.connection import connect, explaining
from embedstream.server.preflight import check, refuse_few_rights, shortcomings
from embedstream_worker.engines import load_engine
from embedstream_worker.pipeline import Life
from embedstream_worker.worker import Worker, WorkerPlan

log = logging.getLogger(__name__)


def serve(plan: WorkerPlan) -> None:
    """Build the worker and run it until it is told to stop."""
    redis_url, orphaned = plan.redis_url, threading.Event()

    def end_private_server() -> None:
        if orphaned.is_set():
            connect(redis_url, retries=0).shutdown()

    worker = Worker(plan, lambda: load_engine(plan.engine), last=end_private_server)
    life, meter = worker.life, worker.meter
    identify(queue=plan.queue, worker=worker.name)
    stop_on_signals(life)
    if plan.alone:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=leave_with_parent, args=(os.getppid(), life, orphaned), daemon=True).start()
    if plan.listen is not None:
        # Before all that takes long: probes hear that the worker is there, and not ready.
        meter.registry.register(QueueCollector(redis_url, [plan.queue]))
        served = Exposition(*plan.listen, meter.registry, lambda: str(life.failure or ""), life.unready)
        log.info("metrics at %s", served.url)
    with connect(redis_url, retries=0) as client, explaining(redis_url):
        check(client, redis_url)
        if not plan.alone:
            refuse_few_rights(client, redis_url, plan.queue)
            for shortcoming in shortcomings(client, redis_url):
                log.warning(shortcoming)
    # Arrow's own allocators keep what a shard needed and are no faster here: a third more memory for nothing.
    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(cpu_cores())
    try:
        with explaining(redis_url):
            worker.run()
    finally:
        end_private_server()


def stop_on_signals(life: Life) -> None:
    """SIGTERM and SIGINT: at the first the worker finishes what is in the model and leaves, at the second at once."""

    def stop() -> None:
        life.stop()
        if not life.serving:
            sys.exit(0)  # nothing is held yet, so loading need not be waited for

    on_signals(stop, 1)


def leave_with_parent(parent: int, life: Life, orphaned: threading.Event) -> None:
    """Wait until the process that started this one is gone; then stop."""
    while os.getppid() == parent:
        time.sleep(0.5)
    orphaned.set()
    life.stop()
