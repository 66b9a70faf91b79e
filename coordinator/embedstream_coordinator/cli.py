"""embed-coordinator."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.cli.logs import LogFormat, set_up, tell_error
from embedstream.cli.service_options import service_options
from embedstream.errors import UsageError
from embedstream.settings import ENV_PREFIX

PROCESSES = 2
"""So that a part that takes hours holds nothing else up."""


@click.command(
    cls=Command,
    groups={
        "What it may read and write": ["input_roots", "output_roots"],
        "Operations": ["processes", "only_check", "metrics_port", "metrics_host", "log_format"],
    },
    examples=["embed-coordinator --redis redis://host:6379/0 --input-root /data --output-root /data"],
)
@click.option("--redis", "redis_url", required=True, help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=PROCESSES,
    help="How many jobs to do at once: reading parts of corpora, writing manifests.",
)
@click.option(
    "--input-root",
    "input_roots",
    multiple=True,
    envvar=[f"{ENV_PREFIX}_INPUT_ROOT", f"{ENV_PREFIX}_INPUT_ROOTS"],
    help="Folder or s3:// prefix below which corpora may be read; repeatable. [default: the current folder]",
)
@click.option(
    "--output-root",
    "output_roots",
    multiple=True,
    envvar=[f"{ENV_PREFIX}_OUTPUT_ROOT", f"{ENV_PREFIX}_OUTPUT_ROOTS"],
    help="Folder or URL below which it may write; repeatable. [default: the current folder, and redis:]",
)
@click.option(
    "--check",
    "only_check",
    envvar=f"{ENV_PREFIX}_CHECK",
    is_flag=True,
    help="Exit 0 if a coordinator of this machine is there, else 1.",
)
@service_options
@click.version_option(package_name="embedstream")
def coordinator(
    redis_url: str,
    processes: int,
    input_roots: tuple[str, ...],
    output_roots: tuple[str, ...],
    only_check: bool,
    metrics_port: int | None,
    metrics_host: str,
    log_format: LogFormat,
) -> None:
    """Read corpora and write manifests for a fleet. It reads the corpora that were submitted with --server-side.

    Any number of coordinators may run, on any machine that sees corpora and outputs. Exit codes: 0 told to stop; 1 it
    failed; 2 it cannot run with these settings.
    """
    if only_check:
        sys.exit(0 if is_there(redis_url) else 1)
    set_up(log_format)
    try:
        import rq  # noqa: F401
    except ImportError as error:
        raise UsageError("RQ is not installed: pip install 'embedstream[coordinator]'") from error
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream.dataset.roots import canonical_root
    from embedstream_coordinator.context import Context
    from embedstream_coordinator.serving import serve

    here = str(Path.cwd())
    context = Context(
        redis_url=redis_url,
        input_roots=tuple(map(canonical_root, input_roots or (here,))),
        output_roots=tuple(map(canonical_root, output_roots or (here, "redis:"))),
    )
    serve(context, processes, log_format, None if metrics_port is None else (metrics_host, metrics_port))


def is_there(redis_url: str) -> bool:
    """Whether a coordinator of this machine lives."""
    from embedstream.queue.broker import Broker
    from embedstream.queue.coordination import coordinators
    from embedstream.server.connection import connect, explaining

    nowhere = Broker(connect(redis_url, retries=0), "")
    with explaining(redis_url):
        return any(each.host == socket.gethostname() for each in coordinators(nowhere))


def main() -> None:
    """Entry point."""
    run(coordinator, tell_error)
