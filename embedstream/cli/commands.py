"""What all commands have in common: how they end."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from embedstream.cli.starting import protect_own_environment
from embedstream.errors import EmbedstreamError, UsageError
from embedstream.masking import mask_text
from embedstream.settings import ENV_PREFIX
from embedstream.terminal import PrintableFormatter, echo

log = logging.getLogger("embedstream")

INTERRUPTED = 130

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")

ECHO_SECONDS = 0.2
"""A signal that follows another so soon is the same one: `timeout` sends each to the process and then to its group."""

_EXTRAS = {
    **dict.fromkeys(("prometheus_client", "torch", "transformers", "sentence_transformers"), "worker"),
    **dict.fromkeys(("tokenizers", "huggingface_hub", "safetensors"), "worker"),
    **dict.fromkeys(("openvino", "nncf"), "cpu"),
    "rq": "coordinator",
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn", "python_multipart", "jinja2"), "gateway"),
    "lancedb": "lance",
    "faiss": "faiss",
    "usearch": "usearch",
    "qdrant_client": "qdrant",
    "psycopg": "pgvector",
    "pymilvus": "milvus",
}
"""What an installation without extras lacks, and the extra that brings it."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def tell_error(message: str) -> None:
    """One sentence for people."""
    echo(f"Error: {message}", err=True)


def run(command: click.Command, tell: Callable[[str], None] = tell_error) -> NoReturn:
    """Run a command; every error on purpose is one sentence on standard error, and its own exit code.

    `tell`: what says the sentence.
    """
    protect_own_environment()
    _fill_closed_streams()
    try:
        Path.cwd()
    except FileNotFoundError:
        tell("the folder that this was started in has been removed: change into another one (cd)")
        sys.exit(UsageError.exit_code)
    if isinstance(sys.stdout, io.TextIOWrapper):  # terminals that lack a character show another; standard error does
        sys.stdout.reconfigure(errors="replace")
    if logging.lastResort is not None:  # of commands that set up no log: warnings, as lines for people
        logging.lastResort.setFormatter(PrintableFormatter("%(message)s"))
    _leave_service_links_out(command)
    try:
        # Not standalone: click would end an interrupted command with 1, which here means a failed job.
        code = command.main(standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(mask_text(said.getvalue()), nl=False, err=True)
        sys.exit(error.exit_code)
    except EmbedstreamError as error:
        tell(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        tell(f"{error.name} is not installed: pip install 'embedstream[{extra}]'")
        sys.exit(UsageError.exit_code)
    except BrokenPipeError:
        _give_output_up()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        _give_output_up()
        click.echo(f"Error: standard output cannot be written: {error.strerror}; the work itself is done", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _fill_closed_streams() -> None:
    """Where a standard stream is closed, the next file that is opened would take its place, and what is printed go into
    it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if name != "stdin":  # a command that reads it reports that it is closed
                setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _leave_service_links_out(command: click.Command) -> None:
    """Take variables of Kubernetes for no settings: a service `embedstream-metrics` makes an EMBEDSTREAM_METRICS_PORT
    in every container of its namespace."""
    for name in [f"{ENV_PREFIX}_{str(param.name).upper()}" for param in command.params]:
        if _SERVICE_LINK.match(os.environ.get(name, "")):
            link = os.environ.pop(name)
            log.warning(
                "%s=%s is Kubernetes' own for a service, and no setting (enableServiceLinks: false)", name, link
            )


def _give_output_up() -> None:
    """Whoever read our output has left, or its disk is full: nothing goes there any more, also when all is flushed."""
    with contextlib.suppress(io.UnsupportedOperation):  # no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def on_signals(first: Callable[[], None], code: int) -> None:
    """Call `first` at the first SIGTERM or SIGINT; at the next one this process ends at once, with `code`.

    In the middle of its end an exception could come out of any line, and nobody would be there to catch it. SIGINT
    stays ignored where it is, as in what a shell runs in the background.
    """
    asked = 0.0

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if not asked:
            asked = now
            first()
        elif now - asked > ECHO_SECONDS:
            os._exit(code)

    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)


def end(command: Callable[[], NoReturn]) -> NoReturn:
    """Run a command to its end and end the process, without the interpreter's own end.

    That takes a while in which a signal would change the exit code, and threads may still be in native code.
    """
    try:
        command()
    except SystemExit as ended:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1  # whoever reads it has left, or its disk is full
        os._exit(code)
