"""What may be shown: ids, names and messages come from corpora and Redis, and terminals obey control characters."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import click
import msgspec

from embedstream.masking import mask_text


def printable(text: str, most: int | None = None) -> str:
    """One line: at most `most` characters of `text`, with those that could play tricks on a terminal escaped."""
    cut = text[:most]
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return cut if most is None or len(text) <= most else cut + "…"


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def counted(number: int, what: str) -> str:
    """A number of things: `1 row`, `2 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"


def echo(text: str, err: bool = False) -> None:
    """Print lines for people."""
    click.echo(printable_lines(text), err=err)


def echo_json(value: object) -> None:
    """Print a value as JSON; what a terminal might obey, or lacks, is escaped, as are names that are not UTF-8:
    as halves of surrogate pairs, from which `os.fsencode` makes the name again.
    """
    try:
        text = msgspec.json.encode(value).decode()
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
    click.echo(text if text.isprintable() else json.dumps(json.loads(text), separators=(",", ":")))


def is_utf8(name: str) -> bool:
    """Whether a name that the system gave us can be written down."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


class PrintableFormatter(logging.Formatter):
    """Log records on one line each, without passwords; only a traceback has lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(mask_text(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable_lines(mask_text(super().formatException(ei)))
