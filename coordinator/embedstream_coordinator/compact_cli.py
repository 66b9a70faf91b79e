"""embed-compact."""

from __future__ import annotations

from typing import Literal

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.settings import MIB


@click.command(cls=Command, examples=["embed-compact corpus.jsonl.vectors", "embed-compact vectors/ --shard-mib 512"])
@click.argument("output")
@click.option("--redis", "redis_url", help="Let the coordinators of this fleet do it, and end at once.")
@click.option("--shard-mib", type=click.IntRange(min=1, max=1024), default=192, help="Size of a merged shard, in MiB.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "json"]),
    default="auto",
    help="json: one event a line on standard error; auto: a bar on a terminal, lines in a log.",
)
@click.version_option(package_name="embedstream")
def compact(output: str, redis_url: str | None, shard_mib: int, progress: Literal["auto", "json"]) -> None:
    """Merge a dataset's small shards into large ones. OUTPUT must be finished; its rows are ordered by part and row.

    The new manifest is written before the old shards are removed. A program that reads by the old manifest meanwhile
    may miss a file, and must read again.
    """
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    import socket
    from pathlib import Path

    from embedstream.dataset.sinks import canonical_output
    from embedstream.queue.broker import Broker
    from embedstream.queue.coordination import Compaction, coordinators, save_compaction
    from embedstream.server.connection import connect, explaining, mask, with_redis
    from embedstream.server.preflight import check
    from embedstream.terminal import counted, echo
    from embedstream_coordinator.compaction import compact as compact_here
    from embedstream_coordinator.compaction import open_finished
    from embedstream_producer.progress import WorkProgress

    address = canonical_output(output)
    if redis_url is None:
        with WorkProgress(progress) as shown:
            before, after = compact_here(address, shard_mib * MIB, shown)
        echo(f"{mask(address)}: {counted(before, 'shard')} before, {after:,} now")
        return
    broker = Broker(connect(redis_url), "")
    check(connect(redis_url, retries=0), redis_url)
    with explaining(redis_url):
        live = coordinators(broker)
        if Path(address).is_dir() or (live and all(each.host == socket.gethostname() for each in live)):
            open_finished(address)  # elsewhere they see what this machine does not
        save_compaction(broker, Compaction(output=address, target_bytes=shard_mib * MIB))
        echo(f"{mask(address)}: to be merged by coordinators; {with_redis('embed-status', redis_url)} shows it")
        if not live:
            echo(f"no coordinator runs: start one with {with_redis('embed-coordinator', redis_url)}", err=True)


def main() -> None:
    """Entry point."""
    run(compact)
