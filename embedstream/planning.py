"""What `embed-submit --plan` and the process that counts tokens for it say to each other, over a pipe.

Each message is its length (4 bytes, little-endian) and MessagePack. First comes the job's spec, answered by a
`TokenCounter`; then lists of texts, each answered by their `Counted`, and perhaps a `Measure`, answered by `Measured`.
To cut texts into chunks, `Cut` is answered by `Chunked` (see `embedstream.chunks`).
"""

from __future__ import annotations

from typing import IO, TypeVar

import msgspec

from embedstream.records import Recipe

T = TypeVar("T")


class TokenCounter(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the model without loading it."""

    trouble: str = ""
    """Why tokens cannot be counted; nothing else but the fingerprint is said then."""
    recipe: Recipe | None = None
    words: str = ""
    """The recipe for people."""
    warning: str = ""
    vector_bytes: int | None = None
    """Of a row; None: not known."""
    fingerprint: str = ""
    """Of the model's folder as it is now; empty: not known."""
    tokenizer: str = ""
    """Sum of what decides where texts are cut; empty: none are."""
    max_length: int = 0
    """Tokens that the model takes, special tokens included."""
    overhead: int = 0
    """Tokens of prompt and special tokens."""


class Counted(msgspec.Struct, frozen=True, array_like=True):
    """Of some texts."""

    tokens: list[int]
    """Of each, its prompt and special tokens included, after the cut."""
    truncated: list[bool]


class Measure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks to embed some texts for some seconds."""

    texts: list[str]
    seconds: float
    flags: dict[str, str] = {}
    """Of the worker: engine, device, dtype."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    trouble: str = ""
    """Why nothing did."""
    tokens_per_second: float = 0.0
    recipe: Recipe | None = None
    words: str = ""


def send(stream: IO[bytes], message: object) -> None:
    """Raises `OSError` if the other side is gone."""
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


def receive(stream: IO[bytes], kind: type[T]) -> T | None:
    """The next message; None at the end, also in the middle of one. `kind` may be a union of types."""
    head = stream.read(4)
    size = int.from_bytes(head, "little")
    data = stream.read(size)
    return msgspec.msgpack.decode(data, type=kind) if len(head) == 4 and len(data) == size else None
