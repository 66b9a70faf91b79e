"""`python tests/reference_page.py > docs/reference.md` makes that page of the commands as click knows them."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

from embedstream.cli import main
from embedstream.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"

INTRODUCTION = """\
# Flags and variables

Made from the code by `python tests/reference_page.py`; a test compares. A flag comes before its variable, and both
before the default. A variable holds for every command that has it; an empty one counts as not set. For a flag that is
repeatable its values are separated by spaces; for one without a value it is 1 or 0. All commands have `--version`,
`--help` and `-h`, too.
"""

WITHOUT_FLAGS = """\
## Variables without a flag

`Client` and `AsyncClient` read these, and EMBEDSTREAM_REDIS_URL, EMBEDSTREAM_MODEL and EMBEDSTREAM_QUEUE, too.
"""

OTHERS = {
    "EMBEDSTREAM_CACHE_DIR": "Where workers keep converted models, and what they measured on this machine. "
    "Default: `~/.cache/embedstream`.",
    "EMBEDSTREAM_FAILPOINTS": "For tests: where a process kills or stops itself, or loses a reply.",
    "EMBEDSTREAM_EMBEDDED": "Set by `embed-submit` without Redis for its worker: the one output that it may write.",
    "EMBEDSTREAM_EMBEDDED_SOURCE": "The same for the dataset of `--update-from`: it may be read, too.",
    "XDG_STATE_HOME": "Below it, in `embedstream`, embedded mode keeps its locks and logs while it runs. "
    "Default: `~/.local/state`.",
    "XDG_RUNTIME_DIR": "Where the socket of embedded mode's server may lie if `/tmp` cannot hold it.",
    "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL": "The store that `s3://` means, if it is not AWS'.",
    "QDRANT_API_KEY": "Of the Qdrant server that `embed-export` writes to.",
    "MILVUS_TOKEN": "Of the Milvus server that `embed-export` writes to: `user:password`, or a key.",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "Where `embed-serve` and `embed-worker` send traces, with the extra `otel` "
    "([gateway.md](gateway.md#traces)). OpenTelemetry's other variables hold, too.",
    "AWS_REGION, AWS_DEFAULT_REGION": "Its region. AWS' usual variables and files give the credentials.",
}


def commands() -> dict[str, click.Command]:
    """Every console script of the package and the one command that its module defines."""
    scripts: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    scripts["embedstream cache"] = main.COMMANDS["cache"]
    found = {}
    for name, entry in sorted(scripts.items()):
        module = importlib.import_module(entry.partition(":")[0])
        (found[name],) = [value for value in vars(module).values() if isinstance(value, click.Command)]
    return found


def variables(option: click.Option) -> list[str]:
    """The environment variables that click reads for an option, the first that is set."""
    if option.envvar is None:
        if not option.allow_from_autoenv:
            return []
        assert option.name is not None
        return [f"{ENV_PREFIX}_{option.name.upper()}"]
    return [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)


def shown_options(command: click.Command) -> Iterator[click.Option]:
    """The options that people use, without those that all commands have."""
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden and option.name not in ("version", "help"):
            yield option


def page() -> str:
    """The whole page."""
    sections = [_section(name, command) for name, command in commands().items()]
    own = table(["variable", "default", "what"], [_setting(name) for name in _without_flag()])
    others = table(["variable", "what"], [[f"`{name}`".replace(", ", "`, `"), what] for name, what in OTHERS.items()])
    return (
        "\n".join([INTRODUCTION, *sections, WITHOUT_FLAGS, own, "What else programs read:\n", others]).rstrip() + "\n"
    )


def _section(name: str, command: click.Command) -> str:
    with click.Context(command, info_name=name, **command.context_settings) as context:
        rows = [_option(option, context) for option in shown_options(command)]
        usage = " ".join([name, *filter(None, command.collect_usage_pieces(context))])
    paragraphs = map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n"))
    flags = table(["flag", "variable", "default", "what"], rows) if rows else ""
    return "\n\n".join([f"## {name}\n\n```\n{usage}\n```", *paragraphs, flags]).rstrip() + "\n"


def _paragraph(text: str) -> str:
    """Of a help page: filled, unless its lines are to stay as they are."""
    kept = text.removeprefix("\b\n")
    return textwrap.fill(" ".join(text.split()), 120) if kept == text else f"```\n{kept}\n```"


def _option(option: click.Option, context: click.Context) -> list[str]:
    flags = ", ".join(option.opts)
    if not option.is_flag:
        flags += f" {option.make_metavar(context).removesuffix(' RANGE')}"
        if isinstance(option.type, click.IntRange | click.FloatRange):
            bounds = (("from", option.type.min), ("to", option.type.max))
            flags += "".join(f" {word} {bound}" for word, bound in bounds if bound is not None)
    what, _, default = (option.help or "").replace("]", "").partition("[default: ")
    if isinstance(option.show_default, str):
        default = option.show_default
    elif not default and not option.is_flag and not option.multiple and isinstance(option.default, str | int | float):
        default = f"`{option.default}`"
    named = ", ".join(f"`{name}`" for name in variables(option))
    return [f"`{flags}`", named, default.rstrip(". "), what.strip() + (" Required." if option.required else "")]


def _without_flag() -> list[str]:
    with_flag = {name for each in commands().values() for option in shown_options(each) for name in variables(option)}
    return [name for name in Settings.__struct_fields__ if f"{ENV_PREFIX}_{name.upper()}" not in with_flag]


def _setting(name: str) -> list[str]:
    default = getattr(Settings(), name)
    shown = "" if default is None else f"`{default}`"
    return [f"`{ENV_PREFIX}_{name.upper()}`", shown, field_docs(Settings).get(name, "")]


def field_docs(kind: type) -> dict[str, str]:
    """The strings below a class's fields, which exist in its source alone."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(found, ast.ClassDef)
    docs = {}
    for field, below in zip(found.body, found.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
