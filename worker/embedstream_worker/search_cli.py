"""embed-search."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream.errors import UsageError
from embedstream.outputs import Kind
from embedstream_worker.model_folder import ALLOW_PICKLE, TRUST_REMOTE_CODE, Trust

LONGEST_QUERY = 1024 * 1024
"""Characters of a line that is a query."""


def _lines(stream: TextIO) -> Iterator[str]:
    """Raises `UsageError` for one that is too long."""
    while line := stream.readline(LONGEST_QUERY + 1):
        if len(line) > LONGEST_QUERY and not line.endswith("\n"):
            raise UsageError(f"a query on standard input has more than {LONGEST_QUERY:,} characters: give one a line")
        yield line


@click.command(
    cls=Command,
    examples=[
        'embed-search corpus.jsonl.vectors "how do I read a file line by line?" -k 3',
        "embed-search corpus.jsonl.vectors - < queries.txt",
        "embed-search reranked/ --run > reranked.trec",
    ],
)
@click.argument("output")
@click.argument("query", required=False)
@click.option("-k", type=click.IntRange(min=1), help="How many texts to show.  [default: 5; all pairs of a query]")
@click.option(
    "--run",
    "as_run",
    is_flag=True,
    help="Print the pairs of a run that was scored (embed-submit --run), best first, in TREC's format.",
)
@click.option(
    "--model",
    allow_from_autoenv=False,  # that variable says what to embed with, not what made a dataset
    help="The dataset's model, if it lies elsewhere now or you never used it here. [default: the dataset's own name]",
)
@click.option(
    "--prompt",
    allow_from_autoenv=False,  # that variable is for documents
    help="Put in front of the query.  [default: the model's own for queries]",
)
@click.option(
    "--by",
    type=click.Choice(["dense", "sparse", "multivector"]),
    help="Compare by these results alone.  [default: by all that the dataset has, their ranks fused]",
)
@click.option("--redis", "redis_url", help="The queue's Redis, if OUTPUT is redis:?prefix=docs:")
@click.option("--trust-remote-code", is_flag=True, help=TRUST_REMOTE_CODE)
@click.option("--allow-pickle", is_flag=True, help=ALLOW_PICKLE)
@click.version_option(package_name="embedstream")
def search_command(
    output: str,
    query: str | None,
    k: int | None,
    as_run: bool,
    model: str | None,
    prompt: str | None,
    by: Kind | None,
    redis_url: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Find the texts nearest to QUERY in a dataset. OUTPUT is a folder, an S3 URL or a Redis URL.

    The query is compared with every row, without an index: by the cosine of dense vectors, the dot product of sparse
    ones, and MaxSim of vectors for each token, or as the model's folder says (similarity_fn_name). Where a dataset has
    several of these, their ranks are fused (reciprocal rank fusion).

    With - as QUERY, each line of standard input is a query, answered at once. The model is loaded once, and the dataset
    read once: its rows stay in memory, unless they have more than 2 GiB.

    A model that the dataset names is loaded only if you have used it on this machine, or installed its package.
    """
    if as_run == (query is not None):
        raise UsageError("give a QUERY, or - to read queries; or --run, for the pairs of a run that was scored")
    if query is None:
        from embedstream_worker.ranked import show_run

        show_run(output, k, redis_url or None)
        return
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream_worker.searching import show_each, show_nearest

    trust = Trust(code=trust_remote_code, pickle=allow_pickle)
    if query == "-":
        queries = _lines(io.TextIOWrapper(sys.stdin.buffer, "utf-8", errors="replace"))
        if show_each(output, queries, k or 5, model, trust, prompt, redis_url or None, by):
            sys.exit(1)
        return
    show_nearest(output, query, k or 5, model, trust, prompt, redis_url or None, by)


def main() -> None:
    """Entry point."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    run(search_command)
