"""embed-status."""

from __future__ import annotations

import sys

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.errors import UsageError


@click.command(
    cls=Command,
    examples=["embed-status --redis redis://host:6379/0", "embed-status 0123456789abcdef --watch"],
)
@click.argument("job", required=False)
@click.option("--redis", "redis_url", help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option("--queue", help="Show this queue only.  [default: all]")
@click.option("--watch", is_flag=True, help="Refresh every second, until the job has ended.")
@click.option("--json", "as_json", is_flag=True, envvar="EMBEDSTREAM_JSON", help="One JSON object each time.")
@click.version_option(package_name="embedstream")
def status(job: str | None, redis_url: str | None, queue: str | None, watch: bool, as_json: bool) -> None:
    """Show one JOB, or all queues with their jobs and workers.

    Exit codes: 0 shown; 2 no such job, or Redis cannot be used; 130 ended by Ctrl-C. JOB with --watch also tells how
    the job ended: 0 all written, or failures within its --max-errors; 1 failed; 3 written, but some rows failed; 4
    cancelled.
    """
    if not redis_url:
        raise UsageError("no Redis: give --redis URL, or set EMBEDSTREAM_REDIS_URL")
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream_producer.status import show_status

    sys.exit(show_status(job, queue or None, redis_url, watch, as_json))


def main() -> None:
    """Entry point."""
    run(status)
