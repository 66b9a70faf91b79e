"""embed-cancel."""

from __future__ import annotations

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.errors import UsageError


@click.command(cls=Command, examples=["embed-cancel 0123456789abcdef --redis redis://host:6379/0"])
@click.argument("job")
@click.option("--redis", "redis_url", help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option("--queue", help="Look for it on this queue only.  [default: all]")
@click.version_option(package_name="embedstream")
def cancel(job: str, redis_url: str | None, queue: str | None) -> None:
    """End a job early. What is written stays, and the same embed-submit goes on from there.

    JOB may be a compaction, too: its dataset stays as it is.
    """
    if not redis_url:
        raise UsageError("no Redis: give --redis URL, or set EMBEDSTREAM_REDIS_URL")
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream.api.client import find_queue, was_cancelled
    from embedstream.queue.broker import Broker
    from embedstream.queue.coordination import compactions, end_compaction
    from embedstream.server.connection import connect, explaining
    from embedstream.server.preflight import check

    check(connect(redis_url, retries=0), redis_url)
    with explaining(redis_url):
        nowhere = Broker(connect(redis_url), "")
        for wanted in compactions(nowhere):
            if wanted.id == job:
                end_compaction(nowhere, wanted)
                click.echo(f"compaction {job} is cancelled; its dataset is as it was")
                return
        broker = nowhere.of(find_queue(nowhere, job, queue or None))
        if broker.is_damaged(job):
            broker.run(broker.forget(job, broker.keys_below(job)))
            click.echo(f"job {job} was damaged in Redis and is removed; the same embed-submit adopts what is written")
            return
        # Its spec is not looked at: a job of another version can be ended, too.
        before = broker.state(job)
        ended_now = was_cancelled(job, broker.run(broker.cancel(job))) and before is not None and not before.ended
        state = broker.state(job)
    if ended_now:
        click.echo(f"job {job} is cancelled; its manifest is written by a worker, a coordinator, or its embed-submit")
    else:
        click.echo(f"job {job} is {state} already")


def main() -> None:
    """Entry point."""
    run(cancel)
