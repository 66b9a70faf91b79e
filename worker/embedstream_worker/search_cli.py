"""embed-search."""

from __future__ import annotations

import logging
import sys

import click

from embedstream.cli.command import Command
from embedstream.cli.commands import run
from embedstream_worker.model_folder import ALLOW_PICKLE, TRUST_REMOTE_CODE, Trust


@click.command(cls=Command, examples=['embed-search corpus.jsonl.vectors "how do I read a file line by line?" -k 3'])
@click.argument("folder", metavar="DIR")
@click.argument("query")
@click.option("-k", default=5, type=click.IntRange(min=1), help="How many chunks to show.")
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
@click.option("--trust-remote-code", is_flag=True, help=TRUST_REMOTE_CODE)
@click.option("--allow-pickle", is_flag=True, help=ALLOW_PICKLE)
@click.version_option(package_name="embedstream")
def search_command(
    folder: str,
    query: str,
    k: int,
    model: str | None,
    prompt: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> None:
    """Find the texts nearest to QUERY in the dataset in DIR.

    A model that the dataset names is loaded only if you have used it on this machine, or installed its package.
    """
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream_worker.searching import show_nearest

    show_nearest(folder, query, k, model, Trust(code=trust_remote_code, pickle=allow_pickle), prompt)


def main() -> None:
    """Entry point."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    run(search_command)
