"""What the three commands have in common: how they end."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from embedstream.errors import EmbedstreamError


def run(command: click.Command) -> NoReturn:
    """Run a command; every error on purpose is one sentence on standard error, and its own exit code."""
    try:
        command()
    except EmbedstreamError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has left: nothing more can be said, not even by the interpreter's own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
