"""What every command's `--help` has: examples, options in groups, variables, and where the documentation is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from embedstream.settings import ENV_PREFIX

WIDEST = 100
"""Columns of a help page, if the terminal has as many."""

MORE = (
    f"Each option has an environment variable: {ENV_PREFIX}_MAX_ERRORS for --max-errors, {ENV_PREFIX}_REDIS_URL for "
    "--redis; docs/reference.md lists them. Documentation: README.md and docs/ of embedstream."
)

CONTEXT = {
    "auto_envvar_prefix": ENV_PREFIX,
    "show_default": True,
    "help_option_names": ["-h", "--help"],
    "max_content_width": WIDEST,
}


class Command(click.Command):
    """A command of ours."""

    def __init__(
        self, *args: Any, groups: Mapping[str, Sequence[str]] | None = None, examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        """`groups`: a title for some of the parameters, by their names; the others stand below `Options`.
        `examples`: command lines that run as they stand, once their files are there.
        """
        super().__init__(*args, **{"context_settings": CONTEXT, **kwargs})
        self.groups = groups or {}
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        grouped = {name for names in self.groups.values() for name in names}
        rest = [name for name in records if name not in grouped]
        for title, names in {**self.groups, "Options": rest}.items():
            rows = [record for name in names if (record := records[name]) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
        formatter.write_paragraph()
        formatter.write_text(MORE)
