"""What enters the model for a text, and the hash by which a dataset remembers it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, cast

import pyarrow as pa

from embedstream.dataset.schema import INPUT_HASH_BYTES


def model_inputs(texts: pa.Array[Any], prompt: str) -> list[str]:
    """The exact texts that enter the model. `texts`: string array without nulls; an empty prompt adds nothing."""
    strings = cast("list[str]", texts.to_pylist())
    return [prompt + text for text in strings] if prompt else strings


def text_digests(texts: Sequence[str]) -> bytes:
    """BLAKE2b of 16 bytes over the UTF-8 of each text, one after the other."""
    return b"".join([blake2b(text.encode(), digest_size=INPUT_HASH_BYTES).digest() for text in texts])


def input_hashes(inputs: Sequence[str]) -> pa.FixedSizeBinaryArray:
    """The column `input_hash` [n] of texts as they enter the model, prompt included."""
    buffers = [None, pa.py_buffer(text_digests(inputs))]
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(INPUT_HASH_BYTES), len(inputs), buffers)
    assert isinstance(array, pa.FixedSizeBinaryArray)
    return array
