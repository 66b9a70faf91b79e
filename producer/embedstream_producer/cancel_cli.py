"""embed-cancel."""

from __future__ import annotations

import time

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.errors import UsageError

MANIFEST_SECONDS = 2.0
"""How long a manifest is waited for after the grace period: live workers look for such jobs every second or so."""


@click.command(cls=Command, examples=["embed-cancel 0123456789abcdef --redis redis://host:6379/0"])
@click.argument("job")
@click.option("--redis", "redis_url", help="The fleet's Redis: redis://host:6379/0, rediss://, unix://.")
@click.option("--queue", help="Look for it on this queue only.  [default: all]")
@click.version_option(package_name="embedstream")
def cancel(job: str, redis_url: str | None, queue: str | None) -> None:
    """End a job early. What is written stays, and the same embed-submit goes on from there.

    Workers have five seconds to write what they have computed of it; this command waits for that and prints how many
    rows are kept. JOB may be a compaction, too: its dataset stays as it is.
    """
    if not redis_url:
        raise UsageError("no Redis: give --redis URL, or set EMBEDSTREAM_REDIS_URL")
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream.api.client import find_queue
    from embedstream.api.job import GRACE_MS, was_cancelled
    from embedstream.queue.broker import Broker
    from embedstream.queue.coordination import compactions, end_compaction
    from embedstream.server.connection import connect, explaining
    from embedstream.server.preflight import check
    from embedstream.terminal import counted

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
        answer = broker.run(broker.cancel(job, grace_ms=GRACE_MS))
        if not was_cancelled(job, answer) or before is None or before.ended:
            click.echo(f"job {job} is {broker.state(job)} already")
            return
        if broker.is_closing(job):
            click.echo(f"workers have {GRACE_MS // 1000} s to write what they have computed of it", err=True)
            end = time.monotonic() + GRACE_MS / 1000 + MANIFEST_SECONDS
            while time.monotonic() < end and (state := broker.state(job)) is not None and not state.ended:
                time.sleep(0.1)
        try:
            status = broker.status(job)
        except UsageError:  # of another version
            kept, state = "", broker.state(job)
        else:
            most = "" if status.sealed else " submitted"
            kept = f": {status.rows:,} of {counted(status.submitted, f'{most} row'.strip())} are kept"
            state = status.state
    next_step = (
        "the same embed-submit goes on from there"
        if state is not None and state.ended
        else "its manifest is written by a worker, a coordinator, or its embed-submit"
    )
    click.echo(f"job {job} is cancelled{kept}; {next_step}")


def main() -> None:
    """Entry point."""
    run(cancel)
