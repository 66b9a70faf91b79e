"""embed-cancel."""

from __future__ import annotations

import click

from embedstream.commands import run
from embedstream.errors import UsageError
from embedstream.settings import ENV_PREFIX


@click.command(context_settings={"auto_envvar_prefix": ENV_PREFIX})
@click.argument("job")
@click.option("--redis", "redis_url", help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.version_option(package_name="embedstream")
def cancel(job: str, redis_url: str | None) -> None:
    """End JOB early. What is written stays, and the same embed-submit goes on from there."""
    if not redis_url:
        raise UsageError("no Redis: give --redis URL, or set EMBEDSTREAM_REDIS_URL")
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream.client import Client
    from embedstream.connection import connect
    from embedstream.preflight import check

    check(connect(redis_url, retries=0), redis_url)
    with Client(redis_url) as client:
        found = client.job(job)
        ended = found.status().state.ended
        if found.cancel() and not ended:
            click.echo(f"job {job} is cancelled; its manifest is written by the next idle worker or waiting producer")
        else:
            click.echo(f"job {job} is {found.status().state} already")


def main() -> None:
    """Entry point."""
    run(cancel)
