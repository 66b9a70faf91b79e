"""embed-search."""

from __future__ import annotations

import logging
import sys

import click

from embedstream.commands import run
from embedstream.settings import ENV_PREFIX


@click.command(context_settings={"auto_envvar_prefix": ENV_PREFIX, "show_default": True})
@click.argument("folder", metavar="DIR")
@click.argument("query")
@click.option("-k", default=5, type=click.IntRange(min=1), help="How many chunks to show.")
@click.version_option(package_name="embedstream")
def search_command(folder: str, query: str, k: int) -> None:
    """Show the chunks of the dataset in DIR that are nearest to QUERY."""
    # Not at the top: loading it takes a while, in which Ctrl-C shall end this command as at any other time.
    from embedstream_worker.searching import show_nearest

    show_nearest(folder, query, k)


def main() -> None:
    """Entry point."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    run(search_command)
