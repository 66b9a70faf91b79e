"""embed-worker."""

from __future__ import annotations

import math
import re
import socket
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.cli.logs import LogFormat, set_up, tell_error
from embedstream.cli.service_options import service_options
from embedstream.errors import UsageError
from embedstream.jobs import DEFAULT_MODEL, model_address, queue_name
from embedstream.settings import ENV_PREFIX, WorkerSettings
from embedstream_worker.engines import ENGINES, GROUP, HASHING_MODEL, EngineOptions
from embedstream_worker.model_folder import ALLOW_PICKLE, TRUST_REMOTE_CODE, Trust

if TYPE_CHECKING:
    from embedstream_worker.engines.precision import Dtype

DEFAULTS = WorkerSettings()


class EngineName(click.Choice[str]):
    """One of ours, or one that an installed package offers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return (
            value
            if value not in ENGINES and entry_points(group=GROUP, name=value)
            else super().convert(value, param, ctx)
        )


class Seconds(click.FloatRange):
    """A finite number: NaN passes every comparison of a range, and nothing can wait for infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


def usable_device(name: str) -> str:
    """The name if a device can have it. Raises `UsageError`."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: use auto, cpu, cuda:N or mps")
    return name


@click.command(
    cls=Command,
    groups={
        "Queue": ["redis_url", "queue", "output_roots", "burst"],
        "Model": ["model", "revision", "trust_remote_code", "allow_pickle"],
        "Device": ["device", "engine", "dtype", "threads", "compiles", "no_warmup"],
        "Batches": ["batch_tokens", "window_tokens", "window_ms"],
        "Times": ["lease_seconds", "stall_seconds", "drain_seconds"],
        "Operations": ["only_check", "metrics_port", "metrics_host", "log_format"],
    },
    examples=[
        "embed-worker --redis redis://host:6379/0 --model BAAI/bge-small-en-v1.5 --output-root /data",
        "embed-worker --redis redis://host:6379/0 --model ./my-model --device cuda:0",
    ],
)
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    help="A folder, a Hugging Face id, an id an installed package carries, or `hashing`.",
)
@click.option("--revision", help="Commit, tag or branch of a Hugging Face id.")
@click.option("--redis", "redis_url", required=True, help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option("--queue", help="Name of the queue.  [default: the model's name]")
@click.option(
    "--device",
    default="auto",
    callback=lambda _context, _option, name: usable_device(name),
    help="auto (of several GPUs the one that the fewest workers of this machine use), cpu, cuda:N or mps.",
)
@click.option(
    "--engine",
    type=EngineName(ENGINES),
    default="auto",
    help=f"auto: the fastest that is right. Installed packages may add others by an entry point of the group {GROUP}.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "int8"]),
    default="auto",
    help="auto: bfloat16 where the device has it. int8 only when asked for: faster, less exact.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of one batch, for onnxruntime. [default: by cores]"
)
@click.option(
    "--compile",
    "compiles",
    envvar=f"{ENV_PREFIX}_COMPILE",
    is_flag=True,
    help="On a GPU, with torch: compile the model. Starting takes longer, the first time most; see docs/gpu.md.",
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens in one batch. [default: by device]")
@click.option("--window-tokens", type=click.IntRange(min=1), help="Tokens sorted together. [default: 10 s of work]")
@click.option(
    "--window-ms", type=click.IntRange(min=0), default=DEFAULTS.window_ms, help="Longest wait for a full window."
)
@click.option(
    "--lease-seconds",
    type=Seconds(min=1),
    default=DEFAULTS.lease_seconds,
    help="Other workers take a block from a worker that gave no sign of life for so long.",
)
@click.option(
    "--stall-seconds",
    type=Seconds(min=0, min_open=True),
    default=DEFAULTS.stall_seconds,
    help="End with exit code 75 (start it again) if a batch takes longer than this, and longer than its work needs.",
)
@click.option(
    "--drain-seconds",
    type=Seconds(min=0),
    default=DEFAULTS.drain_seconds,
    help="Time after SIGTERM to finish and commit what is in the model; the rest is handed back.",
)
@click.option(
    "--output-root",
    "output_roots",
    multiple=True,
    envvar=[f"{ENV_PREFIX}_OUTPUT_ROOT", f"{ENV_PREFIX}_OUTPUT_ROOTS"],
    help="Folder or URL below which jobs may write; repeatable. [default: the current folder, and redis:]",
)
@click.option("--no-warmup", is_flag=True, help="Be ready as soon as the model is loaded; the first batches are slow.")
@click.option("--burst", is_flag=True, help="End when no unfinished job is left on the queue.")
@click.option(
    "--check",
    "only_check",
    envvar=f"{ENV_PREFIX}_CHECK",
    is_flag=True,
    help="Exit 0 if this machine's worker for the queue is ready, else 1.",
)
@click.option("--trust-remote-code", is_flag=True, help=TRUST_REMOTE_CODE)
@click.option("--allow-pickle", is_flag=True, help=ALLOW_PICKLE)
@service_options
@click.option("--embedded", hidden=True, help="The one output of the embed-submit to belong to: leave when it is gone.")
@click.option("--embedded-source", hidden=True, help="The dataset that its job updates, if it is another one.")
@click.version_option(package_name="embedstream")
def worker(
    model: str,
    revision: str | None,
    redis_url: str,
    queue: str | None,
    device: str,
    engine: str,
    dtype: Dtype,
    threads: int | None,
    compiles: bool,
    batch_tokens: int | None,
    window_tokens: int | None,
    window_ms: int,
    lease_seconds: float,
    stall_seconds: float,
    drain_seconds: float,
    output_roots: tuple[str, ...],
    no_warmup: bool,
    burst: bool,
    only_check: bool,
    metrics_port: int | None,
    metrics_host: str,
    log_format: LogFormat,
    embedded: str | None,
    embedded_source: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Embed the blocks of a queue with one model, until it is told to stop.

    Exit codes: 0 told to stop, or --burst and nothing left; 1 it failed; 2 it cannot run with these settings;
    75 its device hangs or is lost: start it again.
    """
    set_up(log_format)
    if revision and model == HASHING_MODEL:
        raise UsageError(f"--revision {revision}: the model {HASHING_MODEL} has none; leave it out")
    model = model_address(model)
    queue = queue or queue_name(model)
    if only_check:
        sys.exit(0 if is_ready(redis_url, queue) else 1)
    # Not at the top: loading these takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream.dataset.roots import canonical_root
    from embedstream_worker.serving import serve
    from embedstream_worker.worker import WorkerPlan

    roots = output_roots or (str(Path.cwd()), "redis:")
    if embedded is not None:
        roots = (embedded, *([embedded_source] if embedded_source else []))
    trust = Trust(code=trust_remote_code, pickle=allow_pickle)
    serve(
        WorkerPlan(
            redis_url=redis_url,
            queue=queue,
            engine=EngineOptions(model, revision, engine, device, dtype, threads, trust, compiles),
            roots=tuple(map(canonical_root, roots)),
            settings=WorkerSettings(
                batch_tokens=batch_tokens,
                window_tokens=window_tokens,
                window_ms=window_ms,
                lease_seconds=lease_seconds,
                stall_seconds=stall_seconds,
                drain_seconds=drain_seconds,
            ),
            burst=burst,
            alone=embedded is not None,
            warm_up=not no_warmup,
            listen=None if metrics_port is None else (metrics_host, metrics_port),
        )
    )


def is_ready(redis_url: str, queue: str) -> bool:
    """Whether a worker of this machine serves the queue and is warm."""
    from embedstream.queue.broker import Broker
    from embedstream.server.connection import connect, explaining

    with explaining(redis_url):
        workers = Broker(connect(redis_url, retries=0), queue).workers()
    return any(w.host == socket.gethostname() and w.state == "ready" for w in workers)


def main() -> None:
    """Entry point."""
    run(worker, tell_error)
