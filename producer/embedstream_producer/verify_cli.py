"""embed-verify."""

from __future__ import annotations

import sys
from typing import Literal

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.errors import UsageError


@click.command(
    cls=Command,
    examples=["embed-verify corpus.jsonl.vectors", "embed-verify vectors/ --corpus part-*.jsonl"],
)
@click.argument("output")
@click.argument("more", nargs=-1, metavar="")
@click.option("--corpus", multiple=True, metavar="FILE...", help="Compare with the files that the job was made of.")
@click.option("--redis", "redis_url", help="The queue's Redis, if OUTPUT is redis:?prefix=docs:")
@click.option("--json", "as_json", is_flag=True, envvar="EMBEDSTREAM_JSON", help="One JSON object on standard output.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "json"]),
    default="auto",
    help="json: one event a line on standard error; auto: a bar on a terminal, lines in a log.",
)
@click.version_option(package_name="embedstream")
def verify(
    output: str,
    more: tuple[str, ...],
    corpus: tuple[str, ...],
    redis_url: str | None,
    as_json: bool,
    progress: Literal["auto", "json"],
) -> None:
    """Prove that a dataset is complete and right. OUTPUT is a folder, an S3 URL or a Redis URL.

    It checks that every row is there once, in the dataset or in its errors, and that files, counts and vectors are
    sound. With --corpus it also compares ids and texts with those of the corpus.

    Exit codes: 0 no problem; 1 problems, each with file and row; 2 wrong usage, or nothing to verify.
    """
    if more and len(corpus) != 1:
        raise UsageError(f"{more[0]}: one output at a time; the files of its corpus follow --corpus")
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream_producer.verify import show_verdict

    sys.exit(show_verdict(output, [*corpus, *more], redis_url or None, as_json, progress))


def main() -> None:
    """Entry point."""
    run(verify)
