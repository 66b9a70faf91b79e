"""One worker process: its signals, its parent, and its end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa

from embedstream.cli.commands import on_signals
from embedstream.cli.logs import identify
from embedstream.dataset.roots import canonical_root
from embedstream.metrics.exposition import Exposition, QueueCollector
from embedstream.server.connection import connect, explaining
from embedstream.server.preflight import check, refuse_few_rights, shortcomings
from embedstream.settings import WorkerSettings
from embedstream_worker.engines import EngineName, make_engine
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.jobs import WorkerModel
from embedstream_worker.meter import Meter
from embedstream_worker.model_folder import Trust
from embedstream_worker.pipeline import Life
from embedstream_worker.worker import Worker, WorkerPlan

log = logging.getLogger(__name__)


def serve(
    model: str,
    revision: str | None,
    redis_url: str,
    queue: str,
    device: str,
    engine: EngineName,
    dtype: Dtype,
    threads: int | None,
    settings: WorkerSettings,
    output_roots: tuple[str, ...],
    burst: bool,
    warm_up: bool,
    embedded: bool,
    trust: Trust,
    listen: tuple[str, int] | None,
    compiles: bool,
) -> None:
    """Build the worker and run it until it is told to stop. No output root: the current folder, and `redis:`.

    `listen`: host and port of /metrics, /healthz and /readyz.
    """
    roots = tuple(canonical_root(root) for root in output_roots or (str(Path.cwd()), "redis:"))
    life, orphaned, meter = Life(), threading.Event(), Meter(queue)
    identify(queue=queue)
    stop_on_signals(life)
    if embedded:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=leave_with_parent, args=(os.getppid(), life, orphaned), daemon=True).start()
    if listen is not None:
        # Before all that takes long: probes hear that the worker is there, and not ready.
        meter.registry.register(QueueCollector(redis_url, [queue]))
        served = Exposition(*listen, meter.registry, lambda: str(life.failure or ""), meter.unready)
        log.info("metrics at %s", served.url)
    with connect(redis_url, retries=0) as client, explaining(redis_url):
        check(client, redis_url)
        if not embedded:
            refuse_few_rights(client, redis_url, queue)
            for shortcoming in shortcomings(client, redis_url):
                log.warning(shortcoming)
    # Arrow's own allocators keep what a shard needed and are no faster here: a third more memory for nothing.
    pa.set_memory_pool(pa.system_memory_pool())
    made, source = make_engine(engine, model, revision, device, dtype, threads, trust, compiles)
    log.info("model %s: %s", model, source)
    plan = WorkerPlan(redis_url, queue, WorkerModel(model, revision), roots, settings, burst, embedded, warm_up)

    def end_private_server() -> None:
        if orphaned.is_set():
            connect(redis_url, retries=0).shutdown()

    try:
        with explaining(redis_url):
            worker = Worker(plan, made, life=life, last=end_private_server, meter=meter)
            identify(worker=worker.name)
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
