"""embed-worker."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
import pyarrow as pa

from embedstream.broker import Broker
from embedstream.connection import check, connect, explaining
from embedstream.dataset.sink import canonical_output
from embedstream.errors import EmbedstreamError
from embedstream.jobs import model_address, queue_name
from embedstream.settings import ENV_PREFIX, WorkerSettings
from embedstream_worker.pipeline import Life

if TYPE_CHECKING:
    from embedstream_worker.engines import EngineName
    from embedstream_worker.engines.precision import Dtype

log = logging.getLogger("embedstream_worker")

DEFAULTS = WorkerSettings()


@click.command(context_settings={"auto_envvar_prefix": ENV_PREFIX, "show_default": True})
@click.option(
    "--model", required=True, help="A folder, a Hugging Face id, an id an installed package carries, or `hashing`."
)
@click.option("--revision", help="Commit, tag or branch of a Hugging Face id.")
@click.option("--redis", "redis_url", required=True, help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option("--queue", help="[default: the model's name]")
@click.option("--device", default="auto", help="auto, cpu, cuda:N or mps.")
@click.option("--engine", type=click.Choice(["auto", "torch", "openvino", "onnxruntime", "hashing"]), default="auto")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "int8"]),
    default="auto",
    help="auto: bfloat16 where the device has it. int8 only when asked for: faster, less exact.",
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens in one batch. [default: by device]")
@click.option(
    "--window-tokens", type=click.IntRange(min=1), default=DEFAULTS.window_tokens, help="Tokens sorted together."
)
@click.option(
    "--window-ms", type=click.IntRange(min=0), default=DEFAULTS.window_ms, help="Longest wait for a full window."
)
@click.option(
    "--lease-seconds",
    type=click.FloatRange(min=1),
    default=DEFAULTS.lease_seconds,
    help="Idle time after which others take a block over.",
)
@click.option(
    "--output-root",
    "output_roots",
    multiple=True,
    envvar=[f"{ENV_PREFIX}_OUTPUT_ROOT", f"{ENV_PREFIX}_OUTPUT_ROOTS"],
    help="Folder or URL below which jobs may write; repeatable. [default: the current folder, and redis:]",
)
@click.option("--no-warmup", is_flag=True, help="Be ready as soon as the model is loaded; the first batches are slow.")
@click.option("--burst", is_flag=True, help="Leave when no unfinished job is left on the queue.")
@click.option(
    "--check",
    "only_check",
    envvar=f"{ENV_PREFIX}_CHECK",
    is_flag=True,
    help="Exit 0 if this machine's worker for the queue is ready, else 1.",
)
@click.option("--embedded", is_flag=True, hidden=True, help="Belongs to an embed-submit: leave when it is gone.")
@click.version_option(package_name="embedstream")
def worker(
    model: str,
    revision: str | None,
    redis_url: str,
    queue: str | None,
    device: str,
    engine: EngineName,
    dtype: Dtype,
    batch_tokens: int | None,
    window_tokens: int,
    window_ms: int,
    lease_seconds: float,
    output_roots: tuple[str, ...],
    no_warmup: bool,
    burst: bool,
    only_check: bool,
    embedded: bool,
) -> None:
    """Embed the blocks of a queue with one long-lived model."""
    model = model_address(model)
    queue = queue or queue_name(model)
    if only_check:
        sys.exit(0 if is_ready(redis_url, queue) else 1)
    settings = WorkerSettings(
        batch_tokens=batch_tokens, window_tokens=window_tokens, window_ms=window_ms, lease_seconds=lease_seconds
    )
    roots = tuple(canonical_root(root) for root in output_roots or (str(Path.cwd()), "redis:"))
    run(model, revision, redis_url, queue, device, engine, dtype, settings, roots, burst, not no_warmup, embedded)


def run(
    model: str,
    revision: str | None,
    redis_url: str,
    queue: str,
    device: str,
    engine: EngineName,
    dtype: Dtype,
    settings: WorkerSettings,
    roots: tuple[str, ...],
    burst: bool,
    warm_up: bool,
    embedded: bool,
) -> None:
    """Build the worker and run it until it is told to stop."""
    life, orphaned = Life(), threading.Event()
    stop_on_signals(life)
    if embedded:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=leave_with_parent, args=(os.getppid(), life, orphaned), daemon=True).start()
    check(connect(redis_url, retries=0), redis_url)
    # Arrow's own allocators keep what a shard needed and are no faster here: a third more memory for nothing.
    pa.set_memory_pool(pa.system_memory_pool())
    # Here, not above: they take seconds to import, which `--check` and `--help` should not cost.
    from embedstream_worker.engines import make_engine
    from embedstream_worker.jobs import WorkerModel
    from embedstream_worker.worker import Worker, WorkerPlan

    made, source = make_engine(engine, model, revision, device, dtype)
    log.info("model %s: %s", model, source)
    plan = WorkerPlan(redis_url, queue, WorkerModel(model, revision), roots, settings, burst, warm_up)
    try:
        with explaining(redis_url):
            Worker(plan, made, life=life).run()
    finally:
        if orphaned.is_set():
            connect(redis_url, retries=0).shutdown()


def stop_on_signals(life: Life) -> None:
    """SIGTERM and SIGINT: at the first the worker finishes what is in the model and leaves, at the second at once."""

    asked = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(1)
        asked.set()
        life.stop()
        if not life.serving:
            sys.exit(0)  # nothing is held yet, so loading need not be waited for

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def leave_with_parent(parent: int, life: Life, orphaned: threading.Event) -> None:
    """Wait until the process that started this one is gone; then stop."""
    while os.getppid() == parent:
        time.sleep(0.5)
    orphaned.set()
    life.stop()


def is_ready(redis_url: str, queue: str) -> bool:
    """Whether a worker of this machine serves the queue and is warm."""
    with explaining(redis_url):
        workers = Broker(connect(redis_url, retries=0), queue).workers()
    return any(w.host == socket.gethostname() and w.state == "ready" for w in workers)


def canonical_root(root: str) -> str:
    """An output root as `roots.allows` compares it."""
    return root if root.startswith(("redis:", "rediss:", "unix:")) else canonical_output(root)


def main() -> None:
    """Entry point: every error on purpose is one sentence on standard error."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("embedstream").setLevel(logging.INFO)
    logging.getLogger("embedstream_worker").setLevel(logging.INFO)
    try:
        worker()
    except EmbedstreamError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
