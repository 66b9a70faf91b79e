"""`embedstream`: one command, with all others beneath it."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from embedstream.cli.command import CONTEXT, MORE
from embedstream.cli.commands import run

COMMANDS = {
    "submit": "embedstream_producer.submit_cli:embed_submit",
    "status": "embedstream_producer.status_cli:status",
    "cancel": "embedstream_producer.cancel_cli:cancel",
    "verify": "embedstream_producer.verify_cli:verify",
    "search": "embedstream_worker.search_cli:search_command",
    "export": "embedstream_producer.export_cli:export_command",
    "compact": "embedstream_coordinator.compact_cli:compact",
    "worker": "embedstream_worker.cli:worker",
    "coordinator": "embedstream_coordinator.cli:coordinator",
    "serve": "embedstream_gateway.cli:serve_command",
    "cache": "embedstream_worker.cache_cli:cache",
}
"""In the order of a first day. Each but `cache` is a program of its own, too: `embed-submit` and so on."""


class Commands(click.Group):
    """Loads a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=Commands, context_settings=CONTEXT, epilog=MORE)
@click.version_option(package_name="embedstream")
def embedstream() -> None:
    """Turn a corpus of texts into vectors, on this machine or by a fleet: every row exactly once.

    \b
    embedstream submit corpus.jsonl             embed on this machine
    embedstream search corpus.jsonl.vectors "a question"
    embedstream verify corpus.jsonl.vectors     prove that every row is there once
    """


def main() -> NoReturn:
    """Entry point. A command that is named runs as its own program would, which decides how it ends."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        program, command, *rest = sys.argv
        sys.argv = [f"{program} {command}", *rest]
        importlib.import_module(COMMANDS[command].partition(":")[0]).main()
    run(embedstream)
