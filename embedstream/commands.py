"""What all commands have in common: how they end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import click

from embedstream.errors import EmbedstreamError
from embedstream.terminal import echo

INTERRUPTED = 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def tell_error(message: str) -> None:
    """One sentence for people."""
    echo(f"Error: {message}", err=True)


def run(command: click.Command, tell: Callable[[str], None] = tell_error) -> NoReturn:
    """Run a command; every error on purpose is one sentence on standard error, and its own exit code.

    `tell`: what says the sentence.
    """
    try:
        # Not standalone: click would end an interrupted command with 1, which here means a failed job.
        code = command.main(standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EmbedstreamError as error:
        tell(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has left: nothing more can be said, not even by the interpreter's own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        click.echo(f"Error: standard output cannot be written: {error.strerror}; the work itself is done", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
