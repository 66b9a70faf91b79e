"""What enters the model for a text, and the hash by which a dataset remembers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, cast

import pyarrow as pa

from embedstream.dataset.schema import INPUT_HASH_BYTES

INPUT_CHARACTERS = 1 << 20
"""Of the inputs made at once: several usual blocks of texts, and no more memory for a long prompt than for a short."""


def model_inputs(texts: Sequence[str], prompt: str) -> Iterator[list[str]]:
    """The exact texts that enter the model, in order, at most about `INPUT_CHARACTERS` of them at once."""
    if sum(map(len, texts)) + len(texts) * len(prompt) <= INPUT_CHARACTERS:
        yield [prompt + text for text in texts] if prompt else list(texts)
        return
    inputs: list[str] = []
    size = 0
    for text in texts:
        size += len(prompt) + len(text)
        if inputs and size > INPUT_CHARACTERS:
            yield inputs
            inputs, size = [], len(prompt) + len(text)
        inputs.append(prompt + text)
    yield inputs


def strings_of(column: pa.Array[Any]) -> list[str]:
    """A string column without nulls."""
    return cast("list[str]", column.to_pylist())


def entered(rows: Any, query_field: str | None) -> list[str]:
    """What entered the model of each row of a block or of a dataset, prompt left out: the text, or the texts of a pair.

    A pair's are its first, a zero character and its second; a first that is null counts as empty.
    """
    texts = strings_of(rows.column("text"))
    if query_field is None:
        return texts
    return [f"{first or ''}\0{text}" for first, text in zip(firsts(rows, query_field), texts, strict=True)]


def firsts(rows: Any, query_field: str) -> list[str | None]:
    """The first of each pair."""
    return cast("list[str | None]", rows.column(query_field).to_pylist())


def text_digests(texts: Sequence[str], prompt: str = "") -> bytes:
    """BLAKE2b of 16 bytes over the UTF-8 of each text with the prompt in front, one after the other."""
    if not prompt:
        return b"".join([blake2b(text.encode(), digest_size=INPUT_HASH_BYTES).digest() for text in texts])
    begun, digests = blake2b(prompt.encode(), digest_size=INPUT_HASH_BYTES), []
    for text in texts:
        digest = begun.copy()
        digest.update(text.encode())
        digests.append(digest.digest())
    return b"".join(digests)


def input_hashes(texts: Sequence[str], prompt: str = "") -> pa.FixedSizeBinaryArray:
    """The column `input_hash` [n] of texts as they enter the model, prompt included."""
    buffers = [None, pa.py_buffer(text_digests(texts, prompt))]
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(INPUT_HASH_BYTES), len(texts), buffers)
    assert isinstance(array, pa.FixedSizeBinaryArray)
    return array
