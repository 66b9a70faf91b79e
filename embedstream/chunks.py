"""Chunks and tokens of texts: what enters the model of each chunk, and how a producer has a process of the worker's cut
texts.

Only that process loads tokenizers. It is `embedstream_worker.planning`, to which `Cut` is one more question.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from embedstream.jobs import Chunking

Spans: TypeAlias = list[tuple[int, int]]
"""Chunks of a text, each from a character to before another."""


class Document(msgspec.Struct, frozen=True, array_like=True):
    """A text to be cut."""

    title: str
    text: str


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One token of what enters the model."""

    id: int
    text: str
    """What of the input it stands for; of a special token, its name."""
    start: int | None = None
    """Bytes of the input, in UTF-8, before it; None for a special token."""
    stop: int | None = None
    """Bytes up to its end."""


class Cut(msgspec.Struct, frozen=True, tag=True):
    """Asks for the chunks of some documents."""

    documents: list[Document]


class Chunked(msgspec.Struct, frozen=True, array_like=True):
    """Of each document its chunks, or why it has none."""

    chunks: list[Any]


def chunk_input(chunking: Chunking, title_sep: str, title: str, chunk: str) -> str:
    """What enters the model of a chunk, behind the prompt."""
    if not chunking.format:
        return f"{title}{title_sep}{chunk}" if title else chunk
    # Not `str.format`: braces of titles and of the rest of the format are what they are.
    before, _, after = chunking.format.partition("{chunk}")
    return before.replace("{title}", title) + chunk + after.replace("{title}", title)
